"""A table that is too wide for the terminal as several, one below the other, each with the names of the rows.

Texts that are too long for their column go on in the next line, paths after a slash.
"""

from __future__ import annotations

import re
from itertools import takewhile
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

_TEXT = 14  # characters that a text is given at least, or what it has


def folded(table: Table, width: int) -> list[Table]:
    """The table in parts that fit, columns in their order; the first columns, up to the first of numbers, in each.

    Args:
      table: its numbers stand right, and are never cut.
      width: of the terminal.

    Returns:
      The table alone where it fits.

    >>> table = Table("model")
    >>> for name in ("first", "second", "third"):
    ...     table.add_column(name, justify="right")
    >>> table.add_row("a", "1", "2", "3")
    >>> [[str(column.header) for column in part.columns] for part in folded(table, 25)]
    [['model', 'first'], ['model', 'second'], ['model', 'third']]
    """
    names = list(takewhile(lambda column: column.justify != "right", table.columns)) or table.columns[:1]
    start = _needed(table, names)
    parts: list[list[Column]] = [[]]
    for column in table.columns[len(names) :]:
        if parts[-1] and start + _needed(table, [*parts[-1], column]) > width:
            parts.append([])
        parts[-1].append(column)
    made = [_of(table, [*names, *part]) for part in parts]
    made[0].title, made[-1].caption = table.title, table.caption
    return made


def _needed(table: Table, columns: list[Column]) -> int:
    """Characters that columns take at least, with what stands between them."""
    left, right = table.padding[3], table.padding[1]
    total = 0
    for column in columns:
        header, *cells = (max(map(cell_len, str(text).split("\n"))) for text in (column.header, *column.cells))
        longest, text = max(cells, default=0), column.justify != "right"
        own = max(min(longest, _TEXT) if text else longest, header if column.no_wrap else min(header, _TEXT))
        total += own + left + right
    return total + len(columns) + 1  # lines between columns, and on both sides


def _of(table: Table, columns: list[Column]) -> Table:
    made = Table(box=table.box, title_justify=table.title_justify, title_style=table.title_style)
    for column in columns:
        made.add_column(
            _breaking(column.header),
            justify=column.justify,
            no_wrap=column.no_wrap,
            overflow=column.overflow,
            style=column.style,
        )
    for row, cells in zip(table.rows, zip(*map(_cells, columns), strict=True), strict=True):
        made.add_row(*cells, end_section=row.end_section)
    return made


class Breaking:
    """A text that is broken after spaces and slashes, then after dots and underscores, and last within a word."""

    def __init__(self, text: str):
        """The text, of one line or several."""
        self.text = text

    def __str__(self) -> str:
        return self.text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text("\n".join(line for whole in self.text.split("\n") for line in broken(whole, options.max_width)))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        longest = max(map(cell_len, self.text.split("\n")))
        return Measurement(min(longest, _TEXT), longest).clamp(max_width=options.max_width)


def broken(text: str, width: int, after: tuple[str, ...] = (" ", "/", "._")) -> list[str]:
    """The lines of a text, none wider than `width`.

    >>> broken("vision/embeddings/class_token", 20), broken("vision/embeddings/class_token", 12)
    (['vision/embeddings/', 'class_token'], ['vision/', 'embeddings/', 'class_token'])
    >>> broken("zeroed by rule: an embedding", 15), broken("abcdef", 4)
    (['zeroed by rule:', 'an embedding'], ['abcd', 'ef'])
    """
    if cell_len(text) <= width:
        return [text]
    if not after:
        return [text[start : start + width] for start in range(0, len(text), width)]
    lines = [""]
    for piece in re.findall(f"[^{after[0]}]*[{after[0]}]?", text):
        if cell_len((lines[-1] + piece).rstrip()) <= width:
            lines[-1] += piece
        else:
            lines += broken(piece, width, after[1:])
    return [line.rstrip() for line in lines if line]


def _cells(column: Column) -> list[Any]:
    return list(column.cells if column.justify == "right" else map(_breaking, column.cells))


def _breaking(cell: Any) -> Any:
    return Breaking(cell) if isinstance(cell, str) else cell
