"""The command ``tvjax``: its subcommands, and how errors end."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from tvjax.cli import apply, compose, config, convert, demo, evaluate, extract, merge, transport

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command("demo")(demo.demo)
app.command("transport")(transport.transport)
app.command("evaluate")(evaluate.evaluate)
app.command("extract")(extract.extract)
app.command("apply")(apply.apply)
app.command("convert")(convert.convert)
app.command("merge")(merge.merge)
app.command("compose")(compose.compose)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tvjax {version('tvjax')}")
        raise typer.Exit()


@app.callback()
def tvjax(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; stands anywhere.")] = False,
) -> None:
    """Edit pre-trained models with task vectors: extract, apply, merge, and move them into other models."""


def run(arguments: Sequence[str]) -> int:
    """Runs one command.

    Returns:
      The exit code: 0; 2 for bad input, with one line on the standard error; 130 where it was interrupted.
    """
    debug = "--debug" in arguments
    try:
        words, defaults = config.read(app, [argument for argument in arguments if argument != "--debug"])
        app(words, prog_name="tvjax", standalone_mode=False, default_map=defaults)
        return 0
    except typer.TyperException as error:
        message = f"{error.format_message()} (tvjax --help)"
    except (ValueError, OSError) as error:
        message = str(error)
        if debug:
            traceback.print_exc()
    except (typer.Abort, KeyboardInterrupt):
        return 130
    print(f"tvjax: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def main() -> None:
    """Runs the command of the command line and exits with its code."""
    sys.exit(run(sys.argv[1:]))
