"""Arrays in pieces: which a process owns, where they lie in a file, and how they get straight to their devices.

A checkpoint may have a tensor transposed, or several parameters in one. What turns a tensor into a parameter is a view
(`tvjax.models.key_table.Source.to_ours`), so a piece of a parameter is a strided piece of the tensor: it is read from a
mapped file, and written to its places, without the rest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike

from tvjax import processes
from tvjax.checkpoints.memory import aligned_memory, contiguous
from tvjax.factors import is_low_rank

_CHUNK = 2**21  # bytes of a piece that are brought in order and written at once
Index = tuple[Any, ...]  # a slice for each axis
View = Callable[[np.ndarray], np.ndarray]


def owned_pieces(array: Any) -> Iterator[tuple[Index, np.ndarray]]:
    """The pieces of an array that this process writes, each on the host when its turn comes.

    Together the processes have every value. Of what a process has for itself alone, the first writes its own.

    >>> [(index, piece.tolist()) for index, piece in owned_pieces(np.ones(2))]
    [((slice(None, None, None),), [1.0, 1.0])]
    """
    if is_low_rank(array):
        array = jnp.asarray(array)
    if isinstance(array, jax.Array):
        for shard in array.addressable_shards:
            if shard.replica_id == 0 and (not array.is_fully_addressable or processes.is_first()):
                yield shard.index, np.asarray(shard.data)
    elif processes.is_first():
        yield (slice(None),) * np.ndim(array), np.asarray(array)


class Runs(NamedTuple):
    """Where a piece lies in its tensor.

    Attributes:
      order: of the piece's axes, as they lie in the tensor.
      length: entries of the tensor that stand in a row.
      starts: the first entry of each run, in the order of the transposed piece.
    """

    order: tuple[int, ...]
    length: int
    starts: np.ndarray


def runs_of(view: View, shape: tuple[int, ...], index: Index) -> Runs:
    """Where the piece of a parameter lies in the tensor that the parameter is a view of.

    Args:
      view: of the tensor to the parameter.
      shape: of the tensor.
      index: of the piece in the parameter.

    Raises:
      ValueError: `view` copies.

    >>> runs_of(np.transpose, (2, 6), (slice(0, 3), slice(0, 2)))  # 3 inputs of 6, 2 outputs of 2
    Runs(order=(1, 0), length=3, starts=array([0, 6]))
    """
    tensor = np.empty(shape, np.bool_)  # never read nor written: it is asked for its layout, and takes no memory
    piece = view(tensor)[(*index, ...)]  # of no axes too a view
    if not np.may_share_memory(piece, tensor) and piece.size:
        raise ValueError("the parameter is no view of its tensor, so it cannot be written in pieces")
    order = tuple(sorted(range(piece.ndim), key=lambda axis: -piece.strides[axis]))
    axes = [(piece.shape[axis], piece.strides[axis]) for axis in order if piece.shape[axis] != 1]
    length = 1
    while axes and axes[-1][1] == length:
        length *= axes.pop()[0]
    starts = np.array([piece.__array_interface__["data"][0] - tensor.__array_interface__["data"][0]])
    for number, stride in axes:
        starts = (starts[:, None] + stride * np.arange(number)).reshape(-1)
    return Runs(order, length, starts)


def write_piece(descriptor: int, offset: int, runs: Runs, piece: np.ndarray) -> None:
    """Writes a piece of a tensor to its places in an open file, brought in order a part at a time.

    Args:
      descriptor: of the file.
      offset: where the tensor begins in it.
      runs: where the piece lies in the tensor.
      piece: its values, of the dtype of the tensor.
    """
    moved = piece.transpose(runs.order) if piece.ndim else piece.reshape(1)
    row = max(1, moved[:1].size)
    step = len(moved) if moved.flags.c_contiguous else max(1, _CHUNK // (row * piece.itemsize))
    for first in range(0, len(moved), max(1, step)):
        values = contiguous(moved[first : first + step]).reshape(-1)
        written = 0
        while written < values.size:
            run, inside = divmod(first * row + written, runs.length)
            count = min(runs.length - inside, values.size - written)
            at = offset + (int(runs.starts[run]) + inside) * piece.itemsize
            _write(descriptor, values[written : written + count], at)
            written += count


def _write(descriptor: int, values: np.ndarray, at: int) -> None:
    data = values.view(np.uint8).data
    while data.nbytes:  # one call writes two gibibytes at most
        count = os.pwrite(descriptor, data, at)
        at, data = at + count, data[count:]


def read_sharded(
    parameter: np.ndarray, sharding: Sharding, dtype: DTypeLike | None, check: Callable[[np.ndarray], None]
) -> jax.Array:
    """An array of which every device gets its piece of a mapped file, and no process reads those of others.

    Args:
      parameter: a view of the mapped tensor.
      sharding: of the array.
      dtype: of the array; None keeps that of the file.
      check: called with every piece.
    """
    own = jnp.dtype(parameter.dtype if dtype is None else dtype)
    known: dict[tuple[Any, ...], np.ndarray] = {}  # devices may have the same piece

    def read(index: Index | None) -> np.ndarray:
        where = index or ()
        key = tuple((part.start, part.stop) for part in where)
        if key not in known:
            piece = parameter[(*where, ...)]
            with np.errstate(over="ignore"):  # what became infinite is found by the check
                known[key] = _copied(piece).astype(own, copy=False)
            check(known[key])
        return known[key]

    return jax.make_array_from_callback(parameter.shape, sharding, read, dtype=own)


def _copied(piece: np.ndarray) -> np.ndarray:
    """The values in memory of their own, which an array of JAX may keep."""
    memory = aligned_memory(piece.nbytes)
    found = contiguous(piece, memory)
    if found is piece:
        found = memory.view(piece.dtype).reshape(piece.shape)
        np.copyto(found, piece)
    return found
