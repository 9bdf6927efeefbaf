"""Which axes of a value are rows and which are features, and how a region is run to observe values in such layouts."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tvjax.capture import jaxprs
from tvjax.capture.marks import Mark
from tvjax.capture.views import View, apply_view, follow_axes, shape_after, transpose_view


class Layout(NamedTuple):
    """Which axes of a value are batch axes of the contraction, rows, and features; of the part of it that `cut` is."""

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    features: tuple[int, ...]
    cut: View = ()

    def sizes(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape ``[groups, rows, features]`` of a value of this shape; no groups where there are no batch axes."""
        shape = shape_after(self.cut, shape) if self.cut else shape
        groups = (math.prod(shape[i] for i in self.batch),) if self.batch else ()
        return (*groups, *(math.prod(shape[i] for i in axes) for axes in (self.rows, self.features)))


def to_rows(value: jax.Array, layout: Layout) -> jax.Array:
    """A value as ``[groups, rows, features]``."""
    sizes = layout.sizes(value.shape)
    value = apply_view(layout.cut, value)
    return jnp.transpose(value, (*layout.batch, *layout.rows, *layout.features)).reshape(sizes)


def from_rows(rows: jax.Array, layout: Layout, shape: Sequence[int]) -> jax.Array:
    """The inverse of `to_rows` for a value of this shape, zero outside the cut."""
    inner = shape_after(layout.cut, shape) if layout.cut else tuple(shape)
    order = (*layout.batch, *layout.rows, *layout.features)
    inverse = tuple(order.index(i) for i in range(len(order)))
    value = jnp.transpose(rows.reshape([inner[i] for i in order]), inverse)
    return transpose_view(layout.cut, value, shape) if layout.cut else value


def others(ndim: int, axes: Sequence[int]) -> tuple[int, ...]:
    """The axes of an array that are none of these."""
    return tuple(i for i in range(ndim) if i not in axes)


def cut_layout(layout: Layout, cut: View, shape: Sequence[int]) -> Layout:
    """The layout of what a cut leaves of a value."""
    if not cut:
        return layout
    if all(step[0] == "slice" for step in cut):
        return layout._replace(cut=cut)
    rows = follow_axes(cut, shape, layout.rows)
    assert rows is not None and not layout.batch
    return Layout((), rows, others(len(shape_after(cut, shape)), rows), cut)


def elementwise_layout(mark: Mark, shape: Sequence[int], out: Any) -> Layout:
    """Features are the axes along which the operand, whose shape is given, has entries of its own."""
    assert mark.axes is not None
    features = tuple(sorted(i for i in mark.axes if shape[i] != 1))
    return Layout((), others(out.aval.ndim, features), features)


def grouped(shape: Sequence[int], rows: Sequence[int], channel: int, groups: int) -> Layout:
    """The layout of a convolution's output, its channels in groups."""
    if groups == 1:
        return Layout((), tuple(rows), (channel,))
    split = tuple(m for i, n in enumerate(shape) for m in ((groups, n // groups) if i == channel else (n,)))
    moved = tuple(i + (i > channel) for i in rows)
    return Layout((channel,), moved, (channel + 1,), (("reshape", split),))


class Tap(NamedTuple):
    """Take the value ``make(read)`` of a region, in a layout, as activation `name`."""

    name: str
    layout: Layout
    role: str  # "input", "output" or "patches"
    make: Callable[[Callable[[Any], Any]], Any]


@dataclasses.dataclass
class Instrumentation:
    """What to do while a region is run: where to add probes, what to record, which inner regions to enter."""

    region: jaxprs.Region
    probes: dict[Any, list[tuple[str, Layout]]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    records: dict[Any, list[Tap]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    inner: dict[int, Instrumentation] = dataclasses.field(default_factory=dict)
    shapes: dict[str, jax.ShapeDtypeStruct] = dataclasses.field(default_factory=dict)
