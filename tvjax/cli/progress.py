"""Progress on the standard error: a bar on a terminal, else plain lines; in one of several processes only."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

from tvjax.cli.output import is_first_process

Report = Callable[[int, int, str], None]
PAUSE = 2.0  # seconds between two plain lines, at least
SILENCE = 2.0  # seconds until a line says what is going on, twice as many until the next, and so on
LONGEST = 60.0  # seconds until such a line, at most


@contextlib.contextmanager
def progress(title: str, quiet: bool) -> Iterator[Report]:
    """Gives a function of (steps done, steps in all, what was done), as `tvjax.fit` takes one.

    What is begun and has no steps to count is told as ``(0, 0, what)``.

    >>> with progress("fit", quiet=True) as report:
    ...     report(1, 2, "vision/blocks/1")
    """
    if quiet or not is_first_process():
        yield lambda done, total, name: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
        )

        before = (SpinnerColumn(), TextColumn("{task.fields[title]}", markup=False), BarColumn(), MofNCompleteColumn())
        after = (TextColumn("{task.fields[left]}", markup=False), TextColumn("{task.description}", markup=False))
        with Progress(*before, *after, console=Console(stderr=True)) as bars:
            bar, pace = bars.add_task("", title=title, total=None, left=""), Pace(time.monotonic())

            def report(done: int, total: int, name: str) -> None:
                if total:
                    left = pace.left(done, total, time.monotonic())
                    bars.update(bar, completed=done, total=total, description=name, left=left and f"{left} left")
                else:
                    pace.begin(time.monotonic())
                    bars.update(bar, description=name, left="")

            yield report
    else:
        lines = Lines(title)
        with lines.alive():
            yield lines


class Pace:
    """How long the steps of a round take, and so how long those that are left will.

    The first step and the longest of the others are not counted: what they wait for, programs to be compiled above all,
    is waited for once. So nothing is said before three steps are done.

    >>> pace = Pace(0)
    >>> [pace.left(done, 5, now) for done, now in ((1, 30), (2, 90), (3, 95), (4, 101))]
    ['', '', '0:10', '0:05']
    """

    def __init__(self, now: float):
        """A round of steps that begins now, in seconds."""
        self.begin(now)

    def begin(self, now: float) -> None:
        """Another round begins."""
        self.done, self.now = 0, now
        self._counted = self._longest = 0.0

    def left(self, done: int, total: int, now: float) -> str:
        """Minutes and seconds that are left after so many steps of so many, "" where nobody knows or none are."""
        if done <= self.done:
            self.begin(self.now)  # where the last round ended
        if self.done:
            self._counted, self._longest = self._counted + now - self.now, max(self._longest, now - self.now)
        self.done, self.now = done, now
        left = _minutes((self._counted - self._longest) / (done - 2) * (total - done)) if done > 2 else "0:00"
        return "" if left == "0:00" else left


class Lines:
    """Progress as plain lines: the first, the last, and in between one every few seconds, with the time that is left.

    Where nothing is told for a while, a line says what is going on, and for how long: after 2 seconds, 4 more, 8 more.

    >>> lines = Lines("fit", clock=iter([0, 30, 31, 40]).__next__)
    >>> with contextlib.redirect_stderr(sys.stdout):
    ...     for done in (1, 2, 3):
    ...         lines(done, 24, f"vision/blocks/{done - 1}")
    fit 1/24: vision/blocks/0
    fit 3/24: vision/blocks/2 (0:21 left)
    """

    def __init__(self, title: str, clock: Callable[[], float] = time.monotonic):
        """Lines that begin with `title`; `clock` gives seconds."""
        self.title, self.clock = title, clock
        self.started = self.told = clock()
        self.pace, self.printed = Pace(self.started), float("-inf")
        self.doing, self.wait = "starting", SILENCE
        self._lock = threading.Lock()

    def __call__(self, done: int, total: int, name: str) -> None:
        """Tells that so many steps of so many are done, the last of them `name`; without steps, that it is begun."""
        with self._lock:
            now = self.clock()
            self.told, self.wait = now, SILENCE
            if not total:
                self.doing, self.printed = name, float("-inf")
                self.pace.begin(now)
                return
            if done <= self.pace.done:  # another round of steps
                self.printed = float("-inf")
            left = self.pace.left(done, total, now)
            self.doing = f"after {done}/{total}, {name}"
            if done < total and now - self.printed < PAUSE:
                return
            self.printed = now
            self._print(f" {done}/{total}: {name}{left and f' ({left} left)'}")

    def still(self) -> None:
        """Says what is going on, where nothing was told for as long as one waits."""
        with self._lock:
            now = self.clock()
            if now - self.told >= self.wait:
                self.told, self.wait = now, min(2 * self.wait, LONGEST)
                self._print(f": {self.doing} ({_minutes(now - self.started)})")

    @contextlib.contextmanager
    def alive(self) -> Iterator[None]:
        """Calls `still` twice a second, beside everything else, until the block ends."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(SILENCE / 4):
                self.still()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()

    def _print(self, text: str) -> None:
        print(f"{self.title}{text}", file=sys.stderr, flush=True)


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
