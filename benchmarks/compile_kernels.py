"""Compiles every shipped Hopper kernel to sm_90a machine code, on a machine without a GPU.

    python3.12 -m venv aot && aot/bin/pip install -e . && V=$(aot/bin/python -c "import jax; print(jax.__version__)")
    aot/bin/pip install --no-deps jax-cuda13-plugin==$V jax-cuda13-pjrt==$V
    aot/bin/pip install nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt
    PYTHONPATH=. aot/bin/python benchmarks/compile_kernels.py [--only WORD]

Lowering, which the tests do, stops before NVIDIA's assembler; this goes through it and prints of each kernel the
registers and the shared memory of a CTA and the bytes spilled to memory. The exit status is 1 if a kernel spills, does
not compile, asks for more shared memory than a CTA has, or multiplies step by step: where the assembler can't tell that
nobody touches an accumulator, it waits after every single product, several times slower, and only says so in a remark.
A few seconds a kernel; not part of the tests.
"""

from __future__ import annotations

import argparse
import glob
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CTA_SHARED_BYTES = 227 * 1024
# What XLA asks of a GPU before it compiles for one: an H100.
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3350000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 85000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
device_description_str: "NVIDIA H100"
"""


def environment(dumps: str) -> dict[str, str]:
    """For a process that compiles: the assembler's folder, and no question about a driver."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) / "cu13" for root in (spec.submodule_search_locations if spec else None) or []]
    tools = next((root for root in roots if (root / "bin" / "ptxas").exists()), None)
    if tools is None:
        sys.exit("ptxas was not found: `pip install nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt`.")
    return {
        **os.environ,
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "PATH": f"{tools / 'bin'}:{os.environ['PATH']}",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_cuda_data_dir={tools}",
        "MOSAIC_GPU_DUMP_TO": dumps,
        "MOSAIC_GPU_DUMP_PTXAS": "1",
    }


def compile_rank(rank: int, only: str) -> bool:
    """Prints a line a kernel; whether all is well. In a process with `environment`."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from tests.kernels import shipped

    topology = topologies.get_topology_desc(platform="cuda", target_config=TARGET, topology="1x1x1")
    everywhere = NamedSharding(Mesh(np.array(topology.devices), ("x",)), PartitionSpec())
    good = True
    for kernel in shipped.kernels(rank):
        if only not in kernel.name:
            continue
        start = time.perf_counter()
        try:
            traced = jax.jit(kernel.run).trace(*shipped.abstract(kernel, sharding=everywhere))
            traced.lower().compile(compiler_options={"xla_gpu_autotune_level": 0})
        except Exception as error:  # any of them is a finding, and the other kernels are still of interest
            print(f"FAILED {kernel.name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            good = False
            continue
        registers, spills, shared, remarks = assembled(os.environ["MOSAIC_GPU_DUMP_TO"])
        fits = spills == 0 and shared <= CTA_SHARED_BYTES and not remarks
        good &= fits
        seconds = time.perf_counter() - start
        print(
            f"{'ok' if fits else 'FAILED'} {registers} registers, {spills} bytes spilled, {shared} bytes shared, "
            f"{seconds:.0f} s: {kernel.name}",
            *remarks,
            sep="\n    ",
            flush=True,
        )
    return good


def assembled(dumps: str) -> tuple[int, int, int, list[str]]:
    """Registers, spilled and shared bytes of the one kernel whose dumps lie there, and the assembler's remarks on its
    speed; removes the dumps."""
    text, remarks = "", []
    for path in sorted(glob.glob(f"{dumps}/*")):
        if path.endswith(".ptx"):
            # By itself, because what Mosaic keeps of the assembler's output lacks the remarks.
            done = subprocess.run(
                ["ptxas", "-arch=sm_90a", "-o", os.devnull, path], capture_output=True, text=True, check=True
            )
            remarks += re.findall(r"Potential Performance Loss.*", done.stdout + done.stderr)
        if path.endswith((".ptxas", ".before_layout_inference.txt")):
            text += Path(path).read_text()
        os.remove(path)

    def numbers(pattern: str) -> list[int]:
        found = [int(n) for n in re.findall(pattern, text)]
        if not found:
            raise RuntimeError(f"no {pattern!r} in what Mosaic and the assembler wrote: {text[:300]!r}")
        return found

    return (
        max(numbers(r"Used (\d+) registers")),
        sum(numbers(r"(\d+) bytes spill")),
        max(numbers(r"dynamic_shared_memory_size %c(\d+)_i32")),
        remarks,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 128, 192, 256], help="as padded")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        sys.exit(not compile_rank(options.rank, options.only))
    failed = []
    for rank in options.ranks:
        with tempfile.TemporaryDirectory() as dumps:
            command = [sys.executable, __file__, "--rank", str(rank), "--only", options.only]
            # Mosaic complains there, for each kernel, that it can't disassemble it as well.
            done = subprocess.run(command, env=environment(dumps), stderr=subprocess.PIPE, text=True)
            if done.returncode:
                failed.append(rank)
                print(*(line for line in done.stderr.splitlines()[-20:] if "nvdisasm" not in line), sep="\n")
    sys.exit(f"not well: ranks {failed}" if failed else 0)


if __name__ == "__main__":
    main()
