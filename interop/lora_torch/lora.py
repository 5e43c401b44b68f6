"""LoRA for PyTorch modules in place, under the names of NeMo Automodel's `nemo_automodel._peft.lora`.

    from lora_torch.lora import PeftConfig, apply_lora_to_linear_modules

    count = apply_lora_to_linear_modules(model, PeftConfig(target_modules=["*.q_proj", "*.v_proj"], dim=16))

Needs torch, and triton only where `use_triton` asks for it; never jax.
"""

from __future__ import annotations

from .lora_autograd import apply_memory_efficient_lora as apply_memory_efficient_lora
from .lora_config import PeftConfig as PeftConfig
from .lora_modules import LinearLoRA as LinearLoRA
from .lora_modules import TritonLinearLoRA as TritonLinearLoRA
from .lora_patch import apply_lora_to_linear_modules as apply_lora_to_linear_modules
from .lora_patch import patch_linear_module as patch_linear_module
from .matching import ModuleMatcher as ModuleMatcher
from .matching import wildcard_match as wildcard_match
from .triton_linear import LoRATritonFunction as LoRATritonFunction
