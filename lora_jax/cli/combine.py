"""`lora-jax combine`: a weighted sum of PEFT adapters, written as one PEFT adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax
from lora_jax.cli._adapter import Adapter, read_adapter
from lora_jax.cli._kernels import kernel_order, kernel_site, say_fan_in_fan_out
from lora_jax.cli._show import console
from lora_jax.sites import LORA_A, LORA_B


def combine(
    out_dir: str,
    adapters: list[str],
    *,
    weights: list[float] | None = None,
    method: str = "cat",
    rank: int | None = None,
    density: float | None = None,
    majority_sign: str = "total",
    seed: int | None = None,
) -> None:
    """Combine PEFT LoRA adapters of one base into one, exactly or by ties, dare and the like.

    Args:
        out_dir: The directory to write; it must not exist yet.
        adapters: The adapter directories, as a list.
        weights: One weight for each of them, of any sign. By default 1 for each, so that their changes add up.
        method: cat (exact, ranks add up), svd, linear, magnitude_prune, ties, dare_linear or dare_ties, the last four
            also with _svd.
        rank: Of the methods with an SVD. By default the largest rank of the adapters.
        density: Share of elements that pruning keeps, for every method but cat, svd and linear.
        majority_sign: How ties elects signs, total or frequency.
        seed: For the dare methods, which draw by chance.
    """
    from lora_torch import save_peft

    if Path(out_dir).exists():
        raise ValueError(f"{out_dir} exists already; name a new directory, nothing is overwritten.")
    read = [read_adapter(directory) for directory in adapters]
    layout = {_layout(one) for one in read}
    if len(layout) > 1:
        raise ValueError("`fan_in_fan_out` is set in some of these adapters only: they are not of one base.")
    made = lora_jax.combine(
        [_as_adapter(one) for one in read],
        [1.0] * len(read) if weights is None else weights,
        method,
        rank=rank,
        density=density,
        majority_sign=majority_sign,
        key=None if seed is None else jax.random.key(seed),
    )
    config = read[0].config
    base, task = config.get("base_model_name_or_path"), config.get("task_type")
    save_peft(made, out_dir, base_model_name_or_path=base, task_type=task)
    if layout == {True}:
        say_fan_in_fan_out(out_dir)
    out = console()
    if len(named := {str(one.config.get("base_model_name_or_path")) for one in read}) > 1:
        out.print(f"note: the adapters name different bases: {', '.join(sorted(named))}", style="yellow")
    ranks = sorted({site.rank for site in made.sites})
    out.print(f"combined {len(read)} adapters in {len(made.sites)} modules, of rank {', '.join(map(str, ranks))}")
    out.print(f"wrote {out_dir}")


def _layout(adapter: Adapter) -> bool:
    return bool(adapter.config.get("fan_in_fan_out"))


def _as_adapter(adapter: Adapter) -> lora_jax.Adapter:
    """The factors under names that an export gives back unchanged.

    **Raises:** `ValueError` for what is no sum of products.
    """
    extra = [*adapter.replaced, *adapter.others]
    extra += [f"{name}.lora_B.bias" for name, factors in adapter.modules.items() if factors.bias is not None]
    extra += [f"{name} (grouped)" for name, factors in adapter.modules.items() if factors.groups > 1]
    if extra:
        more = f" and {len(extra) - 4} more" if len(extra) > 4 else ""
        raise ValueError(
            f"{adapter.directory} holds {', '.join(extra[:4])}{more}: no weighted sum of factors describes that."
        )
    leaves: dict[tuple[str, ...], Any] = {}
    sites = []
    for name, factors in adapter.modules.items():
        a = kernel_order(factors.a)
        shape = (*a.shape[:-1], factors.b.shape[0])
        site = kernel_site(name, shape, factors.rank, factors.scaling * factors.rank, factors.kind)
        sites.append(site)
        leaves[site.leaf_path(LORA_A)] = jnp.asarray(a)
        leaves[site.leaf_path(LORA_B)] = jnp.asarray(factors.b.reshape(factors.b.shape[:2]).T)
    return lora_jax.Adapter.from_leaves(leaves, tuple(sites))
