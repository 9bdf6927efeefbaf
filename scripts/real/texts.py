"""Texts of real classes: WordNet's definitions by topic, and the sentences that people rated for VADER."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from real.packages import fetch

# Lexicographer files by number, in the words of WordNet's own page on them (lexnames(5WN)).
NOUNS = {
    4: "acts or actions",
    5: "animals",
    6: "man-made objects",
    7: "attributes of people and objects",
    8: "body parts",
    9: "cognitive processes and contents",
    10: "communicative processes and contents",
    11: "natural events",
    12: "feelings and emotions",
    13: "foods and drinks",
    14: "groupings of people or objects",
    15: "spatial position",
    17: "natural objects (not man-made)",
    18: "people",
    19: "natural phenomena",
    20: "plants",
    21: "possession and transfer of possession",
    22: "natural processes",
    23: "quantities and units of measure",
    24: "relations between people or things or ideas",
    26: "stable states of affairs",
    27: "substances",
    28: "time and temporal relations",
}  # without 3 (the tops of the hierarchies), 16 (motives, 42 definitions) and 25 (shapes, 344)
VERBS = {
    29: "grooming, dressing and bodily care",
    30: "size, temperature change, intensifying",
    31: "thinking, judging, analyzing, doubting",
    32: "telling, asking, ordering, singing",
    33: "fighting, athletic activities",
    34: "eating and drinking",
    35: "touching, hitting, tying, digging",
    36: "sewing, baking, painting, performing",
    37: "feeling",
    38: "walking, flying, swimming",
    39: "seeing, hearing, feeling",
    40: "buying, selling, owning",
    41: "political and social activities and events",
    42: "being, having, spatial relations",
    43: "raining, snowing, thawing, thundering",
}
SIGNS = ("terrible", "great")
SETS = {
    "film": ("movieReviewSnippets", "The film was {}."),
    "amazon": ("amazonReviewSnippets", "The product was {}."),
    "nyt": ("nytEditorialSnippets", "The news is {}."),
    "tweets": ("tweets", "I feel {}."),
}
CLEAR = 0.5  # of a rating from -4 to 4, the least whose sign counts
TASKS = ("nouns", "verbs", *SETS)


class TextTask(NamedTuple):
    """Texts with a class each.

    Attributes:
      name: a name of `TASKS`.
      class_names: what the templates are filled with.
      templates: prompts whose embeddings are the head.
      texts: without repetitions.
      labels: ``[texts]``.
    """

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    texts: tuple[str, ...]
    labels: np.ndarray


def text_task(name: str, cache: Path | None = None) -> TextTask:
    """A task of `TASKS`, its package fetched where it is not in the cache."""
    if name in SETS:
        file, template = SETS[name]
        with tarfile.open(fetch("VADER", cache)) as outer:
            inner = _member(outer, "hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
            lines = _member(archive, f"{file}_GroundTruth.txt").decode("utf-8", "replace").splitlines()
        return _without_repetitions(name, SIGNS, template, rated(lines))
    classes = {"nouns": NOUNS, "verbs": VERBS}[name]
    with tarfile.open(fetch("WordNet", cache)) as archive:
        lines = _member(archive, f"dict/data.{name[:-1]}").decode().splitlines()
    return _without_repetitions(name, tuple(classes.values()), "{}", definitions(lines, tuple(classes)))


def _member(archive: tarfile.TarFile, ending: str) -> bytes:
    (found,) = (member for member in archive.getmembers() if member.name.endswith(ending))
    file = archive.extractfile(found)
    assert file is not None, f"{found.name} is no file"
    return file.read()


def definitions(lines: Iterable[str], numbers: tuple[int, ...]) -> list[tuple[str, int]]:
    """The definitions of a WordNet data file with their class, the place of their file's number among `numbers`.

    Examples of use, which follow the definition in quotation marks, are left out.

    >>> line = '00017402 04 n 01 act 0 000 | something that people do; "an act of folly"  '
    >>> definitions(["  1 This software ...", line], (3, 4))
    [('something that people do', 1)]
    """
    found = []
    for line in lines:
        data, bar, gloss = line.partition("|")
        if line.startswith(" ") or not bar:
            continue
        number = int(data.split()[1])
        text = gloss.split('"')[0].strip().rstrip(";: ")
        if number in numbers and text:
            found.append((text, numbers.index(number)))
    return found


def rated(lines: Iterable[str]) -> list[tuple[str, int]]:
    r"""The sentences of a rated set with a clear sign: 0 for a bad one, 1 for a good one.

    >>> rated(["1\t-0.6\ttoo tepid", "2\t0.1\tit runs", "3\t2.5\ta joy"])
    [('too tepid', 0), ('a joy', 1)]
    """
    found = []
    for line in lines:
        _, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= CLEAR and text.strip():
            found.append((text.strip(), int(float(rating) > 0)))
    return found


def _without_repetitions(
    name: str, class_names: tuple[str, ...], template: str, found: list[tuple[str, int]]
) -> TextTask:
    """The task; a text that has two classes has none."""
    classes: dict[str, set[int]] = {}
    for text, label in found:
        classes.setdefault(text, set()).add(label)
    texts = tuple(text for text, labels in classes.items() if len(labels) == 1)
    labels = np.array([next(iter(classes[text])) for text in texts], np.int32)
    return TextTask(name, class_names, (template,), texts, labels)


class Split(NamedTuple):
    """Numbers of the texts of each part; no text is in two.

    Attributes:
      test: the same for every draw.
      source: with labels, what the source is fine-tuned on.
      few: with labels, what the target's methods have.
      validation: with labels, what every method chooses its settings by.
      unlabelled: without labels.
    """

    test: np.ndarray
    source: np.ndarray
    few: np.ndarray
    validation: np.ndarray
    unlabelled: np.ndarray


class Counts(NamedTuple):
    """How many texts of each class there are in the parts of a `Split`, and how many without labels."""

    test: int
    source: int
    few: int
    validation: int
    unlabelled: int


def split(labels: np.ndarray, counts: Counts, draw: int) -> Split:
    """Draws the parts class by class; the unlabelled texts, as they come, from what is left.

    Of a class with too few texts the test set takes two fifths, and the source what is left of the others.

    >>> parts = split(np.repeat([0, 1], 20), Counts(4, 5, 2, 3, 6), draw=1)
    >>> [len(part) for part in parts], sorted(np.concatenate(parts).tolist()) == list(range(40))
    ([8, 10, 4, 6, 6], False)
    """
    fixed, rest = np.random.default_rng(0), np.random.default_rng([1, draw])
    parts: tuple[list[np.ndarray], ...] = ([], [], [], [], [])
    for number in np.unique(labels):
        members = fixed.permutation(np.flatnonzero(labels == number))
        test = min(counts.test, 2 * len(members) // 5)
        others = rest.permutation(members[test:])
        starts = np.cumsum([0, counts.few, counts.validation, counts.source])
        few, validation, source = (others[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True))
        for part, chosen in zip(parts, (members[:test], source, few, validation, others[starts[-1] :]), strict=True):
            part.append(chosen)
    unlabelled = rest.permutation(np.concatenate(parts[4]))[: counts.unlabelled]
    return Split(*(np.concatenate(part) for part in parts[:4]), unlabelled)
