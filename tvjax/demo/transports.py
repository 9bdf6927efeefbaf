"""Every method on one task and one target: edits, scales chosen on validation data, accuracies on test data."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tvjax.demo.base import Embedded, Sets, Settings, draw_examples, named_key
from tvjax.evaluate.accuracy import predictions
from tvjax.evaluate.fine_tune import fine_tune
from tvjax.evaluate.scale import choose_scale, edited
from tvjax.stages import Batch, Model, PyTree
from tvjax.transport import State, Transport, bico, chain, fit, gradfix, orthogonal_shift, theseus
from tvjax.transport.base import LinkState

EQUAL_SHAPES = ("naive", "orthogonal_shift", "gradfix")  # these need a target of the source's shape


def methods(settings: Settings) -> tuple[str, ...]:
    """The methods in the order of the tables.

    >>> methods(Settings(("topics",), variants=(("blocks", {"heads": "blocks"}),)))[:7]
    ('zero_shot', 'naive', 'orthogonal_shift', 'gradfix', 'theseus', 'theseus_blocks', 'bico')
    """
    named = {kind: [kind, *(f"{kind}_{name}" for name, _ in settings.variants)] for kind in ("theseus", "bico")}
    chains = ("theseus+gradfix", "bico+gradfix")
    return ("zero_shot", *EQUAL_SHAPES, *named["theseus"], *named["bico"], *chains, "few_shot", "fine_tuned")


class Result(NamedTuple):
    """What a method reaches.

    Attributes:
      method: its name.
      labels_per_class: labelled training examples of each class that it read.
      alpha: scale of its edit.
      right: ``[n]``, in what share of its repeats each test example is right.
      curve: accuracy on the validation examples at every scale of its grid; empty where there is no grid.
    """

    method: str
    labels_per_class: int
    alpha: float
    right: np.ndarray
    curve: tuple[float, ...] = ()

    @property
    def accuracy(self) -> float:
        """Fraction of the test examples."""
        return float(self.right.mean())


class Bench(NamedTuple):
    """One task on one target.

    Attributes:
      source: the model that the task vector comes from.
      target: the model that it goes to.
      task: name of the task.
      examples: of the task.
      settings: of the demo.
    """

    source: Embedded
    target: Embedded
    task: str
    examples: Sets
    settings: Settings

    @property
    def same_shape(self) -> bool:
        """Whether task vectors of the source fit the target as they are."""
        mine, theirs = self.target.taus[self.task], self.source.taus[self.task]
        return jax.tree.map(jnp.shape, mine) == jax.tree.map(jnp.shape, theirs)

    def without_examples(self) -> list[Result]:
        """The methods that look at no calibration example."""
        model, own = self.target.model, self.target.taus[self.task]
        results = [
            Result("zero_shot", 0, 0.0, self._test(model)),
            Result("fine_tuned", self.examples.trained, 1.0, self._test(edited(model, own))),
        ]
        if self.same_shape:
            tau, shift = self.source.taus[self.task], orthogonal_shift()
            shifted = shift.apply(fit(shift, self.source.model, model, []), tau)
            grid = self.settings.unit_scales
            results += [self._scaled("naive", 0, tau, grid), self._scaled("orthogonal_shift", 0, shifted, grid)]
        return results

    def with_examples(self, draw: int) -> tuple[list[Result], dict[str, State]]:
        """The methods that are fitted on a draw of calibration examples, and the states of the transports.

        Few-shot fine-tuning, a third of the work, runs beside the transports: one program seldom fills two cores.
        """
        examples = draw_examples(self.examples.pool, self.task, draw, self.settings)
        with ThreadPoolExecutor(1) as beside:
            tuned = beside.submit(self._few_shot, examples, draw)
            fitted = self._fit(examples)
            results = self._moved(fitted)
        return [*results, tuned.result()], {method: state for method, (_, state) in fitted.items()}

    def _moved(self, fitted: dict[str, tuple[Transport, State]]) -> list[Result]:
        """The edits of the transports."""
        settings, results = self.settings, []
        for method, (transport, state) in fitted.items():
            tau = transport.apply(state, self.source.taus[self.task])
            labels = settings.labels_per_class if transport.needs_gradients else 0
            grid = settings.unit_scales if method in EQUAL_SHAPES else settings.rotation_scales
            results.append(self._scaled(method, labels, tau, grid))
        return results

    def _few_shot(self, examples: Batch, draw: int) -> Result:
        """Fine-tuning on the calibration examples."""
        settings, model = self.settings, self.target.model
        tuned = fine_tune(
            model,
            examples,
            steps=settings.few_shot_steps,
            key=named_key(settings.seed + draw, f"few-shot {self.task}"),
            learning_rates=settings.learning_rates,
            trainable=settings.trainable,
            validation=self.examples.validation,
            checkpoints=settings.few_shot_checkpoints,
        )
        return Result("few_shot", settings.labels_per_class, 1.0, self._test(model.replace(params=tuned.params)))

    def _fit(self, examples: Batch) -> dict[str, tuple[Transport, State]]:
        """All transports with their states. Each link is fitted once; chains share what was fitted."""
        models = self.source.model, self.target.model
        unlabelled = fit(theseus(), *models, [examples])
        labelled = fit(chain(bico(), gradfix()), *models, [examples], task=self.task)
        rotation, mask = labelled.parts

        def state(*parts: LinkState) -> State:
            return dataclasses.replace(labelled, parts=parts)

        fitted = {
            "theseus": (theseus(), unlabelled),
            "bico": (bico(), state(rotation)),
            **self._variants(examples),
            "theseus+gradfix": (chain(theseus(), gradfix()), state(*unlabelled.parts, mask)),
            "bico+gradfix": (chain(bico(), gradfix()), labelled),
        }
        return {"gradfix": (gradfix(), state(mask)), **fitted} if self.same_shape else fitted

    def _variants(self, examples: Batch) -> dict[str, tuple[Transport, State]]:
        """Theseus and BiCo with each of the further options."""
        models = self.source.model, self.target.model
        fitted = {}
        for name, options in self.settings.variants:
            for kind, transport in (("theseus", theseus(**options)), ("bico", bico(**options))):
                task = self.task if transport.needs_gradients else ""
                fitted[f"{kind}_{name}"] = transport, fit(transport, *models, [examples], task=task)
        return fitted

    def _scaled(self, method: str, labels: int, tau: PyTree, grid: tuple[float, ...]) -> Result:
        """The edit at the scale that is best on the validation examples."""
        model = self.target.model
        chosen = choose_scale(model, tau, grid, self.examples.validation)
        found = self._test(edited(model, tau, chosen.scale))
        return Result(method, labels, chosen.scale, found, tuple(chosen.curve.tolist()))

    def _test(self, model: Model) -> np.ndarray:
        return predictions(model, self.examples.test).right.reshape(self.examples.repeats, -1).mean(0)
