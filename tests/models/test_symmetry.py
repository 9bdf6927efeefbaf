"""The symmetry tables: complete on both sides, and true symmetries of what the models compute."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax import tree
from tvjax.align.permutations import axes, groups, invert, permute, random_permutations
from tvjax.align.weight_matching import match_weights
from tvjax.checkpoints import from_pretrained
from tvjax.data.embedded import MODELS, model_folder
from tvjax.models import bert, clip, dinov2, gemma, gpt2, llama, siglip, vit
from tvjax.models.families import FAMILIES, family_of_config
from tvjax.models.symmetry import symmetry_of_config

VISION = clip.CLIPVisionConfig(16, 24, 2, 4, image_size=8, patch_size=4, projection_dim=6)
TEXT = clip.CLIPTextConfig(20, 16, 24, 3, 2, max_position_embeddings=7, eos_token_id=19, projection_dim=6)
CONFIGS = {
    "clip": clip.CLIPConfig(VISION, TEXT),
    "vision": clip.CLIPConfig(VISION, None),
    "text without projection": clip.CLIPConfig(None, dataclasses.replace(TEXT, projection_dim=None)),
    "dinov2": dinov2.Dinov2Config(16, 2, 4, 2, image_size=8, patch_size=4, num_labels=5),
    "dinov2 gated": dinov2.Dinov2WithRegistersConfig(
        16, 2, 4, 1, image_size=8, patch_size=4, use_swiglu_ffn=True, num_labels=5
    ),
    "siglip": siglip.SiglipConfig(
        siglip.SiglipVisionConfig(16, 24, 2, 4, image_size=8, patch_size=4),
        siglip.SiglipTextConfig(20, 16, 24, 3, 2, max_position_embeddings=7, projection_size=16),
    ),
    "vit": vit.ViTConfig(16, 24, 2, 4, image_size=8, patch_size=4, num_labels=5),
    "vit without qkv bias": vit.ViTConfig(16, 24, 2, 4, image_size=8, patch_size=4, num_labels=5, qkv_bias=False),
}

DECODERS = {
    "gemma": gemma.GemmaConfig(
        *(20, 16, 24, 2, 4, 2, 6),
        sliding_window=4,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        layer_types=("sliding_attention", "full_attention"),
        local_rope=llama.Rope(theta=50.0),
        model_type="gemma3_text",
    ),
    "gpt2": gpt2.GPT2Config(20, 16, 24, 2, 4, max_position_embeddings=7),
    "llama": llama.LlamaConfig(20, 16, 24, 2, 4, 4, head_dim=6, attention_bias=True),
    "llama with grouped queries": llama.LlamaConfig(20, 16, 24, 2, 8, 4, head_dim=6, qk_norm=True),
    "tied llama": llama.LlamaConfig(20, 16, 24, 2, 4, 2, head_dim=4, tie_word_embeddings=True, mlp_bias=True),
}


BERTS = {
    "bert classifier": bert.BertConfig(20, 16, 24, 2, 4, max_position_embeddings=9, num_labels=3),
    "bert": bert.BertConfig(20, 16, 24, 2, 4, max_position_embeddings=9),
    "mpnet": bert.MPNetConfig(20, 16, 24, 2, 4, max_position_embeddings=9),
    "mpnet classifier": bert.MPNetConfig(20, 16, 24, 2, 4, max_position_embeddings=9, num_labels=3),
}


def make_params(config, seed):
    """No bias is zero and no scale one."""
    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: family_of_config(config).init(config, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: jax.device_put(np.float32(0.4 * random.normal(size=leaf.shape))), shapes)
    return tree.map_with_path(lambda path, leaf: 1 + leaf if path.endswith("scale") else leaf, params)


def make_inputs(config):
    random = np.random.default_rng(1)
    inputs = {"pixels": jnp.asarray(random.normal(size=(3, 8, 8, 3)), jnp.float32)}
    if getattr(config, "text", None):
        tokens = jnp.asarray(random.integers(0, 19, (4, 7)), jnp.int32).at[:, 5].set(19)
        inputs |= {"tokens": tokens, "mask": jnp.ones((4, 7), bool).at[:, 6].set(False)}
    return inputs


def embedded(name):
    pretrained = from_pretrained(model_folder(name))
    return pretrained.config, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), pretrained.params)


def assert_function_unchanged(config, params, inputs):
    symmetry, build = symmetry_of_config(config), family_of_config(config).build
    expected = build(config, params)(inputs)
    for seed in range(2):
        moved = permute(symmetry, random_permutations(symmetry, params, jax.random.key(seed)), params)
        for path, leaf in tree.flatten(params).items():
            permuted = any(axes(symmetry, path, leaf.ndim)) and not np.all(leaf == leaf.reshape(-1)[0])
            assert bool(np.any(leaf != tree.flatten(moved)[path])) == permuted, path
        outputs = build(config, moved)(inputs)
        assert outputs.keys() == expected.keys()
        for name, value in expected.items():
            if jnp.issubdtype(value.dtype, jnp.floating):
                np.testing.assert_allclose(outputs[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_permuted_model_computes_the_same(name):
    config = CONFIGS[name]
    assert_function_unchanged(config, make_params(config, 0), make_inputs(config))


def test_a_permuted_embedded_model_computes_the_same():
    config, params = embedded("A")
    random = np.random.default_rng(0)
    tokens = jnp.asarray(random.integers(0, 584, (3, 12)), jnp.int32).at[:, 9].set(584)
    inputs = {"pixels": jnp.asarray(random.normal(size=(3, 16, 16, 3)), jnp.float32), "tokens": tokens}
    assert_function_unchanged(config, params, inputs)


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_a_leaf_that_is_left_behind_changes_the_function(tower):
    config = CONFIGS["clip"]
    symmetry, params, inputs = symmetry_of_config(config), make_params(config, 0), make_inputs(config)
    model = clip.clip(config, params)
    expected = model(inputs)["logits_per_image"]
    moved = tree.flatten(permute(symmetry, random_permutations(symmetry, params, jax.random.key(0)), params))
    layers = ("attention/query", "attention/key", "attention/value", "attention/out", "mlp/up", "mlp/down")
    for path in [f"{tower}/blocks/1/{layer}/kernel" for layer in layers] + [f"{tower}/blocks/0/norm2/scale"]:
        broken = model.replace(params=tree.nest({**moved, path: tree.flatten(params)[path]}))(inputs)
        assert np.abs(broken["logits_per_image"] - expected).max() > 1e-2, path


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_covers_every_leaf(name):
    config = CONFIGS[name]
    symmetry, params = symmetry_of_config(config), make_params(config, 0)
    found = groups(symmetry, params)
    for tower in {path.split("/")[0] for path in tree.flatten(params) if "/blocks/" in path}:
        shape = getattr(config, tower, config)
        layers = range(shape.num_hidden_layers)
        names = {f"{tower}/blocks/{i}/{kind}" for i in layers for kind in ("hidden", "heads")}
        if name != "text without projection":  # there the residual stream is what the tower returns
            names.add(f"{tower}/residual")
            names |= {group for group in found if group.startswith(f"{tower}/head")}
            assert found[f"{tower}/residual"].sizes == {"": shape.hidden_size}
        assert {group for group in found if group.startswith(tower)} == names
        assert found[f"{tower}/blocks/0/hidden"].sizes == {"": shape.intermediate_size}
        heads = found[f"{tower}/blocks/0/heads"]
        assert heads.heads == shape.num_attention_heads
        assert heads.sizes == {"query_key": shape.hidden_size, "value_out": shape.hidden_size}


@pytest.mark.parametrize("name", ["clip", "vit"])
def test_every_row_of_the_table_covers_a_leaf(name):
    symmetry, params = symmetry_of_config(CONFIGS[name]), make_params(CONFIGS[name], 0)
    for row in symmetry.rows:
        with pytest.raises(ValueError, match="it has no row for"):
            groups(symmetry._replace(rows=tuple(other for other in symmetry.rows if other != row)), params)


def test_outputs_that_have_a_meaning_are_fixed():
    symmetry = symmetry_of_config(CONFIGS["clip"])
    assert axes(symmetry, "vision/projection/kernel", 2) == ("vision/residual", None)
    assert axes(symmetry, "text/projection/kernel", 2) == ("text/residual", None)
    assert axes(symmetry, "text/embeddings/tokens", 2) == (None, "text/residual")
    assert axes(symmetry, "logit_scale", 0) == ()
    symmetry = symmetry_of_config(CONFIGS["vit"])
    assert axes(symmetry, "head/kernel", 2) == ("vision/residual", None)
    assert axes(symmetry, "head/bias", 1) == (None,)
    assert axes(symmetry, "vision/embeddings/patch/kernel", 4) == (None, None, None, "vision/residual")


def test_every_family_has_a_table():
    for family in FAMILIES.values():
        assert symmetry_of_config(family.config()).rows
    with pytest.raises(ValueError, match="like a dict"):
        symmetry_of_config({})


@pytest.mark.parametrize("name", MODELS)
def test_a_permuted_copy_of_an_embedded_model_is_matched_back_exactly(name):
    config, params = embedded(name)
    symmetry = symmetry_of_config(config)
    for seed in range(3):
        true = random_permutations(symmetry, params, jax.random.key(seed))
        found = match_weights(symmetry, params, permute(symmetry, true, params), key=jax.random.key(7))
        assert found.permutations.keys() == true.keys()
        for group, order in true.items():
            np.testing.assert_array_equal(found.permutations[group], order, err_msg=group)


def test_a_permuted_copy_of_a_fresh_model_is_matched_back_exactly():
    config = CONFIGS["vit"]
    symmetry = symmetry_of_config(config)
    for seed in range(3):
        params = family_of_config(config).init(config, jax.random.key(seed))  # biases zero, scales one
        true = random_permutations(symmetry, params, jax.random.key(seed))
        found = match_weights(symmetry, params, permute(symmetry, true, params), key=jax.random.key(7))
        for group, order in true.items():
            np.testing.assert_array_equal(found.permutations[group], order, err_msg=group)


@pytest.mark.parametrize("name", DECODERS)
def test_a_permuted_decoder_computes_the_same_and_is_matched_back(name):
    config = DECODERS[name]
    symmetry, params = symmetry_of_config(config), make_params(config, 0)
    model = family_of_config(config).build(config, params)
    inputs = {"tokens": jnp.asarray(np.random.default_rng(0).integers(0, 20, (4, 7)), jnp.int32)}
    expected, found = model(inputs)["logits"], groups(symmetry, params)
    assert found["blocks/1/heads"].heads == getattr(config, "num_key_value_heads", config.num_attention_heads)
    for seed in range(2):
        true = random_permutations(symmetry, params, jax.random.key(seed))
        moved = permute(symmetry, true, params)
        np.testing.assert_allclose(model.replace(params=moved)(inputs)["logits"], expected, rtol=1e-4, atol=1e-4)
        back = permute(symmetry, invert(true), moved)
        jax.tree.map(np.testing.assert_array_equal, back, params)
        matched = match_weights(symmetry, params, moved, key=jax.random.key(7))
        for group, order in true.items():
            np.testing.assert_array_equal(matched.permutations[group], order, err_msg=group)


@pytest.mark.parametrize("name", BERTS)
def test_a_permuted_bert_computes_the_same_and_is_matched_back(name):
    config = BERTS[name]
    symmetry, params = symmetry_of_config(config), make_params(config, 0)
    inputs = {"tokens": jnp.asarray(np.random.default_rng(0).integers(2, 20, (4, 7)), jnp.int32)}

    def compared(params):  # embeddings with embeddings of the same model
        outputs = bert.bert(config, params)(inputs)
        return outputs["logits"] if "logits" in outputs else outputs["text"] @ outputs["text"].T

    for seed in range(2):
        true = random_permutations(symmetry, params, jax.random.key(seed))
        assert any(
            np.any(np.asarray(order) != np.arange(len(order))) for name, order in true.items() if "heads" in name
        )
        moved = permute(symmetry, true, params)
        np.testing.assert_allclose(compared(moved), compared(params), rtol=1e-4, atol=1e-4)
        matched = match_weights(symmetry, params, moved, key=jax.random.key(7))
        for group, order in true.items():
            np.testing.assert_array_equal(matched.permutations[group], order, err_msg=group)


def test_blocks_that_share_a_position_bias_exchange_their_heads_together():
    assert symmetry_of_config(BERTS["mpnet"]).heads == {"heads": 4}
    assert symmetry_of_config(BERTS["bert"]).heads == {"blocks/{i}/heads": 4}


def test_what_positions_rotate_stays_in_its_order():
    rigid = {name: symmetry_of_config(config).rigid for name, config in DECODERS.items()}
    heads = "blocks/{i}/heads"
    assert rigid["llama"] == (f"{heads}:query_key",) and rigid["gpt2"] == ()
    units = [f"{heads}:{units}{times}" for units in ("query_key", "value_out") for times in ("", "*2")]
    assert rigid["llama with grouped queries"] == tuple(units)
    config = DECODERS["llama"]
    free = symmetry_of_config(config)._replace(rigid=())
    params = make_params(config, 0)
    inputs = {"tokens": jnp.asarray(np.random.default_rng(0).integers(0, 20, (4, 7)), jnp.int32)}
    moved = permute(free, random_permutations(free, params, jax.random.key(0)), params)
    outputs = [llama.llama(config, each)(inputs)["logits"] for each in (params, moved)]
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-2
