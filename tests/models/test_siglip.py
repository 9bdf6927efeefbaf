"""What is SigLIP's own: pooling by attention, padding that is read, sigmoid scores, zero-shot classification."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tvjax import Batch, Stream, bico, fit, leaf_report, theseus, tree
from tvjax.checkpoints import Pretrained, load_processor, save_pretrained
from tvjax.models.clip import CLIPConfig, CLIPVisionConfig, clip
from tvjax.models.clip import init as init_clip
from tvjax.models.siglip import SiglipConfig, SiglipTextConfig, SiglipVisionConfig, init, siglip
from tvjax.stages import tower
from tvjax.tasks.zero_shot import zero_shot_model

VISION = SiglipVisionConfig(8, 16, 2, 2, image_size=8, patch_size=4)
TEXT = SiglipTextConfig(16, 8, 16, 2, 2, max_position_embeddings=6, projection_size=8)
CONFIG = SiglipConfig(VISION, TEXT)
TOKENS = np.array([[3, 4, 5, 1, 1, 1], [6, 7, 1, 1, 1, 1]], np.int32)


def noisy(params, seed=0):
    """No bias is zero, no scale one."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jax.device_put(np.asarray(x) + np.float32(0.3 * random.normal(size=x.shape))), params)


@pytest.fixture(scope="module")
def model():
    return siglip(CONFIG, noisy(init(CONFIG, jax.random.key(0))))


@pytest.fixture(scope="module")
def pixels():
    return jnp.asarray(np.random.default_rng(0).normal(size=(5, 8, 8, 3)), jnp.float32)


def test_stages_and_towers(model, pixels):
    stages = {stage.name: stage for stage in model.stages}
    assert stages["vision/blocks/1"].streams == Stream(grid=(2, 2)) and stages["vision/blocks/1"].streams.tokens == 4
    assert stages["text/blocks/1"].streams == Stream(mask="mask")
    assert not any(stage.fixed for stage in model.stages)  # two SigLIPs have embedding spaces of their own
    outputs = model({"pixels": pixels, "tokens": TOKENS})
    np.testing.assert_array_equal(tower(model, "vision")({"pixels": pixels})["image"], outputs["image"])
    np.testing.assert_array_equal(tower(model, "text")({"tokens": TOKENS})["text"], outputs["text"])


def test_padding_is_read_and_a_mask_that_says_otherwise_is_kept(model):
    text = tower(model, "text")
    plain = text({"tokens": TOKENS})["text"]
    other = text({"tokens": np.where(TOKENS == 1, 2, TOKENS)})["text"]
    masked = text({"tokens": TOKENS, "mask": np.broadcast_to(np.arange(6) >= 3, TOKENS.shape)})["text"]
    assert np.abs(plain - other).max() > 1e-3 and np.abs(plain - masked).max() > 1e-3
    full = text({"tokens": TOKENS, "mask": np.ones_like(TOKENS, bool)})["text"]
    np.testing.assert_array_equal(full, plain)
    hidden = text({"tokens": np.where(np.arange(6) < 3, 9, TOKENS), "mask": np.broadcast_to(np.arange(6) >= 3, (2, 6))})
    np.testing.assert_allclose(hidden["text"], masked, atol=1e-6)  # what is masked is not seen


def test_scores_of_pairs_and_classes_have_one_order(model, pixels):
    outputs = model({"pixels": pixels, "tokens": TOKENS})
    image, text = (outputs[name] / np.linalg.norm(outputs[name], axis=1, keepdims=True) for name in ("image", "text"))
    expected = np.exp(model.params["logit_scale"]) * image @ text.T + model.params["logit_bias"]
    np.testing.assert_allclose(outputs["logits_per_image"], expected, rtol=1e-5, atol=1e-5)
    classifier = zero_shot_model(model, lambda _: {"tokens": TOKENS}, ["one", "two"], ["{}"])
    scores = classifier.loss.scores(classifier.loss_params, classifier({"pixels": pixels}))
    np.testing.assert_allclose(scores, expected - model.params["logit_bias"], rtol=1e-5, atol=1e-5)
    assert (jax.nn.sigmoid(expected).argmax(1) == scores.argmax(1)).all()


def test_what_the_probe_asks_is_no_activation_and_is_reported(model, pixels):
    vision = tower(model, "vision")
    labelled = vision.with_loss(lambda _, outputs, labels: jnp.sum(outputs["image"] ** 2, 1) * labels)
    batches = [(Batch({"pixels": pixels}, jnp.ones(5)),) * 2]
    for method in (theseus, bico):
        report = {leaf.target: leaf for leaf in leaf_report(fit(method(), labelled, labelled, batches))}
        head = "vision/head"
        rotated = ("attention/key", "attention/value", "attention/out", "mlp/up", "mlp/down")
        assert {report[f"{head}/{name}/kernel"].action for name in rotated} == {"rotated"}
        for name in ("probe", "attention/query/kernel"):
            assert report[f"{head}/{name}"].action != "rotated" and report[f"{head}/{name}"].why


def test_a_clip_moves_into_a_siglip_where_their_layers_have_one_name(pixels):
    source_config = CLIPConfig(CLIPVisionConfig(12, 16, 3, 3, image_size=8, patch_size=4, projection_dim=4), None)
    source = clip(source_config, noisy(init_clip(source_config, jax.random.key(1))))
    target = tower(siglip(CONFIG, noisy(init(CONFIG, jax.random.key(0)))), "vision")
    rebase = theseus()
    state = fit(rebase, source, target, [(Batch({"pixels": pixels}),) * 2])
    moved = tree.flatten(rebase.apply(state, noisy(source.params, 3)))
    for path, leaf in tree.flatten(target.params).items():
        assert moved[path].shape == leaf.shape
        assert np.any(moved[path]) or "blocks/" not in path or not path.endswith("kernel"), path
    actions = {leaf.target: leaf.action for leaf in leaf_report(state) if leaf.target}
    assert actions["vision/blocks/1/mlp/up/kernel"] == "rotated"
    assert actions["vision/head/mlp/up/kernel"] == "unmatched"  # a CLIP has no such head


@pytest.mark.parametrize("config", [CONFIG, SiglipConfig(VISION, None), SiglipConfig(None, TEXT)])
def test_configs_round_trip(config):
    assert SiglipConfig.from_dict(config.to_dict()) == config


def test_what_a_config_leaves_out():
    assert SiglipConfig.from_dict({"model_type": "siglip"}) == SiglipConfig()
    text = {"hidden_size": 1152, "projection_size": 1536}
    giant = SiglipConfig.from_dict(
        {"model_type": "siglip", "vision_config": {"hidden_size": 1536}, "text_config": text}
    )
    assert (giant.vision.projection_dim, giant.text.projection_size) == (1536, 1536)
    tower_of_a_whole = {"model_type": "siglip", "architectures": ["SiglipVisionModel"], "vision_config": {}}
    assert SiglipConfig.from_dict(tower_of_a_whole) == SiglipConfig(SiglipVisionConfig(), None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architectures": ["SiglipForImageClassification"]}, "architecture 'SiglipForImageClassification' is not sup"),
        ({"vision_config": {"vision_use_head": False}}, "vision_use_head is False"),
        ({"vision_config": {"hidden_size": 1152}}, "projection_size is 768 for text and hidden_size 1152 for vision"),
        ({"text_config": {"hidden_size": "8"}}, "hidden_size is '8', expected int"),
    ],
)
def test_unsupported_configs(settings, message):
    with pytest.raises(ValueError, match=message):
        SiglipConfig.from_dict({"model_type": "siglip", **settings})


def test_no_tower_at_all():
    with pytest.raises(ValueError, match="at least one tower"):
        SiglipConfig(None, None)


# -- texts -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    config = dataclasses.replace(CONFIG, text=dataclasses.replace(TEXT, vocab_size=4))
    save_pretrained(Pretrained(siglip(config, init(config, jax.random.key(0))), config), tmp_path / "model")
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1, "cat": 2, "a": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    return tmp_path / "model"


def write_settings(folder, tokenizer_class):
    settings = {"tokenizer_class": tokenizer_class, "unk_token": "<unk>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_texts_are_padded_to_the_length_of_the_model_and_all_of_it_is_read(folder):
    write_settings(folder, "PreTrainedTokenizerFast")
    found = load_processor(folder).tokens(["a cat", "cat"])
    assert found["tokens"].tolist() == [[3, 2, 1, 1, 1, 1], [2, 1, 1, 1, 1, 1]] and found["mask"].all()


def test_a_tokenizer_that_needs_another_package_is_missed_only_by_texts(folder, monkeypatch):
    import transformers

    def absent(*_, **__):
        raise ImportError("\nSiglipTokenizer requires the SentencePiece library\n")

    write_settings(folder, "SiglipTokenizer")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", absent)
    processor = load_processor(folder)
    with pytest.raises(ValueError, match="cannot be opened: SiglipTokenizer requires the SentencePiece library"):
        processor.tokens(["a cat"])
