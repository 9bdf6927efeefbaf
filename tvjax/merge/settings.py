"""Weights, densities and the like: one number for all leaves, one by path pattern, or one by depth."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tvjax import tree
from tvjax.renamed import warn


@dataclasses.dataclass(frozen=True)
class ByDepth:
    """A number for each layer: `values` spread evenly over the layers of a stack and interpolated between.

    The depth of a leaf is the first whole number among the keys of its path (``vision/blocks/3/mlp/up/kernel``: 3); the
    layers of ``vision/blocks`` and of ``text/blocks`` are two stacks, each spread over by itself. The paths of scanned
    models have no number: their layers are seen by `tvjax.merge.by_layer`, after `tvjax.unstack`, or by merges of
    matrices where `matrices` says which axis is that of the layers. Without any layer in sight it is an error.

    Attributes:
      values: from the first layer to the last, one at least.
      other: for leaves that stand in no stack (embeddings, final norms).

    >>> setting = ByDepth((0.0, 1.0), other=0.5)
    >>> resolve(setting, ["blocks/0/w", "blocks/1/w", "blocks/2/w", "head/w"])
    {'blocks/0/w': 0.0, 'blocks/1/w': 0.5, 'blocks/2/w': 1.0, 'head/w': 0.5}
    """

    values: tuple[float, ...]
    other: float

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("ByDepth needs at least one value")


Setting = float | Mapping[str, float] | ByDepth
Settings = Setting | Sequence[Setting]  # one for all task vectors, or one for each


def resolve(setting: Setting, paths: Sequence[str]) -> dict[str, float]:
    """The number of each leaf.

    Args:
      setting: a number for all leaves; a mapping from path patterns (those of `tvjax.tree.select`) to numbers, a later
        pattern winning over an earlier one, which must cover every leaf (``"**"`` is all); or `ByDepth`.
      paths: of the leaves.

    Returns:
      A number by path.

    Raises:
      ValueError: a pattern that matches no leaf, leaves that no pattern matches, or what is no finite number.

    >>> resolve({"**": 1, "**/bias": 0.5}, ["up/kernel", "up/bias"])
    {'up/kernel': 1.0, 'up/bias': 0.5}
    """
    if isinstance(setting, ByDepth):
        found = _by_depth(setting, paths)
    elif isinstance(setting, Mapping):
        found = {path: value for pattern, value in setting.items() for path in tree.match(paths, pattern)}
        left = [path for path in paths if path not in found]
        if left:
            raise ValueError(
                f"no pattern of {list(setting)} matches {len(left)} leaves:\n{tree.list_some(left)}\n"
                "put a number for all leaves first: {'**': 1.0, ...}"
            )
    else:
        found = dict.fromkeys(paths, setting)
    numbers = {}
    for path in paths:
        try:
            numbers[path] = float(found[path])
        except (TypeError, ValueError):
            raise ValueError(f"a setting must be a number, found {found[path]!r} for {path}") from None
        if not np.isfinite(numbers[path]):
            raise ValueError(f"a setting must be finite, found {found[path]} for {path}")
    return numbers


def resolve_each(
    settings: Settings, paths: Sequence[str], count: int, name: str, dtype: type[np.floating] = np.float32
) -> dict[str, np.ndarray]:
    """The numbers of each leaf, one for each task vector.

    Args:
      settings: one setting for all task vectors, or a list or tuple with one for each.
      paths: of the leaves.
      count: how many task vectors there are.
      name: of the setting, for the message.
      dtype: of the numbers: float64 for shares that are multiplied by numbers of entries.

    Returns:
      ``[count]`` by path.

    Raises:
      ValueError: as `resolve`, or a list of another length.

    >>> resolve_each([1.0, {"**": 2.0}], ["w"], 2, "weights")["w"].tolist()
    [1.0, 2.0]
    """
    each: list[Any] = list(settings) if isinstance(settings, list | tuple) else [settings] * count
    if len(each) != count:
        raise ValueError(f"{name}: {len(each)} given for {count} task vectors; give one each, or one for all")
    columns = [resolve(setting, paths) for setting in each]
    return {path: np.array([column[path] for column in columns], dtype) for path in paths}


def densities_of(
    density: Settings, rate: Settings | None, paths: Sequence[str], count: int, method: str
) -> dict[str, np.ndarray]:
    """The share of the entries that stays, float64, of each leaf and task vector.

    Args:
      density: as `resolve_each` takes settings.
      rate: the share that is dropped, by which older recipes say it; it takes the place of the density.
      paths: of the leaves.
      count: how many task vectors there are.
      method: name of the merge, for the warning.

    Raises:
      ValueError: as `resolve_each`, or a share that is not in (0, 1].

    >>> densities_of(0.25, None, ["w"], 2, "dare")["w"].tolist()
    [0.25, 0.25]
    """
    found = resolve_each(density, paths, count, "density", np.float64)
    if rate is not None:
        warn(f"the argument rate of {method}", "density, which is 1 - rate", 4)
        found = {path: 1 - p for path, p in resolve_each(rate, paths, count, "rate", np.float64).items()}
    require(found, "density", lambda share: (share > 0) & (share <= 1), "in (0, 1]")
    return found


def check_votes(weights: Mapping[str, np.ndarray]) -> None:
    """Raises a ValueError unless weights can be votes and members of a mean.

    >>> check_votes({"w": np.array([1.0, 0.0])})
    """
    require(weights, "weights", lambda w: (w >= 0).all() and w.sum() > 0, "0 or more, and of positive sum")


def require(
    numbers: Mapping[str, float | np.ndarray], name: str, holds: Callable[[np.ndarray], Any], expected: str
) -> None:
    """Raises a ValueError that says which numbers are not as they must be, and of which leaf where not of all.

    Args:
      numbers: by path.
      name: of the setting.
      holds: whether the numbers of one leaf are as they must be; elementwise, or one answer for all.
      expected: what they must be.

    >>> require({"w": np.ones(2)}, "weights", lambda w: w.sum() > 0, "of positive sum")
    """
    wrong = {path: found for path, found in numbers.items() if not np.all(holds(np.asarray(found)))}
    if wrong:
        path, found = next(iter(wrong.items()))
        where = "" if len({np.asarray(each).tobytes() for each in numbers.values()}) == 1 else f" for {path}"
        raise ValueError(f"{name} must be {expected}, found {shown(found)}{where}")


def shown(numbers: float | np.ndarray) -> Any:
    """The numbers of a leaf as they were given: one, where all task vectors have the same.

    >>> shown(np.array([2.0, 2.0])), shown(np.array([1.0, 3.0]))
    (2.0, [1.0, 3.0])
    """
    found = np.asarray(numbers)
    return found.flat[0].item() if found.size and (found == found.flat[0]).all() else found.tolist()


def _by_depth(setting: ByDepth, paths: Sequence[str]) -> dict[str, float]:
    layers: dict[str, set[int]] = defaultdict(set)
    place: dict[str, tuple[str, int]] = {}
    for path in paths:
        found = re.search(r"(?:^|/)(\d+)(?:/|$)", path)
        if found:
            place[path] = path[: found.start(1)], int(found[1])
            layers[place[path][0]].add(place[path][1])
    if not place and paths:
        raise ValueError(
            f"ByDepth finds no layers: no path of {len(paths)} leaves has a number, as blocks/3/... has:\n"
            f"{tree.list_some(paths)}\nlayers that are stacked in one array are told apart by tvjax.merge.by_layer or "
            "tvjax.unstack, and by merges of matrices where `matrices` names their axis"
        )
    values = np.asarray(setting.values, np.float64)
    numbers = {}
    for path in paths:
        if path not in place:
            numbers[path] = setting.other
            continue
        stack, layer = place[path]
        last = max(layers[stack])
        at = layer / last * (len(values) - 1) if last else 0.0
        numbers[path] = float(np.interp(at, np.arange(len(values)), values))
    return numbers
