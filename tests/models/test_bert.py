"""What is BERT's own: relatives, pooling, positions, masks, old keys, and transport between two of them."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tvjax import Batch, bico, fit, theseus, tree
from tvjax.align.permutations import permute, random_permutations
from tvjax.capture import check_gradient_identity
from tvjax.checkpoints import from_pretrained, load_orbax, save_orbax, save_pretrained
from tvjax.checkpoints.folder import open_checkpoint
from tvjax.models.bert import BertConfig, MPNetConfig, RobertaConfig, bert, init
from tvjax.models.families import GENERIC
from tvjax.models.symmetry import symmetry_of_config
from tvjax.stages import run_stage
from tvjax.tasks.zero_shot import with_head
from tvjax.transport.leaf_report import leaf_report

GOLDENS = Path(__file__).parent / "goldens"
SHAPE = dict(
    vocab_size=20,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=10,
    layer_norm_eps=1e-3,
)
WIDE = SHAPE | dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3)
CONFIGS = {
    "bert": BertConfig(**SHAPE),
    "bert by its first token": BertConfig(**SHAPE, pooling="cls", normalise=False),
    "bert classifier": BertConfig(**SHAPE, num_labels=3),
    "roberta": RobertaConfig(**SHAPE),
    "roberta classifier": RobertaConfig(**SHAPE, num_labels=3),
    "mpnet": MPNetConfig(**SHAPE),
    "mpnet classifier": MPNetConfig(**SHAPE, num_labels=3),
    "wide bert": BertConfig(**WIDE),
    "wide mpnet": MPNetConfig(**WIDE),
    "wide mpnet classifier": MPNetConfig(**WIDE, num_labels=3),
}


def make_model(name, seed=0):
    """No bias is zero and no scale one; a sentence encoder gets a head of three random classes."""
    config, random = CONFIGS[name], np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: jax.device_put(np.float32(0.3 * random.normal(size=leaf.shape))), shapes)
    params = tree.map_with_path(lambda path, leaf: 1 + leaf if path.endswith("scale") else leaf, params)
    model = bert(config, params)
    if config.num_labels is None:
        columns = random.normal(size=(config.hidden_size, 3))
        return with_head(model, jnp.asarray(columns / np.linalg.norm(columns, axis=0), jnp.float32), 1.0)
    return model.with_loss(lambda _, outputs, labels: -jax.nn.log_softmax(outputs["logits"])[jnp.arange(6), labels])


def make_inputs(seed=0, texts=6, length=7):
    random = np.random.default_rng(seed)
    mask = np.arange(length) < random.integers(2, length + 1, (texts, 1))
    tokens = np.where(mask, random.integers(2, 20, (texts, length)), 1)
    return {"tokens": jnp.asarray(tokens, jnp.int32), "mask": jnp.asarray(mask)}


def make_batches(number=2):
    return [Batch(make_inputs(seed), jnp.asarray(np.arange(6) % 3)) for seed in range(number)]


def score(model, inputs):
    outputs = model(inputs)
    return outputs["logits"] if "logits" in outputs else outputs["text"] @ model.loss_params["classifier"]


@pytest.mark.parametrize("name", ["bert", "bert by its first token", "roberta classifier", "mpnet"])
def test_gradient_identity(name):
    model, inputs = make_model(name), make_inputs()
    labels = jnp.arange(6) % 3
    check_gradient_identity(
        lambda params, inputs: model.loss(model.loss_params, model.replace(params=params)(inputs), labels).sum(),
        model.params,
        inputs,
    )


@pytest.mark.parametrize("name", ["bert", "bert by its first token", "roberta", "mpnet", "mpnet classifier"])
def test_padding_changes_nothing(name):
    model, inputs = make_model(name), make_inputs()
    expected = score(model, inputs)
    other = jnp.where(inputs["mask"], inputs["tokens"], 7)
    longer = {
        "tokens": jnp.pad(other, ((0, 0), (0, 1)), constant_values=9),
        "mask": jnp.pad(inputs["mask"], ((0, 0), (0, 1))),
    }
    np.testing.assert_allclose(score(model, longer), expected, rtol=1e-5, atol=1e-5)


def test_the_embedding_is_the_mean_of_the_tokens_or_the_first():
    inputs = make_inputs()
    whole = make_model("bert")
    hidden = inputs
    for stage in whole.stages[:-1]:
        hidden = stage.function(
            {**{local: tree.get(whole.params, path) for local, path in stage.paths}}
            if stage.group
            else whole.params["embeddings"],
            hidden,
        )
    states, mask = np.asarray(hidden["hidden"]), np.asarray(inputs["mask"])
    mean = np.stack([state[real].mean(0) for state, real in zip(states, mask, strict=True)])
    np.testing.assert_allclose(
        whole(inputs)["text"], mean / np.linalg.norm(mean, axis=1, keepdims=True), rtol=1e-5, atol=1e-6
    )
    first = bert(CONFIGS["bert by its first token"], whole.params)
    np.testing.assert_allclose(first(inputs)["text"], states[:, 0], rtol=1e-5, atol=1e-6)


def test_types_tell_the_texts_of_a_pair_apart():
    model, inputs = make_model("bert"), make_inputs()
    found = [model({**inputs, "types": jnp.full_like(inputs["tokens"], kind)})["text"] for kind in (0, 1)]
    np.testing.assert_array_equal(found[0], model(inputs)["text"])
    assert np.abs(found[0] - found[1]).max() > 1e-2


def test_a_text_of_more_tokens_than_positions():
    model = make_model("roberta")
    with pytest.raises(ValueError, match="texts of 9 tokens, at most 8 have positions: truncate them"):
        model({"tokens": jnp.full((1, 9), 3)})
    assert CONFIGS["roberta"].length == 8
    assert dataclasses.replace(CONFIGS["bert"], max_seq_length=6).length == 6


PAIRS = [
    ("bert", "wide bert"),
    ("wide bert", "bert"),
    ("bert", "wide mpnet"),
    ("wide mpnet", "bert"),
    ("mpnet", "wide mpnet"),
    ("roberta classifier", "wide mpnet classifier"),
]


@pytest.mark.parametrize(
    ("transport", "source", "target"), [*((theseus, *pair) for pair in PAIRS), (bico, *PAIRS[2]), (bico, *PAIRS[-1])]
)
def test_a_task_vector_moves_between_other_widths_depths_heads_and_relatives(transport, source, target):
    a, b = make_model(source), make_model(target, 1)
    rebase, before = transport(), run_stage._cache_size()
    state = fit(rebase, a, b, [(batch, batch) for batch in make_batches()])
    assert run_stage._cache_size() - before <= 12  # embeddings, blocks and head of both, whatever their number
    moved = rebase.apply(state, jax.tree.map(lambda leaf: 0.1 * leaf, a.params))
    assert jax.tree.map(jnp.shape, moved) == jax.tree.map(jnp.shape, b.params)
    actions = {entry.target: entry.action for entry in leaf_report(state) if entry.target}
    kernels = {
        path for path in tree.flatten(b.params) if path.startswith("blocks") and path.endswith(("kernel", "scale"))
    }
    assert {actions[path] for path in kernels} == {"rotated"}
    flat = tree.flatten(moved)
    assert all(np.isfinite(flat[path]).all() and np.any(flat[path]) for path in kernels)
    tables = {path for path in actions if path.startswith("embeddings/") and "norm" not in path} | {"relative_bias"}
    assert not any(np.any(flat[path]) for path in tables & flat.keys())


@pytest.mark.parametrize("name", ["bert", "roberta classifier", "mpnet"])
def test_on_the_same_model_what_the_data_determine_stays(name):
    model = make_model(name)
    rebase = theseus()
    state = fit(rebase, model, model, [(batch, batch) for batch in make_batches(6)])
    tau = jax.tree.map(lambda leaf: 0.1 * jnp.ones_like(leaf) * leaf, model.params)
    once = rebase.apply(state, tau)
    twice = rebase.apply(state, once)
    flat, again, given = tree.flatten(once), tree.flatten(twice), tree.flatten(tau)
    kernels = [path for path in flat if path.startswith("blocks") and path.endswith("kernel")]
    for path in kernels:
        np.testing.assert_allclose(again[path], flat[path], atol=1e-4, err_msg=path)  # a projection
        inside = np.sum(np.asarray(flat[path]) * np.asarray(given[path])) / np.sum(np.square(flat[path]))
        np.testing.assert_allclose(inside, 1, atol=1e-3, err_msg=path)  # an orthogonal one


@pytest.mark.parametrize("name", ["bert", "bert classifier", "mpnet", "mpnet classifier"])
def test_a_permuted_copy_receives_the_permuted_task_vector(name):
    config, model = CONFIGS[name], make_model(name)
    symmetry = symmetry_of_config(config)
    order = random_permutations(symmetry, model.params, jax.random.key(3))
    copy = model.replace(params=permute(symmetry, order, model.params))
    rebase, batches = theseus(), make_batches(6)
    random = np.random.default_rng(5)
    tau = jax.tree.map(lambda leaf: jax.device_put(np.float32(random.normal(size=leaf.shape))), model.params)
    onto = {}
    for label, target in (("itself", model), ("copy", copy)):
        onto[label] = rebase.apply(fit(rebase, model, target, [(batch, batch) for batch in batches]), tau)
    expected, found = tree.flatten(permute(symmetry, order, onto["itself"])), tree.flatten(onto["copy"])
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, atol=2e-3 * (1 + float(jnp.abs(leaf).max())), err_msg=path)


def test_rows_of_the_padding_never_matter():
    source, target = make_model("bert"), make_model("wide mpnet", 1)
    rebase, moved = bico(), []
    for filler in (1, 5):
        batches = []
        for batch in make_batches():
            tokens = jnp.where(batch.inputs["mask"], batch.inputs["tokens"], filler)
            batches.append(batch._replace(inputs={**batch.inputs, "tokens": tokens}))
        moved.append(rebase.apply(fit(rebase, source, target, [(one, one) for one in batches]), source.params))
    for path, leaf in tree.flatten(moved[0]).items():
        np.testing.assert_allclose(tree.flatten(moved[1])[path], leaf, atol=1e-4, err_msg=path)


@pytest.mark.parametrize(
    "case", ["bert", "bert_classifier", "roberta_classifier", "mpnet", "xlm_roberta_for_masked_language"]
)
def test_configs_round_trip(case):
    config = from_pretrained(GOLDENS / case).config
    assert type(config).from_dict(config.to_dict()) == config
    said = dataclasses.replace(config, pooling="cls", normalise=False, max_seq_length=5)
    assert type(config).from_dict(said.to_dict()) == said


def test_what_a_config_leaves_out():
    assert BertConfig.from_dict({"model_type": "bert"}) == BertConfig()
    assert RobertaConfig.from_dict({"model_type": "roberta"}) == RobertaConfig()
    assert MPNetConfig.from_dict({"model_type": "mpnet"}) == MPNetConfig()
    assert RobertaConfig.from_dict({"model_type": "xlm-roberta"}).vocab_size == 30522
    named = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}
    assert BertConfig.from_dict(named).num_labels == 2
    assert BertConfig.from_dict(named | {"id2label": {"0": "a", "1": "b", "2": "c"}}).num_labels == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"architectures": ["BertForTokenClassification"]},
            "architecture 'BertForTokenClassification' is not supported",
        ),
        ({"architectures": ["RobertaModel"]}, "architecture 'RobertaModel' is not supported, only BertModel"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key' is not supported"),
        ({"is_decoder": True}, "is_decoder is true: decoders are not supported"),
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported"),
        ({"hidden_size": 10, "num_attention_heads": 4}, "hidden_size 10 is not a multiple of num_attention_heads 4"),
        ({"type_vocab_size": -1}, "type_vocab_size is -1, expected a number from 0"),
        (
            {"architectures": ["BertForSequenceClassification"], "problem_type": "multi_label_classification"},
            "problem_type 'multi_label_classification' is not supported",
        ),
        (
            {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "score"}},
            "problem_type 'regression' is not supported",
        ),
        ({"pooling": "max"}, "pooling 'max' is not supported, only mean and cls"),
    ],
)
def test_unsupported_configs(settings, message):
    with pytest.raises(ValueError, match=message):
        BertConfig.from_dict({"model_type": "bert"} | settings)


def test_more_unsupported_configs():
    with pytest.raises(ValueError, match="relative_attention_num_buckets is 16: the model that transformers computes"):
        MPNetConfig.from_dict({"model_type": "mpnet", "relative_attention_num_buckets": 16})
    with pytest.raises(ValueError, match="max_position_embeddings is 2, which leaves no position"):
        RobertaConfig.from_dict({"model_type": "roberta", "max_position_embeddings": 2})


def write_modules(folder, modules, pooling):
    kinds = [
        {"type": f"sentence_transformers.models.{kind}", "path": f"{i}_{kind}" if i else ""}
        for i, kind in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(kinds))
    for i, kind in enumerate(modules[1:], start=1):
        (folder / f"{i}_{kind}").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(GOLDENS / "bert", tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("modules", "pooling", "expected"),
    [
        (("Transformer", "Pooling", "Normalize"), {"pooling_mode_mean_tokens": True}, ("mean", True)),
        (
            ("Transformer", "Pooling"),
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
            ("cls", False),
        ),
        (("Transformer", "Pooling", "Normalize"), {"pooling_mode": "cls"}, ("cls", True)),
    ],
)
def test_a_folder_of_sentence_transformers_says_how_texts_are_embedded(folder, tmp_path, modules, pooling, expected):
    write_modules(folder, modules, pooling)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 7, "do_lower_case": false}')
    config = from_pretrained(folder).config
    assert (config.pooling, config.normalise, config.max_seq_length) == (*expected, 7)
    save_pretrained(from_pretrained(folder), tmp_path / "saved")
    assert from_pretrained(tmp_path / "saved").config == config
    save_orbax(from_pretrained(folder), tmp_path / "orbax")
    assert load_orbax(tmp_path / "orbax").config == config
    kept = {path.relative_to(folder) for path in folder.rglob("*.json")}
    assert kept <= {path.relative_to(tmp_path / "saved") for path in (tmp_path / "saved").rglob("*.json")}


@pytest.mark.parametrize(
    ("modules", "pooling", "reason"),
    [
        (("Transformer", "Pooling"), {"pooling_mode_max_tokens": True}, "pooling 'max' is not supported"),
        (
            ("Transformer", "Pooling"),
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            "pooling 'cls and mean' is not supported",
        ),
        (
            ("Transformer", "Pooling", "Dense"),
            {"pooling_mode": "mean"},
            "pooling 'Transformer and Pooling and Dense' is",
        ),
    ],
)
def test_embeddings_that_are_not_computed_leave_the_arithmetic(folder, modules, pooling, reason):
    write_modules(folder, modules, pooling)
    with open_checkpoint(folder) as opened:
        assert opened.family is GENERIC and reason in opened.no_code
        assert opened.params().keys()


def test_of_a_hub_id_the_configs_of_the_modules_are_downloaded_too(folder, monkeypatch):
    write_modules(folder, ("Transformer", "Pooling"), {"pooling_mode_cls_token": True})
    asked = []

    def download(name, revision=None, **patterns):
        asked.append((name, revision, patterns["allow_patterns"][-1], patterns["ignore_patterns"]))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert from_pretrained("owner/encoder").config.pooling == "cls"
    assert asked[1:] == [("owner/encoder", "model", "*/config.json", ["*/*/*"])]  # of the commit that was found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"type": "a"}', "modules.json holds a dict, expected a list"),
        ("[1]", "modules.json has 1, expected an object with a type and a path"),
        ('[{"type": "a.Pooling", "path": "../other"}]', "names the path '../other', expected a folder beside it"),
        ('[{"type": "a.Pooling", "path": "1_Pooling"}]', "1_Pooling has no config.json"),
    ],
)
def test_damaged_files_of_sentence_transformers(folder, content, message):
    (folder / "modules.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        from_pretrained(folder)


def test_keys_of_older_checkpoints(folder, tmp_path):
    file = folder / "model.safetensors"
    tensors, expected = load_file(file), from_pretrained(folder).params
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
        for key, x in tensors.items()
    }
    old = {f"bert.{key}": leaf for key, leaf in old.items()}
    old |= {"cls.predictions.bias": np.zeros(30, np.float32), "bert.embeddings.position_ids": np.arange(11)[None]}
    save_file(old, file, {"format": "pt"})
    pretrained = from_pretrained(folder)
    jax.tree.map(np.testing.assert_array_equal, pretrained.params, expected)
    save_pretrained(pretrained, tmp_path / "saved")
    written = load_file(tmp_path / "saved" / "model.safetensors")
    assert written.keys() == old.keys()
    for key, leaf in old.items():
        np.testing.assert_array_equal(written[key], leaf)
