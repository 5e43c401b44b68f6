"""The products of full size on a GPU: `pytest -m gpu tests/interop/test_product_gpu.py`."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from lora_jax.kernels.triton_configs import ADAPTED, HopperConfig  # noqa: E402
from lora_torch import triton_launch as launch  # noqa: E402
from lora_torch import triton_product, triton_run  # noqa: E402
from lora_torch.lora import patch_linear_module  # noqa: E402
from tests.interop.lora_problem import (  # noqa: E402
    SCALE,
    captured,
    check,
    linear,
    one_sign,
    randomise,
    relative,
    run,
    tensors,
)
from tests.kernels import triton_problem  # noqa: E402
from tests.kernels.triton_problem import mask  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),  # torch's first product in a thread
]
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture
def hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernels are for compute capability 9.0")


# One tile and a part of it; many tiles a program, the last group of row blocks not full; a tail of two blocks.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m,k,n,r", [(100, 72, 264, 16), (5000, 200, 4104, 8), (1000, 520, 768, 72)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.usefixtures("hopper")
def test_with_a_tail(dtype, m, k, n, r, with_bias):
    name = str(dtype).removeprefix("torch.")
    cpu = triton_problem.operands(name, m, k, n, r)
    v = {each: value.cuda() for each, value in cpu.items()}
    bias = v["bias"] if with_bias else None

    def product(v):
        return v["x"] @ v["w"] + v["h"] @ v["b"] + with_bias * v["bias"]

    # The layouts of the forward and of the backward pass.
    for w, b in ((v["w"], v["b"]), (v["w"].contiguous(), v["b"].contiguous())):
        got = triton_product.product(v["x"], w, v["h"], b, bias, config=HopperConfig())
        triton_problem.assert_close(got.cpu(), product, cpu, k + r, lambda v: product(v) - v["h"] @ v["b"])
        stored = triton_product.product(v["x"], w.T, v["h"], b.T, bias, transposed=True, config=HopperConfig())
        assert torch.equal(stored, got)
    assert relative(got, triton_product.by_library(v["x"], v["w"], v["h"], v["b"], bias)) < 0.02
    if bias is not None:
        gaps = torch.stack([bias, bias + 9], 1)[:, 0]
        assert relative(triton_product.product(v["x"], w, v["h"], b, gaps, config=HopperConfig()), got) < 0.02


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_of_the_library(rate):
    cpu = triton_problem.operands("float16", 300, 200, 264, 16)
    v = {each: value.cuda() for each, value in cpu.items()}
    drop = launch.Drop.seeded(rate, triton_problem.SEED, "cuda") if rate else None
    keep = mask(300, 264, rate)
    got = triton_product.by_library(v["x"], v["w"], v["h"], v["b"], v["bias"], drop)

    def product(v):
        return v["x"] @ v["w"] + keep * (v["h"] @ v["b"]) + v["bias"]

    triton_problem.assert_close(got.cpu(), product, cpu, 216, lambda v: v["x"] @ v["w"] + v["bias"])


# One tile; shares of three columns, and of eight; more rows of tiles than multiprocessors, so that one column sums `h`.
SIZES = [(100, 72, 264, 16), (5000, 200, 4104, 8), (520, 1032, 4096, 16), (20000, 72, 520, 16)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m,k,n,r", SIZES)
@pytest.mark.usefixtures("hopper")
def test_that_computes_h_too(dtype, m, k, n, r):
    name = str(dtype).removeprefix("torch.")
    cpu = triton_problem.operands(name, m, k, n, r)
    v = {each: value.cuda() for each, value in cpu.items()}

    def product(v):
        return v["x"] @ v["w"] + v["h"] @ v["b"] + v["bias"]

    for lying in (lambda t: t, lambda t: t.contiguous()):  # of the forward and of the backward pass
        w, a, b = lying(v["w"]), lying(v["a"]), lying(v["b"])
        torch.full((3 * m, n), torch.nan, dtype=dtype, device="cuda")  # where nothing is written are no zeros
        y, h = triton_product.adapted(v["x"], w, a, b, v["bias"], SCALE, config=ADAPTED)
        triton_problem.assert_close(
            h.cpu(), lambda v: SCALE * v["x"] @ v["a"], cpu, k, lambda v: SCALE / 2 * v["x"] @ v["a"]
        )
        # With the `h` that came, which is rounded as an operand.
        found = cpu | {"h": h.cpu()}
        triton_problem.assert_close(y.cpu(), product, found, k + r, lambda v: product(v) - v["h"] @ v["b"])
        for _ in range(3):
            again = triton_product.adapted(v["x"], w, a, b, v["bias"], SCALE, config=ADAPTED)
            assert torch.equal(again[0], y) and torch.equal(again[1], h)
        stored = triton_product.adapted(v["x"], w.T, a.T, b.T, v["bias"], SCALE, transposed=True, config=ADAPTED)
        assert torch.equal(stored[0], y) and torch.equal(stored[1], h)
    other = triton_product.adapted(v["x"], v["w"], v["a"], v["b"], v["bias"], SCALE)
    assert relative(other[0], y) < 0.02 and relative(other[1], h) < 0.02


@pytest.mark.usefixtures("hopper")
def test_programs_that_wait_for_each_other_share_the_gpu():
    """Half of two such kernels on the GPU would wait for their other halves for ever."""
    cpu = triton_problem.operands("bfloat16", 2048, 512, 2048, 16)
    v = {each: value.cuda() for each, value in cpu.items()}
    factors = v["w"], v["a"], v["b"], None, SCALE
    xs = [v["x"] * i for i in range(1, 5)]
    want = [triton_product.adapted(x, *factors, config=ADAPTED)[0] for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    found: list[list] = [[] for _ in xs]
    for _ in range(50):
        for x, stream, results in zip(xs, streams, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(triton_product.adapted(x, *factors, config=ADAPTED)[0])
    torch.cuda.synchronize()
    for results, y in zip(found, want, strict=True):
        assert all(torch.equal(each, y) for each in results)


def large_layer():
    """Both passes of which take the kernel that computes `h` or `g` too."""
    made = randomise(patch_linear_module(linear(2048, 2056, torch.bfloat16, device="cuda"), 8, 14))
    x, dy = tensors(4096, 2048, n=2056, dtype=torch.bfloat16, device="cuda")
    one_sign(x, dy, made.lora_A.weight, made.lora_B.weight)
    triton_run._known.clear()
    return made, x, dy


def launched() -> list[tuple[str, object]]:
    plans = [entry.plan for entry in triton_run._known.values() if entry is not None]
    return [(plan.kernel, plan.numbers["W_T"]) for plan in plans]


@pytest.mark.filterwarnings("ignore")  # inductor's own
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_large_layer(compiled):
    made, x, dy = large_layer()
    called = torch.compile(made, fullgraph=True) if compiled else made
    check(run(called, x, dy), made, x, dy, SCALE)
    assert launched() == [("hopper_adapted", True), ("hopper_adapted", False)]


@pytest.mark.usefixtures("hopper")
def test_a_large_layer_in_a_graph():
    """Each replay counts from zero, and reads nothing of the one before."""
    made, x, dy = large_layer()
    graph, results = captured(made, x, dy)
    for factor in (1, 2, 0.5):
        with torch.no_grad():
            x.mul_(factor)
        graph.replay()
        found = {name: value.clone() for name, value in results.items()}
        for name, want in run(made, x, dy).items():
            assert torch.equal(found[name], want), name


@pytest.mark.usefixtures("hopper")
def test_beside_other_processes(monkeypatch):
    """What they communicate may keep multiprocessors, which the kernel with waiting tiles would need."""
    made, x, dy = large_layer()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    check(run(made, x, dy), made, x, dy, SCALE)
    assert launched() == [("hopper_gemm", True), ("hopper_gemm", False)]
