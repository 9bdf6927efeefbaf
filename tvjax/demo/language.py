"""The demo on language models: task vectors moved into embedded models of other shapes and other training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import get_args

import numpy as np

from tvjax.align.heads import DEFAULT_STRUCTURE, Structure
from tvjax.checkpoints import from_pretrained, load_processor, load_tree
from tvjax.data.batches import few_shot, take
from tvjax.data.embedded import model_folder, task_vector_file
from tvjax.data.embedded_texts import LENGTH, TASKS, embedded_texts
from tvjax.data.tokens import Encoder
from tvjax.demo import base
from tvjax.demo.base import Embedded, Sets, float32, named_key
from tvjax.demo.experiment import Findings, Progress, measured
from tvjax.demo.transports import Bench
from tvjax.stages import Batch, Model
from tvjax.tasks import Task, label_words

SOURCES = {"llama-C": "llama-A", "llama-B": "llama-A", "t5-B": "t5-A"}  # of the targets
TITLES = {
    "llama-C": "llama A to C: trained further",
    "llama-B": "llama A to B: another shape",
    "t5-B": "t5 A to B: another shape",
}
SHORT = 32  # tokens of a short text; most are, and they go in a batch of their own


@dataclasses.dataclass(frozen=True)
class Settings(base.Settings):
    """What the demo measures on language.

    Attributes:
      targets: names of embedded models.
      validation: validation texts of each task, as many of each class.
      test: the same of the test.
    """

    tasks: tuple[str, ...] = ("topics", "reviews")
    unit_scales: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
    rotation_scales: tuple[float, ...] = (0.0, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
    few_shot_steps: int = 40
    few_shot_checkpoints: int = 2
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    trainable: tuple[str, ...] = ("*blocks/*", "*final_norm/*")
    targets: tuple[str, ...] = ("llama-C", "llama-B")
    validation: int = 160
    test: int = 480


QUICK = Settings()
HEADS = tuple((heads, {"heads": heads}) for heads in get_args(Structure) if heads != DEFAULT_STRUCTURE)
FULL = dataclasses.replace(QUICK, tasks=tuple(TASKS), targets=tuple(SOURCES), draws=3, variants=HEADS, test=720)


def run(settings: Settings, progress: Progress | None = None) -> Findings:
    """Measures everything; nothing is written.

    Args:
      settings: what to measure.
      progress: called with (steps done, steps in all, what was done).

    Raises:
      ValueError: for an unknown task or target, none of them, or no draw.
    """
    if not settings.tasks or not settings.targets or settings.draws < 1:
        raise ValueError(
            f"found {len(settings.tasks)} tasks, {len(settings.targets)} targets and {settings.draws} draws, expected "
            "one of each at least"
        )
    benches = {}
    for task in settings.tasks:
        for target in settings.targets:
            if target not in SOURCES:
                raise ValueError(f"there is no embedded target {target!r}: choose one of {', '.join(SOURCES)}")
            source, other = (load(name, task) for name in (SOURCES[target], target))
            benches[target, task] = Bench(source, other, task, examples(target, task, settings), settings)
    ordered = {(target, task): benches[target, task] for target in settings.targets for task in settings.tasks}
    return measured(ordered, {name: TITLES[name] for name in settings.targets}, "texts", progress)


def load(name: str, task: str) -> Embedded:
    """An embedded language model in float32, asked for the words of a task's classes, and its task vector."""
    model, _ = ask(name, task)
    return Embedded(model, {task: float32(load_tree(task_vector_file(name, task))[0])})


def ask(name: str, task: str) -> tuple[Model, Task]:
    """An embedded language model in float32, asked for the words of a task's classes, and the task."""
    pretrained = from_pretrained(model_folder(name))
    encoder = Encoder(load_processor(model_folder(name)).tokenizer, LENGTH)
    start = getattr(pretrained.config, "decoder_start_token_id", None)  # of a T5
    words = [word if start is not None else f" {word}" for word in TASKS[task].words]
    asked = label_words(encoder, words, TASKS[task].template, start)
    return asked.model(pretrained.model.replace(params=float32(pretrained.params))), asked


def examples(name: str, task: str, settings: Settings) -> Sets:
    """The texts of a task, as an embedded model sees them; the pool has the short ones only."""
    _, asked = ask(name, task)
    words, _, trained = TASKS[task]
    found = {}
    for part, count in (("pool", 0), ("validation", settings.validation), ("test", settings.test)):
        texts = embedded_texts(task, part)
        (batch,) = asked.batches(texts, len(texts))
        if count:
            batch = take(batch, few_shot(batch.labels, count // len(words), named_key(settings.seed, f"{part} {task}")))
        found[part] = by_length(batch)
    return Sets(found["pool"][0], found["validation"], found["test"], trained)


def by_length(batch: Batch) -> Sequence[Batch]:
    """The texts of at most `SHORT` tokens as one batch, cut to them, and the others as a second."""
    short = batch.inputs["mask"].sum(1) <= SHORT
    first, second = (take(batch, np.flatnonzero(chosen)) for chosen in (short, ~short))
    tokens = {name: first.inputs[name][:, :SHORT] for name in ("tokens", "mask")}
    first = first._replace(inputs={**first.inputs, **tokens})
    return [part for part in (first, second) if len(part.labels)]
