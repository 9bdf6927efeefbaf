"""What is DINOv2's own: its classifier, positions for other sizes, backbones, gated MLPs, registers."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tvjax import Batch, Stream, fit, leaf_report, theseus, tree
from tvjax.align.tokens import alignment
from tvjax.checkpoints import from_pretrained, load_adapter, save_pretrained
from tvjax.models import vit
from tvjax.models.dinov2 import Dinov2Config, Dinov2WithRegistersConfig, dinov2, init
from tvjax.models.dinov2.positions import resized

GOLDENS = Path(__file__).parent / "goldens"
CONFIG = Dinov2Config(8, 2, 2, 2, image_size=8, patch_size=4, num_labels=3)
BACKBONE = dataclasses.replace(CONFIG, num_labels=None)
REGISTERS = Dinov2WithRegistersConfig(8, 2, 2, 2, image_size=8, patch_size=4, num_register_tokens=3)


def make_model(config, seed=0):
    """No bias is zero, no scale one."""
    random = np.random.default_rng(seed)
    params = init(config, jax.random.key(seed))
    return dinov2(
        config,
        jax.tree.map(lambda x: jax.device_put(np.asarray(x) + np.float32(0.3 * random.normal(size=x.shape))), params),
    )


def pixels(side=8, count=5):
    return {"pixels": jnp.asarray(np.random.default_rng(0).normal(size=(count, side, side, 3)), jnp.float32)}


def test_stages():
    stages = {stage.name: stage for stage in make_model(CONFIG).stages}
    assert stages["vision/blocks/1"].streams == Stream(special=1, grid=(2, 2))
    assert stages["head"].fixed == ("head/class_token/kernel", "head/patches/kernel", "head/bias")
    assert stages["vision/blocks/0"].function is stages["vision/blocks/1"].function
    assert dinov2(REGISTERS, {}).stages[1].streams == Stream(special=4, grid=(2, 2))


def test_the_classifier_is_one_kernel_of_both_in_a_checkpoint(tmp_path):
    pretrained = from_pretrained(GOLDENS / "dinov2")
    whole = load_file(GOLDENS / "dinov2" / "model.safetensors")["classifier.weight"].T
    head = pretrained.params["head"]
    np.testing.assert_array_equal(np.concatenate([head["class_token"]["kernel"], head["patches"]["kernel"]]), whole)
    save_pretrained(pretrained, tmp_path / "saved")
    np.testing.assert_array_equal(load_file(tmp_path / "saved" / "model.safetensors")["classifier.weight"].T, whole)


def test_an_adapter_of_the_classifier_is_one_of_each_half(tmp_path):
    random = np.random.default_rng(0)
    a, b = (random.normal(size=shape).astype(np.float32) for shape in ((2, 48), (5, 2)))
    prefix = "base_model.model.classifier.lora_"
    save_file({f"{prefix}A.weight": a, f"{prefix}B.weight": b}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    found = load_adapter(tmp_path, from_pretrained(GOLDENS / "dinov2"))
    halves = [found[f"head/{name}/kernel"] for name in ("class_token", "patches")]
    np.testing.assert_allclose(np.concatenate([half.a @ half.b for half in halves]), (b @ a).T, rtol=1e-5, atol=1e-6)


def test_a_backbone_returns_its_class_token():
    model = make_model(BACKBONE)
    outputs = model(pixels())
    assert outputs.keys() == {"image"} and outputs["image"].shape == (5, 8) and outputs["image"].dtype == jnp.float32
    assert not any(stage.fixed for stage in model.stages)


def test_images_of_other_sizes_have_positions():
    for config in (CONFIG, dataclasses.replace(REGISTERS, num_labels=3)):
        model = make_model(config)
        assert model(pixels(20))["logits"].shape == (5, 3)
        assert model({"pixels": jnp.zeros((2, 9, 17, 3))})["logits"].shape == (2, 3)
        with pytest.raises(ValueError, match=r"pixels have shape \(1, 3, 8, 8\), expected \(batch, height, width, 3\)"):
            model({"pixels": jnp.zeros((1, 3, 8, 8))})
        with pytest.raises(ValueError, match="of 4 pixels or more a side"):
            model({"pixels": jnp.zeros((1, 3, 8, 3))})


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("grid", "wanted"), [((5, 5), (3, 4)), ((3, 4), (7, 6))])
def test_resized_positions(grid, wanted, antialias):
    ones = resized(jnp.ones((grid[0] * grid[1], 2)), grid, wanted, antialias)
    np.testing.assert_allclose(ones, np.ones((wanted[0] * wanted[1], 2)), atol=1e-6)
    table = jnp.asarray(np.random.default_rng(0).normal(size=(grid[0] * grid[1], 2)), jnp.float32)
    np.testing.assert_allclose(resized(table, grid, grid, antialias), table, atol=1e-6)
    across = resized(table.reshape(*grid, 2).swapaxes(0, 1).reshape(-1, 2), grid[::-1], wanted[::-1], antialias)
    found = resized(table, grid, wanted, antialias)
    np.testing.assert_allclose(across.reshape(*wanted[::-1], 2).swapaxes(0, 1).reshape(-1, 2), found, atol=1e-5)


def test_rows_of_images_of_another_size_are_aligned():
    declared, registers = Stream(special=1, grid=(37, 37)), Stream(special=5, grid=(37, 37))
    assert alignment(declared, declared, 257, 257) == (None, None)
    found = alignment(declared, registers, 257, 261)
    assert found.a is not None and found.a.shape == (257, 257) and found.b is not None and found.b.shape == (257, 261)
    assert alignment(declared, Stream(special=1, grid=(14, 14)), 257, 197).a.shape == (197, 257)
    with pytest.raises(ValueError, match="tokens cannot be aligned"):
        alignment(declared, declared, 257, 200)


@pytest.mark.parametrize("target", [dataclasses.replace(REGISTERS, hidden_size=12), Dinov2Config(12, 3, 3, 2, 12, 4)])
def test_a_backbone_moves_without_labels_on_images_of_another_size(target):
    source, into = make_model(dataclasses.replace(CONFIG, image_size=20)), make_model(target, 1)
    rebase = theseus()
    state = fit(rebase, source, into, [(Batch(pixels(8)), Batch(pixels(16)))])
    moved = tree.flatten(rebase.apply(state, jax.tree.map(jnp.ones_like, source.params)))
    actions = {leaf.target: leaf.action for leaf in leaf_report(state) if leaf.target}
    for path in tree.flatten(into.params):
        if "blocks/" in path and path.endswith(("kernel", "scale")):
            assert actions[path] == "rotated" and np.any(moved[path]), path


def test_a_vit_moves_into_a_dinov2_where_their_layers_have_one_name():
    config = vit.ViTConfig(12, 16, 3, 3, image_size=8, patch_size=4, num_labels=3)
    source, target = vit.vit(config, vit.init(config, jax.random.key(0))), make_model(BACKBONE)
    rebase = theseus()
    state = fit(rebase, source, target, [(Batch(pixels()),) * 2])
    actions = {leaf.target: leaf.action for leaf in leaf_report(state) if leaf.target}
    assert actions["vision/blocks/1/mlp/up/kernel"] == "rotated"
    assert actions["vision/blocks/1/layer_scale1/scale"] == "unmatched"  # a ViT has none


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        BACKBONE,
        REGISTERS,
        dataclasses.replace(CONFIG, use_swiglu_ffn=True, use_mask_token=False, qkv_bias=False),
    ],
)
def test_configs_round_trip(config):
    assert type(config).from_dict(config.to_dict()) == config


def test_what_a_config_leaves_out():
    assert Dinov2Config.from_dict({"model_type": "dinov2"}) == Dinov2Config()
    assert Dinov2WithRegistersConfig.from_dict({"model_type": "dinov2_with_registers"}).patch_size == 16
    giant = Dinov2Config(1536, mlp_ratio=4, use_swiglu_ffn=True)
    assert giant.intermediate_size == 4096
    names = {"0": "cat", "1": "dog", "2": "owl"}
    head = {"model_type": "dinov2", "architectures": ["Dinov2ForImageClassification"]}
    assert Dinov2Config.from_dict({**head, "id2label": names}).num_labels == 3
    assert Dinov2Config.from_dict(head).num_labels == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architectures": ["Dinov2Backbone"]}, "architecture 'Dinov2Backbone' is not supported, only Dinov2Model and"),
        ({"image_size": [8, 16]}, r"image_size is \[8, 16\], expected a square"),
        ({"mlp_ratio": "4"}, "mlp_ratio is '4', expected int"),
        ({"num_channels": 1}, "num_channels is 1, expected 3"),
    ],
)
def test_unsupported_configs(settings, message):
    with pytest.raises(ValueError, match=message):
        Dinov2Config.from_dict({"model_type": "dinov2", **settings})
