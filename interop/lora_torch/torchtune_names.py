"""torchtune's names of a Llama-like decoder, transformers' names of the same, and the order of their q and k rows.

The way back is the same table read from the right. torchtune's Llamas, Mistrals and Gemmas take q and k in interleaved
rotary order, transformers in halves (see `lora_torch.rotary`); its Qwens take halves as transformers does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .patterns import Pattern, nearest

# torchtune's module -> transformers' module.
MODULES = {
    "tok_embeddings": "model.embed_tokens",
    "layers.*.attn.q_proj": "model.layers.*.self_attn.q_proj",
    "layers.*.attn.k_proj": "model.layers.*.self_attn.k_proj",
    "layers.*.attn.v_proj": "model.layers.*.self_attn.v_proj",
    "layers.*.attn.output_proj": "model.layers.*.self_attn.o_proj",
    "layers.*.mlp.w1": "model.layers.*.mlp.gate_proj",
    "layers.*.mlp.w2": "model.layers.*.mlp.down_proj",
    "layers.*.mlp.w3": "model.layers.*.mlp.up_proj",
    "layers.*.sa_norm": "model.layers.*.input_layernorm",
    "layers.*.mlp_norm": "model.layers.*.post_attention_layernorm",
    "norm": "model.norm",
    "output": "lm_head",
}
_NORMS = ("sa_norm", "mlp_norm", "norm")

# Local names of what can be adapted, as an adapter's configuration lists them.
TARGETS = {
    tune.rpartition(".")[2]: hf.rpartition(".")[2]
    for tune, hf in MODULES.items()
    if not tune.endswith((*_NORMS, "tok_embeddings"))
}


@dataclass(frozen=True)
class TuneDecoder:
    """A decoder under torchtune's names.

    **Fields:** `num_heads`, `num_kv_heads`, `head_dim`; `interleaved`, whether its q and k rows lie in interleaved
    rotary order, as everywhere but in torchtune's Qwens.

    **Raises:** `ValueError` for sizes that cannot be.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    interleaved: bool = True

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}")
        if self.interleaved and self.head_dim % 2:
            raise ValueError(f"rotary embeddings need an even `head_dim`, got {self.head_dim}")

    def to_hf(self, module: str, tensor: str, value: Any) -> tuple[str, str, Any]:
        """transformers' (module, tensor, value) of torchtune's; a factor or magnitude is a tensor like any other.

        **Raises:** `ValueError` for a module that the table lacks, or q or k rows that are not the heads'.
        """
        tensor = "weight" if tensor == "scale" and module.rpartition(".")[2] in _NORMS else tensor
        return _renamed(module, MODULES), tensor, self._rows(module, tensor, value, "rotary_to_half")

    def to_tune(self, module: str, tensor: str, value: Any) -> tuple[str, str, Any]:
        """The exact inverse of `to_hf`."""
        out = _renamed(module, {hf: tune for tune, hf in MODULES.items()})
        tensor = "scale" if tensor == "weight" and out.rpartition(".")[2] in _NORMS else tensor
        return out, tensor, self._rows(module, tensor, value, "rotary_to_interleaved")

    def _rows(self, module: str, tensor: str, value: Any, reorder: str) -> Any:
        """q's and k's output rows in the other order: weight, bias, B and magnitude have them, A has none."""
        heads = {"q_proj": self.num_heads, "k_proj": self.num_kv_heads}.get(module.rpartition(".")[2])
        if heads is None or tensor == "a":
            return value
        if value.shape[0] != heads * self.head_dim:
            raise ValueError(
                f"{module} ({tensor}) has {value.shape[0]} rows, which are not {heads} heads of {self.head_dim}: state "
                "the model's `num_heads`, `num_kv_heads` and `head_dim`"
            )
        if not self.interleaved:
            return value
        from . import rotary  # which brings jax, and torchtune's modules need none

        return getattr(rotary, reorder)(value, heads)


def _renamed(module: str, table: dict[str, str]) -> str:
    for match, to in table.items():
        captured = Pattern(match).match(module)
        if captured is not None:
            return Pattern(match).fill(to, captured, lambda piece, is_end: piece)
    raise ValueError(
        f'Error converting the state dict. Found unexpected key: "{module}", no module of such a decoder'
        f"{nearest(module, table)}. Rename it first, or convert without the decoder's names"
    )
