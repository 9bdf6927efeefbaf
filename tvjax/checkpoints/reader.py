"""Reading safetensors files tensor by tensor: nothing before it is asked for, and all of it checked."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO

import numpy as np
import safetensors

from tvjax.checkpoints.memory import aligned_memory, contiguous, copy
from tvjax.checkpoints.tensor_dtypes import numpy_dtype, tensor_bytes
from tvjax.finite import WAY_OUT, count_not_finite
from tvjax.kinds import as_path
from tvjax.models.key_table import Tensor
from tvjax.on_disk import DiskArray

_CHUNK, _ROWS = 2**20, 64  # bytes that are read at once, and rows that make whole tiles where they are transposed


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


@contextlib.contextmanager
def open_tensors(*paths: str | os.PathLike[str]) -> Iterator[Tensors]:
    """Opens safetensors files; only their headers are read.

    Raises:
      ValueError: for a file that is not there, is no safetensors file, or was cut short; or two with one key.
    """
    with contextlib.ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        for path in [str(as_path(path)) for path in paths]:
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


def check_finite(key: str, array: np.ndarray) -> None:
    """Raises a ValueError where values are NaN or infinite, with the tensor's name and their number."""
    wrong = count_not_finite(array)
    if wrong:
        raise _not_finite(key, array, wrong)


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


def _not_finite(key: str, array: np.ndarray, wrong: int) -> ValueError:
    return ValueError(
        f"the tensor {key!r} ({array.dtype.name}) has {wrong} of {array.size} values that are NaN or infinite: "
        f"{WAY_OUT}"
    )


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
