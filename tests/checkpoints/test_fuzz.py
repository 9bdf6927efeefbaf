"""Mutated files: every one is a clear ValueError or is read right; nothing else, whatever the bytes.

A light, repeatable version runs always; `pytest -m fuzz` tries thousands.
"""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tvjax.checkpoints import Pretrained, from_pretrained, load_adapter, map_tree, save_pretrained
from tvjax.checkpoints.folder import open_checkpoint
from tvjax.checkpoints.reader import open_tensors
from tvjax.checkpoints.safetensors import save_tensors
from tvjax.models.clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, clip, init

CONFIG = CLIPConfig(
    CLIPVisionConfig(8, 16, 1, 2, image_size=8, patch_size=4, projection_dim=4),
    CLIPTextConfig(16, 8, 16, 1, 2, max_position_embeddings=6, eos_token_id=15, projection_dim=4),
)
TENSORS = {"a/x": np.arange(6, dtype=np.float32).reshape(2, 3), "a/y": np.float16([1, 2]), "z": np.int32([7])}
ADAPTER = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "use_rslora": False, "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {}, "use_dora": False, "modules_to_save": None, "target_modules": ["q_proj"],
}  # fmt: skip
LAYER = "base_model.model.vision_model.encoder.layers.0.self_attn.q_proj"


def examples(number):
    return settings(
        max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


def light_and_heavy(test):
    """The test with 100 examples, and a heavy one with 3000 under the marker `fuzz`."""
    return pytest.mark.parametrize("number", [100, pytest.param(3000, marks=pytest.mark.fuzz)])(test)


@st.composite
def mutated_bytes(draw, whole):
    """The bytes with a few of them changed, removed or added, most often in the header."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.one_of(st.integers(0, min(250, len(data))), st.integers(0, len(data))))
        kind = draw(st.sampled_from(["change", "digit", "cut", "remove", "add"]))
        if kind == "change":
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "digit":
            data[at : at + 1] = draw(st.sampled_from([b"0", b"1", b"9", b'"', b"}", b"[", b",", b"-"]))
        elif kind == "cut":
            del data[at:]
        elif kind == "remove":
            del data[at : at + draw(st.integers(1, 8))]
        else:
            data[at:at] = draw(st.binary(min_size=1, max_size=8))
    return bytes(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
small_values = st.one_of(
    json_values, st.integers(-2, 20), st.sampled_from(["clip", "gelu", "", [8, 8], [8, 4], 0, 1e9])
)


@st.composite
def mutated_json(draw, whole):
    """The object with a few of its values, at any depth, removed, replaced or added."""
    content = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 3))):
        node = content
        while True:
            inner = [key for key, value in node.items() if isinstance(value, dict) and value]
            if not inner or draw(st.booleans()):
                break
            node = node[draw(st.sampled_from(inner))]
        key = draw(st.sampled_from(sorted(node)) if node and draw(st.integers(0, 9)) else st.text(max_size=6))
        if draw(st.integers(0, 3)):
            node[key] = draw(small_values)
        else:
            node.pop(key, None)
    return content


@light_and_heavy
def test_safetensors(tmp_path, number):
    save_tensors(tmp_path / "whole.safetensors", TENSORS, {"about": "x"})
    path = tmp_path / "mutated.safetensors"

    @examples(number)
    @given(mutated_bytes((tmp_path / "whole.safetensors").read_bytes()))
    def check(data):
        path.write_bytes(data)
        try:
            with open_tensors(path) as tensors:
                found = {key: tensors.read(key) for key in tensors.headers}
        except ValueError:
            return
        expected = safetensors.numpy.load_file(path)
        assert found.keys() == expected.keys()
        for key, array in expected.items():
            assert found[key].tobytes() == array.tobytes() and found[key].shape == array.shape

    check()


@light_and_heavy
def test_mapped_trees(tmp_path, number):
    save_tensors(tmp_path / "whole.safetensors", TENSORS, {"about": "x"})
    path = tmp_path / "mutated.safetensors"

    @examples(number)
    @given(mutated_bytes((tmp_path / "whole.safetensors").read_bytes()))
    def check(data):
        path.write_bytes(data)
        try:
            found, _ = map_tree(path)
        except ValueError:
            return
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
        path.unlink()  # what is mapped is not written over

    check()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    save_pretrained(Pretrained(clip(CONFIG, init(CONFIG, jax.random.key(0))), CONFIG), folder)
    return folder


@light_and_heavy
def test_configs(model, tmp_path, number):
    shutil.copytree(model, tmp_path / "model")
    file = tmp_path / "model" / "config.json"

    @examples(number)
    @given(mutated_json(json.loads(file.read_text())))
    def check(content):
        file.write_text(json.dumps(content))
        try:
            with open_checkpoint(tmp_path / "model") as opened:
                headers = opened.tensors.headers
                assert all(opened.sources[path].key in headers for path in opened.shapes)
        except ValueError as error:
            assert len(str(error)) > 20

    check()


@light_and_heavy
def test_adapters(model, tmp_path, number):
    base = from_pretrained(model)
    (tmp_path / "lora").mkdir()
    factors = {"lora_A": np.ones((2, 8), np.float32), "lora_B": np.ones((8, 2), np.float32)}
    weights, config = (tmp_path / "lora" / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    safetensors.numpy.save_file({f"{LAYER}.{name}.weight": value for name, value in factors.items()}, weights)
    whole = weights.read_bytes()

    @examples(number)
    @given(mutated_json(ADAPTER), st.one_of(st.just(whole), mutated_bytes(whole)))
    def check(content, data):
        config.write_text(json.dumps(content))
        weights.write_bytes(data)
        try:
            (adapter,) = load_adapter(tmp_path / "lora", base).values()
        except ValueError:
            return
        assert adapter.a.shape == (8, content["r"]) or content["rank_pattern"]
        assert np.isfinite(adapter.scale)

    check()
