"""Language models handed to lm-evaluation-harness: a stand-in for it here, and itself where it is installed."""

import importlib.util
import json
import re
import textwrap

import pytest

from tests.jobs.test_texts import write_llama
from tvjax import jobs
from tvjax.cli.main import run

# Takes the words that the harness takes, and leaves a report of its shape.
STAND_IN = """
    import argparse, json, pathlib, sys
    parser = argparse.ArgumentParser()
    for name in ("model", "model_args", "tasks", "batch_size", "output_path", "limit"):
        parser.add_argument(f"--{name}")
    words = parser.parse_args()
    if words.tasks == "unknown":
        sys.exit("ValueError: Tasks not found: unknown")
    folder = dict([words.model_args.split("=", 1)])["pretrained"]
    assert (pathlib.Path(folder) / "config.json").exists() and words.model == "hf"
    found = {"alias": "x", "acc,none": 0.25, "acc_stderr,none": 0.1, "exact_match,strict": 1.0,
             "exact_match_stderr,strict": "N/A"}
    report = {"results": {task: found for task in words.tasks.split(",")}, "lm_eval_version": "stand-in",
              "n-samples": {"one": {"original": 9, "effective": int(words.limit)}}, "versions": {"one": 2}}
    place = pathlib.Path(words.output_path) / folder.replace("/", "__")
    place.mkdir(parents=True)
    (place / "results_2026-01-01T00-00-00.json").write_text(json.dumps(report))
"""


@pytest.fixture
def llama(tmp_path):
    return write_llama(tmp_path / "llama", 8, 2, 2, 0)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    package = tmp_path / "packages" / "lm_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(textwrap.dedent(STAND_IN))
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))


def test_its_measurements_are_read(llama, stand_in, tmp_path, capsys):
    seen = []
    config = jobs.EvaluateConfig(models=[llama], harness=["one", "two"], options={"limit": 3})
    found = jobs.evaluate(config, lambda *step: seen.append(step))
    assert found.harness == "stand-in" and seen == [(1, 1, llama)]
    assert [(one["task"], one["metric"], one["filter"], one["value"], one["stderr"]) for one in found.models] == [
        (task, *measured) for task in ("one", "two")
        for measured in (("acc", "none", 0.25, 0.1), ("exact_match", "strict", 1.0, None))
    ]  # fmt: skip
    assert [one["examples"] for one in found.models] == [3, 3, None, None] and found.models[0]["version"] == 2

    words = ["evaluate", llama, "--harness", "one", "--options", "limit=3", "--output", str(tmp_path / "found.json")]
    assert run(words) == 0
    assert re.search(r"one\W+acc\W+0.25 ± 0.1\W+3", capsys.readouterr().out)
    assert json.loads((tmp_path / "found.json").read_text())["models"][0]["value"] == 0.25


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"harness": ["unknown"]}, "lm-evaluation-harness failed on .*Tasks not found: unknown"),
        ({"harness": ["one"], "options": {"tasks": "two"}}, "option 'tasks' of the harness is given by tvjax"),
        ({"harness": ["one"], "data": "texts.jsonl"}, "--harness brings its own examples"),
        ({"options": {"limit": 3}, "data": "texts.jsonl"}, "--options are those of the harness"),
    ],
)
def test_what_cannot_be(llama, stand_in, more, message):
    with pytest.raises(ValueError, match=message):
        jobs.evaluate(jobs.EvaluateConfig(models=[llama], **more))


def test_models_of_images_have_no_tasks_there(vits, stand_in):
    with pytest.raises(ValueError, match="is no language model"):
        jobs.evaluate(jobs.EvaluateConfig(models=[vits["source"]], harness=["one"]))


def test_it_must_be_installed(llama, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'tvjax\[harness\]'"):
        jobs.evaluate(jobs.EvaluateConfig(models=[llama], harness=["one"]))


TASK = """
    task: reviews
    dataset_path: json
    dataset_kwargs: {{data_files: {{test: {data}}}}}
    test_split: test
    output_type: multiple_choice
    doc_to_text: "{{{{text}}}} it is"
    doc_to_choice: ["bad", "good"]
    doc_to_target: label
    metric_list: [{{metric: acc}}]
"""


@pytest.mark.torch
def test_the_harness_itself_reads_our_folders(llama, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    settings = json.loads((tmp_path / "llama" / "tokenizer_config.json").read_text()) | {"eos_token": "prompt"}
    (tmp_path / "llama" / "tokenizer_config.json").write_text(json.dumps(settings))
    data = tmp_path / "reviews.jsonl"
    data.write_text("".join(json.dumps({"text": text, "label": 1}) + "\n" for text in ("the film is fine", "so dull")))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "reviews.yaml").write_text(textwrap.dedent(TASK.format(data=data)))
    options = {"include_path": str(tmp_path / "tasks"), "device": "cpu"}
    found = jobs.evaluate(jobs.EvaluateConfig(models=[llama], harness=["reviews"], options=options, batch_size=2))
    assert {one["metric"] for one in found.models} == {"acc"} and found.models[0]["examples"] == 2
