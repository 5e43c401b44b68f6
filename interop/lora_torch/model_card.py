"""The README.md of an adapter directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import lora_jax

_USES = {
    "peft": """```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, {directory})
```""",
    "vllm": """```sh
vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules adapter={directory}
```

The scale is folded into `lora_B`: alpha equals the rank for every module.""",
    "gguf": """```sh
python convert_lora_to_gguf.py --base BASE_DIRECTORY {directory}
```

The scale is folded into `lora_B`: alpha equals the rank for every module.""",
}

# vLLM accepts these values of --max-lora-rank only.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def model_card(config: Mapping[str, Any], *, target: str, modules: int, parameters: int) -> str:
    """Markdown with the front matter that Hugging Face's model pages read.

    **Arguments:** `config`, the `adapter_config.json`; `modules`, how many are adapted; `parameters`, numbers stored.
    """
    base = config.get("base_model_name_or_path")
    front = ["library_name: peft", "tags:", "- lora", "- jax", "- lora-jax"]
    if base:
        # A JSON string is a YAML string whatever is in it.
        front.insert(0, f"base_model: {json.dumps(base)}")
    rank = next((n for n in _VLLM_RANKS if n >= config["r"]), config["r"])
    use = _USES[target].format(base=base or "BASE", rank=rank, directory='"path/to/this/directory"')
    rows = [
        ("Base model", base or "not stated"),
        ("Task", config.get("task_type") or "not stated"),
        ("Rank", config["r"]),
        ("Alpha", config["lora_alpha"]),
        ("Scale", "alpha / sqrt(rank)" if config.get("use_rslora") else "alpha / rank"),
        ("Own ranks or alphas", len({*config.get("rank_pattern", {}), *config.get("alpha_pattern", {})})),
        ("Trained in full", ", ".join(config.get("modules_to_save", ())) or "nothing"),
        ("Adapted modules", modules),
        ("Numbers stored", f"{parameters:,}"),
    ]
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows)
    return (
        "---\n" + "\n".join(front) + "\n---\n\n"
        f"# LoRA adapter\n\nTrained in JAX with lora-jax {lora_jax.__version__}, stored as PEFT stores it.\n\n"
        f"| | |\n|---|---|\n{table}\n\n## Use\n\n{use}\n"
    )


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())
