"""Nested dicts of arrays (task vectors, maps) as one safetensors file, whose keys are the paths of the leaves."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping

import jax
from jax.typing import ArrayLike, DTypeLike

from tvjax import processes, tree
from tvjax.checkpoints.memory import to_jax
from tvjax.checkpoints.reader import check_finite, open_tensors
from tvjax.checkpoints.shards import read_sharded
from tvjax.checkpoints.tensor_dtypes import numpy_dtype, tensor_header
from tvjax.checkpoints.writer import write_tensors
from tvjax.kinds import as_path
from tvjax.sharding import Placement, leaf_shardings
from tvjax.stages import PyTree


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, ArrayLike],
    metadata: Mapping[str, str] | None = None,
    dtype: DTypeLike | None = None,
) -> None:
    """Writes one safetensors file, which replaces an older one only when it is complete.

    Args:
      path: where to.
      tensors: arrays by key.
      metadata: text to carry along.
      dtype: dtype that floating tensors are stored in; None keeps theirs.

    Raises:
      ValueError: where values are not finite, or not within the range of `dtype`.
    """
    path = as_path(path)
    headers = {key: tensor_header(key, tensor, dtype) for key, tensor in tensors.items()}
    with write_tensors(path, headers, metadata) as writer:
        for key, tensor in tensors.items():
            writer.write(key, tensor)


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
    >>> import jax.numpy as jnp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_tree(f"{folder}/tau.safetensors", {"a": {"b": jnp.ones(2)}}, {"base_model": "demo"}, jnp.bfloat16)
    ...     tau, metadata = load_tree(f"{folder}/tau.safetensors")
    >>> tau["a"]["b"].dtype.name, metadata
    ('bfloat16', {'base_model': 'demo'})
    """
    save_tensors(path, tree.flatten(params), metadata, dtype)


def load_tree(
    path: str | os.PathLike[str], *, sharding: Placement | None = None, on_disk: bool = False
) -> tuple[PyTree, dict[str, str]]:
    """Reads what `save_tree` wrote.

    Args:
      path: of the file.
      sharding: where the leaves are to lie, as `tvjax.load` takes it; to those of a model
        ``lambda path, leaf: tvjax.tree.get(params, path).sharding``. None: the default device.
      on_disk: leave the values there: the leaves are `tvjax.on_disk.DiskArray`, read when they are used.

    Returns:
      The nested dicts of JAX arrays, in the dtypes of the file, and the metadata.

    Raises:
      ValueError: for a file that is absent, is no safetensors file, was cut short, or has values that are not finite;
        or a sharding that does not fit.
    """
    with open_tensors(path) as tensors:
        headers = tensors.headers
        if on_disk and sharding is not None:
            raise ValueError("leaves that stay on disk lie on no device: give on_disk=True or sharding")
        if on_disk:
            return tree.nest({key: tensors.on_disk(key) for key in headers}), tensors.metadata
        if sharding is None:
            return tree.nest({key: to_jax(tensors.read(key)) for key in headers}), tensors.metadata
        kinds = {key: jax.ShapeDtypeStruct(header.shape, numpy_dtype(key, header)) for key, header in headers.items()}
        found = leaf_shardings(sharding, kinds)
        told = {key: processes.told_sharding(found[key], kind.shape) for key, kind in kinds.items()}
        processes.check_same(f"load from {os.fspath(path)}", {"tensors": headers, "sharding": told})
        with processes.together(f"read {os.fspath(path)}"):
            leaves = {
                key: read_sharded(tensors.map(key), found[key], None, functools.partial(check_finite, key))
                for key in headers
            }
        return tree.nest(leaves), tensors.metadata


def map_tree(path: str | os.PathLike[str]) -> tuple[PyTree, dict[str, str]]:
    """Maps what `save_tree` wrote into memory: leaves are read from the disk when, and as far as, they are used.

    So several task vectors of a large model are merged leaf by leaf, none of them ever in memory as a whole.

    Returns:
      The nested dicts of read-only NumPy arrays, in the dtypes of the file, and the metadata.

    Raises:
      ValueError: for a file that is absent, is no safetensors file, was cut short, has values that are not finite, or a
        dtype that NumPy has not.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_tree(f"{folder}/tau.safetensors", {"a": {"b": jnp.ones(2, jnp.bfloat16)}})
    ...     tau, _ = map_tree(f"{folder}/tau.safetensors")
    >>> tau["a"]["b"].dtype.name, tau["a"]["b"].tolist()
    ('bfloat16', [1.0, 1.0])
    """
    with open_tensors(path) as tensors:
        leaves = {key: tensors.map(key) for key in tensors.headers}
        for key, leaf in leaves.items():
            check_finite(key, leaf)
        return tree.nest(leaves), tensors.metadata
