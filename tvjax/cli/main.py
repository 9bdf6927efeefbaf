"""The command ``tvjax``: its subcommands, and how errors end."""

from __future__ import annotations

import io
import os
import platform
import re
import sys
import traceback
from collections.abc import MutableMapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from tvjax.cli import apply, compose, config, convert, demo, evaluate, extract, inspect, merge, plan, transport

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command("demo")(demo.demo)
app.command("transport")(transport.transport)
app.command("plan")(plan.plan)
app.command("evaluate")(evaluate.evaluate)
app.command("extract")(extract.extract)
app.command("apply")(apply.apply)
app.command("convert")(convert.convert)
app.command("merge")(merge.merge)
app.command("compose")(compose.compose)
app.command("inspect")(inspect.inspect)


_ANYWHERE = ("--debug", "--no-cache")


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
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Keep no compiled programs in the cache folder; stands anywhere.")
    ] = False,
) -> None:
    """Edit pre-trained models with task vectors: extract, apply, merge, and move them into other models."""


def run(arguments: Sequence[str]) -> int:
    """Runs one command.

    Returns:
      The exit code: 0; 2 for bad input and 1 for a fault of tvjax, with one line on the standard error; 130 where it
      was interrupted, 141 where nobody reads its output to the end.
    """
    debug = "--debug" in arguments
    code = 2
    try:
        words, defaults = config.read(app, [argument for argument in arguments if argument not in _ANYWHERE])
        ended = app(words, prog_name="tvjax", standalone_mode=False, default_map=defaults)
        sys.stdout.flush()
        return ended or 0  # typer ends an interrupted command with 130, any other with what it returns, None
    except typer.TyperException as error:
        message = f"{error.format_message()} (tvjax --help)"
    except (BrokenPipeError, SystemExit):  # as of `tvjax inspect ... | head`; typer makes the one the other
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - nothing that is left to flush may raise again
        return 141
    except (ValueError, OSError) as error:
        message = str(error) or type(error).__name__
        if debug:
            traceback.print_exc()
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except Exception as error:
        code = 1
        hint = "please report it" if debug else "please report it with what --debug shows"
        message = f"a fault of tvjax, {hint}: {type(error).__name__}: {error}"
        if debug:
            traceback.print_exc()
    print(f"tvjax: error: {_line(message)}", file=sys.stderr)
    return code


def _line(message: str) -> str:
    r"""A message on one line, items of a list (`tvjax.tree.list_some`) parted, and nothing that steers a terminal.

    >>> _line("2 leaves differ:\n  up: 3 and 4\n  down: 4 and 3\nof another model?")
    '2 leaves differ: up: 3 and 4; down: 4 and 3; of another model?'
    """
    parted = re.sub(r"(?m)^(  \S.*)\n(?=.)", r"\1; ", message)
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in " ".join(parted.split()))


def keep_programs(arguments: Sequence[str], environment: MutableMapping[str, str]) -> None:
    """Lets JAX keep what it compiles in the user's cache folder, unless ``--no-cache`` is said or JAX is told already.

    By machine, for a program may use what another one's processor lacks. To be called before JAX is imported.

    >>> environment = {"XDG_CACHE_HOME": "/cache"}
    >>> keep_programs(["demo"], environment)
    >>> environment["JAX_COMPILATION_CACHE_DIR"].startswith("/cache/tvjax/programs/")
    True
    """
    if "--no-cache" in arguments or "JAX_COMPILATION_CACHE_DIR" in environment:
        return
    folder = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tvjax" / "programs" / platform.node()
    environment["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    environment.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**30))  # bytes; the oldest programs go


def main() -> None:
    """Runs the command of the command line and exits with its code."""
    keep_programs(sys.argv[1:], os.environ)
    for stream in (sys.stdout, sys.stderr):  # a name of a file may be no text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:]))
