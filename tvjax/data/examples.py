"""Examples with their classes, wherever they are stored: drawn and split by labels, read when they are asked for."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from tvjax.renamed import warn


@dataclasses.dataclass(frozen=True, eq=False)
class Examples(abc.ABC):
    """A sequence of examples that stay where they are stored until they are asked for, with their classes.

    `tvjax.data.Images` and `tvjax.data.Texts` are the two kinds. A kind says what `read` may return (`_decode`) and
    which bytes are the identity of it (`_content`).

    Attributes:
      name: of the whole, for messages and records.
      keys: what `read` takes, one for each example; a path is named in messages as it is.
      read: a key to what is stored.
      labels: ``[n]`` int32, indices of `class_names`; None where there are none.
      class_names: names of the classes, in the order of the labels, spelled as prompts have them (`spelled`). Numbered
        classes may share a name.
      notes: what a user should know of how they were read.

    Raises:
      ValueError: for no examples, labels that are not one of the classes for each, or a class without a name.
    """

    kind: ClassVar[str] = "examples"

    name: str
    keys: Sequence[Any]
    read: Callable[[Any], Any]
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.keys):
            raise ValueError(f"{self.name!r} has no {self.kind}")
        names = tuple(spelled(name) for name in self.class_names)
        if "" in names:
            nameless = self.class_names[names.index("")]
            raise ValueError(
                f"{self.name!r} has the class {nameless!r}, which leaves no letter for a prompt: rename it"
            )
        notes = [*self.notes, *_notes_of_names(self.class_names, names)]
        object.__setattr__(self, "class_names", names)
        object.__setattr__(self, "notes", tuple(dict.fromkeys(notes)))
        if self.labels is None:
            return
        labels = np.asarray(self.labels)
        if labels.shape != (len(self.keys),) or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"{self.name!r} has labels of shape {labels.shape} and dtype {labels.dtype}, expected "
                f"{len(self.keys)} integers, the class of each of its {self.kind}"
            )
        low, high, count = int(labels.min()), int(labels.max()), len(self.class_names)
        if low < 0 or high >= count:
            raise ValueError(
                f"{self.name!r} has labels from {low} to {high}, expected 0 to {count - 1}, as it has {count} classes"
            )
        object.__setattr__(self, "labels", labels.astype(np.int32))

    @abc.abstractmethod
    def _decode(self, stored: Any, place: str) -> Any:
        """The example, of what is stored; `place` names it in messages."""

    @abc.abstractmethod
    def _content(self, stored: Any, place: str) -> bytes:
        """The bytes that the identity of an example rests on."""

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Any:
        return self._decode(self.read(self.keys[index]), self._place(index))

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def take(self, indices: Sequence[int] | np.ndarray) -> Self:
        """The examples at these indices; none is read."""
        chosen = np.asarray(indices)
        labels = None if self.labels is None else self.labels[chosen]
        return dataclasses.replace(self, keys=[self.keys[index] for index in chosen], labels=labels)

    def split(self, start: float, stop: float, seed: int = 0) -> Self:
        """A share of each class, such as 0 to 0.8; shares that do not overlap have no example in common.

        Within a class the examples are ordered by the SHA-256 of their stored content and the seed, and cut: the share
        depends on no order and on no random generator, and equal examples of a class are on one side of a cut.

        Args:
          start: where the share starts, from 0 to 1.
          stop: where it ends.
          seed: another seed, another order.

        Raises:
          ValueError: for bounds that are none, or a share without examples.

        >>> from tvjax.data.texts import Texts
        >>> texts = Texts("counted", range(10), lambda number: (f"number {number}",), columns=("text",))
        >>> len(texts.split(0, 0.8)), len(texts.split(0.8, 1))
        (8, 2)
        """
        if not 0 <= start < stop <= 1:
            raise ValueError(f"a share goes from one number to a greater one, both from 0 to 1; found {start}:{stop}")
        salt = str(seed).encode()
        digests = [hashlib.sha256(salt + self._digest(index)).digest() for index in range(len(self))]
        groups = np.zeros(len(self), np.int32) if self.labels is None else self.labels
        chosen: list[int] = []
        for label in np.unique(groups):
            own = sorted(np.flatnonzero(groups == label), key=digests.__getitem__)
            rank = 0
            for place, index in enumerate(own):
                rank = rank if place and digests[index] == digests[own[place - 1]] else place
                if start <= rank / len(own) < stop:
                    chosen.append(int(index))
        if not chosen:
            raise ValueError(f"the share {start}:{stop} of {self.name!r} has no {self.kind}: its classes are too small")
        return self.take(sorted(chosen))

    def part(self, start: float, stop: float, seed: int = 0) -> Self:
        """The old name of `split`."""
        warn(f"{type(self).__name__}.part", "split")
        return self.split(start, stop, seed)

    def sha256(self) -> str:
        """The SHA-256 of the stored examples and their labels, in order: the identity of what was looked at.

        Everything is read once, and what is empty or broken is found.
        """
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(self._digest(index))
        if self.labels is not None:
            digest.update(np.ascontiguousarray(self.labels, "<i4").tobytes())
        return digest.hexdigest()

    def _digest(self, index: int) -> bytes:
        return hashlib.sha256(self._content(self.read(self.keys[index]), self._place(index))).digest()

    def _place(self, index: int) -> str:
        key = self.keys[index]
        return repr(str(key)) if isinstance(key, Path) else f"{key} of {self.name!r}"


def spelled(name: str) -> str:
    """A class name as prompts have it, wherever it is stored: underscores are spaces, and all else is kept.

    Spaces around it, and the slash that ``ls -d */`` puts behind it, are no part of it. Capitals inside a word are not
    taken apart: whether ``AnnualCrop`` is two words and ``McLaren`` one, only a list of names can say.

    >>> spelled("apple_pie"), spelled("AnnualCrop"), spelled("polar_bear/")
    ('apple pie', 'AnnualCrop', 'polar bear')
    """
    return " ".join(name.replace("_", " ").rstrip("/").split())


def by_name(
    place: str, stored: Sequence[str], given: Sequence[str] | None, what: str = "classes"
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Classes that are stored by name: the names in the order of the labels, and the label of each stored name.

    Args:
      place: where they are stored, for messages.
      stored: the names that occur, each once.
      given: the names that are asked for, in the order of the labels; None: those that are stored.
      what: what bears the names, for messages.

    Raises:
      ValueError: a stored name that is none of those given, or one of several alike.

    >>> by_name("photos", ["polar_bear"], ["cat", "polar bear"])
    (('cat', 'polar bear'), {'polar_bear': 1})
    """
    names = tuple({spelled(name): name for name in stored}.values()) if given is None else tuple(given)
    order = [spelled(name) for name in names]
    surplus = sorted({spelled(name) for name in stored} - set(order))
    if surplus:
        raise ValueError(f"{place!r} has the {what} {surplus}, which are none of the classes {list(names)}")
    for name in map(spelled, stored):
        if order.count(name) > 1:
            numbers = [str(number) for number, other in enumerate(order) if other == name]
            raise ValueError(
                f"{place!r} has the class {name!r} by name, which the list names more than once (classes "
                f"{', '.join(numbers)}): give each its own name"
            )
    return names, {name: order.index(spelled(name)) for name in stored}


def _notes_of_names(stored: Sequence[str], names: Sequence[str]) -> list[str]:
    """What to say of class names, as they were stored and as they are spelled."""
    notes = []
    changed = [f"{one!r} is {other!r}" for one, other in zip(stored, names, strict=True) if one != other]
    if changed:
        notes.append(f"underscores in class names are spaces: {changed[0]}" + (", ..." if len(changed) > 1 else ""))
    numbers: dict[str, list[str]] = {}
    for number, name in enumerate(names):
        numbers.setdefault(name, []).append(str(number))
    shared = [f"{name!r} is {' and '.join(own)}" for name, own in numbers.items() if len(own) > 1]
    if shared:
        notes.append(f"classes of one name are not told apart, the first of them is predicted: {', '.join(shared)}")
    return notes


def with_names(name: str, own: Sequence[str], given: Sequence[str] | None) -> tuple[str, ...]:
    """The names of classes that are stored as numbers: those given, in the order of the labels, or else their own.

    Args:
      name: of the examples, for messages.
      own: the names that are stored with the examples; none where there are none.
      given: the names that are asked for.

    Raises:
      ValueError: where neither is there, they differ in number, or they are the same names in another order, but for
        capitals and signs.

    >>> with_names("photos", ["annual crop", "forest"], ["annual crop land", "forest"])
    ('annual crop land', 'forest')
    """
    if given is None:
        if not own:
            raise ValueError(f"{name!r} stores its classes as numbers without names: give their names, in that order")
        return tuple(own)
    if own and len(given) != len(own):
        raise ValueError(f"{name!r} has {len(own)} classes, but {len(given)} class names are given")
    stored, asked = ([re.sub(r"[^a-z0-9]+", " ", one.lower()).strip() for one in names] for names in (own, given))
    if sorted(stored) == sorted(asked) and stored != asked:
        raise ValueError(
            f"{name!r} stores its classes as numbers in the order {', '.join(own)}, but the names are given as "
            f"{', '.join(given)}: give them in the order of the numbers"
        )
    return tuple(given)
