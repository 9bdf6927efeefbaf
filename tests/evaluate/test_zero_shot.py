import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tvjax.evaluate.zero_shot import (
    classifier,
    zero_shot,
    zero_shot_loss,
    zero_shot_model,
    zero_shot_scores,
)
from tvjax.models.clip.config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from tvjax.models.clip.modeling import clip, init, text_model, vision_model

CONFIG = CLIPConfig(
    CLIPVisionConfig(8, 16, 1, 2, image_size=8, patch_size=4, projection_dim=4),
    CLIPTextConfig(32, 8, 16, 1, 2, max_position_embeddings=6, eos_token_id=31, projection_dim=4),
)


def tokenize(texts):
    """Tokens by letter, five at most."""
    tokens = [[ord(letter) % 31 for letter in text[:5]] for text in texts]
    rows = [row + [31] * (6 - len(row)) for row in tokens]
    return {"tokens": np.array(rows, np.int32), "mask": np.array([[1] * 6] * len(rows), bool)}


@pytest.fixture(scope="module")
def model():
    return clip(CONFIG, init(CONFIG, jax.random.key(0)))


def test_classifier_is_the_normalised_mean_of_normalised_prompts(model):
    head = classifier(model, tokenize, ["ab", "cd", "e"], ["{}!", "x{}"])
    assert head.shape == (4, 3)
    for column, name in zip(head.T, ["ab", "cd", "e"], strict=True):
        embeddings = np.array(text_model(model)(tokenize([f"{name}!", f"x{name}"]))["text"])
        mean = (embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).mean(0)
        np.testing.assert_allclose(column, mean / np.linalg.norm(mean), atol=1e-6)


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [([], ["{}"], "found 0 class names and 1 templates"), (["a"], [], "0 templates"), (["a"], ["x"], "no '{}'")],
)
def test_classifier_of_nothing_is_refused(model, names, templates, message):
    with pytest.raises(ValueError, match=message):
        classifier(model, tokenize, names, templates)


def test_loss_is_the_cross_entropy_of_clips_own_logits(model, key):
    pixels = jax.random.normal(key, (3, 8, 8, 3))
    names = ["ab", "cd"]
    logits = model({"pixels": pixels, **tokenize(names)})["logits_per_image"]
    zero_shot_tower = zero_shot_model(model, tokenize, names, ["{}"])
    outputs = zero_shot_tower({"pixels": pixels})
    np.testing.assert_allclose(zero_shot_scores(zero_shot_tower.loss_params, outputs), logits, atol=1e-5)
    labels = jnp.array([0, 1, 1])
    losses = zero_shot_tower.loss(zero_shot_tower.loss_params, outputs, labels)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    np.testing.assert_allclose(losses, expected, atol=1e-5)


def test_zero_shot_keeps_the_parameters_of_the_tower(model):
    tower = vision_model(model)
    with_head = zero_shot(tower, jnp.eye(4)[:, :3], 2.0)
    assert with_head.params is tower.params and with_head.loss is zero_shot_loss
    assert with_head.loss_params["logit_scale"].dtype == jnp.float32


def test_half_precision_parameters_give_float32_losses(model):
    half = model.replace(params=jax.tree.map(lambda leaf: leaf.astype(jnp.float16), model.params))
    tower = zero_shot_model(half, tokenize, ["ab", "cd"], ["{}"])
    outputs = tower({"pixels": jnp.ones((2, 8, 8, 3))})
    assert tower.loss(tower.loss_params, outputs, jnp.array([0, 1])).dtype == jnp.float32
