"""Which stage of the source each stage of the target is paired with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Var

from tvjax import processes, tree
from tvjax.align import depth as layers
from tvjax.align.rows import RowAxes, alignment, arranged, on_tokens, padding_mask
from tvjax.capture import jaxprs
from tvjax.capture.axes import of_argument
from tvjax.stages import Model, Stage, layer_groups
from tvjax.walk import Walk


class Hidden(NamedTuple):
    """What a stage leaves in the residual stream.

    Attributes:
      rows: ``[n, d]``.
      axes: what its row axes are.
      mask: ``[examples, tokens]``, True at real tokens; None where all are.
    """

    rows: Array
    axes: RowAxes
    mask: Array | None


def pair_stages(
    source: Model,
    target: Model,
    depth: Any,
    walks: tuple[Walk, Walk] | None,
    overlaps: Sequence[Mapping[str, Any]],
    tokens: str,
) -> list[int]:
    """For each stage of the target the index of its partner in the source."""
    theirs, mine = layer_groups(source), layer_groups(target)
    missing = [name for name in mine if name not in theirs]
    if missing:
        raise ValueError(
            f"the target's stages {missing} have no partner in the source, whose stages are {sorted(theirs)}: "
            "transport between models of one family, or take their common tower"
        )
    if isinstance(depth, Mapping) and (unknown := [name for name in depth if name not in mine]):
        raise ValueError(f"depth names {unknown}, the target's groups of layers are {sorted(mine)}")
    partners: list[int] = []
    for stage in target.stages:
        name = stage.group or stage.name
        position = mine[name].index(stage)
        rule = depth.get(name, "uniform") if isinstance(depth, Mapping) else depth
        if len(mine[name]) == 1 and len(theirs[name]) == 1:
            rule = "uniform"
        if rule == "cka":
            if walks is None:
                raise ValueError(
                    "depth='cka' compares activations, and this transport reads none: give a list of layers"
                )
            rule = _cka_pairing(walks, theirs[name], mine[name], tokens, overlaps[0] if overlaps else {})
            depth = {**(depth if isinstance(depth, Mapping) else {}), name: rule}
        chosen = layers.pair_layers(len(theirs[name]), len(mine[name]), rule)[position]
        partners.append(source.stages.index(theirs[name][chosen]))
    return partners


def hidden(walk: Walk, index: int, batch: int) -> Hidden:
    """What a stage of a walk writes into the carry: the first floating leaf that it does not hand on as it was.

    Raises:
      ValueError: for a stage that writes none.
    """
    stage, before = walk.model.stages[index], walk.carries(index)[batch]
    after = tree.flatten(walk.carries(index + 1)[batch])
    path = _written(stage.function, *(_abstract(x) for x in (walk.stored(index), before)))
    if path is None:
        raise ValueError(f"stage {stage.name!r} returns no activations to compare: its carry is {sorted(after)}")
    rows_of = [factor for axis in of_argument(path, after[path])[:-1] for factor in axis]
    axes = arranged([f.size for f in rows_of], [f.label for f in rows_of])
    return Hidden(after[path].reshape(-1, after[path].shape[-1]), axes, padding_mask(stage, before, axes))


def aligned(
    sides: tuple[Hidden, Hidden], stages: tuple[Stage, Stage], tokens: Any, overlaps: Mapping[str, Any]
) -> tuple[Array, Array, Array]:
    """The activations of both sides on the same rows, and the weights of the rows."""
    operators = alignment(sides[0].axes, sides[1].axes, stages, tokens, overlaps)
    (a, weights_a), (b, weights_b) = (_moved(x, operator) for x, operator in zip(sides, operators, strict=True))
    return a, b, weights_a * weights_b


def _moved(side: Hidden, operator: Any) -> tuple[Array, Array]:
    return on_tokens(side.rows, side.axes, operator, side.mask)


def _cka_pairing(
    walks: tuple[Walk, Walk], theirs: Sequence[Stage], mine: Sequence[Stage], tokens: Any, overlaps: Mapping[str, Any]
) -> tuple[int, ...]:
    """The monotone pairing that maximises linear CKA of what the layers return, on the first batch."""
    sides = [
        [hidden(walk, walk.model.stages.index(stage), 0) for stage in stages]
        for walk, stages in zip(walks, (theirs, mine), strict=True)
    ]
    # The layers of a group have one layout, so each is brought to the common rows once, whatever it is compared with.
    operators = alignment(sides[0][0].axes, sides[1][0].axes, (theirs[0], mine[0]), tokens, overlaps)
    rows = [[_moved(x, operator) for x in side] for side, operator in zip(sides, operators, strict=True)]
    real = processes.fetch(rows[0][0][1] * rows[1][0][1]) > 0
    likeness = processes.fetch([[layers.linear_cka(x[real], y[real]) for y, _ in rows[1]] for x, _ in rows[0]])
    return layers.monotone_pairing(np.array(likeness))


def _abstract(pytree: Any) -> Any:
    """Shapes and dtypes, hashable."""
    leaves, structure = jax.tree.flatten(jax.tree.map(tree.leaf_type, pytree))
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


@cache
def _written(function: Any, params: Any, carry: Any) -> str | None:
    """Path of the first floating leaf of what a stage returns that is not one of those that it takes."""
    arguments = [
        structure.unflatten([jax.ShapeDtypeStruct(*leaf) for leaf in leaves]) for structure, leaves in (params, carry)
    ]
    region, returned = jaxprs.trace(function, *arguments)
    taken = set(region.variables)
    for path, atom in zip(tree.flatten(returned), region.results, strict=True):
        floating = jnp.issubdtype(atom.aval.dtype, jnp.floating) and atom.aval.ndim > 1
        if floating and isinstance(atom, Var) and atom not in taken:
            return path
    return None
