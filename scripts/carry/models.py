"""The sets of embedded models that are measured: all that differs between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from tvjax.demo import base, language, setup
from tvjax.demo.base import Embedded, Sets

FEW = 50  # unlabelled examples: those that have labels in the usual column, and further ones up to so many


class Models(NamedTuple):
    """A set of models.

    Attributes:
      sources: the source of each target, targets in the order in which they are measured.
      tasks: names, in that order.
      tuned_on: the tasks that were looked at when grids and budget were settled.
      one_shape: the targets of their source's shape.
      settings: the demo's: grids of scales, what fine-tuning trains, how examples are drawn.
      kind: of the examples, in the plural.
      pool: unlabelled examples that a column has at most: all that the pool of a task holds.
      load: by the names of a model and a task.
      examples: by the names of a target and a task.
      results: name of the file of results.
      about: what the results file says of the set beyond what holds for all.
    """

    sources: dict[str, str]
    tasks: tuple[str, ...]
    tuned_on: tuple[str, ...]
    one_shape: tuple[str, ...]
    settings: base.Settings
    kind: str
    pool: int
    load: Callable[[str, str], Embedded]
    examples: Callable[[str, str], Sets]
    results: str
    about: dict[str, str]


CLIP_TASKS = ("ruled", "framed", "blurred", "upside_down", "thick", "mirrored")


@cache
def _clip(name: str) -> Embedded:
    return setup.load(name, CLIP_TASKS)


@cache
def _photographs(task: str) -> Sets:
    return setup.photographs(task, setup.style_of(task), setup.QUICK)


_text_model = cache(language.load)


@cache
def _texts(target: str, task: str) -> Sets:
    return language.examples(target, task, language.FULL)


SETS = {
    "clip": Models(
        sources=dict.fromkeys(setup.TARGETS, setup.SOURCE),
        tasks=CLIP_TASKS,
        tuned_on=("thick", "mirrored"),
        one_shape=("B",),
        settings=setup.QUICK,
        kind="images",
        pool=550,
        load=lambda name, task: _clip(name),
        examples=lambda target, task: _photographs(task),
        results="compare_carry.json",
        about={
            "tasks": "styles of handwritten digits, ten classes; grids and budget were looked at on thick and mirrored",
            "unlabelled": "images; 50 are those that are labelled with 5 labels a class, 550 the whole pool",
            "validation": "200 images",
        },
    ),
    "language": Models(
        sources=language.SOURCES,
        tasks=tuple(language.TASKS),
        tuned_on=(),
        one_shape=("llama-C",),
        settings=dataclasses.replace(language.FULL, trainable=("**/blocks", "**/final_norm")),
        kind="texts",
        pool=230,
        load=_text_model,
        examples=_texts,
        results="compare_carry_language.json",
        about={
            "tasks": "topics of 8 classes, actions of 6, reviews of 2; grids of scales are the demo's, rates, epochs "
            "and factors those of the CLIPs, settled there: nothing was tuned on these tasks",
            "unlabelled": "texts of at most 32 tokens; 50 hold the 40, 30 and 10 that are labelled with 5 labels a "
            "class; 230 stands for the whole pool, which has 210 of topics, 230 of actions, 71 of reviews",
            "validation": "160, 156 and 160 texts, as many of each class; tested on 720, short and long",
        },
    ),
}


def models_of(target: str) -> Models:
    """The set that a target is of."""
    return next(models for models in SETS.values() if target in models.sources)
