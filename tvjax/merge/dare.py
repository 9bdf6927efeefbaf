"""DARE: drop entries at random and rescale the rest (Yu et al., ICML 2024, arXiv 2311.03099)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt32

from tvjax.merge.base import PyTree, Vectors, merge_leaves, over_meshes, wide
from tvjax.merge.combine import MANNER, Combine, check_combine, combined
from tvjax.merge.leaf_report import Report
from tvjax.merge.random_bits import entry_bits, words
from tvjax.merge.settings import Settings, check_votes, densities_of, resolve_each


@over_meshes
def dare(
    taus: Sequence[PyTree],
    *,
    key: Key[Array, ""],
    density: Settings = 0.1,
    weights: Settings = 1.0,
    combine: Combine = "linear",
    rescale: bool = True,
    rate: Settings | None = None,
    report: Report | None = None,
) -> PyTree:
    """Keeps each entry with probability d, multiplies those by ``1 / d``, and merges them.

    The mean of the result over keys is that of the merge without dropping (for ``combine="linear"``). The bits are
    `tvjax.merge.random_bits`: for one key the same mask on any device count and sharding, another for each leaf and
    each place in the list of vectors.

    Args:
      taus: task vectors of one base.
      key: from `jax.random.key`.
      density: d, in (0, 1]; a number, by path pattern or by depth, or a list of these. Resolved to 2^-32.
      weights: a number, by path pattern or by depth, or a list of these; not negative and of positive sum unless
        ``combine="linear"``.
      combine: ``"linear"``, the weighted sum, as task arithmetic; or ``"ties"``, the election and disjoint mean of
        `tvjax.merge.ties` on the rescaled entries; ``"ties_sum"``, the sum of those that agree.
      rescale: False leaves the entries that stay as they are (the paper's ablation): the mean over keys is then
        d times the merge without dropping.
      rate: the old name of ``1 - density``, whose place it takes.
      report: called for each merged leaf.

    Returns:
      The merged task vector, float32.

    Raises:
      ValueError: vectors that do not fit together, or an option out of range.

    >>> import jax
    >>> merged = dare([{"w": jnp.ones(1000)}], key=jax.random.key(0), density=0.25)["w"]
    >>> sorted(set(merged.tolist())), bool(abs(merged.mean() - 1) < 0.2)
    ([0.0, 4.0], True)
    """
    check_combine(combine)
    vectors = Vectors(taus)
    numbers = resolve_each(weights, vectors.paths, len(vectors), "weights")
    if combine != "linear":
        check_votes(numbers)
    shares = densities_of(density, rate, vectors.paths, len(vectors), "dare")
    return merge_leaves(
        vectors,
        "dropped at random, " + MANNER[combine],
        _dropped,
        numbers,
        {path: np.minimum(np.rint((1 - d) * 2**32), 2**32 - 1).astype(np.uint32) for path, d in shares.items()},
        {path: (1 / d if rescale else np.ones_like(d)).astype(np.float32) for path, d in shares.items()},
        words(key, vectors.paths, len(vectors)),
        options=(("combine", combine),),
        report=report,
    )


def _dropped(
    leaves: list[Any],
    weights: Float[Array, " vectors"],
    levels: UInt32[Array, " vectors"],
    factors: Float[Array, " vectors"],
    keyed: UInt32[Array, " words"],
    combine: Combine,
) -> tuple[Float[Array, "*shape"], dict[str, Array]]:
    bits = entry_bits(jnp.shape(leaves[0]), keyed)
    kept = [jnp.where(bits[i] >= levels[i], leaf * factors[i], 0) for i, leaf in enumerate(wide(leaves))]
    return combined(kept, weights, combine), {"density": 1 - levels.astype(jnp.float32) * 2**-32, "factor": factors}
