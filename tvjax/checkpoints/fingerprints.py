"""The identity of a model: one hash over its weights, however their files are laid out."""

from __future__ import annotations

import hashlib

import numpy as np

from tvjax import processes, tree
from tvjax.stages import PyTree


class Fingerprint:
    """The SHA-256 of paths, dtypes, shapes and values, leaf by leaf in the order of the paths; see `fingerprint`."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, path: str, array: np.ndarray) -> None:
        """Takes the next leaf, contiguous."""
        self._digest.update(f"{path} {array.dtype.name} {array.shape}\n".encode())
        self._digest.update(array.reshape(-1).view(np.uint8).data)

    def hexdigest(self) -> str:
        """The identity, of 64 characters."""
        return self._digest.hexdigest()


def fingerprint(params: PyTree) -> str:
    """The SHA-256 of a tree's paths, dtypes, shapes and values: the identity of a model, however its file is laid out.

    A leaf at a time is on the host, whole: one hash runs over all values in their order.

    >>> fingerprint({"a": np.ones(2)}) == fingerprint({"a": np.ones((2, 1))})
    False
    """
    found = Fingerprint()
    for path, leaf in sorted(tree.flatten(params).items()):
        found.add(path, np.asarray(processes.fetch(leaf), order="C"))
    return found.hexdigest()
