"""Merges of matrices: the same walk over the leaves for every rule, and what happens to leaves that are none."""

from __future__ import annotations

import dataclasses
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial, reduce
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tvjax import placement
from tvjax.merge.base import Leaf, PyTree, Vectors, stack, weighted_sum, wide
from tvjax.merge.leaf_report import Report, tell
from tvjax.merge.settings import Settings, require, resolve_each
from tvjax.merge.views import Matrices, Part, as_matrix, from_matrix, join, leaf_axes, parts

Others = Literal["average", "weighted_average", "zero"]

BATCH_BYTES = 2**26  # of the float32 matrices that are on the device at once


def merge_matrices(
    rule: Callable[..., Float[Array, "inputs outputs"]],
    taus: Sequence[PyTree],
    *,
    weights: Settings,
    matrices: Matrices,
    others: Others,
    batch_bytes: int,
    report: Report | None,
) -> PyTree:
    """A rule for matrices on the leaves that are matrices, the mean on the others.

    Args:
      rule: ``[vectors, inputs, outputs] -> [inputs, outputs]`` on one matrix, its task vectors multiplied by their
        weights; hashable, and equal for equal options, so that XLA compiles once.
      taus: task vectors of one base.
      weights: the task vectors are multiplied by these.
      matrices: how the leaves are matrices (`tvjax.merge.views.leaf_axes`).
      others: what the other leaves are: ``"average"``, ``1/T sum_i w_i tau_i``, linear in the vectors and the weights
        as the matrices are; ``"weighted_average"``, ``sum_i w_i tau_i / sum_i w_i``, as published code with weights has
        it, for which their sum must be positive; or ``"zero"``. Without weights the first two are one.
      batch_bytes: matrices of one shape go to the device in batches of this size in float32. It changes no result.
      report: called for each leaf (`tvjax.merge.leaf_report.MergedLeaf`).

    Returns:
      The merged task vector, float32.

    Raises:
      ValueError: vectors that do not fit, an unknown option, or leaves of which nothing says how they are matrices.
    """
    if others not in get_args(Others):
        raise ValueError(f"others must be one of {get_args(Others)}, found {others!r}")
    vectors = Vectors(taus)
    shapes = {path: vectors.shape(path) for path in vectors.paths}
    axes = leaf_axes(shapes, matrices)
    stacks = {path: parts(path, shapes[path], axes[path]) for path in vectors.paths}
    names = dict.fromkeys(part.name for each in stacks.values() for part in each)
    numbers = resolve_each(weights, list(names), len(vectors), "weights")
    if others == "weighted_average":
        require(numbers, "weights", lambda w: w.sum() > 0, "of positive sum for others='weighted_average'")
    kernels = {path: each for path, each in stacks.items() if "i" in axes[path] and 0 not in shapes[path]}
    merged: dict[str, Array] = {}
    pieces: dict[str, list[Array]] = defaultdict(list)
    batches = by_shape([part for each in kernels.values() for part in each], len(vectors), batch_bytes)
    for batch, found in _side_by_side(_Weighted(rule), batches, vectors, numbers):
        for part, piece in zip(batch, found, strict=True):
            pieces[part.path].append(piece)
            if len(pieces[part.path]) == len(kernels[part.path]):
                path = part.path
                merged[path] = vectors.place(path, join(pieces.pop(path), shapes[path], axes[path]))
                tell(report, path, shapes[path], _rule(kernels[path], axes[path], matrices))
    for path in vectors.paths:
        if path not in merged:
            factors = _others(others, [numbers[part.name] for part in stacks[path]])
            averaged = weighted(vectors.leaves(path), _along(factors, shapes[path], axes[path]))
            merged[path] = vectors.place(path, averaged)
            tell(report, path, shapes[path], "zeroed by rule" if others == "zero" else "averaged")
    return vectors.tree(merged)


def _side_by_side(
    rule: Callable[..., Float[Array, "inputs outputs"]],
    batches: Iterable[list[Part]],
    vectors: Vectors,
    numbers: Mapping[str, np.ndarray],
) -> Iterator[tuple[list[Part], list[Float[Array, "*shape"]]]]:
    """The rule on one batch of matrices after the other, in order.

    Matrices that are spread over devices are gathered to one of them, in turn: a batch on each device at a time.
    """
    devices = max(placement.devices(leaf) for flat in vectors.flat for leaf in flat.values())
    under_way: deque[tuple[list[Part], list[Leaf], list[Array]]] = deque()

    def finished() -> tuple[list[Part], list[Array]]:
        batch, first, found = under_way.popleft()
        jax.block_until_ready(found)
        return batch, [placement.like(piece, leaf) for piece, leaf in zip(found, first, strict=True)]

    for turn, batch in enumerate(batches):
        if len(under_way) == devices:  # before the next batch takes memory
            yield finished()
        leaves = [[part.of(leaf) for leaf in vectors.leaves(part.path)] for part in batch]
        axes, weights = tuple(part.axes for part in batch), np.stack([numbers[part.name] for part in batch])
        found = placement.on_one_device(turn, partial(run_matrices, rule, axes), leaves, weights)
        under_way.append((batch, [each[0] for each in leaves], found))
    while under_way:
        yield finished()


def by_shape(pieces: Iterable[Part], vectors: int, batch_bytes: int) -> Iterator[list[Part]]:
    """Matrices in batches of one shape, each batch of at most `batch_bytes` in float32 (one matrix at least)."""
    groups: dict[tuple[int, int], list[Part]] = defaultdict(list)
    for part in pieces:
        groups[part.matrix].append(part)
    for (rows, columns), members in groups.items():
        size = max(1, batch_bytes // max(1, 4 * rows * columns * vectors))
        yield from (members[start : start + size] for start in range(0, len(members), size))


@partial(jax.jit, static_argnums=(0, 1))
def run_matrices(
    rule: Callable[..., Float[Array, "inputs outputs"]], axes: tuple[str, ...], leaves: list[list[Leaf]], *extra: Any
) -> list[Float[Array, "*shape"]]:
    """A rule on a batch of leaves, or parts of leaves, of one matrix shape.

    Args:
      rule: ``([vectors, inputs, outputs], *extra) -> [inputs, outputs]``; pure, and the SAME object for every call (a
        module-level function, or a `jax.tree_util.Partial` made once).
      axes: for each of the batch, the letters of its axes.
      leaves: for each of the batch, that leaf of every vector.
      *extra: pytrees whose arrays have the batch first (weights by leaf and the like).

    Returns:
      The merged leaves, in their own shapes.
    """
    matrices = jnp.stack([stack([as_matrix(x, a) for x in wide(each)]) for a, each in zip(axes, leaves, strict=True)])
    merged = jax.vmap(rule)(matrices, *extra)
    return [from_matrix(merged[n], jnp.shape(each[0]), axes[n]) for n, each in enumerate(leaves)]


@jax.jit
def weighted(leaves: Sequence[Any], factors: Float[Array, "vectors ..."]) -> Float[Array, "*shape"]:
    """``sum_i f_i tau_i`` of one leaf as stored, float32; f_i is a number, or an array to multiply the leaf by.

    >>> weighted([jnp.ones(2, jnp.bfloat16), jnp.ones(2)], jnp.array([1.0, 2.0])).tolist()
    [3.0, 3.0]
    """
    return weighted_sum(wide(leaves), factors)


def total(parts: Iterable[Float[Array, "*shape"]]) -> Float[Array, "*shape"]:
    """The sum of arrays (of an array over its first axis), one after another.

    XLA sums over a leading axis of a few elements an order of magnitude slower than it adds arrays.

    >>> total(jnp.ones((3, 2))).tolist()
    [3.0, 3.0]
    """
    return reduce(jnp.add, parts)


@dataclasses.dataclass(frozen=True)
class _Weighted:
    """A rule on the weighted matrices."""

    rule: Callable[..., Float[Array, "inputs outputs"]]

    def __call__(
        self, matrices: Float[Array, "vectors inputs outputs"], weights: Float[Array, " vectors"]
    ) -> Float[Array, "inputs outputs"]:
        return self.rule(matrices * weights[:, None, None])


def _rule(stacked: Sequence[Part], axes: str, matrices: Matrices) -> str:
    """What was done to a leaf, for the report."""
    rows, columns = stacked[0].matrix
    if len(stacked) > 1:
        return f"{len(stacked)} matrices [{rows}, {columns}]"
    by_rule = axes == "iiio" and not isinstance(matrices, Mapping)
    return f"matrix [{rows}, {columns}]" + (" of a convolution [h, w, in, out]" if by_rule else "")


def _others(others: Others, numbers: Sequence[np.ndarray]) -> np.ndarray:
    """Factors of the vectors in a leaf that is no matrix, ``[parts, vectors]``."""
    each = np.stack(numbers)
    if others == "weighted_average":
        return each / each.sum(axis=1, keepdims=True)
    return np.float32(1 / each.shape[1] if others == "average" else 0) * each


def _along(factors: np.ndarray, shape: tuple[int, ...], axes: str) -> np.ndarray:
    """Factors of the parts of a leaf, laid along its stacked axes: ``[vectors]``, or ``[vectors, ...]`` to multiply."""
    if len(factors) == 1:
        return factors[0]
    sizes = [size if letter in "ls" else 1 for size, letter in zip(shape, axes, strict=True)]
    return factors.T.reshape(-1, *sizes)
