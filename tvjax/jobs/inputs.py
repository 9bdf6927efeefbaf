"""What jobs read beside models: examples, class names, prompts; and where they may write."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from tvjax.checkpoints import Pretrained
from tvjax.checkpoints.atomic import replacing
from tvjax.checkpoints.provenance import check_made_for, check_same_config
from tvjax.data.batches import few_shot, herding, k_medoids
from tvjax.data.images import Images
from tvjax.data.source import open_examples
from tvjax.tasks.catalogue import find_task
from tvjax.tasks.zero_shot import TEMPLATES


class Prompts(NamedTuple):
    """What the classes are called.

    Attributes:
      class_names: names of the classes; None: those that the images have.
      templates: prompts with ``{}`` in place of the name.
    """

    class_names: tuple[str, ...] | None
    templates: tuple[str, ...]


def read_prompts(task: str | None, classes: Path | None, templates: Path | None) -> Prompts:
    """Class names and prompts: of the files, or else of the task, or else of the images and the default prompt.

    Raises:
      ValueError: no such task, no such file, or an empty one.
    """
    known = None if task is None else find_task(task)
    if known is not None and known.kind != "images":
        raise ValueError(f"the task {task!r} is of {known.kind}, and this command takes images")
    names = None if known is None else known.class_names
    prompts = TEMPLATES if known is None else known.templates
    if classes is not None:
        names = read_lines(classes, "class names")
    return Prompts(names, prompts if templates is None else read_lines(templates, "prompts"))


def images_of(images: str | None, task: str | None, split: Literal["train", "test"]) -> str:
    """Where the images are: what the option says, or else the task.

    Raises:
      ValueError: where neither says it.
    """
    if images is not None:
        return images
    place = getattr(find_task(task), split) if task is not None else ""
    if not place:
        raise ValueError(
            "give --images, or --task with one of the datasets that are on the hub"
            if task is None
            else f"the task {task!r} has images of many kinds: give --images too"
        )
    return str(place)


def read_images(source: str, prompts: Prompts, labelled_for: str = "") -> Images:
    """The images that an option names, none of them decoded yet.

    Args:
      source: as `tvjax.data.open_examples` takes it.
      prompts: with the names of the classes.
      labelled_for: what needs the classes; "" where nothing does.

    Raises:
      ValueError: no such images, or no classes though they are needed.
    """
    found = open_examples(source, prompts.class_names)
    if not isinstance(found, Images):
        raise ValueError(f"{source!r} is of {found.kind}, and this command takes images")
    if labelled_for and found.labels is None:
        raise ValueError(
            f"{source!r} has no labels, and {labelled_for} needs labelled images: put those of each class into a "
            "folder of its name, or give an archive or dataset with labels"
        )
    return found


def draw_images(
    found: Images, per_class: int, select: str, seed: int, features: Callable[[Images], np.ndarray]
) -> Images:
    """So many images of each class; 0 for all.

    Args:
      found: the images.
      per_class: how many of each class.
      select: ``random``, ``herding`` or ``k_medoids``.
      seed: of the random key.
      features: of all images ``[n, d]``; called for herding and k-medoids only.

    Raises:
      ValueError: where a class has fewer, or there are no classes.
    """
    if not per_class:
        if select != "random":
            raise ValueError(f"--select {select} chooses some images of each class: say how many with --per-class")
        return found
    if found.labels is None:
        raise ValueError("--per-class needs labelled images: put those of each class into a folder of its name")
    key = jax.random.key(seed)
    chosen = few_shot(found.labels, per_class, key)  # raises where a class has fewer, before any image is read
    if select == "herding":
        chosen = herding(features(found), found.labels, per_class)
    elif select == "k_medoids":
        chosen = k_medoids(features(found), found.labels, per_class, key)
    return found.take(chosen)


def record(found: Images) -> dict[str, Any]:
    """What a result says of the images that it rests on; all are read, and what is no image is found.

    Raises:
      ValueError: for an image that is empty or none.
    """
    return {"source": found.name, "count": len(found), "sha256": found.sha256(), "notes": list(found.notes)}


def notes_of(*images: Images | None) -> list[str]:
    """What a user should know of how images were read, each said once."""
    return list(dict.fromkeys(f"{found.name}: {note}" for found in images if found is not None for note in found.notes))


def left(reasons: Mapping[str, str]) -> list[str]:
    """What to say of tensors that take no part, by reason.

    >>> left({"ids": "I64, no parameter", "mask": "I64, no parameter"})
    ['2 tensors take no part (I64, no parameter): ids, mask']
    """
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    return [
        f"{len(names)} tensor{'s take' if len(names) > 1 else ' takes'} no part ({reason}): {', '.join(names[:3])}"
        + (", ..." if len(names) > 3 else "")
        for reason, names in by_reason.items()
    ]


def read_lines(file: Path, what: str) -> tuple[str, ...]:
    """The lines of a text file that are not blank."""
    if not file.is_file():
        raise ValueError(f"there is no file {str(file)!r} of {what}")
    lines = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    if not lines:
        raise ValueError(f"{str(file)!r} is empty: write {what} into it, one a line")
    return lines


def write_json(file: Path, content: Any) -> None:
    """Writes a file of JSON, complete or not at all."""
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def check_file(file: Path) -> None:
    """Raises a ValueError where an output file cannot be written, before anything heavy is done."""
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise ValueError(f"the output {str(file)!r} is a folder, or its folder does not exist: give the name of a file")


def check_base(metadata: Mapping[str, str], base: Pretrained, files: Sequence[Path], any_base: bool) -> None:
    """Raises a ValueError where task vectors were made for other weights or another config, unless `any_base`."""
    names = [str(file) for file in files]
    check_same_config(metadata, base, names, any_base)
    check_made_for(metadata, base.name, base.identity()["base_fingerprint"], names, any_base)


def about_model(model: Pretrained) -> dict[str, str]:
    """What a model card says of a model that took part."""
    return {key.removeprefix("base_"): value for key, value in model.identity().items() if value}
