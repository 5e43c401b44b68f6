"""PEFT directories as files: strict reading of damaged, hostile and inconsistent ones."""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_torch import config_for, load_peft, plan_peft, read_peft, save_peft
from lora_torch.peft_load import _same_product
from lora_torch.peft_read import read_described
from lora_torch.peft_tensors import Factors
from tests.interop.peft_models import random_adapter
from tests.interop.peft_toy import CONFIG, PARAMS, TENSORS, P, X, edit_config, edit_tensors, fn, key, plan_of
from tests.interop.peft_toy import directory as directory  # a fixture


def test_every_problem_is_in_one_error(directory: Path) -> None:
    def break_it(tensors: dict[str, np.ndarray]) -> None:
        del tensors[key(0, "q", "B")]
        tensors[f"{P}layers.0.v.weight"] = np.ones((6, 4), np.float32)
        tensors["layers.9.q.lora_A.weight"] = np.ones((2, 4), np.float32)
        tensors[key(1, "v", "B")] = np.ascontiguousarray(tensors[key(1, "v", "B")].T)
        tensors[key(1, "q", "A")] = np.ones((2, 5), np.float32)
        tensors[f"{P}layers.7.q.lora_A.weight"] = np.ones((2, 4), np.float32)
        tensors[f"{P}layers.7.q.lora_B.weight"] = np.ones((6, 2), np.float32)

    edit_tensors(directory, break_it)
    with pytest.raises(ValueError) as error:
        load_peft(directory, plan_of())
    for part in (
        "layers.0.q has lora_A but no lora_B",
        "layers.0.v.weight (6, 4) would overwrite a base tensor",
        "layers.9.q.lora_A.weight does not start with `base_model.model.`",
        "layers.1.v: lora_A (2, 4), lora_B (2, 6) do not agree on a rank; are they transposed?",
        "layers.1.q: lora_A (2, 5), lora_B (6, 2) do not fit `layers_1.q.kernel` (4, 6), which takes (r, 4) and (6, r)",
        "unexpected: base_model.model.layers.7.q is not in the plan; nearest: layers.1.q",
    ):
        assert part in str(error.value), str(error.value)
    with pytest.raises(ValueError, match="would overwrite a base tensor"):
        read_peft(directory)


def test_missing_modules_and_modules_that_peft_would_drop(directory: Path) -> None:
    edit_tensors(directory, lambda t: [t.pop(key(1, "v", f)) for f in "AB"])
    with pytest.raises(ValueError, match="missing: base_model.model.layers.1.v, for `layers_1.v.kernel`"):
        load_peft(directory, plan_of())
    with pytest.raises(ValueError, match="missing: base_model.model.layers.1.v, which the configuration targets"):
        plan_peft(directory, fn, PARAMS, X)
    edit_config(directory, exclude_modules=["layers.1.v"])
    assert [s.name for s in plan_peft(directory, fn, PARAMS, X).sites][1:] == ["layers_0.v.kernel", "layers_1.q.kernel"]
    edit_config(directory, target_modules=["q"])
    with pytest.raises(ValueError, match="layers.0.v has factors, but the configuration does not target it"):
        read_peft(directory)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("layers.0.q.lora_magnitude_vector", (6,), "belongs to DoRA, but the configuration has no `use_dora`"),
        ("layers.0.q.lora_B.bias", (6,), "belongs to `lora_bias`"),
        ("layers.0.q.ia3_l", (6, 1), "belongs to IA3"),
        ("embed.token_adapter.trainable_tokens_delta", (2, 4), "belongs to trainable tokens"),
        ("layers.0.q.base_layer.bias", (6,), "would overwrite a base tensor"),
        ("layers.0.q.lora_A.default.weight", (2, 4), "would overwrite a base tensor"),
        ("../../etc/passwd.lora_A.weight", (2, 4), "is no name of a tensor"),
        ("layers/0/q.lora_A.weight", (2, 4), "is no name of a tensor"),
        ("layers.0.q\n.lora_A.weight", (2, 4), "is no name of a tensor"),
        ("layers..q.lora_A.weight", (2, 4), "is no name of a tensor"),
        ("layers.0.q.lora_embedding_A", (2, 4), "factors of an embedding and of a linear layer"),
        ("layers.9.q.base_layer.weight", (6, 4), "would overwrite the base"),
    ],
)
def test_keys_without_a_role(directory: Path, name: str, shape: tuple[int, ...], message: str) -> None:
    edit_tensors(directory, lambda t: t.update({P + name: np.ones(shape, np.float32)}))
    with pytest.raises(ValueError, match=message):
        read_peft(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(use_dora=True), "layers.0.q has no lora_magnitude_vector although `use_dora` is true"),
        (dict(peft_type="IA3"), "`peft_type='IA3'` is another method than LoRA"),
        (dict(peft_type="PROMPT_TUNING"), "PROMPT_TUNING"),
        (dict(bias="some"), "`bias` must be one of none, all, lora_only, got 'some'"),
        (dict(init_lora_weights="pissa"), "`init_lora_weights='pissa'` changed the base model"),
        (dict(init_lora_weights="olora"), "changed the base model"),
        (dict(init_lora_weights="something new"), "is not known here"),
        (dict(r="2"), "`r` must be a positive whole number, got '2'"),
        (dict(r=True), "`r` must be"),
        (dict(lora_alpha=float("inf")), "`lora_alpha` must be a finite number"),
        (dict(rank_pattern=[1]), "`rank_pattern` must be an object"),
        (dict(rank_pattern={"q": 0}), r"`rank_pattern\['q'\]` must be"),
        (dict(rank_pattern={"(": 2}), "is not a regular expression"),
        (dict(target_modules={"q": 1}), "`target_modules` must be a list of names"),
        (dict(target_modules="("), "is not a regular expression"),
        (dict(layers_to_transform="1"), "`layers_to_transform` must be whole numbers"),
        (dict(layers_to_transform=True), "`layers_to_transform` must be whole numbers"),
        (dict(use_rslora="false"), "`use_rslora` must be true or false, got 'false'"),
        (dict(ensure_weight_tying="false"), "`ensure_weight_tying` must be true or false, got 'false'"),
        (dict(r=10**400), "`r` must be a positive whole number, got 1000"),
        (dict(lora_alpha=10**400), "`lora_alpha` must be a finite number, got 1000"),
        (dict(rank_pattern={"(?i)q": 2}), r"'\(\?i\)q' is not a regular expression: global flags"),
        (dict(modules_to_save=["(?i)q"]), "is not a regular expression: global flags"),
        (dict(alpha_pattern={"q{99999999999}": 2}), "is not a regular expression: the repetition number"),
        (dict(rank_pattern={"(" * 5000 + ")" * 5000: 2}), "is not a regular expression: maximum recursion"),
        (dict(use_novelty={"depth": 3}), "`use_novelty={'depth': 3}` is unknown"),
        (dict(velora_config={"x": 1}), "train without it, or merge the adapter in PEFT"),
    ],
)
def test_configurations_that_are_refused(directory: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(directory, **changes)
    for read in (read_peft, config_for, lambda d: load_peft(d, plan_of())):
        with pytest.raises(ValueError, match=message):
            read(directory)


def test_initialisations_that_left_the_base_alone_are_taken(directory: Path) -> None:
    edit_config(directory, init_lora_weights="eva", eva_config={"rho": 2.0})
    assert load_peft(directory, plan_of()).sites == plan_of().sites
    assert config_for(directory).init == "kaiming"


def test_a_setting_that_stands_twice(directory: Path) -> None:
    text = (directory / CONFIG).read_text()
    (directory / CONFIG).write_text(text.replace('"lora_alpha"', '"lora_alpha": 99, "lora_alpha"'))
    with pytest.raises(ValueError, match="is not valid JSON: it has 'lora_alpha' twice"):
        read_peft(directory)


def test_an_unknown_setting_that_is_off_changes_nothing(directory: Path) -> None:
    edit_config(directory, use_novelty=False, novelty_config=None)
    assert load_peft(directory, plan_of()).sites == plan_of().sites


@pytest.mark.parametrize("text", ["", "[]", '"LORA"', "{", "\xff", "[" * 100_000, "null"])
def test_a_configuration_that_is_no_object(directory: Path, text: str) -> None:
    (directory / CONFIG).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="is not valid JSON|not an object"):
        read_peft(directory)


def damaged(data: bytes) -> dict[str, bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    first = next(k for k in header if k != "__metadata__")

    def with_header(change: Callable[[dict[str, Any]], Any]) -> bytes:
        altered = json.loads(json.dumps(header))
        change(altered)
        text = json.dumps(altered).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return {
        "empty": b"",
        "a few bytes": data[:5],
        "cut in the header": data[: length // 2],
        "cut in the tensors": data[:-7],
        "longer": data + b"\0" * 8,
        "a header longer than the file": struct.pack("<Q", 1 << 40) + data[8:],
        "a header length of 2**64 - 1": b"\xff" * 8 + data[8:],
        "a header that is no JSON": data[:8] + b"x" * length + data[8 + length :],
        "offsets beyond the end": with_header(lambda h: h[first].update(data_offsets=[0, 1 << 30])),
        "offsets that overlap": with_header(lambda h: h[first].update(data_offsets=[0, 4])),
        "a shape that does not fit": with_header(lambda h: h[first].update(shape=[1 << 40, 4])),
        "an unknown dtype": with_header(lambda h: h[first].update(dtype="Q7")),
        "a pickle": pickle.dumps({"a": 1}),
    }


EMPTY_HEADER = b'{"a":{}}'


@pytest.mark.parametrize("how", damaged(struct.pack("<Q", len(EMPTY_HEADER)) + EMPTY_HEADER))
def test_damaged_tensors(directory: Path, how: str) -> None:
    (directory / TENSORS).write_bytes(damaged((directory / TENSORS).read_bytes())[how])
    with pytest.raises(ValueError, match="is damaged or is no safetensors file"):
        read_peft(directory)


def test_integers_are_no_factors(directory: Path) -> None:
    edit_tensors(directory, lambda t: t.update({key(0, "q", "A"): np.ones((2, 4), np.int32)}))
    with pytest.raises(ValueError, match=r"layers.0.q.lora_A.weight \(I32\)"):
        read_peft(directory)
    save_file({}, directory / TENSORS)
    with pytest.raises(ValueError, match="holds no tensors"):
        read_peft(directory)


def test_absent_files(tmp_path: Path, directory: Path) -> None:
    for empty in (tmp_path / "nothing", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"there is no {CONFIG}"):
            read_peft(empty)
    with pytest.raises(FileNotFoundError, match="its folders adapter are adapters, pass one of them"):
        read_peft(tmp_path)
    (directory / TENSORS).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no {TENSORS}"):
        read_peft(directory)


class Hostile:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["HOSTILE_DIRECTORY"],)


def test_a_pickle_is_read_by_torchs_restricted_loader_only(directory: Path, tmp_path: Path, monkeypatch: Any) -> None:
    torch = pytest.importorskip("torch")
    tensors = load_file(directory / TENSORS)
    (directory / TENSORS).unlink()
    torch.save({k: torch.tensor(v) for k, v in tensors.items()}, directory / "adapter_model.bin")
    _, again = read_peft(directory)
    assert all(np.array_equal(tensors[k], again[k]) for k in tensors) and set(again) == set(tensors)

    monkeypatch.setenv("HOSTILE_DIRECTORY", str(tmp_path / "hit"))
    torch.save({"a": Hostile()}, directory / "adapter_model.bin")
    with pytest.raises(ValueError, match="cannot be read as plain tensors"):
        read_peft(directory)
    (directory / "adapter_model.bin").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(ValueError, match="never unpickled otherwise"):
        read_peft(directory)
    torch.save([torch.ones(2)], directory / "adapter_model.bin")
    with pytest.raises(ValueError, match="other things than named floating-point tensors"):
        read_peft(directory)
    assert not (tmp_path / "hit").exists()

    monkeypatch.setitem(sys.modules, "torch", None)  # as on a machine without it
    with pytest.raises(ValueError, match="install torch, or save the adapter as"):
        read_peft(directory)


def test_a_description_takes_methods_that_are_switched_on(directory: Path) -> None:
    """`read_described` is for looking at a file: what is not applied here has a role all the same, if it is stated."""

    def extend(tensors: dict[str, np.ndarray]) -> None:
        for layer in range(2):
            for module in "qv":
                tensors[f"{P}layers.{layer}.{module}.lora_magnitude_vector"] = np.ones(6, np.float32)
                tensors[f"{P}layers.{layer}.{module}.lora_B.bias"] = np.ones(6, np.float32)
        tensors[f"{P}embed.token_adapter.trainable_tokens_delta"] = np.ones((2, 4), np.float32)
        tensors[f"{P}layers.0.q.base_layer.bias"] = np.full(6, 2, np.float32)

    edit_tensors(directory, extend)
    settings = dict(use_dora=True, lora_bias=True, trainable_token_indices=[1, 2], bias="lora_only")
    edit_config(directory, **settings)
    file = read_described(directory)
    assert file.problems == [] and set(file.full) == {"layers.0.q.bias"}
    assert set(file.extras["layers.1.v"]) == {"lora_magnitude_vector", "lora_bias"}
    assert set(file.extras["embed"]) == {"trainable_tokens_delta"}
    for name, told in (
        ("use_dora", "layers.0.q.lora_magnitude_vector belongs to DoRA, but the configuration has no `use_dora`"),
        ("lora_bias", "layers.1.v.lora_B.bias belongs to `lora_bias`, but the configuration has no"),
        ("trainable_token_indices", "trainable_tokens_delta belongs to trainable tokens, but"),
        ("bias", "layers.0.q.base_layer.bias (6,) would overwrite a base tensor"),
    ):
        edit_config(directory, **{**settings, name: None})
        assert any(told in problem for problem in read_described(directory).problems), told
    edit_config(directory, **settings)
    edit_tensors(directory, lambda t: t.pop(f"{P}layers.0.v.lora_magnitude_vector"))
    edit_tensors(directory, lambda t: t.update({f"{P}layers.0.q.lora_B.bias": np.ones(5, np.float32)}))
    edit_tensors(directory, lambda t: t.update({f"{P}layers.9.q.lora_B.bias": np.ones(6, np.float32)}))
    assert read_described(directory).problems == [
        "layers.0.q: lora_bias is (5,), but lora_B (6, 2)",
        "layers.0.v has no lora_magnitude_vector although `use_dora` is true",
        f"{P}layers.9.q has lora_bias but no factors",
    ]
    with pytest.raises(ValueError, match="`use_dora` and `lora_bias` exclude each other"):
        read_peft(directory)


@pytest.mark.parametrize(
    ("a", "b"),
    [((6, 3, 5), (8, 2, 1)), ((4, 3, 1, 1, 1, 1), (8, 4, 1, 1, 1, 1)), ((4, 3, 5), (8, 4, 2)), ((4,), (4,))],
)
def test_shapes_that_no_layer_of_peft_has(directory: Path, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    """Among them six ranks in three groups, into which eight outputs do not divide."""
    edit_config(directory, rank_pattern={"layers.0.q": a[0]})
    edit_tensors(directory, lambda t: t.update({key(0, "q", "A"): np.ones(a, np.float32)}))
    edit_tensors(directory, lambda t: t.update({key(0, "q", "B"): np.ones(b, np.float32)}))
    with pytest.raises(ValueError, match="layers.0.q: lora_A .* (are no factors|do not agree on a rank)"):
        read_peft(directory)


# Ranks and scales -------------------------------------------------------------------------------------------------


def test_two_factorings_of_one_product_and_the_smallest_difference() -> None:
    """A table of 30,000 words, sixteen ranks: rounding is no difference, one bit of one float32 factor is."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(16, 30_000)).astype(np.float32), rng.normal(size=(64, 16)).astype(np.float32)
    rotation = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    one = Factors(a, b, 0.3)
    assert _same_product(one, Factors(a[::-1], b[:, ::-1], 0.3))
    assert _same_product(one, Factors(rotation.T @ a, 0.3 * (b @ rotation), 1.0))
    assert not _same_product(one, Factors(a, b, 0.30001))
    other = a.copy()
    other[3, 7] = np.nextafter(a[3, 7], np.float32(9))
    assert not _same_product(one, Factors(other, b, 0.3))


def test_ranks_come_from_tensors_and_alphas_must_be_plain(tmp_path: Path) -> None:
    """PEFT sorts its JSON: of two patterns that match, the first in the file need not be the one it meant."""
    plan = plan_of(target_modules=["q"], rank_pattern={"layers.1.q": 3})
    directory = save_peft(random_adapter(plan), tmp_path / "a", plan)
    edit_config(directory, rank_pattern={"1.q": 7, "layers.1.q": 3})
    assert [s.rank for s in load_peft(directory, plan).sites] == [2, 3]
    assert [s.rank for s in plan_peft(directory, fn, PARAMS, X).sites] == [2, 3]

    edit_config(directory, alpha_pattern={"1.q": 4, "layers.1.q": 4})
    assert [s.alpha for s in load_peft(directory, plan.sites).sites] == [16, 4]
    edit_config(directory, alpha_pattern={"1.q": 4, "layers.1.q": 5})
    with pytest.raises(ValueError, match="several keys of `alpha_pattern` match, with alphas 4, 5"):
        load_peft(directory, plan.sites)
    edit_config(directory, alpha_pattern={}, rank_pattern={})
    with pytest.raises(ValueError, match="layers.1.q: the tensors have rank 3, the configuration says 2"):
        load_peft(directory, plan.sites)


def test_a_plan_with_another_scale_is_refused(directory: Path) -> None:
    with pytest.raises(ValueError, match="the file has rank 2, alpha 16, the plan rank 2, alpha 8. Make the plan with"):
        load_peft(directory, plan_of(alpha=8))
    with pytest.raises(ValueError, match="the plan rank 2, alpha 16 with rsLoRA"):
        load_peft(directory, plan_of(use_rslora=True))
    # The same scale said otherwise computes the same.
    same = plan_of(alpha=8 * 2**0.5, use_rslora=True)
    assert load_peft(directory, same).sites == same.sites
