"""Images of every kind on the command line, and what ``tvjax evaluate`` reports."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from tvjax.cli.main import run
from tvjax.data import open_examples


@pytest.fixture(scope="module")
def places(images, tmp_path_factory):
    """The images of the folder as an archive, and as a dataset on disk."""
    import datasets

    folder = tmp_path_factory.mktemp("places")
    found = open_examples(str(images))
    np.savez(folder / "images.npz", images=np.stack(list(found)), labels=found.labels, class_names=found.class_names)
    features = datasets.Features({"photo": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "polar bear"])})
    rows = {"photo": [str(file) for file in found.keys], "kind": found.labels.tolist()}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder / "dataset")
    return folder


@pytest.fixture(scope="module")
def task_vector(models, tmp_path_factory):
    file = tmp_path_factory.mktemp("tau") / "tau.safetensors"
    pair = ["--pretrained", models["source"], "--finetuned", models["finetuned"]]
    assert run(["extract", *pair, "--output", str(file), "--quiet"]) == 0
    return str(file)


@pytest.fixture
def evaluate(capfd):
    def command(*words):
        assert run(["evaluate", *map(str, words), "--json", "--quiet"]) == 0
        return json.loads(capfd.readouterr().out)

    return command


def test_a_folder_an_archive_and_a_dataset_give_the_same_numbers(models, images, places, evaluate):
    sources = [str(images), f"{places}/images.npz", f"hf:{places}/dataset"]
    found = [evaluate(models["same"], "--images", source, "--batch-size", 4) for source in sources]
    for result, source in zip(found, sources, strict=True):
        assert result["examples"]["source"] == source and result["examples"]["count"] == 6
        assert len(result["examples"]["sha256"]) == 64
        assert result["models"] == found[0]["models"] and result["classes"] == ["cat", "polar bear"]
    assert sum(row["total"] for row in found[0]["models"][0]["by_class"]) == 6


def test_lists_with_a_name_twice_and_what_was_not_read_are_said(models, places, images, evaluate, tmp_path, capfd):
    (tmp_path / "names.txt").write_text("missile\nmissile\n")
    found = evaluate(models["same"], "--images", f"{places}/images.npz", "--classes", tmp_path / "names.txt")
    first, second = found["models"][0]["by_class"]
    assert found["classes"] == ["missile", "missile"] and first["accuracy"] == 1 and second["correct"] == 0
    assert any("'missile' is 0 and 1" in note for note in found["examples"]["notes"])
    shutil.copytree(images, tmp_path / "photos")
    (tmp_path / "photos" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "photos" / "cat" / "a.heic").write_bytes(b"ftypheic")
    (tmp_path / "names.txt").write_text("cat\npolar_bear\n")
    words = ["--images", str(tmp_path / "photos"), "--classes", str(tmp_path / "names.txt")]
    assert run(["evaluate", models["same"], *words]) == 0
    printed = " ".join(capfd.readouterr().out.split())
    for note in ("passed over: .ipynb_checkpoints", "1 file is no image: 1 .heic", "'polar_bear' is 'polar bear'"):
        assert printed.count(note) == 1, note


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 55}, "knows 56 tokens, but the model has embeddings for 55"),
        ({"eos_token_id": 3}, r"2 of 2 texts \('cat', ...\) lack the token 3 that .*'s is 55 \('<\|endoftext\|>'\)"),
    ],
)
def test_a_tokenizer_that_does_not_fit_its_model(models, images, tmp_path, capsys, monkeypatch, change, message):
    shutil.copytree(models["same"], tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    settings["text_config"] |= change
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("tvjax.checkpoints.reader.Tensors.read_into", lambda *_: pytest.fail("weights were read"))
    assert run(["evaluate", models["source"], str(tmp_path / "model"), "--images", str(images)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_models_in_one_result(models, images, evaluate, tmp_path):
    names = [models[name] for name in ("source", "wider", "finetuned")]
    found = evaluate(*names, "--images", images, "--reference", models["finetuned"], "--output", tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == found
    rows = {row["model"]: row for row in found["models"]}
    assert list(rows) == names and found["reference"]["model"] == models["finetuned"]
    assert found["reference"]["correct"] == rows[models["finetuned"]]["correct"]
    for row in rows.values():
        assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]
        if found["reference"]["correct"]:
            assert row["normalised"] == pytest.approx(row["correct"] / found["reference"]["correct"])
    assert [(pair["baseline"], pair["model"]) for pair in found["pairs"]] == [
        (names[0], names[1]), (names[0], names[2]), (names[1], names[2])
    ]  # fmt: skip
    for pair in found["pairs"]:
        gain = rows[pair["model"]]["correct"] - rows[pair["baseline"]]["correct"]
        assert pair["only_model"] - pair["only_baseline"] == gain
        assert pair["difference"] == pytest.approx(gain / 6) and 0 < pair["p_value"] <= 1
        assert 0 <= pair["agreement"]["same"] <= 1


def test_a_fine_tuned_tower_is_read_with_the_text_tower_of_the_full_model(models, images, task_vector, evaluate):
    tower = evaluate(models["source"], models["finetuned"], "--images", images)["models"][1]
    curve = evaluate(models["source"], "--images", images, "--task-vector", task_vector, "--scales", "1")["curve"]
    assert curve["points"][0]["correct"] == tower["correct"]


def test_the_curve_of_a_task_vector(models, images, task_vector, tmp_path, capfd):
    plot, output = tmp_path / "curve.png", tmp_path / "curve.json"
    words = ["--task-vector", task_vector, "--scales", "1,0,0.5", "--plot", str(plot), "--output", str(output)]
    words += ["--by-class", "--reference", models["finetuned"]]
    assert run(["evaluate", models["source"], "--images", str(images), *words]) == 0
    printed = capfd.readouterr()
    assert "best: scale" in printed.out and "polar bear" in printed.out and "of reference" in printed.out
    found = json.loads(output.read_text())
    points = found["curve"]["points"]
    assert [point["scale"] for point in points] == [0.0, 0.5, 1.0]
    assert points[0]["correct"] == found["models"][0]["correct"]
    assert points[0]["difference_to_model"]["difference"] == 0
    assert points[2]["correct"] == found["reference"]["correct"]
    assert found["curve"]["best_scale"] == max(points, key=lambda point: point["correct"])["scale"]
    with Image.open(plot) as image:
        assert image.format == "PNG"


def test_named_tasks_give_names_and_prompts(models, tmp_path, evaluate, capfd):
    rng = np.random.default_rng(0)
    labels = np.arange(12) % 10
    np.savez(tmp_path / "sat.npz", images=rng.integers(0, 256, (12, 8, 8, 3), np.uint8), labels=labels)
    found = evaluate(models["same"], "--images", tmp_path / "sat.npz", "--task", "eurosat")
    assert found["classes"][1] == "forest" and len(found["classes"]) == 10
    assert found["templates"][0] == "a centered satellite photo of {}."
    (tmp_path / "prompts.txt").write_text("{}\n")
    words = ("--task", "eurosat", "--templates", tmp_path / "prompts.txt")
    assert evaluate(models["same"], "--images", tmp_path / "sat.npz", *words)["templates"] == ["{}"]
    for words, message in (
        (["--task", "eurosatt"], "no task 'eurosatt'; the nearest"),
        (["--task", "digits"], "'digits' has images of many kinds"),
        ([], "give --data, or --task"),
    ):
        assert run(["evaluate", models["same"], *words]) == 2
        assert re.search(message, capfd.readouterr().err)


@pytest.mark.parametrize("select", ["random", "herding", "k_medoids"])
def test_images_of_each_class_are_drawn(models, images, tmp_path, select):
    folders = ["--source", models["source"], "--finetuned", models["finetuned"], "--target", models["same"]]
    draw = ["--images", str(images), "--per-class", "2", "--select", select, "--quiet"]
    words = [*folders, "--method", "theseus", *draw, "--validation", f"{images}?part=0:0.5"]
    reports = []
    for name in ("a", "b"):
        assert run(["transport", *words, "--output", str(tmp_path / name)]) == 0
        reports.append(json.loads((tmp_path / name / "leaf_report.json").read_text()))
    assert reports[0]["examples"] == reports[1]["examples"]
    assert reports[0]["examples"]["source"] == str(images) and reports[0]["examples"]["count"] == 4
    assert reports[0]["validation"]["count"] == 4 and len(reports[0]["validation"]["accuracy"]) == 21


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "{places}/images.npz?labels=kinds"], "no array 'kinds', only images, labels, class_names"),
        (["--images", "hf:{places}/dataset?label=sort"], "no column 'sort'; its columns are photo, kind"),
        (["--images", "hf:{places}/dataset?split=test"], "is one split"),
        (["--images", "hf:{places}/dataset?splat=test"], "found 'splat=test', expected each of split="),
        (["--images", "{places}/images.npz", "--task", "mnist"], "has 2 classes, but 10 class names"),
        (["--images", "{images}/cat"], "has no labels, and an accuracy needs labelled images"),
        (["--images", "digits:thick/test", "--scales", "1"], "give --task-vector"),
        (["--images", "digits:thick/test", "--task-vector", "x", "--scales", "1,b"], "numbers with commas"),
        (["--images", "digits:thick/test", "--task-vector", "x", "--scales", "inf"], "finite numbers"),
        (["--images", "digits:thick/test", "--output", "/nowhere/r.json"], "its folder does not exist"),
        (["--images", "digits:thick/test", "--task-vector", "/nowhere/x.safetensors"], "/nowhere/x.safetensors"),
        (["{model}", "--images", "digits:thick/test"], "given twice"),
        (["{other}", "--images", "digits:thick/test", "--task-vector", "x"], "is added to one model, found 2"),
    ],
)
def test_bad_input_is_one_line_before_any_weight_is_read(models, images, places, capsys, monkeypatch, words, message):
    monkeypatch.setattr("tvjax.checkpoints.reader.Tensors.read_into", lambda *_: pytest.fail("weights were read"))
    given = {"places": places, "images": images, "model": models["same"], "other": models["wider"]}
    assert run(["evaluate", models["same"], *(word.format(**given) for word in words)]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.strip().splitlines()
    assert printed.out == "" and re.search(message, line), line


def test_what_does_not_fit_is_said(models, images, task_vector, tmp_path, capsys):
    for words, message in (
        ([models["finetuned"]], "no text tower to make a zero-shot head from"),
        ([models["wider"], models["finetuned"]], "has no text tower, and does not fit that of"),
        ([models["same"], "--task-vector", task_vector], "say --any-base"),
    ):
        assert run(["evaluate", *words, "--images", str(images), "--quiet", "--output", str(tmp_path / "r.json")]) == 2
        assert re.search(message, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []
    words = ["--source", models["source"], "--finetuned", models["finetuned"], "--target", models["same"]]
    words += ["--method", "theseus", "--images", str(images), "--output", str(tmp_path / "out")]
    for more, message in ((["--select", "herding"], "say how many"), (["--per-class", "4"], "has 3 examples")):
        assert run(["transport", *words, *more]) == 2
        assert re.search(message, capsys.readouterr().err)


def test_an_image_that_is_broken_is_named(models, images, tmp_path, capsys):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for file in (images / "cat").iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    (tmp_path / "dog" / "1.png").write_bytes(b"")
    assert run(["evaluate", models["same"], "--images", str(tmp_path)]) == 2
    assert "dog/1.png' is empty (0 bytes)" in capsys.readouterr().err
    whole = (images / "cat" / "0.png").read_bytes()
    (tmp_path / "dog" / "1.png").write_bytes(whole[: len(whole) // 2])
    assert run(["evaluate", models["same"], "--images", str(tmp_path)]) == 2
    assert "dog/1.png' cannot be read" in capsys.readouterr().err


def test_texts_are_refused_where_images_are_looked_at(models, tmp_path, capfd):
    (tmp_path / "texts.csv").write_text("text,label\none,cat\ntwo,dog\n")
    for words in (["--images", f"{tmp_path}/texts.csv"], ["--task", "sst2"], ["--task", "rte", "--images", "nowhere"]):
        assert run(["evaluate", models["same"], *words, "--quiet"]) == 2
        said = capfd.readouterr().err
        assert "is of texts, and this command takes images" in said.replace("\n", " "), said
