"""Options that several commands share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

LARGEST_SEED = 2**31 - 1
LARGEST_COUNT = 2**20  # of what arrays are made for


def finite(value: Any) -> Any:
    """An option's number, or numbers, unless they are NaN or infinite."""
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, float) and not math.isfinite(number):
            raise typer.BadParameter(f"{number} is no finite number.")
    return value


Images = Annotated[
    Path, typer.Option("--images", metavar="FOLDER", help="Images in one folder a class; the folders name the classes.")
]
Classes = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Class names, one a line; default: the folders of the images, sorted."),
]
Templates = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Prompts with {} for the class name, one a line; default: 'a photo of a {}.'"),
]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--options", metavar="NAME=VALUE", help="A hyperparameter of the method, such as rank=0.25; may be repeated."
    ),
]
AnyBase = Annotated[
    bool, typer.Option("--any-base", help="Take task vectors although they were made for another model.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at once.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object, and nothing else.")]
