"""Tables for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from tvjax.evaluate.accuracy import Accuracy
from tvjax.report.measurements import Comparison, Difference, Measurement, accuracies, in_order


def accuracy_table(
    measurements: Sequence[Measurement], comparisons: Sequence[Comparison], target: str, title: str, **style: Any
) -> Table:
    """One row for each method on one target: accuracy on every task in per cent, their mean, differences.

    Args:
      measurements: of all targets; the order of methods and tasks is that of their first appearance.
      comparisons: columns of differences; a method lacks those that it has none of.
      target: the target.
      title: above the table.
      **style: of rich's table (``box``).

    Returns:
      The table; where there are several draws, accuracies come with their standard deviation over draws.
    """
    own = [m for m in measurements if m.target == target]
    tasks = in_order(m.task for m in own)
    baselines = in_order(c.baseline for c in comparisons if c.target == target)
    differences = {(c.method, c.baseline): c.over_pairs for c in comparisons if c.target == target}
    table = Table(title=title, title_justify="left", title_style="bold", **{"box": box.SIMPLE_HEAD, **style})
    for column in ("method", "labels"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for column in (*tasks, "mean", *(f"- {name.replace('_', ' ')}" for name in baselines)):
        table.add_column(column.replace("_", " "), justify="right", no_wrap=True)
    for method in in_order(m.method for m in own):
        found = accuracies(own, target, method)
        labels = max(m.labels_per_class for m in own if m.method == method)
        draws_of_mean = np.mean([found[task] for task in tasks], axis=0)
        cells = [_percent(values) for values in (*(found[task] for task in tasks), draws_of_mean)]
        cells += [_difference(differences.get((method, baseline))) for baseline in baselines]
        table.add_row(method.replace("_", " "), str(labels) if labels else "", *cells)
    return table


def arithmetic_table(rows: Sequence[Mapping[str, Any]], title: str, **style: Any) -> Table:
    """One row for each edit: what it is, its scale, and accuracies in per cent.

    Args:
      rows: with ``operation``, ``edit``, ``measured_on``, ``alpha``, ``before``, ``after``, ``normalised``.
      title: above the table.
      **style: of rich's table.
    """
    table = Table(title=title, title_justify="left", title_style="bold", **{"box": box.SIMPLE_HEAD, **style})
    for column in ("operation", "edit", "measured on"):
        table.add_column(column, no_wrap=True)
    for column in ("alpha", "before", "after", "of fine-tuned"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        normalised = "" if row["normalised"] is None else f"{100 * row['normalised']:.1f}"
        table.add_row(
            *(row[key].replace("_", " ") for key in ("operation", "edit", "measured_on")),
            *(f"{row['alpha']:.2f}", f"{100 * row['before']:.1f}", f"{100 * row['after']:.1f}", normalised),
        )
    return table


def evaluation_table(found: Mapping[str, Accuracy], title: str) -> Table:
    """One row for each model: accuracy in per cent and its 95 % interval (Wilson).

    >>> evaluation_table({"model": Accuracy(9, 10)}, "images").row_count
    1
    """
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("model", overflow="fold")
    for column in ("accuracy", "95 % interval", "correct"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, accuracy in found.items():
        low, high = accuracy.interval()
        interval = f"{100 * low:.1f} to {100 * high:.1f}"
        table.add_row(name, f"{100 * accuracy.fraction:.1f}", interval, f"{accuracy.correct} of {accuracy.total}")
    return table


def _percent(values: np.ndarray) -> str:
    spread = values.std(ddof=1) if len(values) > 1 else 0.0
    return f"{100 * values.mean():.1f}" + (f" ± {100 * spread:.1f}" if spread > 0 else "")


def _difference(difference: Difference | None) -> str:
    if difference is None:
        return ""
    interval = "" if difference.half_width is None else f" ± {100 * difference.half_width:.1f}"
    return f"{100 * difference.mean:+.1f}{interval}"
