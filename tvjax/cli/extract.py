"""``tvjax extract``: the task vector of a fine-tuning, as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tvjax.cli import config as recipes
from tvjax.cli.options import AllowConfigDifferences, AnyBase, Json, Quiet
from tvjax.cli.output import left, show


def extract(
    context: typer.Context,
    pretrained: Annotated[str, typer.Option(metavar="MODEL", help="The model before fine-tuning: folder or hub id.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="Where the task vector goes (.safetensors).")],
    finetuned: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The fine-tuned model; the part that is taken suffices.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="A LoRA adapter of PEFT instead: folder or hub id.")
    ] = None,
    subtree: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="The part of the model to take, such as text; '' for all of it. Default: vision of a CLIP or a ViT, "
            "all of another model.",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    allow_config_differences: AllowConfigDifferences = False,
    any_base: AnyBase = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write a task vector, fine-tuned minus pre-trained parameters, of any model in safetensors."""
    from tvjax.checkpoints import streaming
    from tvjax.checkpoints.folder import open_checkpoint
    from tvjax.cli import inputs
    from tvjax.cli.progress import progress

    if (finetuned is None) == (adapter is None):
        raise ValueError("give either --finetuned, a model, or --adapter, a LoRA adapter of PEFT")
    inputs.check_dtype(dtype)
    inputs.check_file(output)
    with progress("extract", quiet or as_json) as report, open_checkpoint(pretrained) as base:
        subtree = base.family.part if subtree is None else subtree
        if finetuned is not None:
            found = streaming.extract(
                base,
                finetuned,
                output,
                subtree=subtree,
                allow_config_differences=allow_config_differences,
                dtype=dtype,
                progress=report,
            )
        elif adapter is not None:
            found = streaming.extract_adapter(base, adapter, output, dtype=dtype, any_base=any_base, progress=report)
    recipes.write(context, output)
    notes = [f"note: {note}" for note in (*found.notes, *left(found.left))]
    if found.changed_outside:
        first, number = found.changed_outside[0], len(found.changed_outside)
        notes.append(f"note: fine-tuning changed {number} leaves outside {subtree!r} too ({first}, ...), which stay")
    show(
        {"output": output, **found._asdict()},
        *notes,
        f"{output}: {found.leaves} leaves, {found.parameters} parameters, norm {found.norm:.4g}, of {pretrained}",
        as_json=as_json,
        quiet=quiet,
    )
