"""torchtune's adapter modules, `torchtune.modules.peft` name for name, and its conversions to PEFT.

Importing this package imports torch. torchao is imported when a base is quantised, torchtune never. docs/torchtune.md
lists every name, and where a result differs from torchtune's on purpose.
"""

from .adapters import LORA_ATTN_MODULES as LORA_ATTN_MODULES
from .adapters import AdapterModule as AdapterModule
from .adapters import disable_adapter as disable_adapter
from .adapters import get_adapter_params as get_adapter_params
from .adapters import get_adapter_state_dict as get_adapter_state_dict
from .adapters import get_lora_module_names as get_lora_module_names
from .adapters import set_trainable_params as set_trainable_params
from .dora import DoRALinear as DoRALinear
from .lora import LoRALinear as LoRALinear
from .merging import get_merged_lora_ckpt as get_merged_lora_ckpt
from .nf4 import reparametrize_as_dtype_state_dict_post_hook as reparametrize_as_dtype_state_dict_post_hook
from .qat import QATLoRALinear as QATLoRALinear
from .to_peft import peft_to_tune_adapter_weights as peft_to_tune_adapter_weights
from .to_peft import tune_to_peft_adapter_config as tune_to_peft_adapter_config
from .to_peft import tune_to_peft_adapter_weights as tune_to_peft_adapter_weights
from .validation import validate_missing_and_unexpected_for_lora as validate_missing_and_unexpected_for_lora
