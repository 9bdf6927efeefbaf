"""Accuracies of models on the same examples, one beside the other, or along the scale of a task vector."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from tvjax.checkpoints import map_tree
from tvjax.data.images import Images
from tvjax.data.loader import image_batches
from tvjax.evaluate.accuracy import Accuracy, Predictions, predictions
from tvjax.evaluate.scale import scale_curve
from tvjax.jobs import inputs
from tvjax.jobs.calibration import of_head
from tvjax.jobs.configs import EvaluateConfig
from tvjax.jobs.opened import Models, Opened
from tvjax.jobs.parts import check_labels, has_head, head_labels, sees, with_task
from tvjax.jobs.schema import Progress
from tvjax.models.clip import clip
from tvjax.report import records
from tvjax.report.plots import plot_scale_curve
from tvjax.stages import Model

SCALES = ",".join(f"{0.05 * step:g}" for step in range(21))


class Evaluated(NamedTuple):
    """What `evaluate` measured.

    Attributes:
      images: the examples.
      classes: their names.
      templates: the prompts; none where every model has a head of its own.
      models: accuracy of each model, in whole and by class.
      reference: accuracy of the reference.
      pairs: each two models on the same examples.
      curve: accuracy at every scale of a task vector, and the best.
      notes: what the user should know.
    """

    images: dict[str, Any]
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    models: list[dict[str, Any]]
    reference: dict[str, Any] | None
    pairs: list[dict[str, Any]]
    curve: dict[str, Any] | None
    notes: tuple[str, ...]


def evaluate(config: EvaluateConfig, progress: Progress | None = None) -> Evaluated:
    """Accuracy with its 95 % interval (Wilson), zero-shot or by a model's own head, and how sure a difference is.

    Args:
      config: the models and the examples.
      progress: called after every model.

    Raises:
      ValueError: what cannot be; before any weight is read where configs and files show it.
    """
    grid = read_scales(config.scales or SCALES)
    for file in (config.output, config.plot):
        if file is not None:
            inputs.check_file(file)
    with Models() as models:
        names = list(dict.fromkeys((*config.models, *([config.reference] if config.reference else []))))
        opened = {name: models[name] for name in names}
        base = _base(opened)
        prompts = inputs.read_prompts(config.task, config.classes, config.templates)
        headed = next((one for one in opened.values() if head_labels(one)), None)
        if headed is not None and config.classes is None:
            prompts = of_head(headed, prompts)
        tau, about = map_tree(config.task_vector) if config.task_vector is not None else (None, {})
        place = inputs.images_of(config.data, config.task, "test")
        found = inputs.read_images(place, prompts, "an accuracy")
        looked_at = inputs.record(found)
        for one in opened.values():
            check_labels(one, found.class_names, config.classes is not None)
            if head_labels(one) is None and has_head(one):  # a tokenizer that does not fit is refused before a run
                one.processor.tokens(found.class_names)
        seen: dict[str, Predictions] = {}
        curve: list[Predictions] = []
        for number, (name, one) in enumerate(opened.items()):
            head, pixels = _head(one, base, found.class_names, prompts.templates)
            loader = image_batches(found, pixels, config.batch_size)
            if config.task_vector is not None and name == config.models[0]:
                inputs.check_base(about, one.pretrained, [config.task_vector], config.any_base)
                *curve, seen[name] = scale_curve(head, tau, (*grid, 0.0), loader)
            else:
                seen[name] = predictions(head, loader)
            if one is not base:
                one.release()
            if progress is not None:
                progress(number + 1, len(names), name)
        zero_shot = any(head_labels(one) is None for one in opened.values())
    return _results(config, found, looked_at, prompts.templates if zero_shot else (), seen, (grid, curve))


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


def _base(opened: dict[str, Opened]) -> Opened | None:
    """The first full CLIP, whose text tower goes with vision towers alone; None where there is no such tower.

    Raises:
      ValueError: where there are such towers, and no full CLIP.
    """
    for one in opened.values():
        sees(one)
    towers = [name for name, one in opened.items() if not has_head(one)]
    full = [one for one in opened.values() if has_head(one) and head_labels(one) is None]
    if towers and not full:
        raise ValueError(f"{towers[0]!r} has no text tower to make a zero-shot head from: give a full CLIP first")
    return full[0] if towers else None


def _head(one: Opened, base: Opened | None, names: Sequence[str], templates: Sequence[str]) -> tuple[Model, Any]:
    """A model with its task, and what makes its inputs of images."""
    whole = one if has_head(one) or base is None else with_text(one, base)
    return with_task(whole, names, templates), whole.processor.pixels


def with_text(tower: Opened, base: Opened) -> Opened:
    """A vision tower alone in the place of a full CLIP's own, run with its config.

    Raises:
      ValueError: for a tower that does not fit.
    """
    loaded, full = tower.pretrained, base.pretrained
    try:
        whole = full.with_params({**full.params, "vision": {**full.params["vision"], **loaded.params["vision"]}})
    except ValueError as error:
        raise ValueError(
            f"{tower.name!r} has no text tower, and does not fit that of {base.name!r}: {error}"
        ) from error
    vision = dataclasses.replace(loaded.config.vision, projection_dim=full.config.vision.projection_dim)
    config = dataclasses.replace(full.config, vision=vision)
    made = Opened(base.checkpoint)
    made.config = config
    made.pretrained = dataclasses.replace(whole, model=clip(config, whole.params), config=config, settings=None)
    images = tower.processor.image_processor or base.processor.image_processor
    made.processor = dataclasses.replace(base.processor, image_processor=images)
    return made


def _results(
    config: EvaluateConfig,
    found: Images,
    looked_at: dict[str, Any],
    templates: tuple[str, ...],
    seen: dict[str, Predictions],
    curve: tuple[tuple[float, ...], list[Predictions]],
) -> Evaluated:
    """The measurements as records, written and drawn where it is asked for."""
    norm = None if config.reference is None else seen[config.reference].accuracy
    result = Evaluated(
        images=looked_at,
        classes=found.class_names,
        templates=templates,
        models=[{"model": name, **records.of_model(seen[name], found.class_names, norm)} for name in config.models],
        reference=None if norm is None else {"model": config.reference, **records.of_accuracy(norm)},
        pairs=[
            {"model": two, "baseline": one, **records.of_pair(seen[two], seen[one])}
            for one, two in itertools.combinations(config.models, 2)
        ],
        curve=_curve(config, seen, norm, *curve) if config.task_vector is not None else None,
        notes=tuple(inputs.notes_of(found)),
    )
    if config.output is not None:
        inputs.write_json(config.output, result._asdict())
    if config.plot is not None:
        grid, points = curve
        title = f"{config.models[0]} + scale × {config.task_vector}"
        accuracies = [at.accuracy for at in points]
        plot_scale_curve(grid, accuracies, config.plot, title, None if norm is None else norm.fraction)
    return result


def _curve(
    config: EvaluateConfig,
    seen: dict[str, Predictions],
    norm: Accuracy | None,
    grid: tuple[float, ...],
    curve: list[Predictions],
) -> dict[str, Any]:
    points = records.of_curve(grid, curve, seen[config.models[0]], norm)
    best = max(points, key=lambda point: point["accuracy"])  # of those that tie, the smallest scale
    return {"task_vector": str(config.task_vector), "best_scale": best["scale"], "points": points}
