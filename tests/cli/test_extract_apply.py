"""`tvjax extract` and `tvjax apply`: thin over `tvjax.checkpoints.streaming`."""

import json
import re

import numpy as np
import pytest
import safetensors.numpy

from tvjax import tree
from tvjax.checkpoints import from_pretrained, load_tree
from tvjax.cli.main import run


def extract(models, output, *more, finetuned="finetuned"):
    pair = ["--pretrained", models["source"], "--finetuned", models[finetuned]]
    return run(["extract", *pair, "--output", str(output), *map(str, more)])


def error_of(capsys):
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("tvjax: error: ")
    return line


def test_extract_says_what_it_wrote_and_what_stays(models, tmp_path, capsys):
    words = ("--dtype", "bfloat16")
    assert extract(models, tmp_path / "tau.safetensors", *words, finetuned="same") == 0
    printed = capsys.readouterr()
    assert "leaves outside 'vision' too (logit_scale, ...), which stay" in printed.out
    tau, about = load_tree(tmp_path / "tau.safetensors")
    assert set(tau) == {"vision"} and about["finetuned_model"] == models["same"]
    assert {leaf.dtype.name for leaf in tree.flatten(tau).values()} == {"bfloat16"}
    assert extract(models, tmp_path / "all.safetensors", "--subtree", "", "--quiet", finetuned="same") == 0
    assert capsys.readouterr().out == ""
    assert set(load_tree(tmp_path / "all.safetensors")[0]) == {"logit_scale", "text", "vision"}


def test_apply_chooses_dtype_and_shards_and_writes_a_card(models, tmp_path, capsys):
    tau, output = tmp_path / "tau.safetensors", tmp_path / "edited"
    assert extract(models, tau, "--quiet") == 0
    words = ["--model", models["source"], "--output", str(output), "--dtype", "float16", "--max-shard-size", "4KB"]
    assert run(["apply", str(tau), *words, "--scale", "0.5"]) == 0
    assert "parameters" in capsys.readouterr().out
    assert len(list(output.glob("model-*.safetensors"))) > 1 and (output / "tvjax.yaml").exists()
    assert "| scale | `0.5` |" in (output / "README.md").read_text()
    before, after = (tree.flatten(from_pretrained(name).params) for name in (models["source"], output))
    assert sum(leaf.size for leaf in before.values()) == sum(leaf.size for leaf in after.values())
    assert {leaf.dtype.name for leaf in after.values()} == {"float16"}


def test_an_adapter_is_extracted_too(models, tmp_path):
    layer, rng = "vision_model.encoder.layers.0.self_attn.q_proj", np.random.default_rng(0)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 8), (8, 2)))
    (tmp_path / "lora").mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {f"base_model.model.{layer}.lora_{name}.weight": factor for name, factor in (("A", a), ("B", b))}
    safetensors.numpy.save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
    words = ["--pretrained", models["source"], "--adapter", str(tmp_path / "lora")]
    assert run(["extract", *words, "--output", str(tmp_path / "tau.safetensors"), "--quiet"]) == 0
    words = ["--model", models["source"], "--output", str(tmp_path / "edited"), "--quiet"]
    assert run(["apply", str(tmp_path / "tau.safetensors"), *words]) == 0
    before, after = (tree.flatten(from_pretrained(name).params) for name in (models["source"], tmp_path / "edited"))
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    (path,) = moved
    np.testing.assert_allclose(after[path] - before[path], 2 * (b @ a).T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "either --finetuned, a model, or --adapter"),
        (["--finetuned", "{wider}"], "leaves differ"),
        (["--finetuned", "{finetuned}", "--subtree", "text"], "has no part 'text', only vision"),
        (["--finetuned", "{finetuned}", "--dtype", "int8"], "'int8' is not one of 'float32', 'float16', 'bfloat16'"),
        (["--adapter", "{source}"], "has no adapter_config.json"),
        (["--finetuned", "/no/such/folder"], "is no folder"),
    ],
)
def test_what_cannot_be_extracted(models, tmp_path, capsys, words, message):
    words = [word.format(**models) for word in words]
    assert run(["extract", "--pretrained", models["source"], *words, "--output", str(tmp_path / "tau")]) == 2
    assert message in error_of(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dtype", "int8"], "'int8' is not one of 'float32', 'float16', 'bfloat16'"),
        (["--max-shard-size", "many"], "many"),
        (["--max-shard-size", "0"], "0"),
        (["--model", "{wider}"], "do not fit"),
    ],
)
def test_what_cannot_be_applied(models, tmp_path, capsys, words, message):
    assert extract(models, tmp_path / "tau.safetensors", "--quiet") == 0
    words = [word.format(**models) for word in words]
    fixed = [] if "--model" in words else ["--model", models["source"]]
    assert run(["apply", str(tmp_path / "tau.safetensors"), *fixed, *words, "--output", str(tmp_path / "out")]) == 2
    assert message in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_a_model_that_was_not_fine_tuned_from_the_other_is_asked_about(models, images, tmp_path, capsys):
    """Equal shapes and nothing else in common: sqrt(2) times the norm apart."""
    pair = ["--source", models["source"], "--target", models["wider"], "--data", str(images), "--method", "theseus"]
    for name, said in (("same", True), ("finetuned", False)):
        words = ["extract", "--pretrained", models["source"], "--finetuned", models[name]]
        calls = [
            [*words, "--output", tmp_path / f"{name}.safetensors"],
            [*words, "--rank", 1, "--output", tmp_path / f"{name}_low"],
            ["transport", *pair, "--finetuned", models[name], "--output", tmp_path / f"{name}_moved"],
        ]
        for call in calls:
            assert run([*map(str, call)]) == 0
            found = [line for line in capsys.readouterr().out.splitlines() if "are these the weights" in line]
            assert bool(found) == said
            assert not said or re.match(r"note: vision/blocks/\S+ of '\S+same' is 1\.[0-9] times its norm", found[0])
