"""Checkpoints walked side by side: their leaves in turn, read ahead, and hashed as they are read."""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np

from tvjax.checkpoints.fingerprints import Fingerprint
from tvjax.checkpoints.memory import Scratch
from tvjax.progress import Progress

_TURNS = 4  # leaves that are there at once: a small one is soon done with, while a large one is still being read
_AHEAD = 2**28  # bytes of them; a larger one is there alone
_KEPT = 2**25  # bytes of a leaf whose memory is kept for the next


class Side(Protocol):
    """What has leaves to read: a `tvjax.checkpoints.folder.Checkpoint`, or what is made of task vectors."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the leaves, by path."""

    def leaf_bytes(self, path: str) -> int:
        """The size of a leaf in memory."""

    def read(self, path: str, scratch: Scratch) -> np.ndarray:
        """A leaf, contiguous; it may lie in the scratch."""


class _Started(NamedTuple):
    """A leaf that is being read, of each side, and the memory that it is read into."""

    path: str
    arrays: Sequence[Future[np.ndarray] | None]
    memory: Sequence[Scratch]


class SideBySide:
    """Walks sides in the order of their paths, which is that of fingerprints.

    While one leaf is computed with, the next are read: each side has some sets of memory, and a thread that reads,
    transposes and hashes.
    """

    def __init__(self, *sides: Side, hashed: Sequence[Side] | None = None):
        """Takes the sides, and which of them are hashed: all by default."""
        self._sides = sides
        self._digests = [Fingerprint() if hashed is None or side in hashed else None for side in sides]
        self._memory = [[Scratch() for _ in range(_TURNS)] for _ in sides]
        self._pools = [ThreadPoolExecutor(1) for _ in sides]

    def __enter__(self) -> SideBySide:
        return self

    def __exit__(self, *error: Any) -> None:
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)

    def leaves(self, progress: Progress | None) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """Each path with the leaf of each side, None where a side lacks it; valid until the next."""
        ahead = collections.deque(sorted({path for side in self._sides for path in side.shapes}))
        number, total = 0, len(ahead)
        started: collections.deque[_Started] = collections.deque()
        while ahead or started:
            while ahead and self._fits(ahead[0], started):
                started.append(self._start(ahead.popleft(), (number + len(started)) % _TURNS))
            path, arrays = started[0].path, tuple(one and one.result() for one in started[0].arrays)
            yield path, arrays
            del arrays
            for scratch in started.popleft().memory:
                scratch.trim(_KEPT)
            number += 1
            if progress is not None:
                progress(number, total, path)

    def fingerprints(self) -> list[str]:
        """Of the sides that are hashed, at the end of the walk."""
        return [digest.hexdigest() for digest in self._digests if digest is not None]

    def _fits(self, path: str, started: Collection[_Started]) -> bool:
        """Whether a leaf is read beside those that are there."""
        size = self._bytes(path) + sum(self._bytes(one.path) for one in started)
        return not started or (len(started) < _TURNS and size <= _AHEAD)

    def _bytes(self, path: str) -> int:
        """What the leaf takes, of all sides."""
        return sum(side.leaf_bytes(path) for side in self._sides if path in side.shapes)

    def _start(self, path: str, turn: int) -> _Started:
        arrays = [
            self._pools[index].submit(self._read, index, path, turn) if path in side.shapes else None
            for index, side in enumerate(self._sides)
        ]
        return _Started(path, arrays, [memory[turn] for memory in self._memory])

    def _read(self, index: int, path: str, turn: int) -> np.ndarray:
        array = self._sides[index].read(path, self._memory[index][turn])
        digest = self._digests[index]
        if digest is not None:
            digest.add(path, array)
        return array
