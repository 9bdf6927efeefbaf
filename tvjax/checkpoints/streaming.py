"""Task vectors of checkpoints on disk, extracted and applied tensor by tensor.

What is in memory at once is a few tensors, whatever the size of the model. Both directions compute on the host, in
float32, and hash the models as they read them: a task vector's file names the weights that it was made for and made
from, and what was made for other weights never becomes a model.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.typing import DTypeLike

from tvjax import tree
from tvjax.checkpoints.adapters import open_adapter, product
from tvjax.checkpoints.cards import model_card
from tvjax.checkpoints.huggingface import Checkpoint, open_checkpoint, write_checkpoint
from tvjax.checkpoints.memory import Scratch
from tvjax.checkpoints.provenance import check_configs, check_made_for, check_same_base, check_same_config
from tvjax.checkpoints.safetensors import Fingerprint, Tensors, cast, cast_header, open_tensors, write_tensors
from tvjax.models.differences import function_values, to_text
from tvjax.models.key_table import Tensor

Progress = Callable[[int, int, str], None]
_UNKNOWN = "0" * 64  # stands where a fingerprint will


class Extracted(NamedTuple):
    """What `extract` wrote.

    Attributes:
      leaves: number of leaves.
      parameters: number of their entries.
      norm: Euclidean norm of all of them together.
      metadata: of the file.
      changed_outside: leaves outside the subtree that fine-tuning changed too, which take no part.
      notes: what could not be told of the models, and what was allowed.
    """

    leaves: int
    parameters: int
    norm: float
    metadata: dict[str, str]
    changed_outside: tuple[str, ...]
    notes: tuple[str, ...] = ()


class Applied(NamedTuple):
    """What `apply` wrote.

    Attributes:
      changed: leaves that the task vectors cover.
      copied: leaves that they do not cover, equal in every bit.
      parameters: number of entries of all leaves.
      fingerprint: of the edited model.
    """

    changed: tuple[str, ...]
    copied: tuple[str, ...]
    parameters: int
    fingerprint: str


def extract(
    pretrained: str | os.PathLike[str],
    finetuned: str | os.PathLike[str],
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
      pretrained: theta_0, a folder or hub id.
      finetuned: theta_ft; it may hold the subtree only.
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
        covered = _common_leaves(base, tuned, subtree)
        notes = check_configs(
            (base.name, tuned.name), (base.config, tuned.config), _part(covered), allow_config_differences
        )
        metadata = {
            "base_model": base.name,
            "base_revision": base.revision,
            "base_config": to_text(function_values(base.config)),
            "base_fingerprint": _UNKNOWN,
            "finetuned_model": tuned.name,
            "finetuned_revision": tuned.revision,
            "finetuned_fingerprint": _UNKNOWN,
        }
        if notes:
            metadata["notes"] = "; ".join(notes)
        headers = {leaf: cast_header(leaf, Tensor("F32", base.shapes[leaf]), dtype) for leaf in covered}
        squares, changed, scratch = 0.0, [], Scratch()
        with write_tensors(path, headers, metadata) as writer, _Reader(base, tuned) as reader:
            for leaf, (before, after) in reader.leaves(progress):
                if leaf in headers:
                    change = _wide_memory(scratch, "change", before.shape)
                    np.subtract(after, before, out=change, dtype=np.float32, casting="same_kind")
                    squares += float(np.vdot(change, change))
                    writer.write(leaf, cast(change, dtype))
                elif before is not None and after is not None and not np.array_equal(before, after):
                    changed.append(leaf)
            base_digest, tuned_digest = reader.fingerprints()
            found = {"base_fingerprint": base_digest, "finetuned_fingerprint": tuned_digest}
            writer.set_metadata(found)
    parameters = sum(math.prod(base.shapes[leaf]) for leaf in covered)
    return Extracted(len(covered), parameters, squares**0.5, metadata | found, tuple(changed), notes)


def extract_adapter(
    pretrained: str | os.PathLike[str],
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
            "base_model": base.name,
            "base_revision": base.revision,
            "base_config": to_text(function_values(base.config)),
            "base_fingerprint": _UNKNOWN,
            "finetuned_model": opened.name,
            "finetuned_revision": opened.revision,
            "finetuned_fingerprint": opened.fingerprint(),
        }
        if opened.notes:
            metadata |= {"adapter_base_model": opened.trained_on, "notes": "; ".join(opened.notes)}
        headers = {leaf: cast_header(leaf, Tensor("F32", base.shapes[leaf]), dtype) for leaf in covered}
        squares, scratch = 0.0, Scratch()
        with write_tensors(path, headers, metadata) as writer, _Reader(base) as reader:
            for leaf, (kernel,) in reader.leaves(progress):
                if leaf in headers:
                    with np.errstate(over="ignore"):  # reported where it is written
                        change = product(*opened.read(leaf, kernel), _wide_memory(scratch, "change", base.shapes[leaf]))
                    squares += float(np.vdot(change, change))
                    writer.write(leaf, cast(change, dtype))
            found = {"base_fingerprint": reader.fingerprints()[0]}
            writer.set_metadata(found)
    parameters = sum(math.prod(base.shapes[leaf]) for leaf in covered)
    return Extracted(len(covered), parameters, squares**0.5, metadata | found, (), opened.notes)


def apply(
    model: str | os.PathLike[str],
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
      model: theta_0, a folder or hub id.
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
        _check_fit(base, dict(zip(names, taus, strict=True)))
        made_for = check_same_base(names, [tau.metadata for tau in taus], any_base)
        check_same_config(made_for, base, names, any_base)
        written = Fingerprint()
        scratch = Scratch()
        changed: list[str] = []
        reader = stack.enter_context(_Reader(base))

        def card() -> str:
            settings = {"scale": scale, "any_base": any_base, "dtype": None if dtype is None else np.dtype(dtype).name}
            about = {
                "base_model": base.name,
                "base_revision": base.revision,
                "base_fingerprint": reader.fingerprints()[0],
            }
            return model_card(
                Path(folder).name,
                f"{len(names)} task vector{'s' if len(names) > 1 else ''} added to the weights of the base model.",
                about,
                inputs={name: tau.metadata for name, tau in zip(names, taus, strict=True)},
                settings=settings,
                results={
                    "fingerprint": written.hexdigest(),
                    "parameters": count,
                    "leaves changed": len(changed),
                    "leaves copied": len(base.shapes) - len(changed),
                },
            )

        count = sum(math.prod(shape) for shape in base.shapes.values())
        writing = write_checkpoint(base, folder, dtype=dtype, max_shard_size=max_shard_size, card=card)
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
            check_made_for(made_for, base.name, digest, names, any_base)
    covered = set(changed)
    copied = tuple(leaf for leaf in sorted(base.shapes) if leaf not in covered)
    return Applied(tuple(changed), copied, count, written.hexdigest())


class _Reader:
    """Walks checkpoints side by side in the order of their paths, which is that of fingerprints.

    While one leaf is computed with, the next is read: each side has two sets of memory, and a thread that reads,
    transposes and hashes.
    """

    def __init__(self, *sides: Checkpoint):
        self._sides = sides
        self._digests = [Fingerprint() for _ in sides]
        self._memory = [(Scratch(), Scratch()) for _ in sides]
        self._pools = [ThreadPoolExecutor(1) for _ in sides]
        self._other = ThreadPoolExecutor(1)

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *error: Any) -> None:
        for pool in (*self._pools, self._other):
            pool.shutdown(cancel_futures=True)

    def leaves(self, progress: Progress | None) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """Each path with the leaf of each side, None where a side lacks it; valid until the next."""
        paths = sorted({path for side in self._sides for path in side.shapes})
        ahead = [self._start(paths[0], 0)]
        for number, path in enumerate(paths):
            arrays = tuple(None if future is None else future.result() for future in ahead.pop())
            if number + 1 < len(paths):
                ahead.append(self._start(paths[number + 1], number + 1))
            yield path, arrays
            if progress is not None:
                progress(number + 1, len(paths), path)

    def submit(self, function: Callable[..., None], *arguments: Any) -> Future[None]:
        """Runs a function beside everything else."""
        return self._other.submit(function, *arguments)

    def fingerprints(self) -> list[str]:
        """Of the sides, at the end of the walk."""
        return [digest.hexdigest() for digest in self._digests]

    def _start(self, path: str, number: int) -> list[Future[np.ndarray] | None]:
        return [
            self._pools[index].submit(self._read, index, path, number % 2) if path in side.shapes else None
            for index, side in enumerate(self._sides)
        ]

    def _read(self, index: int, path: str, turn: int) -> np.ndarray:
        array = self._sides[index].read(path, self._memory[index][turn])
        self._digests[index].add(path, array)
        return array


def _edit(theta: np.ndarray, parts: Sequence[Tensors], leaf: str, scale: float, scratch: Scratch) -> np.ndarray:
    """``theta + scale * sum(parts)`` in float32."""
    total = _wide_memory(scratch, "total", theta.shape)
    for number, tau in enumerate(parts):
        change = tau.read(leaf, scratch.take("tau", total.size * 8))
        if number:
            np.add(total, change, out=total, casting="same_kind")
        else:
            np.copyto(total, change, casting="same_kind")
    with np.errstate(over="ignore"):  # reported where it is written
        np.multiply(total, np.float32(scale), out=total)
        return np.add(theta, total, out=total, casting="same_kind")


def _wide_memory(scratch: Scratch, name: str, shape: tuple[int, ...]) -> np.ndarray:
    size = math.prod(shape)
    return scratch.take(name, 4 * size).view(np.float32).reshape(shape)


def _common_leaves(base: Checkpoint, tuned: Checkpoint, subtree: str) -> list[str]:
    """The paths that the task vector covers."""
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
    problems = [f"{path}: only in the pre-trained model" for path in theta_0.keys() - theta_ft.keys()]
    problems += [f"{path}: only in the fine-tuned model" for path in theta_ft.keys() - theta_0.keys()]
    problems += [
        f"{path}: pre-trained {shape}, fine-tuned {theta_ft[path]}"
        for path, shape in theta_0.items()
        if theta_ft.get(path, shape) != shape
    ]
    if problems:
        raise ValueError(
            f"a task vector is the difference of two checkpoints of one model, {len(problems)} leaves differ:\n"
            f"{tree.list_some(sorted(problems))}\nwas {tuned.name!r} fine-tuned from {base.name!r}? Where only a part "
            "fits, name it (subtree)"
        )
    return sorted(theta_0)


def _part(covered: Sequence[str]) -> str:
    """The tower that all paths are of, "" where there are several."""
    parts = {path.partition("/")[0] for path in covered}
    return parts.pop() if len(parts) == 1 else ""


def _check_fit(base: Checkpoint, taus: Mapping[str, Tensors]) -> None:
    problems = []
    for name, tau in taus.items():
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
