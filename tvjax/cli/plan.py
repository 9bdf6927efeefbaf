"""``tvjax plan``: what a transport would do, from headers alone."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from tvjax.cli.commands import Json, Quiet, command
from tvjax.cli.output import show
from tvjax.cli.progress import progress
from tvjax.jobs.configs import PlanConfig

if TYPE_CHECKING:
    from tvjax.jobs._plan import Planned

BEYOND = "host and device together; runtime, compiled programs and workspace come on top, 1 to 2 GiB on a CPU"


@command(PlanConfig)
def plan(config: PlanConfig, quiet: Quiet = False, json: Json = False) -> None:
    """Say what tvjax transport would do with these options; nothing is written.

    No weights are read, unless the models are to be compared (--compare). What becomes of every leaf, which layers are
    paired, how tokens are aligned, how many examples make the maps unique, peak memory and disk. Takes the recipes of
    tvjax transport too.
    """
    with progress("comparing" if config.compare else "plan", quiet or json) as report:
        from tvjax import jobs

        found = jobs.plan(config, report)
    result = found._asdict()
    result["memory of the fit"] = result.pop("fit")
    show(result, *_texts(found, config), *found.notes, as_json=json, quiet=quiet)


def _texts(found: Planned, config: PlanConfig) -> list[Any]:
    """The plan for people."""
    from rich.table import Table

    title = f"{config.source} to {config.target} by {found.method}"
    leaves = Table(title=title)
    for column in ("link", "what becomes of a leaf", "leaves", "such as"):
        leaves.add_column(column, overflow="fold", no_wrap=column == "leaves")
    example = {(x["link"], x["action"], x["why"]): x["target"] or x["source"] for x in reversed(found.leaves)}
    for row, number in Counter((x["link"], x["action"], x["why"]) for x in found.leaves).items():
        link, action, why = row
        leaves.add_row(link, f"{action}: {why}" if why else action, str(number), example[row])
    memory = Table("peak memory of arrays", "", caption=BEYOND)
    for step, size in found.memory.items():
        memory.add_row(step, readable(size))
    for name, size in found.fit.items():
        memory.add_row(f"  {name}", readable(size))
    layers = [stage["source"].rpartition("/")[2] for stage in found.stages]
    lines = [f"source layers of the target's {len(layers)} stages: {' '.join(layers)}"]
    tokens = {tuple(stage["tokens"]) for stage in found.stages if stage["tokens"]}
    lines += [f"tokens: {a} in the source, {b} in the target, compared on {c}" for a, b, c in sorted(tokens)]
    counts = found.examples
    if counts["maps"]:
        needed = counts["for unique maps of tokens"], counts["for unique maps of one row an example"]
        lines.append(
            f"{counts['count']} examples: {counts['maps not unique']} of {counts['maps']} maps are not unique; those "
            f"of tokens are from {needed[0]} examples on, those of one row an example from {needed[1]}"
        )
    lines.append(f"copying: {found.copy}" if found.copy else "copying: every leaf fits as it is; try it first (naive)")
    if found.likeness:
        lines.append(_likeness(found.likeness))
    lines += [f"disk: {name} {readable(size)}" for name, size in found.disk.items()]
    return [leaves, memory, *lines]


def _likeness(blocks: list[dict[str, Any]]) -> str:
    """How alike the models are, in a line: every block, and the least."""
    least = min(blocks, key=lambda one: one["cka"])
    values = " ".join(f"{one['cka']:.2f}" for one in blocks)
    return (
        f"linear CKA by block on {blocks[0]['rows']} rows: {values} (least {least['cka']:.2f}, {least['target']}); the "
        "nearer to 1, the more carries over"
    )


def readable(size: int) -> str:
    """A number of bytes for people.

    >>> readable(1_500_000), readable(3 * 2**30)
    ('1.4 MiB', '3.0 GiB')
    """
    return f"{size / 2**20:.1f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"
