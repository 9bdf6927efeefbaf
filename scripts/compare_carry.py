"""What carries a skill into a new base model: transports, a teacher, a few labels; on the embedded digits.

For every target and task each method is measured on the same 50 images (5 a class), with their labels or without, and
where it reads images without labels also on all 550 of the pool. The teacher is the fine-tuned source: its scores of
the ten digits on those images. Every setting of a method (scale, learning rate, epoch, factor) is a candidate, measured
on the validation and test images and by its distillation loss on the unlabelled images; which one counts is decided
afterwards by what the column has:

  0 labels a class   the least distillation loss, the teacher's cross-entropy, on the unlabelled images: no label at all
  5 labels a class   the greatest accuracy on 200 labelled validation images, the same for all methods, which are labels
                     beyond the 50

The least loss of a training on the very images that it was trained on takes what overfits, so distillation stands below
the table at the default rate and the last epoch too. Ties go to the first: the smaller scale or rate, fewer epochs. A
start's scale is that of the least distillation loss in both columns. Trainings have one budget from every start: 5
epochs of 20 steps of 50 images. What was settled beforehand (grids and budget; passes, mu and ridge are the library's
defaults) was looked at on thick and mirrored only; the tables are of the other tasks, then of all. A finished method is
written at once; a run that is started again goes on.

    python scripts/compare_carry.py --tasks thick --targets B
    python scripts/compare_carry.py --images 50 550
    python scripts/compare_carry.py --report          # Markdown of what is there
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import tvjax as tv
from compare_few_shot import adam, edited, leaves_of
from tvjax import tree
from tvjax.checkpoints.atomic import replacing
from tvjax.compose import class_scores, distillation, few_shot, train
from tvjax.compose.teachers import distillation_losses
from tvjax.demo.base import Embedded, Sets, draw_examples, named_key
from tvjax.demo.setup import QUICK, SOURCE, TARGETS, load, photographs, style_of
from tvjax.evaluate.accuracy import predict
from tvjax.report.measurements import Difference, in_order, paired_difference
from tvjax.stages import Batch, PyTree

TUNED_ON = ("thick", "mirrored")
TASKS = (*TUNED_ON, "ruled", "framed", "blurred", "upside_down")
IMAGES = (50, 550)
LABELS = (0, 5)
RATES, EPOCHS, STEPS, BATCH = (3e-4, 1e-3, 3e-3), 5, 20, 50
DEFAULT = [1e-3, float(EPOCHS)]  # rate and epoch of a training that nothing chooses for
FACTORS = (5.0, 10.0, 20.0)  # of one-hot labels, in the place of a teacher's logits
BASELINES = ("zero-shot", "few-shot fine-tuning")
SETTINGS = {
    "scales": QUICK.rotation_scales,
    "unit_scales": QUICK.unit_scales,
    "rates": RATES,
    "epochs": EPOCHS,
    "steps": STEPS,
    "batch": BATCH,
    "factors": FACTORS,
    "draw": 0,
}
ABOUT = {
    "labels": "a class that the column has; with 0 a setting is chosen by the teacher's loss, with 5 by the accuracy "
    "on 200 labelled validation images",
    "images": "unlabelled images that the column has; 50 are those that are labelled in the other columns",
    "candidates": "every setting: [setting, distillation loss, validation accuracy, test accuracy]",
    "over_pairs": "Student's t, 95 %, of the mean of paired differences over pairs of a task and a target; one draw",
    "over_tasks": "the same over tasks, the targets of a task averaged first",
    "own fine-tuning": "the target's own, on its labelled images of the whole pool: what no column has",
    "BiCo": "with centred rows, as tvjax transport takes it by itself",
    "seconds": "on a machine that others used too: no measure of speed",
}


class Candidate(NamedTuple):
    """One setting of a method, measured.

    Attributes:
      setting: scale, or rate and epoch, or factor; empty where there is nothing to set.
      loss: the teacher's cross-entropy on the unlabelled images.
      validation: accuracy.
      test: accuracy.
    """

    setting: list[float]
    loss: float
    validation: float
    test: float


class Cell(NamedTuple):
    """One method, measured."""

    target: str
    task: str
    images: int
    method: str


class Bench:
    """One task on one target with so many images; what several methods need is made once."""

    def __init__(self, source: Embedded, target: Embedded, task: str, sets: Sets, images: int):
        self.source, self.target, self.task, self.sets = source, target, task, sets
        self.model, self.tau = target.model, source.taus[task]
        few = draw_examples(sets.pool, task, 0, QUICK)
        self.few = Batch(jax.tree.map(jnp.asarray, few.inputs), jnp.asarray(few.labels))
        pool = jax.tree.map(jnp.asarray, sets.pool.inputs)
        self.images = self.few.inputs if images == len(few.labels) else pool
        self.key = named_key(QUICK.seed, f"carry {task}")

    @cached_property
    def unlabelled(self) -> list[Batch]:
        """The images, 50 at once."""
        count = jax.tree.leaves(self.images)[0].shape[0]
        starts = range(0, count, BATCH)
        return [Batch(jax.tree.map(lambda leaf: leaf[at : at + BATCH], self.images), None) for at in starts]  # noqa: B023

    @cached_property
    def teacher(self) -> np.ndarray:
        """The scores of the fine-tuned source."""
        model = self.source.model
        return class_scores(model.replace(params=tv.apply(model.params, self.tau)), self.unlabelled)

    @cached_property
    def seen(self) -> tuple[PyTree, np.ndarray, int]:
        """Validation and test images with their labels, and how many are for validation."""
        both = (self.sets.validation, self.sets.test)
        inputs = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(batch.inputs for batch in both))
        return inputs, np.concatenate([batch.labels for batch in both]), len(both[0].labels)

    def measure(self, params: PyTree, *setting: float) -> Candidate:
        """Edited parameters."""
        model, (inputs, labels, count) = self.model.replace(params=params), self.seen
        right = np.asarray(predict(model, inputs)) == labels
        loss = distillation_losses(class_scores(model, self.unlabelled), self.teacher).mean()
        return Candidate([*map(float, setting)], float(loss), float(right[:count].mean()), float(right[count:].mean()))

    def scaled(self, tau: PyTree, grid: tuple[float, ...] = QUICK.rotation_scales) -> list[Candidate]:
        """A task vector at every scale."""
        return [self.measure(edited(self.model.params, tau, scale), scale) for scale in grid]

    def moved(self, transport: tv.Transport, batches: list[Batch]) -> PyTree:
        """The task vector, as a transport moves it that is fitted on batches."""
        given = {"tau": self.tau} if transport.needs_task_vector else {}
        return transport.apply(tv.fit(transport, self.source.model, self.model, batches, **given), self.tau)

    @cached_property
    def bico(self) -> PyTree:
        """BiCo's vector, of the labelled images, with centred rows as `tvjax transport` takes it."""
        return self.moved(tv.bico(center=True), [self.few])

    @cached_property
    def ariadne(self) -> PyTree:
        """Ariadne's vector, of the unlabelled images."""
        return self.moved(tv.ariadne(), self.unlabelled)

    def start(self, tau: PyTree) -> PyTree:
        """A task vector times the scale of its least distillation loss."""
        grid = QUICK.rotation_scales
        scaled = [self.model.replace(params=edited(self.model.params, tau, scale)) for scale in grid]
        losses = [distillation_losses(class_scores(m, self.unlabelled), self.teacher).mean() for m in scaled]
        return tv.scale(tau, grid[int(np.argmin(losses))])

    def trained(self, objective: Any, tau: PyTree = None) -> list[Candidate]:
        """Adam on what the task vectors cover, from the target or from a start: every rate and epoch."""
        params = self.model.params if tau is None else tv.apply(self.model.params, tau)
        found: list[Candidate] = []

        def score(params: PyTree) -> float:
            rate, epoch = divmod(len(found), EPOCHS)
            found.append(self.measure(params, RATES[rate], epoch + 1))
            return found[-1].validation

        train(
            tree.replace, params, leaves_of(params, QUICK), objective, key=self.key, optimiser=adam,
            learning_rates=RATES, epochs=EPOCHS, batch_size=BATCH, batches_per_epoch=STEPS, score=score,
        )  # fmt: skip
        return found

    def corrected(self, tau: PyTree = None) -> list[Candidate]:
        """The closed form from the teacher's logits, from the target or from a start."""
        change = tv.logit_correction(self.model, self.teacher, self.unlabelled, start=tau)
        return [self.measure(tv.apply(self.model.params, change))]

    def corrected_by_labels(self) -> list[Candidate]:
        """The closed form with labels alone."""
        found = []
        for factor in FACTORS:
            wanted = factor * jax.nn.one_hot(self.few.labels, self.teacher.shape[1])
            change = tv.logit_correction(self.model, wanted, self.few)
            found.append(self.measure(tv.apply(self.model.params, change), factor))
        return found

    @cached_property
    def told(self) -> Any:
        """What a training from the teacher minimises."""
        return distillation(self.model, self.images, self.teacher)


class Method(NamedTuple):
    """A row of the table.

    Attributes:
      labels: a class that it reads.
      more: whether it reads more images than those with labels.
      one_shape: whether it needs a target of the source's shape.
      run: its candidates.
    """

    labels: int
    more: bool
    one_shape: bool
    run: Callable[[Bench], list[Candidate]]


METHODS: dict[str, Method] = {
    "zero-shot": Method(0, False, False, lambda b: [b.measure(b.model.params)]),
    "copy": Method(0, True, True, lambda b: b.scaled(b.tau, QUICK.unit_scales)),
    "GradFix": Method(5, False, True, lambda b: b.scaled(b.moved(tv.gradfix(), [b.few]), QUICK.unit_scales)),
    "Theseus": Method(0, True, False, lambda b: b.scaled(b.moved(tv.theseus(), b.unlabelled))),
    "BiCo": Method(5, False, False, lambda b: b.scaled(b.bico)),
    "Ariadne": Method(0, True, False, lambda b: b.scaled(b.ariadne)),
    "few-shot fine-tuning": Method(5, False, False, lambda b: b.trained(few_shot(b.model, b.few))),
    "logit correction, labels alone": Method(5, False, False, lambda b: b.corrected_by_labels()),
    "logit correction, teacher": Method(0, True, False, lambda b: b.corrected()),
    "BiCo, then logit correction, teacher": Method(5, True, False, lambda b: b.corrected(b.start(b.bico))),
    "Ariadne, then logit correction, teacher": Method(0, True, False, lambda b: b.corrected(b.start(b.ariadne))),
    "distillation": Method(0, True, False, lambda b: b.trained(b.told)),
    "BiCo, then distillation": Method(5, True, False, lambda b: b.trained(b.told, b.start(b.bico))),
    "Ariadne, then distillation": Method(0, True, False, lambda b: b.trained(b.told, b.start(b.ariadne))),
    "own fine-tuning": Method(0, False, False, lambda b: [b.measure(tv.apply(b.model.params, b.target.taus[b.task]))]),
}
STARTS = {  # what starts from a transport, and the same from the target as it is
    name: name.partition(", then ")[2] for name in METHODS if ", then " in name
}
Records = dict[Cell, dict[str, Any]]
Choice = Callable[[list[Candidate], int], Candidate]


def wanted(targets: list[str], tasks: list[str], images: list[int], methods: list[str]) -> list[Cell]:
    """The cells that there are to measure, fewer images first; what reads 50 at most stands there alone."""
    return [
        Cell(target, task, count, method)
        for count, task, target, method in product(sorted(images), tasks, targets, methods)
        if (count == min(IMAGES) or METHODS[method].more) and (target == TARGETS[0] or not METHODS[method].one_shape)
    ]


def chosen(candidates: list[Candidate], labels: int) -> Candidate:
    """The candidate that counts in a column."""
    by = [one.validation for one in candidates] if labels else [-one.loss for one in candidates]
    return candidates[int(np.argmax(by))]


def as_given(candidates: list[Candidate], labels: int = 0) -> Candidate:
    """The candidate that the commands take where nothing chooses: `DEFAULT`."""
    return next(one for one in candidates if one.setting == DEFAULT)


def accuracies(
    records: Records, method: str, labels: int, images: int, choice: Choice = chosen
) -> dict[tuple[str, str], float]:
    """The test accuracy of a method in a column, by task and target; empty where it is not of that column."""
    if METHODS[method].labels > labels:
        return {}
    return {
        (cell.task, cell.target): choice([Candidate(*one) for one in record["candidates"]], labels).test
        for cell, record in records.items()
        if (cell.method, cell.images) == (method, images)
    }


def difference(one: dict[tuple[str, str], float], other: dict[tuple[str, str], float]) -> dict[str, Any] | None:
    """The mean of paired differences, over pairs and over tasks; None without a pair."""
    by_task: dict[str, list[float]] = {}
    for pair in one.keys() & other.keys():
        by_task.setdefault(pair[0], []).append(one[pair] - other[pair])
    if not by_task:
        return None
    return {
        "over_pairs": paired_difference([gap for gaps in by_task.values() for gap in gaps])._asdict(),
        "over_tasks": paired_difference([float(np.mean(gaps)) for gaps in by_task.values()])._asdict(),
    }


def summary(records: Records) -> list[dict[str, Any]]:
    """Every method in every column: of the tasks that nothing was tuned on, and of all."""
    rows = []
    for scope, tasks in (("other tasks", set(TASKS) - set(TUNED_ON)), ("all tasks", set(TASKS))):
        some = {cell: record for cell, record in records.items() if cell.task in tasks}
        for (labels, images), method in product(product(LABELS, IMAGES), METHODS):
            found = accuracies(some, method, labels, images)
            if not found:
                continue
            row: dict[str, Any] = {"scope": scope, "labels": labels, "images": images, "method": method}
            row |= {"accuracy": float(np.mean([*found.values()])), "pairs": len(found)}
            for target in in_order(target for _, target in found):
                row[target] = float(np.mean([value for (_, at), value in found.items() if at == target]))
            for baseline in BASELINES:  # with 50 images, whatever the column
                if baseline != method:
                    other = accuracies(some, baseline, max(LABELS), min(IMAGES))
                    row[f"minus {baseline}"] = difference(found, other)
            if method in STARTS:
                row["minus its start from zero"] = difference(found, accuracies(some, STARTS[method], labels, images))
            if method.endswith("distillation"):  # the least loss of what was trained on takes what overfits
                taken = accuracies(some, method, labels, images, as_given)
                row["at the default rate"] = {
                    "accuracy": float(np.mean([*taken.values()])),
                    f"minus {BASELINES[1]}": difference(
                        taken, accuracies(some, BASELINES[1], max(LABELS), min(IMAGES))
                    ),
                }
                if method in STARTS:
                    zero = accuracies(some, STARTS[method], labels, images, as_given)
                    row["at the default rate"]["minus its start from zero"] = difference(taken, zero)
            rows.append(row)
    return rows


def shown(gap: dict[str, Any] | None) -> str:
    """A difference in points: its half widths over pairs and over tasks."""
    if gap is None:
        return ""
    pairs, tasks = (Difference(**gap[name]) for name in ("over_pairs", "over_tasks"))
    widths = ", ".join("-" if one.half_width is None else f"{100 * one.half_width:.1f}" for one in (pairs, tasks))
    return f"{100 * pairs.mean:+.1f} ({widths})"


def table(rows: list[dict[str, Any]], scope: str) -> str:
    """Markdown: accuracy in per cent, and the difference to few-shot fine-tuning, by column."""
    rows = [row for row in rows if row["scope"] == scope]
    columns = [column for column in product(LABELS, IMAGES) if any((r["labels"], r["images"]) == column for r in rows)]
    heads = [f"{labels} labels, {images} images | minus few-shot" for labels, images in columns]
    lines = [f"| {scope} | " + " | ".join(heads) + " |", "|---|" + "---:|---:|" * len(columns)]
    most = {column: max(r["pairs"] for r in rows if (r["labels"], r["images"]) == column) for column in columns}
    for method in (method for method in METHODS if any(row["method"] == method for row in rows)):
        line = []
        for column in columns:
            row = next((r for r in rows if (r["labels"], r["images"], r["method"]) == (*column, method)), None)
            if row is None:
                line += ["", ""]
                continue
            fewer = f" ({row['pairs']} pairs)" if row["pairs"] < most[column] else ""
            line += [f"{100 * row['accuracy']:.1f}{fewer}", shown(row.get(f"minus {BASELINES[1]}"))]
        lines.append(f"| {method} | " + " | ".join(line) + " |")
    pairs = ", ".join(f"{most[column]} with {column[0]} labels and {column[1]} images" for column in columns)
    lines.append(
        f"\nPairs of a task and a target: {pairs}. In brackets half 95 % intervals over pairs and over tasks.\n"
    )
    for row in (row for row in rows if row.get("minus its start from zero")):
        gap = shown(row["minus its start from zero"])
        pairs = row["minus its start from zero"]["over_pairs"]["pairs"]
        column = f"{row['labels']} labels, {row['images']} images"
        lines.append(f"- {row['method']}, minus the same from zero ({column}, {pairs} pair{'s' * (pairs > 1)}): {gap}")
    for row in (row for row in rows if "at the default rate" in row and not row["labels"]):
        found, gap = row["at the default rate"], shown(row["at the default rate"][f"minus {BASELINES[1]}"])
        start = shown(found.get("minus its start from zero"))
        lines.append(
            f"- {row['method']} at the default rate and the last epoch, {row['images']} images: "
            f"{100 * found['accuracy']:.1f}, minus few-shot {gap}" + (f", minus from zero {start}" if start else "")
        )
    return "\n".join(lines)


def read(path: Path) -> Records:
    """The records of a results file; none where there is no file.

    Raises:
      SystemExit: they were made with other settings.
    """
    if not path.exists():
        return {}
    content = json.loads(path.read_text())
    if content["settings"] != json.loads(json.dumps(SETTINGS)):
        raise SystemExit(f"{path} was made with other settings: give another --output")
    return {Cell(*cell.pop("cell")): cell for cell in content["cells"]}


def write(path: Path, records: Records) -> list[dict[str, Any]]:
    """Writes the records and what follows from them, replacing the file when it is complete."""
    rows = summary(records)
    versions = {name: importlib.metadata.version(name) for name in ("tvjax", "jax", "jaxlib", "optax", "numpy")}
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "backend": jax.default_backend()}
    content = {
        "summary": rows,
        "about": ABOUT,
        "settings": SETTINGS,
        "versions": {**versions, "python": platform.python_version(), **machine},
        "cells": [{"cell": cell, **record} for cell, record in records.items()],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n")
    return rows


def main() -> None:
    """Measures the cells that are missing, writes the results file, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/compare_carry.json"))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--images", nargs="+", type=int, default=list(IMAGES), choices=IMAGES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--report", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    records = read(arguments.output)
    cells = wanted(arguments.targets, arguments.tasks, arguments.images, arguments.methods)
    missing = [] if arguments.report else [cell for cell in cells if cell not in records]
    models = {name: load(name, TASKS) for name in (SOURCE, *arguments.targets)} if missing else {}
    sets = {task: photographs(task, style_of(task), QUICK) for task in in_order(cell.task for cell in missing)}
    bench: Bench | None = None
    place: tuple[str, str, int] | None = None
    for number, cell in enumerate(missing, 1):
        began = time.perf_counter()
        if bench is None or place != cell[:3]:
            bench, place = Bench(models[SOURCE], models[cell.target], cell.task, sets[cell.task], cell.images), cell[:3]
        found = METHODS[cell.method].run(bench)
        records[cell] = {"candidates": found, "seconds": round(time.perf_counter() - began, 1)}
        write(arguments.output, records)
        print(f"{number} of {len(missing)}: {' '.join(map(str, cell))}: {records[cell]['seconds']} s", flush=True)
    if records:
        rows = write(arguments.output, records)
        print(*(table(rows, scope) for scope in in_order(row["scope"] for row in rows)), sep="\n\n")


if __name__ == "__main__":
    main()
