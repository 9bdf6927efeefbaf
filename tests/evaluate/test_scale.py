import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax.data.batches import as_batch, split
from tvjax.evaluate.scale import choose_scale, choose_scales
from tvjax.stages import Model, Stage


def linear(params, carry):
    return {"logits": carry @ params["kernel"]}


@pytest.fixture
def problem(key):
    keys = jax.random.split(key, 4)
    inputs = jax.random.normal(keys[0], (60, 5))
    right = jax.random.normal(keys[1], (5, 3))
    labels = np.asarray((inputs @ right).argmax(1))
    model = Model({"kernel": jax.random.normal(keys[2], (5, 3))}, (Stage("linear", linear),))
    tau = {"kernel": right - model.params["kernel"] + 0.5 * jax.random.normal(keys[3], (5, 3))}
    return model, tau, inputs, labels


def test_curve_and_choice_match_brute_force(problem):
    model, tau, inputs, labels = problem
    scales = [2.0, 0.0, 0.5, 1.0]
    chosen = choose_scale(model, tau, scales, split(as_batch(inputs, labels), 25))
    curve = [
        ((np.asarray(inputs) @ np.asarray(model.params["kernel"] + s * tau["kernel"])).argmax(1) == labels).mean()
        for s in sorted(scales)
    ]
    np.testing.assert_allclose(chosen.curve, curve)
    assert chosen.scales.tolist() == sorted(scales)
    assert chosen.scale == sorted(scales)[int(np.argmax(curve))] and chosen.accuracy == max(curve)
    assert chosen.accuracy > curve[0]


def test_several_task_vectors_are_chosen_for_in_one_pass(problem):
    model, tau, inputs, labels = problem
    half = jax.tree.map(lambda leaf: leaf / 2, tau)
    once = iter(split(as_batch(inputs, labels), 25))  # a second pass would find nothing
    one, other = choose_scales(model, [(tau, (0.0, 0.5, 1.0)), (half, (1.0, 2.0))], once)
    assert one.curve[1:].tolist() == other.curve.tolist() and one.scales.tolist() == [0.0, 0.5, 1.0]
    assert one.curve.tolist() == choose_scale(model, tau, (0, 0.5, 1), as_batch(inputs, labels)).curve.tolist()


def test_ties_go_to_the_smallest_scale(problem):
    model, tau, inputs, labels = problem
    zero = jax.tree.map(jnp.zeros_like, tau)
    assert choose_scale(model, zero, [0.3, 0.1, 0.2], as_batch(inputs, labels)).scale == 0.1


def test_other_scales_compile_nothing(problem):
    model, tau, inputs, labels = problem
    traces = []

    def counted(params, carry):
        traces.append(1)
        return linear(params, carry)

    choose_scale(model.replace(stages=(Stage("linear", counted),)), tau, range(10), as_batch(inputs, labels))
    assert len(traces) == 1


@pytest.mark.parametrize("scales", [[], [0.0, float("nan")]])
def test_bad_grids_are_refused(problem, scales):
    model, tau, inputs, labels = problem
    with pytest.raises(ValueError, match="expected at least one finite number"):
        choose_scale(model, tau, scales, as_batch(inputs, labels))
