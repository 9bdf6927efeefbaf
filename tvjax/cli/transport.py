"""``tvjax transport``: one task vector moved into another CLIP."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tvjax.cli.options import BatchSize, Classes, Quiet, Templates

if TYPE_CHECKING:
    from tvjax.models.clip.config import CLIPConfig
    from tvjax.transport import State, Transport

NAMES = ("naive", "orthogonal_shift", "gradfix", "theseus", "bico")
SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "image_size", "patch_size", "projection_dim")


def transport(
    source: Annotated[str, typer.Option(metavar="MODEL", help="The pre-trained source: folder or hub id.")],
    finetuned: Annotated[str, typer.Option(metavar="MODEL", help="The fine-tuned source; its vision tower suffices.")],
    target: Annotated[str, typer.Option(metavar="MODEL", help="The model to move the task into.")],
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the edited target goes.")],
    method: Annotated[str, typer.Option(help=f"One of {', '.join(NAMES)}; or a chain such as bico+gradfix.")],
    images: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Calibration images, in one folder a class.")
    ] = None,
    classes: Classes = None,
    templates: Templates = None,
    scale: Annotated[float, typer.Option(help="Factor of the moved task vector.")] = 1.0,
    per_class: Annotated[int, typer.Option(min=0, help="Images of each class to draw; 0: all.")] = 0,
    seed: Annotated[int, typer.Option(help="Of that draw.")] = 0,
    batch_size: BatchSize = 32,
    save_maps: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the fitted maps.")] = None,
    quiet: Quiet = False,
) -> None:
    """Move what a fine-tuning learned into another CLIP, and save the edited model with a report by leaf."""
    from tvjax import tree
    from tvjax.arithmetic import apply
    from tvjax.checkpoints import from_pretrained, load_processor, save_pretrained, save_state
    from tvjax.cli import inputs
    from tvjax.cli.progress import progress
    from tvjax.evaluate.zero_shot import zero_shot_model
    from tvjax.models.clip.modeling import vision_model
    from tvjax.stages import Batch
    from tvjax.transport import fit

    moving = make_transport(method)
    inputs.check_output(output)
    if save_maps is not None:
        inputs.check_file(save_maps)
    check_configs(moving, inputs.read_clip_config(source), inputs.read_clip_config(target), source, target)
    inputs.read_clip_config(finetuned)
    found = inputs.Images([], None, ())
    if reads_images(moving):
        if images is None:
            raise ValueError(f"{moving.name} looks at calibration images: give --images")
        found = inputs.read_images(images, classes, moving.name if moving.needs_gradients else "")
        found = inputs.draw_images(found, per_class, seed)
    prompts = inputs.read_templates(templates)

    loaded, towers, views = [], [], []
    for name in (source, target):
        pretrained = from_pretrained(name)
        tower = vision_model(pretrained.model)
        if found.images:
            processor = load_processor(name)
            if moving.needs_gradients:
                tower = zero_shot_model(pretrained.model, processor.tokens, found.class_names, prompts)
            parts = found.parts(batch_size)
            views.append([Batch({"pixels": processor.pixels(part)}, labels) for part, labels in parts])
        loaded.append(pretrained)
        towers.append(tower.replace(params=inputs.float32(tower.params)))
    (base, receiver), (a, b) = loaded, towers
    tuned = from_pretrained(finetuned)
    tau = inputs.vision_task_vector(base, tuned)
    with progress(moving.name, quiet) as report:
        state = fit(moving, a, b, [(x, y) for x, y in zip(*views, strict=True)] if views else [], progress=report)
    state = dataclasses.replace(state, notes=(*state.notes, *inputs.notes(base, tuned)))
    moved = moving.apply(state, tau)
    save_pretrained(receiver.with_params(apply(receiver.params, moved, scale)), output)
    norms = {"source": float(tree.norm(tau)), "target": float(tree.norm(moved))}
    about = {"method": method, "scale": scale, "source": source, "finetuned": finetuned, "target": target}
    write_report(output, state, {**about, "images": len(found.images), "norms": norms})
    if save_maps is not None:
        save_state(save_maps, state)
    if quiet:
        return
    for note in state.notes:
        print(f"note: {note}")
    print(f"{output}: {target} with {scale:g} times the task of {finetuned}, moved by {method}")
    print(f"norm {norms['source']:.4g} in the source, {norms['target']:.4g} in the target; by leaf: leaf_report.txt")


def make_transport(method: str) -> Transport:
    """The transport of a name, or the chain of several joined by ``+``.

    Raises:
      ValueError: an unknown name, or links in an order that cannot be.

    >>> make_transport("bico+gradfix").name
    'bico+gradfix'
    """
    from tvjax import transport as methods

    makers = (methods.identity, methods.orthogonal_shift, methods.gradfix, methods.theseus, methods.bico)
    known = dict(zip(NAMES, makers, strict=True))
    unknown = [name for name in method.split("+") if name not in known]
    if unknown:
        raise ValueError(f"there is no method {unknown[0]!r}: choose among {', '.join(NAMES)}, or join some by '+'")
    return methods.chain(*(known[name]() for name in method.split("+")))


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
