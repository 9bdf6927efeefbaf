"""Jobs on an encoder with a decoder: texts with answers, and classes by the words that the decoder says."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tvjax import jobs, tree
from tvjax.checkpoints import Pretrained, from_pretrained, save_pretrained
from tvjax.cli.main import run
from tvjax.models.t5 import T5Config, UMT5Config, init, t5

WORDS = (
    "<pad>",
    "</s>",
    "<unk>",
    "good",
    "bad",
    "the",
    "film",
    "was",
    "is",
    "it",
    "dull",
    "fine",
    "so",
    "plot",
    "cast",
)
REVIEWS = [("the film was fine", "good"), ("so dull", "bad"), ("the plot is so fine", "good"), ("dull plot", "bad")]
END = WORDS.index("</s>")


def write_tokenizer(folder, words=WORDS, letters=False):
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated") if letters else pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", words.index("</s>"))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}))


def write_t5(folder, width, depths, heads, seed, change=0.0, letters=False, kind=T5Config, **changes):
    """A random T5; `change` is added at random to all of it."""
    config = kind(16, width, 4, 2 * width, *depths, heads, 8, 12, **changes)
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: jax.device_put(np.float32(0.3 * rng.normal(size=leaf.shape))), shapes)
    params = jax.tree.map(
        lambda x: jax.device_put(np.asarray(x) + np.float32(change * rng.normal(size=x.shape))), params
    )
    save_pretrained(Pretrained(t5(config, params), config), folder)
    write_tokenizer(folder, letters=letters)
    return str(folder)


GATED = {"dense_act_fn": "gelu_new", "is_gated_act": True, "tie_word_embeddings": False, "scale_decoder_outputs": False}


@pytest.fixture(scope="module")
def t5s(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5s")
    return {
        "source": write_t5(folder / "source", 8, (2, 1), 2, 0),
        "finetuned": write_t5(folder / "finetuned", 8, (2, 1), 2, 0, change=0.1),
        "same": write_t5(folder / "same", 8, (2, 1), 2, 1),
        "larger": write_t5(folder / "larger", 12, (3, 2), 4, 2),
        "untied": write_t5(folder / "untied", 12, (1, 2), 3, 3, tie_word_embeddings=False),
        "gated": write_t5(folder / "gated", 12, (2, 1), 3, 3, **GATED),
        "umt5": write_t5(folder / "umt5", 12, (2, 1), 3, 3, kind=UMT5Config),
        "foreign": write_t5(folder / "foreign", 12, (2, 2), 2, 4, letters=True),
    }


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    rows = {
        "labelled": [{"text": text, "label": label} for text, label in REVIEWS],
        "plain": [{"text": text} for text, _ in REVIEWS],
        "answered": [{"prompt": f"{text} it is", "completion": f"{label} {label} film"} for text, label in REVIEWS],
    }
    for name, own in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    (folder / "prompts.txt").write_text("{} it is\n")
    return {path.stem: str(path) for path in folder.iterdir()}


def flat(folder):
    return tree.flatten(from_pretrained(folder).params)


@pytest.mark.parametrize(
    ("method", "target", "data"),
    [
        ("theseus", "larger", "answered"),
        ("theseus", "untied", "labelled"),
        ("bico+gradfix", "larger", "labelled"),
        ("bico", "untied", "answered"),
        ("theseus", "umt5", "answered"),
        ("gradfix", "same", "answered"),
    ],
)
def test_a_task_moves_from_one_model_into_another(t5s, texts, tmp_path, method, target, data):
    given = {"source": t5s["source"], "finetuned": t5s["finetuned"], "target": t5s[target]}
    given |= {"method": method, "data": texts[data]}
    found = jobs.transport(jobs.TransportConfig(**given, output=tmp_path / "edited"))
    before, after = flat(t5s[target]), flat(tmp_path / "edited")
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    kernels = {path for path in before if "/blocks/" in path and path.endswith("kernel")}
    alone = set()  # the decoder reads one token, the start: too little to move what reads it
    if data == "labelled" and "bico" in method:
        alone = {path for path in kernels if re.search("decoder/blocks/./attention/", path)}
    assert kernels - alone <= changed
    assert ("head/kernel" in changed) == (target == "untied")  # it takes what the source's tied table learned as a head
    assert all(np.isfinite(leaf).all() for leaf in after.values()) and found.examples["count"] == 4
    done = json.loads((tmp_path / "edited" / "leaf_report.json").read_text())
    actions = {leaf["target"]: leaf["action"] for leaf in done["leaves"]}
    assert {actions[path] for path in kernels} == {"masked" if "gradfix" in method else "rotated"}
    if method != "gradfix":
        assert not any("position_bias" in path for path in changed) and "embeddings/tokens" not in changed
        assert any("encoder" in path and "position_bias" in path for path in actions)
    planned = jobs.plan(jobs.PlanConfig(**given))
    assert planned.leaves == [{k: v for k, v in leaf.items() if k != "measures"} for leaf in done["leaves"]]


def test_the_accuracy_is_that_of_the_words_that_the_decoder_says_first(t5s, texts):
    asked = {"data": texts["labelled"], "templates": texts["prompts"]}
    found = jobs.evaluate(jobs.EvaluateConfig(models=[t5s["source"], t5s["gated"], t5s["umt5"]], **asked))
    for row in found.models:
        right = 0
        for text, label in REVIEWS:
            scores = scores_by_hand(row["model"], f"{text} it is", [])[0]
            right += (scores[WORDS.index("good")] > scores[WORDS.index("bad")]) == (label == "good")
        assert row["correct"] == right and row["total"] == 4


def scores_by_hand(folder, text, answer):
    """The log-probabilities of what follows the start and each token of the answer."""
    ids = jnp.array([[*map(WORDS.index, text.split()), END]])
    outputs = from_pretrained(folder).model({"tokens": ids, "decoder_tokens": jnp.array([[0, *answer]])})
    return np.asarray(jax.nn.log_softmax(outputs["logits"][0]), np.float64)


def test_the_perplexity_is_that_of_the_answers_and_their_ends(t5s, texts, capsys):
    losses = []
    for text, label in REVIEWS:
        answer = [*map(WORDS.index, (label, label, "film")), END]
        scores = scores_by_hand(t5s["source"], f"{text} it is", answer)
        losses += [-scores[place, token] for place, token in enumerate(answer)]
    assert run(["evaluate", t5s["source"], "--data", texts["answered"], "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["models"]
    assert row["total"] == len(losses)
    np.testing.assert_allclose(row["perplexity"], math.exp(np.mean(losses)), rtol=1e-5)


def test_composition_learns_by_the_words(t5s, texts, tmp_path):
    tau = tmp_path / "tau.safetensors"
    jobs.extract(jobs.ExtractConfig(pretrained=t5s["source"], finetuned=t5s["finetuned"], output=tau))
    given = {"task_vectors": tau, "model": t5s["source"], "data": texts["labelled"], "epochs": 2, "tune": False}
    found = jobs.compose(jobs.ComposeConfig(**given, validation=texts["labelled"], output=tmp_path / "composed"))
    assert 0 <= found.validation_accuracy <= 1


def test_a_command_line_from_end_to_end(t5s, texts, tmp_path, capsys):
    pair = ["--source", t5s["source"], "--target", t5s["larger"], "--method", "theseus"]
    assert run(["plan", *pair]) == 0
    options = ["--finetuned", t5s["finetuned"], "--data", texts["labelled"], "--validation", texts["labelled"]]
    assert run(["transport", *pair, *options, "--output", str(tmp_path / "edited")]) == 0
    assert run(["evaluate", t5s["larger"], str(tmp_path / "edited"), "--data", texts["labelled"]]) == 0
    assert "4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "data", "message"),
    [
        ("larger", "plain", "has no answers, which the task 'sequence to sequence' needs: name completion=COLUMN"),
    ],
)
@pytest.mark.parametrize("command", ["transport", "plan"])
def test_what_cannot_be_is_one_line_before_any_weight_is_read(
    t5s, texts, tmp_path, capsys, monkeypatch, command, target, data, message
):
    monkeypatch.setattr("tvjax.checkpoints.reader.Tensors.read_into", lambda *_: pytest.fail("weights were read"))
    given = {"source": t5s["source"], "finetuned": t5s["finetuned"], "target": t5s[target]}
    given |= {"data": texts[data], "method": "theseus", "output": tmp_path / "out"}
    options = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    assert run([command, *options]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tvjax: error: ")]
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["theseus", "bico"])
def test_both_streams_of_other_tokens_are_matched_by_characters(t5s, texts, tmp_path, method):
    given = {"source": t5s["source"], "finetuned": t5s["finetuned"], "target": t5s["foreign"]}
    given["data"] = texts["answered"]
    planned = jobs.plan(jobs.PlanConfig(**given, method=method))
    found = jobs.transport(jobs.TransportConfig(**given, method=method, output=tmp_path / "edited"))
    (note,) = [note for note in found.notes if note.startswith("tokens matched by characters: ")]
    assert note in planned.notes
    seen = {stage["tokens"] for stage in planned.stages if stage["tokens"]}
    assert all(aligned == own for _, own, aligned in seen) and any(theirs != own for theirs, own, _ in seen)
    edited, target = flat(tmp_path / "edited"), flat(given["target"])
    for side in ("encoder", "decoder"):
        assert any(not np.array_equal(edited[path], target[path]) for path in target if path.startswith(side))
    assert all(np.isfinite(leaf).all() for leaf in edited.values())


@pytest.mark.parametrize("command", ["transport", "plan"])
def test_rotary_maps_of_a_t5_are_refused_before_any_weight_is_read(t5s, texts, tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr("tvjax.checkpoints.reader.Tensors.read_into", lambda *_: pytest.fail("weights were read"))
    given = {"source": t5s["source"], "finetuned": t5s["finetuned"], "target": t5s["foreign"], "method": "theseus"}
    given |= {"data": texts["answered"], "options": "heads=rotary", "output": str(tmp_path / "out")}
    assert run([command, *(text for name, value in given.items() for text in (f"--{name}", value))]) == 2
    assert "no position of the source rotates its heads: use heads='blocks'" in capsys.readouterr().err


def test_texts_without_answers_are_refused_before_any_weight_is_read(t5s, texts, capsys, monkeypatch):
    monkeypatch.setattr("tvjax.checkpoints.reader.Tensors.read_into", lambda *_: pytest.fail("weights were read"))
    assert run(["evaluate", t5s["source"], "--data", texts["plain"], "--quiet"]) == 2
    assert "has no answers, which the task 'sequence to sequence' needs" in capsys.readouterr().err
