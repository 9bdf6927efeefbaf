"""Orthogonal shift: a baseline without data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from tvjax.transport.base import Flat, Link, Part, Reads, Rule, Transport

if TYPE_CHECKING:
    from tvjax.transport.fit import Pair


def orthogonal_shift() -> Transport:
    """Removes from each leaf its component along ``theta_B - theta_A``: ``tau - <tau, d> / <d, d> d``.

    No data are needed; the models must have one shape. (A baseline of the re-basin literature.)

    Returns:
      The transport.

    >>> orthogonal_shift().name
    'orthogonal_shift'
    """
    link = Link("orthogonal_shift", "bridge", Reads(), _fit, _transform, same_shapes=True)
    return Transport((link,))


def _fit(pair: Pair) -> Part:
    shifts, rules = {}, []
    for leaf in pair.leaves:
        rule = Rule(leaf.target, leaf.source or "", "shifted", leaf.shape, leaf.source_shape)
        if leaf.source is None:
            rules.append(rule._replace(action="unmatched", why="the source has no such leaf"))
            continue
        rules.append(rule)
        shifts[leaf.target] = pair.target_leaves[leaf.local].astype(jnp.float32) - pair.source_leaves[
            leaf.local
        ].astype(jnp.float32)
    return Part("orthogonal_shift", shifts, {}, tuple(rules))


def _transform(part: Part, flat: Flat) -> Flat:
    moved = {}
    for rule in part.rules:
        if rule.source not in flat:
            continue
        tau, shift = flat[rule.source], part.arrays[rule.target]
        size = jnp.sum(shift**2)
        moved[rule.target] = tau - jnp.sum(tau * shift) / jnp.where(size > 0, size, 1) * shift
    return moved
