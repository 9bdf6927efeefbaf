"""``tvjax apply``: task vectors added to the model that they were made for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tvjax.cli import config as recipes
from tvjax.cli.options import AnyBase, Json, Quiet
from tvjax.cli.output import left, show


def apply(
    context: typer.Context,
    task_vectors: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Task vectors; several are added.")],
    model: Annotated[str, typer.Option(metavar="MODEL", help="The pre-trained model: folder or hub id.")],
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the edited model goes.")],
    scale: Annotated[float, typer.Option(help="Factor of the task vectors; -1 negates.")] = 1.0,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; default: that of each tensor of the model.")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of one file, such as 5GB; default: the files of the model.")
    ] = None,
    any_base: AnyBase = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Add task vectors to the model that they were made for, tensor by tensor, and save it."""
    from tvjax.checkpoints import streaming
    from tvjax.checkpoints.huggingface import check_new
    from tvjax.cli import inputs
    from tvjax.cli.progress import progress

    check_new(output)
    if dtype is not None:
        inputs.check_dtype(dtype)
    with progress("apply", quiet or as_json) as report:
        found = streaming.apply(
            model,
            task_vectors,
            output,
            scale=scale,
            any_base=any_base,
            dtype=dtype,
            max_shard_size=max_shard_size,
            progress=report,
        )
    recipes.write(context, output)
    show(
        {"output": output, "model": model, "task_vectors": task_vectors, "scale": scale, **found._asdict()},
        *(f"note: {note}" for note in left(found.left)),
        f"{output}: {model} with {len(task_vectors)} task vectors, scale {scale:g}; {len(found.changed)} leaves "
        f"changed, {len(found.copied)} copied, {found.parameters} parameters",
        as_json=as_json,
        quiet=quiet,
    )
