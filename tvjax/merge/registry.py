"""Merges by name: what recipes and the command line speak of.

A merge is one file with a function ``merge(taus, *, ..., report=None)``, and one line here or in one's own code:

    register("mine", mine)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from tvjax import merge as methods

Merge = Callable[..., Any]
_MERGES: dict[str, Merge] = {
    name: getattr(methods, name)
    for name in (
        *("average", "task_arithmetic", "slerp", "nuslerp", "multi_slerp", "karcher_mean", "ties", "dare", "della"),
        *("breadcrumbs", "model_stock", "sce", "tsv_m", "iso_c", "iso_cts", "knots", "wudi", "ace", "core_space"),
        *("lines", "svc"),
    )
}


def register(name: str, merge: Merge) -> None:
    """Makes a merge known by a name.

    Args:
      name: of the merge.
      merge: ``merge(taus, *, report=None, ...)``; its further keyword arguments are its options. One called ``key``
        gets a random key of the command's seed.

    Raises:
      ValueError: a name that is taken, or a function that takes no task vectors or no report.
    """
    if _MERGES.setdefault(name, merge) is not merge:
        raise ValueError(f"there is a merge {name!r} already")
    parameters = inspect.signature(merge).parameters
    if not {"taus", "report"} <= set(parameters):
        del _MERGES[name]
        raise ValueError(f"a merge takes (taus, *, ..., report=None), found {name}{inspect.signature(merge)}")


def merges() -> dict[str, Merge]:
    """The merges that are known, by name.

    >>> list(merges())[:3]
    ['average', 'task_arithmetic', 'slerp']
    """
    return dict(_MERGES)
