"""Core Space: adapters merged in one small basis of both their sides (Panariello et al., 2025, arXiv 2509.17786)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from tvjax import placement, tree
from tvjax.align.decompositions import svd
from tvjax.align.products import product
from tvjax.factors import LowRank, is_low_rank
from tvjax.merge.adapters import Adapter, compress
from tvjax.merge.base import PyTree, Vectors, over_meshes
from tvjax.merge.knots import Merge
from tvjax.merge.leaf_report import Report, tell


@over_meshes
def core_space(
    taus: Sequence[PyTree], merge: Merge, *, rank: int | None = None, report: Report | None = None
) -> PyTree:
    """Merges low-rank task vectors in a basis that all of them share, without ever forming their products.

    ``U`` spans the inputs ``[A_1 .. A_T]`` of all adapters, ``V`` their outputs ``[B_1; ..; B_T]``, both by an SVD of
    the factors side by side. Each is ``A_t B_t = U M_t V^T`` without loss, of a core ``M_t = U^T A_t B_t V`` as small
    as the sum of the ranks. The result is ``U merge([M_1 .. M_T]) V^T``. A linear merge is the same as outside; one
    that looks at entries one by one (TIES, DARE) sees coordinates in which adapters overlap, as in `knots`, on both
    sides. Leaves that are not of low rank in all vectors are merged as they are.

    Args:
      taus: task vectors of one base with `tvjax.LowRank` leaves (`tvjax.merge.cover` fills up what some lack).
      merge: any merge of task vectors, such as ``partial(ties, density=0.2)``. It gets the cores in the place of the
        leaves; in that of a leaf that stacks layers a list of them.
      rank: of the result, at most (the best approximation); None: the sum of the ranks.
      report: called for each leaf (`tvjax.merge.leaf_report.MergedLeaf`).

    Returns:
      The merged task vector, float32, of low rank where all vectors are.

    Raises:
      ValueError: vectors that do not fit together, or a rank below 1.

    >>> from tvjax.merge import task_arithmetic
    >>> one = {"up": LowRank(jnp.array([[1.0], [0.0]]), jnp.array([[2.0, 0.0]]))}
    >>> two = {"up": LowRank(jnp.array([[0.0], [1.0]]), jnp.array([[0.0, 3.0]]))}
    >>> merged = core_space([one, two], task_arithmetic)["up"]
    >>> merged.rank, jnp.asarray(merged).round(4).tolist()
    (2, [[2.0, 0.0], [0.0, 3.0]])
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be 1 or more, found {rank}")
    vectors = Vectors(taus, factors=True)
    shared = {
        path: _spread([flat[path] for flat in vectors.flat], turn)
        for turn, path in enumerate(vectors.paths)
        if all(is_low_rank(flat[path]) for flat in vectors.flat)
        and len({(flat[path].layers, flat[path].cut) for flat in vectors.flat}) == 1
        and any(flat[path].rank for flat in vectors.flat)
    }
    given = []
    for number, flat in enumerate(vectors.flat):
        cores = {path: _split(basis.cores[number]) for path, basis in shared.items()}
        given.append(vectors.tree({path: cores.get(path, flat[path]) for path in vectors.paths}))
    merged = tree.flatten(merge(given))
    found: dict[str, Any] = {}
    for path in vectors.paths:
        leaf = vectors.flat[0][path]
        if path not in shared:
            found[path] = merged[path]
            tell(report, path, leaf.shape, "merged as it is")
            continue
        basis = shared[path]
        core = _joined(merged, path, basis.cores.shape[1:])
        found[path] = LowRank(*_sides(basis, core), leaf.shape)
        if rank is not None:
            found[path] = _truncated(found[path], rank)
        tell(report, path, leaf.shape, "merged in a shared basis", {"rank": found[path].rank})
    return vectors.tree(found)


class _Shared(NamedTuple):
    """Adapters in one basis: ``left @ cores[t] @ right`` each.

    Attributes:
      left: ``[*layers, d_in, m]``, orthonormal columns.
      cores: ``[tasks, *layers, m, n]``.
      right: ``[*layers, n, d_out]``, orthonormal rows.
    """

    left: Array
    cores: Array
    right: Array


def _spread(leaves: Sequence[LowRank], turn: int) -> _Shared:
    """`_shared` on one device, lying as the leaves do."""
    found = placement.on_one_device(turn, _shared, list(leaves))
    return _Shared(
        *(
            placement.like(x, leaf)
            for x, leaf in zip(found, (leaves[0].left, leaves[0].left, leaves[0].right), strict=True)
        )
    )


@jax.jit
def _shared(leaves: Sequence[LowRank]) -> _Shared:
    sides = [(jnp.asarray(leaf.left, jnp.float32), jnp.asarray(leaf.right, jnp.float32)) for leaf in leaves]
    basis = lambda columns: svd(columns)[0]  # noqa: E731
    for _ in range(leaves[0].layers):
        basis = jax.vmap(basis)
    left = basis(jnp.concatenate([a for a, _ in sides], axis=-1))
    right = jnp.swapaxes(basis(jnp.swapaxes(jnp.concatenate([b for _, b in sides], axis=-2), -1, -2)), -1, -2)
    inner, outer = jnp.swapaxes(left, -1, -2), jnp.swapaxes(right, -1, -2)
    return _Shared(left, jnp.stack([product(product(inner, a), product(b, outer)) for a, b in sides]), right)


def _split(core: Array) -> Any:
    """A matrix as it is, stacked ones as a list."""
    if core.ndim == 2:
        return core
    return list(core.reshape(-1, *core.shape[-2:]))


def _joined(merged: dict[str, Any], path: str, shape: tuple[int, ...]) -> Array:
    if path in merged:
        return merged[path]
    count = sum(1 for name in merged if name.rpartition("/")[0] == path)
    return jnp.stack([merged[f"{path}/{number}"] for number in range(count)]).reshape(shape)


def _sides(basis: _Shared, core: Array) -> tuple[Array, Array]:
    """The two factors, the core in the one that leaves the smaller rank."""
    if core.shape[-1] <= core.shape[-2]:
        return product(basis.left, core), basis.right
    return basis.left, product(core, basis.right)


def _truncated(leaf: LowRank, rank: int) -> LowRank:
    shorten = lambda a, b: compress(Adapter(a, b), rank)[:2]  # noqa: E731
    for _ in range(leaf.layers):
        shorten = jax.vmap(shorten)
    return LowRank(*shorten(leaf.left, leaf.right), leaf.shape)
