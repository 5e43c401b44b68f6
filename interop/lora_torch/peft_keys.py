"""Keys of an `adapter_model.safetensors`, and the modules they belong to.

    <P>.lora_A.weight, <P>.lora_B.weight             linear, convolution
    <P>.lora_embedding_A, <P>.lora_embedding_B       embedding
    <P>.lora_magnitude_vector[.weight]               DoRA: (out,), for a convolution (1, out, 1, …)
    <P>.lora_B.bias                                  `lora_bias`: (out,)
    <P>.base_layer.bias, <P>.bias                    `bias`: of an adapted module, of another
    <P>[.base_layer…].lora_A.weight, …               `target_parameters`; a module with several nests them
    <P>.weight, <P>.bias                             modules trained in full

with P = `base_model.model.` + the module's dotted name. **Source:** files written by PEFT 0.21.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_jax.sites import LORA_BIAS, MAGNITUDE

from .peft_tensors import Placement

PREFIX = "base_model.model."

# What is trained beside the factors: the leaf it is here, and the endings of its keys.
VECTORS = {
    # transformers 5 drops a magnitude without `.weight`, PEFT takes either, its older releases the bare one alone.
    MAGNITUDE: (".lora_magnitude_vector", ".lora_magnitude_vector.weight"),
    LORA_BIAS: (".lora_B.bias",),
}

# PEFT nests parameters of one module in the order in which the module registers them, the first innermost.
# transformers' experts register them in this one.
PARAMETER_ORDER = ("gate_up_proj", "down_proj")


def keys_of(
    places: Sequence[Placement], parameter_order: Sequence[str] = PARAMETER_ORDER
) -> dict[str, tuple[str, str]]:
    """Keys of (A, B) for every module that `places` name.

    **Raises:** `ValueError` if several parameters of one module are adapted and their order is not known.
    """
    owned: dict[str, list[str]] = {}
    for place in places:
        if place.kind == "parameter":
            for name in place.names:
                module, _, parameter = name.rpartition(".")
                owned.setdefault(module, []).append(parameter)
    out: dict[str, tuple[str, str]] = {}
    for place in places:
        for name in place.names:
            if place.kind == "embedding":
                out[name] = (f"{PREFIX}{name}.lora_embedding_A", f"{PREFIX}{name}.lora_embedding_B")
            elif place.kind == "parameter":
                out[name] = _pair(_nested(name, owned, parameter_order))
            else:
                out[name] = _pair(name)
        for name in place.heads:
            out[name] = _pair(name)
    return out


def vector_keys(key_a: str, vector: str) -> tuple[str, ...]:
    """Keys of a vector beside the factor whose key is `key_a`, each of which holds the same tensor."""
    module = key_a.removesuffix(".lora_A.weight").removesuffix(".lora_embedding_A")
    return tuple(module + ending for ending in VECTORS[vector])


def _pair(module: str) -> tuple[str, str]:
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def _nested(name: str, owned: dict[str, list[str]], order: Sequence[str]) -> str:
    module, _, parameter = name.rpartition(".")
    if not module:
        raise ValueError(f"`{name}` belongs to the model itself; PEFT adapts parameters of submodules only")
    siblings = owned[module]
    if len(siblings) == 1:
        return module
    if unknown := [p for p in siblings if p not in order]:
        raise ValueError(
            f"`{module}` has several adapted parameters, {', '.join(siblings)}, which PEFT nests in the order in "
            f"which the module registers them: say it, `parameter_order=({', '.join(map(repr, siblings))})` in "
            f"that order; the place of {', '.join(unknown)} is not known"
        )
    later = sum(order.index(p) > order.index(parameter) for p in siblings)
    return module + ".base_layer" * later
