"""Orthogonal shift: a baseline without data."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from tvjax.transport.base import Flat, Link, LinkState, Needs, Rule, Transport, make_options

if TYPE_CHECKING:
    from tvjax.transport.pair import Pair


class Options(NamedTuple):
    """Hyperparameters of `orthogonal_shift`.

    Attributes:
      beta: the share of the component that is removed: 1 all of it, 0 none.
    """

    beta: float = 1.0


def orthogonal_shift(**options: Any) -> Transport:
    """Removes a share of each leaf's component along ``theta_B - theta_A``: ``tau - beta <tau, d> / <d, d> d``.

    No data are needed; the models must have one shape. (A baseline of the re-basin literature.)

    Args:
      **options: ``beta``, the share that is removed, all of it by default; a fitted state serves any share.

    Returns:
      The transport.

    Raises:
      ValueError: an option that is unknown or no finite number.

    >>> orthogonal_shift(beta=0.5).name
    'orthogonal_shift'
    """
    beta = make_options("orthogonal_shift", Options, options).beta
    link = Link("orthogonal_shift", "source_to_target", Needs(), _fit, partial(_transform, beta), same_shapes=True)
    return Transport((link,))


def _fit(pair: Pair) -> LinkState:
    shifts, rules = {}, []
    for leaf in pair.leaves:
        rule = Rule(leaf.target, leaf.source or "", "shifted", leaf.shape, leaf.source_shape)
        if leaf.source is None:
            rules.append(rule._replace(action="unmatched", why="the source has no such leaf"))
            continue
        rules.append(rule)
        shifts[leaf.target] = _shift(pair.source_leaves[leaf.local], pair.target_leaves[leaf.local])
    return LinkState("orthogonal_shift", shifts, {}, tuple(rules))


def _transform(beta: float, part: LinkState, flat: Flat) -> Flat:
    moved = {}
    for rule in part.rules:
        if rule.source not in flat:
            continue
        moved[rule.target] = _without(beta, jnp.asarray(flat[rule.source]), part.arrays[rule.target])
    return moved


@jax.jit
def _shift(source: jax.Array, target: jax.Array) -> jax.Array:
    return target.astype(jnp.float32) - source.astype(jnp.float32)


@jax.jit
def _without(beta: float, tau: jax.Array, shift: jax.Array) -> jax.Array:
    size = jnp.sum(shift**2)
    return tau - beta * (jnp.sum(tau * shift) / jnp.where(size > 0, size, 1)) * shift
