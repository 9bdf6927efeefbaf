"""What is GPT-2's own: its fused kernel, its config, positions, and adapters of the fused kernel."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tvjax import tree
from tvjax.checkpoints import from_pretrained, load_adapter, save_pretrained, streaming
from tvjax.models.families import GENERIC, GPT2, family_of_config
from tvjax.models.gpt2 import GPT2Config, gpt2, init
from tvjax.models.key_table import Tensor, find_sources, to_checkpoint

FOLDER = Path(__file__).parent / "goldens" / "gpt2"
CONFIG = GPT2Config(20, 12, 20, 2, 2, max_position_embeddings=8)
ATTENTION = ("query", "key", "value")


def copied(tmp_path, change):
    shutil.copytree(FOLDER, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    return tmp_path / "model"


def test_the_parts_of_the_fused_kernel_are_layers():
    tensors, params = load_file(FOLDER / "model.safetensors"), from_pretrained(FOLDER).params
    for kind, axis in (("weight", 1), ("bias", 0)):
        parts = np.split(tensors[f"transformer.h.1.attn.c_attn.{kind}"], 3, axis)
        for name, part in zip(ATTENTION, parts, strict=True):
            leaf = "kernel" if kind == "weight" else "bias"
            np.testing.assert_array_equal(params["blocks"]["1"]["attention"][name][leaf], part)


def test_keys_without_the_first_word_and_buffers_of_the_first_checkpoints(tmp_path):
    def change(tensors):
        old = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
        for i in range(3):
            old[f"h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 10, 10), np.float32))
            old[f"h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)
        return old

    found, expected = from_pretrained(copied(tmp_path, change)).params, from_pretrained(FOLDER).params
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_fused_kernel_of_another_shape_is_named_once():
    shapes = {path: leaf.shape for path, leaf in tree.flatten(init(CONFIG, jax.random.key(0))).items()}
    headers = {key: Tensor("F32", array.shape) for key, array in to_checkpoint(GPT2.table, _params()).items()}
    headers["transformer.h.0.attn.c_attn.weight"] = Tensor("F32", (36, 12))
    del headers["transformer.h.1.attn.c_attn.bias"]
    with pytest.raises(ValueError) as error:
        find_sources(GPT2.table, shapes, headers, "folder")
    assert "missing keys (1): transformer.h.1.attn.c_attn.bias" in str(error.value)
    assert "wrong shapes (1): transformer.h.0.attn.c_attn.weight is [36, 12], expected [12, 36]" in str(error.value)


def test_a_part_without_the_others_cannot_be_written():
    params = _params()
    del params["blocks"]["0"]["attention"]["key"]
    with pytest.raises(ValueError, match="parts of these tensors are missing: transformer.h.0.attn.c_attn.bias"):
        to_checkpoint(GPT2.table, params)


def _params():
    return init(CONFIG, jax.random.key(0))


def test_a_task_vector_is_extracted_and_applied_tensor_by_tensor(tmp_path):
    base = from_pretrained(FOLDER)
    tuned = base.with_params(jax.tree.map(lambda leaf: leaf + 0.25, base.params))
    save_pretrained(tuned, tmp_path / "tuned")
    streaming.extract(FOLDER, tmp_path / "tuned", tmp_path / "tau.safetensors")
    streaming.apply(FOLDER, [tmp_path / "tau.safetensors"], tmp_path / "edited")
    edited = load_file(tmp_path / "edited" / "model.safetensors")
    for key, tensor in load_file(tmp_path / "tuned" / "model.safetensors").items():
        np.testing.assert_allclose(edited[key], tensor, rtol=1e-6, atol=1e-6, err_msg=key)


def test_a_token_sees_none_that_come_later():
    model = gpt2(CONFIG, _params())
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 20, (4, 7)), jnp.int32)
    before, after = (model({"tokens": each})["logits"] for each in (tokens, tokens.at[:, 4:].add(1) % 20))
    np.testing.assert_allclose(before[:, :4], after[:, :4], atol=1e-6)
    assert np.abs(before[:, 4:] - after[:, 4:]).max() > 1e-2


def test_padding_before_a_text_changes_nothing_when_positions_say_where_it_begins():
    model, tokens = gpt2(CONFIG, _params()), jnp.asarray([[3, 4, 5, 6]], jnp.int32)
    padded = jnp.concatenate([jnp.full((1, 2), 9), tokens], 1)
    places = {"mask": jnp.arange(6)[None] >= 2, "positions": jnp.maximum(jnp.arange(6)[None] - 2, 0)}
    found = model({"tokens": padded, **places})["logits"][:, 2:]
    np.testing.assert_allclose(found, model({"tokens": tokens})["logits"], rtol=1e-5, atol=1e-5)


def test_texts_without_positions_and_tokens_without_embeddings():
    model = gpt2(CONFIG, _params())
    with pytest.raises(ValueError, match="texts of 9 tokens, at most 8 have positions"):
        model({"tokens": jnp.zeros((1, 9), jnp.int32)})
    assert np.isnan(model({"tokens": jnp.full((1, 2), 20)})["logits"]).all()


def test_configs_round_trip_and_take_both_names():
    untied = dataclasses.replace(CONFIG, tie_word_embeddings=False, hidden_act="relu", layer_norm_eps=1e-3)
    for config in (CONFIG, untied):
        assert GPT2Config.from_dict(config.to_dict()) == config
    assert GPT2Config.from_dict({"model_type": "gpt2"}) == GPT2Config()
    large = {"model_type": "gpt2", "n_inner": None, "hidden_size": 1280, "num_hidden_layers": 36, "n_head": 20}
    found = GPT2Config.from_dict({**large, "reorder_and_upcast_attn": True})  # float32 scores, as always here
    assert (found.hidden_size, found.intermediate_size, found.num_hidden_layers) == (1280, 5120, 36)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True, and only False is supp"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False, and only True is supported"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"architectures": ["GPT2DoubleHeadsModel"]}, "architecture 'GPT2DoubleHeadsModel' is not supported"),
        ({"n_embd": "8"}, "hidden_size is '8', expected int"),
        ({"n_layer": 0}, "num_hidden_layers is 0"),
    ],
)
def test_what_is_not_computed_is_named_and_left_to_arithmetic(tmp_path, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GPT2Config.from_dict({"model_type": "gpt2", **settings})
    if "n_" not in str(settings):  # tensors of such a model can still be added
        shutil.copytree(FOLDER, tmp_path / "model")
        known = json.loads((FOLDER / "config.json").read_text())
        (tmp_path / "model" / "config.json").write_text(json.dumps(known | settings))
        assert family_of_config(from_pretrained(tmp_path / "model").config) is GENERIC


# -- adapters ----------------------------------------------------------------------------------------------------------


def write_adapter(folder, prefix="transformer.", **changes):
    random = np.random.default_rng(0)
    shapes = {"h.1.attn.c_attn": (24, 72), "h.1.attn.c_proj": (24, 24)}
    tensors = {}
    for module, (inputs, outputs) in shapes.items():
        tensors[f"base_model.model.{prefix}{module}.lora_A.weight"] = random.normal(size=(2, inputs)).astype("float32")
        tensors[f"base_model.model.{prefix}{module}.lora_B.weight"] = random.normal(size=(outputs, 2)).astype("float32")
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "fan_in_fan_out": True, **changes}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return {key.removeprefix(f"base_model.model.{prefix}"): tensor for key, tensor in tensors.items()}


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_an_adapter_of_the_fused_kernel_is_one_of_each_part(tmp_path, prefix):
    tensors = write_adapter(tmp_path / "adapter", prefix)
    found = load_adapter(tmp_path / "adapter", from_pretrained(FOLDER))
    whole = 3 * tensors["h.1.attn.c_attn.lora_A.weight"].T @ tensors["h.1.attn.c_attn.lora_B.weight"].T
    assert found.keys() == {f"blocks/1/attention/{name}/kernel" for name in (*ATTENTION, "out")}
    for name, part in zip(ATTENTION, np.split(whole, 3, 1), strict=True):
        adapter = found[f"blocks/1/attention/{name}/kernel"]
        assert adapter.a.shape == (24, 2) and adapter.b.shape == (2, 24)
        np.testing.assert_allclose(adapter.scale * adapter.a @ adapter.b, part, rtol=1e-5, atol=1e-5)
    streaming.extract_adapter(FOLDER, tmp_path / "adapter", tmp_path / "tau.safetensors")
    tau = load_file(tmp_path / "tau.safetensors")
    np.testing.assert_allclose(tau["blocks/1/attention/key/kernel"], np.split(whole, 3, 1)[1], rtol=1e-5, atol=1e-5)


def test_an_initialisation_that_was_taken_out_of_the_fused_kernel_is_refused(tmp_path):
    write_adapter(tmp_path / "adapter", init_lora_weights="pissa")
    with pytest.raises(ValueError, match="transformer.h.1.attn.c_attn: pissa of a fused kernel"):
        load_adapter(tmp_path / "adapter", from_pretrained(FOLDER))
