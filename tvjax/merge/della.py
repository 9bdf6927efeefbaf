"""DELLA: drop entries at random, small ones more often (Deep et al., 2024, arXiv 2406.11617)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt32

from tvjax.merge.base import PyTree, Vectors, merge_leaves, over_meshes, wide
from tvjax.merge.combine import MANNER, Combine, check_combine, combined
from tvjax.merge.leaf_report import Report
from tvjax.merge.random_bits import entry_bits, words
from tvjax.merge.settings import Settings, check_votes, densities_of, require, resolve_each, shown
from tvjax.merge.views import Axes, Matrices, leaf_axes

Ranked = Literal["unit", "leaf"]


@over_meshes
def della(
    taus: Sequence[PyTree],
    *,
    key: Key[Array, ""],
    density: Settings = 0.3,
    epsilon: Settings = 0.2,
    weights: Settings = 1.0,
    combine: Combine = "ties",
    ranked: Ranked = "unit",
    matrices: Matrices = None,
    rescale: bool = True,
    rate: Settings | None = None,
    report: Report | None = None,
) -> PyTree:
    """Drops each entry with a probability that falls with the rank of its magnitude, and rescales the others.

    Of n entries that are ranked together, r = 0 the smallest, entry r is dropped with probability
    ``p_r = 1 - d + epsilon (1/2 - r / (n - 1))`` and multiplied by ``1 / (1 - p_r)`` if it stays. A lone entry stays
    with probability d. Of equal entries the first ranks lower.

    Args:
      taus: task vectors of one base.
      key: from `jax.random.key`; the bits are those of `dare`.
      density: d, the share that stays on the mean; a number, by path pattern or by depth, or a list of these.
      epsilon: the spread of the probabilities, 0 or more (0: `dare`); ``d +- epsilon / 2`` must lie in (0, 1].
      weights: as in `dare`.
      combine: ``"ties"``, the election and disjoint mean of `tvjax.merge.ties`, as published; ``"ties_sum"``, the
        sum of those that agree; or ``"linear"``.
      ranked: together: the entries of one ``"unit"`` (a column of a kernel seen as [in, out], as published; all of a
        vector), or those of the ``"leaf"``.
      matrices: for ``"unit"``, how leaves are matrices, the letters of their axes by path pattern; None: by the rule
        (`tvjax.merge.views`).
      rescale: False leaves the entries that stay as they are.
      rate: the old name of ``1 - density``, whose place it takes.
      report: called for each merged leaf.

    Returns:
      The merged task vector, float32.

    Raises:
      ValueError: vectors that do not fit together, or an option out of range.

    Source: section 3, step 1. (The published code takes half the spread: its `epsilon` is ours divided by two.) Ranks
    take a full sort of every leaf: expect some 50 times the time of `dare`.

    >>> import jax
    >>> merged = della([{"w": jnp.arange(1.0, 101.0)}], key=jax.random.key(0), density=0.5, epsilon=0.98)["w"]
    >>> int((merged[:50] != 0).sum()) < 20 < 30 < int((merged[50:] != 0).sum())
    True
    """
    check_combine(combine)
    if ranked not in get_args(Ranked):
        raise ValueError(f"ranked must be one of {get_args(Ranked)}, found {ranked!r}")
    vectors = Vectors(taus)
    shapes = {path: vectors.shape(path) for path in vectors.paths}
    axes = {path: "v" * len(shape) for path, shape in shapes.items()}
    if ranked == "unit":
        axes = leaf_axes(shapes, matrices)
    numbers = resolve_each(weights, vectors.paths, len(vectors), "weights")
    if combine != "linear":
        check_votes(numbers)
    shares = densities_of(density, rate, vectors.paths, len(vectors), "della")
    spreads = resolve_each(epsilon, vectors.paths, len(vectors), "epsilon")
    require(spreads, "epsilon", lambda e: e >= 0, "0 or more")
    for path, d in shares.items():
        half = spreads[path] / 2
        if (d - half <= 0).any() or (d + half > 1 + 1e-6).any():  # epsilon is a number of float32
            raise ValueError(
                f"density - epsilon / 2 must be more than 0 and density + epsilon / 2 at most 1, found density "
                f"{shown(d)} and epsilon {shown(spreads[path])} for {path}"
            )
    return merge_leaves(
        vectors,
        "dropped by rank, " + MANNER[combine],
        _dropped,
        numbers,
        {path: (1 - d).astype(np.float32) for path, d in shares.items()},
        spreads,
        words(key, vectors.paths, len(vectors)),
        {path: Axes(letters) for path, letters in axes.items()},
        options=(("combine", combine), ("rescale", rescale)),
        report=report,
    )


def _dropped(
    leaves: list[Any],
    weights: Float[Array, " vectors"],
    rates: Float[Array, " vectors"],
    spreads: Float[Array, " vectors"],
    keyed: UInt32[Array, " words"],
    axes: Axes,
    combine: Combine,
    rescale: bool,
) -> tuple[Float[Array, "*shape"], dict[str, Array]]:
    bits = entry_bits(jnp.shape(leaves[0]), keyed)
    kept = []
    for i, leaf in enumerate(wide(leaves)):
        drop = rates[i] + spreads[i] * (0.5 - _relative_rank(leaf, axes.letters))
        uniform = (bits[i] >> 8).astype(jnp.float32) * jnp.float32(2**-24)
        kept.append(jnp.where(uniform >= drop, leaf / (1 - drop) if rescale else leaf, 0))
    return combined(kept, weights, combine), {"density": 1 - rates, "epsilon": spreads}


def _relative_rank(leaf: Float[Array, "*shape"], axes: str) -> Float[Array, "*shape"]:
    """From 0, the smallest magnitude of those ranked together, to 1; one half for a lone entry.

    Together are the inputs of one output of one matrix, or all of a vector.
    """
    order = sorted(range(leaf.ndim), key=lambda axis: axes[axis] in "iv")
    turned = jnp.transpose(jnp.abs(leaf), order)
    apart = sum(letter not in "iv" for letter in axes)
    together = turned.reshape(math.prod(turned.shape[:apart]), math.prod(turned.shape[apart:]))
    count = together.shape[1]
    if count < 2:
        return jnp.full_like(leaf, 0.5)
    numbers = jnp.argsort(together, axis=1)
    steps = jnp.broadcast_to(jnp.arange(count, dtype=jnp.float32) / jnp.float32(count - 1), numbers.shape)
    ranks = jnp.put_along_axis(jnp.zeros_like(together), numbers, steps, axis=1, inplace=False)
    return jnp.transpose(ranks.reshape(turned.shape), sorted(order, key=order.__getitem__))
