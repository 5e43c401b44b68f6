"""What a `LoRAConfig` accepts, what it says about the rest, and what a plan and an adapter refuse at once."""

from __future__ import annotations

import inspect
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import inits
from lora_jax.config import COMPUTED_INITS
from lora_jax.interpret import site_key
from lora_jax.sites import Site

X = jnp.ones((2, 4))


def dense(params: Any, x: Any) -> Any:
    return x @ params["q"]["kernel"]


PARAMS = {"q": {"kernel": jnp.ones((4, 4))}}


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("rank", 0, ValueError, "`rank=0` must be a positive whole number"),
        ("rank", True, ValueError, "`rank=True`"),
        ("rank", 2.0, ValueError, "`rank=2.0`"),
        ("alpha", "16", ValueError, "`alpha='16'` must be a finite number"),
        ("alpha", float("inf"), ValueError, "`alpha=inf`"),
        ("alpha", 1j, ValueError, "`alpha=1j`"),
        ("alpha", 0, ValueError, "multiplies every change by zero"),
        ("alpha_pattern", {"q": 0.0}, ValueError, "`alpha_pattern['q']=0.0` multiplies every change by zero"),
        ("target_modules", [], ValueError, "`target_modules` is empty"),
        ("target_modules", "", ValueError, "`target_modules` is empty"),
        ("target_modules", ["q", 3], TypeError, "`target_modules` takes names, got 3"),
        ("target_modules", 3, TypeError, "takes a list of names or a string, got int"),
        ("target_modules", ["all-linear"], ValueError, "write the string itself, target_modules='all-linear'"),
        ("exclude_modules", "", ValueError, "`exclude_modules` is empty; name the modules to leave out"),
        ("exclude_modules", "all-linear", ValueError, "would leave nothing"),
        ("modules_to_save", "head", TypeError, "write ['head']"),
        ("modules_to_save", [None], TypeError, "`modules_to_save` takes names, got None"),
        ("rank_pattern", [("q", 4)], TypeError, "`rank_pattern` maps patterns to numbers, got list"),
        ("rank_pattern", {"q": 0}, ValueError, "`rank_pattern['q']=0`"),
        ("rank_pattern", {"*.q": 4}, ValueError, "`rank_pattern` key '*.q' is not a regular expression"),
        ("rank_pattern", {"q(": 4}, ValueError, "`rank_pattern` key 'q(' is not a regular expression"),
        ("alpha_pattern", {3: 4}, TypeError, "got the key 3"),
        ("rank_pattern", {"q{99999999999}": 4}, ValueError, "is not a regular expression (the repetition number"),
        (
            "target_modules",
            "layers(",
            ValueError,
            "the target 'layers(' is neither a regular expression nor a wildcard",
        ),
        ("exclude_modules", "q{99999999999}", ValueError, "is neither a regular expression nor a wildcard"),
        ("target_modules", "(" * 5000 + ")" * 5000, ValueError, "is neither a regular expression nor a wildcard"),
        ("use_rslora", "no", TypeError, "`use_rslora='no'`: write True or False"),
        ("use_rslora", 1, TypeError, "`use_rslora=1`"),
        ("dropout", "0.1", ValueError, "`dropout='0.1'` must be a probability"),
        ("dropout", None, ValueError, "`dropout=None` must be a probability"),
        ("dropout", 1.0, ValueError, "`dropout=1.0` must be a probability"),
        ("dropout", float("nan"), ValueError, "`dropout=nan` must be a probability"),
        ("init", "kaimin", ValueError, "did you mean kaiming?"),
        ("init", "pissa", ValueError, "is computed, from more than a key: leave `init` out, plan, and call"),
        ("init", "pissa_niter_4", ValueError, "`adapter, params = inits.pissa(plan, params)`"),
        ("init", "EVA", ValueError, "`adapter = inits.eva(plan, fn, params, batches)`"),
        ("init", "lora-ga", ValueError, "`adapter, params = inits.lora_ga(plan, loss, params, batches)`"),
        ("dtype", "int8", TypeError, "cannot be trained"),
        ("dtype", "float31", TypeError, "is not a dtype"),
        ("layers_to_transform", [], ValueError, "`layers_to_transform` is empty"),
        ("layers_to_transform", [0.0], ValueError, "`layers_to_transform=0.0` must be whole numbers, 0 or more"),
        ("layers_to_transform", "0", ValueError, "`layers_to_transform='0'` must be whole numbers"),
        ("layers_to_transform", ["0"], ValueError, "`layers_to_transform='0'` must be whole numbers"),
        ("layers_to_transform", [-1], ValueError, "`layers_to_transform=-1` must be whole numbers, 0 or more"),
        ("layers_to_transform", True, ValueError, "`layers_to_transform=True` must be whole numbers"),
        ("layers_pattern", "layers", ValueError, "it needs `layers_to_transform`"),
    ],
)
def test_a_wrong_value_says_what_to_write(field: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        lj.LoRAConfig(**{"target_modules": ["q"], field: value})
    assert message in str(raised.value)


@pytest.mark.parametrize("name", COMPUTED_INITS)
def test_a_computed_start_is_named_as_it_is_called(name: str) -> None:
    """The call in the error is that of a function that there is, with the arguments that it takes."""
    call = COMPUTED_INITS[name].split("inits.")[1]
    function = getattr(inits, name)
    assert call.startswith(f"{name}(")
    given = call.removeprefix(f"{name}(").removesuffix(")").split(", ")
    required = [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    assert given == required


def test_layers_need_a_list_of_names() -> None:
    with pytest.raises(ValueError, match="needs a list in `target_modules`"):
        lj.LoRAConfig(target_modules=".*q", layers_to_transform=0)


def test_numbers_of_numpy_become_pythons() -> None:
    config = lj.LoRAConfig(
        rank=np.int64(2), alpha=np.int64(3), dropout=np.float64(0.5), use_rslora=np.bool_(True),
        target_modules=["q"], layers_to_transform=np.array([0, 1]),
        rank_pattern={"q": np.int32(4)}, alpha_pattern={"q": np.float32(0.5)},
    )  # fmt: skip
    plain = lj.LoRAConfig(
        rank=2, alpha=3, dropout=0.5, use_rslora=True, target_modules=["q"], layers_to_transform=[0, 1],
        rank_pattern={"q": 4}, alpha_pattern={"q": 0.5},
    )  # fmt: skip
    assert config == plain and hash(config) == hash(plain)
    assert lj.LoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == plain
    assert json.dumps(config.to_peft()) == json.dumps(plain.to_peft())


def test_configurations_and_plans_are_static_arguments_of_jit() -> None:
    """Equal ones share a trace; ones that differ, be it in the order of their patterns, do not."""
    traces = []

    def run(config: lj.LoRAConfig, plan: lj.Plan, x: jax.Array) -> jax.Array:
        traces.append(config)
        return lj.apply(dense, plan)(PARAMS, plan.init(jax.random.key(0)), x)

    jitted = jax.jit(run, static_argnums=(0, 1))
    for patterns in ({"q": 2, ".*": 2}, {"q": 2, ".*": 2}, {".*": 2, "q": 2}):
        config = lj.LoRAConfig(rank=1, target_modules=["q"], rank_pattern=patterns)
        jitted(config, lj.plan(dense, PARAMS, X, config=config), X)
    assert len(traces) == 2
    one, other = (lj.LoRAConfig(rank_pattern=p) for p in ({"q": 2, "k": 3}, {"k": 3, "q": 2}))
    assert one != other and one == one.replace() and one != "q"


def test_float64_factors_need_64_bit_mode() -> None:
    plan = lj.plan(dense, PARAMS, X, config=lj.LoRAConfig(target_modules=["q"], dtype="float64"))
    with jax.enable_x64(False), pytest.raises(ValueError, match="need JAX's 64-bit mode"):
        plan.init(jax.random.key(0))
    with jax.enable_x64(True):
        assert plan.init(jax.random.key(0))["q"]["lora_A"]["kernel"].dtype == jnp.float64


def test_bare_parameters_are_refused_when_planning() -> None:
    with pytest.raises(TypeError, match="a parameter needs a name: wrap it in a dictionary"):
        lj.plan(lambda w, x: x @ w, jnp.ones((4, 4)), X, config=lj.LoRAConfig())


def test_the_scale_of_a_full_copy_is_one() -> None:
    assert Site(("head", "kernel"), (4, 2), "float32", "full").scale == 1.0
    assert Site(("q", "kernel"), (4, 2), "float32", "linear", rank=4, alpha=6, rslora=True).scale == 3.0


def test_one_dotted_name_of_two_parameters_gives_two_initial_values() -> None:
    params = {"a.b": {"kernel": jnp.ones((4, 4))}, "a": {"b": {"kernel": jnp.ones((4, 4))}}}

    def fn(params: Any, x: Any) -> Any:
        return x @ params["a.b"]["kernel"] @ params["a"]["b"]["kernel"]

    plan = lj.plan(fn, params, X, config=lj.LoRAConfig(target_modules=["b"]))
    adapter, key = plan.init(jax.random.key(0)), jax.random.key(1)
    first, second = (np.asarray(adapter.factors(site)[0]) for site in plan.sites)
    assert not np.any(first == second)
    assert len({int(jax.random.bits(site_key(key, site))) for site in plan.sites}) == 2
    again = plan.init(jax.random.key(0))
    assert all(map(np.array_equal, jax.tree.leaves(adapter), jax.tree.leaves(again)))


def test_a_parameter_in_a_factors_place_is_refused() -> None:
    params = {"q": {"kernel": jnp.ones((4, 4)), "lora_A": {"kernel": jnp.ones((4, 4))}}}

    def fn(params: Any, x: Any) -> Any:
        return x @ params["q"]["kernel"] @ params["q"]["lora_A"]["kernel"]

    def made(**config: Any) -> lj.Plan:
        return lj.plan(fn, params, X, config=lj.LoRAConfig(**config))

    with pytest.raises(ValueError) as error:
        made(target_modules=["q.kernel"], modules_to_save=["q.lora_A"])
    assert "`q.kernel` and `q.lora_A.kernel` would both be stored at q/lora_A/kernel" in str(error.value)
    sites = (*made(target_modules=["q.kernel"]).sites, Site(("q", "lora_A"), (4,), "float32", "full"))
    with pytest.raises(ValueError, match="would both be stored at q/lora_A of the adapter"):
        lj.Adapter.from_leaves({}, sites)
    assert len(made(target_modules=["q.kernel"]).init(jax.random.key(0))["q"]) == 2


def test_the_table_says_that_members_share_a_factor() -> None:
    params = {"members": jnp.ones((3, 4, 5)), "w": jnp.ones((5, 5))}

    def fn(params: Any, x: Any) -> Any:
        return jax.vmap(lambda w: x @ w)(params["members"]) @ params["w"]

    config = lj.LoRAConfig(rank=2, target_modules=["members", "w"])
    table = str(lj.plan(fn, params, X, config=config)).splitlines()
    assert [("one lora_A" in line) for line in table if line.startswith(("members ", "w "))] == [True, False]
    assert "axis_roles={'members': 'lio'}" in "\n".join(table)
    stated = lj.plan(fn, params, X, config=config, axis_roles={"members": "lio"})
    assert "one lora_A" not in str(stated)
    assert stated.sites[0].a_shape == (3, 4, 2)
