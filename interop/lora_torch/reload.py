"""Runs an exported PEFT directory in real torch: what transformers and peft make of the files alone."""

from __future__ import annotations

from os import PathLike
from typing import Any

import numpy as np
import torch


def peft_logits(
    adapter: str | PathLike[str],
    base: str | PathLike[str],
    task_type: str,
    ids: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    dtype: str = "float32",
) -> np.ndarray:
    """Logits of `PeftModel.from_pretrained` on a batch, on the CPU, without dropout.

    **Arguments:**

    - `adapter`: a PEFT directory; `base`: the Hugging Face directory of its base.
    - `task_type`: `"SEQ_CLS"` or `"CAUSAL_LM"`, which decides the class of the model. The number of labels is that
      of the classifier in the adapter's file.
    - `ids`, `mask`: (batch, length) integers; without a mask every position counts.
    - `dtype`: what the base is loaded in and computed with.

    **Returns:** float32, (batch, labels) or (batch, length, vocabulary).
    """
    import peft
    import transformers

    options: dict[str, Any] = {"torch_dtype": getattr(torch, dtype)}
    if task_type == "SEQ_CLS":
        kind: Any = transformers.AutoModelForSequenceClassification
        options["num_labels"] = _num_labels(adapter)
    elif task_type == "CAUSAL_LM":
        kind = transformers.AutoModelForCausalLM
    else:
        raise ValueError(f"`task_type={task_type!r}`: only 'SEQ_CLS' and 'CAUSAL_LM' are run here.")
    # transformers announces a classifier that the base lacks; the adapter brings it.
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        model = kind.from_pretrained(str(base), **options)
        model = peft.PeftModel.from_pretrained(model, str(adapter)).eval()
    finally:
        transformers.logging.set_verbosity(before)
    inputs = {"input_ids": torch.from_numpy(np.asarray(ids, np.int64))}
    if mask is not None:
        inputs["attention_mask"] = torch.from_numpy(np.asarray(mask, np.int64))
    with torch.no_grad():
        return model(**inputs).logits.float().numpy()


def _num_labels(adapter: str | PathLike[str]) -> int:
    """Rows of the classification head in the adapter's file."""
    from pathlib import Path

    from .files import open_safetensors

    heads = ("classifier.weight", "score.weight", "classifier.out_proj.weight")
    with open_safetensors(Path(adapter) / "adapter_model.safetensors") as file:
        for name in file.keys():
            if name.endswith(heads):
                return file.get_slice(name).get_shape()[0]
    raise ValueError(f"{adapter} holds no classification head; train with `modules_to_save=['classifier']`.")
