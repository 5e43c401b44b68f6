"""Compiles the Triton kernels for a GPU on a machine that has none, and reads what the machine code needs.

    python -m tests.kernels.triton_compiled [--arch 90] [--dtype bf16] [--ranks 16 64] [--large]

prints a JSON line for each shipped configuration.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lora_jax.kernels import triton_configs
from lora_jax.kernels.triton_configs import GemmConfig, PassConfig, padded
from lora_jax.kernels.triton_down import down_kernel
from lora_jax.kernels.triton_gemm import gemm_kernel
from lora_jax.kernels.triton_outer import outer_kernel

# Compute capability -> shared memory of one program in bytes: A100, Ada, Hopper.
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}


@dataclass(frozen=True)
class Needs:
    """Of one program: shared memory in bytes, registers a thread, bytes spilled a thread."""

    shared: int
    registers: int
    spilled: int


def gemm(config: GemmConfig, *, arch: int, dtype: str, r: int, drop: bool, w_t: bool) -> Needs:
    """16-bit types go by descriptors on Hopper."""
    rp, tma = padded(r), arch >= 90 and dtype != "fp32"
    w_block = (config.bn, config.bk) if w_t else (config.bk, config.bn)
    types = {
        "x_ptr": _tensor(dtype, (config.bm, config.bk) if tma else None),
        "w_ptr": _tensor(dtype, w_block if tma else None),
        "y_ptr": _tensor(dtype, (config.bm, config.bn // config.chunks) if tma else None),
        "h_ptr": f"*{dtype}",
        "b_ptr": f"*{dtype}",
        "bias_ptr": None,
        "seed_ptr": "*i32" if drop else None,
        "tail_scale": "fp32",
    }
    constants: dict[str, Any] = {
        "R": r,
        "RP": rp,
        "BM": config.bm,
        "BN": config.bn,
        "BK": config.bk,
        "GROUP": config.group,
        "CHUNKS": config.chunks,
        "PREFETCH": config.prefetch(rp, 4 if dtype == "fp32" else 2),
        "BIAS": False,
        "DROP": drop,
        "W_T": w_t,
        "TMA": tma,
    }
    unit = ["stride_xk", "stride_hr", "stride_bn", "stride_yn", "stride_wk" if w_t else "stride_wn"]
    return _compiled(gemm_kernel, types, constants, unit, config, arch)


def down(config: PassConfig, *, arch: int, dtype: str, r: int, drop: bool, split: int) -> Needs:
    """The factor's rows contiguous along K, as PyTorch stores it."""
    types = {
        "x_ptr": _tensor(dtype, (config.rows, config.columns) if config.tma else None),
        "a_ptr": f"*{dtype}",
        "h_ptr": f"*{dtype}" if split == 1 else "*fp32",
        "seed_ptr": "*i32" if drop else None,
        "scale": "fp32",
    }
    constants = {"BM": config.rows, "BK": config.columns} | _pass_constants(config, r, drop, split)
    return _compiled(down_kernel, types, constants, ["stride_xk", "stride_ak", "stride_hr"], config, arch)


def outer(config: PassConfig, *, arch: int, dtype: str, r: int, drop: bool, split: int) -> Needs:
    types = {
        "t_ptr": f"*{dtype}",
        "v_ptr": _tensor(dtype, (config.rows, config.columns) if config.tma else None),
        "out_ptr": "*fp32",
        "seed_ptr": "*i32" if drop else None,
        "scale": "fp32",
    }
    constants = {"BM": config.rows, "BC": config.columns} | _pass_constants(config, r, drop, split)
    return _compiled(outer_kernel, types, constants, ["stride_tr", "stride_vc", "stride_oc"], config, arch)


def _tensor(dtype: str, block: tuple[int, int] | None) -> str:
    """The type of a pointer, or of a descriptor of blocks."""
    return f"tensordesc<{dtype}[{block[0]},{block[1]}]>" if block else f"*{dtype}"


def shipped(arch: int, dtype: str, ranks: list[int], large: bool) -> Iterator[tuple[str, Any, dict[str, Any], Any]]:
    """(kernel, configuration, the rest, a function that compiles it) for what a call can get.

    `large`: only large layers, and one layout of the weight.
    """
    sizes = [(8192, 4096, 4096)] if large else [(8192, 4096, 4096), (512, 2048, 4096), (100, 64, 64)]
    itemsize = 4 if dtype == "fp32" else 2
    for r, drop in itertools.product(ranks, [False, True]):
        rest = {"arch": arch, "dtype": dtype, "r": r, "drop": drop}
        chosen = {"dropout": drop, "tma": arch >= 90 and itemsize == 2}
        for size, w_t in itertools.product(sizes, [False] if large else [False, True]):
            yield "gemm", triton_configs.gemm_config(*size, r, itemsize, **chosen), rest | {"w_t": w_t}, gemm
        yield "down", triton_configs.down_config(8192, 4096, r, itemsize, **chosen), rest | {"split": 2}, down
        yield "outer", triton_configs.outer_config(8192, 4096, r, itemsize, **chosen), rest | {"split": 2}, outer


def _pass_constants(config: PassConfig, r: int, drop: bool, split: int) -> dict[str, Any]:
    return {"R": r, "RP": padded(r), "SPLIT": split, "DROP": drop, "TMA": config.tma}


def _compiled(
    kernel: Any, types: dict[str, str | None], constants: dict[str, Any], unit: list[str], config: Any, arch: int
) -> Needs:
    """Sizes and strides count as multiples of 16, as for all large layers, and `unit` strides as 1."""
    constants = constants | {name: 1 for name in unit} | {name: None for name, kind in types.items() if kind is None}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "i32")
        if signature[name] == "i32" and name != "threshold" or signature[name].startswith("*"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    built = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": config.warps, "num_stages": config.stages},
    )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(built.asm["ptx"])
        command = [
            triton.knobs.nvidia.ptxas.path,
            "-v",
            f"--gpu-name=sm_{arch}{'a' if arch == 90 else ''}",
            "-o",
            "/dev/null",
            str(source),
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    assert registers and spilled, said
    return Needs(built.metadata.shared, int(registers[1]), int(spilled[1]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--arch", type=int, default=90, choices=SHARED)
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16", "fp32"])
    arguments = parser.parse_args()
    for kernel, config, rest, build in shipped(arguments.arch, arguments.dtype, arguments.ranks, arguments.large):
        needs = build(config, **rest)
        print(json.dumps({"kernel": kernel, "config": str(config), **rest, **asdict(needs)}), flush=True)
