"""Each family on the command line: tiny random folders are evaluated, and a task moves from one into another."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tvjax import tree
from tvjax.checkpoints import Pretrained, from_pretrained, save_pretrained
from tvjax.cli.main import run
from tvjax.models.families import family_of_config
from tvjax.models.gpt2 import GPT2Config

WORDS = ("<unk>", "good", "bad", "the", "film", "was", "so", "dull", "fine", "plot", "cast")
REVIEWS = [("the film was fine", "good"), ("so dull", "bad"), ("the cast so fine", "good"), ("dull plot", "bad")]


def write_model(folder, config, seed, change=0.0):
    """A random model; `change` is added at random to all of it."""
    family, random = family_of_config(config), np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: family.init(config, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * random.normal(size=leaf.shape), jnp.float32), shapes)
    params = jax.tree.map(lambda x: x + jnp.asarray(change * random.normal(size=x.shape), jnp.float32), params)
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
