"""Plots of accuracies as PNG files, drawn without a display."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from tvjax.evaluate.accuracy import Accuracy
from tvjax.report.measurements import Measurement, accuracies, in_order
from tvjax.report.style import BOX, COLOURS, DARK, GREY, MARKERS, STYLE, save, tidy


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
        tidy(axis, "x")
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
    save(figure, file)


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
        tidy(axis, "both")
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
    save(figure, file)


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
    tidy(axis, "both")
    save(figure, file)


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
