"""Fisher merging: an average weighted by how much each task's loss minds a change (Matena and Raffel, NeurIPS 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tvjax import placement, tree
from tvjax.finite import check_finite
from tvjax.kinds import kind_of
from tvjax.merge.base import PyTree, Vectors, merge_leaves, over_meshes, stack, wide
from tvjax.merge.leaf_report import Report
from tvjax.merge.matrices import total
from tvjax.merge.settings import Settings, check_votes, resolve_each
from tvjax.per_example import ExampleGradients
from tvjax.progress import Progress
from tvjax.renamed import renamed_arguments
from tvjax.stages import Batch, Model, check_model
from tvjax.walk import Walk


@over_meshes
def fisher(
    taus: Sequence[PyTree],
    fishers: Sequence[PyTree],
    *,
    weights: Settings = 1.0,
    floor: float = 1e-6,
    report: Report | None = None,
) -> PyTree:
    """The average of the task vectors, weighted entry by entry: ``sum_i w_i F_i tau_i / sum_i w_i F_i``.

    The mode of the product of the tasks' Laplace approximations with diagonal Fisher matrices F_i (arXiv 2111.09832,
    equation 4). Task vectors of one base give what the parameters give: the base comes out of the sum whole.

    Args:
      taus: T task vectors of one base.
      fishers: for each task its diagonal Fisher matrix, `diagonal_fisher` of its fine-tuned model on its own data; a
        tree with the paths and shapes of the task vectors (leaves that these do not cover are not used).
      weights: of the tasks, 0 or more and not all 0; a number, by path pattern or by depth, or a list of these. Only
        their ratios matter.
      floor: the least Fisher information of an entry, relative to the mean of its leaf over all tasks; where no task
        has more, the entry is the plain weighted average. (Published: 1e-6, absolute.)
      report: called for each leaf (`tvjax.merge.leaf_report.MergedLeaf`).

    Returns:
      The merged task vector, float32, on the scale of an average.

    Raises:
      ValueError: vectors or Fisher matrices that do not fit together, or an option out of range.

    >>> taus = [{"w": jnp.array([1.0, 1.0])}, {"w": jnp.array([3.0, 3.0])}]
    >>> fisher(taus, [{"w": jnp.array([3.0, 0.0])}, {"w": jnp.array([1.0, 0.0])}])["w"].tolist()
    [1.5, 2.0]
    """
    vectors = Vectors(taus)
    numbers = resolve_each(weights, vectors.paths, len(vectors), "weights")
    check_votes(numbers)
    information = _check(vectors, fishers, floor)
    options = (("floor", float(floor)),)
    name = "averaged by Fisher information"
    return merge_leaves(vectors, name, _average, information, numbers, options=options, report=report)


@renamed_arguments(host="offload")
@placement.automatic(lambda model, *_, **__: model.params)
def diagonal_fisher(
    model: Model,
    batches: Sequence[Batch],
    *,
    chunk: int = 4,
    offload: bool = False,
    progress: Progress | None = None,
) -> PyTree:
    """The diagonal of the empirical Fisher matrix: ``F = 1/N sum_n (dL(x_n, y_n)/dtheta)^2``.

    The square is of the gradient of ONE sample, summed over every use of a tied leaf. The model is walked stage by
    stage from the last to the first, the samples of a batch in chunks (`tvjax.per_example`).

    Labels of the data give the empirical Fisher; labels drawn from the model's own predictions give the Fisher matrix
    itself, up to sampling, as the paper has it.

    Args:
      model: a fine-tuned model with a loss.
      batches: of its task, with labels.
      chunk: samples whose gradients are taken at once.
      offload: keep residual streams and cotangents in host memory.
      progress: called with (stages done, stages in all, name of the stage).

    Returns:
      A tree of the structure of the parameters, float32; None at leaves that are not floating-point.

    Raises:
      ValueError: no batches, no labels, no loss, or a chunk below one.

    >>> from tvjax.stages import single_stage
    >>> loss = lambda _, outputs, labels: outputs[:, 0] * labels
    >>> model = single_stage(lambda p, x: x * p["w"], {"w": jnp.ones(1)}, loss=loss)
    >>> diagonal_fisher(model, [Batch(jnp.array([[1.0], [2.0]]), jnp.array([1.0, 3.0]))])
    {'w': Array([18.5], dtype=float32)}
    """
    check_model("model", model)
    batches = list(batches)
    if not batches or any(batch.labels is None for batch in batches):
        raise ValueError("the Fisher matrix needs batches with labels: Batch(inputs, labels)")
    if not model.has_loss:
        raise ValueError("the Fisher matrix reads gradients, but the model has no loss: Model.with_loss(...)")
    if chunk < 1:
        raise ValueError(f"chunk must be 1 or more, found {chunk}")
    walk = Walk(model, batches, offload)
    squares = ExampleGradients(walk, _squares, chunk)
    sums: dict[str, Array] = {}
    for index in reversed(range(len(model.stages))):
        sums.update(squares.stage(index))
        if index > 0:
            walk.cotangents(index - 1)
            walk.release_after(index - 1)
        if progress is not None:
            progress(len(model.stages) - index, len(model.stages), model.stages[index].name)
    count = squares.examples
    mean = lambda path, leaf: placement.like(sums[path] / count, leaf) if path in sums else None  # noqa: E731
    return tree.map_with_path(mean, model.params)


def _squares(gradients: dict[str, Array]) -> dict[str, Array]:
    return {path: jnp.square(g.astype(jnp.float32)) for path, g in gradients.items()}


def _check(vectors: Vectors, fishers: Sequence[PyTree], floor: float) -> dict[str, list[Any]]:
    if not isinstance(fishers, Sequence) or len(fishers) != len(vectors):
        found = len(fishers) if isinstance(fishers, Sequence) else kind_of(fishers)
        raise ValueError(f"expected a Fisher matrix of each of the {len(vectors)} task vectors, found {found}")
    if not 0 <= floor < 1:
        raise ValueError(f"floor must lie in [0, 1), found {floor}")
    flats = [tree.flatten(each) for each in fishers]
    problems = [
        f"{path} of task {task}: {tuple(np.shape(flat[path])) if path in flat else 'missing'}, "
        f"the task vector has {vectors.shape(path)}"
        for task, flat in enumerate(flats)
        for path in vectors.paths
        if path not in flat or tuple(np.shape(flat[path])) != vectors.shape(path)
    ]
    if problems:
        raise ValueError(f"Fisher matrices that do not fit the task vectors:\n{tree.list_some(problems)}")
    for task, flat in enumerate(flats):
        check_finite(flat, f"the Fisher matrix of task {task}")
    return {path: [flat[path] for flat in flats] for path in vectors.paths}


def _average(
    leaves: Sequence[Any], fishers: Sequence[Any], weights: Float[Array, " vectors"], floor: float
) -> tuple[Float[Array, "*shape"], dict[str, Array]]:
    information = stack(fishers)
    mean = jnp.mean(information)
    # Relative to the mean: squares of small gradients lie near the edge of float32.
    information = jnp.maximum(information / jnp.where(mean > 0, mean, 1), floor)
    shares = [weight * each for weight, each in zip(weights, jnp.where(mean > 0, information, 1), strict=True)]
    mass = total(shares)
    merged = total([share * leaf for share, leaf in zip(shares, wide(leaves), strict=True)])
    return merged / jnp.where(mass > 0, mass, 1), {"weights": weights}
