"""Compiles the Triton kernels for a Hopper GPU on a machine that has none, and reads what the machine code needs.

    python -m tests.kernels.triton_compiled [--ranks 16 64] [--large]

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

HOPPER = GPUTarget("cuda", 90, 32)


@dataclass(frozen=True)
class Needs:
    """Of one program: shared memory in bytes, registers a thread, bytes spilled a thread."""

    shared: int
    registers: int
    spilled: int


def gemm(config: GemmConfig, *, r: int, drop: bool, w_t: bool) -> Needs:
    """bfloat16, by descriptors."""
    rp = padded(r)
    types = {
        "x_ptr": f"tensordesc<bf16[{config.bm},{config.bk}]>",
        "w_ptr": f"tensordesc<bf16[{config.bn},{config.bk}]>" if w_t else f"tensordesc<bf16[{config.bk},{config.bn}]>",
        "y_ptr": f"tensordesc<bf16[{config.bm},{config.bn // config.chunks}]>",
        "h_ptr": "*bf16",
        "b_ptr": "*bf16",
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
        "PREFETCH": config.prefetch(rp, 2),
        "BIAS": False,
        "DROP": drop,
        "W_T": w_t,
        "TMA": True,
    }
    unit = ["stride_xk", "stride_hr", "stride_bn", "stride_yn", "stride_wk" if w_t else "stride_wn"]
    return _compiled(gemm_kernel, types, constants, unit, config)


def down(config: PassConfig, *, r: int, drop: bool, split: int) -> Needs:
    """bfloat16; the factor's rows contiguous along K, as PyTorch stores it."""
    x = f"tensordesc<bf16[{config.rows},{config.columns}]>" if config.tma else "*bf16"
    out = "*bf16" if split == 1 else "*fp32"
    types = {"x_ptr": x, "a_ptr": "*bf16", "h_ptr": out, "seed_ptr": "*i32" if drop else None, "scale": "fp32"}
    constants = {"BM": config.rows, "BK": config.columns} | _pass_constants(config, r, drop, split)
    return _compiled(down_kernel, types, constants, ["stride_xk", "stride_ak", "stride_hr"], config)


def outer(config: PassConfig, *, r: int, drop: bool, split: int) -> Needs:
    """bfloat16, with a float32 result."""
    v = f"tensordesc<bf16[{config.rows},{config.columns}]>" if config.tma else "*bf16"
    types = {"t_ptr": "*bf16", "v_ptr": v, "out_ptr": "*fp32", "seed_ptr": "*i32" if drop else None, "scale": "fp32"}
    constants = {"BM": config.rows, "BC": config.columns} | _pass_constants(config, r, drop, split)
    return _compiled(outer_kernel, types, constants, ["stride_tr", "stride_vc", "stride_oc"], config)


def shipped(ranks: list[int], large: bool) -> Iterator[tuple[str, Any, dict[str, Any], Any]]:
    """(kernel, configuration, the rest, a function that compiles it) for what a call in bfloat16 can get.

    `large`: only large layers, and one layout of the weight.
    """
    sizes = [(8192, 4096, 4096)] if large else [(8192, 4096, 4096), (512, 2048, 4096), (100, 64, 64)]
    for r, drop in itertools.product(ranks, [False, True]):
        for size, w_t in itertools.product(sizes, [False] if large else [False, True]):
            config = triton_configs.gemm_config(*size, r, 2, dropout=drop)
            yield "gemm", config, {"r": r, "drop": drop, "w_t": w_t}, gemm
        config = triton_configs.down_config(8192, 4096, r, 2, dropout=drop)
        yield "down", config, {"r": r, "drop": drop, "split": 2}, down
        config = triton_configs.outer_config(8192, 4096, r, 2, dropout=drop)
        yield "outer", config, {"r": r, "drop": drop, "split": 2}, outer


def _pass_constants(config: PassConfig, r: int, drop: bool, split: int) -> dict[str, Any]:
    return {"R": r, "RP": padded(r), "SPLIT": split, "DROP": drop, "TMA": config.tma}


def _compiled(
    kernel: Any, types: dict[str, str | None], constants: dict[str, Any], unit: list[str], config: Any
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
        target=HOPPER,
        options={"num_warps": config.warps, "num_stages": config.stages},
    )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(built.asm["ptx"])
        command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "-o", "/dev/null", str(source)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    assert registers and spilled, said
    return Needs(built.metadata.shared, int(registers[1]), int(spilled[1]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--large", action="store_true")
    arguments = parser.parse_args()
    for kernel, config, rest, build in shipped(arguments.ranks, arguments.large):
        needs = build(config, **rest)
        print(json.dumps({"kernel": kernel, "config": str(config), **rest, **asdict(needs)}), flush=True)
