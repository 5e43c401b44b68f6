"""DTensors: parameters split over a mesh before and after adapting, and inputs split over it. One process, gloo."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torch.distributed.tensor")

import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor  # noqa: E402
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

from lora_torch.lora import PeftConfig, apply_lora_to_linear_modules, patch_linear_module  # noqa: E402
from lora_torch.mlp import fused_lora_relu2_mlp  # noqa: E402
from tests.interop.lora_problem import check, linear, randomise, relative, tensors  # noqa: E402

K, N = 12, 20
pytestmark = pytest.mark.filterwarnings("ignore:.*DTensor random operators:UserWarning")


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def split(layer: nn.Module, mesh, placement) -> nn.Module:
    def over(name, module, mesh):
        for key, parameter in list(module.named_parameters(recurse=False)):
            where = placement if key == "weight" or placement == Shard(0) else Replicate()
            value = distribute_tensor(parameter.data, mesh, [where])
            setattr(module, key, nn.Parameter(value, requires_grad=parameter.requires_grad))

    return distribute_module(layer, mesh, over)


def whole(layer: nn.Module, **options) -> nn.Module:
    """The adapted layer without a mesh."""
    made = patch_linear_module(linear(K, N), 4, 7, use_triton=False, **options)
    made.load_state_dict({name: value.full_tensor() for name, value in layer.state_dict().items()})
    return made


# Data parallel, sequence parallel, column-wise and row-wise: weight, input.
@pytest.mark.parametrize(
    "weight,x_placement",
    [
        (Replicate(), Replicate()),
        (Replicate(), Shard(0)),
        (Replicate(), Shard(1)),
        (Shard(0), Replicate()),
        (Shard(1), Shard(2)),
    ],
)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_inputs_and_weights_over_a_mesh(mesh, weight, x_placement, options):
    layer = patch_linear_module(split(linear(K, N), mesh, weight), 4, 7, use_triton=False, **options)
    assert layer.lora_A.weight.placements == (weight if weight == Shard(1) else Replicate(),)
    assert layer.lora_B.weight.placements == (weight if weight == Shard(0) else Replicate(),)
    if options:  # of columns on several devices each has a part of the norm, which nothing could train
        assert layer.lora_magnitude.placements == (weight if weight == Shard(0) else Replicate(),)
        layer.init_dora_magnitude()
    assert layer.lora_A.weight.full_tensor().any() and layer.lora_A.weight.requires_grad
    with torch.no_grad():
        layer.lora_B.weight.copy_(distribute_tensor(torch.randn(N, 4), mesh, layer.lora_B.weight.placements))
    x, dy = tensors(2, 3, K, n=N)
    spread = distribute_tensor(x.detach(), mesh, [x_placement]).requires_grad_()
    y = layer(spread)
    assert isinstance(y, DTensor)
    y = y.full_tensor()
    y.backward(dy)
    found = {"x": spread.grad, "a": layer.lora_A.weight.grad, "b": layer.lora_B.weight.grad}
    found = {"y": y, **{name: value.full_tensor() for name, value in found.items()}}
    alone = whole(layer, **options)
    if not options:
        check(found, alone, x, dy, 7 / 4)
    want = alone(x)
    want.backward(dy)
    for name, value in {"y": want, "x": x.grad, "a": alone.lora_A.weight.grad, "b": alone.lora_B.weight.grad}.items():
        assert relative(found[name], value) < 1e-6, name


# Split by torch's own plans. The second's outputs are partial sums, whose elements cannot be dropped one by one.
@pytest.mark.parametrize("plan", [ColwiseParallel, RowwiseParallel])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_tensor_parallel_layers_with_dropout(mesh, plan, options):
    model = parallelize_module(nn.Sequential(linear(K, N)), mesh, {"0": plan()})
    apply_lora_to_linear_modules(model, PeftConfig(["0"], dim=4, alpha=7, dropout=0.4, **options))
    layer = model[0]
    with torch.no_grad():
        layer.lora_B.weight.copy_(distribute_tensor(torch.randn(N, 4), mesh, layer.lora_B.weight.placements))
    x, dy = tensors(9, K, n=N)
    alone = whole(layer, dropout=0.4, **options)
    torch.manual_seed(1)
    want = alone(x)
    want.backward(dy)
    torch.manual_seed(1)
    y = model(x.detach())
    y.backward(dy)
    assert relative(y, want) < 1e-6 and relative(alone.eval()(x), want) > 0.01
    for name in ("lora_A", "lora_B"):
        got = getattr(layer, name).weight.grad.full_tensor()
        assert relative(got, getattr(alone, name).weight.grad) < 1e-6


def test_splitting_after_adapting(mesh):
    layer = randomise(patch_linear_module(linear(K, N), 4, 7, use_triton=False))
    x, _ = tensors(5, K, n=N)
    want = layer(x)
    split(layer, mesh, Replicate())
    assert torch.allclose(layer(distribute_tensor(x.detach(), mesh, [Shard(0)])).full_tensor(), want, atol=1e-6)


def pair() -> nn.Sequential:
    return nn.Sequential(linear(K, K), nn.Tanh(), linear(K, N))


WRAPPERS = {
    "DistributedDataParallel": DistributedDataParallel,
    "FullyShardedDataParallel": lambda m: FullyShardedDataParallel(
        m, use_orig_params=True, device_id=torch.device("cpu")
    ),
    "fully_shard": lambda m: fully_shard(m),
}


@pytest.mark.filterwarnings("ignore")  # of FSDP, on computing without an accelerator
@pytest.mark.parametrize("use_triton", [False, True])
@pytest.mark.parametrize("wrapper", list(WRAPPERS))
def test_data_parallel_wrappers(mesh, wrapper, use_triton):
    """They count the parameters when they wrap: an adapter is in their care before, and refused after."""
    if use_triton:
        pytest.importorskip("triton")
    model, config = pair(), PeftConfig(["0", "2"], dim=4, alpha=7, use_triton=use_triton)
    apply_lora_to_linear_modules(model, config)
    randomise(model)
    x, dy = tensors(5, K, n=N)
    want = model(x)
    want.backward(dy)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    wrapped = WRAPPERS[wrapper](model)
    y = wrapped(x.detach())
    y.backward(dy)
    assert relative(y, want) < 1e-6
    for name, p in model.named_parameters():
        if p.requires_grad:
            grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            assert relative(grad, gradients[name.replace("_fsdp_wrapped_module.", "")]) < 1e-6

    late = WRAPPERS[wrapper](pair())
    before = [type(module) for module in late.modules()]
    with pytest.raises(
        ValueError, match=rf"0: the model is in {wrapper} already, .*: adapt first, and wrap afterwards"
    ):
        apply_lora_to_linear_modules(late, PeftConfig(match_all_linear=True))
    assert [type(module) for module in late.modules()] == before


def test_what_takes_no_dtensors(mesh):
    layer = split(patch_linear_module(linear(K, N), 4, layer_name="q"), mesh, Replicate())
    x = distribute_tensor(torch.ones(2, K), mesh, [Shard(0)])
    with pytest.raises(
        NotImplementedError, match="q: the Triton kernels take the tensors of one device, not a DTensor"
    ):
        layer(x)
    up, down = (
        split(patch_linear_module(linear(*size), 4, use_triton=False), mesh, Replicate()) for size in ((K, N), (N, K))
    )
    with pytest.raises(ValueError, match="its parameters are DTensors, so this MLP cannot run fused"):
        fused_lora_relu2_mlp(up, down, x)
