"""Task vectors added to a checkpoint on disk, tensor by tensor."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from jax.typing import DTypeLike

from tvjax import tree
from tvjax.checkpoints.cards import model_card
from tvjax.checkpoints.folder import Checkpoint, Name, open_checkpoint
from tvjax.checkpoints.huggingface import write_checkpoint
from tvjax.checkpoints.memory import Scratch
from tvjax.checkpoints.provenance import check_made_for, check_same_base, check_same_config
from tvjax.checkpoints.safetensors import (
    Fingerprint,
    cast,
    open_tensors,
    tensor_header,
)
from tvjax.checkpoints.side_by_side import Progress, SideBySide
from tvjax.models.key_table import Tensor
from tvjax.stages import PyTree


class Applied(NamedTuple):
    """What `apply` wrote.

    Attributes:
      changed: leaves that the task vectors cover.
      copied: leaves that they do not cover, equal in every bit.
      parameters: number of entries of all leaves.
      fingerprint: of the edited model.
      left: why tensors are copied that are no leaves, by key.
    """

    changed: tuple[str, ...]
    copied: tuple[str, ...]
    parameters: int
    fingerprint: str
    left: Mapping[str, str]


class MadeFor(NamedTuple):
    """What the files of task vectors say of their model.

    Attributes:
      names: of the files.
      base: the identity of the model; empty where none says it.
      any_base: whether they may be added to another one.
    """

    names: Sequence[str]
    base: Mapping[str, str]
    any_base: bool = False


class _TaskVector(Protocol):
    """A task vector, in a file or in memory."""

    headers: dict[str, Tensor]

    def read(self, key: str, out: np.ndarray | None = None) -> np.ndarray:
        """One leaf."""


class _InMemory:
    """A tree of arrays as a task vector."""

    def __init__(self, tau: PyTree):
        self._leaves = tree.flatten(tau)
        self.headers = {path: tensor_header(path, leaf) for path, leaf in self._leaves.items()}

    def read(self, key: str, out: np.ndarray | None = None) -> np.ndarray:
        """One leaf."""
        return np.asarray(self._leaves[key])


def apply(
    model: Name,
    task_vectors: Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    *,
    scale: float = 1.0,
    any_base: bool = False,
    dtype: DTypeLike | None = None,
    max_shard_size: int | str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Applied:
    """Writes ``theta_0 + scale * sum_i tau_i`` as a Hugging Face folder, tensor by tensor.

    The sum is taken in float32 and rounded once, to the dtype of each tensor of the model. What no task vector covers
    is copied as it is. The folder has the keys, and unless told otherwise the shards, of the model's.

    Args:
      model: theta_0, a folder, a hub id, or a model that is open.
      task_vectors: files of `extract` or `save_tree`, one at least.
      folder: where to; a new folder, which appears when it is complete.
      scale: factor of the task vectors; -1 negates.
      any_base: take task vectors although they were made for other weights.
      dtype: dtype of all parameters; None keeps that of each.
      max_shard_size: of one file, in bytes or like ``5GB``; None keeps the files of the model.
      revision: branch, tag or commit of the model.
      progress: called with leaves done, leaves in all, and the path of the last.

    Returns:
      What was written.

    Raises:
      ValueError: task vectors that do not fit the model, naming every leaf, before anything is written; that were made
        for other weights, or give values that are not finite: then nothing is left behind.
    """
    if not task_vectors:
        raise ValueError("apply needs at least one task vector")
    names = [os.fspath(file) for file in task_vectors]
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(open_checkpoint(model, revision))
        taus = [stack.enter_context(open_tensors(name)) for name in names]
        metadata = [tau.metadata for tau in taus]
        made_for = _check_base(base, taus, names, metadata, any_base)

        def card(about: Mapping[str, str], results: Mapping[str, Any]) -> str:
            return model_card(
                Path(folder).name,
                f"{len(names)} task vector{'s' if len(names) > 1 else ''} added to the weights of the base model.",
                about,
                inputs=dict(zip(names, metadata, strict=True)),
                settings={"scale": scale, "any_base": any_base, "dtype": _name_of(dtype)},
                results=results,
            )

        return _write_edited(base, taus, folder, scale, made_for, card, dtype, max_shard_size, progress)


def apply_tree(
    model: Name,
    tau: PyTree,
    folder: str | os.PathLike[str],
    made_for: MadeFor,
    *,
    card: Callable[[Mapping[str, str], Mapping[str, Any]], str],
    scale: float = 1.0,
    progress: Progress | None = None,
) -> Applied:
    """Writes a model plus a task vector that is in memory, tensor by tensor; see `apply`.

    Args:
      model: theta_0, a folder, a hub id, or a model that is open.
      tau: the task vector.
      folder: where to; a new folder, which appears when it is complete.
      made_for: of `check_base`.
      card: gives the content of ``README.md``, of the base's identity and of what came out.
      scale: factor of the task vector.
      progress: called with leaves done, leaves in all, and the path of the last.

    Raises:
      ValueError: weights other than those that tau was made for, or values that are not finite: nothing is left behind.
    """
    with open_checkpoint(model) as base:
        return _write_edited(base, [_InMemory(tau)], folder, scale, made_for, card, None, None, progress)


def check_base(
    base: Checkpoint,
    taus: Sequence[PyTree],
    names: Sequence[str],
    metadata: Sequence[Mapping[str, str]],
    any_base: bool = False,
) -> MadeFor:
    """Checks that task vectors belong to a model, as far as headers and configs tell; no weight is read.

    Args:
      base: the model.
      taus: nested dicts of arrays.
      names: of their files.
      metadata: of each.
      any_base: whether they may have been made for another model.

    Returns:
      What is still to be compared with the weights.

    Raises:
      ValueError: leaves that do not fit, naming each; or that were made for another model.
    """
    return _check_base(base, [_InMemory(tau) for tau in taus], names, metadata, any_base)


def _check_base(
    base: Checkpoint,
    taus: Sequence[_TaskVector],
    names: Sequence[str],
    metadata: Sequence[Mapping[str, str]],
    any_base: bool,
) -> MadeFor:
    _check_fit(base, taus, names)
    made_for = check_same_base(names, metadata, any_base)
    check_same_config(made_for, base, names, any_base)
    return MadeFor(names, made_for, any_base)


def _write_edited(
    base: Checkpoint,
    taus: Sequence[_TaskVector],
    folder: str | os.PathLike[str],
    scale: float,
    made_for: MadeFor,
    card: Callable[[Mapping[str, str], Mapping[str, Any]], str],
    dtype: DTypeLike | None,
    max_shard_size: int | str | None,
    progress: Progress | None,
) -> Applied:
    """The model and the sum of task vectors, leaf by leaf."""
    written, scratch = Fingerprint(), Scratch()
    changed: list[str] = []
    count = sum(math.prod(shape) for shape in base.shapes.values())
    with SideBySide(base) as reader:

        def final_card() -> str:
            about = {
                "base_model": base.name,
                "base_revision": base.revision,
                "base_fingerprint": reader.fingerprints()[0],
            }
            results = {
                "fingerprint": written.hexdigest(),
                "parameters": count,
                "leaves changed": len(changed),
                "leaves copied": len(base.shapes) - len(changed),
            }
            return card(about, results)

        writing = write_checkpoint(base, folder, dtype=dtype, max_shard_size=max_shard_size, card=final_card)
        with writing as write:
            for leaf, (theta,) in reader.leaves(progress):
                parts = [tau for tau in taus if leaf in tau.headers]
                if parts:
                    changed.append(leaf)
                whole = _edit(theta, parts, leaf, scale, scratch) if parts else theta
                edited = cast(whole, theta.dtype if dtype is None else dtype)
                hashed = reader.submit(written.add, leaf, edited)
                write(leaf, edited)
                hashed.result()
            (digest,) = reader.fingerprints()
            check_made_for(made_for.base, base.name, digest, made_for.names, made_for.any_base)
    covered = set(changed)
    copied = tuple(leaf for leaf in sorted(base.shapes) if leaf not in covered)
    return Applied(tuple(changed), copied, count, written.hexdigest(), base.others)


def _name_of(dtype: DTypeLike | None) -> str | None:
    return None if dtype is None else np.dtype(dtype).name


def _edit(theta: np.ndarray, parts: Sequence[_TaskVector], leaf: str, scale: float, scratch: Scratch) -> np.ndarray:
    """``theta + scale * sum(parts)`` in float32."""
    total = scratch.wide("total", theta.shape)
    for number, tau in enumerate(parts):
        change = tau.read(leaf, scratch.take("tau", total.size * 8))
        if number:
            np.add(total, change, out=total, casting="same_kind")
        else:
            np.copyto(total, change, casting="same_kind")
    with np.errstate(over="ignore"):  # reported where it is written
        np.multiply(total, np.float32(scale), out=total)
        return np.add(theta, total, out=total, casting="same_kind")


def _check_fit(base: Checkpoint, taus: Sequence[_TaskVector], names: Sequence[str]) -> None:
    problems = []
    for name, tau in zip(names, taus, strict=True):
        if not tau.headers:
            problems.append(f"{name}: holds no leaves")
        for path, header in tau.headers.items():
            if path not in base.shapes:
                problems.append(f"{path} of {name}: not in the model")
            elif header.shape != base.shapes[path]:
                problems.append(f"{path} of {name}: model {base.shapes[path]}, task vector {header.shape}")
            elif header.dtype not in ("F64", "F32", "F16", "BF16"):
                problems.append(f"{path} of {name}: is {header.dtype}, expected floating values")
    if problems:
        raise ValueError(
            f"the task vectors do not fit {base.name!r} at {len(problems)} leaves:\n{tree.list_some(problems)}\nof "
            "another model? Move there first (tvjax transport)"
        )
