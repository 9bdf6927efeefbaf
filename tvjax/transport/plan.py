"""What a fit would do, from shapes alone: pairs of stages, maps and their rows, what becomes of every leaf, memory.

`fit` is traced with `jax.eval_shape`: nothing is computed, no parameter is read, and what a fit refuses is refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tvjax import placement, tree
from tvjax.align import tokens as token_alignment
from tvjax.capture import SiteTable
from tvjax.on_disk import is_on_disk
from tvjax.spread import sharding_of
from tvjax.stages import Model, local_params, owner_paths
from tvjax.transport.base import LinkState, MapInfo, Needs, State, Transport
from tvjax.transport.checks import check_kinds
from tvjax.transport.fit import Batches, Fitting
from tvjax.transport.leaf_report import LeafReport, leaf_report
from tvjax.transport.pair import Pair, owner_of_leaves
from tvjax.transport.plan_mesh import memory_by_device, moment_bytes
from tvjax.walk import Walk


class PlannedStage(NamedTuple):
    """A stage of the target.

    Attributes:
      target: its name.
      source: name of its partner.
      tokens: tokens of an activation in the source, in the target, and after alignment; None without a token axis.
      maps: the maps between the two.
      size: bytes of what is alive while the stage is fitted: activations, gradients, moments.
      streamed: bytes of what is alive of the stage where its parameters are on disk: its maps, both sides' parameters
        and what is alive while it is fitted. Later the leaves of a task vector, before and after, take their place.
    """

    target: str
    source: str
    tokens: tuple[int, int, int] | None
    maps: tuple[MapInfo, ...]
    size: int
    streamed: int


class Plan(NamedTuple):
    """What a fit would do.

    Attributes:
      stages: the target's stages in their order.
      leaves: what becomes of every leaf, as `tvjax.transport.leaf_report` has it, without measures.
      memory: bytes by what they hold: ``parameters`` of both models (and of the fine-tuned source, where a link is
        fitted with the task vector), ``residual streams``, as many as are held at once (of a walk forwards those of two
        stages, of one backwards those of all, and two gradients; overlaps of other tokens), the ``largest stage``, the
        ``maps`` of all stages, and the task vector before and after (``task vectors``). With parameters and task
        vectors on disk and moved leaves written away there are the residual streams and the ``largest streamed
        stage``. Arrays only: the runtime, compiled programs and workspace come on top.
      notes: what the fit may do otherwise.
      on_device: where a model lies over a mesh, bytes on the device that holds most
        (`tvjax.transport.plan_mesh.memory_by_device`).
    """

    stages: tuple[PlannedStage, ...]
    leaves: tuple[LeafReport, ...]
    memory: dict[str, int]
    notes: tuple[str, ...] = ()
    on_device: dict[str, int] = {}  # noqa: RUF012 - never written to


def plan(
    transport: Transport,
    source: Model,
    target: Model,
    batches: Batches,
    *,
    depth: Any = "uniform",
    tokens: token_alignment.Mode = "interpolate",
) -> Plan:
    """What `fit` would do with these arguments; the arrays may be `jax.ShapeDtypeStruct`.

    Args:
      transport: what to fit.
      source: the model that task vectors come from.
      target: the model that they go to.
      batches: calibration batches, as in `fit`, not by link.
      depth: as in `fit`; ``"cka"`` compares activations, which a plan does not compute: it is planned as
        ``"uniform"``, and a note says so.
      tokens: as in `fit`.

    Raises:
      ValueError: whatever `fit` refuses before it computes.

    >>> from tvjax.stages import Batch, single_stage
    >>> from tvjax.transport import theseus
    >>> shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    >>> small, large = (single_stage(lambda p, x: x @ p["w"], {"w": shape(n, n)}) for n in (3, 5))
    >>> found = plan(theseus(), small, large, [(Batch(shape(4, 3)), Batch(shape(4, 5)))])
    >>> [(leaf.target, leaf.action) for leaf in found.leaves], [m.shape for m in found.stages[0].maps]
    ([('w', 'rotated')], [(3, 5), (3, 5)])
    """
    check_kinds(transport, source, target)
    notes: tuple[str, ...] = ()
    if transport.needs_examples:
        planned = _without_activations(depth)
        notes = (
            () if planned == depth else ("source layers are paired by cka when they have been run; shown is uniform",)
        )
        depth = planned
    stages: dict[str, PlannedStage] = {}
    streams = 0
    source, target = (jax.tree.map(lambda x: tree.leaf_type(x) if is_on_disk(x) else x, m) for m in (source, target))

    def traced(source: Model, target: Model, batches: Any) -> State:
        nonlocal streams
        tau = _of_all(source) if transport.needs_task_vector else None
        work = Fitting(transport, source, target, batches, depth, tokens, tau=tau)
        work.cache = _OncePerKind(work)
        parts: tuple[LinkState, ...] | None = None
        walks = next(([Walk(walk.model, walk.batches) for walk in both] for both in work.walks if both), None)
        for pair, found in work:
            stages[pair.name] = _planned_stage(transport, pair, walks, found)
            parts = found if parts is None else tuple(a.merge(b) for a, b in zip(parts, found, strict=True))
        assert parts is not None
        streams = _streams(work) + tree.nbytes(work.overlaps)
        return work.state(tuple(dataclasses.replace(part, measures={}) for part in parts), ())

    batches = list(batches)
    with placement.within(placement.explicit_mesh(())):  # how arrays lie is looked at below, and is no part of shapes
        state = jax.eval_shape(traced, *jax.tree.map(_without_sharding, (source, target, batches)))
    order = [stages[stage.name] for stage in target.stages if stage.name in stages]
    memory = {
        "parameters": tree.nbytes((source.params, target.params, source.params if transport.needs_task_vector else ())),
        "residual streams": streams,
        "largest stage": max(stage.size for stage in order),
        "largest streamed stage": max(stage.streamed for stage in order),
        "maps": tree.nbytes([part.arrays for part in state.parts]),
        "task vectors": sum(4 * math.prod(x.shape) for m in (source, target) for x in jax.tree.leaves(m.params)),
    }
    about = [(stage.size, stage.maps) for stage in order]
    on_device = memory_by_device(source, target, batches, streams, about, state)
    return Plan(tuple(order), tuple(leaf_report(state)), memory, notes, on_device)


def _without_sharding(leaf: Any) -> Any:
    return leaf if sharding_of(leaf) is None else tree.leaf_type(leaf)


def _of_all(source: Model) -> dict[str, Any]:
    """A task vector that covers all parameters, for its shapes."""
    leaves = tree.flatten(source.params)
    return {path: leaf for path, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.floating)}


def _without_activations(depth: Any) -> Any:
    """The rule of depth with ``"uniform"`` in the place of ``"cka"``."""
    if isinstance(depth, Mapping):
        return {group: _without_activations(rule) for group, rule in depth.items()}
    return "uniform" if isinstance(depth, str) and depth == "cka" else depth


class _OncePerKind:
    """A store that gives a stage the parts of one like it, under its own names: one pair of each kind is traced."""

    def __init__(self, work: Fitting):
        self.links, self.models = work.transport.links, (work.source, work.target)
        partners = [work.source.stages[index] for index in work.pairing]
        self.pairs = {b.name: (a, b) for a, b in zip(partners, work.target.stages, strict=True)}
        self.owner = owner_of_leaves(work.target)
        self.known: dict[Any, tuple[str, tuple[LinkState, ...]]] = {}

    def load(self, stage: str) -> tuple[LinkState, ...] | None:
        """The parts of a stage of a known kind."""
        if (kind := self._kind(stage)) not in self.known:
            return None
        like, parts = self.known[kind]
        sources, targets = (
            dict(zip(theirs.values(), mine.values(), strict=True))
            for theirs, mine in zip(self._paths(like), self._paths(stage), strict=True)
        )
        renamed, moved = [], False
        for link, part in zip(self.links, parts, strict=True):
            inputs = targets if moved or link.space == "target" else sources
            renamed.append(_renamed(part, f"{like}:", f"{stage}:", inputs, targets))
            moved = moved or link.space == "source_to_target"
        return tuple(renamed)

    def save(self, stage: str, parts: tuple[LinkState, ...]) -> None:
        """Keeps the parts of the first stage of a kind."""
        self.known[self._kind(stage)] = stage, parts

    def _paths(self, name: str) -> list[dict[str, str]]:
        """Paths in the models by path in the stage, of the source's stage and of the target's."""
        pair = zip(self.pairs[name], self.models, strict=True)
        return [owner_paths(stage, model.params) for stage, model in pair]

    def _kind(self, name: str) -> Any:
        pair = list(zip(self.pairs[name], self.models, strict=True))
        functions = tuple(
            (stage.function, stage.streams, stage.fixed, stage.heads, stage.vocabulary) for stage, _ in pair
        )
        leaves = [tree.flatten(local_params(stage, model.params)) for stage, model in pair]
        shapes = tuple((side, path, jnp.shape(x)) for side in (0, 1) for path, x in leaves[side].items())
        owned = tuple(local for local, path in self._paths(name)[1].items() if self.owner[path] == name)
        return functions, shapes, owned


def _renamed(part: LinkState, like: str, stage: str, sources: dict[str, str], targets: dict[str, str]) -> LinkState:
    """A part under the names of another stage: maps begin with its name, masks are called by its leaves."""

    def name(old: str) -> str:
        return targets[old] if old in targets else stage + old.removeprefix(like)

    rules = [
        rule._replace(
            target=targets[rule.target],
            source=rule.source and sources[rule.source],
            pieces=tuple(
                p._replace(inner=p.inner and name(p.inner), outer=p.outer and name(p.outer)) for p in rule.pieces
            ),
        )
        for rule in part.rules
    ]
    maps = tuple(info._replace(name=name(info.name)) for info in part.maps)
    return LinkState(part.link, {name(old): array for old, array in part.arrays.items()}, {}, tuple(rules), maps)


def _planned_stage(
    transport: Transport, pair: Pair, walks: Sequence[Walk] | None, parts: Sequence[LinkState]
) -> PlannedStage:
    partner = pair.source.model.stages[pair.source_index].name
    sides = [
        tree.nbytes(walk.stored(i)) for walk, i in ((pair.source, pair.source_index), (pair.target, pair.target_index))
    ]
    maps_of = tree.nbytes([part.arrays for part in parts])
    if walks is None:
        return PlannedStage(pair.name, partner, None, (), 0, sum(sides) + maps_of)
    tables = walks[0].table(pair.source_index), walks[1].table(pair.target_index)
    maps = [info for part in parts for info in part.maps]
    seen = next((info.tokens for info in maps if info.tokens is not None), None)
    moments = sum(map(moment_bytes, maps))
    activations = sum(_activations(table, transport.needs_gradients) for table in tables)
    size = activations + moments
    return PlannedStage(pair.name, partner, seen, tuple(maps), size, sum(sides) + size + maps_of)


def _activations(table: SiteTable, gradients: bool) -> int:
    """Bytes of the activations at the sites of a stage, each counted once, in float32."""
    sizes = {}
    for site in table.sites:
        rows = 4 * math.prod(site.rows)
        sizes[site.output] = rows * site.d_out
        if site.input is not None:
            sizes[site.input] = rows * site.d_in
        if gradients:
            sizes[site.gradient] = rows * site.d_out
    return sum(sizes.values())


def _streams(work: Fitting) -> int:
    """Bytes of what the stages of both models take and return, and of their gradients, as many as are held at once."""
    seen: dict[int, tuple[tuple[Walk, Walk], list[Needs]]] = {}  # links that share batches share their walks
    for link, walks in zip(work.transport.links, work.walks, strict=True):
        if walks is not None:
            seen.setdefault(id(walks), (walks, []))[1].append(link.needs)
    total = 0
    for walks, needs in seen.values():
        sizes = [[tree.nbytes(x) for x in _boundaries(walk)] for walk in walks]
        if not any(one.source for one in needs):
            sizes[0] = [sizes[0][0], *(0 for _ in sizes[0][1:])]  # nothing of it is run
        if not work.transport.needs_gradients:
            order = list(zip(work.pairing, range(len(work.pairing)), strict=True))
            total += _forwards(order, sizes)
            if any(one.task_vector for one in needs):  # the fine-tuned source is walked beside the source
                total += _forwards(order, [sizes[0], [0] * len(sizes[1])])
            continue
        gradients = [any(one.gradients and (side or one.source) for one in needs) for side in (0, 1)]
        orders = work.pairing, range(len(work.pairing))
        steps = [_backwards(*side) for side in zip(orders, sizes, gradients, strict=True)]
        total += max(map(sum, zip(*steps, strict=True)))
    return total


def _boundaries(walk: Walk) -> list[Any]:
    """What every stage takes, and the last one returns."""
    fresh = Walk(walk.model, walk.batches)
    return [fresh.carries(index) for index in range(len(walk.model.stages) + 1)]


def _forwards(order: Sequence[tuple[int, int]], sizes: Sequence[Sequence[int]]) -> int:
    """The most that two walks hold that visit pairs of stages in this order, and forget what none of the rest takes.

    >>> _forwards([(0, 0), (1, 1), (2, 2)], [[1, 4, 4, 4], [1, 2, 2, 2]])
    12
    """
    held, most = [{0}, {0}], 0
    for done, pair in enumerate(order):
        for side, index in enumerate(pair):
            first = min(rest[side] for rest in order[done:])
            while (last := max(held[side])) < index:  # one is computed from the one before
                held[side].add(last + 1)
                alive = (sum(sizes[i][j] for j in own | {0}) for i, own in enumerate(held))
                most = max(most, sum(alive))  # the inputs are the caller's, and stay
                held[side] = {j for j in held[side] if j >= first or j > last}
            held[side] = {j for j in held[side] if j >= first}
    return max(most, sum(own[0] for own in sizes))


def _backwards(order: Sequence[int], sizes: Sequence[int], gradients: bool) -> list[int]:
    """What a walk holds at each stage of this order, the last stage first: carries, and gradients down to the next.

    >>> _backwards([0, 1, 2], [1, 4, 4, 2], True), _backwards([0, 1, 2], [1, 4, 4, 2], False)
    ([17, 13, 5], [9, 5, 1])
    """
    found = []
    for done, index in enumerate(reversed(order)):
        below = order[-done - 2] if done + 2 <= len(order) else -1
        carries = sum(sizes[: index + (2 if gradients and not done else 1)])
        found.append(carries + (sum(sizes[max(below, 0) + 1 : index + 2]) if gradients else 0))
    return found
