"""A table that is too wide for the terminal as several, one below the other, each with the names of the rows."""

from __future__ import annotations

from itertools import takewhile

from rich.cells import cell_len
from rich.table import Column, Table

_TEXT = 14  # characters that a text is given at least, or what it has


def folded(table: Table, width: int) -> list[Table]:
    """The table in parts that fit, columns in their order; the first columns, up to the first of numbers, in each.

    Args:
      table: its numbers stand right, and are never cut.
      width: of the terminal.

    Returns:
      The table itself where it fits.

    >>> table = Table("model")
    >>> for name in ("first", "second", "third"):
    ...     table.add_column(name, justify="right")
    >>> table.add_row("a", "1", "2", "3")
    >>> [[column.header for column in part.columns] for part in folded(table, 25)]
    [['model', 'first'], ['model', 'second'], ['model', 'third']]
    """
    names = list(takewhile(lambda column: column.justify != "right", table.columns)) or table.columns[:1]
    start = _needed(table, names)
    parts: list[list[Column]] = [[]]
    for column in table.columns[len(names) :]:
        if parts[-1] and start + _needed(table, [*parts[-1], column]) > width:
            parts.append([])
        parts[-1].append(column)
    if len(parts) == 1:
        return [table]
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
            column.header, justify=column.justify, no_wrap=column.no_wrap, overflow=column.overflow, style=column.style
        )
    for row, cells in zip(table.rows, zip(*(column.cells for column in columns), strict=True), strict=True):
        made.add_row(*cells, end_section=row.end_section)
    return made
