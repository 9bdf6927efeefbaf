"""The commands end to end, on tiny random models."""

import json

import numpy as np
import pytest

from tvjax import tree
from tvjax.checkpoints import from_pretrained, load_state, load_tree
from tvjax.cli.main import run


def transport(models, target, method, output, *more):
    folders = {"source": models["source"], "finetuned": models["finetuned"], "target": models[target]}
    options = [text for name, value in folders.items() for text in (f"--{name}", value)]
    assert run(["transport", *options, "--method", method, "--output", str(output), *map(str, more)]) == 0
    return from_pretrained(output).params


@pytest.mark.parametrize("method", ["bico", "theseus"])
def test_transport_and_evaluate(models, images, tmp_path, capsys, method):
    output, maps = tmp_path / "edited", tmp_path / "maps.safetensors"
    more = ("--images", images, "--scale", 0.5, "--save-maps", maps, "--batch-size", 3)
    edited = tree.flatten(transport(models, "wider", method, output, *more))
    before = tree.flatten(from_pretrained(models["wider"]).params)
    moved = {path for path, leaf in before.items() if not np.array_equal(leaf, edited[path])}
    assert moved and all(path.startswith("vision/") for path in moved)
    report = json.loads((output / "leaf_report.json").read_text())
    assert report["method"] == method and report["scale"] == 0.5 and report["norms"]["target"] > 0
    rotated = {leaf["target"] for leaf in report["leaves"] if leaf["action"] == "rotated"}
    assert moved <= rotated and "vision/blocks/2/mlp/up/kernel" in moved
    assert (output / "leaf_report.txt").read_text().startswith("link")
    assert [part.link for part in load_state(maps).parts] == method.split("+")
    printed = capsys.readouterr()
    assert f"moved by {method}" in printed.out and f"{method} 1/5" in printed.err

    assert run(["evaluate", models["wider"], str(output), "--images", str(images), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["total"] for row in rows] == [6, 6]
    assert all(row["interval"][0] <= row["accuracy"] <= row["interval"][1] for row in rows)
    assert run(["evaluate", str(output), "--images", str(images)]) == 0
    assert f"{rows[1]['correct']} of 6" in capsys.readouterr().out


def test_transport_is_quiet_and_deterministic(models, images, tmp_path, capsys):
    more = ("--images", images, "--per-class", 2, "--seed", 3, "--quiet")
    first, second = (transport(models, "same", "theseus", tmp_path / name, *more) for name in ("a", "b"))
    assert capsys.readouterr() == ("", "")
    for path, leaf in tree.flatten(first).items():
        np.testing.assert_array_equal(leaf, tree.flatten(second)[path])


def test_extract_apply_is_the_fine_tuned_model_and_naive_transport_to_itself(models, tmp_path):
    tau, output = str(tmp_path / "tau.safetensors"), tmp_path / "applied"
    pair = ["--pretrained", models["source"], "--finetuned", models["finetuned"]]
    assert run(["extract", *pair, "--output", tau]) == 0
    assert run(["apply", tau, "--model", models["source"], "--output", str(output)]) == 0
    naive = transport({**models, "itself": models["source"]}, "itself", "naive", tmp_path / "naive")
    applied, tuned = (tree.flatten(from_pretrained(name).params) for name in (output, models["finetuned"]))
    for path, leaf in tuned.items():
        np.testing.assert_allclose(applied[path], leaf, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(applied[path], tree.flatten(naive)[path])
    assert set(tree.flatten(load_tree(tau)[0])) == set(tuned)


def test_a_task_vector_of_another_model_is_refused(models, tmp_path, capsys):
    tau = str(tmp_path / "tau.safetensors")
    pair = ["--pretrained", models["source"], "--finetuned", models["finetuned"]]
    assert run(["extract", *pair, "--output", tau, "--quiet"]) == 0
    assert run(["apply", tau, "--model", models["same"], "--output", str(tmp_path / "out")]) == 2
    assert "move it there first (tvjax transport)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
