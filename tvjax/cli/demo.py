"""``tvjax demo``: the experiment on the embedded models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from tvjax.cli.commands import Json, Quiet
from tvjax.jobs.recipes import COMMAND, write_recipe


def demo(
    full: Annotated[bool, typer.Option("--full", help="All tasks and three draws.")] = False,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the results go.")] = Path("results/demo"),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Move task vectors of a small CLIP into three others by every method, and evaluate them on real images."""
    standing = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not standing.is_dir():
        raise ValueError(f"the output {str(output)!r} is a file, or lies below one: give a folder")
    if not os.access(standing, os.W_OK):
        raise ValueError(f"the output {str(output)!r} cannot be written in {str(standing)!r}: give another folder")

    from tvjax.cli.output import show
    from tvjax.cli.progress import progress
    from tvjax.demo import experiment, setup
    from tvjax.report.tables import accuracy_table, arithmetic_table

    with progress("demo", quiet) as report:
        findings = experiment.run(setup.FULL if full else setup.QUICK, report)
    files = experiment.write(findings, output)
    write_recipe({COMMAND: "demo", "full": full, "output": str(output)}, output)
    tables = [
        accuracy_table(findings.measurements, findings.comparisons, target, title)
        for target, title in setup.TITLES.items()
    ]
    show(
        {"output": output, "files": files, **experiment.results(findings)},
        *tables,
        arithmetic_table([edit._asdict() for edit in findings.edits], f"Arithmetic on {setup.SOURCE}"),
        *experiment.footnotes(findings),
        f"{findings.seconds:.0f} s; wrote {', '.join(map(str, files))}",
        as_json=as_json,
        quiet=quiet,
    )
