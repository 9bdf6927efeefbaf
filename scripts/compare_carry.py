"""What carries a skill into a new base model: transports, a teacher, a few labels; on embedded models.

The sets of models are the CLIPs on handwritten digits and the language models on texts (`carry.models` has all that
differs). For every target, task and draw each method is measured on the same 50 examples, those of 5 labels a class
among them, with their labels or without, where it reads examples without labels also on the whole pool (draw 0), and a
few with 1 and 10 labels a class. The teacher is the fine-tuned source: its scores of the classes on the unlabelled
examples. Every setting of a method (scale, learning rate, epoch, factor) is a candidate, measured on the validation
examples and by its distillation loss on the unlabelled ones; which one counts is decided by what the column has:

  0 labels a class   the least distillation loss, the teacher's cross-entropy, on the unlabelled examples: no label
  some               the greatest accuracy on the labelled validation examples, the same for all methods, which are
                     labels beyond those of the column

The least loss of a training on the very examples that it was trained on takes what overfits, so trainings from a
teacher stand below the table at the default rate and the last epoch too. The test is looked at for these alone. Ties
go to the first: the smaller scale or rate, fewer epochs. A start's scale is that of the least distillation loss in all
columns; coefficients start at the best vector and scale by their own objective. Trainings have one budget from every
start: 5 epochs of 20 steps of 50 examples at three rates. What was settled beforehand (grids and budget; passes, mu
and ridge are the library's defaults) was looked at on thick and mirrored only; the tables are of the other tasks, then
of all.

Worker processes with a share of the cores each measure groups of one task and target; what matters most comes first
(`order`), so that a run that is cut off is balanced. A run that is started again goes on.

    python scripts/compare_carry.py --tasks thick --targets B --draws 0
    JAX_PLATFORMS=cpu python scripts/compare_carry.py --jobs 16 --seconds 400 --output OUT/compare_carry.json
    python scripts/compare_carry.py --models language --targets llama-B --tasks actions
    python scripts/compare_carry.py --report          # Markdown of what is there
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Iterator
from itertools import product
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import jax

from carry.columns import LABELS, USUAL, Cell, Records, summary, table
from carry.methods import BATCH, EPOCHS, FACTORS, METHODS, RATES, STEPS, Bench
from carry.models import FEW, SETS, Models, models_of
from compare_few_shot import RATES as TUNE_RATES
from compare_few_shot import SHARE
from tvjax.checkpoints.atomic import replacing
from tvjax.report.measurements import in_order

DRAWS = (0, 1, 2)
PAUSE = 15.0  # seconds between two writings of the file
ABOUT = {
    "labels": "a class that the column has; with 0 a setting is chosen by the teacher's loss, else by the accuracy "
    "on labelled validation examples",
    "cell": "[target, task, draw, labels a class that the method reads, unlabelled examples, method]",
    "candidates": "every setting: [setting, distillation loss, validation accuracy, test accuracy where it counts]",
    "minus": "paired by task, target and draw, with 50 unlabelled and the labels of the column (5 where it has none)",
    "over_pairs": "Student's t, 95 %, of the mean of paired differences over pairs of a task and a target, the draws "
    "of a pair averaged first",
    "over_tasks": "the same over tasks, the targets of a task averaged first",
    "by_target": "the same over the tasks of one target",
    "spread_over_draws": "of the difference: root of the mean over pairs of its variance over draws",
    "own fine-tuning": "the target's own, on many labelled examples: what no column has",
    "BiCo": "with centred rows, as tvjax transport takes it by itself",
    "coefficients": "of Theseus and Ariadne, and of BiCo where there are labels",
    "seconds": "of processor time, with compilation where a worker compiles",
}


def settings_of(models: Models) -> dict[str, Any]:
    """What the cells of a set have in common; those of a file have it too, or are of another measurement."""
    return {
        "scales": models.settings.rotation_scales,
        "unit_scales": models.settings.unit_scales,
        "rates": RATES,
        "rates of coefficients": TUNE_RATES["coefficients"],
        "rate of leaves over that of coefficients": SHARE,
        "epochs": EPOCHS,
        "steps": STEPS,
        "batch": BATCH,
        "factors": FACTORS,
    }


def wanted(
    targets: list[str], tasks: list[str], draws: list[int], unlabelled: list[int], methods: list[str]
) -> list[Cell]:
    """The cells that there are to measure, in the order of `order`."""
    cells = [
        Cell(target, task, draw, labels, count, name)
        for target, task, draw, labels, count, name in product(targets, tasks, draws, LABELS, unlabelled, methods)
        if labels in ((LABELS[1:] if METHODS[name].few else (USUAL,)) if METHODS[name].labels else (0,))
        and (count == FEW or (METHODS[name].more and labels in (0, USUAL) and draw == 0))
        and (target in models_of(target).one_shape or not METHODS[name].one_shape)
    ]
    return sorted(cells, key=lambda cell: (order(cell), tasks.index(cell.task), targets.index(cell.target)))


def order(cell: Cell) -> tuple[bool, int, bool]:
    """What comes first: what is read most, draw after draw, 50 examples before all; then the rest of the rows."""
    rest = METHODS[cell.method].late or cell.labels not in (0, USUAL)
    return rest, cell.draw, cell.unlabelled > FEW


def groups_of(cells: list[Cell]) -> list[list[Cell]]:
    """The cells that one worker measures one after another, those with the same examples together."""
    groups = itertools.groupby(cells, key=lambda cell: (order(cell), cell.task, cell.target))
    return [sorted(group, key=lambda cell: cell.labels) for _, group in groups]


def taken(groups: list[list[Cell]], target: str) -> list[Cell]:
    """Takes the next group, of those of the same order one of the target that is compiled already."""
    same = [group for group in groups if order(group[0]) == order(groups[0][0])]
    group = next((group for group in same if group[0].target == target), groups[0])
    groups.remove(group)
    return group


def work(connection: Connection, cores: list[int]) -> None:
    """What a worker does: measures the groups that it is sent, a cell at a time."""
    if cores:
        os.sched_setaffinity(0, cores)  # before JAX starts its threads
    while group := connection.recv():
        bench, place = None, None
        for cell in group:
            began = time.process_time()
            if bench is None or place != cell[:-1]:
                place = cell[:-1]
                bench = Bench(models_of(cell.target), *place)
            candidates = METHODS[cell.method].run(bench)
            connection.send((cell, {"candidates": candidates, "seconds": round(time.process_time() - began, 1)}))
        connection.send(None)


class Worker:
    """A process that measures on its share of the cores."""

    def __init__(self, cores: list[int]):
        context = multiprocessing.get_context("spawn")
        self.cores, self.target = cores, ""
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, cores), daemon=True)
        self.process.start()
        theirs.close()

    def send(self, group: list[Cell]) -> None:
        """Gives it what to measure."""
        self.target = group[0].target
        self.connection.send(group)


def shares(jobs: int) -> list[list[int]]:
    """The cores of each worker; empty where the system does not tell, and all run on all."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return [cores[job::jobs] or cores[job % max(len(cores), 1) :][:1] for job in range(jobs)]


def measured(groups: list[list[Cell]], jobs: int, end: float) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """The cells of the groups as they are finished, until the clock says `end`.

    A worker that dies takes the rest of its group with it; the others go on.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    idle = [Worker(cores) for cores in shares(jobs)[: len(groups)]]
    busy: dict[Connection, Worker] = {}
    while busy or groups:
        while idle and groups:
            worker = idle.pop(0)
            worker.send(taken(groups, worker.target))
            busy[worker.connection] = worker
        while idle:
            idle.pop().connection.send(None)  # nothing is left for it
        ready = wait(busy, timeout=min(max(0.0, end - time.monotonic()), 3600.0))
        if time.monotonic() >= end:
            break
        for connection in ready:
            try:
                found = connection.recv()
            except EOFError:
                worker = busy.pop(connection)
                print(f"a worker died on {worker.target}: the rest of its group is missing", flush=True)
                idle.append(Worker(worker.cores))
                continue
            if found is None:
                idle.append(busy.pop(connection))
            else:
                yield found
    for worker in busy.values():
        worker.process.terminate()


def read(path: Path, models: Models) -> Records:
    """The records of a results file; none where there is no file.

    Raises:
      SystemExit: they were made with other settings.
    """
    if not path.exists():
        return {}
    content = json.loads(path.read_text())
    if content["settings"] != json.loads(json.dumps(settings_of(models))):
        raise SystemExit(f"{path} was made with other settings: give another --output")
    return {Cell(*cell.pop("cell")): cell for cell in content["cells"]}


def write(path: Path, records: Records, models: Models) -> None:
    """Writes the records and what follows from them, replacing the file when it is complete."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax", "numpy")}
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "backend": jax.default_backend()}
    content = {
        "summary": summary(records, models),
        "about": models.about | ABOUT,
        "settings": settings_of(models),
        "versions": {**versions, "python": platform.python_version(), **machine},
        "cells": [{"cell": cell, **record} for cell, record in records.items()],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n")


def main() -> None:
    """Measures the cells that are missing, writes the results file, and prints the tables."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="clip", choices=SETS, help="which set")
    parser.add_argument("--output", type=Path, help="default: that of the set in results/")
    parser.add_argument("--targets", nargs="+", help="default: all of the set, as with what follows")
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--draws", nargs="+", type=int, default=list(DRAWS), choices=DRAWS)
    parser.add_argument("--unlabelled", nargs="+", type=int)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--jobs", type=int, default=1, help="worker processes")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many; a later run goes on")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    models = SETS[arguments.models]
    known = {"targets": list(models.sources), "tasks": list(models.tasks), "unlabelled": [FEW, models.pool]}
    chosen = {name: getattr(arguments, name) or values for name, values in known.items()}
    for name, values in known.items():
        if other := [value for value in chosen[name] if value not in values]:
            parser.error(f"--{name}: found {other}, expected some of {values} with --models {arguments.models}")
    output = arguments.output or Path("results", models.results)
    records = read(output, models)
    cells = wanted(chosen["targets"], chosen["tasks"], arguments.draws, chosen["unlabelled"], arguments.methods)
    missing = [] if arguments.report else [cell for cell in cells if cell not in records]
    written = began
    finished = measured(groups_of(missing), arguments.jobs, began + arguments.seconds)
    for number, (cell, record) in enumerate(finished, 1):
        records[cell] = record
        print(f"{number} of {len(missing)}: {' '.join(map(str, cell))}: {record['seconds']} s", flush=True)
        if time.monotonic() - written > PAUSE:
            write(output, records, models)
            written = time.monotonic()
    if records:
        if not arguments.report:
            write(output, records, models)
        rows = summary(records, models)
        print(*(table(rows, scope, models.kind) for scope in in_order(row["scope"] for row in rows)), sep="\n\n")


if __name__ == "__main__":
    main()
