import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax.compose import Edited, combine, few_shot, init, linearise, value
from tvjax.compose.edited import outputs
from tvjax.models.clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, clip
from tvjax.models.clip import init as clip_init
from tvjax.stages import Batch, Model, Stage

KEY = jax.random.key(0)
CONFIG = CLIPConfig(
    CLIPVisionConfig(8, 16, 1, 2, image_size=8, patch_size=4, projection_dim=4),
    CLIPTextConfig(16, 8, 16, 1, 2, max_position_embeddings=6, eos_token_id=15, projection_dim=4),
)


def contrastive(loss_params, outputs, labels):
    return -jnp.diagonal(jax.nn.log_softmax(outputs["logits_per_image"]))


def noisy(params, seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * random.normal(size=leaf.shape), leaf.dtype), params)


@pytest.fixture(scope="module")
def pair():
    """A CLIP of two towers: the first stage of one sees no floats, and the last has a single leaf."""
    model = clip(CONFIG, noisy(clip_init(CONFIG, KEY), 0)).with_loss(contrastive)
    random = np.random.default_rng(1)
    inputs = {
        "pixels": jnp.asarray(random.normal(size=(4, 8, 8, 3)), jnp.float32),
        "tokens": jnp.asarray(random.integers(0, 15, (4, 6)), jnp.int32),
        "mask": jnp.ones((4, 6), bool),
    }
    return model, [noisy(model.params, seed) for seed in (2, 3)], Batch(inputs, jnp.zeros(4, jnp.int32))


@pytest.mark.parametrize(
    ("which", "options"), [("tiny", {}), ("tiny", {"partitions": 3, "key": KEY}), ("pair", {"blocks": "vector"})]
)
def test_edited_stage_by_stage_is_edited_at_once(tiny, pair, which, options):
    model, taus, batch = (tiny.model, tiny.taus, tiny.batch) if which == "tiny" else pair
    objective = few_shot(model, batch)
    start = init(taus, **options)
    random = np.random.default_rng(0)
    start = dataclasses.replace(start, values=jax.device_put(np.float32(0.2 * random.normal(size=start.values.shape))))

    def loss(edit):
        return jax.jit(
            jax.value_and_grad(
                lambda c, p, t: value(objective, edit(p, t, c), [batch], KEY), argnums=(0, 1, 2), allow_int=True
            )
        )(start, model.params, taus)

    (found, gradient), (expected, whole) = loss(Edited), loss(combine)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for one, other in zip(*map(jax.tree.leaves, (gradient, whole)), strict=True):
        assert one.dtype == other.dtype
        if one.dtype != jax.dtypes.float0:
            scale = np.abs(np.asarray(other, np.float32)).max()
            np.testing.assert_allclose(one, other, atol=(1e-5 if one.dtype == jnp.float32 else 1e-2) * (scale + 1e-3))


def test_other_models_get_the_parameters(tiny):
    coefficients = init(tiny.taus, value=0.1)
    edited = Edited(tiny.model.params, tiny.taus, coefficients)
    flat = linearise(tiny.model)
    found, expected = outputs(flat, edited, tiny.batch.inputs), flat.replace(params=edited.combine())(tiny.batch.inputs)
    np.testing.assert_allclose(found["logits"], expected["logits"], atol=1e-6)


def test_one_edited_stage_is_alive_at_a_time():
    """Forward and backward over many stages: neither all edited parameters nor all their gradients are held."""

    def layer(params, carry):
        return jnp.tanh(carry @ params["kernel"])

    size, depth = 256, 12
    params = {str(i): {"kernel": jnp.zeros((size, size))} for i in range(depth)}
    stages = tuple(Stage(str(i), layer, (("", str(i)),)) for i in range(depth))
    model = Model(params, stages, lambda _, outputs, labels: outputs.sum(-1))
    taus = [jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)] * 6
    batch = Batch(jnp.ones((4, size)), jnp.zeros(4))
    step = jax.jit(jax.value_and_grad(lambda c, p, t, o, b: value(o, Edited(p, t, c), [b], KEY)))
    memory = step.lower(init(taus), params, taus, few_shot(model, batch), batch).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 5 * size * size * 4
