"""Coefficients over several transports of one task vector, on the embedded models, with a few labels."""

import dataclasses

import jax

from tvjax.compose import combine, few_shot, init, learn
from tvjax.demo.base import draw_examples
from tvjax.demo.setup import QUICK, SOURCE, load, photographs, style_of
from tvjax.evaluate import accuracy
from tvjax.transport import bico, chain, fit, gradfix


def test_coefficients_over_transports_of_one_task_vector_gain_accuracy():
    task = "mirrored"
    settings = dataclasses.replace(QUICK, labels_per_class=3)
    source, target = (load(name, (task,)) for name in (SOURCE, "B"))
    images = photographs(task, style_of(task), settings)
    examples = draw_examples(images.pool, task, 0, settings)
    both, tau, model = chain(bico(), gradfix()), source.taus[task], target.model
    state = fit(both, source.model, model, [examples])

    @jax.jit
    def moved(state):
        alone = (dataclasses.replace(state, parts=(part,)) for part in state.parts)
        return [both.apply(state, tau), *(t.apply(s, tau) for t, s in zip((bico(), gradfix()), alone, strict=True))]

    taus = [tau, *moved(state)]
    start = init(taus, names=["naive", "masked", "bico", "gradfix"])
    found = learn(
        model.params, taus, few_shot(model, examples), key=jax.random.key(0), coefficients=start, batch_size=None,
        epochs=4,
    )  # fmt: skip
    edited = model.replace(params=jax.jit(combine)(model.params, taus, found.trainable))
    before, after = (accuracy(m, images.validation).fraction for m in (model, edited))
    assert after > before + 0.05
