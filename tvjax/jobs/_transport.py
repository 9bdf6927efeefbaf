"""One task vector moved into another model."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tvjax import processes, tree
from tvjax.arithmetic import apply, scale
from tvjax.checkpoints import TransportStore, elementwise, model_card, save_adapter, save_pretrained, save_tree
from tvjax.checkpoints.atomic import becomes, new_folder, write_text
from tvjax.checkpoints.fingerprints import fingerprint
from tvjax.checkpoints.huggingface import check_new, write_checkpoint
from tvjax.checkpoints.json_files import write_json
from tvjax.checkpoints.processors import processor_fingerprint
from tvjax.data.loader import Loader
from tvjax.data.texts import Texts
from tvjax.evaluate.scale import ChosenScale, choose_scales
from tvjax.factors import is_low_rank
from tvjax.jobs import inputs
from tvjax.jobs.asking import float32, with_task
from tvjax.jobs.calibration import Prepared, paired_batches, prepare
from tvjax.jobs.configs import TransportConfig
from tvjax.jobs.methods import scales_of
from tvjax.jobs.opened import Models, Opened
from tvjax.jobs.parts import changed_elsewhere, copied, part_task_vector
from tvjax.jobs.recipes import recipe_of, write_recipe
from tvjax.jobs.recommended import with_method
from tvjax.jobs.refined import Refinement, prepare_refinement, refine
from tvjax.jobs.task_vectors import is_adapter, read_given
from tvjax.on_disk import DiskArray, is_on_disk
from tvjax.progress import Progress, begin
from tvjax.renamed import warn
from tvjax.report.norm_plots import plot_norms
from tvjax.stages import Model, PyTree
from tvjax.transport import State, fit, identity, leaf_forms, leaf_report, summary
from tvjax.transport.leaf_report import Forms

Norms = dict[str, float]
_SIDES = ("source", "target")
_PICTURE = "norms.png"


class Transported(NamedTuple):
    """What `transport` did.

    Attributes:
      output: the folder of the edited model, or of the adapter for it, with ``leaf_report.txt``,
        ``leaf_report.json`` and ``norms.png``.
      form: ``model`` or ``adapter``.
      method: the transport.
      scale: factor of the moved task vector, chosen where there is validation.
      source: the pre-trained source.
      finetuned: the fine-tuned source, or the task vector that was given.
      target: the model before.
      examples: of the calibration.
      validation: the examples that the scale was chosen on, with the accuracy at every scale.
      refined: how the fine-tuned source taught the target from there on; None where it did not.
      copy: the task vector added as it is, at its own best scale on the same examples; None where the shapes do not
        agree, or there is no validation.
      norms: of the task vector in the source and in the target.
      leaf_norms: the same leaf by leaf, by path.
      notes: what the user should know.
    """

    output: Path
    form: str
    method: str
    scale: float
    source: str
    finetuned: str
    target: str
    examples: dict[str, Any] | None
    validation: dict[str, Any] | None
    refined: dict[str, Any] | None
    copy: dict[str, Any] | None
    norms: dict[str, float]
    leaf_norms: dict[str, dict[str, float]]
    notes: tuple[str, ...]

    @property
    def images(self) -> Any:
        """The old name of `examples`."""
        warn("images", "examples")
        return self.examples


def transport(config: TransportConfig, progress: Progress | None = None) -> Transported:
    """Moves what a fine-tuning learned into another model, and saves the edited model with a report by leaf.

    An adapter that is given as the task vector comes out as an adapter of the same ranks, unless a link of the method
    cannot keep its factors, or the edited model is asked for (``dense``).

    Args:
      config: what to move, where to and how.
      progress: called when a part begins, after every stage of the fit, and after every batch of the choice of a
        scale.

    Raises:
      ValueError: what cannot be, before anything is written, and before any weight is read where headers show it.
    """
    check_new(config.output)
    if config.save_task_vector is not None:
        inputs.check_file(config.save_task_vector)
    begin(progress, "reading the examples")
    with Models(on_disk=config.stream, progress=progress) as models:
        config, why = with_method(config, models)
        ready = prepare(config, models)
        ready = ready._replace(notes=(*why, *ready.notes))
        looked_at = None if ready.found is None else inputs.record(ready.found)
        taught = prepare_refinement(config, models) if config.refine else None
        with new_folder(config.output) as output:
            inside = config.model_copy(update={"output": output})
            work = _Work(inside, ready, models, looked_at, taught, progress)
            tau, also = _task_vector(config, ready, models)
            result, state, forms = (_streamed if config.stream else _whole)(work, tau, also)
            _write_report(inside, result, state, forms)
            write_recipe(recipe_of(config), output)
    return result._replace(output=config.output)


class _Work(NamedTuple):
    """What is moved, where to and how, checked and opened."""

    config: TransportConfig
    ready: Prepared
    models: Models
    looked_at: dict[str, Any] | None
    taught: Refinement | None
    progress: Progress | None

    def result(self, state: State, form: str, norms: tuple[Norms, Norms], **chosen: Any) -> Transported:
        """What was done; `norms` are those of the leaves of the task vector, and of the moved one."""
        config, ready = self.config, self.ready
        done: dict[str, Any] = {"scale": config.scale, "validation": None, "refined": None, "copy": None}
        return Transported(
            output=config.output,
            form=form,
            method=ready.method,
            source=config.source,
            finetuned=config.finetuned or config.task_vector or "",
            target=config.target,
            examples=self.looked_at,
            norms={side: math.hypot(*own.values()) for side, own in zip(_SIDES, norms, strict=True)},
            leaf_norms=dict(zip(_SIDES, norms, strict=True)),
            notes=(*inputs.notes_of(ready.found, ready.held_out), *state.notes),
            **(done | chosen),
        )


def _whole(work: _Work, tau: PyTree, also: list[str]) -> tuple[Transported, State, Forms]:
    """The models in memory: fitted, moved, at the best scale where there is validation, and saved."""
    config, ready, models, target = work.config, work.ready, work.models, work.models[work.config.target]
    state = _fitted(work, tau)
    moved = ready.moving.apply(state, tau)
    forms = leaf_forms(ready.moving, state, tau) if any(map(is_low_rank, tree.flatten(tau).values())) else ()
    form = "model" if work.taught is not None else _form(config, tau, moved)
    state = dataclasses.replace(state, notes=(*state.notes, *ready.notes, *also, *_lost(moved, forms, state)))
    chosen: dict[str, Any] = {}
    params = None
    if work.taught is not None:
        params, chosen = refine(work.taught, target, moved, scales_of(ready.moving), work.progress)
    elif ready.held_out is not None:
        task = ready.way.task(target, ready.held_out, ready.prompts)
        scored = with_task(target, task), task.batches(ready.held_out, config.batch_size)
        best, copy = _chosen(moved, tau, target, ready, *scored, work.progress)
        chosen = {"scale": best.scale, "validation": _curve(best, ready.held_out), "copy": copy}
        if best.scale == 0:
            nothing = "no scale does better than none on the validation examples: the target is written as it was"
            state = dataclasses.replace(state, notes=(*state.notes, nothing))
    result = work.result(state, form, (_norms(tau), _norms(moved)), **chosen)
    begin(work.progress, f"writing {becomes(config.output)}")
    _save(config, result, models, moved, params)
    return result, state, forms


def _streamed(work: _Work, tau: PyTree, also: list[str]) -> tuple[Transported, State, Forms]:
    """The models on disk: a stage in memory at a time, each moved leaf added to the target's and written at once."""
    config, target = work.config, work.models[work.config.target]
    left = tree.flatten(target.pretrained.params)
    after: Norms = {}

    # The card says the fingerprints, which are taken over the weights in the order of their paths: the walk, which goes
    # by stages, reads them again. This first reading is also the one that finds values that are not finite.
    begin(work.progress, "checking the weights")
    card = _card(config, "model", config.scale, work.looked_at, work.models)
    tau, before = _measured(tau)
    with write_checkpoint(target.checkpoint, config.output, card=lambda: card) as write:

        def edit(number: int, path: str, leaf: Any) -> None:
            change, own = np.asarray(leaf), np.asarray(left.pop(path))
            after[path] = math.sqrt(np.vdot(change, change))
            edited = np.empty_like(own)
            elementwise.edited(own, change, config.scale, edited)
            write(path, edited)

        state = _fitted(work, tau, stream=[tau], write=edit)
        for path, leaf in left.items():
            write(path, np.asarray(leaf))
    state = dataclasses.replace(state, notes=(*state.notes, *work.ready.notes, *also))
    return work.result(state, "model", (before, after)), state, ()


def _norms(tau: PyTree) -> Norms:
    """The norm of each leaf by path."""
    found = processes.fetch(tree.by_leaf(tree.norm, tau))
    return {path: float(norm) for path, norm in found.items()}


def _measured(tau: PyTree) -> tuple[PyTree, Norms]:
    """A task vector, and the norms of its leaves by path: those on disk are measured when the fit checks them."""
    norms: Norms = {}

    def read(path: str, leaf: Any) -> np.ndarray:
        values = np.asarray(leaf)
        norms[path] = math.sqrt(np.vdot(values, values))
        return values

    def measured(path: str, leaf: Any) -> Any:
        if is_on_disk(leaf):
            return DiskArray(leaf.shape, leaf.dtype, functools.partial(read, path, leaf))
        read(path, leaf)
        return leaf

    return tree.map_with_path(measured, tau), norms


def _task_vector(config: TransportConfig, ready: Prepared, models: Models) -> tuple[PyTree, list[str]]:
    """The task vector of what is moved, and what should be known of the rest."""
    source = models[config.source]
    if config.task_vector is not None:
        return read_given(config.task_vector, source, ready.part, config.any_base), []
    assert config.finetuned is not None
    tuned = models[config.finetuned]
    tau = part_task_vector(ready.part, source.pretrained.params, tuned.pretrained.params, config.finetuned)
    return tau, changed_elsewhere(ready.part, source.pretrained, tuned.pretrained)


def _form(config: TransportConfig, tau: PyTree, moved: PyTree) -> str:
    """Whether an adapter is written: where one came in, and every leaf kept its factors."""
    leaves = [*tree.flatten(tau).values(), *tree.flatten(moved).values()]
    return "adapter" if not config.dense and all(map(is_low_rank, leaves)) else "model"


def _lost(moved: PyTree, forms: Forms, state: State) -> list[str]:
    """Which links did not keep the factors of an adapter, and which leaves came to nothing."""
    notes = []
    for part, form in zip(state.parts, forms, strict=False):  # no forms of a task vector that is no adapter
        lost = [path for path, said in form.items() if said.startswith("dense, from")]
        if lost:
            notes.append(f"{part.link} makes arrays of {len(lost)} leaves of the adapter ({lost[0]}, ...)")
    nothing = [path for path, leaf in tree.flatten(moved).items() if is_low_rank(leaf) and not leaf.rank]
    if nothing:
        notes.append(f"{len(nothing)} leaves of the adapter are zeroed by rule ({nothing[0]}, ...)")
    return notes


def _side(opened: Opened, ready: Prepared) -> Model:
    """What a fit walks of a model: what reads the examples, in float32, with its task where gradients are read."""
    if ready.found is not None and ready.moving.needs_gradients:
        return with_task(opened, ready.way.task(opened, ready.found, ready.prompts))
    model = ready.way.tower(opened.pretrained.model)
    return model.replace(params=float32(model.params))


def _fitted(work: _Work, tau: PyTree, **stream: Any) -> State:
    """The fitted transport, from the maps that are kept where there are some; of a stream, what is left of it."""
    config, ready, models, looked_at, _, progress = work
    source, target = models[config.source], models[config.target]
    sides = _side(source, ready), _side(target, ready)
    store = None
    if config.maps is not None:
        depends_on = {
            "method": ready.method,
            "options": json.dumps(config.options, sort_keys=True),
            "batch size": str(config.batch_size),
            "depth": config.depth,
            "tokens": config.tokens,
        }
        for side, opened in (("source", source), ("target", target)):
            identity = opened.pretrained.identity()
            depends_on |= {side: identity["base_fingerprint"], f"{side} config": identity["base_config"]}
            if looked_at is not None:
                depends_on[f"{side} processor"] = processor_fingerprint(opened.checkpoint.folder)
        if ready.moving.needs_task_vector:
            depends_on["task vector"] = fingerprint(tau)
        if looked_at is not None:
            depends_on["examples"] = looked_at["sha256"]
        if isinstance(ready.found, Texts):
            depends_on["length"] = str(ready.prompts.length)
        if ready.found is not None and (ready.moving.needs_gradients or isinstance(ready.found, Texts)):
            depends_on["classes"] = json.dumps(ready.found.class_names)
            depends_on["prompts"] = json.dumps(ready.prompts.templates)
        store = TransportStore(config.maps, depends_on)
    pairs, loader = ([], None) if ready.found is None else paired_batches(ready, source, target, config.batch_size)
    begin(progress, "fitting")
    options: dict[str, Any] = {"depth": ready.depth, "tokens": config.tokens, "progress": progress, "cache": store}
    options |= {"tau": tau if ready.moving.needs_task_vector else None, **stream}
    state = fit(ready.moving, *sides, pairs, **options)
    return dataclasses.replace(state, notes=(*inputs.notes_of(loader), *state.notes))


def _chosen(
    moved: PyTree,
    tau: PyTree,
    target: Opened,
    ready: Prepared,
    scored: Model,
    held_out: Loader,
    progress: Progress | None,
) -> tuple[ChosenScale, dict[str, Any] | None]:
    """The best scale, and what the task vector does as it is: the baseline that every transport must beat.

    There is none where shapes do not agree. The examples are read once for both.
    """
    edits = [(moved, scales_of(ready.moving))]
    as_it_is = copied(tau, target.pretrained.params)
    if not isinstance(as_it_is, str):
        edits.append((as_it_is, scales_of(identity())))
    best, *copies = choose_scales(scored, edits, held_out, progress)
    return best, {"scale": copies[0].scale, "accuracy": copies[0].accuracy} if copies else None


def _curve(chosen: ChosenScale, held_out: Any) -> dict[str, Any]:
    curve = {"scales": chosen.scales.tolist(), "accuracy": chosen.curve.tolist()}
    return {**inputs.record(held_out), **curve}


def _save(config: TransportConfig, result: Transported, models: Models, moved: PyTree, params: PyTree) -> None:
    """Writes the edited model, of these parameters where there are some, or the adapter; and the moved task vector."""
    receiver = models[config.target].pretrained
    card = _card(config, result.form, result.scale, result.examples, models)
    if result.form == "adapter":
        adapter = scale(moved, result.scale)
        save_adapter(adapter, config.output, receiver, metadata=receiver.identity(), card=card)
    else:
        edited = apply(receiver.params, moved, result.scale) if params is None else params
        save_pretrained(receiver.with_params(edited), config.output, card=card)
    if config.save_task_vector is not None:
        save_tree(config.save_task_vector, moved, receiver.identity())


def _write_report(config: TransportConfig, result: Transported, state: State, forms: Forms) -> None:
    """Writes what became of every leaf beside the model."""
    about = {name: value for name, value in result._asdict().items() if name not in ("output", "notes")}
    rows = [leaf._asdict() for leaf in leaf_report(state, forms)]
    leaves = [{name: value for name, value in row.items() if value or name != "form"} for row in rows]
    given = {"part": config.part, "task_vector": config.task_vector}
    content = {**about, **given, "notes": state.notes, "leaves": leaves}
    write_json(config.output / "leaf_report.json", content, sort_keys=False)
    write_text(config.output / "leaf_report.txt", summary(state, forms) + "\n")
    if processes.is_first():
        plot_norms(result.leaf_norms["source"], result.leaf_norms["target"], config.output / _PICTURE)


def _card(config: TransportConfig, form: str, scale: float, examples: dict[str, Any] | None, models: Models) -> str:
    """The model card of what is written."""
    inputs_of = {
        name: inputs.about_model(models[name].pretrained) for name in (config.source, config.finetuned) if name
    }
    if config.task_vector is not None:
        inputs_of[config.task_vector] = {"kind": "adapter" if is_adapter(config.task_vector) else "task vector"}
    after = f"; the fine-tuned source then taught it from there on ({config.refine})" if config.refine else ""
    return model_card(
        becomes(config.output).name,
        f"What a fine-tuning taught the source was moved into the base model by {config.method}"
        f"{after or ', without training'}.",
        models[config.target].pretrained.identity(),
        inputs=inputs_of,
        settings={
            "method": config.method,
            "scale": scale,
            "depth": config.depth,
            "tokens": config.tokens,
            # A method may have an option of a name that stands above, such as ``method``.
            **{f"option {name}": value for name, value in config.options.items()},
        },
        results=None if examples is None else {"examples": examples},
        pictures={"Norm by layer and kind of leaf, in the source and moved": _PICTURE},
        library="peft" if form == "adapter" else "transformers",
    )
