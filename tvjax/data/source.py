"""Examples by a text that says where they are: images or texts, by what is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from tvjax.data.archives import read_archive
from tvjax.data.datasets import read_dataset, read_text_dataset
from tvjax.data.digits import read_photographs
from tvjax.data.folders import read_folder
from tvjax.data.images import Images
from tvjax.data.text_files import ENDINGS, read_text_file
from tvjax.data.texts import Texts


def open_examples(source: str, class_names: Sequence[str] | None = None) -> Images | Texts:
    """The images or texts that a text names.

    ======================  =========================================================================================
    ``photos``              a folder with one folder of images a class, or of images without classes
    ``photos.npz``          a numpy archive with the arrays ``images`` and ``labels``; ``?images=x&labels=y`` if others
    ``hf:tanganke/dtd``     a Hugging Face dataset of the hub or on disk, ``hf:mnist?split=test``; where they are not
                            plain, also ``image=COLUMN``, ``label=COLUMN``, ``config=NAME``, ``revision=COMMIT``
    ``digits:thick/test``   the embedded digits, a style (or ``base``) and a part; ``?seed=1`` for other photographs
    ``notes.txt``           texts, one a line
    ``reviews.csv``         texts with columns, ``.csv``, ``.tsv`` or ``.jsonl``; ``?text=premise,hypothesis`` and
                            ``label=COLUMN``, or ``text=COLUMN&completion=COLUMN`` where answers are to be given
    ``hf:glue?text=...``    texts of a Hugging Face dataset, with the same words and ``split``, ``config``, ``revision``
    ======================  =========================================================================================

    Names of classes are spelled in one way wherever they are stored or given: underscores are spaces, all else is kept
    (`tvjax.data.examples.spelled`). All places take ``?part=0:0.8``, a share of each class that depends on content
    alone, and ``part_seed=1`` for another (`Examples.part`).

    Args:
      source: the text.
      class_names: names of the classes: of folders, in the order of a model's outputs; of numbered classes, in the
        order of their numbers; None: as they are stored.

    Returns:
      The examples, each decoded when it is asked for.

    Raises:
      ValueError: naming what is wrong and what would be right.

    >>> images = open_examples("digits:thick/validation?part=0:0.5")
    >>> len(images), images[0].shape, images.class_names[:3]
    (100, (16, 16, 3), ('zero', 'one', 'two'))
    """
    place, question, words = source.partition("?")
    if not question or Path(source).exists():
        place, words = source, ""
    reader, known = _reader(place, words)
    options: dict[str, str] = {}
    for word in filter(None, words.split("&")):
        option, equals, value = word.partition("=")
        if option not in (*known, "part", "part_seed") or not equals or option in options:
            names = ", ".join(f"{name}=..." for name in (*known, "part", "part_seed"))
            raise ValueError(f"{source!r}: found {word!r}, expected each of {names} at most once, joined by '&'")
        options[option] = value
    part, seed = options.pop("part", ""), options.pop("part_seed", "0")
    found = reader(place, class_names, **options)
    if part:
        start, colon, stop = part.partition(":")
        try:
            found = found.split(float(start), float(stop), int(seed))
        except ValueError as error:
            raise ValueError(f"{source!r}: part={part} with part_seed={seed}: {error}") from error
    return dataclasses.replace(found, name=source)


def _reader(place: str, words: str = "") -> tuple[Callable[..., Images | Texts], tuple[str, ...]]:
    """What reads a place, and the options that it takes."""
    if place.startswith("hf:"):
        of_hub = ("split", "label", "config", "revision")
        if {"text", "completion"} & {word.partition("=")[0] for word in words.split("&")}:
            return _text_dataset, (*of_hub, "text", "completion")
        return _dataset, (*of_hub, "image")
    if place.startswith("digits:"):
        return _digits, ("seed",)
    if place.endswith(".npz"):
        return read_archive, ("images", "labels")
    if place.endswith(".txt"):
        return read_text_file, ()
    if place.endswith(ENDINGS):
        return read_text_file, ("text", "label", "completion")
    return read_folder, ()


def _dataset(place: str, class_names: Sequence[str] | None, **options: str) -> Images:
    return read_dataset(place.removeprefix("hf:"), class_names, **options)


def _text_dataset(place: str, class_names: Sequence[str] | None, **options: str) -> Texts:
    return read_text_dataset(place.removeprefix("hf:"), class_names, **options)


def _digits(place: str, class_names: Sequence[str] | None, seed: str = "0") -> Images:
    style, _, part = place.removeprefix("digits:").partition("/")
    if not seed.isdecimal():
        raise ValueError(f"{place!r}: found seed={seed}, expected a whole number")
    return read_photographs(style, part, class_names, int(seed))
