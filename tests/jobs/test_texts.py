"""Jobs on language models: the same commands, with texts in the place of images."""

import json
import math
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tvjax import jobs, tree
from tvjax.checkpoints import Pretrained, from_pretrained, save_pretrained, save_tree
from tvjax.cli.main import run
from tvjax.data import Encoder
from tvjax.data.embedded import model_folder
from tvjax.models.llama import LlamaConfig, init, llama

WORDS = ("<unk>", "?", "good", "bad", "the", "film", "was", "is", "it", "dull", "fine", "so", "plot", "cast", "prompt")
REVIEWS = [("the film was fine", "good"), ("so dull", "bad"), ("the cast is so fine", "good"), ("dull plot", "bad")]


def write_tokenizer(folder, words=WORDS, letters=False):
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated") if letters else pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_llama(folder, width, depth, heads, seed, change=0.0, words=WORDS, vocabulary=16, letters=False):
    """A random Llama; `change` is added at random to all of it."""
    config = LlamaConfig(vocabulary, width, 2 * width, depth, heads, 2, head_dim=4, max_position_embeddings=32)
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: jax.device_put(np.float32(0.3 * rng.normal(size=leaf.shape))), shapes)
    params = jax.tree.map(
        lambda x: jax.device_put(np.asarray(x) + np.float32(change * rng.normal(size=x.shape))), params
    )
    save_pretrained(Pretrained(llama(config, params), config), folder)
    if words:
        write_tokenizer(folder, words, letters)
    return str(folder)


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llamas")
    return {
        "source": write_llama(folder / "source", 8, 2, 2, 0),
        "finetuned": write_llama(folder / "finetuned", 8, 2, 2, 0, change=0.1),
        "same": write_llama(folder / "same", 8, 2, 2, 1),
        "wider": write_llama(folder / "wider", 12, 3, 4, 2),
        "padded": write_llama(folder / "padded", 12, 3, 4, 2, vocabulary=24),
        "mute": write_llama(folder / "mute", 12, 3, 4, 2, words=()),
        "small": write_llama(folder / "small", 12, 3, 4, 2, vocabulary=10),
        "reordered": write_llama(folder / "reordered", 12, 3, 4, 2, words=WORDS[:4] + WORDS[:3:-1]),
        "foreign": write_llama(folder / "foreign", 12, 3, 4, 2, letters=True),
        "letters": write_llama(folder / "letters", 8, 2, 2, 0, letters=True),
        "clip": str(model_folder("A")),
    }


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    rows = {
        "labelled": [{"text": text, "label": label} for text, label in REVIEWS],
        "plain": [{"text": text} for text, _ in REVIEWS],
        "answered": [{"prompt": f"{text} it is", "completion": f" {label}"} for text, label in REVIEWS],
        "named": [{"sentence": text, "label": int(label == "good")} for text, label in REVIEWS],
    }
    for name, own in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    (folder / "prompts.txt").write_text("{} it is\n")
    (folder / "classes.txt").write_text("fine\nfilm\n")
    return {path.stem: str(path) for path in folder.iterdir()}


def flat(folder):
    return tree.flatten(from_pretrained(folder).params)


@pytest.mark.parametrize(
    ("method", "target", "data"),
    [
        ("theseus", "wider", "plain"),
        ("theseus", "padded", "labelled"),
        ("bico", "reordered", "labelled"),  # the same pieces of the texts under other ids
        ("bico", "wider", "labelled"),
        ("bico+gradfix", "wider", "answered"),
        ("bico+gradfix", "wider", "labelled"),
        ("gradfix", "same", "plain"),
    ],
)
def test_a_task_moves_from_one_language_model_into_another(llamas, texts, tmp_path, method, target, data):
    given = {"source": llamas["source"], "finetuned": llamas["finetuned"], "target": llamas[target]}
    given |= {"method": method, "data": texts[data]}
    found = jobs.transport(jobs.TransportConfig(**given, output=tmp_path / "edited"))
    before, after = flat(llamas[target]), flat(tmp_path / "edited")
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    kernels = {path for path in before if path.startswith("blocks/") and path.endswith("kernel")}
    assert kernels <= changed
    assert ("head/kernel" in changed) == (target != "padded")  # by its inputs alone; not between other vocabularies
    assert ("embeddings/tokens" in changed) == (method == "gradfix")  # a table of rows is not rotated
    assert all(np.isfinite(leaf).all() for leaf in after.values()) and found.examples["count"] == 4
    done = json.loads((tmp_path / "edited" / "leaf_report.json").read_text())
    actions = {leaf["target"]: leaf["action"] for leaf in done["leaves"]}
    last = "masked" if "gradfix" in method else "rotated"
    assert {actions[path] for path in kernels} == {last}
    planned = jobs.plan(jobs.PlanConfig(**given))
    assert planned.leaves == [{k: v for k, v in leaf.items() if k != "measures"} for leaf in done["leaves"]]


def test_maps_by_head_are_options_of_a_job(llamas, texts):
    given = {"source": llamas["source"], "target": llamas["wider"], "data": texts["plain"], "method": "bico"}
    given |= {"data": texts["labelled"]}
    planned = jobs.plan(jobs.PlanConfig(**given, options={"heads": "rotary", "head_matching": "assignment"}))
    heads = {own["heads"] for stage in planned.stages for own in stage["maps"]}
    assert heads == {(1, 1), (2, 2), (2, 4)}
    with pytest.raises(ValueError, match="heads must be one of .*rotary.*found 'diagonal'"):
        jobs.plan(jobs.PlanConfig(**given, options={"heads": "diagonal"}))


def test_naive_transport_into_the_source_is_the_fine_tuned_model(llamas, texts, tmp_path):
    given = {"source": llamas["source"], "finetuned": llamas["finetuned"], "target": llamas["source"]}
    jobs.transport(jobs.TransportConfig(**given, method="naive", output=tmp_path / "edited"))
    tuned, edited = flat(llamas["finetuned"]), flat(tmp_path / "edited")
    for path, leaf in edited.items():  # its tables and its head too
        np.testing.assert_allclose(leaf, tuned[path], rtol=1e-6, atol=1e-6)


def test_the_scale_is_chosen_on_texts_and_what_is_cut_is_said(llamas, texts, tmp_path):
    given = {"source": llamas["source"], "finetuned": llamas["finetuned"], "target": llamas["wider"]}
    given |= {"method": "theseus", "data": texts["plain"], "validation": texts["labelled"], "length": 2}
    found = jobs.transport(jobs.TransportConfig(**given, output=tmp_path / "edited"))
    assert found.validation["accuracy"][found.validation["scales"].index(found.scale)] == max(
        found.validation["accuracy"]
    )
    assert any("2 of 4 texts are longer than the model takes, and were cut" in note for note in found.notes)


def scores_by_hand(folder, text):
    model = from_pretrained(folder).model
    ids = jnp.array([[WORDS.index(word) for word in text.split()]])
    return np.asarray(jax.nn.log_softmax(model({"tokens": ids})["logits"][0]), np.float64), np.asarray(ids[0])


def test_the_accuracy_is_that_of_the_words_that_are_said_next(llamas, texts):
    found = jobs.evaluate(
        jobs.EvaluateConfig(
            models=[llamas["source"], llamas["wider"]], data=texts["labelled"], templates=texts["prompts"]
        )
    )
    assert found.classes == ("bad", "good") and found.templates == ("{} it is",)
    for row in found.models:
        said = [scores_by_hand(row["model"], f"{text} it is")[0][-1] for text, _ in REVIEWS]
        right = [(scores[2] > scores[3]) == (label == "good") for scores, (_, label) in zip(said, REVIEWS, strict=True)]
        assert row["correct"] == sum(right) and row["total"] == 4 and "perplexity" not in row


def test_the_perplexity_is_that_of_the_next_tokens(llamas, texts, capsys):
    losses = []
    for text, _ in REVIEWS:
        scores, ids = scores_by_hand(llamas["source"], text)
        losses += [-scores[place, ids[place + 1]] for place in range(len(ids) - 1)]
    assert run(["evaluate", llamas["source"], "--data", texts["plain"], "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["models"]
    assert row["total"] == len(losses)
    np.testing.assert_allclose(row["perplexity"], math.exp(np.mean(losses)), rtol=1e-5)
    assert run(["evaluate", llamas["source"], llamas["same"], "--data", texts["answered"]]) == 0
    printed = capsys.readouterr().out
    assert "perplexity" in printed and "Next-token accuracy" in printed and "4" in printed


def test_named_tasks_give_words_and_the_prompt(llamas, texts, tmp_path):
    words = (*WORDS, "negative", "positive")
    model = write_llama(tmp_path / "model", 8, 1, 2, 0, words=words, vocabulary=len(words))
    data = f"{texts['named']}?text=sentence&label=label"
    found = jobs.evaluate(jobs.EvaluateConfig(models=model, data=data, task="sst2"))
    assert found.classes == ("negative", "positive") and "{sentence}" in found.templates[0]


def test_composition_learns_by_the_words(llamas, texts, tmp_path):
    tau = tmp_path / "tau.safetensors"
    jobs.extract(jobs.ExtractConfig(pretrained=llamas["source"], finetuned=llamas["finetuned"], output=tau))
    given = {"task_vectors": tau, "model": llamas["source"], "data": texts["labelled"], "epochs": 2, "tune": False}
    found = jobs.compose(jobs.ComposeConfig(**given, validation=texts["labelled"], output=tmp_path / "composed"))
    assert 0 <= found.validation_accuracy <= 1
    with pytest.raises(ValueError, match="entropy looks at images, and .* takes texts: take few_shot"):
        jobs.compose(jobs.ComposeConfig(**given, objective="entropy", output=tmp_path / "other"))


def test_a_plan_without_texts_reckons_with_the_length(llamas):
    given = {"source": llamas["source"], "target": llamas["wider"], "method": "bico"}
    short, long = (jobs.plan(jobs.PlanConfig(**given, length=length)) for length in (4, 1000))
    assert short.fit["residual streams"] < long.fit["residual streams"]
    assert {tuple(stage["tokens"]) for stage in long.stages if stage["tokens"]} == {(32, 32, 32)}  # all positions


def test_texts_are_no_longer_than_the_rotary_positions_are_computed_for(llamas, texts, tmp_path):
    shutil.copytree(llamas["source"], tmp_path / "longrope")
    config = tmp_path / "longrope" / "config.json"
    rope = {"rope_type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [4.0, 8.0]}
    rope |= {"rope_theta": 100.0, "original_max_position_embeddings": 8}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_parameters": rope}))
    found = jobs.evaluate(jobs.EvaluateConfig(models=str(tmp_path / "longrope"), data=texts["labelled"], length=1000))
    assert found.models[0]["total"] == 4


@pytest.mark.parametrize(
    ("target", "data", "words", "message"),
    [
        ("wider", "digits:thick/test", [], "is of images, and this command takes texts for .*a LlamaConfig"),
        ("mute", "{plain}", [], "mute': the folder has neither tokenizer.json nor vocab.json"),
        ("small", "{plain}", [], "small': the tokenizer knows 15 tokens, but the model has embeddings for 10"),
        ("clip", "{plain}", [], "give a source and a target of one family"),
        ("wider", "{labelled}", ["--classes", "{classes}"], "the label '(good|bad)' is none of the classes fine, film"),
        ("wider", "{labelled}", ["--task", "eurosat"], "the task 'eurosat' is of images, and this command takes texts"),
        ("wider", "{plain}", ["--per-class", "1"], "--per-class needs labelled examples, and .* has no labels"),
        (
            "wider",
            "{plain}",
            ["--part", "vision"],
            "'vision' matches no leaf that sees texts: the parts are blocks, emb",
        ),
    ],
)
@pytest.mark.parametrize("command", ["transport", "plan"])
def test_what_cannot_be_is_one_line_before_any_weight_is_read(
    llamas, texts, tmp_path, capsys, monkeypatch, command, target, data, words, message
):
    monkeypatch.setattr("tvjax.checkpoints.reader.Tensors.read_into", lambda *_: pytest.fail("weights were read"))
    given = {"source": llamas["source"], "finetuned": llamas["finetuned"], "target": llamas[target]}
    given |= {"data": data.format(**texts), "method": "theseus", "output": tmp_path / "out"}
    options = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    assert run([command, *options, *(word.format(**texts) for word in words)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tvjax: error: ")]
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists()


NOTE = r"tokens matched by characters: \d+ % of the target's tokens have a partner"


@pytest.mark.parametrize(
    ("method", "pair", "data"),
    [
        ("theseus", ("source", "foreign"), "answered"),
        ("bico", ("letters", "wider"), "plain"),
        ("bico+gradfix", ("source", "foreign"), "plain"),
    ],
)
def test_texts_that_are_cut_differently_are_matched_by_characters(llamas, texts, tmp_path, method, pair, data):
    given = {"source": llamas[pair[0]], "target": llamas[pair[1]], "method": method, "data": texts[data]}
    given |= {"finetuned": llamas["finetuned"], "batch_size": 3}
    planned = jobs.plan(jobs.PlanConfig(**given, compare=True))
    assert sum(bool(re.fullmatch(NOTE, note)) for note in planned.notes) == 1
    assert all(0 < one["cka"] <= 1 for one in planned.likeness)
    found = jobs.transport(jobs.TransportConfig(**given, output=tmp_path / "edited"))
    (note,) = [note for note in found.notes if re.fullmatch(NOTE, note)]
    assert note in planned.notes and found.norms["target"] > 0
    moved = {leaf["target"]: leaf for leaf in planned.leaves if leaf["link"] == "bico" or method == "theseus"}
    assert moved["head/kernel"]["why"] == "its outputs are words of other vocabularies"
    edited, target = flat(tmp_path / "edited"), flat(given["target"])
    np.testing.assert_array_equal(edited["head/kernel"], target["head/kernel"])
    assert any(not np.array_equal(edited[path], target[path]) for path in target)
    assert all(np.isfinite(leaf).all() for leaf in edited.values())


def test_masks_of_the_target_alone_need_no_partners(llamas, texts, tmp_path):
    given = {"source": llamas["source"], "finetuned": llamas["finetuned"], "target": llamas["letters"]}
    found = jobs.transport(
        jobs.TransportConfig(**given, method="gradfix", data=texts["plain"], output=tmp_path / "out")
    )
    assert not any(re.fullmatch(NOTE, note) for note in found.notes)


@pytest.mark.parametrize("command", ["transport", "plan"])
def test_a_tokenizer_that_knows_no_characters_is_one_line(llamas, texts, tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr("tvjax.checkpoints.reader.Tensors.read_into", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setattr(Encoder, "knows_spans", False)
    given = {"source": llamas["source"], "finetuned": llamas["finetuned"], "target": llamas["foreign"]}
    given |= {"data": texts["plain"], "method": "theseus", "output": tmp_path / "out"}
    assert run([command, *(text for name, value in given.items() for text in (f"--{name}", str(value)))]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tvjax: error: ")]
    assert re.search("cut the texts of .* that of '.*source' does not say which characters its tokens cover", line)


@pytest.mark.parametrize("words", [["--classes", "{classes}"], ["--task", "sst2"]])
def test_classes_without_labels_are_refused_before_any_weight_is_read(llamas, texts, capsys, monkeypatch, words):
    monkeypatch.setattr("tvjax.checkpoints.reader.Tensors.read_into", lambda *_: pytest.fail("weights were read"))
    given = [word.format(**texts) for word in words]
    assert run(["evaluate", llamas["source"], "--data", texts["plain"], *given, "--quiet"]) == 2
    assert "has no labels, and an accuracy of classes needs them: say which column" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("models", "data", "message"),
    [
        (["clip"], "{labelled}", "is of texts, and this command takes images for .*a CLIPConfig"),
        (["source"], "digits:thick/test", "is of images, and this command takes texts for .*a LlamaConfig"),
        (["source", "clip"], "{labelled}", "takes texts and .* images: give models of one kind of examples"),
        (["mute"], "{plain}", "mute': the folder has neither tokenizer.json nor vocab.json"),
        (["source", "foreign"], "{plain}", "cut the texts of .* into other tokens, whose accuracies are not compar"),
    ],
)
def test_evaluation_of_what_cannot_be_is_one_line(llamas, texts, capsys, monkeypatch, models, data, message):
    monkeypatch.setattr("tvjax.checkpoints.reader.Tensors.read_into", lambda *_: pytest.fail("weights were read"))
    assert run(["evaluate", *(llamas[name] for name in models), "--data", data.format(**texts), "--quiet"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tvjax: error: ")]
    assert re.search(message, line), line


def test_other_tokenizers_are_no_matter_where_the_answers_are_classes(llamas, texts):
    found = jobs.evaluate(jobs.EvaluateConfig(models=[llamas["wider"], llamas["reordered"]], data=texts["labelled"]))
    assert [row["total"] for row in found.models] == [4, 4] and len(found.pairs) == 1


@pytest.mark.parametrize(
    ("method", "message"),
    [("transfusion", "made from Python: tvjax.transfusion"), ("identity", "the method 'identity' is called 'naive'")],
)
def test_methods_that_only_python_knows_are_named_with_the_way_out(llamas, capsys, method, message):
    assert run(["plan", "--source", llamas["source"], "--target", llamas["same"], "--method", method]) == 2
    assert message in capsys.readouterr().err


def test_the_command_speaks_of_what_it_knows(llamas, texts, tmp_path, capsys):
    """Of its own methods and options, also where a task vector does not fit."""
    names = {name: str(tmp_path / f"{name}.safetensors") for name in ("own", "other")}
    for name, pair in (("own", ("source", "finetuned")), ("other", ("wider", "padded"))):
        before, after = (from_pretrained(llamas[one]).params["blocks"] for one in pair)
        save_tree(names[name], {"blocks": jax.tree.map(lambda x, y: y - x, before, after)}, {})
    given = ["--any-base", "--quiet"]
    assert (
        run(["evaluate", llamas["source"], "--task-vector", names["other"], "--data", texts["labelled"], *given]) == 2
    )
    assert run(["merge", *names.values(), "--method", "ties", "--output", str(tmp_path / "m.safetensors"), *given]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tvjax: error: ")]
    assert all("tvjax transport)" in line and "tvjax.fit" not in line for line in lines) and len(lines) == 2
    found = jobs.transport(
        jobs.TransportConfig(
            source=llamas["source"], finetuned=llamas["finetuned"], target=llamas["same"], method="naive",
            data="nowhere.jsonl", output=tmp_path / "naive",
        )
    )  # fmt: skip
    assert "--data nowhere.jsonl is not read: naive looks at no examples" in found.notes
    planned = jobs.plan(jobs.PlanConfig(source=llamas["source"], target=llamas["same"], method="naive"))
    assert {leaf["link"] for leaf in planned.leaves} == {"naive"}
