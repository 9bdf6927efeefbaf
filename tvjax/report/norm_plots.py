"""The norms of a task vector in its source and of what became of it, by layer and kind of leaf, as a PNG."""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from tvjax.report.measurements import in_order
from tvjax.report.style import COLOURS, STYLE, save, tidy

_COLUMNS = 4
_ROW = 1.45  # inches of a row of panels
_LINE = 0.21  # inches of a leaf that stands in no stack
_MOST = 40  # leaves of no stack that are drawn, the largest
_LOOKS: tuple[dict[str, Any], ...] = (
    {"color": COLOURS[0], "marker": "o", "linestyle": "--", "markerfacecolor": "white"},
    {"color": COLOURS[5], "marker": "s", "linestyle": "-"},
)
_SIZES = (7.0, 3.5)  # of the markers: where both are equal, one is seen around the other


class Place(NamedTuple):
    """Where a leaf stands.

    Attributes:
      stack: the path of its stack; "" where it stands in none.
      layer: its number in the stack; 0 in none.
      kind: what it is in every layer; kernel and bias of one map are of one kind.
    """

    stack: str
    layer: int
    kind: str


def place(path: str) -> Place:
    """Where a leaf stands: by the first whole number of its path.

    >>> place("vision/blocks/3/attention/query/kernel")
    Place(stack='vision/blocks', layer=3, kind='attention/query')
    >>> place("embeddings/tokens")
    Place(stack='', layer=0, kind='embeddings/tokens')
    """
    kind = re.sub(r"/(kernel|bias|scale|weight)$", "", path)
    found = re.match(r"((?:[^/]+/)*?)(\d+)/(.+)", kind)
    return Place("", 0, kind) if found is None else Place(found[1].rstrip("/"), int(found[2]), found[3])


def plot_norms(
    source: Mapping[str, float],
    moved: Mapping[str, float],
    file: str | os.PathLike[str],
    names: tuple[str, str] = ("in the source", "moved"),
) -> None:
    """Norm by layer, a panel for each kind of leaf, with the source's layers spread over those of the target.

    Every panel has a scale of its own, which begins at zero. Leaves that stand in no stack are rows below.

    Args:
      source: norms by path in the source.
      moved: norms by path in the target.
      file: the PNG.
      names: of the two, in the legend.
    """
    sides = _by_kind(source), _by_kind(moved)
    kinds = list(dict.fromkeys(key for side in sides for key in side if key[0]))
    rest = in_order(key[1] for side in sides for key in side if not key[0])
    sizes = {kind: max(side.get(("", kind), {0: 0.0})[0] for side in sides) for kind in rest}
    shown = sorted(sorted(rest, key=lambda kind: -sizes[kind])[:_MOST], key=rest.index)
    rows = math.ceil(len(kinds) / _COLUMNS)
    heights = [_ROW * rows + 0.35] * bool(kinds) + [_LINE * len(shown) + 0.7] * bool(shown)
    figure = Figure(figsize=(9.6, sum(heights) + 0.45), layout="constrained")
    parts = list(figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]) if heights else []
    if kinds:
        axes = list(parts[0].subplots(rows, _COLUMNS, squeeze=False).flat)
        for axis, key in zip(axes, kinds, strict=False):
            _panel(axis, [side.get(key, {}) for side in sides], [_layers(side, key[0]) for side in sides])
            axis.set_title(_title(key, kinds), fontsize=STYLE["size"])
        for axis in axes[len(kinds) :]:
            axis.set_axis_off()
        parts[0].supxlabel("layer of the target", fontsize=STYLE["size"])
        parts[0].supylabel("norm", fontsize=STYLE["size"])
    if shown:
        axis = parts[-1].subplots()
        _rows(axis, shown, [[side.get(("", kind), {}).get(0) for kind in shown] for side in sides])
        left = len(rest) - len(shown)
        further = f"; the {_MOST} largest, {left} more are not shown" if left else ""
        axis.set_title(f"leaves of no layer{further}" if kinds else f"leaves{further}", fontsize=STYLE["size"])
    handles = [Line2D([], [], **look, markersize=size) for look, size in zip(_LOOKS, _SIZES, strict=True)]
    figure.legend(handles, names, loc="outside upper center", ncols=2, frameon=False, fontsize=STYLE["size"])
    save(figure, file)


def _by_kind(norms: Mapping[str, float]) -> dict[tuple[str, str], dict[int, float]]:
    """Norms by layer, of each stack and kind; of several leaves the root of the sum of squares."""
    squares: dict[tuple[str, str], dict[int, float]] = {}
    for path, norm in norms.items():
        stack, layer, kind = place(path)
        layers = squares.setdefault((stack, kind), {})
        layers[layer] = layers.get(layer, 0.0) + norm**2
    return {key: {layer: math.sqrt(own) for layer, own in sorted(layers.items())} for key, layers in squares.items()}


def _layers(side: Mapping[tuple[str, str], Mapping[int, float]], stack: str) -> int:
    return 1 + max((max(layers) for (own, _), layers in side.items() if own == stack), default=0)


def _title(key: tuple[str, str], kinds: Sequence[tuple[str, str]]) -> str:
    """The kind, after the stack's name where there are several."""
    several = len({stack for stack, _ in kinds}) > 1
    text = f"{re.sub(r'/(blocks|layers?)$', '', key[0])}: {key[1]}" if several else key[1]
    return "\n".join(textwrap.wrap(text.replace("/", "/ "), 30)).replace("/ ", "/")


def _panel(axis: Axes, sides: Sequence[Mapping[int, float]], layers: Sequence[int]) -> None:
    """The lines of one kind; a layer of the source stands where the same share of the target's depth is."""
    for own, count, look, size in zip(sides, layers, _LOOKS, _SIZES, strict=True):
        if not own:  # what is empty and not clipped has no bounds, and the layout would collapse
            continue
        x = [(layer + 0.5) / count * layers[1] - 0.5 for layer in own]
        axis.plot(
            x, list(own.values()), **look, markersize=size if count <= 16 else size / 2, linewidth=1.2, clip_on=False
        )
    axis.set_xlim(-0.5, max(layers[1] - 0.5, 0.5))
    axis.set_ylim(0, 1.08 * max((norm for own in sides for norm in own.values()), default=0.0) or 1.0)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axis.yaxis.set_major_locator(MaxNLocator(3))
    tidy(axis, "y")
    axis.tick_params(labelsize=STYLE["small"])


def _rows(axis: Axes, kinds: Sequence[str], sides: Sequence[Sequence[float | None]]) -> None:
    """A row for each leaf of no stack, with its numbers at the end: sizes may be of very different orders."""
    largest = max((norm for norms in sides for norm in norms if norm is not None), default=0.0) or 1.0
    for row in range(len(kinds)):
        found = [norms[row] for norms in sides]
        for norm, look, shift in zip(found, _LOOKS, (-0.12, 0.12), strict=True):
            if norm is not None:
                axis.plot([0, norm], [row + shift] * 2, color=look["color"], linewidth=1.2)
                axis.plot(norm, row + shift, look["marker"], color=look["color"], markersize=4, clip_on=False)
        text = " to ".join("none" if norm is None else f"{norm:.3g}" for norm in found)
        axis.text(1.04 * largest, row, text, va="center", fontsize=STYLE["small"])
    axis.set_yticks(range(len(kinds)), kinds)
    axis.set_ylim(len(kinds) - 0.5, -0.5)
    axis.set_xlim(0, 1.25 * largest)
    axis.set_xlabel("norm", fontsize=STYLE["size"])
    tidy(axis, "x")
    axis.tick_params(labelsize=STYLE["small"])
    axis.set_xticks([tick for tick in MaxNLocator(5).tick_values(0, largest) if 0 <= tick <= largest])
