"""Plots as PNG files, drawn without a display."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from tvjax.checkpoints.atomic import replacing
from tvjax.compose.coefficients import Coefficients, entries
from tvjax.evaluate.accuracy import Accuracy
from tvjax.report.measurements import Measurement, accuracies, in_order

# Okabe and Ito's colours, told apart by every kind of colour vision.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
GREY = "#8A8A8A"
DARK = "#333333"
MARKERS = ("o", "s", "^", "D", "v", "P")
BOX = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
STYLE = {"size": 9, "title": 10, "small": 8}


class Curve(NamedTuple):
    """Accuracy of one method against the scale of the task vector.

    Attributes:
      task: name of the task.
      target: name of the model that was edited.
      method: name of the method.
      draw: number of the draw of the calibration examples.
      alphas: the scales.
      accuracy: on the validation images, a fraction each.
    """

    task: str
    target: str
    method: str
    draw: int
    alphas: tuple[float, ...]
    accuracy: tuple[float, ...]


def plot_methods(
    measurements: Sequence[Measurement],
    file: str | os.PathLike[str],
    titles: dict[str, str],
    bounds: tuple[str, str] = ("zero_shot", "fine_tuned"),
) -> None:
    """Accuracy by method, a panel for each target: bars for the mean over tasks, a marker for every task.

    Args:
      measurements: of all targets.
      file: the PNG.
      titles: of the targets, in the order of the panels.
      bounds: the two methods that are drawn as lines from top to bottom.
    """
    tasks = in_order(m.task for m in measurements)
    methods = [name for name in in_order(m.method for m in measurements) if name not in bounds]
    figure = Figure(figsize=(3.0 * len(titles) + 1.6, 0.34 * len(methods) + 1.7), layout="constrained")
    axes = figure.subplots(1, len(titles), sharex=True, sharey=True, squeeze=False)[0]
    for axis, (target, title) in zip(axes, titles.items(), strict=True):
        for y, method in enumerate(methods):
            found = accuracies(measurements, target, method)
            if not found:
                axis.text(
                    2, y, "needs equal shapes", va="center", color=GREY, fontsize=STYLE["small"], zorder=5, bbox=BOX
                )
                continue
            means = {task: 100 * values.mean() for task, values in found.items()}
            mean = float(np.mean(list(means.values())))
            axis.barh(y, mean, height=0.62, color=_method_colour(method), alpha=0.85, zorder=2)
            for task, value in means.items():
                marker = MARKERS[tasks.index(task) % len(MARKERS)]
                axis.scatter(value, y, s=16, marker=marker, color="white", edgecolor=DARK, linewidth=0.8, zorder=4)
        for method, style in zip(bounds, ("--", ":"), strict=True):
            found = accuracies(measurements, target, method)
            mean = 100 * float(np.mean([values.mean() for values in found.values()]))
            axis.axvline(mean, color=DARK, linestyle=style, linewidth=1.2, zorder=3)
        axis.set_title(title, fontsize=STYLE["title"])
        axis.set_xlim(0, 100)
        axis.set_xlabel("accuracy on test examples, %", fontsize=STYLE["size"])
        _tidy(axis, "x")
    axes[0].set_yticks(range(len(methods)), [_label(name) for name in methods])
    axes[0].invert_yaxis()
    handles = [
        axes[0].scatter([], [], s=16, marker=MARKERS[i % len(MARKERS)], color="white", edgecolor=DARK, linewidth=0.8)
        for i in range(len(tasks))
    ]
    handles += [axes[0].plot([], [], color=DARK, linestyle=style, linewidth=1.2)[0] for style in ("--", ":")]
    names = [*(task.replace("_", " ") for task in tasks), *map(_label, bounds)]
    legend = figure.legend(
        handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=STYLE["small"]
    )
    legend.set_in_layout(True)
    _save(figure, file)


def plot_scales(curves: Sequence[Curve], file: str | os.PathLike[str], titles: dict[str, str]) -> None:
    """Accuracy against the scale of the task vector, mean over tasks and draws, a panel for each target.

    Args:
      curves: of all targets.
      file: the PNG.
      titles: of the targets, in the order of the panels.
    """
    methods = in_order(curve.method for curve in curves)
    figure = Figure(figsize=(3.0 * len(titles) + 0.6, 3.4), layout="constrained")
    axes = figure.subplots(1, len(titles), sharex=True, sharey=True, squeeze=False)[0]
    for axis, (target, title) in zip(axes, titles.items(), strict=True):
        for method in methods:
            found = [curve for curve in curves if (curve.target, curve.method) == (target, method)]
            if not found:
                continue
            mean = 100 * np.mean([curve.accuracy for curve in found], axis=0)
            line = "--" if "+" in method else "-"
            axis.plot(found[0].alphas, mean, line, color=_method_colour(method), linewidth=1.6, label=_label(method))
            best = int(mean.argmax())
            axis.plot(found[0].alphas[best], mean[best], "o", color=_method_colour(method), markersize=4.5)
        axis.set_title(title, fontsize=STYLE["title"])
        axis.set_xlabel(r"scale $\alpha$", fontsize=STYLE["size"])
        _tidy(axis, "both")
    axes[0].set_ylabel("accuracy on validation examples, %", fontsize=STYLE["size"])
    handles = {label: h for axis in axes for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
        fontsize=STYLE["small"],
    )
    _save(figure, file)


def plot_scale_curve(
    scales: Sequence[float],
    found: Sequence[Accuracy],
    file: str | os.PathLike[str],
    title: str,
    reference: float | None = None,
) -> None:
    """Accuracy of one edited model against the scale of its task vector, with the 95 % interval of each.

    Args:
      scales: in ascending order.
      found: the accuracy at each.
      file: the PNG.
      title: above the plot.
      reference: accuracy of the fine-tuned model, a line from side to side.
    """
    figure = Figure(figsize=(4.6, 3.3), layout="constrained")
    axis = figure.subplots()
    accuracy = np.array([100 * one.fraction for one in found])
    low, high = (100 * np.array([one.interval() for one in found])).T
    axis.fill_between(scales, low, high, color=COLOURS[0], alpha=0.18, linewidth=0, zorder=2, label="95 % interval")
    marker = "o" if len(scales) < 15 else ""
    axis.plot(scales, accuracy, color=COLOURS[0], marker=marker, markersize=3.5, linewidth=1.6, zorder=3)
    best = int(accuracy.argmax())
    label = rf"best: {accuracy[best]:.1f} % at $\alpha$ = {scales[best]:g}"
    axis.plot(scales[best], accuracy[best], "o", color=COLOURS[5], markersize=6, zorder=4, label=label)
    if reference is not None:
        axis.axhline(
            100 * reference,
            color=DARK,
            linestyle=":",
            linewidth=1.2,
            zorder=1,
            label=f"reference: {100 * reference:.1f} %",
        )
    axis.set_title(title, fontsize=STYLE["title"], wrap=True)
    axis.set_xlabel(r"scale $\alpha$", fontsize=STYLE["size"])
    axis.set_ylabel("accuracy, %", fontsize=STYLE["size"])
    axis.legend(frameon=False, fontsize=STYLE["small"])
    _tidy(axis, "both")
    _save(figure, file)


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
    _save(figure, file)


def _kind_and_depth(path: str) -> tuple[str, int | None]:
    """A leaf's path without its layer, and the layer."""
    found = re.search(r"(?:^|/)(\d+)(?:/|$)", path)
    if found is None:
        return path, None
    return "/".join(filter(None, (path[: found.start()], path[found.end() :]))), int(found[1])


def _method_colour(method: str) -> str:
    """A colour for each family of methods: a chain has that of its first link."""
    families = ("theseus", "naive", "bico", "gradfix", "orthogonal_shift", "few_shot")
    first = method.split("+")[0]
    own = next((name for name in families if first == name or first.startswith(f"{name}_")), None)  # a variant's too
    return GREY if own is None else COLOURS[families.index(own)]


def _label(method: str) -> str:
    """A method for people; a variant of one (``theseus_blocks``) by both names."""
    names = {
        "naive": "naive addition",
        "gradfix": "GradFix",
        "theseus": "Theseus",
        "bico": "BiCo",
        "zero_shot": "zero-shot",
    }
    names |= {"few_shot": "few-shot fine-tuning", "fine_tuned": "own fine-tuning"}
    return " + ".join(_name(part, names) for part in method.split("+"))


def _name(method: str, names: dict[str, str]) -> str:
    for kind in ("theseus", "bico"):
        if method.startswith(f"{kind}_"):
            return f"{names[kind]}, {method.removeprefix(f'{kind}_').replace('_', ' ')}"
    return names.get(method, method.replace("_", " "))


def _tidy(axis: Axes, grid: Literal["both", "x"]) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=STYLE["size"], length=3)
    axis.grid(axis=grid, color="#E4E4E4", linewidth=0.8, zorder=0)
    axis.set_axisbelow(True)


def _save(figure: Figure, file: str | os.PathLike[str]) -> None:
    with replacing(file) as temporary:
        figure.savefig(temporary, format="png", dpi=160)
