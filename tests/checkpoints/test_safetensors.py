"""Reading, writing and refusing safetensors files."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax.checkpoints.fingerprints import fingerprint
from tvjax.checkpoints.reader import open_tensors
from tvjax.checkpoints.safetensors import load_tree, save_tensors, save_tree

TREE = {
    "vision": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "scale": np.float16([1, 2])},
    "scalar": np.asarray(0.5, jnp.bfloat16),
    "empty": np.zeros((0, 3), np.float32),
    "counts": np.int32([1, 2]),
}


def test_a_tree_round_trips(tmp_path):
    save_tree(tmp_path / "tree.safetensors", TREE, {"base_model": "demo", "base_revision": ""})
    loaded, metadata = load_tree(tmp_path / "tree.safetensors")
    chex.assert_trees_all_equal(loaded, TREE)
    chex.assert_trees_all_equal_dtypes(loaded, TREE)
    assert metadata == {"base_model": "demo", "base_revision": ""}


def test_layouts_that_are_not_contiguous_are_written_as_they_read(tmp_path):
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)[::-1]
    save_tensors(tmp_path / "x.safetensors", {"x": array})
    with open_tensors(tmp_path / "x.safetensors") as tensors:
        np.testing.assert_array_equal(tensors.read("x"), array)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_16_bit_storage(tmp_path, dtype):
    save_tree(tmp_path / "tree.safetensors", TREE, dtype=dtype)
    loaded, _ = load_tree(tmp_path / "tree.safetensors")
    assert loaded["vision"]["kernel"].dtype == dtype and loaded["counts"].dtype == jnp.int32
    chex.assert_trees_all_close(loaded["vision"]["kernel"].astype(jnp.float32), TREE["vision"]["kernel"])
    with pytest.raises(ValueError, match=r"the tensor 'big' \(float16\) has 1 of 2 values that are NaN or infinite"):
        save_tree(tmp_path / "tree.safetensors", {"big": np.float32([1, 1e9])}, dtype=jnp.float16)
    assert load_tree(tmp_path / "tree.safetensors")[0].keys() == TREE.keys()  # the old file is still there


def test_only_what_is_asked_for_is_read(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {"a": np.ones(2, np.float32)}, {"from": "a"})
    save_tensors(tmp_path / "b.safetensors", {"b": np.ones((3, 1), np.float16)})
    with open_tensors(tmp_path / "a.safetensors", tmp_path / "b.safetensors") as tensors:
        assert tensors.headers == {"a": ("F32", (2,)), "b": ("F16", (3, 1))}
        assert tensors.metadata == {"from": "a"}
        assert tensors.read("b").dtype == np.float16


@pytest.mark.parametrize("damage", ["cut short", "only the header", "empty", "garbage", "pickle", "longer"])
def test_damaged_files(tmp_path, damage):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"x": np.ones(8, np.float32)})
    whole = path.read_bytes()
    path.write_bytes(
        {
            "cut short": whole[:-3],
            "only the header": whole[:20],
            "empty": b"",
            "garbage": b"x" * 100,
            "pickle": b"\x80\x02}q\x00." + bytes(40),
            "longer": whole + b"abc",
        }[damage]
    )
    with pytest.raises(ValueError, match="is no complete safetensors file .*: download or save it again"):
        load_tree(path)


def test_absent_files(tmp_path):
    with pytest.raises(ValueError, match="there is no file .*nowhere.safetensors"):
        load_tree(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_values_that_are_not_finite(tmp_path, value, dtype):
    with pytest.raises(ValueError, match=r"the tensor 'a/b' .* has 1 of 2 values that are NaN or infinite"):
        save_tree(tmp_path / "x.safetensors", {"a": {"b": np.asarray([0, value], dtype)}})


def test_fingerprint_depends_on_paths_dtypes_shapes_and_values_only():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    same = fingerprint({"a": x, "b": jnp.float32(1)})
    assert fingerprint({"b": np.float32(1), "a": jnp.asarray(np.asfortranarray(x))}) == same
    others = [
        {"a": x, "c": np.float32(1)},
        {"a": x.T, "b": np.float32(1)},
        {"a": x.astype(np.float16), "b": np.float32(1)},
        {"a": x + 1, "b": np.float32(1)},
    ]
    assert len({same, *map(fingerprint, others)}) == 5
