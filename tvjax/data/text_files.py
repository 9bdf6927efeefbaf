"""Texts in files: JSON lines, tables with commas or tabs, and plain lines."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tvjax.data.examples import by_name, spelled, with_names
from tvjax.data.texts import Texts, checked_texts
from tvjax.kinds import kind_of

ENDINGS = (".jsonl", ".csv", ".tsv", ".txt")


def read_text_file(
    file: str | os.PathLike[str],
    class_names: Sequence[str] | None = None,
    *,
    text: str | None = None,
    label: str | None = None,
    completion: str | None = None,
) -> Texts:
    r"""The texts of a file, held in memory; its ending says how it is written.

    Args:
      file: ``.jsonl``, an object a line; ``.csv`` or ``.tsv``, the first line names the columns; ``.txt``, a text a
        line, in the one column ``text``. UTF-8.
      class_names: names of the classes, in the order of the labels; None: those that occur, sorted.
      text: the columns of the texts, joined by commas; None: ``text``, or ``prompt`` with the answer in ``completion``.
      label: the column of the classes, names or numbers; None: ``label`` where there is one; "" for none.
      completion: the column of the answers; None or "" for none.

    Raises:
      ValueError: naming the file and the line: no such column, an empty line, bytes that are no UTF-8, a label that is
        none of the classes.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "reviews.csv"
    ...     _ = file.write_text("text,label\nlovely,good\ndull,bad\n")
    ...     found = read_text_file(file, ["bad", "good"])
    >>> found[1], found.labels.tolist()
    ({'text': 'dull'}, [1, 0])
    """
    file = Path(file)
    rows = list(_rows(file))
    if not rows:
        raise ValueError(f"{str(file)!r} has no texts")
    places = [f"{str(file)!r}, line {line}" for line, _ in rows]
    named = rows[0][1]
    if text is None:
        paired = completion is None and "prompt" in named and "completion" in named
        text, completion = ("prompt", "completion") if paired else ("text", completion)
    if label is None:
        label = "label" if "label" in named and not completion else ""
    columns = tuple(filter(None, (*text.split(","), completion)))
    for place, (_, row) in zip(places, rows, strict=True):
        absent = [repr(column) for column in (*columns, label) if column and column not in row]
        if absent:
            raise ValueError(
                f"{place}: there is no column {' and no column '.join(absent)}, only {', '.join(row)}: name the "
                "columns with text=COLUMN,..., label=COLUMN and completion=COLUMN"
            )
    stored = [[row[column] for column in columns] for _, row in rows]
    for place, values in zip(places, stored, strict=True):
        checked_texts(columns, completion or "", values, place)
    labels, names = None, tuple(class_names or ())
    if label:
        labels, names = _labels(str(file), places, [row[label] for _, row in rows], class_names)
    return Texts(str(file), range(len(rows)), stored.__getitem__, labels, names, (), columns, completion or "")


def _rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows of a file by column, each with the number of its first line."""
    content = _content(file)
    if file.suffix in (".csv", ".tsv"):
        yield from _of_table(file, content, "," if file.suffix == ".csv" else "\t")
        return
    for number, line in enumerate(_lines(content), start=1):
        place = f"{str(file)!r}, line {number}"
        if not line.strip():
            raise ValueError(f"{place} is empty: remove it, or write a text")
        if file.suffix == ".txt":
            yield number, {"text": line}
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{place} is no JSON ({error}): write one object a line") from error
        if not isinstance(row, dict):
            raise ValueError(f"{place} holds {kind_of(row)}, expected an object, {{column: value}}")
        yield number, row


def _of_table(file: Path, content: str, delimiter: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    names: list[str] = []
    line = 1
    try:
        for values in reader:
            place = f"{str(file)!r}, line {line}"
            if not any(value.strip() for value in values):
                raise ValueError(f"{place} is empty: remove it, or write a text")
            if not names:
                if len(set(values)) < len(values):
                    raise ValueError(f"{place} names a column twice: {', '.join(values)}")
                names = values
            elif len(values) != len(names):
                raise ValueError(
                    f"{place} has {len(values)} values for the {len(names)} columns {', '.join(names)}: quote texts "
                    "with the delimiter in them"
                )
            else:
                yield line, dict(zip(names, values, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{str(file)!r}, line {line} is no row of a table ({error})") from error


def _content(file: Path) -> str:
    if not file.is_file():
        raise ValueError(f"there is no file {str(file)!r} of texts")
    stored = file.read_bytes()
    try:
        return stored.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{str(file)!r}, line {line}: the byte 0x{error.object[error.start]:02x} is no UTF-8 ({error.reason}): "
            "save the file as UTF-8"
        ) from error


def _lines(content: str) -> list[str]:
    """Lines that end in a line feed alone: other signs that Unicode breaks lines at are part of a text."""
    lines = content.split("\n")
    return [line.removesuffix("\r") for line in (lines[:-1] if not lines[-1] else lines)]


def _labels(
    name: str, places: Sequence[str], values: Sequence[Any], class_names: Sequence[str] | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Classes that are stored by name or by number, and their names."""
    for place, value in zip(places, values, strict=True):
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise ValueError(f"{place}: the label {value!r} is neither the name of a class nor its number")
    given = None if class_names is None else [spelled(one) for one in class_names]
    texts = [str(value) for value in values]
    named = given is not None and any(spelled(text) in given for text in texts)
    if not named and all(text.removeprefix("-").isdecimal() for text in texts):
        names = with_names(name, [], class_names)
        numbers = [int(text) for text in texts]
        for place, number in zip(places, numbers, strict=True):
            if not 0 <= number < len(names):
                raise ValueError(
                    f"{place}: the label {number} is no class, expected 0 to {len(names) - 1} ({', '.join(names)})"
                )
        return np.array(numbers, np.int32), names
    for place, text in zip(places, texts, strict=True):
        if given is not None and spelled(text) not in given:
            raise ValueError(f"{place}: the label {text!r} is none of the classes {', '.join(class_names or ())}")
    found, number_of = by_name(name, sorted(set(texts)), class_names)
    return np.array([number_of[text] for text in texts], np.int32), found
