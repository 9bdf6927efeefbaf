"""What is the ViT classifier's own."""

import jax
import jax.numpy as jnp
import pytest

from tvjax.models.vit import ViTConfig, init, vit

CONFIG = ViTConfig(8, 16, 2, 2, image_size=8, patch_size=4, num_labels=3)


def test_stages_and_fixed_leaves():
    model = vit(CONFIG, init(CONFIG, jax.random.key(0)))
    assert [stage.name for stage in model.stages] == ["vision/embeddings", "vision/blocks/0", "vision/blocks/1", "head"]
    assert model.stages[-1].fixed == ("head/kernel", "head/bias")
    outputs = model({"pixels": jnp.zeros((2, 8, 8, 3))})
    assert outputs.keys() == {"logits"} and outputs["logits"].shape == (2, 3)


def test_config_round_trips():
    assert ViTConfig.from_dict(CONFIG.to_dict()) == CONFIG
    assert ViTConfig.from_dict({"model_type": "vit"}) == ViTConfig()


def test_a_backbone_is_no_classifier():
    with pytest.raises(ValueError, match="architecture 'ViTModel' is not supported, only ViTForImageClassification"):
        ViTConfig.from_dict({"model_type": "vit", "architectures": ["ViTModel"]})
