"""One battery for every family: it must compute what transformers does, and behave as a model of stages."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tvjax import tree
from tvjax.checkpoints.huggingface import from_pretrained, save_pretrained
from tvjax.checkpoints.reader import open_tensors
from tvjax.models.bert import Bert, BertConfig, MPNetConfig, RobertaConfig
from tvjax.models.clip import CLIP, CLIPConfig
from tvjax.models.dinov2 import Dinov2, Dinov2Config, Dinov2WithRegistersConfig
from tvjax.models.families import family_of_config
from tvjax.models.gemma import Gemma, GemmaConfig
from tvjax.models.gpt2 import GPT2, GPT2Config
from tvjax.models.llama import Llama, LlamaConfig
from tvjax.models.siglip import Siglip, SiglipConfig
from tvjax.models.t5 import T5, T5Config, UMT5Config
from tvjax.models.transformer import parameter_shapes, parameters, set_parameters
from tvjax.models.vit import ViT, ViTConfig
from tvjax.stages import local_params, run_stage

GOLDENS = Path(__file__).parent / "goldens"
CASES = sorted(path.name for path in GOLDENS.iterdir())


@pytest.fixture(scope="module", params=CASES)
def golden(request):
    folder = GOLDENS / request.param
    with np.load(folder / "activations.npz") as file:
        arrays = tree.nest(dict(file))
    return from_pretrained(folder), arrays["in"], arrays["out"]


one_of_each = pytest.mark.parametrize(
    "golden",
    [
        *("clip_quick_gelu", "dinov2_with_registers", "gpt2", "siglip", "vit_without_qkv_bias", "qwen2", "qwen3"),
        *("bert_classifier", "mpnet", "t5", "umt5", "gemma2_untied"),
    ],
    indirect=True,
)
MODULES = {
    CLIPConfig: CLIP,
    Dinov2Config: Dinov2,
    Dinov2WithRegistersConfig: Dinov2,
    GemmaConfig: Gemma,
    GPT2Config: GPT2,
    LlamaConfig: Llama,
    SiglipConfig: Siglip,
    T5Config: T5,
    UMT5Config: T5,
    ViTConfig: ViT,
}
MODULES |= dict.fromkeys((BertConfig, RobertaConfig, MPNetConfig), Bert)
CARRIED = {"encoder": "encoder_hidden", "decoder": "decoder_hidden"}  # by tower; "hidden" of all others


def module_of(pretrained, dtype=jnp.float32):
    return MODULES[type(pretrained.config)](pretrained.config, dtype, rngs=nnx.Rngs(0))


def tower_of(stage):
    """The name of a stage's hidden states in the goldens: a language model is a text tower."""
    tower = stage.name.split("/")[0]
    return tower if tower in ("vision", "text", *CARRIED) else "text"


def test_outputs_are_those_of_transformers(golden, assert_equal_at_tokens):
    pretrained, inputs, expected = golden
    outputs = pretrained.model(inputs)
    names = outputs.keys() & expected.keys()
    assert names == outputs.keys()
    for name in names:
        assert_equal_at_tokens(outputs[name], expected[name], inputs, name)


def test_normalised_embeddings_are_those_of_transformers(golden):
    pretrained, inputs, expected = golden
    outputs = pretrained.model(inputs)
    for name in ("image", "text"):
        if f"{name}_normalised" in expected:
            embeddings = outputs[name] / jnp.linalg.norm(outputs[name], axis=-1, keepdims=True)
            np.testing.assert_allclose(embeddings, expected[f"{name}_normalised"], rtol=1e-5, atol=1e-5)


def test_hidden_states_are_those_of_transformers(golden, assert_equal_at_tokens):
    pretrained, inputs, expected = golden
    carry = inputs
    towers = {tower_of(stage) for stage in pretrained.model.stages if stage.group}
    seen = dict.fromkeys(towers, 0)
    for stage in pretrained.model.stages:
        carry = run_stage(stage.function, local_params(stage, pretrained.params), carry)
        entered = [tower for tower in CARRIED if stage.name == "embeddings" and CARRIED[tower] in carry]
        for tower in entered or [tower_of(stage)]:
            name = CARRIED.get(tower, "hidden")
            if name in carry and stage.name != "encoder/final_norm":
                hidden = expected[f"{tower}_hidden"][str(seen[tower])]
                assert_equal_at_tokens(carry[name], hidden, inputs, stage.name, atol=2e-5)
                assert stage.stream(name).tokens in (None, hidden.shape[1])
                seen[tower] += 1
    assert seen == {tower: len(expected[f"{tower}_hidden"]) for tower in towers}


@one_of_each
def test_stages_equal_the_module(golden):
    pretrained, inputs, _ = golden
    module = module_of(pretrained)
    set_parameters(module, pretrained.params)
    chex.assert_trees_all_equal(parameters(module), pretrained.params)
    chex.assert_trees_all_close(module(inputs), pretrained.model(inputs), rtol=1e-5, atol=1e-5)


@one_of_each
def test_jit_equals_eager(golden):
    pretrained, inputs, _ = golden
    with jax.disable_jit():
        eager = pretrained.model(inputs)
    chex.assert_trees_all_close(jax.jit(lambda model: model(inputs))(pretrained.model), eager, rtol=1e-5, atol=1e-5)


@one_of_each
def test_blocks_of_one_shape_are_compiled_once(golden):
    pretrained, inputs, _ = golden
    model = pretrained.model
    functions = {stage.function for stage in model.stages}
    assert len(functions) < len(model.stages)
    batches = 2 + sorted(CASES).index(pretrained.folder.name)  # a batch size that nothing else uses
    fresh = jax.tree.map(lambda x: np.concatenate([x] * batches), inputs)
    before = run_stage._cache_size()
    model(fresh)
    assert run_stage._cache_size() - before == len(functions)


@one_of_each
def test_building_again_gives_the_same_functions(golden):
    pretrained, _, _ = golden
    build = family_of_config(pretrained.config).build
    assert build(pretrained.config, pretrained.params).stages == pretrained.model.stages
    assert build(pretrained.config, pretrained.params, jnp.bfloat16).stages != pretrained.model.stages


@one_of_each
def test_blocks_run_under_scan_and_vmap(golden, assert_equal_at_tokens):
    pretrained, inputs, expected = golden
    blocks = [stage for stage in pretrained.model.stages if stage.group == pretrained.model.stages[1].group]
    blocks = [stage for stage in blocks if stage.function is blocks[0].function]
    tower = tower_of(blocks[0])
    hidden, name = jnp.asarray(expected[f"{tower}_hidden"]["0"]), CARRIED.get(tower, "hidden")
    carry = {name: hidden} | ({"mask": jnp.asarray(inputs["mask"])} if tower != "vision" else {})
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(local_params(stage, pretrained.params) for stage in blocks))
    function = blocks[0].function
    scanned, _ = jax.lax.scan(lambda carry, params: (function(params, carry), None), carry, stacked)
    assert_equal_at_tokens(scanned[name], expected[f"{tower}_hidden"][str(len(blocks))], inputs, tower, atol=2e-5)
    mapped = jax.vmap(function, in_axes=(0, None))(stacked, carry)
    first = function(local_params(blocks[0], pretrained.params), carry)
    np.testing.assert_allclose(mapped[name][0], first[name], rtol=1e-5, atol=1e-5)


@one_of_each
def test_every_parameter_has_a_gradient(golden):
    pretrained, inputs, _ = golden

    def loss(params):
        outputs = pretrained.model.replace(params=params)(inputs)
        name = next(name for name in ("logits_per_image", "logits", "image", "text") if name in outputs)
        return jnp.sum(outputs[name] ** 2)

    gradients = tree.flatten(jax.grad(loss)(pretrained.params))
    dead = {path for path, gradient in gradients.items() if not np.any(gradient)}
    unread = ("attention/key/bias", "mask_token")  # softmax takes no notice of the first, pre-training left the second
    assert all(path.endswith(unread) for path in dead)


def test_round_trip_keeps_every_bit(golden, tmp_path):
    pretrained, _, _ = golden
    save_pretrained(pretrained, tmp_path / "saved")
    again = from_pretrained(tmp_path / "saved")
    assert again.config == pretrained.config
    chex.assert_trees_all_equal(again.params, pretrained.params)
    with (
        open_tensors(pretrained.folder / "model.safetensors") as before,
        open_tensors(tmp_path / "saved" / "model.safetensors") as after,
    ):
        wrapped = {key.split(".", 1)[-1] if key not in before.headers else key: key for key in after.headers}
        assert wrapped.keys() == before.headers.keys()
        for key, name in wrapped.items():
            np.testing.assert_array_equal(before.read(key), after.read(name))


@one_of_each
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_parameters_of_16_bits_keep_their_dtype_and_are_computed_in_float32(golden, tmp_path, dtype):
    pretrained, inputs, _ = golden
    small = pretrained.with_params(jax.tree.map(lambda x: x.astype(dtype), pretrained.params))
    save_pretrained(small, tmp_path / "saved")
    again = from_pretrained(tmp_path / "saved")
    chex.assert_trees_all_equal(again.params, small.params)
    widened = pretrained.with_params(jax.tree.map(lambda x: x.astype(jnp.float32), small.params))
    chex.assert_trees_all_close(again.model(inputs), widened.model(inputs), rtol=1e-5, atol=1e-5)


@one_of_each
def test_compute_dtype_is_separate(golden):
    pretrained, inputs, _ = golden
    outputs = from_pretrained(pretrained.folder, dtype=jnp.bfloat16).model(inputs)
    for name, value in pretrained.model(inputs).items():
        assert outputs[name].dtype == jnp.float32
        np.testing.assert_allclose(outputs[name], value, atol=0.1 * float(jnp.abs(value).max()))


def test_parameters_of_the_module_have_the_paths_of_the_stages(golden):
    pretrained, _, _ = golden
    shapes = jax.eval_shape(lambda: parameters(module_of(pretrained)))
    chex.assert_trees_all_equal_shapes(shapes, pretrained.params)
    assert parameter_shapes(pretrained.model.stages) == {
        path: leaf.shape for path, leaf in tree.flatten(pretrained.params).items()
    }


@one_of_each
def test_a_carry_passes_through_what_is_not_the_models(golden):
    pretrained, inputs, _ = golden
    outputs = pretrained.model(inputs | {"labels": np.arange(3)})
    np.testing.assert_array_equal(outputs["labels"], np.arange(3))
    gone = {"pixels", "tokens", "mask", "hidden", "end", "decoder_tokens", "decoder_mask", *CARRIED.values()}
    assert not gone & outputs.keys()


def test_inputs_in_shapes_are_what_the_model_takes(golden):
    pretrained, inputs, expected = golden
    shapes = family_of_config(pretrained.config).inputs(pretrained.config, 2)
    assert {name: leaf.dtype for name, leaf in shapes.items()} == {name: leaf.dtype for name, leaf in inputs.items()}
    outputs = jax.eval_shape(pretrained.model, shapes)
    assert {name: leaf.ndim for name, leaf in outputs.items()} == {name: expected[name].ndim for name in outputs}
