"""Names of the last release: they work for one more, and say what they are called now."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def warn(old: str, new: str, level: int = 3) -> None:
    """Says that a name has changed, at the place that uses it: by default what called the caller."""
    warnings.warn(f"{old} is now called {new}: the old name goes with the next release", DeprecationWarning, level)


def renamed_arguments(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator under which a function takes its arguments by their old names too.

    Args:
      **names: the new name of each, by its old one.

    >>> @renamed_arguments(host="offload")
    ... def fit(offload=False):
    ...     return offload
    >>> with warnings.catch_warnings(record=True) as seen:
    ...     warnings.simplefilter("always")
    ...     fit(host=True), [str(each.message) for each in seen]
    (True, ['the argument host of fit is now called offload: the old name goes with the next release'])
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for old in kwargs.keys() & names.keys():
                if names[old] in kwargs:
                    raise TypeError(f"{function.__name__}() takes {names[old]}, and {old} is its old name: give one")
                warn(f"the argument {old} of {function.__name__}", names[old])
                kwargs[names[old]] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate
