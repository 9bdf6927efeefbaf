"""LoRA adapters in the folders of PEFT, as what they change: one product of two factors for each kernel.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``. What it changes beyond the kernels of linear
layers (whole layers, biases, magnitudes) is refused by name, not passed over.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tvjax import tree
from tvjax.checkpoints.huggingface import Checkpoint, Pretrained, fetch, shapes_of
from tvjax.checkpoints.json_files import read_json
from tvjax.checkpoints.memory import to_jax
from tvjax.checkpoints.safetensors import Fingerprint, Tensors, open_tensors
from tvjax.merge.adapters import Adapter
from tvjax.models.families import family_of_config
from tvjax.models.key_table import FLOATS, keys_of

CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Settings under which the change of a kernel is not the product of its factors.
_UNSUPPORTED = ("use_dora", "modules_to_save", "layer_replication", "lora_bias", "trainable_token_indices")


class Factors(NamedTuple):
    """The two factors of one kernel in the file of an adapter.

    Attributes:
      a: key of ``[r, in]``.
      b: key of ``[out, r]``.
      scale: ``alpha / r``, or ``alpha / sqrt(r)``.
    """

    a: str
    b: str
    scale: float


class AdapterFile(NamedTuple):
    """An open adapter; made by `open_adapter`.

    Attributes:
      name: the folder or hub id that was asked for.
      revision: the commit of the hub repository.
      factors: by the path of their kernel.
      tensors: of the file.
    """

    name: str
    revision: str
    factors: Mapping[str, Factors]
    tensors: Tensors

    def read(self, path: str) -> tuple[np.ndarray, np.ndarray, float]:
        """The factors ``[in, r]`` and ``[r, out]`` of a kernel, and the scale of their product.

        Raises:
          ValueError: where values are not finite.
        """
        factors = self.factors[path]
        return self.tensors.read(factors.a).T, self.tensors.read(factors.b).T, factors.scale

    def fingerprint(self) -> str:
        """The identity of the factors and scales."""
        found = Fingerprint()
        for path, (a, b, scale) in sorted(self.factors.items()):
            found.add(f"{path} a {scale!r}", self.tensors.read(a))
            found.add(f"{path} b", self.tensors.read(b))
        return found.hexdigest()


def load_adapter(
    source: str | os.PathLike[str], base: Pretrained | Checkpoint, revision: str | None = None
) -> dict[str, Adapter]:
    """Reads a LoRA adapter of PEFT, for `tvjax.merge.merge_adapters` or, by `to_task_vector`, as a task vector.

    The scale of a kernel's product is ``alpha / r``, or ``alpha / sqrt(r)`` (rslora), with the ranks and alphas that
    the config gives for single layers by pattern.

    Args:
      source: a folder or hub id with ``adapter_config.json`` and ``adapter_model.safetensors``.
      base: the model that it was trained on.
      revision: branch, tag or commit of the hub repository.

    Returns:
      For each kernel that it changes, by path, its adapter.

    Raises:
      ValueError: an adapter of another kind, or of another model; the message names every key.
    """
    with open_adapter(source, base, revision) as opened:
        found = {path: opened.read(path) for path in opened.factors}
    return {path: Adapter(to_jax(a), to_jax(b), scale) for path, (a, b, scale) in found.items()}


@contextlib.contextmanager
def open_adapter(
    source: str | os.PathLike[str], base: Pretrained | Checkpoint, revision: str | None = None
) -> Iterator[AdapterFile]:
    """Opens a LoRA adapter of PEFT; everything is checked, and no weight is read. See `load_adapter`."""
    folder, revision = fetch(source, revision)
    settings = read_json(folder / CONFIG, "is it the folder of a PEFT adapter?")
    try:
        _check_settings(settings)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    if not (folder / _WEIGHTS).is_file():
        raise ValueError(f"{folder} has no {_WEIGHTS}: save the adapter with safe_serialization=True")
    with open_tensors(folder / _WEIGHTS) as tensors:
        factors = _find_factors(folder, settings, base, tensors)
        yield AdapterFile(os.fspath(source), revision or "", factors, tensors)


def _check_settings(settings: Mapping[str, Any]) -> None:
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {settings.get('peft_type')!r}, only LORA adapters are read")
    for name in _UNSUPPORTED:
        if settings.get(name):
            raise ValueError(
                f"{name} is {settings[name]!r}: such an adapter is no product of two factors; merge it into its base "
                "with PEFT (merge_and_unload), save that, and extract the task vector from it"
            )
    if settings.get("bias", "none") != "none":
        raise ValueError(f"bias is {settings['bias']!r}, which changes the base's biases: merge it with PEFT first")
    for name, kind in (("r", int), ("lora_alpha", (int, float))):
        value = settings.get(name)
        if not isinstance(value, kind) or isinstance(value, bool) or not math.isfinite(value) or value < (name == "r"):
            raise ValueError(f"{name} is {value!r}, expected a positive number")
    for name, kind in (("rank_pattern", int), ("alpha_pattern", (int, float))):
        patterns = settings.get(name) or {}
        if not isinstance(patterns, dict) or not all(
            isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
            for value in patterns.values()
        ):
            raise ValueError(f"{name} is {patterns!r}, expected numbers by pattern")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{name}: {pattern!r} is no pattern ({error})") from error


def _find_factors(
    folder: Path, settings: Mapping[str, Any], base: Pretrained | Checkpoint, tensors: Tensors
) -> dict[str, Factors]:
    family = family_of_config(base.config)
    shapes = shapes_of(base.config)
    path_of = {key: path for path, key in keys_of(family.keys, shapes).items() if path.endswith("/kernel")}
    pairs: dict[str, dict[str, str]] = {}
    problems = []
    for key in tensors.headers:
        match = re.fullmatch(rf"(?:{re.escape(_PREFIX)})?(.+)\.lora_([AB])(?:\.default)?\.weight", key)
        if match is None:
            problems.append(f"{key}: no factor of a linear layer")
        else:
            pairs.setdefault(match[1], {})[match[2]] = key
    factors: dict[str, Factors] = {}
    for module, pair in pairs.items():
        spellings = [module, *(wrapper + module for wrapper in family.keys.wrappers)]
        path = next((path_of[f"{name}.weight"] for name in spellings if f"{name}.weight" in path_of), None)
        if path is None or len(shapes[path]) != 2:
            problems.append(f"{module}: the model has no such linear layer")
            continue
        if set(pair) != {"A", "B"} or path in factors:
            problems.append(
                f"{module}: found {' and '.join(sorted(pair.values()))}, expected one lora_A and one lora_B"
            )
            continue
        a, b = tensors.headers[pair["A"]], tensors.headers[pair["B"]]
        rank = _by_pattern(settings.get("rank_pattern"), module, settings["r"])
        inputs, outputs = shapes[path]
        if (a.shape, b.shape) != ((rank, inputs), (outputs, rank)):
            problems.append(
                f"{module}: lora_A {a.shape} and lora_B {b.shape}, expected {(rank, inputs)} and {(outputs, rank)}"
            )
        elif {a.dtype, b.dtype} - set(FLOATS):
            problems.append(f"{module}: is {a.dtype} and {b.dtype}, expected one of {', '.join(FLOATS)}")
        else:
            alpha = _by_pattern(settings.get("alpha_pattern"), module, settings["lora_alpha"])
            root = math.sqrt(rank) if settings.get("use_rslora") else rank
            factors[path] = Factors(pair["A"], pair["B"], alpha / root)
    if not pairs and not problems:
        problems.append("it holds no factors")
    if problems:
        raise ValueError(
            f"the adapter {folder} does not fit {base.name!r} at {len(problems)} places:\n{tree.list_some(problems)}\n"
            "was it trained on this model?"
        )
    return factors


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that the end of a module's name matches, as PEFT decides it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def product(a: np.ndarray, b: np.ndarray, scale: float, out: np.ndarray) -> np.ndarray:
    """``scale * a @ b`` in float32, into memory that is there.

    >>> product(np.ones((2, 1)), np.ones((1, 3)), 0.5, np.empty((2, 3), np.float32)).tolist()
    [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
    """
    np.matmul(a.astype(np.float32), b.astype(np.float32), out=out)
    return np.multiply(out, np.float32(scale), out=out)
