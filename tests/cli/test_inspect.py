"""``tvjax inspect`` on tiny random models: tables for people, one JSON object, a heat map."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tvjax import tree
from tvjax.checkpoints import load_tree, save_coefficients
from tvjax.checkpoints.reader import Tensors
from tvjax.cli.main import run
from tvjax.compose import init


@pytest.fixture(scope="module")
def vectors(models, tmp_path_factory):
    """The task vector of the fine-tuned tower, and the way back from another model to it."""
    folder = tmp_path_factory.mktemp("vectors")
    for name, pretrained in (("a", "source"), ("b", "same")):
        pair = ["--pretrained", models[pretrained], "--finetuned", models["finetuned"]]
        assert run(["extract", *pair, "--output", str(folder / f"{name}.safetensors"), "--quiet"]) == 0
    return [str(folder / f"{name}.safetensors") for name in "ab"]


def as_json(capsys, *words):
    capsys.readouterr()
    assert run(["inspect", *words, "--json", "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return json.loads(printed.out)


def test_a_model_in_a_table_and_as_json_without_reading_weights(models, capsys, monkeypatch):
    monkeypatch.setattr(Tensors, "read_into", lambda *_: pytest.fail("weights were read"))
    assert run(["inspect", models["source"]]) == 0
    shown = capsys.readouterr()
    assert "vision/blocks/*/attention/query/kernel" in shown.out and "self_attn.q_proj.weight" in shown.out
    assert "hidden_size 8" in shown.out and shown.err == ""
    assert run(["inspect", models["source"], "--leaves"]) == 0
    assert "vision/blocks/1/attention/query/kernel" in capsys.readouterr().out
    found = as_json(capsys, models["source"], "--sites")
    assert found["kind"] == "model" and found["entries"] == sum(
        np.prod(leaf["shape"], dtype=int) for leaf in found["leaves"]
    )
    assert "norm" not in found
    block = next(kind for kind in found["sites"] if "vision/blocks/1" in kind["stages"])
    query = {"leaf": "attention/query/kernel", "occurrence": 0, "kind": "dense", "d_in": 8, "d_out": 8, "tokens": 5}
    assert query in block["sites"]
    assert run(["inspect", models["source"], "--sites"]) == 0
    assert "vision/blocks/0 and 1 more" in capsys.readouterr().out


def test_a_task_vector_with_norms_relative_to_its_model(models, vectors, tmp_path, capsys):
    tau = tree.flatten(load_tree(vectors[0])[0])
    found = as_json(capsys, vectors[0], "--model", models["source"], "--plot", str(tmp_path / "p.png"))
    assert found["kind"] == "task vector" and found["made_for_model"] is True
    for leaf in found["leaves"]:
        np.testing.assert_allclose(leaf["norm"], tree.norm(tau[leaf["path"]]), rtol=1e-5)
        assert leaf["model_norm"] > 0
    np.testing.assert_allclose(found["norm"], np.sqrt(sum(block["norm"] ** 2 for block in found["blocks"].values())))
    with Image.open(tmp_path / "p.png") as image:
        assert image.format == "PNG" and min(image.size) > 200
    assert run(["inspect", vectors[1], "--model", models["source"]]) == 0
    shown = capsys.readouterr()
    assert "made for OTHER weights than" in shown.out and "relative" in shown.out and "norms 40/40" in shown.err
    assert as_json(capsys, vectors[0], "--no-norms").keys().isdisjoint({"norm", "blocks"})


def test_two_task_vectors(vectors, tmp_path, capsys):
    found = as_json(capsys, *vectors, "--plot", str(tmp_path / "p.png"))
    a, b = (load_tree(file)[0] for file in vectors)
    np.testing.assert_allclose(found["cosine"], tree.cosine(a, b), rtol=1e-4)
    np.testing.assert_allclose(found["sign_agreement"], tree.sign_agreement(a, b), rtol=1e-6)
    assert set(found["leaves"]) == set(tree.flatten(a)) and "vision/blocks/1" in found["blocks"]
    assert found["only_first"] == found["only_second"] == []
    assert run(["inspect", *vectors]) == 0
    assert "cosine" in capsys.readouterr().out
    assert run(["inspect", *vectors, "--leaves"]) == 0
    assert "vision/blocks/1/mlp/up/bias" in capsys.readouterr().out
    (tmp_path / "p.png").unlink()
    assert run(["--config", str(tmp_path / "p.png.yaml"), "--json"]) == 0  # how it is printed is no part of the job
    assert json.loads(capsys.readouterr().out) == found and (tmp_path / "p.png").exists()


def test_two_models_of_two_shapes_by_block_and_kind(models, tmp_path, capsys, monkeypatch):
    found = as_json(capsys, "--compare", models["source"], models["wider"])
    query = "vision/blocks/0/attention/query/kernel"
    assert found["shapes"][query] == [[8, 8], [12, 12]] and found["about"]["config.vision.hidden_size"] == [8, 12]
    own = found["leaves"][query]
    assert min(own["norms"]) > 0 and own["distance"] is own["cosine"] is own["sign_agreement"] is None
    assert found["blocks"]["vision/blocks/2"]["norms"][0] is None  # the second has a block more
    of_kind = [found["leaves"][query.replace("0", str(block))]["norms"][1] for block in range(3)]
    kind = found["kinds"]["vision/blocks/*/attention/query/kernel"]["norms"][1]
    np.testing.assert_allclose(kind, np.linalg.norm(of_kind))
    assert run(["inspect", models["source"], models["wider"], "--compare"]) == 0
    shown = capsys.readouterr().out
    assert "other shapes" in shown and "only B has" in shown and "config.vision.hidden_size: 8 in A, 12 in B" in shown
    alike = [leaf for leaf in found["leaves"].values() if leaf["distance"] is not None]
    assert f"distance, cosine and signs are of {len(alike)} of {len(found['leaves'])} leaves" in shown
    assert "vision/blocks/*/mlp/up/kernel" in shown
    held = []
    monkeypatch.setattr(Tensors, "read", lambda self, key, read=Tensors.read: held.append(key) or read(self, key))
    near = as_json(capsys, models["source"], models["same"], "--plot", str(tmp_path / "p.png"))
    assert len(held) == 2 * len(near["leaves"]) and [*held[::2]] == [*held[1::2]]  # pair by pair, each once
    with Image.open(tmp_path / "p.png") as image:
        assert min(image.size) > 200


def test_coefficients_say_what_they_are(tmp_path, capsys):
    file = str(tmp_path / "c.safetensors")
    layer = {"up": {"kernel": jnp.ones((2, 2))}}
    taus = [{"blocks": {"0": layer, "1": layer}}, {"blocks": {"1": layer}}]
    save_coefficients(file, init(taus, names=["digits", "signs"], value=0.25))
    found = as_json(capsys, file, "--plot", str(tmp_path / "c.png"))
    assert found["kind"] == "coefficients" and found["about"]["vectors"] == ["digits", "signs"]
    assert [entry["vector"] for entry in found["coefficients"]] == ["digits", "digits", "signs"]
    assert run(["inspect", file]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["digits", "2", "0.25", "0.25", "0.25"] in [line.split() for line in lines]
    assert (tmp_path / "c.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{a}", "{b}", "{a}"], "3 things given"),
        (["{a}", "{b}", "--sites"], "are for one thing"),
        (["--compare", "{a}"], "--compare is for two things"),
        (["{a}", "--no-norms", "--plot", "{tmp}/p.png"], "need norms"),
        (["{a}", "--plot", "{tmp}/p.jpg"], "in .png"),
        (["{a}", "--plot", "{tmp}/none/p.png"], "its folder does not exist"),
        (["{a}", "--sites"], "only a model has sites"),
        (["{a}", "--model", "{wider}"], "do not fit"),
        (["{wider}", "--model", "{wider}"], "is for a task vector"),
        (["{a}", "{wider}"], "give two of one kind"),
        (["{tmp}"], "has no config.json"),
        (["{tmp}/none.safetensors"], "there is no file"),
    ],
)
def test_what_cannot_be_inspected(models, vectors, tmp_path, capsys, words, message):
    names = {"{a}": vectors[0], "{b}": vectors[1], "{wider}": models["wider"]}
    capsys.readouterr()
    assert run(["inspect", *(names.get(word, word.replace("{tmp}", str(tmp_path))) for word in words)]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert printed.out == "" and message in line, line
    assert list(tmp_path.iterdir()) == []
