"""Progress of long work, told to a function of the caller; the library itself prints nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

Progress = Callable[[int, int, str], None]
"""Takes the steps done, the steps in all, and what was done last; ``(0, 0, what)`` where something of unknown length is
begun."""

Item = TypeVar("Item")


def begin(progress: Progress | None, what: str) -> None:
    """Tells that something is begun whose steps are not counted."""
    if progress is not None:
        progress(0, 0, what)


def counted(items: Iterable[Item], progress: Progress | None, what: str) -> Iterator[Item]:
    """Gives the items on, and tells when the work with each of them is done.

    Args:
      items: where they have no length, each is told as something that was begun.
      progress: whom to tell.
      what: is done with the items.

    >>> for _ in counted("ab", lambda *step: print(*step), "letters"):
    ...     pass
    1 2 letters
    2 2 letters
    """
    total = len(items) if isinstance(items, Sized) else 0
    for number, item in enumerate(items, 1):
        yield item
        if progress is not None:
            progress(number if total else 0, total, what if total else f"{what} {number}")
