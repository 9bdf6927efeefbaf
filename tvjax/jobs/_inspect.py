"""What a model or a file holds, and how alike two of them are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tvjax.checkpoints import load_coefficients
from tvjax.compose.coefficients import Coefficients
from tvjax.jobs import inputs
from tvjax.jobs.configs import InspectConfig
from tvjax.jobs.recipes import recipe_of, write_recipe
from tvjax.progress import Progress
from tvjax.report import comparison, contents, inspection
from tvjax.report.comparison import Comparison
from tvjax.report.contents import Contents
from tvjax.report.inspection import StageSites
from tvjax.report.leaf_plots import plot_coefficients, plot_leaves
from tvjax.report.sums import Sums


class Inspected(NamedTuple):
    """What `inspect` found of one thing.

    Attributes:
      contents: what it holds, from its headers.
      sites: where the leaves of a model meet activations; empty where that was not asked for.
      coefficients: those of a file of coefficients.
      sums: by leaf, for norms; None where they were not measured.
      base_sums: those of the model of a task vector.
      made_for: whether a task vector was made for the weights of that model; None: not known.
    """

    contents: Contents
    sites: Sequence[StageSites]
    coefficients: Coefficients | None
    sums: Mapping[str, Sums] | None
    base_sums: Mapping[str, Sums] | None
    made_for: bool | None


class Compared(NamedTuple):
    """What `inspect` found of two things.

    Attributes:
      contents: what each holds.
      comparison: norms, distances, cosines and sign agreement by leaf, and in what else they differ.
    """

    contents: tuple[Contents, Contents]
    comparison: Comparison


def inspect(config: InspectConfig, progress: Progress | None = None) -> Inspected | Compared:
    """Looks at a model or a file, and its norms; or at how far two of them are from one another.

    Without norms only headers are read; for norms one tensor after the other.

    Args:
      config: what to look at.
      progress: called after every tensor that is measured.

    Raises:
      ValueError: what cannot be looked at.
    """
    if config.plot is not None:
        inputs.check_file(config.plot)
    found = _looked_at(config, progress or (lambda done, total, name: None))
    if config.plot is not None:
        write_recipe(recipe_of(config), config.plot)
    return found


def _looked_at(config: InspectConfig, tell: Progress) -> Inspected | Compared:
    found = contents.contents(config.things[0])
    if len(config.things) == 1:
        return _inspected(config, found, tell)
    other = contents.contents(config.things[1])
    shapes = [{(leaf.path, leaf.shape) for leaf in one.leaves} for one in (found, other)]
    if config.plot is not None and not shapes[0] & shapes[1]:
        raise ValueError("--plot shows leaves that both have in one shape, and there are none: leave it out")
    compared = Compared((found, other), comparison.compare(found, other, tell))
    if config.plot is not None:
        _plot_comparison(compared, config.plot)
    return compared


def _inspected(config: InspectConfig, found: Contents, progress: Progress) -> Inspected:
    thing, plot, norms = config.things[0], config.plot, config.norms
    if config.model is not None and found.kind != contents.TASK_VECTOR:
        raise ValueError(f"--model is for a task vector, found the {found.kind} {thing!r}")
    if plot is not None and found.kind == contents.TRANSPORT:
        raise ValueError(
            f"--plot has no picture of the {found.kind} {thing!r}: it is for models, task vectors and coefficients"
        )
    base = None if config.model is None else contents.contents(config.model)
    stages = inspection.model_sites(found) if config.sites else []
    learned = load_coefficients(thing)[0] if found.kind == contents.COEFFICIENTS else None
    if learned is not None and plot is not None:
        plot_coefficients(learned, plot)
        plot = None
    if norms is None:
        norms = found.kind == contents.TASK_VECTOR or plot is not None
    if not norms:
        return Inspected(found, stages, learned, None, None, None)
    references, made_for = (None, None) if base is None else inspection.base_sums(found, base, progress)
    sums = inspection.measure(found, progress)
    if plot is not None:
        _plot_norms(found, sums, references, plot)
    return Inspected(found, stages, learned, sums, references, made_for)


def _plot_norms(found: Contents, sums: Mapping[str, Sums], references: Mapping[str, Sums] | None, plot: Path) -> None:
    values = {path: own.norm for path, own in sums.items()}
    if references is not None:
        values = {path: own.norm / (references[path].norm or math.inf) for path, own in sums.items()}
    label = "norm" if references is None else "norm, relative to the model's"
    plot_leaves({Path(found.name).name: values}, plot, label, positive=True)


def _plot_comparison(compared: Compared, plot: Path) -> None:
    found = compared.comparison
    rows = {path: found.row([path]) for path in found.sums}
    if compared.contents[0].kind == contents.MODEL:  # of two models that are near, every cosine is nearly 1
        distances = {path: row.relative_distance or 0.0 for path, row in rows.items()}
        plot_leaves({"A and B": distances}, plot, "distance, relative to A's norm", positive=True)
        return
    moved = {path: row for path, row in rows.items() if row.sign_agreement is not None}  # the others are grey
    cosines = {path: row.cosine or 0.0 for path, row in moved.items()}
    # From -1 to 1 like a cosine: 0 where half of the signs are the same, as by chance.
    signs = {path: 2 * (row.sign_agreement or 0.0) - 1 for path, row in moved.items()}
    plot_leaves({"cosine": cosines, "signs: same - different": signs}, plot, "share, -1 to 1")
