"""Tables for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

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
      The table; where there are several draws, accuracies come with their standard deviation over draws. Differences
      come with their interval over test examples where the comparison has it, else over pairs of a task and a draw
      where there are three at least.
    """
    own = [m for m in measurements if m.target == target]
    tasks = in_order(m.task for m in own)
    baselines = in_order(c.baseline for c in comparisons if c.target == target)
    differences = {(c.method, c.baseline): c.over_examples or c.over_pairs for c in comparisons if c.target == target}
    table = Table(title=title, title_justify="left", title_style="bold", **{"box": box.SIMPLE_HEAD, **style})
    table.add_column("method", overflow="fold")
    for column in ("labels", *tasks, "mean", *(f"- {name.replace('_', ' ')}" for name in baselines)):
        table.add_column(column.replace("_", " "), justify="right", overflow="fold")  # no number is cut
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
        table.add_column(column, overflow="fold")
    for column in ("alpha", "before", "after", "of fine-tuned"):
        table.add_column(column, justify="right", overflow="fold")
    for row in rows:
        normalised = "" if row["normalised"] is None else f"{100 * row['normalised']:.1f}"
        table.add_row(
            *(row[key].replace("_", " ") for key in ("operation", "edit", "measured_on")),
            *(f"{row['alpha']:.2f}", f"{100 * row['before']:.1f}", f"{100 * row['after']:.1f}", normalised),
        )
    return table


def evaluation_table(
    rows: Sequence[Mapping[str, Any]], title: str, reference: Mapping[str, Any] | None = None
) -> Table:
    """One row for each model: accuracy in per cent and its 95 % interval.

    Args:
      rows: with ``model``, ``accuracy``, ``interval``, ``correct``, ``total``, ``normalised``; of tokens also
        ``perplexity``.
      title: above the table.
      reference: the same of the model that accuracies are normalised by; its row comes last.

    >>> row = {"model": "m", "accuracy": 0.9, "interval": (0.6, 0.98), "correct": 9, "total": 10, "normalised": None}
    >>> evaluation_table([row], "images").row_count
    1
    """
    further = [*(["of reference"] if reference else []), *(["perplexity"] if "perplexity" in rows[0] else [])]
    table = _table(title, ["model"], ["accuracy", "95 % interval", "correct", *further])
    for row in [*rows, *([{**reference, "normalised": 1.0}] if reference else [])]:
        cells = [_of_one(row["accuracy"]), _interval(row["interval"]), f"{row['correct']} of {row['total']}"]
        cells += [_of_one(row["normalised"])] if reference else []
        cells += [f"{row['perplexity']:.4g}" if "perplexity" in row else ""] if "perplexity" in rows[0] else []
        table.add_row(row["model"], *cells)
    return table


def pairs_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """One row for each pair of models: the difference in points, its interval, and McNemar's test.

    Args:
      rows: with ``model``, ``baseline``, ``difference``, ``interval`` and ``p_value``.
      title: above the table.
    """
    table = _table(title, ["model", "minus"], ["difference", "95 % interval", "p"])
    for row in rows:
        numbers = [_signed(row["difference"]), _interval(row["interval"], _signed), f"{row['p_value']:.2g}"]
        table.add_row(row["model"], row["baseline"], *numbers)
    return table


def agreement_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """One row for each pair of models: how often they predict the same, are both wrong, and the same where they are.

    Args:
      rows: with ``model``, ``baseline`` and ``agreement``.
      title: above the table.
    """
    table = _table(title, ["model", "and"], ["same", "both wrong", "same of these"])
    for row in rows:
        shares = [_of_one(row["agreement"][name]) for name in ("same", "both_wrong", "same_when_both_wrong")]
        table.add_row(row["model"], row["baseline"], *shares)
    return table


def curve_table(points: Sequence[Mapping[str, Any]], title: str) -> Table:
    """One row for each scale of a task vector: accuracy, and the difference to the model without it.

    Args:
      points: with ``scale``, ``accuracy``, ``interval``, ``normalised`` and ``difference_to_model``.
      title: above the table.
    """
    normalised = any(point["normalised"] is not None for point in points)
    columns = ["accuracy", "95 % interval", "difference", "its interval", *(["of reference"] if normalised else [])]
    table = _table(title, [], ["scale", *columns])
    for point in points:
        gain = point["difference_to_model"]
        cells = [_of_one(point["accuracy"]), _interval(point["interval"])]
        cells += [_signed(gain["difference"]), _interval(gain["interval"], _signed)]
        table.add_row(f"{point['scale']:g}", *cells, *([_of_one(point["normalised"])] if normalised else []))
    return table


def class_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """One row for each class: its number of examples, and the accuracy of each model on them.

    Args:
      rows: of the models, with ``model`` and ``by_class``, a list of ``class``, ``accuracy`` and ``total``.
      title: above the table.
    """
    table = _table(title, ["class"], ["examples"])
    for row in rows:
        table.add_column(row["model"], justify="right", overflow="fold")
    for own in zip(*(row["by_class"] for row in rows), strict=True):
        table.add_row(own[0]["class"], str(own[0]["total"]), *(_of_one(one["accuracy"]) for one in own))
    return table


def harness_table(measured: Sequence[Mapping[str, Any]], title: str) -> Table:
    """One row for each model, task and metric of lm-evaluation-harness.

    Args:
      measured: as `tvjax.jobs.harness.records_of` gives them.
      title: above the table.

    >>> row = {"model": "a", "task": "arc", "metric": "acc", "filter": "none", "value": 0.5, "stderr": None}
    >>> harness_table([{**row, "examples": None}], "lm-evaluation-harness").row_count
    1
    """
    table = _table(title, ["model", "task", "metric"], ["value", "examples"])
    for one in measured:
        metric = one["metric"] if one["filter"] == "none" else f"{one['metric']} ({one['filter']})"
        error = "" if one["stderr"] is None else f" ± {one['stderr']:.2g}"
        examples = "" if one["examples"] is None else str(one["examples"])
        table.add_row(one["model"], one["task"], metric, f"{one['value']:.4g}{error}", examples)
    return table


def _table(title: str, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in texts:
        table.add_column(column, overflow="fold")
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _of_one(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}"


def _interval(bounds: Sequence[float], text: Callable[[float], str] = _of_one) -> str:
    return f"{text(bounds[0])} to {text(bounds[1])}"


def _percent(values: np.ndarray) -> str:
    spread = values.std(ddof=1) if len(values) > 1 else 0.0
    return f"{100 * values.mean():.1f}" + (f" ± {100 * spread:.1f}" if spread > 0 else "")


def _difference(difference: Difference | None) -> str:
    """The mean, and its interval where that says something: of two pairs it is six times as wide as their distance."""
    if difference is None:
        return ""
    half = difference.half_width if difference.pairs > 2 else None
    interval = "" if half is None else f" ± {100 * half:.1f}"
    return f"{100 * difference.mean:+.1f}{interval}"
