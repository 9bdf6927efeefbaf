"""The experiment of the demo, and the files that it writes."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from tvjax.checkpoints.atomic import replacing
from tvjax.demo import base
from tvjax.demo.arithmetic import addition, analogies, negation
from tvjax.demo.setup import BASE, SOURCE, TARGETS, TITLES, Settings, load, photographs, style_of
from tvjax.demo.transports import EQUAL_SHAPES, Bench, Result, methods
from tvjax.evaluate.accuracy import Accuracy
from tvjax.evaluate.protocols import Edit
from tvjax.progress import Progress
from tvjax.report.measurements import (
    Comparison,
    Difference,
    Measurement,
    compare,
    difference_over_examples,
    in_order,
)
from tvjax.report.plots import Curve, plot_methods, plot_scales
from tvjax.stages import Batch
from tvjax.transport import State, summary

PACKAGES = ("tvjax", "jax", "jaxlib", "flax", "optax", "numpy", "transformers")
REPORTED = ("theseus", "bico+gradfix")  # the transports whose report by leaf is written, of the first task and draw
ABOUT = {
    "labels_per_class": "labelled training examples of each class that the method read; scales and few-shot "
    "hyperparameters were chosen on the same labelled validation examples for every method",
    "draw": "of the calibration examples; what they do not change (zero-shot, naive addition, orthogonal shift, own "
    "fine-tuning) was measured once and stands once for each draw, so that records pair",
    "alpha": "scale of the edit; 0 for zero-shot, 1 for fine-tuning",
    "intervals": "Student's t, 95 %, of the mean of paired differences (method minus baseline, same task and draw): "
    "mean +- t(0.975, n - 1) s / sqrt(n); over_pairs: n = tasks x draws, for these tasks; over_tasks: n = tasks, the "
    "draws of a task averaged first, for tasks like these; over_examples, of one draw only: the mean over tasks +- "
    "1.96 standard errors over n test examples, photographs of one digit averaged first, for these tasks and draw",
}

_SETS = ("calibration", "validation", "test")


class Findings(NamedTuple):
    """What the demo found.

    Attributes:
      settings: of the demo.
      titles: of the targets.
      kind: of the examples, in the plural.
      counts: how many there are, by task and set.
      measurements: the records.
      comparisons: every method against zero-shot and, at equal shapes, naive addition.
      curves: validation accuracy by scale.
      edits: the arithmetic.
      reports: reports by leaf, by title.
      seconds: it took.
      repeats: how often each test example is there.
    """

    settings: base.Settings
    titles: dict[str, str]
    kind: str
    counts: dict[str, dict[str, int]]
    measurements: list[Measurement]
    comparisons: list[Comparison]
    curves: list[Curve]
    edits: list[Edit]
    reports: dict[str, str]
    seconds: float
    repeats: int = 1


def run(settings: Settings, progress: Progress | None = None) -> Findings:
    """Measures everything on the digits; nothing is written.

    Args:
      settings: what to measure.
      progress: called with (steps done, steps in all, what was done).

    Raises:
      ValueError: for an unknown task, fewer than two tasks, or no draw.
    """
    if len(settings.tasks) < 2 or settings.draws < 1:
        raise ValueError(f"found {len(settings.tasks)} tasks and {settings.draws} draws, expected two and one at least")
    began = time.perf_counter()
    models = {name: load(name, settings.tasks) for name in (SOURCE, *TARGETS)}
    source = models[SOURCE]
    images = {name: photographs(name, style_of(name), settings) for name in (BASE, *settings.tasks)}
    benches = {
        (name, task): Bench(source, models[name], task, images[task], settings)
        for name in TARGETS
        for task in settings.tasks
    }
    found = measured(benches, TITLES, "photographs", progress, further=1)
    edits = [*addition(source, images, settings), *negation(source, images, settings), *analogies(source, settings)]
    if progress is not None:
        progress(len(benches) + 1, len(benches) + 1, "arithmetic")
    return found._replace(edits=edits, seconds=time.perf_counter() - began)


def measured(
    benches: Mapping[tuple[str, str], Bench],
    titles: dict[str, str],
    kind: str,
    progress: Progress | None = None,
    further: int = 0,
) -> Findings:
    """Measures every method on every target and task.

    Args:
      benches: by target and task, all of the same settings.
      titles: of the targets.
      kind: of the examples, in the plural.
      progress: called with (steps done, steps in all, what was done).
      further: steps that are still to come.
    """
    began = time.perf_counter()
    measurements: list[Measurement] = []
    curves: list[Curve] = []
    reports: dict[str, str] = {}
    right: dict[tuple[str, str, str], np.ndarray] = {}
    for step, ((name, task), bench) in enumerate(benches.items(), start=1):
        settings, order = bench.settings, methods(bench.settings)
        fixed = bench.without_examples()
        for draw in range(settings.draws):
            drawn, states = bench.with_examples(draw)
            results = sorted([*fixed, *drawn], key=lambda result: order.index(result.method))
            measurements += [_measurement(task, name, draw, result) for result in results]
            right |= {(name, result.method, task): result.right for result in results if settings.draws == 1}
            curves += [_curve(task, name, draw, result, settings) for result in results if result.curve]
            if draw == 0 and task == settings.tasks[0]:
                reports |= _reports(f"{titles[name]}, {task}", states)
        if progress is not None:
            progress(step, len(benches) + further, f"{titles[name]}, {task}")
    counts = {task: _counts(bench) for (_, task), bench in benches.items()}
    seconds = time.perf_counter() - began
    compared = comparisons(measurements, right)
    repeats = max(bench.examples.repeats for bench in benches.values())
    return Findings(settings, titles, kind, counts, measurements, compared, curves, [], reports, seconds, repeats)


def comparisons(
    measurements: list[Measurement], right: Mapping[tuple[str, str, str], np.ndarray] | None = None
) -> list[Comparison]:
    """Every method minus zero-shot, and minus naive addition where that was measured.

    Args:
      measurements: of all methods.
      right: of one draw, by target, method and task: which test examples are right.
    """
    found = []
    for target in in_order(m.target for m in measurements):
        methods = in_order(m.method for m in measurements if m.target == target)
        for baseline in ("zero_shot", "naive"):
            others = [method for method in methods if method not in ("zero_shot", baseline)]
            found += [compare(measurements, target, m, baseline) for m in others if baseline in methods]
    return [_over_examples(comparison, right) for comparison in found] if right else found


def _over_examples(comparison: Comparison, right: Mapping[tuple[str, str, str], np.ndarray]) -> Comparison:
    """A comparison with the interval over test examples."""
    target, *pair = comparison[:3]
    tasks = [task for name, method, task in right if (name, method) == (target, pair[0])]
    sides = [[right[target, method, task] for task in tasks] for method in pair]
    return comparison._replace(over_examples=difference_over_examples(sides[0], sides[1]))


def write(findings: Findings, folder: str | os.PathLike[str]) -> list[Path]:
    """Writes ``results.json``, two plots and the reports by leaf, each file replaced when it is complete.

    Returns:
      The files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / name for name in ("results.json", "accuracy.png", "scales.png", "leaf_report.txt")}
    _write_text(files["results.json"], json.dumps(results(findings), indent=1) + "\n")
    plot_methods(findings.measurements, files["accuracy.png"], findings.titles)
    plot_scales(findings.curves, files["scales.png"], findings.titles)
    reports = (f"{title}\n\n{text}\n" for title, text in findings.reports.items())
    _write_text(files["leaf_report.txt"], "\n".join(reports))
    return list(files.values())


def footnotes(findings: Findings) -> list[str]:
    """What the tables are of, in a few lines."""
    settings, kind = findings.settings, findings.kind
    sets = {name: sorted({of_task[name] for of_task in findings.counts.values()}) for name in _SETS}
    counts = {name: " to ".join(map(str, sorted({found[0], found[-1]}))) for name, found in sets.items()}
    lines = [
        f"Accuracy in per cent on {counts['test']} test {kind} a task; scales and few-shot hyperparameters chosen "
        f"on the same {counts['validation']} labelled validation {kind} for every method.",
        f"Fitted on {counts['calibration']} {kind}, {settings.labels_per_class} a class (Theseus: no labels); "
        f"{settings.draws} draw(s).",
    ]
    if settings.draws > 1:
        return [*lines, "± is the standard deviation over draws, in a difference half its 95 % interval over pairs."]
    least = min(of_task["test"] for of_task in findings.counts.values()) // findings.repeats
    low, high = Accuracy(least // 2, least).interval()
    return [
        *lines,
        f"± is half the 95 % interval of a paired difference over test {kind}, for these tasks and this draw; of one "
        f"accuracy it is at most ± {50 * (high - low):.1f} (Wilson). tvjax demo --full measures other draws and tasks.",
    ]


def results(findings: Findings) -> dict[str, object]:
    """The content of ``results.json``."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "records": [measurement._asdict() for measurement in findings.measurements],
        "settings": {**dataclasses.asdict(findings.settings), findings.kind: findings.counts},
        "versions": {**versions, "python": platform.python_version(), "backend": jax.default_backend()},
        "seconds": round(findings.seconds, 2),
        "peak_memory_gib": round(_peak_memory_gib(), 3),
        "about": ABOUT,
        "comparisons": [
            {key: value._asdict() if isinstance(value, Difference) else value for key, value in c._asdict().items()}
            for c in findings.comparisons
        ],
        "arithmetic": [edit._asdict() for edit in findings.edits],
        "curves": [curve._asdict() for curve in findings.curves],
    }


def _peak_memory_gib() -> float:
    """Peak resident memory of this process so far; the system counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if platform.system() == "Darwin" else peak / 2**20


def _measurement(task: str, target: str, draw: int, result: Result) -> Measurement:
    return Measurement(task, target, result.method, result.labels_per_class, draw, result.alpha, result.accuracy)


def _curve(task: str, target: str, draw: int, result: Result, settings: base.Settings) -> Curve:
    grid = settings.unit_scales if result.method in EQUAL_SHAPES else settings.rotation_scales
    return Curve(task, target, result.method, draw, grid, result.curve)


def _counts(bench: Bench) -> dict[str, int]:
    pool, validation, test = bench.examples[:3]
    calibration = bench.settings.labels_per_class * len(np.unique(pool.labels))
    return dict(zip(_SETS, (calibration, _count(validation), _count(test)), strict=True))


def _count(batches: Batch | Sequence[Batch]) -> int:
    return sum(len(batch.labels) for batch in ([batches] if isinstance(batches, Batch) else batches))


def _reports(title: str, states: dict[str, State]) -> dict[str, str]:
    return {f"{title}: {method}": summary(states[method]) for method in REPORTED}


def _write_text(file: Path, text: str) -> None:
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
