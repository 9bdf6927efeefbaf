"""``tvjax demo``: the experiment on the embedded models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tvjax.cli.commands import Json, Quiet
from tvjax.cli.output import show
from tvjax.cli.progress import progress
from tvjax.jobs.recipes import COMMAND, write_recipe

if TYPE_CHECKING:
    from tvjax.demo.experiment import Findings


def demo(
    full: Annotated[bool, typer.Option("--full", help="All tasks and three draws, language too.")] = False,
    language: Annotated[bool, typer.Option("--language", help="Language models in place of the CLIPs.")] = False,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the results go.")] = Path("results/demo"),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Move task vectors of small models into others by every method, and evaluate them on real images or texts."""
    standing = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not standing.is_dir():
        raise ValueError(f"the output {str(output)!r} is a file, or lies below one: give a folder")
    if not os.access(standing, os.W_OK):
        raise ValueError(f"the output {str(output)!r} cannot be written in {str(standing)!r}: give another folder")

    with progress("demo", quiet) as report:
        from tvjax.demo import experiment, setup
        from tvjax.demo import language as texts

        parts: list[tuple[Path, experiment.Findings]] = []
        if not language:
            parts.append((output, experiment.run(setup.FULL if full else setup.QUICK, report)))
        if language or full:
            parts.append((output / "language", texts.run(texts.FULL if full else texts.QUICK, report)))
    files = [file for folder, findings in parts for file in experiment.write(findings, folder)]
    write_recipe({COMMAND: "demo", "full": full, "language": language, "output": str(output)}, output)
    content = {findings.kind: experiment.results(findings) for _, findings in parts}
    measured = content.get("photographs", {}) | ({"language": content["texts"]} if "texts" in content else {})
    show(
        {"output": output, "files": files, **measured},
        *(line for _, findings in parts for line in _tables(findings)),
        f"{sum(findings.seconds for _, findings in parts):.0f} s; wrote {', '.join(map(str, files))}",
        as_json=as_json,
        quiet=quiet,
    )


def _tables(findings: Findings) -> list[Any]:
    """The tables of a part of the demo, and what they are of."""
    from tvjax.demo.experiment import footnotes
    from tvjax.report.tables import accuracy_table, arithmetic_table

    tables: list[Any] = [
        accuracy_table(findings.measurements, findings.comparisons, target, title)
        for target, title in findings.titles.items()
    ]
    if findings.edits:
        tables.append(arithmetic_table([edit._asdict() for edit in findings.edits], "Arithmetic on A"))
    return [*tables, *footnotes(findings)]
