"""Host memory for tensors: aligned as JAX wants it, reused from one to the next, filled fast from transposed views."""

from __future__ import annotations

import contextlib
import math
import mmap

import jax
import numpy as np

_LARGE = 2**22  # bytes from which on memory is asked of the system for itself
_WORD = 8  # bytes that change places at once when a matrix is transposed
_ROWS, _COLUMNS = 64, 2048  # of a tile of it, which stays in the cache


class Scratch:
    """Memory by name that grows to the largest tensor and is then reused; new memory costs more than a copy.

    >>> scratch = Scratch()
    >>> first = scratch.take("raw", 8)
    >>> np.shares_memory(first, scratch.take("raw", 4)), scratch.size
    (True, 8)
    """

    def __init__(self) -> None:
        self._pieces: dict[str, np.ndarray] = {}

    def take(self, name: str, size: int) -> np.ndarray:
        """So many bytes, flat; what was taken under this name before is overwritten."""
        if name not in self._pieces or self._pieces[name].size < size:
            self._pieces.pop(name, None)
            self._pieces[name] = aligned_memory(size)
        return self._pieces[name][:size]

    def wide(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A float32 array in the memory of that name."""
        return self.take(name, 4 * math.prod(shape)).view(np.float32).reshape(shape)

    def trim(self, most: int) -> None:
        """Gives back the pieces of more bytes."""
        self._pieces = {name: piece for name, piece in self._pieces.items() if piece.size <= most}

    @property
    def size(self) -> int:
        """Bytes of all pieces."""
        return sum(piece.size for piece in self._pieces.values())


def aligned_memory(size: int) -> np.ndarray:
    """New memory of so many bytes, aligned so that an array of JAX on a CPU takes it without a copy."""
    if size >= _LARGE and hasattr(mmap, "MADV_HUGEPAGE"):
        mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # In small pages, the system would take longer to clear and map it than a file takes to be read into it.
        with contextlib.suppress(OSError):  # a system without large pages
            mapped.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(mapped, np.uint8)
    memory = np.empty(size + 63, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size]


def contiguous(view: np.ndarray, memory: np.ndarray | None = None) -> np.ndarray:
    """The values in C order: the view itself where it has it, else a copy.

    Args:
      view: any strides.
      memory: flat 8-bit values to copy into, as many bytes or more; None takes new memory.

    >>> contiguous(np.arange(6).reshape(2, 3).T).tolist()
    [[0, 3], [1, 4], [2, 5]]
    """
    if view.flags.c_contiguous:
        return view
    memory = aligned_memory(view.nbytes) if memory is None else memory
    out = memory[: view.nbytes].view(view.dtype).reshape(view.shape)
    copy(view, out)
    return out


def copy(source: np.ndarray, out: np.ndarray) -> None:
    """Copies values into an array of the same shape and dtype, fast where one of the two is a transposed matrix.

    >>> out = np.empty((2, 3), np.int16)
    >>> copy(np.arange(6, dtype=np.int16).reshape(3, 2).T, out)
    >>> out.tolist()
    [[0, 2, 4], [1, 3, 5]]
    """
    size = source.itemsize
    if source.ndim == 2 and size <= _WORD and source.strides[1] == out.strides[0] == size:
        _transpose(source.view(f"u{size}"), out.T.view(f"u{size}"))
    elif source.ndim == 2 and size <= _WORD and source.strides[0] == out.strides[1] == size:
        _transpose(source.T.view(f"u{size}"), out.view(f"u{size}"))
    else:
        np.copyto(out, source)


def _transpose(rows: np.ndarray, out: np.ndarray) -> None:
    """``out[...] = rows.T``, both with the entries of a row side by side.

    NumPy moves one entry at a time, whatever its size. So entries that stand under one another are first gathered into
    words, row after row, and the words are moved.
    """
    group = _WORD // rows.itemsize
    words = np.empty((_ROWS // group, min(_COLUMNS, rows.shape[1]), group), rows.dtype)
    grouped = len(rows) // group * group
    for top in range(0, grouped, _ROWS):
        for left in range(0, rows.shape[1], _COLUMNS):
            tile = rows[top : min(top + _ROWS, grouped), left : left + _COLUMNS]
            gathered = words[: len(tile) // group, : tile.shape[1]]
            for place in range(group):
                gathered[..., place] = tile[place::group]
            target = out[left : left + _COLUMNS, top : top + len(tile)]
            np.copyto(target.view(f"u{_WORD}"), gathered.view(f"u{_WORD}")[..., 0].T)
    np.copyto(out[:, grouped:], rows[grouped:].T)


def to_jax(array: np.ndarray) -> jax.Array:
    """The array as one of JAX, without a copy where it is in `aligned_memory` and the device is a CPU."""
    return jax.device_put(array)
