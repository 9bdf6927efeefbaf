"""Several task vectors of one model in one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tvjax import arithmetic, tree
from tvjax import merge as methods
from tvjax.checkpoints import map_tree, save_tree, streaming
from tvjax.checkpoints.folder import open_checkpoint
from tvjax.checkpoints.huggingface import check_new
from tvjax.checkpoints.json_files import write_json
from tvjax.checkpoints.provenance import check_same_base
from tvjax.jobs import inputs
from tvjax.jobs.configs import MergeConfig
from tvjax.jobs.merges import find_merge
from tvjax.jobs.recipes import recipe_of, write_recipe
from tvjax.jobs.schema import Progress
from tvjax.merge import MergedLeaf
from tvjax.stages import PyTree


class Merged(NamedTuple):
    """What `merge` wrote.

    Attributes:
      output: the task vector, or the folder of the model.
      method: the merge.
      scale: factor of the merged task vector.
      task_vectors: their files.
      base_model: the model that they say they were made for.
      norm: of the merged task vector, not scaled.
      leaf_report: the file of the report by leaf.
      left: why tensors of the model take no part, by key.
      notes: what the user should know.
    """

    output: Path
    method: str
    scale: float
    task_vectors: tuple[str, ...]
    base_model: str | None
    norm: float
    leaf_report: Path
    left: Mapping[str, str]
    notes: tuple[str, ...]


def merge(config: MergeConfig, progress: Progress | None = None) -> Merged:
    """Merges task vectors of one model into one, and writes it or the model with it.

    A leaf that only some of them cover, as with adapters of different target modules, counts as zero in the others.

    Args:
      config: the task vectors, the method and the output.
      progress: called after every leaf.

    Raises:
      ValueError: what cannot be, before anything is written.
    """
    function = find_merge(config.method, config.options, config.seed)
    _check_output(config)
    files = [str(file) for file in config.task_vectors]
    loaded, made = zip(*map(map_tree, config.task_vectors), strict=True)
    metadata = check_same_base(files, made, config.any_base)
    origin = streaming.Origin(files, made, config.any_base)
    left: Mapping[str, str] = {}
    with contextlib.ExitStack() as stack:
        base = None
        if config.model is not None and config.output.suffix != ".safetensors":
            base = stack.enter_context(open_checkpoint(config.model))
            origin.check(base, loaded)
        taus, partly = methods.cover(loaded)
        tau, rows = _merged(function, taus, partly, progress)
        if base is None:
            save_tree(config.output, arithmetic.scale(tau, config.scale), metadata, config.dtype)
        else:
            action = (
                f"{len(made)} task vectors, merged by {config.method}, were added to the weights of the base model."
            )
            settings = {"method": config.method, **config.options}
            left = streaming.apply_trees(
                base, [tau], config.output, origin, scale=config.scale, action=action, settings=settings
            ).left
    about = {"method": config.method, "scale": config.scale, "task_vectors": files}
    report = report_name(config.output)
    write_json(report, {**about, "leaves": [row._asdict() for row in rows]}, sort_keys=False)
    write_recipe(recipe_of(config), config.output)
    notes = inputs.left(left)
    if partly:
        notes.append(
            f"{len(partly)} leaves ({next(iter(partly))}, ...) are not covered by every task vector, and count as "
            f"zero in the others; which, says covered_by in {report.name}"
        )
    return Merged(
        output=config.output,
        method=config.method,
        scale=config.scale,
        task_vectors=tuple(files),
        base_model=metadata.get("base_model"),
        norm=float(tree.norm(tau)),
        leaf_report=report,
        left=left,
        notes=tuple(notes),
    )


def report_name(output: Path) -> Path:
    """The report by leaf of an output: in its folder, or beside its file."""
    return output / "leaf_report.json" if output.is_dir() else output.with_name(f"{output.stem}.leaf_report.json")


def _check_output(config: MergeConfig) -> None:
    output = config.output
    if output.suffix != ".safetensors" and config.model is None:
        raise ValueError(f"the output {str(output)!r} is a folder of a model: give --model, or a name in .safetensors")
    if output.resolve() in [file.resolve() for file in config.task_vectors]:
        raise ValueError(
            f"the output {str(output)!r} is one of the task vectors, which would be lost: give another file"
        )
    if output.suffix == ".safetensors":
        inputs.check_file(output)
    else:
        check_new(output)


def _merged(
    function: Callable[..., PyTree],
    taus: Sequence[PyTree],
    partly: Mapping[str, Any],
    progress: Progress | None,
) -> tuple[PyTree, list[MergedLeaf]]:
    """The merged task vector, and its report by leaf."""
    rows: list[MergedLeaf] = []
    leaves = len(tree.flatten(taus[0]))

    def report(row: MergedLeaf) -> None:
        covered = {"covered_by": partly[row.path]} if row.path in partly else {}
        rows.append(row._replace(measures=row.measures | covered))
        if progress is not None:
            progress(len(rows), leaves, row.path)

    return function(taus, report=report), rows
