"""LoRA adapters of PEFT: the products of their factors, and everything else refused."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from tvjax import tree
from tvjax.checkpoints import Pretrained, from_pretrained, load_adapter, load_tree, save_pretrained, streaming
from tvjax.checkpoints.adapters import open_adapter
from tvjax.merge.adapters import to_task_vector
from tvjax.models.clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, clip, init
from tvjax.models.vit import ViTConfig, modeling, vit

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


def decomposed(kind, kernel, rank, scale):
    """What PEFT takes out of a weight ``[out, in]`` before training, by its formulas."""
    if kind == "pissa":
        u, s, vt = np.linalg.svd(kernel, full_matrices=False)
        root = np.sqrt(s[:rank] / scale)
        return root[:, None] * vt[:rank], u[:, :rank] * root
    q, r = np.linalg.qr(kernel)
    return r[:rank], q[:, :rank]


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_an_initialisation_that_was_taken_out_of_the_base_is_no_change(base, tmp_path, kind):
    """Issue: alpha/r B A is not the change there, but alpha/r (B A - B_0 A_0)."""
    kernels = {path: np.asarray(tree.get(base.params, f"{path}/kernel")) for path in PATHS.values()}
    start, trained, changes = {}, {}, {}
    rng = np.random.default_rng(1)
    for (module, (*_, rank)), scale in zip(MODULES.items(), (3.0, 2.0), strict=True):
        a, b = decomposed(kind, kernels[PATHS[module]].T, rank, scale)
        step = 0.1 * rng.normal(size=b.shape).astype(np.float32)
        for tensors, factor in ((start, b), (trained, b + step)):
            tensors[f"{module}.lora_A.weight"] = a.astype(np.float32)
            tensors[f"{module}.lora_B.weight"] = factor.astype(np.float32)
        changes[PATHS[module]] = scale * (step @ a).T
    write(tmp_path / "start", start, init_lora_weights=kind)
    write(tmp_path / "trained", trained, init_lora_weights=kind)
    untouched = to_task_vector(load_adapter(tmp_path / "start", base), base.params)
    assert float(tree.norm(untouched)) < 1e-5
    streaming.extract_adapter(base.folder, tmp_path / "trained", tmp_path / "tau.safetensors")
    tau = load_tree(tmp_path / "tau.safetensors")[0]
    for path, change in changes.items():
        np.testing.assert_allclose(tree.get(tau, f"{path}/kernel"), change, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda', .*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights is 'lora_ga'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"init_lora_weights": "of next year"}, "init_lora_weights is 'of next year'"),
        ({"use_of_next_year": {"rate": 1}}, "use_of_next_year is .*: what that does .*merge_and_unload"),
        ({"kasa_config": {"beta": 1}}, "kasa_config is"),
        ({"rank_pattern": {"fc1": 0}}, "ranks from 1 on"),
    ],
)
def test_only_settings_that_are_known_are_read(base, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_adapter(write(tmp_path / "lora", factors(), **changes), base)


def test_settings_of_training_alone_do_not_matter(base, tmp_path):
    plain = load_adapter(write(tmp_path / "lora", factors()), base)
    more = {"lora_dropout": 0.1, "task_type": "FEATURE_EXTRACTION", "eva_config": {"rho": 2}, "use_dora": False}
    more |= {"init_lora_weights": "eva", "megatron_config": None, "alora_invocation_tokens": None}
    same = load_adapter(write(tmp_path / "lora", factors(), **more), base)
    assert tree.norm(to_task_vector(plain, base.params)) == tree.norm(to_task_vector(same, base.params))


TOWER = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module", params=[8, 12], ids=["equal towers", "unlike towers"])
def both_towers(request, tmp_path_factory):
    """A CLIP whose vision tower is as wide as its text tower, or wider."""
    vision = CLIPVisionConfig(**TOWER | {"hidden_size": request.param}, image_size=8, patch_size=4, projection_dim=4)
    text = CLIPTextConfig(20, **TOWER, max_position_embeddings=6, eos_token_id=19, projection_dim=4)
    config = CLIPConfig(vision, text)
    folder = tmp_path_factory.mktemp("both") / "model"
    save_pretrained(Pretrained(clip(config, init(config, jax.random.key(0))), config), folder)
    return from_pretrained(folder)


def towers_of(adapters):
    return {path.split("/")[0] for path in adapters}


BARE = {"encoder.layers.0.self_attn.q_proj": (8, 8, 2), "encoder.layers.1.mlp.fc1": (8, 16, 3)}


def test_a_tower_that_was_trained_alone_is_the_one_that_the_config_names(both_towers, tmp_path):
    """Recent transformers leave the tower out of the names of its modules."""
    for name, tower in (("CLIPTextModel", "text"), ("CLIPVisionModel", "vision")):
        width = both_towers.config.vision.hidden_size if tower == "vision" else 8
        modules = {module: (width, 16 if "fc1" in module else width, r) for module, (*_, r) in BARE.items()}
        mapping = {"base_model_class": name, "parent_library": "transformers.models.clip.modeling_clip"}
        adapter = write(tmp_path / name, factors(modules), auto_mapping=mapping)
        assert towers_of(load_adapter(adapter, both_towers)) == {tower}


def test_where_no_class_is_named_the_sizes_decide_or_it_is_refused(both_towers, tmp_path):
    adapter = write(tmp_path / "lora", factors(BARE))
    if both_towers.config.vision.hidden_size == 8:
        with pytest.raises(ValueError, match=r'fits text and vision alike.*"auto_mapping".*CLIPTextModel'):
            load_adapter(adapter, both_towers)
    else:
        assert towers_of(load_adapter(adapter, both_towers)) == {"text"}
    full = {f"text_model.{module}": size for module, size in BARE.items()}
    assert towers_of(load_adapter(write(tmp_path / "full", factors(full)), both_towers)) == {"text"}


def test_a_tower_that_the_model_lacks_is_refused(base, tmp_path):
    adapter = write(tmp_path / "lora", factors(BARE), auto_mapping={"base_model_class": "CLIPTextModel"})
    with pytest.raises(ValueError, match="the model has no such linear layer"):
        load_adapter(adapter, base)


def test_the_base_that_the_config_names(base, tmp_path):
    def notes(named, **more):
        adapter = write(tmp_path / "lora", factors(), base_model_name_or_path=named)
        with open_adapter(adapter, base, **more) as opened:
            return opened.notes

    assert notes(str(base.folder)) == notes(f"{base.folder}/") == ()
    assert "names no base model" in notes(None)[0]
    assert "nothing shows" in notes("/no/longer/there")[0]
    assert "nothing shows" in notes("openai/clip-vit-base-patch32")[0]  # it may be the folder that is given
    shutil.copytree(base.folder, tmp_path / "moved")
    assert notes(str(tmp_path / "moved")) == ()
    other = tree.map_with_path(lambda path, leaf: leaf + 1 if path.endswith("post_norm/bias") else leaf, base.params)
    save_pretrained(base.with_params(other), tmp_path / "other")
    with pytest.raises(ValueError, match=r"trained on '.*other', and .* \(vision/post_norm/bias differs\).*--any-base"):
        notes(str(tmp_path / "other"))
    assert "another base" in notes(str(tmp_path / "other"), any_base=True)[0]


def test_two_hub_ids(base, tmp_path):
    ours = dataclasses.replace(base, name="openai/clip-vit-base-patch32", revision=40 * "b", folder=None)
    cached = "/home/me/.cache/models--openai--clip-vit-base-patch32/snapshots/" + 40 * "a"

    def read(named, **more):
        adapter = write(tmp_path / "lora", factors(), base_model_name_or_path=named, **more)
        with open_adapter(adapter, ours) as opened:
            return opened.notes

    assert read("openai/clip-vit-base-patch32") == read(cached) == ()
    assert read("openai/clip-vit-base-patch32", revision="main") == ()
    assert f"is at {ours.revision}" in read("openai/clip-vit-base-patch32", revision=40 * "c")[0]
    with pytest.raises(ValueError, match="trained on 'laion/CLIP-B', and 'openai/clip-vit-base-patch32' is another"):
        read("laion/CLIP-B")


def test_a_note_on_the_base_is_stamped(base, tmp_path):
    adapter = write(tmp_path / "lora", factors(), base_model_name_or_path="/no/longer/there")
    found = streaming.extract_adapter(base.folder, adapter, tmp_path / "tau.safetensors")
    _, metadata = load_tree(tmp_path / "tau.safetensors")
    assert metadata["adapter_base_model"] == "/no/longer/there" and metadata["notes"] == found.notes[0]


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


def trained_by_peft(model, folder, **settings):
    """Trains nothing, but moves the factors, and saves the adapter as PEFT does by default."""
    import peft
    import torch

    settings = {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "fc1"]} | settings
    model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init_lora_weights", [True, False, "gaussian", "orthogonal", "eva", "mica", "pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_every_initialisation_that_is_read_is_what_peft_merges(base, tmp_path, init_lora_weights, rslora):
    peft = pytest.importorskip("peft")
    from transformers import CLIPVisionModelWithProjection as Model

    settings = {"init_lora_weights": init_lora_weights, "use_rslora": rslora}
    if init_lora_weights != "orthogonal":  # of even ranks only
        settings |= {"rank_pattern": {"fc1": 3}}
    trained_by_peft(Model.from_pretrained(base.folder), tmp_path / "lora", **settings)
    merged = peft.PeftModel.from_pretrained(Model.from_pretrained(base.folder), tmp_path / "lora").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    streaming.extract_adapter(base.folder, tmp_path / "lora", tmp_path / "tau.safetensors")
    streaming.extract(base.folder, tmp_path / "merged", tmp_path / "expected.safetensors")
    (tau, about), (expected, _) = (load_tree(tmp_path / f"{name}.safetensors") for name in ("tau", "expected"))
    assert "notes" not in about
    for path, leaf in tree.flatten(tau).items():
        np.testing.assert_allclose(leaf, tree.get(expected, path), atol=1e-5)
    assert tree.norm(tau) > 0.01


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_the_conversion_of_peft_is_the_same_change(base, tmp_path, kind):
    peft = pytest.importorskip("peft")
    import torch
    from transformers import CLIPVisionModelWithProjection as Model

    settings = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "fc1"], init_lora_weights=kind)
    model = peft.get_peft_model(Model.from_pretrained(base.folder), settings)
    model.save_pretrained(tmp_path / "initial")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "trained")
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    trained, converted = (
        tree.flatten(to_task_vector(load_adapter(tmp_path / name, base), base.params))
        for name in ("trained", "converted")
    )
    for path, leaf in converted.items():
        np.testing.assert_allclose(trained[path], leaf, atol=1e-5)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["CLIPTextModel", "CLIPVisionModel", "CLIPModel"])
def test_adapters_of_one_tower_as_peft_saves_them(both_towers, tmp_path, name):
    pytest.importorskip("peft")
    import transformers

    trained_by_peft(getattr(transformers, name).from_pretrained(both_towers.folder), tmp_path / "lora")
    expected = {"CLIPTextModel": {"text"}, "CLIPVisionModel": {"vision"}, "CLIPModel": {"text", "vision"}}
    assert towers_of(load_adapter(tmp_path / "lora", both_towers)) == expected[name]


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["ViTForImageClassification", "ViTModel"])
def test_an_adapter_of_a_vit_as_peft_saves_it(tmp_path, name):
    peft = pytest.importorskip("peft")
    import transformers

    config = ViTConfig(8, 16, 2, 2, image_size=8, patch_size=4)
    save_pretrained(Pretrained(vit(config, modeling.init(config, jax.random.key(0))), config), tmp_path / "base")
    trained_by_peft(
        getattr(transformers, name).from_pretrained(tmp_path / "base"),
        tmp_path / "lora",
        target_modules=["q_proj", "query", "o_proj", "fc1", "fc2"],
    )
    found = load_adapter(tmp_path / "lora", from_pretrained(tmp_path / "base"))
    assert len(found) == 8
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "base")
    if name == "ViTForImageClassification":
        merged = peft.PeftModel.from_pretrained(model, tmp_path / "lora").merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        streaming.extract_adapter(tmp_path / "base", tmp_path / "lora", tmp_path / "tau.safetensors")
        streaming.apply(tmp_path / "base", [tmp_path / "tau.safetensors"], tmp_path / "edited")
        edited, expected = (from_pretrained(tmp_path / name).params for name in ("edited", "merged"))
        for path, leaf in tree.flatten(expected).items():
            np.testing.assert_allclose(tree.get(edited, path), leaf, atol=1e-5)
