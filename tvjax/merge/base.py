"""What every merge is built on: task vectors of one base, leaf by leaf.

A merge is a plain function of a sequence of task vectors that returns one task vector. The leaves may be JAX arrays,
NumPy arrays or memory maps, in 16 or 32 bits: each leaf goes to the device when its turn comes, is merged there in
float32 by one compiled program per shape, and is let go, so that all vectors are never there at once.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeVar, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from tvjax import placement, processes, tree
from tvjax.factors import dense
from tvjax.finite import check_finite
from tvjax.kinds import kind_of
from tvjax.merge.entries import lying
from tvjax.merge.leaf_report import Report, tell

PyTree = Any
F = TypeVar("F", bound=Callable[..., Any])
Leaf = Any  # of a JAX or a NumPy array
Scope = Literal["vector", "leaf"]  # what is measured: the whole task vector, or each leaf by itself

_IN_FLIGHT = 2  # leaves whose programs run at once


def over_meshes(merge: F) -> F:
    """Decorator of a merge: task vectors may lie over any mesh, and the merged one lies like the first.

    Where several processes merge, they are asked first whether their arguments are the same.
    """
    placed = placement.automatic(lambda taus, *_, **__: taus[0])(merge)

    @functools.wraps(merge)
    def merged(taus: Sequence[PyTree], *arguments: Any, **options: Any) -> PyTree:
        processes.check_same("merge", {"task vectors": taus, "arguments": arguments, "options": options})
        return placed(taus, *arguments, **options)

    return cast(F, merged)


class Vectors:
    """Task vectors of one base, checked to be so; iterate over `paths` and take the `leaves` of each.

    Attributes:
      flat: the leaves of each vector by path, as they are stored.
      paths: of the leaves that the vectors cover.
    """

    def __init__(self, taus: Sequence[PyTree], least: int = 1, factors: bool = False):
        """Checks the vectors.

        Args:
          taus: task vectors; all cover the same leaves (None elsewhere).
          least: how many the method needs.
          factors: leave leaves of low rank as they are; else they become arrays.

        Raises:
          ValueError: too few vectors, other paths or shapes, leaves that are no floating-point arrays, or values that
            are not finite; inside `jit` there are no values to look at.
        """
        if not isinstance(taus, Sequence):
            raise ValueError(f"a merge takes a list of task vectors, found {kind_of(taus)}")
        if len(taus) < least:
            raise ValueError(f"this merge needs at least {least} task vectors, found {len(taus)}")
        self.flat = [tree.flatten(tau if factors else dense(tau)) for tau in taus]
        self._structure = tree.structure(taus[0])
        shapes = [{path: tuple(np.shape(leaf)) for path, leaf in flat.items()} for flat in self.flat]
        problems = [
            f"{path}: " + " and ".join(str(found.get(path, "missing")) for found in shapes)
            for path in dict.fromkeys(itertools.chain(*shapes))
            if len({found.get(path) for found in shapes}) > 1
        ]
        if problems:
            raise ValueError(
                f"task vectors that are merged must have the same paths and shapes, {len(problems)} leaves differ:\n"
                f"{tree.list_some(problems)}\nwere they made for one model? count what some lack as zero "
                "(tvjax.merge.cover), select the common leaves (tvjax.tree.select), or transport them first (tvjax.fit)"
            )
        self.paths = list(shapes[0])
        if not self.paths:
            raise ValueError("the task vectors have no leaves")
        wrong = [
            f"{path}: {tree.leaf_type(flat[path]).dtype}"
            for flat in self.flat
            for path in self.paths
            if not jnp.issubdtype(tree.leaf_type(flat[path]).dtype, jnp.floating)
        ]
        if wrong:
            raise ValueError(f"the leaves of a task vector are floating-point arrays, found\n{tree.list_some(wrong)}")
        for number, flat in enumerate(self.flat):
            check_finite(flat, f"task vector {number}")

    def __len__(self) -> int:
        return len(self.flat)

    def shape(self, path: str) -> tuple[int, ...]:
        """Shape of a leaf."""
        return tuple(np.shape(self.flat[0][path]))

    def leaves(self, path: str) -> list[Leaf]:
        """That leaf of every vector, as stored."""
        return [flat[path] for flat in self.flat]

    def place(self, path: str, merged: Array) -> Array:
        """A merged leaf, lying as that of the first vector does."""
        return placement.like(merged, self.flat[0][path])

    def tree(self, merged: Mapping[str, Any]) -> PyTree:
        """The merged leaves in the structure of the first vector."""
        return jax.tree.unflatten(self._structure, [merged[path] for path in self.paths])


def check_scope(scope: str) -> None:
    """Raises a ValueError unless it is a scope.

    >>> check_scope("leaf")
    """
    if scope not in get_args(Scope):
        raise ValueError(f"scope must be one of {get_args(Scope)}, found {scope!r}")


def over_leaves(
    vectors: Vectors, rule: Callable[..., Any], *arguments: Mapping[str, Any], options: tuple[tuple[str, Any], ...] = ()
) -> Iterator[tuple[str, Any]]:
    """A rule on one leaf after the other: ``rule(leaves, *arguments, **options)``, compiled once per shape.

    The next leaf is under way while one is looked at, and no more: what is on the device does not grow with the model.
    Leaves on host are read in place where the platform can do so; nothing reads them any more when the walk has ended.

    Args:
      vectors: the task vectors.
      rule: pure; gets that leaf of every vector as stored. A module-level function, so that it is compiled once.
      *arguments: pytrees of arrays by path.
      options: static keywords of the rule.

    Yields:
      Path and result, in order.
    """
    under_way: deque[tuple[str, Any]] = deque()
    for path in vectors.paths:
        lie = placement.spread(vectors.flat[0][path])
        result = _run(rule, options, lie, vectors.leaves(path), *(argument[path] for argument in arguments))
        under_way.append((path, result))
        if len(under_way) == _IN_FLIGHT:
            yield jax.block_until_ready(under_way.popleft())
    while under_way:
        yield jax.block_until_ready(under_way.popleft())


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
    rule: Callable[..., Any],
    options: tuple[tuple[str, Any], ...],
    lie: NamedSharding | None,
    leaves: list[Leaf],
    *arguments: Any,
) -> Any:
    with lying(lie):
        return rule(leaves, *arguments, **dict(options))


def merge_leaves(
    vectors: Vectors,
    name: str,
    rule: Callable[..., tuple[Float[Array, "*shape"], dict[str, Any]]],
    *arguments: Mapping[str, Any],
    options: tuple[tuple[str, Any], ...] = (),
    report: Report | None = None,
) -> PyTree:
    """The merged task vector of a rule that acts leaf by leaf.

    Args:
      vectors: the task vectors.
      name: of the rule, for the report.
      rule: as in `over_leaves`; returns the merged leaf, float32, and numbers for the report.
      *arguments: pytrees of arrays by path.
      options: static keywords of the rule.
      report: called for each merged leaf.

    Returns:
      A task vector in the structure of the first one.
    """
    merged = {}
    for path, (leaf, measures) in over_leaves(vectors, rule, *arguments, options=options):
        merged[path] = vectors.place(path, leaf)
        tell(report, path, vectors.shape(path), name, measures)
    return vectors.tree(merged)


def wide(leaves: Sequence[Leaf]) -> list[Float[Array, "*shape"]]:
    """Each leaf in float32; call it inside `jit`.

    >>> wide([np.ones(2, np.float16)])[0].dtype.name
    'float32'
    """
    return [jnp.asarray(leaf).astype(jnp.float32) for leaf in leaves]


def weighted_sum(
    leaves: Sequence[Float[Array, "*shape"]], weights: Float[Array, "vectors ..."]
) -> Float[Array, "*shape"]:
    """``sum_i w_i tau_i`` as one elementwise loop; call it inside `jit`.

    (A product with a stacked array, summed over its first axis, becomes a matrix product that takes XLA a thousand
    times as long on CPU.)

    >>> weighted_sum([jnp.ones(2), jnp.ones(2)], jnp.array([1.0, 2.0])).tolist()
    [3.0, 3.0]
    """
    total = leaves[0] * weights[0]
    for number, leaf in enumerate(leaves[1:], start=1):
        total = total + leaf * weights[number]
    return total


def stack(leaves: Sequence[Leaf]) -> Float[Array, "vectors ..."]:
    """The leaves of all vectors in one float32 array; call it inside `jit`.

    >>> stack([jnp.ones(2, jnp.bfloat16), jnp.zeros(2)]).dtype.name
    'float32'
    """
    return jnp.stack([jnp.asarray(leaf).astype(jnp.float32) for leaf in leaves])
