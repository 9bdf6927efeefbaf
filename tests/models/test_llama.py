"""What is Llama's own: configs of its relatives, positions, masks, tied heads, and transport between two of them."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tvjax import Batch, fit, theseus, tree
from tvjax.capture import check_gradient_identity
from tvjax.checkpoints import from_pretrained, save_pretrained
from tvjax.models.llama import LlamaConfig, Rope, init, llama
from tvjax.stages import run_stage
from tvjax.tasks import token_losses
from tvjax.transport.leaf_report import leaf_report

GOLDENS = Path(__file__).parent / "goldens"
CONFIG = LlamaConfig(20, 16, 24, 2, 4, 2, head_dim=6, rms_norm_eps=1e-3)
YARN = {"rope_type": "yarn", "factor": 4.0}
TIED = LlamaConfig(20, 24, 36, 3, 6, 3, head_dim=8, tie_word_embeddings=True, attention_bias=True)


def next_token_loss(_, outputs, labels):
    scores = jax.nn.log_softmax(outputs["logits"][:, :-1])
    losses = -jnp.take_along_axis(scores, labels["tokens"][:, 1:, None], -1)[..., 0]
    return jnp.sum(losses * labels["mask"][:, 1:].astype(losses.dtype), axis=1)


def make_model(config, seed=0):
    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: jax.device_put(np.float32(0.3 * random.normal(size=leaf.shape))), shapes)
    params = tree.map_with_path(lambda path, leaf: 1 + leaf if path.endswith("scale") else leaf, params)
    return llama(config, params).with_loss(next_token_loss)


def make_inputs(seed=0, texts=6, length=7):
    random = np.random.default_rng(seed)
    mask = np.arange(length) < random.integers(2, length + 1, (texts, 1))
    return {"tokens": jnp.asarray(random.integers(0, 20, (texts, length)), jnp.int32), "mask": jnp.asarray(mask)}


def test_blocks_of_one_shape_share_one_function():
    windows = dataclasses.replace(CONFIG, num_hidden_layers=4, sliding_window=3, max_window_layers=2)
    blocks = [stage for stage in llama(windows, {}).stages if stage.group == "blocks"]
    assert [stage.name for stage in blocks] == [f"blocks/{i}" for i in range(4)]
    assert blocks[0].function is blocks[1].function is not blocks[2].function is blocks[3].function


@pytest.mark.parametrize("config", [CONFIG, TIED, dataclasses.replace(CONFIG, sliding_window=2)])
def test_a_token_sees_none_that_come_later(config):
    model, inputs = make_model(config), {"tokens": make_inputs()["tokens"]}
    changed = {"tokens": inputs["tokens"].at[:, 4:].add(1) % 20}
    before, after = (model(each)["logits"] for each in (inputs, changed))
    np.testing.assert_allclose(before[:, :4], after[:, :4], atol=1e-6)
    assert np.abs(before[:, 4:] - after[:, 4:]).max() > 1e-2


@pytest.mark.parametrize("config", [CONFIG, TIED])
def test_wanted_tokens_are_scored_in_the_place_of_logits(config):
    model, inputs = make_model(config), make_inputs()
    logits, wanted = model(inputs)["logits"], jnp.roll(inputs["tokens"], -1, 1)
    found = model({**inputs, "wanted": wanted})
    assert found.keys() == {"losses", "predicted", "finite"} and found["finite"].all()
    expected = token_losses(logits, wanted, jnp.ones_like(inputs["mask"]))
    np.testing.assert_allclose(found["losses"], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found["predicted"], logits.argmax(-1))


def test_padding_before_a_text_changes_nothing_when_positions_say_where_it_begins():
    model, inputs = make_model(CONFIG), make_inputs()
    tokens = inputs["tokens"][:, :5]
    expected = model({"tokens": tokens})["logits"]
    padded = jnp.concatenate([jnp.full((6, 2), 3), tokens], axis=1)
    mask = jnp.broadcast_to(jnp.arange(7) >= 2, padded.shape)
    positions = jnp.broadcast_to(jnp.maximum(jnp.arange(7) - 2, 0), padded.shape)
    found = model({"tokens": padded, "mask": mask, "positions": positions})["logits"]
    np.testing.assert_allclose(found[:, 2:], expected, rtol=1e-5, atol=1e-5)


def test_a_window_ends_what_a_token_sees():
    config = dataclasses.replace(CONFIG, num_hidden_layers=1, sliding_window=3)
    model, inputs = make_model(config), {"tokens": make_inputs()["tokens"]}
    changed = {"tokens": inputs["tokens"].at[:, 0].add(1) % 20}
    before, after = (model(each)["logits"] for each in (inputs, changed))
    np.testing.assert_allclose(before[:, 3:], after[:, 3:], atol=1e-6)
    assert np.abs(before[:, 2] - after[:, 2]).max() > 1e-3


def test_a_token_outside_the_vocabulary_is_no_number():
    assert np.isnan(make_model(CONFIG)({"tokens": jnp.full((1, 2), 20)})["logits"]).all()


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(TIED, qk_norm=True, mlp_bias=True, sliding_window=3)])
def test_gradient_identity(config):
    model, inputs = make_model(config), make_inputs()
    check_gradient_identity(
        lambda params, inputs: model.loss(None, model.replace(params=params)(inputs), inputs).sum(),
        model.params,
        inputs,
    )


def test_theseus_moves_a_task_vector_between_other_widths_depths_and_heads():
    source, target = make_model(CONFIG), make_model(TIED, 1)
    batches = [(Batch(inputs), Batch(inputs)) for inputs in (make_inputs(), make_inputs(1))]
    rebase, before = theseus(), run_stage._cache_size()
    state = fit(rebase, source, target, batches)
    assert run_stage._cache_size() - before <= 8  # embeddings, blocks and head of both, whatever their number
    moved = rebase.apply(state, jax.tree.map(lambda leaf: 0.1 * leaf, source.params))
    assert jax.tree.map(jnp.shape, moved) == jax.tree.map(jnp.shape, target.params)
    actions = {entry.target: entry.action for entry in leaf_report(state) if entry.target}
    kernels = {path for path in tree.flatten(target.params) if path.endswith(("kernel", "scale"))}
    assert {actions[path] for path in kernels} == {"rotated"}
    assert all(
        np.isfinite(leaf).all() and np.any(leaf) for path, leaf in tree.flatten(moved).items() if path in kernels
    )


@pytest.mark.parametrize("case", ["llama", "llama_of_many_biases", "mistral", "qwen2", "qwen3", "yarn"])
def test_configs_round_trip_and_are_read_as_older_transformers_wrote_them(case):
    settings = json.loads((GOLDENS / case / "config.json").read_text())
    config = LlamaConfig.from_dict(settings)
    assert LlamaConfig.from_dict(config.to_dict()) == config
    old = {key: value for key, value in settings.items() if key not in ("rope_parameters", "layer_types")}
    rope = dict(settings["rope_parameters"])
    old["rope_theta"] = rope.pop("rope_theta")
    old["rope_scaling"] = None if rope["rope_type"] == "default" else {**rope, "type": rope.pop("rope_type")}
    assert LlamaConfig.from_dict(old) == config


def test_what_a_config_leaves_out():
    assert LlamaConfig.from_dict({"model_type": "llama"}) == LlamaConfig()
    mistral = LlamaConfig.from_dict({"model_type": "mistral"})
    assert (mistral.num_key_value_heads, mistral.sliding_window, mistral.window(0)) == (8, 4096, 4096)
    assert LlamaConfig.from_dict({"model_type": "mistral", "sliding_window": None}).window(0) is None
    qwen = LlamaConfig.from_dict({"model_type": "qwen3"})
    assert (qwen.head_dim, qwen.qk_norm, qwen.sliding_window, qwen.attention_bias) == (128, True, None, False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architectures": ["LlamaModel"]}, "architecture 'LlamaModel' is not supported, only LlamaForCausalLM"),
        ({"rope_scaling": {"rope_type": "mrope"}}, "rope_type 'mrope' is not supported, only default, linear, dynamic"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, r"rope_type \['yarn'\] is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor of the rotary positions is '2', expected a posi"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not 1"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "of their own for full_attention are not supp"),
        ({"rope_theta": None}, "theta of the rotary positions is None, expected a positive number"),
        ({"rope_theta": float("inf")}, "theta of the rotary positions is inf, expected a positive number"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_type 'linear' without factor"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "rope_type 'dynamic' without factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "without low_freq_factor and high_freq_factor"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 4}},
            "high_freq_factor 4 is not greater than low_freq_factor 4",
        ),
        ({"rope_scaling": YARN | {"factor": -1}}, "factor of the rotary positions is -1, expected a positive number"),
        ({"rope_scaling": YARN | {"attention_factor": 0.0}}, "attention_factor of the rotary positions is 0.0"),
        ({"rope_scaling": YARN | {"mscale": "1"}}, "mscale of the rotary positions is '1'"),
        (
            {"rope_scaling": YARN | {"original_max_position_embeddings": "4"}},
            "original_max_position_embeddings of the r",
        ),
        ({"rope_scaling": YARN | {"truncate": 1}}, "truncate of the rotary positions is 1, expected true or false"),
        ({"rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 32}}, "beta_fast 1 is less than beta_slow 32"),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, "theta of the rotary positions is 1.0, expected more than 1"),
        ({"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, "rope_type 'longrope' without short_factor"),
        (
            {"rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [0.0]}},
            r"short_factor of the rotary positions is \(0.0,\), expected positive numbers",
        ),
        (
            {"rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": 2}},
            "short_factor of the rotary positions is 2, expected positive numbers",
        ),
        (
            {"rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}},
            "short_factor of the rotary positions has 1 numbers, expected 64: one for each pair",
        ),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            "num_attention_heads 4 is not a multiple of num_key_val",
        ),
        ({"head_dim": 5}, "head_dim is 5, expected an even number"),
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "full attention after sliding attention"),
        ({"layer_types": ["chunked_attention"]}, "expected a list of full_attention and sliding_attention"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected bool"),
        ({"hidden_size": "8"}, "hidden_size is '8', expected int"),
    ],
)
def test_unsupported_configs(settings, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_dict({"model_type": "llama"} | settings)


def test_frequencies_of_no_known_kind():
    with pytest.raises(ValueError, match="rope_type 'ntk' is not supported"):
        Rope(kind="ntk")


@pytest.mark.parametrize(
    "rope",
    [
        YARN | {"beta_fast": 16, "truncate": False, "mscale": 0.7, "mscale_all_dim": 1.0},
        YARN | {"attention_factor": 1.2},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [3, 4.5], "factor": 4.0},
    ],
)
def test_rotary_positions_are_written_as_they_were_read(rope):
    settings = {"model_type": "llama", "head_dim": 4, "rope_parameters": {**rope, "rope_theta": 50.0}}
    config = LlamaConfig.from_dict(settings)
    written = json.loads(json.dumps(config.to_dict()))
    assert LlamaConfig.from_dict(written) == config
    for key in ("rope_parameters", "rope_scaling"):
        assert rope.items() <= written[key].items()


def test_what_rotary_positions_leave_out_is_the_ratio_of_the_lengths():
    lengths = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    rope = LlamaConfig.from_dict({"model_type": "llama", **lengths, "rope_scaling": {"type": "yarn"}}).rope
    assert (rope.factor, rope.original_max_position_embeddings) == (4.0, 16)


def test_yarn_keeps_the_fast_pairs_and_divides_the_slow_ones():
    plain, yarn = Rope().frequencies(128), Rope(kind="yarn", factor=4.0).frequencies(128)
    ratio = yarn / plain
    np.testing.assert_allclose(ratio[:20], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[-10:], 1 / 4, rtol=1e-6)
    assert np.all(np.diff(ratio) <= 1e-6) and len(np.unique(ratio.round(3))) > 10


@pytest.mark.parametrize(
    "rope",
    [
        Rope(kind="dynamic", factor=2.0),
        Rope(kind="longrope", original_max_position_embeddings=6, short_factor=(1.0, 2.0, 3.0), long_factor=(1.0,) * 3),
    ],
)
def test_texts_whose_length_changes_the_frequencies(rope):
    model = make_model(dataclasses.replace(CONFIG, rope=rope, max_position_embeddings=6))
    assert np.isfinite(model(make_inputs(length=6))["logits"]).all()
    with pytest.raises(ValueError, match=f"texts of 7 tokens, expected at most 6: above it rope_type '{rope.kind}'"):
        model(make_inputs(length=7))
    positions = jnp.arange(6)[None] + jnp.array([[0], [1]])
    found = np.isfinite(model({"tokens": make_inputs(texts=2, length=6)["tokens"], "positions": positions})["logits"])
    assert found[0].all() and not found[1].any()  # the text with a position beyond is no number


def test_dynamic_positions_are_the_plain_ones_up_to_the_greatest_length():
    dynamic = dataclasses.replace(CONFIG, rope=Rope(kind="dynamic", factor=2.0), max_position_embeddings=7)
    inputs = make_inputs()
    np.testing.assert_array_equal(make_model(dynamic)(inputs)["logits"], make_model(CONFIG)(inputs)["logits"])


def test_what_stands_beside_the_weights_of_a_language_model_is_kept(tmp_path):
    shutil.copytree(GOLDENS / "llama", tmp_path / "model")
    names = ("tokenizer.model", "chat_template.jinja", "generation_config.json")
    for name in names:
        (tmp_path / "model" / name).write_text(name)
    save_pretrained(from_pretrained(tmp_path / "model"), tmp_path / "saved")
    assert [(tmp_path / "saved" / name).read_text() for name in names] == list(names)


def test_a_tied_head_that_a_checkpoint_has_too(tmp_path):
    shutil.copytree(GOLDENS / "qwen2", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    expected = from_pretrained(GOLDENS / "qwen2").params
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, file, {"format": "pt"})
    jax.tree.map(np.testing.assert_array_equal, from_pretrained(tmp_path / "model").params, expected)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file, {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lm_head.weight and model.embed_tokens.weight with other values.*tie_word_emb"
    ):
        from_pretrained(tmp_path / "model")
