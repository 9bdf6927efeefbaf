"""What a transport would do, from headers alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tvjax import tree
from tvjax.checkpoints.huggingface import check_new
from tvjax.jobs import inputs
from tvjax.jobs.asking import float32, parameters
from tvjax.jobs.calibration import Prepared, paired_batches, prepare
from tvjax.jobs.configs import PlanConfig
from tvjax.jobs.matching import overlap_shapes
from tvjax.jobs.opened import Models, Opened
from tvjax.jobs.parts import copied
from tvjax.jobs.recommended import with_method
from tvjax.jobs.refined import prepare_refinement
from tvjax.progress import Progress, begin
from tvjax.renamed import warn
from tvjax.stages import Batch, PyTree
from tvjax.transport import likeness
from tvjax.transport.plan import Plan
from tvjax.transport.plan import plan as plan_fit

_WORKED_ON = 3  # copies of a leaf as it is stored: as read, in our layout, and edited


class Planned(NamedTuple):
    """What `plan` found.

    Attributes:
      method: the transport.
      leaves: what becomes of each.
      stages: of the target: the source's stage, how tokens are compared, the maps.
      examples: how many there are, and how many make the maps unique.
      memory: bytes of arrays while reading, fitting and applying; and with the models on disk (``--stream``) of the
        stage at which they are the most, ``streaming``.
      fit: what the memory of the fit consists of.
      disk: bytes of what is written.
      copy: what is against adding the task vector as it is, the baseline of every transport; "" where nothing is.
      likeness: how alike the models are on the examples, by block (`tvjax.transport.likeness`), where it is asked for.
      notes: what the user should know.
    """

    method: str
    leaves: list[dict[str, Any]]
    stages: list[dict[str, Any]]
    examples: dict[str, int]
    memory: dict[str, int]
    fit: dict[str, int]
    disk: dict[str, int]
    copy: str
    likeness: list[dict[str, Any]] | None
    notes: tuple[str, ...]

    @property
    def images(self) -> Any:
        """The old name of `examples`."""
        warn("images", "examples")
        return self.examples


def plan(config: PlanConfig, progress: Progress | None = None) -> Planned:
    """Says what `tvjax.jobs.transport` would do; nothing is written, and no weights are read but to compare the models.

    Args:
      config: what a transport takes.
      progress: called when a part begins, and after every block that is compared.

    Raises:
      ValueError: what the transport would refuse.
    """
    if config.output is not None:
        check_new(config.output)
    if config.save_task_vector is not None:
        inputs.check_file(config.save_task_vector)
    begin(progress, "looking at the models")
    with Models(progress=progress) as models:
        config, why = with_method(config, models)
        ready = prepare(config, models)
        ready = ready._replace(notes=(*why, *ready.notes))
        if config.refine and config.finetuned:
            prepare_refinement(config, models)
        found = ready.found
        number = config.count if found is None else len(found)
        sizes = [min(config.batch_size, number - start) for start in range(0, number, config.batch_size)]
        opened = [models[name] for name in (config.source, config.target)]
        held = [parameters(one) for one in opened]
        a, b = (ready.way.shapes(one, found, ready.prompts) for one in opened)
        views = [ready.way.batches(one, found, ready.prompts, sizes) for one in opened]
        if config.finetuned is not None:
            held.append(parameters(models[config.finetuned]))
        alike = _likeness(ready, opened[0], opened[1], config, progress) if config.compare else None
    pairs = [_pair(ready, *view) for view in zip(*views, strict=True)] if ready.moving.needs_examples else []
    depth = "uniform" if ready.depth == "cka" else ready.depth  # which compares activations; sizes do not depend on it
    begin(progress, "tracing the fit")
    fitted = plan_fit(ready.moving, a, b, pairs, depth=depth, tokens=config.tokens)
    disk = {"edited model": tree.nbytes(held[1])}
    if config.maps is not None:
        disk["maps"] = fitted.memory["maps"]
    if config.save_task_vector is not None:
        disk["task vector"] = tree.nbytes(b.params)
    notes = [*inputs.notes_of(found, ready.held_out), *ready.notes]
    if config.depth == "cka":
        notes.append("source layers are paired by cka when they have been run; shown is uniform")
    as_it_is = copied(tree.nest(ready.part.of(held[0])), held[1])
    found_of_fit = _planned(ready.method, fitted, held, [a.params, b.params], number, disk, notes)
    return found_of_fit._replace(copy=as_it_is if isinstance(as_it_is, str) else "", likeness=alike)


def _pair(ready: Prepared, a: Batch, b: Batch) -> Any:
    """What a fit takes of a batch, in shapes."""
    if not ready.by_characters:
        return a, b
    return a, b, {mask: jax.ShapeDtypeStruct(shape, jnp.float32) for mask, shape in overlap_shapes(a, b).items()}


def _likeness(
    ready: Prepared, source: Opened, target: Opened, config: PlanConfig, progress: Progress | None
) -> list[dict[str, Any]]:
    """How alike the models are on the examples."""
    a, b = (ready.way.tower(one.pretrained.model) for one in (source, target))
    a, b = (side.replace(params=float32(side.params)) for side in (a, b))
    pairs, _ = paired_batches(ready, source, target, config.batch_size)
    found = likeness(a, b, pairs, depth=ready.depth, tokens=config.tokens, progress=progress)
    return [one._asdict() for one in found]


def _converted(held: PyTree, tower: PyTree) -> int:
    """Bytes of the float32 parameters of a tower that are stored in another dtype; the others are not held twice."""
    stored = tree.flatten(held)
    return tree.nbytes([leaf for path, leaf in tree.flatten(tower).items() if stored[path].dtype != leaf.dtype])


def _planned(
    method: str,
    found: Plan,
    held: list[PyTree],
    towers: list[PyTree],
    examples: int,
    disk: dict[str, int],
    notes: list[str],
) -> Planned:
    """A plan as a record.

    Args:
      method: the transport.
      found: the plan of the fit.
      held: source, target and fine-tuned model as stored, in shapes.
      towers: source and target as they are computed with, in shapes.
      examples: how many there are.
      disk: bytes of what is written.
      notes: what the user should know.
    """
    maps = [planned for stage in found.stages for planned in stage.maps]
    fit = found.memory
    tau, moved = map(tree.nbytes, towers)
    read = tree.nbytes(held) + sum(_converted(*sides) for sides in zip(held, towers, strict=False))
    leaves = [
        {"link": x.link, "target": x.target, "source": x.source, "action": x.action, "why": x.why} for x in found.leaves
    ]
    stages = [
        {"target": x.target, "source": x.source, "tokens": x.tokens, "maps": [own._asdict() for own in x.maps]}
        for x in found.stages
    ]
    numbers = {
        "count": examples,
        "for unique maps of tokens": max((m.examples for m in maps if m.rows > examples), default=0),
        "for unique maps of one row an example": max((m.examples for m in maps if m.rows <= examples), default=0),
        "maps": len(maps),
        "maps not unique": sum(planned.rows < min(planned.shape) for planned in maps),
    }
    largest = max(map(tree.nbytes, jax.tree.leaves(held)))
    memory = {
        "reading": read,
        "fitting": read + tau + sum(fit[name] for name in ("residual streams", "largest stage", "maps")),
        "applying": read + tau + fit["maps"] + moved + tree.nbytes(held[1]),
        "streaming": fit["residual streams"] + fit["largest streamed stage"] + _WORKED_ON * largest,
    }
    return Planned(method, leaves, stages, numbers, memory, dict(fit), disk, "", None, tuple(notes))
