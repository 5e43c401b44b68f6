"""Fused MLPs against the same MLP layer by layer, and what they keep."""

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts  # noqa: E402

from lora_torch.lora import PeftConfig, apply_lora_to_linear_modules  # noqa: E402
from lora_torch.mlp import (  # noqa: E402
    FusedLoRAMLP,
    fused_lora_relu2_mlp,
    fused_lora_swiglu_mlp,
    install_fused_lora_mlp,
)
from tests.interop.lora_problem import randomise, relative, tensors  # noqa: E402
from tests.interop.test_lora_triton import kept  # noqa: E402

K, WIDE, TOLERANCE = 12, 20, 1e-5


class SwiGLU(nn.Module):
    def __init__(self, act=F.silu, bias=False):
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj, self.up_proj = nn.Linear(K, WIDE, bias=bias), nn.Linear(K, WIDE, bias=bias)
        self.down_proj = nn.Linear(WIDE, K, bias=bias)
        self.act = act

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class ReLU2(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up_proj, self.down_proj = nn.Linear(K, WIDE), nn.Linear(WIDE, K)

    def forward(self, x):
        return self.down_proj(F.relu(self.up_proj(x)) ** 2)


def adapted(mlp: nn.Module, **options) -> nn.Module:
    apply_lora_to_linear_modules(mlp, PeftConfig(["*_proj"], dim=3, alpha=5, **options))
    return randomise(mlp)


def near_zero() -> nn.Module:
    """So small inside that GELU and SiLU, of one slope at 0, agree to rounding."""
    mlp = adapted(SwiGLU(F.gelu))
    with torch.no_grad():
        for layer in (mlp.gate_proj, mlp.up_proj):
            layer.weight.mul_(1e-6)
            layer.lora_A.weight.mul_(1e-6)
    return mlp


def gradients(call, mlp, x, dy):
    x.grad = None
    mlp.zero_grad()
    y = call(x)
    y.backward(dy)
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in mlp.named_parameters() if p.requires_grad}}


@pytest.mark.parametrize("use_triton", [False, True])
@pytest.mark.parametrize("make", [SwiGLU, lambda: SwiGLU(bias=True), ReLU2])
def test_the_same_values_and_gradients(make, use_triton):
    mlp = adapted(make().double() if not use_triton else make(), use_triton=use_triton)
    x, dy = tensors(2, 5, K, n=K, dtype=mlp.up_proj.weight.dtype)
    want = gradients(mlp, mlp, x, dy)
    fused = copy.deepcopy(mlp)
    assert install_fused_lora_mlp(fused) == 1
    assert isinstance(fused, FusedLoRAMLP) and isinstance(fused, type(mlp))
    got = gradients(fused, fused, x, dy)
    assert got.keys() == want.keys() and len(got) == 2 + 2 * len(list(mlp.children()))
    for name, value in want.items():
        assert relative(got[name], value) <= (TOLERANCE if use_triton else 1e-12), name
        assert value.abs().max() > 0, name
    y = fused(x)
    y.add_(1)  # the result can be changed in place
    assert list(fused.state_dict()) == list(mlp.state_dict())
    assert torch.equal(pickle.loads(pickle.dumps(fused))(x), fused(x))


def test_what_is_kept():
    x, _ = tensors(7, K, n=K)
    swiglu, relu2 = adapted(SwiGLU()), adapted(ReLU2())
    big = lambda shapes: [shape for shape in shapes if shape[0] == 7]  # noqa: E731
    call = lambda: fused_lora_swiglu_mlp(swiglu.gate_proj, swiglu.up_proj, swiglu.down_proj, x)  # noqa: E731
    assert big(kept(call)) == [(7, K), (7, WIDE), (7, WIDE)]
    assert big(kept(lambda: fused_lora_relu2_mlp(relu2.up_proj, relu2.down_proj, x))) == [(7, K), (7, WIDE)]
    assert len(big(kept(lambda: swiglu(x)))) > 3


def test_gradients_are_those_of_the_formula(monkeypatch):
    monkeypatch.setitem(globals(), "K", 3)
    monkeypatch.setitem(globals(), "WIDE", 4)
    x = torch.randn(2, K, dtype=torch.float64, requires_grad=True)
    for mlp, call in (
        (adapted(SwiGLU().double()), lambda m: fused_lora_swiglu_mlp(m.gate_proj, m.up_proj, m.down_proj, x)),
        (adapted(ReLU2().double()), lambda m: fused_lora_relu2_mlp(m.up_proj, m.down_proj, x)),
    ):
        factors = [p for p in mlp.parameters() if p.requires_grad]
        assert torch.autograd.gradcheck(lambda *_, mlp=mlp, call=call: call(mlp), (x, *factors))


def test_autocast_and_other_dtypes():
    mlp = adapted(SwiGLU(), lora_dtype="bfloat16")
    x, _ = tensors(5, K, n=K)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fused_lora_swiglu_mlp(mlp.gate_proj, mlp.up_proj, mlp.down_proj, x)
        want = mlp(x)
    assert y.dtype == torch.bfloat16 and relative(y, want) < 0.02
    y.sum().backward()
    assert x.grad.dtype == torch.float32 and mlp.up_proj.lora_A.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("use_triton", [False, True])
def test_a_backward_pass_under_autocast(use_triton):
    mlp = adapted(SwiGLU(), use_triton=use_triton)
    x, dy = tensors(5, K, n=K)
    factors = [p for p in mlp.parameters() if p.requires_grad]
    want = torch.autograd.grad(mlp(x), [x, *factors], dy)
    y = fused_lora_swiglu_mlp(mlp.gate_proj, mlp.up_proj, mlp.down_proj, x)
    with torch.autocast("cpu", dtype=torch.float16):
        found = torch.autograd.grad(y, [x, *factors], dy)
    for one, other in zip(found, want, strict=True):
        assert one.dtype == torch.float32 and relative(one, other) <= TOLERANCE and other.any()


@pytest.mark.parametrize("bias", [False, True])
def test_checkpoints_that_keep_products(bias):
    mlp = adapted(SwiGLU(bias=bias))
    x, dy = tensors(5, K, n=K)
    want = torch.autograd.grad(mlp(x), x, dy)[0]
    install_fused_lora_mlp(nn.Sequential(mlp))
    keep = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    y = checkpoint(
        lambda x: mlp(x).mul(2), x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(keep)
    )
    assert relative(torch.autograd.grad(y, x, dy / 2)[0], want) <= TOLERANCE and want.any()


def test_a_real_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    randomise(adapted(model))
    ids = torch.arange(10).reshape(2, 5)
    want = model(ids).logits
    assert install_fused_lora_mlp(model) == 2
    assert relative(model(ids).logits, want) <= TOLERANCE
    with pytest.raises(ValueError, match="has no MLP to fuse"):
        install_fused_lora_mlp(model)  # done already


@pytest.mark.parametrize(
    "mlp,message",
    [
        (lambda: nn.Sequential(SwiGLU()), "Sequential has no MLP to fuse: modules with up_proj and down_proj"),
        (lambda: adapted(nn.Sequential(SwiGLU(F.gelu))), r"0: SwiGLU computes something other than down\(silu"),
        (lambda: nn.Sequential(near_zero()), r"0: SwiGLU computes something other than down\(silu"),
        (lambda: adapted(nn.Sequential(SwiGLU()), use_dora=True), r"0\.gate_proj: the adapter is DoRA's"),
        (lambda: adapted(nn.Sequential(SwiGLU()), dropout=0.1), r"0\.gate_proj: dropout=0\.1 is active"),
        (lambda: adapted(nn.Sequential(SwiGLU())).to("meta"), "0: weights are on the meta device"),
    ],
)
def test_what_cannot_be_fused(mlp, message):
    model = mlp()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        install_fused_lora_mlp(model)
    assert [type(module) for module in model.modules()] == before


def test_hooks_are_not_passed_over():
    mlp = adapted(SwiGLU())
    install_fused_lora_mlp(mlp)
    hook = mlp.up_proj.register_forward_hook(lambda module, args, y: 2 * y)
    with pytest.raises(ValueError, match="up_proj: it has hooks, which would not run, so this MLP cannot run fused"):
        mlp(torch.ones(2, K))
    hook.remove()
    mlp(torch.ones(2, K))


def test_what_a_call_refuses():
    mlp = adapted(SwiGLU())
    with pytest.raises(ValueError, match="a Linear has no adapter, so this MLP cannot run fused"):
        fused_lora_swiglu_mlp(mlp.gate_proj, nn.Linear(K, WIDE), mlp.down_proj, torch.ones(2, K))
    with pytest.raises(ValueError, match="some projections of this MLP were made with use_triton and some without"):
        other = adapted(SwiGLU(), use_triton=True)
        fused_lora_swiglu_mlp(mlp.gate_proj, other.up_proj, mlp.down_proj, torch.ones(2, K))
    mlp.down_proj.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="down_proj: weight or bias are to be trained, so this MLP cannot run fused"):
        fused_lora_swiglu_mlp(mlp.gate_proj, mlp.up_proj, mlp.down_proj, torch.ones(2, K))


def test_double_backward_is_refused():
    mlp = adapted(SwiGLU())
    x = torch.randn(3, mlp.up_proj.in_features, requires_grad=True)
    y = fused_lora_swiglu_mlp(mlp.gate_proj, mlp.up_proj, mlp.down_proj, x)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(grad.square().sum() + y.sum(), mlp.up_proj.lora_A.weight)
