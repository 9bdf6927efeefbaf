"""The best low-rank adapter of a fine-tuning, from two checkpoints on disk, one leaf in memory at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from tvjax import tree
from tvjax.checkpoints.adapter_writer import linear_kernels, save_adapter
from tvjax.checkpoints.atomic import becomes
from tvjax.checkpoints.extraction import common_leaves, part_of
from tvjax.checkpoints.folder import Checkpoint, Name, open_checkpoint
from tvjax.checkpoints.huggingface import check_new
from tvjax.checkpoints.memory import Scratch
from tvjax.checkpoints.model_card import model_card
from tvjax.checkpoints.provenance import check_configs, doubts
from tvjax.checkpoints.side_by_side import Progress, SideBySide
from tvjax.factors import LowRank
from tvjax.models.families import GENERIC
from tvjax.truncate import Truncated, check_size, not_smaller, truncate


class ExtractedAdapter(NamedTuple):
    """What `extract_low_rank` wrote.

    Attributes:
      leaves: number of kernels that the adapter changes.
      parameters: entries of their factors.
      norm: of the adapter's change.
      error: ``||tau - tau_r|| / ||tau||``, leaves that are left out included.
      truncated: what became of each leaf that fine-tuning changed.
      metadata: of the file.
      changed_outside: leaves outside the subtree that fine-tuning changed too.
      left: why tensors take no part, by path.
      notes: what the user should know.
    """

    leaves: int
    parameters: int
    norm: float
    error: float
    truncated: tuple[dict[str, Any], ...]
    metadata: dict[str, str]
    changed_outside: tuple[str, ...]
    left: Mapping[str, str]
    notes: tuple[str, ...] = ()


def extract_low_rank(
    pretrained: Name,
    finetuned: Name,
    folder: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    key: jax.Array | None = None,
    subtree: str = "",
    allow_config_differences: bool = False,
    dtype: DTypeLike = np.float32,
    progress: Progress | None = None,
) -> ExtractedAdapter:
    """Writes the best adapter of ``theta_ft - theta_0`` as a PEFT folder: a truncated SVD of each linear layer.

    Args:
      pretrained: theta_0, a folder, a hub id, or a model that is open.
      finetuned: theta_ft.
      folder: where to; a new folder, which appears when it is complete.
      rank: of each kernel, at most.
      energy: the least rank that holds this share of a kernel's squared norm, with `rank` too at most that; see
        `tvjax.low_rank`.
      key: for large matrices, which are then decomposed by randomised SVD.
      subtree: the part of the model, "" for all of it.
      allow_config_differences: take the difference although the two configs differ in what the models compute.
      dtype: of the factors in the file.
      progress: called with leaves done, leaves in all, and the path of the last.

    Returns:
      What was written, with the error of each leaf. Leaves that are no linear layers (biases, norms, embeddings,
      convolutions) are left out, and reported with their share of the norm.

    Raises:
      ValueError: models that do not fit each other, a rank or energy that is none, or no linear layer that fine-tuning
        changed; nothing is left behind.
    """
    check_size(rank, energy)
    check_new(folder)
    with open_checkpoint(pretrained) as base, open_checkpoint(finetuned) as tuned:
        covered, left = common_leaves(base, tuned, subtree)
        configs = (base.config, tuned.config)
        notes = check_configs((base.name, tuned.name), configs, part_of(list(covered)), allow_config_differences)
        notes += doubts(base, tuned, [path for path, own in covered.items() if own == path])
        kept, rows, changed, digests = _truncated(base, tuned, covered, (rank, energy), key, progress)
        if not kept:
            raise ValueError(
                f"fine-tuning changed no linear layer of {base.name!r} that the adapter could hold: extract a task "
                "vector instead (leave --rank and --energy out)"
            )
        whole = math.fsum(square for _, square in rows)
        error = math.sqrt(math.fsum(row.error**2 * square for row, square in rows) / whole)
        truncated = tuple(row._replace(share=square / whole) for row, square in rows)
        metadata = {
            **base.identity(digests[0]),
            "finetuned_model": tuned.name,
            "finetuned_revision": tuned.revision,
            "finetuned_fingerprint": digests[1],
        }
        asked = {"rank": rank, "energy": energy}
        card = model_card(
            becomes(folder).name,
            "A LoRA adapter: the truncated singular value decomposition of what a fine-tuning changed.",
            metadata,
            inputs={tuned.name: {"fingerprint": digests[1]}},
            settings={name: value for name, value in asked.items() if value is not None},
            results={"relative error": error, "linear layers": len(kept)},
            library="peft",
        )
        save_adapter(tree.nest(kept), folder, base, metadata=metadata, dtype=dtype, card=card)
        if base.family is GENERIC:
            notes = (*notes, "the weights of the base are taken for [out, in], as torch has them")
    parameters = sum(leaf.left.size + leaf.right.size for leaf in kept.values())
    norm = float(tree.norm(tree.nest(kept)))
    told = (*notes, *_told(truncated, error), *not_smaller(truncated))
    by_leaf = tuple(row._asdict() for row in truncated)
    return ExtractedAdapter(len(kept), parameters, norm, error, by_leaf, metadata, tuple(changed), left, told)


def _truncated(
    base: Checkpoint,
    tuned: Checkpoint,
    covered: Mapping[str, str],
    size: tuple[int | None, float | None],
    key: jax.Array | None,
    progress: Progress | None,
) -> tuple[dict[str, LowRank], list[tuple[Truncated, float]], list[str], list[str]]:
    """The truncated leaves; each changed one with its squared norm; changes elsewhere; both fingerprints."""
    linear = linear_kernels(base)
    kept: dict[str, LowRank] = {}
    rows: list[tuple[Truncated, float]] = []
    changed = []
    with SideBySide(base, tuned) as reader:
        for path, (before, after) in reader.leaves(progress):
            if path not in covered:
                if before is not None and after is not None and not np.array_equal(before, after):
                    changed.append(path)
                continue
            after = tuned.read(covered[path], Scratch()) if covered[path] != path else after
            change = np.subtract(after, before, dtype=np.float32, casting="same_kind")
            square, error = float(np.vdot(change, change)), 1.0
            if not square:
                continue
            if path in linear:
                own = None if key is None else jax.random.fold_in(key, len(rows))
                kept[path], error = truncate(change, *size, key=own)
            rule, rank = ("truncated", kept[path].rank) if path in kept else ("left out", 0)
            rows.append((Truncated(path, change.shape, rule, rank, error, square), square))
    return kept, rows, changed, reader.fingerprints()


def _told(rows: tuple[Truncated, ...], error: float) -> list[str]:
    """How much of the task vector is in the adapter, and what is left out."""
    said = [f"the adapter holds {1 - error**2:.2%} of the task vector's squared norm"]
    out = [row for row in rows if row.rule == "left out"]
    if out:
        share = math.fsum(row.share for row in out)
        said.append(
            f"{len(out)} leaves that are no linear layers ({out[0].path}, ...) are left out, {share:.2%} of the "
            "squared norm"
        )
    return said
