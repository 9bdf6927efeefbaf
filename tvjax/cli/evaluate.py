"""``tvjax evaluate``: zero-shot accuracy of CLIPs on a folder of images."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from tvjax.cli.options import BatchSize, Classes, Images, Templates


def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Full CLIPs: folders or hub ids.")],
    images: Images,
    classes: Classes = None,
    templates: Templates = None,
    batch_size: BatchSize = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Zero-shot accuracy with its 95 % interval (Wilson)."""
    from rich.console import Console

    from tvjax.checkpoints import from_pretrained, load_processor
    from tvjax.cli import inputs
    from tvjax.cli.progress import progress
    from tvjax.data.loader import Loader
    from tvjax.evaluate.accuracy import accuracy
    from tvjax.evaluate.zero_shot import zero_shot_model
    from tvjax.report.tables import evaluation_table

    for name in models:
        if inputs.read_clip_config(name).text is None:
            raise ValueError(f"{name!r} has no text tower to make a zero-shot head from: give a full CLIP")
    found = inputs.read_images(images, classes, "an accuracy")
    prompts = inputs.read_templates(templates)
    results = {}
    with progress("evaluate", quiet) as report:
        for number, name in enumerate(models):
            processor = load_processor(name)
            head = zero_shot_model(from_pretrained(name).model, processor.tokens, found.class_names, prompts)
            results[name] = accuracy(head, Loader(found, processor.pixels, batch_size))
            report(number + 1, len(models), name)
    if as_json:
        rows = [
            {"model": name, "accuracy": a.fraction, "interval": a.interval(), "correct": a.correct, "total": a.total}
            for name, a in results.items()
        ]
        print(json.dumps(rows, indent=1))
    else:
        Console().print(evaluation_table(results, f"Zero-shot accuracy on {images}, %"))
