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
            TimeRemainingColumn,
        )

        before = (SpinnerColumn(), TextColumn("{task.fields[title]}", markup=False), BarColumn(), MofNCompleteColumn())
        after = (TimeRemainingColumn(elapsed_when_finished=True), TextColumn("{task.description}", markup=False))
        with Progress(*before, *after, console=Console(stderr=True)) as bars:
            bar = bars.add_task("", title=title, total=None)

            def report(done: int, total: int, name: str) -> None:
                if total:
                    bars.update(bar, completed=done, total=total, description=name)
                else:
                    bars.update(bar, description=name)

            yield report
    else:
        lines = Lines(title)
        with lines.alive():
            yield lines


class Lines:
    """Progress as plain lines: the first, the last, and in between one every few seconds, with the time that is left.

    Where nothing is told for a while, a line says what is going on, and for how long: after 2 seconds, 4 more, 8 more.

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
        self.started = self.began = self.now = self.told = clock()
        self.done, self.printed = 0, float("-inf")
        self.doing, self.wait = "starting", SILENCE
        self._lock = threading.Lock()

    def __call__(self, done: int, total: int, name: str) -> None:
        """Tells that so many steps of so many are done, the last of them `name`; without steps, that it is begun."""
        with self._lock:
            now = self.clock()
            self.told, self.wait = now, SILENCE
            if not total:
                self.doing = name
                self.done, self.began, self.now, self.printed = 0, now, now, float("-inf")
                return
            if done <= self.done:  # another round of steps, which began where the last one ended
                self.began, self.printed = self.now, float("-inf")
            self.done, self.now = done, now
            self.doing = f"after {done}/{total}, {name}"
            if done < total and now - self.printed < PAUSE:
                return
            self.printed = now
            left = _minutes((now - self.began) / max(done, 1) * (total - done))
            self._print(f" {done}/{total}: {name}{f' ({left} left)' if left != '0:00' else ''}")

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
