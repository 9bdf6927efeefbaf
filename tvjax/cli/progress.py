"""Progress on the standard error: a bar on a terminal, else plain lines."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

Report = Callable[[int, int, str], None]


@contextlib.contextmanager
def progress(title: str, quiet: bool) -> Iterator[Report]:
    """Gives a function of (steps done, steps in all, what was done), as `tvjax.fit` takes one.

    >>> with progress("fit", quiet=True) as report:
    ...     report(1, 2, "vision/blocks/1")
    """
    if quiet:
        yield lambda done, total, name: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.fields[title]}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True)) as bars:
            bar = bars.add_task("", title=title, total=None)
            yield lambda done, total, name: bars.update(bar, completed=done, total=total, description=name)
    else:
        yield lambda done, total, name: print(f"{title} {done}/{total}: {name}", file=sys.stderr, flush=True)
