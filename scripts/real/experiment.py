"""One draw of one task on one pair of models: the same texts for every method, and what several methods need.

A setting (scale, learning rate, number of steps) is that of the greatest accuracy on the validation texts, ties going
to the smaller one; what a method trains is what the task vector covers, the blocks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import tvjax as tv
from real import protocol
from real.taught import Taught
from real.texts import Split, TextTask
from real.weights import model_folder
from tvjax import tree
from tvjax.checkpoints import load_processor
from tvjax.data.tokens import Encoder
from tvjax.evaluate.fine_tune import FineTuned, Score, fine_tune
from tvjax.evaluate.scale import ChosenScale, choose_scale
from tvjax.stages import Batch, Model, PyTree
from tvjax.tasks import zero_shot


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
        self.validation = target.batches(parts.validation, protocol.EVALUATION)
        self.pairs = self.as_both_see(parts.few)

    def as_both_see(self, texts: np.ndarray, order: np.ndarray | None = None) -> list[tuple[Batch, Batch]]:
        """Texts as both models see them, the source in another order where one is given."""
        source = self.source.batches(texts if order is None else order, protocol.CALIBRATION)
        return list(zip(source, self.target.batches(texts, protocol.CALIBRATION), strict=True))

    @cached_property
    def shuffled(self) -> list[tuple[Batch, Batch]]:
        """The same with the source's texts in another order, so that hardly a row meets its own."""
        return self.as_both_see(self.parts.few, np.random.default_rng(2).permutation(self.parts.few))

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
        return self.scale_of(self.bico)

    @cached_property
    def start(self) -> PyTree:
        """BiCo's vector at that scale."""
        return tv.scale(self.bico, self.bico_chosen.scale)

    @cached_property
    def few_taught(self) -> Taught:
        """The teacher on the few texts, whose labels it does not read."""
        return Taught(self, self.parts.few)

    @cached_property
    def taught(self) -> Taught:
        """The teacher on the unlabelled texts."""
        return Taught(self, self.parts.unlabelled)

    def scale_of(self, moved: PyTree) -> ChosenScale:
        """The scale of a transported task vector, by validation."""
        return choose_scale(self.target.model, moved, protocol.SCALES, self.validation)

    def started(self, tau: PyTree) -> Model:
        """The target with a task vector added."""
        return self.target.model.replace(params=tv.apply(self.target.model.params, tau))

    def moved(self, transport: tv.Transport, pairs: Sequence[tuple[Batch, Batch]]) -> PyTree:
        """The task vector as a transport that is fitted on these batches moves it."""
        given = {"tau": self.tau} if transport.needs_task_vector else {}
        return transport.apply(tv.fit(transport, self.source.model, self.target.model, pairs, **given), self.tau)

    def tuned(
        self,
        own: Reader,
        start: Model,
        examples: Batch,
        steps: protocol.Steps,
        rates: Sequence[float] = protocol.RATES,
        score: Score | None = None,
    ) -> FineTuned:
        """A model of one of the two, trained on examples; rate and number of steps chosen by validation, or a score."""
        return fine_tune(
            start,
            examples,
            steps=steps.steps,
            key=self.key,
            learning_rates=rates,
            batch_size=steps.size,
            trainable=protocol.TRAINED,
            validation=() if score else own.batches(self.parts.validation, protocol.EVALUATION),
            checkpoints=protocol.CHECKPOINTS,
            score=score,
        )

    def with_many_labels(self, own: Reader) -> FineTuned:
        """A model of one of the two, fine-tuned with the labels of the source."""
        path = self.kept / f"{own.name}-{self.draw}.safetensors"
        told = {
            "rates": str(protocol.RATES_MANY),
            "steps": str(protocol.MANY),
            "texts": hashlib.sha256(self.parts.source).hexdigest(),
        }
        if path.exists():
            params, found = tv.load_task_vector(path)
            if told.items() <= found.items():
                chosen = json.loads(found["chosen"])
                return FineTuned(tree.replace(own.model.params, tree.flatten(params)), **chosen, losses=np.zeros(0))
        tuned = self.tuned(own, own.model, own.batch(self.parts.source), protocol.MANY, protocol.RATES_MANY)
        chosen = {"learning_rate": tuned.learning_rate, "steps": tuned.steps, "accuracy": tuned.accuracy}
        path.parent.mkdir(parents=True, exist_ok=True)
        tv.save_task_vector(path, tuned.params, {**told, "chosen": json.dumps(chosen)})
        return tuned
