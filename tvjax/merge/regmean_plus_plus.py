"""RegMean++: RegMean on the features of the layers merged so far (Nguyen et al., TMLR 2026, arXiv 2508.03121)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from tvjax import placement, tree
from tvjax.merge.base import PyTree, Vectors, over_meshes
from tvjax.merge.inner_products import origin_leaves
from tvjax.merge.leaf_report import Report, tell
from tvjax.merge.matrices import weighted
from tvjax.merge.regmean import check_options, per_row, regression, stage_grams
from tvjax.merge.settings import Settings, check_votes, resolve_each
from tvjax.progress import Progress
from tvjax.stages import Batch, Model, check_model, owner_paths
from tvjax.walk import Walk


@over_meshes
def regmean_plus_plus(
    taus: Sequence[PyTree],
    model: Model,
    batches: Sequence[Sequence[Batch]],
    *,
    weights: Settings = 1.0,
    shrink: float = 0.95,
    ridge: float = 1e-6,
    offload: bool = False,
    progress: Progress | None = None,
    report: Report | None = None,
) -> PyTree:
    """`tvjax.merge.regmean`, stage by stage, each on what the merged stages before it make of every task's data.

    In RegMean the inputs of a layer come out of the fine-tuned layers before it; in the merged model they will come out
    of merged ones. So stage s of every fine-tuned model reads, on its own task's data, the outputs of the merged stages
    0 .. s-1; its kernels are merged by ``argmin sum_i w_i ||X_i W - X_i W_i||^2`` of these X_i, its other leaves are
    averaged, and the data go on through the merged stage. The leaves of one stage are merged at once, so that inside a
    stage the inputs are those of the fine-tuned layers, as published. A leaf that several stages share is merged in the
    first.

    Args:
      taus: T task vectors of one base.
      model: the base, its parameters those that the vectors were made from (for vectors of a tower, a model of it); no
        loss is read. A stack of layers in one stage is one stage: take it apart (`tvjax.unstack`).
      batches: for each task its batches; labels are not used.
      weights: as in `tvjax.merge.regmean`.
      shrink: as in `tvjax.merge.regmean`.
      ridge: as in `tvjax.merge.regmean`.
      offload: keep the residual streams in host memory.
      progress: called with (stages done, stages in all, name of the stage).
      report: called for each leaf (`tvjax.merge.leaf_report.MergedLeaf`).

    Returns:
      The merged task vector, float32, on the scale of an average.

    Raises:
      ValueError: vectors that do not fit together or to the model, other than one set of batches for each, or an option
        out of range.

    Deviation: the released code averages what comes before the first block; here its kernels are merged as all others.

    >>> from tvjax.stages import single_stage
    >>> model = single_stage(lambda p, x: x @ p["kernel"], {"kernel": jnp.ones((2, 1))})
    >>> taus = [{"kernel": jnp.array([[1.0], [0.0]])}, {"kernel": jnp.array([[0.0], [4.0]])}]
    >>> data = [[Batch(jnp.array([[3.0, 0.0]]))], [Batch(jnp.array([[0.0, 1.0]]))]]
    >>> print(np.asarray(regmean_plus_plus(taus, model, data)["kernel"]).round(3).T)
    [[1. 4.]]
    """
    check_model("model", model)
    vectors = Vectors(taus)
    numbers = resolve_each(weights, vectors.paths, len(vectors), "weights")
    check_votes(numbers)
    check_options(shrink, ridge)
    base = origin_leaves(vectors, model.params)
    data = [list(each) for each in batches]
    if len(data) != len(vectors) or not all(data):
        raise ValueError(
            f"each of the {len(vectors)} task vectors needs batches of its task, found {[len(each) for each in data]}"
        )
    walks = [Walk(model, each, offload) for each in data]
    merged: dict[str, Any] = {}

    def merge(path: str, grams: Sequence[Mapping[str, Any]], otherwise: str) -> None:
        shares, leaves = numbers[path] / numbers[path].sum(), vectors.leaves(path)
        options = np.float32(shrink), np.float32(ridge)
        found = [matrices[path] for matrices in grams if path in matrices]
        if found:
            each = placement.on_one_device(len(merged), regression, leaves, found, shares, *options)
        else:
            each = weighted(leaves, shares)
        merged[path] = vectors.place(path, each)
        tell(report, path, vectors.shape(path), "regression on the inputs" if found else f"averaged: {otherwise}")

    for index, stage in enumerate(model.stages):
        own = [path for path in owner_paths(stage, model.params).values() if path in base and path not in merged]
        grams = []
        for walk, tau in zip(walks, vectors.flat, strict=True):
            _add(walk, base, {path: tau[path] for path in own})
            sums, reasons = stage_grams(walk, index)
            grams.append({path: per_row(*parts) for path, parts in sums.items() if path not in reasons})
        for path in own:
            merge(path, grams, "no kernel of its stage")
        for walk in walks:
            _add(walk, base, {path: merged[path] for path in own})
            walk.release_before(index + 1)
        if progress is not None:
            progress(index + 1, len(model.stages), stage.name)
    for path in vectors.paths:
        if path not in merged:
            merge(path, (), "no stage reads it")
    return vectors.tree(merged)


def _add(walk: Walk, base: Mapping[str, Any], tau: Mapping[str, Any]) -> None:
    """Gives the model of a walk these leaves of the base plus a task vector, in the base's dtypes."""
    leaves = {}
    for path, leaf in tau.items():
        before = jnp.asarray(base[path])
        leaves[path] = (before.astype(jnp.float32) + jnp.asarray(leaf).astype(jnp.float32)).astype(before.dtype)
    walk.model = walk.model.replace(params=tree.replace(walk.model.params, leaves))
