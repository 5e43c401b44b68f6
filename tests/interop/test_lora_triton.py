"""The adapted linear on the Triton kernels, run by Triton's interpreter. On a GPU: `test_lora_gpu.py`."""

import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts  # noqa: E402

from lora_torch.lora import LoRATritonFunction, patch_linear_module  # noqa: E402
from lora_torch.triton_linear import lora_linear  # noqa: E402
from tests.interop.lora_problem import SCALE, check, linear, randomise, relative, run, tensors  # noqa: E402
from tests.interop.test_lora_patch import Int8Linear  # noqa: E402
from tests.kernels.triton_problem import mask  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned")


def layer(k=24, n=40, dtype=torch.float32, bias=True, **options):
    return randomise(patch_linear_module(linear(k, n, dtype, bias), 4, 7, **options))


# Odd sizes go by pointers, multiples of 8 by descriptors.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape,k,n,efficient", [((33,), 21, 35, True), ((2, 17), 24, 40, False)])
def test_values_and_gradients(dtype, shape, k, n, efficient):
    made = layer(k, n, dtype, bias=efficient, use_memory_efficient_lora=efficient)
    x, dy = tensors(*shape, k, n=n, dtype=dtype)
    check(run(made, x, dy), made, x, dy, SCALE)


def test_strides_and_changes_in_place():
    made = layer()
    x, dy = tensors(3, 6, 24, n=40)
    turned = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    y = made(turned)
    y.mul_(2)
    y.backward(dy)
    grads = {"x": turned.grad, "a": made.lora_A.weight.grad, "b": made.lora_B.weight.grad}
    found = {name: value.detach() / 2 for name, value in {"y": y, **grads}.items() if value is not None}
    assert len(found) == 4
    check(found, made, x, dy, SCALE)
    wide = torch.randn(6, 48)[:, ::2]
    assert torch.allclose(made(wide), made(wide.contiguous()), atol=1e-6)
    assert made(torch.ones(2, 0, 24)).shape == (2, 0, 40)


@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_dropout(monkeypatch, post, keep):
    """The mask is the specified one, the same in both passes, without being kept."""
    made = layer(use_memory_efficient_lora=not keep, dropout=0.4, dropout_position="post" if post else "pre")
    x, dy = tensors(30, 24, n=40)
    made.eval()
    check(run(made, x, dy), made, x, dy, SCALE)
    made.train()
    state = torch.get_rng_state()
    seed = torch.randint(-(2**31), 2**31, (4,), dtype=torch.int32).tolist()[:2]
    torch.set_rng_state(state)
    found = run(made, x, dy)
    drawn = mask(30, 40 if post else 24, 0.4, seed=tuple(word % 2**32 for word in seed))
    check(found, made, x, dy, SCALE, *((None, drawn) if post else (drawn, None)))
    with pytest.raises(AssertionError):
        check(found, made, x, dy, SCALE)
    assert not torch.equal(made(x), found["y"])  # other bits the next time


def test_only_what_is_wanted():
    made = layer()
    x, dy = tensors(9, 24, n=40)
    made.lora_A.requires_grad_(False)
    made(x.detach()).backward(dy)
    assert made.lora_A.weight.grad is None and made.lora_B.weight.grad.any() and x.grad is None


@pytest.mark.parametrize("bias", [False, True])
def test_checkpoints_that_keep_products(bias):
    """What the policy keeps of a layer, nobody may change after."""
    made = layer(bias=bias)
    x, dy = tensors(2, 5, 24, n=40)
    keep = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    y = checkpoint(
        lambda x: made(x).mul(2), x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(keep)
    )
    y.backward(dy / 2)
    check({"y": y / 2, "x": x.grad, "a": made.lora_A.weight.grad, "b": made.lora_B.weight.grad}, made, x, dy, SCALE)


# The second layer of a model under autocast has the dtype of the first one's result, and a weight of its own.
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16])
def test_autocast(x_dtype):
    made = layer()
    x, dy = tensors(2, 5, 24, n=40, dtype=x_dtype)
    with torch.autocast("cpu", dtype=torch.float16):
        y = made(x)
        y.backward(dy.half())
    assert y.dtype == torch.float16
    grads = {"x": x.grad, "a": made.lora_A.weight.grad, "b": made.lora_B.weight.grad}
    for name, value in grads.items():
        assert value.dtype == (x_dtype if name == "x" else torch.float32)
    # In float16 all operands, so that the bounds are its.
    check({"y": y, **grads}, made, x.detach().half(), dy.half(), SCALE)
    with pytest.raises(TypeError, match=r"`x` is torch\.float64: the Triton kernels take"):
        with torch.autocast("cpu", dtype=torch.float16):
            made(x.double())


def test_a_backward_pass_under_autocast():
    """What was computed in float32 has its gradients in float32, in the full precision."""
    made = layer()
    x, dy = tensors(5, 24, n=40)
    y = made(x)
    a, b = made.lora_A.weight, made.lora_B.weight
    with torch.autocast("cpu", dtype=torch.float16):
        y.backward(dy)
        low = LoRATritonFunction.apply(x, a, b, SCALE, torch.float32)
        (dx,) = torch.autograd.grad(low, x, dy)
    assert low.dtype == torch.float32
    check({"y": y, "x": x.grad, "a": a.grad, "b": b.grad}, made, x, dy, SCALE)
    check({"y": low + F.linear(x, made.weight, made.bias), "x": dx + dy @ made.weight}, made, x, dy, SCALE)


def test_a_base_that_is_to_be_trained():
    made = layer()
    made.layer_name = "block.q_proj"
    x, _ = tensors(3, 24, n=40)
    for parameter in (made.weight, made.bias):
        parameter.requires_grad_(True)
        with pytest.raises(NotImplementedError, match=r"^block\.q_proj: weight or bias are to be trained"):
            made(x)
        with torch.no_grad():
            y = made(x)
        parameter.requires_grad_(False)
        assert torch.equal(made(x), y)


def kept(call) -> list[tuple[int, ...]]:
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        call()
    return sorted(shapes)


def test_what_is_kept():
    x, _ = tensors(7, 24, n=40)
    efficient, other = layer(), layer(use_memory_efficient_lora=False)
    wanted = [(7, 24), (40, 24), (4, 24), (40, 4)]
    assert kept(lambda: efficient(x)) == sorted(wanted)
    assert kept(lambda: other(x)) == sorted([*wanted, (7, 4)])


@pytest.mark.parametrize("with_res", [False, True])
def test_the_branch_alone(with_res):
    base = linear(24, 40)
    made = layer()
    x, dy = tensors(2, 5, 24, n=40)
    a, b = made.lora_A.weight, made.lora_B.weight
    res = F.linear(x, base.weight.detach(), base.bias.detach()) if with_res else None
    y = LoRATritonFunction.apply(x, a, b, SCALE, x.dtype, *([res] if with_res else []))
    y.backward(dy)
    found = {"y": y, "x": x.grad, "a": a.grad, "b": b.grad}
    if not with_res:
        found["y"] = y + F.linear(x, base.weight, base.bias)
        found["x"] = found["x"] + F.linear(dy, base.weight.T)
    check(found, made, x, dy, SCALE)
    assert kept(lambda: LoRATritonFunction.apply(x, a, b, SCALE, x.dtype)) == sorted([(2, 5, 24), (4, 24), (40, 4)])
    assert LoRATritonFunction.apply(x, a, b, SCALE, torch.float16).dtype == torch.float16


@pytest.mark.parametrize("options", [{"use_dora": True}, {"dropout": 0.0, "lora_dtype": "float16"}])
def test_the_same_as_without_triton(options):
    made, plain = (randomise(patch_linear_module(linear(24, 40), 4, use_triton=t, **options)) for t in (True, False))
    x, dy = tensors(9, 24, n=40)
    want = run(plain, x, dy)
    for name, value in run(made, x, dy).items():
        assert value.dtype == want[name].dtype
        # A gradient is rounded once, to its factor's dtype.
        assert relative(value, want[name]) <= (1e-5 if value.dtype == torch.float32 else 2**-10), name


def test_a_quantised_base():
    made = patch_linear_module(Int8Linear(nn.Linear(24, 40)), 4, lora_dtype="float32")
    plain = patch_linear_module(Int8Linear(nn.Linear(24, 40)), 4, lora_dtype="float32", use_triton=False)
    plain.load_state_dict(randomise(made).state_dict())
    x = torch.randn(5, 24)
    assert torch.allclose(made(x), plain(x), atol=1e-5)


class Doubled(nn.Linear):
    """A dense weight, and a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_forward_of_its_own():
    made, plain = (randomise(patch_linear_module(Doubled(24, 40), 4, use_triton=t)) for t in (True, False))
    made.load_state_dict(plain.state_dict())
    x = torch.randn(5, 24)
    base = 2 * F.linear(x, plain.weight, plain.bias)
    low = plain.scale * x @ plain.lora_A.weight.T @ plain.lora_B.weight.T
    assert torch.allclose(made(x), base + low, atol=1e-4) and torch.allclose(plain(x), base + low, atol=1e-4)
    assert (base / 2).abs().max() > 0.1 and low.abs().max() > 0.1
    with pytest.raises(NotImplementedError, match="the base has a forward of its own"):
        plain.materialize_effective_weight()


@pytest.mark.parametrize("dora", [False, True])  # the whole layer, and the branch alone
def test_double_backward_is_refused(dora):
    made = layer(use_dora=dora)
    x, _ = tensors(3, 24, n=40)
    # The gradient of a plain sum waits for none itself: torch's own mark lets the penalty's pass for a constant.
    for y in (made(x).square(), made(x)):
        (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice: write use_triton=False"):
            torch.autograd.grad(grad.square().sum() + y.sum(), made.lora_A.weight)


# Dynamo, tracing an autograd function, does what torch warns of.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled():
    made = layer(dropout=0.5)
    x, dy = tensors(4, 24, n=40)
    made.eval()
    want = run(made, x, dy)
    graph = torch.compile(made, backend="aot_eager", fullgraph=True)
    for name, value in run(graph, x, dy).items():
        assert torch.equal(value, want[name]), name
    check(want, made, x, dy, SCALE)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_the_operations_are_registered_as_they_are():
    from lora_torch import triton_ops as ops

    x, a, words = torch.randn(4, 24), torch.randn(24, 3), torch.tensor([1, 2, 0, 0], dtype=torch.int32)
    w, h, b = torch.randn(24, 40), torch.randn(4, 3), torch.randn(3, 40)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops._down, (x, a, 2.0, 0.5, words), test_utils=utils)
    torch.library.opcheck(ops._outer, (h, x, 0.0, None, torch.float32, True), test_utils=utils)
    torch.library.opcheck(ops._adapted, (x, w.T, a.T, b.T, None, 2.0, True), test_utils=utils)
    torch.library.opcheck(ops._product, (x, w, h, b, None, 0.0, None, False), test_utils=utils)
    torch.library.opcheck(ops._product, (x, w.T, h, b.T, None, 0.5, words, True), test_utils=utils)


def test_what_the_kernels_refuse():
    made = layer()
    with pytest.raises(TypeError, match="x is torch.float16 and the weight torch.float32: cast one"):
        made(torch.ones(2, 24, dtype=torch.float16))
    with pytest.raises(RuntimeError, match="interpreter multiplies bfloat16 wrongly"):
        layer(dtype=torch.bfloat16)(torch.ones(2, 24, dtype=torch.bfloat16))
    named = patch_linear_module(nn.Linear(24, 8), layer_name="block.up")
    with pytest.raises(TypeError, match="block.up: `x` is torch.float64: the Triton kernels take"):
        with torch.autocast("cpu", dtype=torch.float16):
            named(torch.ones(2, 24, dtype=torch.float64))
    with pytest.raises(TypeError, match="float64: the Triton kernels take"):
        x = torch.ones(2, 24, dtype=torch.float64)
        lora_linear(x, x[:1].expand(8, 24), None, x[:1], x[:1, :1].expand(8, 1), 1.0)


def test_no_gpu_and_no_interpreter():
    code = """
import torch
from lora_torch.lora import PeftConfig, apply_lora_to_linear_modules
model = torch.nn.ModuleDict({"block": torch.nn.Sequential(torch.nn.Linear(4, 4))})
apply_lora_to_linear_modules(model, PeftConfig(match_all_linear=True, use_triton=True))
try:
    model["block"](torch.ones(2, 4))
except RuntimeError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("block.0: use_triton=True needs a CUDA GPU, and `x` is on cpu. Move model and data")
    assert "set TRITON_INTERPRET=1" in done.stdout
