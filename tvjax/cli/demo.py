"""``tvjax demo``: the experiment on the embedded models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tvjax.cli.options import Quiet


def demo(
    full: Annotated[bool, typer.Option("--full", help="All tasks and three draws.")] = False,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the results go.")] = Path("results/demo"),
    quiet: Quiet = False,
) -> None:
    """Move task vectors of a small CLIP into three others by every method, and evaluate them on real images."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"the output {str(output)!r} is a file: give a folder")

    from rich.console import Console

    from tvjax.cli.progress import progress
    from tvjax.demo import experiment, setup
    from tvjax.report.tables import accuracy_table, arithmetic_table

    with progress("demo", quiet) as report:
        findings = experiment.run(setup.FULL if full else setup.QUICK, report)
    files = experiment.write(findings, output)
    if quiet:
        return
    console = Console(width=None if Console().is_terminal else 160)
    for target, title in setup.TITLES.items():
        console.print(accuracy_table(findings.measurements, findings.comparisons, target, title))
    console.print(arithmetic_table([edit._asdict() for edit in findings.edits], f"Arithmetic on {setup.SOURCE}"))
    for line in experiment.footnotes(findings):
        console.print(line)
    console.print(f"{findings.seconds:.0f} s; wrote {', '.join(map(str, files))}")
