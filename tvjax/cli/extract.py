"""``tvjax extract``: the task vector of a fine-tuning, as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tvjax.cli import config as recipes
from tvjax.cli.options import Quiet


def extract(
    context: typer.Context,
    pretrained: Annotated[str, typer.Option(metavar="MODEL", help="The model before fine-tuning: folder or hub id.")],
    finetuned: Annotated[str, typer.Option(metavar="MODEL", help="The fine-tuned model; its vision tower suffices.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="Where the task vector goes (.safetensors).")],
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    quiet: Quiet = False,
) -> None:
    """Write the task vector of a CLIP's vision tower: fine-tuned minus pre-trained parameters."""
    from tvjax import tree
    from tvjax.checkpoints import from_pretrained, save_tree
    from tvjax.cli import inputs

    inputs.check_dtype(dtype)
    inputs.check_file(output)
    for name in (pretrained, finetuned):
        inputs.read_clip_config(name)
    base, tuned = from_pretrained(pretrained), from_pretrained(finetuned)
    tau = inputs.vision_task_vector(base, tuned)
    save_tree(output, tau, base.identity(), dtype)
    recipes.write(context, output)
    if quiet:
        return
    for note in inputs.notes(base, tuned):
        print(f"note: {note}")
    print(f"{output}: {len(tree.flatten(tau))} leaves, norm {float(tree.norm(tau)):.4g}, of {pretrained}")
