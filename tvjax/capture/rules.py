"""The rules: what an equation that reads a parameter makes of it.

A rule adds sites and returns None, or returns why it cannot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tvjax.capture.layout import Layout, elementwise_layout, grouped, others
from tvjax.capture.marks import Mark, block_slice, signed, vector_view, with_axes
from tvjax.capture.recorder import Output, Read, Recorder, other_operand
from tvjax.capture.region import Var
from tvjax.capture.views import TRANSPARENT, View, follow_axes


def contraction(region: Recorder, eqn: Any, position: int) -> str | None:
    """A dense site; batch axes that the activation owns make its kernel block-diagonal."""
    contracts, batches = eqn.params["dimension_numbers"]
    parameter, activation, out = eqn.invars[position], eqn.invars[1 - position], eqn.outvars[0]
    inner, shared = tuple(contracts[position]), tuple(batches[position])
    free = others(parameter.aval.ndim, (*inner, *shared))
    n_batch = len(shared)
    if not inner and not free:
        return _scale_by_contraction(region, eqn, position)
    rows = others(activation.aval.ndim, (*contracts[1 - position], *batches[1 - position]))
    first, second = (rows, free) if position == 1 else (free, rows)
    places = tuple(range(n_batch)), *_consecutive(n_batch, first, second)
    out_rows, out_free = (places[1], places[2]) if position == 1 else (places[2], places[1])
    x_axes: tuple[tuple[int, ...], ...] = (tuple(batches[1 - position]), rows, tuple(contracts[1 - position]))
    source = activation
    if n_batch and (before := _before_broadcast(region, activation, x_axes[0])) is not None:
        # The activation is the same for every block: one matrix whose outputs are those of all blocks.
        source, kept = before
        x_axes = (), *(tuple(kept.index(i) for i in axes) for axes in x_axes[1:])
        free, shared, out_free = (*shared, *free), (), (*places[0], *out_free)
        n_batch = 0
    layout = Layout(places[0][:n_batch], out_rows, out_free)
    marks = region.marks_of(parameter)
    cuts = [_cuts(mark, (shared, inner, free), (source, x_axes), (out, layout)) for mark in marks]
    for mark, (x_cut, y_cut) in zip(marks, cuts, strict=True):
        shape = mark.shape(parameter.aval.shape)
        matrix = tuple(math.prod(shape[i] for i in axes) for axes in (shared, inner, free))
        view = _matrix_view(shape, (*shared, *inner, *free), matrix if n_batch else matrix[1:])
        x_layout = Layout(x_axes[0], x_axes[1], x_axes[2], x_cut)
        name = region.activation(region.root(source), x_layout, mark, "in", "input")
        site = region.site("dense", mark, view, out, layout, name)
        site = site._replace(d_in=matrix[1], raw=not region.is_in(source, region.touched))
        site = site._replace(groups=matrix[0] if n_batch else None)
        region.add_kernel(site, out, layout, y_cut, [y for _, y in cuts])
    return None


def _cuts(mark: Mark, axes: Sequence[Any], x: tuple[Var, Any], y: tuple[Var, Layout]) -> tuple[View, View]:
    """The parts of the input and of the output that a leaf among several joined ones has to do with.

    Args:
      mark: of the leaf.
      axes: batch, contracted and free axes of the joined parameter.
      x: the activation, and its batch axes, rows and contracted axes in the same order.
      y: the output and its layout.
    """
    if mark.block is None:
        return (), ()
    axis, (shared, inner, free) = mark.block[0], axes
    if axis in inner:
        return block_slice(x[0].aval.shape, x[1][2][inner.index(axis)], mark), ()
    if axis in free:
        return (), block_slice(y[0].aval.shape, y[1].features[free.index(axis)], mark)
    place = shared.index(axis)
    return tuple(
        block_slice(variable.aval.shape, axes[place], mark) for variable, axes in ((x[0], x[1][0]), (y[0], y[1].batch))
    )  # type: ignore[return-value]


def _before_broadcast(region: Recorder, variable: Var, batch: tuple[int, ...]) -> tuple[Var, list[int]] | None:
    """What was broadcast over these axes, and the axes of the broadcast that were there before."""
    maker = region.makers.get(variable)
    if maker is None or maker.primitive.name != "broadcast_in_dim":
        return None
    source, kept = maker.invars[0], [int(i) for i in maker.params["broadcast_dimensions"]]
    if sorted((*batch, *kept)) != list(range(variable.aval.ndim)):
        return None
    same = all(source.aval.shape[i] == variable.aval.shape[k] for i, k in enumerate(kept))
    return (source, kept) if same and region.is_data(source) else None


def convolution(region: Recorder, eqn: Any, position: int) -> str | None:
    """A dense site on patches, in groups of channels."""
    params = eqn.params
    if position != 1:
        return "conv_general_dilated of a parameter as its image"
    if params["batch_group_count"] != 1:
        return "conv_general_dilated with batch groups"
    image, kernel = eqn.invars
    if any(mark.block is not None for mark in region.marks_of(kernel)):
        return "conv_general_dilated of concatenated parameters"
    numbers, out, groups = params["dimension_numbers"], eqn.outvars[0], params["feature_group_count"]
    shape = kernel.aval.shape
    places = (numbers.rhs_spec[1], *numbers.rhs_spec[2:], numbers.rhs_spec[0])
    window = tuple(shape[i] for i in numbers.rhs_spec[2:])
    d_in, d_out = math.prod(shape[i] for i in places[:-1]), shape[places[-1]] // groups
    view = _matrix_view(shape, places, (d_in, groups * d_out))
    if groups > 1:
        view += (("reshape", (d_in, groups, d_out)), ("transpose", (1, 0, 2)))
    channel = numbers.out_spec[1]
    spatial = (numbers.out_spec[0], *numbers.out_spec[2:])
    layout = grouped(out.aval.shape, spatial, channel, groups)
    patch_shape = tuple(groups * d_in if i == channel else n for i, n in enumerate(out.aval.shape))

    def patches(read: Read) -> Any:
        return jax.lax.conv_general_dilated_patches(
            read(image),
            filter_shape=window,
            window_strides=params["window_strides"],
            padding=params["padding"],
            lhs_dilation=params["lhs_dilation"],
            rhs_dilation=params["rhs_dilation"],
            dimension_numbers=jax.lax.ConvDimensionNumbers(numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec),
            precision=jax.lax.Precision.HIGHEST,
        )

    pixels = Layout((), (numbers.lhs_spec[0], *numbers.lhs_spec[2:]), (numbers.lhs_spec[1],))
    pixel_rows, pixel_axes = region.rows_of(image, pixels)
    for mark in region.marks_of(kernel):
        patch_layout = grouped(patch_shape, spatial, channel, groups)
        name = region.activation((image, id(eqn)), patch_layout, mark, "patches", "patches", at=out, make=patches)
        seen = region.activation(region.root(image), pixels, mark, "in", "input")
        rows = Layout((), spatial, (channel,))
        site = region.site("conv", mark, view, out, rows, name)._replace(
            d_in=d_in,
            d_out=d_out,
            groups=groups if groups > 1 else None,
            taps=math.prod(window),
            image=seen,
            image_rows=pixel_rows,
            image_axes=pixel_axes,
            raw=not region.is_in(image, region.touched),
        )
        region.add_kernel(site, out, layout, ())
    return None


def _scale_by_contraction(region: Recorder, eqn: Any, position: int) -> str | None:
    """A contraction over batch axes alone: a product, its features in front."""
    batches = eqn.params["dimension_numbers"][1]
    parameter, activation, out = eqn.invars[position], eqn.invars[1 - position], eqn.outvars[0]
    own, theirs = batches[position], batches[1 - position]
    order = (*theirs, *others(activation.aval.ndim, theirs))
    step = (("transpose", tuple(own)),)
    marks = []
    for mark in with_axes(region.marks_of(parameter), parameter):
        if mark.block is not None:
            return "dot_general of concatenated parameters"
        axes = follow_axes(step, parameter.aval.shape, mark.axes or ())
        marks.append(mark._replace(view=mark.view + step, axes=axes))
    shape = tuple(parameter.aval.shape[i] for i in own) + (1,) * (out.aval.ndim - len(own))
    padded = [mark._replace(view=mark.view + (("reshape", shape),)) for mark in marks]
    _scales(region, out, padded, shape, [lambda read: jnp.transpose(jnp.asarray(read(activation)), order)])
    return None


def product(region: Recorder, eqn: Any, position: int) -> str | None:
    """A scale, or what an activation is divided by."""
    parameter, other, out = eqn.invars[position], eqn.invars[1 - position], eqn.outvars[0]
    marks = with_axes(region.marks_of(parameter), parameter)

    def divided(read: Read) -> Any:  # y = x / s is not linear in s: dy/ds = -x / s^2
        divisor = jnp.asarray(read(parameter))
        return -jnp.asarray(read(other)) / (divisor * divisor)

    factor: Callable[[Read], Any] = lambda read: read(other)  # noqa: E731
    if eqn.primitive.name == "div":
        factor = divided if position == 1 else lambda read: 1 / jnp.asarray(read(other))
    _scales(region, out, marks, parameter.aval.shape, [factor])
    return None


def _scales(region: Recorder, out: Var, marks: Sequence[Mark], shape: Sequence[int], factors: list[Callable]) -> None:
    """Scales of what the factors make; the product goes on as long as nothing else reads it."""
    while (following := region.only_use(out)) is not None:
        name = following.primitive.name
        if name in TRANSPARENT and len(following.invars) == 1:
            out = following.outvars[0]
            continue
        other = other_operand(following, out)
        # Stop at a square, and at a product with another parameter.
        if other is None or name not in ("mul", "div") or region.marks_of(other) or region.is_in(other, region.derived):
            break
        if name == "div" and following.invars[0] is not out:
            break
        inverse = name == "div"
        factors.append(
            lambda read, other=other, inverse=inverse: 1 / jnp.asarray(read(other)) if inverse else read(other)
        )
        out = following.outvars[0]

    def unit(read: Read) -> Any:
        value = jnp.ones(out.aval.shape, out.aval.dtype)
        for factor in factors:
            value = value * jnp.asarray(factor(read)).astype(out.aval.dtype)
        return value

    for mark in marks:
        layout = elementwise_layout(mark, shape, out)
        cut: View = () if mark.block is None else block_slice(out.aval.shape, mark.block[0], mark)
        seen = layout._replace(cut=cut)
        name = region.activation((out, "unit"), seen, mark, "in", "input", at=out, make=unit)
        site = region.site("scale", mark, vector_view(mark, shape), out, layout, name)
        region.add_kernel(site._replace(positional=region.is_positional(out, layout)), out, layout, cut)


def sum_(region: Recorder, eqn: Any, position: int) -> str | None:
    """A shift; the bias of a kernel or scale is found with it, and does not come here."""
    parameter, out = eqn.invars[position], eqn.outvars[0]
    marks, shape = with_axes(region.marks_of(parameter), parameter), parameter.aval.shape
    for mark in marks:
        mark = signed(mark, eqn, position)
        layout = elementwise_layout(mark, shape, out)
        cut = () if mark.block is None else block_slice(out.aval.shape, mark.block[0], mark)
        site = region.site("shift", mark, vector_view(mark, shape), out, layout, None)
        region.add_site(site._replace(positional=region.is_positional(out, layout)), Output(out, layout, cut))
    return None


def _consecutive(start: int, first: Sequence[int], second: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    middle = start + len(first)
    return tuple(range(start, middle)), tuple(range(middle, middle + len(second)))


def _matrix_view(shape: Sequence[int], order: Sequence[int], matrix: Sequence[int]) -> View:
    view: View = ()
    if tuple(order) != tuple(range(len(shape))):
        view += (("transpose", tuple(order)),)
    if tuple(shape[i] for i in order) != tuple(matrix):
        view += (("reshape", tuple(matrix)),)
    return view


RULES: dict[str, Callable[[Recorder, Any, int], str | None]] = {
    "dot_general": contraction,
    "conv_general_dilated": convolution,
    "mul": product,
    "div": product,
    "add": sum_,
    "add_any": sum_,
    "sub": sum_,
}
