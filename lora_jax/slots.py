"""`per_slot`: an optimizer that treats each adapter of a stack as if it were trained alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.bank import AdapterStack


def per_slot(tx: Any, stack: AdapterStack) -> Any:
    """An optax transformation of `stack.factors` that gives every slot a state of its own.

    Whatever `tx` computes over all parameters (a clipped global norm, the count of a schedule) is computed for each
    slot by itself. `update(grads, state, factors, active=mask)` leaves slots where the mask (slots,) is False exactly
    as they are, their moments, decay and counts as well; `active_slots(stack, ids)` makes the mask of a batch.

    **Returns:** an `optax.GradientTransformationExtraArgs`. State leaves have the slots as their first axis. A slot
    that is given another adapter keeps the moments and counts of the one before until `fresh_slot` takes them away.
    """
    import optax

    axes = stack.slot_axes()

    def init(params: Any) -> Any:
        return jax.vmap(tx.init, in_axes=(axes,), axis_size=stack.slots)(params)

    def update(updates: Any, state: Any, params: Any = None, *, active: Any = None) -> tuple[Any, Any]:
        ours = None if params is None else axes
        run = jax.vmap(tx.update, in_axes=(axes, 0, ours), out_axes=(axes, 0), axis_size=stack.slots)
        updates, new = run(updates, state, params)
        if active is None:
            return updates, new
        active = jnp.asarray(active)

        def only(x: jax.Array, other: Any, axis: int) -> jax.Array:
            shape = [1] * x.ndim
            shape[axis] = stack.slots
            return jnp.where(active.reshape(shape), x, other)

        updates = jax.tree.map(lambda x, axis: only(x, jnp.zeros_like(x), axis), updates, axes)
        return updates, jax.tree.map(lambda x, old: only(x, old, 0), new, state)

    return optax.GradientTransformationExtraArgs(init, update)


def fresh_slot(tx: Any, state: Any, stack: AdapterStack, slot: int) -> Any:
    """The state of `tx = per_slot(...)` with one slot as it is when training begins: for a new adapter in its place.

        bank = bank.remove("a").add("b", adapter)
        state = fresh_slot(tx, state, bank.stack, bank.slot("b"))

    **Raises:** `ValueError` for a slot that the stack does not have.
    """
    if not 0 <= slot < stack.slots:
        raise ValueError(f"there is no slot {slot}: the stack has slots 0 to {stack.slots - 1}.")
    first = tx.init(stack.factors)
    return jax.tree.map(lambda old, new: jnp.asarray(old).at[slot].set(new[slot]), state, first)


def active_slots(stack: AdapterStack, ids: Any) -> jax.Array:
    """(slots,) booleans: the slots that `ids` name."""
    return jnp.isin(jnp.arange(stack.slots), jnp.asarray(ids))
