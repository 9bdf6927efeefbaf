"""The best low-rank approximation of a task vector: an adapter of what a full fine-tuning learned."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tvjax import tree
from tvjax.align import procrustes
from tvjax.align.products import wide
from tvjax.factors import LowRank, is_low_rank, triplets
from tvjax.merge.views import Matrices, leaf_axes

PyTree = Any
Others = Literal["refuse", "leave out", "keep"]

_SKETCHED = 512  # a smaller matrix is decomposed as a whole


class Truncated(NamedTuple):
    """What became of one leaf.

    Attributes:
      path: of the leaf.
      shape: its shape.
      rule: ``truncated``, ``left out`` or ``kept``.
      rank: of the result; 0 where there is none.
      error: ``||tau - tau_r|| / ||tau||`` of this leaf.
      share: of the squared norm of the whole task vector that the leaf has.
    """

    path: str
    shape: tuple[int, ...]
    rule: str
    rank: int
    error: float
    share: float


def low_rank(
    tau: PyTree,
    rank: int | None = None,
    *,
    energy: float | None = None,
    matrices: Matrices = None,
    others: Others = "refuse",
    key: Array | None = None,
    report: Callable[[Truncated], None] | None = None,
) -> PyTree:
    """The nearest task vector whose matrices have at most a rank: a truncated SVD of each, ``U_r S_r V_r^T``.

    Args:
      tau: a task vector; leaves that are low rank already are compressed without their product.
      rank: of each matrix, at most.
      energy: the least rank whose singular values hold this share of the matrix's squared norm; with `rank` too, at
        most that.
      matrices: how leaves are matrices, as in `tvjax.merge.knots`; None: all of two axes, and convolutions.
      others: what becomes of leaves that are no matrices: ``"refuse"`` them by name, ``"leave out"`` (None in the
        result) or ``"keep"`` as they are. Leaves of zeros are left out.
      key: a random key: large matrices are decomposed by randomised SVD; without one all are exactly.
      report: called for each leaf.

    Returns:
      A task vector of the same structure with `tvjax.LowRank` leaves, ``left = U sqrt(S)``, ``right = sqrt(S) V^T``.

    Raises:
      ValueError: neither a rank nor an energy, one out of range, or leaves that are no matrices.

    >>> tau = {"kernel": jnp.diag(jnp.array([3.0, 4.0])), "bias": jnp.zeros(2)}
    >>> found = low_rank(tau, 1, report=lambda row: print(row.path, row.rule, round(row.error, 3)))
    bias left out 0.0
    kernel truncated 0.6
    >>> jnp.asarray(found["kernel"]).round(4).tolist()
    [[0.0, 0.0], [0.0, 4.0]]
    """
    check_size(rank, energy)
    if others not in get_args(Others):
        raise ValueError(f"others must be one of {get_args(Others)}, found {others!r}")
    flat = {path: leaf if is_low_rank(leaf) else jnp.asarray(leaf) for path, leaf in tree.flatten(tau).items()}
    squares = {path: float(tree.norm(leaf)) ** 2 for path, leaf in flat.items()}
    whole = sum(squares.values()) or 1.0
    axes = leaf_axes({path: leaf.shape for path, leaf in flat.items() if not is_low_rank(leaf)}, matrices)
    fits = {path for path, leaf in flat.items() if is_low_rank(leaf) or re.fullmatch("[ls]*i+o+", axes[path])}
    rest = [path for path in flat if path not in fits and squares[path]]
    if rest and others == "refuse":
        listed = [f"{path}: {flat[path].shape}, {squares[path] / whole:.2%} of the squared norm" for path in rest]
        raise ValueError(
            f"{len(rest)} leaves are no matrices, and have no factors:\n{tree.list_some(listed)}\n"
            'say what becomes of them: others="leave out" or others="keep"; or how they are matrices (matrices)'
        )
    found: dict[str, Any] = {}
    for path, leaf in flat.items():
        share, own = squares[path] / whole, None if key is None else _key_of(key, path)
        if path not in fits or not squares[path]:
            kept = others == "keep" and path not in fits
            found[path] = leaf if kept else None
            row = Truncated(path, leaf.shape, "kept" if kept else "left out", 0, 0.0 if kept else 1.0, share)
            row = row if squares[path] else row._replace(error=0.0)
        else:
            found[path], error = truncate(leaf, rank, energy, axes.get(path, ""), own)
            row = Truncated(path, leaf.shape, "truncated", found[path].rank, error, share)
        if report is not None:
            report(row)
    return tree.map_with_path(lambda path, leaf: found[path], tau)


def truncate(
    leaf: Any, rank: int | None, energy: float | None, axes: str = "io", key: Array | None = None
) -> tuple[LowRank, float]:
    """One leaf truncated to a rank or an energy, and the relative error.

    Args:
      leaf: an array, or a leaf of low rank.
      rank: at most.
      energy: share of the squared norm to hold.
      axes: letters of the axes of an array: stacked ones first, then inputs, then outputs.
      key: for randomised SVD.

    >>> leaf, error = truncate(jnp.diag(jnp.array([3.0, 4.0])), None, 0.6)
    >>> leaf.rank, round(error, 3)
    (1, 0.6)
    """
    if is_low_rank(leaf):
        left, values, right = _over_layers(triplets, leaf.layers)(wide(leaf.left), wide(leaf.right))
    else:
        stacked = len(axes) - len(axes.lstrip("ls"))
        rows = math.prod(leaf.shape[stacked : axes.index("o")])
        matrix = wide(leaf).reshape(*leaf.shape[:stacked], rows, -1)
        most = min(matrix.shape[-2:]) if rank is None else min(rank, *matrix.shape[-2:])
        sketched = key is not None and energy is None and 4 * most <= min(matrix.shape[-2:]) >= _SKETCHED
        decompose = partial(_decompose, most if energy is None else min(matrix.shape[-2:]), sketched)
        keys = jax.random.split(jax.random.key(0) if key is None else key, matrix.shape[:-2])
        left, values, right = _over_layers(decompose, stacked)(matrix, keys)
    count = _count(np.asarray(values), rank, energy)
    root = jnp.sqrt(values[..., :count])
    found = LowRank(left[..., :count] * root[..., None, :], root[..., None] * right[..., :count, :], leaf.shape)
    size = tree.norm(leaf)
    if is_low_rank(leaf):
        lost = jnp.linalg.norm(values[..., count:].reshape(-1))
    else:
        lost = tree.norm(wide(leaf) - jnp.asarray(found))
    return found, float(lost / jnp.where(size > 0, size, 1))


def check_size(rank: int | None, energy: float | None) -> None:
    """Raises a ValueError unless a rank, an energy or both are given, and in range.

    >>> check_size(16, None)
    """
    if rank is None and energy is None:
        raise ValueError("give a rank, such as 16, or an energy, such as 0.95")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank must be a whole number from 1 on, found {rank!r}")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy must lie in (0, 1], found {energy!r}: the share of the squared norm to hold")


def not_smaller(rows: Sequence[Truncated]) -> tuple[str, ...]:
    """What to say where factors have as many entries as what they stand for, or more.

    >>> not_smaller([Truncated("kernel", (4, 6), "truncated", 3, 0.1, 1.0)])[0][:62]
    'of 1 of 1 layers the factors are no smaller than the matrix (k'
    """
    kept = [row for row in rows if row.rule == "truncated" and len(row.shape) > 1]
    large = [row for row in kept if row.rank * (math.prod(row.shape[:-1]) + row.shape[-1]) >= math.prod(row.shape)]
    if not large:
        return ()
    shape = "x".join(map(str, large[0].shape))
    return (
        f"of {len(large)} of {len(kept)} layers the factors are no smaller than the matrix ({large[0].path}: rank "
        f"{large[0].rank} of {shape}): a task vector in full takes no more room and loses nothing",
    )


def _count(values: np.ndarray, rank: int | None, energy: float | None) -> int:
    """Directions to keep, of the layer that needs the most of them."""
    count = values.shape[-1]
    if energy is not None:
        squares = np.cumsum(values.astype(np.float64) ** 2, -1)
        enough = squares >= (energy - 1e-7) * np.maximum(squares[..., -1:], 1e-300)
        count = int(np.max(np.argmax(enough, -1))) + 1
    return count if rank is None else min(rank, count)


@partial(jax.jit, static_argnums=(0, 1))
def _decompose(count: int, sketched: bool, matrix: Array, key: Array) -> tuple[Array, Array, Array]:
    return procrustes.decompose(matrix, count, "randomised" if sketched else "svd", key)


def _over_layers(function: Callable[..., Any], layers: int) -> Callable[..., Any]:
    for _ in range(layers):
        function = jax.vmap(function)
    return function


def _key_of(key: Array, path: str) -> Array:
    return jax.random.fold_in(key, zlib.crc32(path.encode()))
