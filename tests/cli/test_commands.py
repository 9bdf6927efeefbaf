"""The commands end to end, on tiny random models."""

import json
import re

import jax
import numpy as np
import pytest

from tvjax import tree
from tvjax.checkpoints import from_pretrained, load_tree, save_tree
from tvjax.cli.main import run
from tvjax.jobs.configs import MERGES


def transport(models, target, method, output, *more):
    folders = {"source": models["source"], "finetuned": models["finetuned"], "target": models[target]}
    options = [text for name, value in folders.items() for text in (f"--{name}", value)]
    assert run(["transport", *options, "--method", method, "--output", str(output), *map(str, more)]) == 0
    return from_pretrained(output).params


@pytest.mark.parametrize("method", ["bico", "theseus"])
def test_transport_and_evaluate(models, images, tmp_path, capsys, method):
    output = tmp_path / "edited"
    more = ("--images", images, "--scale", 0.5, "--batch-size", 3)
    edited = tree.flatten(transport(models, "wider", method, output, *more))
    before = tree.flatten(from_pretrained(models["wider"]).params)
    moved = {path for path, leaf in before.items() if not np.array_equal(leaf, edited[path])}
    assert moved and all(path.startswith("vision/") for path in moved)
    report = json.loads((output / "leaf_report.json").read_text())
    assert report["method"] == method and report["scale"] == 0.5 and report["norms"]["target"] > 0
    rotated = {leaf["target"] for leaf in report["leaves"] if leaf["action"] == "rotated"}
    assert moved <= rotated and "vision/blocks/2/mlp/up/kernel" in moved
    assert (output / "leaf_report.txt").read_text().startswith("link")
    printed = capsys.readouterr()
    assert f"moved by {method}" in printed.out and f"{method} 1/5" in printed.err

    assert run(["evaluate", models["wider"], str(output), "--images", str(images), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["models"]
    assert [row["total"] for row in rows] == [6, 6]
    assert all(row["interval"][0] <= row["accuracy"] <= row["interval"][1] for row in rows)
    assert run(["evaluate", str(output), "--images", str(images)]) == 0
    assert f"{rows[1]['correct']} of 6" in capsys.readouterr().out


def test_transport_is_quiet_and_deterministic_and_its_vector_makes_the_same_model(models, images, tmp_path, capsys):
    more = ("--images", images, "--per-class", 2, "--seed", 3, "--quiet")
    first = transport(models, "same", "theseus", tmp_path / "a", *more)
    capsys.readouterr()  # transformers complains once of the tiny vocabulary
    tau = tmp_path / "moved.safetensors"
    second = transport(models, "same", "theseus", tmp_path / "b", *more, "--save-task-vector", tau)
    assert capsys.readouterr() == ("", "")
    words = ["--model", models["same"], "--output", str(tmp_path / "c"), "--quiet"]
    assert run(["apply", str(tau), *words]) == 0
    third = from_pretrained(tmp_path / "c").params
    for path, leaf in tree.flatten(first).items():
        np.testing.assert_array_equal(leaf, tree.flatten(second)[path])
        np.testing.assert_allclose(leaf, tree.flatten(third)[path], rtol=1e-6, atol=1e-7)


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
    assert "move there first (tvjax transport), or say --any-base" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    arguments = ["apply", tau, "--model", models["same"], "--output", str(tmp_path / "out"), "--any-base", "--quiet"]
    assert run(arguments) == 0


def test_the_scale_is_chosen_on_validation_images_and_the_run_can_be_repeated_from_its_recipe(models, images, tmp_path):
    output = tmp_path / "chosen"
    transport(models, "wider", "theseus", output, "--images", images, "--validation", images, "--options", "rank=0.5")
    report = json.loads((output / "leaf_report.json").read_text())
    curve, scales = report["validation"]["accuracy"], report["validation"]["scales"]
    assert len(curve) == 21 and report["scale"] == scales[int(np.argmax(curve))]
    assert run(["--config", str(output / "tvjax.yaml"), f"output={tmp_path / 'again'}"]) == 0
    first, second = (tree.flatten(from_pretrained(folder).params) for folder in (output, tmp_path / "again"))
    for path, leaf in first.items():
        np.testing.assert_array_equal(leaf, second[path])


@pytest.fixture
def task_vectors(models, tmp_path):
    files = []
    for name in ("one", "two"):
        files.append(str(tmp_path / f"{name}.safetensors"))
        pair = ["--pretrained", models["source"], "--finetuned", models["finetuned"]]
        assert run(["extract", *pair, "--output", files[-1], "--quiet", "--dtype", "float16"]) == 0
    return files


def test_merge_into_a_file_and_into_a_model(models, task_vectors, tmp_path, capsys):
    output = tmp_path / "merged.safetensors"
    assert run(["merge", *task_vectors, "--method", "average", "--output", str(output)]) == 0
    assert "2 task vectors" in capsys.readouterr().out
    (one, about), (merged, kept) = load_tree(task_vectors[0]), load_tree(output)
    for path, leaf in tree.flatten(merged).items():
        np.testing.assert_allclose(leaf, tree.flatten(one)[path].astype("float32"), rtol=1e-6)
    assert kept["base_fingerprint"] == about["base_fingerprint"]
    report = json.loads((tmp_path / "merged.leaf_report.json").read_text())
    assert {row["path"] for row in report["leaves"]} == set(tree.flatten(merged))

    folder = tmp_path / "model"
    arguments = ["merge", *task_vectors, "--method", "ties", "--options", "density={'**': 0.5, '**/bias': 1.0}"]
    arguments += ["--options", "scope=leaf"]
    assert run([*arguments, "--model", models["source"], "--scale", "0.5", "--output", str(folder)]) == 0
    edited, base = (tree.flatten(from_pretrained(name).params) for name in (folder, models["source"]))
    moved = {path for path in base if not np.array_equal(edited[path], base[path])}
    assert moved and moved <= set(tree.flatten(merged))
    assert (folder / "tvjax.yaml").exists() and (folder / "leaf_report.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "tyes"], "no merge 'tyes'"),
        (["--method", "regmean"], "needs data of every task"),
        (["--method", "knots"], "knots needs the option merge"),
        (["--method", "ties", "--options", "densty=1"], "ties has no option 'densty'; the nearest .* 'density'"),
        (["--method", "ties", "--options", "density"], "not of the form name=value"),
        (["--method", "ties", "--options", "density=7"], "density"),
        (["--method", "ties", "--options", "density={1: 2}"], "patterns of paths"),
        (["--method", "ties", "--options", "density=.nan"], "density is nan, expected a finite number"),
        (["--method", "wudi", "--options", "steps=many"], "steps is 'many', expected int"),
        (["--method", "iso_cts", "--options", "common=true"], "common is True, expected float"),
        (["--method", "average", "--scale", "inf"], "inf is no finite number"),
        (["--method", "dare", "--seed", "-1"], "seed"),
        (["--method", "iso_c", "--options", "matrices={'**': lio}"], "matrices` takes one letter an axis"),
        (["--method", "average", "--options", "weights=[1]"], "weights: 1 given for 2 task vectors"),
        (["--method", "average", "--options", "weights={'x/*': 1}"], "'x/\\*' matches none"),
    ],
)
def test_what_cannot_be_merged(task_vectors, tmp_path, capsys, words, message):
    output = tmp_path / "out.safetensors"
    assert run(["merge", *task_vectors, *words, "--output", str(output), "--quiet"]) == 2
    line = capsys.readouterr().err.strip()
    assert len(line.splitlines()) == 1 and re.search(message, line), line
    assert not output.exists()


@pytest.mark.parametrize("method", MERGES)
def test_a_leaf_that_only_some_vectors_cover_counts_as_zero_in_the_others(models, tmp_path, capsys, method):
    base = from_pretrained(models["source"]).identity()
    rng, files, whole = np.random.default_rng(0), [], []
    for number, name in enumerate(("0/query", "0/value")):  # the leaves of two adapters, and one that both have
        leaves = {f"{part}/kernel": rng.normal(size=(8, 8)).astype(np.float32) for part in (name, "0/out")}
        files.append(str(tmp_path / f"{number}.safetensors"))
        save_tree(files[-1], tree.nest(leaves), base)
        zeros = {f"{part}/kernel": np.zeros((8, 8), np.float32) for part in ("0/query", "0/value")}
        whole.append(str(tmp_path / f"whole{number}.safetensors"))
        save_tree(whole[-1], tree.nest(zeros | leaves), base)
    merged = []
    words = ["--method", method, *(("--options", "merge=ties") if method in ("knots", "core_space") else ())]
    for inputs, output in ((files, tmp_path / "merged.safetensors"), (whole, tmp_path / "expected.safetensors")):
        assert run(["merge", *inputs, *words, "--output", str(output)]) == 0
        merged.append(tree.flatten(load_tree(output)[0]))
        assert ("2 leaves (0/query/kernel, ...) are not covered" in capsys.readouterr().out) == (inputs is files)
    assert merged[0].keys() == merged[1].keys() == {"0/query/kernel", "0/value/kernel", "0/out/kernel"}
    for path, leaf in merged[1].items():
        np.testing.assert_array_equal(merged[0][path], leaf)
        assert np.isfinite(leaf).all()
    rows = json.loads((tmp_path / "merged.leaf_report.json").read_text())["leaves"]
    covered = {row["path"]: row["measures"].get("covered_by") for row in rows}
    assert covered == {"0/out/kernel": None, "0/query/kernel": [0], "0/value/kernel": [1]}


def test_a_merge_around_one_that_draws_at_random_gives_it_the_seed(tmp_path):
    files, merged = [], []
    for number in range(2):
        files.append(str(tmp_path / f"{number}.safetensors"))
        kernel = np.random.default_rng(number).normal(size=(8, 8)).astype(np.float32)
        save_tree(files[-1], {"blocks": {"0": {"kernel": kernel}}})
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        output = tmp_path / f"{name}.safetensors"
        words = ["--method", "lines", "--options", "merge=dare", "--options", "alpha=0.5", "--seed", str(seed)]
        assert run(["merge", *files, *words, "--output", str(output), "--quiet"]) == 0
        merged.append(load_tree(output)[0]["blocks"]["0"]["kernel"])
    np.testing.assert_array_equal(merged[0], merged[1])
    assert (merged[0] != merged[2]).any()


def test_a_merge_never_replaces_its_inputs(task_vectors, tmp_path, capsys):
    before = [tree.flatten(load_tree(file)[0]) for file in task_vectors]
    link = tmp_path / "link.safetensors"
    link.symlink_to(task_vectors[1])
    for output in (task_vectors[0], str(link)):
        assert run(["merge", *task_vectors, "--method", "average", "--output", output, "--quiet"]) == 2
        assert "would be lost" in capsys.readouterr().err
    for leaves, file in zip(before, task_vectors, strict=True):
        assert all(np.array_equal(leaf, leaves[path]) for path, leaf in tree.flatten(load_tree(file)[0]).items())


def test_merge_prints_json_and_nothing_else(models, task_vectors, tmp_path, capsys):
    output = tmp_path / "merged.safetensors"
    assert run(["merge", *task_vectors, "--method", "average", "--output", str(output), "--json", "--quiet"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert printed.err == "" and found["output"] == str(output) and found["base_model"] == models["source"]
    np.testing.assert_allclose(found["norm"], tree.norm(load_tree(output)[0]), rtol=1e-5)


def test_a_folder_needs_a_model(task_vectors, tmp_path, capsys):
    assert run(["merge", *task_vectors, "--method", "average", "--output", str(tmp_path / "out")]) == 2
    assert "give --model" in capsys.readouterr().err


def compose(models, task_vectors, images, output, *more):
    fixed = ["--model", models["source"], "--images", str(images), "--output", str(output), "--batch-size", "3"]
    return run(["compose", *task_vectors, *fixed, "--epochs", "1", *map(str, more)])


@pytest.mark.parametrize("objective", ["few_shot", "entropy", "fix_match"])
def test_compose_learns_coefficients_and_the_model_is_what_they_give(
    models, images, task_vectors, tmp_path, capsys, objective
):
    from tvjax.checkpoints import load_coefficients
    from tvjax.compose import combine

    output = tmp_path / "composed"
    words = ("--objective", objective, "--no-flip", "--no-tune")
    assert compose(models, task_vectors, images, output, *words) == 0
    assert "2 task vectors" in capsys.readouterr().out
    coefficients, about = load_coefficients(output / "coefficients.safetensors")
    assert np.any(np.asarray(coefficients.values)) and coefficients.layout.vectors == tuple(task_vectors)
    base = from_pretrained(models["source"])
    assert about["base_fingerprint"] == base.identity()["base_fingerprint"]
    expected = tree.flatten(jax.jit(combine)(base.params, [load_tree(file)[0] for file in task_vectors], coefficients))
    for path, leaf in tree.flatten(from_pretrained(output).params).items():
        np.testing.assert_array_equal(leaf, expected[path])
    assert (output / "coefficients.png").stat().st_size > 1000 and (output / "tvjax.yaml").exists()


def test_compose_tunes_the_leaves_too_unless_it_is_told_not_to(models, images, task_vectors, tmp_path, capsys):
    from tvjax.checkpoints import load_coefficients
    from tvjax.compose import combine

    output = tmp_path / "tuned"
    assert compose(models, task_vectors, images, output, "--per-class", 2, "--select", "herding") == 0
    record = json.loads((output / "examples.json").read_text())["examples"]
    assert record["count"] == 4 and len(record["sha256"]) == 64
    covered = {path for path, leaf in tree.flatten(load_tree(task_vectors[0])[0]).items() if np.any(leaf)}
    assert f"coefficients and {len(covered)} leaves" in capsys.readouterr().out.replace("\n", " ")
    coefficients, _ = load_coefficients(output / "coefficients.safetensors")
    base = from_pretrained(models["source"]).params
    moved = jax.jit(combine)(base, [load_tree(file)[0] for file in task_vectors], coefficients)
    for path, leaf in tree.flatten(from_pretrained(output).params).items():
        same = np.array_equal(leaf, tree.flatten(moved)[path])
        assert same == (path not in covered), path


@pytest.mark.parametrize("words", [(), ("--no-tune", "--match", "logits", "--objective", "few_shot")])
def test_compose_learns_from_a_teacher_of_another_shape(models, images, task_vectors, tmp_path, capsys, words):
    """The wider CLIP teaches; unlabelled images do, but where the labels are learned from too."""
    data = images if words[-1:] == ("few_shot",) else images / "cat"
    names = tmp_path / "names.txt"
    names.write_text("cat\npolar bear\n")
    given = ("--teacher", models["wider"], "--classes", names, "--learning-rate", 1, "--json", *words)
    assert compose(models, task_vectors, data, tmp_path / "taught", *given) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["objective"] == (words[-1] if words[-1:] == ("few_shot",) else "distillation")
    assert (found["tuned_leaves"] == 0) == ("--no-tune" in words)
    before, after = (from_pretrained(name).params for name in (models["source"], tmp_path / "taught"))
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


def test_a_tower_alone_teaches_with_the_head_of_its_base(models, images, task_vectors, tmp_path, capsys):
    given = ("--teacher", models["finetuned"], "--quiet", "--no-tune")
    assert compose(models, task_vectors, images, tmp_path / "out", *given) == 2
    assert "has no text tower" in capsys.readouterr().err and not (tmp_path / "out").exists()
    given = (*given, "--teacher-base", models["source"], "--match", "logits")
    assert compose(models, task_vectors, images, tmp_path / "out", *given) == 0
    assert "teacher_base: " + models["source"] in (tmp_path / "out" / "tvjax.yaml").read_text()


def test_compose_chooses_by_validation_images_and_goes_on_from_its_state(
    models, images, task_vectors, tmp_path, capsys
):
    rates = ("--learning-rate", 0.01, "--learning-rate", 1.0, "--validation", images, "--state", tmp_path / "state")
    assert compose(models, task_vectors, images, tmp_path / "first", *rates) == 0
    first = capsys.readouterr()
    assert "% on" in first.out and "few_shot 2/2: learning rate 1, epoch 1: loss" in first.err
    assert compose(models, task_vectors, images, tmp_path / "second", *rates, "--json") == 0
    printed = capsys.readouterr()
    assert "epoch" not in printed.err  # nothing was left to train; how far the choice of the start is may be told
    found = json.loads(printed.out)
    assert found["coefficients"] == 80 and found["learning_rate"] in (0.01, 1.0) and found["validation_accuracy"] >= 0
    names = ("first", "second")
    a, b = (tree.flatten(from_pretrained(tmp_path / name).params) for name in names)
    for path, leaf in a.items():
        np.testing.assert_array_equal(leaf, b[path])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--objective", "magic"], "magic|few_shot"),
        (["--blocks", "row"], "'leaf'"),
        (["--learning-rate", "1", "--learning-rate", "2"], "give --validation"),
        (["--learning-rate", "nan"], "no finite number"),
        (["--batch-size", "99999999999"], "batch-size"),
        (["--per-class", "99"], "99"),
        (["--objective", "distillation"], "give --teacher"),
        (["--objective", "entropy", "--teacher", "x"], "learns from no teacher"),
        (["--temperature", "2"], "--temperature is about a teacher"),
        (["--teacher", "{source}", "--teacher-base", "{wider}"], "is no fine-tuning of"),
    ],
)
def test_what_cannot_be_composed(models, images, task_vectors, tmp_path, capsys, words, message):
    words = [word.format(**models) for word in words]
    assert compose(models, task_vectors, images, tmp_path / "out", *words, "--quiet") == 2
    line = capsys.readouterr().err.strip()
    assert len(line.splitlines()) == 1 and re.search(message, line), line
    assert not (tmp_path / "out").exists()
