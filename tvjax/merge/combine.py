"""How sparse task vectors are put together: their weighted sum, or the mean of those that agree on the sign."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float

from tvjax.merge.base import weighted_sum

Combine = Literal["linear", "ties", "ties_sum"]
MANNER = {"linear": "added", "ties": "elected mean", "ties_sum": "elected sum"}  # for the report
Elect = Literal["weighted", "sum", "count"]  # by sum_i w_i tau_i, by sum_i tau_i, or by the number of each sign
Over = Literal["weights", "count", "vectors", "none"]  # what a sum is divided by


def check_combine(combine: str) -> None:
    """Raises a ValueError unless it is a way to combine.

    >>> check_combine("ties")
    """
    if combine not in get_args(Combine):
        raise ValueError(f"combine must be one of {get_args(Combine)}, found {combine!r}")


def combined(
    leaves: Sequence[Float[Array, "*shape"]], weights: Float[Array, " vectors"], combine: Combine
) -> Float[Array, "*shape"]:
    """``sum_i w_i tau_i``; `elected_mean`; or that sum of those that agree, not divided. Call it inside `jit`."""
    if combine == "linear":
        return weighted_sum(leaves, weights)
    return elected_mean(leaves, weights, over="weights" if combine == "ties" else "none")


def mass(
    leaves: Sequence[Float[Array, "*shape"]], weights: Float[Array, " vectors"], elect: Elect
) -> Float[Array, "*shape"]:
    """What an entry's sign is elected by; call it inside `jit`.

    >>> x = [jnp.array([5.0]), jnp.array([-1.0]), jnp.array([-2.0])]
    >>> [mass(x, jnp.array([0.1, 1.0, 1.0]), elect).item() for elect in get_args(Elect)]
    [-2.5, 2.0, -1.0]
    """
    if elect == "weighted":
        return weighted_sum(leaves, weights)
    return reduce(jnp.add, leaves if elect == "sum" else map(jnp.sign, leaves))


def elected_mean(
    leaves: Sequence[Float[Array, "*shape"]],
    weights: Float[Array, " vectors"],
    mass: Float[Array, "*shape"] | None = None,
    over: Over = "weights",
) -> Float[Array, "*shape"]:
    """The weighted mean, entry by entry, of the vectors that have the elected sign; call it inside `jit`.

    The sign of an entry is that of its mass ``sum_i w_i tau_i``. The mean is over the vectors whose entry has that
    sign, ``sum w_i tau_i / sum w_i``: zeros do not count. Where the mass is zero, so is the result.

    Args:
      leaves: a leaf of each vector, float32.
      weights: not negative.
      mass: another mass to elect by.
      over: what the sum is divided by: the ``"weights"`` of those that agree, their ``"count"``, the number of
        ``"vectors"``, or ``"none"``.

    >>> x = [jnp.array([3.0, 1.0, 0.0]), jnp.array([1.0, -2.0, 5.0])]
    >>> elected_mean(x, jnp.ones(2)).tolist()
    [2.0, -2.0, 5.0]
    """
    mass = weighted_sum(leaves, weights) if mass is None else mass
    total, count = jnp.zeros_like(mass), jnp.zeros_like(mass)
    for number, leaf in enumerate(leaves):
        # Written so that a NaN agrees with everything and is seen in the result.
        agrees = ~(leaf * jnp.sign(mass) <= 0)
        total = total + jnp.where(agrees, leaf * weights[number], 0)
        count = count + jnp.where(agrees, weights[number] if over == "weights" else 1, 0)
    if over == "none":
        return total
    return total / (len(leaves) if over == "vectors" else jnp.where(count > 0, count, 1))
