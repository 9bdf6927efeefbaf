"""Coefficients of task vectors, learned on a few examples."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from tvjax import compose as learned
from tvjax.checkpoints import TrainingStore, map_tree, model_card, save_coefficients, save_pretrained
from tvjax.checkpoints.atomic import new_folder
from tvjax.checkpoints.huggingface import check_new
from tvjax.checkpoints.json_files import write_json
from tvjax.checkpoints.provenance import check_same_base
from tvjax.compose.objectives import Objective
from tvjax.compose.train import Trained
from tvjax.data.augment import StrongView, WeakView
from tvjax.data.examples import spelled
from tvjax.data.images import Images
from tvjax.data.texts import Texts
from tvjax.evaluate.accuracy import accuracy
from tvjax.jobs import inputs
from tvjax.jobs.asking import Prompts, asking, with_task
from tvjax.jobs.calibration import of_head
from tvjax.jobs.configs import ComposeConfig
from tvjax.jobs.opened import Models, Opened
from tvjax.jobs.parts import check_labels
from tvjax.jobs.recipes import recipe_of, write_recipe
from tvjax.jobs.teachers import Teacher, find_teacher
from tvjax.progress import Progress, begin
from tvjax.report.leaf_plots import plot_coefficients
from tvjax.stages import Batch, Model, PyTree
from tvjax.tasks import Task


class Composed(NamedTuple):
    """What `compose` learned.

    Attributes:
      output: the folder of the edited model, with ``coefficients.safetensors`` and ``examples.json``.
      model: the model before.
      task_vectors: their files.
      objective: what was learned by.
      coefficients: how many there are.
      tuned_leaves: how many leaves were trained along.
      learning_rate: the one that was chosen.
      epochs: passes over the examples.
      validation_accuracy: of the chosen rate and epoch; None without validation.
      notes: what the user should know.
    """

    output: Path
    model: str
    task_vectors: tuple[str, ...]
    objective: str
    coefficients: int
    tuned_leaves: int
    learning_rate: float
    epochs: int
    validation_accuracy: float | None
    notes: tuple[str, ...]


class Data(NamedTuple):
    """The examples, the held-out ones, and how to ask."""

    found: Images | Texts
    held_out: Images | Texts | None
    prompts: Prompts
    teacher: Teacher | None


def compose(config: ComposeConfig, progress: Progress | None = None) -> Composed:
    """Learns coefficients of task vectors on a few examples, and saves the model that they give.

    Args:
      config: the model, its task vectors and the examples.
      progress: called after every epoch.

    Raises:
      ValueError: what cannot be, before anything is written.
    """
    check_new(config.output)
    store = None if config.state is None else TrainingStore(config.state)
    begin(progress, "reading the examples")
    with Models(progress=progress) as models, contextlib.ExitStack() as stack:
        opened = models[config.model]
        data = read(config, opened, models)
        looked_at = {
            "examples": inputs.record(data.found),
            "validation": None if data.held_out is None else inputs.record(data.held_out),
        }
        loaded = [map_tree(file) for file in config.task_vectors]
        files = [str(file) for file in config.task_vectors]
        metadata = check_same_base(files, [about for _, about in loaded], config.any_base)
        inputs.check_base(metadata, opened.pretrained, config.task_vectors, config.any_base)
        taus = [tau for tau, _ in loaded]
        output = stack.enter_context(new_folder(config.output))
        trained, params, coefficients = _learn(config, opened, data, taus, store, progress)
        tuned_leaves = len(trained.trainable.leaves) if _tunes(config) else 0
        card = model_card(
            config.output.name,
            f"Task vectors with coefficients learned by {config.learned_by} were added to the weights of the base "
            "model.",
            opened.pretrained.identity(),
            inputs={file: made for file, (_, made) in zip(files, loaded, strict=True)},
            settings={
                "objective": config.learned_by,
                **({} if config.teacher is None else {"teacher": config.teacher}),
                "start": config.start,
                "tune": _tunes(config),
                "learning rate": trained.learning_rate,
            },
            results={"epochs": trained.epochs, "validation accuracy": trained.score},
            pictures={"Coefficients by kind of leaf and depth": "coefficients.png"},
        )
        begin(progress, f"writing {config.output}")
        save_pretrained(opened.pretrained.with_params(params), output, card=card)
        save_coefficients(output / "coefficients.safetensors", coefficients, metadata)
        plot_coefficients(coefficients, output / "coefficients.png")
        write_json(output / "examples.json", looked_at, sort_keys=False)
        write_recipe(recipe_of(config), output)
    return Composed(
        output=config.output,
        model=config.model,
        task_vectors=tuple(files),
        objective=config.learned_by,
        coefficients=coefficients.values.size,
        tuned_leaves=tuned_leaves,
        learning_rate=trained.learning_rate,
        epochs=trained.epochs,
        validation_accuracy=trained.score,
        notes=(*inputs.notes_of(data.found, data.held_out), *asking(opened).notes(opened)),
    )


def _tunes(config: ComposeConfig) -> bool:
    return config.is_told if config.tune is None else config.tune


def read(config: ComposeConfig, opened: Opened, models: Models) -> Data:
    """The examples; but for a choice by embeddings, no weight is read.

    Raises:
      ValueError: examples without the labels or names that are needed, or of other classes than the model's own head.
    """
    way = asking(opened)
    if not way.can_score(opened):
        raise ValueError(f"{config.model!r} {way.lacks}")
    if not config.is_told and way.kind is not Images:
        raise ValueError(
            f"{config.objective} looks at images, and {config.model!r} takes {way.kind.kind}: take few_shot, or "
            "distillation"
        )
    teacher = None
    if config.teacher is not None:
        base = None if config.teacher_base is None else models[config.teacher_base]
        teacher = find_teacher(models[config.teacher], base)
    prompts = inputs.read_prompts(config, (opened, *([] if teacher is None else [teacher.reader])))
    if config.classes is None:
        prompts = of_head(opened, prompts)
    needed = config.learned_by if config.learned_by == "few_shot" else ""
    found = inputs.read_examples(inputs.place_of(config.data, config.task, "train"), prompts, (opened,), needed)
    names = found.class_names or tuple(map(spelled, prompts.class_names or ()))
    if not names and way.needs_labels:
        reader = config.learned_by if config.teacher is None else "a teacher"
        raise ValueError(f"{reader} needs the names of the classes: give --classes, or {way.labelling}")
    check_labels(opened, names, config.classes is not None)
    features = lambda images: opened.embed(images, config.batch_size)  # noqa: E731
    found = inputs.draw(found, config.per_class, config.select, config.seed, features)
    found = dataclasses.replace(found, class_names=names)
    if teacher is not None:
        found = teacher.asked(found, prompts, config.classes is not None)
    way.check(opened, found, prompts)
    if config.validation is None:
        return Data(found, None, prompts, teacher)
    held_out = inputs.read_examples(config.validation, prompts, (opened,), "choosing a learning rate")
    check_labels(opened, held_out.class_names, config.classes is not None)
    return Data(found, held_out, prompts, teacher)


def _learn(
    config: ComposeConfig,
    opened: Opened,
    data: Data,
    taus: list[PyTree],
    store: TrainingStore | None,
    progress: Progress | None,
) -> tuple[Trained, PyTree, learned.Coefficients]:
    """What was trained, the parameters that it gives, and the coefficients."""
    task = asking(opened).task(opened, data.found, data.prompts)
    head = with_task(opened, task)
    begin(progress, "preparing what is learned from")
    goal = _goal(config, opened, head, task.batches(data.found, config.batch_size).whole(), data)
    key, part_key = jax.random.split(jax.random.key(config.seed))
    names = [str(file) for file in config.task_vectors]
    coefficients = learned.init(taus, blocks=config.blocks, partitions=config.partitions, key=part_key, names=names)
    if (config.start or ("best" if config.is_told else "zero")) == "best":
        coefficients = learned.best_start(
            head.params, taus, goal, key=key, coefficients=coefficients, progress=progress
        )
    begin(progress, "learning")
    trained = (learned.tune if _tunes(config) else learned.learn)(
        head.params,
        taus,
        goal,
        key=key,
        coefficients=coefficients,
        learning_rates=config.rates,
        epochs=config.epochs,
        batch_size=config.batch_size,
        micro_batches=config.micro_batches,
        score=score_on(config, task, head, data.held_out),
        progress=progress,
        store=store,
    )
    begin(progress, "adding what was learned")
    base = opened.pretrained.params
    if _tunes(config):
        return trained, jax.jit(learned.Tuned.combine)(trained.trainable, base, taus), trained.trainable.coefficients
    return trained, jax.jit(learned.combine)(base, taus, trained.trainable), trained.trainable


def _goal(config: ComposeConfig, opened: Opened, head: Model, seen: Batch, data: Data) -> Objective:
    """What the coefficients are learned by."""
    if config.is_told:
        goals = [learned.few_shot(head, seen)] if config.learned_by == "few_shot" else []
        if data.teacher is not None:
            said = data.teacher.scores(data.found, data.prompts, config.batch_size)
            data.teacher.release()
            told = learned.distillation(head, seen.inputs, said, temperature=config.temperature, match=config.match)
            goals.append(told)
        return learned.average(goals)
    pixels = seen.inputs
    if config.objective == "entropy":
        return learned.entropy(head, pixels)
    weak = WeakView(flip=config.flip)
    mean, std = opened.processor.normalisation
    return learned.fix_match(head, pixels, weak=weak, strong=StrongView(mean, std, weak=weak))


def score_on(
    config: ComposeConfig, task: Task, head: Model, held_out: Images | Texts | None
) -> Callable[[Any], float] | None:
    """The accuracy of parameters on the examples that were held out."""
    if held_out is None:
        return None
    held = list(task.batches(held_out, config.batch_size))
    return lambda params: accuracy(head.replace(params=params), held).fraction
