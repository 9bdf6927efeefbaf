"""Nonsense of every kind ends in one line and exit code 2, before a weight is read and with nothing left behind."""

import shutil

import jax
import jax.numpy as jnp
import pytest

from tvjax import compose
from tvjax.checkpoints.folder import Checkpoint
from tvjax.cli.main import run
from tvjax.kinds import as_bytes


def error_of(capsys, *words):
    assert run([str(word) for word in words]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tvjax: error: ")]
    return line


@pytest.fixture
def no_weights(monkeypatch):
    """Fails where a weight is read."""

    def reads(*_, **__):
        raise AssertionError("a weight was read")

    for name in ("read", "params"):
        monkeypatch.setattr(Checkpoint, name, reads)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--output", ""], "output is empty, expected a name: is a variable of the shell not set?"),
        (["--model", ""], "model is empty, expected a name"),
        (["--scale", "1e39"], "scale: 1e+39 is beyond the range of float32"),
        (["--scale", "-1e39"], "scale: -1e+39 is beyond the range of float32"),
        (["--max-shard-size", "-5GB"], "the size of a shard is '-5GB', expected 1 byte or more"),
        (["--max-shard-size", "many"], "the size of a shard is 'many', expected 1 byte or more"),
    ],
)
def test_an_option_that_cannot_be(models, tmp_path, no_weights, capsys, words, expected):
    given = ["apply", "tau.safetensors", "--model", models["source"], "--output", tmp_path / "out", *words]
    assert expected in error_of(capsys, *given)
    assert not list(tmp_path.iterdir())


def test_an_empty_name_among_several_and_a_part_that_may_be(models, tmp_path, capsys):
    words = ["merge", "one.safetensors", "", "--method", "ties", "--output", "merged.safetensors"]
    assert "task_vectors is empty" in error_of(capsys, *words)
    words = ["extract", "--pretrained", models["source"], "--finetuned", models["source"], "--part", ""]
    assert run([*words, "--output", str(tmp_path / "whole.safetensors")]) == 0


@pytest.mark.parametrize("size", ["5GB", "1.5kb", "7", " 3 MB ", 12])
def test_sizes_are_those_of_the_hub(size):
    assert as_bytes(size) == {"5GB": 5 * 10**9, "1.5kb": 1500, "7": 7, " 3 MB ": 3 * 10**6, 12: 12}[size]


@pytest.mark.parametrize("command", ["transport", "compose", "evaluate"])
def test_a_model_that_cannot_read_images_is_named(models, images, tmp_path, no_weights, capsys, command):
    blind = shutil.copytree(models["wider"], tmp_path / "blind")
    (blind / "preprocessor_config.json").unlink()
    words = {
        "transport": ["--source", models["source"], "--finetuned", models["finetuned"], "--target", blind],
        "compose": ["tau.safetensors", "--model", blind],
        "evaluate": [blind],
    }[command]
    more = ["--method", "theseus"] if command == "transport" else []
    more += [] if command == "evaluate" else ["--output", tmp_path / "out"]
    found = error_of(capsys, command, *words, "--data", images, *more)
    assert f"'{blind}': the folder has no preprocessor_config.json" in found and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--micro-batches", "5"], "--micro-batches 5 does not divide a batch of 128 examples"),
        (["--learning-rate", "0"], "learning_rate.0: found 0.0; input should be greater than 0"),
        (["--state", "{model}/config.json"], "is a file, expected the folder of a training's states"),
    ],
)
def test_a_training_that_cannot_be(models, images, tmp_path, no_weights, capsys, words, expected):
    given = ["compose", "tau.safetensors", "--model", models["source"], "--data", images, "--output", tmp_path / "out"]
    assert expected in error_of(capsys, *given, *(word.format(model=models["source"]) for word in words))
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_ends_a_training():
    goal = compose.of_loss(lambda params, batch: jnp.exp(params["w"] * batch), jnp.ones(2))
    tau, key = [{"w": jnp.float32(1)}], jax.random.key(0)
    with pytest.raises(ValueError, match=r"loss: not finite in epoch 1 of learning rate 1000: lower it"):
        compose.learn({"w": jnp.float32(88)}, tau, goal, key=key, learning_rates=[1e3], epochs=1)
    with pytest.raises(ValueError, match=r"learning_rates: found \[-1.0\], expected positive numbers"):
        compose.learn({"w": jnp.float32(0)}, tau, goal, key=key, learning_rates=[-1.0])


def test_what_a_teacher_needs_is_said_of_it(models, images, tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    shutil.copy(images / "cat" / "0.png", flat / "0.png")
    pair = ["--source", models["source"], "--finetuned", models["finetuned"], "--target", models["wider"]]
    words = ["transport", *pair, "--data", flat, "--refine", "correction", "--output", tmp_path / "out"]
    assert "a teacher needs the names of the classes: give --classes" in error_of(capsys, *words)


@pytest.mark.parametrize("name", ["out", "deeper/still/out"])
def test_a_folder_that_nothing_may_be_written_into(models, tmp_path, no_weights, monkeypatch, capsys, name):
    """Root may write everywhere, so the system's answer is made up."""
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    expected = f"cannot be: nothing may be written into '{tmp_path}'"
    words = ["apply", "tau.safetensors", "--model", models["source"], "--output", tmp_path / name]
    assert expected in error_of(capsys, *words)
    pair = ["--pretrained", models["source"], "--finetuned", models["finetuned"]]
    assert expected in error_of(capsys, "extract", *pair, "--output", tmp_path / "tau.safetensors")
