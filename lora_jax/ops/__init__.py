"""Array-level operations: no knowledge of models, jaxprs or plans."""

from lora_jax.ops.dropout import dropout as dropout
from lora_jax.ops.lora_dot import lora_dot as lora_dot
from lora_jax.ops.low_rank import Contraction as Contraction
from lora_jax.ops.low_rank import low_rank_contract as low_rank_contract
