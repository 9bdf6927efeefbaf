"""``tvjax evaluate``: zero-shot accuracy of CLIPs, one beside the other, or along the scale of a task vector."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tvjax.cli.options import AnyBase, BatchSize, Classes, Images, Json, Quiet, Task, Templates
from tvjax.cli.output import show

if TYPE_CHECKING:
    from tvjax.checkpoints import Pretrained, Processor
    from tvjax.evaluate.accuracy import Predictions

SCALES = ",".join(f"{0.05 * step:g}" for step in range(21))


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="CLIPs: folders or hub ids. A vision tower alone goes with the text tower of the first full CLIP.",
        ),
    ],
    images: Images = None,
    task: Task = None,
    classes: Classes = None,
    templates: Templates = None,
    reference: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="A fine-tuned model: accuracies are given as shares of its own too."),
    ] = None,
    task_vector: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Add this task vector to the one MODEL, at every scale.")
    ] = None,
    scales: Annotated[
        str | None, typer.Option(metavar="NUMBERS", help="Such as 0,0.25,0.5; default: 0 to 1 by 0.05.")
    ] = None,
    any_base: AnyBase = False,
    by_class: Annotated[bool, typer.Option("--by-class", help="Print the accuracy of each class too.")] = False,
    batch_size: BatchSize = 64,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the results as JSON.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw the accuracy by scale, as a PNG (--task-vector).")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Zero-shot accuracy with its 95 % interval (Wilson), and how sure a difference on the same images is.

    With several models every pair is compared: the difference of accuracies with an interval for the same images,
    McNemar's exact test, and how often the two predict the same.
    """
    from tvjax.checkpoints import from_pretrained, load_processor, map_tree
    from tvjax.cli import inputs
    from tvjax.cli.progress import progress
    from tvjax.data.loader import image_batches
    from tvjax.evaluate.accuracy import predictions
    from tvjax.evaluate.scale import scale_curve
    from tvjax.report import records
    from tvjax.tasks.zero_shot import zero_shot_model

    if len(set(models)) < len(models):
        raise ValueError(f"a model is given twice: {', '.join(models)}")
    if task_vector is None and (scales is not None or plot is not None):
        raise ValueError("--scales and --plot are about a task vector: give --task-vector")
    if task_vector is not None and len(models) > 1:
        raise ValueError(f"--task-vector is added to one model, found {len(models)}: {', '.join(models)}")
    grid = read_scales(scales or SCALES)
    for file in (output, plot):
        if file is not None:
            inputs.check_file(file)
    every = [*models, *([reference] if reference is not None else [])]
    full = [name for name in every if inputs.read_clip_config(name).text is not None]
    if not full:
        raise ValueError(f"{every[0]!r} has no text tower to make a zero-shot head from: give a full CLIP first")
    tau, about = map_tree(task_vector) if task_vector is not None else (None, {})
    prompts = inputs.read_prompts(task, classes, templates)
    found = inputs.read_images(inputs.images_of(images, task, "test"), prompts, "an accuracy")
    results: dict[str, Any] = {
        "images": inputs.record(found),
        "classes": found.class_names,
        "templates": prompts.templates,
    }

    for name in full:
        load_processor(name).tokens(found.class_names)  # one that does not fit its model is refused before any is run
    seen: dict[str, Predictions] = {}
    curve: list[Predictions] = []
    base = from_pretrained(full[0]), load_processor(full[0])
    with progress("evaluate", quiet or as_json) as report:
        for number, name in enumerate(dict.fromkeys(every)):
            clip, processor = base if name == full[0] else _with_text(name, *base)
            theta = clip.params if task_vector is None else inputs.float32(clip.params)
            whole = clip.model.replace(params=theta)
            head = zero_shot_model(whole, processor.tokens, found.class_names, prompts.templates)
            loader = image_batches(found, processor.pixels, batch_size)
            if task_vector is not None and name == models[0]:
                inputs.check_base(about, clip, [task_vector], any_base)
                *curve, seen[name] = scale_curve(head, tau, (*grid, 0.0), loader)
            else:
                seen[name] = predictions(head, loader)
            report(number + 1, len(set(every)), name)

    norm = None if reference is None else seen[reference].accuracy
    results["models"] = [{"model": name, **records.of_model(seen[name], found.class_names, norm)} for name in models]
    results["reference"] = None if norm is None else {"model": reference, **records.of_accuracy(norm)}
    results["pairs"] = [
        {"model": two, "baseline": one, **records.of_pair(seen[two], seen[one])}
        for one, two in itertools.combinations(models, 2)
    ]
    if task_vector is not None:
        points = records.of_curve(grid, curve, seen[models[0]], norm)
        best = max(points, key=lambda point: point["accuracy"])  # of those that tie, the smallest scale
        results["curve"] = {"task_vector": str(task_vector), "best_scale": best["scale"], "points": points}
    if output is not None:
        inputs.write_json(output, results)
    if plot is not None:
        from tvjax.report.plots import plot_scale_curve

        title = f"{models[0]} + scale × {task_vector}"
        plot_scale_curve(grid, [at.accuracy for at in curve], plot, title, None if norm is None else norm.fraction)
    said = [f"note: {note}" for note in inputs.notes_of(found)]
    show(results, *said, *_tables(results, by_class), as_json=as_json, quiet=quiet)


def _with_text(name: str, base: Pretrained, its: Processor) -> tuple[Pretrained, Processor]:
    """A CLIP; where the name is one of a vision tower alone, that in the place of the base's own, run with its config.

    Raises:
      ValueError: for a tower that does not fit.
    """
    from tvjax.checkpoints import from_pretrained, load_processor
    from tvjax.models.clip import clip

    loaded, processor = from_pretrained(name), load_processor(name)
    if loaded.config.text is not None:
        return loaded, processor
    try:
        whole = base.with_params({**base.params, "vision": {**base.params["vision"], **loaded.params["vision"]}})
    except ValueError as error:
        raise ValueError(f"{name!r} has no text tower, and does not fit that of {base.name!r}: {error}") from error
    vision = dataclasses.replace(loaded.config.vision, projection_dim=base.config.vision.projection_dim)
    config = dataclasses.replace(base.config, vision=vision)
    whole = dataclasses.replace(whole, model=clip(config, whole.params), config=config, settings=None)
    return whole, dataclasses.replace(its, image_processor=processor.image_processor or its.image_processor)


def read_scales(text: str) -> tuple[float, ...]:
    """The numbers of a text, sorted, each once.

    Raises:
      ValueError: where one is none.

    >>> read_scales("1, 0.5,0")
    (0.0, 0.5, 1.0)
    """
    try:
        found = sorted({float(word) for word in text.split(",")})
    except ValueError as error:
        raise ValueError(f"--scales is {text!r}, expected numbers with commas between them") from error
    if not all(abs(scale) < float("inf") for scale in found):
        raise ValueError(f"--scales is {text!r}, expected finite numbers")
    return tuple(found)


def _tables(results: dict[str, Any], by_class: bool) -> list[Any]:
    from tvjax.report import tables

    source = results["images"]["source"]
    found: list[Any] = [
        tables.evaluation_table(results["models"], f"Zero-shot accuracy on {source}, %", results["reference"])
    ]
    if results["pairs"]:
        found.append(tables.pairs_table(results["pairs"], "Differences on the same images, points (p: McNemar)"))
        found.append(tables.agreement_table(results["pairs"], "Agreement, % of the images"))
    if "curve" in results:
        found.append(tables.curve_table(results["curve"]["points"], f"With {results['curve']['task_vector']}, %"))
        best = results["curve"]["best_scale"]
        found.append(f"best: scale {best:g}; a scale is to be chosen on images that are no test")
    if by_class:
        found.append(tables.class_table(results["models"], "By class, %"))
    return found
