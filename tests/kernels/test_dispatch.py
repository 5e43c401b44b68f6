"""What lies between `lora_dot` and the kernels: which run, on which matrices, and that nothing is lost on the way.

The kernels here are `reference_kernels`, on a CPU; the real ones have tests of their own.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

import lora_jax as lj
from lora_jax import reference
from lora_jax.ops import explain, lora_dot
from tests.core.harness import cast, config, normal, random_adapter
from tests.kernels import reference_kernels
from tests.kernels.problems import mask

BF16 = ml_dtypes.bfloat16
KEY, RATE, SCALE = jax.random.key(5), 0.25, 2.7


def operands(rows=(5,), k=70, n=24, r=3, dtype=BF16):
    x, w = cast(normal(*rows, k), dtype), cast(normal(k, n), dtype)
    return x, w, cast(normal(k, r) / 2, np.float32), cast(normal(r, n), np.float32)


def drawn(shape, key=KEY, rate=RATE):
    """The mask, 0 or 1 / (what is kept), in float64."""
    seed0, seed1 = map(int, jax.random.bits(key, (2,), jnp.uint32))
    return mask((int(np.prod(shape[:-1])), shape[-1]), round(rate * 65536), (seed0, seed1)).reshape(shape)


@pytest.mark.parametrize(
    "rows, r, dropped, dtype",
    [
        ((5,), 3, True, BF16),
        ((5,), 17, False, np.float16),
        ((2, 3), 17, True, np.float16),
        ((), 1, True, BF16),
        ((1, 4, 1), 64, True, BF16),
        ((2, 3), 64, False, BF16),
    ],
)
def test_values_and_gradients(rows, r, dropped, dtype):
    """Against float64: with the scale folded in, the mask on the low-rank branch only, the padding cut off."""
    x, w, a, b = operands(rows, r=r, dtype=dtype)
    options = {"dropout_rate": RATE, "key": KEY} if dropped else {}
    keep = drawn(x.shape) if dropped else None
    dy = cast(normal(*rows, 24, seed=3), dtype)
    with reference_kernels.installed() as calls:

        @jax.jit
        def run(*v):
            y, vjp = jax.vjp(lambda *v: lora_dot(*v, scale=SCALE, implementation="reference", **options), *v)
            return y, vjp(dy)

        y, gradients = run(x, w, a, b)
        m = int(np.prod(rows))
        assert ("forward", (m, 70, 24, r)) in calls and ("backward", (m, 70, 24, r)) in calls
    bound = reference.tolerance(dtype, 70 + r)
    want, magnitude = reference.lora_dot(x, w, a, b, SCALE, keep)
    assert y.dtype == dtype and y.shape == (*rows, 24)
    assert reference.excess(y, want, bound * magnitude) <= 1
    for wrong in (reference.lora_dot(x, w, a, b, 1.0, keep), reference.lora_dot(x, w, a, 0 * b, SCALE, keep)):
        assert reference.excess(wrong[0], want, bound * magnitude) > 1
    if dropped:
        assert reference.excess(reference.lora_dot(x, w, a, b, SCALE)[0], want, bound * magnitude) > 1
    wanted = reference.lora_dot_gradients(x, w, a, b, SCALE, dy, keep)
    bound = reference.tolerance(dtype, 70 + 24 + r + m)
    for name, got, leaf in zip("xwab", gradients, (x, w, a, b), strict=True):
        want, magnitude = wanted[name]
        assert got.dtype == leaf.dtype and reference.excess(got, want, bound * magnitude) <= 1, name
        assert reference.excess(0.5 * want, want, bound * magnitude) > 1, name


@pytest.mark.parametrize("asked", [(0,), (2, 3)])
def test_only_gradients_asked_for(asked):
    args = operands()
    with reference_kernels.installed():

        def loss(*v):
            return lora_dot(*v, implementation="reference").astype(jnp.float32).sum()

        got = jax.grad(loss, argnums=asked)(*args)
    dy = np.ones((5, 24))
    wanted = reference.lora_dot_gradients(*args, 1.0, dy)
    for i, g in zip(asked, got, strict=True):
        want, magnitude = wanted["xwab"[i]]
        assert reference.excess(g, want, reference.tolerance(BF16, 100) * magnitude) <= 1


# (function, weight, data): products that are ones of matrices as they stand, and whether the weight lies transposed.
DIRECT = {
    "dense": (lambda w, x: x @ w, (32, 24), (5, 32), False),
    "transposed": (lambda w, x: x @ w.T, (24, 32), (5, 32), True),
    "batch": (lambda w, x: x @ w, (32, 24), (3, 4, 32), False),
    "heads": (lambda w, x: jnp.einsum("btd,dnh->btnh", x, w), (32, 3, 8), (2, 5, 32), False),
    "out of heads": (lambda w, x: jnp.einsum("btnh,nhd->btd", x, w), (3, 8, 32), (2, 5, 3, 8), False),
    "heads, stored in first": (lambda w, x: jnp.einsum("btd,nhd->btnh", x, w), (3, 8, 32), (2, 5, 32), True),
    "one of several": (lambda w, x: x @ w[1], (2, 32, 24), (5, 32), False),
    "axes of one": (lambda w, x: jnp.einsum("xbd,dyf->bxfy", x, w), (32, 1, 24), (1, 5, 32), False),
    "weight first": (lambda w, x: lax.dot_general(w, x, (((0,), (1,)), ((), ()))), (32, 24), (5, 32), False),
    "scan": (lambda w, x: lax.scan(lambda c, w: (c, c @ w), x, w)[1], (2, 32, 24), (5, 32), False),
}  # fmt: skip
INDIRECT = {
    "experts": (lambda w, x: jnp.einsum("etd,edf->etf", x, w), (3, 32, 8), (3, 5, 32), "share a batch axis"),
    "data's axes": (lambda w, x: jnp.einsum("bdt,df->btf", x, w), (32, 24), (2, 32, 5), "transpose of the data"),
    "weight's axes": (lambda w, x: jnp.einsum("bt,ntd->bnd", x, w), (3, 32, 8), (5, 32), "transpose of the weight"),
    "transposed data": (lambda w, x: (w.T @ x.T), (32, 24), (5, 32), "transpose of the data"),
    "float32": (lambda w, x: jnp.dot(x, w, preferred_element_type=jnp.float32), (32, 24), (5, 32), "wanted in float32"),
    "precise": (lambda w, x: jnp.dot(x, w, precision="highest"), (32, 24), (5, 32), "precision="),
    "mixed": (lambda w, x: x.astype(jnp.float32) @ w.astype(jnp.float32), (32, 24), (5, 32), "takes a bfloat16"),
    "two rows": (lambda w, x: x @ w, (32, 24), (2, 32), "M=2 is below 3"),
}  # fmt: skip


def of_model(name):
    """Traces or computes a model's value and gradients, with dropout."""
    fn, shape, x_shape, _ = {**DIRECT, **INDIRECT}[name]
    params, x = cast({"w": normal(*shape)}, BF16), cast(normal(*x_shape), BF16)

    def model(p, x):
        return fn(p["w"], x)

    plan = lj.plan(model, params, x, config=config(dropout=RATE))
    adapter = random_adapter(plan, np.float32)

    def run(how, **options):
        def both(adapter, x):
            y, vjp = jax.vjp(lambda a, x: lj.apply(model, plan, **options)(params, a, x, key=KEY), adapter, x)
            return jax.tree.leaves((y, vjp(cast(normal(*y.shape, seed=1), y.dtype))))

        return how(both)(adapter, x)

    return run, model, params, x


@pytest.mark.parametrize("name", DIRECT)
def test_products_of_models(name):
    """On kernels, and with the results of XLA to their roundings."""
    run, model, params, x = of_model(name)
    want = [np.asarray(v, np.float64) for v in run(jax.jit, implementation="xla")]
    with reference_kernels.installed() as calls:
        got = run(jax.jit)
        assert {kind for kind, _ in calls} == {"forward", "backward"}
    for g, w in zip(got, want, strict=True):
        bound = reference.tolerance(BF16, 100) * np.abs(w).max()
        assert reference.excess(g, w, bound) <= 1
    assert reference.excess(model(params, x), want[0], reference.tolerance(BF16, 100) * np.abs(want[0]).max()) > 1


@pytest.mark.parametrize("name", INDIRECT)
def test_other_products_stay_on_xla(name):
    run = of_model(name)[0]
    with reference_kernels.installed() as calls:
        run(lambda both: lambda *v: jax.eval_shape(both, *v))
        assert not calls
        if name != "two rows":  # where XLA is faster and no more
            with pytest.raises(ValueError, match="`implementation='reference'` can't run the product of `w`"):
                run(lambda both: lambda *v: jax.eval_shape(both, *v), implementation="reference")


@pytest.mark.parametrize("name", INDIRECT)
def test_reasons(name):
    fn, shape, x_shape, reason = INDIRECT[name]
    params, x = cast({"w": normal(*shape)}, BF16), cast(normal(*x_shape), BF16)

    def model(p, x):
        return fn(p["w"], x)

    plan = lj.plan(model, params, x, config=config())
    adapter = random_adapter(plan, np.float32)
    with reference_kernels.installed():
        text = str(lj.explain(model, plan)(params, adapter, x))
    assert "xla" in text and reason in text, text


def test_vmap_takes_xla():
    x, w, a, b = operands()
    xs, keys = jnp.stack([x, 2 * x]), jax.random.split(KEY, 2)

    def loss(x, a, key, implementation):
        y = lora_dot(x, w, a, b, dropout_rate=RATE, key=key, implementation=implementation)
        return (y.astype(jnp.float32) ** 2).sum(), y

    def run(implementation):
        grad = jax.grad(lambda *v: loss(*v, implementation), argnums=(0, 1), has_aux=True)
        return jax.vmap(grad, in_axes=(0, None, 0))(xs, a, keys)

    with reference_kernels.installed():
        got, want = run("reference"), run("xla")
    # h was padded on the way: the sums may differ in their last bits.
    for g, v in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        v = np.asarray(v, np.float64)
        assert reference.excess(g, v, reference.tolerance(g.dtype, 100) * np.abs(v).max()) <= 1


def test_another_platform_takes_xla():
    """A program traced for one platform and lowered for another."""
    x, w, a, b = operands()
    with reference_kernels.installed(platform="cpu"):
        f = jax.jit(lambda x: jax.grad(lambda x: lora_dot(x, w, a, b).astype(jnp.float32).sum())(x))
        there, here = (f.trace(x).lower(lowering_platforms=(p,)).as_text() for p in ("cuda", "cpu"))
    # The reference sums in float32 from float32 operands, XLA's path from bfloat16 ones.
    assert "tensor<5x70xf32>, tensor<70x24xf32>" in here and "tensor<5x70xf32>, tensor<70x24xf32>" not in there


def test_explain_and_errors_without_a_gpu():
    x, w, a, b = operands()
    text = str(explain(x, w, a, b))
    assert text.splitlines()[0] == "xla"
    assert "not mosaic_gpu: needs a Hopper GPU (H100, H200); the platform here is cpu" in text
    wrong = r"`implementation='mosaic_gpu'` can't run the product .* platform here is cpu"
    with pytest.raises(ValueError, match=wrong):
        lora_dot(x, w, a, b, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="implementation='gpu'"):
        explain(x, w, a, b, implementation="gpu")
    struct = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in (x, w, a, b)]
    with reference_kernels.installed():
        assert str(explain(*struct)).splitlines()[0] == "reference  M=5, K=70, N=24, R=3"
        assert explain(*struct, implementation="xla").reasons["reference"] == "`implementation='xla'` was asked for"
        assert explain(*operands(r=65)).reasons["reference"] == "rank 65 is more than 64"
        with pytest.raises(ValueError, match="rank 65 is more than 64"):
            lora_dot(*operands(r=65), implementation="reference")
        assert explain(*operands((2,))).implementation == "xla"  # slower, and so only by name
        assert explain(*operands((2,)), implementation="reference").implementation == "reference"


def test_devices():
    """Hopper kernels on Hopper GPUs and no others."""
    x, w, a, b = operands()
    for kind, capability, reason in [
        ("NVIDIA A100", (8, 0), "needs a Hopper GPU (H100, H200); NVIDIA A100 has 8.0"),
        ("NVIDIA B200", (10, 0), "needs a Hopper GPU (H100, H200); NVIDIA B200 has 10.0"),
        ("NVIDIA", None, "needs a Hopper GPU (H100, H200); NVIDIA has an unknown compute capability"),
    ]:
        with reference_kernels.pretending(kind, capability):
            assert explain(x, w, a, b).reasons["mosaic_gpu"] == reason
            with pytest.raises(ValueError, match=re.escape(reason)):
                lora_dot(x, w, a, b, implementation="mosaic_gpu")


def test_the_mesh_in_scope_says_what_is_compiled_for():
    """An abstract mesh of GPUs, as in ahead-of-time compilation on a machine without one."""
    x, w, a, b = operands()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("d",), abstract_device=device)
    with reference_kernels.installed(platform="cuda"):
        assert explain(x, w, a, b).implementation == "xla"
        with jax.sharding.use_abstract_mesh(mesh):
            assert explain(x, w, a, b).implementation == "reference"


def test_in_a_scan_results_reach_their_readers_by_a_barrier():
    """Without it XLA writes `y` where the scan keeps it, and runs the kernel again for the other readers of `y`."""
    x, w, a, b = normal(16, 64), normal(64, 32), normal(64, 4), normal(4, 32)

    def fn(x, w, a, b):
        return lax.scan(lambda x, w: (x + lora_dot(x, w, a, b, implementation="reference").sum(), None), x, w[None])[0]

    operands = [cast(v, np.float16) for v in (x, w, a, b)]
    with reference_kernels.installed(platform="cuda"), reference_kernels.pretending("NVIDIA H200"):
        text = jax.jit(fn).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("optimization_barrier") == 1


def test_second_derivatives_take_xla():
    """Of a gradient by the kernels, the gradient is that of XLA's path, to the roundings of the first."""
    x, w, a, b = operands(dtype=np.float16)

    def twice(implementation):
        def loss(x, a, b):
            options = {"dropout_rate": RATE, "key": KEY, "implementation": implementation}
            return jnp.sin(lora_dot(x, w, a, b, scale=0.1, **options).astype(jnp.float32)).sum()

        def of_gradients(*v):
            return sum((g.astype(jnp.float32) ** 2).sum() for g in jax.grad(loss, argnums=(0, 1, 2))(*v))

        return jax.jit(jax.grad(of_gradients, argnums=(0, 1, 2)))(x, a, b)

    with reference_kernels.installed() as calls:
        got, want = twice("reference"), twice("xla")
        assert {kind for kind, _ in calls} == {"forward", "backward"}
    for g, v in zip(got, want, strict=True):
        v = np.asarray(v, np.float64)
        bound = 10 * reference.tolerance(np.float16, 100) * np.abs(v).max()
        assert reference.excess(g, v, bound) <= 1 < reference.excess(v / 2, v, bound)


@pytest.mark.parametrize("devices, split", [(1, False), (4, True)])
def test_compiled_for_more_devices_than_are_here(devices, split):
    """On a machine with one device, for a mesh: kernels are split over it, and not run whole on each."""
    x, w, a, b = operands()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    kinds = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((devices,), ("d",), axis_types=kinds, abstract_device=device)
    with reference_kernels.installed(platform="cuda"), jax.sharding.use_abstract_mesh(mesh):
        assert ("custom_partitioning" in str(jax.make_jaxpr(lora_dot)(x, w, a, b))) == split


@pytest.mark.parametrize("m, k, n, r", [(0, 70, 24, 3), (5, 0, 24, 3), (5, 70, 0, 3), (5, 70, 24, 0)])
def test_empty_operands_stay_on_xla(m, k, n, r):
    operands = [jnp.ones(shape, BF16) for shape in ((m, k), (k, n), (k, r), (r, n))]
    with reference_kernels.installed() as calls:
        y, vjp = jax.vjp(lora_dot, *operands)
        gradients = vjp(y)
        assert not calls and [v.shape for v in gradients] == [v.shape for v in operands]
        assert "has length 0: nothing to compute" in explain(*operands).reasons["reference"]
        with pytest.raises(ValueError, match="has length 0: nothing to compute"):
            lora_dot(*operands, implementation="reference")
    assert np.array_equal(np.asarray(y, np.float32), np.full((m, n), float(k)))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"scale": jnp.ones(24)}, TypeError, r"`scale` is of shape \(24,\) .*; expected one number"),
        ({"scale": None}, TypeError, "`scale` is None"),
        ({"scale": 1j}, TypeError, "`scale` is 1j"),
        ({"dropout_rate": jnp.float32(0.1)}, TypeError, r"`dropout_rate` is a .*; expected a plain number"),
        ({"dropout_rate": float("nan")}, ValueError, r"`dropout_rate=nan` must be in \[0, 1\)"),
        ({"x": np.ones((5, 70), np.complex64)}, TypeError, r"complex operands \(complex64"),
        ({"a": np.ones((70, 3), np.complex64)}, TypeError, "complex operands"),
        ({"kernel": np.ones((1, 70, 24), BF16)}, ValueError, r"kernel \(1, 70, 24\); expected"),
        ({"x": np.ones((), BF16)}, ValueError, r"x \(\) and kernel"),
    ],
)
def test_what_is_no_product_is_refused(change, error, message):
    given = dict(zip(("x", "kernel", "a", "b"), operands(), strict=True)) | {"key": KEY} | change
    with pytest.raises(error, match=message):
        lora_dot(**given)
    if "dropout_rate" in change:
        with pytest.raises(TypeError, match="under `jax.jit` a static argument"):
            jax.jit(lambda rate: lora_dot(**(given | {"dropout_rate": rate})))(0.1)


def test_inside_a_shard_map_over_some_axes_alone_xla_runs():
    """There the compiler splits what is left, which no kernel would notice."""
    x, w, a, b = operands()
    mesh = jax.make_mesh((1, 1), ("d", "t"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec()

    def mapped(implementation, **options):
        def dot(*v):
            return lora_dot(*v, implementation=implementation)

        return jax.eval_shape(jax.shard_map(dot, mesh=mesh, in_specs=spec, out_specs=spec, **options), x, w, a, b)

    with reference_kernels.installed() as calls:
        mapped(None, axis_names={"d"})
        assert not calls
        with pytest.raises(ValueError, match=r"the axes of the mesh are of several kinds here \(auto, manual\)"):
            mapped("reference", axis_names={"d"})
        mapped(None)
        assert calls
