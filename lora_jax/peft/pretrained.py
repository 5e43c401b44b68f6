"""`PeftModel` and `get_peft_model`: a `LoraModel` that reads and writes PEFT directories."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from lora_jax.inits.convert import difference
from lora_jax.peft.config import LoraConfig
from lora_jax.peft.known import Known
from lora_jax.peft.model import LoraModel
from lora_torch import load_peft, plan_peft, save_peft
from lora_torch.peft_settings import read_config


class PeftModel(LoraModel):
    """PEFT's `PeftModel` for LoRA: what a `LoraModel` is, and directories.

    Names of modules in the files are those of the Flax model by the table `names` (`"nnx"`, `"linen"`, `"hf-flax"`, …
    as in `lora_torch.save_peft`).
    """

    @property
    def base_model(self) -> LoraModel:
        return self

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        selected_adapters: Sequence[str] | None = None,
        *,
        names: Any = "nnx",
        tied: Mapping[str, str] | None = None,
    ) -> None:
        """Writes each adapter as PEFT does, `"default"` at the root and others in folders of their names.

        Where an initialiser changed the base (PiSSA, OLoRA, CorDA, LoRA-GA), every adapter is written converted, for
        the original base: PEFT and everything else then load it without knowing of the initialiser.

        **Raises:** `ValueError` for an unknown name, a base that was quantised (LoftQ), and as `save_peft`.
        """
        taken = self._taken()
        for name in selected_adapters or list(self.peft_config):
            self._must_know(name)
            known = self._known.value[name]
            adapter = self.adapter(name)
            if self._moved.value is not None and taken is None:
                raise ValueError(
                    f"{name!r} belongs to the quantised base of this model. Save both: `lora_torch.save_peft("
                    "model.adapter(...), ...)` and `lora_torch.to_torch_state_dict(model.params, ...)`."
                )
            if taken is not None:
                adapter = difference(adapter, taken)
            directory = Path(save_directory) if name == "default" else Path(save_directory) / name
            save_peft(
                adapter, directory, known.plan, names=names, tied=tied, task_type=known.config.task_type,
                base_model_name_or_path=known.config.base_model_name_or_path, overwrite=True,
            )  # fmt: skip

    @classmethod
    def from_pretrained(
        cls,
        model: nnx.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        *,
        inputs: Any,
        names: Any = "nnx",
        tied: Mapping[str, str] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> PeftModel:
        """The model with the adapter of a PEFT directory, as PEFT frozen and in evaluation mode by default.

        **Arguments:** `inputs`, `rngs`: as for `LoraModel`. **Raises:** as `lora_torch.load_peft`: every key of the
        file and every module it names has to fit.
        """
        new = cls(model, None, inputs=inputs, rngs=rngs)
        new.load_adapter(model_id, adapter_name, is_trainable, names=names, tied=tied)
        new.set_adapter(adapter_name, inference_mode=not is_trainable)
        if not is_trainable:
            new.eval()
        return new

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        *,
        names: Any = "nnx",
        tied: Mapping[str, str] | None = None,
    ) -> None:
        """Adds the adapter of a PEFT directory, inactive. **Raises:** as `add_adapter` and `from_pretrained`."""
        self._must_be_new(adapter_name)
        self._must_have_its_base(adapter_name)
        directory, call = Path(model_id), self._call()
        plan = plan_peft(directory, call.fn, call.params, call.state, call.inputs, names=names, tied=tied)
        adapter = load_peft(directory, plan, names=names, tied=tied, params=self._unmerged_params())
        fields = LoraConfig.__dataclass_fields__
        stored = {key: value for key, value in read_config(directory).items() if key in fields}
        config = LoraConfig(**{**stored, "inference_mode": not is_trainable})
        self._put(adapter_name, adapter, Known(plan, config, adapter.sites))


def get_peft_model(
    model: nnx.Module,
    peft_config: LoraConfig,
    adapter_name: str = "default",
    *,
    inputs: Any,
    rngs: nnx.Rngs | None = None,
    batches: Iterable[Any] | None = None,
    loss: Callable[..., jax.Array] | None = None,
    mask: Callable[..., jax.Array] | None = None,
) -> PeftModel:
    """PEFT's `get_peft_model`: `model` with a new adapter; see `LoraModel` for the arguments that PEFT has not."""
    return PeftModel(
        model, peft_config, adapter_name, inputs=inputs, rngs=rngs, batches=batches, loss=loss, mask=mask
    )  # fmt: skip
