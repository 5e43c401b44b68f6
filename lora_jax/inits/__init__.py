"""Initial values computed from the base's weights, from data or from gradients.

Those that also change the base return `(adapter, new_params)`; nothing that is passed in is altered. Random initial
values (`"kaiming"`, `"gaussian"`, ...) are `LoRAConfig.init`, drawn by `plan.init`.
"""

from lora_jax.inits.convert import to_original as to_original
from lora_jax.inits.corda import corda as corda
from lora_jax.inits.eva import eva as eva
from lora_jax.inits.gradients import lora_ga as lora_ga
from lora_jax.inits.loftq import loftq as loftq
from lora_jax.inits.spectral import olora as olora
from lora_jax.inits.spectral import pissa as pissa
