import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tvjax.evaluate.accuracy import predict
from tvjax.models.clip.config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from tvjax.models.clip.modeling import clip, init, text_model, vision_model
from tvjax.stages import Model, Stage
from tvjax.tasks.zero_shot import ZERO_SHOT, classifier, with_head, zero_shot_model, zero_shot_scores

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


def test_classes_of_one_name_have_one_column(model):
    names = ["ab", "cd", "ab", "e"]
    head = classifier(model, tokenize, names, ["{}!", "x{}"])
    np.testing.assert_array_equal(head[:, 0], head[:, 2])
    np.testing.assert_allclose(
        head[:, [0, 1, 3]], classifier(model, tokenize, ["ab", "cd", "e"], ["{}!", "x{}"]), atol=1e-6
    )


def test_of_equal_columns_the_first_wins():
    random = np.random.default_rng(0)
    head = random.normal(size=(512, 397)).astype(np.float32)
    head[:, 396], head[:, 200] = head[:, 0], head[:, 1]  # sums over the last columns are rounded otherwise on CPU
    tower = with_head(Model({}, (Stage("image", lambda params, carry: {"image": carry}),)), head, 0.0)
    found = predict(tower, np.concatenate([head[:, [396, 200, 7]].T, random.normal(size=(4, 512)).astype(np.float32)]))
    assert found[:3].tolist() == [0, 1, 7] and not set(found.tolist()) & {200, 396}
    scores = zero_shot_scores(tower.loss_params, {"image": jnp.asarray(random.normal(size=(7, 512)), jnp.float32)})
    np.testing.assert_array_equal(scores[:, 396], scores[:, 0])


def test_many_prompts_are_embedded_in_parts(model, monkeypatch):
    whole = classifier(model, tokenize, ["ab", "cd", "e"], ["{}!", "x{}"])
    monkeypatch.setitem(classifier.__globals__, "_TEXTS", 4)
    np.testing.assert_allclose(classifier(model, tokenize, ["ab", "cd", "e"], ["{}!", "x{}"]), whole, atol=1e-6)


def test_a_head_that_does_not_read_its_texts_is_refused(model):
    def outside(texts):
        return {**tokenize(texts), "tokens": np.where(tokenize(texts)["tokens"] == 31, 40, tokenize(texts)["tokens"])}

    def endless(texts):
        start = np.full((len(texts), 1), 30, np.int32)
        return {"tokens": np.concatenate([start, np.minimum(tokenize(texts)["tokens"], 29)], 1)[:, :6]}

    with pytest.raises(ValueError, match="embeddings of 2 of 2 classes are NaN or infinite:\n  'ab'\n  'cd'\n"):
        zero_shot_model(model, outside, ["ab", "cd"], ["{}"])
    with pytest.raises(ValueError, match="(?s)2 pairs of classes have one text embedding.*'ab' and 'cd'.*eos_token_id"):
        zero_shot_model(model, endless, ["ab", "cd", "e"], ["{}"])
    with pytest.raises(ValueError, match="the zero-shot head has values that are NaN"):
        with_head(vision_model(model), np.full((4, 3), np.nan), 2.0)


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
    headed = with_head(tower, jnp.eye(4)[:, :3], 2.0)
    assert headed.params is tower.params and headed.loss == ZERO_SHOT
    assert headed.loss_params["logit_scale"].dtype == jnp.float32


def test_half_precision_parameters_give_float32_losses(model):
    half = model.replace(params=jax.tree.map(lambda leaf: leaf.astype(jnp.float16), model.params))
    tower = zero_shot_model(half, tokenize, ["ab", "cd"], ["{}"])
    outputs = tower({"pixels": jnp.ones((2, 8, 8, 3))})
    assert tower.loss(tower.loss_params, outputs, jnp.array([0, 1])).dtype == jnp.float32
