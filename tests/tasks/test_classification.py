"""Tasks of classes: a model's own head, a dual encoder, and an encoder of sentences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax import compose, tasks
from tvjax.checkpoints import from_pretrained, load_processor
from tvjax.data import Encoder, Images, Texts, digits, open_examples
from tvjax.data.embedded import model_folder
from tvjax.evaluate import accuracy, predict
from tvjax.models.clip.modeling import vision_model
from tvjax.models.vit.config import ViTConfig
from tvjax.models.vit.modeling import init, vit
from tvjax.stages import single_stage
from tvjax.tasks.zero_shot import ZERO_SHOT

TOPICS = ("cats and cats", "dogs", "dog cat dog", "cat")
ENCODER = Encoder(lambda texts: of_words(texts), shortest=2)
VOCABULARY = ("a", "text", "about", "cat", "dog", "cats", "dogs", "and")


def of_words(texts):
    ids = [[VOCABULARY.index(word) for word in text.split()] for text in texts]
    return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}


def about(labels=(0, 1, 1, 0), names=("cat", "dog")):
    return Texts("topics", range(4), lambda key: (TOPICS[key],), np.array(labels), names, columns=("text",))


@pytest.fixture
def sentences():
    """The mean of word embeddings: cats along one axis, dogs along another."""
    words = jnp.array([[0, 0, 1], [0, 0, 1], [0, 0, 1], [1, 0, 0], [0, 1, 0], [1, 0, 0.1], [0, 1, 0.1], [0, 0, 1]])

    def mean(params, inputs):
        mask = inputs["mask"][..., None].astype(jnp.float32)
        return {"text": (params["words"][inputs["tokens"]] * mask).sum(1) / mask.sum(1)}

    return single_stage(mean, {"words": words.astype(jnp.float32)})


def test_texts_by_the_names_of_their_classes(sentences):
    task = tasks.zero_shot(ENCODER, ["cat", "dog"], ["a text about {}"])
    model = task.model(sentences)
    assert model.loss == ZERO_SHOT and model.params is sentences.params
    np.testing.assert_allclose(np.exp(model.loss_params["logit_scale"]), 20, rtol=1e-6)
    for size in (1, 3):
        found = task.score(model, task.batches(about(), size))
        assert found.accuracy == found.exact_match == 1.0 and found.examples == found.answers == 4
        assert accuracy(model, task.batches(about((1, 1, 1, 0)), size)).correct == 3
    embeddings = tasks.unit_embeddings(sentences, task.batches(about(), 2))
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)


def test_the_factor_of_the_cosines_changes_the_loss_and_no_answer(sentences):
    batches = list(tasks.zero_shot(ENCODER, ["cat", "dog"]).batches(about(), 4))
    found = {}
    for scale in (1.0, 50.0):
        model = tasks.zero_shot(ENCODER, ["cat", "dog"], scale=scale).model(sentences)
        np.testing.assert_allclose(np.exp(model.loss_params["logit_scale"]), scale, rtol=1e-6)
        found[scale] = tasks.score(model, batches)
    assert found[1.0].right == found[50.0].right and found[1.0].loss > found[50.0].loss
    with pytest.raises(ValueError, match="scale is -1, expected a positive number"):
        tasks.zero_shot(ENCODER, ["cat", "dog"], scale=-1)


def test_a_dual_encoder_as_a_task_is_the_tower_with_its_head():
    folder = model_folder("A")
    clip, processor = from_pretrained(folder), load_processor(folder)
    images = open_examples("digits:base/validation").take(range(0, 200, 10))
    task = tasks.zero_shot(processor, digits.CLASS_NAMES, digits.TEMPLATES)
    model = task.model(clip.model)
    by_hand = tasks.zero_shot_model(clip.model, processor.tokens, digits.CLASS_NAMES, digits.TEMPLATES)
    (batch,) = task.batches(images, 20)
    np.testing.assert_array_equal(batch.inputs["pixels"], processor.pixels(images))
    np.testing.assert_array_equal(predict(model, batch.inputs), predict(by_hand, batch.inputs))
    assert task.score(model, batch).right == accuracy(by_hand, batch).correct
    assert model.params is not clip.params and set(model.params) == {"vision"}


def test_a_vision_tower_alone_is_asked_with_the_text_tower_of_another():
    clip, processor = (read(model_folder("A")) for read in (from_pretrained, load_processor))
    images = open_examples("digits:base/validation").take(range(0, 200, 10))
    names, prompts = digits.CLASS_NAMES, digits.TEMPLATES[:1]
    own = tasks.zero_shot(processor, names, prompts)
    alone = tasks.zero_shot(processor, names, prompts, text=(clip.model, processor.tokens))
    (batch,) = own.batches(images, 20)
    tower = vision_model(clip.model)
    assert alone.score(alone.model(tower), batch) == own.score(own.model(clip.model), batch)
    with pytest.raises(ValueError, match="the model has no text tower"):
        own.model(tower)


def test_the_scores_of_a_task_serve_objectives_without_being_named(sentences):
    task = tasks.zero_shot(ENCODER, ["cat", "dog"], ["a text about {}"])
    model = task.model(sentences)
    batch = task.batches(about(), 4).whole()
    goal = compose.entropy(model, batch.inputs)
    chances = jax.nn.softmax(ZERO_SHOT.scores(model.loss_params, model(batch.inputs)))
    expected = -(chances * jnp.log(chances)).sum(1).mean()
    found = compose.value(goal, model.params, [batch.inputs], jax.random.key(0))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_the_head_of_a_vit():
    config = ViTConfig(8, 16, 2, 2, image_size=8, patch_size=4, num_labels=3)
    model = vit(config, init(config, jax.random.key(0)))

    class Grey:
        @staticmethod
        def pixels(images):
            return np.stack(images).astype(np.float32) / 255

    photos = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    labels = np.asarray(model({"pixels": Grey.pixels(photos)})["logits"]).argmax(1)
    images = Images("photos", range(6), photos.__getitem__, labels, ("a", "b", "c"))
    task = tasks.own_head(Grey, ["a", "b", "c"])
    assert task.score(task.model(model), task.batches(images, 4)).accuracy == 1.0
    with pytest.raises(ValueError, match=r"'photos' has 3 classes, and the task .* has 2 \(x, y\)"):
        tasks.own_head(Grey, ["x", "y"]).batches(images, 4)
    with pytest.raises(ValueError, match="'topics' is of texts, and the task .* takes images"):
        task.batches(about(), 4)
    with pytest.raises(ValueError, match=r"returns logits \[6, 3\], which the task 'zero-shot classification'"):
        ZERO_SHOT.scores({"logit_scale": jnp.zeros(()), "classifier": jnp.eye(3)}, {"logits": jnp.zeros((6, 3))})


def test_pairs_of_texts_reach_the_tokenizer_as_pairs():
    seen = []

    def tokenizer(texts, pairs):
        seen.append((texts, pairs))
        return {"input_ids": [[1]] * len(texts), "attention_mask": [[1]] * len(texts)}

    rows = [("a", "b"), ("c", "d")]
    texts = Texts("pairs", range(2), rows.__getitem__, columns=("premise", "hypothesis"))
    list(tasks.own_head(Encoder(tokenizer)).batches(texts, 2))
    assert seen == [(["a", "c"], ["b", "d"])]
