"""The adapter that a `LoraConfig` starts with, and the base beside it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax

from lora_jax import inits
from lora_jax.adapters import Adapter
from lora_jax.peft.config import CordaConfig, EvaConfig, LoftQConfig, LoraConfig, LoraGAConfig
from lora_jax.planning import Plan


def initial(
    config: LoraConfig,
    plan: Plan,
    params: Any,
    key: jax.Array,
    fn: Callable[..., Any],
    batches: Iterable[Any] | None,
    loss: Callable[..., jax.Array] | None,
    mask: Callable[..., jax.Array] | None,
) -> tuple[Adapter, Any]:
    """`(adapter, params)`; the latter is the same object unless the initialiser changes the base.

    **Raises:** `ValueError` for an initialiser whose data are missing, and for data that none asks for.
    """
    name = config.computed_init
    if not re.fullmatch(r"[^_]+(_ga)?|pissa_niter_[0-9]+", str(config.init_lora_weights)):
        raise ValueError(
            f"`init_lora_weights={config.init_lora_weights!r}`: the number of iterations is written 'pissa_niter_4', "
            "and other initialisers take none."
        )
    needs = {"eva": {"batches"}, "corda": {"batches"}, "lora_ga": {"batches", "loss"}}.get(name or "", set())
    given = {n for n, value in (("batches", batches), ("loss", loss)) if value is not None}
    if missing := sorted(needs - given):
        raise ValueError(f"`init_lora_weights={name!r}` needs {', '.join(f'`{n}=`' for n in missing)}.")
    if unused := sorted(given - needs):
        raise ValueError(f"{', '.join(f'`{n}=`' for n in unused)}: `init_lora_weights` asks for no such thing.")
    if name == "pissa":
        _, _, iterations = str(config.init_lora_weights).partition("_niter_")
        return inits.pissa(plan, params, iterations=int(iterations) if iterations else None, key=key)
    if name == "olora":
        return inits.olora(plan, params)
    if name == "loftq":
        settings = _settings(LoftQConfig, config.loftq_config)
        return inits.loftq(plan, params, bits=settings.loftq_bits, iterations=settings.loftq_iter)
    if name == "corda":
        method: Any = _settings(CordaConfig, config.corda_config).corda_method
        return inits.corda(plan, fn, params, batches or (), method=method, mask=mask)
    if name == "lora_ga":
        assert loss is not None
        ga: Any = dataclasses.asdict(_settings(LoraGAConfig, config.lora_ga_config))
        return inits.lora_ga(plan, loss, params, batches or (), key=key, **ga)
    if name == "eva":
        eva = _settings(EvaConfig, config.eva_config)
        adapter = inits.eva(
            plan, fn, params, batches or (), rho=eva.rho, tau=eva.tau, whiten=eva.whiten,
            adjust_alpha=eva.adjust_scaling_factors, mask=mask,
        )  # fmt: skip
        return adapter, params
    return plan.init(key, params), params


def _settings(kind: type[Any], value: Any) -> Any:
    """Settings of an initialiser; as PEFT, a dictionary of them will do."""
    return value if isinstance(value, kind) else kind(**(value or {}))
