"""Checkpoints walked side by side: their leaves in turn, read ahead, and hashed as they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from tvjax.checkpoints.folder import Checkpoint
from tvjax.checkpoints.memory import Scratch
from tvjax.checkpoints.safetensors import Fingerprint
from tvjax.progress import Progress


class SideBySide:
    """Walks checkpoints side by side in the order of their paths, which is that of fingerprints.

    While one leaf is computed with, the next is read: each side has two sets of memory, and a thread that reads,
    transposes and hashes.
    """

    def __init__(self, *sides: Checkpoint):
        self._sides = sides
        self._digests = [Fingerprint() for _ in sides]
        self._memory = [(Scratch(), Scratch()) for _ in sides]
        self._pools = [ThreadPoolExecutor(1) for _ in sides]
        self._other = ThreadPoolExecutor(1)

    def __enter__(self) -> SideBySide:
        return self

    def __exit__(self, *error: Any) -> None:
        for pool in (*self._pools, self._other):
            pool.shutdown(cancel_futures=True)

    def leaves(self, progress: Progress | None) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """Each path with the leaf of each side, None where a side lacks it; valid until the next."""
        paths = sorted({path for side in self._sides for path in side.shapes})
        ahead = [self._start(paths[0], 0)]
        for number, path in enumerate(paths):
            arrays = tuple(None if future is None else future.result() for future in ahead.pop())
            if number + 1 < len(paths):
                ahead.append(self._start(paths[number + 1], number + 1))
            yield path, arrays
            if progress is not None:
                progress(number + 1, len(paths), path)

    def submit(self, function: Callable[..., None], *arguments: Any) -> Future[None]:
        """Runs a function beside everything else."""
        return self._other.submit(function, *arguments)

    def fingerprints(self) -> list[str]:
        """Of the sides, at the end of the walk."""
        return [digest.hexdigest() for digest in self._digests]

    def _start(self, path: str, number: int) -> list[Future[np.ndarray] | None]:
        return [
            self._pools[index].submit(self._read, index, path, number % 2) if path in side.shapes else None
            for index, side in enumerate(self._sides)
        ]

    def _read(self, index: int, path: str, turn: int) -> np.ndarray:
        array = self._sides[index].read(path, self._memory[index][turn])
        self._digests[index].add(path, array)
        return array
