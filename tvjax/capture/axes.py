"""Where the axes of an activation come from: the example axis, a token axis of which argument, features, or none.

Two models can only be compared row by row, so it must be known what a row is. A function's arguments begin with the
example axis; the last axis of a floating one holds features, what lies between holds tokens of that argument's
*stream*. From there the axes are followed equation by equation: an axis is a tuple of factors (a merged axis keeps the
factors that it was merged from), each with its size and one of these labels:

=============  ========================================================================================
label          the axis
=============  ========================================================================================
`EXAMPLE`      the examples
``"hidden"``   tokens of the argument at this path (the stream)
`FEATURE`      features: a model's own coordinates
`PART`         a part of a feature axis that was split, such as heads
`ROUTED`       an order that the data decide: sorted, selected, gathered
`NEW`          an axis that no argument has
=============  ========================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import Literal

from tvjax.capture import jaxprs

EXAMPLE, FEATURE, PART, ROUTED, NEW = "<example>", "<feature>", "<part of the features>", "<routed>", "<new>"


class Factor(NamedTuple):
    """One of the axes that an axis was merged from; `label` says where it comes from."""

    size: int
    label: str


Axis = tuple[Factor, ...]
Axes = tuple[Axis, ...]


def is_stream(label: str) -> bool:
    """Whether a label is the path of an argument that tokens come from.

    >>> is_stream("hidden"), is_stream(FEATURE)
    (True, False)
    """
    return not label.startswith("<")


def of_argument(path: str, aval: Any) -> Axes:
    """The axes of an argument of a function.

    >>> import jax
    >>> [axis[0].label for axis in of_argument("hidden", jax.ShapeDtypeStruct((2, 5, 8), jnp.float32))]
    ['<example>', 'hidden', '<feature>']
    """
    shape = aval.shape
    has_features = jnp.issubdtype(aval.dtype, jnp.floating) and len(shape) > 1
    labels = [EXAMPLE, *[path] * (len(shape) - 1)]
    if has_features:
        labels[-1] = FEATURE
    return tuple((Factor(n, label),) for n, label in zip(shape, labels, strict=False))


def unknown(shape: Sequence[int], label: str = NEW) -> Axes:
    """Axes of this shape that come from no argument."""
    return tuple((Factor(n, label),) for n in shape)


def follow(
    eqn: Any, axes_of: Callable[[Any], Axes | None], is_parameter: Callable[[Any], bool] = lambda atom: False
) -> list[Axes]:
    """The axes of an equation's results.

    Args:
      eqn: an equation with at least one activation.
      axes_of: the axes of an operand, None for what depends on no argument.
      is_parameter: whether such an operand is made of parameters: what it brings along are features.
    """
    operands = [axes_of(atom) for atom in eqn.invars]
    if eqn.primitive.name == "dot_general":
        operands = [
            unknown(atom.aval.shape) if axes is None and not is_parameter(atom) else axes
            for axes, atom in zip(operands, eqn.invars, strict=True)
        ]
    rule = _RULES.get(eqn.primitive.name)
    found: Any = None
    if rule is not None:
        found = rule(eqn, operands)
    elif (region := jaxprs.called(eqn)) is not None:
        found = _through(region, operands)
    shapes = [tuple(out.aval.shape) for out in eqn.outvars]
    if found is None:
        return [_elementwise(shape, operands) for shape in shapes]
    results = list(found) if isinstance(found, list) else [found] * len(shapes)
    return [_checked(axes, shape) for axes, shape in zip(results, shapes, strict=True)]


def _checked(axes: Axes, shape: Sequence[int]) -> Axes:
    """The axes, those of another size (cut, padded, joined) with their new size; the label stays."""
    return tuple(
        axis if math.prod(f.size for f in axis) == n else (Factor(n, _label(axis)),)
        for axis, n in zip(axes, shape, strict=True)
    )


def _label(axis: Axis) -> str:
    """The one label of an axis, `NEW` of several."""
    labels = {factor.label for factor in axis}
    return labels.pop() if len(labels) == 1 else NEW


def _elementwise(shape: Sequence[int], operands: Sequence[Axes | None]) -> Axes:
    """For each axis the best known among the operands of this rank."""
    alike = [axes for axes in operands if axes is not None and len(axes) == len(shape)]
    result = []
    for i, n in enumerate(shape):
        candidates = [axes[i] for axes in alike if math.prod(f.size for f in axes[i]) == n]
        known = [axis for axis in candidates if any(f.label != NEW for f in axis)]
        result.append((known or candidates or [(Factor(n, NEW),)])[0])
    return tuple(result)


def _broadcast(eqn: Any, operands: list[Any]) -> Axes:
    shape, places = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    given = operands[0] or unknown(eqn.invars[0].aval.shape)
    before = eqn.invars[0].aval.shape
    found = {place: axis for place, axis, n in zip(places, given, before, strict=True) if n == shape[place]}
    return tuple(found.get(i, (Factor(n, NEW),)) for i, n in enumerate(shape))


def _reshape(eqn: Any, operands: list[Any]) -> Axes | None:
    if operands[0] is None or eqn.params.get("dimensions") is not None:
        return None
    rest = [factor for axis in operands[0] for factor in axis]
    result = []
    for n in eqn.outvars[0].aval.shape:
        axis: list[Factor] = []
        size = 1
        while rest and (size < n or (rest[0].size == 1 and size == n and not axis)):
            factor = rest.pop(0)
            if n % (size * factor.size) == 0:
                axis.append(factor)
                size *= factor.size
                continue
            left = n // size
            if n % size or factor.size % left:  # the factors do not nest: what is left of them is unknown
                axis, size, rest = [], n, [Factor(math.prod(f.size for f in (factor, *rest)), NEW)]
                break
            label = PART if factor.label in (FEATURE, PART) else NEW
            axis.append(Factor(left, label))
            rest.insert(0, Factor(factor.size // left, label))
            size = n
        result.append(tuple(axis) or (Factor(n, NEW),))
    return tuple(result)


def _squeeze(eqn: Any, operands: list[Any]) -> Axes | None:
    dropped = eqn.params["dimensions"]
    return None if operands[0] is None else tuple(a for i, a in enumerate(operands[0]) if i not in dropped)


def _transpose(eqn: Any, operands: list[Any]) -> Axes | None:
    return None if operands[0] is None else tuple(operands[0][i] for i in eqn.params["permutation"])


def _reduce(eqn: Any, operands: list[Any]) -> Axes | None:
    dropped = eqn.params["axes"]
    return None if operands[0] is None else tuple(a for i, a in enumerate(operands[0]) if i not in dropped)


def _same(eqn: Any, operands: list[Any]) -> Axes | None:
    """The axes of the first operand, cut or padded."""
    return operands[0]


def _split(eqn: Any, operands: list[Any]) -> list[Axes] | None:
    return None if operands[0] is None else [operands[0]] * len(eqn.outvars)


def _unstack(eqn: Any, operands: list[Any]) -> list[Axes] | None:
    if operands[0] is None:
        return None
    rest = tuple(axis for i, axis in enumerate(operands[0]) if i != eqn.params["axis"])
    return [rest] * len(eqn.outvars)


def _stack(eqn: Any, operands: list[Any]) -> Axes:
    along, shape = eqn.params["axis"], tuple(eqn.outvars[0].aval.shape)
    rest = _elementwise(tuple(n for i, n in enumerate(shape) if i != along), operands)
    return (*rest[:along], (Factor(shape[along], NEW),), *rest[along:])


def _concatenate(eqn: Any, operands: list[Any]) -> Axes:
    shape = tuple(eqn.outvars[0].aval.shape)
    along = eqn.params["dimension"]
    axes = list(_elementwise(shape, [axes and _checked(axes, shape) for axes in operands]))
    labels = [_label(axes[along]) for axes in operands if axes is not None]
    known = [label for label in labels if label != NEW]  # a class token joins the tokens of the patches
    axes[along] = (Factor(shape[along], known[0] if known else NEW),)
    return tuple(axes)


def _dot_general(eqn: Any, operands: list[Any]) -> Axes:
    contracts, batches = eqn.params["dimension_numbers"]
    given = [
        axes if axes is not None else unknown(atom.aval.shape, FEATURE)
        for axes, atom in zip(operands, eqn.invars, strict=True)
    ]
    sides = [
        [given[side][i] for i in range(len(given[side])) if i not in (*contracts[side], *batches[side])]
        for side in (0, 1)
    ]
    data = [side for side in (0, 1) if operands[side] is not None]
    shared = []
    for pair in zip(*batches, strict=True):  # a parameter's batch axes are the activation's
        candidates = [given[side][pair[side]] for side in data]
        shared.append(next((axis for axis in candidates if _label(axis) != NEW), candidates[0]))
    return (*shared, *sides[0], *sides[1])


def _convolution(eqn: Any, operands: list[Any]) -> Axes:
    numbers, shape = eqn.params["dimension_numbers"], eqn.outvars[0].aval.shape
    image = operands[0] if operands[0] is not None else unknown(eqn.invars[0].aval.shape)
    places = dict(zip(numbers.out_spec, numbers.lhs_spec, strict=True))
    axes = [image[places[i]] for i in range(len(shape))]
    axes[numbers.out_spec[1]] = (Factor(shape[numbers.out_spec[1]], FEATURE),)
    return tuple(axes)


def _sort(eqn: Any, operands: list[Any]) -> list[Axes]:
    along = eqn.params.get("dimension", eqn.params.get("axis", -1))
    results = []
    for out in eqn.outvars:
        shape = tuple(out.aval.shape)
        axes = list(_elementwise(shape, [a and _checked(a, shape) for a in operands if a and len(a) == len(shape)]))
        axes[along] = (Factor(shape[along], ROUTED),)
        results.append(tuple(axes))
    return results


def _gather(eqn: Any, operands: list[Any]) -> Axes:
    numbers, shape = eqn.params["dimension_numbers"], eqn.outvars[0].aval.shape
    table, indices = operands[0], operands[1]
    from_indices = list(indices[:-1]) if indices is not None else list(unknown(eqn.invars[1].aval.shape[:-1]))
    if table is None:  # a look-up in a parameter: what it holds are features
        entries = [(Factor(shape[i], FEATURE),) for i in numbers.offset_dims]
    else:
        left_out = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
        entries = [axis for i, axis in enumerate(table) if i not in left_out]
        if indices is not None:  # which rows are taken the data decide
            from_indices = [
                axis if all(f.label == EXAMPLE for f in axis) else tuple(Factor(f.size, ROUTED) for f in axis)
                for axis in from_indices
            ]
    rest = iter(from_indices)
    taken = iter(entries)
    return tuple(next(taken) if i in numbers.offset_dims else next(rest) for i in range(len(shape)))


def _through(region: jaxprs.Region, operands: list[Any]) -> list[Axes]:
    """The axes of the results of an inner function."""
    inner: dict[Any, Axes] = {
        variable: axes
        for variable, axes in zip(region.variables[len(region.consts) :], operands, strict=True)
        if axes is not None
    }

    def axes_of(atom: Any) -> Axes | None:
        return None if isinstance(atom, Literal) else inner.get(atom)

    for eqn in region.eqns:
        if any(axes_of(atom) is not None for atom in eqn.invars):
            inner.update(zip(eqn.outvars, follow(eqn, axes_of), strict=True))
    return [axes_of(atom) or unknown(atom.aval.shape) for atom in region.results]


_RULES: dict[str, Callable[[Any, list[Any]], Any]] = {
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "transpose": _transpose,
    **dict.fromkeys(("slice", "dynamic_slice", "dynamic_update_slice", "pad", "reduce_window_sum"), _same),
    **dict.fromkeys(("reduce_window_max", "reduce_window", "reduce_window_min"), _same),
    **dict.fromkeys(
        (*("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"), "argmax", "argmin"),
        _reduce,
    ),
    "split": _split,
    "unstack": _unstack,
    "stack": _stack,
    "concatenate": _concatenate,
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "sort": _sort,
    "top_k": _sort,
    "gather": _gather,
}
