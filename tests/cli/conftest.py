"""Two tiny random CLIPs of different widths and depths as Hugging Face folders."""

import json

import jax
import numpy as np
import pytest

from tvjax.checkpoints import Pretrained, save_pretrained
from tvjax.models.clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, clip, init

SIZE, LENGTH = 8, 64


def write_processors(folder):
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + ["."]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    special = {"bos_token": tokens[-2], "eos_token": tokens[-1], "pad_token": tokens[-1], "unk_token": tokens[-1]}
    image = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": SIZE},
        "crop_size": {"height": SIZE, "width": SIZE},
    }
    contents = {
        "vocab.json": {token: i for i, token in enumerate(tokens)},
        "tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, **special},
        "preprocessor_config.json": image,
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return len(tokens)


def write_clip(folder, width, depth, seed, change=0.0, vision_only=False):
    """A random CLIP; `change` is added at random to its vision tower."""
    folder.mkdir(parents=True)
    tokens = write_processors(folder)
    vision = CLIPVisionConfig(width, 2 * width, depth, 2, image_size=SIZE, patch_size=4, projection_dim=4)
    text = CLIPTextConfig(
        tokens, 8, 16, 1, 2, max_position_embeddings=LENGTH, eos_token_id=tokens - 1, projection_dim=4
    )
    config = CLIPConfig(vision, text)
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: jax.device_put(np.float32(0.3 * rng.normal(size=leaf.shape))), shapes)
    moved = jax.tree.map(
        lambda x: jax.device_put(np.asarray(x) + np.float32(change * rng.normal(size=x.shape))), params["vision"]
    )
    if vision_only:
        config = CLIPConfig(vision, None)
        params = {"vision": moved}
    else:
        params = {**params, "vision": moved}
    save_pretrained(Pretrained(clip(config, params), config), folder.with_name(folder.name + "_saved"))
    for file in folder.with_name(folder.name + "_saved").iterdir():
        file.rename(folder / file.name)
    folder.with_name(folder.name + "_saved").rmdir()
    return str(folder)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "source": write_clip(folder / "source", 8, 2, 0),
        "finetuned": write_clip(folder / "finetuned", 8, 2, 0, change=0.1, vision_only=True),
        "same": write_clip(folder / "same", 8, 2, 1),
        "wider": write_clip(folder / "wider", 12, 3, 2),
    }
