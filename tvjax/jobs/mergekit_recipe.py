"""What a YAML recipe of mergekit says: its models and parameters, as numbers of all leaves or by path."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from tvjax.jobs.recipes import short

if TYPE_CHECKING:
    from tvjax.checkpoints.folder import Checkpoint

Numbers = float | dict[str, float]  # of all leaves, or by path

_KEYS = ("merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source")
_BEFORE = ("embed", "wte", "wpe", "shared", "pre_layrnorm")  # in the keys of what comes before the layers


class Recipe:
    """A recipe whose parameters are read once each, so that one that nobody reads is seen."""

    def __init__(self, recipe: Mapping[str, Any], stack: contextlib.ExitStack):
        for key in recipe:
            if key not in _KEYS:
                raise ValueError(f"{key} is not read here; the keys that are: {', '.join(_KEYS)}")
        self.method = _text(recipe["merge_method"], "merge_method")
        self.base = None if recipe.get("base_model") is None else _model(recipe["base_model"])
        self.notes: list[str] = []
        self._stack, self._open = stack, cast("Checkpoint | None", None)
        self._ranges: list[Any] = []
        self._read: set[str] = {"int8_mask"}
        self._shared = [_mapping(recipe.get("parameters"), "parameters")]
        self._own: dict[str, dict[str, Any]] = {}
        for entry in self._entries(recipe):
            known = {"model", "parameters", "layer_range"}
            if not isinstance(entry, Mapping) or "model" not in entry or not set(entry) <= known:
                raise ValueError(f"an entry of models has model and parameters, found {short(entry)}")
            model = _model(entry["model"])
            if model in self._own:
                raise ValueError(f"the model {model!r} stands twice")
            self._own[model] = _mapping(entry.get("parameters"), f"parameters of {model}")
        if not self._own:
            raise ValueError("there are no models")
        self._note(recipe)

    def _entries(self, recipe: Mapping[str, Any]) -> Sequence[Any]:
        """The models, or the sources of a slice that is all of their layers."""
        models, slices = recipe.get("models"), recipe.get("slices")
        if isinstance(models, list) and slices is None:
            return models
        if not isinstance(slices, list) or not all(isinstance(each, Mapping) for each in slices) or models is not None:
            raise ValueError("give a list of models (or one slice of all their layers)")
        if len(slices) != 1:
            raise ValueError(
                f"found {len(slices)} slices: models put together of layers (frankenmerges) are not made here; "
                "merge whole models (models: ...)"
            )
        sources = slices[0].get("sources")
        if not isinstance(sources, list) or not all(isinstance(source, Mapping) for source in sources):
            raise ValueError(f"the sources of a slice are a list of models, found {short(sources)}")
        self._shared.insert(0, _mapping(slices[0].get("parameters"), "parameters of the slice"))
        self._ranges = [source.get("layer_range") for source in sources]
        return sources

    def _note(self, recipe: Mapping[str, Any]) -> None:
        source = recipe.get("tokenizer_source")
        if source not in (None, "base", self.base):
            raise ValueError(
                f"tokenizer_source {source!r}: tokens stay those of the base model; say base, or leave it out"
            )
        if "int8_mask" in self._names():
            self.notes.append("int8_mask saves mergekit memory, and is passed over")
        for key in ("dtype", "out_dtype"):
            if recipe.get(key) not in (None, "float32"):
                self.notes.append(
                    f"{key} {recipe[key]} is passed over: computed in float32, stored as the base model is"
                )

    def _names(self) -> set[str]:
        return {name for each in (*self._shared, *self._own.values()) for name in each}

    def check_all_read(self) -> None:
        """Raises a ValueError for a parameter that nothing read, and for slices of a part of the layers."""
        left = sorted(self._names() - self._read)
        if left:
            raise ValueError(f"the parameter {left[0]} of {self.method} has no counterpart here: leave it out")
        for found in self._ranges:
            if found is not None and list(found) != [0, self._layers]:
                raise ValueError(
                    f"layer_range {found} of models with {self._layers} layers: only slices of all layers are merged"
                )

    @property
    def models(self) -> list[str]:
        """All that are listed."""
        return list(self._own)

    @property
    def tuned(self) -> list[str]:
        """Those that are not the base, of which the method needs one."""
        if self.base is None:
            raise ValueError(f"{self.method} needs base_model")
        models = [model for model in self._own if model != self.base]
        if not models:
            raise ValueError("there is no model beside base_model")
        return models

    def shared(self, name: str, default: float | None = None) -> Numbers:
        """A parameter that is one for all models."""
        return self._numbers(name, self._shared, default)

    def each(self, name: str, models: Sequence[str], default: float | None = None) -> list[Numbers]:
        """A parameter of each of these models."""
        return [self._numbers(name, [self._own[model], *self._shared], default, model) for model in models]

    def number(self, name: str, default: float) -> float:
        """A parameter that is one number."""
        found = self.shared(name, default)
        if isinstance(found, dict):
            raise ValueError(f"{name} must be one number here, found {short(found)}")
        return found

    def flag(self, name: str, default: bool) -> bool:
        """A parameter that is true or false."""
        self._read.add(name)
        found = next((each[name] for each in self._shared if name in each), default)
        if not isinstance(found, bool):
            raise ValueError(f"{name} must be true or false, found {short(found)}")
        return found

    def _numbers(
        self, name: str, levels: Sequence[Mapping[str, Any]], default: float | None, model: str | None = None
    ) -> Numbers:
        self._read.add(name)
        settings = [level[name] for level in levels if name in level]
        if default is not None:
            settings.append(default)
        missing = f"{name} is missing" + (f" for {model}" if model else "")
        if not settings:
            raise ValueError(missing)
        if _is_number(settings[0]):
            return float(settings[0])
        found = {}
        for path, (key, depth) in self._places().items():
            values = (_evaluate(setting, key, depth, name) for setting in settings)
            value = next((value for value in values if value is not None), None)
            if value is None:
                raise ValueError(f"{missing} at {key}")
            found[path] = value
        return found

    @property
    def _checkpoint(self) -> Checkpoint:
        from tvjax.checkpoints.folder import open_checkpoint

        if self._open is None:
            self._open = self._stack.enter_context(open_checkpoint(self.base or self.models[0]))
        return self._open

    def _places(self) -> dict[str, tuple[str, float]]:
        """The key of each leaf, and its depth: from 0 in the first layer, and before, to 1 in the last, and after."""
        from tvjax.merge.settings import ByDepth, resolve

        keys = {path: source.key for path, source in self._checkpoint.sources.items()}
        depths = resolve(ByDepth((0.0, 1.0), other=-1.0), list(keys))
        outside = {path: 0.0 if any(word in key for word in _BEFORE) else 1.0 for path, key in keys.items()}
        return {path: (key, outside[path] if depths[path] < 0 else depths[path]) for path, key in keys.items()}

    @property
    def _layers(self) -> int:
        numbers = [int(word) for path in self._checkpoint.shapes for word in path.split("/") if word.isdigit()]
        return max(numbers, default=-1) + 1

    def matrices(self) -> dict[str, str]:
        """The letters of matrices (`tvjax.merge.views`) by which ours have the rows of those in the files."""
        found = {}
        for path, source in self._checkpoint.sources.items():
            theirs = self._checkpoint.tensors.headers[source.key].shape
            ours = source.leaf.to_ours(np.empty(range(2, 2 + len(theirs)), np.bool_)).shape
            if len(ours) > 1:
                inputs = "i" * (len(ours) - 1)
                found[path] = inputs + "o" if ours[-1] == 2 else "o" + inputs
        return found


def combine(function: Callable[..., float], *numbers: Numbers) -> Numbers:
    """A function of numbers, by path where one of them is.

    >>> combine(lambda x, y: x + y, 1.0, {"w": 2.0})
    {'w': 3.0}
    """
    paths = next((each for each in numbers if isinstance(each, dict)), None)
    if paths is None:
        return function(*numbers)
    return {path: function(*(each[path] if isinstance(each, dict) else each for each in numbers)) for path in paths}


def require_all(numbers: Numbers, holds: Callable[[float], bool], message: str) -> None:
    """Raises a ValueError with this message for a number that is not as it must be.

    >>> require_all(1.0, lambda total: total == 1, "the sum is not 1")
    """
    for path, number in (numbers if isinstance(numbers, dict) else {"all leaves": numbers}).items():
        if not holds(number):
            raise ValueError(f"{message}, found {number:g} for {path}")


def compact(value: Any) -> Any:
    """Numbers by path as numbers by the widest subtrees in which they are equal.

    >>> compact({"blocks/0/up": 1.0, "blocks/0/down": 1.0, "blocks/1/up": 2.0})
    {'blocks/0': 1.0, 'blocks/1': 2.0}
    """
    if isinstance(value, list):
        return [compact(each) for each in value]
    if not isinstance(value, dict):
        return value
    found = dict(_subtrees(value, ""))
    return found[""] if set(found) == {""} else found


def _subtrees(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    if len(set(values.values())) == 1:
        yield prefix, next(iter(values.values()))
        return
    groups: dict[str, dict[str, Any]] = {}
    start = len(prefix) + 1 if prefix else 0
    for path, value in values.items():
        child = path[: path.find("/", start)] if "/" in path[start:] else path
        groups.setdefault(child, {})[path] = value
    for child, group in groups.items():
        yield from _subtrees(group, child)


def _evaluate(setting: Any, key: str, depth: float, name: str) -> float | None:
    """The value of a setting at a tensor: a number, a gradient over the layers, or conditions; None: no filter fits."""
    if _is_number(setting):
        return float(setting)
    if isinstance(setting, list) and setting and all(map(_is_number, setting)):
        return float(np.interp(depth * (len(setting) - 1), np.arange(len(setting)), setting))
    for condition in [setting] if isinstance(setting, Mapping) else setting if isinstance(setting, list) else ():
        if not isinstance(condition, Mapping) or not {"value"} <= set(condition) <= {"value", "filter"}:
            break
        if condition.get("filter") in (None, "*") or str(condition["filter"]) in key:
            return _evaluate(condition["value"], key, depth, name)
    else:
        if isinstance(setting, Mapping | list) and setting:
            return None
    raise ValueError(
        f"{name} must be a number, a list of numbers, or a list of filters with values, found {short(setting)}"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{what} must be a text, found {short(value)}")
    return value


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"the {what} must be names with values, found {short(value)}")
    return value


def _model(value: Any) -> str:
    """The folder or hub id of a model."""
    name = _text(value, "a model")
    if "+" in name and not Path(name).exists():
        raise ValueError(f"{name!r} is a model with an adapter: merge adapters by tvjax merge ADAPTER... --model MODEL")
    if "@" in name and not Path(name).exists():
        raise ValueError(f"{name!r} names a revision: download it, and give its folder")
    return name
