"""What every part of the demo shares: its settings, models with their task vectors, and sets of examples."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tvjax.compose.tuned import SCALES
from tvjax.data.batches import few_shot, take
from tvjax.stages import Batch, Model, PyTree


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the demo measures.

    Attributes:
      tasks: names of embedded tasks.
      draws: draws of the calibration examples.
      labels_per_class: calibration examples of each class; they are the few shots of fine-tuning too.
      unit_scales: grid of alpha for what stays in the coordinates of the target: naive addition, masks.
      rotation_scales: grid of alpha for what is rotated.
      variants: further options of Theseus and BiCo, by the name that the methods have with them.
      few_shot_steps: greatest number of steps of few-shot fine-tuning.
      few_shot_checkpoints: numbers of steps to choose from.
      learning_rates: of few-shot fine-tuning, to choose from.
      trainable: leaves that few-shot fine-tuning trains: those that the task vectors cover.
      seed: of all draws.
    """

    tasks: tuple[str, ...]
    draws: int = 1
    labels_per_class: int = 5
    unit_scales: tuple[float, ...] = tuple(np.linspace(0, 1, 11).round(2).tolist())
    rotation_scales: tuple[float, ...] = SCALES
    variants: tuple[tuple[str, dict[str, Any]], ...] = ()
    few_shot_steps: int = 60
    few_shot_checkpoints: int = 3
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    trainable: tuple[str, ...] = ("*",)
    seed: int = 0


class Embedded(NamedTuple):
    """An embedded model.

    Attributes:
      model: what reads the examples, with the head of its tasks.
      taus: its own task vectors, by task.
    """

    model: Model
    taus: dict[str, PyTree]


class Sets(NamedTuple):
    """The examples of one task; none is in two of these sets.

    Attributes:
      pool: calibration examples are drawn from it.
      validation: scales and hyperparameters are chosen on these.
      test: reported accuracies are measured on these.
      trained: examples of each class that the targets were fine-tuned on for their own task vectors.
      repeats: how often each test example is there, all of them once and then again.
    """

    pool: Batch
    validation: Batch | Sequence[Batch]
    test: Batch | Sequence[Batch]
    trained: int
    repeats: int = 1


def draw_examples(pool: Batch, task: str, draw: int, settings: Settings) -> Batch:
    """The labelled calibration examples of a draw."""
    key = jax.random.fold_in(named_key(settings.seed, f"calibration {task}"), draw)
    return take(pool, few_shot(pool.labels, settings.labels_per_class, key))


def named_key(seed: int, name: str) -> jax.Array:
    """A random key for each name."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def float32(params: PyTree) -> PyTree:
    """The parameters in float32, so that edits are not rounded to the 16 bits of a file."""
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float32)), params)  # nothing to compile
