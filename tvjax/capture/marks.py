"""What a variable of a jaxpr shows of a parameter, carried from equation to equation.

A mark says that a variable is an affine function of a leaf: views of it, times constants, plus constants. Several
leaves that are joined by a concatenation leave a mark each, with the block of the variable that is theirs. What a
variable loses (an exponential, a product of two parameters) is not guessed: whoever reads the mark reports it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Literal

from tvjax.capture import jaxprs
from tvjax.capture.views import Constant, View, follow_axes, shape_after, split_step, step_of, unstack_step

LARGEST_CONSTANT = 2**24  # entries that a constant of the function may have to be kept in a view


class Mark(NamedTuple):
    """What a variable shows of a leaf.

    Attributes:
      path: of the leaf.
      view: from the leaf to the variable (to its `block`), the linear part.
      axes: axes of the variable that carry the leaf's entries (others are broadcast); None where unknown.
      levels: for each scan around, outermost first, whether the leaf is scanned over.
      block: ``(axis, start, stop)`` of the variable that is this leaf's; None: all of it.
      exact: whether the variable is the view itself, with no constant added.
      stopped: whether the gradient is stopped on the way.
    """

    path: str
    view: View
    axes: tuple[int, ...] | None
    levels: tuple[bool, ...]
    block: tuple[int, int, int] | None = None
    exact: bool = True
    stopped: bool = False

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the leaf's part of a variable of this shape."""
        if self.block is None:
            return tuple(shape)
        axis, start, stop = self.block
        return tuple(stop - start if i == axis else n for i, n in enumerate(shape))


Marks = tuple[Mark, ...]


class Constants:
    """Values of the variables of a region that depend on no argument and no parameter, computed when asked for."""

    def __init__(self, region: jaxprs.Region, given: dict[Any, Callable[[], Any]]):
        self._makers = {out: eqn for eqn in region.eqns for out in eqn.outvars}
        self._values: dict[Any, Any] = dict(zip(region.variables, region.consts, strict=False))
        self._given = given

    def value(self, atom: Any) -> np.ndarray | None:
        """The value, None where it is not known while the function is traced, or too large to be kept."""
        if int(np.prod(atom.aval.shape, dtype=int)) > LARGEST_CONSTANT:
            return None
        with jax.ensure_compile_time_eval():
            found = self._value(atom)
        return None if found is None or isinstance(found, jax.core.Tracer) else np.asarray(found)

    def _value(self, atom: Any) -> Any:
        if isinstance(atom, Literal):
            return atom.val
        if atom in self._given and atom not in self._values:
            self._values[atom] = self._given[atom]()
        if atom not in self._values:
            eqn = self._makers.get(atom)
            operands = None if eqn is None else [self._value(x) for x in eqn.invars]
            if eqn is None or operands is None or any(x is None for x in operands):
                self._values[atom] = None
            else:
                self._values.update(zip(eqn.outvars, jaxprs.bind(eqn, *operands), strict=True))
        return self._values[atom]


def propagate(eqn: Any, marks_of: Callable[[Any], Marks], constants: Constants) -> dict[int, Marks] | None:
    """The marks of an equation's results, by their position; None where no rule says what becomes of its marks.

    Args:
      eqn: an equation none of whose operands is an activation (but of `optimization_barrier`).
      marks_of: the marks of an operand, () where it is none.
      constants: of the region.
    """
    name = eqn.primitive.name
    if name == "optimization_barrier":
        return {i: marks for i, atom in enumerate(eqn.invars) if (marks := marks_of(atom))}
    if name in ("concatenate", "stack"):
        return _joined(eqn, marks_of)
    marked = [i for i, atom in enumerate(eqn.invars) if marks_of(atom)]
    if len(marked) != 1:
        return None
    position = marked[0]
    marks, shape = marks_of(eqn.invars[position]), eqn.invars[position].aval.shape
    if name in ("mul", "div", "add", "sub", "add_any", "select_n"):
        return _with_constant(eqn, position, marks, constants)
    found: dict[int, Marks] = {}
    for index in range(len(eqn.outvars)):
        step = _step(eqn, index)
        if step is None or not jax.numpy.issubdtype(eqn.outvars[index].aval.dtype, jax.numpy.inexact):
            return None
        extended = tuple(extend(mark, step, shape) for mark in marks)
        if any(mark is None for mark in extended):
            return None
        stops = name == "stop_gradient"
        found[index] = tuple(mark._replace(stopped=mark.stopped or stops) for mark in extended if mark)
    return found


def _step(eqn: Any, index: int) -> View | None:
    if eqn.primitive.name == "split":
        return split_step(eqn, index)
    return unstack_step(eqn, index) if eqn.primitive.name == "unstack" else step_of(eqn)


def extend(mark: Mark, step: View, shape: Sequence[int]) -> Mark | None:
    """The mark after a view of its variable, whose shape is given; None where its block mixes with others."""
    axes = mark.axes
    if axes is not None and step and step[0][0] != "slice":  # a slice keeps the axes, cut or not
        axes = follow_axes(step, shape, axes)
    elif axes is not None and len(step) == 2:  # an element of an axis: a slice, then a reshape
        axes = follow_axes(step[1:], shape_after(step[:1], shape), axes)
    if mark.block is None or not step:
        return mark._replace(view=mark.view + step, axes=axes)
    axis, start, stop = mark.block
    if any(kind[0] not in ("transpose", "reshape", "times") for kind in step):
        return None
    moved = follow_axes(step, shape, (axis,))
    after = shape_after(step, shape)
    if moved is None or len(moved) != 1 or after[moved[0]] != shape[axis]:
        return None
    own: View = ()
    for kind in step:  # the same step on the block alone
        if kind[0] == "reshape":
            own += (("reshape", tuple(stop - start if i == moved[0] else n for i, n in enumerate(kind[1]))),)
        elif kind[0] == "times" and isinstance(kind[1], Constant):
            return None
        else:
            own += (kind,)
    if len(step) > 1 and any(kind[0] == "reshape" for kind in step):
        return None
    return mark._replace(view=mark.view + own, axes=axes, block=(moved[0], start, stop))


def _joined(eqn: Any, marks_of: Callable[[Any], Marks]) -> dict[int, Marks] | None:
    stacks = eqn.primitive.name == "stack"
    along, start = eqn.params["axis" if stacks else "dimension"], 0
    marks: Marks = ()
    for atom in eqn.invars:
        shape = atom.aval.shape
        size = 1 if stacks else shape[along]
        for mark in marks_of(atom):
            if mark.block is not None and (stacks or mark.block[0] != along):
                return None
            if stacks:
                mark = mark._replace(
                    view=(*mark.view, ("reshape", (*shape[:along], 1, *shape[along:]))),
                    axes=mark.axes and tuple(a + (a >= along) for a in mark.axes),
                )
            low, high = (0, size) if mark.block is None else mark.block[1:]
            marks += (mark._replace(block=(along, start + low, start + high)),)
        start += size
    return {0: marks}


def _with_constant(eqn: Any, position: int, marks: Marks, constants: Constants) -> dict[int, Marks] | None:
    """Marks after a sum with a constant, or a product with one whose value is known."""
    name, shape, out = eqn.primitive.name, eqn.invars[position].aval.shape, eqn.outvars[0].aval.shape
    others = [atom for i, atom in enumerate(eqn.invars) if i != position]
    exact = True
    factor: Any = 1.0
    if name in ("add", "add_any", "sub"):
        exact = False
        factor = -1.0 if name == "sub" and position == 1 else 1.0
    elif name == "select_n":
        chosen = constants.value(others[0])
        if position == 0 or len(eqn.invars) != 3 or chosen is None:
            return None
        other = constants.value(others[1])
        exact = other is not None and not np.any(other)
        factor = np.asarray(chosen == (position - 1), np.float32)
    elif name == "div" and position == 1:
        return None
    else:
        value = constants.value(others[0])
        if value is None:
            return None
        factor = np.asarray(value, np.float32)
        factor = np.divide(1, factor, out=np.zeros_like(factor), where=factor != 0) if name == "div" else factor
    if isinstance(factor, np.ndarray) and np.all(factor == factor.flat[0] if factor.size else True):
        factor = float(factor.flat[0]) if factor.size else 1.0
    step: View = ()
    if tuple(shape) != tuple(out):  # a size-one axis that the equation itself broadcasts
        step += (("broadcast", tuple(out), tuple(range(len(out) - len(shape), len(out)))),)
    if not isinstance(factor, float):
        step += (("times", Constant(np.broadcast_to(factor, out))),)
    elif factor != 1:
        step += (("times", factor),)
    extended = []
    for mark in marks:
        axes = mark.axes
        if step and step[0][0] == "broadcast":
            axes = None if axes is None else tuple(i for i in axes if shape[i] == out[i])
            mark = mark._replace(axes=axes)
        found = extend(mark, step, shape) if not step or step[0][0] != "broadcast" else _broadcasted(mark, step)
        if found is None:
            return None
        extended.append(found._replace(exact=found.exact and exact))
    return {0: tuple(extended)}


def _broadcasted(mark: Mark, step: View) -> Mark | None:
    return None if mark.block is not None else mark._replace(view=mark.view + step)


def with_axes(marks: Marks, operand: Any) -> Marks:
    """Where a view mixes axes (a tile) the operand's own entries are looked at, each copy apart."""
    every = tuple(range(operand.aval.ndim))
    return tuple(mark if mark.axes is not None else mark._replace(axes=every) for mark in marks)


def signed(mark: Mark, eqn: Any, position: int) -> Mark:
    """A mark that is subtracted."""
    subtracted = eqn.primitive.name == "sub" and position == 1
    return mark._replace(view=(*mark.view, ("times", -1.0))) if subtracted else mark


def block_slice(shape: Sequence[int], axis: int, mark: Mark) -> View:
    """The block of a mark, along an axis of a value of this shape."""
    assert mark.block is not None
    _, start, stop = mark.block
    low = tuple(start if i == axis else 0 for i in range(len(shape)))
    high = tuple(stop if i == axis else n for i, n in enumerate(shape))
    return (("slice", low, high, (1,) * len(shape)),)


def vector_view(mark: Mark, shape: Sequence[int]) -> View:
    """From an elementwise operand of this shape to the vector of the leaf's entries: one row of it."""
    assert mark.axes is not None
    own = mark.shape(shape)
    limit = tuple(n if i in mark.axes else 1 for i, n in enumerate(own))
    view: View = () if limit == own else (("slice", (0,) * len(own), limit, (1,) * len(own)),)
    size = math.prod(limit)
    return view if limit == (size,) else (*view, ("reshape", (size,)))
