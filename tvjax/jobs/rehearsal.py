"""A merge up to the first value that it reads: what its options cannot be is said before anything is read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tvjax import tree
from tvjax.on_disk import DiskArray


class _Reached(Exception):
    """The merge has checked what it can without values."""


class _Unread(DiskArray):
    """A leaf of which there is no more than its shape."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__(shape, np.float32, self._reach)

    @property
    def known_finite(self) -> bool:
        return True

    @property
    def __jax_array__(self) -> Any:  # a program that is given the leaf asks for it first
        return self._reach()

    def _reach(self) -> np.ndarray:
        raise _Reached


def rehearse(merge: Callable[..., Any], shapes: Sequence[Mapping[str, tuple[int, ...]]], **trees: Any) -> None:
    """Raises what a merge raises before it reads its task vectors: options that are out of range, or name no leaf.

    Args:
      merge: a function of the task vectors.
      shapes: of the leaves of each of them, by path.
      **trees: shapes by path of further trees, by the name of the argument.

    >>> from tvjax.merge import ties
    >>> rehearse(lambda taus: ties(taus, density=2.0), [{"w": (2, 3)}] * 2)
    Traceback (most recent call last):
    ...
    ValueError: density must be in (0, 1], found 2.0
    """
    unread = [tree.nest({path: _Unread(shape) for path, shape in each.items()}) for each in (*shapes, *trees.values())]
    with contextlib.suppress(_Reached):
        merge(unread[: len(shapes)], **dict(zip(trees, unread[len(shapes) :], strict=True)))
