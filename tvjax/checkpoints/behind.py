"""Work on one leaf that goes on while the next is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from tvjax.checkpoints.memory import Scratch, aligned_memory

_LARGE = 2**25  # bytes of an array from which on nothing is computed beside it: there would be two of them
_THREADS = 2


class Behind:
    """Hashes and writes arrays behind what computes them; leaving the block waits for all.

    >>> done = []
    >>> with Behind() as behind:
    ...     for number in range(3):
    ...         array = behind.take((2,), np.float32)
    ...         array[:] = number
    ...         behind.do(lambda total=array.sum(): done.append(total))
    >>> [float(one) for one in done]
    [0.0, 2.0, 4.0]
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS)
        self._futures: list[Future[Any]] = []
        self._memory = [Scratch(), Scratch()]

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        self._pool.shutdown()
        if kind is None:
            self.wait()

    def take(self, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
        """Memory for an array, which work may still be done on when the next is taken, but not the one after it."""
        own = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * own.itemsize
        if size > _LARGE:
            self.wait()
            return aligned_memory(size).view(own).reshape(shape)
        self._memory.reverse()
        return self._memory[0].take("array", size).view(own).reshape(shape)

    def do(self, *functions: Callable[[], Any]) -> None:
        """Begins some work side by side, after what was begun before."""
        self.wait()
        self._futures = [self._pool.submit(function) for function in functions]

    def wait(self) -> None:
        """Waits for what was begun; raises what it raised."""
        futures, self._futures = self._futures, []
        for future in futures:
            future.result()
