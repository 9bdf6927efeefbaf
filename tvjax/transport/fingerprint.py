"""Which task vector a state is of: three numbers a leaf, that can be computed and compared inside `jit`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tvjax import tree

_TOLERANCE = 1e-2  # of the norm: a task vector that was stored in 16 bits is still the same one
_PREFIX = "task vector:"


def fingerprints(flat: Mapping[str, Any]) -> dict[str, Array]:
    """The fingerprint of each leaf of a task vector, by the name that a link keeps it under.

    >>> list(fingerprints({"w": jnp.ones(2)}))
    ['task vector:w']
    """
    return {_PREFIX + path: fingerprint(jnp.asarray(leaf, jnp.float32)) for path, leaf in flat.items()}


@jax.jit
def fingerprint(leaf: Float[Array, "*shape"]) -> Float[Array, " 3"]:
    """The norm of a leaf, and two sums of its entries with random signs, which are of the norm's size.

    >>> fingerprint(jnp.zeros(3)).tolist()
    [0.0, 0.0, 0.0]
    """
    numbers = jax.lax.iota(jnp.uint32, leaf.size).reshape(leaf.shape)
    mixed = numbers * jnp.uint32(0x9E3779B1)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x85EBCA77)
    sums = [jnp.sum(jnp.where((mixed >> bit) & 1, -leaf, leaf)) for bit in (31, 30)]
    return jnp.stack([jnp.sqrt(jnp.sum(jnp.square(leaf))), *sums])


def check_same(link: str, arrays: Mapping[str, Any], flat: Mapping[str, Any], expected: Sequence[str] = ()) -> Array:
    """Whether the leaves of a task vector are those that a state is of; a scalar.

    Args:
      link: name of the link, for the message.
      arrays: of its state, with the fingerprints among them.
      flat: the task vector, or part of it.
      expected: paths of leaves that must be there, if the state knows them.

    Raises:
      ValueError: where they are not; inside `jit` nothing can be raised, and the answer is all there is.
    """
    same: dict[str, Any] = {path: False for path in expected if _PREFIX + path in arrays and path not in flat}
    for path, leaf in flat.items():
        known = arrays.get(_PREFIX + path)
        found = fingerprint(jnp.asarray(leaf, jnp.float32))
        known = jnp.zeros(3) if known is None else known
        same[path] = jnp.all(jnp.abs(found - known) <= _TOLERANCE * known[0])
    if not same:
        return jnp.bool_(True)
    if not tree.is_traced(same):
        other = [path for path, is_same in jax.device_get(same).items() if not is_same]
        if other:
            raise ValueError(
                f"this state of {link} is the moved task vector of another task vector: {len(other)} of {len(same)} "
                f"leaves differ ({other[0]}, ...); fit again with this one, fit(..., tau=tau)"
            )
    return jnp.all(jnp.stack([jnp.asarray(is_same) for is_same in same.values()]))
