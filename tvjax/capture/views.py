"""View operations: how a parameter is seen by the operation that reads it.

A `View` is a tuple of steps, hashable, that leads from a leaf to the array that an equation takes: transpositions,
reshapes, slices, broadcasts, products with constants. Casts and sharding constraints are left out: they move no entry.
Step ``("each",)`` says that what follows happens to each element of the first axis (a scan over stacked layers).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Step = tuple[Any, ...]
View = tuple[Step, ...]

# Entries stay as they are and where they are.
TRANSPARENT = (
    *("convert_element_type", "copy", "copy_p", "sharding_constraint", "reshard", "reduce_precision", "pvary", "name"),
    *("optimization_barrier", "stop_gradient"),
)


class Constant:
    """An array in a view: compared and hashed by its entries.

    >>> Constant(np.ones(2)) == Constant(np.ones(2)), Constant(np.ones(2)) == Constant(np.zeros(2))
    (True, False)
    """

    def __init__(self, array: Any):
        self.array = np.asarray(array)
        self._key = self.array.shape, self.array.dtype.name, self.array.tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"Constant({self.array.dtype.name}{list(self.array.shape)})"


def step_of(eqn: Any) -> View | None:
    """The step that a view equation makes of its first operand, () where entries stay; None if it is no view."""
    name, params = eqn.primitive.name, eqn.params
    shape_in = eqn.invars[0].aval.shape if eqn.invars else ()
    if name in TRANSPARENT and len(eqn.invars) == 1:
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
    if name == "neg":
        return (("times", -1.0),)
    if name == "tile":
        reps = tuple(params["reps"])
        spread = tuple(n for pair in zip(reps, shape_in, strict=True) for n in pair)
        return (("broadcast", spread, tuple(range(1, len(spread), 2))), ("reshape", shape_out))
    return None


def unstack_step(eqn: Any, index: int) -> View:
    """The element of an axis that output `index` of an `unstack` equation is."""
    return index_step(eqn.invars[0].aval.shape, eqn.params["axis"], index)


def index_step(shape: Sequence[int], axis: int, index: int) -> View:
    """Element `index` of an axis, which is left out of the result.

    >>> index_step((2, 3), 0, 1)
    (('slice', (1, 0), (2, 3), (1, 1)), ('reshape', (3,)))
    """
    start = tuple(index if i == axis else 0 for i in range(len(shape)))
    limit = tuple(index + 1 if i == axis else n for i, n in enumerate(shape))
    return (("slice", start, limit, (1,) * len(shape)), ("reshape", tuple(n for i, n in enumerate(shape) if i != axis)))


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
    return _applied(view, array) if view else array


def transpose_view(view: View, array: jax.Array, shape: Sequence[int]) -> jax.Array:
    """The transpose of a view, as a linear map: from what the equation took back to a leaf of this shape.

    For a view that moves entries it is the inverse; entries that a slice left out are zero; broadcasts are summed.

    >>> transpose_view((("slice", (1,), (3,), (1,)),), jnp.ones(2), (4,))
    Array([0., 1., 1., 0.], dtype=float32)
    """
    return _transposed(view, tuple(shape), array) if view else array


def restore_view(view: View, array: jax.Array, shape: Sequence[int]) -> jax.Array:
    """What a leaf of this shape must hold for its view to be `array`, in the entries that the view reaches.

    The pseudo-inverse of the view V as a linear map, ``V^T y / V^T V 1``: each row of V has one entry. An entry of the
    leaf that the view repeats is the mean of its copies, one that meets a zero stays zero.

    >>> restore_view((("times", 0.5),), jnp.ones(2), (2,))
    Array([2., 2.], dtype=float32)
    """
    return _restored(view, tuple(shape), array) if view else array


# --- A view in one program, whatever the number of its steps ---


@partial(jax.jit, static_argnums=0, inline=True)
def _applied(view: View, array: jax.Array) -> jax.Array:
    for number, step in enumerate(view):
        kind = step[0]
        if kind == "each":
            return jax.vmap(lambda element, rest=view[number + 1 :]: _applied(rest, element))(array)
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
        elif kind == "times":
            factor = step[1].array if isinstance(step[1], Constant) else step[1]
            array = array * jnp.asarray(factor, array.dtype)
        elif kind == "take":
            array = array[np.array(step[1])]
        else:
            raise AssertionError(f"unknown view step {kind!r}")
    return array


@partial(jax.jit, static_argnums=(0, 1), inline=True)
def _transposed(view: View, shape: tuple[int, ...], array: jax.Array) -> jax.Array:
    leaf = jax.ShapeDtypeStruct(shape, array.dtype)
    return jax.linear_transpose(lambda x: _applied(view, x), leaf)(array)[0]


@partial(jax.jit, static_argnums=(0, 1), inline=True)
def _restored(view: View, shape: tuple[int, ...], array: jax.Array) -> jax.Array:
    moved = _transposed(view, shape, array)
    if not any(step[0] in ("times", "broadcast", "take") for step in view):
        return moved
    weight = _transposed(view, shape, _applied(view, jnp.ones(shape, array.dtype)))
    return jnp.where(weight != 0, moved / jnp.where(weight != 0, weight, 1), 0)


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
        elif step[0] == "times":
            continue
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


def shape_after(view: View, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of what a view makes of an array of this shape.

    >>> shape_after((("slice", (0, 0), (2, 3), (1, 1)), ("reshape", (6,))), (4, 3))
    (6,)
    """
    return jax.eval_shape(lambda x: apply_view(view, x), jax.ShapeDtypeStruct(tuple(shape), jnp.float32)).shape


def restrict(view: View, shape: Sequence[int], axes: Sequence[int]) -> View | None:
    """What a view of an array does to some of its axes, as a view of the vector of their entries.

    Args:
      view: transpositions, reshapes and slices.
      shape: of the array.
      axes: ascending; the others must stay as they are.

    Returns:
      From ``[prod(shape[axes])]`` to the vector of what is left of these axes; None where they mix with others.

    >>> restrict((("reshape", (5, 3, 2)), ("slice", (0, 1, 0), (5, 2, 2), (1, 1, 1))), (5, 6), (1,))
    (('reshape', (3, 2)), ('slice', (1, 0), (2, 2), (1, 1)), ('reshape', (2,)))
    """
    shape = tuple(shape)
    kept = tuple(i for i in axes if shape[i] != 1)
    inner: View = ()
    if len(kept) != 1:
        inner += (("reshape", tuple(shape[i] for i in kept)),)
    for step in view:
        if step[0] == "transpose":
            order = [kept.index(i) for i in step[1] if i in kept]
            inner += (("transpose", tuple(order)),) if order != sorted(order) else ()
            kept = tuple(position for position, i in enumerate(step[1]) if i in kept)
            shape = tuple(shape[i] for i in step[1])
        elif step[0] == "reshape":
            moved = _axes_after_reshape(shape, step[1], kept)
            if moved is None:
                return None
            before, after = tuple(shape[i] for i in kept), tuple(step[1][i] for i in moved)
            inner += (("reshape", after),) if before != after else ()
            kept, shape = moved, step[1]
        elif step[0] == "slice":
            start, limit, strides = step[1:]
            after = tuple(-(-(b - a) // s) for a, b, s in zip(start, limit, strides, strict=True))
            if any(n != m for i, (n, m) in enumerate(zip(shape, after, strict=True)) if i not in kept):
                return None
            inner += (("slice", *(tuple(x[i] for i in kept) for x in (start, limit, strides))),)
            shape = after
        else:
            return None
    size = int(np.prod([shape[i] for i in kept], dtype=int))
    return inner if len(kept) == 1 else (*inner, ("reshape", (size,)))


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
