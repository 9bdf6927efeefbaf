"""The result of a command on the standard output: text or tables for people, one JSON object with ``--json``."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from typing import Any

WIDTH = 160  # of tables where there is no terminal, and no COLUMNS either


def show(result: Mapping[str, Any], *texts: Any, as_json: bool = False, quiet: bool = False) -> None:
    """Prints the result of a command, in one of several processes only in the first.

    Args:
      result: by name; NumPy and JAX numbers and arrays, paths and named tuples are written as JSON has them, a number
        that is not finite as null.
      *texts: the same for people: strings, or what rich prints, such as tables.
      as_json: print `result` as one JSON object in the place of the texts, whether quiet or not.
      quiet: print no texts.

    >>> show({"norm": float("nan"), "shape": (2, 3)}, as_json=True)
    {
     "norm": null,
     "shape": [
      2,
      3
     ]
    }
    >>> show({"norm": 0.5}, "norm 0.5")
    norm 0.5
    """
    if not is_first_process():
        return
    if as_json:
        print(json.dumps(_plain(result), indent=1, allow_nan=False))
        return
    for text in () if quiet else texts:
        if isinstance(text, str):
            print(text)
        else:
            _print(text)


def _print(text: Any) -> None:
    """Prints what rich prints; a table that is too wide, in parts."""
    from rich.console import Console
    from rich.table import Table

    from tvjax.cli.fold import folded

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=WIDTH)
    for part in folded(text, console.width) if isinstance(text, Table) else [text]:
        console.print(part, markup=False)


def is_first_process() -> bool:
    """Whether this is the process that prints; JAX is asked where it is loaded, and runs in several processes."""
    jax = sys.modules.get("jax")
    return jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # of NumPy and JAX
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def counted(count: int, name: str) -> str:
    """So many of something, in words.

    >>> counted(1, "task vector"), counted(2, "task vector")
    ('1 task vector', '2 task vectors')
    """
    return f"{count} {name}{'' if count == 1 else 's'}"
