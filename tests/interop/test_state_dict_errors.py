"""What does not fit is one error that lists everything, by name, with the numbers and the way out."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_torch import Rule, StateDictError, from_torch_state_dict, to_torch_state_dict


def f32(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def tree() -> dict[str, Any]:
    return {
        "embed": {"embedding": f32(7, 4)},
        "layers_0": {"q_proj": {"kernel": f32(4, 6), "bias": f32(6)}, "norm": {"scale": f32(4)}},
    }


def refusal(call: Any) -> StateDictError:
    with pytest.raises(StateDictError) as caught:
        call()
    return caught.value


def test_missing_unexpected_and_misshapen_in_one_error() -> None:
    state = to_torch_state_dict(tree(), preset="linen")
    state["layers.0.q_prj.weight"] = state.pop("layers.0.q_proj.weight")
    state["layers.0.norm.weight"] = f32(5)
    state["head.weight"] = f32(2, 2)
    del state["layers.0.q_proj.bias"]
    error = refusal(lambda: from_torch_state_dict(state, tree(), preset="linen"))
    assert set(error.missing) == {"layers.0.q_proj.weight", "layers.0.q_proj.bias"}
    assert set(error.unexpected) == {"layers.0.q_prj.weight", "head.weight"}
    assert error.misshapen == ("layers.0.norm.weight",)
    text = str(error)
    assert "2 missing from the state dict" in text and "2 unexpected" in text and "1 misshapen" in text
    assert "layers.0.q_proj.weight (6, 4); nearest: layers.0.q_prj.weight" in text
    assert "layers.0.norm.weight is (5,), but the parameters make (4,)" in text


def test_missing_also_where_the_layout_is_open() -> None:
    error = refusal(lambda: from_torch_state_dict({"b": f32(3)}, {"a": {"kernel": f32(3, 3)}, "b": f32(3)}))
    assert error.missing == ("a.weight",) and not error.ambiguous and "for a.kernel (3, 3)" in str(error)
    error = refusal(lambda: from_torch_state_dict({"a.weight": f32(3, 5)}, {"a": {"kernel": f32(3, 4)}}))
    assert error.misshapen == ("a.weight",) and not error.unexpected
    assert "is (3, 5); a.kernel (3, 4) needs (4, 3) by 'i o -> o i' or (3, 4) by '... -> ...'" in str(error)


def test_transposed_tensor_is_misshapen_under_a_preset() -> None:
    """A preset states the layout; a tensor stored the other way is no reason to give it up."""
    error = refusal(lambda: from_torch_state_dict({"weight": f32(4, 6)}, {"kernel": f32(4, 6)}, preset="linen"))
    assert error.misshapen == ("weight",)
    proved = from_torch_state_dict({"weight": f32(4, 6)}, {"kernel": f32(4, 6)})  # no preset: the shape decides
    assert np.array_equal(proved["kernel"], f32(4, 6))


def test_like_is_checked_both_ways() -> None:
    like = {"embed.weight": (7, 4), "layers.0.q_proj.weight": (6, 4), "layers.0.norm.weight": (4, 1), "x": (1,)}
    error = refusal(lambda: to_torch_state_dict(tree(), preset="linen", like=like))
    assert error.missing == ("layers.0.q_proj.bias",)
    assert error.unexpected == ("x",) and error.misshapen == ("layers.0.norm.weight",)
    assert refusal(lambda: to_torch_state_dict(tree(), preset="linen", like=like, ignore=["x"])).unexpected == ()


def test_layout_that_nothing_decides() -> None:
    error = refusal(lambda: to_torch_state_dict(tree()))
    assert error.ambiguous == ("layers_0.q_proj.kernel",)
    assert "(4, 6) could be 'i o -> o i' -> (6, 4), '... -> ...' -> (4, 6)" in str(error)
    assert "state `preset=…`, or `layouts={name: layout}`" in str(error)
    state = to_torch_state_dict(tree(), layouts={"**.kernel": "linear"})
    assert np.array_equal(state["layers.0.q_proj.weight"], tree()["layers_0"]["q_proj"]["kernel"].T)


def test_a_stated_layout_never_gives_way() -> None:
    layouts = {"layers_0.q_proj.kernel": "heads_in"}
    error = refusal(lambda: to_torch_state_dict(tree(), preset="linen", layouts=layouts))
    assert "'d n h -> (n h) d' does not describe an array of 2 axes" in str(error)
    error = refusal(lambda: to_torch_state_dict(tree(), preset="linen", layouts={"embed.embedding": "a b -> b"}))
    assert "{a} of length 7 left to be told apart by the name(s) ['embed.weight']" in str(error)


def test_stated_but_unused() -> None:
    error = refusal(
        lambda: to_torch_state_dict(tree(), preset="linen", names={"embd.embedding": "e"}, stacks=("layers",))
    )
    assert "rule 'embd.embedding' matches no parameter; nearest: embed.embedding" in str(error)
    assert "stack 'layers' matches no module; nearest: layers_0" in str(error)


def test_two_parameters_of_one_name() -> None:
    clash = {"a": {"kernel": f32(2, 3), "scale": f32(2)}}
    assert "a.kernel and a.scale both become a.weight" in str(
        refusal(lambda: to_torch_state_dict(clash, preset="linen"))
    )


def test_names_that_hold_dots_are_told_apart() -> None:
    error = refusal(
        lambda: to_torch_state_dict({"a.b": {"kernel": f32(3, 4)}, "a": {"b": {"kernel": f32(3, 4)}}}, preset="linen")
    )
    assert "a.b.kernel and a.b.kernel both become a.b.weight" in str(error)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "base_model.model."])
def test_a_prefix_before_every_name(prefix: str) -> None:
    state = to_torch_state_dict(tree(), preset="linen")
    wrapped = {prefix + name: value for name, value in state.items()}
    error = refusal(lambda: from_torch_state_dict(wrapped, tree(), preset="linen"))
    assert f"every name starts with `{prefix}`" in str(error) and f"name.removeprefix('{prefix}')" in str(error)
    wrapped["head.weight"] = f32(2, 2)
    assert "every name" not in str(refusal(lambda: from_torch_state_dict(wrapped, tree(), preset="linen")))


def test_parts_that_do_not_join() -> None:
    rules = [Rule("q.kernel", to="qkv.weight", part=0), Rule("k.kernel", to="qkv.weight", part=1)]
    params = {"q": {"kernel": f32(4, 6)}, "k": {"kernel": f32(5, 6)}}
    assert "qkv.weight: its parts cannot be joined" in str(
        refusal(lambda: to_torch_state_dict(params, preset="linen", rules=rules))
    )
    same = [Rule("q.kernel", to="qkv.weight", part=0), Rule("k.kernel", to="qkv.weight", part=0)]
    assert "k.kernel and q.kernel both become qkv.weight" in str(
        refusal(lambda: to_torch_state_dict({"q": params["q"], "k": params["q"]}, preset="linen", rules=same))
    )


def test_ties() -> None:
    params = {"embed": {"embedding": f32(7, 4)}}
    tied = {"head.weight": "embed.weight"}
    state = to_torch_state_dict(params, tied=tied)
    assert state["head.weight"] is state["embed.weight"]
    for stored in (state, {"embed.weight": state["embed.weight"]}, {"head.weight": state["embed.weight"]}):
        back = from_torch_state_dict(stored, params, tied=tied)
        assert np.array_equal(back["embed"]["embedding"], params["embed"]["embedding"])
    # An untied Flax head is filled from the stored embedding.
    both = from_torch_state_dict(
        {"embed.weight": f32(7, 4)},
        {**params, "head": {"kernel": f32(4, 7)}},
        tied=tied,
        preset="linen",
    )
    assert np.array_equal(both["head"]["kernel"], f32(7, 4).T)


def test_broken_ties() -> None:
    params = {"embed": {"embedding": f32(7, 4)}, "head": {"kernel": f32(7, 4).T + 1}}
    tied = {"head.weight": "embed.weight"}
    assert "tied: head.weight and embed.weight differ" in str(
        refusal(lambda: to_torch_state_dict(params, preset="linen", tied=tied))
    )
    params["head"]["kernel"] = f32(7, 4).T
    assert set(to_torch_state_dict(params, preset="linen", tied=tied)) == {"head.weight", "embed.weight"}
    state = {"embed.weight": f32(7, 4), "head.weight": -f32(7, 4)}
    only = {"embed": params["embed"]}
    assert "tied: head.weight and embed.weight differ" in str(
        refusal(lambda: from_torch_state_dict(state, only, tied=tied))
    )
    state["head.weight"] = state["embed.weight"].copy()
    assert (
        "head.weight (7, 4); nearest: embed.weight; equals embed.weight: pass tied={'head.weight': 'embed.weight'}"
        in str(refusal(lambda: from_torch_state_dict(state, only)).args[0])
    )
    assert "tied: neither lm.weight nor emb.weight is stored; nearest: embed.weight" in str(
        refusal(lambda: from_torch_state_dict({"embed.weight": f32(7, 4)}, only, tied={"lm.weight": "emb.weight"}))
    )
    assert "tied: the source emb.weight of head.weight is not produced; nearest: embed.weight" in str(
        refusal(lambda: to_torch_state_dict(only, tied={"head.weight": "emb.weight"}))
    )
    assert "tied: a -> b, which is an alias itself; name its source c" in str(
        refusal(lambda: to_torch_state_dict({"c": f32(2)}, tied={"a": "b", "b": "c"}))
    )


def test_dtypes_must_be_stated_to_change() -> None:
    state, like = {"weight": f32(3, 2)}, {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)}
    error = refusal(lambda: from_torch_state_dict(state, like))
    assert "weight is float32, kernel is bfloat16; pass dtype='like' to cast, or dtype='stored'" in str(error)
    assert from_torch_state_dict(state, like, dtype="like")["kernel"].dtype == jnp.bfloat16
    kept = from_torch_state_dict(state, like, dtype="stored")["kernel"]
    assert kept.dtype == jnp.float32 and np.array_equal(kept, f32(3, 2).T)
    double = {"weight": f32(3, 2).astype(np.float64)}
    assert "jax keeps no float64 unless jax_enable_x64" in str(
        refusal(lambda: from_torch_state_dict(double, like, dtype="stored"))
    )
    assert from_torch_state_dict(double, like, dtype="stored", kind="numpy")["kernel"].dtype == np.float64
    rule = Rule("kv", to=("k", "v"), layout="s a -> a")
    mixed = {"k": f32(3), "v": f32(3).astype(np.float16)}
    assert "kv joins tensors of several dtypes (k float32, v float16)" in str(
        refusal(lambda: from_torch_state_dict(mixed, {"kv": f32(2, 3)}, rules=[rule], dtype="stored"))
    )


def test_casts_that_cut_numbers_off_are_refused() -> None:
    for stored, wanted in ((np.float32, np.int32), (np.complex64, np.float32)):
        state, like = {"bias": np.ones(3, stored)}, {"bias": np.ones(3, wanted)}
        error = refusal(lambda state=state, like=like: from_torch_state_dict(state, like, dtype="like"))
        assert f"bias is {np.dtype(stored).name}, bias is {np.dtype(wanted).name}, which would cut off" in str(error)
    counted = from_torch_state_dict({"bias": np.arange(3)}, {"bias": np.ones(3, np.float32)}, dtype="like")
    assert np.array_equal(counted["bias"], [0, 1, 2])


def test_float64_does_not_narrow_by_itself() -> None:
    error = refusal(lambda: to_torch_state_dict({"bias": np.ones(3)}, kind="jax"))
    assert "bias: jax keeps no float64 unless jax_enable_x64 is set; cast the parameter first" in str(error)


@pytest.mark.parametrize(
    "params,error,message",
    [
        ({}, ValueError, "the parameter tree is empty"),
        ({"params": {"a": f32(2)}, "cache": {"k": f32(2)}}, ValueError, r"collections \['cache'\] have no PyTorch"),
        ({"a": {"b": "text"}}, TypeError, "a.b: expected an array .* got str"),
        ({"a": 1.0}, TypeError, "a: expected an array .* got float"),
        ({"rngs": {"key": jax.random.key(0)}}, TypeError, "rngs.key: a typed PRNG key is not a parameter"),
        (f32(2), TypeError, "a single array has no name"),
    ],
)
def test_trees_that_are_no_parameters(params: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        to_torch_state_dict(params)


def test_values_that_are_no_arrays() -> None:
    with pytest.raises(TypeError, match="weight: expected a numpy, jax or torch array, got list"):
        from_torch_state_dict({"weight": [1.0]}, {"kernel": f32(1)})
    with pytest.raises(TypeError, match="weight: expected a numpy, jax or torch array, got ShapeDtypeStruct"):
        from_torch_state_dict({"weight": jax.ShapeDtypeStruct((1,), jnp.float32)}, {"kernel": f32(1)})
    with pytest.raises(TypeError, match="expected a numpy, jax or torch array, got ShapeDtypeStruct"):
        to_torch_state_dict({"bias": jax.ShapeDtypeStruct((1,), jnp.float32)})
    with pytest.raises(TypeError, match="weight: expected an array .* got str"):
        to_torch_state_dict({"bias": f32(1)}, like={"weight": "no shape"})


def test_unknown_options() -> None:
    with pytest.raises(ValueError, match=r"kind='tf' is none of \['numpy', 'jax', 'torch'\]"):
        to_torch_state_dict(tree(), kind="tf")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dtype='bf16' is none of"):
        from_torch_state_dict({}, tree(), dtype="bf16")  # type: ignore[arg-type]


def test_inputs_are_not_changed() -> None:
    params, state = tree(), to_torch_state_dict(tree(), preset="linen", copy=True)
    before = {name: value.copy() for name, value in state.items()}
    from_torch_state_dict(state, params, preset="linen", tied={"head.weight": "embed.weight"})
    assert state.keys() == before.keys() and all(np.array_equal(state[name], before[name]) for name in before)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), params, tree()))
