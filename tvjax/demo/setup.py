"""What the demo runs on: its settings, the embedded models, and the photographs of every task."""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tvjax.checkpoints import from_pretrained, load_processor, load_tree
from tvjax.compose.tuned import SCALES
from tvjax.data import digits
from tvjax.data.batches import few_shot, take
from tvjax.data.digits import Style
from tvjax.data.embedded import MODELS, TASKS, model_folder, task_vector_file
from tvjax.stages import Batch, Model, PyTree
from tvjax.tasks.zero_shot import zero_shot_model

SOURCE, *TARGETS = MODELS
BASE = "base"  # the style of the pre-training
TITLES = {"B": "A to B: same shape", "W": "A to W: wider", "D": "A to D: deeper"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the demo measures.

    Attributes:
      tasks: names of embedded tasks.
      draws: draws of the calibration examples.
      labels_per_class: calibration examples of each class; they are the few shots of fine-tuning too.
      validation_repeats: photographs of each of the 200 validation digits.
      test_repeats: photographs of each of the 497 test digits.
      unit_scales: grid of alpha for what stays in the coordinates of the target: naive addition, masks.
      rotation_scales: grid of alpha for what is rotated.
      few_shot_steps: greatest number of steps of few-shot fine-tuning.
      few_shot_checkpoints: numbers of steps to choose from.
      learning_rates: of few-shot fine-tuning, to choose from.
      trainable: leaves that few-shot fine-tuning trains: those that the task vectors cover.
      control: share of its accuracy that a control keeps when a task vector is negated.
      seed: of all draws.
    """

    tasks: tuple[str, ...] = ("mirrored", "thick")  # where a digit stands, and how it is drawn
    draws: int = 1
    labels_per_class: int = 5
    validation_repeats: int = 1
    test_repeats: int = 2
    unit_scales: tuple[float, ...] = tuple(np.linspace(0, 1, 11).round(2).tolist())
    rotation_scales: tuple[float, ...] = SCALES
    few_shot_steps: int = 60
    few_shot_checkpoints: int = 3
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    trainable: tuple[str, ...] = ("vision/blocks/*", "vision/*_norm/*", "vision/projection/*")
    control: float = 0.95
    seed: int = 0


QUICK = Settings()
FULL = dataclasses.replace(QUICK, tasks=TASKS, draws=3)


class Embedded(NamedTuple):
    """An embedded model.

    Attributes:
      model: its vision tower with the zero-shot head of the ten digits.
      taus: its own task vectors, by task.
    """

    model: Model
    taus: dict[str, PyTree]


class Photographs(NamedTuple):
    """The photographs of one style; no digit is in two of these sets.

    Attributes:
      pool: of the targets' half of the training digits: calibration examples are drawn from it.
      validation: scales and hyperparameters are chosen on these.
      test: reported accuracies are measured on these.
    """

    pool: Batch
    validation: Batch
    test: Batch


def load(name: str, tasks: tuple[str, ...]) -> Embedded:
    """An embedded model in float32, so that edits are not rounded to the 16 bits of its file."""
    folder = model_folder(name)
    pretrained = from_pretrained(folder)
    model = pretrained.model.replace(params=_float32(pretrained.params))
    head = zero_shot_model(model, load_processor(folder).tokens, digits.CLASS_NAMES, digits.TEMPLATES)
    return Embedded(head, {task: _float32(load_tree(task_vector_file(name, task))[0]) for task in tasks})


def style_of(task: str) -> Style:
    """The style of a task; that of pre-training under the name `BASE`."""
    return digits.BASE if task == BASE else digits.STYLES[task]


def combined(first: Style, second: Style) -> Style:
    """The style of photographs that are of both styles."""

    def both(a: Callable, b: Callable) -> Callable:
        def apply(image: jax.Array, key: jax.Array) -> jax.Array:
            keys = jax.random.split(key)
            return b(a(image, keys[0]), keys[1])

        return apply

    (a, b), (c, d) = (np.array(first.matrix) @ np.array(second.matrix)).tolist()
    return Style(((a, b), (c, d)), both(first.strokes, second.strokes), both(first.finish, second.finish))


def photographs(name: str, style: Style, settings: Settings) -> Photographs:
    """The photographs of a style, taken in one go; its name seeds them."""
    parts = digits.load_splits()
    pool, validation, test = parts["target"], parts["validation"], parts["test"]
    sets = [pool], [validation] * settings.validation_repeats, [test] * settings.test_repeats
    together = digits.Digits(*map(np.concatenate, zip(*(part for chosen in sets for part in chosen), strict=True)))
    batch = digits.photograph(together, style, named_key(settings.seed, name))
    cuts = np.cumsum([0, *(sum(len(part.labels) for part in chosen) for chosen in sets)])
    return Photographs(*(take(batch, slice(*cut)) for cut in itertools.pairwise(cuts)))


def draw_examples(pool: Batch, task: str, draw: int, settings: Settings) -> Batch:
    """The labelled calibration examples of a draw."""
    key = jax.random.fold_in(named_key(settings.seed, f"calibration {task}"), draw)
    return take(pool, few_shot(pool.labels, settings.labels_per_class, key))


def named_key(seed: int, name: str) -> jax.Array:
    """A random key for each name."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def _float32(params: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
