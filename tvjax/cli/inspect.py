"""``tvjax inspect``: what a model or a file holds, and how alike two task vectors are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tvjax.cli import config as recipes
from tvjax.cli.options import Json, Quiet

if TYPE_CHECKING:
    from tvjax.report.inspection import Contents, StageSites


def inspect(
    context: typer.Context,
    things: Annotated[
        list[str],
        typer.Argument(
            metavar="THING [THING]",
            help="A model (folder or hub id), or a file of tvjax: a task vector, maps, coefficients. Two are compared.",
        ),
    ],
    norms: Annotated[
        bool | None,
        typer.Option("--norms/--no-norms", help="Norms by block; every tensor is read. Default: for task vectors."),
    ] = None,
    leaves: Annotated[bool, typer.Option("--leaves", help="A row for each leaf, in the place of blocks.")] = False,
    sites: Annotated[
        bool, typer.Option("--sites", help="Where the leaves of a model meet activations; no weights are read.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The pre-trained model of a task vector, for relative norms.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw a heat map, kind of leaf by depth (.png).")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what a model or a file holds, and its norms; or the cosines and sign agreement of two of them.

    Without norms only headers are read; for norms one tensor after the other.
    """
    if len(things) > 2:
        raise ValueError(f"{len(things)} things given, expected one, or two to compare")
    if len(things) == 2 and (sites or model is not None or norms is False):
        raise ValueError("--sites, --model and --no-norms are for one thing, found two")
    if norms is False and (plot is not None or model is not None):
        raise ValueError("--plot and --model need norms: leave --no-norms out")
    if plot is not None:
        from tvjax.cli import inputs

        inputs.check_file(plot)
        if plot.suffix.lower() != ".png":
            raise ValueError(f"--plot is {str(plot)!r}, expected the name of a file in .png")
    from tvjax.cli.output import show

    if len(things) == 2:
        result, texts = _compare(things[0], things[1], leaves, plot, quiet)
    else:
        result, texts = _describe(things[0], norms, leaves, sites, model, plot, quiet)
    if plot is not None:
        recipes.write(context, plot)
    show(result, *texts, as_json=as_json, quiet=quiet)


def _describe(
    thing: str, norms: bool | None, by_leaf: bool, sites: bool, model: str | None, plot: Path | None, quiet: bool
) -> tuple[dict[str, Any], list[Any]]:
    """One thing, for JSON and for people."""
    from tvjax.checkpoints import load_coefficients
    from tvjax.cli.progress import progress
    from tvjax.compose.coefficients import entries
    from tvjax.report import inspection, inspection_tables

    found = inspection.contents(thing)
    if model is not None and found.kind != inspection.TASK_VECTOR:
        raise ValueError(f"--model is for a task vector, but {thing!r} is a {found.kind}")
    if plot is not None and found.kind == inspection.TRANSPORT:
        raise ValueError(f"--plot has no picture of a {found.kind}: it is for models, task vectors and coefficients")
    base = None if model is None else inspection.contents(model)
    result = {
        **{"name": found.name, "kind": found.kind, "about": found.about},
        **{"entries": found.entries, "bytes": found.bytes, "dtypes": found.dtypes},
    }
    texts: list[Any] = [f"{found.name}: {found.kind}, {_size(found)}", *_about(found)]
    if sites:
        stages = inspection.model_sites(found)
        result["sites"] = [_stage(stage) for stage in stages]
        texts.append(inspection_tables.site_table(stages))
    rows = [leaf._asdict() for leaf in found.leaves]
    result["leaves"] = rows
    if found.kind == inspection.COEFFICIENTS:
        learned, _ = load_coefficients(thing)
        result["coefficients"] = [entry._asdict() for entry in entries(learned)]
        texts.append(inspection_tables.coefficient_table(learned))
        if plot is not None:
            from tvjax.report.plots import plot_coefficients

            plot_coefficients(learned, plot)
            plot = None
    if norms is None:
        norms = found.kind == inspection.TASK_VECTOR or plot is not None
    if not norms:
        named = by_leaf or (found.kind in (inspection.MODEL, inspection.TENSORS) and not sites)
        return result, [*texts, inspection_tables.leaf_table(found, by_leaf=by_leaf)] if named else texts

    references = None
    if base is not None:
        references, made_for = inspection.base_sums(found, base)
        result["made_for_model"] = made_for
        if made_for is not None:
            texts.append(f"made for {'the' if made_for else 'OTHER'} weights {'of' if made_for else 'than'} {model}")
    with progress("norms", quiet) as report:
        sums = inspection.measure(found, report)

    def numbers(paths: Sequence[str]) -> dict[str, Any]:
        own = inspection.total(sums, paths)
        values = {"norm": own.norm, "zeros": own.zeros}
        return values if references is None else {**values, "model_norm": inspection.total(references, paths).norm}

    for row in rows:
        row |= numbers([row["path"]])
    result["blocks"] = {name: numbers(paths) for name, paths in inspection.by_block(sums).items()}
    result |= numbers(list(sums))
    texts.append(inspection_tables.norm_table(sums, references, by_leaf=by_leaf))
    if plot is not None:
        from tvjax.report.plots import plot_leaves

        values = {path: own.norm for path, own in sums.items()}
        if references is not None:
            values = {path: own.norm / (references[path].norm or math.inf) for path, own in sums.items()}
        label = "norm" if references is None else "norm, relative to the model's"
        plot_leaves({Path(found.name).name: values}, plot, label, positive=True)
    return result, texts


def _compare(
    first: str, second: str, by_leaf: bool, plot: Path | None, quiet: bool
) -> tuple[dict[str, Any], list[Any]]:
    """Two things, for JSON and for people."""
    from tvjax.cli.progress import progress
    from tvjax.report import inspection, inspection_tables

    found = [inspection.contents(thing) for thing in (first, second)]
    with progress("compare", quiet) as report:
        compared = inspection.compare(found[0], found[1], report)

    def numbers(paths: Sequence[str]) -> dict[str, Any]:
        own = inspection.total(compared.sums, paths)
        values = {"cosine": own.cosine, "sign_agreement": own.sign_agreement, "norms": own.norms}
        return {**values, "distance": own.distance}

    result = {
        **{"names": [first, second], "kind": found[0].kind, **numbers(list(compared.sums))},
        "blocks": {name: numbers(paths) for name, paths in inspection.by_block(compared.sums).items()},
        "leaves": {path: numbers([path]) for path in compared.sums},
        **{"only_first": compared.only_first, "only_second": compared.only_second},
    }
    texts: list[Any] = [
        f"{letter}: {one.name}, {one.kind}, {_size(one)}" for letter, one in zip("AB", found, strict=True)
    ]
    for letter, paths in zip("AB", (compared.only_first, compared.only_second), strict=True):
        if paths:
            texts.append(f"only {letter} has {', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''} ({len(paths)})")
    texts.append(inspection_tables.comparison_table(compared, "AB", by_leaf=by_leaf))
    if plot is not None:
        from tvjax.report.plots import plot_leaves

        moved = {path: own for path, own in compared.sums.items() if own.compared}  # the others are grey
        cosines = {path: own.cosine for path, own in moved.items()}
        # From -1 to 1 like a cosine: 0 where half of the signs are the same, as by chance.
        signs = {path: 2 * own.sign_agreement - 1 for path, own in moved.items()}
        plot_leaves({"cosine": cosines, "signs: same - different": signs}, plot, "share, -1 to 1")
    return result, texts


def _size(found: Contents) -> str:
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in found.dtypes.items())
    power = max(power for power in range(4) if power == 0 or found.bytes >= 1024**power)
    size, unit = found.bytes / 1024**power, ("bytes", "KiB", "MiB", "GiB")[power]
    tensors = f"{len(found.leaves)} tensor{'s' if len(found.leaves) > 1 else ''}"
    return f"{found.entries:,} entries in {tensors} ({dtypes}), {size:,.{1 if power else 0}f} {unit}"


def _about(found: Contents) -> list[str]:
    """What a thing says of itself, a line for each tower of a model, or each entry."""
    lines = []
    for name, value in found.about.items():
        if isinstance(value, Mapping):
            own = {key: item for key, item in value.items() if not isinstance(item, Mapping)}
            towers = {key: item for key, item in value.items() if isinstance(item, Mapping)}
            for title, fields in {**towers, name: own}.items():
                lines.append(f"  {title}: {', '.join(f'{key} {item}' for key, item in fields.items())}")
        elif value not in ("", [], None):
            lines.append(f"  {name}: {', '.join(map(str, value)) if isinstance(value, list) else value}")
    return lines


def _stage(stage: StageSites) -> dict[str, Any]:
    """The sites of a kind of stage as JSON."""
    rows = [
        {"leaf": site.path, "occurrence": site.occurrence, "kind": site.kind, "d_in": site.d_in, "d_out": site.d_out}
        | {"tokens": tokens}
        for site, tokens in zip(stage.table.sites, stage.tokens, strict=True)
    ]
    without = {**stage.table.unclassified, **{path: ["never read"] for path in stage.table.unused}}
    return {"stages": stage.stages, "sites": rows, "without_site": without}
