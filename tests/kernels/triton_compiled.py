"""Compiles the Triton kernels for a GPU on a machine that has none, and reads what the machine code needs.

    python -m tests.kernels.triton_compiled [--arch 90] [--dtype bf16] [--ranks 16 64] [--large] [--jax]

prints a JSON line for each shipped configuration: as PyTorch launches it or, with `--jax`, as `triton_lora` does.
"""

from __future__ import annotations

import argparse
import importlib
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
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout

from lora_jax.kernels import triton_plans as plans
from lora_jax.kernels.triton_configs import SHARED_BYTES
from lora_jax.kernels.triton_plans import Launch, Matrix

SMS = {80: 108, 89: 128, 90: 132}  # A100, Ada, Hopper


@dataclass(frozen=True)
class Needs:
    """Of one program: shared memory in bytes, registers a thread, bytes spilled a thread."""

    shared: int
    registers: int
    spilled: int


def shipped(arch: int, dtype: str, ranks: list[int], large: bool, by_jax: bool) -> Iterator[Launch]:
    """What a call can get. `large`: only large layers, and one layout of the weight.

    PyTorch stores the weight and both factors the other way round, has descriptors on Hopper, and leaves `gemm` to JAX.
    """
    sizes = [(8192, 4096, 4096)] if large else [(8192, 4096, 4096), (512, 2048, 4096), (100, 64, 64)]
    itemsize, sms = 4 if dtype == "fp32" else 2, SMS[arch]

    def matrix(rows: int, columns: int, *, other_way: bool = False) -> Matrix:
        if other_way:
            return matrix(columns, rows).T
        return Matrix((rows, columns), (columns, 1), itemsize, tma=arch >= 90 and not by_jax)

    for r, threshold in itertools.product(ranks, [0, 6554]):
        for (m, k, n), w_t in itertools.product(sizes if by_jax else [], [False] if large else [False, True]):
            yield plans.gemm(
                matrix(m, k), matrix(k, n, other_way=w_t), matrix(m, r), matrix(r, n), matrix(m, n), threshold, sms,
                shared=SHARED_BYTES[divmod(arch, 10)],
            )  # fmt: skip
        m, k, _ = sizes[0]
        if not by_jax:
            yield plans.up(matrix(m, r), matrix(r, k, other_way=True), matrix(m, k), threshold, bias=True)
            if arch == 90 and itemsize == 2 and not threshold and r == ranks[-1]:  # its registers do not depend on r
                for other_way in (True,) if large else (True, False):
                    w, b = matrix(k, k, other_way=other_way), matrix(r, k, other_way=other_way)
                    yield plans.hopper_gemm(matrix(m, k), w, matrix(m, r), b, sms, bias=other_way)
                    thin, tail = matrix(k, 16, other_way=other_way), matrix(16, k, other_way=other_way)
                    yield plans.hopper_adapted(matrix(m, k), w, thin, tail, 4.0, sms, bias=other_way)
        yield plans.down(matrix(m, k), matrix(k, r, other_way=not by_jax), 1.0, threshold, sms)
        yield plans.outer(matrix(m, r), matrix(m, k), threshold, sms, transposed=by_jax)


def _layout(rows: int, columns: int) -> str:
    """How a block lies in shared memory, as Gluon spells it in a signature."""
    return f",{NVMMASharedLayout.get_default_for([rows, columns], triton.language.float16)!r}"


def compiled(plan: Launch, *, arch: int, dtype: str, by_jax: bool) -> Needs:
    """Sizes and strides by what they are multiples of, as Triton does it, or all of them as constants."""
    kernel = getattr(importlib.import_module(f"lora_jax.kernels.triton_{plan.kernel}"), f"{plan.kernel}_kernel")
    gluon = plan.kernel.startswith("hopper_")
    pointers = {parameter.name: f"*{dtype}" for parameter in kernel.params if parameter.name.endswith("_ptr")} | {
        name: f"tensordesc<{dtype}[{rows},{columns}]{_layout(rows, columns) if gluon else ''}>"
        for name, (rows, columns) in plan.blocks.items()
    }
    pointers |= {"seed_ptr": "*i32" if plan.numbers.get("DROP") else "*i8", "space_ptr": "*i32"}
    if plan.kernel == "outer" or plan.parts > 1:
        pointers[plan.out] = "*fp32"
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, plan.numbers.get(parameter.name)
        if name in pointers:
            signature[name] = pointers[name]
        elif by_jax or parameter.is_constexpr or value == 1 and not parameter.do_not_specialize:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if signature[name].startswith("*") or signature[name] == "i32" and value and value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    built = triton.compile(
        (GluonASTSource if gluon else ASTSource)(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": plan.warps, "num_stages": plan.stages},
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
    parser.add_argument("--jax", action="store_true")
    parser.add_argument("--arch", type=int, default=90, choices=SMS)
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16", "fp32"])
    arguments = parser.parse_args()
    how: dict[str, Any] = {"arch": arguments.arch, "dtype": arguments.dtype, "by_jax": arguments.jax}
    for plan in shipped(ranks=arguments.ranks, large=arguments.large, **how):
        needs = compiled(plan, **how)
        print(json.dumps({**how, **asdict(plan), **asdict(needs)}), flush=True)
