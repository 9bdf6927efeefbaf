"""Writing safetensors files tensor by tensor; they appear when they are complete."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from tvjax import processes
from tvjax.checkpoints.atomic import replacing
from tvjax.checkpoints.reader import check_finite
from tvjax.checkpoints.shards import View, owned_pieces, runs_of, write_piece
from tvjax.checkpoints.tensor_dtypes import DTYPES, NAMES, cast, numpy_dtype, tensor_bytes
from tvjax.models.key_table import Tensor

_SYNC_EVERY = 2**26  # bytes


class TensorWriter:
    """One safetensors file that is written tensor by tensor, in any order; made by `write_tensors`."""

    def __init__(
        self,
        descriptor: int,
        pool: ThreadPoolExecutor,
        headers: Mapping[str, Tensor],
        metadata: Mapping[str, str],
    ):
        # As the library orders them: by falling size of the entries, then by key, so that all are aligned.
        keys = sorted(headers, key=lambda key: (-numpy_dtype(key, headers[key]).itemsize, key))
        self._entries: dict[str, Any] = {}
        end = 0
        for key in keys:
            start, end = end, end + tensor_bytes(key, headers[key])
            dtype, shape = headers[key]
            self._entries[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        self._file, self._pool = descriptor, pool
        self._metadata = dict(metadata)
        self._left = {key: math.prod(headers[key].shape) for key in keys}  # entries that are not written
        self._unsynced = 0
        self._syncing: Future[None] | None = None
        self._start = len(self._header())
        if processes.is_first():
            self._write_header()
            _reserve(descriptor, self._start + end)

    def write(self, key: str, array: Any, view: View = lambda tensor: tensor) -> None:
        """Writes one tensor, or the part of it that a parameter is; of a sharded array one shard after another.

        Args:
          key: of the tensor.
          array: of the dtype that was announced, or a floating one that is rounded to it.
          view: of the tensor to the parameter that the array is.

        Raises:
          ValueError: where values are not finite.
        """
        dtype, shape, (offset, _) = self._entries[key].values()
        for index, values in owned_pieces(array):
            piece = cast(values, DTYPES[dtype])
            assert NAMES[piece.dtype] == dtype, key
            check_finite(key, piece)
            write_piece(self._file, self._start + offset, runs_of(view, tuple(shape), index), piece)
            self._unsynced += piece.nbytes
        self._left[key] -= math.prod(np.shape(array))
        if self._unsynced > _SYNC_EVERY and (self._syncing is None or self._syncing.done()):
            self._sync()

    def _sync(self) -> None:
        """Lets the disk write beside what comes next; at the end there is less to wait for."""
        self._syncing, self._unsynced = self._pool.submit(os.fsync, self._file), 0

    def set_metadata(self, metadata: Mapping[str, str]) -> None:
        """Replaces metadata by others of the same length, such as a fingerprint that is known at the end."""
        self._metadata.update(metadata)
        assert len(self._header()) == self._start, "metadata of another length"
        if processes.is_first():
            self._write_header()

    def finish(self) -> None:
        """Every tensor that was announced must have been written."""
        assert not any(self._left.values()), sorted(key for key, left in self._left.items() if left)
        if self._syncing is not None:
            self._syncing.result()

    def _write_header(self) -> None:
        os.pwrite(self._file, self._header(), 0)

    def _header(self) -> bytes:
        content = {"__metadata__": self._metadata, **self._entries} if self._metadata else self._entries
        text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def _reserve(descriptor: int, size: int) -> None:
    """Makes a file as large as it will be: a disk that is too full says so here, and what follows is written faster."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:  # macOS
        os.ftruncate(descriptor, size)


@contextlib.contextmanager
def write_tensors(
    path: str | os.PathLike[str],
    headers: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> Iterator[TensorWriter]:
    """Opens a safetensors file to be written tensor by tensor; it replaces an older one when the block ends.

    No more than one tensor is ever in memory, and of a sharded one a shard. Several processes open it together, and
    each writes the shards that it owns.

    Args:
      path: where to.
      headers: dtype and shape of every tensor that will be written, by key.
      metadata: text to carry along.

    Raises:
      ValueError: a dtype that is not written.

    >>> import tempfile
    >>> from tvjax.checkpoints import load_tree
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with write_tensors(f"{folder}/x.safetensors", {"x": Tensor("F32", (2,))}, {"sum": "?"}) as writer:
    ...         writer.write("x", np.ones(2, np.float32))
    ...         writer.set_metadata({"sum": "2"})
    ...     load_tree(f"{folder}/x.safetensors")
    ({'x': Array([1., 1.], dtype=float32)}, {'sum': '2'})
    """
    processes.check_same("write", {"path": os.fspath(path), "tensors": dict(headers), "metadata": dict(metadata or {})})
    with replacing(path, shared=True) as temporary, ThreadPoolExecutor(1) as pool:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            writer = TensorWriter(descriptor, pool, headers, metadata or {})
            yield writer
            writer.finish()
        finally:
            pool.shutdown()  # nothing is synced after the end
            os.close(descriptor)
