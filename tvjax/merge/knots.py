"""KnOTS: merging in the coordinates of a shared basis (Stoica et al., ICLR 2025, arXiv 2410.19735)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tvjax import placement, tree
from tvjax.align.decompositions import qr, svd
from tvjax.align.procrustes import default_rank_tolerance
from tvjax.align.products import product
from tvjax.merge.adapters import Adapter, Adapters, check_adapters
from tvjax.merge.base import PyTree, Vectors, over_meshes, stack, wide
from tvjax.merge.leaf_report import Report, tell
from tvjax.merge.spectral import Method, check_method, leading
from tvjax.merge.views import Matrices, Part, as_matrix, from_matrix, join, leaf_axes, parts

Merge = Callable[[Sequence[PyTree]], PyTree]
Side = Literal["input", "output"]


@over_meshes
def knots(
    taus: Sequence[PyTree],
    merge: Merge,
    *,
    side: Side = "output",
    rank: int | None = None,
    matrices: Matrices = None,
    method: Method = "gram",
    report: Report | None = None,
) -> PyTree:
    """Merges the coordinates of the task vectors in a basis that all of them share.

    The updates one above the other are ``[tau_1; ..; tau_T] = [C_1; ..; C_T] V^T``, V the right singular vectors, so
    that ``tau_i = C_i V^T`` in ONE basis V of the outputs; the result is ``merge([C_1 .. C_T]) V^T``. Low-rank updates
    (adapters) hardly overlap entry by entry in the coordinates of the model; in these they do.

    The paper's kernels are ``[out, in]``: it concatenates them side by side, ``U S [V_1 .. V_T]^T``, and merges what
    its code calls ``S V_i``. In Flax orientation that is ``C_i = V_i S``, and its U, the shared basis, our V: outputs.

    Args:
      taus: task vectors of one base, of adapters as a rule (`tvjax.merge.adapters.to_task_vector`).
      merge: any merge of task vectors, such as ``partial(ties, density=0.2)``. It gets trees of the structure of
        `taus` whose matrices are the coordinates, ``[in, r]`` (or ``[r, out]``), the other leaves as they are. In the
        place of a leaf that is a stack it gets a list, ``path/0``, ``path/1``, ...
      side: the basis is of the ``"output"`` (as published) or of the ``"input"`` space.
      rank: directions of the basis, at most; None: all that the vectors have.
      matrices: how leaves are matrices: the letters of their axes by path pattern, ``{"**/kernel": "lio"}``, as by
        `tvjax.merge.matrix_views`; or path patterns of the matrices; None: all of two axes (`tvjax.merge.views`).
      method: ``"gram"``, ``"svd"`` or ``"randomised"`` (needs `rank`).
      report: called for each leaf (`tvjax.merge.leaf_report.MergedLeaf`).

    Returns:
      The merged task vector, float32.

    Raises:
      ValueError: vectors that do not fit together, or an unknown option.

    A merge that treats entries one by one depends on the singular vectors themselves, up to sign: where two singular
    values are equal, the basis is one of several.

    >>> one, two = ({"kernel": jnp.array(x)} for x in ([[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [3.0, 0.0]]))
    >>> total = lambda parts: jax.tree.map(lambda *leaves: sum(leaves), *parts)
    >>> jnp.round(knots([one, two], total)["kernel"], 4).tolist()
    [[1.0, 0.0], [3.0, 0.0]]
    """
    check_method(method)
    _check(side, rank)
    if method == "randomised" and rank is None:
        raise ValueError('method="randomised" needs rank: a number of directions')
    vectors = Vectors(taus)
    shapes = {path: vectors.shape(path) for path in vectors.paths}
    axes = leaf_axes(shapes, matrices)
    inner = {path: _named(parts(path, shapes[path], axes[path])) for path in vectors.paths}
    kernels = [path for path in vectors.paths if "i" in axes[path] and 0 not in shapes[path]]
    found = {}
    for turn, (name, part) in enumerate((name, part) for path in kernels for name, part in inner[path].items()):
        leaves = [part.of(leaf) for leaf in vectors.leaves(part.path)]
        rule = partial(_coordinates, axes=part.axes, side=side, rank=rank, method=method)
        shared = placement.on_one_device(turn, rule, leaves)
        basis, coordinates = (placement.like(x, leaves[0]) for x in (shared.basis, shared.coordinates))
        found[name] = _Shared(coordinates, basis, shared.rank)
    found = _determined(found)
    given = []
    for number, flat in enumerate(vectors.flat):
        pieces: dict[str, Any] = {
            name: part.of(flat[part.path]) for each in inner.values() for name, part in each.items()
        }
        pieces |= _on_side({name: shared.coordinates[number] for name, shared in found.items()}, side)
        lists = {path: [pieces[name] for name in names] for path, names in inner.items()}
        given.append(vectors.tree({path: each if len(each) > 1 else each[0] for path, each in lists.items()}))
    merged = tree.flatten(merge(given))
    for path in kernels:
        for name, part in inner[path].items():
            basis = found[name].basis
            whole = product(merged[name], basis) if side == "output" else product(basis.T, merged[name])
            merged[name] = from_matrix(whole, part.shape, part.axes)
    for path, names in inner.items():
        ranks = [found[name].basis.shape[0] for name in names if name in found]
        how = "merged in a shared basis" if ranks else "merged as it is"
        tell(report, path, shapes[path], how, {"rank": ranks if len(ranks) > 1 else ranks[0]} if ranks else None)
    return vectors.tree(
        {
            path: vectors.place(path, join([merged[name] for name in names], shapes[path], axes[path]))
            for path, names in inner.items()
        }
    )


def _named(stacked: list[Part]) -> dict[str, Part]:
    """The parts of a leaf by the paths that they have for the inner merge."""
    if len(stacked) == 1:
        return {stacked[0].path: stacked[0]}
    return {f"{part.path}/{number}": part for number, part in enumerate(stacked)}


def knots_adapters(
    adapters: Sequence[Adapters], merge: Merge, *, side: Side = "output", rank: int | None = None
) -> dict[str, Adapter]:
    """`knots` of adapters, without ever forming their products: by a QR of the factors and an SVD of the small core.

    Args:
      adapters: for each task the adapters by the path of their kernel, the same paths for all.
      merge: as in `knots`; its trees are nested dicts of the coordinates.
      side: as in `knots`.
      rank: of the result, at most; None: the sum of the ranks.

    Returns:
      Adapters of scale 1 by path: the merged coordinates and the shared basis.

    Raises:
      ValueError: adapters that do not fit together, or an unknown option.

    >>> one = {"up/kernel": Adapter(jnp.array([[1.0], [0.0]]), jnp.array([[2.0, 0.0]]), 0.5)}
    >>> merged = knots_adapters([one, one], lambda parts: parts[0])["up/kernel"]
    >>> jnp.abs(merged.a @ merged.b).round(4).tolist()
    [[1.0, 0.0], [0.0, 0.0]]
    """
    shapes = check_adapters(adapters)
    _check(side, rank)
    missing = [f"{path} of task {task}" for task, each in enumerate(adapters) for path in shapes if path not in each]
    if missing:
        raise ValueError(
            f"knots needs an adapter of every task at every kernel, missing are\n{tree.list_some(missing)}\n"
            "merge the common paths only, or give a zero adapter"
        )
    found = _determined({path: _factored([each[path] for each in adapters], side) for path in shapes}, rank)
    parts = []
    for number in range(len(adapters)):
        pieces = {path: shared.coordinates[number] for path, shared in found.items()}
        parts.append(tree.nest(_on_side(pieces, side)))
    merged = tree.flatten(merge(parts))
    return {
        path: Adapter(*((merged[path], shared.basis) if side == "output" else (shared.basis.T, merged[path])))
        for path, shared in found.items()
    }


class _Shared(NamedTuple):
    """Updates in a shared basis, largest direction first: ``coordinates @ basis``, the first `rank` not rounding."""

    coordinates: Float[Array, "vectors rows r"]
    basis: Float[Array, "r columns"]
    rank: Int[Array, ""]


def _determined(found: dict[str, _Shared], most: int | None = None) -> dict[str, _Shared]:
    """The directions that are not rounding, one at least; their number is fetched once for all leaves."""
    ranks = jax.device_get({path: shared.rank for path, shared in found.items()})
    cut = {}
    for path, (coordinates, basis, rank) in found.items():
        kept = max(1, int(ranks[path])) if most is None else max(1, min(most, int(ranks[path])))
        cut[path] = _Shared(coordinates[..., :kept], basis[:kept], rank)
    return cut


def _on_side(pieces: dict[str, Array], side: Side) -> dict[str, Array]:
    """Coordinates as ``[in, r]``, or as ``[r, out]`` in a basis of the inputs."""
    return pieces if side == "output" else {path: piece.T for path, piece in pieces.items()}


def _check(side: str, rank: int | None) -> None:
    if side not in get_args(Side):
        raise ValueError(f"side must be one of {get_args(Side)}, found {side!r}")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be 1 or more, found {rank}")


@partial(jax.jit, static_argnames=("axes", "side", "rank", "method"))
def _coordinates(leaves: Sequence[Any], axes: str, side: Side, rank: int | None, method: Method) -> _Shared:
    """The updates (for the input side their transposes) in a basis of their columns."""
    matrices = stack([as_matrix(leaf, axes) for leaf in wide(leaves)])
    matrices = matrices if side == "output" else matrices.mT
    tall = matrices.reshape(-1, matrices.shape[-1])
    count = min(tall.shape) if rank is None else min(rank, *tall.shape)
    basis = leading(tall, count, method)[1]
    last = jnp.max(jnp.where(jnp.any(basis != 0, axis=1), jnp.arange(1, count + 1), 0))
    return _Shared(product(matrices, basis.T), basis, last)


@partial(jax.jit, static_argnums=1)
def _factored(adapters: Sequence[Adapter], side: Side) -> _Shared:
    """`_coordinates` of products, from their factors."""
    pairs = [(scale * a, b) for a, b, scale in ((jnp.asarray(part, jnp.float32) for part in each) for each in adapters)]
    pairs = pairs if side == "output" else [(b.T, a.T) for a, b in pairs]
    # [A_1 B_1; ..] = blockdiag(A_i) B: a QR of each A_i and of all B leaves a core of the sum of the ranks.
    outer, small = qr(jnp.concatenate([b for _, b in pairs], axis=0).T)
    cuts = [sum(b.shape[0] for _, b in pairs[:number]) for number in range(1, len(pairs))]
    blocks = jnp.split(small.T, cuts, axis=0)
    core = jnp.concatenate([product(qr(a)[1], block) for (a, _), block in zip(pairs, blocks, strict=True)])
    _, values, turn = svd(core)
    coordinates = [product(a, product(block, turn.T)) for (a, _), block in zip(pairs, blocks, strict=True)]
    tolerance = default_rank_tolerance()
    rank = jnp.sum(values > tolerance * jnp.max(values), dtype=jnp.int32)
    return _Shared(jnp.stack(coordinates), product(turn, outer.T), rank)
