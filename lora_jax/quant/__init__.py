"""Quantisers of frozen weights, as plain functions of a matrix: references, not fast storage."""

from lora_jax.quant.int8 import round_trip_int8 as round_trip_int8
from lora_jax.quant.normal_float import NormalFloat as NormalFloat
from lora_jax.quant.normal_float import dequantise as dequantise
from lora_jax.quant.normal_float import quantise as quantise
