"""``tvjax plan``: what a transport would do, from headers alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tvjax.cli import config as recipes
from tvjax.cli.options import (
    AllowConfigDifferences,
    BatchSize,
    Classes,
    Images,
    Json,
    Options,
    PerClass,
    Quiet,
    Select,
    Task,
    Templates,
)
from tvjax.cli.output import show
from tvjax.cli.transport import (
    Depth,
    Maps,
    Method,
    SaveTaskVector,
    Scale,
    Seed,
    Source,
    Target,
    Tokens,
    Validation,
    check_models,
    make_transport,
    read_calibration,
    read_depth,
    reads_images,
)

BEYOND = "host and device together; runtime, compiled programs and workspace come on top, 1 to 2 GiB on a CPU"

if TYPE_CHECKING:
    from tvjax.checkpoints.folder import Checkpoint
    from tvjax.stages import Batch, Model, PyTree
    from tvjax.transport.plan import Plan


def plan(
    source: Source,
    target: Target,
    method: Method,
    finetuned: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The fine-tuned source; checked where it is given.")
    ] = None,
    images: Images = None,
    task: Task = None,
    count: Annotated[int, typer.Option(min=1, help="Calibration images to reckon with where none are given.")] = 8,
    classes: Classes = None,
    templates: Templates = None,
    options: Options = None,
    scale: Scale = 1.0,
    validation: Validation = None,
    per_class: PerClass = 0,
    select: Select = "random",
    seed: Seed = 0,
    batch_size: BatchSize = 32,
    depth: Depth = "uniform",
    tokens: Tokens = "interpolate",
    maps: Maps = None,
    save_task_vector: SaveTaskVector = None,
    allow_config_differences: AllowConfigDifferences = False,
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Checked, as the transport would; nothing is written.")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Say what tvjax transport would do with these options; no weights are read, and nothing is written.

    What becomes of every leaf, which layers are paired, how tokens are aligned, how many images make the maps unique,
    peak memory and disk. Takes the recipes of tvjax transport too.
    """
    import jax

    from tvjax import tree
    from tvjax.arithmetic import task_vector
    from tvjax.checkpoints.folder import open_checkpoint
    from tvjax.checkpoints.huggingface import check_new
    from tvjax.cli import inputs
    from tvjax.transport.plan import plan as plan_fit

    if output is not None:
        check_new(output)
    if save_task_vector is not None:
        inputs.check_file(save_task_vector)
    moving = make_transport(method, recipes.parse_options(options or ()))
    pairing = read_depth(depth)
    check_models(moving, source, target, finetuned, validation, allow_config_differences)
    prompts = inputs.read_prompts(task, classes, templates)
    found = None
    if reads_images(moving) and (images is not None or task is not None):
        found = read_calibration(moving, inputs.images_of(images, task, "train"), prompts)
        # How many, not which: a choice by embeddings would read the weights.
        found = inputs.draw_images(found, per_class, "random", seed, inputs.embeddings(target, batch_size))
    held_out = None if validation is None else inputs.read_images(validation, prompts, "choosing a scale")
    number = count if found is None else len(found)
    sizes = [min(batch_size, number - start) for start in range(0, number, batch_size)]
    names = len(found.class_names) if found is not None and found.labels is not None else 10
    with open_checkpoint(source) as theirs, open_checkpoint(target) as mine:
        a, b = (tower(checkpoint, names) for checkpoint in (theirs, mine))
        views = [[batch(checkpoint, size, names) for size in sizes] for checkpoint in (theirs, mine)]
        held = [parameters(checkpoint) for checkpoint in (theirs, mine)]
        if finetuned is not None:
            with open_checkpoint(finetuned) as tuned:
                sides = [parameters(checkpoint)["vision"] for checkpoint in (theirs, tuned)]
                if "projection" not in sides[1]:
                    sides[0].pop("projection", None)
                jax.eval_shape(task_vector, *sides)
                held.append(parameters(tuned))
    pairs = list(zip(*views, strict=True)) if reads_images(moving) else []
    found_plan = plan_fit(moving, a, b, pairs, depth=pairing, tokens=tokens)
    result = summary(found_plan, held, [a.params, b.params], number)
    result["disk"] = {"edited model": tree.nbytes(held[1])}
    if maps is not None:
        result["disk"]["maps"] = found_plan.memory["maps"]
    if save_task_vector is not None:
        result["disk"]["task vector"] = tree.nbytes(b.params)
    notes = [*inputs.notes_of(found, held_out), *found_plan.notes]
    show({**result, "notes": notes}, *texts(result, source, target, method), *notes, as_json=as_json, quiet=quiet)


def tower(checkpoint: Checkpoint, classes: int) -> Model:
    """The vision tower with a zero-shot head of so many classes, in shapes; parameters are computed with in float32."""
    import jax
    import jax.numpy as jnp

    from tvjax.models.clip.modeling import vision_model
    from tvjax.tasks.zero_shot import ZERO_SHOT

    whole = checkpoint.family.build(checkpoint.config, parameters(checkpoint))
    model = vision_model(whole)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), model.params)
    width = checkpoint.config.vision.projection_dim
    head = {
        "classifier": jax.ShapeDtypeStruct((width, classes), jnp.float32),
        "logit_scale": jax.ShapeDtypeStruct((), jnp.float32),
    }
    return model.replace(params=params).with_loss(ZERO_SHOT, head)


def batch(checkpoint: Checkpoint, size: int, classes: int) -> Batch:
    """So many images with labels, in shapes."""
    import jax
    import jax.numpy as jnp

    from tvjax.stages import Batch

    side = checkpoint.config.vision.image_size
    pixels = jax.ShapeDtypeStruct((size, side, side, 3), jnp.float32)
    return Batch({"pixels": pixels}, jax.ShapeDtypeStruct((size,), jnp.int32))


def parameters(checkpoint: Checkpoint) -> PyTree:
    """The parameters of a checkpoint, in shapes."""
    import jax

    from tvjax import tree
    from tvjax.checkpoints.safetensors import numpy_dtype

    keys = {path: source.key for path, source in checkpoint.sources.items()}
    headers = checkpoint.tensors.headers
    leaves = {
        path: jax.ShapeDtypeStruct(shape, numpy_dtype(keys[path], headers[keys[path]]))
        for path, shape in checkpoint.shapes.items()
    }
    return tree.nest(leaves)


def converted(held: PyTree, tower: PyTree) -> int:
    """Bytes of the float32 parameters of a tower that are stored in another dtype; the others are not held twice."""
    from tvjax import tree

    stored = tree.flatten(held)
    return tree.nbytes([leaf for path, leaf in tree.flatten(tower).items() if stored[path].dtype != leaf.dtype])


def summary(found: Plan, held: list[PyTree], towers: list[PyTree], images: int) -> dict[str, Any]:
    """A plan as a record.

    Args:
      found: the plan of the fit.
      held: source, target and fine-tuned model as stored, in shapes.
      towers: source and target as they are computed with, in shapes.
      images: how many there are.
    """
    from tvjax import tree

    maps = [planned for stage in found.stages for planned in stage.maps]
    fit = found.memory
    tau, moved = map(tree.nbytes, towers)
    read = tree.nbytes(held) + sum(converted(*sides) for sides in zip(held, towers, strict=False))
    return {
        "leaves": [
            {"link": x.link, "target": x.target, "source": x.source, "action": x.action, "why": x.why}
            for x in found.leaves
        ],
        "stages": [
            {
                "target": stage.target,
                "source": stage.source,
                "tokens": stage.tokens,
                "maps": [planned._asdict() for planned in stage.maps],
            }
            for stage in found.stages
        ],
        "images": {
            "count": images,
            "for unique maps of tokens": max((m.examples for m in maps if m.rows > images), default=0),
            "for unique maps of one row an image": max((m.examples for m in maps if m.rows <= images), default=0),
            "maps": len(maps),
            "maps not unique": sum(planned.rows < min(planned.shape) for planned in maps),
        },
        "memory": {
            "reading": read,
            "fitting": read + tau + sum(fit[name] for name in ("residual streams", "largest stage", "maps")),
            "applying": read + tau + fit["maps"] + moved + tree.nbytes(held[1]),
        },
        "memory of the fit": fit,
    }


def texts(result: dict[str, Any], source: str, target: str, method: str) -> list[Any]:
    """The record for people."""
    from rich.table import Table

    leaves = Table("link", "what becomes of a leaf", "leaves", "such as", title=f"{source} to {target} by {method}")
    actions = Counter((x["link"], x["action"], x["why"]) for x in result["leaves"])
    for (link, action, why), number in actions.items():
        example = next(
            x["target"] or x["source"]
            for x in result["leaves"]
            if (x["link"], x["action"], x["why"]) == (link, action, why)
        )
        leaves.add_row(link, f"{action}: {why}" if why else action, str(number), example)
    memory = Table("peak memory of arrays", "", caption=BEYOND)
    for step, size in result["memory"].items():
        memory.add_row(step, readable(size))
    for name, size in result["memory of the fit"].items():
        memory.add_row(f"  {name}", readable(size))
    layers = [stage["source"].rpartition("/")[2] for stage in result["stages"]]
    lines = [f"source layers of the target's {len(layers)} stages: {' '.join(layers)}"]
    tokens = {tuple(stage["tokens"]) for stage in result["stages"] if stage["tokens"]}
    lines += [f"tokens: {a} in the source, {b} in the target, compared on {c}" for a, b, c in sorted(tokens)]
    images = result["images"]
    if images["maps"]:
        needed = images["for unique maps of tokens"], images["for unique maps of one row an image"]
        lines.append(
            f"{images['count']} images: {images['maps not unique']} of {images['maps']} maps are not unique; those of "
            f"tokens are from {needed[0]} images on, those of one row an image from {needed[1]}"
        )
    lines += [f"disk: {name} {readable(size)}" for name, size in result["disk"].items()]
    return [leaves, memory, *lines]


def readable(size: int) -> str:
    """A number of bytes for people.

    >>> readable(1_500_000), readable(3 * 2**30)
    ('1.4 MiB', '3.0 GiB')
    """
    return f"{size / 2**20:.1f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"
