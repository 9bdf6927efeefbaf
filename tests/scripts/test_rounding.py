"""Rounded task vectors: near what they were, and smaller in an archive."""

import zlib

import numpy as np

from rounding import on_grid


def test_on_grid():
    rng = np.random.default_rng(0)
    tau = {"kernel": rng.normal(size=(64, 64)).astype(np.float32) * 3e-3, "still": np.zeros(5, np.float32)}
    rounded = on_grid(tau)
    half = rounded["kernel"].astype(np.float16)
    np.testing.assert_array_equal(half.astype(np.float32), rounded["kernel"])  # nothing is lost in 16 bits
    np.testing.assert_array_equal(rounded["still"], 0)
    error = np.linalg.norm(rounded["kernel"] - tau["kernel"]) / np.linalg.norm(tau["kernel"])
    assert error < 0.02
    assert len(zlib.compress(half.tobytes())) < 0.7 * len(zlib.compress(tau["kernel"].astype(np.float16).tobytes()))
