"""Plots of a number for every leaf of a model: kind of leaf by depth."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from tvjax.compose.coefficients import Coefficients, entries
from tvjax.report.measurements import in_order
from tvjax.report.style import STYLE, save


def plot_coefficients(coefficients: Coefficients, file: str | os.PathLike[str]) -> None:
    """A heat map of learned coefficients, a panel for each task vector: kind of leaf by depth.

    A leaf of several random parts shows their mean; one that takes no part, or that the vector does not cover, is grey.

    Args:
      coefficients: of `tvjax.compose.learn`.
      file: the PNG.
    """
    panels: dict[str, dict[str, float]] = {vector: {} for vector in coefficients.layout.vectors}
    for entry in entries(coefficients):
        panels[entry.vector][entry.path] = float(np.mean(entry.values)) if entry.values else math.nan
    plot_leaves({name.replace("_", " "): values for name, values in panels.items()}, file, "coefficient")


def plot_leaves(
    panels: Mapping[str, Mapping[str, float]], file: str | os.PathLike[str], label: str, *, positive: bool = False
) -> None:
    """A heat map of a number for each leaf: kind of leaf by depth.

    The depth of a leaf is the first whole number in its path; leaves that stand in no stack have a column of their own.
    What is no number, or not there, is grey.

    Args:
      panels: numbers by path, a panel for each title.
      file: the PNG.
      label: of the colours.
      positive: the numbers are of one sign and of many sizes: colours go by their logarithm, zero is grey; otherwise
        one colour is for each sign.
    """
    places = {path: _kind_and_depth(path) for values in panels.values() for path in values}
    kinds = in_order(kind for kind, _ in sorted(places.values(), key=lambda place: place[1] is None))
    depths = sorted({depth for _, depth in places.values() if depth is not None})
    columns = [*depths, *([None] if any(depth is None for _, depth in places.values()) else [])]
    grid = np.full((len(panels), len(kinds), len(columns)), np.nan)
    for panel, values in zip(grid, panels.values(), strict=True):
        for path, value in values.items():
            kind, depth = places[path]
            panel[kinds.index(kind), columns.index(depth)] = value if value or not positive else np.nan
    size = (2.2 + len(panels) * (0.24 * max(len(columns), 4) + 0.5), 0.17 * len(kinds) + 1.3)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    found = np.abs(grid[~np.isnan(grid)])
    largest = float(found.max(initial=0)) or 1.0
    colours: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -largest, "vmax": largest}
    if positive:
        colours = {"cmap": "viridis", "norm": LogNorm(float(found.min(initial=largest)), largest)}
    for axis, title, numbers in zip(axes, panels, grid, strict=True):
        axis.set_facecolor("#E4E4E4")
        image = axis.imshow(numbers, **colours, aspect="auto", interpolation="nearest")
        axis.set_title(title, fontsize=STYLE["title"])
        axis.set_xticks(range(len(columns)), ["rest" if depth is None else str(depth) for depth in columns])
        axis.set_xlabel("depth", fontsize=STYLE["size"])
        axis.tick_params(labelsize=STYLE["small"], length=2)
    axes[0].set_yticks(range(len(kinds)), kinds)
    bar = figure.colorbar(image, ax=list(axes), shrink=0.8)
    bar.ax.tick_params(labelsize=STYLE["small"])
    bar.set_label(label, fontsize=STYLE["size"])
    save(figure, file)


def _kind_and_depth(path: str) -> tuple[str, int | None]:
    """A leaf's path without its layer, and the layer."""
    found = re.search(r"(?:^|/)(\d+)(?:/|$)", path)
    if found is None:
        return path, None
    return "/".join(filter(None, (path[: found.start()], path[found.end() :]))), int(found[1])
