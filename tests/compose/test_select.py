import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax import tree
from tvjax.compose import addition, combine, few_shot, init, negation, select_informative, value

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def informed(tiny):
    """|gradient| of every coefficient at zero, by vector and path."""
    coefficients = init(tiny.taus)

    def loss(coefficients):
        params = combine(tiny.model.params, tiny.taus, coefficients)
        return value(few_shot(tiny.model, tiny.batch), params, [tiny.batch], KEY)

    gradient = np.abs(jax.grad(loss)(coefficients).values[..., 0])
    return {
        (index, place.path): float(gradient[index, place.block])
        for place in coefficients.layout.places
        for index in place.vectors
    }


def kept_leaves(taus):
    return {(index, path) for index, tau in enumerate(taus) for path in tree.flatten(tau)}


@pytest.mark.parametrize("batch_size", [24, 10])
def test_a_count_keeps_the_greatest_gradients_of_coefficients(tiny, informed, batch_size):
    objective = few_shot(tiny.model, tiny.batch)
    for count in (0, 3, 7, 100):
        kept, report = select_informative(
            tiny.model.params, tiny.taus, objective, key=KEY, leaves=count, batch_size=batch_size
        )
        best = sorted(informed, key=informed.get, reverse=True)[:count]
        assert kept_leaves(kept) == set(best)
        assert [(leaf.vector, leaf.path) for leaf in report] == sorted(informed, key=informed.get, reverse=True)
        for leaf in report:
            assert leaf.information == pytest.approx(informed[leaf.vector, leaf.path], abs=1e-5)
            assert leaf.kept == ((leaf.vector, leaf.path) in best)
    assert [jax.tree.structure(tau) for tau in kept] == [jax.tree.structure(tau) for tau in tiny.taus]


def test_a_budget_of_bytes_is_kept_and_used(tiny, informed):
    stored = {
        (index, path): leaf.nbytes for index, tau in enumerate(tiny.taus) for path, leaf in tree.flatten(tau).items()
    }
    for budget in (0, 30, 700, 2000, sum(stored.values())):
        kept, report = select_informative(
            tiny.model.params, tiny.taus, few_shot(tiny.model, tiny.batch), key=KEY, nbytes=budget
        )
        chosen = kept_leaves(kept)
        room = budget - sum(stored[leaf] for leaf in chosen)
        assert room >= 0
        for leaf in stored.keys() - chosen:  # what was dropped had no room behind what is more informative
            before = sum(stored[other] for other in chosen if informed[other] > informed[leaf])
            assert before + stored[leaf] > budget
        assert {(leaf.vector, leaf.path): leaf.bytes for leaf in report} == stored


def test_what_is_kept_is_learned_over(tiny):
    kept, _ = select_informative(
        tiny.model.params, tiny.taus, few_shot(tiny.model, tiny.batch), key=KEY, leaves=4, nbytes=10**6
    )
    params = combine(tiny.model.params, kept, init(kept, value=0.5))
    changed = {
        path for path, leaf in tree.flatten(params).items() if np.any(leaf != tree.flatten(tiny.model.params)[path])
    }
    assert changed == {path for _, path in kept_leaves(kept)}


def test_objectives_of_several_terms_and_vectors_on_the_host(tiny):
    batches = [tiny.batch, tiny.make_batch(12, 3)]
    taus = [jax.tree.map(np.asarray, tau) for tau in tiny.taus]
    coefficients = init(tiny.taus)
    for objective in (
        addition([(tiny.model, b) for b in batches]),
        negation(*((tiny.model, b) for b in batches)),
    ):

        def loss(coefficients, objective=objective):
            return value(objective, combine(tiny.model.params, tiny.taus, coefficients), batches, KEY)

        gradient = np.abs(jax.grad(loss)(coefficients).values[..., 0])
        _, report = select_informative(tiny.model.params, taus, objective, key=KEY, leaves=1, batch_size=9)
        for leaf in report:
            block = coefficients.layout.blocks.index(leaf.path)
            assert leaf.information == pytest.approx(float(gradient[leaf.vector, block]), abs=1e-5)


def test_bad_requests_are_refused(tiny):
    objective = few_shot(tiny.model, tiny.batch)
    for options in ({}, {"leaves": -1}, {"nbytes": -5}):
        with pytest.raises(ValueError, match="expected a budget"):
            select_informative(tiny.model.params, tiny.taus, objective, key=KEY, **options)
    with pytest.raises(ValueError, match="other: not in the parameters"):
        select_informative(tiny.model.params, [{"other": jnp.ones(2)}], objective, key=KEY, leaves=1)
    with pytest.raises(ValueError, match=r"scale: parameters \(\) float32, task vector 0 \(2,\)"):
        select_informative(tiny.model.params, [{"scale": jnp.ones(2)}], objective, key=KEY, leaves=1)
