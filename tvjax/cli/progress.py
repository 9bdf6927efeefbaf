"""Progress on the standard error: a bar on a terminal, else plain lines; in one of several processes only."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from tvjax.cli.output import is_first_process

Report = Callable[[int, int, str], None]
PAUSE = 2.0  # seconds between two plain lines, at least


@contextlib.contextmanager
def progress(title: str, quiet: bool) -> Iterator[Report]:
    """Gives a function of (steps done, steps in all, what was done), as `tvjax.fit` takes one.

    >>> with progress("fit", quiet=True) as report:
    ...     report(1, 2, "vision/blocks/1")
    """
    if quiet or not is_first_process():
        yield lambda done, total, name: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        before = (TextColumn("{task.fields[title]}", markup=False), BarColumn(), MofNCompleteColumn())
        after = (TimeRemainingColumn(elapsed_when_finished=True), TextColumn("{task.description}", markup=False))
        with Progress(*before, *after, console=Console(stderr=True)) as bars:
            bar = bars.add_task("", title=title, total=None)
            yield lambda done, total, name: bars.update(bar, completed=done, total=total, description=name)
    else:
        yield Lines(title)


class Lines:
    """Progress as plain lines: the first, the last, and in between one every few seconds, with the time that is left.

    >>> lines = Lines("fit", clock=iter([0, 30, 31, 40]).__next__)
    >>> with contextlib.redirect_stderr(sys.stdout):
    ...     for done in (1, 2, 3):
    ...         lines(done, 4, f"vision/blocks/{done - 1}")
    fit 1/4: vision/blocks/0 (1:30 left)
    fit 3/4: vision/blocks/2 (0:13 left)
    """

    def __init__(self, title: str, clock: Callable[[], float] = time.monotonic):
        """Lines that begin with `title`; `clock` gives seconds."""
        self.title, self.clock = title, clock
        self.began = self.now = clock()
        self.done, self.printed = 0, float("-inf")

    def __call__(self, done: int, total: int, name: str) -> None:
        """Tells that so many steps of so many are done, the last of them `name`."""
        if done <= self.done:  # another round of steps, which began where the last one ended
            self.began, self.printed = self.now, float("-inf")
        self.done, self.now = done, self.clock()
        if done < total and self.now - self.printed < PAUSE:
            return
        self.printed = self.now
        left = int((self.now - self.began) / max(done, 1) * (total - done))
        text = f" ({left // 60}:{left % 60:02d} left)" if left else ""
        print(f"{self.title} {done}/{total}: {name}{text}", file=sys.stderr, flush=True)
