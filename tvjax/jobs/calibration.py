"""The examples of a transport: those that it is fitted on, and those that its scale is chosen on."""

from __future__ import annotations

from typing import Any, NamedTuple

from tvjax import tree
from tvjax.checkpoints.provenance import check_configs, doubts
from tvjax.data.images import Images
from tvjax.data.loader import Loader, Processed
from tvjax.data.texts import Texts
from tvjax.jobs import inputs, matching
from tvjax.jobs.asking import OfTexts, OwnHead, Prompts, asking, parameters
from tvjax.jobs.configs import PlanConfig, TransportConfig
from tvjax.jobs.methods import check_pair, read_depth
from tvjax.jobs.opened import Models, Opened
from tvjax.jobs.parts import Part, check_labels, find_part, part_task_vector
from tvjax.jobs.task_vectors import check_given, is_adapter
from tvjax.stages import Batch
from tvjax.transport import Transport, make_transport


class Prepared(NamedTuple):
    """What a transport needs, before any weight is read.

    Attributes:
      method: the name of the transport.
      moving: the transport.
      way: how both models are asked.
      part: the leaves that are moved.
      depth: source layer of each target layer, or the rule.
      prompts: how to ask.
      found: calibration examples; None where the transport reads none.
      held_out: labelled examples to choose the scale on.
      by_characters: whether the tokenizers cut the examples differently, so that tokens are matched by characters.
      notes: what the user should know of the models.
    """

    method: str
    moving: Transport
    way: OwnHead
    part: Part
    depth: str | list[int]
    prompts: Prompts
    found: Images | Texts | None
    held_out: Images | Texts | None
    by_characters: bool
    notes: tuple[str, ...]


def prepare(config: TransportConfig | PlanConfig, models: Models) -> Prepared:
    """Checks what a transport is given; no weight is read, but for a choice of examples by embeddings.

    Raises:
      ValueError: what cannot be, naming it.
    """
    assert config.method is not None  # with_method
    moving, depth = make_transport(config.method, config.options), read_depth(config.depth)
    if config.stream:
        _check_streams(config, moving)
    source, target = models[config.source], models[config.target]
    check_pair(moving, source, target)
    part, way = find_part(source, config.part), asking(target)
    for link in moving.links:
        if link.check is not None:
            link.check(*(way.shapes(model, None, Prompts(None, ())) for model in (source, target)))
    if config.validation is not None and not way.can_score(target):
        raise ValueError(f"--validation needs a score, but {config.target!r} {way.lacks}")
    notes: tuple[str, ...] = ()
    moved: dict[str, Any] = {}
    if config.finetuned is not None:
        names, tuned = (config.source, config.finetuned), models[config.finetuned]
        configs = (source.config, tuned.config)
        notes = check_configs(names, configs, source.checkpoint.family.part, config.allow_config_differences)
        moved = tree.flatten(part_task_vector(part, parameters(source), parameters(tuned), config.finetuned))  # fits
    if config.task_vector is not None:
        notes += check_given(config.task_vector, source, part, config.any_base)
    prompts = inputs.read_prompts(config, (source, target))
    named = next((model for model in (target, source) if way.labels(model)), target)
    labelled = prompts if config.classes else of_head(named, prompts)
    found = held_out = share = None
    compare = isinstance(config, PlanConfig) and config.compare
    if compare or moving.needs_examples and (config.data or config.task or not isinstance(config, PlanConfig)):
        found = _calibration(config, moving, labelled if moving.needs_gradients else prompts, target)
        for model in (source, target) if moving.needs_gradients else ():
            check_labels(model, found.class_names, config.classes is not None)
            if isinstance(config, TransportConfig) or way.kind is Texts:  # a plan of images needs no tokenizer
                way.check(model, found, prompts)
        for model in (source, target) if isinstance(config, TransportConfig) else ():
            way.check_reader(model, prompts)
        if compare or any(link.needs.source for link in moving.links if link.needs.activations or link.needs.gradients):
            share = way.partnered(source, target, found, prompts)
        notes += () if share is None else (matching.note(share),)
    if found is None and config.data is not None and not isinstance(config, PlanConfig):
        notes += (f"--data {config.data} is not read: {moving.name} looks at no examples",)
    if config.validation is not None:
        held_out = inputs.read_examples(config.validation, labelled, (target,), "choosing a scale")
        check_labels(target, held_out.class_names, config.classes is not None)
        if isinstance(config, TransportConfig):
            way.check(target, held_out, prompts)
    if config.finetuned is not None and isinstance(config, TransportConfig):  # a plan reads no weights
        notes += doubts(source.checkpoint, models[config.finetuned].checkpoint, moved)
    notes += tuple(dict.fromkeys(note for model in (source, target) for note in way.notes(model)))
    return Prepared(config.method, moving, way, part, depth, prompts, found, held_out, share is not None, notes)


def _check_streams(config: TransportConfig | PlanConfig, moving: Transport) -> None:
    """Raises a ValueError for what has to be in memory as a whole."""
    if config.task_vector is not None and is_adapter(config.task_vector):
        raise ValueError(
            f"{config.task_vector!r} is an adapter, which is moved by its factors: leave --stream out, or make a task "
            "vector of it first (tvjax extract --adapter)"
        )
    if moving.needs_task_vector:
        raise ValueError(f"{config.method} runs the fine-tuned source, which is made in memory: leave --stream out")


def of_head(model: Opened, prompts: Prompts) -> Prompts:
    """The prompts with the names of the classes of a model's own head, where it has one that names them."""
    return prompts._replace(class_names=asking(model).labels(model) or prompts.class_names)


def _calibration(
    config: TransportConfig | PlanConfig, moving: Transport, prompts: Prompts, target: Opened
) -> Images | Texts:
    way = asking(target)
    if config.data is None and config.task is None:
        reader = moving.name if moving.needs_examples else "a comparison of the models"
        raise ValueError(f"{reader} looks at calibration {way.kind.kind}: give --data")
    place = inputs.place_of(config.data, config.task, "train")
    found = inputs.read_examples(place, prompts, (target,))
    if moving.needs_gradients and way.needs_labels and found.labels is None:
        raise ValueError(
            f"{place!r} has no labels, and {moving.name} reads gradients of the loss: {way.labelling}, or take "
            "theseus, which needs no labels"
        )
    # A plan says how many, not which: a choice by embeddings would read the weights.
    select = "random" if isinstance(config, PlanConfig) else config.select
    features = lambda images: target.embed(images, config.batch_size)  # noqa: E731
    return inputs.draw(found, config.per_class, select, config.seed, features)


def paired_batches(ready: Prepared, source: Opened, target: Opened, size: int) -> tuple[list[Any], Loader]:
    """The same examples as two models see them, each read once, with overlaps of other tokens; and what made them."""
    assert ready.found is not None
    found, prompts, way = ready.found, ready.prompts, ready.way
    loaders = [way.task(model, found, prompts).batches(found, size) for model in (source, target)]
    of_spans: list[Loader] = []
    if ready.by_characters:
        assert isinstance(way, OfTexts)
        of_spans = [way.spans(model, found, prompts, size) for model in (source, target)]

    def both(examples: Any, labels: Any) -> Processed:
        made = [loader.process(examples, labels) for loader in loaders]
        views: list[Any] = [one.batch for one in made]
        if of_spans:
            views.append(matching.overlaps_of(*(loader.process(examples, labels).batch for loader in of_spans)))
        return Processed(Batch(views), max(one.cut for one in made))

    pairs = Loader(found, both, size)
    return [tuple(batch.inputs) for batch in pairs], pairs
