"""Folders that are written, replaced and refused."""

import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub.errors import LocalEntryNotFoundError

from tvjax import tree
from tvjax.checkpoints import Pretrained, from_pretrained, save_pretrained
from tvjax.checkpoints.folder import copy_files, fetch
from tvjax.models.clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, clip, init
from tvjax.models.vit import ViTConfig, modeling, vit

CONFIG = CLIPConfig(
    CLIPVisionConfig(8, 16, 1, 2, image_size=8, patch_size=4, projection_dim=4),
    CLIPTextConfig(16, 8, 16, 1, 2, max_position_embeddings=6, eos_token_id=15, projection_dim=4),
)
QUERY = "vision_model.encoder.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def made_here():
    return Pretrained(clip(CONFIG, init(CONFIG, jax.random.key(0))), CONFIG)


@pytest.fixture
def folder(made_here, tmp_path):
    save_pretrained(made_here, tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, **changes):
    """Changes tensors of a folder behind tvjax's back; None removes one."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors") | changes
    kept = {key: np.asarray(tensor, order="C") for key, tensor in tensors.items() if tensor is not None}
    safetensors.numpy.save_file(kept, folder / "model.safetensors")


def settings_of(folder, **changes):
    settings = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(settings))


def test_a_new_folder(made_here, folder):
    loaded = from_pretrained(folder)
    assert loaded.config == CONFIG and loaded.name == str(folder) and loaded.folder == folder
    chex.assert_trees_all_equal(loaded.params, made_here.params)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert [path for path in folder.parent.iterdir()] == [folder]


def test_identity_is_that_of_the_parameters(made_here, folder):
    loaded = from_pretrained(folder)
    identity = loaded.identity()
    assert identity["base_model"] == str(folder)
    assert identity["base_fingerprint"] == made_here.identity()["base_fingerprint"]
    moved = loaded.with_params(jax.tree.map(lambda x: x + 1, loaded.params))
    assert moved.identity()["base_fingerprint"] != identity["base_fingerprint"]


def test_with_params_wants_all_parameters(made_here):
    params = made_here.params
    with pytest.raises(ValueError, match="8 parameters do not fit|parameters do not fit the CLIPConfig: .* is missing"):
        made_here.with_params({"vision": params["vision"]})
    with pytest.raises(ValueError, match=r"logit_scale is \[1\], expected \[\]; new is surplus"):
        made_here.with_params(params | {"logit_scale": jnp.zeros(1), "new": jnp.zeros(1)})
    with pytest.raises(ValueError, match="logit_scale is int32, expected float32, float16 or bfloat16"):
        made_here.with_params(params | {"logit_scale": jnp.int32(1)})


def test_saving_over_the_same_model_replaces_the_weights(folder):
    (folder / "README.md").write_text("mine")
    loaded = from_pretrained(folder)
    edited = loaded.with_params(jax.tree.map(lambda x: x + 1, loaded.params))
    save_pretrained(edited, folder)
    chex.assert_trees_all_equal(from_pretrained(folder).params, edited.params)
    assert (folder / "README.md").read_text() == "mine"


def test_saving_over_shards_leaves_one_file(folder):
    shard(folder)
    loaded = from_pretrained(folder)
    save_pretrained(loaded, folder)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    chex.assert_trees_all_equal(from_pretrained(folder).params, loaded.params)


def test_saving_over_another_model_is_refused(made_here, folder):
    settings_of(folder, projection_dim=5)
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds another model .*: give a new folder, or remove the old one"):
        save_pretrained(made_here, folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_parameters_that_are_not_finite_are_not_saved(made_here, tmp_path):
    broken = made_here.with_params(made_here.params | {"logit_scale": jnp.float32(jnp.nan)})
    with pytest.raises(ValueError, match="the tensor 'logit_scale' .* 1 of 1 values that are NaN"):
        save_pretrained(broken, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_settings_and_processors_are_carried_along(folder, tmp_path):
    settings_of(folder, finetuned_on="digits", torch_dtype="float16")
    (folder / "preprocessor_config.json").write_text("{}")
    loaded = from_pretrained(folder)
    half = loaded.with_params(jax.tree.map(lambda x: x.astype(jnp.bfloat16), loaded.params))
    save_pretrained(half, tmp_path / "copy")
    settings = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert settings["finetuned_on"] == "digits" and settings["dtype"] == "bfloat16" and "torch_dtype" not in settings
    assert (tmp_path / "copy" / "preprocessor_config.json").read_text() == "{}"


def shard(folder):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    shard_of = {key: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, key in enumerate(sorted(tensors))}
    for name in set(shard_of.values()):
        part = {key: tensor for key, tensor in tensors.items() if shard_of[key] == name}
        safetensors.numpy.save_file(part, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    (folder / "model.safetensors").unlink()


def test_shards(made_here, folder):
    shard(folder)
    chex.assert_trees_all_equal(from_pretrained(folder).params, made_here.params)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="names model-00002-of-00002.safetensors, which the folder lacks"):
        from_pretrained(folder)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": {"a": "../other.safetensors"}}'])
def test_bad_index(folder, index):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match="model.safetensors.index.json"):
        from_pretrained(folder)


def test_a_tower_without_its_wrapper(made_here, folder, tmp_path):
    vision = CLIPConfig(CONFIG.vision, None)
    tower = Pretrained(clip(vision, {"vision": made_here.params["vision"]}), vision)
    save_pretrained(tower, tmp_path / "tower")
    tensors = safetensors.numpy.load_file(tmp_path / "tower" / "model.safetensors")
    assert QUERY in tensors and "visual_projection.weight" in tensors
    unwrapped = {key.removeprefix("vision_model."): tensor for key, tensor in tensors.items()}
    safetensors.numpy.save_file(unwrapped, tmp_path / "tower" / "model.safetensors")
    chex.assert_trees_all_equal(from_pretrained(tmp_path / "tower").params, tower.params)


def test_buffers_of_positions_and_unused_poolers_are_passed_over(folder, tmp_path):
    rewrite(folder, **{"vision_model.embeddings.position_ids": np.arange(5)[None]})
    from_pretrained(folder)
    config = ViTConfig(8, 16, 1, 2, image_size=8, patch_size=4)
    save_pretrained(Pretrained(vit(config, modeling.init(config, jax.random.key(0))), config), tmp_path / "vit")
    rewrite(tmp_path / "vit", **{"vit.pooler.dense.weight": np.zeros((8, 8), np.float32)})
    assert from_pretrained(tmp_path / "vit").config == config


def test_wrong_folders(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("the hub cannot be reached")

    with pytest.raises(ValueError, match="has no config.json: is it the folder of a Hugging Face model?"):
        from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is no folder, and no hub id that can be downloaded"):
        from_pretrained(tmp_path / "nowhere")
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ValueError, match="'openai/clip' is no folder, .*: the hub cannot be reached"):
        from_pretrained("openai/clip")
    with pytest.raises(ValueError, match="has no revision 'main': leave the revision out"):
        from_pretrained(tmp_path, revision="main")


def test_from_the_hub(folder, monkeypatch, tmp_path):
    snapshot = tmp_path / "snapshots" / "0123abcd"
    shutil.copytree(folder, snapshot)
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **kw: asked.update(kw, name=name) or snapshot)
    for source, revision in (("openai/clip", "main"), ("openai/clip@main", None)):
        asked.clear()
        loaded = from_pretrained(source, revision)
        assert (loaded.name, loaded.revision) == ("openai/clip", "0123abcd")
        assert asked["name"] == "openai/clip" and asked["revision"] == "main"
    with pytest.raises(ValueError, match="'openai/clip@main' names a revision, and 'v2' is another"):
        from_pretrained("openai/clip@main", "v2")
    assert not any("bin" in pattern or pattern == "*" for pattern in asked["allow_patterns"])
    assert fetch("openai/clip") == (snapshot, "0123abcd")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "holds a list, expected an object"),
        ('{"model_type": 5}', "model_type 5 is not supported: expected a name"),
        ('{"model_type": "clip", "architectures": ["CLIPForImageClassification"]}', "is not supported, only"),
        ('{"model_type": "vit", "hidden_act": "mish"}', "config.json: hidden_act 'mish' is not supported"),
    ],
)
def test_bad_configs(folder, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logit_scale": None}, r"missing keys \(1\): logit_scale"),
        ({"lora.weight": np.zeros(1, np.float32)}, r"surplus keys \(1\): lora.weight"),
        ({QUERY: np.zeros((8, 9), np.float32)}, rf"wrong shapes \(1\): {QUERY} is \[8, 9\], expected \[8, 8\]"),
        ({QUERY: np.zeros((8, 8), np.int8)}, rf"dtypes other than F32, F16, BF16 \(1\): {QUERY} is I8"),
        ({QUERY: np.full((8, 8), np.nan, np.float32)}, f"the tensor '{QUERY}' .* 64 of 64 values that are NaN"),
    ],
)
def test_weights_that_do_not_fit(folder, changes, message):
    rewrite(folder, **changes)
    with pytest.raises(ValueError, match=message):
        from_pretrained(folder)


def test_float8_weights(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    data = bytearray(whole[8 + length :])
    cut = header[QUERY]["data_offsets"]
    size = (cut[1] - cut[0]) // 4
    del data[cut[0] + size : cut[1]]
    for key, entry in header.items():
        if key != "__metadata__" and entry["data_offsets"][0] > cut[0]:
            entry["data_offsets"] = [offset - 3 * size for offset in entry["data_offsets"]]
    header[QUERY] |= {"dtype": "F8_E4M3", "data_offsets": [cut[0], cut[0] + size]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    with pytest.raises(ValueError, match=f"{QUERY} is F8_E4M3. Use .* saved in float32, float16 or bfloat16"):
        from_pretrained(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_never_opened(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(ValueError, match=f"has neither .* only {name}: pickles can run code and are never opened"):
        from_pretrained(folder)


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is no complete safetensors file"):
        from_pretrained(folder)


def test_no_weights_are_read_before_everything_fits(folder, monkeypatch):
    rewrite(folder, logit_scale=None)
    monkeypatch.setattr("tvjax.checkpoints.reader.Tensors.read_into", lambda *_: pytest.fail("read a tensor"))
    with pytest.raises(ValueError, match="missing keys"):
        from_pretrained(folder)


def test_parameters_are_nested_dicts_of_jax_arrays(folder):
    for path, leaf in tree.flatten(from_pretrained(folder).params).items():
        assert isinstance(leaf, jax.Array), path


def test_records_of_how_a_model_was_made_stay_with_it(tmp_path):
    (tmp_path / "edited").mkdir()
    (tmp_path / "made").mkdir()
    for name in ("tvjax.yaml", "leaf_report.json", "examples.json", "coefficients.png", "tokenizer.json"):
        (tmp_path / "made" / name).write_text("{}")
    copy_files(tmp_path / "made", tmp_path / "edited")
    assert [file.name for file in (tmp_path / "edited").iterdir()] == ["tokenizer.json"]
