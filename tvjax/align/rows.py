"""Which rows of two activations correspond, and which are padding.

The rows of a site are the product of its row axes, each with a label that says where it comes from
(`tvjax.capture.axes`): examples, tokens of a stream of the carry, and the rest (heads, places that a router made). Two
models are compared example by example, and token by token after their grids are aligned; what the rest is must be the
same on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from tvjax import tree
from tvjax.align import tokens
from tvjax.capture import Site, SiteTable
from tvjax.capture.axes import EXAMPLE, FEATURE, NEW, ROUTED, is_stream
from tvjax.stages import Stage, Stream


class RowAxes(NamedTuple):
    """The row axes of an activation, by what they are.

    Attributes:
      sizes: of the axes.
      examples: positions of the example axes.
      tokens: positions of the axes of one stream, a grid in row-major order.
      rest: positions of the others.
      stream: the leaf of the carry that the tokens belong to, None where they belong to none.
      labels: of the axes.
    """

    sizes: tuple[int, ...]
    examples: tuple[int, ...]
    tokens: tuple[int, ...]
    rest: tuple[int, ...]
    stream: str | None
    labels: tuple[str, ...]

    def count(self, axes: tuple[int, ...]) -> int:
        """How many rows some of the axes make."""
        return math.prod(self.sizes[i] for i in axes)


def row_axes(site: Site, of_image: bool = False) -> RowAxes:
    """The row axes of the output of a site, or of the image that a convolution reads.

    >>> import jax.numpy as jnp
    >>> from tvjax.capture import sites
    >>> table = sites(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2))}, jnp.ones((4, 5, 3)))
    >>> row_axes(table.sites[0])[:5]
    ((4, 5), (0,), (1,), (), '')
    """
    return arranged(*((site.image_rows, site.image_axes) if of_image else (site.rows, site.axes)))


def arranged(sizes: Sequence[int], labels: Sequence[str]) -> RowAxes:
    """Row axes of these sizes and labels, by what they are."""
    sizes, labels = tuple(sizes), tuple(labels)
    places = range(len(sizes))
    examples = tuple(i for i in places if labels[i] == EXAMPLE)
    if not examples and labels[:1] == (NEW,):
        examples = (0,)  # an example axis that was not followed: the first, by the contract of a model's inputs
    stream = next((label for label in labels if is_stream(label)), None)
    inside = tuple(i for i in places if labels[i] == stream) if stream is not None else ()
    if stream is None:  # tokens that no argument has, such as learned queries
        inside = tuple(i for i in places if labels[i] == NEW and i not in examples)
    rest = tuple(i for i in places if i not in examples and i not in inside)
    return RowAxes(sizes, examples, inside, rest, stream, labels)


def stream_of(stage: Stage, rows: RowAxes) -> Stream:
    """The layout of the tokens of some rows; that of a stage with one where the rows belong to no leaf of the carry."""
    if rows.stream is None:
        return stage.streams if isinstance(stage.streams, Stream) else Stream()
    return stage.stream(rows.stream)


def check_streams(stage: Stage, table: SiteTable) -> None:
    """Raises where one layout is declared for the tokens of several leaves of the carry.

    Raises:
      ValueError: it names the leaves, and the line that tells them apart.
    """
    if not isinstance(stage.streams, Stream) or stage.streams == Stream():
        return
    found = {label: None for site in table.sites for label in (*site.axes, *site.image_axes) if is_stream(label)}
    if len(found) > 1:
        example = ", ".join(f"{label!r}: Stream(...)" for label in found)
        raise ValueError(
            f"stage {stage.name!r} works on the tokens of {', '.join(map(repr, found))}, and one layout is declared "
            f"for all of them ({stage.streams}): say which is whose, streams={{{example}}}"
        )


def padding_mask(stage: Stage, carry: Any, rows: RowAxes) -> Array | None:
    """The mask ``[examples, tokens]`` of some rows, True at real tokens; None where every row is real.

    Where a text has several axes of tokens they are in row-major order.

    Raises:
      ValueError: the mask is not in the carry, or has other tokens than the rows.
    """
    layout = stream_of(stage, rows)
    if layout.mask is None or not rows.tokens:
        return None
    masks = carry if isinstance(carry, Mapping) else {}
    if layout.mask not in masks:
        raise ValueError(
            f"stage {stage.name!r} declares the padding mask {layout.mask!r}, which its carry does not hold; it holds "
            f"{sorted(tree.flatten(carry))}"
        )
    mask = masks[layout.mask]
    mask = mask.reshape(len(mask), -1)  # texts of several parts, such as one for each class
    shape = tuple(rows.count(axes) for axes in (rows.examples, rows.tokens))
    if tuple(mask.shape) == shape:
        return mask
    if rows.stream is None:
        return None
    raise ValueError(
        f"stage {stage.name!r}: the padding mask {layout.mask!r} has shape {tuple(mask.shape)}, the tokens of "
        f"{rows.stream!r} are {shape} here"
    )


def mismatch(a: RowAxes, b: RowAxes, heads: tuple[int, int] | None = None) -> str | None:
    """Why the rows of a site do not correspond between two models, None where they do.

    Args:
      a: of the source.
      b: of the target.
      heads: the heads of both, where those of one token are paired by what they are.
    """
    for rows in (a, b):
        if ROUTED in rows.labels:
            return "its rows are in an order that the data decide, each model's own"
        if FEATURE in rows.labels:
            return "its rows are features, and each model has its own"
        if rows.stream is not None and any(is_stream(rows.labels[i]) for i in rows.rest):
            return "its rows are pairs of tokens of two streams"
    if a.count(a.examples) != b.count(b.examples):
        return f"{a.count(a.examples)} examples in the source, {b.count(b.examples)} in the target"
    if heads is not None and (a.count(a.rest), b.count(b.rest)) != heads:
        return f"its rows are not one for each of {heads[0]} heads in the source and of {heads[1]} in the target"
    if heads is None and a.count(a.rest) != b.count(b.rest):
        return f"{a.count(a.rest)} rows a token in the source (heads), {b.count(b.rest)} in the target"
    if a.stream is None and b.stream is None and a.count(a.tokens) != b.count(b.tokens):
        return f"{a.count(a.tokens)} rows an example in the source, {b.count(b.tokens)} in the target"
    if bool(a.tokens) != bool(b.tokens):
        return "its rows are tokens in one model, examples in the other"
    return None


def alignment(
    a: RowAxes, b: RowAxes, stages: tuple[Stage, Stage], mode: tokens.Mode, overlaps: Mapping[str, Any] | None = None
) -> tokens.Alignment:
    """The operators that bring the tokens of both sides to the same rows.

    Args:
      a: of the source.
      b: of the target.
      stages: of the source and of the target.
      mode: for grids.
      overlaps: for streams of texts that two tokenizers cut differently, by the padding mask of the target's tokens,
        the operator of each example, ``[examples, tokens_b, tokens_a]``.

    Raises:
      ValueError: tokens that cannot be aligned.
    """
    if not a.tokens or not b.tokens:
        return tokens.Alignment()
    layout_a, layout_b = (stream_of(stage, rows) for stage, rows in zip(stages, (a, b), strict=True))
    counts = a.count(a.tokens), b.count(b.tokens)
    overlap = (overlaps or {}).get(layout_b.mask or "")
    if overlap is not None:
        if overlap.shape == (b.count(b.examples), *counts[::-1]):
            return tokens.Alignment(overlap)
        if b.stream is not None:
            raise ValueError(
                f"stage {stages[1].name!r}: the overlap of {layout_b.mask!r} has shape {tuple(overlap.shape)}, and "
                f"there are {counts[0]} tokens in the source, {counts[1]} in the target"
            )
    return tokens.alignment(layout_a, layout_b, *counts, mode)


@partial(jax.jit, static_argnames="axes")
def on_tokens(rows: Array, axes: RowAxes, operator: Any, mask: Array | None) -> tuple[Array, Array]:
    """Rows on the aligned tokens.

    Args:
      rows: ``[*layers, n, d]``, n the product of the row axes, or a multiple where a scan repeats a layer.
      axes: the row axes.
      operator: ``[tokens', tokens]``, one for each example, or None, see `tvjax.align.tokens`.
      mask: ``[examples, tokens]`` or None.

    Returns:
      ``[*layers, n', d]`` float32 in the order examples, tokens, rest, and the weights of the rows, ``[n']``.
    """
    layers, width = rows.shape[:-2], rows.shape[-1]
    examples, inside, rest = (axes.count(part) for part in (axes.examples, axes.tokens, axes.rest))
    grid = rows.reshape(-1, *axes.sizes, width)
    order = (0, *(1 + i for i in (*axes.examples, *axes.tokens, *axes.rest)), grid.ndim - 1)
    grid = jnp.transpose(grid, order).reshape(-1, examples, inside, rest * width)
    aligned, weights = jax.vmap(lambda hidden: tokens.align(operator, hidden, mask))(grid)
    weights = jnp.broadcast_to(weights[..., None], (*weights.shape, rest))
    # Every layer sees the same rows; where a scan repeats one layer, each pass adds its own.
    return aligned.reshape(*layers, -1, width), weights.reshape(math.prod(layers), -1)[0].astype(jnp.float32)
