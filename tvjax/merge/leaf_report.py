"""The report by leaf: what a merge did to every leaf, told while it works."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from tvjax import processes


class MergedLeaf(NamedTuple):
    """What a merge did to one leaf.

    Every merge takes `report`, a function that is called once for each leaf as soon as it is merged: ``rows.append``
    collects them, and a progress bar counts them.

    Attributes:
      path: of the leaf.
      shape: of the leaf.
      rule: what was done to it (``averaged``, ``trimmed, elected mean``, ``matrix [768, 3072]``).
      measures: numbers of that rule (thresholds, weights, angles, ranks), lists where there is one for each vector.
    """

    path: str
    shape: tuple[int, ...]
    rule: str
    measures: dict[str, Any]


Report = Callable[[MergedLeaf], None]


def tell(
    report: Report | None, path: str, shape: tuple[int, ...], rule: str, measures: dict[str, Any] | None = None
) -> None:
    """Calls `report`, if there is one, with the measures fetched from the device as numbers and lists.

    >>> tell(print, "up/bias", (8,), "averaged", {"weights": np.ones(2)})
    MergedLeaf(path='up/bias', shape=(8,), rule='averaged', measures={'weights': [1.0, 1.0]})
    """
    if report is not None:
        numbers = {name: np.asarray(value).tolist() for name, value in processes.fetch(measures or {}).items()}
        report(MergedLeaf(path, tuple(shape), rule, numbers))


def summary(rows: Iterable[MergedLeaf]) -> str:
    """The report as lines of text, a line a leaf.

    >>> print(summary([MergedLeaf("up/kernel", (8, 2), "trimmed", {"threshold": [0.00123, 4.5e-5]})]))
    leaf                                         shape            rule
    up/kernel                                    8x2              trimmed  threshold 0.00123, 4.5e-05
    """
    lines = [f"{'leaf':<44} {'shape':<16} rule"]
    for row in rows:
        shape = "x".join(map(str, row.shape)) or "scalar"
        measures = "; ".join(f"{name} {_numbers(value)}" for name, value in row.measures.items())
        lines.append(f"{row.path:<44} {shape:<16} {row.rule}  {measures}".rstrip())
    return "\n".join(lines)


def _numbers(value: Any) -> str:
    return ", ".join(f"{number:.4g}" for number in np.ravel(value).tolist())
