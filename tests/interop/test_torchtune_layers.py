"""`LoRALinear` and `DoRALinear` against their formulas in float64, and how they are built, moved and refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lora_jax import reference

torch = pytest.importorskip("torch")

from lora_torch.torchtune import (  # noqa: E402
    DoRALinear,
    LoRALinear,
    QATLoRALinear,
    get_adapter_params,
    get_merged_lora_ckpt,
    set_trainable_params,
)


def randomised(module: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def in_float64(module: Any) -> dict[str, np.ndarray]:
    return {name: value.detach().double().numpy() for name, value in module.named_parameters()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [False, True])
def test_lora_forward_and_gradients(dtype: str, bias: bool) -> None:
    module = randomised(LoRALinear(12, 7, 3, 5.0, use_bias=bias)).to(getattr(torch, dtype))
    set_trainable_params(module, get_adapter_params(module))
    x = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(1)).to(module.weight.dtype).requires_grad_()
    y = module(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    y.backward(dy)
    assert y.dtype == module.weight.dtype and module.weight.grad is None

    p = in_float64(module)
    rows, grad = (t.detach().double().numpy().reshape(8, -1) for t in (x, dy))
    numpy_dtype = np.float32 if dtype == "float32" else "bfloat16"
    bound = reference.tolerance(numpy_dtype, 12 + 3 + 8)
    args = (rows, p["weight"].T, p["lora_a.weight"].T, p["lora_b.weight"].T)
    want, magnitude = reference.lora_dot(*args, 5 / 3)
    shift = p.get("bias", np.zeros(7))
    got = y.detach().double().numpy().reshape(8, 7)
    assert reference.excess(got, want + shift, bound * (magnitude + abs(shift))) <= 1
    gradients = reference.lora_dot_gradients(*args, 5 / 3, grad)
    for name, value in (("a", module.lora_a.weight.grad.T), ("b", module.lora_b.weight.grad.T), ("x", x.grad)):
        exact, size = gradients[name]
        assert reference.excess(value.double().numpy().reshape(exact.shape), exact, bound * size) <= 1
    # The bound notices a dropped adapter and a wrong scale.
    for scale in (0.0, 1.0):
        assert reference.excess(reference.lora_dot(*args, scale)[0] + shift, want + shift, bound * magnitude) > 1


def dora_reference(p: dict[str, np.ndarray], x: np.ndarray, scale: float) -> np.ndarray:
    """The merged weight, its rows brought to the length `magnitude`; the bias is scaled alike."""
    merged = p["weight"] + scale * p["lora_b.weight"] @ p["lora_a.weight"]
    g = p["magnitude"] / np.sqrt((merged**2).sum(axis=1))
    return (x @ merged.T + p.get("bias", 0)) * g


@pytest.mark.parametrize("bias", [False, True])
def test_dora_forward_and_gradients(bias: bool) -> None:
    module = randomised(DoRALinear(12, 7, 3, 5.0, use_bias=bias)).double()
    x = torch.randn(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = module(x)
    dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y.backward(dy)
    p, rows = in_float64(module), x.detach().numpy()
    want = dora_reference(p, rows, 5 / 3)
    np.testing.assert_allclose(y.detach().numpy(), want, rtol=0, atol=1e-12 * abs(want).max())
    assert abs(dora_reference(p, rows, 1.0) - want).max() > 1e-3
    # By central differences, with the norm held constant as the layer holds it.
    merged = p["weight"] + 5 / 3 * p["lora_b.weight"] @ p["lora_a.weight"]
    norms = np.sqrt((merged**2).sum(axis=1))

    def loss(q: dict[str, np.ndarray], inputs: np.ndarray) -> float:
        w = q["weight"] + 5 / 3 * q["lora_b.weight"] @ q["lora_a.weight"]
        return float((dy.numpy() * (inputs @ w.T + q.get("bias", 0)) * (q["magnitude"] / norms)).sum())

    rng = np.random.default_rng(0)
    for name in ("lora_a.weight", "lora_b.weight", "magnitude", "x"):
        start = rows if name == "x" else p[name]
        step = rng.normal(size=start.shape)

        def shifted(t: float, name: str = name, step: np.ndarray = step) -> float:
            return loss(p, rows + t * step) if name == "x" else loss({**p, name: p[name] + t * step}, rows)

        slope = (shifted(1e-4) - shifted(-1e-4)) / 2e-4
        own = x.grad if name == "x" else dict(module.named_parameters())[name].grad
        np.testing.assert_allclose((own.numpy() * step).sum(), slope, rtol=1e-6)


def test_new_layers_compute_the_base() -> None:
    x = torch.randn(3, 12)
    for kind in (LoRALinear, DoRALinear):
        module = kind(12, 7, 3, 5.0, use_bias=True)
        base = torch.nn.functional.linear(x, module.weight, module.bias)
        torch.testing.assert_close(module(x), base)
        bound = 1 / np.sqrt(12)
        drawn = module.lora_a.weight.detach().abs()
        assert 0.5 * bound < drawn.max() <= bound and not module.lora_b.weight.any()
        assert all(p.requires_grad for p in module.parameters())  # freezing is `set_trainable_params`' task
        randomised(module)
        assert not torch.allclose(module(x), torch.nn.functional.linear(x, module.weight, module.bias), atol=0.1)
        module.disabled = True
        torch.testing.assert_close(module(x), torch.nn.functional.linear(x, module.weight, module.bias))
    lora = LoRALinear(12, 7, 3, 5)
    assert (lora.rank, lora.alpha, lora.merged, lora.disabled, lora._quantize_base) == (3, 5, False, False, False)
    first, again = lora.adapter_params(), lora.adapter_params()
    first.clear()
    assert again == ["lora_a.weight", "lora_b.weight"]


def test_dropout_is_on_the_low_rank_branch_only() -> None:
    torch.manual_seed(0)
    module = randomised(LoRALinear(64, 5, 2, 4.0, dropout=0.5))
    x = torch.ones(400, 64)
    base = torch.nn.functional.linear(x, module.weight)
    update = module.train()(x) - base
    whole = module.eval()(x) - base
    assert isinstance(module.dropout, torch.nn.Dropout) and update.std(dim=0).min() > 0.1
    # Kept elements are doubled, so the mean over many rows is the update without dropout.
    error = (update.mean(dim=0) - whole[0]).abs() / (update.std(dim=0) / 400**0.5)
    assert error.max() < 5 and (update.mean(dim=0) / 2 - whole[0]).abs().max() > 5 * (update.std(dim=0) / 20).max()
    assert isinstance(LoRALinear(64, 5, 2, 4.0).dropout, torch.nn.Identity)


def test_dora_with_dropout_keeps_the_base_undropped() -> None:
    module = randomised(DoRALinear(16, 5, 2, 4.0, dropout=1.0))  # nothing of the branch is left
    x = torch.randn(3, 16)
    merged = module.weight + 2 * module.lora_b.weight @ module.lora_a.weight
    want = x @ module.weight.T * module.magnitude / merged.norm(dim=1)
    torch.testing.assert_close(module.train()(x), want)
    assert not torch.allclose(module.eval()(x), want, atol=0.1)


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_meta_modules_get_memory_for_the_adapter_only(kind: Any) -> None:
    with torch.device("meta"):
        module = kind(12, 7, 3, 5.0)
    if kind is DoRALinear:
        with pytest.raises(RuntimeError, match="still on meta device"):
            module.initialize_dora_magnitude()
    module.requires_grad_(False)
    held = dict(module.named_parameters())
    assert module.to_empty(device="cpu") is module
    assert module.weight.is_meta and not any(p.is_meta for n, p in module.named_parameters() if n != "weight")
    assert not any(p.requires_grad for p in module.parameters())
    assert module.lora_a.weight.shape == (3, 12)
    if kind is DoRALinear:
        assert module.magnitude is held["magnitude"]  # an optimizer that holds it holds it still
    module.initialize_parameters()
    module.load_state_dict({"weight": torch.randn(7, 12)}, strict=False, assign=True)
    if kind is DoRALinear:
        module.initialize_dora_magnitude()
        torch.testing.assert_close(module.magnitude, module.weight.norm(dim=1))
    x = torch.randn(2, 12)
    torch.testing.assert_close(module(x), x @ module.weight.T)


def test_wide_factors_over_a_narrow_base() -> None:
    module = randomised(LoRALinear(12, 7, 3, 5.0))
    module.weight.data = module.weight.data.bfloat16()
    x = torch.randn(4, 12).bfloat16()
    base = torch.nn.functional.linear(x, module.weight)
    a, b = module.lora_a.weight, module.lora_b.weight
    y = module(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, base + (5 / 3 * (x.float() @ a.T) @ b.T).bfloat16())


def test_a_layer_for_quantisation_aware_training_is_the_same_layer() -> None:
    """Without configurations no torchao is needed, and nothing is quantised."""
    lora = randomised(LoRALinear(16, 5, 2, 3.0, dropout=0.25)).eval()
    lora.disabled = True
    module = QATLoRALinear.from_lora_linear(lora)
    assert all(module.get_parameter(name) is parameter for name, parameter in lora.named_parameters())
    assert module.disabled and not module.training and module.dropout.p == 0.25
    x = torch.randn(3, 16)
    torch.testing.assert_close(module(x), x @ lora.weight.T)
    module.disabled = lora.disabled = False
    torch.testing.assert_close(module(x), lora(x))
    assert not torch.allclose(module(x), x @ lora.weight.T, atol=0.1)
    wrong: Any = DoRALinear(16, 5, 2, 3.0)
    with pytest.raises(TypeError, match="`lora_linear` must be a LoRALinear, got DoRALinear"):
        QATLoRALinear.from_lora_linear(wrong)


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_refused_arguments(kind: Any) -> None:
    with pytest.raises(ValueError, match="``quantize_base`` is False, but received the following quantization argum"):
        kind(12, 7, 3, 5.0, quantize_base=False, block_size=8)
    kind(12, 7, 3, 5.0, block_size=0)  # as torchtune: nothing is asked for
    for wrong, name in (((0, 7, 3, 5.0), "in_dim"), ((12, 7, 0, 5.0), "rank"), ((12, 7, 2.5, 5.0), "rank")):
        with pytest.raises(ValueError, match=f"`{name}` must be a positive whole number"):
            kind(*wrong)
    with pytest.raises(ValueError, match="`alpha` must be finite"):
        kind(12, 7, 3, float("nan"))
    with pytest.raises(ValueError, match="`dropout` is a probability"):
        kind(12, 7, 3, 5.0, dropout=1.5)
    for wrong, name in ((("5", 0.0), "alpha"), ((5.0, None), "dropout"), ((True, 0.0), "alpha")):
        with pytest.raises(ValueError, match=f"`{name}` must be a number"):
            kind(12, 7, 3, *wrong)


def test_rows_of_zeros_under_dora() -> None:
    """Padded vocabularies have them. Merged or not they give their bias, and no NaN; other rows are what they were."""
    module = randomised(DoRALinear(6, 5, 2, 3.0, use_bias=True))
    with torch.no_grad():
        module.weight[2] = module.lora_b.weight[2] = 0
    module.initialize_dora_magnitude()
    x = torch.randn(4, 6, requires_grad=True)
    y = module(x)
    y.sum().backward()
    torch.testing.assert_close(y[:, 2], module.bias[2].expand(4))
    assert all(p.grad.isfinite().all() for p in (x, *module.parameters()))
    state = get_merged_lora_ckpt(module.state_dict(), 2, 3.0)
    torch.testing.assert_close(torch.nn.functional.linear(x, state["weight"], state["bias"]), y)
