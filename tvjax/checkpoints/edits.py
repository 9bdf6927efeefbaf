"""Task vectors added to a checkpoint on disk, tensor by tensor."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.typing import DTypeLike

from tvjax import tree
from tvjax.checkpoints import elementwise
from tvjax.checkpoints.atomic import becomes
from tvjax.checkpoints.behind import Behind
from tvjax.checkpoints.fingerprints import Fingerprint
from tvjax.checkpoints.folder import Checkpoint, Name, open_checkpoint
from tvjax.checkpoints.huggingface import write_checkpoint
from tvjax.checkpoints.memory import Scratch
from tvjax.checkpoints.model_card import model_card
from tvjax.checkpoints.provenance import check_made_for, check_same_base, check_same_config
from tvjax.checkpoints.reader import check_finite, open_tensors
from tvjax.checkpoints.side_by_side import Progress, SideBySide
from tvjax.checkpoints.tensor_dtypes import cast, tensor_header
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


class Origin(NamedTuple):
    """Where task vectors come from, and what their files say of the model that they were made for.

    Attributes:
      names: of their files.
      metadata: of each file.
      any_base: whether they are taken for another model too.
    """

    names: Sequence[str]
    metadata: Sequence[Mapping[str, str]]
    any_base: bool = False

    def check(self, base: Checkpoint, taus: Sequence[PyTree]) -> None:
        """Raises a ValueError unless the task vectors fit a model, as far as shapes and configs tell."""
        check_fit(base, taus, self.names)
        made_for = check_same_base(self.names, self.metadata, self.any_base)
        check_same_config(made_for, base, self.names, self.any_base)

    def check_weights(self, base: Checkpoint, fingerprint: str) -> None:
        """Raises a ValueError where they were made for other weights than those of a model."""
        made_for = check_same_base(self.names, self.metadata, self.any_base)
        check_made_for(made_for, base.name, fingerprint, self.names, self.any_base)


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
        opened = [stack.enter_context(open_tensors(name)) for name in names]
        taus = [{path: tensors.on_disk(path) for path in tensors.headers} for tensors in opened]
        origin = Origin(names, [tensors.metadata for tensors in opened], any_base)
        base = stack.enter_context(open_checkpoint(model, revision))
        origin.check(base, taus)
        action = f"{len(names)} task vector{'s' if len(names) > 1 else ''} added to the weights of the base model."
        settings = {"any_base": any_base, "dtype": None if dtype is None else np.dtype(dtype).name}
        return apply_trees(
            base,
            taus,
            folder,
            origin,
            scale=scale,
            action=action,
            settings=settings,
            dtype=dtype,
            max_shard_size=max_shard_size,
            progress=progress,
        )


def apply_trees(
    base: Checkpoint,
    taus: Sequence[PyTree],
    folder: str | os.PathLike[str],
    origin: Origin,
    *,
    scale: float = 1.0,
    action: str,
    settings: Mapping[str, Any],
    dtype: DTypeLike | None = None,
    max_shard_size: int | str | None = None,
    progress: Progress | None = None,
) -> Applied:
    """Writes a model plus task vectors that are in memory, or mapped into it; see `apply`.

    Args:
      base: theta_0.
      taus: nested dicts of arrays, which fit (`Origin.check`).
      folder: where to; a new folder, which appears when it is complete.
      origin: the files that the task vectors come from.
      scale: factor of the task vectors.
      action: what the model card says was done.
      settings: of the model card, beside the scale.
      dtype: dtype of all parameters; None keeps that of each.
      max_shard_size: of one file, in bytes or like ``5GB``; None keeps the files of the model.
      progress: called with leaves done, leaves in all, and the path of the last.

    Raises:
      ValueError: as `apply`.
    """
    changes = _Changes(taus)
    changed = [path for path in sorted(base.shapes) if path in changes.shapes]
    written = Fingerprint()
    count = sum(math.prod(shape) for shape in base.shapes.values())
    with SideBySide(base, changes, hashed=[base]) as reader:

        def card() -> str:
            about = base.identity(reader.fingerprints()[0])
            results = {"fingerprint": written.hexdigest(), "parameters": count}
            results |= {"leaves changed": len(changed), "leaves copied": len(base.shapes) - len(changed)}
            inputs = dict(zip(origin.names, origin.metadata, strict=True))
            chosen = {"scale": scale, **settings}
            return model_card(becomes(folder).name, action, about, inputs=inputs, settings=chosen, results=results)

        options: dict[str, Any] = {"dtype": dtype, "max_shard_size": max_shard_size, "card": card}
        with write_checkpoint(base, folder, **options) as write, Behind() as behind:
            for leaf, (theta, change) in reader.leaves(progress):
                stored = theta.dtype if dtype is None else np.dtype(dtype)
                if change is None:
                    edited = cast(theta, stored)
                else:
                    edited = behind.take(theta.shape, stored)
                    elementwise.edited(theta, change, scale, edited)
                behind.do(functools.partial(written.add, leaf, edited), functools.partial(write, leaf, edited))
                if change is None:  # what was read is valid until the next
                    behind.wait()
            behind.wait()
            origin.check_weights(base, reader.fingerprints()[0])
    covered = set(changed)
    copied = tuple(leaf for leaf in sorted(base.shapes) if leaf not in covered)
    return Applied(tuple(changed), copied, count, written.hexdigest(), base.others)


class _Changes:
    """The sum of task vectors, a leaf of which is read, checked and summed when it is asked for."""

    def __init__(self, taus: Sequence[PyTree]):
        self._leaves: dict[str, list[Any]] = {}
        for tau in taus:
            for path, leaf in tree.flatten(tau).items():
                self._leaves.setdefault(path, []).append(leaf)
        self.shapes = {path: tuple(np.shape(parts[0])) for path, parts in self._leaves.items()}

    def leaf_bytes(self, path: str) -> int:
        """The size of a leaf, of one task vector or summed."""
        parts = self._leaves[path]
        return math.prod(self.shapes[path]) * (np.dtype(parts[0].dtype).itemsize if len(parts) == 1 else 4)

    def read(self, path: str, scratch: Scratch) -> np.ndarray:
        """The sum of a leaf: of several in float32, one of them in memory at a time.

        Raises:
          ValueError: values that are not finite; the message names the leaf.
        """
        first, *others = self._leaves[path]
        if not others:
            return _checked(path, first)
        total = scratch.wide("total", self.shapes[path])
        np.copyto(total, _checked(path, first), casting="same_kind")
        for part in others:
            np.add(total, _checked(path, part), out=total, casting="same_kind")
        return total


def _checked(path: str, part: Any) -> np.ndarray:
    change = np.asarray(part)
    check_finite(path, change)
    return change


def check_fit(base: Checkpoint, taus: Sequence[PyTree], names: Sequence[str]) -> None:
    """Raises a ValueError where a task vector has leaves that a model does not have, or of other shapes."""
    problems = []
    for name, tau in zip(names, taus, strict=True):
        leaves = tree.flatten(tau)
        if not leaves:
            problems.append(f"{name}: holds no leaves")
        for path, leaf in leaves.items():
            header = tensor_header(path, leaf)
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
