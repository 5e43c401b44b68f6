"""`LinearLoRA`: values and gradients against float64 formulas, and what it keeps for the backward pass."""

import copy
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from lora_jax import reference  # noqa: E402
from lora_torch.lora import LinearLoRA, apply_memory_efficient_lora, patch_linear_module  # noqa: E402
from tests.interop.lora_problem import SCALE, check, exact, linear, randomise, run, tensors  # noqa: E402

K, N = 21, 34


def layer(**options) -> LinearLoRA:
    options = {"use_triton": False} | options
    dtype, bias = options.pop("dtype", torch.float32), options.pop("bias", True)
    made = patch_linear_module(linear(K, N, dtype, bias), 4, 7, **options)
    randomise(made)
    return made


@pytest.mark.parametrize("efficient", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values_and_gradients(dtype, efficient):
    made = layer(dtype=dtype, bias=efficient, use_memory_efficient_lora=efficient)
    x, dy = tensors(3, 11, K, n=N, dtype=dtype)
    check(run(made, x, dy), made, x, dy, SCALE)
    assert made.weight.grad is None and not made.weight.requires_grad


@pytest.mark.parametrize("options", [{}, {"use_triton": True}, {"use_dora": True}])
def test_inputs_that_do_not_fit(options):
    made = layer(layer_name="layers.0.q", **options)
    with pytest.raises(ValueError, match=r"^layers\.0\.q: x has shape \(2, 20\), and the layer takes 21 features"):
        made(torch.ones(2, 20))
    with pytest.raises(ValueError, match=r"^layers\.0\.q: x has shape \(\)"):
        made(torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"^layers\.0\.q: x is torch.float64 and the weight torch.float32: cast one"):
        made(torch.ones(2, K, dtype=torch.float64))
    with torch.autocast("cpu", dtype=torch.float16):
        assert made(torch.ones(2, K, dtype=torch.bfloat16)).dtype == torch.float16


@pytest.mark.parametrize("use_triton", [False, True])
def test_shapes_of_the_branch_alone(use_triton):
    x, a, b = torch.ones(2, 3, K), torch.ones(4, K), torch.ones(N, 4)
    with pytest.raises(ValueError, match=r"lora_B \(34, 3\): want \(\.\.\., in\), \(dim, in\) and \(out, dim\)"):
        apply_memory_efficient_lora(x, a, b[:, :3], SCALE, use_triton)
    with pytest.raises(ValueError, match=r"res is \(6, 34\), not \(2, 3, 34\)"):
        apply_memory_efficient_lora(x, a, b, SCALE, use_triton, res=torch.ones(6, N))


def test_gradients_of_each_sample():
    made = layer(dtype=torch.float64)
    x, _ = tensors(5, 3, K, n=N, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in made.named_parameters()}

    def loss(factors, row):
        return torch.func.functional_call(made, parameters | factors, (row,)).pow(2).sum()

    factors = {name: parameters[name] for name in ("lora_A.weight", "lora_B.weight")}
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(factors, x.detach())
    for i, row in enumerate(x.detach()):
        for name, gradient in torch.func.grad(loss)(factors, row).items():
            torch.testing.assert_close(each[name][i], gradient)
            assert gradient.abs().max() > 0


def test_any_leading_dimensions_and_strides():
    made = layer()
    for shape in [(K,), (6, K), (2, 0, K), (2, 3, 2, K)]:
        assert made(torch.ones(shape)).shape == (*shape[:-1], N)
    x, dy = tensors(2, 6, K, n=N)
    turned = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert not turned.is_contiguous()
    for name, value in run(made, turned, dy).items():
        assert torch.allclose(value, run(made, x, dy)[name], rtol=1e-6), name


def test_the_constructor_shares_the_parameters():
    base = linear(K, N)
    made = LinearLoRA(base, 4, 7, 0.5, "pre", "uniform", "bfloat16")
    assert made.weight is base.weight and made.bias is base.bias and not base.weight.requires_grad
    assert (made.dim, made.alpha, made.scale, made.dropout_p, made.dropout_position) == (4, 7, SCALE, 0.5, "pre")
    assert made.lora_A.weight.dtype == torch.bfloat16 and made.lora_A.weight.shape == (4, K)
    assert made.lora_B.weight.shape == (N, 4) and not made.lora_B.weight.any()
    x = torch.ones(2, K)
    assert torch.equal(made(x), base(x))
    assert not LinearLoRA(linear(K, N).eval()).training


def test_initialisation():
    torch.manual_seed(0)
    normal, uniform = (LinearLoRA(nn.Linear(400, 8), 100, lora_A_init_method=each) for each in ("xavier", "kaiming"))
    assert abs(normal.lora_A.weight.std() / (2 / 500) ** 0.5 - 1) < 0.05
    assert normal.lora_A.weight.abs().max() > 0.15  # a uniform one ends at 0.11
    assert uniform.lora_A.weight.abs().max() <= 0.05 and abs(uniform.lora_A.weight.std() / (0.05 / 3**0.5) - 1) < 0.05
    randomise(normal)
    normal.init_lora_weights("uniform")
    assert normal.lora_A.weight.abs().max() <= 0.05 and not normal.lora_B.weight.any()


def saved(call) -> list[tuple[int, ...]]:
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        call()
    return sorted(shapes)


def test_what_is_kept():
    """With the memory-efficient function `x` and the factors; without, a tensor of the rank for each token as well."""
    x, _ = tensors(7, K, n=N)
    efficient, other = layer(), layer(use_memory_efficient_lora=False)
    of_the_base = saved(lambda: nn.functional.linear(x, efficient.weight))
    assert saved(lambda: efficient(x)) == sorted([(7, K), (4, K), (N, 4), *of_the_base])
    assert (7, 4) in saved(lambda: other(x))


@pytest.mark.parametrize("efficient", [True, False])
def test_the_output_can_be_changed_in_place(efficient):
    made = layer(use_memory_efficient_lora=efficient)
    x, dy = tensors(2, 5, K, n=N)
    y = made(x)
    y.add_(1).relu_()
    y.backward(dy)
    in_place = x.grad.clone()
    x.grad = None
    torch.relu(made(x) + 1).backward(dy)
    assert torch.equal(in_place, x.grad)


def test_the_residual_is_left_as_it_was():
    made = layer()
    x, dy = tensors(5, K, n=N)
    res = torch.randn(5, N, requires_grad=True)
    before = res.detach().clone()
    y = apply_memory_efficient_lora(x, made.lora_A.weight, made.lora_B.weight, SCALE, res=res)
    y.backward(dy)
    assert torch.equal(res, before) and torch.equal(res.grad, dy)
    alone = apply_memory_efficient_lora(x, made.lora_A.weight, made.lora_B.weight, SCALE)
    assert torch.allclose(y - res, alone, atol=1e-5)
    half = [each.detach().bfloat16() for each in (x, made.lora_A.weight, made.lora_B.weight)]
    assert apply_memory_efficient_lora(*half, SCALE, res=res).dtype == torch.float32
    assert apply_memory_efficient_lora(*half, SCALE).dtype == torch.bfloat16


def test_gradient_of_the_gradient():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    a, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 5), (4, 2)))
    res = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    call = lambda *t: apply_memory_efficient_lora(*t[:3], 1.5, res=t[3])  # noqa: E731
    assert torch.autograd.gradgradcheck(call, (x, a, b, res))


@pytest.mark.parametrize("position", ["pre", "post"])
@pytest.mark.parametrize("efficient", [True, False])
def test_dropout(position, efficient):
    made = layer(dropout=0.4, dropout_position=position, use_memory_efficient_lora=efficient)
    x, dy = tensors(30, K, n=N)
    made.eval()
    check(run(made, x, dy), made, x, dy, SCALE)
    made.train()
    torch.manual_seed(1)
    found = run(made, x, dy)
    torch.manual_seed(1)
    mask = exact(nn.functional.dropout(torch.ones(30, K if position == "pre" else N), 0.4))
    check(found, made, x, dy, SCALE, *((mask, None) if position == "pre" else (None, mask)))
    with pytest.raises(AssertionError):
        check(found, made, x, dy, SCALE)


@pytest.mark.parametrize("position", ["pre", "post"])
def test_dropout_with_dora(position):
    """The base sees what is dropped before A, as in the source: `x` is one tensor there."""
    made = layer(dropout=0.4, dropout_position=position, use_dora=True)
    x, dy = tensors(30, K, n=N)
    torch.manual_seed(1)
    found = run(made, x, dy)
    torch.manual_seed(1)
    mask = exact(nn.functional.dropout(torch.ones(30, K if position == "pre" else N), 0.4))
    w, a, b, rows = (exact(each) for each in (made.weight, made.lora_A.weight, made.lora_B.weight, x))
    gain = exact(made.lora_magnitude) / np.linalg.norm(w + SCALE * b @ a, axis=1)

    def formula(rows, before, after):
        low = SCALE * (rows * before) @ a.T @ b.T * after
        return rows @ w.T + exact(made.bias) + (gain - 1) * ((rows * before) @ w.T) + gain * low

    one = np.ones(())
    want = formula(rows, *((mask, one) if position == "pre" else (one, mask)))
    bound = 1e-5 * abs(want).max()
    assert abs(exact(found["y"]) - want).max() < bound < abs(exact(found["y"]) - formula(rows, one, one)).max()
    if position == "pre":
        d_x = exact(dy) @ w + mask * ((exact(dy) * (gain - 1)) @ w + SCALE * (exact(dy) * gain) @ b @ a)
    else:
        d_x = (exact(dy) * gain) @ w + SCALE * (exact(dy) * gain * mask) @ b @ a
    assert abs(exact(found["x"]) - d_x).max() < 1e-5 * abs(d_x).max()


def test_rows_of_zeros_under_dora():
    """Padded vocabularies have them: their norm is 0, and their outputs and gradients are no NaN."""
    base = linear(K, N)
    with torch.no_grad():
        base.weight[3] = 0
    made = patch_linear_module(base, 4, use_triton=False, use_dora=True)
    x, dy = tensors(5, K, n=N)
    assert torch.allclose(made(x), nn.functional.linear(x, base.weight, base.bias), atol=1e-5)
    made(x).backward(dy)
    assert all(p.grad.isfinite().all() for p in (x, *made.parameters()) if p.requires_grad)
    assert made.materialize_effective_weight().isfinite().all()


def test_adapters_made_in_inference_mode_can_be_trained():
    base = linear(K, N)
    with torch.inference_mode():
        made = patch_linear_module(base, 4, use_triton=False)
    made(torch.ones(2, K)).sum().backward()
    assert made.lora_B.weight.grad.any()


@pytest.mark.parametrize("efficient", [True, False])
def test_factors_of_another_dtype(efficient):
    """They are cast to the input's dtype; their gradients come back in their own."""
    made = layer(dtype=torch.bfloat16, lora_dtype="float32", use_memory_efficient_lora=efficient)
    x, dy = tensors(9, K, n=N, dtype=torch.bfloat16)
    found = run(made, x, dy)
    assert found["y"].dtype == torch.bfloat16 and found["a"].dtype == found["b"].dtype == torch.float32
    check(found, made, x, dy, SCALE)


@pytest.mark.parametrize("efficient", [True, False])
def test_autocast(efficient):
    made = layer(use_memory_efficient_lora=efficient)
    x, dy = tensors(9, K, n=N)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = made(x)
    assert y.dtype == torch.bfloat16
    y.backward(dy.bfloat16())
    assert x.grad.dtype == made.lora_A.weight.grad.dtype == torch.float32
    grads = {"x": x.grad, "a": made.lora_A.weight.grad, "b": made.lora_B.weight.grad}
    # The bounds are those of bfloat16, in which autocast computes.
    check({"y": y, **grads}, made, x.detach().bfloat16(), dy.bfloat16(), SCALE)


# Dynamo, tracing an autograd function, does what torch warns of.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled():
    made = layer()
    x, dy = tensors(4, K, n=N)
    graph = torch.compile(made, backend="aot_eager", fullgraph=True)
    want = {name: value.clone() for name, value in run(made, x, dy).items()}
    for name, value in run(graph, x, dy).items():
        assert torch.equal(value, want[name]), name
    check(want, made, x, dy, SCALE)


@pytest.mark.parametrize("dora", [False, True])
def test_the_effective_weight(dora):
    made = layer(use_dora=dora, dropout=0.5)
    with pytest.raises(RuntimeError, match=r"dropout=0\.5 is active: call eval\(\) first"):
        made.materialize_effective_weight()
    made.eval()
    x, _ = tensors(5, K, n=N)
    weight = made.materialize_effective_weight()
    assert weight.dtype == made.weight.dtype
    a, b = exact(made.lora_A.weight), exact(made.lora_B.weight)
    want = exact(made.weight) + SCALE * b @ a
    if dora:
        want *= (exact(made.lora_magnitude) / np.linalg.norm(want, axis=1))[:, None]
    bound = reference.tolerance("float32", K + 4) * (abs(exact(made.weight)) + SCALE * abs(b) @ abs(a)) * (1 + 4 * dora)
    assert reference.excess(exact(weight), want, bound) <= 1
    assert reference.excess(exact(made.weight), want, bound) > 1
    assert torch.allclose(nn.functional.linear(x, weight, made.bias), made(x), atol=1e-5)
    weight.sum().backward()
    assert made.lora_A.weight.grad.any() and made.lora_B.weight.grad.any()
    narrow = layer(use_dora=dora, dtype=torch.bfloat16, lora_dtype="float32")
    assert narrow.materialize_effective_weight().dtype == torch.bfloat16


def test_copies_and_pickles():
    made = layer()
    x = torch.ones(2, K)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(other(x), made(x)) and other.lora_A.weight is not made.lora_A.weight
