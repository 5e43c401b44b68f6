"""The adapted layer and a small Llama against real `peft` on the same weights: outputs and gradients."""

import copy
import math

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from torch import nn  # noqa: E402

from lora_torch.lora import PeftConfig, apply_lora_to_linear_modules  # noqa: E402
from tests.interop.lora_problem import randomise, relative  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # peft and transformers warn of their own deprecations

TOLERANCE = 1e-5  # relative to the largest value, as for PEFT directories
TARGETS = ["q_proj", "v_proj", "down_proj"]
IDS = torch.arange(14).reshape(2, 7)


def llama(layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


def by_peft(model: nn.Module, ours: nn.Module, **options) -> nn.Module:
    """PEFT's model with the adapter of `ours`."""
    config = peft.LoraConfig(r=4, lora_alpha=7, target_modules=TARGETS, **options)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    values = ours.state_dict()
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.copy_(values[our_name(name)])
    return theirs.eval()


def our_name(name: str) -> str:
    name = name.removeprefix("base_model.model.").replace(".default", "")
    return name.replace("lora_magnitude_vector.weight", "lora_magnitude")


def value_and_gradients(model: nn.Module):
    model.zero_grad()
    logits = model(IDS).logits
    logits.log_softmax(-1)[..., 3].sum().backward()
    return logits, {our_name(n): p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"use_memory_efficient_lora": False}, {"use_triton": True}]
)
def test_a_llama(options):
    layers = 1 if "use_triton" in options else 2  # the interpreter takes its time
    base = llama(layers)
    ours = copy.deepcopy(base)
    count = apply_lora_to_linear_modules(ours, PeftConfig([f"*.{name}" for name in TARGETS], dim=4, alpha=7, **options))
    assert count == layers * len(TARGETS)
    randomise(ours)
    theirs = by_peft(base, ours, use_dora=options.get("use_dora", False))
    got, gradients = value_and_gradients(ours)
    want, wanted = value_and_gradients(theirs)
    assert relative(got, want) <= TOLERANCE
    assert gradients.keys() == wanted.keys() and len(gradients) == count * (3 if "use_dora" in options else 2)
    for name, gradient in wanted.items():
        assert relative(gradients[name], gradient) <= TOLERANCE, name
        assert gradient.abs().max() > 0, name
    # Each of these would be seen: the base alone, and another scale.
    assert relative(base(IDS).logits, want) > 100 * TOLERANCE
    for module in ours.modules():
        if hasattr(module, "scale"):
            module.scale *= 1.01
    assert relative(ours(IDS).logits, want) > TOLERANCE


def test_merged_it_is_an_ordinary_model():
    ours = llama()
    apply_lora_to_linear_modules(ours, PeftConfig(["*_proj"], dim=4, alpha=7))
    randomise(ours)
    merged = {
        name: ours.get_submodule(name.rpartition(".")[0]).materialize_effective_weight()
        if name.endswith("_proj.weight")
        else value
        for name, value in ours.state_dict().items()
        if "lora_" not in name
    }
    plain = llama()
    plain.load_state_dict(merged)
    assert relative(plain(IDS).logits, ours(IDS).logits) <= TOLERANCE
    assert relative(llama()(IDS).logits, ours(IDS).logits) > 100 * TOLERANCE


def test_training_is_pefts():
    """Five steps of AdamW from the same start: the same losses."""
    base = llama()
    ours = copy.deepcopy(base)
    apply_lora_to_linear_modules(ours, PeftConfig([f"*.{name}" for name in TARGETS], dim=4, alpha=7))
    randomise(ours)

    def losses(model: nn.Module) -> list[float]:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        found = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    want = losses(by_peft(base, ours))
    got = losses(ours)
    assert got == pytest.approx(want, rel=1e-4)
    assert want[-1] < want[0] - 0.05 and not math.isclose(got[1], got[0], rel_tol=1e-3)
