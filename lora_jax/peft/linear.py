"""`Linear`: one `nnx.Linear` with adapters of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax.peft.config import LoraConfig
from lora_jax.peft.layer import LoraLayer
from lora_jax.peft.model import LoraModel


class Linear(LoraModel):
    """PEFT's `lora.Linear` around an `nnx.Linear`, to be put in its place.

    It is a `LoraModel` of one layer, and has the attributes of its `LoraLayer`.

    **Raises:** `TypeError` for another layer: `LoraModel` takes any module.
    """

    def __init__(
        self,
        base_layer: nnx.Linear,
        adapter_name: str = "default",
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        init_lora_weights: bool | str = True,
        use_rslora: bool = False,
        use_dora: bool = False,
        lora_bias: bool = False,
        *,
        rngs: nnx.Rngs | None = None,
    ):
        if not isinstance(base_layer, nnx.Linear):
            raise TypeError(f"`base_layer` is a {type(base_layer).__name__}, not an nnx.Linear: use `LoraModel`.")
        config = LoraConfig(
            r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, init_lora_weights=init_lora_weights,
            use_rslora=use_rslora, use_dora=use_dora, lora_bias=lora_bias, target_modules=["kernel"],
        )  # fmt: skip
        x = jax.ShapeDtypeStruct((1, base_layer.in_features), base_layer.dtype or jnp.float32)
        super().__init__(base_layer, config, adapter_name, inputs=(x,), rngs=rngs)

    @property
    def _layer(self) -> LoraLayer:
        return self.lora_layers()["kernel"]

    def get_base_layer(self) -> nnx.Module:
        return self.base

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        self.merge_adapter(adapter_names, safe_merge)

    def unmerge(self) -> None:
        self.unmerge_adapter()

    def __getattr__(self, name: str) -> Any:
        if name in ("r", "lora_alpha", "scaling", "lora_A", "lora_B", "merged") or name in _METHODS:
            return getattr(self._layer, name)
        return super().__getattr__(name)


_METHODS = ("get_delta_weight", "set_scale", "scale_layer", "unscale_layer", "disable_adapters")
