"""Adapters stay adapters: through `tvjax extract`, `tvjax transport` and `tvjax merge`."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import tvjax as tv
from tvjax import tree
from tvjax.checkpoints import from_pretrained, load_adapter, load_tree, save_adapter
from tvjax.cli.main import run
from tvjax.data.embedded import model_folder
from tvjax.factors import dense
from tvjax.merge import to_task_vector
from tvjax.models.clip.modeling import vision_model

UP = "vision/blocks/{}/mlp/up/kernel"


def adapter(model, folder, seed=0, rank=2, patterns=("vision/**/query/kernel", "vision/**/up/kernel")):
    """The folder of a random adapter of a model, and its task vector."""
    base, random = from_pretrained(model), np.random.default_rng(seed)
    found = {}
    for pattern in patterns:
        for path in tree.match(list(tree.flatten(base.params)), pattern):
            rows, columns = tree.get(base.params, path).shape
            left, right = random.normal(size=(rows, rank)), random.normal(size=(rank, columns))
            found[path] = tv.LowRank(0.2 * left.astype(np.float32), 0.2 * right.astype(np.float32))
    save_adapter(tree.nest(found), folder, base)
    return str(folder), found


def read(folder, model):
    base = from_pretrained(model)
    return tree.flatten(to_task_vector(load_adapter(folder, base), base.params, low_rank=True))


def transport(models, images, output, lora, *more, target="wider", method="theseus"):
    pair = ["--source", models["source"], "--target", models[target], "--method", method, "--data", str(images)]
    return run(["transport", *pair, "--task-vector", lora, "--output", str(output), *map(str, more)])


def error_of(capsys):
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("tvjax: error: ")
    return line


@pytest.fixture(scope="module")
def lora(models, tmp_path_factory):
    return adapter(models["source"], tmp_path_factory.mktemp("lora") / "lora")


# -- transport ------------------------------------------------------------------------------------------------------


def test_an_adapter_in_an_adapter_out(models, images, lora, tmp_path, capsys):
    """Of the same rank, for a wider and deeper model, and the same edit as that of the dense way."""
    words = ("--options", "rank_tolerance=1e-3", "--scale", "1.5")
    assert transport(models, images, tmp_path / "moved", lora[0], *words, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["form"] == "adapter" and result["finetuned"] == lora[0]
    assert transport(models, images, tmp_path / "dense", lora[0], *words, "--dense", "--json") == 0
    assert json.loads(capsys.readouterr().out)["form"] == "model"
    moved, target = read(tmp_path / "moved", models["wider"]), from_pretrained(models["wider"])
    assert len(moved) == 6 and {leaf.rank for leaf in moved.values()} == {2}
    edited = tree.flatten(tv.apply(target.params, tree.nest(moved)))
    for path, leaf in tree.flatten(from_pretrained(tmp_path / "dense").params).items():
        np.testing.assert_allclose(edited[path], leaf, atol=1e-5, err_msg=path)
    settings = json.loads((tmp_path / "moved" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == models["wider"]
    card = (tmp_path / "moved" / "README.md").read_text()
    assert "library_name: peft" in card and "theseus" in card
    report = json.loads((tmp_path / "moved" / "leaf_report.json").read_text())
    forms = {leaf["target"]: leaf.get("form") for leaf in report["leaves"]}
    assert forms[UP.format(0)] == "rank 2" and report["form"] == "adapter"
    assert (tmp_path / "moved" / "tvjax.yaml").exists()


def test_a_link_that_cannot_keep_the_form_is_named(models, images, lora, tmp_path, capsys):
    more = ("--options", "theseus.rank_tolerance=1e-3")
    assert transport(models, images, tmp_path / "edited", lora[0], *more, target="same", method="theseus+gradfix") == 0
    assert "gradfix makes arrays of 4 leaves of the adapter" in capsys.readouterr().out
    assert (tmp_path / "edited" / "model.safetensors").exists()
    assert not (tmp_path / "edited" / "adapter_config.json").exists()


def test_the_naive_way_is_the_adapter_itself(models, lora, tmp_path):
    words = ["--source", models["source"], "--target", models["same"], "--method", "naive", "--task-vector", lora[0]]
    assert run(["transport", *words, "--output", str(tmp_path / "moved"), "--quiet"]) == 0
    for path, leaf in read(tmp_path / "moved", models["same"]).items():
        np.testing.assert_array_equal(leaf.left, lora[1][path].left)


def test_the_scale_is_chosen_and_folded_in(models, images, lora, tmp_path, capsys):
    words = ["--source", models["source"], "--target", models["same"], "--method", "naive", "--task-vector", lora[0]]
    words += ["--validation", str(images), "--output", str(tmp_path / "moved"), "--json"]
    assert run(["transport", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["form"] == "adapter" and len(found["validation"]["accuracy"]) == len(found["validation"]["scales"])
    for path, leaf in read(tmp_path / "moved", models["same"]).items():
        np.testing.assert_allclose(leaf.right, found["scale"] * lora[1][path].right, rtol=1e-6)


def test_a_task_vector_on_disk_moves_as_its_fine_tuning(models, images, tmp_path):
    tau = str(tmp_path / "tau.safetensors")
    pair = ["--pretrained", models["source"], "--finetuned", models["finetuned"]]
    assert run(["extract", *pair, "--output", tau, "--quiet"]) == 0
    assert transport(models, images, tmp_path / "one", tau, "--quiet") == 0
    pair = ["--source", models["source"], "--finetuned", models["finetuned"], "--target", models["wider"]]
    words = ["--method", "theseus", "--data", str(images), "--output", str(tmp_path / "two"), "--quiet"]
    assert run(["transport", *pair, *words]) == 0
    one, two = (tree.flatten(from_pretrained(tmp_path / name).params) for name in ("one", "two"))
    for path, leaf in two.items():
        np.testing.assert_allclose(one[path], leaf, atol=1e-5)


def test_what_cannot_be_is_one_line_before_any_weight_is_read(models, images, lora, tmp_path, capsys, monkeypatch):
    wider, _ = adapter(models["wider"], tmp_path / "wider")
    text, _ = adapter(models["source"], tmp_path / "text", patterns=("text/**/query/kernel",))
    other, _ = adapter(models["same"], tmp_path / "other")
    tau = str(tmp_path / "tau.safetensors")
    assert run(["extract", "--pretrained", models["source"], "--adapter", lora[0], "--output", tau, "--quiet"]) == 0
    monkeypatch.setattr("tvjax.jobs.opened.from_pretrained", None)
    for name, message in (
        (wider, "does not fit"),
        (text, "none of which is moved: name the part that it changes"),
        (other, "is another model"),
        (str(tmp_path / "nothing.safetensors"), "there is no file"),
    ):
        assert transport(models, images, tmp_path / "moved", name, "--any-base" if name == wider else "--quiet") == 2
        assert message in error_of(capsys), name
    words = ["--source", models["source"], "--target", models["wider"], "--method", "naive"]
    assert run(["transport", *words, "--output", str(tmp_path / "moved")]) == 2
    assert "give either --finetuned, a model, or --task-vector" in error_of(capsys)
    assert transport(models, images, tmp_path / "moved", tau, "--finetuned", models["finetuned"]) == 2
    assert "give either" in error_of(capsys)
    assert not (tmp_path / "moved").exists()


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_peft_loads_what_was_moved_and_computes_what_the_edited_target_does(models, images, lora, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import CLIPVisionModelWithProjection

    words = ("--options", "rank_tolerance=1e-3", "--scale", "2", "--quiet")
    assert transport(models, images, tmp_path / "moved", lora[0], *words) == 0
    pixels = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype(np.float32)
    plain = CLIPVisionModelWithProjection.from_pretrained(models["wider"])
    with torch.no_grad():
        seen = {"pixel_values": torch.tensor(pixels.transpose(0, 3, 1, 2))}
        before = plain(**seen).image_embeds.numpy()
        expected = peft.PeftModel.from_pretrained(plain, tmp_path / "moved").eval()(**seen).image_embeds.numpy()
    target = from_pretrained(models["wider"])
    edited = tv.apply(target.params, tree.nest(read(tmp_path / "moved", models["wider"])))
    found = vision_model(target.model.replace(params=edited))({"pixels": jnp.asarray(pixels)})["image"]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(expected - before).max() > 1e-3


# -- extract --------------------------------------------------------------------------------------------------------


def test_the_best_adapter_of_a_fine_tuning(models, tmp_path, capsys):
    pair = ["--pretrained", models["source"], "--finetuned", models["finetuned"]]
    assert run(["extract", *pair, "--rank", "3", "--output", str(tmp_path / "lora"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    before, after = (tree.flatten(from_pretrained(models[name]).params) for name in ("source", "finetuned"))
    tau = {path: np.asarray(leaf) - np.asarray(before[path]) for path, leaf in after.items()}
    lora = read(tmp_path / "lora", models["source"])
    rows = {row["path"]: row for row in json.loads((tmp_path / "lora" / "leaf_report.json").read_text())["leaves"]}
    assert rows.keys() == tau.keys()
    whole = sum(np.sum(leaf**2) for leaf in tau.values())
    for path, row in rows.items():
        np.testing.assert_allclose(row["share"], np.sum(tau[path] ** 2) / whole, rtol=1e-4)
        if path not in lora:
            assert row["rule"] == "left out" and row["error"] == 1
            continue
        u, s, vt = np.linalg.svd(tau[path], full_matrices=False)
        np.testing.assert_allclose(np.asarray(lora[path]), (u[:, :3] * s[:3]) @ vt[:3], atol=1e-5)
        assert row["rank"] == 3
    assert {path for path in tau if path.endswith("/kernel") and "patch" not in path} == set(lora)
    rest = [path for path in tau if path not in lora]
    assert any(f"{len(rest)} leaves that are no linear layers" in note for note in found["notes"])
    lost = sum(row["error"] ** 2 * row["share"] for row in rows.values())
    np.testing.assert_allclose(found["error"] ** 2, lost, rtol=1e-5)
    assert "library_name: peft" in (tmp_path / "lora" / "README.md").read_text()


def test_all_of_the_energy_is_the_fine_tuning_itself(models, tmp_path):
    pair = ["--pretrained", models["source"], "--finetuned", models["finetuned"]]
    assert run(["extract", *pair, "--energy", "1", "--output", str(tmp_path / "lora"), "--quiet"]) == 0
    edited = tv.apply(from_pretrained(models["source"]).params, tree.nest(read(tmp_path / "lora", models["source"])))
    after = tree.flatten(from_pretrained(models["finetuned"]).params)
    np.testing.assert_allclose(tree.get(edited, UP.format(1)), after[UP.format(1)], atol=1e-6)


def test_extraction_of_what_cannot_be(models, lora, tmp_path, capsys):
    pair = ["--pretrained", models["source"], "--finetuned", models["finetuned"]]
    assert run(["extract", *pair, "--rank", "3", "--output", str(tmp_path / "a.safetensors")]) == 2
    assert "an adapter is a folder" in error_of(capsys)
    words = ["--pretrained", models["source"], "--adapter", lora[0], "--rank", "3", "--output", str(tmp_path / "a")]
    assert run(["extract", *words]) == 2
    assert "give --finetuned" in error_of(capsys)
    pair = ["--pretrained", models["source"], "--finetuned", models["source"]]
    assert run(["extract", *pair, "--rank", "3", "--output", str(tmp_path / "a"), "--quiet"]) == 2
    assert "fine-tuning changed no linear layer" in error_of(capsys)
    assert not list(tmp_path.iterdir())


# -- merge ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(models, lora, tmp_path_factory):
    return [lora, adapter(models["source"], tmp_path_factory.mktemp("two") / "two", 1, 3, ("vision/**/up/kernel",))]


def merge(models, two, output, method, *more):
    words = ["--model", models["source"], "--method", method, "--output", str(output), *more]
    return run(["merge", *(folder for folder, _ in two), *words])


@pytest.mark.parametrize(
    ("method", "more"), [("task_arithmetic", ()), ("core_space", ("--options", "merge=task_arithmetic"))]
)
def test_adapters_merge_to_an_adapter(models, two, tmp_path, capsys, method, more):
    assert merge(models, two, tmp_path / "merged", method, *more, "--scale", "0.5", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["form"] == "adapter"
    merged = read(tmp_path / "merged", models["source"])
    for path, leaf in merged.items():
        parts = [np.asarray(tau[path]) for _, tau in two if path in tau]
        assert leaf.rank == (5 if len(parts) == 2 else 2)
        np.testing.assert_allclose(np.asarray(leaf), 0.5 * sum(parts), atol=1e-5)
    assert merged.keys() == two[0][1].keys()


def test_a_rank_makes_an_adapter_of_any_merge(models, two, tmp_path, capsys):
    assert merge(models, two, tmp_path / "merged", "ties", "--rank", "4") == 0
    assert "rank 4 holds" in capsys.readouterr().out
    assert {leaf.rank for leaf in read(tmp_path / "merged", models["source"]).values()} == {4}


def test_other_merges_and_dense_give_the_model(models, two, tmp_path, capsys):
    assert merge(models, two, tmp_path / "ties", "ties") == 0
    assert "ties makes arrays of adapters" in capsys.readouterr().out
    assert merge(models, two, tmp_path / "dense", "task_arithmetic", "--dense", "--quiet") == 0
    base = from_pretrained(models["source"])
    expected = tv.apply(base.params, tree.nest(dense(two[0][1])))
    flat = {path: leaf for path, leaf in two[1][1].items()}
    expected = tree.flatten(tv.apply(expected, tree.nest(flat)))
    for path, leaf in tree.flatten(from_pretrained(tmp_path / "dense").params).items():
        np.testing.assert_allclose(leaf, expected[path], atol=1e-5)


def test_a_file_gets_the_products(models, two, tmp_path):
    assert merge(models, two, tmp_path / "tau.safetensors", "task_arithmetic", "--quiet") == 0
    for path, leaf in tree.flatten(load_tree(tmp_path / "tau.safetensors")[0]).items():
        expected = sum(np.asarray(tau[path]) for _, tau in two if path in tau)
        np.testing.assert_allclose(leaf, expected, atol=1e-5)


def test_a_merge_of_adapters_needs_their_model(models, two, tmp_path, capsys):
    words = [folder for folder, _ in two]
    assert run(["merge", *words, "--method", "ties", "--output", str(tmp_path / "a.safetensors")]) == 2
    assert "is an adapter, which names layers as its model does: give --model" in error_of(capsys)
    words += ["--method", "ties", "--model", models["wider"], "--output", str(tmp_path / "a")]
    assert run(["merge", *words]) == 2
    assert "does not fit" in error_of(capsys) and not list(tmp_path.iterdir())


def test_an_adapter_in_the_place_of_a_model_or_a_file_is_named_with_the_way_out(tmp_path, capsys):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    base, lora = str(model_folder("A")), str(tmp_path / "lora")
    for words in (["apply", lora, "--model", base, "--output", str(tmp_path / "out")], ["inspect", lora]):
        assert run(words) == 2
        assert "tvjax extract --adapter" in capsys.readouterr().err


def test_measurements_do_not_replace_a_file_of_tensors(tmp_path, capsys):
    file = tmp_path / "tau.safetensors"
    file.write_bytes(b"tensors")
    words = ["evaluate", str(model_folder("A")), "--data", "digits:thick/test", "--output", str(file)]
    assert run(words) == 2 and file.read_bytes() == b"tensors"
    assert "give one that ends in .json" in capsys.readouterr().err
