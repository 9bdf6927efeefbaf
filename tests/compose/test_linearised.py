import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax import apply
from tvjax.compose import few_shot, learn, linearise, value
from tvjax.evaluate import accuracy
from tvjax.stages import single_stage


def test_at_theta_0_it_is_the_model_and_has_its_gradient(tiny):
    flat = linearise(tiny.model)
    np.testing.assert_allclose(
        jax.jit(lambda m, x: m(x))(flat, tiny.batch.inputs)["logits"],
        tiny.model(tiny.batch.inputs)["logits"],
        atol=5e-6,
    )
    one, other = (
        jax.jit(
            jax.grad(lambda p, m: value(few_shot(m, tiny.batch), p, [tiny.batch], jax.random.key(0)), allow_int=True)
        )(tiny.model.params, model)
        for model in (flat, tiny.model)
    )
    for path in (("conv", "kernel"), ("dense", "kernel"), ("dense", "bias")):
        a, b = (gradient[path[0]][path[1]] for gradient in (one, other))
        np.testing.assert_allclose(a, b, atol=1e-6)
        assert np.abs(b).max() > 1e-3


def test_it_is_linear_in_the_parameters_and_the_model_is_not(tiny):
    flat, tau = linearise(tiny.model), tiny.taus[0]

    def outputs(model, scale):
        return np.asarray(model.replace(params=apply(tiny.model.params, tau, scale))(tiny.batch.inputs)["logits"])

    steps = [outputs(flat, scale) for scale in (0.0, 1.0, 2.0)]
    np.testing.assert_allclose(steps[2] - steps[1], steps[1] - steps[0], atol=1e-4)
    curved = [outputs(tiny.model, scale) for scale in (0.0, 1.0, 2.0)]
    assert np.abs(curved[2] - 2 * curved[1] + curved[0]).max() > 0.1
    small = 1e-3
    slope = (outputs(tiny.model, small) - outputs(tiny.model, -small)) / (2 * small)
    np.testing.assert_allclose(steps[1] - steps[0], slope, atol=1e-2)


def test_objectives_training_and_accuracy_run_on_it(tiny):
    flat = linearise(tiny.model)
    objective = few_shot(flat, tiny.batch)
    found = learn(flat.params, tiny.taus, objective, key=jax.random.key(0), batch_size=None, epochs=2)
    assert found.losses[-1, -1] < found.losses[0, 0]
    assert accuracy(flat, tiny.batch).total == 24


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_dtypes_of_parameters(dtype):
    model = linearise(single_stage(lambda params, x: x.astype(dtype) * params["w"] ** 2, {"w": jnp.ones(2, dtype)}))
    found = model.replace(params={"w": jnp.full(2, 1.5, dtype)})(jnp.ones(2))
    assert found.dtype == dtype
    np.testing.assert_allclose(found, 2.0)
