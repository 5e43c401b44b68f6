"""Kinds of virtual weight: what a parameter is while a model's trace is interpreted."""

from lora_jax.weights.lora import Lora as Lora
from lora_jax.weights.lora import lora_weight as lora_weight
from lora_jax.weights.virtual import Kind as Kind
from lora_jax.weights.virtual import Virtual as Virtual
