"""What a transport would do, from headers alone."""

from __future__ import annotations

from typing import Any, NamedTuple

from tvjax import tree
from tvjax.checkpoints.huggingface import check_new
from tvjax.jobs import inputs
from tvjax.jobs.asking import parameters
from tvjax.jobs.calibration import prepare
from tvjax.jobs.configs import PlanConfig
from tvjax.jobs.opened import Models
from tvjax.jobs.schema import Progress
from tvjax.stages import PyTree
from tvjax.transport.plan import Plan
from tvjax.transport.plan import plan as plan_fit


class Planned(NamedTuple):
    """What `plan` found.

    Attributes:
      leaves: what becomes of each.
      stages: of the target: the source's stage, how tokens are compared, the maps.
      images: how many examples there are, and how many make the maps unique.
      memory: bytes of arrays while reading, fitting and applying.
      fit: what the memory of the fit consists of.
      disk: bytes of what is written.
      notes: what the user should know.
    """

    leaves: list[dict[str, Any]]
    stages: list[dict[str, Any]]
    images: dict[str, int]
    memory: dict[str, int]
    fit: dict[str, int]
    disk: dict[str, int]
    notes: tuple[str, ...]


def plan(config: PlanConfig, progress: Progress | None = None) -> Planned:
    """Says what `tvjax.jobs.transport` would do; no weights are read, and nothing is written.

    Args:
      config: what a transport takes.
      progress: not called: this is done in no time.

    Raises:
      ValueError: what the transport would refuse.
    """
    if config.output is not None:
        check_new(config.output)
    if config.save_task_vector is not None:
        inputs.check_file(config.save_task_vector)
    with Models() as models:
        ready = prepare(config, models)
        found = ready.found
        number = config.count if found is None else len(found)
        sizes = [min(config.batch_size, number - start) for start in range(0, number, config.batch_size)]
        opened = [models[name] for name in (config.source, config.target)]
        held = [parameters(one) for one in opened]
        a, b = (ready.way.shapes(one, found, ready.prompts) for one in opened)
        views = [ready.way.batches(one, found, ready.prompts, sizes) for one in opened]
        if config.finetuned is not None:
            held.append(parameters(models[config.finetuned]))
    pairs = list(zip(*views, strict=True)) if ready.moving.needs_examples else []
    depth = "uniform" if ready.depth == "cka" else ready.depth  # which compares activations; sizes do not depend on it
    fitted = plan_fit(ready.moving, a, b, pairs, depth=depth, tokens=config.tokens)
    disk = {"edited model": tree.nbytes(held[1])}
    if config.maps is not None:
        disk["maps"] = fitted.memory["maps"]
    if config.save_task_vector is not None:
        disk["task vector"] = tree.nbytes(b.params)
    notes = [*inputs.notes_of(found, ready.held_out), *ready.notes]
    if config.depth == "cka":
        notes.append("source layers are paired by cka when they have been run; shown is uniform")
    return _planned(fitted, held, [a.params, b.params], number, disk, notes)


def _converted(held: PyTree, tower: PyTree) -> int:
    """Bytes of the float32 parameters of a tower that are stored in another dtype; the others are not held twice."""
    stored = tree.flatten(held)
    return tree.nbytes([leaf for path, leaf in tree.flatten(tower).items() if stored[path].dtype != leaf.dtype])


def _planned(
    found: Plan, held: list[PyTree], towers: list[PyTree], images: int, disk: dict[str, int], notes: list[str]
) -> Planned:
    """A plan as a record.

    Args:
      found: the plan of the fit.
      held: source, target and fine-tuned model as stored, in shapes.
      towers: source and target as they are computed with, in shapes.
      images: how many there are.
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
        "count": images,
        "for unique maps of tokens": max((m.examples for m in maps if m.rows > images), default=0),
        "for unique maps of one row an image": max((m.examples for m in maps if m.rows <= images), default=0),
        "maps": len(maps),
        "maps not unique": sum(planned.rows < min(planned.shape) for planned in maps),
    }
    memory = {
        "reading": read,
        "fitting": read + tau + sum(fit[name] for name in ("residual streams", "largest stage", "maps")),
        "applying": read + tau + fit["maps"] + moved + tree.nbytes(held[1]),
    }
    return Planned(leaves, stages, numbers, memory, dict(fit), disk, tuple(notes))
