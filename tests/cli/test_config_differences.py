"""Weights that fit by shape under another config: a tower is run with its own, arithmetic between two is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tvjax.checkpoints import from_pretrained, load_tree
from tvjax.cli.main import run
from tvjax.jobs._evaluate import with_text
from tvjax.jobs.opened import Models
from tvjax.models.clip.modeling import vision_model

FIELDS = [("hidden_act", "gelu"), ("num_attention_heads", 4), ("layer_norm_eps", 1e-2), ("image_size", 9)]


def with_config(folder, copy, tower="vision_config", **changes):
    """A copy of a model whose config.json says something else of a tower."""
    shutil.copytree(folder, copy)
    file = copy / "config.json"
    settings = json.loads(file.read_text())
    settings.get(tower, settings).update(changes)
    file.write_text(json.dumps(settings))
    return str(copy)


def error_of(capsys):
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize(("field", "value"), FIELDS)
def test_the_difference_of_two_functions_is_no_task_vector(models, tmp_path, capsys, field, value):
    tuned = with_config(models["finetuned"], tmp_path / "tuned", **{field: value})
    words = ["extract", "--pretrained", models["source"], "--finetuned", tuned]
    words += ["--output", str(tmp_path / "tau.safetensors")]
    assert run(words) == 2
    line = error_of(capsys)
    before = json.loads(Path(models["source"], "config.json").read_text())["vision_config"][field]
    assert f"vision.{field} ({before!r} and {value!r})" in line and "--allow-config-differences" in line
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]
    assert run([*words, "--allow-config-differences"]) == 0
    assert f"note: the configs of {models['source']!r} and {tuned!r} differ" in capsys.readouterr().out
    assert f"vision.{field}" in load_tree(tmp_path / "tau.safetensors")[1]["notes"]


def test_two_spellings_of_one_function_are_no_difference(models, tmp_path):
    base = with_config(models["same"], tmp_path / "base", hidden_act="gelu")
    tuned = with_config(models["same"], tmp_path / "tuned", hidden_act="gelu_python")
    eos = json.loads(Path(base, "config.json").read_text())["text_config"]["eos_token_id"]
    legacy = with_config(tuned, tmp_path / "legacy", "text_config", eos_token_id=2)
    assert eos != 2
    for name in (tuned, legacy):
        words = ["extract", "--pretrained", base, "--finetuned", name, "--subtree", ""]
        assert run([*words, "--output", str(tmp_path / "tau.safetensors"), "--quiet"]) == 0


def test_only_the_tower_that_is_taken_counts(models, tmp_path, capsys):
    tuned = with_config(models["same"], tmp_path / "tuned", "text_config", hidden_act="gelu")
    words = ["extract", "--pretrained", models["same"], "--finetuned", tuned]
    words += ["--output", str(tmp_path / "tau.safetensors"), "--quiet"]
    assert run([*words, "--subtree", "vision"]) == 0
    assert run([*words, "--subtree", "text"]) == 2
    assert "text.hidden_act ('quick_gelu' and 'gelu')" in error_of(capsys)


def test_a_task_vector_is_not_added_to_the_same_weights_of_another_function(models, tmp_path, capsys):
    tau, other = tmp_path / "tau.safetensors", with_config(models["source"], tmp_path / "gelu", hidden_act="gelu")
    pair = ["--pretrained", models["source"], "--finetuned", models["finetuned"]]
    assert run(["extract", *pair, "--output", str(tau), "--quiet"]) == 0
    words = ["--model", other, "--output", str(tmp_path / "out"), "--quiet"]
    for command in (["apply", str(tau)], ["merge", str(tau), "--method", "average"]):
        assert run([*command, *words]) == 2
        assert "vision.hidden_act ('quick_gelu' and 'gelu')" in error_of(capsys)
        assert not (tmp_path / "out").exists()
    assert run(["apply", str(tau), *words, "--any-base"]) == 0


def test_task_vectors_of_two_functions_are_not_merged(models, tmp_path, capsys):
    files = []
    for name, heads in (("two", 2), ("four", 4)):
        pair = [
            with_config(models[kind], tmp_path / f"{name}_{kind}", num_attention_heads=heads)
            for kind in ("source", "finetuned")
        ]
        files.append(str(tmp_path / f"{name}.safetensors"))
        words = ["--pretrained", pair[0], "--finetuned", pair[1], "--output", files[-1], "--quiet"]
        assert run(["extract", *words]) == 0
    words = ["merge", *files, "--method", "average", "--output", str(tmp_path / "out.safetensors"), "--quiet"]
    assert run(words) == 2
    assert "vision.num_attention_heads (2 and 4)" in error_of(capsys)
    assert run([*words, "--any-base"]) == 0


@pytest.mark.parametrize("command", ["transport", "plan"])
def test_transport_takes_the_task_of_one_function(models, tmp_path, capsys, command):
    tuned = with_config(models["finetuned"], tmp_path / "tuned", num_attention_heads=4)
    words = [command, "--source", models["source"], "--finetuned", tuned, "--target", models["same"]]
    words += ["--method", "naive", "--output", str(tmp_path / "out")]
    assert run(words) == 2
    assert "vision.num_attention_heads (2 and 4)" in error_of(capsys) and not (tmp_path / "out").exists()
    assert run([*words, "--allow-config-differences"]) == 0
    if command == "transport":
        assert "note: the configs of" in capsys.readouterr().out


@pytest.mark.parametrize(("field", "value"), FIELDS[:3])
def test_a_tower_alone_is_run_with_its_own_config(models, tmp_path, field, value):
    tower = with_config(models["finetuned"], tmp_path / "tower", **{field: value})
    with Models() as opened:
        base, whole = opened[models["source"]].pretrained, with_text(opened[tower], opened[models["source"]]).pretrained
    pixels = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    batch = {"pixels": pixels}
    expected = from_pretrained(tower).model(batch)["image"]
    np.testing.assert_allclose(vision_model(whole.model)(batch)["image"], expected, rtol=1e-5, atol=1e-6)
    under_the_base = base.model.replace(params=whole.params)
    assert not np.allclose(vision_model(under_the_base)(batch)["image"], expected, rtol=1e-5, atol=1e-6)
