"""What is Gemma's own: its configs, and what no other family computes."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax import tree
from tvjax.capture import check_gradient_identity
from tvjax.models.gemma import GemmaConfig, gemma, init
from tvjax.models.llama import Rope
from tvjax.tasks import token_losses

GOLDENS = Path(__file__).parent / "goldens"
LAYERS = ("sliding_attention", "full_attention")
CONFIG = GemmaConfig(
    *(20, 16, 24, 2, 4, 2, 6),
    sliding_window=3,
    query_pre_attn_scalar=5,
    attn_logit_softcapping=2.0,
    final_logit_softcapping=3.0,
    layer_types=LAYERS,
    local_rope=Rope(theta=50.0),
    model_type="gemma3_text",
)


def make_model(config, seed=0):
    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    return gemma(config, jax.tree.map(lambda x: jax.device_put(np.float32(0.3 * random.normal(size=x.shape))), shapes))


def make_inputs(seed=0, texts=6, length=7):
    random = np.random.default_rng(seed)
    mask = np.arange(length) < random.integers(2, length + 1, (texts, 1))
    return {"tokens": jnp.asarray(random.integers(0, 20, (texts, length)), jnp.int32), "mask": jnp.asarray(mask)}


def test_gradient_identity():
    model, inputs = make_model(CONFIG), make_inputs()

    def loss(params, inputs):
        logits = model.replace(params=params)(inputs)["logits"]
        return token_losses(logits, jnp.roll(inputs["tokens"], -1, 1), inputs["mask"]).sum()

    check_gradient_identity(loss, model.params, inputs)


def test_wanted_tokens_are_scored_with_the_cap_of_the_logits():
    model, inputs = make_model(CONFIG), make_inputs()
    logits, wanted = model(inputs)["logits"], jnp.roll(inputs["tokens"], -1, 1)
    assert np.abs(logits).max() < 3.0
    found = model({**inputs, "wanted": wanted})
    expected = token_losses(logits, wanted, jnp.ones_like(inputs["mask"]))
    np.testing.assert_allclose(found["losses"], expected, rtol=1e-5, atol=1e-5)


def test_sliding_and_full_blocks_have_positions_of_their_own():
    blocks = [stage for stage in make_model(CONFIG).stages if stage.group == "blocks"]
    found = [dict(stage.heads)["attention/query/kernel"][1].frequencies for stage in blocks]
    np.testing.assert_allclose(found[0], Rope(theta=50.0).frequencies(6))
    np.testing.assert_allclose(found[1], Rope().frequencies(6))
    assert blocks[0].function is not blocks[1].function


@pytest.mark.parametrize("case", ["gemma2", "gemma2_untied", "gemma3"])
def test_configs_round_trip_and_are_read_as_older_transformers_wrote_them(case):
    settings = json.loads((GOLDENS / case / "config.json").read_text())
    config = GemmaConfig.from_dict(settings)
    assert GemmaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    old = {key: value for key, value in config.to_dict().items() if key != "rope_parameters"}
    assert GemmaConfig.from_dict(old) == config


def test_what_a_config_leaves_out():
    two, three = (GemmaConfig.from_dict({"model_type": name}) for name in ("gemma2", "gemma3_text"))
    assert (two.attn_logit_softcapping, two.final_logit_softcapping) == (50.0, 30.0)
    assert two.layer_types == LAYERS * 13 and two.rope == two.local_rope == Rope()
    assert (three.attn_logit_softcapping, three.final_logit_softcapping) == (None, None)
    assert [i for i, kind in enumerate(three.layer_types) if kind == "full_attention"] == [5, 11, 17, 23]
    assert (three.vocab_size, three.rope.theta, three.local_rope.theta) == (262208, 1e6, 1e4)
    none = GemmaConfig.from_dict({"model_type": "gemma2", "attn_logit_softcapping": None, "sliding_window": None})
    assert none.attn_logit_softcapping is None and none.window(0) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
        ({"architectures": ["Gemma2ForSequenceClassification"]}, "Gemma2ForSequenceClassification' is not supported"),
        ({"layer_types": ["full_attention"]}, "expected 'sliding_attention' or 'full_attention' for each of the 26"),
        ({"layer_types": "full_attention"}, "layer_types is 'full_attention', expected a list"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern is 0, expected a number of layers"),
        ({"num_key_value_heads": 3}, "num_attention_heads 8 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 5}, "head_dim is 5, expected an even number"),
        ({"hidden_activation": "mish"}, "hidden_activation 'mish' is not supported"),
        ({"final_logit_softcapping": "30"}, "final_logit_softcapping is '30', expected float"),
        ({"final_logit_softcapping": 0.0}, "final_logit_softcapping is 0.0, expected a positive number"),
    ],
)
def test_unsupported_configs(settings, message):
    with pytest.raises(ValueError, match=message):
        GemmaConfig.from_dict({"model_type": "gemma2"} | settings)


def test_a_norm_multiplies_by_one_more_than_its_scale():
    """A model whose scales are all zero is one whose norms only normalise."""
    params = tree.map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if path.endswith("scale") else leaf, make_model(CONFIG).params
    )
    plain = gemma(dataclasses.replace(CONFIG, final_logit_softcapping=None), params)
    carry = plain.stages[0].function({"tokens": params["embeddings"]["tokens"]}, make_inputs())
    before = carry["hidden"]
    np.testing.assert_allclose(before, params["embeddings"]["tokens"][make_inputs()["tokens"]] * 4, rtol=1e-6)
    after = plain.stages[1].function(params["blocks"]["0"], carry)["hidden"]
    assert np.isfinite(after).all() and np.abs(after - before).max() > 0.1
