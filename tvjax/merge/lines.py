"""LiNeS: layers scaled by their depth, after any merge or on a task vector alone (Wang et al., arXiv 2410.17146)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tvjax import tree
from tvjax.merge.base import PyTree, Vectors, over_leaves, over_meshes, weighted_sum, wide
from tvjax.merge.entries import sum_entries
from tvjax.merge.knots import Merge
from tvjax.merge.leaf_report import Report, tell
from tvjax.merge.settings import ByDepth, resolve
from tvjax.merge.task_arithmetic import task_arithmetic


@over_meshes
def lines(
    taus: Sequence[PyTree],
    merge: Merge = task_arithmetic,
    *,
    alpha: float | None = None,
    beta: float | None = None,
    report: Report | None = None,
) -> PyTree:
    """What a merge made, layer l of L times ``alpha + beta l / (L - 1)``, l from 0, and what is no layer times alpha.

    Shallow layers serve every task and lose most by a merge, deep ones belong to their task. Of one task vector it
    restores what fine-tuning forgot. After a merge that is linear in its weights the same is the setting
    ``weights=ByDepth((alpha, alpha + beta), other=alpha)``; weights of TIES and the like are votes, and scale nothing.

    Args:
      taus: task vectors of one base; one is scaled as it is.
      merge: any merge of task vectors, such as ``partial(ties, density=0.2)``.
      alpha: scale of the first layer; None: ``|sum_i tau_i|_1 / (T |merged|_1)``, as published, at which the shallow
        layers are as long as those of the average (1 for one vector: give it).
      beta: what the last layer has more; None: ``1 - alpha``, as published for one vector. After merges the paper
        chooses it on validation data.
      report: called for each leaf, with its scale.

    Returns:
      The merged task vector, float32.

    Raises:
      ValueError: as the merge, or no layers in sight: they are those that `tvjax.merge.ByDepth` sees (stacked layers by
        `tvjax.merge.by_layer`).

    >>> taus = [{"blocks": [jnp.ones(1), jnp.ones(1)], "head": jnp.ones(1)}] * 2
    >>> {path: leaf.tolist() for path, leaf in tree.flatten(lines(taus, alpha=0.5, beta=0.25)).items()}
    {'blocks/0': [1.0], 'blocks/1': [1.5], 'head': [1.0]}
    """
    for name, given in (("alpha", alpha), ("beta", beta)):
        if given is not None and not np.isfinite(given):
            raise ValueError(f"{name} must be a finite number, found {given}")
    vectors = Vectors(taus)
    depths = resolve(ByDepth((0.0, 1.0), other=0.0), vectors.paths)
    merged = tree.flatten(merge(taus))
    first = _average_length(vectors, merged) if alpha is None else jnp.float32(alpha)
    more = 1 - first if beta is None else jnp.float32(beta)
    found = {}
    for path in vectors.paths:
        scale = first + more * np.float32(depths[path])
        found[path] = vectors.place(path, jnp.asarray(merged[path], jnp.float32) * scale)
        tell(report, path, vectors.shape(path), "scaled by depth", {"scale": scale})
    return vectors.tree(found)


def _average_length(vectors: Vectors, merged: dict[str, Any]) -> Float[Array, ""]:
    """``|sum_i tau_i|_1 / (T |merged|_1)``."""
    of_sum, of_merged = sum(sizes for _, sizes in over_leaves(vectors, _sizes, merged))
    return jnp.where(of_merged > 0, of_sum / jnp.where(of_merged > 0, len(vectors) * of_merged, 1), 1)


def _sizes(leaves: list[Any], merged: Any) -> Float[Array, " two"]:
    total = weighted_sum(wide(leaves), jnp.ones(len(leaves), jnp.float32))
    return sum_entries(lambda *stretches: jnp.abs(jnp.stack(stretches)), [total, *wide([merged])])
