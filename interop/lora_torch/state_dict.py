"""Flax parameters to a PyTorch state dict and back, under the names PyTorch gives them.

Both directions run the same table (`lora_torch.naming`) and the same layouts, so going there and back returns every
bit. Nothing is guessed: a layout that neither a rule nor a shape decides is an error that lists the choices, and
every fault of a call is in one `StateDictError`.

    state_dict = to_torch_state_dict(params, preset="hf-flax", kind="torch")
    model.load_state_dict(state_dict, strict=True)
    params = from_torch_state_dict(model.state_dict(), params, preset="hf-flax")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from .arrays import KINDS, Kind, check_values, convert, kind_of, ops_of, same_bits, shape_dtype
from .checks import broken_tie, check_dtypes, check_ties, compare_shapes, hint_ties, kept_by
from .naming import Naming, nearest
from .parts import part_slices, produced_shapes
from .problems import Problems
from .resolve import resolve
from .rules import Preset, Rule
from .trees import flatten


def to_torch_state_dict(
    params: Any,
    *,
    preset: str | Preset | None = None,
    names: Mapping[str, str] | None = None,
    layouts: Mapping[str, str | tuple[str, ...]] | None = None,
    rules: Sequence[Rule] = (),
    stacks: Sequence[str] | Mapping[str, int] = (),
    tied: Mapping[str, str] | None = None,
    like: Mapping[str, Any] | None = None,
    ignore: Sequence[str] = (),
    kind: Kind = "numpy",
    copy: bool = False,
    contiguous: bool = True,
) -> dict[str, Any]:
    """Converts Flax parameters to a PyTorch state dict.

    **Arguments:**

    - `params`: nested dicts, a `FrozenDict`, an `nnx.State`, a pure dict of one, or linen variables with `params`
        and `batch_stats`. Leaves are jax or numpy arrays of any dtype.
    - `preset`, `names`, `layouts`, `rules`, `stacks`: the table, see `lora_torch.naming.Naming`.
    - `tied`: alias to source, e.g. `{"lm_head.weight": "model.embed_tokens.weight"}`. The alias is added as the
        same array; if `params` has both they must agree in every bit.
    - `like`: the state dict of the PyTorch model (or a mapping of names to shapes). Its shapes decide layouts that
        the table leaves open, and names and shapes must then match completely.
    - `ignore`: patterns of names in `like` that Flax lacks; BatchNorm's `num_batches_tracked` always is one.
    - `kind`: `"numpy"`, `"torch"` or `"jax"`, what the values are. Torch is imported for `"torch"` only.
    - `copy`: False lets results share memory with `params` (see `lora_torch.arrays`): load them, do not write to
        them in place, and drop them before a jitted step that donates `params`. True makes every array
        independent.
    - `contiguous`: False leaves a transposed kernel a strided view of `params`, so that nothing is copied and one base
        serves both libraries; safetensors files and `view` want contiguous tensors.

    **Returns:** PyTorch names to arrays of unchanged dtype, in the order of the tree's leaves.

    **Raises:** `StateDictError` listing every unknown layout, name clash, broken tie, rule that matches nothing and
    (with `like`) missing, unexpected or misshapen name. `TypeError` for leaves that are not arrays.
    """
    _check_kind(kind)
    naming = Naming(preset, names or {}, layouts or {}, rules, stacks)
    leaves, _ = flatten(params)
    shapes = None if like is None else {name: _shape_of(name, value) for name, value in like.items()}
    problems = Problems()
    entries = resolve(leaves, naming, shapes, problems)
    # Every name and shape is checked before the first value moves.
    produced = produced_shapes(entries, problems)
    for entry in entries:
        problems.other += kept_by(kind, entry.names[0], entry.leaf.dtype, "cast the parameter first")
    ties = check_ties(tied, problems)
    for alias, source in ties.items():
        if source in produced:
            produced.setdefault(alias, produced[source])
        elif not problems.ambiguous:
            problems.other.append(f"tied: the source {source} of {alias} is not produced{nearest(source, produced)}")
    if shapes is not None:
        compare_shapes(produced, shapes, (*ignore, *naming.family.ignore), problems)
    problems.raise_if_any()

    ops = ops_of(kind)
    state: dict[str, Any] = {}
    parts: dict[str, dict[int, tuple[Any, int]]] = {}
    for entry in entries:
        pieces = entry.layout.to_torch(convert(entry.leaf.value, kind), ops, contiguous)
        for name, piece in zip(entry.names, pieces, strict=True):
            if entry.part is None:
                state[name] = ops.copy(piece) if copy else piece
            else:
                parts.setdefault(name, {})[entry.part] = (piece, entry.axis)
                state[name] = None  # keeps the order of the leaves
    for name, slices in parts.items():
        ordered = [slices[part] for part in sorted(slices)]
        state[name] = ops.contiguous(ops.concat([piece for piece, _ in ordered], ordered[0][1]))
    for alias, source in ties.items():
        if alias in state and not same_bits(state[alias], state[source]):
            problems.other.append(broken_tie(alias, source))
        state.setdefault(alias, state[source])
    problems.raise_if_any()
    return state


def from_torch_state_dict(
    state_dict: Mapping[str, Any],
    like: Any,
    *,
    preset: str | Preset | None = None,
    names: Mapping[str, str] | None = None,
    layouts: Mapping[str, str | tuple[str, ...]] | None = None,
    rules: Sequence[Rule] = (),
    stacks: Sequence[str] | Mapping[str, int] = (),
    tied: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    dtype: Literal["same", "like", "stored"] = "same",
    kind: Kind = "jax",
    copy: bool = False,
) -> Any:
    """Converts a PyTorch state dict to Flax parameters.

    **Arguments:**

    - `state_dict`: PyTorch names to torch, numpy or jax arrays. It is not changed.
    - `like`: a tree of the wanted structure and shapes, of arrays or `jax.ShapeDtypeStruct`s (`jax.eval_shape` of
        the model's `init`); what `to_torch_state_dict` takes.
    - `preset`, `names`, `layouts`, `rules`, `stacks`: the table, see `lora_torch.naming.Naming`. Where it leaves a
        layout open the tensor's shape decides, if only one layout fits.
    - `tied`: alias to source. Either may be stored, or both if they agree in every bit.
    - `ignore`: patterns of stored names that Flax lacks; BatchNorm's `num_batches_tracked` always is one.
    - `dtype`: `"same"` demands the dtypes of `like`, `"like"` casts to them, `"stored"` keeps the stored ones.
    - `kind`: what the leaves are, `"jax"`, `"numpy"` or `"torch"`.
    - `copy`: False lets leaves share memory with the state dict: do not write to its tensors in place afterwards,
        as training the PyTorch model would. True makes every array independent; parameters that a jitted step
        donates need it.

    **Returns:** a tree of exactly `like`'s structure, boxes and nnx variables included.

    **Raises:** `StateDictError` listing every missing, unexpected or misshapen name (with the nearest ones), unknown
    layout, wrong dtype, broken tie and rule that matches nothing. `TypeError` for values that are not arrays.
    """
    _check_kind(kind)
    if dtype not in ("same", "like", "stored"):
        raise ValueError(f"dtype={dtype!r} is none of 'same', 'like', 'stored'; cast the result for any other")
    naming = Naming(preset, names or {}, layouts or {}, rules, stacks)
    leaves, rebuild = flatten(like)
    problems = Problems()
    stored = dict(state_dict)
    for name, value in stored.items():
        _check_array(name, value)
    ties = check_ties(tied, problems)
    for alias, source in ties.items():
        if alias in stored and source in stored:
            if not same_bits(stored[alias], stored[source]):
                problems.other.append(broken_tie(alias, source))
        elif alias in stored or source in stored:
            stored[alias] = stored[source] = stored[alias if alias in stored else source]
        else:
            problems.other.append(f"tied: neither {alias} nor {source} is stored{nearest(source, stored)}")
    shapes = {name: shape_dtype(value)[0] for name, value in stored.items()}
    entries = resolve(leaves, naming, shapes, problems)
    wanted = produced_shapes(entries, problems)
    undecided = {name for leaf in leaves for name in _possible_names(leaf, naming)} - set(wanted)
    optional = (set(ties) | set(ties.values())) - set(wanted)
    compare_shapes(wanted, shapes, (*ignore, *naming.family.ignore), problems, undecided | optional)
    check_dtypes(entries, stored, dtype, kind, problems)
    if problems.unexpected:
        hint_ties(problems, stored, wanted)
    problems.raise_if_any()

    slices = part_slices(entries)
    values = []
    for entry in entries:
        pieces = []
        for name in entry.names:
            piece = stored[name].detach() if kind_of(stored[name]) == "torch" else stored[name]
            if entry.part is not None:
                at: list[Any] = [slice(None)] * piece.ndim
                at[entry.axis] = slices[name, entry.part]
                piece = piece[tuple(at)]
            pieces.append(piece)
        ops = ops_of(kind_of(pieces[0]))
        value = entry.layout.from_torch([convert(piece, kind_of(pieces[0])) for piece in pieces], ops)
        if dtype == "like":
            value = ops.cast(value, entry.leaf.dtype)
        value = convert(value, kind)
        values.append(ops_of(kind).copy(value) if copy else value)
    return rebuild(values)


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is none of {list(KINDS)}")


def _check_array(name: str, value: Any) -> None:
    try:
        check_values(value)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None


def _shape_of(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, tuple) and all(isinstance(size, int) for size in value):
        return tuple(value)
    try:
        return shape_dtype(value)[0]
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None


def _possible_names(leaf: Any, naming: Naming) -> set[str]:
    """Names a leaf may take, decided or not, so that an undecided leaf's tensors do not count as unexpected too."""
    target = naming.target(leaf.path, len(leaf.shape))
    names: set[str] = set()
    for layout in target.layouts:
        try:
            names.update(target.expand(layout, leaf.shape))
        except ValueError:
            continue  # `resolve` has noted it
    return names
