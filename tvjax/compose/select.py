"""Which leaves of which task vectors to keep when there is no room for all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tvjax import tree
from tvjax.compose.objectives import Objective, check_objective, value
from tvjax.placement import automatic

PyTree = Any


class Kept(NamedTuple):
    """What became of one leaf of one task vector.

    Attributes:
      vector: number of the task vector.
      path: of the leaf.
      information: ``|<gradient, tau leaf>|``: how fast the objective changes with the leaf's coefficient.
      bytes: of the leaf as it is stored.
      kept: whether it stays.
    """

    vector: int
    path: str
    information: float
    bytes: int
    kept: bool


@automatic(lambda params, taus, *_, **__: (list(taus), ()))
def select_informative(
    params: PyTree,
    taus: Sequence[PyTree],
    objective: Objective,
    *,
    key: Array,
    leaves: int | None = None,
    nbytes: int | None = None,
    batch_size: int = 32,
) -> tuple[list[PyTree], list[Kept]]:
    """Keeps the leaves of task vectors whose coefficients change the objective fastest.

    The gradient of a coefficient at 0 is ``<gradient, tau leaf>``; the leaves are taken in the order of its size until
    the budget is full (arXiv 2407.02880, section 5.2, selection by gradient). With a budget of bytes, a leaf that does
    not fit any more is passed over and smaller ones may still follow. Task vectors may be NumPy arrays: they go to the
    device leaf by leaf.

    Args:
      params: theta_0, where the gradient is taken.
      taus: task vectors; None leaves are not covered.
      objective: on a few labelled examples, all of which are used.
      key: a random key, for augmentation.
      leaves: how many leaves to keep, counted over all vectors.
      nbytes: how many bytes they may take as they are stored. At least one of the two budgets is given.
      batch_size: examples whose gradient is taken at once.

    Returns:
      The task vectors, None at what was dropped, and the report, the most informative leaf first.

    Raises:
      ValueError: no budget or a negative one, or leaves that the parameters lack or have in another shape.

    >>> from tvjax.compose import of_loss
    >>> objective = of_loss(lambda params, batch: batch @ params["w"] + params["b"], jnp.ones((2, 2)))
    >>> params = {"w": jnp.zeros(2), "b": jnp.zeros(())}
    >>> taus = [{"w": jnp.ones(2), "b": jnp.float32(9)}, {"w": -jnp.ones(2), "b": jnp.float32(1)}]
    >>> kept, report = select_informative(params, taus, objective, key=jax.random.key(0), leaves=1)
    >>> kept[0]["w"], float(kept[0]["b"]), kept[1], report[0].information
    (None, 9.0, {'b': None, 'w': None}, 9.0)
    """
    if (leaves is None and nbytes is None) or min(leaves or 0, nbytes or 0) < 0:
        raise ValueError(f"found leaves {leaves} and nbytes {nbytes}, expected a budget, not negative: leaves=100")
    tree.check_whole(params)
    check_objective(objective)
    flat = [tree.flatten(tau) for tau in taus]
    _check_fit(params, flat)
    gradient = tree.flatten(_mean_gradient(params, objective, batch_size, key))
    found = [
        Kept(index, path, abs(float(_product(gradient[path], leaf))), _bytes(leaf), False)
        for path in gradient
        for index, vector in enumerate(flat)
        if (leaf := vector.get(path)) is not None
    ]
    report, count, size = [], 0, 0
    for leaf in sorted(found, key=lambda kept: -kept.information):  # stable: ties stay in the order of the leaves
        fits = (leaves is None or count < leaves) and (nbytes is None or size + leaf.bytes <= nbytes)
        if fits:
            count, size = count + 1, size + leaf.bytes
        report.append(leaf._replace(kept=fits))
    keep = {(leaf.vector, leaf.path) for leaf in report if leaf.kept}
    chosen = [
        tree.map_with_path(lambda path, leaf, index=index: leaf if (index, path) in keep else None, tau)
        for index, tau in enumerate(taus)
    ]
    return chosen, report


def _mean_gradient(params: PyTree, objective: Objective, size: int, key: Array) -> PyTree:
    """The gradient of the objective on all its examples, batch by batch."""
    total = None
    for number, term in enumerate(objective):
        for start in range(0, term.count, size):
            batch = jax.tree.map(lambda leaf, at=start: leaf[at : at + size], term.examples)
            share = min(size, term.count - start) / term.count
            part_key = jax.random.fold_in(jax.random.fold_in(key, number), start)
            part = _batch_gradient((_without_examples(term),), params, batch, part_key, jnp.float32(share))
            total = part if total is None else _sum(total, part)
    return total


def _without_examples(term: Any) -> Any:
    return term.__class__(term.loss, term.context, None, term.weight, term.share)


@jax.jit
def _batch_gradient(objective: Objective, params: PyTree, batch: PyTree, key: Array, share: Float[Array, ""]) -> PyTree:
    floating = jax.tree.map(lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else None, params)

    def loss(floating: PyTree) -> Float[Array, ""]:
        merged = jax.tree.map(
            lambda leaf, own: own if leaf is None else leaf, floating, params, is_leaf=lambda leaf: leaf is None
        )
        return share * value(objective, merged, [batch], key)

    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), jax.grad(loss)(floating))


@partial(jax.jit, donate_argnums=0)
def _sum(total: PyTree, part: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, total, part)


@jax.jit
def _product(gradient: Float[Array, "*shape"], leaf: Float[Array, "*shape"]) -> Float[Array, ""]:
    return jnp.sum(gradient * leaf.astype(jnp.float32))


def _bytes(leaf: Any) -> int:
    kind = tree.leaf_type(leaf)
    return math.prod(kind.shape) * np.dtype(kind.dtype).itemsize


def _check_fit(params: PyTree, flat: Sequence[dict[str, Any]]) -> None:
    theta = {path: tree.leaf_type(leaf) for path, leaf in tree.flatten(params).items()}
    problems = []
    for index, vector in enumerate(flat):
        for path, leaf in vector.items():
            shape = tree.leaf_type(leaf).shape
            if path not in theta:
                problems.append(f"{path}: not in the parameters (task vector {index})")
            elif theta[path].shape != shape or not jnp.issubdtype(theta[path].dtype, jnp.floating):
                problems.append(
                    f"{path}: parameters {theta[path].shape} {theta[path].dtype}, task vector {index} {shape}"
                )
    if problems:
        raise ValueError(
            f"the task vectors do not fit the parameters at {len(problems)} leaves:\n{tree.list_some(problems)}\n"
            "of another model? transport them first (tvjax.fit)"
        )
