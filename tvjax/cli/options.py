"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

SOURCES = (
    "a folder with one folder a class, an archive FILE.npz, a dataset hf:NAME?split=SPLIT, or digits:STYLE/PART; "
    "?part=0:0.8 takes a share of them"
)
Images = Annotated[
    str | None, typer.Option("--images", metavar="IMAGES", help=f"The images: {SOURCES}. Default: those of --task.")
]
Task = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Class names, prompts and images: sun397, cars, resisc45, eurosat, svhn, gtsrb, mnist, dtd; or digits.",
    ),
]
PerClass = Annotated[int, typer.Option(min=0, help="Images of each class to draw; 0: all.")]
Select = Annotated[
    Literal["random", "herding", "k_medoids"],
    typer.Option(help="How --per-class draws: at random, or by the model's own embeddings."),
]
Classes = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Class names, one a line, in the labels' order; default: of the task or images."),
]
Templates = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Prompts with {} for the name, one a line; default: of the task, or 'a photo of a {}.'",
    ),
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
