"""Few labels on the embedded digits: learned coefficients of transported task vectors beside few-shot fine-tuning.

For every target, task, number of labels per class and draw, each method is trained on the same labelled photographs of
the task with every candidate of its hyperparameters (learning rate, epoch, scale), and each candidate is measured on
the validation and on the test photographs. Which candidate counts is decided afterwards, by one of three rules that
hold for all methods alike:

  validation  the greatest accuracy on 200 labelled validation photographs, 20 a class (beyond the training labels);
  as many     the greatest accuracy on as many labelled validation photographs as there are training ones, so that
              n labels a class in training cost 2n labels a class in all;
  none        the candidate with the greatest mean validation accuracy on the other tasks, targets alike: no validation
              label of the task at hand. Needs two tasks.

Ties go to the first candidate: the smaller learning rate, the fewer epochs, the smaller scale. What starts from BiCo's
vector starts at the scale of the least loss on the training labels, and what starts from learned coefficients at those
of the last epoch at learning rate 0.1, so no rule borrows labels from another. Every finished cell is written at once;
a run that is started again goes on with the cells that are missing.

    python scripts/compare_few_shot.py --quick
    python scripts/compare_few_shot.py --tasks mirrored thick upside_down blurred --draws 5
    python scripts/compare_few_shot.py --report          # tables of what is there
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tvjax import tree
from tvjax.arithmetic import apply
from tvjax.checkpoints.atomic import replacing
from tvjax.compose import Coefficients, Trained, best_start, few_shot, init, learn, train, tune
from tvjax.demo.base import Embedded, Sets, draw_examples, named_key
from tvjax.demo.setup import QUICK, SOURCE, TARGETS, Settings, load, photographs, style_of
from tvjax.evaluate.accuracy import predict
from tvjax.report.measurements import Measurement, in_order, paired_difference
from tvjax.stages import Batch, Model, PyTree
from tvjax.transport import bico, chain, fit, gradfix, orthogonal_shift, theseus

LABELS = (1, 2, 5, 10, 20)
RULES = ("validation", "as many", "none")
METHODS = {
    "zero_shot": "the target as it is",
    "bico": "the transported vector at one scale",
    "fine_tune": "fine-tuning the target",
    "bico, fine_tune": "fine-tuning that starts from the transported model",
    "coefficients of bico": "a coefficient a leaf of the BiCo vector, from 0",
    "coefficients of all": "a coefficient a leaf of every transport of the one task vector, from 0",
    "bico, coefficients of all": "as coefficients of all, from BiCo's scale",
    "bico, coefficients of all, fine_tune": "fine-tuning that starts from the learned coefficients",
    "bico, coefficients and fine_tune": "coefficients of all and a fine-tuning, trained at once, from BiCo's scale",
}
BASELINES = ("fine_tune", "bico, fine_tune")
RATES = {"coefficients": (0.03, 0.1, 0.3), "fine_tune": (3e-4, 1e-3, 3e-3), "both": (0.03, 0.1, 0.3)}
SHARE = 0.01  # learning rate of the leaves in terms of that of the coefficients, where both are trained
ABOUT = {
    "labels_per_class": "labelled training photographs of each class; zero-shot reads none of them",
    "rule": "how the candidate was chosen, see the top of scripts/compare_few_shot.py",
    "labels_in_all": "labels per class that the method and the choice of its candidate read together",
    "candidates": "of every cell and method: accuracy on validation subsets of that many photographs a class (nested), "
    "and on the test photographs",
    "intervals": "Student's t, 95 %, of the mean of paired differences over targets, tasks and draws",
}


class Candidate(NamedTuple):
    """One setting of a method, measured.

    Attributes:
      setting: what it is, equal for equal settings in other cells.
      validation: accuracy on nested subsets of the validation photographs, by photographs a class.
      test: accuracy on the test photographs.
    """

    setting: list[float]
    validation: dict[str, float]
    test: float


class Cell(NamedTuple):
    """What is measured together."""

    target: str
    task: str
    labels: int
    draw: int


class Bench:
    """One target and one task: photographs, models, and the measuring of candidates."""

    def __init__(self, source: Embedded, target: Embedded, task: str, images: Sets, settings: Settings):
        self.source, self.target, self.task, self.images, self.settings = source, target, task, images, settings
        both = (images.validation, images.test)
        self.seen = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(batch.inputs for batch in both))
        self.truth = np.concatenate([batch.labels for batch in both])
        labels = np.asarray(images.validation.labels)
        order = np.argsort(labels, kind="stable")
        self.rank = np.empty(len(labels), int)  # of each validation photograph within its class
        self.rank[order] = np.concatenate([np.arange(n) for n in np.bincount(labels)])

    @property
    def model(self) -> Model:
        """The target."""
        return self.target.model

    def measure(self, setting: Iterable[float], params: PyTree) -> Candidate:
        """The accuracy of edited parameters."""
        right = np.asarray(predict(self.model.replace(params=params), self.seen)) == self.truth
        validation, test = np.split(right, [len(self.rank)])
        subsets = {str(n): float(validation[self.rank < n].mean()) for n in LABELS}
        return Candidate([float(value) for value in setting], subsets, float(test.mean()))

    def scaled(self, tau: PyTree) -> list[Candidate]:
        """A vector at every scale of the grid."""
        scales = self.settings.rotation_scales
        return [self.measure([scale], edited(self.model.params, tau, scale)) for scale in scales]

    def trained(
        self, kind: str, training: Callable[..., Trained], examples: Batch, epochs: int, key: jax.Array
    ) -> tuple[list[Candidate], PyTree]:
        """Every learning rate and epoch of a training, and the parameters at the end of learning rate 0.1."""
        found: list[Candidate] = []
        rates = sorted(RATES[kind])
        ends = {}

        def score(params: PyTree) -> float:
            rate, epoch = divmod(len(found), epochs)
            found.append(self.measure([rates[rate], epoch + 1], params))
            ends[rates[rate]] = params
            return found[-1].validation[str(max(LABELS))]

        training(
            objective=few_shot(self.model, examples), key=key, learning_rates=rates, epochs=epochs,
            batch_size=None if len(examples.labels) <= 50 else 50, batches_per_epoch=20, score=score,
        )  # fmt: skip
        return found, ends.get(0.1)


def adam(learning_rate: Callable[[jax.Array], jax.Array]) -> optax.GradientTransformation:
    return optax.adam(learning_rate)


@jax.jit
def edited(params: PyTree, tau: PyTree, scale: float) -> PyTree:
    return apply(params, tau, scale)


def transports(bench: Bench, examples: Batch) -> dict[str, PyTree]:
    """Every transport of the task vector, BiCo's first."""
    source, target = bench.source.model, bench.target.model
    tau = bench.source.taus[bench.task]
    labelled = fit(chain(bico(), gradfix()), source, target, [examples], task=bench.task)
    unlabelled = fit(theseus(), source, target, [examples])
    rotation, mask = labelled.parts
    states = {
        "bico": (bico(), (rotation,)),
        "bico+gradfix": (chain(bico(), gradfix()), (rotation, mask)),
        "theseus": (theseus(), unlabelled.parts),
        "theseus+gradfix": (chain(theseus(), gradfix()), (*unlabelled.parts, mask)),
    }
    same = jax.tree.map(jnp.shape, tau) == jax.tree.map(jnp.shape, bench.target.taus[bench.task])
    if same:
        states["gradfix"] = (gradfix(), (mask,))
    found = {
        name: jax.jit(transport.apply)(dataclasses.replace(labelled, parts=parts), tau)
        for name, (transport, parts) in states.items()
    }
    if same:
        shift = orthogonal_shift()
        found |= {"naive": tau, "orthogonal_shift": shift.apply(fit(shift, source, target, []), tau)}
    return found


def run_cell(bench: Bench, cell: Cell, epochs: int) -> dict[str, list[Candidate]]:
    """All methods on one draw of labelled photographs."""
    settings = dataclasses.replace(bench.settings, labels_per_class=cell.labels)
    examples = draw_examples(bench.images.pool, cell.task, cell.draw, settings)
    examples = Batch(jax.tree.map(jnp.asarray, examples.inputs), jnp.asarray(examples.labels))
    params = bench.model.params
    vectors = transports(bench, examples)
    key = named_key(settings.seed + cell.draw, f"few-shot {cell.task}")
    found: dict[str, list[Candidate]] = {"zero_shot": [bench.measure([], params)]}
    found["bico"] = bench.scaled(vectors["bico"])
    objective, scales = few_shot(bench.model, examples), settings.rotation_scales
    scale = float(best_start(params, [vectors["bico"]], objective, key=key, scales=scales).values[0, 0, 0])
    start = edited(params, vectors["bico"], scale)

    def fine_tuning(start: PyTree) -> list[Candidate]:
        leaves = leaves_of(start, settings)
        training = partial(train, tree.replace, start, leaves, optimiser=adam)
        return bench.trained("fine_tune", training, examples, epochs, key)[0]

    def coefficients(taus: dict[str, PyTree], scale: float) -> tuple[list[Candidate], PyTree]:
        training = partial(learn, params, list(taus.values()), coefficients=beginning(taus, scale))
        return bench.trained("coefficients", training, examples, epochs, key)

    only = {"bico": vectors["bico"]}
    found["fine_tune"] = fine_tuning(params)
    found["bico, fine_tune"] = fine_tuning(start)
    found["coefficients of bico"], _ = coefficients(only, 0.0)
    found["coefficients of all"], _ = coefficients(vectors, 0.0)
    found["bico, coefficients of all"], learned = coefficients(vectors, scale)
    found["bico, coefficients of all, fine_tune"] = fine_tuning(learned)
    begin, leaves = beginning(vectors, scale), settings.trainable
    both = partial(tune, params, list(vectors.values()), coefficients=begin, leaves=leaves, share=SHARE)
    found["bico, coefficients and fine_tune"], _ = bench.trained("both", both, examples, epochs, key)
    assert found.keys() == METHODS.keys()
    return found


def beginning(taus: dict[str, PyTree], scale: float) -> Coefficients:
    """Coefficients at which the BiCo vector has a scale, and the others 0."""
    coefficients = init(list(taus.values()), names=list(taus))
    row = list(taus).index("bico")
    return dataclasses.replace(coefficients, values=coefficients.values.at[row].set(scale))


def leaves_of(params: PyTree, settings: Settings) -> dict[str, jax.Array]:
    """The leaves that fine-tuning trains: those that the task vectors cover."""
    flat = tree.flatten(params)
    return {path: flat[path] for pattern in settings.trainable for path in tree.match(list(flat), pattern)}


def best(candidates: list[Candidate], subset: str) -> int:
    """The candidate of the greatest accuracy on a validation subset, the first of those that tie."""
    return int(np.argmax([candidate.validation[subset] for candidate in candidates]))


def chosen(results: dict[Cell, dict[str, list[Candidate]]], rule: str) -> Iterator[dict[str, Any]]:
    """The record of every cell and method under one rule; nothing where the rule has nothing to go by."""
    tasks = in_order(cell.task for cell in results)
    if rule == "none" and len(tasks) < 2:
        return
    full = str(max(LABELS))
    means: dict[tuple[str, str, int, str], list[np.ndarray]] = defaultdict(list)
    for cell, methods in results.items():
        for method, candidates in methods.items():
            curve = np.array([candidate.validation[full] for candidate in candidates])
            for task in tasks:
                if task != cell.task:
                    means[task, cell.target, cell.labels, method].append(curve)
    for cell, methods in results.items():
        for method, candidates in methods.items():
            if rule == "none":
                if not means[cell.task, cell.target, cell.labels, method]:
                    continue  # no other task of this target was measured yet
                index = int(np.mean(means[cell.task, cell.target, cell.labels, method], axis=0).argmax())
            else:
                index = best(candidates, full if rule == "validation" else str(cell.labels))
            one = candidates[index]
            extra = {"validation": max(LABELS), "as many": cell.labels, "none": 0}[rule] if len(candidates) > 1 else 0
            labels = 0 if method == "zero_shot" else cell.labels
            alpha = one.setting[0] if method == "bico" else float(method != "zero_shot")
            record = Measurement(cell.task, cell.target, method, labels, cell.draw, alpha, one.test)
            about = {"rule": rule, "labels": cell.labels, "labels_in_all": labels + extra, "setting": one.setting}
            yield {**record._asdict(), **about}


def comparisons(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every method against the baselines, for every rule and number of labels, paired by target, task and draw."""
    table: dict[tuple[str, int, str], dict[tuple[str, str, int], float]] = defaultdict(dict)
    for r in records:
        table[r["rule"], r["labels"], r["method"]][r["target"], r["task"], r["draw"]] = r["accuracy"]
    found = []
    for (rule, labels, method), values in table.items():
        row = {
            "rule": rule,
            "labels_per_class": labels,
            "method": method,
            "accuracy": float(np.mean([*values.values()])),
        }
        for baseline in BASELINES:
            other = table[rule, labels, baseline]
            row[f"minus {baseline}"] = paired_difference([values[k] - other[k] for k in other])._asdict()
        found.append(row)
    return found


def print_tables(rows: list[dict[str, Any]]) -> None:
    """For every rule: accuracy in per cent by method and labels, and the difference to fine-tuning."""
    for rule in in_order(row["rule"] for row in rows):
        labels = sorted({row["labels_per_class"] for row in rows if row["rule"] == rule})
        pairs = next(row for row in rows if row["rule"] == rule)[f"minus {BASELINES[0]}"]["pairs"]
        print(f"\nchosen by: {rule}; {pairs} pairs; in brackets minus {BASELINES[0]}, with its 95 % interval")
        print(f"{'labels per class':44}" + "".join(f"{n:>22}" for n in labels))
        for method in METHODS:
            cells = []
            for n in labels:
                row = next(r for r in rows if (r["rule"], r["labels_per_class"], r["method"]) == (rule, n, method))
                gap = row[f"minus {BASELINES[0]}"]
                width = "" if gap["half_width"] is None else f" ±{100 * gap['half_width']:4.1f}"
                cells.append(f"{100 * row['accuracy']:6.1f} ({100 * gap['mean']:+5.1f}{width})")
            print(f"{method:44}" + "".join(f"{cell:>22}" for cell in cells))


def read(path: Path) -> dict[Cell, dict[str, list[Candidate]]]:
    """The cells of a results file; none where there is no file."""
    if not path.exists():
        return {}
    found = {}
    for entry in json.loads(path.read_text())["candidates"]:
        methods = {method: [Candidate(*c) for c in candidates] for method, candidates in entry["methods"].items()}
        found[Cell(*entry["cell"])] = methods
    return found


def write(
    path: Path, results: dict[Cell, dict[str, list[Candidate]]], settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Writes records, comparisons and candidates, replacing the file when it is complete; returns the comparisons."""
    records = [record for rule in RULES for record in chosen(results, rule)]
    rows = comparisons(records)
    versions = {name: importlib.metadata.version(name) for name in ("tvjax", "jax", "jaxlib", "optax", "numpy")}
    content = {
        "records": records,
        "comparisons": rows,
        "settings": settings,
        "versions": {**versions, "python": platform.python_version(), "backend": jax.default_backend()},
        "about": {**ABOUT, "methods": METHODS},
        "candidates": [{"cell": cell, "methods": methods} for cell, methods in results.items()],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n")
    return rows


def main() -> None:
    """Measures the cells that are missing, writes the results file, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/compare_few_shot.json"))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--tasks", nargs="+", default=list(QUICK.tasks))
    parser.add_argument("--labels", nargs="+", type=int, default=list(LABELS), choices=LABELS)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5, help="of twenty steps each")
    parser.add_argument("--quick", action="store_true", help="one target, two tasks, 1 and 2 labels, one draw")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.targets, arguments.labels, arguments.draws, arguments.epochs = ["B"], [1, 2], 1, 3
    settings = {"epochs": arguments.epochs, "rates": RATES, "share": SHARE, "scales": QUICK.rotation_scales}
    results = read(arguments.output)
    if results and not arguments.report:
        kept = json.loads(arguments.output.read_text())["settings"]
        if kept != json.loads(json.dumps(settings)):
            raise SystemExit(f"{arguments.output} was made with other settings ({kept}): give another --output")
    cells = [
        Cell(target, task, labels, draw)
        for draw in range(arguments.draws)
        for labels in arguments.labels
        for target in arguments.targets
        for task in arguments.tasks
    ]
    missing = [] if arguments.report else [cell for cell in cells if cell not in results]
    if missing:
        models = {name: load(name, tuple(arguments.tasks)) for name in (SOURCE, *arguments.targets)}
        images = {task: photographs(task, style_of(task), QUICK) for task in arguments.tasks}
    for number, cell in enumerate(missing, 1):
        began = time.perf_counter()
        bench = Bench(models[SOURCE], models[cell.target], cell.task, images[cell.task], QUICK)
        results[cell] = run_cell(bench, cell, arguments.epochs)
        write(arguments.output, results, settings)
        print(f"{number} of {len(missing)}: {cell}, {time.perf_counter() - began:.0f} s", flush=True)
    if results:
        print_tables(write(arguments.output, results, settings))


if __name__ == "__main__":
    main()
