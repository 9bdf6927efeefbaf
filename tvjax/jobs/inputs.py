"""What jobs read beside models: examples, class names, prompts; and where they may write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from tvjax.checkpoints import Pretrained
from tvjax.checkpoints.huggingface import check_writable
from tvjax.checkpoints.provenance import check_made_for, check_same_config
from tvjax.data.batches import few_shot, herding, k_medoids
from tvjax.data.examples import Examples
from tvjax.data.images import Images
from tvjax.data.loader import Loader
from tvjax.data.source import open_examples
from tvjax.data.texts import Texts
from tvjax.jobs.asking import Prompts, asking
from tvjax.jobs.configs import Examples as Asked
from tvjax.jobs.opened import Opened
from tvjax.kinds import kind_of
from tvjax.tasks.catalogue import find_task


def read_prompts(config: Asked, models: Sequence[Opened]) -> Prompts:
    """Class names and prompts: of the files, or else of the task, or else of the examples and the default prompt.

    Raises:
      ValueError: models that take examples of other kinds, no such task, no such file, or an empty one.
    """
    ways = [asking(model) for model in models]
    for model, way in zip(models, ways, strict=True):
        if way.kind is not ways[0].kind:
            raise ValueError(
                f"{models[0].name!r} takes {ways[0].kind.kind} and {model.name!r} {way.kind.kind}: give models of one "
                "kind of examples"
            )
    known = None if config.task is None else find_task(config.task)
    if known is not None and known.kind != ways[0].kind.kind:
        raise ValueError(_other_kind(f"the task {config.task!r}", known.kind, ways[0].kind, models))
    names = None if known is None else known.class_names or None
    prompts = next((way.templates for way in ways if way.templates), ())
    if known is not None and not (known.kind == "texts" and prompts):  # whose prompts ask language models
        prompts = known.templates
    if config.classes is not None:
        names = read_lines(config.classes, "class names")
    if config.templates is not None:
        prompts = read_lines(config.templates, "prompts")
    length = min(way.length(model, config.length) for model, way in zip(models, ways, strict=True))
    return Prompts(names, prompts, length)


def place_of(data: str | None, task: str | None, split: Literal["train", "test"]) -> str:
    """Where the examples are: what the option says, or else the task.

    Raises:
      ValueError: where neither says it.
    """
    if data is not None:
        return data
    place = getattr(find_task(task), split) if task is not None else ""
    if not place:
        raise ValueError(
            "give --data, or --task with one of the datasets that are on the hub"
            if task is None
            else f"the task {task!r} has images of many kinds: give --data too"
        )
    return str(place)


def read_examples(source: str, prompts: Prompts, models: Sequence[Opened], labelled_for: str = "") -> Images | Texts:
    """The examples that an option names, images not decoded yet.

    Args:
      source: as `tvjax.data.open_examples` takes it.
      prompts: with the names of the classes.
      models: that take them.
      labelled_for: what needs the classes; "" where nothing does.

    Raises:
      ValueError: no such examples, of another kind than the models take, or no classes though they are needed.
    """
    found, way = open_examples(source, prompts.class_names), asking(models[0])
    if not isinstance(found, way.kind):
        raise ValueError(_other_kind(repr(source), found.kind, way.kind, models))
    if labelled_for and way.needs_labels and found.labels is None:
        raise ValueError(
            f"{source!r} has no labels, and {labelled_for} needs labelled {way.kind.kind}: {way.labelling}, or give an "
            "archive or dataset with labels"
        )
    if labelled_for and found.labels is None and found.class_names:
        raise ValueError(
            f"{source!r} has no labels, and {labelled_for} of classes needs them: say which column has them "
            "(label=COLUMN), or leave --classes and --task out to be asked for the next tokens"
        )
    return found


def _other_kind(what: str, found: str, wanted: type[Examples], models: Sequence[Opened]) -> str:
    name = kind_of(models[0].config)
    return f"{what} is of {found}, and this command takes {wanted.kind} for {models[0].name!r}, {name}"


def draw(
    found: Images | Texts, per_class: int, select: str, seed: int, features: Callable[[Any], np.ndarray]
) -> Images | Texts:
    """So many examples of each class; 0 for all.

    Args:
      found: the examples.
      per_class: how many of each class.
      select: ``random``, ``herding`` or ``k_medoids``.
      seed: of the random key.
      features: of all examples ``[n, d]``; called for herding and k-medoids only.

    Raises:
      ValueError: where a class has fewer, or there are no classes.
    """
    if not per_class:
        if select != "random":
            raise ValueError(f"--select {select} chooses some examples of each class: say how many with --per-class")
        return found
    if found.labels is None:
        raise ValueError(f"--per-class needs labelled examples, and {found.name!r} has no labels")
    key = jax.random.key(seed)
    chosen = few_shot(found.labels, per_class, key)  # raises where a class has fewer, before any example is read
    if select == "herding":
        chosen = herding(features(found), found.labels, per_class)
    elif select == "k_medoids":
        chosen = k_medoids(features(found), found.labels, per_class, key)
    return found.take(chosen)


def record(found: Images | Texts) -> dict[str, Any]:
    """What a result says of the examples that it rests on; all are read, and what is no image is found.

    Raises:
      ValueError: for an image that is empty or none.
    """
    return {"source": found.name, "count": len(found), "sha256": found.sha256(), "notes": list(found.notes)}


def notes_of(*read: Images | Texts | Loader | None) -> list[str]:
    """What a user should know of how examples, and batches of them, were read, each said once."""
    said = [found for found in read if found is not None]
    names = [found.examples.name if isinstance(found, Loader) else found.name for found in said]
    return list(dict.fromkeys(f"{name}: {note}" for name, one in zip(names, said, strict=True) for note in one.notes))


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


def check_file(file: Path, kind: str = "") -> None:
    """Raises a ValueError where an output file cannot be written, before anything heavy is done.

    Args:
      file: the output.
      kind: how names of its kind end; a file of tensors is not replaced by one of another kind.
    """
    if kind and file.suffix == ".safetensors" != kind:
        raise ValueError(f"the output {str(file)!r} has the name of a file of tensors: give one that ends in {kind}")
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise ValueError(f"the output {str(file)!r} is a folder, or its folder does not exist: give the name of a file")
    check_writable(file, file.absolute().parent)


def check_base(metadata: Mapping[str, str], base: Pretrained, files: Sequence[Path], any_base: bool) -> None:
    """Raises a ValueError where task vectors were made for other weights or another config, unless `any_base`."""
    names = [str(file) for file in files]
    check_same_config(metadata, base, names, any_base)
    check_made_for(metadata, base.name, base.identity()["base_fingerprint"], names, any_base)


def about_model(model: Pretrained) -> dict[str, str]:
    """What a model card says of a model that took part."""
    return {key.removeprefix("base_"): value for key, value in model.identity().items() if value}
