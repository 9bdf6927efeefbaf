"""`tvjax plan` reads headers only and says what the transport then does; every recipe has one; maps are reused."""

import json
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import yaml

from tvjax import tree
from tvjax.checkpoints import TransportStore, from_pretrained
from tvjax.cli.main import run
from tvjax.models.clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, clip
from tvjax.models.families import CLIP
from tvjax.models.key_table import to_checkpoint
from tvjax.models.transformer import parameter_shapes

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(CONFIGS.glob("transport_*.yaml"))
TOWERS = {
    "openai/clip-vit-base-patch32": (768, 12, 32, 512),
    "openai/clip-vit-base-patch16": (768, 12, 16, 512),
    "openai/clip-vit-large-patch14": (1024, 24, 14, 768),
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K": (768, 12, 32, 512),
    "tanganke/clip-vit-base-patch32_sun397": (768, 12, 32, 512),
    "tanganke/clip-vit-base-patch16_sun397": (768, 12, 16, 512),
}


def write_headers(folder, width, depth, patch, embedding, full=True):
    """A checkpoint of real size whose weights are a hole in the file: nothing but its header can be read in no time."""
    vision = CLIPVisionConfig(width, 4 * width, depth, width // 64, patch_size=patch, projection_dim=embedding)
    text = CLIPTextConfig(hidden_size=embedding, intermediate_size=4 * embedding, projection_dim=embedding)
    config = CLIPConfig(vision, text if full else None)
    shapes = parameter_shapes(clip(config, {}).stages)
    params = tree.nest({path: np.broadcast_to(np.int8(0), shape) for path, shape in shapes.items()})
    header, end = {}, 0
    for key, tensor in to_checkpoint(CLIP.table, params).items():
        start, end = end, end + 4 * tensor.size
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text_of_header = json.dumps(header).encode()
    folder.mkdir(parents=True)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text_of_header)) + text_of_header)
        file.truncate(file.tell() + end)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Folders with the names of hub repositories."""
    folder = tmp_path_factory.mktemp("hub")
    for name, shape in TOWERS.items():
        write_headers(folder / name, *shape, full=not name.startswith("tanganke"))
    return folder


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_of_a_transport_can_be_planned(hub, images, monkeypatch, capsys, recipe):
    monkeypatch.chdir(hub)
    words = [f"images={images}", "per_class=2"]
    if "validation" in yaml.safe_load(recipe.read_text()):
        words.append(f"validation={images}")
    assert run(["plan", "--config", str(recipe), *words, "--json"]) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)
    actions = {leaf["action"] for leaf in found["leaves"]}
    assert actions & {"rotated", "masked", "passed through", "shifted", "fitted"} and "unmatched" not in actions
    assert found["examples"]["count"] == (4 if "data" in yaml.safe_load(recipe.read_text()) else 8)
    assert found["memory"]["applying"] > found["memory of the fit"]["parameters"] > 2**29


def test_recipes_cross_widths_and_depths():
    pairs = {(recipe["source"], recipe["target"]) for recipe in map(yaml.safe_load, (f.read_text() for f in RECIPES))}
    assert ("openai/clip-vit-base-patch32", "openai/clip-vit-base-patch16") in pairs
    assert any(target == "openai/clip-vit-large-patch14" for _, target in pairs)


def test_the_plan_is_what_the_transport_does(models, images, tmp_path, capsys):
    words = ["--source", models["source"], "--target", models["wider"], "--finetuned", models["finetuned"]]
    words += ["--method", "theseus", "--images", str(images), "--output", str(tmp_path / "edited")]
    assert run(["plan", *words, "--json", "--save-task-vector", str(tmp_path / "tau.safetensors")]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []
    assert run(["transport", *words, "--quiet"]) == 0
    done = json.loads((tmp_path / "edited" / "leaf_report.json").read_text())
    assert planned["leaves"] == [{k: v for k, v in leaf.items() if k != "measures"} for leaf in done["leaves"]]
    weights = (tmp_path / "edited" / "model.safetensors").stat().st_size
    assert 0 < weights - planned["disk"]["edited model"] < 20_000  # the header


def test_a_fit_with_the_task_vector_is_planned_and_kept_for_it_alone(models, images, tmp_path, capsys):
    words = ["--source", models["source"], "--target", models["wider"], "--finetuned", models["finetuned"]]
    words += ["--method", "ariadne", "--images", str(images), "--maps", str(tmp_path / "maps")]
    assert run(["plan", *words, "--json", "--options", "leaves=attention_and_mlp"]) == 0
    planned = json.loads(capsys.readouterr().out)
    fitted = [leaf["target"] for leaf in planned["leaves"] if leaf["action"] == "fitted"]
    assert {path.split("/", 3)[3] for path in fitted} == {"attention/out/kernel", "mlp/down/kernel", "mlp/down/bias"}
    assert run(["transport", *words, "--output", str(tmp_path / "one"), "--quiet"]) == 0
    report = json.loads((tmp_path / "one" / "leaf_report.json").read_text())
    down = next(leaf for leaf in report["leaves"] if leaf["target"] == "vision/blocks/0/mlp/down/kernel")
    assert down["action"] == "fitted" and 0 < down["measures"]["realised"] <= 1
    before, after = (tree.flatten(from_pretrained(name).params) for name in (models["wider"], tmp_path / "one"))
    moved = {path for path, leaf in before.items() if not np.array_equal(leaf, after[path])}
    assert moved == {path for path in fitted if "mlp" in path}
    words[words.index("--finetuned") + 1] = models["source"]
    assert run(["transport", *words, "--output", str(tmp_path / "two"), "--quiet"]) == 2
    assert "holds the maps of another fit, of other task vector" in capsys.readouterr().err


def test_a_plan_for_people(models, capsys):
    words = ["--source", models["source"], "--target", models["wider"], "--method", "theseus", "--count", "3"]
    assert run(["plan", *words]) == 0
    printed = capsys.readouterr().out
    assert "rotated" in printed and "fitting" in printed and "embeddings 0 0 1 head" in printed
    assert "those of tokens are from 4 examples on, those of one row an example from 8" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "gradfix"], "gradfix needs towers of one shape.*theseus and bico move across shapes"),
        (["--method", "bico", "--images", "{flat}"], "has no labels.*or take theseus, which needs no labels"),
        (["--method", "theseus", "--finetuned", "{wider}"], "56 leaves differ"),
        (["--method", "theseus", "--output", "{flat}"], "the output .* exists"),
        (["--method", "theseus", "--options", "rank=0"], "rank"),
    ],
)
def test_what_cannot_be_is_said_before_any_weight_is_read(models, images, tmp_path, capsys, words, message):
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "1.png").write_bytes((images / "cat" / "0.png").read_bytes())
    words = [word.format(flat=flat, wider=models["wider"]) for word in words]
    assert run(["plan", "--source", models["source"], "--target", models["wider"], *words]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_kept_maps_are_used_again_and_those_of_other_images_refused(models, images, tmp_path, capsys, monkeypatch):
    words = ["--source", models["source"], "--target", models["wider"], "--finetuned", models["finetuned"]]
    words += ["--method", "theseus", "--images", str(images), "--quiet", "--maps", str(tmp_path / "maps")]
    assert run(["transport", *words, "--output", str(tmp_path / "one")]) == 0
    kept = sorted((tmp_path / "maps").iterdir())
    assert len(kept) == 6  # five stages, and what they depend on

    def refit(store, stage, parts):
        raise AssertionError(f"{stage} was fitted again")

    with monkeypatch.context() as patch:
        patch.setattr(TransportStore, "save", refit)
        assert run(["transport", *words, "--output", str(tmp_path / "two"), "--scale", "2"]) == 0
    before, one, two = (
        tree.flatten(from_pretrained(name).params) for name in (models["wider"], tmp_path / "one", tmp_path / "two")
    )
    for path, leaf in before.items():
        np.testing.assert_allclose(two[path] - leaf, 2 * (one[path] - leaf), atol=1e-6)
    capsys.readouterr()
    assert run(["transport", *words, "--output", str(tmp_path / "three"), "--per-class", "1"]) == 2
    assert "holds the maps of another fit, of other examples: give another folder" in capsys.readouterr().err
    shutil.copytree(models["source"], tmp_path / "source")
    settings = json.loads((tmp_path / "source" / "preprocessor_config.json").read_text())
    (tmp_path / "source" / "preprocessor_config.json").write_text(json.dumps(settings | {"do_normalize": False}))
    assert run(["transport", *words, "--output", str(tmp_path / "three"), "--source", str(tmp_path / "source")]) == 2
    assert "maps of another fit, of other source processor: give another folder" in capsys.readouterr().err
    assert sorted((tmp_path / "maps").iterdir()) == kept and not (tmp_path / "three").exists()
