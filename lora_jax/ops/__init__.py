"""Array-level operations: no knowledge of models, jaxprs or plans."""

from typing import TYPE_CHECKING, Any

from lora_jax.ops.choice import Choice as Choice
from lora_jax.ops.choice import recording as recording
from lora_jax.ops.contraction import Contraction as Contraction
from lora_jax.ops.dropout import dropout as dropout
from lora_jax.ops.lora_dot import explain as explain
from lora_jax.ops.lora_dot import lora_dot as lora_dot
from lora_jax.ops.lora_dot_group import explain_group as explain_group
from lora_jax.ops.lora_dot_group import lora_dot_group as lora_dot_group
from lora_jax.ops.lora_swiglu import LoraKernel as LoraKernel
from lora_jax.ops.lora_swiglu import lora_swiglu as lora_swiglu
from lora_jax.ops.low_rank import low_rank_contract as low_rank_contract

if TYPE_CHECKING:
    from lora_jax.ops.tuning import tune as tune


def __getattr__(name: str) -> Any:
    """Loads what needs Pallas when it is used."""
    if name == "tune":
        from lora_jax.ops.tuning import tune

        return tune
    raise AttributeError(f"module 'lora_jax.ops' has no attribute {name!r}")
