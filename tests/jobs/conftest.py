"""Tiny random models as Hugging Face folders."""

import json

import jax
import numpy as np
import pytest

from tvjax.checkpoints import Pretrained, save_pretrained
from tvjax.models.vit import ViTConfig, init, vit

LABELS = ("polar bear", "cat")  # in another order than those of folders


def write_vit(folder, width, depth, seed, labels=LABELS, change=0.0):
    """A random ViT; `change` is added at random to all but its head."""
    config = ViTConfig(width, 2 * width, depth, 2, image_size=8, patch_size=4, num_labels=len(labels))
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: jax.device_put(np.float32(0.3 * rng.normal(size=leaf.shape))), shapes)
    moved = jax.tree.map(
        lambda x: jax.device_put(np.asarray(x) + np.float32(change * rng.normal(size=x.shape))), params["vision"]
    )
    save_pretrained(Pretrained(vit(config, {**params, "vision": moved}), config), folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["id2label"] = {str(number): label for number, label in enumerate(labels)}
    settings["label2id"] = {label: number for number, label in enumerate(labels)}
    (folder / "config.json").write_text(json.dumps(settings))
    image = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    return str(folder)


@pytest.fixture(scope="session")
def vits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vits")
    return {
        "source": write_vit(folder / "source", 8, 2, 0),
        "finetuned": write_vit(folder / "finetuned", 8, 2, 0, (*LABELS, "owl"), change=0.1),
        "same": write_vit(folder / "same", 8, 2, 1),
        "wider": write_vit(folder / "wider", 12, 3, 2),
        "numbered": write_vit(folder / "numbered", 12, 3, 3, ("LABEL_0", "LABEL_1")),
        "three": write_vit(folder / "three", 12, 3, 3, ("LABEL_0", "LABEL_1", "LABEL_2")),
    }
