"""What torchtune computes on small problems, as plain numbers: run on torchtune itself once, on ours in every test.

`torchtune_recorded.json` holds torchtune 0.6.1's answers (torch 2.13, torchao 0.17). To record them again, in an
environment with both: `python -m tests.interop.torchtune_cases >tests/interop/torchtune_recorded.json`.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn


def fill(module: nn.Module) -> None:
    """Values that depend on the name and the place alone, so that they are the same wherever this runs."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            steps = torch.arange(parameter.numel(), dtype=torch.float64).reshape(parameter.shape)
            parameter.copy_(torch.sin(0.7 * steps + len(name)) * (1.5 if "magnitude" in name else 0.5))


def inputs(rows: int, columns: int) -> torch.Tensor:
    steps = torch.arange(rows * columns, dtype=torch.float64).reshape(rows, columns)
    return torch.cos(0.3 * steps).float().requires_grad_()


def layer(module: nn.Module, in_dim: int) -> dict[str, Any]:
    """Names and shapes, output, and the gradients of the input and the adapter."""
    x = inputs(3, in_dim)
    y = module(x)
    (y * torch.sin(torch.arange(y.numel(), dtype=torch.float32)).reshape(y.shape)).sum().backward()
    names = module.adapter_params()  # type: ignore[operator]
    gradients = {name: dict(module.named_parameters())[name].grad for name in names}
    return {
        "adapter_params": names,
        "state": {name: list(value.shape) for name, value in module.state_dict().items()},
        "y": y.tolist(),
        "dx": x.grad.tolist(),  # type: ignore[union-attr]
        "gradients": {name: value.tolist() for name, value in gradients.items()},  # type: ignore[union-attr]
    }


class Tree(nn.Module):
    """Adapter modules among others, nested, under the names of a torchtune decoder."""

    def __init__(self, peft: Any):
        super().__init__()
        attn = nn.Module()
        attn.q_proj = peft.DoRALinear(8, 8, 2, 3.0)
        attn.k_proj = peft.LoRALinear(8, 4, 2, 3.0)
        attn.output_proj = nn.Linear(8, 8)
        mlp = nn.Module()
        mlp.w1 = peft.LoRALinear(8, 6, 2, 3.0)
        block = nn.Module()
        block.attn, block.mlp = attn, mlp
        self.layers = nn.ModuleList([block])
        self.output = peft.LoRALinear(8, 5, 2, 3.0, use_bias=True)


def plain(state_dict: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() for name, value in sorted(state_dict.items())}


def dense(peft: Any, to_weights: Any, to_config: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, kind, bias in (
        ("lora", "LoRALinear", True),
        ("dora", "DoRALinear", False),
        ("dora bias", "DoRALinear", True),
    ):
        module = getattr(peft, kind)(6, 5, 2, 3.0, use_bias=bias)
        fill(module)
        if name != "dora bias":
            out[f"{name} as it is"] = layer(module, 6)
            module.zero_grad()
        if kind == "DoRALinear":
            module.initialize_dora_magnitude()
            with torch.no_grad():
                module.lora_b.weight.mul_(-2)  # the norms change, the magnitudes stay
            out[f"{name} trained"] = layer(module, 6)
    tree = Tree(peft)
    fill(tree)
    parameters = peft.get_adapter_params(tree)
    peft.set_trainable_params(tree, parameters)
    out["adapter params"] = list(parameters)
    out["trainable"] = [name for name, p in tree.named_parameters() if p.requires_grad]
    state = {name: value.clone() for name, value in tree.state_dict().items()}
    adapter = peft.get_adapter_state_dict(state)
    out["adapter keys"] = list(adapter)
    out["merged"] = plain(peft.get_merged_lora_ckpt(state, 2, 3.0))
    out["names"] = peft.get_lora_module_names(["q_proj", "v_proj"], True, True)
    out["peft weights"] = plain(to_weights(adapter, num_heads=2, num_kv_heads=1, dim=8))
    config = {"r": 2, "lora_alpha": 3.0, "target_modules": ["q_proj", "output_proj", "w1", "w2", "w3", "output"]}
    out["peft config"] = to_config(config, "base")
    return out


def quantised(peft: Any, fake_quantize_config: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, kind in (("nf4 lora", "LoRALinear"), ("nf4 dora", "DoRALinear")):
        torch.manual_seed(0)
        module = getattr(peft, kind)(16, 8, 2, 3.0, quantize_base=True, block_size=8, scaler_block_size=16)
        base = nn.Linear(16, 8, bias=False)
        fill(base)
        module.load_state_dict({"weight": base.weight}, strict=False)  # quantised on the way in
        for part in (module.lora_a, module.lora_b):
            fill(part)
        if kind == "DoRALinear":
            module.initialize_dora_magnitude()
        out[name] = layer(module, 16)
        out[name].pop("state")
    activation = fake_quantize_config(dtype=torch.int8, granularity="per_token", is_symmetric=False)
    weight = fake_quantize_config(dtype=torch.int4, group_size=8, is_symmetric=True)
    module = peft.QATLoRALinear(16, 5, 2, 3.0, 0.0, activation, weight)
    fill(module)
    out["qat"] = layer(module, 16)
    plain_layer = peft.LoRALinear(16, 5, 2, 3.0)
    fill(plain_layer)
    shared = peft.QATLoRALinear.from_lora_linear(plain_layer, None, weight)
    out["qat of lora"] = layer(shared, 16)
    return out


if __name__ == "__main__":
    import torchtune.modules.peft as original  # pyright: ignore[reportMissingImports]
    from torchao.quantization.qat import FakeQuantizeConfig  # pyright: ignore[reportMissingImports]
    from torchtune.models.convert_weights import (  # pyright: ignore[reportMissingImports]
        tune_to_peft_adapter_config,
        tune_to_peft_adapter_weights,
    )

    recorded = {
        "dense": dense(original, tune_to_peft_adapter_weights, tune_to_peft_adapter_config),
        "quantised": quantised(original, FakeQuantizeConfig),
    }
    # Nine digits are enough for every float32.
    print(json.dumps(json.loads(json.dumps(recorded), parse_float=lambda text: float(f"{float(text):.9g}"))))
