"""What carries a skill into a new base model: transports, a teacher, a few labels; on the embedded digits.

For every target, task and draw each method is measured on the same 50 images (5 a class), with their labels or without,
where it reads images without labels also on all 550 of the pool (draw 0), and a few with 1 and 10 labels a class. The
teacher is the fine-tuned source: its scores of the ten digits on the unlabelled images. Every setting of a method
(scale, learning rate, epoch, factor) is a candidate, measured on the validation images and by its distillation loss on
the unlabelled images; which one counts is decided by what the column has:

  0 labels a class   the least distillation loss, the teacher's cross-entropy, on the unlabelled images: no label at all
  some               the greatest accuracy on 200 labelled validation images, the same for all methods, which are labels
                     beyond those of the column

The least loss of a training on the very images that it was trained on takes what overfits, so trainings from a teacher
stand below the table at the default rate and the last epoch too. Test images are looked at for these three alone. Ties
go to the first: the smaller scale or rate, fewer epochs. A start's scale is that of the least distillation loss in all
columns; coefficients start at the best vector and scale by their own objective. Trainings have one budget from every
start: 5 epochs of 20 steps of 50 images at three rates. What was settled beforehand (grids and budget; passes, mu and
ridge are the library's defaults) was looked at on thick and mirrored only; the tables are of the other tasks, then of
all.

Worker processes with a share of the cores each measure groups of one task and target; what matters most comes first
(`order`), so that a run that is cut off is balanced. A run that is started again goes on.

    python scripts/compare_carry.py --tasks thick --targets B --draws 0
    JAX_PLATFORMS=cpu python scripts/compare_carry.py --jobs 16 --seconds 400 --output OUT/compare_carry.json
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
from functools import cache
from itertools import product
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import jax

from carry.columns import LABELS, TASKS, USUAL, Cell, Records, summary, table
from carry.methods import BATCH, EPOCHS, FACTORS, IMAGES, METHODS, RATES, STEPS, Bench
from compare_few_shot import RATES as TUNE_RATES
from compare_few_shot import SHARE
from tvjax.checkpoints.atomic import replacing
from tvjax.demo.base import Embedded, Sets
from tvjax.demo.setup import QUICK, SOURCE, TARGETS, load, photographs, style_of
from tvjax.report.measurements import in_order

DRAWS = (0, 1, 2)
PAUSE = 15.0  # seconds between two writings of the file
SETTINGS = {
    "scales": QUICK.rotation_scales,
    "unit_scales": QUICK.unit_scales,
    "rates": RATES,
    "rates of coefficients": TUNE_RATES["coefficients"],
    "rate of leaves over that of coefficients": SHARE,
    "epochs": EPOCHS,
    "steps": STEPS,
    "batch": BATCH,
    "factors": FACTORS,
}
ABOUT = {
    "labels": "a class that the column has; with 0 a setting is chosen by the teacher's loss, else by the accuracy "
    "on 200 labelled validation images",
    "images": "unlabelled images that the column has; 50 are those that are labelled with 5 labels a class",
    "cell": "[target, task, draw, labels a class that the method reads, unlabelled images, method]",
    "candidates": "every setting: [setting, distillation loss, validation accuracy, test accuracy where it counts]",
    "minus": "paired by task, target and draw, with 50 images and the labels of the column (5 where it has none)",
    "over_pairs": "Student's t, 95 %, of the mean of paired differences over pairs of a task and a target, the draws "
    "of a pair averaged first",
    "over_tasks": "the same over tasks, the targets of a task averaged first",
    "by_target": "the same over the tasks of one target",
    "spread_over_draws": "of the difference: root of the mean over pairs of its variance over draws",
    "own fine-tuning": "the target's own, on its labelled images of the whole pool: what no column has",
    "BiCo": "with centred rows, as tvjax transport takes it by itself",
    "coefficients": "of Theseus and Ariadne, and of BiCo where there are labels",
    "seconds": "of processor time, with compilation where a worker compiles",
}


def wanted(targets: list[str], tasks: list[str], draws: list[int], images: list[int], methods: list[str]) -> list[Cell]:
    """The cells that there are to measure, in the order of `order`."""
    cells = [
        Cell(target, task, draw, labels, count, name)
        for target, task, draw, labels, count, name in product(targets, tasks, draws, LABELS, images, methods)
        if labels in ((LABELS[1:] if METHODS[name].few else (USUAL,)) if METHODS[name].labels else (0,))
        and (count == min(IMAGES) or (METHODS[name].more and labels in (0, USUAL) and draw == 0))
        and (target == TARGETS[0] or not METHODS[name].one_shape)
    ]
    return sorted(cells, key=lambda cell: (order(cell), tasks.index(cell.task), targets.index(cell.target)))


def order(cell: Cell) -> tuple[bool, int, bool]:
    """What comes first: what is read most, draw after draw, 50 images before 550; then the rest of the rows."""
    rest = METHODS[cell.method].late or cell.labels not in (0, USUAL)
    return rest, cell.draw, cell.images > min(IMAGES)


def groups_of(cells: list[Cell]) -> list[list[Cell]]:
    """The cells that one worker measures one after another, those with the same images together."""
    groups = itertools.groupby(cells, key=lambda cell: (order(cell), cell.task, cell.target))
    return [sorted(group, key=lambda cell: cell.labels) for _, group in groups]


def taken(groups: list[list[Cell]], target: str) -> list[Cell]:
    """Takes the next group, of those of the same order one of the target that is compiled already."""
    same = [group for group in groups if order(group[0]) == order(groups[0][0])]
    group = next((group for group in same if group[0].target == target), groups[0])
    groups.remove(group)
    return group


@cache
def embedded(name: str) -> Embedded:
    """A model, loaded once in each process."""
    return load(name, TASKS)


@cache
def images_of(task: str) -> Sets:
    """The photographs of a task."""
    return photographs(task, style_of(task), QUICK)


def work(connection: Connection, cores: list[int]) -> None:
    """What a worker does: measures the groups that it is sent, a cell at a time."""
    if cores:
        os.sched_setaffinity(0, cores)  # before JAX starts its threads
    while group := connection.recv():
        bench, place = None, None
        for cell in group:
            began = time.process_time()
            if bench is None or place != cell[:-1]:
                target, task, *numbers = place = cell[:-1]
                bench = Bench(embedded(SOURCE), embedded(target), task, images_of(task), *numbers)
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


def write(path: Path, records: Records) -> None:
    """Writes the records and what follows from them, replacing the file when it is complete."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax", "numpy")}
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "backend": jax.default_backend()}
    content = {
        "summary": summary(records),
        "about": ABOUT,
        "settings": SETTINGS,
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
    parser.add_argument("--output", type=Path, default=Path("results/compare_carry.json"))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--draws", nargs="+", type=int, default=list(DRAWS), choices=DRAWS)
    parser.add_argument("--images", nargs="+", type=int, default=list(IMAGES), choices=IMAGES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--jobs", type=int, default=1, help="worker processes")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many; a later run goes on")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    records = read(arguments.output)
    cells = wanted(arguments.targets, arguments.tasks, arguments.draws, arguments.images, arguments.methods)
    missing = [] if arguments.report else [cell for cell in cells if cell not in records]
    written = began
    finished = measured(groups_of(missing), arguments.jobs, began + arguments.seconds)
    for number, (cell, record) in enumerate(finished, 1):
        records[cell] = record
        print(f"{number} of {len(missing)}: {' '.join(map(str, cell))}: {record['seconds']} s", flush=True)
        if time.monotonic() - written > PAUSE:
            write(arguments.output, records)
            written = time.monotonic()
    if records:
        if not arguments.report:
            write(arguments.output, records)
        rows = summary(records)
        print(*(table(rows, scope) for scope in in_order(row["scope"] for row in rows)), sep="\n\n")


if __name__ == "__main__":
    main()
