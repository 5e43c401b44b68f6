"""NF4 bases and fake quantisation, which need torchao, and what is said where it is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from lora_torch import from_torch_state_dict, translate  # noqa: E402
from lora_torch import torchtune as tt  # noqa: E402
from lora_torch.torchtune.nf4 import dequantised, is_nf4, to_nf4  # noqa: E402

# torchao warns of its own classes when they are imported or made.
pytestmark = pytest.mark.filterwarnings("ignore")
BLOCKS: dict[str, Any] = {"block_size": 8, "scaler_block_size": 16}


@pytest.fixture
def qat() -> Any:
    return pytest.importorskip("torchao.quantization.qat")


@pytest.mark.parametrize("kind", [tt.LoRALinear, tt.DoRALinear])
@pytest.mark.parametrize("bias", [False, True])
def test_a_quantised_layer_is_a_dense_one_on_the_dequantised_weight(kind: Any, bias: bool, qat: Any) -> None:
    torch.manual_seed(0)
    module = kind(16, 8, 2, 3.0, use_bias=bias, quantize_base=True, **BLOCKS)
    with torch.no_grad():
        module.lora_b.weight.normal_()
    dense = kind(16, 8, 2, 3.0, use_bias=bias)
    assert is_nf4(module.weight) and not is_nf4(dense.weight)
    state = {**module.state_dict(), "weight": dequantised(module.weight.detach())}
    dense.load_state_dict(state)
    x = torch.randn(3, 16)
    got, want = (x.clone().requires_grad_() for _ in range(2))
    outputs = module(got), dense(want)
    torch.testing.assert_close(*outputs)
    for y in outputs:
        y.square().sum().backward()
    torch.testing.assert_close(got.grad, want.grad)
    torch.testing.assert_close(module.lora_a.weight.grad, dense.lora_a.weight.grad)
    assert module.weight.grad is None  # it cannot be trained, whatever `requires_grad` says
    module.disabled = True
    assert (module(x) - outputs[0]).abs().max() > 0.1


def test_state_dicts_of_quantised_layers(qat: Any, tmp_path: Path) -> None:
    module = tt.LoRALinear(16, 8, 2, 3.0, quantize_base=True, **BLOCKS)
    torch.save(module.state_dict(), tmp_path / "adapter.pt")
    back = torch.load(tmp_path / "adapter.pt", weights_only=True)
    assert is_nf4(back["weight"])
    base = torch.randn(8, 16)
    module.load_state_dict({"weight": base}, strict=False)
    assert is_nf4(module.weight) and torch.equal(dequantised(module.weight), dequantised(to_nf4(base, **BLOCKS)))
    module._register_state_dict_hook(tt.reparametrize_as_dtype_state_dict_post_hook)
    dense = module.state_dict()["weight"]
    assert not is_nf4(dense) and dense.dtype == torch.bfloat16
    assert torch.equal(dense, dequantised(module.weight, torch.bfloat16))
    # Merging makes the base dense, in the dtype that was quantised.
    state = {"weight": module.weight.detach(), "lora_a.weight": torch.ones(2, 16), "lora_b.weight": torch.ones(8, 2)}
    merged = tt.get_merged_lora_ckpt(state, 2, 3.0)
    assert list(merged) == ["weight"]
    torch.testing.assert_close(merged["weight"], dequantised(module.weight.detach()) + 3.0)


def test_a_quantised_base_has_no_form_in_flax(qat: Any) -> None:
    layer = torch.nn.ModuleDict({"up": tt.LoRALinear(16, 8, 2, 3.0, quantize_base=True, **BLOCKS)})
    base = translate(layer.state_dict(), "torchtune", "plain", keep="base")
    like = {"up": {"kernel": np.zeros((16, 8), np.float32)}}
    with pytest.raises(
        TypeError, match="up.weight: a NF4Tensor keeps its values in other tensors; make it dense first"
    ):
        from_torch_state_dict(base, like, preset="linen")
    dense = {name: dequantised(value) for name, value in base.items()}
    params = from_torch_state_dict(dense, like, preset="linen", kind="numpy")
    assert np.array_equal(params["up"]["kernel"].T, dense["up.weight"].numpy())


def test_refused_quantisations(qat: Any) -> None:
    with pytest.raises(ValueError, match=r"shape \(8, 16\) cannot be stored as NF4"):
        tt.LoRALinear(16, 8, 2, 3.0, quantize_base=True)  # torchao's defaults take multiples of 16384
    with pytest.raises(TypeError, match="blocksize"):
        tt.LoRALinear(16, 8, 2, 3.0, quantize_base=True, blocksize=8)


def test_fake_quantisation(qat: Any) -> None:
    torch.manual_seed(0)
    weight = qat.IntxFakeQuantizeConfig(dtype=torch.int4, group_size=8, is_symmetric=True)
    activation = qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    lora = tt.LoRALinear(16, 5, 2, 3.0, dropout=0.25).eval()
    with torch.no_grad():
        lora.lora_b.weight.normal_()
    module = tt.QATLoRALinear.from_lora_linear(lora, activation, weight)
    assert module.weight is lora.weight and module.lora_b.weight is lora.lora_b.weight
    assert (module.dropout.p, module.training, module.rank, module.alpha) == (0.25, False, 2, 3.0)
    assert list(module.state_dict()) == list(lora.state_dict())
    x = torch.randn(3, 16)
    fake = qat.FakeQuantizerBase.from_config
    base = fake(activation)(x) @ fake(weight)(lora.weight).T
    update = 1.5 * x @ lora.lora_a.weight.T @ lora.lora_b.weight.T  # sees the exact x
    torch.testing.assert_close(module(x), base + update)
    assert (module(x) - lora(x)).abs().max() > 0.01
    plain = tt.QATLoRALinear.from_lora_linear(lora)
    torch.testing.assert_close(plain(x), lora(x))


def test_refused_fake_quantisation(qat: Any) -> None:
    weight = qat.IntxFakeQuantizeConfig(dtype=torch.int4, group_size=8, is_symmetric=True)
    with pytest.raises(ValueError, match=r"in_dim \(12\) must be divisible by group_size \(8\)"):
        tt.QATLoRALinear(12, 5, 2, 3.0, weight_qat_config=weight)
    with pytest.raises(TypeError, match="`activation_qat_config` must be torchao's FakeQuantizeConfig, got str"):
        tt.QATLoRALinear(16, 5, 2, 3.0, activation_qat_config="int8")
    with pytest.raises(ValueError, match="Bias is not supported in QAT"):
        tt.QATLoRALinear.from_lora_linear(tt.LoRALinear(16, 5, 2, 3.0, use_bias=True), weight_qat_config=weight)
    quantised = tt.LoRALinear(16, 8, 2, 3.0, quantize_base=True, **BLOCKS)
    with pytest.raises(ValueError, match="quantize_base is not compatible with QAT"):
        tt.QATLoRALinear.from_lora_linear(quantised)
    with torch.device("meta"):
        meta = tt.LoRALinear(16, 5, 2, 3.0)
    assert tt.QATLoRALinear.from_lora_linear(meta).weight.is_meta


def test_without_torchao() -> None:
    code = """
import sys
sys.modules["torchao"] = None
from lora_torch import torchtune as tt
tt.LoRALinear(4, 4, 2, 2.0)
tt.QATLoRALinear(4, 4, 2, 2.0)
for wanted in (lambda: tt.LoRALinear(4, 4, 2, 2.0, quantize_base=True), lambda: tt.QATLoRALinear(4, 4, 2, 2.0, 0.0, 1)):
    try:
        wanted()
    except ImportError as error:
        assert "pip install 'lora-jax[torchao]'" in str(error), error
    else:
        raise SystemExit("nothing was said")
assert "torchtune" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
