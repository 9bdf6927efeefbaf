"""Batches made in the background while the last one is being used."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from jaxtyping import Float

from tvjax.data.images import Images
from tvjax.stages import Batch

Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclasses.dataclass(frozen=True, eq=False)
class Loader:
    """Batches of images as one model sees them, read and processed in a background thread.

    Every pass yields the same batches in the same order, and starts a thread of its own, which ends with the pass,
    also where the consumer stops early.

    Attributes:
      images: the images.
      pixels: arrays of 8-bit values to a model's inputs, as `tvjax.checkpoints.Processor.pixels`.
      size: images in a batch; the last holds what is left.
      ahead: batches that may wait to be used.

    >>> images = Images("grey", range(3), lambda shade: np.full((4, 4), shade, np.uint8))
    >>> [len(batch.inputs["pixels"]) for batch in Loader(images, np.stack, size=2)]
    [2, 1]
    """

    images: Images
    pixels: Callable[[Sequence[np.ndarray]], Float[np.ndarray, "images height width 3"]]
    size: int
    ahead: int = 2

    def __post_init__(self) -> None:
        if self.size < 1 or self.ahead < 1:
            raise ValueError(f"found batches of {self.size} images, {self.ahead} ahead, expected at least 1 of each")

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __iter__(self) -> Iterator[Batch]:
        return prefetch(self._batch, range(0, len(self.images), self.size), self.ahead)

    def whole(self) -> Batch:
        """All images as one batch."""
        batches = list(self)
        pixels = np.concatenate([batch.inputs["pixels"] for batch in batches])
        return Batch({"pixels": pixels}, self.images.labels)

    def _batch(self, start: int) -> Batch:
        chosen = range(start, min(start + self.size, len(self.images)))
        labels = None if self.images.labels is None else self.images.labels[chosen.start : chosen.stop]
        return Batch({"pixels": self.pixels([self.images[index] for index in chosen])}, labels)


def prefetch(function: Callable[[Given], Made], items: Iterable[Given], ahead: int = 2) -> Iterator[Made]:
    """``map(function, items)``, computed in order by one background thread, at most `ahead` results in advance.

    An exception of the function is raised where its result would have come. When the iterator is closed, what has not
    begun is dropped, and the thread has ended.

    >>> list(prefetch(str, range(3)))
    ['0', '1', '2']
    """
    waiting: collections.deque[Future[Made]] = collections.deque()
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tvjax-loader")
    try:
        for item in items:
            waiting.append(thread.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        thread.shutdown(wait=True, cancel_futures=True)
