"""LoRA adapters of PEFT: the products of their factors, and everything else refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from tvjax import tree
from tvjax.checkpoints import Pretrained, from_pretrained, load_adapter, load_tree, save_pretrained, streaming
from tvjax.merge.adapters import to_task_vector
from tvjax.models.clip import CLIPConfig, CLIPVisionConfig, clip, init

CONFIG = CLIPConfig(CLIPVisionConfig(8, 16, 2, 2, image_size=8, patch_size=4, projection_dim=4), None)
LAYER = "vision_model.encoder.layers"
SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "fc1"]}
MODULES = {f"{LAYER}.0.self_attn.q_proj": (8, 8, 2), f"{LAYER}.1.mlp.fc1": (8, 16, 3)}
PATHS = {
    f"{LAYER}.0.self_attn.q_proj": "vision/blocks/0/attention/query",
    f"{LAYER}.1.mlp.fc1": "vision/blocks/1/mlp/up",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    save_pretrained(Pretrained(clip(CONFIG, init(CONFIG, jax.random.key(0))), CONFIG), folder)
    return from_pretrained(folder)


def factors(modules=MODULES, prefix="base_model.model."):
    rng = np.random.default_rng(0)
    tensors = {}
    for module, (inputs, outputs, rank) in modules.items():
        tensors[f"{prefix}{module}.lora_A.weight"] = rng.normal(size=(rank, inputs)).astype(np.float32)
        tensors[f"{prefix}{module}.lora_B.weight"] = rng.normal(size=(outputs, rank)).astype(np.float32)
    return tensors


def write(folder, tensors, **changes):
    folder.mkdir(exist_ok=True)
    settings = SETTINGS | {"rank_pattern": {"fc1": 3}} | changes
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("changes", "scales"),
    [
        ({}, (3.0, 2.0)),
        ({"use_rslora": True}, (6 / 2**0.5, 6 / 3**0.5)),
        ({"alpha_pattern": {"layers.1.mlp.fc1": 12, "proj": 1}}, (3.0, 4.0)),
    ],
)
@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_products(base, tmp_path, changes, scales, prefix):
    tensors = factors(prefix=prefix)
    adapters = load_adapter(write(tmp_path / "lora", tensors, **changes), base)
    tau = tree.flatten(to_task_vector(adapters, base.params))
    assert set(tau) == {f"{path}/kernel" for path in PATHS.values()}
    for module, scale in zip(MODULES, scales, strict=True):
        a, b = (tensors[f"{prefix}{module}.lora_{name}.weight"] for name in "AB")
        np.testing.assert_allclose(tau[f"{PATHS[module]}/kernel"], scale * (b @ a).T, rtol=1e-6, atol=1e-6)


def test_the_file_of_an_adapter_is_its_task_vector(base, tmp_path):
    adapter = write(tmp_path / "lora", factors())
    found = streaming.extract_adapter(base.folder, adapter, tmp_path / "tau.safetensors")
    tau, metadata = load_tree(tmp_path / "tau.safetensors")
    expected = tree.flatten(to_task_vector(load_adapter(adapter, base), base.params))
    for path, leaf in tree.flatten(tau).items():
        np.testing.assert_allclose(leaf, expected.pop(path), rtol=1e-6, atol=1e-6)
    assert not expected and found.leaves == 2 and found.parameters == 8 * 8 + 8 * 16
    assert metadata.items() >= base.identity().items() and metadata["finetuned_model"] == str(adapter)
    streaming.apply(base.folder, [tmp_path / "tau.safetensors"], tmp_path / "edited")
    write(tmp_path / "lora", factors(), lora_alpha=7)
    other = streaming.extract_adapter(base.folder, adapter, tmp_path / "other.safetensors")
    assert other.metadata["finetuned_fingerprint"] != metadata["finetuned_fingerprint"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', only LORA"),
        ({"use_dora": True}, r"use_dora is True: .*merge_and_unload"),
        ({"modules_to_save": ["head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"r": 0}, "r is 0, expected a positive number"),
        ({"r": "2"}, "r is '2'"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"rank_pattern": {"(": 2}}, "'\\(' is no pattern"),
        ({"rank_pattern": [3]}, "expected numbers by pattern"),
        ({"rank_pattern": {}}, r"lora_A \(3, 8\) and lora_B \(16, 3\), expected \(2, 8\) and \(16, 2\)"),
    ],
)
def test_settings_that_are_refused(base, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_adapter(write(tmp_path / "lora", factors(), **changes), base)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"base_model.model.head.weight": np.ones(1, np.float32)}, "head.weight: no factor of a linear layer"),
        ({"base_model.model.head.lora_A.weight": np.ones((2, 8), np.float32)}, "head: the model has no such linear"),
        (
            {f"{LAYER}.1.mlp.fc2.lora_A.weight": np.ones((2, 16), np.float32)},
            "fc2: found .*expected one lora_A and one",
        ),
    ],
)
def test_keys_that_are_refused(base, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        load_adapter(write(tmp_path / "lora", factors() | more), base)


def test_folders_that_are_no_adapters(base, tmp_path):
    with pytest.raises(ValueError, match="has no adapter_config.json: is it the folder of a PEFT adapter?"):
        load_adapter(base.folder, base)
    write(tmp_path / "lora", factors())
    (tmp_path / "lora" / "adapter_model.safetensors").rename(tmp_path / "lora" / "adapter_model.bin")
    with pytest.raises(ValueError, match="has no adapter_model.safetensors"):
        load_adapter(tmp_path / "lora", base)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rslora", [False, True])
def test_the_merge_of_peft(base, tmp_path, rslora):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import CLIPVisionModelWithProjection

    model = CLIPVisionModelWithProjection.from_pretrained(base.folder)
    settings = peft.LoraConfig(
        r=2,
        lora_alpha=5,
        use_rslora=rslora,
        target_modules=["q_proj", "fc1"],
        rank_pattern={"fc1": 3},
        alpha_pattern={"layers.0.mlp.fc1": 7},
    )
    model = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "lora")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    streaming.extract_adapter(base.folder, tmp_path / "lora", tmp_path / "tau.safetensors")
    streaming.apply(base.folder, [tmp_path / "tau.safetensors"], tmp_path / "edited")
    edited, merged = (tree.flatten(from_pretrained(tmp_path / name).params) for name in ("edited", "merged"))
    assert edited.keys() == merged.keys()
    for path, leaf in merged.items():
        np.testing.assert_allclose(edited[path], leaf, rtol=1e-5, atol=1e-5)
    assert not jnp.allclose(
        edited["vision/blocks/1/mlp/up/kernel"], base.params["vision"]["blocks"]["1"]["mlp"]["up"]["kernel"]
    )
