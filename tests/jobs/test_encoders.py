"""Jobs on encoders of texts: sentence encoders with class names as their head, and sequence classifiers."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from tvjax import jobs, tree
from tvjax.checkpoints import Pretrained, from_pretrained, save_pretrained
from tvjax.cli.main import run
from tvjax.models.bert import BertConfig, MPNetConfig, RobertaConfig, bert, init

PIECES = "good bad the film was dull fine so plot cast ##ly ##s ##ive . negat posit".split()
REVIEWS = [("the film was fine", "good"), ("so dull", "bad"), ("the casts so finely", "good"), ("dull plots", "bad")]
SPECIAL = {
    "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    "mpnet": ("<s>", "<pad>", "</s>", "<unk>", "[UNK]", "<mask>", "<other>"),
}
CONFIGS = {"bert": BertConfig, "mpnet": MPNetConfig, "roberta": RobertaConfig}


def write_tokenizer(folder, kind, pieces=PIECES):
    """WordPiece as the originals have it: MPNet's ids are BERT's and a few more, with other special tokens."""
    special = SPECIAL[kind]
    vocabulary = {piece: number for number, piece in enumerate((*special, *pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    first, last, pad = ("[CLS]", "[SEP]", "[PAD]") if kind == "bert" else ("<s>", "</s>", "<pad>")
    ends = [(one, vocabulary[one]) for one in (first, last)]
    pair = f"{first} $A {last} $B:1 {last}:1" if kind == "bert" else f"{first} $A {last} {last} $B {last}"
    tokenizer.post_processor = processors.TemplateProcessing(f"{first} $A {last}", pair, ends)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "cls_token": first, "sep_token": last, "pad_token": pad}
    settings["model_input_names"] = ["input_ids", "attention_mask", *(["token_type_ids"] if kind == "bert" else [])]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"unk_token": "[UNK]"}))


def write_model(folder, kind="bert", width=8, depth=2, heads=2, seed=0, change=0.0, tokenizer=None, **changes):
    """A random encoder; `change` is added at random to all of it."""
    vocabulary = {"vocab_size": len(SPECIAL["bert" if kind == "bert" else "mpnet"]) + len(PIECES)}
    config = CONFIGS[kind](
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        max_position_embeddings=24,
        **vocabulary | changes,
    )
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: jax.device_put(np.float32(0.5 * rng.normal(size=leaf.shape))), shapes)
    params = tree.map_with_path(lambda path, leaf: 1 + leaf if path.endswith("scale") else leaf, params)
    params = jax.tree.map(
        lambda x: jax.device_put(np.asarray(x) + np.float32(change * rng.normal(size=x.shape))), params
    )
    save_pretrained(Pretrained(bert(config, params), config), folder)
    write_tokenizer(folder, tokenizer or ("bert" if kind == "bert" else "mpnet"))
    return str(folder)


def write_modules(folder, mode="mean", normalise=True, length=None, **more):
    """The files of sentence-transformers."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalise else []), *more.get("kinds", ())]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    names = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "max": "pooling_mode_max_tokens"}
    pooling = {name: known == mode for known, name in names.items()}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 8, **pooling}))
    if length:
        settings = {"max_seq_length": length, "do_lower_case": more.get("lower", False)}
        (folder / "sentence_bert_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    labels = {"num_labels": 2}
    found = {
        "source": write_model(folder / "source"),
        "finetuned": write_model(folder / "finetuned", change=0.1),
        "same": write_model(folder / "same", seed=1),
        "wider": write_model(folder / "wider", width=12, depth=3, heads=3, seed=2),
        "mpnet": write_model(folder / "mpnet", "mpnet", 12, 3, 3, seed=3),
        "padded": write_model(folder / "padded", width=12, seed=2, vocab_size=40),
        "small": write_model(folder / "small", seed=2, vocab_size=10),
        "foreign": write_model(folder / "foreign", "mpnet", seed=3, tokenizer="bert"),
        "classifier": write_model(folder / "classifier", **labels),
        "tuned classifier": write_model(folder / "tuned classifier", change=0.1, **labels),
        "wider classifier": write_model(folder / "wider classifier", "roberta", 12, 3, 3, seed=4, **labels),
    }
    for name in ("classifier", "tuned classifier", "wider classifier"):
        file = folder / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"id2label": {"0": "bad", "1": "good"}}))
    for name in ("source", "finetuned", "mpnet", "wider"):
        write_modules(folder / name, length=12)
    return found


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    rows = {
        "labelled": [{"text": text, "label": label} for text, label in REVIEWS],
        "plain": [{"text": text} for text, _ in REVIEWS],
        "long": [{"text": " ".join([text] * 9), "label": label} for text, label in REVIEWS],
        "pairs": [{"one": text, "other": "so fine", "label": label} for text, label in REVIEWS],
        "valued": [{"sentence": text, "label": int(label == "good")} for text, label in REVIEWS],
        "twice": [{"text": "so dull", "label": "Bad film"}, {"text": "so fine", "label": "bad  film"}],
        "nameless": [{"text": "so dull", "label": "\u200b"}, {"text": "so fine", "label": "good"}],
    }
    for name, own in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    (folder / "prompts.txt").write_text("so {}\nthe film was {} .\n")
    return {path.stem: str(path) for path in folder.iterdir()}


def flat(folder):
    return tree.flatten(from_pretrained(folder).params)


def ids_of(words):
    names = (*SPECIAL["bert"], *PIECES)
    return jnp.array([[2, *(names.index(word) for word in words.split()), 3]])


def embedding(folder, words):
    return np.asarray(from_pretrained(folder).model({"tokens": ids_of(words)})["text"][0], np.float64)


def test_accuracy_is_by_the_nearest_class_name(encoders, texts):
    found = jobs.evaluate(
        jobs.EvaluateConfig(models=[encoders["source"]], data=texts["labelled"], templates=texts["prompts"])
    )
    assert found.classes == ("bad", "good") and found.templates == ("so {}", "the film was {} .")
    names = [
        np.mean([embedding(encoders["source"], text.format(name)) for text in found.templates], axis=0)
        for name in found.classes
    ]
    right = 0
    for words, label in zip(
        ("the film was fine", "so dull", "the cast ##s so fine ##ly", "dull plot ##s"),
        (label for _, label in REVIEWS),
        strict=True,
    ):
        cosines = [embedding(encoders["source"], words) @ name / np.linalg.norm(name) for name in names]
        right += found.classes[int(np.argmax(cosines))] == label
    assert found.models[0]["correct"] == right and found.models[0]["total"] == 4


@pytest.mark.parametrize("method", ["theseus", "bico", "bico+gradfix"])
@pytest.mark.parametrize("target", ["wider", "mpnet"])
def test_a_task_moves_from_one_sentence_encoder_into_another(encoders, texts, tmp_path, method, target):
    given = {"source": encoders["source"], "finetuned": encoders["finetuned"], "target": encoders[target]}
    given |= {"method": method, "data": texts["labelled"]}
    found = jobs.transport(jobs.TransportConfig(**given, output=tmp_path / "edited"))
    before, after = flat(encoders[target]), flat(tmp_path / "edited")
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    kernels = {path for path in before if path.startswith("blocks/") and path.endswith("kernel")}
    assert kernels <= changed and not any(path.startswith("embeddings/t") for path in changed)
    assert all(np.isfinite(leaf).all() for leaf in after.values())
    planned = jobs.plan(jobs.PlanConfig(**given))
    done = json.loads((tmp_path / "edited" / "leaf_report.json").read_text())
    assert planned.leaves == [{k: v for k, v in leaf.items() if k != "measures"} for leaf in done["leaves"]]
    assert from_pretrained(tmp_path / "edited").config == from_pretrained(encoders[target]).config
    assert not [note for note in found.notes if "modules.json" in note]


def test_what_a_folder_does_not_say_is_said(encoders, texts, tmp_path, capsys):
    assert run(["evaluate", encoders["same"], "--data", texts["labelled"]]) == 0
    assert "has no modules.json that says how tokens become one embedding" in " ".join(capsys.readouterr().out.split())


def test_texts_that_are_too_long_are_cut_and_counted(encoders, texts):
    found = jobs.evaluate(jobs.EvaluateConfig(models=[encoders["source"]], data=texts["long"]))
    assert any("4 of 4 texts are longer than the model takes, and were cut" in note for note in found.notes)


def test_gradfix_masks_a_sentence_encoder_of_the_same_shape(encoders, texts, tmp_path):
    given = {"source": encoders["source"], "finetuned": encoders["finetuned"], "target": encoders["same"]}
    given |= {"method": "gradfix", "data": texts["labelled"], "output": tmp_path / "edited"}
    jobs.transport(jobs.TransportConfig(**given))
    before, after = flat(encoders["same"]), flat(tmp_path / "edited")
    assert all(not np.array_equal(leaf, after[path]) for path, leaf in before.items() if path.endswith("up/kernel"))


def test_prompts_of_a_task_that_ask_language_models_are_no_prompts_of_class_names(encoders, texts):
    data = texts["valued"] + "?text=sentence&label=label"
    names = [encoders["source"], encoders["mpnet"]]
    found = jobs.evaluate(jobs.EvaluateConfig(models=names, data=data, task="sst2"))
    assert found.classes == ("negative", "positive") and found.templates == ("{}",)
    assert [row["total"] for row in found.models] == [4, 4]


def test_a_model_without_code_says_why(encoders, texts, tmp_path, capsys):
    folder = tmp_path / "model"
    write_model(folder)
    write_modules(folder, "max")
    assert run(["evaluate", str(folder), "--data", texts["labelled"]]) == 2
    assert "no modelling code for this model_type 'bert' (pooling 'max' is not supported" in capsys.readouterr().err


@pytest.mark.parametrize("data", ["labelled", "pairs"])
def test_sequence_classifiers_answer_by_their_own_head(encoders, texts, tmp_path, data):
    where = texts[data] + ("?text=one,other&label=label" if data == "pairs" else "")
    given = {"source": encoders["classifier"], "finetuned": encoders["tuned classifier"], "data": where}
    if data == "labelled":
        given["target"] = encoders["wider classifier"]
        jobs.transport(jobs.TransportConfig(**given, method="bico", output=tmp_path / "edited"))
        before, after = flat(encoders["wider classifier"]), flat(tmp_path / "edited")
        changed = {path for path in before if not np.array_equal(before[path], after[path])}
        assert "head/dense/kernel" in changed and not {"head/out/kernel", "head/out/bias"} & changed
    found = jobs.evaluate(jobs.EvaluateConfig(models=[encoders["classifier"]], data=where))
    model, right = from_pretrained(encoders["classifier"]).model, 0
    for words, (_, label) in zip(
        ("the film was fine", "so dull", "the cast ##s so fine ##ly", "dull plot ##s"), REVIEWS, strict=True
    ):
        tokens = ids_of(words)
        types = jnp.zeros_like(tokens)
        if data == "pairs":
            second = ids_of("so fine")[:, 1:]
            tokens, types = jnp.concatenate([tokens, second], 1), jnp.concatenate([types, jnp.ones_like(second)], 1)
        logits = model({"tokens": tokens, "types": types})["logits"][0]
        right += ("bad", "good")[int(logits.argmax())] == label
    assert found.models[0]["correct"] == right and found.templates == ()


def test_composition_learns_by_class_names(encoders, texts, tmp_path):
    tau = tmp_path / "tau.safetensors"
    jobs.extract(jobs.ExtractConfig(pretrained=encoders["source"], finetuned=encoders["finetuned"], output=tau))
    given = {"task_vectors": tau, "model": encoders["source"], "data": texts["labelled"], "epochs": 2, "tune": False}
    given |= {"per_class": 1, "select": "herding", "validation": texts["labelled"], "output": tmp_path / "composed"}
    found = jobs.compose(jobs.ComposeConfig(**given))
    assert 0 <= found.validation_accuracy <= 1
    assert from_pretrained(tmp_path / "composed").config.max_seq_length == 12


@pytest.mark.parametrize(
    ("target", "data", "message"),
    [
        ("small", "labelled", "small': the tokenizer knows 21 tokens, but the model has embeddings for 10"),
        (
            "foreign",
            "labelled",
            r"foreign': the tokenizer pads with the token 0 \('\[PAD\]'\), and config.json names 1",
        ),
        ("wider", "twice", "the class names '.*' and '.*' are the same tokens"),
        ("wider", "nameless", r"the class name '.*' is no token for"),
        ("wider", "plain", "has no labels, and bico reads gradients of the loss: name the column of the classes"),
        ("wider classifier", "labelled", "one model has a head of its own: .*source' has no head, .*fier' has one"),
    ],
)
@pytest.mark.parametrize("command", ["transport", "plan"])
def test_what_cannot_be_is_one_line_before_any_weight_is_read(
    encoders, texts, tmp_path, capsys, monkeypatch, command, target, data, message
):
    monkeypatch.setattr("tvjax.checkpoints.reader.Tensors.read_into", lambda *_: pytest.fail("weights were read"))
    given = {"source": encoders["source"], "finetuned": encoders["finetuned"], "target": encoders[target]}
    given |= {"data": texts[data], "method": "bico", "output": tmp_path / "out"}
    options = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    assert run([command, *options]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tvjax: error: ")]
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists()
