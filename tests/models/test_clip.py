"""What is CLIP's own: configs, towers, where a text is read, padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax.models.clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, clip, init, text_model, vision_model
from tvjax.models.clip.modeling import end_position
from tvjax.stages import Stream

VISION = CLIPVisionConfig(8, 16, 2, 2, image_size=8, patch_size=4, projection_dim=4)
TEXT = CLIPTextConfig(16, 8, 16, 2, 2, max_position_embeddings=6, eos_token_id=15, projection_dim=4)
TOKENS = np.array([[14, 3, 4, 15, 0, 0], [14, 5, 15, 0, 0, 0]], np.int32)


@pytest.fixture(scope="module")
def model():
    config = CLIPConfig(VISION, TEXT)
    return clip(config, init(config, jax.random.key(0)))


def test_stages_declare_their_rows_and_what_is_fixed(model):
    stages = {stage.name: stage for stage in model.stages}
    assert list(stages) == [
        *("vision/embeddings", "vision/blocks/0", "vision/blocks/1", "vision/head"),
        *("text/embeddings", "text/blocks/0", "text/blocks/1", "text/head"),
        "logits",
    ]
    assert stages["vision/blocks/1"].streams == Stream(special=1, grid=(2, 2))
    assert stages["vision/blocks/1"].streams.tokens == 5
    assert stages["text/blocks/1"].streams == Stream(mask="mask")
    assert [name for name, stage in stages.items() if stage.group == "vision/blocks"] == list(stages)[1:3]
    assert not any(stage.fixed for stage in model.stages)  # two CLIPs have embedding spaces of their own


def test_towers_alone(model):
    pixels = jax.random.normal(jax.random.key(1), (3, 8, 8, 3))
    outputs = model({"pixels": pixels, "tokens": TOKENS, "mask": TOKENS > 0})
    vision, text = vision_model(model), text_model(model)
    assert set(vision.params) == {"vision"} and set(text.params) == {"text"}
    np.testing.assert_array_equal(vision({"pixels": pixels})["image"], outputs["image"])
    np.testing.assert_array_equal(text({"tokens": TOKENS, "mask": TOKENS > 0})["text"], outputs["text"])
    cosines = outputs["logits_per_image"] / np.exp(model.params["logit_scale"])
    assert np.abs(cosines).max() <= 1 + 1e-6
    with pytest.raises(ValueError, match="the model has no text tower"):
        text_model(vision)


def test_padding_after_the_end_changes_nothing(model):
    text = text_model(model)
    embedding = text({"tokens": TOKENS, "mask": TOKENS > 0})["text"]
    cut = text({"tokens": TOKENS[:, :4], "mask": TOKENS[:, :4] > 0})["text"]
    unmasked = text({"tokens": np.where(TOKENS == 0, 7, TOKENS)})["text"]  # a causal model sees nothing after the end
    np.testing.assert_allclose(embedding, cut, atol=1e-6)
    np.testing.assert_allclose(embedding, unmasked, atol=1e-6)


def test_padding_before_the_text_is_not_seen(model):
    text = text_model(model)
    left = np.array([[7, 14, 3, 15]], np.int32)
    other = np.where(left == 7, 9, left)
    mask = np.array([[False, True, True, True]])
    embeddings = [text({"tokens": tokens, "mask": mask})["text"] for tokens in (left, other)]
    np.testing.assert_array_equal(*embeddings)


def test_the_end_of_a_text():
    tokens = jnp.array([[14, 3, 15, 15], [14, 9, 4, 2]])
    assert end_position(tokens, 15).tolist() == [2, 0]
    assert end_position(tokens, 2).tolist() == [2, 0]


def test_wrong_inputs_say_what_is_expected(model):
    with pytest.raises(ValueError, match=r"pixels have shape \(1, 3, 8, 8\), expected \(batch, 8, 8, 3\)"):
        vision_model(model)({"pixels": jnp.zeros((1, 3, 8, 8))})
    with pytest.raises(ValueError, match="texts of 7 tokens, at most 6 have positions"):
        text_model(model)({"tokens": np.zeros((1, 7), np.int32)})
    outside = text_model(model)({"tokens": np.array([[14, 16, 15]], np.int32)})
    assert np.isnan(outside["text"]).all()


def test_config_of_a_full_model():
    settings = {
        "model_type": "clip",
        "projection_dim": 4,
        "vision_config": {"hidden_size": 8, "projection_dim": 99, "image_size": [8, 8]},
        "vision_config_dict": None,
        "text_config": {"hidden_size": 8},
        "text_config_dict": {"hidden_size": 16, "num_attention_heads": 4},
    }
    config = CLIPConfig.from_dict(settings)
    assert (config.vision.hidden_size, config.vision.projection_dim, config.vision.image_size) == (8, 4, 8)
    assert (config.text.hidden_size, config.text.num_attention_heads, config.text.projection_dim) == (16, 4, 4)
    assert CLIPConfig.from_dict({"model_type": "clip"}) == CLIPConfig()


@pytest.mark.parametrize("projection_dim", [None, 4])
@pytest.mark.parametrize("tower", ["vision", "text"])
def test_config_of_one_tower_round_trips(tower, projection_dim):
    towers = {"vision": CLIPVisionConfig, "text": CLIPTextConfig}
    config = CLIPConfig(**{name: None for name in towers} | {tower: towers[tower](projection_dim=projection_dim)})
    settings = config.to_dict()
    assert settings["model_type"] == f"clip_{tower}_model"
    assert settings["architectures"][0].endswith("WithProjection") == (projection_dim is not None)
    assert CLIPConfig.from_dict(settings) == config


def test_the_vision_tower_of_a_full_config():
    settings = {"model_type": "clip", "architectures": ["CLIPVisionModelWithProjection"], "vision_config": {}}
    assert CLIPConfig.from_dict(settings) == CLIPConfig(CLIPVisionConfig(), None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architectures": ["CLIPForImageClassification"]}, "architecture 'CLIPForImageClassification' is not supp"),
        ({"vision_config": {"image_size": [8, 16]}}, r"image_size is \[8, 16\], expected a square"),
        ({"vision_config": {"num_channels": 1}}, "num_channels is 1, expected 3"),
        ({"vision_config": {"hidden_size": "8"}}, "hidden_size is '8', expected int"),
    ],
)
def test_unsupported_configs(settings, message):
    with pytest.raises(ValueError, match=message):
        CLIPConfig.from_dict({"model_type": "clip"} | settings)


def test_inconsistent_configs():
    with pytest.raises(ValueError, match="at least one tower"):
        CLIPConfig(None, None)
    with pytest.raises(ValueError, match="projection_dim is 4 for vision and 5 for text"):
        CLIPConfig(VISION, CLIPTextConfig(projection_dim=5))
    with pytest.raises(ValueError, match="hidden_act 'mish' is not supported: use one of .*quick_gelu"):
        _ = CLIPVisionConfig(hidden_act="mish").block
    with pytest.raises(ValueError, match="hidden_size 10 is not a multiple of num_attention_heads 4"):
        _ = CLIPVisionConfig(hidden_size=10, num_attention_heads=4).block
