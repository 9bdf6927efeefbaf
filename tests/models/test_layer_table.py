"""What a family's layer table says of the axes of its leaves and of the outputs of its stages."""

import jax
import pytest

from tvjax import tree
from tvjax.models.bert import BertConfig, MPNetConfig, RobertaConfig
from tvjax.models.clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from tvjax.models.dinov2 import Dinov2Config, Dinov2WithRegistersConfig
from tvjax.models.families import family_of_config
from tvjax.models.gemma import GemmaConfig
from tvjax.models.gpt2 import GPT2Config
from tvjax.models.layer_table import Space, fix_outputs, in_towers, spaces_of
from tvjax.models.llama import LlamaConfig
from tvjax.models.siglip import SiglipConfig, SiglipTextConfig, SiglipVisionConfig
from tvjax.models.t5 import T5Config, UMT5Config
from tvjax.models.transformer import stage_function
from tvjax.models.vit import ViT, ViTConfig
from tvjax.stages import Stage, owner_paths

CONFIGS = {
    "clip": CLIPConfig(
        CLIPVisionConfig(8, 16, 2, 2, image_size=8, patch_size=4, projection_dim=4),
        CLIPTextConfig(16, 12, 16, 2, 4, max_position_embeddings=6, projection_dim=4),
    ),
    "dinov2": Dinov2Config(8, 2, 2, 2, image_size=8, patch_size=4, use_swiglu_ffn=True, num_labels=3),
    "dinov2 backbone": Dinov2WithRegistersConfig(8, 2, 2, 2, image_size=8, patch_size=4),
    "gemma": GemmaConfig(
        *(16, 8, 12, 2, 4, 2, 6),
        attention_bias=True,
        tie_word_embeddings=False,
        layer_types=("sliding_attention", "full_attention"),
        model_type="gemma3_text",
    ),
    "gpt2": GPT2Config(16, 8, 12, 2, 4, max_position_embeddings=6),
    "llama": LlamaConfig(16, 8, 12, 2, 4, 2, head_dim=6, attention_bias=True, mlp_bias=True, qk_norm=True),
    "siglip": SiglipConfig(
        SiglipVisionConfig(8, 16, 2, 2, image_size=8, patch_size=4),
        SiglipTextConfig(16, 12, 16, 2, 4, max_position_embeddings=6, projection_size=8),
    ),
    "tied llama": LlamaConfig(16, 8, 12, 2, 4, 4, head_dim=6, tie_word_embeddings=True),
    "t5": T5Config(16, 8, 4, 12, 2, 1, 3, tie_word_embeddings=False),
    "tied t5": T5Config(16, 8, 4, 12, 1, 2, 3, is_gated_act=True),
    "umt5": UMT5Config(16, 8, 4, 12, 2, 1, 3),
    "vit": ViTConfig(8, 16, 2, 2, image_size=8, patch_size=4),
    "bert": BertConfig(16, 8, 12, 2, 2, max_position_embeddings=6),
    "roberta classifier": RobertaConfig(16, 8, 12, 2, 2, max_position_embeddings=6, num_labels=3),
    "mpnet": MPNetConfig(16, 8, 12, 2, 2, max_position_embeddings=6),
}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def shapes_of(config):
    family = family_of_config(config)
    return tree.flatten(jax.eval_shape(lambda: family.init(config, jax.random.key(0))))


def test_every_axis_is_named_and_axes_of_one_space_are_of_one_size(config):
    table, sizes = family_of_config(config).table, {}
    for path, leaf in shapes_of(config).items():
        spaces = spaces_of(table, config, path)
        assert len(spaces) == leaf.ndim, path
        for space, size in zip(spaces, leaf.shape, strict=True):
            if space is not None:
                assert sizes.setdefault(space, size) == size, path
                assert space.heads == 0 or size % space.heads == 0, path
    assert any(space.heads for space in sizes)


def test_heads_of_grouped_queries():
    config = CONFIGS["llama"]
    query, key, value, out = (
        spaces_of(family_of_config(config).table, config, f"blocks/1/attention/{name}/kernel")
        for name in ("query", "key", "value", "out")
    )
    assert query == (Space("residual"), Space("blocks/1/heads:query_key", 4, rotary=True))
    assert key == (Space("residual"), Space("blocks/1/heads:query_key", 2, rotary=True))
    assert value == (Space("residual"), Space("blocks/1/heads:value_out", 2))
    assert out == (Space("blocks/1/heads:value_out", 4), Space("residual"))


def test_heads_that_share_a_table_of_position_biases_are_exchanged_together():
    tables = {name: family_of_config(CONFIGS[name]).table for name in ("t5", "umt5")}
    for block in (0, 1):
        path = f"encoder/blocks/{block}/attention/query/kernel"
        joint, own = (spaces_of(table, CONFIGS[name], path)[1] for name, table in tables.items())
        assert joint == Space(f"encoder/heads:{block}/query_key", 3)
        assert own == Space(f"encoder/blocks/{block}/heads:query_key", 3)
    assert spaces_of(tables["t5"], CONFIGS["t5"], "encoder/position_bias") == (None, Space("encoder/heads:bias", 3))


def test_stages_say_the_heads_of_the_table(config):
    family, seen = family_of_config(config), set()
    model, params = family.build(config, {}), tree.nest(shapes_of(config))
    for stage in model.stages:
        owners = owner_paths(stage, params)
        for local, (_, outputs) in stage.heads:
            path = owners[local]
            space = spaces_of(family.table, config, path)[-1]
            if outputs is not None and not outputs.shared:
                assert (outputs.number, bool(outputs.frequencies)) == (space.heads, space.rotary), path
            seen.add(path)
    headed = [path for path in shapes_of(config) if any(s and s.heads for s in spaces_of(family.table, config, path))]
    assert set(headed) <= seen and all(path in headed or path.endswith("norm/scale") for path in seen)
    groups = {stage.heads for stage in model.stages if stage.group.endswith("blocks")}
    assert len(groups) == len({stage.group for stage in model.stages if stage.group})  # alike in every block


def test_norms_inside_heads_share_a_map_and_a_vocabulary_has_a_kernel():
    models = {name: family_of_config(CONFIGS[name]).build(CONFIGS[name], {}) for name in ("llama", "tied llama")}
    norm = dict(models["llama"].stages[1].heads)["attention/key_norm/scale"][1]
    assert (norm.number, len(norm.frequencies), norm.shared) == (2, 3, True)
    assert models["llama"].stages[-1].vocabulary == (("head/kernel", "head/kernel"),)
    assert models["tied llama"].stages[-1].vocabulary == (("head/kernel", "tokens"),)


def test_heads_are_those_of_the_tower():
    config = CONFIGS["clip"]
    table = family_of_config(config).table
    for tower, heads in (("vision", 2), ("text", 4)):
        _, space = spaces_of(table, config, f"{tower}/blocks/0/attention/query/kernel")
        assert space == Space(f"{tower}/blocks/0/heads:query_key", heads)


def test_the_rows_of_towers_are_those_that_the_model_has():
    config = CONFIGS["clip"]
    table = family_of_config(config).table
    rows = {row.path for row in in_towers(table, CLIPConfig(None, config.text)).rows}
    assert "text/blocks/{i}/norm1" in rows and not any("tower" in row or "vision" in row for row in rows)
    assert len(in_towers(table, config).rows) == 8 * 2 + 11


@pytest.mark.parametrize(
    ("name", "fixed"),
    [
        ("clip", {}),
        ("siglip", {}),
        ("vit", {"head": ("head/kernel", "head/bias")}),
        ("dinov2", {"head": ("head/class_token/kernel", "head/patches/kernel", "head/bias")}),
        ("dinov2 backbone", {}),
        ("gpt2", {"head": ("tokens",)}),
        ("llama", {"head": ("head/kernel",)}),
        ("tied llama", {"head": ("tokens",)}),
        ("bert", {}),
        ("roberta classifier", {"head": ("out/kernel", "out/bias")}),
        ("t5", {"head": ("head/kernel",)}),
        ("tied t5", {"head": ("tokens",)}),
    ],
)
def test_outputs_that_have_a_meaning_are_fixed_where_they_are_computed(name, fixed):
    stages = family_of_config(CONFIGS[name]).build(CONFIGS[name], {}).stages
    assert {stage.name: stage.fixed for stage in stages if stage.fixed} == fixed


def test_a_model_of_one_stage_has_fixed_outputs_too():
    config = CONFIGS["vit"]
    whole = Stage("model", stage_function(ViT, config), (("", ""),))
    assert fix_outputs(family_of_config(config).table, [whole])[0].fixed == ("head/kernel", "head/bias")


def test_a_parameter_of_another_model():
    with pytest.raises(ValueError, match="no row of the layer table names the parameter 'vision/adapter'"):
        spaces_of(family_of_config(CONFIGS["vit"]).table, CONFIGS["vit"], "vision/adapter")
