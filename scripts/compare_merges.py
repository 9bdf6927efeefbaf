"""What the merges reach on the embedded digits, and whether to merge before or after a transport.

merges     every merge of the source's task vectors, all six at once and every two of them: mean accuracy on the tasks,
           and normalised by each task's own fine-tuned model.
transport  two task vectors of the source on each target: merged and then transported (BiCo fitted on the examples of
           both tasks), transported and then merged, and the same with GradFix's mask after the merge (votes of the
           examples of both tasks) or before it (votes of the task's own).

One scale for the merged vector is chosen by the mean validation accuracy over the tasks, 20 labelled photographs of
each class and task; the calibration examples are `labels_per_class` photographs of each task.

    python scripts/compare_merges.py --output results/compare_merges.json
    python scripts/compare_merges.py --parts merges --merges ACE SVC   # the other records stay
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tvjax import apply, merge
from tvjax.checkpoints.atomic import replacing
from tvjax.compose import ada_merging, weighted_sum
from tvjax.data.batches import take
from tvjax.data.embedded import TASKS
from tvjax.demo.base import Embedded, Sets, draw_examples
from tvjax.demo.setup import QUICK, SOURCE, TARGETS, load, photographs, style_of
from tvjax.evaluate.protocols import Benchmark, addition
from tvjax.report.measurements import paired_difference
from tvjax.stages import PyTree
from tvjax.transport import bico, chain, fit, gradfix

Merge = Callable[[Sequence[PyTree]], PyTree]
KEY = jax.random.key(0)
SCALES = (*np.linspace(0, 2, 21).round(2).tolist(), 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 15.0, 20.0)
EXAMPLES = 200  # photographs of each task for the merges that look at data
MERGES: dict[str, Merge] = {
    "average": merge.average,
    "task arithmetic": merge.task_arithmetic,
    "SLERP": merge.slerp,
    "NuSLERP": merge.nuslerp,
    "multi-SLERP": merge.multi_slerp,
    "Karcher mean": merge.karcher_mean,
    "TIES": merge.ties,
    "DARE": partial(merge.dare, key=KEY),
    "DARE, TIES": partial(merge.dare, key=KEY, combine="ties"),
    "DELLA": partial(merge.della, key=KEY),
    "breadcrumbs": merge.breadcrumbs,
    "model stock": merge.model_stock,
    "SCE": merge.sce,
    "TSV-M": merge.tsv_m,
    "Iso-C": merge.iso_c,
    "Iso-CTS": merge.iso_cts,
    "WUDI": merge.wudi,
    "ACE": merge.ace,
    "LiNeS": merge.lines,
    "SVC": merge.svc,
}
OF_TWO = ("SLERP", "NuSLERP")
WITH_DATA = ("RegMean", "RegMean++", "Fisher", "AdaMerging, by leaf", "AdaMerging, by task")
BASELINE = "task arithmetic"
BEFORE_TRANSPORT = ("task arithmetic", "TIES", "TSV-M", "Iso-C")


def as_task(model: Embedded, images: Sets) -> Benchmark:
    return Benchmark(model.model, images.validation, images.test)


def with_data(source: Embedded, images: dict[str, Sets]) -> Callable[[str, Sequence[str]], Merge]:
    """The merges that look at photographs of the tasks, by name and tasks."""
    grams, fishers = {}, {}
    for task, tau in source.taus.items():
        tuned = source.model.replace(params=jax.jit(apply)(source.model.params, tau))
        seen = [take(images[task].pool, slice(0, EXAMPLES))]
        grams[task] = merge.input_grams(tuned, seen).matrices
        fishers[task] = merge.diagonal_fisher(tuned, seen)

    def adapted(taus: Sequence[PyTree], tasks: Sequence[str], blocks: str) -> PyTree:
        unlabelled = [(source.model, images[task].pool.inputs) for task in tasks]
        found = ada_merging(source.model.params, taus, unlabelled, key=KEY, blocks=blocks)
        return jax.jit(weighted_sum)(taus, found.trainable)

    def get(name: str, tasks: Sequence[str]) -> Merge:
        chosen: dict[str, Merge] = {
            "RegMean": partial(merge.regmean, grams=[grams[task] for task in tasks]),
            "RegMean++": partial(
                merge.regmean_plus_plus,
                model=source.model,
                batches=[[take(images[task].pool, slice(0, EXAMPLES))] for task in tasks],
            ),
            "Fisher": partial(merge.fisher, fishers=[fishers[task] for task in tasks]),
            "AdaMerging, by leaf": partial(adapted, tasks=tasks, blocks="leaf"),
            "AdaMerging, by task": partial(adapted, tasks=tasks, blocks="vector"),
        }
        return chosen[name]

    return get


def merges(source: Embedded, images: dict[str, Sets], names: Sequence[str]) -> list[dict[str, Any]]:
    """These merges of all task vectors and of every two."""
    from_data = with_data(source, images)
    records = []
    for tasks in (tuple(source.taus), *itertools.combinations(source.taus, 2)):
        measured = {task: as_task(source, images[task]) for task in tasks}
        own = {task: source.taus[task] for task in tasks}
        for name in names:
            if (name in OF_TWO and len(tasks) > 2) or (name.startswith("Ada") and len(tasks) == 2):
                continue  # AdaMerging trains, and is measured on all tasks only
            began = time.perf_counter()
            tau = (MERGES.get(name) or from_data(name, tasks))(list(own.values()))
            mean = addition(measured, own, SCALES, merge=lambda _, tau=tau: tau)[-1]
            record = {"tasks": tasks, "merge": name, "alpha": mean.alpha, "zero_shot": mean.before}
            record |= {"accuracy": mean.after, "normalised": mean.normalised}
            records.append(record)
            print(
                f"{' + '.join(tasks)}: {name} {100 * mean.after:.1f}, {time.perf_counter() - began:.0f} s", flush=True
            )
    return records


def orders(
    source: Embedded, targets: dict[str, Embedded], images: dict[str, Sets], labels: int
) -> list[dict[str, Any]]:
    """Two task vectors on every target, merged before and after."""
    settings = dataclasses.replace(QUICK, labels_per_class=labels)
    records = []
    for (name, target), pair in itertools.product(targets.items(), itertools.combinations(source.taus, 2)):
        examples = {task: draw_examples(images[task].pool, task, 0, settings) for task in pair}
        together = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *examples.values())
        both, taus = chain(bico(), gradfix()), [source.taus[task] for task in pair]
        states = {task: fit(both, source.model, target.model, [batch]) for task, batch in examples.items()}
        shared = fit(both, source.model, target.model, [together])
        rotate, mask = (jax.jit(partial(moved, number)) for number in (0, 1))
        rotated = [rotate(shared, tau) for tau in taus]
        own_votes = [mask(states[task], tau) for task, tau in zip(pair, rotated, strict=True)]
        measured = {task: as_task(target, images[task]) for task in pair}
        own = {task: target.taus[task] for task in pair}
        for rule in BEFORE_TRANSPORT:
            merged = MERGES[rule]
            first, last = rotate(shared, merged(taus)), merged(rotated)
            edits = {
                "merge, transport": first,
                "transport, merge": last,
                "merge, transport, mask": mask(shared, first),
                "transport, merge, mask": mask(shared, last),
                "transport, mask, merge": merged(own_votes),
            }
            for order, tau in edits.items():
                mean = addition(measured, own, QUICK.rotation_scales, merge=lambda _, tau=tau: tau)[-1]
                record = {"target": name, "tasks": pair, "merge": rule, "order": order, "alpha": mean.alpha}
                records.append({**record, "zero_shot": mean.before, "accuracy": mean.after})
        print(
            f"{name}, {' + '.join(pair)}: " + ", ".join(f"{100 * r['accuracy']:.1f}" for r in records[-20:]), flush=True
        )
    return records


def moved(number: int, state: Any, tau: PyTree) -> PyTree:
    """One link of the chain alone: the rotation (0) or the mask (1)."""
    return (bico(), gradfix())[number].apply(dataclasses.replace(state, parts=(state.parts[number],)), tau)


def compared(records: list[dict[str, Any]], by: str, baseline: str, pairing: Sequence[str]) -> list[dict[str, Any]]:
    """Mean accuracy of each kind of record, and minus a baseline with its interval."""

    def place(record: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(str(record[field]) for field in pairing)  # tasks are a list where they were read from the file

    against = {place(record): record["accuracy"] for record in records if record[by] == baseline}
    rows = []
    for kind in dict.fromkeys(record[by] for record in records):
        mine = [record for record in records if record[by] == kind]
        gap = paired_difference([record["accuracy"] - against[place(record)] for record in mine])
        row = {by: kind, "accuracy": float(np.mean([record["accuracy"] for record in mine]))}
        if "normalised" in mine[0]:
            row["normalised"] = float(np.mean([record["normalised"] for record in mine]))
        rows.append(row | {f"minus {baseline}": gap._asdict()})
    return rows


def table(title: str, rows: list[dict[str, Any]]) -> None:
    """Prints rows of `compared` in per cent."""
    print(f"\n{title}")
    for row in rows:
        label, gap = next(iter(row.values())), row[next(field for field in row if field.startswith("minus"))]
        width = "" if gap["half_width"] is None else f" ±{100 * gap['half_width']:.1f}"
        print(f"  {label:26} {100 * row['accuracy']:6.1f}  ({100 * gap['mean']:+.1f}{width}, n = {gap['pairs']})")


def main() -> None:
    """Measures both, writes the results file, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/compare_merges.json"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--parts", nargs="+", default=["merges", "orders"], choices=("merges", "orders"))
    everything = (*MERGES, *WITH_DATA)
    parser.add_argument("--merges", nargs="+", default=list(everything), choices=everything)
    parser.add_argument("--labels", type=int, default=5, help="calibration examples of each class and task")
    arguments = parser.parse_args()
    names = tuple(arguments.tasks)
    source = load(SOURCE, names)
    images = {task: photographs(task, style_of(task), QUICK) for task in names}
    found: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    if arguments.output.exists():  # a part that is not measured again stays, with its settings
        content = json.loads(arguments.output.read_text())
        found, settings = content["records"], content["settings"]
    if "merges" in arguments.parts:
        kept = [record for record in found.get("merges", []) if record["merge"] not in arguments.merges]
        found["merges"] = [*kept, *merges(source, images, arguments.merges)]
        settings["scales"] = SCALES
    if "orders" in arguments.parts:
        targets = {name: load(name, names) for name in TARGETS}
        found["orders"] = orders(source, targets, images, arguments.labels)
        settings |= {"rotation_scales": QUICK.rotation_scales, "labels_per_class": arguments.labels}
    report(arguments.output, found, settings)


def report(path: Path, found: dict[str, Any], settings: dict[str, Any]) -> None:
    """Writes records and comparisons, and prints the comparisons."""
    measured = found.get("merges", [])
    pairs = [record for record in measured if len(record["tasks"]) == 2]
    whole = [record for record in measured if len(record["tasks"]) > 2]
    comparisons = {"pairs": compared(pairs, "merge", BASELINE, ("tasks",))}
    comparisons["all tasks"] = compared(whole, "merge", BASELINE, ("tasks",))
    pairing = ("target", "tasks", "merge")
    comparisons["orders"] = compared(found.get("orders", []), "order", "merge, transport", pairing)
    for rule in BEFORE_TRANSPORT:
        mine = [record for record in found.get("orders", []) if record["merge"] == rule]
        comparisons[f"orders, {rule}"] = compared(mine, "order", "merge, transport", pairing)
    versions = {name: importlib.metadata.version(name) for name in ("tvjax", "jax", "jaxlib", "numpy")}
    content = {"records": found, "comparisons": comparisons, "settings": settings, "versions": versions}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    for title, rows in comparisons.items():
        table(title, rows)


if __name__ == "__main__":
    main()
