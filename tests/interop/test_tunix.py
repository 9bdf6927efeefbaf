"""Tunix's trees: the numbers of a Hugging Face folder, bit by bit, in an NNX state of its shape and back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from tvjax import interop, tree
from tvjax.checkpoints import Pretrained, save_pretrained
from tvjax.models.families import shapes_of
from tvjax.models.llama import LlamaConfig, llama

CONFIG = LlamaConfig(20, 16, 24, 2, 4, 2, head_dim=6)
CONFIGS = {
    "llama": CONFIG,
    "qwen2": dataclasses.replace(CONFIG, model_type="qwen2", attention_bias=True, tie_word_embeddings=True),
    "qwen3": dataclasses.replace(CONFIG, model_type="qwen3", qk_norm=True),
}
SHAPES = {"q": (16, 4, 6), "k": (16, 2, 6), "v": (16, 2, 6), "o": (4, 6, 16)}  # of the projections of the attention


def make_params(config, seed=0):
    draw = np.random.default_rng(seed).normal
    return tree.nest({path: draw(size=shape).astype(np.float32) for path, shape in shapes_of(config).items()})


def tunix_state(config):
    """The state of an NNX model as Tunix builds it: a list of layers, `w` in projections, norms and head."""

    def module(**leaves):
        return nnx.Dict(**{name: nnx.Param(jnp.zeros(shape)) for name, shape in leaves.items()})

    def layer():
        attention = {f"{name}_proj": module(w=shape) for name, shape in SHAPES.items()}
        if config.model_type == "qwen2":
            attention |= {f"{name}_bias": nnx.Param(jnp.zeros(n)) for name, n in (("q", 24), ("k", 12), ("v", 12))}
        if config.model_type == "qwen3":
            attention |= {f"{name}_norm": module(w=6) for name in "qk"}
        sizes = {"gate": (16, 24), "up": (16, 24), "down": (24, 16)}
        return nnx.Dict(
            input_layernorm=module(w=16),
            attn=nnx.Dict(**attention),
            post_attention_layernorm=module(w=16),
            mlp=nnx.Dict(**{f"{name}_proj": module(kernel=size) for name, size in sizes.items()}),
        )

    head = {} if config.tie_word_embeddings else {"lm_head": module(w=(16, 20))}
    layers = nnx.List([layer() for _ in range(2)])
    return nnx.state(
        nnx.Dict(embedder=module(input_embedding=(20, 16)), layers=layers, final_norm=module(w=16), **head)
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_lands_in_a_state_and_comes_back_bit_by_bit(name, tmp_path):
    config, state = CONFIGS[name], tunix_state(CONFIGS[name])
    params = make_params(config)
    save_pretrained(Pretrained(llama(config, params), config), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    found = interop.to_tunix(params, config, like=state)
    assert isinstance(found, nnx.State)
    flat = {path.removesuffix("/value"): leaf for path, leaf in tree.flatten(found).items()}
    names = interop.tunix_names(config)
    assert names.keys() == tensors.keys() and set(names.values()) == flat.keys()
    for key, path in names.items():
        turned = tensors[key] if "embed_tokens" in key else tensors[key].T
        expected = turned.reshape(SHAPES[path.split("/")[-2][0]]) if "attn" in path and "_proj" in path else turned
        np.testing.assert_array_equal(flat[path], expected, err_msg=key)
    back = interop.from_tunix(found, config)
    for path, leaf in tree.flatten(params).items():
        np.testing.assert_array_equal(tree.flatten(back)[path], leaf, err_msg=path)


def test_a_task_vector_lands_too():
    """What is extracted from two folders is what the two trees differ by, bit by bit."""
    two = [make_params(CONFIG, seed) for seed in (0, 1)]
    expected = jax.tree.map(np.subtract, *(interop.to_tunix(params, CONFIG) for params in two))
    found = interop.to_tunix(jax.tree.map(np.subtract, *two), CONFIG)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dataclasses.replace(CONFIG, tie_word_embeddings=True), r"(?s)1 leaves.*lm_head/w: surplus"),
        (dataclasses.replace(CONFIG, model_type="mistral"), "Tunix's trees are known for .*, found 'mistral'"),
        (dataclasses.replace(CONFIG, mlp_bias=True), r"(?s)6 parameters .*no place in Tunix's llama.*mlp/gate/bias"),
        (dataclasses.replace(CONFIG, num_hidden_layers=3), r"layers/2/input_layernorm/w: missing"),
        (CONFIGS["qwen3"], r"layers/0/attn/q_norm/w: missing"),
    ],
)
def test_what_has_no_place_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        interop.from_tunix(tunix_state(CONFIG), config)
