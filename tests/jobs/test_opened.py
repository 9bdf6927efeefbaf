"""What one job opens: each model once, each weight once, each example once a pass."""

import builtins
import io
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

from tvjax import jobs
from tvjax.checkpoints.reader import Tensors
from tvjax.data import images as image_files
from tvjax.data.embedded import model_folder
from tvjax.jobs.opened import Models


def within(package):
    """Whether a function of the package is running."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] == package:
            return True
        frame = frame.f_back
    return False


@pytest.fixture
def seen(monkeypatch):
    """Counts the files that tvjax opens (transformers looks into config.json by itself), what is read and decoded."""
    counts = {"files": Counter(), "weights": Counter(), "examples": Counter()}
    opens, read, decode = io.open, Tensors.read_into, image_files._decode

    def counted_open(file, *arguments, **keywords):
        if isinstance(file, str | os.PathLike) and not within("transformers"):
            counts["files"][os.fspath(file)] += 1
        return opens(file, *arguments, **keywords)

    def counted_read(tensors, key, out):
        counts["weights"][tensors.file_of[key], key] += 1
        return read(tensors, key, out)

    def counted_decode(stored, place):
        counts["examples"][place] += 1
        return decode(stored, place)

    for module in (io, builtins):
        monkeypatch.setattr(module, "open", counted_open)
    monkeypatch.setattr(Tensors, "read_into", counted_read)
    monkeypatch.setattr(image_files, "_decode", counted_decode)
    return counts


@pytest.mark.parametrize("method", ["theseus", "bico"])
def test_a_transport_opens_each_thing_once(images, tmp_path, seen, method):
    (tmp_path / "tuned").symlink_to(model_folder("A"))
    folders = [str(model_folder("A")), str(tmp_path / "tuned"), str(model_folder("B"))]
    given = dict(zip(("source", "finetuned", "target"), folders, strict=True))
    validation = {"validation": str(images)} if method == "theseus" else {}
    config = jobs.TransportConfig(
        **given, **validation, method=method, data=str(images), output=tmp_path / "edited", maps=tmp_path / "maps"
    )
    jobs.transport(config)
    for folder in folders:
        assert seen["files"][f"{folder}/config.json"] == seen["files"][f"{folder}/model.safetensors"] == 1, folder
    assert {Path(file).parent for file, _ in seen["weights"]} == set(map(Path, folders))
    assert set(seen["weights"].values()) <= {1, 2}
    twice = {(Path(file).parent, key) for (file, key), count in seen["weights"].items() if count == 2}
    assert {folder for folder, _ in twice} <= set(map(Path, folders[:2]))  # one matrix tells whether it is the base
    assert len(twice) == 2 and len({key for _, key in twice}) == 1
    passes = 2 if validation else 1  # of the fit, and of the choice of scales, of the copy beside it too
    assert len(seen["examples"]) == 6 and set(seen["examples"].values()) == {passes}


def test_an_evaluation_opens_each_model_once(images, seen):
    folders = [str(model_folder(name)) for name in "AB"]
    jobs.evaluate(jobs.EvaluateConfig(models=folders, reference=folders[0], data=str(images)))
    for folder in folders:
        assert seen["files"][f"{folder}/config.json"] == seen["files"][f"{folder}/model.safetensors"] == 1, folder
    assert set(seen["weights"].values()) == {1} and set(seen["examples"].values()) == {2}


def test_weights_are_read_when_they_are_asked_for_and_kept_until_they_are_released(vits, seen):
    with Models() as models:
        opened = models[vits["source"]]
        assert opened.config.hidden_size == 8 and not seen["weights"]
        assert opened.pretrained is models[vits["source"]].pretrained and set(seen["weights"].values()) == {1}
        opened.release()
        assert opened.pretrained.params and set(seen["weights"].values()) == {2}
