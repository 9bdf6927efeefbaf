"""``tvjax convert``: a model as another kind of checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tvjax.cli import config as recipes
from tvjax.cli.options import Json, Quiet
from tvjax.cli.output import left, show


def convert(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face or Orbax folder, hub id, or .pt file.")],
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the model goes.")],
    to: Annotated[Literal["huggingface", "orbax"], typer.Option(help="The kind of checkpoint.")] = "huggingface",
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; default: that of the model.")] = None,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Of one safetensors file.")] = "5GB",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    like: Annotated[
        str | None, typer.Option(metavar="MODEL", help="For a .pt file: a model of the same shape, for its config.")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Open a .pt file that you trust; needs torch.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write a model as a Hugging Face folder or an Orbax directory, or in another dtype."""
    from tvjax.checkpoints.huggingface import check_new
    from tvjax.cli import inputs

    check_new(output)
    if dtype is not None:
        inputs.check_dtype(dtype)
    from tvjax.checkpoints import conversion

    found = conversion.convert(
        source,
        output,
        to=to,
        dtype=dtype,
        max_shard_size=max_shard_size,
        like=like,
        allow_pickle=allow_pickle,
        revision=revision,
    )
    recipes.write(context, output)
    show(
        {"output": output, "source": source, "to": to, "parameters": found.parameters, "dtypes": found.dtypes}
        | {"left": found.left},
        *(f"note: {note}" for note in left(found.left)),
        f"{output}: {source} as {to}, {found.parameters} parameters, {', '.join(found.dtypes)}",
        as_json=as_json,
        quiet=quiet,
    )
