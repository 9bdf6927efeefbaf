"""The key tables are complete on both sides and the same in both directions."""

import jax
import numpy as np
import pytest

from tvjax import tree
from tvjax.models.bert import BertConfig, MPNetConfig, RobertaConfig
from tvjax.models.clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from tvjax.models.dinov2 import Dinov2Config
from tvjax.models.families import BERT, CLIP, DINOV2, GEMMA, GPT2, LLAMA, MPNET, ROBERTA, SIGLIP, T5, UMT5, VIT
from tvjax.models.gemma import GemmaConfig
from tvjax.models.gpt2 import GPT2Config
from tvjax.models.key_table import Tensor, check_copies, find_sources, kernels_by_module, to_checkpoint
from tvjax.models.layer_table import KINDS, LayerTable, Row
from tvjax.models.llama import LlamaConfig
from tvjax.models.siglip import SiglipConfig, SiglipTextConfig, SiglipVisionConfig
from tvjax.models.t5 import T5Config, UMT5Config
from tvjax.models.vit import ViTConfig

GEMMA_LAYERS = {"layer_types": ("sliding_attention", "full_attention")}
FAMILIES = {
    "clip": (
        CLIP,
        CLIPConfig(
            CLIPVisionConfig(8, 16, 11, 2, image_size=8, patch_size=4, projection_dim=4),
            CLIPTextConfig(16, 8, 16, 2, 2, max_position_embeddings=6, projection_dim=4),
        ),
    ),
    "dinov2": (DINOV2, Dinov2Config(8, 2, 2, 2, image_size=8, patch_size=4, num_labels=3)),
    "dinov2 gated": (DINOV2, Dinov2Config(8, 2, 2, 2, image_size=8, patch_size=4, use_swiglu_ffn=True)),
    "gemma": (
        GEMMA,
        GemmaConfig(16, 8, 12, 2, 2, 1, 4, **GEMMA_LAYERS, model_type="gemma3_text", tie_word_embeddings=False),
    ),
    "gpt2": (GPT2, GPT2Config(16, 8, 12, 2, 2, max_position_embeddings=6, tie_word_embeddings=False)),
    "llama": (
        LLAMA,
        LlamaConfig(16, 8, 12, 2, 2, 1, 4, attention_bias=True, output_bias=True, mlp_bias=True, qk_norm=True),
    ),
    "siglip": (
        SIGLIP,
        SiglipConfig(
            SiglipVisionConfig(8, 16, 11, 2, image_size=8, patch_size=4),
            SiglipTextConfig(16, 8, 16, 2, 2, max_position_embeddings=6, projection_size=8),
        ),
    ),
    "t5": (T5, T5Config(16, 8, 4, 12, 2, 1, 2)),
    "gated t5": (T5, T5Config(16, 8, 4, 12, 1, 2, 2, is_gated_act=True, tie_word_embeddings=False)),
    "umt5": (UMT5, UMT5Config(16, 8, 4, 12, 1, 1, 2)),
    "gated umt5": (UMT5, UMT5Config(16, 8, 4, 12, 1, 1, 2, is_gated_act=True, tie_word_embeddings=False)),
    "vit": (VIT, ViTConfig(8, 16, 2, 2, image_size=8, patch_size=4)),
    "bert": (BERT, BertConfig(16, 8, 12, 2, 2, max_position_embeddings=6, num_labels=3)),
    "roberta": (ROBERTA, RobertaConfig(16, 8, 12, 2, 2, max_position_embeddings=6, num_labels=3)),
    "mpnet": (MPNET, MPNetConfig(16, 8, 12, 2, 2, max_position_embeddings=6, num_labels=3)),
}


@pytest.fixture(params=sorted(FAMILIES))
def family_and_params(request):
    family, config = FAMILIES[request.param]
    shapes = jax.eval_shape(lambda: family.init(config, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return family, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def headers(tensors):
    return {key: Tensor("F32", array.shape) for key, array in tensors.items()}


def shapes_of(params):
    return {path: leaf.shape for path, leaf in tree.flatten(params).items()}


def test_both_directions(family_and_params):
    family, params = family_and_params
    tensors = to_checkpoint(family.table, params)
    assert sum(array.size for array in tensors.values()) == sum(leaf.size for leaf in tree.flatten(params).values())
    sources = find_sources(family.table, shapes_of(params), headers(tensors), "there")
    for path, source in sources.items():
        np.testing.assert_array_equal(source.to_ours(tensors[source.key]), tree.get(params, path))


def rows_of(family, params):
    """The rows that each parameter outside the second block and its kin can be of, by their paths."""
    rows = [row for row in family.table.rows if not row.tied or row.path == "head"]  # the others only name copies
    paths = {row.path.format(i=0, tower=tower) for row in rows for tower in ("vision", "text")}
    owners = {path: [p for p in paths if any(path == p + leaf.ours for kind in KINDS.values() for leaf in kind)]
              for path in shapes_of(params) if "blocks/" not in path or "blocks/0/" in path}  # fmt: skip
    return paths, owners


def test_every_parameter_is_of_one_row(family_and_params):
    _, owners = rows_of(*family_and_params)
    assert all(len(found) == 1 for found in owners.values())


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_row_is_of_some_model(name):
    family = FAMILIES[name][0]
    used = set()
    for other, config in FAMILIES.values():  # a gated MLP and a plain one are not in one model
        if other is family:
            paths, owners = rows_of(family, jax.eval_shape(lambda c=config: family.init(c, jax.random.key(0))))
            used |= {found[0] for found in owners.values()}
    assert used == paths


def test_one_error_names_all_that_is_wrong(family_and_params):
    family, params = family_and_params
    found = headers(to_checkpoint(family.table, params))
    first, second, third, *_ = (
        key
        for key in found
        if key.endswith(("fc1.weight", "up_proj.weight")) or any(name in key.lower() for name in ("norm", "ln_"))
    )
    del found[first]
    found[second] = Tensor("F32", (3, 5))
    found[third] = Tensor("F8_E4M3", found[third].shape)
    found["adapter.weight"] = Tensor("F32", (1,))
    with pytest.raises(ValueError) as error:
        find_sources(family.table, shapes_of(params), found, "folder")
    message = str(error.value)
    assert message.startswith("the weights of folder do not fit its config.json")
    assert f"missing keys (1): {first}" in message
    assert "surplus keys (1): adapter.weight" in message
    assert f"{second} is [3, 5], expected [" in message
    assert f"{third} is F8_E4M3" in message


def test_known_keys_without_use_are_passed_over(family_and_params):
    family, params = family_and_params
    found = headers(to_checkpoint(family.table, params))
    for pattern in family.table.unused:
        found.setdefault(pattern.format(tower="vision", i=0, path="of/another"), Tensor("I64", (1, 50)))
    find_sources(family.table, shapes_of(params), found, "folder")


def test_a_wrapper_may_be_left_out_but_not_doubled():
    table = LayerTable((Row("a", "wrapper.a", "array"),), wrappers=("wrapper.",))
    assert find_sources(table, {"a": (2,)}, {"a": Tensor("F16", (2,))}, "there")["a"].key == "a"
    with pytest.raises(ValueError, match=r"surplus keys \(1\): wrapper.a"):
        find_sources(table, {"a": (2,)}, {"a": Tensor("F16", (2,)), "wrapper.a": Tensor("F16", (2,))}, "there")


def test_parameters_of_another_model():
    with pytest.raises(ValueError, match="no row of the layer table names the parameter 'vision/adapter'"):
        to_checkpoint(CLIP.table, {"vision": {"adapter": np.zeros(1)}})


def test_a_layer_that_is_tied_to_another_is_read_once():
    rows = (Row("tokens", "tokens", "embedding"), Row("head", "head", "kernel", tied="tokens"))
    table, shape = LayerTable(rows), (5, 2)
    found = {"tokens.weight": Tensor("F32", shape), "head.weight": Tensor("F32", shape)}
    tied = find_sources(table, {"tokens": shape}, found, "there")
    assert tied.keys() == {"tokens"}
    assert find_sources(table, {"tokens": shape, "head/kernel": shape[::-1]}, found, "there").keys() == {
        "tokens",
        "head/kernel",
    }
    same, other = np.ones(shape), np.zeros(shape)
    check_copies(table, tied, found, {"tokens.weight": same, "head.weight": same}.__getitem__, "there")
    with pytest.raises(ValueError, match="there has head.weight and tokens.weight with other values"):
        check_copies(table, tied, found, {"tokens.weight": same, "head.weight": other}.__getitem__, "there")


def test_lora_adapts_linear_layers():
    shapes = {
        path: leaf.shape for path, leaf in tree.flatten(LLAMA.init(FAMILIES["llama"][1], jax.random.key(0))).items()
    }
    found = kernels_by_module(LLAMA.table, shapes)
    assert found["model.layers.1.self_attn.q_proj"] == "blocks/1/attention/query/kernel"
    assert found["lm_head"] == "head/kernel"
    assert set(found.values()) == {path for path in shapes if path.endswith("/kernel")}
