"""Ours against what torchtune itself answered, recorded in `torchtune_recorded.json` (see `torchtune_cases`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lora_jax import reference

torch = pytest.importorskip("torch")

import lora_torch.torchtune as ours  # noqa: E402
from tests.interop import torchtune_cases as cases  # noqa: E402

RECORDED = json.loads((Path(__file__).parent / "torchtune_recorded.json").read_text())
# No sum of the problems has more terms, and every number went through at most a handful of such sums.
TERMS = 64


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Arrays of numbers stay whole; everything else is taken apart."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{path}/{key}")
    else:
        yield path, tree


def is_numbers(value: Any) -> bool:
    while isinstance(value, list) and value:
        value = value[0]
    return isinstance(value, float)


def wrong(got: Any, want: Any) -> list[str]:
    """What differs: structure, names, order and whole numbers exactly, the others by more than rounding."""
    mine, theirs = dict(leaves(got)), dict(leaves(want))
    out = sorted(mine.keys() ^ theirs.keys())
    for path in mine.keys() & theirs.keys():
        if is_numbers(theirs[path]):
            exact = np.asarray(theirs[path], np.float64)
            bound = reference.tolerance(np.float32, TERMS) * max(np.abs(exact).max(), 1e-3)
            if reference.excess(np.asarray(mine[path], np.float64), exact, bound) > 1:
                out.append(path)
        elif mine[path] != theirs[path]:
            out.append(path)
    return sorted(out)


def dense(peft: Any) -> dict[str, Any]:
    return cases.dense(peft, ours.tune_to_peft_adapter_weights, ours.tune_to_peft_adapter_config)


def test_dense_layers_and_utilities() -> None:
    got = dense(ours)
    # Row order of rotary halves, which torchtune gives to B and not to the magnitude: (heads, half, 2).
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    theirs = np.asarray(RECORDED["dense"]["peft weights"][key])
    moved = theirs.reshape(2, 2, 2).swapaxes(1, 2).reshape(-1)
    assert not np.array_equal(moved, theirs)
    np.testing.assert_allclose(got["peft weights"].pop(key), moved, rtol=1e-6)
    want = json.loads(json.dumps(RECORDED["dense"]))
    del want["peft weights"][key]
    assert wrong(got, want) == []


def test_a_wrong_scale_would_be_noticed() -> None:
    def scaled(kind: Any) -> Any:
        return lambda i, o, r, alpha, *rest, **more: kind(i, o, r, alpha * 1.01, *rest, **more)

    changed = SimpleNamespace(**{**vars(ours), "LoRALinear": scaled(ours.LoRALinear)})
    changed.DoRALinear = scaled(ours.DoRALinear)
    found = wrong(dense(changed), RECORDED["dense"])
    assert {"/lora as it is/y", "/lora as it is/gradients/lora_a.weight", "/dora trained/y"} <= set(found)
    assert "/lora as it is/state/weight" not in found


@pytest.mark.filterwarnings("ignore")  # of torchao, on its own classes
def test_quantised_layers() -> None:
    qat = pytest.importorskip("torchao.quantization.qat")
    got = cases.quantised(ours, qat.IntxFakeQuantizeConfig)
    assert wrong(got, RECORDED["quantised"]) == []
    # A base that is not quantised at all is far outside.
    got["nf4 lora"]["y"] = (np.asarray(got["nf4 lora"]["y"]) * 1.001).tolist()
    assert wrong(got, RECORDED["quantised"]) == ["/nf4 lora/y"]
