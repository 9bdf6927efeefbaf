"""One draw of one task on one pair of models: every method, on the same texts and with the same choices by validation.

A method's settings (scale, learning rate, number of steps) are those of the greatest accuracy on the validation texts,
ties going to the smaller one; what a method trains is what the task vector covers, the blocks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import tvjax as tv
from real.texts import Counts, Split, TextTask
from real.weights import model_folder
from tvjax import tree
from tvjax.checkpoints import load_processor
from tvjax.compose import class_scores, constant
from tvjax.data.tokens import Encoder
from tvjax.evaluate.accuracy import accuracy, predictions
from tvjax.evaluate.fine_tune import FineTuned, fine_tune
from tvjax.evaluate.scale import ChosenScale, choose_scale
from tvjax.stages import Batch, Model, PyTree
from tvjax.tasks import zero_shot
from tvjax.tasks.losses import distilled
from tvjax.tasks.zero_shot import ZERO_SHOT

TRAINED = ("blocks/*",)
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
RATES, RATES_MANY = (3e-5, 1e-4, 3e-4), (2e-4, 8e-4)  # of the leaves, with few labels and with many
SHARE = 1e-3  # where coefficients are trained too, theirs are a thousand times greater
CHECKPOINTS = 3  # numbers of steps to choose from, up to all
CALIBRATION, EVALUATION = 48, 200  # texts at once, at most


class Steps(NamedTuple):
    """How many steps a training takes at most, and of how many texts."""

    steps: int
    size: int


FEW, MANY, TEACHER = Steps(60, 16), Steps(90, 32), Steps(60, 32)


class Setting(NamedTuple):
    """How texts of a task are read and how many of each class there are in each part.

    Attributes:
      length: tokens that are kept of a text.
      counts: of the parts.
    """

    length: int
    counts: Counts


SENTENCES = Setting(24, Counts(test=500, source=400, few=48, validation=80, unlabelled=500))
SETTINGS = {
    "nouns": Setting(16, Counts(test=44, source=40, few=4, validation=7, unlabelled=500)),
    "verbs": Setting(16, Counts(test=67, source=60, few=6, validation=10, unlabelled=500)),
    **dict.fromkeys(("film", "amazon", "nyt", "tweets"), SENTENCES),
}


class Result(NamedTuple):
    """What a method arrived at.

    Attributes:
      right: ``[test texts]``, whether each is classified rightly.
      validation: the accuracy by which its setting was chosen; None where there is nothing to choose.
      setting: what was chosen.
      seconds: that it took.
    """

    right: np.ndarray
    validation: float | None
    setting: dict[str, float]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Reader:
    """A pre-trained model with the frozen head of a task, and the texts as it reads them.

    Attributes:
      name: of the model.
      model: with the zero-shot head as its loss.
      inputs: the texts of some numbers.
      labels: of all texts.
    """

    name: str
    model: Model
    inputs: Callable[[np.ndarray], PyTree]
    labels: np.ndarray

    def batch(self, chosen: np.ndarray) -> Batch:
        """Texts with their labels."""
        return Batch(self.inputs(chosen), jnp.asarray(self.labels[chosen]))

    def batches(self, chosen: np.ndarray, size: int) -> list[Batch]:
        """The same in the fewest batches of one size, at most this one: a size is compiled once."""
        number = next(n for n in range(-(-len(chosen) // size), len(chosen) + 1) if len(chosen) % n == 0)
        return [self.batch(part) for part in np.split(chosen, number)]


def reader(name: str, task: TextTask, length: int, cache: Path | None = None) -> Reader:
    """Opens a model of `real.weights.MODELS` for a task."""
    folder = model_folder(name, cache)
    encoder = Encoder(load_processor(folder).tokenizer, length, shortest=length)
    model = zero_shot(encoder, task.class_names, task.templates).model(tv.load(folder).model)

    def inputs(chosen: np.ndarray) -> PyTree:
        tokens = encoder([task.texts[i] for i in chosen])
        return {"tokens": jnp.asarray(tokens.ids), "mask": jnp.asarray(tokens.mask)}

    return Reader(name, model, inputs, task.labels)


class Bench:
    """One draw of a task on a pair of models; what several methods need is made once.

    What is fine-tuned with many labels is kept in a folder: a model that is the target of one pair is the source of
    another.
    """

    def __init__(self, source: Reader, target: Reader, parts: Split, draw: int, kept: Path):
        self.source, self.target, self.parts, self.draw, self.kept = source, target, parts, draw, kept
        self.key = jax.random.key(draw)
        self.few = target.batch(parts.few)
        self.validation = target.batches(parts.validation, EVALUATION)
        self.pairs = self._pairs(parts.few)

    def _pairs(self, order: np.ndarray) -> list[tuple[Batch, Batch]]:
        """The few labelled texts as both models see them, the source in this order."""
        source = self.source.batches(order, CALIBRATION)
        return list(zip(source, self.target.batches(self.parts.few, CALIBRATION), strict=True))

    @cached_property
    def shuffled(self) -> list[tuple[Batch, Batch]]:
        """The same with the source's texts in another order, so that hardly a row meets its own."""
        return self._pairs(np.random.default_rng(2).permutation(self.parts.few))

    @cached_property
    def tau(self) -> PyTree:
        """The task vector."""
        return tv.task_vector(self.source.model.params, self.with_many_labels(self.source).params)

    @cached_property
    def bico(self) -> PyTree:
        """The task vector as BiCo on centred rows moves it."""
        return self.moved(tv.bico(center=True), self.pairs)

    @cached_property
    def bico_chosen(self) -> ChosenScale:
        """Its scale, by validation."""
        return choose_scale(self.target.model, self.bico, SCALES, self.validation)

    @cached_property
    def start(self) -> Model:
        """The target with BiCo's vector at that scale."""
        model = self.target.model
        return model.replace(params=tv.apply(model.params, self.bico, self.bico_chosen.scale))

    @cached_property
    def taught(self) -> Batch:
        """The unlabelled texts with the fine-tuned source's scores of the classes."""
        model = self.source.model.replace(params=self.with_many_labels(self.source).params)
        scores = class_scores(model, self.source.batches(self.parts.unlabelled, EVALUATION))
        return Batch(self.target.inputs(self.parts.unlabelled), jnp.asarray(scores))

    def moved(self, transport: tv.Transport, pairs: Sequence[tuple[Batch, Batch]]) -> PyTree:
        """The task vector as a transport that is fitted on these batches moves it."""
        return transport.apply(tv.fit(transport, self.source.model, self.target.model, pairs), self.tau)

    def tuned(
        self, own: Reader, start: Model, examples: Batch, steps: Steps, rates: Sequence[float] = RATES
    ) -> FineTuned:
        """A model of one of the two, trained on examples; rate and number of steps chosen by validation."""
        return fine_tune(
            start,
            examples,
            steps=steps.steps,
            key=self.key,
            learning_rates=rates,
            batch_size=steps.size,
            trainable=TRAINED,
            validation=own.batches(self.parts.validation, EVALUATION),
            checkpoints=CHECKPOINTS,
        )

    def with_many_labels(self, own: Reader) -> FineTuned:
        """A model of one of the two, fine-tuned with the labels of the source."""
        path = self.kept / f"{own.name}-{self.draw}.safetensors"
        told = {"rates": str(RATES_MANY), "steps": str(MANY), "texts": hashlib.sha256(self.parts.source).hexdigest()}
        if path.exists():
            params, found = tv.load_task_vector(path)
            if told.items() <= found.items():
                chosen = json.loads(found["chosen"])
                return FineTuned(tree.replace(own.model.params, tree.flatten(params)), **chosen, losses=np.zeros(0))
        tuned = self.tuned(own, own.model, own.batch(self.parts.source), MANY, RATES_MANY)
        chosen = {"learning_rate": tuned.learning_rate, "steps": tuned.steps, "accuracy": tuned.accuracy}
        path.parent.mkdir(parents=True, exist_ok=True)
        tv.save_task_vector(path, tuned.params, {**told, "chosen": json.dumps(chosen)})
        return tuned


class Found(NamedTuple):
    """What a method arrives at.

    Attributes:
      reader: the model that it edits.
      params: its parameters.
      validation: the accuracy by which the setting was chosen; None where there is nothing to choose.
      setting: what was chosen.
    """

    reader: Reader
    params: PyTree
    validation: float | None = None
    setting: dict[str, Any] = {}


Method = Callable[[Bench], Found]


def _at(bench: Bench, moved: PyTree, chosen: ChosenScale) -> Found:
    """A transported task vector at one scale."""
    params = tv.apply(bench.target.model.params, moved, chosen.scale)
    return Found(bench.target, params, chosen.accuracy, {"scale": chosen.scale, "curve": chosen.curve.tolist()})


def _transported(transport: Callable[[], tv.Transport], shuffled: bool = False) -> Method:
    def method(bench: Bench) -> Found:
        moved = bench.moved(transport(), bench.shuffled if shuffled else bench.pairs)
        return _at(bench, moved, choose_scale(bench.target.model, moved, SCALES, bench.validation))

    return method


def _of(reader: Reader, tuned: FineTuned) -> Found:
    setting = {"learning_rate": tuned.learning_rate, "steps": tuned.steps}
    return Found(reader, tuned.params, tuned.accuracy, setting)


def _few_shot(bench: Bench, start: Model) -> Found:
    return _of(bench.target, bench.tuned(bench.target, start, bench.few, FEW))


def _distilled(bench: Bench, start: Model) -> Found:
    return _of(bench.target, bench.tuned(bench.target, start.replace(loss=distilled(ZERO_SHOT)), bench.taught, TEACHER))


def _with_coefficients(bench: Bench) -> Found:
    """Coefficients of the leaves of BiCo's vector and the leaves of the target, trained at once."""
    model, taus = bench.target.model, [bench.bico]
    paths = list(tree.flatten(model.params))
    trained = tv.compose.tune(
        model.params,
        taus,
        tv.compose.few_shot(model, bench.few),
        key=bench.key,
        coefficients=tv.compose.init(taus, value=bench.bico_chosen.scale),
        leaves=[path for pattern in TRAINED for path in tree.match(paths, pattern)],
        share=SHARE,
        learning_rates=[rate / SHARE for rate in RATES],
        epochs=CHECKPOINTS,
        batch_size=FEW.size,
        batches_per_epoch=FEW.steps // CHECKPOINTS,
        schedule=constant,
        score=lambda params: accuracy(model.replace(params=params), bench.validation).fraction,
    )
    setting = {"learning_rate": SHARE * trained.learning_rate, "steps": trained.epochs * FEW.steps // CHECKPOINTS}
    return Found(bench.target, trained.trainable.combine(model.params, taus), trained.score, setting)


METHODS: dict[str, Method] = {
    "source, zero-shot": lambda bench: Found(bench.source, bench.source.model.params),
    "source, fine-tuned": lambda bench: _of(bench.source, bench.with_many_labels(bench.source)),
    "zero-shot": lambda bench: Found(bench.target, bench.target.model.params),
    "Theseus": _transported(tv.theseus),
    "Theseus, centred": _transported(partial(tv.theseus, center=True)),
    "BiCo": _transported(tv.bico),
    "BiCo, centred": lambda bench: _at(bench, bench.bico, bench.bico_chosen),
    "BiCo, centred, then GradFix": _transported(lambda: tv.chain(tv.bico(center=True), tv.gradfix())),
    "BiCo, centred, texts shuffled": _transported(partial(tv.bico, center=True), shuffled=True),
    "few-shot": lambda bench: _few_shot(bench, bench.target.model),
    "BiCo, centred, then few-shot": lambda bench: _few_shot(bench, bench.start),
    "BiCo, centred, coefficients and few-shot": _with_coefficients,
    "distillation": lambda bench: _distilled(bench, bench.target.model),
    "BiCo, centred, then distillation": lambda bench: _distilled(bench, bench.start),
    "own fine-tuning": lambda bench: _of(bench.target, bench.with_many_labels(bench.target)),
}


def run(bench: Bench, method: str) -> Result:
    """Measures one method of `METHODS` on the test texts."""
    began = time.perf_counter()
    found = METHODS[method](bench)
    model = found.reader.model.replace(params=found.params)
    right = predictions(model, found.reader.batches(bench.parts.test, EVALUATION)).right
    return Result(right, found.validation, found.setting, time.perf_counter() - began)
