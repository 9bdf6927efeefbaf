"""Tables of what `tvjax.report.inspection` and `tvjax.report.comparison` find, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from rich import box
from rich.table import Table

from tvjax.compose.coefficients import Coefficients
from tvjax.report.comparison import Comparison
from tvjax.report.contents import Contents
from tvjax.report.inspection import StageSites
from tvjax.report.sums import Sums, by_block, place, total, without_number


def leaf_table(found: Contents, *, by_leaf: bool = False) -> Table:
    """Path, key in the file, shape and dtype of the leaves, those of one stack in one row unless `by_leaf`."""
    table = _table("leaf", "key in the file", "shape", "dtype", "layers", right=("layers",))
    counts: dict[tuple[str, ...], int] = {}
    for leaf in found.leaves:
        path, key = (name if by_leaf else without_number(name) for name in (leaf.path, leaf.key))
        row = (path, "" if key == path else key, _shape(leaf.shape), leaf.dtype)
        counts[row] = counts.get(row, 0) + 1
    for cells, count in counts.items():
        table.add_row(*cells, str(count) if "*" in cells[0] else "")
    return table


def norm_table(sums: Mapping[str, Sums], base: Mapping[str, Sums] | None = None, *, by_leaf: bool = False) -> Table:
    """Norms by block, and within a stack by part of the block; or by leaf.

    Args:
      sums: of `tvjax.report.inspection.measure`.
      base: of the parameters that the leaves are added to, for norms relative to theirs.
      by_leaf: one row for each leaf.

    Returns:
      The table; shares are of the squared norm.
    """
    blocks = {path: [path] for path in sums} if by_leaf else by_block(sums)
    parts = [] if by_leaf else list(dict.fromkeys(filter(None, (place(path)[1] for path in sums))))
    columns = (*parts, "norm", "share", *([] if base is None else ["relative"]), "zeros")
    table = _table("leaf" if by_leaf else "block", *columns, right=columns)
    whole = total(sums, sums)
    for name, paths in (*blocks.items(), ("all", list(sums))):
        own = total(sums, paths)
        of_parts = ([path for path in paths if place(path)[1] == part] for part in parts)
        cells = [f"{total(sums, part).norm:.4g}" if part else "" for part in of_parts]
        cells += [f"{own.norm:.4g}", _percent(own.squares / whole.squares if whole.squares else 0.0)]
        if base is not None:
            cells.append(_ratio(own.norm, total(base, paths).norm))
        table.add_row(name, *cells, _percent(own.sparsity))
    return table


def comparison_table(found: Comparison, groups: Mapping[str, Sequence[str]], title: str) -> Table:
    """Norms, distance, cosine and sign agreement of two trees, a row for each group of leaves, and for all.

    Args:
      found: of `tvjax.report.comparison.compare`.
      groups: paths by name.
      title: of the names.

    Returns:
      The table; the distance is relative to the norm of the first, of leaves that both have in one shape.
    """
    columns = ("norm A", "norm B", "distance", "cosine", "same sign")
    table = _table(title, *columns, right=columns)
    for name, paths in (*groups.items(), ("all", found.paths)):
        row = found.row(paths)
        cells = ["" if norm is None else f"{norm:.4g}" for norm in row.norms]
        cells += ["" if row.relative_distance is None else f"{row.relative_distance:.4g}"]
        cells += ["" if row.cosine is None else f"{row.cosine:.4f}"]
        table.add_row(name, *cells, "" if row.sign_agreement is None else _percent(row.sign_agreement))
    return table


def coefficient_table(coefficients: Coefficients) -> Table:
    """One row for each task vector: how many coefficients it has, their mean, least and greatest."""
    columns = ("coefficients", "mean", "min", "max")
    table = _table("task vector", *columns, right=columns)
    layout, values = coefficients.layout, np.asarray(coefficients.values)
    for index, name in enumerate(layout.vectors):
        used = {block for place in layout.places if index in place.vectors for block in place.blocks.values()}
        own = values[index, sorted(used)]
        numbers = (f"{number:.4g}" for number in (own.mean(), own.min(), own.max())) if own.size else ("", "", "")
        table.add_row(name, str(own.size), *numbers)
    return table


def site_table(found: Sequence[StageSites]) -> Table:
    """One row for each site of each kind of stage, and for each leaf that has none, with the reason."""
    columns = ("d_in", "d_out", "tokens")
    table = _table("stage", "leaf", "kind", *columns, right=columns)
    for kind in found:
        first = kind.stages[0] if len(kind.stages) == 1 else f"{kind.stages[0]} and {len(kind.stages) - 1} more"
        rows = [
            (site.key if site.occurrence else site.path, site.kind, str(site.d_in), str(site.d_out), str(tokens))
            for site, tokens in zip(kind.table.sites, kind.tokens, strict=True)
        ]
        rows += [(path, f"no site: {', '.join(why)}", "", "", "") for path, why in kind.table.unclassified.items()]
        rows += [(path, "no site: never read", "", "", "") for path in kind.table.unused]
        for number, row in enumerate(rows):
            table.add_row(first if number == 0 else "", *row, end_section=number == len(rows) - 1)
    return table


def _table(*columns: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        numbers = column in right
        table.add_column(column, justify="right" if numbers else "left", no_wrap=numbers, overflow="fold")
    return table


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _ratio(norm: float, reference: float) -> str:
    return f"{norm / reference:.4g}" if reference else ""
