"""The names of PEFT over Flax models, so that a script is ported by changing its imports.

Thin: what these names do is done by the functions of `lora_jax` and `lora_torch`, which are there without them.
"""

from lora_jax.peft.config import CordaConfig as CordaConfig
from lora_jax.peft.config import EvaConfig as EvaConfig
from lora_jax.peft.config import LoftQConfig as LoftQConfig
from lora_jax.peft.config import LoraConfig as LoraConfig
from lora_jax.peft.config import LoraGAConfig as LoraGAConfig
from lora_jax.peft.config import TaskType as TaskType
from lora_jax.peft.from_linen import from_linen as from_linen
from lora_jax.peft.layer import LoraLayer as LoraLayer
from lora_jax.peft.linear import Linear as Linear
from lora_jax.peft.model import LoraModel as LoraModel
from lora_jax.peft.pretrained import PeftModel as PeftModel
from lora_jax.peft.pretrained import get_peft_model as get_peft_model
