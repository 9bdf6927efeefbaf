"""Options that several commands share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

SOURCES = (
    "a folder with one folder a class, an archive FILE.npz, a dataset hf:NAME?split=SPLIT, or digits:STYLE/PART; "
    "?part=0:0.8 takes a share of them"
)
LARGEST_SEED = 2**31 - 1
LARGEST_COUNT = 2**20  # of what arrays are made for


def finite(value: Any) -> Any:
    """An option's number, or numbers, unless they are NaN or infinite."""
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, float) and not math.isfinite(number):
            raise typer.BadParameter(f"{number} is no finite number.")
    return value


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
AllowConfigDifferences = Annotated[
    bool,
    typer.Option(
        "--allow-config-differences",
        help="Subtract the weights of models whose configs differ in what they compute (activation, heads, epsilon).",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at once.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object, and nothing else.")]
