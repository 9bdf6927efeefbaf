"""LoRA adapters in the folders of PEFT, as what they change: one product of two factors for each kernel.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``. What it changes beyond the kernels of linear
layers (whole layers, biases, magnitudes), and what its config says beyond what is understood here, is refused by name,
not passed over. Where the initialisation was taken out of the base (PiSSA, OLoRA), the change is that from the
unchanged base, as PEFT's own conversion and its merge have it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tvjax import tree
from tvjax.checkpoints.adapter_base import check_base
from tvjax.checkpoints.adapter_config import check_settings, initialisation, model_class, rank_and_scale
from tvjax.checkpoints.fingerprints import Fingerprint
from tvjax.checkpoints.folder import Checkpoint, fetch
from tvjax.checkpoints.huggingface import Pretrained, read_leaf
from tvjax.checkpoints.json_files import read_json
from tvjax.checkpoints.memory import to_jax
from tvjax.checkpoints.reader import Tensors, open_tensors
from tvjax.merge.adapters import Adapter
from tvjax.models.families import GENERIC, family_of_config, shapes_of
from tvjax.models.key_table import FLOATS, fused_kernels, kernels_by_module, module_key
from tvjax.models.layer_table import LayerTable, Part

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_OUTER = (("A", 1), ("B", 0))  # inputs and outputs of a layer: the axis of each factor
PREFIX = "base_model.model."


class Factors(NamedTuple):
    """The two factors of one kernel in the file of an adapter.

    Attributes:
      a: key of ``[r, in]``.
      b: key of ``[out, r]``.
      scale: ``alpha / r``, or ``alpha / sqrt(r)``.
      outputs_first: whether the weight lies ``[out, in]``, as in a model that is read as its file has it.
      part: which part of a fused kernel's inputs or outputs it is of; None: the kernel is whole.
    """

    a: str
    b: str
    scale: float
    outputs_first: bool = False
    part: Part | None = None


class AdapterFile(NamedTuple):
    """An open adapter; made by `open_adapter`.

    Attributes:
      name: the folder or hub id that was asked for.
      revision: the commit of the hub repository.
      factors: by the path of their kernel.
      tensors: of the file.
      initial: ``pissa`` or ``olora``, what was taken out of the base before training; "" for nothing.
      trained_on: the base that its config names.
      notes: what cannot be told of the base.
    """

    name: str
    revision: str
    factors: Mapping[str, Factors]
    tensors: Tensors
    initial: str
    trained_on: str
    notes: tuple[str, ...]

    def read(self, path: str, kernel: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, float]:
        """The factors ``[in, r]`` and ``[r, out]`` of the change of a kernel, and the scale of their product.

        Of a weight that lies ``[out, in]`` they are ``[out, r]`` and ``[r, in]``.

        Args:
          path: of the kernel.
          kernel: of the base; read only where an initialisation was taken out of it.

        Raises:
          ValueError: where values are not finite.
        """
        factors = self.factors[path]
        a, b = self.tensors.read(factors.a).T, self.tensors.read(factors.b).T
        scale = factors.scale
        if self.initial and kernel is not None:
            kernel = np.asarray(kernel.T if factors.outputs_first else kernel, np.float32)
            a_0, b_0 = _initial_factors(self.initial, kernel, a.shape[1], scale)
            a = np.concatenate([np.float32(scale) * a.astype(np.float32), -a_0], axis=1)
            b, scale = np.concatenate([b.astype(np.float32), b_0]), 1.0
        if factors.part is not None:
            number, of, axis = factors.part
            a, b = (np.split(a, of)[number], b) if axis == 0 else (a, np.split(b, of, axis=1)[number])
        return (b.T, a.T, scale) if factors.outputs_first else (a, b, scale)

    def fingerprint(self) -> str:
        """The identity of the factors and scales."""
        found = Fingerprint()
        for path, (a, b, scale, *_) in sorted(self.factors.items()):
            found.add(f"{path} a {scale!r} {self.initial}".rstrip(), self.tensors.read(a))
            found.add(f"{path} b", self.tensors.read(b))
        return found.hexdigest()


def load_adapter(
    source: str | os.PathLike[str],
    base: Pretrained | Checkpoint,
    revision: str | None = None,
    *,
    any_base: bool = False,
) -> dict[str, Adapter]:
    """Reads a LoRA adapter of PEFT, for `tvjax.merge.merge_adapters` or, by `to_task_vector`, as a task vector.

    The scale of a kernel's product is ``alpha / r``, or ``alpha / sqrt(r)`` (rslora), with the ranks and alphas that
    the config gives for single layers by pattern. For PiSSA and OLoRA, whose initial product was taken out of the base
    before training, that product is computed from the base again and subtracted: the factors have twice the rank. Other
    initialisations that change the base (CorDA, LoftQ, LoRA-GA) are refused, with what PEFT has to convert them.

    Args:
      source: a folder or hub id with ``adapter_config.json`` and ``adapter_model.safetensors``.
      base: the model that it was trained on.
      revision: branch, tag or commit of the hub repository.
      any_base: take it although its config names another base.

    Returns:
      For each kernel that it changes, by path, its adapter.

    Raises:
      ValueError: an adapter of another kind, or of another model; the message names every key.
    """
    with open_adapter(source, base, revision, any_base=any_base) as opened:
        found = {path: opened.read(path, read_leaf(base, path) if opened.initial else None) for path in opened.factors}
    return {path: Adapter(to_jax(a), to_jax(b), scale) for path, (a, b, scale) in found.items()}


@contextlib.contextmanager
def open_adapter(
    source: str | os.PathLike[str],
    base: Pretrained | Checkpoint,
    revision: str | None = None,
    *,
    any_base: bool = False,
) -> Iterator[AdapterFile]:
    """Opens a LoRA adapter of PEFT; everything is checked, and none of its weights is read. See `load_adapter`."""
    folder, revision = fetch(source, revision)
    settings = read_json(folder / CONFIG, "is it the folder of a PEFT adapter?")
    try:
        check_settings(settings)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} has no {WEIGHTS}: save the adapter with safe_serialization=True")
    with open_tensors(folder / WEIGHTS) as tensors:
        factors = _find_factors(folder, settings, base, tensors)
        notes = check_base(settings, base, any_base)
        trained_on = str(settings.get("base_model_name_or_path") or "")
        name = os.fspath(source)
        yield AdapterFile(name, revision or "", factors, tensors, initialisation(settings), trained_on, notes)


def _initial_factors(initial: str, kernel: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Factors ``[in, r]`` and ``[r, out]`` of what an initialisation took out of a kernel, ``[in, out]``.

    PiSSA takes the r largest singular directions; OLoRA alpha/r times the first r columns of Q and rows of R, of the
    weight as torch has it, ``[out, in]``. Neither product depends on the signs that a decomposition leaves open.
    """
    if initial == "pissa":
        u, s, vt = np.linalg.svd(kernel, full_matrices=False)
        return u[:, :rank] * s[:rank], vt[:rank]
    q, r = np.linalg.qr(kernel.T)
    return np.float32(scale) * r[:rank].T, q[:, :rank].T


def _find_factors(
    folder: Path, settings: Mapping[str, Any], base: Pretrained | Checkpoint, tensors: Tensors
) -> dict[str, Factors]:
    pairs: dict[str, dict[str, str]] = {}
    problems = []
    for key in tensors.headers:
        match = re.fullmatch(rf"(?:{re.escape(PREFIX)})?(.+)\.lora_([AB])(?:\.default)?\.weight", key)
        if match is None:
            problems.append(f"{key}: no factor of a linear layer")
        else:
            pairs.setdefault(match[1], {})[match[2]] = key
    family = family_of_config(base.config)
    outputs_first = family is GENERIC and not settings.get("fan_in_fan_out")  # True for Conv1D, which lies [in, out]
    name = "/weight" if family is GENERIC else "/kernel"
    shapes = {
        path: shape[::-1] if outputs_first else shape
        for path, shape in shapes_of(base.config).items()
        if path.endswith(name) and len(shape) == 2
    }
    kernels, fused = _with_fused(family.table, shapes)
    sizes = {
        module: tuple(tensors.headers[pair[name]].shape[axis] if name in pair else None for name, axis in _OUTER)
        for module, pair in pairs.items()
        if all(len(tensors.headers[key].shape) == 2 for key in pair.values())
    }
    known = {**kernels_by_module(family.table, shapes), **{key: key for key in fused}}
    path_of = _find_kernels(folder, family.table, known, kernels, sizes, model_class(settings))
    factors: dict[str, Factors] = {}
    for module, pair in pairs.items():
        path = path_of.get(module, "")
        if not path:
            problems.append(f"{module}: the model has no such linear layer")
            continue
        if set(pair) != {"A", "B"} or factors.keys() & {path, *fused.get(path, ())}:
            problems.append(
                f"{module}: found {' and '.join(sorted(pair.values()))}, expected one lora_A and one lora_B"
            )
            continue
        a, b = tensors.headers[pair["A"]], tensors.headers[pair["B"]]
        rank, scale = rank_and_scale(settings, module)
        inputs, outputs = kernels[path]
        if (a.shape, b.shape) != ((rank, inputs), (outputs, rank)):
            problems.append(
                f"{module}: lora_A {a.shape} and lora_B {b.shape}, expected {(rank, inputs)} and {(outputs, rank)}"
            )
        elif {a.dtype, b.dtype} - set(FLOATS):
            problems.append(f"{module}: is {a.dtype} and {b.dtype}, expected one of {', '.join(FLOATS)}")
        elif path in fused and initialisation(settings):
            problems.append(f"{module}: {initialisation(settings)} of a fused kernel, whose parts are layers here")
        else:
            whole = Factors(pair["A"], pair["B"], scale, outputs_first)
            factors |= {own: whole._replace(part=part) for own, part in fused.get(path, {}).items()} or {path: whole}
    if not pairs and not problems:
        problems.append("it holds no factors")
    if problems:
        raise ValueError(
            f"the adapter {folder} does not fit {base.name!r} at {len(problems)} places:\n{tree.list_some(problems)}\n"
            "was it trained on this model?"
        )
    return factors


def _with_fused(
    table: LayerTable, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[int, ...]], dict[str, dict[str, Part]]]:
    """Kernels with those that a checkpoint has in one, under their modules' names; and the parts of the latter."""
    found, fused = dict(shapes), fused_kernels(table, shapes)
    for module, parts in fused.items():
        path, part = next(iter(parts.items()))
        whole = list(shapes[path])
        whole[part.axis] *= part.of
        found[module] = tuple(whole)
    return found, fused


def _find_kernels(
    folder: Path,
    table: LayerTable,
    known: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    sizes: Mapping[str, tuple[int | None, ...]],
    trained_in: str,
) -> dict[str, str]:
    """The path of each module's kernel, where it has one.

    The modules of a tower that was trained alone have no tower in their names; which one it is says the class that the
    adapter was trained in, or that only one has such layers of these sizes.

    Args:
      folder: of the adapter, for the error.
      table: of the model's family.
      known: the path of the kernel of each module of the model; of a fused one the module's name.
      shapes: of the model's kernels by path, of the fused ones by that name.
      sizes: inputs and outputs of each module, None where a factor is missing.
      trained_in: class of transformers; "" where it is not known.

    Raises:
      ValueError: several towers fit.
    """

    def paths(names: list[str], wrapper: str) -> dict[str, str]:
        keys = {name: module_key(table, wrapper + name) for name in names}
        return {name: known[key] for name, key in keys.items() if key in known}

    found = paths(list(sizes), "")
    rest = [name for name in sizes if name not in found]
    if not rest:
        return found
    if trained_in in table.wrapper_of:
        return found | paths(rest, table.wrapper_of[trained_in])
    towers = [paths(rest, wrapper) for wrapper in table.wrappers]
    fits = [
        tower
        for tower in towers
        if len(tower) == len(rest)
        and all(
            size in (None, length)
            for name, path in tower.items()
            for size, length in zip(sizes[name], shapes[path], strict=True)
        )
    ]
    if len(fits) > 1:
        where = " and ".join(sorted({path.split("/")[0] for tower in fits for path in tower.values()}))
        classes = " or ".join(f'"{name}"' for name in table.wrapper_of)
        raise ValueError(
            f"the adapter {folder} fits {where} alike, its keys ({rest[0]}, ...) do not say which, and its {CONFIG} "
            f'names no class that does: write "auto_mapping": {{"base_model_class": {classes}}} into that file'
        )
    return found | max(fits or towers, key=len, default={})


def product(a: np.ndarray, b: np.ndarray, scale: float, out: np.ndarray) -> np.ndarray:
    """``scale * a @ b`` in float32, into memory that is there.

    >>> product(np.ones((2, 1)), np.ones((1, 3)), 0.5, np.empty((2, 3), np.float32)).tolist()
    [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
    """
    np.matmul(a.astype(np.float32), b.astype(np.float32), out=out)
    return np.multiply(out, np.float32(scale), out=out)
