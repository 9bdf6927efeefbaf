"""RegMean: merging linear layers by regression on their inputs (Jin et al., ICLR 2023, arXiv 2212.09849)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tvjax import placement, tree
from tvjax.align import moments
from tvjax.align.products import product
from tvjax.align.rows import check_streams, on_tokens, padding_mask, row_axes
from tvjax.capture import Site, SiteTable
from tvjax.capture.views import apply_view
from tvjax.finite import check_finite
from tvjax.kinds import kind_of
from tvjax.merge.base import PyTree, Vectors, over_meshes, stack, weighted_sum
from tvjax.merge.leaf_report import Report, tell
from tvjax.merge.matrices import total, weighted
from tvjax.merge.settings import Settings, check_votes, resolve_each
from tvjax.merge.spectral import solve
from tvjax.progress import Progress
from tvjax.renamed import renamed_arguments
from tvjax.stages import Batch, Model, owner_paths
from tvjax.walk import Walk


class Grams(NamedTuple):
    """What `input_grams` found.

    Attributes:
      matrices: by path, ``X^T X / n`` of the n input rows of a kernel, ``[*layers, in, in]``, in the order of the
        kernel's own input axes.
      left_out: by path, why a leaf of two axes or more has none.
    """

    matrices: dict[str, Float[Array, "*layers inputs inputs"]]
    left_out: dict[str, str]


@over_meshes
def regmean(
    taus: Sequence[PyTree],
    grams: Sequence[Mapping[str, Float[Array, "*layers inputs inputs"]]],
    *,
    weights: Settings = 1.0,
    shrink: float = 0.95,
    ridge: float = 1e-6,
    report: Report | None = None,
) -> PyTree:
    """The kernels whose outputs are nearest to those of every task's own kernel, on that task's own inputs.

    ``W = argmin sum_i w_i ||X_i W - X_i W_i||^2 = (sum_i w_i G_i)^-1 sum_i w_i G_i W_i``, ``G_i = X_i^T X_i``
    (equation 2), the off-diagonal entries of G_i times `shrink`. Task vectors of one base give the same: with ``W_i =
    W_0 + tau_i`` the base comes out of the right-hand side whole, ``W = W_0 + (sum w_i G_i)^-1 sum w_i G_i tau_i``.

    It is solved for the difference to the weighted average S of the tau_i, ``(sum w_i G_i + ridge g I) D =
    sum w_i G_i (tau_i - S)``, g the mean of the diagonal: equal task vectors are returned as they are, and a direction
    that no input has gets the average.

    Args:
      taus: T task vectors of one base.
      grams: for each task its Gram matrices by path, `input_grams` of its fine-tuned model on its own data. A leaf
        without one is the weighted average.
      weights: of the tasks, 0 or more and not all 0; a number, by path pattern or by depth, or a list of these. Only
        their ratios matter.
      shrink: factor of the off-diagonal entries, in [0, 1]; 0.95 for CLIP, 1 for the plain regression.
      ridge: relative to the mean of the diagonal; the pull towards the average.
      report: called for each leaf (`tvjax.merge.leaf_report.MergedLeaf`).

    Returns:
      The merged task vector, float32, on the scale of an average.

    Raises:
      ValueError: vectors that do not fit together, Gram matrices that do not fit the leaves or that some tasks lack,
        none at all, or an option out of range.

    >>> taus = [{"kernel": jnp.array([[1.0], [0.0]])}, {"kernel": jnp.array([[0.0], [4.0]])}]
    >>> grams = [{"kernel": jnp.diag(jnp.array([3.0, 0.0]))}, {"kernel": jnp.diag(jnp.array([1.0, 2.0]))}]
    >>> print(np.asarray(regmean(taus, grams)["kernel"]).round(3).T)
    [[0.75 4.  ]]
    """
    vectors = Vectors(taus)
    numbers = resolve_each(weights, vectors.paths, len(vectors), "weights")
    check_votes(numbers)
    _check(vectors, grams, shrink, ridge)
    merged = {}
    for turn, path in enumerate(vectors.paths):
        shares = numbers[path] / numbers[path].sum()
        if path in grams[0]:
            arguments = (vectors.leaves(path), [each[path] for each in grams], shares)
            merged[path] = placement.on_one_device(turn, regression, *arguments, np.float32(shrink), np.float32(ridge))
            rule = "regression on the inputs"
        else:
            merged[path] = weighted(vectors.leaves(path), shares)
            rule = "averaged: no Gram matrix"
        merged[path] = vectors.place(path, merged[path])
        tell(report, path, vectors.shape(path), rule)
    return vectors.tree(merged)


@renamed_arguments(host="offload")
@placement.automatic(lambda *_, **__: ())
def input_grams(
    model: Model,
    batches: Sequence[Batch],
    *,
    offload: bool = False,
    progress: Progress | None = None,
) -> Grams:
    """The Gram matrices of what the kernels of a model read, per row: ``1/n sum_rows x x^T``.

    The model is walked stage by stage, each batch in turn, its sites found by capture; activations of one stage are
    alive at once. Padding rows do not count. Sites that share one input share one matrix; the uses of a tied kernel are
    added. Per row, so that tasks with more data do not weigh more.

    Args:
      model: a fine-tuned model.
      batches: of its task; labels are not used.
      offload: keep the residual streams in host memory.
      progress: called with (stages done, stages in all, name of the stage).

    Returns:
      The matrices in float32, and the leaves of two axes or more that have none, with the reason.

    Raises:
      ValueError: no batches.

    >>> from tvjax.stages import single_stage
    >>> model = single_stage(lambda p, x: x @ p["kernel"], {"kernel": jnp.ones((2, 3))})
    >>> input_grams(model, [Batch(jnp.array([[1.0, 0.0], [1.0, 2.0]]))]).matrices["kernel"].tolist()
    [[1.0, 1.0], [1.0, 2.0]]
    """
    batches = list(batches)
    if not batches:
        raise ValueError("the Gram matrices need batches, found none (an iterator that was used up before?)")
    walk = Walk(model, batches, offload)
    leaves = tree.flatten(model.params)
    sums: dict[str, tuple[Array, Array]] = {}
    left_out: dict[str, str] = {}
    for index, stage in enumerate(model.stages):
        found, reasons = stage_grams(walk, index)
        left_out.update(reasons)
        for path, (gram, count) in found.items():
            sums[path] = (sums[path][0] + gram, sums[path][1] + count) if path in sums else (gram, count)
        walk.release_before(index + 1)
        if progress is not None:
            progress(index + 1, len(model.stages), stage.name)
    return Grams(
        {path: per_row(*parts) for path, parts in sums.items() if path not in left_out},
        {path: reason for path, reason in left_out.items() if jnp.ndim(leaves[path]) >= 2}
        | {
            path: "no stage reads it"
            for path, leaf in leaves.items()
            if jnp.ndim(leaf) >= 2 and path not in sums and path not in left_out
        },
    )


def check_options(shrink: float, ridge: float) -> None:
    """Raises a ValueError for options out of range.

    >>> check_options(0.95, 1e-6)
    """
    if not 0 <= shrink <= 1 or not ridge >= 0:
        raise ValueError(f"shrink must lie in [0, 1] and ridge be 0 or more, found {shrink} and {ridge}")


def stage_grams(walk: Walk, index: int) -> tuple[dict[str, tuple[Array, Array]], dict[str, str]]:
    """Of the kernels that a stage reads: ``X^T X`` and the number of rows, by path; and why other leaves have none."""
    stage = walk.model.stages[index]
    owners = owner_paths(stage, walk.model.params)
    table = walk.table(index)
    check_streams(stage, table)
    leaves = tree.flatten(walk.params(index))
    kernels, reasons = _kernels(table, leaves)
    found: dict[str, moments.Moments] = {}
    names = frozenset(site.input for site, _ in kernels if site.input is not None)
    for batch in range(len(walk.batches)):
        seen = walk.observe(index, batch, names, frozenset())
        rows = {site.key: row_axes(site) for site in walk.table(index, batch).sites}
        carry = walk.carries(index)[batch]
        for name in sorted(names):
            site = next(site for site, _ in kernels if site.input == name)
            x = seen.input(site)
            assert x is not None
            axes = rows[site.key]
            found[name] = _add(found.get(name), *on_tokens(x, axes, None, padding_mask(stage, carry, axes)))
    sums: dict[str, tuple[Array, Array]] = {}
    for site, order in kernels:
        gram, count = _matrix(found[site.input or ""], order)
        path = owners[site.path]
        sums[path] = (sums[path][0] + gram, sums[path][1] + count) if path in sums else (gram, count)
    return sums, {owners[local]: reason for local, reason in reasons.items()}


def _check(vectors: Vectors, grams: Sequence[Mapping[str, Any]], shrink: float, ridge: float) -> None:
    if not isinstance(grams, Sequence) or len(grams) != len(vectors):
        found = len(grams) if isinstance(grams, Sequence) else kind_of(grams)
        raise ValueError(f"expected Gram matrices of each of the {len(vectors)} task vectors, found {found}")
    wrong = [kind_of(each) for each in grams if not isinstance(each, Mapping)]
    if wrong:
        raise ValueError(f"Gram matrices are given by path, input_grams(...).matrices, found {wrong[0]}")
    check_options(shrink, ridge)
    problems = []
    for path in vectors.paths:
        shape = vectors.shape(path)
        sizes = [tuple(jnp.shape(each[path])) if path in each else "missing" for each in grams]
        if len(set(sizes)) > 1:
            problems.append(f"{path}: {sizes}, must be the same for every task")
        elif sizes[0] != "missing" and _split(shape, sizes[0]) is None:
            problems.append(f"{path}: {sizes[0]} for a kernel of {shape}, expected [*layers, in, in]")
    if problems:
        raise ValueError(f"Gram matrices that do not fit the task vectors:\n{tree.list_some(problems)}")
    for task, each in enumerate(grams):
        check_finite(dict(each), f"the set of Gram matrices of task {task}")
    if not any(path in grams[0] for path in vectors.paths):
        raise ValueError(
            f"no leaf has a Gram matrix: they are for {list(grams[0])[:4]}, the task vectors have {vectors.paths[:4]}; "
            "collect them with the model that the task vectors belong to (input_grams)"
        )


def _split(kernel: tuple[int, ...], gram: tuple[int, ...] | str) -> tuple[int, ...] | None:
    """Shape ``[*layers, in, out]`` of a kernel beside a Gram matrix ``[*layers, in, in]``, None if they do not fit."""
    if isinstance(gram, str) or len(gram) < 2 or gram[-1] != gram[-2]:
        return None
    layers, rest = gram[:-2], kernel[len(gram) - 2 :]
    sizes = [int(np.prod(rest[:cut])) for cut in range(1, len(rest))]
    if kernel[: len(layers)] != layers or gram[-1] not in sizes:
        return None
    return (*layers, gram[-1], int(np.prod(rest)) // gram[-1])


@jax.jit
def regression(
    leaves: Sequence[Any],
    grams: Sequence[Any],
    shares: Float[Array, " vectors"],
    shrink: Float[Array, ""],
    ridge: Float[Array, ""],
) -> Float[Array, "*shape"]:
    """One kernel of `regmean`, from that of each vector and its Gram matrices; `shares` add up to one."""
    shape = jnp.shape(leaves[0])
    matrix = _split(shape, jnp.shape(grams[0]))
    assert matrix is not None
    kernels, inputs = stack(leaves).reshape(len(leaves), *matrix), stack(grams)
    average = weighted_sum(list(kernels), shares)

    def merge(kernels: Array, inputs: Array, average: Array) -> Array:
        kept = shrink + (1 - shrink) * jnp.eye(inputs.shape[-1])
        inputs = inputs * kept * shares[:, None, None]
        seen = total(inputs)
        pull = total(product(inputs, kernels - average))
        return average + solve(seen + ridge * jnp.mean(jnp.diagonal(seen)) * jnp.eye(seen.shape[0]), pull)

    for _ in matrix[:-2]:
        merge = jax.vmap(merge, (1, 1, 0))
    return merge(kernels, inputs, average).reshape(shape)


# -- collecting ----------------------------------------------------------------------------------------------------


def _kernels(table: SiteTable, leaves: dict[str, Any]) -> tuple[list[tuple[Site, np.ndarray]], dict[str, str]]:
    """The sites of kernels, each with the place of its inputs among the leaf's own, and why other leaves have none."""
    kernels: list[tuple[Site, np.ndarray]] = []
    reasons = {path: f"unclassified use: {', '.join(why)}" for path, why in table.unclassified.items()}
    for site in table.sites:
        if site.kind not in ("dense", "conv"):
            reasons.setdefault(site.path, f"used as a {site.kind}")
            continue
        order = _input_order(site, tuple(jnp.shape(leaves[site.path])))
        if order is None:
            reasons.setdefault(site.path, "its leading axes are not the inputs")
        else:
            kernels.append((site, order))
    return [(site, order) for site, order in kernels if site.path not in reasons], reasons


def _input_order(site: Site, shape: tuple[int, ...]) -> np.ndarray | None:
    """For each input of a site, its number among the inputs of the leaf ``[*layers, *inputs, *outputs]``; else None."""
    numbers = np.arange(int(np.prod(shape))).reshape(shape)
    with jax.ensure_compile_time_eval():  # inside `jit` too
        seen = np.asarray(apply_view(site.view, jnp.asarray(numbers, jnp.int32)))
    inputs, outputs = seen.shape[-2:]
    layers = seen.size // (inputs * outputs)
    width = numbers.size // (layers * inputs)  # outputs of the whole leaf, of which a site may see a part
    found = seen.reshape(layers, inputs, outputs) - np.arange(layers)[:, None, None] * inputs * width
    order = found[0, :, 0] // width
    straight = np.array_equal(found // width, np.broadcast_to(order[:, None], found.shape))
    complete = np.array_equal(np.sort(order), np.arange(inputs))
    return order if straight and complete and shape[: seen.ndim - 2] == seen.shape[:-2] else None


@jax.jit
def _add(
    sums: moments.Moments | None, x: Float[Array, "*layers n inputs"], weights: Float[Array, " n"]
) -> moments.Moments:
    layers, width = x.shape[:-2], x.shape[-1]
    if sums is None:
        sums = jax.tree.map(lambda zero: jnp.broadcast_to(zero, (*layers, *zero.shape)), moments.init(width, width))
    update = partial(_update, weights)
    for _ in layers:
        update = jax.vmap(update)
    return update(sums, x)


def _update(weights: Array, sums: moments.Moments, x: Array) -> moments.Moments:
    return moments.update(sums, x, x, weights)


@jax.jit
def _matrix(sums: moments.Moments, order: Array) -> tuple[Float[Array, "*layers inputs inputs"], Array]:
    def matrix(sums: moments.Moments) -> tuple[Array, Array]:
        gram = moments.cross(sums)
        back = jnp.argsort(order)
        return gram[back][:, back], sums.count

    for _ in range(sums.count.ndim):
        matrix = jax.vmap(matrix)
    return matrix(sums)


@jax.jit
def per_row(gram: Array, count: Array) -> Float[Array, "*layers inputs inputs"]:
    """A Gram matrix divided by the number of its rows."""
    return gram / jnp.where(count > 0, count, 1)[..., None, None]
