"""`lora_dot_group`: on reference kernels and on XLA, with all that one product may have, and what is shared."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lora_jax import reference
from lora_jax.kernels import mosaic
from lora_jax.ops import explain_group, lora_dot, lora_dot_group, recording
from tests.core.harness import cast, normal
from tests.kernels import reference_kernels
from tests.kernels.test_dispatch import KEY, RATE, drawn

BF16 = ml_dtypes.bfloat16
K, NS = 70, (24, 16, 40)
SCALES = (2.7, 0.6, 1.0)


def operands(dtype=BF16, rows=(2, 3), ranks=(3, 5, 16)):
    x = cast(normal(*rows, K), dtype)
    ws = [cast(normal(K, n), dtype) for n in NS]
    a_s = [cast(normal(K, r, seed=i) / 2, np.float32) for i, r in enumerate(ranks)]
    b_s = [cast(normal(r, n), np.float32) for r, n in zip(ranks, NS, strict=True)]
    return x, ws, a_s, b_s, [None, cast(10 * normal(NS[1]), np.float32), cast(10 * normal(NS[2]), dtype)]


def exact(operands, dys, mask, scales: Any = SCALES):
    """`[(y, gradients of one)]` and the gradient of `x`, each a value and a magnitude."""
    x, *lists = operands
    each = [
        (
            reference.lora_dot(x, w, a, b, scale, mask, 0.0 if bias is None else bias),
            reference.lora_dot_gradients(x, w, a, b, scale, dy, mask),
        )
        for w, a, b, bias, dy, scale in zip(*lists, dys, scales, strict=True)
    ]
    return each, tuple(sum(gradients["x"][i] for _, gradients in each) for i in range(2))


@pytest.mark.parametrize(
    "implementation, dtype, ranks, how",
    [
        ("xla", np.float32, (3, 5, 16), None),
        ("xla", BF16, (3, 5, 16), None),
        ("reference", BF16, (3, 5, 16), "together"),
        ("reference", np.float16, (3, 17, 2), "together"),
        ("reference", BF16, (3, 40, 5), "in turn"),
    ],
)
@pytest.mark.parametrize("dropped", [False, True])
def test_values_and_gradients(implementation, dtype, ranks, how, dropped):
    given = operands(dtype, ranks=ranks)
    x, ws, a_s, b_s, biases = given
    dys = [cast(normal(2, 3, n, seed=3), dtype) for n in NS]
    options = {"dropout_rate": RATE, "key": KEY} if dropped else {}

    @jax.jit
    def run(*operands):
        def group(x, ws, a_s, b_s, biases):
            settings = {"scale": SCALES, "implementation": implementation}
            return lora_dot_group(x, ws, a_s, b_s, biases=biases, **settings, **options)

        ys, vjp = jax.vjp(group, *operands)
        return ys, vjp(tuple(dys))

    with reference_kernels.installed() as calls:
        ys, (dx, dws, das, dbs, dbiases) = run(*given)
        sizes = {kind: [size for name, size in calls if name == kind] for kind in ("forward", "backward")}
        one_each = [(6, K, n, r) for n, r in zip(NS, ranks, strict=True)]
        wanted = {None: [], "together": [(6, K, *NS)], "in turn": one_each}[how]
        assert sizes == {"forward": wanted * (len(sizes["forward"]) // max(len(wanted), 1)), "backward": wanted}

    each, (want, magnitude) = exact(given, dys, drawn(x.shape) if dropped else None)
    bound = reference.tolerance(dtype, K + sum(NS)) * magnitude
    assert dx.dtype == dtype and reference.excess(dx, want, bound) <= 1
    for i, (_, gradients) in enumerate(each):
        assert reference.excess(want - gradients["x"][0], want, bound) > 1, f"without {i}"
    mistakes = [exact(given, dys, drawn(x.shape) if dropped else None, scales) for scales in ((1, 1, 2), (0, 0, 0))]
    mistakes += [exact(given, dys, None)] if dropped else []
    found = zip(ys, dws, das, dbs, dbiases, strict=True)
    for i, ((y, *got), (result, gradients)) in enumerate(zip(found, each, strict=True)):
        exactly = (result, *(gradients[name] for name in ("w", "a", "b", "bias")))
        for name, value, (want, magnitude) in zip(("y", "w", "a", "b", "bias"), (y, *got), exactly, strict=True):
            if name == "bias" and biases[i] is None:
                assert value is None
                continue
            bound = (reference.tolerance(dtype, K + sum(NS)) + reference.unit_roundoff(value.dtype)) * magnitude
            assert reference.excess(value, want, bound) <= 1, (name, i)
            for wrong, _ in mistakes if name in ("y", "a", "b") else []:
                wrong = wrong[i][0] if name == "y" else wrong[i][1][name]
                assert reference.excess(wrong[0], want, bound) > 1, (name, i)
        if biases[i] is not None:
            want, magnitude = result
            without = want - np.asarray(biases[i], np.float64)
            assert reference.excess(without, want, reference.tolerance(dtype, K) * magnitude) > 1


def test_one_unused_result_and_one_gradient_alone():
    x, ws, a_s, b_s, _ = operands()
    with reference_kernels.installed() as calls:
        for implementation in ("xla", "reference"):

            def group(x, a, implementation=implementation):
                return lora_dot_group(x, ws, [a, *a_s[1:]], b_s, implementation=implementation)

            def loss(x, a, group=group):
                return group(x, a)[0].astype(jnp.float32).sum()

            got = jax.grad(loss, argnums=(0, 1))(x, a_s[0])
            dys = [np.ones((2, 3, NS[0])), *(np.zeros((2, 3, n)) for n in NS[1:])]
            each, (want, magnitude) = exact((x, ws, a_s, b_s, [None] * 3), dys, None, (1, 1, 1))
            for value, (exactly, size) in zip(got, ((want, magnitude), each[0][1]["a"]), strict=True):
                bound = reference.tolerance(BF16, K + sum(NS)) * size
                assert reference.excess(value, exactly, bound) <= 1 < reference.excess(exactly / 2, exactly, bound)
        assert ("backward", (6, K, *NS)) in calls


def products(jaxpr: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The operands' shapes of every `dot_general`, in inner functions too."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            found.append(tuple(v.aval.shape for v in eqn.invars))
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            found += products(inner)
    return found


def test_xla_reads_x_once_for_the_adapters():
    x, ws, a_s, b_s, _ = operands(np.float32, rows=(6,), ranks=(3, 5, 14))

    def loss(a_s):
        return sum((y**2).sum() for y in lora_dot_group(x, ws, a_s, b_s))

    with_x = [pair for pair in products(jax.make_jaxpr(jax.grad(loss))(a_s).jaxpr) if (6, K) in pair]
    # The three products, `h` of 22 ranks in all, and the gradients of as many.
    wide = [pair for pair in with_x if (K, NS[0]) in pair or (K, NS[1]) in pair or (K, NS[2]) in pair]
    assert len(wide) == 3 and len(with_x) == 5, with_x
    assert ((6, K), (K, 22)) in with_x


def test_a_key_for_each_is_as_many_products():
    x, ws, a_s, b_s, _ = operands()
    keys = list(jax.random.split(KEY, 3))
    with reference_kernels.installed() as calls, recording() as choices:
        got = lora_dot_group(x, ws, a_s, b_s, scale=SCALES, dropout_rate=RATE, key=keys)
        assert len(calls) == 3 and [choice.implementation for choice in choices] == ["reference"] * 3
        alone = [
            lora_dot(x, w, a, b, scale=scale, dropout_rate=RATE, key=key)
            for w, a, b, scale, key in zip(ws, a_s, b_s, SCALES, keys, strict=True)
        ]
        said = explain_group(x, ws, a_s, b_s, dropout_rate=RATE, separate_keys=True)
    for y, want in zip(got, alone, strict=True):
        assert np.array_equal(np.asarray(y, np.float32), np.asarray(want, np.float32))
    shared = lora_dot_group(x, ws, a_s, b_s, scale=SCALES, dropout_rate=RATE, key=KEY)
    assert not np.array_equal(np.asarray(shared[1], np.float32), np.asarray(got[1], np.float32))
    assert all("each has a dropout mask of its own" in str(choice) for choice in said)


def test_explanations():
    x, ws, a_s, b_s, _ = operands()
    with reference_kernels.installed(), recording() as choices:
        lora_dot_group(x, ws, a_s, b_s)
        told = explain_group(x, ws, a_s, b_s)
        assert choices == [*told, *told]
        assert str(told[1]).splitlines()[:2] == [
            "reference  M=6, K=70, N=16, R=5",
            "  at most one pass over the data gives h of all 3, one all dA, one product the data's gradient",
        ]
        _, ws, a_s, b_s, _ = operands(ranks=(3, 40, 5))
        assert "ranks [3, 40, 5] are more than 64 together" in explain_group(x, ws, a_s, b_s)[0].group
        _, ws, a_s, b_s, _ = operands(ranks=(3, 65, 5))
        told = explain_group(x, ws, a_s, b_s)
        assert [choice.implementation for choice in told] == ["reference", "xla", "reference"]
        assert "they don't run on the same implementation" in told[0].group
        assert [y.shape[-1] for y in lora_dot_group(x, ws, a_s, b_s)] == list(NS)
        with pytest.raises(ValueError, match="rank 65 is more than 64"):
            lora_dot_group(x, ws, a_s, b_s, implementation="reference")


@pytest.mark.parametrize("ranks, barriers", [((3, 5, 16), 1), ((3, 40, 5), 3)])  # together, in turn
def test_in_a_scan_results_reach_their_readers_by_a_barrier(ranks, barriers):
    """One behind each call of the kernels: see `test_dispatch`."""
    x, ws, a_s, b_s, _ = operands(ranks=ranks)

    def layer(x, ws):
        ys = lora_dot_group(x, ws, a_s, b_s, implementation="reference")
        return x + sum(y.sum() for y in ys), None

    def fn(x, ws):
        return jax.lax.scan(layer, x, [w[None] for w in ws])[0]

    with reference_kernels.installed(platform="cuda"), reference_kernels.pretending("NVIDIA H200"):
        text = jax.jit(fn).trace(x, ws).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("optimization_barrier") == barriers


def test_vmap_takes_xla():
    x, ws, a_s, b_s, biases = operands()
    xs = jnp.stack([x, 2 * x])

    def run(implementation):
        def loss(x, a_s):
            ys = lora_dot_group(x, ws, a_s, b_s, biases=biases, implementation=implementation)
            return sum((y.astype(jnp.float32) ** 2).sum() for y in ys)

        return jax.vmap(jax.grad(loss, argnums=(0, 1)), in_axes=(0, None))(xs, a_s)

    with reference_kernels.installed():
        got, want = run("reference"), run("xla")
    for g, v in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        v = np.asarray(v, np.float64)
        assert reference.excess(g, v, reference.tolerance(g.dtype, 200) * np.abs(v).max()) <= 1
        assert reference.excess(v / 2, v, reference.tolerance(g.dtype, 200) * np.abs(v).max()) > 1


@pytest.mark.parametrize(
    "ns, rank, rate, shared",
    [
        ((14336, 14336), 16, 0.0, "604 MB would be moved together"),
        ((4096, 1024, 1024), 16, 0.0, "at most one pass"),
        ((14336, 14336), 16, 0.1, "at most one pass"),  # the mask would be drawn for each
        ((14336, 14336), 32, 0.0, "at most one pass"),  # and each has a thin product of its own
    ],
)
def test_hopper_groups_go_where_fewer_bytes_are_moved(ns, rank, rate, shared, monkeypatch):
    monkeypatch.setattr(mosaic, "STORES_TRANSPOSED", True)
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=BF16)
    operands = [shape((4096, n)) for n in ns], [shape((4096, rank))] * len(ns), [shape((rank, n)) for n in ns]
    with reference_kernels.pretending("NVIDIA H200", multiprocessors=132):
        for choice in explain_group(shape((8192, 4096)), *operands, dropout_rate=rate):
            assert choice.implementation == "mosaic_gpu" and shared in choice.group


@pytest.mark.parametrize(
    "change, message",
    [
        ({"a": []}, "`a` has 0 entries for 3 kernels"),
        ({"biases": [None]}, "`biases` has 1 entries for 3 kernels"),
        ({"scale": [1.0, 2.0]}, "`scale` has 2 entries for 3 kernels"),
        ({"key": [KEY]}, "`key` has 1 entries for 3 kernels"),
        ({"kernels": []}, "`kernels` is empty"),
        ({"kernels": [np.ones((K, 3))] * 3}, "shapes disagree"),
    ],
)
def test_errors(change, message):
    x, ws, a_s, b_s, _ = operands()
    with pytest.raises(ValueError, match=message):
        lora_dot_group(**({"x": x, "kernels": ws, "a": a_s, "b": b_s} | change))
