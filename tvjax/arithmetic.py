"""Task arithmetic: what a fine-tuning learned, as a tree of differences that is added, negated, scaled and combined.

A *task vector* is ``tau = theta_ft - theta_0``, leaf by leaf, in float32 whatever the stored dtype (Ilharco et al.,
ICLR 2023, arXiv 2212.04089, section 2). It is an ordinary pytree. None stands at leaves that it does not cover; a task
vector of nested dicts may also lack them altogether, so that one made for a vision tower applies to the whole model,
by path. Nothing is skipped in silence: a path or a shape that the parameters do not have is an error. A leaf may be a
`tvjax.LowRank`, and stays one where a result can be.

Leaves that hold NaN give NaN, as everywhere in JAX, and no sum waits for a device to look; whatever hides or keeps them
looks: saving, merges, transports. A factor that is no JAX array is looked at here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tvjax import factors, placement, tree
from tvjax.factors import is_low_rank
from tvjax.finite import check_factor
from tvjax.on_disk import difference as difference_on_disk
from tvjax.on_disk import is_on_disk

PyTree = Any
_like_first = placement.automatic(lambda first, *_, **__: first)


@_like_first
def task_vector(pretrained: PyTree, finetuned: PyTree) -> PyTree:
    """``tau = theta_ft - theta_0``, the leaves in float32 (float64 where stored so).

    Integer and boolean leaves (position ids) are no parameters: they must be equal on both sides, and are None in tau.
    A leaf that is None on both sides stays None. That of leaves on disk (``load(name, on_disk=True)``) is taken when it
    is asked for.

    Args:
      pretrained: theta_0, any pytree of arrays or scalars.
      finetuned: theta_ft, the same paths and shapes; the stored dtypes may differ.

    Returns:
      tau, of the structure of `pretrained`.

    Raises:
      ValueError: other paths or shapes, or integer leaves that differ.

    >>> import jax.numpy as jnp
    >>> task_vector({"w": jnp.ones(2, jnp.bfloat16)}, {"w": jnp.array([1.5, 0.0])})["w"].tolist()
    [0.5, -1.0]
    """
    theta_0, theta_ft = tree.flatten(pretrained), tree.flatten(finetuned)
    mismatches = [f"{path}: only in the pretrained parameters" for path in theta_0 if path not in theta_ft]
    mismatches += [f"{path}: only in the fine-tuned parameters" for path in theta_ft if path not in theta_0]
    for path in theta_0.keys() & theta_ft.keys():
        before, after = tree.leaf_type(theta_0[path]), tree.leaf_type(theta_ft[path])
        if before.shape != after.shape:
            mismatches.append(f"{path}: pretrained {before.shape}, fine-tuned {after.shape}")
        elif _is_floating(before) != _is_floating(after):
            mismatches.append(f"{path}: pretrained {before.dtype}, fine-tuned {after.dtype}")
    if mismatches:
        raise ValueError(
            f"a task vector is the difference of two checkpoints of one model, {len(mismatches)} leaves differ:\n"
            f"{tree.list_some(sorted(mismatches))}\nselect the common leaves of both first (tvjax.tree.select)"
        )

    def difference(path: str, before: Any) -> Any:
        after = theta_ft[path]
        if _is_floating(tree.leaf_type(before)):
            if is_on_disk(before) or is_on_disk(after):
                return difference_on_disk(after, before)
            return placement.like(_difference(_array(after), _array(before)), before)
        if not np.array_equal(before, after):
            raise ValueError(
                f"the integer leaf {path} differs between the two checkpoints: it is no parameter and has no task "
                "vector; make the two sides equal, or select it away (tvjax.tree.select)"
            )
        return None

    return tree.map_with_path(difference, pretrained)


@_like_first
def apply(params: PyTree, tau: PyTree, scale: float | jax.Array = 1.0) -> PyTree:
    """``theta = theta_0 + scale * tau``, matched by path, in the stored dtype of `params`.

    The sum is taken in float32 and rounded once. Jittable, and differentiable in `params`, `tau` and `scale`; under
    `jax.vmap` over a vector of scales it gives all edits at once.

    Args:
      params: theta_0, any pytree.
      tau: a task vector; it may cover a subtree only (None elsewhere, or no such paths).
      scale: a scalar.

    Returns:
      theta, of the structure of `params`; leaves that tau does not cover are passed through as they are.

    Raises:
      ValueError: tau has paths that `params` lack, other shapes, or covers an integer leaf; or the scale is no scalar,
        or a number that is not finite.

    >>> import jax.numpy as jnp
    >>> params = {"vision": {"w": jnp.ones(2)}, "text": {"w": jnp.ones(1)}}
    >>> edited = apply(params, {"vision": {"w": jnp.array([2.0, 4.0])}}, 0.5)
    >>> edited["vision"]["w"].tolist(), edited["text"]["w"].tolist()
    ([2.0, 3.0], [1.0])
    """
    if tree.leaf_type(scale).shape != ():
        raise ValueError(
            f"the scale must be a scalar, found shape {tree.leaf_type(scale).shape}: "
            "for one coefficient per leaf scale the task vector (tvjax.scale), for several edits use jax.vmap"
        )
    check_factor(scale, "the scale")
    changes = tree.flatten(tau)
    theta = tree.flatten(params)
    mismatches = []
    for whole in (params, tau):
        tree.check_whole(whole)
    for path, change in changes.items():
        if path not in theta:
            mismatches.append(f"{path}: not in the parameters")
            continue
        leaf = tree.leaf_type(theta[path])
        if leaf.shape != np.shape(change):
            mismatches.append(f"{path}: parameters {leaf.shape}, task vector {np.shape(change)}")
        elif not _is_floating(leaf):
            mismatches.append(f"{path}: the parameters hold {leaf.dtype}, which takes no change")
    if mismatches:
        raise ValueError(
            f"the task vector does not fit the parameters at {len(mismatches)} of {len(changes)} leaves:\n"
            f"{tree.list_some(mismatches)}\nof another model? transport it first (tvjax.fit), or select the leaves "
            "that fit (tvjax.tree.select); for a subtree wrap it: {'vision': tau}"
        )

    def edit(path: str, leaf: Any) -> Any:
        if path not in changes:
            return leaf
        edited = _edited(_array(leaf), _array(changes[path]), scale, tree.leaf_type(leaf).dtype)
        return placement.like(edited, leaf)

    return tree.map_with_path(edit, params)


@_like_first
def add(*taus: PyTree) -> PyTree:
    """``sum_i tau_i``: one edit that holds several tasks. A leaf that some of them do not cover is the sum of the rest.

    Args:
      *taus: task vectors of one structure, one at least.

    Returns:
      A task vector of that structure.

    Raises:
      ValueError: no task vector, or structures or shapes that differ.

    >>> import jax.numpy as jnp
    >>> add({"a": jnp.array([1.0]), "b": None}, {"a": jnp.array([2.0]), "b": jnp.array([3.0])})
    {'a': Array([3.], dtype=float32), 'b': Array([3.], dtype=float32)}
    """
    if not taus:
        raise ValueError("add needs at least one task vector")

    def total(*leaves: Any) -> Any:
        covered = [leaf for leaf in leaves if leaf is not None]
        if not covered:
            return None
        if all(map(is_low_rank, covered)) and (joined := factors.total(covered)) is not None:
            return joined
        return _total([_array(leaf) for leaf in covered])

    return _map(total, *taus)


@_like_first
def negate(tau: PyTree) -> PyTree:
    """``-tau``: forgets the task.

    >>> import jax.numpy as jnp
    >>> negate({"a": jnp.array([1.0, -2.0])})["a"].tolist()
    [-1.0, 2.0]
    """
    return tree.map_with_path(lambda path, leaf: factors.scaled(leaf, -1), tau)


@_like_first
def scale(tau: PyTree, factor: float | jax.Array | Mapping[str, Any]) -> PyTree:
    """``factor * tau``, with one factor for all leaves or one by path pattern.

    Args:
      tau: a task vector.
      factor: a scalar; or a mapping from path patterns (those of `tvjax.tree.select`) to scalars, a later pattern
        winning over an earlier one and leaves that none matches keeping their size. A nested mapping, such as a tree of
        coefficients, is one of patterns too: its keys are joined by ``/``.

    Returns:
      A task vector of the same structure.

    Raises:
      ValueError: a factor that is no scalar or not finite, or a pattern that matches no leaf.

    >>> import jax.numpy as jnp
    >>> scaled = scale({"up": {"kernel": jnp.ones(1), "bias": jnp.ones(1)}}, {"**": 2.0, "**/bias": 0.0})
    >>> scaled["up"]["kernel"].tolist(), scaled["up"]["bias"].tolist()
    ([2.0], [0.0])
    """
    numbers = _factors(factor if isinstance(factor, Mapping) else {"**": factor})
    for pattern, value in numbers.items():
        if tree.leaf_type(value).shape != ():
            raise ValueError(f"the factor of {pattern!r} must be a scalar, found shape {jnp.shape(value)}")
        check_factor(value, f"the factor of {pattern!r}")
    paths = list(tree.flatten(tau))
    chosen: dict[str, Any] = {}
    if paths:
        chosen = {path: value for pattern, value in numbers.items() for path in tree.match(paths, pattern)}

    return tree.map_with_path(lambda path, leaf: factors.scaled(leaf, chosen.get(path, 1)), tau)


def analogy(a: PyTree, b: PyTree, c: PyTree) -> PyTree:
    """``tau_C + (tau_B - tau_A)``, the task vector of D where "A is to B as C is to D".

    Args:
      a: tau_A.
      b: tau_B.
      c: tau_C, all three of one structure.

    Returns:
      The task vector of D.

    Raises:
      ValueError: structures or shapes that differ.

    >>> import jax.numpy as jnp
    >>> a, b, c = ({"w": jnp.array(x)} for x in (1.0, 3.0, 10.0))
    >>> float(analogy(a, b, c)["w"])
    12.0
    """
    return add(c, b, negate(a))


@_like_first
def interpolate(a: PyTree, b: PyTree, t: float | jax.Array) -> PyTree:
    """``(1 - t) a + t b``, for parameters or task vectors: leaf by leaf, in the stored dtype of `a`.

    Integer leaves must be equal and are passed through.

    Args:
      a: any pytree, what t = 0 gives.
      b: the same paths and shapes, what t = 1 gives.
      t: a scalar.

    Returns:
      A tree of the structure of `a`.

    Raises:
      ValueError: other paths or shapes, integer leaves that differ, or a number t that is not finite.

    >>> import jax.numpy as jnp
    >>> interpolate({"w": jnp.array([0.0, 2.0])}, {"w": jnp.array([4.0, 2.0])}, 0.25)["w"].tolist()
    [1.0, 2.0]
    """
    return apply(a, task_vector(a, b), t)


def _map(function: Callable[..., Any], *trees: PyTree) -> PyTree:
    """``function(leaf, ...)`` over trees whose leaves, None included, have the same paths; shapes checked first."""
    flat = [_shapes(item) for item in trees]
    mismatches = []
    for path in {path: None for shapes in flat for path in shapes}:
        found = [shapes.get(path, "missing") for shapes in flat]
        if len({shape for shape in found if shape is not None}) > 1:
            mismatches.append(f"{path}: {' and '.join(map(str, found))}")
    if mismatches:
        raise ValueError(
            f"task vectors that are combined must have the same paths and shapes, {len(mismatches)} leaves differ:\n"
            f"{tree.list_some(mismatches)}\nwere they made for one model? Leaves that one does not cover are None"
        )
    return jax.tree.map(function, *trees, is_leaf=_is_leaf)


def _shapes(item: PyTree) -> dict[str, tuple[int, ...] | None]:
    """The shapes by path, None at leaves that are not covered."""
    leaves = jax.tree_util.tree_flatten_with_path(item, is_leaf=_is_leaf)[0]
    return {tree.path_string(key_path): None if leaf is None else np.shape(leaf) for key_path, leaf in leaves}


def _factors(factor: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The factors by pattern, in the order given, the keys of nested mappings joined."""
    flat: dict[str, Any] = {}
    for key, value in factor.items():
        flat |= _factors(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _is_leaf(leaf: Any) -> bool:
    return leaf is None or is_low_rank(leaf)


# --- Leaf by leaf, each in one program: no wide copy of a leaf lies in memory between two operations ---


@partial(jax.jit, inline=True)
def _difference(after: Any, before: Any) -> jax.Array:
    after, before = _align(_wide(after), _wide(before))
    return after - before


@partial(jax.jit, inline=True, static_argnames="dtype")
def _edited(leaf: Any, change: Any, scale: Any, dtype: Any) -> jax.Array:
    base, change = _align(_wide(leaf), _wide(change))
    return (base + jnp.asarray(scale, base.dtype) * change).astype(dtype)


@partial(jax.jit, inline=True)
def _total(leaves: list[Any]) -> jax.Array:
    result = _wide(leaves[0])
    for leaf in leaves[1:]:
        result = jnp.add(*_align(result, _wide(leaf)))
    return result


def _array(leaf: Any) -> Any:
    """A leaf as a program takes it; one that lies on disk or in factors is made an array."""
    return leaf if isinstance(leaf, jax.Array) or type(leaf) is np.ndarray else _wide(leaf)


def _wide(leaf: Any) -> jax.Array:
    return jnp.asarray(leaf, tree.wide_dtype(tree.leaf_type(leaf).dtype))


def _align(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two wide arrays in the wider dtype of the two."""
    dtype = x.dtype if x.dtype == jnp.float64 else y.dtype
    return x.astype(dtype), y.astype(dtype)


def _is_floating(leaf: jax.ShapeDtypeStruct) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)
