"""Reading and writing safetensors files: lazily tensor by tensor, checked, replaced atomically.

Arbitrary nested dicts of arrays (task vectors, maps) are exchanged as one file whose keys are the paths of the leaves.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
from jax.typing import ArrayLike, DTypeLike

from tvjax import processes, tree
from tvjax.checkpoints.atomic import replacing
from tvjax.checkpoints.memory import aligned_memory, contiguous, copy, to_jax
from tvjax.checkpoints.shards import View, owned_pieces, read_sharded, runs_of, write_piece
from tvjax.finite import count_not_finite
from tvjax.models.key_table import Tensor
from tvjax.on_disk import DiskArray
from tvjax.sharding import Placement, leaf_shardings
from tvjax.stages import PyTree

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_FLOATING = tuple(_DTYPES[name] for name in ("F64", "F32", "F16", "BF16"))
_SYNC_EVERY = 2**26  # bytes
_CHUNK, _ROWS = 2**20, 64  # bytes that are read at once, and rows that make whole tiles where they are transposed
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Tensors:
    """The tensors of open safetensors files, each read when it is asked for; made by `open_tensors`.

    Attributes:
      headers: dtype and shape of every tensor, by key.
      metadata: the text that the files carry.
      file_of: the path of each tensor's file, by key.
    """

    def __init__(self, files: Mapping[str, BinaryIO]):
        self.headers: dict[str, Tensor] = {}
        self.metadata: dict[str, str] = {}
        self.file_of: dict[str, str] = {}
        self._files = dict(files)
        self._states = {path: _state(file) for path, file in files.items()}
        self._maps: dict[str, np.ndarray] = {}
        self._offsets: dict[str, int] = {}
        for path, file in files.items():
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            self.metadata.update(header.pop("__metadata__", None) or {})
            for key, entry in header.items():
                if key in self.headers:
                    raise ValueError(
                        f"the tensor {key!r} is in {self.file_of[key]!r} and in {path!r}: remove one of the files"
                    )
                self.headers[key] = Tensor(entry["dtype"], tuple(entry["shape"]))
                self.file_of[key] = path
                self._offsets[key] = 8 + length + entry["data_offsets"][0]

    def read(self, key: str, memory: np.ndarray | None = None) -> np.ndarray:
        """One tensor, in its own dtype.

        Args:
          key: of the tensor.
          memory: to read into, flat 8-bit values, as many bytes or more; None takes new memory.

        Raises:
          ValueError: where values are not finite, with the tensor's name and their number; or a dtype that NumPy lacks.
        """
        header = self.headers[key]
        size = tensor_bytes(key, header)
        memory = aligned_memory(size) if memory is None else memory[:size]
        array = memory.view(numpy_dtype(key, header)).reshape(header.shape)
        self.read_into(key, array)
        return array

    def read_into(self, key: str, out: np.ndarray) -> None:
        """Reads one tensor into an array of its shape and dtype, whose axes may lie in any order.

        Raises:
          ValueError: where values are not finite, with the tensor's name and their number.
        """
        path = self.file_of[key]
        _read_checked(key, self._files[path], path, self._offsets[key], out)

    def on_disk(self, key: str, to_ours: Callable[[np.ndarray], np.ndarray] = lambda tensor: tensor) -> DiskArray:
        """One tensor that is read whenever its values are asked for, after these files were closed too.

        Args:
          key: of the tensor.
          to_ours: a view of it, the layout that the array has.

        Returns:
          The array. Reading it raises a ValueError where values are not finite, or the file is not any more the one
          that was opened here.
        """
        dtype, shape, path = numpy_dtype(key, self.headers[key]), self.headers[key].shape, self.file_of[key]
        state, offset = self._states[path], self._offsets[key]

        def read() -> np.ndarray:
            array = aligned_memory(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)
            with _reopened(path, state) as file:
                _read_checked(key, file, path, offset, array)
            return contiguous(to_ours(array))

        return DiskArray(to_ours(np.broadcast_to(np.int8(0), shape)).shape, dtype, read, checks=True)

    def map(self, key: str) -> np.ndarray:
        """One tensor, read-only and unchecked, whose values are read from the disk as far as they are used.

        Raises:
          ValueError: a dtype that NumPy lacks.
        """
        dtype, shape = numpy_dtype(key, self.headers[key]), self.headers[key].shape
        if not math.prod(shape):
            return np.zeros(shape, dtype)
        size = math.prod(shape) * dtype.itemsize
        path = self.file_of[key]
        if path not in self._maps:
            self._maps[path] = np.memmap(path, np.uint8, "r")
        start = self._offsets[key]
        return np.asarray(self._maps[path][start : start + size]).view(dtype).reshape(shape)


def _read_checked(key: str, file: BinaryIO, path: str, offset: int, out: np.ndarray) -> None:
    """Reads a tensor a few rows at a time: in the cache still, they are looked through and brought in order."""
    rows = out if out.ndim else out.reshape(1)
    row = rows[:1].nbytes
    step = max(_ROWS, _CHUNK // max(1, row) // _ROWS * _ROWS)
    wrong, chunk = 0, np.empty(0 if out.flags.c_contiguous else step * row, np.uint8)
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        read = part if part.flags.c_contiguous else chunk[: part.nbytes].view(part.dtype).reshape(part.shape)
        _fill(read.reshape(-1).view(np.uint8), file, path, offset + first * row)
        wrong += count_not_finite(read)
        if read is not part:
            copy(read, part)
    if wrong:
        raise _not_finite(key, out, wrong)


def _fill(memory: np.ndarray, file: BinaryIO, path: str, offset: int) -> None:
    """Reads as many bytes as the memory has."""
    filled = 0
    while filled < memory.size:  # one call reads two gibibytes at most
        count = os.preadv(file.fileno(), [memory[filled:].data], offset + filled)
        if not count:
            raise ValueError(f"{path!r} was cut short while it was read")
        filled += count


def _state(file: BinaryIO) -> tuple[int, ...]:
    """What is another once a file was replaced or written to."""
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def _reopened(path: str, state: tuple[int, ...]) -> Iterator[BinaryIO]:
    """The file at a path, which must be in the state that it was in."""
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed below
    except FileNotFoundError as error:
        raise ValueError(
            f"{path!r} is gone, with leaves that are still to be read: put it back, begin again"
        ) from error
    with file:
        if _state(file) != state:
            raise ValueError(
                f"{path!r} has changed since it was opened, with leaves that are still to be read: begin again, and "
                "leave the file alone until all is done"
            )
        yield file


@contextlib.contextmanager
def open_tensors(*paths: str | os.PathLike[str]) -> Iterator[Tensors]:
    """Opens safetensors files; only their headers are read.

    Raises:
      ValueError: for a file that is not there, is no safetensors file, or was cut short; or two with one key.
    """
    with contextlib.ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        for path in [os.fspath(path) for path in paths]:
            try:
                files[path] = stack.enter_context(open(path, "rb", buffering=0))
                with safetensors.safe_open(path, framework="numpy"):  # whole and well formed
                    pass
            except FileNotFoundError as error:
                raise ValueError(f"there is no file {path!r}") from error
            except IsADirectoryError as error:
                hint = (
                    ": it is an adapter, make a file of it with tvjax extract --adapter"
                    if os.path.isfile(os.path.join(path, "adapter_config.json"))
                    else ""
                )
                raise ValueError(f"{path!r} is a folder, expected a safetensors file{hint}") from error
            except safetensors.SafetensorError as error:
                raise ValueError(
                    f"{path!r} is no complete safetensors file ({error}): download or save it again"
                ) from error
        yield Tensors(files)


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
            piece = cast(values, _DTYPES[dtype])
            assert _NAMES[piece.dtype] == dtype, key
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
    headers = {key: tensor_header(key, tensor, dtype) for key, tensor in tensors.items()}
    with write_tensors(path, headers, metadata) as writer:
        for key, tensor in tensors.items():
            writer.write(key, tensor)


def tensor_header(key: str, tensor: Any, dtype: DTypeLike | None = None) -> Tensor:
    """What the header of a file says of an array that is stored in a dtype, see `cast`.

    Raises:
      ValueError: a dtype that is not written.

    >>> tensor_header("x", np.ones((2, 3)), jnp.bfloat16)
    Tensor(dtype='BF16', shape=(2, 3))
    """
    own = np.dtype(tensor.dtype if hasattr(tensor, "dtype") else np.asarray(tensor).dtype)
    if own not in _NAMES:
        raise ValueError(f"the tensor {key!r} is of dtype {own.name}, expected one of {', '.join(map(str, _NAMES))}")
    return cast_header(key, Tensor(_NAMES[own], tuple(np.shape(tensor))), dtype)


def cast_header(key: str, header: Tensor, dtype: DTypeLike | None) -> Tensor:
    """The header of a tensor after `cast`.

    Raises:
      ValueError: a dtype that is not written, or that has no fractions.
    """
    if dtype is None or numpy_dtype(key, header) not in _FLOATING:
        return header
    stored = np.dtype(jnp.dtype(dtype))
    if stored not in _FLOATING:
        raise ValueError(f"weights are stored in {', '.join(map(str, _FLOATING))}, not in {stored.name}")
    return header._replace(dtype=_NAMES[stored])


def cast(array: np.ndarray, dtype: DTypeLike | None) -> np.ndarray:
    """Floating values in another dtype, rounded; None, and values that are not floating, leave it."""
    if dtype is None or array.dtype not in _FLOATING:
        return array
    with np.errstate(over="ignore"):  # what became infinite is reported where it is written
        return array.astype(jnp.dtype(dtype), copy=False)


def numpy_dtype(key: str, header: Tensor) -> np.dtype[Any]:
    """The dtype of a tensor.

    Raises:
      ValueError: one that NumPy has not.
    """
    if header.dtype not in _DTYPES:
        raise ValueError(f"the tensor {key!r} is of dtype {header.dtype}, expected one of {', '.join(_DTYPES)}")
    return _DTYPES[header.dtype]


def tensor_bytes(key: str, header: Tensor) -> int:
    """The size of a tensor in bytes."""
    return math.prod(header.shape) * numpy_dtype(key, header).itemsize


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


def check_finite(key: str, array: np.ndarray) -> None:
    """Raises a ValueError where values are NaN or infinite, with the tensor's name and their number."""
    wrong = count_not_finite(array)
    if wrong:
        raise _not_finite(key, array, wrong)


def _not_finite(key: str, array: np.ndarray, wrong: int) -> ValueError:
    return ValueError(
        f"the tensor {key!r} ({array.dtype.name}) has {wrong} of {array.size} values that are NaN or infinite: "
        "take an earlier checkpoint of the run, or a dtype of wider range"
    )
