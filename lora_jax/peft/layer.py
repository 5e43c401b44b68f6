"""`LoraLayer`: one adapted parameter of a `LoraModel`, with PEFT's attributes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from lora_jax.adapters import Adapter
from lora_jax.merging import delta
from lora_jax.sites import LORA_A, LORA_B, Site

if TYPE_CHECKING:
    from lora_jax.peft.model import LoraModel


class LoraLayer:
    """A view: it holds nothing, and what it changes, it changes in its model.

    `r`, `lora_alpha`, `scaling`, `lora_A`, `lora_B` are dictionaries by adapter name; factors have this library's
    shapes, `lora_A` (*lead, *in, rank), `lora_B` (*lead, rank, *out).
    """

    def __init__(self, model: LoraModel, path: tuple[str, ...]):
        self._model, self._path = model, path

    def _each(self, what: Callable[[Adapter, Site], Any]) -> dict[str, Any]:
        out = {}
        for name in self._model.peft_config:
            adapter = self._model.adapter(name)
            for site in adapter.sites:
                if site.path == self._path:
                    out[name] = what(adapter, site)
        return out

    @property
    def r(self) -> dict[str, int]:
        return self._each(lambda adapter, site: site.rank)

    @property
    def lora_alpha(self) -> dict[str, float]:
        return self._each(lambda adapter, site: site.alpha)

    @property
    def scaling(self) -> dict[str, float]:
        return self._each(lambda adapter, site: site.scale)

    @property
    def lora_A(self) -> dict[str, jax.Array]:
        return self._each(lambda adapter, site: adapter.leaf(site.leaf_path(LORA_A)))

    @property
    def lora_B(self) -> dict[str, jax.Array]:
        return self._each(lambda adapter, site: adapter.leaf(site.leaf_path(LORA_B)))

    @property
    def active_adapters(self) -> list[str]:
        return [name for name in self._model.active_adapters if name in self.r]

    @property
    def merged_adapters(self) -> list[str]:
        return [name for name in self._model.merged_adapters if name in self.r]

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @property
    def disable_adapters(self) -> bool:
        return not self._model._enabled

    def get_delta_weight(self, adapter: str) -> jax.Array:
        """s·A·B in the shape of the parameter."""
        found = self._each(lambda value, site: delta(site, *value.factors(site)))
        if adapter not in found:
            raise ValueError(f"{'.'.join(self._path)} has no adapter {adapter!r}; it has {', '.join(found)}.")
        return found[adapter]

    def set_scale(self, adapter: str, scale: float) -> None:
        """`scale` times the scaling that the adapter was made with."""
        self._change(adapter, scale, lambda site, made: made.alpha * scale)

    def scale_layer(self, scale: float) -> None:
        """`scale` times the present scaling of the active adapters."""
        for name in self.active_adapters:
            self._change(name, scale, lambda site, made: site.alpha * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """The inverse of `scale_layer`; None goes back to the scaling that the adapters were made with.

        **Raises:** `ValueError` for a scale of 0, by which nothing can have been scaled and come back.
        """
        if scale == 0:
            raise ValueError("`unscale_layer(0)` divides by zero: write `unscale_layer()` for the scaling at first.")
        for name in self.active_adapters:
            self._change(name, scale, lambda site, made: made.alpha if scale is None else site.alpha / scale)

    def _change(self, name: str, scale: float | None, alpha: Callable[[Site, Site], float]) -> None:
        if scale is not None and not math.isfinite(scale):
            raise ValueError(f"`scale={scale!r}` must be a finite number.")
        model = self._model
        adapter, known = model.adapter(name), model._known.value[name]
        made = {site.path: site for site in known.made}
        sites = tuple(
            dataclasses.replace(site, alpha=alpha(site, made[site.path])) if site.path == self._path else site
            for site in adapter.sites
        )
        model._put(name, Adapter(adapter.to_dict(), sites), known)
