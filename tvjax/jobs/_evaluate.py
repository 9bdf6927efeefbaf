"""How well models do on the same examples, one beside the other, or along the scale of a task vector."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

from tvjax.checkpoints import map_tree
from tvjax.checkpoints.edits import check_fit
from tvjax.checkpoints.json_files import write_json
from tvjax.data.images import Images
from tvjax.data.loader import Loader
from tvjax.data.texts import Texts
from tvjax.evaluate.accuracy import Accuracy, Predictions, predictions
from tvjax.evaluate.scale import scale_curve
from tvjax.jobs import inputs
from tvjax.jobs.asking import Prompts, ZeroShot, asking, with_task
from tvjax.jobs.calibration import of_head
from tvjax.jobs.configs import EvaluateConfig
from tvjax.jobs.copies import copy_beside
from tvjax.jobs.harness import Harnessed, harness
from tvjax.jobs.opened import Models, Opened
from tvjax.jobs.parts import check_labels
from tvjax.progress import Progress, begin
from tvjax.renamed import warn
from tvjax.report import records
from tvjax.report.plots import plot_scale_curve

SCALES = ",".join(f"{0.05 * step:g}" for step in range(21))


class Evaluated(NamedTuple):
    """What `evaluate` measured.

    Attributes:
      examples: what they are measured on.
      classes: their names.
      templates: the prompts; none where every model has a head of its own.
      models: accuracy of each model, in whole and by class; of the next token also the perplexity. Beside a model that
        a transport made stands a plain copy of the same task vector, where shapes agree (`tvjax.jobs.copies`).
      reference: accuracy of the reference.
      pairs: each two models on the same examples.
      curve: accuracy at every scale of a task vector, and the best.
      notes: what the user should know.
    """

    examples: dict[str, Any]
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    models: list[dict[str, Any]]
    reference: dict[str, Any] | None
    pairs: list[dict[str, Any]]
    curve: dict[str, Any] | None
    notes: tuple[str, ...]

    @property
    def images(self) -> Any:
        """The old name of `examples`."""
        warn("images", "examples")
        return self.examples


def evaluate(config: EvaluateConfig, progress: Progress | None = None) -> Evaluated | Harnessed:
    """Accuracy with its 95 % interval (Wilson), and how sure a difference is.

    It is zero-shot, by a model's own head, or by the words that a language model says next; on texts without classes it
    is that of the next token, with the perplexity. Without a template a language model reads the text as it is, and the
    words are the names of the classes: behind a space where a causal model continues the text, alone where a decoder
    answers. With ``harness`` lm-evaluation-harness measures instead
    (`tvjax.jobs.harness`).

    Args:
      config: the models and the examples.
      progress: called when a part begins, and after every batch of every model.

    Raises:
      ValueError: what cannot be; before any weight is read where configs and files show it.
    """
    if config.harness:
        return harness(config, progress)
    grid = read_scales(config.scales or SCALES)
    for file, kind in ((config.output, ".json"), (config.plot, ".png")):
        if file is not None:
            inputs.check_file(file, kind)
    begin(progress, "reading the examples")
    with Models(progress=progress) as models:
        names = list(dict.fromkeys((*config.models, *([config.reference] if config.reference else []))))
        opened = {name: models[name] for name in names}
        ways = {name: asking(one) for name, one in opened.items()}
        prompts = inputs.read_prompts(config, tuple(opened.values()))
        base = _base(opened)
        headed = next((one for name, one in opened.items() if ways[name].labels(one)), None)
        if headed is not None and config.classes is None:
            prompts = of_head(headed, prompts)
        tau, about = map_tree(config.task_vector) if config.task_vector is not None else (None, {})
        place = inputs.place_of(config.data, config.task, "test")
        found = inputs.read_examples(place, prompts, tuple(opened.values()), "an accuracy")
        looked_at = inputs.record(found)
        for name, one in opened.items():
            check_labels(one, found.class_names, config.classes is not None)
            ways[name].check(one, found, prompts)
        if found.labels is None:  # the answers are tokens
            ways[config.models[0]].check_alike(tuple(opened.values()), found, prompts)
        seen: dict[str, Predictions] = {}
        loaders: list[Loader] = []
        curve: list[Predictions] = []
        beside: list[str] = []
        for number, (name, one) in enumerate(opened.items()):
            whole = one if base is None or ways[name].can_score(one) else with_text(one, base)
            task = ways[name].task(whole, found, prompts)
            head, loader = with_task(whole, task), task.batches(found, config.batch_size)
            loaders.append(loader)
            tell = _of_model(progress, number, len(names), name)
            if config.task_vector is not None and name == config.models[0]:
                check_fit(one.checkpoint, [tau], [str(config.task_vector)])
                inputs.check_base(about, one.pretrained, [config.task_vector], config.any_base)
                *curve, seen[name] = scale_curve(head, tau, (*grid, 0.0), loader, tell)
            else:
                seen[name] = predictions(head, loader, tell)
            if one is not base:
                one.release()
            copy = copy_beside(one, models) if name in config.models else None
            if isinstance(copy, Opened):
                seen[f"{name}, copied"] = predictions(with_task(copy, task), loader)
            elif copy:
                beside.append(f"no copy is shown beside {name}: {copy}")
        if all(ways[name].labels(one) is not None for name, one in opened.items()):
            prompts = prompts._replace(templates=())
        notes = [*inputs.notes_of(found, *loaders), *beside]
        notes += [note for name, one in opened.items() for note in ways[name].notes(one)]
    return _results(config, found, looked_at, prompts, seen, (grid, curve), notes)


def _of_model(progress: Progress | None, number: int, models: int, name: str) -> Progress | None:
    """Takes the batches of one model, and tells them as some of those of all models."""
    if progress is None:
        return None
    return lambda done, total, _: progress(number * total + done, models * total, name)


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
    """The first full dual encoder, whose text tower goes with vision towers alone; None where there is no such tower.

    Raises:
      ValueError: where there are such towers and no full model, or a model that no text tower helps.
    """
    towers = [one for one in opened.values() if not asking(one).can_score(one)]
    full = [one for one in opened.values() if asking(one).can_score(one) and isinstance(asking(one), ZeroShot)]
    for one in towers:
        if not full or not isinstance(asking(one), ZeroShot):
            raise ValueError(f"{one.name!r} {asking(one).lacks}")
    return full[0] if towers else None


def with_text(tower: Opened, base: Opened) -> Opened:
    """A vision tower alone in the place of a full dual encoder's own, run with its config.

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
    vision = loaded.config.vision
    if vision.projection_dim is None:  # of a CLIP that was saved without its projection
        vision = dataclasses.replace(vision, projection_dim=full.config.vision.projection_dim)
    config = dataclasses.replace(full.config, vision=vision)
    made = Opened(base.checkpoint)
    made.config = config
    made.pretrained = dataclasses.replace(
        whole, model=base.checkpoint.family.build(config, whole.params), config=config, settings=None
    )
    images = tower.processor.image_processor or base.processor.image_processor
    made.processor = dataclasses.replace(base.processor, image_processor=images)
    return made


def _results(
    config: EvaluateConfig,
    found: Images | Texts,
    looked_at: dict[str, Any],
    prompts: Prompts,
    seen: dict[str, Predictions],
    curve: tuple[tuple[float, ...], list[Predictions]],
    notes: list[str],
) -> Evaluated:
    """The measurements as records, written and drawn where it is asked for."""
    norm = None if config.reference is None else seen[config.reference].accuracy
    if found.labels is None:
        notes.append("the answers are tokens, and those of one text are not independent: the intervals are too narrow")
    shown = [name for name in seen if name != config.reference or name in config.models]
    result = Evaluated(
        examples=looked_at,
        classes=found.class_names,
        templates=prompts.templates,
        models=[{"model": name, **records.of_model(seen[name], found.class_names, norm)} for name in shown],
        reference=None if norm is None else {"model": config.reference, **records.of_accuracy(norm)},
        pairs=[
            {"model": two, "baseline": one, **records.of_pair(seen[two], seen[one])}
            for one, two in itertools.combinations(shown, 2)
        ],
        curve=_curve(config, seen, norm, *curve) if config.task_vector is not None else None,
        notes=tuple(notes),
    )
    if config.output is not None:
        write_json(config.output, result._asdict(), sort_keys=False)
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
