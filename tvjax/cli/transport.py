"""``tvjax transport``: one task vector moved into another CLIP."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tvjax.cli import config as recipes
from tvjax.cli.options import (
    LARGEST_SEED,
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
    finite,
)
from tvjax.cli.output import show

if TYPE_CHECKING:
    from tvjax.cli.inputs import Prompts
    from tvjax.data import images as data
    from tvjax.models.clip.config import CLIPConfig
    from tvjax.transport import State, Transport

NAMES = ("naive", "orthogonal_shift", "gradfix", "theseus", "bico")
SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "image_size", "patch_size", "projection_dim")


Source = Annotated[str, typer.Option(metavar="MODEL", help="The pre-trained source: folder, hub id or id@revision.")]
FineTuned = Annotated[str, typer.Option(metavar="MODEL", help="The fine-tuned source; its vision tower suffices.")]
Target = Annotated[str, typer.Option(metavar="MODEL", help="The model to move the task into.")]
Method = Annotated[str, typer.Option(help=f"One of {', '.join(NAMES)}; or a chain such as bico+gradfix.")]
Scale = Annotated[float, typer.Option(help="Factor of the moved task vector.", callback=finite)]
Validation = Annotated[
    str | None,
    typer.Option(metavar="IMAGES", help="Labelled images on which the scale is chosen, in the place of --scale."),
]
Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of that draw.")]
Depth = Annotated[
    str,
    typer.Option(help="Source layer of each target layer: uniform, cka (by likeness), or a list such as 0,0,1,1."),
]
Tokens = Annotated[
    Literal["interpolate", "class_token", "mean"],
    typer.Option(help="How activations are compared where the patch grids differ."),
]
Maps = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Keep the fitted maps here, stage by stage: an interrupted run goes on, and a later one, with another "
        "scale or another fine-tuned model, starts from them.",
    ),
]
SaveTaskVector = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Also write the moved task vector, unscaled, for the target.")
]


def transport(
    context: typer.Context,
    source: Source,
    finetuned: FineTuned,
    target: Target,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the edited target goes.")],
    method: Method,
    images: Images = None,
    task: Task = None,
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
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Move what a fine-tuning learned into another CLIP, and save the edited model with a report by leaf."""
    from tvjax import tree
    from tvjax.arithmetic import apply
    from tvjax.checkpoints import (
        TransportStore,
        from_pretrained,
        load_processor,
        model_card,
        save_pretrained,
        save_tree,
    )
    from tvjax.checkpoints.huggingface import check_new
    from tvjax.cli import inputs
    from tvjax.cli.progress import progress
    from tvjax.data.loader import image_batches
    from tvjax.evaluate.scale import choose_scale
    from tvjax.models.clip.modeling import vision_model
    from tvjax.tasks.zero_shot import zero_shot_model
    from tvjax.transport import fit

    given = recipes.parse_options(options or ())
    check_new(output)
    if save_task_vector is not None:
        inputs.check_file(save_task_vector)
    moving = make_transport(method, given)
    pairing = read_depth(depth)
    allowed = check_models(moving, source, target, finetuned, validation, allow_config_differences)
    prompts = inputs.read_prompts(task, classes, templates)
    found = None
    if reads_images(moving):
        if images is None and task is None:
            raise ValueError(f"{moving.name} looks at calibration images: give --images")
        found = read_calibration(moving, inputs.images_of(images, task, "train"), prompts)
        found = inputs.draw_images(found, per_class, select, seed, inputs.embeddings(target, batch_size))
    held_out = None if validation is None else inputs.read_images(validation, prompts, "choosing a scale")
    looked_at = None if found is None else inputs.record(found)
    about: dict[str, object] = {"images": looked_at}

    loaded, towers, views = [], [], []
    for name in (source, target):
        pretrained = from_pretrained(name)
        tower = vision_model(pretrained.model)
        if found is not None:
            processor = load_processor(name)
            if moving.needs_gradients:
                tower = zero_shot_model(pretrained.model, processor.tokens, found.class_names, prompts.templates)
            views.append(list(image_batches(found, processor.pixels, batch_size)))
        loaded.append(pretrained)
        towers.append(tower.replace(params=inputs.float32(tower.params)))
    (base, receiver), (a, b) = loaded, towers
    tuned = from_pretrained(finetuned)
    tau = inputs.vision_task_vector(base, tuned)
    store = None
    if maps is not None:
        depends_on = {"method": method, "options": json.dumps(given, sort_keys=True), "batch size": str(batch_size)}
        depends_on |= {"depth": depth, "tokens": tokens}
        for side, model in (("source", base), ("target", receiver)):
            identity = model.identity()
            depends_on |= {side: identity["base_fingerprint"], f"{side} config": identity["base_config"]}
        if looked_at is not None:
            depends_on["images"] = looked_at["sha256"]
        if found is not None and moving.needs_gradients:
            depends_on |= {"classes": json.dumps(found.class_names), "prompts": json.dumps(prompts.templates)}
        store = TransportStore(maps, depends_on)
    with progress(moving.name, quiet or as_json) as report:
        pairs = list(zip(*views, strict=True)) if views else []
        state = fit(moving, a, b, pairs, depth=pairing, tokens=tokens, progress=report, store=store)
    state = dataclasses.replace(state, notes=(*state.notes, *allowed, *inputs.notes(base, tuned)))
    moved = moving.apply(state, tau)
    chosen = None
    if held_out is not None:
        processor = load_processor(target)
        whole = receiver.model.replace(params=inputs.float32(receiver.params))
        head = zero_shot_model(whole, processor.tokens, held_out.class_names, prompts.templates)
        chosen = choose_scale(head, moved, scales_of(moving), image_batches(held_out, processor.pixels, batch_size))
        scale = chosen.scale
    card = model_card(
        output.name,
        f"What a fine-tuning taught the source was moved into the base model by {method}, without training.",
        receiver.identity(),
        inputs={name: inputs.about_model(model) for name, model in ((source, base), (finetuned, tuned))},
        settings={"method": method, "scale": scale, "depth": depth, "tokens": tokens, **given},
        results=None if looked_at is None else {"images": looked_at},
    )
    save_pretrained(receiver.with_params(apply(receiver.params, moved, scale)), output, card=card)
    norms = {"source": float(tree.norm(tau)), "target": float(tree.norm(moved))}
    about |= {"method": method, "scale": scale}
    about |= {"source": source, "finetuned": finetuned, "target": target}
    if chosen is not None and held_out is not None:
        curve = {"scales": chosen.scales.tolist(), "accuracy": chosen.curve.tolist()}
        about["validation"] = {**inputs.record(held_out), **curve}
    about["norms"] = norms
    write_report(output, state, about)
    recipes.write(context, output)
    if save_task_vector is not None:
        save_tree(save_task_vector, moved, receiver.identity())
    notes = [*inputs.notes_of(found, held_out), *state.notes]
    show(
        {**about, "output": output, "notes": notes},
        *(f"note: {note}" for note in notes),
        f"{output}: {target} with {scale:g} times the task of {finetuned}, moved by {method}",
        f"norm {norms['source']:.4g} in the source, {norms['target']:.4g} in the target; by leaf: leaf_report.txt",
        as_json=as_json,
        quiet=quiet,
    )


def check_models(
    moving: Transport,
    source: str,
    target: str,
    finetuned: str | None = None,
    validation: str | None = None,
    allow_config_differences: bool = False,
) -> tuple[str, ...]:
    """Raises a ValueError where the configs of the models show that the transport cannot be; no weight is read.

    Returns:
      A note where source and fine-tuned source differ in what they compute, and that is allowed.
    """
    from tvjax.checkpoints import provenance
    from tvjax.cli import inputs

    base = inputs.read_clip_config(source)
    check_configs(moving, base, inputs.read_clip_config(target), source, target)
    if validation is not None and inputs.read_clip_config(target).text is None:
        raise ValueError(f"--validation needs a zero-shot head, but {target!r} has no text tower: give the full CLIP")
    if finetuned is None:
        return ()
    configs = (base, inputs.read_clip_config(finetuned))
    return provenance.check_configs((source, finetuned), configs, "vision", allow_config_differences)


def read_depth(text: str) -> str | list[int]:
    """The depth pairing that an option names.

    Raises:
      ValueError: neither a rule nor a list of layers.

    >>> read_depth("0, 0, 1")
    [0, 0, 1]
    """
    if text in ("uniform", "cka"):
        return text
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--depth is {text!r}, expected uniform, cka, or source layers such as 0,0,1,1") from error


def read_calibration(moving: Transport, place: str, prompts: Prompts) -> data.Images:
    """The calibration images of a transport, none of them decoded yet.

    Raises:
      ValueError: no such images, or no labels though the transport reads gradients.
    """
    from tvjax.cli import inputs

    found = inputs.read_images(place, prompts)
    if moving.needs_gradients and found.labels is None:
        raise ValueError(
            f"{place!r} has no labels, and {moving.name} reads gradients of the zero-shot loss: put the images of each "
            "class into a folder of its name, or take theseus, which needs no labels"
        )
    return found


def scales_of(moving: Transport) -> tuple[float, ...]:
    """The grid of scales: 0 to 5 where a task vector is rotated, else 0 to 1."""
    from tvjax.compose.tuned import SCALES

    rotated = any(link.space == "bridge" and not link.same_shapes for link in moving.links)
    return SCALES if rotated else tuple(round(0.05 * step, 2) for step in range(21))


def make_transport(method: str, options: Mapping[str, Any] | None = None) -> Transport:
    """The transport of a name, or the chain of several joined by ``+``.

    Args:
      method: the names.
      options: hyperparameters; those of one link of a chain by ``link.name``.

    Raises:
      ValueError: an unknown name or hyperparameter, or links in an order that cannot be.

    >>> make_transport("bico+gradfix", {"bico.rank": 0.5}).name
    'bico+gradfix'
    """
    from tvjax import transport as methods

    makers = (methods.identity, methods.orthogonal_shift, methods.gradfix, methods.theseus, methods.bico)
    known = dict(zip(NAMES, makers, strict=True))
    unknown = [name for name in method.split("+") if name not in known]
    if unknown:
        raise ValueError(f"there is no method {unknown[0]!r}: choose among {', '.join(NAMES)}, or join some by '+'")
    names = method.split("+")
    settings: dict[str, dict[str, Any]] = {name: {} for name in names}
    for option, value in (options or {}).items():
        link, dot, key = option.rpartition(".")
        if dot and link not in settings:
            raise ValueError(f"the option {option!r} is of {link!r}, which is not in {method!r}")
        if not dot and len(names) > 1:
            raise ValueError(f"say whose option {option!r} is: {' or '.join(f'{name}.{option}' for name in names)}")
        settings[link or names[0]][key] = value
    if settings.get("naive"):
        raise ValueError(f"naive has no options, found {', '.join(map(repr, settings['naive']))}")
    return methods.chain(*(known[name](**settings[name]) for name in names))


def reads_images(moving: Transport) -> bool:
    """Whether a link of the transport looks at calibration images."""
    return any(link.reads.activations or link.reads.gradients for link in moving.links)


def check_configs(moving: Transport, source: CLIPConfig, target: CLIPConfig, *names: str) -> None:
    """Raises a ValueError where the configs alone show that the transport cannot be.

    Args:
      moving: the transport.
      source: config of the source.
      target: config of the target.
      *names: of source and target, for the message.
    """
    if moving.needs_gradients:
        for config, name in zip((source, target), names, strict=True):
            if config.text is None:
                raise ValueError(
                    f"{moving.name} reads gradients of the zero-shot loss, but {name!r} has no text tower: "
                    "give the full CLIP"
                )
    if any(link.space == "bridge" and not link.same_shapes for link in moving.links):
        return
    for field in SHAPE:
        theirs, mine = (getattr(config.vision, field) for config in (source, target))
        if mine != theirs:
            raise ValueError(
                f"{moving.name} needs towers of one shape: {field} is {theirs} in {names[0]!r} and {mine} in "
                f"{names[1]!r}; theseus and bico move across shapes, and gradfix may follow one of them (bico+gradfix)"
            )


def write_report(folder: Path, state: State, about: dict[str, object]) -> None:
    """Writes ``leaf_report.txt`` and ``leaf_report.json`` into a folder."""
    from tvjax.checkpoints.atomic import replacing
    from tvjax.transport import leaf_report, summary

    content = {**about, "notes": state.notes, "leaves": [leaf._asdict() for leaf in leaf_report(state)]}
    texts = {"leaf_report.txt": summary(state), "leaf_report.json": json.dumps(content, indent=1)}
    for name, text in texts.items():
        with replacing(folder / name) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
