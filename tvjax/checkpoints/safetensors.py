"""Reading and writing safetensors files: lazily tensor by tensor, checked, replaced atomically.

Arbitrary nested dicts of arrays (task vectors, maps) are exchanged as one file whose keys are the paths of the leaves.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.typing import ArrayLike, DTypeLike

from tvjax import tree
from tvjax.checkpoints.atomic import replacing
from tvjax.models.key_table import Tensor
from tvjax.stages import PyTree

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "BOOL": np.bool_,
}


class Tensors:
    """The tensors of open safetensors files, each read when it is asked for; made by `open_tensors`.

    Attributes:
      headers: dtype and shape of every tensor, by key.
      metadata: the text that the files carry.
    """

    def __init__(self, files: list[Any]):
        self._file_of = {key: file for file in files for key in file.keys()}  # noqa: SIM118 - not a mapping
        self.metadata: dict[str, str] = {}
        for file in files:
            self.metadata.update(file.metadata() or {})
        views = {key: file.get_slice(key) for key, file in self._file_of.items()}
        self.headers = {key: Tensor(view.get_dtype(), tuple(view.get_shape())) for key, view in views.items()}

    def read(self, key: str) -> np.ndarray:
        """One tensor, in its own dtype.

        Raises:
          ValueError: where values are not finite, with the tensor's name and their number.
        """
        array = self._file_of[key].get_tensor(key)
        _check_finite(key, array)
        return array


@contextlib.contextmanager
def open_tensors(*paths: str | os.PathLike[str]) -> Iterator[Tensors]:
    """Opens safetensors files; only their headers are read.

    Raises:
      ValueError: for a file that is not there, is no safetensors file, or was cut short.
    """
    with contextlib.ExitStack() as stack:
        files = []
        for path in paths:
            try:
                files.append(stack.enter_context(safetensors.safe_open(path, framework="numpy")))
            except FileNotFoundError as error:
                raise ValueError(f"there is no file {os.fspath(path)!r}") from error
            except safetensors.SafetensorError as error:
                raise ValueError(
                    f"{os.fspath(path)!r} is no complete safetensors file ({error}): download or save it again"
                ) from error
        yield Tensors(files)


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, ArrayLike], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes one safetensors file, which replaces an older one only when it is complete.

    Args:
      path: where to.
      tensors: arrays by key.
      metadata: text to carry along.

    Raises:
      ValueError: where values are not finite.
    """
    arrays = {key: np.asarray(tensor, order="C") for key, tensor in tensors.items()}
    for key, array in arrays.items():
        _check_finite(key, array)
    with replacing(path) as temporary:
        safetensors.numpy.save_file(arrays, temporary, metadata=dict(metadata or {}))


def save_tree(
    path: str | os.PathLike[str],
    params: PyTree,
    metadata: Mapping[str, str] | None = None,
    dtype: DTypeLike | None = None,
) -> None:
    """Writes nested dicts of arrays (a task vector) as one safetensors file, each leaf under its path.

    Args:
      path: where to.
      params: nested dicts with string keys.
      metadata: text to carry along, such as ``Pretrained.identity()`` of the base model.
      dtype: dtype that floating leaves are stored in (``bfloat16`` halves the file); None keeps theirs.

    Raises:
      ValueError: where values are not finite, or not within the range of `dtype`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_tree(f"{folder}/tau.safetensors", {"a": {"b": jnp.ones(2)}}, {"base_model": "demo"}, jnp.bfloat16)
    ...     tau, metadata = load_tree(f"{folder}/tau.safetensors")
    >>> tau["a"]["b"].dtype.name, metadata
    ('bfloat16', {'base_model': 'demo'})
    """

    def stored(leaf: ArrayLike) -> np.ndarray:
        array = np.asarray(leaf)
        if dtype is None or not jnp.issubdtype(array.dtype, jnp.floating):
            return array
        with np.errstate(over="ignore"):  # reported by save_tensors, with the name of the leaf
            return array.astype(jnp.dtype(dtype))

    save_tensors(path, {name: stored(leaf) for name, leaf in tree.flatten(params).items()}, metadata)


def load_tree(path: str | os.PathLike[str]) -> tuple[PyTree, dict[str, str]]:
    """Reads what `save_tree` wrote.

    Returns:
      The nested dicts of JAX arrays, in the dtypes of the file, and the metadata.

    Raises:
      ValueError: for a file that is absent, is no safetensors file, was cut short, or has values that are not finite.
    """
    with open_tensors(path) as tensors:
        return tree.nest({key: jnp.asarray(tensors.read(key)) for key in tensors.headers}), tensors.metadata


def map_tree(path: str | os.PathLike[str]) -> tuple[PyTree, dict[str, str]]:
    """Maps what `save_tree` wrote into memory: leaves are read from the disk when, and as far as, they are used.

    So several task vectors of a large model are merged leaf by leaf, none of them ever in memory as a whole.

    Returns:
      The nested dicts of read-only NumPy arrays, in the dtypes of the file, and the metadata.

    Raises:
      ValueError: for a file that is absent, is no safetensors file, was cut short, has values that are not finite, or a
        dtype that NumPy has not.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_tree(f"{folder}/tau.safetensors", {"a": {"b": jnp.ones(2, jnp.bfloat16)}})
    ...     tau, _ = map_tree(f"{folder}/tau.safetensors")
    >>> tau["a"]["b"].dtype.name, tau["a"]["b"].tolist()
    ('bfloat16', [1.0, 1.0])
    """
    with open_tensors(path) as tensors:  # whole and well formed
        headers, metadata = tensors.headers, tensors.metadata
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        offsets = {key: entry["data_offsets"] for key, entry in json.loads(file.read(length)).items() if key in headers}
    data = np.memmap(path, np.uint8, "r", offset=8 + length) if any(a < b for a, b in offsets.values()) else np.zeros(0)
    leaves = {}
    for key, header in headers.items():
        if header.dtype not in _DTYPES:
            raise ValueError(f"the tensor {key!r} is of dtype {header.dtype}, expected one of {', '.join(_DTYPES)}")
        start, stop = offsets[key]
        leaves[key] = np.asarray(data[start:stop]).view(_DTYPES[header.dtype]).reshape(header.shape)
        _check_finite(key, leaves[key])
    return tree.nest(leaves), metadata


def fingerprint(params: PyTree) -> str:
    """The SHA-256 of a tree's paths, dtypes, shapes and values: the identity of a model, however its file is laid out.

    >>> fingerprint({"a": np.ones(2)}) == fingerprint({"a": np.ones((2, 1))})
    False
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(tree.flatten(params).items()):
        array = np.asarray(leaf, order="C")
        digest.update(f"{path} {array.dtype.name} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _check_finite(key: str, array: np.ndarray) -> None:
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return
    wrong = array.size - int(np.count_nonzero(np.isfinite(array)))
    if wrong:
        raise ValueError(
            f"the tensor {key!r} ({array.dtype.name}) has {wrong} of {array.size} values that are NaN or infinite: "
            "take an earlier checkpoint of the run, or a dtype of wider range"
        )
