"""Two models, or two task vectors, beside one another: leaf by leaf, so that neither is ever held whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tvjax.models.differences import from_text
from tvjax.progress import Progress
from tvjax.report.contents import TASK_VECTOR, TENSORS, Contents
from tvjax.report.sums import PairSums, Sums, pair_sums_of, sums_of, total


class Row(NamedTuple):
    """What some leaves of two trees come to.

    Attributes:
      norms: of all of them in either; None where one has none of them.
      reference: norm in the first of those that both have in one shape, which what follows is of.
      distance: norm of their difference; None where there are none, as below.
      cosine: of the angle between them; None also where one of them is zero.
      sign_agreement: None also where no two entries are compared.
    """

    norms: tuple[float | None, float | None]
    reference: float = 0.0
    distance: float | None = None
    cosine: float | None = None
    sign_agreement: float | None = None

    @property
    def relative_distance(self) -> float | None:
        """The distance as a share of the norm in the first."""
        return self.distance / self.reference if self.distance is not None and self.reference else None


class Comparison(NamedTuple):
    """Two trees leaf by leaf.

    Attributes:
      paths: of the leaves of either, in the order of the first, and then of the second.
      sums: of each leaf that both have in one shape.
      others: of each leaf that has no partner of its shape, on either side.
      shapes: of the leaves that both have in two shapes.
      dtypes: of the leaves that both have in two dtypes.
      only_first: leaves that the second lacks.
      only_second: leaves that the first lacks.
      about: in what they differ of what they say of themselves, with both values, None where one says nothing.
      one_base: whether both were made for the same weights; None where one of them does not say.
    """

    paths: tuple[str, ...]
    sums: dict[str, PairSums]
    others: tuple[dict[str, Sums], dict[str, Sums]]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    dtypes: dict[str, tuple[str, str]]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    about: dict[str, tuple[Any, Any]]
    one_base: bool | None

    def row(self, paths: Iterable[str]) -> Row:
        """What some leaves come to together."""
        wanted = list(paths)
        both = [path for path in wanted if path in self.sums]
        own = total(self.sums, both) if both else PairSums()
        squares = list(own[:2])
        present = [bool(both)] * 2
        for side, others in enumerate(self.others):
            alone = [path for path in wanted if path in others]
            present[side] = present[side] or bool(alone)
            squares[side] += sum(others[path].squares for path in alone)
        norms = [square**0.5 if here else None for square, here in zip(squares, present, strict=True)]
        if not both:
            return Row((norms[0], norms[1]))
        cosine = own.cosine if all(own.norms) else None
        signs = own.sign_agreement if own.compared else None
        return Row((norms[0], norms[1]), own.norms[0], own.distance, cosine, signs)


def compare(first: Contents, second: Contents, progress: Progress | None = None) -> Comparison:
    """Reads two trees leaf by leaf, and sums over the entries of each leaf, and over the pairs of entries.

    Args:
      first: of `tvjax.report.contents.contents`.
      second: the same; of the same kind.
      progress: called with (leaves done, leaves in all, path).

    Raises:
      ValueError: things of two kinds, no leaf in common, or values that are not finite.
    """
    trees = (TASK_VECTOR, TENSORS)
    if first.kind != second.kind and not (first.kind in trees and second.kind in trees):
        raise ValueError(
            f"found the {first.kind} {first.name!r} and the {second.kind} {second.name!r}: give two of one kind; a "
            "task vector and its model are one thing and --model"
        )
    ours, theirs = ({leaf.path: leaf for leaf in found.leaves} for found in (first, second))
    common = [path for path in ours if path in theirs]
    if not common:
        raise ValueError(
            f"{first.name!r} and {second.name!r} have no leaf in common: the one has {_some(ours)}, the other "
            f"{_some(theirs)}"
        )
    only = tuple(path for path in ours if path not in theirs), tuple(path for path in theirs if path not in ours)
    sums: dict[str, PairSums] = {}
    others: tuple[dict[str, Sums], dict[str, Sums]] = ({}, {})
    tell = _Counted(progress, len(common) + len(only[0]) + len(only[1]))
    with first.reading() as read, second.reading() as read_second:
        for path in common:
            if ours[path].shape == theirs[path].shape:
                sums[path] = pair_sums_of(read(path), read_second(path))
            else:
                others[0][path], others[1][path] = sums_of(read(path)), sums_of(read_second(path))
            tell(path)
        for found, paths, reader in zip(others, only, (read, read_second), strict=True):
            for path in paths:
                found[path] = sums_of(reader(path))
                tell(path)
    pairs = {path: (ours[path], theirs[path]) for path in common}
    return Comparison(
        (*ours, *only[1]),
        sums,
        others,
        {path: (a.shape, b.shape) for path, (a, b) in pairs.items() if a.shape != b.shape},
        {path: (a.dtype, b.dtype) for path, (a, b) in pairs.items() if a.dtype != b.dtype},
        *only,
        differences(first.about, second.about),
        _one_base(first, second),
    )


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What two things say of themselves differently, by name, that of a part after a dot.

    >>> differences({"config": {"layers": 2, "heads": 4}}, {"config": {"layers": 3, "heads": 4}, "base_model": "m"})
    {'base_model': (None, 'm'), 'config.layers': (2, 3)}
    """
    sides = [dict(_entries(about)) for about in (first, second)]
    both = ((name, (sides[0].get(name), sides[1].get(name))) for name in sorted(sides[0].keys() | sides[1].keys()))
    return {name: values for name, values in both if values[0] != values[1]}


def _entries(about: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in about.items():
        if name == "base_config" and isinstance(value, str):
            value = from_text(value, "a task vector")
        if isinstance(value, Mapping):
            yield from _entries(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _one_base(first: Contents, second: Contents) -> bool | None:
    made = [found.about.get("base_fingerprint") for found in (first, second)]
    return None if None in made else made[0] == made[1]


class _Counted:
    """Progress by leaf."""

    def __init__(self, progress: Progress | None, count: int):
        self.progress, self.count, self.done = progress, count, 0

    def __call__(self, path: str) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.count, path)


def _some(paths: Iterable[str]) -> str:
    listed = list(paths)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "") if listed else "none"
