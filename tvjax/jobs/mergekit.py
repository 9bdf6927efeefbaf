"""mergekit's YAML recipes as configs of `tvjax.jobs.merge`, for the methods that both have.

mergekit merges models, leaf by leaf under their keys in the files; here their task vectors are merged, under our paths.
Filters and gradients are resolved to numbers by path, with the keys that the files of the base model have; what a
recipe says and nothing here does is refused by name.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tvjax.jobs.configs import MergeConfig
from tvjax.jobs.mergekit_recipe import Numbers, Recipe, combine, compact, require_all
from tvjax.jobs.recipes import load

_STRAIGHT = 0.0316  # sine of the angle whose cosine is the 0.9995 of mergekit's slerp
_ELSEWHERE = {
    "passthrough": "tvjax has no models of layers that are stacked anew (frankenmerges)",
    "arcee_fusion": "ties or sce are the nearest",
    "nearswap": "slerp is the nearest",
    "ram": "ties is the nearest",
}


class FromMergekit(NamedTuple):
    """A recipe of mergekit as one of ours.

    Attributes:
      config: for `tvjax.jobs.merge`.
      notes: what is not as mergekit does it, or was passed over.
    """

    config: MergeConfig
    notes: tuple[str, ...]


def from_mergekit(file: str | os.PathLike[str], output: str | os.PathLike[str], **more: Any) -> FromMergekit:
    """Reads a YAML recipe of mergekit.

    Args:
      file: the recipe.
      output: where the merged model goes.
      **more: further keys of `tvjax.jobs.MergeConfig`, such as ``seed``.

    Raises:
      ValueError: of one line, for what a recipe has and nothing here does: a method, a parameter, slices.

    Numbers that differ by filter or layer are resolved with the files of the base model, whose keys the filters mean:
    for them it is opened (its weights are not read). mergekit counts densities in whole tensors; a tensor that is
    several leaves here (GPT-2's ``c_attn``) is counted by these.
    """
    keys, notes = translate(load(Path(file)), os.fspath(file))
    return FromMergekit(MergeConfig.read({**keys, "output": Path(output), **more}), tuple(notes))


def is_mergekit(recipe: Mapping[str, Any]) -> bool:
    """Whether the keys of a recipe are those of mergekit.

    >>> is_mergekit({"merge_method": "ties", "models": []}), is_mergekit({"command": "merge", "method": "ties"})
    (True, False)
    """
    return "merge_method" in recipe


def translate(recipe: Mapping[str, Any], name: str) -> tuple[dict[str, Any], list[str]]:
    """The keys of a config of `tvjax.jobs.merge`, but for the output, and notes.

    Args:
      recipe: what the YAML holds.
      name: of the file, for errors.

    Raises:
      ValueError: as `from_mergekit`.
    """
    try:
        with contextlib.ExitStack() as stack:
            read = Recipe(recipe, stack)
            if read.method not in _METHODS:
                way = _ELSEWHERE.get(read.method, f"those that both have are {', '.join(_METHODS)}")
                raise ValueError(f"merge_method {read.method!r} has no counterpart here: {way}")
            found = _METHODS[read.method](read)
            read.check_all_read()
    except ValueError as error:
        raise ValueError(f"{name!r}, a recipe of mergekit: {error}") from error
    options = {key: value if key == "matrices" else compact(value) for key, value in found.options.items()}
    keys = {"task_vectors": [_folder(model) for model in found.models], "model": found.base, "method": found.method}
    return {**keys, "options": options, "scale": found.scale}, read.notes


class _Found(NamedTuple):
    """What a recipe asks for: our method, the fine-tuned models, the base, and options."""

    method: str
    models: Sequence[str]
    base: str
    options: dict[str, Any]
    scale: float = 1.0


# -- the methods -------------------------------------------------------------------------------------------------------


def _linear(recipe: Recipe) -> _Found:
    if recipe.base is not None and recipe.base not in recipe.models:
        raise ValueError("linear merges the models that are listed: leave base_model out, or list it with a weight")
    first = recipe.base or recipe.models[0]
    others = [model for model in recipe.models if model != first]
    if not others:
        raise ValueError("linear needs two models at least")
    weights = recipe.each("weight", recipe.models)
    total = combine(lambda *each: sum(each), *weights)
    if recipe.flag("normalize", True):
        require_all(total, lambda whole: abs(whole) > 1e-8, "the weights add up to 0")
        weights = [combine(lambda w, whole: w / whole, each, total) for each in weights]
    else:
        require_all(total, lambda whole: abs(whole - 1) < 1e-6, "without normalize the weights must add up to 1")
    shares = [share for model, share in zip(recipe.models, weights, strict=True) if model != first]
    return _Found("task_arithmetic", others, first, {"weights": shares})


def _task_arithmetic(recipe: Recipe) -> _Found:
    weights = _divided(recipe, recipe.each("weight", recipe.tuned), normalize=False)
    return _Found(
        "task_arithmetic", recipe.tuned, recipe.base or "", {"weights": weights}, recipe.number("lambda", 1.0)
    )


def _ties(recipe: Recipe) -> _Found:
    _no_rescale(recipe)
    options = {
        "weights": recipe.each("weight", recipe.tuned),
        "density": _densities(recipe),
        "scope": "leaf",
        "over": "weights" if recipe.flag("normalize", True) else "none",
    }
    return _Found("ties", recipe.tuned, recipe.base or "", options, recipe.number("lambda", 1.0))


def _dare(how: str) -> Callable[[Recipe], _Found]:
    def read(recipe: Recipe) -> _Found:
        options = {**_sparse(recipe, how, normalize=False), "rescale": recipe.flag("rescale", True)}
        recipe.notes.append(
            "dropped at random, by other draws; rescaled by 1 / density (mergekit since 0.1.2 to the same sum of "
            "magnitudes, which is the same in the mean)"
        )
        return _Found("dare", recipe.tuned, recipe.base or "", options, recipe.number("lambda", 1.0))

    return read


def _della(how: str) -> Callable[[Recipe], _Found]:
    def read(recipe: Recipe) -> _Found:
        options = {
            **_sparse(recipe, how, normalize=how == "ties"),
            "rescale": recipe.flag("rescale", True),
            "matrices": recipe.matrices(),
        }
        halves = recipe.each("epsilon", recipe.tuned, 0.15)
        options["epsilon"] = [  # a density of 1 drops nothing there
            combine(lambda half, share: 0.0 if share >= 1 else 2 * half, half, share)
            for half, share in zip(halves, options["density"], strict=True)
        ]
        recipe.notes.append(
            "dropped at random, by other draws; each entry that stays is divided by its own probability"
        )
        return _Found("della", recipe.tuned, recipe.base or "", options, recipe.number("lambda", 1.0))

    return read


def _breadcrumbs(how: str) -> Callable[[Recipe], _Found]:
    def read(recipe: Recipe) -> _Found:
        _no_rescale(recipe)
        options = _sparse(recipe, how, normalize=False)
        options["gamma"] = [  # what does not fit beside the density is not dropped
            combine(lambda gamma, share: min(gamma, 1 - share), gamma, share)
            for gamma, share in zip(recipe.each("gamma", recipe.tuned, 0.01), options["density"], strict=True)
        ]
        return _Found("breadcrumbs", recipe.tuned, recipe.base or "", options, recipe.number("lambda", 1.0))

    return read


def _slerp(recipe: Recipe) -> _Found:
    if len(recipe.models) != 2 or recipe.base not in recipe.models:
        raise ValueError("slerp needs two models, one of which is base_model")
    t = recipe.shared("t")
    weights = [combine(lambda share: 1 - share, t), t]
    assert recipe.base is not None
    models = [recipe.base, *recipe.tuned]
    return _Found("nuslerp", models, recipe.base, {"weights": weights, "base": True, "straight": _STRAIGHT})


def _nuslerp(recipe: Recipe) -> _Found:
    if len(recipe.models) != 2 or recipe.base in recipe.models:
        raise ValueError("nuslerp needs two models, neither of which is base_model")
    options: dict[str, Any] = {"weights": recipe.each("weight", recipe.models)}
    flat, rows = recipe.flag("nuslerp_flatten", True), recipe.flag("nuslerp_row_wise", False)
    if not flat:
        options |= {"along": "outputs" if rows else "inputs", "matrices": recipe.matrices()}
    return _Found("nuslerp", recipe.models, *_on_models(recipe, options))


def _multislerp(recipe: Recipe) -> _Found:
    models = recipe.models if recipe.base is None else recipe.tuned
    recipe.number("eps", 1e-8)
    options = {
        "weights": recipe.each("weight", models),
        "normalize": recipe.flag("normalize_weights", True),
    }
    return _Found("multi_slerp", models, *_on_models(recipe, options))


def _karcher(recipe: Recipe) -> _Found:
    if recipe.base is not None:
        raise ValueError("karcher merges the models that are listed: leave base_model out")
    options = {"iterations": int(recipe.number("max_iter", 10)), "tolerance": recipe.number("tol", 1e-5)}
    return _Found("karcher_mean", recipe.models, *_on_models(recipe, options))


def _model_stock(recipe: Recipe) -> _Found:
    if recipe.flag("filter_wise", False):
        raise ValueError("filter_wise is not done here: leave it out")
    recipe.notes.append(
        "where the vectors point away from each other, nothing is kept; mergekit turns their mean around"
    )
    return _Found("model_stock", recipe.tuned, recipe.base or "", {})


def _sce(recipe: Recipe) -> _Found:
    recipe.notes.append("select_topk is a share of all entries; in mergekit of those that differ between the models")
    return _Found("sce", recipe.tuned, recipe.base or "", {"density": recipe.shared("select_topk", 1.0)})


_METHODS: dict[str, Callable[[Recipe], _Found]] = {
    "linear": _linear,
    "task_arithmetic": _task_arithmetic,
    "ties": _ties,
    "dare_linear": _dare("linear"),
    "dare_ties": _dare("ties"),
    "della": _della("ties"),
    "della_linear": _della("linear"),
    "breadcrumbs": _breadcrumbs("linear"),
    "breadcrumbs_ties": _breadcrumbs("ties"),
    "slerp": _slerp,
    "nuslerp": _nuslerp,
    "multislerp": _multislerp,
    "karcher": _karcher,
    "model_stock": _model_stock,
    "sce": _sce,
}


def _sparse(recipe: Recipe, how: str, normalize: bool) -> dict[str, Any]:
    """The weights and densities of sparse vectors, and how they are put together."""
    weights = recipe.each("weight", recipe.tuned)
    if how == "linear":
        weights = _divided(recipe, weights, normalize)
    elif not recipe.flag("normalize", normalize):
        how = "ties_sum"
    return {"weights": weights, "density": _densities(recipe), "combine": how}


def _divided(recipe: Recipe, weights: list[Numbers], normalize: bool) -> list[Numbers]:
    """Weights divided by their sum where the recipe says normalize."""
    if not recipe.flag("normalize", normalize):
        return weights
    total = combine(lambda *each: sum(each), *weights)
    return [combine(lambda w, whole: w / (whole if abs(whole) >= 1e-8 else 1), each, total) for each in weights]


def _densities(recipe: Recipe) -> list[Numbers]:
    return [combine(lambda share: min(share, 1.0), each) for each in recipe.each("density", recipe.tuned, 1.0)]


def _no_rescale(recipe: Recipe) -> None:
    if recipe.flag("rescale", False):
        raise ValueError(f"rescale is not done here for {recipe.method}: leave it out, or take lambda")


def _on_models(recipe: Recipe, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The base and the options of a method that merges the models themselves where there is no base_model."""
    return (recipe.base, options) if recipe.base is not None else (recipe.models[0], {**options, "base": True})


def _folder(model: str) -> str:
    """A model as a folder: a hub id as a task vector would be taken for an adapter."""
    from tvjax.checkpoints.folder import fetch

    return model if Path(model).exists() else str(fetch(model)[0])
