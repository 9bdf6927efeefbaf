"""View operations: how a parameter is seen by the operation that reads it.

A `View` is a tuple of steps, hashable, that leads from a leaf to the array that an equation takes: transpositions,
reshapes, slices, broadcasts. Casts and sharding constraints are left out: they move no entry. Step ``("each",)`` says
that what follows happens to each element of the first axis (a scan over stacked layers).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Step = tuple[Any, ...]
View = tuple[Step, ...]

TRANSPARENT = ("convert_element_type", "copy", "copy_p", "sharding_constraint", "reduce_precision", "pvary")


def step_of(eqn: Any) -> View | None:
    """The step that a view equation makes of its first operand, () where entries stay; None if it is no view."""
    name, params = eqn.primitive.name, eqn.params
    shape_in = eqn.invars[0].aval.shape if eqn.invars else ()
    if name in TRANSPARENT:
        return ()
    if len(eqn.invars) != 1 or len(eqn.outvars) != 1:
        return None
    shape_out = tuple(eqn.outvars[0].aval.shape)
    if name == "transpose":
        return (("transpose", tuple(int(i) for i in params["permutation"])),)
    if name == "squeeze" or (name == "reshape" and params["dimensions"] is None):
        return () if shape_in == shape_out else (("reshape", shape_out),)
    if name == "broadcast_in_dim":
        dimensions = tuple(int(i) for i in params["broadcast_dimensions"])
        if np.prod(shape_in, dtype=int) == np.prod(shape_out, dtype=int):
            return () if shape_in == shape_out else (("reshape", shape_out),)
        return (("broadcast", shape_out, dimensions),)
    if name == "slice":
        strides = params["strides"] or (1,) * len(shape_out)
        return (("slice", tuple(params["start_indices"]), tuple(params["limit_indices"]), tuple(strides)),)
    if name == "rev":
        return (("rev", tuple(params["dimensions"])),)
    return None


def split_step(eqn: Any, index: int) -> View:
    """The slice that output `index` of a `split` equation is."""
    sizes, axis = eqn.params["sizes"], eqn.params["axis"]
    start = [0] * len(eqn.invars[0].aval.shape)
    limit = list(eqn.invars[0].aval.shape)
    start[axis], limit[axis] = sum(sizes[:index]), sum(sizes[: index + 1])
    return (("slice", tuple(start), tuple(limit), (1,) * len(start)),)


def apply_view(view: View, array: jax.Array) -> jax.Array:
    """The array that a view makes of a leaf; the dtype stays the leaf's own.

    >>> apply_view((("transpose", (1, 0)), ("reshape", (6,))), jnp.arange(6).reshape(2, 3))
    Array([0, 3, 1, 4, 2, 5], dtype=int32)
    """
    for number, step in enumerate(view):
        kind = step[0]
        if kind == "each":
            return jax.vmap(lambda element, rest=view[number + 1 :]: apply_view(rest, element))(array)
        if kind == "transpose":
            array = jnp.transpose(array, step[1])
        elif kind == "reshape":
            array = jnp.reshape(array, step[1])
        elif kind == "broadcast":
            array = lax.broadcast_in_dim(array, step[1], step[2])
        elif kind == "slice":
            array = lax.slice(array, *step[1:])
        elif kind == "rev":
            array = lax.rev(array, step[1])
        else:
            raise AssertionError(f"unknown view step {kind!r}")
    return array


def transpose_view(view: View, array: jax.Array, shape: Sequence[int]) -> jax.Array:
    """The transpose of a view, as a linear map: from what the equation took back to a leaf of this shape.

    For a view that moves entries it is the inverse; entries that a slice left out are zero; broadcasts are summed.

    >>> transpose_view((("slice", (1,), (3,), (1,)),), jnp.ones(2), (4,))
    Array([0., 1., 1., 0.], dtype=float32)
    """
    leaf = jax.ShapeDtypeStruct(tuple(shape), array.dtype)
    return jax.linear_transpose(lambda x: apply_view(view, x), leaf)(array)[0]


def is_slice(view: View) -> bool:
    """Whether a view leaves out entries of its leaf."""
    return any(step[0] == "slice" for step in view)


def follow_axes(view: View, shape: Sequence[int], axes: Sequence[int]) -> tuple[int, ...] | None:
    """Where some axes of an array are after a view, in order; None where they are mixed with others or cut.

    >>> follow_axes((("reshape", (2, 3, 4)),), (6, 4), (1,))
    (2,)
    >>> follow_axes((("reshape", (24,)),), (6, 4), (1,)) is None
    True
    """
    shape, kept = tuple(shape), tuple(axes)
    for step in view:
        if step[0] == "transpose":
            kept = tuple(step[1].index(axis) for axis in kept)
            shape = tuple(shape[i] for i in step[1])
        elif step[0] == "reshape":
            moved = _axes_after_reshape(shape, step[1], kept)
            if moved is None:
                return None
            kept, shape = moved, step[1]
        elif step[0] == "broadcast":
            if any(shape[axis] != step[1][step[2][axis]] for axis in kept):
                return None
            kept, shape = tuple(step[2][axis] for axis in kept), step[1]
        elif step[0] == "slice":
            after = tuple(-(-(b - a) // s) for a, b, s in zip(*step[1:], strict=True))
            if any(shape[axis] != after[axis] for axis in kept):
                return None
            shape = after
        else:
            return None
    return kept


def _axes_after_reshape(before: Sequence[int], after: Sequence[int], axes: Sequence[int]) -> tuple[int, ...] | None:
    # Cut both shapes into the finest groups of axes with equal products; axes survive as whole groups.
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left: list[int] = []
        right: list[int] = []
        size_left = size_right = 1
        while True:
            if size_left <= size_right and i < len(before) and (not left or size_left != size_right):
                left.append(i)
                size_left *= before[i]
                i += 1
            elif j < len(after) and (not right or size_left != size_right):
                right.append(j)
                size_right *= after[j]
                j += 1
            else:
                break
            if size_left == size_right and left and right:
                break
        groups.append((left, right))
    result: list[int] = []
    wanted = {axis for axis in axes if before[axis] != 1}
    for left, right in groups:
        members = {axis for axis in left if before[axis] != 1}
        if members & wanted:
            if not members <= wanted:
                return None
            result.extend(axis for axis in right if after[axis] != 1)
    order = [axis for axis in axes if before[axis] != 1]
    return tuple(result) if order == sorted(order) else None
