"""``tvjax inspect``: what a model or a file holds, and how alike two of them are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tvjax.cli.commands import Json, Quiet, command
from tvjax.cli.output import show
from tvjax.cli.progress import progress
from tvjax.jobs.configs import InspectConfig

if TYPE_CHECKING:
    from tvjax.jobs._inspect import Compared, Inspected
    from tvjax.report.comparison import Comparison
    from tvjax.report.contents import Contents
    from tvjax.report.inspection import StageSites

_MOST = 12  # lines of what two things say of themselves differently


@command(InspectConfig)
def inspect(
    config: InspectConfig,
    leaves: Annotated[bool, typer.Option("--leaves", help="A row for each leaf, in the place of blocks.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what a model or a file holds, and its norms; or how far two of them are from one another.

    Without norms only headers are read; for norms one tensor after the other.
    """
    with progress("norms" if len(config.things) == 1 else "compare", quiet) as report:
        from tvjax import jobs
        from tvjax.jobs._inspect import Inspected

        found = jobs.inspect(config, report)
    result, texts = (
        _describe(found, config, leaves) if isinstance(found, Inspected) else _compare(found, config, leaves)
    )
    show(result, *texts, as_json=json, quiet=quiet)


def _describe(found: Inspected, config: InspectConfig, by_leaf: bool) -> tuple[dict[str, Any], list[Any]]:
    """One thing, for JSON and for people."""
    from tvjax.compose.coefficients import entries
    from tvjax.report import contents, inspection_tables
    from tvjax.report import sums as adding

    own = found.contents
    rows = [leaf._asdict() for leaf in own.leaves]
    result: dict[str, Any] = {
        **{"name": own.name, "kind": own.kind, "about": own.about},
        **{"entries": own.entries, "bytes": own.bytes, "dtypes": own.dtypes, "leaves": rows},
    }
    texts: list[Any] = [f"{own.name}: {own.kind}, {_size(own)}", *_about(own)]
    if found.sites:
        result["sites"] = [_stage(stage) for stage in found.sites]
        texts.append(inspection_tables.site_table(found.sites))
    if found.coefficients is not None:
        result["coefficients"] = [entry._asdict() for entry in entries(found.coefficients)]
        texts.append(inspection_tables.coefficient_table(found.coefficients))
    sums, references = found.sums, found.base_sums
    if sums is None:
        named = by_leaf or (own.kind in (contents.MODEL, contents.TENSORS) and not config.sites)
        return result, [*texts, inspection_tables.leaf_table(own, by_leaf=by_leaf)] if named else texts
    if references is not None:
        result["made_for_model"] = found.made_for
        if found.made_for is not None:
            weights = f"{'the' if found.made_for else 'OTHER'} weights {'of' if found.made_for else 'than'}"
            texts.append(f"made for {weights} {config.model}")

    def numbers(paths: Sequence[str]) -> dict[str, Any]:
        total = adding.total(sums, paths)
        values = {"norm": total.norm, "zeros": total.zeros}
        return values if references is None else {**values, "model_norm": adding.total(references, paths).norm}

    for row in rows:
        row |= numbers([row["path"]])
    result["blocks"] = {name: numbers(paths) for name, paths in adding.by_block(sums).items()}
    result |= numbers(list(sums))
    return result, [*texts, inspection_tables.norm_table(sums, references, by_leaf=by_leaf)]


def _compare(found: Compared, config: InspectConfig, by_leaf: bool) -> tuple[dict[str, Any], list[Any]]:
    """Two things, for JSON and for people."""
    from tvjax.report.inspection_tables import comparison_table
    from tvjax.report.sums import by_block, by_kind

    compared = found.comparison
    blocks, kinds = by_block(compared.paths), by_kind(compared.paths)

    def numbers(paths: Sequence[str]) -> dict[str, Any]:
        row = compared.row(paths)
        return {"norms": row.norms, "distance": row.distance, "cosine": row.cosine} | {
            "sign_agreement": row.sign_agreement
        }

    result = {
        **{"names": config.things, "kind": found.contents[0].kind, **numbers(compared.paths)},
        "blocks": {name: numbers(paths) for name, paths in blocks.items()},
        "kinds": {name: numbers(paths) for name, paths in kinds.items()},
        "leaves": {path: numbers([path]) for path in compared.paths},
        **{"only_first": compared.only_first, "only_second": compared.only_second},
        **{"shapes": compared.shapes, "dtypes": compared.dtypes},
        **{"about": compared.about, "one_base": compared.one_base},
    }
    texts: list[Any] = [
        f"{letter}: {one.name}, {one.kind}, {_size(one)}" for letter, one in zip("AB", found.contents, strict=True)
    ]
    texts += _differences(compared)
    if by_leaf:
        return result, [*texts, comparison_table(compared, {path: [path] for path in compared.paths}, "leaf")]
    return result, [*texts, comparison_table(compared, blocks, "block"), comparison_table(compared, kinds, "kind")]


def _differences(compared: Comparison) -> list[str]:
    """In what two things differ but for their values, a line each."""
    lines = []
    if compared.one_base is not None:
        lines.append(f"made for {'the same' if compared.one_base else 'OTHER'} weights")
    for letter, paths in zip("AB", (compared.only_first, compared.only_second), strict=True):
        if paths:
            lines.append(f"only {letter} has {_some(paths)}")
    if compared.shapes:
        shapes = [f"{path} ({_times(a)} and {_times(b)})" for path, (a, b) in compared.shapes.items()]
        lines.append(f"other shapes, so that only norms are compared: {_some(shapes)}")
    if compared.sums and len(compared.sums) < len(compared.paths):
        lines.append(f"distance, cosine and signs are of {len(compared.sums)} of {len(compared.paths)} leaves")
    for (a, b), count in Counter(compared.dtypes.values()).items():
        lines.append(f"other dtypes: {a} in A and {b} in B ({count})")
    shown = [f"  {name}: {_short(a)} in A, {_short(b)} in B" for name, (a, b) in compared.about.items()]
    left = len(shown) - _MOST
    return [*lines, *shown[:_MOST], *([f"  and {left} more, which --json lists"] if left > 0 else [])]


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''} ({len(names)})"


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _short(value: Any) -> str:
    text = "nothing" if value in (None, "") else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


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
