"""`LoraConfig` under PEFT's names and defaults, and what it means here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from lora_jax.config import LoRAConfig
from lora_jax.peft_config import from_peft


class TaskType(StrEnum):
    """PEFT's task types, for `LoraConfig.task_type`."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


# Initial values that `lora_jax.inits` computes.
COMPUTED = ("pissa", "olora", "loftq", "eva", "corda", "lora_ga")


@dataclass
class LoftQConfig:
    """PEFT's: bits of the quantised base, and how often it is fitted."""

    loftq_bits: int = 4
    loftq_iter: int = 1


@dataclass
class EvaConfig:
    """PEFT's. `use_label_mask` has no counterpart: pass `mask=` to `get_peft_model`."""

    rho: float = 2.0
    tau: float | None = 0.99
    whiten: bool = False
    adjust_scaling_factors: bool = True


@dataclass
class CordaConfig:
    """PEFT's, without its files."""

    corda_method: str = "ipm"


@dataclass
class LoraGAConfig:
    """PEFT's."""

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: float = 16


@dataclass
class LoraConfig:
    """PEFT 0.21's `LoraConfig`: every field, with its default. See PEFT's documentation for what they mean.

    Names are those of the Flax model or PyTorch's (`layers.0` and `layers_0` are one). An entry that matches nothing is
    an error here, and so is a field that is set and has no counterpart, by name, when the model is made.
    `lora_jax.LoRAConfig` is what it becomes.
    """

    task_type: str | None = None
    peft_type: str = "LORA"
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    r: int = 8
    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: Sequence[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    loftq_config: LoftQConfig | dict[str, Any] = field(default_factory=dict)
    eva_config: EvaConfig | None = None
    corda_config: CordaConfig | None = None
    lora_ga_config: LoraGAConfig | None = None
    kasa_config: Any = None
    velora_config: Any = None
    monteclora_config: Any = None
    arrow_config: Any = None
    use_dora: bool = False
    alora_invocation_tokens: Sequence[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    layer_replication: Sequence[Sequence[int]] | None = None
    runtime_config: Any = None
    lora_bias: bool = False
    target_parameters: Sequence[str] | None = None
    use_bdlora: Any = None
    ensure_weight_tying: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's: a plain dictionary."""
        return asdict(self)

    @property
    def computed_init(self) -> str | None:
        """The initialiser of `lora_jax.inits` that `init_lora_weights` asks for, or None for random factors."""
        name = str(self.init_lora_weights).partition("_niter_")[0]
        return name if name in COMPUTED else None

    def to_lora(self) -> LoRAConfig:
        """The configuration of this library. **Raises** `ValueError` naming every field that cannot be followed."""
        data = self.to_dict()
        if self.computed_init is not None:
            data["init_lora_weights"] = True
        for name in ("loftq_config", "eva_config", "corda_config", "lora_ga_config"):
            data.pop(name)
        return from_peft(data)
