"""``tvjax apply``: task vectors added to the model that they were made for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tvjax.cli import config as recipes
from tvjax.cli.options import AnyBase, Quiet


def apply(
    context: typer.Context,
    task_vectors: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Task vectors; several are added.")],
    model: Annotated[str, typer.Option(metavar="MODEL", help="The pre-trained model: folder or hub id.")],
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the edited model goes.")],
    scale: Annotated[float, typer.Option(help="Factor of the task vectors; -1 negates.")] = 1.0,
    any_base: AnyBase = False,
    quiet: Quiet = False,
) -> None:
    """Add task vectors to the model that they were made for, and save it."""
    from tvjax import arithmetic
    from tvjax.checkpoints import from_pretrained, load_tree, save_pretrained
    from tvjax.cli import inputs

    inputs.check_output(output)
    inputs.read_clip_config(model)
    loaded = [load_tree(file) for file in task_vectors]
    base = from_pretrained(model)
    metadata = inputs.common_base(task_vectors, [about for _, about in loaded], any_base)
    inputs.check_base(metadata, base, task_vectors, any_base)
    tau = arithmetic.add(*(tau for tau, _ in loaded))
    save_pretrained(base.with_params(arithmetic.apply(base.params, tau, scale)), output)
    recipes.write(context, output)
    if not quiet:
        print(f"{output}: {model} with {len(loaded)} task vectors, scale {scale:g}")
