"""A damaged ``config.json`` is a ValueError that names the field."""

import copy

import pytest

from tvjax.models.clip.config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from tvjax.models.families import family_of_settings

SETTINGS = CLIPConfig(CLIPVisionConfig(projection_dim=4), CLIPTextConfig(projection_dim=4)).to_dict()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("vision_config", "x", "vision_config is 'x', expected an object"),
        ("vision_config", [1], r"vision_config is \[1\], expected an object"),
        ("vision_config.hidden_size", "8", "hidden_size is '8', expected int"),
        ("vision_config.hidden_size", 0, "hidden_size is 0, expected a number from 1 to"),
        ("vision_config.hidden_size", -8, "hidden_size is -8"),
        ("vision_config.num_attention_heads", 0, "num_attention_heads is 0"),
        ("vision_config.num_hidden_layers", True, "num_hidden_layers is True, expected int"),
        ("vision_config.num_hidden_layers", -1, "num_hidden_layers is -1"),
        ("vision_config.patch_size", 0, "patch_size is 0"),
        ("vision_config.layer_norm_eps", float("nan"), "layer_norm_eps is nan, expected a number from 0 to"),
        ("text_config.max_position_embeddings", 0, "max_position_embeddings is 0"),
        ("architectures", 5, "architectures is 5, expected a list of names"),
        ("architectures", "CLIPModel", "architectures is 'CLIPModel', expected a list of names"),
        ("architectures", [5], "expected a list of names"),
        ("model_type", ["clip"], r"model_type \['clip'\] is not supported"),
        ("model_type", {"a": 1}, "is not supported"),
    ],
)
def test_a_damaged_config(path, value, message):
    settings = copy.deepcopy(SETTINGS)
    *parents, last = path.split(".")
    node = settings
    for name in parents:
        node = node[name]
    node[last] = value
    with pytest.raises(ValueError, match=message):
        family_of_settings(settings).config.from_dict(settings)


def test_the_sound_one_is_read():
    assert family_of_settings(SETTINGS).config.from_dict(SETTINGS).vision.projection_dim == 4
