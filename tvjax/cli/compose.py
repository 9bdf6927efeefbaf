"""``tvjax compose``: learned coefficients of task vectors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tvjax.cli import config as recipes
from tvjax.cli.options import (
    LARGEST_COUNT,
    LARGEST_SEED,
    AnyBase,
    Classes,
    Images,
    Json,
    PerClass,
    Quiet,
    Select,
    Task,
    Templates,
    finite,
)

if TYPE_CHECKING:
    from tvjax.stages import PyTree

Objective = Literal["few_shot", "entropy", "fix_match"]
RATE = {"few_shot": (0.1,), "entropy": (1e-3,), "fix_match": (1e-3,)}  # as published
RATES = {"few_shot": (0.03, 0.1, 0.3), "entropy": (1e-3, 1e-2), "fix_match": (1e-3, 1e-2)}  # where one can choose


def compose(
    context: typer.Context,
    task_vectors: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Task vectors of the model.")],
    model: Annotated[str, typer.Option(metavar="MODEL", help="The pre-trained model: folder or hub id.")],
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the edited model goes.")],
    images: Images = None,
    task: Task = None,
    objective: Annotated[
        Objective, typer.Option(help="few_shot learns from labelled images, entropy and fix_match need no labels.")
    ] = "few_shot",
    blocks: Annotated[
        Literal["leaf", "vector"], typer.Option(help="One coefficient for each leaf, or for each vector.")
    ] = "leaf",
    partitions: Annotated[
        int, typer.Option(min=1, max=LARGEST_COUNT, help="Random parts of each block, a coefficient each.")
    ] = 1,
    start: Annotated[
        Literal["best", "zero"] | None,
        typer.Option(
            help="best: from the one vector and scale of the least loss on the images. Default: best for few_shot."
        ),
    ] = None,
    tune: Annotated[
        bool | None,
        typer.Option(help="Train the leaves that the vectors move too, at 1 % of the rate. Default: for few_shot."),
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option(metavar="IMAGES", help="Labelled images by which learning rate and epoch are chosen."),
    ] = None,
    learning_rates: Annotated[
        list[float] | None, typer.Option("--learning-rate", help="One, or several to choose from.", callback=finite)
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the images, at most.")] = 10,
    batch_size: Annotated[int, typer.Option(min=1, max=LARGEST_COUNT, help="Images of each step.")] = 128,
    micro_batches: Annotated[int, typer.Option(min=1, help="Pieces of a batch, to save memory.")] = 1,
    per_class: PerClass = 0,
    select: Select = "random",
    classes: Classes = None,
    templates: Templates = None,
    flip: Annotated[bool, typer.Option(help="Whether a mirrored image is of the same class (fix_match).")] = True,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of every draw.")] = 0,
    state: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keep the training's state here; a later run goes on.")
    ] = None,
    any_base: AnyBase = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Learn coefficients of task vectors on a few images, and save the model that they give.

    By default, with labels, what did best with one and two of them a class: start from the best vector, and fine-tune
    the model's leaves along with the coefficients (--start best --tune). aTLAS as published is --start zero --no-tune.
    """
    import jax

    from tvjax import compose as learned
    from tvjax.checkpoints import (
        TrainingStore,
        from_pretrained,
        load_processor,
        map_tree,
        model_card,
        save_coefficients,
        save_pretrained,
    )
    from tvjax.checkpoints.huggingface import check_new
    from tvjax.cli import inputs
    from tvjax.cli.output import show
    from tvjax.cli.progress import progress
    from tvjax.data.augment import StrongView, WeakView
    from tvjax.data.examples import spelled
    from tvjax.data.loader import image_batches
    from tvjax.evaluate.accuracy import accuracy
    from tvjax.report.plots import plot_coefficients
    from tvjax.tasks.zero_shot import zero_shot_model

    rates = tuple(learning_rates or (RATES if validation is not None else RATE)[objective])
    if len(rates) > 1 and validation is None:
        raise ValueError(f"{len(rates)} learning rates need labelled images to choose by: give --validation")
    check_new(output)
    if inputs.read_clip_config(model).text is None:
        raise ValueError(f"{model!r} has no text tower to make a zero-shot head from: give a full CLIP")
    labelled = objective == "few_shot"
    prompts = inputs.read_prompts(task, classes, templates)
    found = inputs.read_images(inputs.images_of(images, task, "train"), prompts, objective if labelled else "")
    found = inputs.draw_images(found, per_class, select, seed, inputs.embeddings(model, batch_size))
    names = found.class_names or tuple(map(spelled, prompts.class_names or ()))
    if not names:
        raise ValueError(f"{objective} needs the names of the classes: give --classes, or images in one folder a class")
    held_out = None if validation is None else inputs.read_images(validation, prompts, "choosing a learning rate")
    looked_at = {"images": inputs.record(found), "validation": None if held_out is None else inputs.record(held_out)}
    loaded = [map_tree(file) for file in task_vectors]
    base = from_pretrained(model)
    metadata = inputs.common_base(task_vectors, [about for _, about in loaded], any_base)
    inputs.check_base(metadata, base, task_vectors, any_base)

    processor = load_processor(model)
    head = zero_shot_model(
        base.model.replace(params=inputs.float32(base.params)), processor.tokens, names, prompts.templates
    )
    seen = image_batches(found, processor.pixels, batch_size).whole()
    pixels = seen.inputs
    if labelled:
        goal = learned.few_shot(head, seen)
    elif objective == "entropy":
        goal = learned.entropy(head, pixels)
    else:
        weak = WeakView(flip=flip)
        mean, std = processor.normalisation
        strong = StrongView(mean, std, weak=weak)
        goal = learned.fix_match(head, pixels, weak=weak, strong=strong)
    score: Callable[[PyTree], float] | None = None
    if held_out is not None:
        held = list(image_batches(held_out, processor.pixels, batch_size))

        def score(params: PyTree) -> float:
            return accuracy(head.replace(params=params), held).fraction

    taus = [tau for tau, _ in loaded]
    files = [str(file) for file in task_vectors]
    key, part_key = jax.random.split(jax.random.key(seed))
    coefficients = learned.init(taus, blocks=blocks, partitions=partitions, key=part_key, names=files)
    if (start or ("best" if labelled else "zero")) == "best":
        coefficients = learned.best_start(head.params, taus, goal, key=key, coefficients=coefficients)
    tuned = labelled if tune is None else tune
    with progress(objective, quiet) as report:
        trained = (learned.tune if tuned else learned.learn)(
            head.params,
            taus,
            goal,
            key=key,
            coefficients=coefficients,
            learning_rates=rates,
            epochs=epochs,
            batch_size=batch_size,
            micro_batches=micro_batches,
            score=score,
            progress=report,
            store=None if state is None else TrainingStore(state),
        )
    if tuned:
        coefficients = trained.trainable.coefficients
        params = jax.jit(learned.Tuned.combine)(trained.trainable, base.params, taus)
    else:
        coefficients = trained.trainable
        params = jax.jit(learned.combine)(base.params, taus, coefficients)
    card = model_card(
        output.name,
        f"Task vectors with coefficients learned by {objective} were added to the weights of the base model.",
        base.identity(),
        inputs={str(file): made for file, (_, made) in zip(task_vectors, loaded, strict=True)},
        settings={"objective": objective, "start": start, "tune": tuned, "learning rate": trained.learning_rate},
        results={"epochs": trained.epochs, "validation accuracy": trained.score},
    )
    save_pretrained(base.with_params(params), output, card=card)
    save_coefficients(output / "coefficients.safetensors", coefficients, metadata)
    plot_coefficients(coefficients, output / "coefficients.png")
    inputs.write_json(output / "images.json", looked_at)
    recipes.write(context, output)
    notes = inputs.notes_of(found, held_out)
    number, leaves = coefficients.values.size, len(trained.trainable.leaves) if tuned else 0
    also = f" and {leaves} leaves" if tuned else ""
    by = "" if trained.score is None else f", accuracy {100 * trained.score:.1f} % on {validation}"
    show(
        {
            "output": output,
            "model": model,
            "task_vectors": files,
            "objective": objective,
            "coefficients": number,
            "tuned_leaves": leaves,
            "learning_rate": trained.learning_rate,
            "epochs": trained.epochs,
            "validation_accuracy": trained.score,
            "notes": notes,
        },
        *(f"note: {note}" for note in notes),
        f"{output}: {model} with {len(taus)} task vectors, {number} coefficients{also},",
        f"learning rate {trained.learning_rate:g}, {trained.epochs} epochs{by}",
        as_json=as_json,
        quiet=quiet,
    )
