"""Batches made in the background while the last one is being used."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Float, Int

from tvjax.data.examples import Examples
from tvjax.data.images import Images
from tvjax.stages import Batch

Given = TypeVar("Given")
Item = TypeVar("Item")


class Processed(NamedTuple):
    """A batch, and what was lost in making it.

    Attributes:
      batch: of the examples.
      cut: how many of its texts were longer than the model takes.
    """

    batch: Batch
    cut: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Loader:
    """Batches of examples as one model sees them, read and processed in a background thread.

    Every pass yields the same batches in the same order, and starts a thread of its own, which ends with the pass,
    also where the consumer stops early.

    Attributes:
      examples: images or texts.
      process: examples and their labels, or None, to a batch.
      size: examples in a batch; the last holds what is left.
      ahead: batches that may wait to be used.

    >>> images = Images("grey", range(3), lambda shade: np.full((4, 4), shade, np.uint8))
    >>> [len(batch.inputs["pixels"]) for batch in image_batches(images, np.stack, size=2)]
    [2, 1]
    """

    examples: Examples
    process: Callable[[Sequence[Any], Int[np.ndarray, " examples"] | None], Processed]
    size: int
    ahead: int = 2
    _cut: dict[int, int] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.size < 1 or self.ahead < 1:
            raise ValueError(
                f"found batches of {self.size} {self.examples.kind}, {self.ahead} ahead, expected at least 1 of each"
            )

    def __len__(self) -> int:
        return -(-len(self.examples) // self.size)

    def __iter__(self) -> Iterator[Batch]:
        return prefetch(self._batch, range(0, len(self.examples), self.size), self.ahead)

    def whole(self) -> Batch:
        """All examples as one batch."""
        batches = list(self)
        if len({tuple(leaf.shape[1:] for leaf in jax.tree.leaves(batch)) for batch in batches}) > 1:
            return dataclasses.replace(self, size=len(self.examples)).whole()  # texts are padded to one length
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of the batches that were made so far."""
        cut = sum(self._cut.values())
        return (f"{cut} of {len(self.examples)} texts are longer than the model takes, and were cut",) if cut else ()

    def _batch(self, start: int) -> Batch:
        chosen = range(start, min(start + self.size, len(self.examples)))
        labels = None if self.examples.labels is None else self.examples.labels[chosen.start : chosen.stop]
        made = self.process([self.examples[index] for index in chosen], labels)
        self._cut[chosen.start] = made.cut  # by place: another pass counts nothing twice
        return made.batch


def image_batches(
    images: Images,
    pixels: Callable[[Sequence[np.ndarray]], Float[np.ndarray, "images height width 3"]],
    size: int,
    ahead: int = 2,
) -> Loader:
    """Batches of images, ``{"pixels": [images, height, width, 3]}``, with their classes.

    Args:
      images: the images.
      pixels: arrays of 8-bit values to a model's inputs, as `tvjax.checkpoints.Processor.pixels`.
      size: images in a batch.
      ahead: batches that may wait to be used.
    """
    return Loader(images, lambda found, labels: Processed(Batch({"pixels": pixels(found)}, labels)), size, ahead)


def prefetch(function: Callable[[Given], Item], items: Iterable[Given], ahead: int = 2) -> Iterator[Item]:
    """``map(function, items)``, computed in order by one background thread, at most `ahead` results in advance.

    An exception of the function is raised where its result would have come. When the iterator is closed, what has not
    begun is dropped, and the thread has ended.

    >>> list(prefetch(str, range(3)))
    ['0', '1', '2']
    """
    waiting: collections.deque[Future[Item]] = collections.deque()
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
