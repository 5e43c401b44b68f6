"""The adapted linear on compiled Triton kernels: `pytest -m gpu tests/interop/test_lora_gpu.py`."""

from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from torch import nn  # noqa: E402
from triton import knobs  # noqa: E402

from lora_torch import triton_launch as launch  # noqa: E402
from lora_torch import triton_run  # noqa: E402
from lora_torch.lora import LoRATritonFunction, patch_linear_module  # noqa: E402
from lora_torch.mlp import fused_lora_swiglu_mlp  # noqa: E402
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

# What torch warns of: that its first product in a thread makes the context, and that it may overlook a wait.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def layer(k: int, n: int, dtype=torch.bfloat16, dim: int = 4, **options):
    made = patch_linear_module(linear(k, n, dtype, device="cuda"), dim, 7 * dim / 4, **options)
    return randomise(made)


# Odd sizes go by pointers, multiples of 8 by descriptors; both cross the edges of tiles. Few rows are split over K.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape,k,n,dim", [((257,), 513, 129, 16), ((4, 75), 520, 264, 8), ((3,), 1032, 776, 64), ((2, 130), 264, 520, 5)]
)
def test_values_and_gradients(dtype, shape, k, n, dim):
    for efficient in (True, False):
        made = layer(k, n, dtype, dim, use_memory_efficient_lora=efficient)
        x, dy = tensors(*shape, k, n=n, dtype=dtype, device="cuda")
        if dtype == torch.bfloat16:
            one_sign(x, dy, made.lora_A.weight, made.lora_B.weight)
        found = run(made, x, dy)
        check(found, made, x, dy, SCALE)
        for name, value in run(made, x, dy).items():
            assert torch.equal(value, found[name]), name  # the same bits each time


@pytest.mark.parametrize("position", ["pre", "post"])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_dropout(dtype, position):
    made = layer(136, 264, dtype, dropout=0.25, dropout_position=position)
    x, dy = tensors(200, 136, n=264, dtype=dtype, device="cuda")
    state = torch.cuda.get_rng_state()
    seed = torch.randint(-(2**31), 2**31, (4,), dtype=torch.int32, device="cuda").tolist()[:2]
    torch.cuda.set_rng_state(state)
    found = run(made, x, dy)
    drawn = mask(200, 136 if position == "pre" else 264, 0.25, seed=tuple(word % 2**32 for word in seed))
    masks = (drawn, None) if position == "pre" else (None, drawn)
    check(found, made, x, dy, SCALE, *masks)
    with pytest.raises(AssertionError):
        check(found, made, x, dy, SCALE)


def test_strides():
    made = layer(256, 128)
    x, dy = tensors(6, 40, 256, n=128, dtype=torch.bfloat16, device="cuda")
    turned = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    y = made(turned)
    y.backward(dy.transpose(0, 1).contiguous().transpose(0, 1))
    grads = {"x": turned.grad, "a": made.lora_A.weight.grad, "b": made.lora_B.weight.grad}
    check({"y": y} | {name: grad for name, grad in grads.items() if grad is not None}, made, x, dy, SCALE)
    wide = torch.randn(70, 512, device="cuda").bfloat16()[:, ::2]
    assert torch.equal(made(wide), made(wide.contiguous())) or relative(made(wide), made(wide.contiguous())) < 2**-7


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_branch_alone(dtype):
    made = layer(136, 264, dtype)
    x, dy = tensors(3, 50, 136, n=264, dtype=dtype, device="cuda")
    a, b = made.lora_A.weight, made.lora_B.weight
    res = nn.functional.linear(x, made.weight, made.bias)
    y = LoRATritonFunction.apply(x, a, b, SCALE, dtype, res)
    y.backward(dy)
    found = {"y": y, "x": x.grad, "a": a.grad, "b": b.grad}
    check({name: value for name, value in found.items() if value is not None}, made, x, dy, SCALE)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dtype": "float32"}])
def test_the_same_as_without_triton(options):
    made = layer(256, 128, **options)
    plain = layer(256, 128, use_triton=False, **options)
    x, dy = tensors(100, 256, n=128, dtype=torch.bfloat16, device="cuda")
    want = run(plain, x, dy)
    for name, value in run(made, x, dy).items():
        assert value.dtype == want[name].dtype and relative(value, want[name]) < 0.02, name


def test_autocast():
    made = layer(256, 128, torch.float32)
    x, dy = tensors(100, 256, n=128, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = made(x)
    assert y.dtype == torch.bfloat16
    with torch.autocast("cuda", dtype=torch.bfloat16):  # of a second layer
        assert torch.equal(made(x.bfloat16()), y)
    y.backward(dy.bfloat16())
    assert made.lora_A.weight.grad is not None and made.lora_A.weight.grad.dtype == torch.float32
    check({"y": y}, made, x.detach().bfloat16(), dy.bfloat16(), SCALE)
    # Autograd's own thread, which hears of autocast: what was computed in float32 stays so.
    x.grad = None
    made.zero_grad()
    y = made(x)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y.backward(dy)
    check({"y": y, "x": x.grad, "a": made.lora_A.weight.grad, "b": made.lora_B.weight.grad}, made, x, dy, SCALE)


def test_nothing_waits_for_the_gpu():
    """Neither pass copies anything to the host, dropout included, so both can be captured in a CUDA graph."""
    made = layer(256, 128, dropout=0.1, dropout_position="pre")
    x, dy = tensors(100, 256, n=128, dtype=torch.bfloat16, device="cuda")
    run(made, x, dy)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(made, x, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    made.eval()
    # Detached: what keeps a graph of another stream alive ties the capture to that stream.
    want = {name: value.detach().clone() for name, value in run(made, x, dy).items()}
    graph, found = captured(made, x, dy)
    graph.replay()
    torch.cuda.synchronize()
    for name, value in found.items():
        assert torch.equal(value, want[name]), name


def test_profilers_see_every_kernel():
    """Later launches pass by Triton's front end, but not by the hooks that there may be."""
    made = layer(256, 128, dropout=0.1, dropout_position="pre")
    x, dy = tensors(100, 256, n=128, dtype=torch.bfloat16, device="cuda")
    run(made, x, dy)
    launches = []

    def record(metadata):
        launches.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(record)
    try:
        run(made, x, dy)
    finally:
        knobs.runtime.launch_enter_hook.remove(record)
    assert {"down_kernel", "outer_kernel", "up_kernel"} <= set(launches)
    assert all(quick is not slow for quick, slow in (each.again for each in triton_run._known.values() if each))
    seen = len(launches)
    run(made, x, dy)
    assert len(launches) == seen


def test_threads():
    """Threads that meet in the first call of a kind, and those that start what another has just compiled."""
    a = torch.randn(168, 16, device="cuda").half()
    xs = [torch.randn(333, 168, device="cuda").half() for _ in range(64)]
    drop = launch.Drop.seeded(0.1, triton_problem.SEED, "cuda")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda x: launch.down(x, a, 2.0, drop), xs))
    for x, h in zip(xs, found, strict=True):
        assert torch.equal(h, launch.down(x, a, 2.0, drop))
    assert not torch.equal(found[0], found[1])


@pytest.mark.filterwarnings("ignore")  # inductor's own
@pytest.mark.parametrize("use_triton", [True, False])
def test_compiled(use_triton):
    made = layer(256, 128, use_triton=use_triton)
    x, dy = tensors(100, 256, n=128, dtype=torch.bfloat16, device="cuda")
    check(run(torch.compile(made, fullgraph=True), x, dy), made, x, dy, SCALE)


def test_a_fused_mlp():
    gate, up, down = layer(128, 320), layer(128, 320), layer(320, 128)
    x, dy = tensors(4, 50, 128, n=128, dtype=torch.bfloat16, device="cuda")
    factors = [each.weight for part in (gate, up, down) for each in (part.lora_A, part.lora_B)]
    y = fused_lora_swiglu_mlp(gate, up, down, x)
    got = [y, *torch.autograd.grad(y, [x, *factors], dy)]
    y = down(nn.functional.silu(gate(x)) * up(x))
    want = [y, *torch.autograd.grad(y, [x, *factors], dy)]
    for one, other in zip(got, want, strict=True):
        assert relative(one, other) < 0.02 and other.abs().max() > 0


def test_data_elsewhere():
    x, a = torch.ones(8, 16, device="cuda").bfloat16(), torch.ones(16, 16, device="cuda").bfloat16()
    here = launch.Drop.seeded(0.1, triton_problem.SEED, "cuda")
    for _ in range(2):
        launch.down(x, a, 1.0, here)
        with pytest.raises(ValueError, match="the words of `drop` are on cpu, and the operands on cuda:0"):
            launch.down(x, a, 1.0, launch.Drop.seeded(0.1, triton_problem.SEED, "cpu"))
    made = layer(16, 16)
    with pytest.raises(RuntimeError, match="use_triton=True needs a CUDA GPU, and `x` is on cpu"):
        made.cpu()(torch.ones(2, 16, dtype=torch.bfloat16))
