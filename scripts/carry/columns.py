"""The columns of the table: which candidate counts in them, how methods are paired, and the table in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from carry.methods import BASELINES, METHODS, Candidate, as_given, chosen
from carry.models import FEW, Models
from tvjax.report.measurements import Difference, in_order, paired_difference

LABELS = (0, 1, 5, 10)  # a class
USUAL = 5  # of them, where there are any; what a column without labels is compared with


class Cell(NamedTuple):
    """One method, measured.

    Attributes:
      target: name of the model that is edited.
      task: name of the task.
      draw: of the examples.
      labels: a class that the method reads.
      unlabelled: examples without labels.
      method: name of the method.
    """

    target: str
    task: str
    draw: int
    labels: int
    unlabelled: int
    method: str


Records = dict[Cell, dict[str, Any]]
Choice = Callable[[list[Candidate], int], Candidate]
Accuracies = dict[tuple[str, str, int], float]  # by task, target and draw


def accuracies(records: Records, method: str, labels: int, unlabelled: int, choice: Choice = chosen) -> Accuracies:
    """The test accuracy of a method in a column; empty where it is not of that column."""
    read = labels if METHODS[method].labels else 0
    if METHODS[method].labels and not labels:
        return {}
    found = {
        (cell.task, cell.target, cell.draw): choice([Candidate(*one) for one in record["candidates"]], labels).test
        for cell, record in records.items()
        if (cell.method, cell.labels, cell.unlabelled) == (method, read, unlabelled)
    }
    assert None not in found.values()
    return found  # type: ignore[return-value]


def by_pair(values: Accuracies) -> dict[tuple[str, str], list[float]]:
    """The draws of every pair of a task and a target."""
    pairs: dict[tuple[str, str], list[float]] = {}
    for (task, target, _), value in values.items():
        pairs.setdefault((task, target), []).append(value)
    return pairs


def average(values: Accuracies) -> float:
    """The mean over pairs, the draws of a pair averaged first."""
    return float(np.mean([np.mean(draws) for draws in by_pair(values).values()]))


def difference(one: Accuracies, other: Accuracies) -> dict[str, Any] | None:
    """The mean of paired differences, over pairs, tasks and each target's tasks, and the spread over draws.

    None without a pair.
    """
    pairs = by_pair({key: one[key] - other[key] for key in one if key in other})
    if not pairs:
        return None
    means = {pair: float(np.mean(draws)) for pair, draws in pairs.items()}
    by_task: dict[str, list[float]] = {}
    by_target: dict[str, list[float]] = {}
    for (task, target), mean in means.items():
        by_task.setdefault(task, []).append(mean)
        by_target.setdefault(target, []).append(mean)
    spreads = [np.var(draws, ddof=1) for draws in pairs.values() if len(draws) > 1]
    return {
        "over_pairs": paired_difference([*means.values()])._asdict(),
        "over_tasks": paired_difference([float(np.mean(gaps)) for gaps in by_task.values()])._asdict(),
        "by_target": {target: paired_difference(gaps)._asdict() for target, gaps in by_target.items()},
        "spread_over_draws": float(np.sqrt(np.mean(spreads))) if spreads else None,
        "draws": max(map(len, pairs.values())),
    }


def summary(records: Records, models: Models) -> list[dict[str, Any]]:
    """Every method in every column: of the tasks that nothing was tuned on, where there are others, and of all."""
    rows = []
    others = [task for task in models.tasks if task not in models.tuned_on]
    for scope, tasks in {"other tasks": others if models.tuned_on else [], "all tasks": models.tasks}.items():
        some = {cell: record for cell, record in records.items() if cell.task in tasks}
        read = {0} | {cell.labels for cell in some}  # what no method read makes no column
        columns = product(sorted(read), sorted({cell.unlabelled for cell in some}))
        for (labels, unlabelled), method in product(columns, METHODS):
            found = accuracies(some, method, labels, unlabelled)
            if found:
                row = {"scope": scope, "labels": labels, "unlabelled": unlabelled, "method": method}
                rows.append(row | compared(some, method, labels, unlabelled, found))
    return rows


def compared(records: Records, method: str, labels: int, unlabelled: int, found: Accuracies) -> dict[str, Any]:
    """What a row says: mean accuracy, by target too, and differences to the baselines."""
    pairs, zero = by_pair(found), METHODS[method].zero
    row: dict[str, Any] = {"accuracy": average(found), "pairs": len(pairs), "draws": max(map(len, pairs.values()))}
    for target in in_order(target for _, target in pairs):
        row[target] = average({key: value for key, value in found.items() if key[1] == target})
    others = {name: accuracies(records, name, labels or USUAL, FEW) for name in BASELINES}
    for baseline in BASELINES:
        if baseline != method:
            row[f"minus {baseline}"] = difference(found, others[baseline])
    if zero is not None:
        row["minus its start from zero"] = difference(found, accuracies(records, zero, labels, unlabelled))
    if METHODS[method].is_training:  # the least loss of what was trained on takes what overfits
        taken = accuracies(records, method, labels, unlabelled, as_given)
        given: dict[str, Any] = {"accuracy": average(taken)}
        given[f"minus {BASELINES[1]}"] = difference(taken, others[BASELINES[1]])
        if zero is not None:
            from_zero = accuracies(records, zero, labels, unlabelled, as_given)
            given["minus its start from zero"] = difference(taken, from_zero)
        row["at the default rate"] = given
    return row


def shown(gap: dict[str, Any] | None) -> str:
    """A difference in points: its half widths over pairs and over tasks."""
    if gap is None:
        return ""
    pairs, tasks = (Difference(**gap[name]) for name in ("over_pairs", "over_tasks"))
    widths = ", ".join("-" if one.half_width is None else f"{100 * one.half_width:.1f}" for one in (pairs, tasks))
    return f"{100 * pairs.mean:+.1f} ({widths})"


def table(rows: list[dict[str, Any]], scope: str, kind: str) -> str:
    """Markdown: accuracy in per cent, and the difference to few-shot fine-tuning, by column; `kind` of examples."""
    rows = [row for row in rows if row["scope"] == scope]
    usual = [row for row in rows if row["labels"] in (0, USUAL)]
    few = [row for row in rows if row["labels"] and row["unlabelled"] == FEW]
    methods = [name for name, method in METHODS.items() if method.few or not method.labels]
    parts = [grid(usual, scope, kind, METHODS)]
    parts.append(grid([row for row in few if row["method"] in methods], scope, kind, methods))
    return "\n\n".join([*parts, "\n".join(remarks(usual, kind))])


def grid(rows: list[dict[str, Any]], scope: str, kind: str, methods: Iterable[str]) -> str:
    """The methods by columns."""
    columns = sorted({(row["labels"], row["unlabelled"]) for row in rows})
    heads = [f"{labels} labels, {unlabelled} {kind} | minus few-shot" for labels, unlabelled in columns]
    lines = [f"| {scope} | " + " | ".join(heads) + " |", "|---|" + "---:|---:|" * len(columns)]
    most = {column: max(r["pairs"] for r in rows if (r["labels"], r["unlabelled"]) == column) for column in columns}
    for method in (method for method in methods if any(row["method"] == method for row in rows)):
        line = []
        for column in columns:
            row = next((r for r in rows if (r["labels"], r["unlabelled"], r["method"]) == (*column, method)), None)
            if row is None:
                line += ["", ""]
                continue
            fewer = f" ({row['pairs']} pairs)" if row["pairs"] < most[column] else ""
            line += [f"{100 * row['accuracy']:.1f}{fewer}", shown(row.get(f"minus {BASELINES[1]}"))]
        lines.append(f"| {method} | " + " | ".join(line) + " |")
    counts = [f"{most[column]} with {column[0]} labels and {column[1]} {kind}" for column in columns]
    lines.append("\nPairs of a task and a target: " + ", ".join(counts))
    lines.append("In brackets half 95 % intervals over pairs and over tasks.")
    return "\n".join(lines)


def remarks(rows: list[dict[str, Any]], kind: str) -> list[str]:
    """What the grid has no place for: starts against zero, and distillation that nothing chooses for."""
    lines = []
    for row in (row for row in rows if row.get("minus its start from zero")):
        gap = row["minus its start from zero"]
        column = f"{row['labels']} labels, {row['unlabelled']} {kind}, {gap['over_pairs']['pairs']} pairs"
        lines.append(f"- {row['method']}, minus the same from zero ({column}): {shown(gap)}")
    for row in (row for row in rows if "at the default rate" in row and not row["labels"]):
        found, gap = row["at the default rate"], shown(row["at the default rate"][f"minus {BASELINES[1]}"])
        start = shown(found.get("minus its start from zero"))
        lines.append(
            f"- {row['method']} at the default rate and the last epoch, {row['unlabelled']} {kind}: "
            f"{100 * found['accuracy']:.1f}, minus few-shot {gap}" + (f", minus from zero {start}" if start else "")
        )
    return lines
