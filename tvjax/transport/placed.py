"""Where a fitted state lies, and where what it moves is to lie: like the target's leaves.

What has the shape of a leaf (votes, shifts) lies like the leaf; maps are spread over the target's mesh, their left
factors by the source's units, their right ones by the target's, so that moving a kernel sums over devices once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from tvjax import tree
from tvjax.align.solving import spread_map
from tvjax.placement import name_of
from tvjax.spread import brought, laid, mesh_of, sharding_of
from tvjax.transport.base import LinkState, State

PyTree = Any
Shardings = Mapping[str, NamedSharding | None]


def shardings_of(params: PyTree) -> dict[str, NamedSharding | None]:
    """How the leaves of a tree lie, by path; None for those that do not lie over a mesh."""
    return {path: sharding_of(leaf) for path, leaf in tree.flatten(params).items()}


def place(state: State, params: PyTree) -> State:
    """A fitted state for a target that lies elsewhere than it did when the state was fitted.

    Args:
      state: what `tvjax.fit` returned, on whatever devices, or what `tvjax.checkpoints.load_state` has read.
      params: of the target, arrays or `jax.ShapeDtypeStruct` with shardings.

    Returns:
      The state over their mesh (on one device where they have none), whose task vectors lie like them; a note says
      where it was fitted.

    >>> import jax.numpy as jnp
    >>> from tvjax import fit, identity, single_stage
    >>> model = single_stage(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 2))})
    >>> place(fit(identity(), model, model), model.params).notes
    ()
    """
    fitted, mesh = state.mesh, mesh_of(params)
    if mesh is None:
        one = next((leaf.sharding for leaf in jax.tree.leaves(params) if getattr(leaf, "sharding", None)), None)
        state = jax.device_put(state, one)
    else:
        state = brought(state, mesh)
    parts = tuple(placed_part(part, shardings_of(params), mesh) for part in state.parts)
    notes = state.notes
    if fitted != mesh:
        here, there = ("one device" if m is None else f"the mesh {name_of(m)}" for m in (mesh, fitted))
        notes = (*notes, f"fitted on {there}, resharded onto {here}")
    return dataclasses.replace(state, parts=parts, notes=notes)


def placed_part(part: LinkState, shardings: Shardings, mesh: Mesh | None) -> LinkState:
    """The state of a link, its arrays over the target's mesh, its rules with where the target's leaves lie."""
    rules = tuple(rule._replace(sharding=shardings.get(rule.target)) for rule in part.rules)
    if mesh is None:
        return dataclasses.replace(part, rules=rules)
    shapes = {rule.target: rule.shape for rule in rules}

    def placed(name: str, array: Any) -> Any:
        own = shardings.get(name)
        if own is not None and shapes.get(name) == getattr(array, "shape", None):
            return laid(array, own)
        return spread_map(mesh, array)

    arrays = {name: placed(name, array) for name, array in part.arrays.items()}
    return dataclasses.replace(part, rules=rules, arrays=arrays)
