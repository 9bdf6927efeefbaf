"""Tensors whose axes lie in another order come and go as they are, a piece at a time."""

import os

import ml_dtypes
import numpy as np
import pytest

from tvjax.checkpoints import memory, reader, save_tree, shards
from tvjax.checkpoints.reader import open_tensors
from tvjax.checkpoints.safetensors import save_tensors

DTYPES = (np.bool_, np.int8, np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.complex128)


def values(shape, dtype, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (1, 9), (9, 1), (8, 8), (67, 5), (130, 2100), (64, 2048)])
def test_transposed_copies_are_those_of_numpy(dtype, shape):
    matrix = values(shape, dtype)
    out = np.empty(shape[::-1], dtype)
    memory.copy(matrix.T, out)
    np.testing.assert_array_equal(out, matrix.T)
    backwards = np.empty(shape, dtype)
    memory.copy(out, backwards.T)
    np.testing.assert_array_equal(backwards, matrix)
    part = np.zeros((shape[1], shape[0] + 3), dtype)  # columns of something larger
    memory.copy(matrix, part[:, 1:-2].T)
    np.testing.assert_array_equal(part[:, 1:-2], matrix.T)
    assert not part[:, 0].any() and not part[:, -2:].any()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0)])
def test_a_tensor_is_read_and_written_in_any_order_of_its_axes(tmp_path, monkeypatch, order):
    monkeypatch.setattr(reader, "_CHUNK", 64)
    monkeypatch.setattr(reader, "_ROWS", 2)
    monkeypatch.setattr(shards, "_CHUNK", 64)
    tensor = values((7, 5, 3), ml_dtypes.bfloat16)
    save_tensors(tmp_path / "x.safetensors", {"x": tensor})
    with open_tensors(tmp_path / "x.safetensors") as tensors:
        ours = np.empty([tensor.shape[axis] for axis in order], tensor.dtype)
        theirs = ours.transpose(np.argsort(order))
        tensors.read_into("x", theirs)
    np.testing.assert_array_equal(ours, tensor.transpose(order))
    save_tensors(tmp_path / "y.safetensors", {"x": theirs})  # whose memory lies otherwise
    assert (tmp_path / "y.safetensors").read_bytes() == (tmp_path / "x.safetensors").read_bytes()


def test_values_that_are_not_finite_are_counted_over_all_pieces(tmp_path, monkeypatch):
    tensor = np.ones((40, 4), np.float32)
    save_tree(tmp_path / "x.safetensors", {"x": tensor})
    content = bytearray((tmp_path / "x.safetensors").read_bytes())
    wrong = tensor.copy()
    wrong[[1, 20, 39], 2] = np.nan, np.inf, -np.inf
    content[-wrong.nbytes :] = wrong.tobytes()
    (tmp_path / "x.safetensors").write_bytes(content)
    monkeypatch.setattr(reader, "_CHUNK", 64)
    monkeypatch.setattr(reader, "_ROWS", 2)
    with open_tensors(tmp_path / "x.safetensors") as tensors, pytest.raises(ValueError, match="'x'.* has 3 of 160"):
        tensors.read_into("x", np.empty((4, 40), np.float32).T)


def test_a_disk_that_is_too_full_says_so_before_anything_is_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(shards, "write_piece", lambda *_: pytest.fail("a tensor was written"))
    with pytest.raises(OSError, match="No space left"):
        save_tree(tmp_path / "x.safetensors", {"x": np.ones(3)})
    assert not list(tmp_path.iterdir())
