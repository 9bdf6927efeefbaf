"""Texts: one column or several, and where there is one to be given, the answer; tokenised when they are asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from tvjax.data.examples import Examples


@dataclasses.dataclass(frozen=True, eq=False)
class Texts(Examples):
    """Texts by column, ``{"premise": ..., "hypothesis": ...}``.

    `read` takes a key to one value for each column, in their order.

    Attributes:
      columns: names of the columns; templates name them in braces.
      completion: the one of them that holds the answer to be given; "" where there is none.

    >>> rows = [("it rains", "it is wet"), ("it rains", "it is dry")]
    >>> texts = Texts("weather", range(2), rows.__getitem__, columns=("premise", "hypothesis"))
    >>> texts[1]
    {'premise': 'it rains', 'hypothesis': 'it is dry'}
    """

    kind = "texts"

    columns: tuple[str, ...] = ()
    completion: str = ""

    @property
    def prompts(self) -> tuple[str, ...]:
        """The columns without the answer."""
        return tuple(column for column in self.columns if column != self.completion)

    def _decode(self, stored: Sequence[Any], place: str) -> dict[str, str]:
        return checked_texts(self.columns, self.completion, stored, place)

    def _content(self, stored: Sequence[Any], place: str) -> bytes:
        texts = [text.encode() for text in self._decode(stored, place).values()]
        return b"".join(len(text).to_bytes(8, "little") + text for text in texts)


def checked_texts(columns: Sequence[str], completion: str, values: Sequence[Any], place: str) -> dict[str, str]:
    """The texts of one example; numbers are written out.

    Raises:
      ValueError: for a value that is no text, one that cannot be encoded, or an example without a letter in it.

    >>> checked_texts(("question", "answer"), "answer", ("how much?", 3.5), "line 7")
    {'question': 'how much?', 'answer': '3.5'}
    """
    found = {}
    for column, value in zip(columns, values, strict=True):
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(f"{place}: the column {column!r} has {value!r}, expected a text")
        text = f"{value:g}" if isinstance(value, float) else str(value)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{place}: the column {column!r} has half of a surrogate pair ({error.reason})") from error
        found[column] = text
    asked = [text for column, text in found.items() if column != completion]
    if not any(text.strip() for text in asked):
        raise ValueError(f"{place} has no text: remove it, or write one")
    if completion and not found[completion].strip():
        raise ValueError(f"{place} has nothing in the column {completion!r}, the answer: remove it, or write one")
    return found
