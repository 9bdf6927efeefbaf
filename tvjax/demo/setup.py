"""What the demo runs on: its settings, the embedded models, and the photographs of every task."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import jax
import numpy as np

from tvjax.checkpoints import from_pretrained, load_processor, load_tree
from tvjax.data import digits
from tvjax.data.batches import take
from tvjax.data.digits import Style
from tvjax.data.embedded import MODELS, TASKS, model_folder, task_vector_file
from tvjax.demo import base
from tvjax.demo.base import Embedded, Sets, float32, named_key
from tvjax.tasks.zero_shot import zero_shot_model

SOURCE, *TARGETS = MODELS
BASE = "base"  # the style of the pre-training
TITLES = {"B": "A to B: same shape", "W": "A to W: wider", "D": "A to D: deeper"}


@dataclasses.dataclass(frozen=True)
class Settings(base.Settings):
    """What the demo measures on the digits.

    Attributes:
      validation_repeats: photographs of each of the 200 validation digits.
      test_repeats: photographs of each of the 497 test digits.
      control: share of its accuracy that a control keeps when a task vector is negated.
    """

    tasks: tuple[str, ...] = ("mirrored", "thick")  # where a digit stands, and how it is drawn
    trainable: tuple[str, ...] = ("vision/blocks/*", "vision/*_norm/*", "vision/projection/*")
    validation_repeats: int = 1
    test_repeats: int = 2
    control: float = 0.95


QUICK = Settings()
FULL = dataclasses.replace(QUICK, tasks=TASKS, draws=3)


def load(name: str, tasks: tuple[str, ...]) -> Embedded:
    """An embedded model in float32: its vision tower with the zero-shot head of the ten digits."""
    folder = model_folder(name)
    pretrained = from_pretrained(folder)
    model = pretrained.model.replace(params=float32(pretrained.params))
    head = zero_shot_model(model, load_processor(folder).tokens, digits.CLASS_NAMES, digits.TEMPLATES)
    return Embedded(head, {task: float32(load_tree(task_vector_file(name, task))[0]) for task in tasks})


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


def photographs(name: str, style: Style, settings: Settings) -> Sets:
    """The photographs of a style, taken in one go; its name seeds them. The pool is the targets' training digits."""
    parts = digits.load_splits()
    sets = (
        [parts["target"]],
        [parts["validation"]] * settings.validation_repeats,
        [parts["test"]] * settings.test_repeats,
    )
    together = digits.Digits(*map(np.concatenate, zip(*(part for chosen in sets for part in chosen), strict=True)))
    batch = digits.photograph(together, style, named_key(settings.seed, name))
    cuts = np.cumsum([0, *(sum(len(part.labels) for part in chosen) for chosen in sets)])
    pool, validation, test = (take(batch, slice(*cut)) for cut in itertools.pairwise(cuts))
    return Sets(pool, validation, test, digits.PER_CLASS["target"], settings.test_repeats)
