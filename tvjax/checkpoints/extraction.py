"""Task vectors of two checkpoints on disk, or of an adapter, written tensor by tensor."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jax.typing import DTypeLike

from tvjax import tree
from tvjax.checkpoints.adapters import open_adapter, product
from tvjax.checkpoints.behind import Behind
from tvjax.checkpoints.elementwise import difference
from tvjax.checkpoints.folder import Checkpoint, Name, open_checkpoint
from tvjax.checkpoints.memory import Scratch
from tvjax.checkpoints.provenance import check_configs, doubts
from tvjax.checkpoints.side_by_side import Progress, SideBySide
from tvjax.checkpoints.tensor_dtypes import cast, cast_header
from tvjax.checkpoints.writer import write_tensors
from tvjax.models.families import GENERIC
from tvjax.models.key_table import Tensor

_UNKNOWN = "0" * 64  # stands where a fingerprint will


class Extracted(NamedTuple):
    """What `extract` wrote.

    Attributes:
      leaves: number of leaves.
      parameters: number of their entries.
      norm: Euclidean norm of all of them together.
      metadata: of the file.
      changed_outside: leaves outside the subtree that fine-tuning changed too, which take no part.
      left: why tensors take no part, by path: no parameters, or not in both models.
      notes: what could not be told of the models, and what was allowed.
    """

    leaves: int
    parameters: int
    norm: float
    metadata: dict[str, str]
    changed_outside: tuple[str, ...]
    left: Mapping[str, str]
    notes: tuple[str, ...] = ()


def extract(
    pretrained: Name,
    finetuned: Name,
    path: str | os.PathLike[str],
    *,
    subtree: str = "",
    allow_config_differences: bool = False,
    dtype: DTypeLike = np.float32,
    revision: str | None = None,
    finetuned_revision: str | None = None,
    progress: Progress | None = None,
) -> Extracted:
    """Writes ``tau = theta_ft - theta_0`` of two checkpoints, tensor by tensor, each leaf under its path.

    Args:
      pretrained: theta_0, a folder, a hub id, or a model that is open.
      finetuned: theta_ft; it may hold the subtree only. Where there is no modelling code for the two, tau covers the
        tensors that both have in one shape; one that only theta_0 has, and that is tied to another of them, changes
        with that.
      path: the file to write (.safetensors).
      subtree: the part of the model that tau covers (``vision``), "" for all of it. A tower that was fine-tuned without
        its projection gives a tau that does not cover that.
      allow_config_differences: take the difference although the two configs differ in what the models compute.
      dtype: dtype that tau is stored in; the difference is taken in float32.
      revision: branch, tag or commit of the pre-trained model.
      finetuned_revision: the same of the fine-tuned one.
      progress: called with leaves done, leaves in all, and the path of the last.

    Returns:
      What was written.

    Raises:
      ValueError: models that do not fit each other, naming every leaf, before anything is written; values that are not
        finite, and nothing is left behind.
    """
    with open_checkpoint(pretrained, revision) as base, open_checkpoint(finetuned, finetuned_revision) as tuned:
        covered, left = common_leaves(base, tuned, subtree)
        notes = check_configs(
            (base.name, tuned.name), (base.config, tuned.config), part_of(list(covered)), allow_config_differences
        )
        notes += doubts(base, tuned, [path for path, own in covered.items() if own == path])
        metadata = {
            **base.identity(_UNKNOWN),
            "finetuned_model": tuned.name,
            "finetuned_revision": tuned.revision,
            "finetuned_fingerprint": _UNKNOWN,
        }
        if notes:
            metadata["notes"] = "; ".join(notes)
        headers = {leaf: cast_header(leaf, Tensor("F32", base.shapes[leaf]), dtype) for leaf in covered}
        squares, changed, scratch, stored = 0.0, [], Scratch(), np.dtype(dtype)
        with write_tensors(path, headers, metadata) as writer, SideBySide(base, tuned) as reader, Behind() as behind:
            for leaf, (before, after) in reader.leaves(progress):
                if leaf in headers:
                    if covered[leaf] != leaf:
                        after = tuned.read(covered[leaf], scratch)
                    change = behind.take(before.shape, stored)
                    squares += difference(after, before, change)
                    behind.do(functools.partial(writer.write, leaf, change))
                elif before is not None and after is not None and not np.array_equal(before, after):
                    changed.append(leaf)
            behind.wait()
            base_digest, tuned_digest = reader.fingerprints()
            found = {"base_fingerprint": base_digest, "finetuned_fingerprint": tuned_digest}
            writer.set_metadata(found)
    parameters = sum(math.prod(base.shapes[leaf]) for leaf in covered)
    return Extracted(len(covered), parameters, squares**0.5, metadata | found, tuple(changed), left, notes)


def extract_adapter(
    pretrained: Name,
    adapter: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike = np.float32,
    revision: str | None = None,
    adapter_revision: str | None = None,
    any_base: bool = False,
    progress: Progress | None = None,
) -> Extracted:
    """Writes the task vector of a LoRA adapter of PEFT, the products of its factors, tensor by tensor.

    Args:
      pretrained: the model that it was trained on, a folder or hub id.
      adapter: a folder or hub id, see `tvjax.checkpoints.load_adapter`.
      path: the file to write (.safetensors).
      dtype: dtype that tau is stored in; the products are taken in float32.
      revision: branch, tag or commit of the pre-trained model.
      adapter_revision: the same of the adapter.
      any_base: take it although its config names another base than this.
      progress: called with leaves done, leaves in all, and the path of the last.

    Returns:
      What was written.

    Raises:
      ValueError: an adapter of another kind or another model, before anything is written; values that are not finite,
        and nothing is left behind.
    """
    with (
        open_checkpoint(pretrained, revision) as base,
        open_adapter(adapter, base, adapter_revision, any_base=any_base) as opened,
    ):
        covered = sorted(opened.factors)
        metadata = {
            **base.identity(_UNKNOWN),
            "finetuned_model": opened.name,
            "finetuned_revision": opened.revision,
            "finetuned_fingerprint": opened.fingerprint(),
        }
        if opened.notes:
            metadata |= {"adapter_base_model": opened.trained_on, "notes": "; ".join(opened.notes)}
        headers = {leaf: cast_header(leaf, Tensor("F32", base.shapes[leaf]), dtype) for leaf in covered}
        squares, scratch = 0.0, Scratch()
        with write_tensors(path, headers, metadata) as writer, SideBySide(base) as reader:
            for leaf, (kernel,) in reader.leaves(progress):
                if leaf in headers:
                    with np.errstate(over="ignore"):  # reported where it is written
                        change = product(*opened.read(leaf, kernel), scratch.wide("change", base.shapes[leaf]))
                    squares += float(np.vdot(change, change))
                    writer.write(leaf, cast(change, dtype))
            found = {"base_fingerprint": reader.fingerprints()[0]}
            writer.set_metadata(found)
    parameters = sum(math.prod(base.shapes[leaf]) for leaf in covered)
    return Extracted(len(covered), parameters, squares**0.5, metadata | found, (), {}, opened.notes)


def common_leaves(base: Checkpoint, tuned: Checkpoint, subtree: str) -> tuple[dict[str, str], dict[str, str]]:
    """The paths that the task vector covers, each with its path in the fine-tuned model; and why others are left."""
    sides = []
    for name, side in (("pre-trained", base), ("fine-tuned", tuned)):
        shapes = {path: shape for path, shape in side.shapes.items() if not subtree or path.startswith(f"{subtree}/")}
        if not shapes:
            parts = sorted({path.split("/")[0] for path in side.shapes})
            raise ValueError(f"the {name} model {side.name!r} has no part {subtree!r}, only {', '.join(parts)}")
        sides.append(shapes)
    theta_0, theta_ft = sides
    projection = f"{subtree}/projection/kernel"
    if subtree and projection not in theta_ft:
        theta_0.pop(projection, None)
    covered = {path: path for path, shape in theta_0.items() if theta_ft.get(path) == shape}
    generic = base.family is GENERIC and tuned.family is GENERIC
    if generic:
        lacking = [path for path in theta_0 if path not in theta_ft]
        covered |= {path: owner for path in lacking if (owner := _tied_to(base, path, covered))}
    problems = {path: "only in the pre-trained model" for path in theta_0.keys() - theta_ft.keys() - covered.keys()}
    problems |= {path: "only in the fine-tuned model" for path in theta_ft.keys() - theta_0.keys()}
    problems |= {
        path: f"pre-trained {shape}, fine-tuned {theta_ft[path]}"
        for path, shape in theta_0.items()
        if theta_ft.get(path, shape) != shape
    }
    if problems and not (generic and covered):
        listed = sorted(f"{path}: {problem}" for path, problem in problems.items())
        raise ValueError(
            f"a task vector is the difference of two checkpoints of one model, {len(problems)} leaves differ:\n"
            f"{tree.list_some(listed)}\nwas {tuned.name!r} fine-tuned from {base.name!r}? Where only a part "
            "fits, name it (--part, subtree=...)"
        )
    left = {**tuned.others, **base.others, **problems}
    return dict(sorted(covered.items())), dict(sorted(left.items()))


def _tied_to(base: Checkpoint, path: str, others: Mapping[str, str]) -> str:
    """The matrix among others that a matrix is a copy of, "" for none: one of two tied ones, which files may lack."""
    tensors, sources = base.tensors, base.sources
    key = sources[path].key
    header = tensors.headers[key]
    same = [other for other in others if tensors.headers[sources[other].key] == header]
    if len(header.shape) < 2 or not same:
        return ""
    array = tensors.map(key)
    if (array == array[:1]).all():  # as both may have been initialised
        return ""
    return next((other for other in same if np.array_equal(tensors.map(sources[other].key), array)), "")


def part_of(covered: Sequence[str]) -> str:
    """The tower that all paths are of, "" where there are several."""
    parts = {path.partition("/")[0] for path in covered}
    return parts.pop() if len(parts) == 1 else ""
