"""Which stage of the source each stage of the target is paired with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tvjax import tree
from tvjax.align import depth as layers
from tvjax.align.rows import alignment, arranged, on_tokens, padding_mask
from tvjax.capture.axes import of_argument
from tvjax.stages import Model, Stage, layer_groups
from tvjax.walk import Walk


def pair_stages(source: Model, target: Model, depth: Any, walks: tuple[Walk, Walk] | None, tokens: str) -> list[int]:
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
            rule = _cka_pairing(walks, theirs[name], mine[name], tokens)
            depth = {**(depth if isinstance(depth, Mapping) else {}), name: rule}
        chosen = layers.pair_layers(len(theirs[name]), len(mine[name]), rule)[position]
        partners.append(source.stages.index(theirs[name][chosen]))
    return partners


def _cka_pairing(
    walks: tuple[Walk, Walk], theirs: Sequence[Stage], mine: Sequence[Stage], tokens: Any
) -> tuple[int, ...]:
    """The monotone pairing that maximises linear CKA of what the layers return, on the first batch."""
    features, masks, axes = [], [], []
    for walk, stages in zip(walks, (theirs, mine), strict=True):
        carries = [walk.carries(walk.model.stages.index(stage) + 1)[0] for stage in stages]
        path = _residual_stream(walk.carries(walk.model.stages.index(stages[0]))[0], carries[0])
        features.append([tree.flatten(carry)[path] for carry in carries])
        rows_of = [factor for axis in of_argument(path, features[-1][0])[:-1] for factor in axis]
        axes.append(arranged([f.size for f in rows_of], [f.label for f in rows_of]))
        masks.append(padding_mask(stages[0], carries[0], axes[-1]))
    operators = alignment(axes[0], axes[1], (theirs[0], mine[0]), tokens)
    rows, weights = [], []
    for side, own, operator, mask in zip(features, axes, operators, masks, strict=True):
        aligned = [on_tokens(hidden.reshape(-1, hidden.shape[-1]), own, operator, mask) for hidden in side]
        rows.append([x for x, _ in aligned])
        weights.append(aligned[0][1])
    real = np.asarray(weights[0] * weights[1]) > 0
    similarity = jax.device_get([[layers.linear_cka(x[real], y[real]) for y in rows[1]] for x in rows[0]])
    return layers.monotone_pairing(np.array(similarity))


def _residual_stream(before: Any, after: Any) -> str:
    """The path of what a layer changes: where a decoder reads an encoder, the carry holds both."""
    given = tree.flatten(before)
    floating = [path for path, x in tree.flatten(after).items() if jnp.issubdtype(x.dtype, jnp.floating)]
    same = [path for path in floating if path in given and np.array_equal(given[path], tree.get(after, path))]
    return next((path for path in floating if path not in same), floating[0])
