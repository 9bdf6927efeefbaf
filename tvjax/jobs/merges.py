"""Merges by their names, and their hyperparameters as a recipe has them."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax

from tvjax import merge as methods
from tvjax.merge import registry

KINDS: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool, "str": str, "None": type(None)}  # annotated
_LARGEST = 2**53  # the whole numbers that a float can hold
WITH_DATA = ("regmean", "regmean_plus_plus", "fisher")
BY_LEAF = (
    *("average", "task_arithmetic", "slerp", "karcher_mean", "ties", "dare", "della", "breadcrumbs", "model_stock"),
    *("sce", "tsv_m", "iso_c", "wudi"),
)
GIVEN = ("taus", "key", "report")  # arguments that no option sets


def find_merge(name: str, options: Mapping[str, Any], seed: int) -> Callable[..., Any]:
    """The merge of a name, with its hyperparameters: a function of the task vectors, and of ``report``.

    Args:
      name: of a merge of `tvjax.merge`, or of one's own (`tvjax.merge.register`).
      options: hyperparameters by name.
      seed: of methods that draw at random.

    The option ``base`` says whether the models themselves are merged; their base is given by the job, later.

    Raises:
      ValueError: no such merge, one that needs data, or hyperparameters that it does not have.
    """
    known = registry.merges()
    if name not in known:
        if name in WITH_DATA:
            raise ValueError(
                f"{name} needs data of every task, and a model that can be run (CLIP, ViT, or your own function): call "
                f"tvjax.merge.{name} from Python"
            )
        raise ValueError(f"there is no merge {name!r}: choose among {', '.join(known)}")
    function = known[name]
    parameters = inspect.signature(function).parameters
    check_options(name, function, options, GIVEN)
    arguments = read_settings(options)
    if not isinstance(arguments.pop("base", False), bool):
        raise ValueError(
            f"{name}: base is {options['base']!r}, expected true (the models are merged) or false (their task vectors)"
        )
    if "key" in parameters:
        arguments["key"] = jax.random.key(seed)
    inner = arguments.get("merge")  # of a merge around another
    if inner is not None and "key" in inspect.signature(inner).parameters:
        arguments["merge"] = functools.partial(inner, key=jax.random.key(seed))
    return functools.partial(function, **arguments)


def acts_by_leaf(name: str, options: Mapping[str, Any]) -> bool:
    """Whether a merge makes each leaf of that leaf of the task vectors alone, with these hyperparameters.

    Not so where a scope is the whole vector, where settings go by path or by depth, and of merges that hand the vectors
    to another one, whose rounding depends on what is decomposed beside (iso_cts), or that are not known here.

    >>> acts_by_leaf("dare", {"density": 0.5}), acts_by_leaf("ties", {}), acts_by_leaf("ties", {"scope": "leaf"})
    (True, False, True)
    """
    if name not in BY_LEAF or any(_by_path(value) for value in options.values()):
        return False
    scope = inspect.signature(registry.merges()[name]).parameters.get("scope")
    return scope is None or options.get("scope", scope.default) == "leaf"


def _by_path(value: Any) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, list | tuple) and any(map(_by_path, value)))


def check_options(name: str, method: Callable[..., Any], options: Mapping[str, Any], given: Collection[str]) -> None:
    """Raises a ValueError for a hyperparameter that a method lacks or is not given, or a value of another kind.

    Args:
      name: of the method.
      method: a function whose keyword arguments are its hyperparameters.
      options: hyperparameters by name.
      given: arguments that the command gives itself.

    >>> def ties(taus, *, density=0.2): ...
    >>> check_options("ties", ties, {"densty": 0.5}, given=["taus"])
    Traceback (most recent call last):
    ValueError: ties has no option 'densty'; the nearest of density is 'density'
    """
    parameters = inspect.signature(method).parameters
    known = [key for key in parameters if key not in given]
    missing = [key for key in known if parameters[key].default is inspect.Parameter.empty and key not in options]
    if missing:
        raise ValueError(f"{name} needs the option {missing[0]} (--options {missing[0]}=...)")
    for option, value in options.items():
        if option not in known:
            if not known:
                raise ValueError(f"{name} has no options, found {option!r}")
            near = difflib.get_close_matches(option, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"{name} has no option {option!r}; the nearest of {', '.join(known)} is {near!r}")
        kinds = str(parameters[option].annotation).split(" | ")
        if KINDS.keys() >= set(kinds) and not any(_is_kind(value, kind) for kind in kinds):
            raise ValueError(f"{name}: {option} is {value!r}, expected {' or '.join(kinds)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}: {option} is {value}, expected a finite number")
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise ValueError(f"{name}: {option} is {value}, expected a number of at most {_LARGEST}")


def _is_kind(value: Any, kind: str) -> bool:
    return isinstance(value, KINDS[kind]) and (kind == "bool" or not isinstance(value, bool))


def read_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with what YAML cannot say: ``{by_depth: [0.2, 0.8], other: 0.5}``, and merges by their names.

    >>> read_settings({"density": {"by_depth": [0.2, 0.8], "other": 0.5}})
    {'density': ByDepth(values=(0.2, 0.8), other=0.5)}
    """

    def read(value: Any) -> Any:
        if isinstance(value, Mapping) and not all(isinstance(key, str) for key in value):
            raise ValueError(f"the keys of a setting are patterns of paths, found {sorted(map(str, value))}")
        if isinstance(value, Mapping) and "by_depth" in value:
            if set(value) != {"by_depth", "other"}:
                raise ValueError(f"a setting by depth has by_depth and other, found {sorted(value)}")
            if not isinstance(value["by_depth"], list):
                raise ValueError(f"by_depth is {value['by_depth']!r}, expected a list of numbers")
            return methods.ByDepth(tuple(value["by_depth"]), value["other"])
        return [read(item) for item in value] if isinstance(value, list) else value

    settings = {name: read(value) for name, value in options.items()}
    if "merge" in settings:  # the merge inside KnOTS or Core Space
        inner = settings["merge"]
        known = registry.merges()
        if not isinstance(inner, str) or inner not in known or inner in ("knots", "core_space"):
            raise ValueError(f"merge: found {inner!r}, expected one of {', '.join(known)}")
        settings["merge"] = known[inner]
    return settings
