"""DARE: drop entries at random and rescale the rest (Yu et al., ICML 2024, arXiv 2311.03099)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt32

from tvjax.merge.base import PyTree, Vectors, merge_leaves, wide
from tvjax.merge.combine import Combine, check_combine, combined
from tvjax.merge.leaf_report import Report
from tvjax.merge.random_bits import entry_bits, words
from tvjax.merge.settings import Settings, check_votes, require, resolve_each


def dare(
    taus: Sequence[PyTree],
    *,
    key: Key[Array, ""],
    rate: Settings = 0.9,
    weights: Settings = 1.0,
    combine: Combine = "linear",
    rescale: bool = True,
    report: Report | None = None,
) -> PyTree:
    """Drops each entry with probability p, multiplies the others by ``1 / (1 - p)``, and merges what is left.

    The mean of the result over keys is that of the merge without dropping (for ``combine="linear"``). The bits are
    `tvjax.merge.random_bits`: for one key the same mask on any device count and sharding, another for each leaf and
    each place in the list of vectors.

    Args:
      taus: task vectors of one base.
      key: from `jax.random.key`.
      rate: p, in [0, 1); a number, by path pattern or by depth, or a list of these. Resolved to 2^-32.
      weights: a number, by path pattern or by depth, or a list of these; with ``combine="ties"`` not negative, and of
        positive sum.
      combine: ``"linear"``, the weighted sum, as task arithmetic; or ``"ties"``, the election and disjoint mean of
        `tvjax.merge.ties` on the rescaled entries.
      rescale: False leaves the entries that stay as they are (the paper's ablation): the mean over keys is then
        ``1 - p`` of the merge without dropping.
      report: called for each merged leaf.

    Returns:
      The merged task vector, float32.

    Raises:
      ValueError: vectors that do not fit together, or an option out of range.

    >>> import jax
    >>> merged = dare([{"w": jnp.ones(1000)}], key=jax.random.key(0), rate=0.75)["w"]
    >>> sorted(set(merged.tolist())), bool(abs(merged.mean() - 1) < 0.2)
    ([0.0, 4.0], True)
    """
    check_combine(combine)
    vectors = Vectors(taus)
    numbers = resolve_each(weights, vectors.paths, len(vectors), "weights")
    if combine == "ties":
        check_votes(numbers)
    rates = resolve_each(rate, vectors.paths, len(vectors), "rate", np.float64)
    require(rates, "rate", lambda p: (p >= 0) & (p < 1), "in [0, 1)")
    return merge_leaves(
        vectors,
        "dropped at random, " + ("added" if combine == "linear" else "elected mean"),
        _dropped,
        numbers,
        {path: np.minimum(np.rint(p * 2**32), 2**32 - 1).astype(np.uint32) for path, p in rates.items()},
        {path: (1 / (1 - p) if rescale else np.ones_like(p)).astype(np.float32) for path, p in rates.items()},
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
    return combined(kept, weights, combine), {"rate": levels.astype(jnp.float32) * 2**-32, "factor": factors}
