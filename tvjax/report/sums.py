"""Sums over the entries of leaves, which add up to those of a block and of the whole."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np

_PIECE = 2**20  # entries that are measured at once, in float64


class Sums(NamedTuple):
    """Sums over the entries of a leaf, or of several leaves.

    Attributes:
      entries: how many.
      zeros: how many are zero.
      squares: sum of their squares.

    >>> sums = sums_of(np.array([3.0, 0.0, 4.0]))
    >>> sums.norm, sums.sparsity
    (5.0, 0.3333333333333333)
    """

    entries: int = 0
    zeros: int = 0
    squares: float = 0.0

    @property
    def norm(self) -> float:
        """The Euclidean norm."""
        return math.sqrt(self.squares)

    @property
    def sparsity(self) -> float:
        """The share of entries that are zero; 0 of none."""
        return self.zeros / self.entries if self.entries else 0.0


class PairSums(NamedTuple):
    """Sums over the entries of two leaves of one shape, or of several such pairs.

    Attributes:
      first: sum of the squares of the first.
      second: sum of the squares of the second.
      products: sum of their products.
      differences: sum of the squares of their differences.
      agreeing: entries at which both have the same sign.
      compared: entries at which neither is zero.

    >>> sums = pair_sums_of(np.array([1.0, -2.0, 0.0]), np.array([2.0, 4.0, 1.0]))
    >>> round(sums.cosine, 4), sums.sign_agreement
    (-0.5855, 0.5)
    """

    first: float = 0.0
    second: float = 0.0
    products: float = 0.0
    differences: float = 0.0
    agreeing: int = 0
    compared: int = 0

    @property
    def cosine(self) -> float:
        """Cosine of the angle between them; 0 where one of them is zero."""
        scale = math.prod(self.norms)
        return min(max(self.products / scale, -1.0), 1.0) if scale else 0.0

    @property
    def sign_agreement(self) -> float:
        """Share of the same signs, among the entries at which neither is zero; 0 of none."""
        return self.agreeing / self.compared if self.compared else 0.0

    @property
    def norms(self) -> tuple[float, float]:
        """The Euclidean norms of both."""
        return math.sqrt(self.first), math.sqrt(self.second)

    @property
    def distance(self) -> float:
        """Norm of the difference."""
        return math.sqrt(self.differences)


_Sums = TypeVar("_Sums", Sums, PairSums)


def sums_of(array: np.ndarray) -> Sums:
    """The sums over the entries of an array, in float64.

    Raises:
      ValueError: entries that are no real numbers.
    """
    pieces = (x.astype(np.float64) for x in _pieces(array))
    return add_up((Sums(x.size, x.size - int(np.count_nonzero(x)), float(np.vdot(x, x))) for x in pieces), Sums())


def pair_sums_of(first: np.ndarray, second: np.ndarray) -> PairSums:
    """The sums over the entries of two arrays of one shape, in float64."""
    found = []
    for pieces in zip(_pieces(first), _pieces(second), strict=True):
        x, y = (piece.astype(np.float64) for piece in pieces)
        signs, difference = np.sign(x) * np.sign(y), x - y
        found.append(
            PairSums(
                first=float(np.vdot(x, x)),
                second=float(np.vdot(y, y)),
                products=float(np.vdot(x, y)),
                differences=float(np.vdot(difference, difference)),
                agreeing=int(np.count_nonzero(signs > 0)),
                compared=int(np.count_nonzero(signs)),
            )
        )
    return add_up(found, PairSums())


def add_up(items: Iterable[_Sums], start: _Sums) -> _Sums:
    """The sums over several leaves, and those of `start`, together."""
    columns: Any = zip(start, *items, strict=True)
    maker: Any = type(start)
    return maker(*map(sum, columns))


def total(sums: Mapping[str, _Sums], paths: Iterable[str]) -> _Sums:
    """The sums over the leaves of some paths, one at least.

    >>> total({"a": Sums(1, 0, 9.0), "b": Sums(2, 1, 16.0)}, ["a", "b"]).norm
    5.0
    """
    found = [sums[path] for path in paths]
    return add_up(found[1:], found[0])


def by_block(paths: Iterable[str]) -> dict[str, list[str]]:
    """The paths of each block, blocks in the order of their first appearance.

    >>> by_block(["blocks/0/up", "blocks/0/down", "head/kernel"])
    {'blocks/0': ['blocks/0/up', 'blocks/0/down'], 'head': ['head/kernel']}
    """
    blocks: dict[str, list[str]] = {}
    for path in paths:
        blocks.setdefault(place(path)[0], []).append(path)
    return blocks


def by_kind(paths: Iterable[str]) -> dict[str, list[str]]:
    """The paths of each kind of leaf, those of all layers of a stack together.

    >>> by_kind(["blocks/0/up", "blocks/1/up", "head/kernel"])
    {'blocks/*/up': ['blocks/0/up', 'blocks/1/up'], 'head/kernel': ['head/kernel']}
    """
    kinds: dict[str, list[str]] = {}
    for path in paths:
        kinds.setdefault(without_number(path), []).append(path)
    return kinds


def place(path: str) -> tuple[str, str]:
    """The block that a leaf is of, and the part of the block.

    A block ends at the first whole number of a path; a leaf that stands in no stack is in the block of its layer.

    >>> place("vision/blocks/3/attention/query/kernel"), place("vision/pre_norm/scale"), place("logit_scale")
    (('vision/blocks/3', 'attention'), ('vision/pre_norm', ''), ('logit_scale', ''))
    >>> place("vision_model.encoder.layers.3.mlp.fc1.weight")
    ('vision_model.encoder.layers.3', 'mlp')
    """
    found = re.match(r"((?:[^/.]+[/.])*?\d+)[/.]([^/.]+)", path)
    if found:
        return found[1], found[2]
    return re.sub(r"[/.][^/.]*$", "", path), ""


def without_number(path: str) -> str:
    """A path or key with ``*`` for the number of the layer, one for all layers of a stack.

    >>> without_number("vision/blocks/3/mlp/up/kernel"), without_number("encoder.layers.10.0.weight")
    ('vision/blocks/*/mlp/up/kernel', 'encoder.layers.*.0.weight')
    """
    return re.sub(r"(^|[/.])\d+(?=[/.]|$)", r"\1*", path, count=1)


def _pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    if np.iscomplexobj(array):
        raise ValueError(f"complex numbers ({array.dtype.name}) have no sign: only real tensors are measured")
    flat = array.reshape(-1)
    return (flat[start : start + _PIECE] for start in range(0, flat.size, _PIECE))
