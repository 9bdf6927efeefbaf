"""Each family on the command line: tiny random folders are evaluated, and a task moves from one into another."""

import json

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tvjax import tree
from tvjax.checkpoints import Pretrained, from_pretrained, save_pretrained
from tvjax.cli.main import run
from tvjax.models.dinov2 import Dinov2Config
from tvjax.models.families import family_of_config
from tvjax.models.gpt2 import GPT2Config
from tvjax.models.siglip import SiglipConfig, SiglipTextConfig, SiglipVisionConfig

WORDS = ("<unk>", "good", "bad", "the", "film", "was", "so", "dull", "fine", "plot", "cast", "cat", "polar", "bear")
REVIEWS = [("the film was fine", "good"), ("so dull", "bad"), ("the cast so fine", "good"), ("dull plot", "bad")]


def write_model(folder, config, seed, change=0.0):
    """A random model; `change` is added at random to all of it."""
    family, random = family_of_config(config), np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: family.init(config, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: jax.device_put(np.float32(0.3 * random.normal(size=leaf.shape))), shapes)
    params = jax.tree.map(
        lambda x: jax.device_put(np.asarray(x) + np.float32(change * random.normal(size=x.shape))), params
    )
    save_pretrained(Pretrained(family.build(config, params), config), folder)
    return folder


def write_tokenizer(folder, **settings):
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    known = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "pad_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(known | settings))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "reviews.jsonl"
    file.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in REVIEWS))
    return file


def gpt2(folder):
    shapes = {"source": (8, 2, 2), "target": (12, 3, 3)}
    for name, (width, depth, heads) in shapes.items():
        config = GPT2Config(len(WORDS), width, 2 * width, depth, heads, max_position_embeddings=16)
        write_model(folder / name, config, len(name))
        if name == "source":
            write_model(folder / "finetuned", config, len(name), change=0.1)
    for name in ("source", "finetuned", "target"):
        write_tokenizer(folder / name)


def succeeds(capsys, *words):
    code = run([str(word) for word in words])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def changed(before, after):
    one, other = (tree.flatten(from_pretrained(folder).params) for folder in (before, after))
    return {path for path, leaf in one.items() if not np.array_equal(leaf, other[path])}


@pytest.mark.parametrize("method", ["theseus", "bico+gradfix"])
def test_a_language_model(texts, tmp_path, capsys, method):
    gpt2(tmp_path)
    models = [tmp_path / name for name in ("source", "finetuned", "target")]
    given = ["--source", models[0], "--finetuned", models[1], "--target", models[2], "--data", texts]
    succeeds(capsys, "plan", *given, "--method", method)
    succeeds(capsys, "transport", *given, "--method", method, "--output", tmp_path / "edited")
    moved = changed(models[2], tmp_path / "edited")
    assert {f"blocks/{i}/attention/{name}/kernel" for i in range(3) for name in ("query", "key", "value")} <= moved
    assert "reviews" in succeeds(capsys, "evaluate", models[2], tmp_path / "edited", "--data", texts)


# -- images ------------------------------------------------------------------------------------------------------------


def write_image_processor(folder, name, size):
    settings = {"image_processor_type": name, "size": {"height": size, "width": size}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def siglips(tmp_path_factory):
    """Two shapes, a fine-tuned vision tower alone, and prompts of words that the tokenizer knows."""
    folder = tmp_path_factory.mktemp("siglips")
    shapes = {"source": (8, 2, 8), "finetuned": (8, 2, 8), "target": (12, 3, 16)}
    for name, (width, depth, size) in shapes.items():
        vision = SiglipVisionConfig(width, 2 * width, depth, 2, image_size=size, patch_size=4)
        text = SiglipTextConfig(len(WORDS), 8, 16, 1, 2, max_position_embeddings=5, projection_size=width)
        config = SiglipConfig(vision, None if name == "finetuned" else text)
        write_model(folder / name, config, width, change=0.1 * (name == "finetuned"))
        write_tokenizer(folder / name)
        write_image_processor(folder / name, "SiglipImageProcessor", size)
    (folder / "prompts.txt").write_text("the film was {}\n")
    return folder


@pytest.mark.parametrize("method", ["theseus", "bico+gradfix"])
def test_a_dual_encoder(siglips, images, tmp_path, capsys, method):
    models = [siglips / name for name in ("source", "finetuned", "target")]
    asked = ["--data", images, "--templates", siglips / "prompts.txt"]
    given = ["--source", models[0], "--finetuned", models[1], "--target", models[2], *asked]
    succeeds(capsys, "plan", *given, "--method", method)
    succeeds(capsys, "transport", *given, "--method", method, "--output", tmp_path / "edited")
    moved = changed(models[2], tmp_path / "edited")
    assert {f"vision/blocks/{i}/mlp/up/kernel" for i in range(3)} <= moved
    assert all(path.startswith("vision/") for path in moved)  # the text tower and the scale stay
    assert "images" in succeeds(capsys, "evaluate", models[2], tmp_path / "edited", *asked)


def test_a_vision_tower_of_a_siglip_goes_with_the_text_tower_of_another(siglips, images, capsys):
    asked = ["--data", images, "--templates", siglips / "prompts.txt"]
    succeeds(capsys, "evaluate", siglips / "source", siglips / "finetuned", *asked)
    assert fails(capsys, "evaluate", siglips / "finetuned", *asked).endswith("give the full model")
    assert "does not fit that of" in fails(capsys, "evaluate", siglips / "target", siglips / "finetuned", *asked)


def fails(capsys, *words):
    assert run([str(word) for word in words]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tvjax: error: ")]
    return line


@pytest.fixture(scope="module")
def dinov2s(tmp_path_factory):
    """Classifiers and backbones, whose processors make images of another size than their positions are for."""
    folder = tmp_path_factory.mktemp("dinov2s")
    models = {
        "source": Dinov2Config(8, 2, 2, 2, image_size=20, patch_size=4, num_labels=2),
        "target": Dinov2Config(12, 3, 3, 2, image_size=20, patch_size=4, num_labels=2),
        "backbone": Dinov2Config(8, 2, 2, 2, image_size=20, patch_size=4),
        "wider": Dinov2Config(12, 3, 3, 2, image_size=20, patch_size=4),
    }
    for name, config in models.items():
        write_model(folder / name, config, len(name))
        if name in ("source", "backbone"):
            write_model(folder / f"tuned_{name}", config, len(name), change=0.1)
    for model in folder.iterdir():
        write_image_processor(model, "ViTImageProcessor", 8 if model.name in ("target", "wider") else 12)
    return folder


@pytest.mark.parametrize("method", ["theseus", "bico+gradfix"])
def test_a_classifier_on_images_of_another_size(dinov2s, images, tmp_path, capsys, method):
    (tmp_path / "classes.txt").write_text("cat\npolar bear\n")
    target = dinov2s / "target"
    asked = ["--data", images, "--classes", tmp_path / "classes.txt"]
    given = ["--source", dinov2s / "source", "--finetuned", dinov2s / "tuned_source", "--target", target, *asked]
    succeeds(capsys, "plan", *given, "--method", method)
    succeeds(capsys, "transport", *given, "--method", method, "--output", tmp_path / "edited")
    moved = changed(target, tmp_path / "edited")
    assert {f"vision/blocks/{i}/layer_scale1/scale" for i in range(3)} <= moved
    assert all(path.startswith("vision/") for path in moved)
    succeeds(capsys, "evaluate", target, tmp_path / "edited", *asked)


def test_a_backbone_is_moved_without_labels_and_has_nothing_to_be_evaluated_by(dinov2s, images, tmp_path, capsys):
    given = ["--source", dinov2s / "backbone", "--finetuned", dinov2s / "tuned_backbone", "--data", images]
    given += ["--target", dinov2s / "wider"]
    succeeds(capsys, "transport", *given, "--method", "theseus", "--output", tmp_path / "edited")
    assert "vision/blocks/2/attention/out/kernel" in changed(dinov2s / "wider", tmp_path / "edited")
    assert "has no head of classes" in fails(
        capsys, "transport", *given, "--method", "bico", "--output", tmp_path / "other"
    )
    assert "has no head of classes" in fails(capsys, "evaluate", dinov2s / "wider", "--data", images)
    assert not (tmp_path / "other").exists()


def test_models_of_two_families_are_refused_by_name(dinov2s, siglips, images, tmp_path, capsys):
    given = ["--source", siglips / "source", "--finetuned", siglips / "finetuned", "--target", dinov2s / "wider"]
    line = fails(capsys, "transport", *given, "--method", "theseus", "--data", images, "--output", tmp_path / "out")
    assert "is a SiglipConfig and" in line and "give a source and a target of one family" in line
