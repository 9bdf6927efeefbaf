"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SOURCES = (
    "a folder with one folder a class, an archive FILE.npz, a dataset hf:NAME?split=SPLIT, or digits:STYLE/PART; "
    "?part=0:0.8 takes a share of them"
)
Images = Annotated[str, typer.Option("--images", metavar="IMAGES", help=f"The images: {SOURCES}.")]
Classes = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Class names, one a line, in the labels' order; default: those of the images."),
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
