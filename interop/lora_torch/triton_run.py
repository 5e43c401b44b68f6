"""Runs a `Launch` of `lora_jax.kernels.triton_plans` on torch tensors.

The first call of a kind goes through Triton's front end, which compiles. It looks at every argument each time, and to
Python that takes longer than a layer of moderate size takes a GPU: so later calls of a kind start what was compiled.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, overload

from lora_jax.kernels import triton_plans as plans
from lora_jax.kernels.triton_plans import Launch, Matrix

from .triton_start import Start, recorded

if TYPE_CHECKING:
    import torch

REMEMBERED = 4096  # kinds of calls. Each length of a sequence is one

Operands = dict[str, "torch.Tensor | None"]
_known: dict[Hashable, Any] = {}
_UNKNOWN = object()


@overload
def ready(key: Hashable, plan: Callable[[], Launch]) -> Ready: ...
@overload
def ready(key: Hashable, plan: Callable[[], Launch | None]) -> Ready | None: ...
def ready(key: Hashable, plan: Callable[[], Launch | None]) -> Ready | None:
    """What was made for `key` before, else of `plan()`. The key says of each tensor how it `lies`."""
    # One question: between two another thread may clear.
    found = _known.get(key, _UNKNOWN)
    if found is not _UNKNOWN:
        return found
    planned = plan()
    if len(_known) >= REMEMBERED:
        _known.clear()
    found = _known[key] = None if planned is None else Ready(planned)
    return found


def lies(tensor: torch.Tensor | None) -> Hashable:
    """All that a compiled kernel depends on. The device by its number, which is faster to hash: the CPU's is -1."""
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device(), tensor.data_ptr() % 16 == 0


class Ready:
    """A plan and, once it has run, the compiled kernel with the arguments that are the same in every call."""

    def __init__(self, plan: Launch):
        self.plan = plan
        self.sum: Ready | None = None
        # How it is started again, without hooks and with.
        self.again: tuple[Start, Start] | None = None

    def __call__(self, out: torch.Tensor, operands: Operands) -> torch.Tensor:
        """Fills `out`; `operands` are the other tensors by the names of their pointers, all on one device."""
        import torch

        index = out.get_device()
        # Of torch's C part, because `torch.cuda.current_device()` asks whether there is CUDA first.
        if index >= 0 and index != torch._C._cuda_getDevice():
            with torch.cuda.device(index):  # Triton launches on the current one
                return self(out, operands)
        plan = self.plan
        if plan.space:
            operands["space_ptr"] = out.new_zeros(plan.space, dtype=torch.int32)
        if plan.parts == 1:
            target = operands[plan.out] = out
        else:
            target = operands[plan.out] = out.new_empty(plan.parts * out.numel(), dtype=torch.float32)
        if self.again is None:
            self._first(operands)
        else:
            self.again[_hooked()](operands, index)
        if target is out:
            return out
        if self.sum is None:
            self.sum = Ready(plans.total(out.numel(), plan.parts))
        return self.sum(out, {"parts_ptr": target})

    def _first(self, operands: Operands) -> None:
        plan, kernel = self.plan, _kernel(self.plan.kernel)
        gluon = plan.kernel.startswith("hopper_")
        describe = {name: _descriptors(operands[name], block, gluon) for name, block in plan.blocks.items()}
        given: dict[str, Any] = operands | plan.numbers
        for name, described in describe.items():
            given[name] = described(operands[name])
        options = {"launch_cooperative_grid": True} if plan.together else {}
        compiled = kernel[(plan.programs,)](**given, num_warps=plan.warps, num_stages=plan.stages, **options)
        if compiled is None:  # the interpreter
            return
        names = [parameter.name for parameter in kernel.params]
        tensors = [name if operands.get(name) is not None else None for name in names]
        quick = recorded(compiled, plan.programs, [given[name] for name in names], tensors, describe)
        fixed = [given[name] if tensor is None else None for name, tensor in zip(names, tensors, strict=True)]
        launch = compiled[plan.programs, 1, 1]

        def with_hooks(operands: Operands, index: int) -> None:
            arguments = fixed.copy()
            for at, name in enumerate(tensors):
                if name is not None:
                    tensor = operands[name]
                    arguments[at] = describe[name](tensor) if name in describe else tensor
            launch(*arguments)

        # At once, since another thread may be here too, and a third one start what there is.
        self.again = quick or with_hooks, with_hooks


@functools.cache
def _runtime() -> Any:
    from triton import knobs

    return knobs.runtime


def _hooked() -> bool:
    """Whether a profiler, say, is to be told of launches."""
    runtime = _runtime()
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    # Chains of hooks, mostly empty ones; None or a function in older versions.
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _descriptors(like: Any, block: tuple[int, int], gluon: bool) -> Callable[[Any], Any]:
    """Makes descriptors of tensors that lie as `like` does, without checking each anew."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    kind: Any = TensorDescriptor
    arguments = [like, list(like.shape), list(like.stride()), list(block)]
    if gluon:
        import triton.language as tl
        from triton.experimental.gluon.language import NVMMASharedLayout
        from triton.experimental.gluon.nvidia import hopper

        kind = hopper.TensorDescriptor
        arguments.append(NVMMASharedLayout.get_default_for(list(block), tl.float16))  # any of 16 bits
    template = vars(kind(*arguments))
    rest = {name: value for name, value in template.items() if name != "base"}

    def describe(tensor: Any) -> Any:
        made = kind.__new__(kind)
        made.__dict__.update(rest, base=tensor)
        return made

    return describe


@functools.cache
def _kernel(name: str) -> Any:
    """`<name>_kernel` of `lora_jax/kernels/triton_<name>.py`, which imports triton."""
    try:
        return getattr(importlib.import_module(f"lora_jax.kernels.triton_{name}"), f"{name}_kernel")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ModuleNotFoundError("the Triton kernels need triton: install `lora-jax[triton]`", name="triton") from None


@functools.cache
def interpreting() -> bool:
    """Whether Triton runs kernels on the CPU. It decides when a kernel is imported, so the answer never changes."""
    return "Interpreted" in type(_kernel("sum")).__name__


@functools.cache
def sms(device: int | None) -> int:
    """Multiprocessors of a CUDA device; 4 stands in for them under the interpreter."""
    import torch

    return 4 if device is None else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _has_tma(device: int | None) -> bool:
    """Whether the device copies tiles by descriptor (Hopper and later); the interpreter does."""
    import torch

    return device is None or torch.cuda.get_device_capability(device)[0] >= 9


def seen(tensor: torch.Tensor) -> Matrix:
    """Rows of a descriptor begin at multiples of 16 bytes, and so must the first."""
    (rows, columns), (row, column) = tensor.shape, tensor.stride()
    tma = tensor.data_ptr() % 16 == 0 and _has_tma(tensor.device.index)
    return Matrix((rows, columns), (row, column), tensor.element_size(), tma)


@functools.cache
def has_hopper_kernels(device: int | None) -> bool:
    """Whether the device is of the one kind that `triton_hopper_*` are for, and this Triton can compile it."""
    import torch

    if device is None or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    try:
        from triton.experimental.gluon.language import warp_specialize
    except ImportError:
        return False
    return "functions_and_args" in inspect.signature(warp_specialize).parameters  # Triton 3.6 and later
