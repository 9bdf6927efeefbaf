"""Fitting a transport: two models walked side by side, one pair of stages at a time.

For every stage of the target its partner in the source is found (depth pairing), both are run on the same calibration
rows with their sites observed, every link of the chain reduces what it needs to maps and masks, and what was observed
is dropped. Transports that read gradients are walked from the last stage to the first, others from the first on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, get_args

import jax
import jax.numpy as jnp

from tvjax import placement, processes, tree
from tvjax.align import tokens as token_alignment
from tvjax.arithmetic import apply
from tvjax.factors import float32
from tvjax.finite import check_finite
from tvjax.on_disk import trim
from tvjax.placement import name_of
from tvjax.progress import Progress
from tvjax.renamed import renamed_arguments, warn
from tvjax.spread import brought, lies_elsewhere, mesh_of
from tvjax.stages import Batch, Model
from tvjax.transport.base import Flat, LinkState, State, Transport, check_leaves
from tvjax.transport.checks import (
    check_batches,
    check_common_leaves,
    check_kinds,
    check_models,
    check_stages,
    check_task_vector,
    views_of,
)
from tvjax.transport.fingerprint import check_same
from tvjax.transport.pair import Pair
from tvjax.transport.pairing import pair_stages
from tvjax.transport.placed import placed_part, shardings_of
from tvjax.walk import Walk

PyTree = Any
Overlaps = Mapping[str, Any]
Batches = Iterable[Batch | tuple[Batch, Batch] | tuple[Batch, Batch, Overlaps]]
Write = Callable[[int, str, Any], None]


class StateCache(Protocol):
    """Where the fitted parts of stages are kept, so that a run that was interrupted goes on."""

    def load(self, stage: str) -> tuple[LinkState, ...] | None:
        """The parts of a stage of the target, one for each link; None where they are not kept."""

    def save(self, stage: str, parts: tuple[LinkState, ...]) -> None:
        """Keeps the parts of a stage."""


@renamed_arguments(check="check_gradients", host="offload", store="cache")
@placement.automatic(like=lambda *args, **options: ())  # where all arrays lie is said below
def fit(
    transport: Transport,
    source: Model,
    target: Model,
    batches: Batches | Mapping[str, Batches] = (),
    *,
    depth: str | Sequence[int] | Mapping[str, str | Sequence[int]] = "uniform",
    tokens: token_alignment.Mode = "interpolate",
    check_gradients: bool = False,
    offload: bool = False,
    task: str = "",
    progress: Progress | None = None,
    cache: StateCache | None = None,
    stream: Sequence[PyTree] | None = None,
    tau: PyTree = None,
    write: Write | None = None,
) -> State | Any:
    """Fits a transport on a pair of models.

    Models, and task vectors of a stream, may have leaves on disk (``load(name, on_disk=True)``): those of a stage are
    read when it is reached, and let go after it.

    Args:
      transport: what to fit.
      source: the model that task vectors come from.
      target: the model that they go to.
      batches: calibration batches: `Batch`es that both models take, or pairs ``(for the source, for the target)`` of
        views of the same examples, or of texts that two tokenizers cut differently triples with ``{"mask": overlap}``
        beside, `tvjax.data.token_overlap` of the tokens under this mask: layers and tables whose rows or outputs are
        words are then left as they are; or a mapping from link names to such, for links that draw on different
        examples.
        Labels where a link reads gradients; none at all where every link needs only the parameters.
      depth: which source layer a target layer is paired with: ``"uniform"``, ``"cka"`` (the monotone pairing that
        maximises linear CKA of the residual streams of the first batch), or a list of source layers; or a mapping from
        groups to these.
      tokens: how rows are matched where the models see different patch grids: ``"interpolate"``, ``"class_token"`` or
        ``"mean"``.
      check_gradients: verify the gradient identity once for each kind of target stage before fitting.
      offload: keep residual streams in host memory.
      task: name of the task whose labels are used; noted in the state.
      progress: called with (stages done, stages in all, name of the stage).
      cache: keeps what is fitted, stage by stage, and gives it back to a later run
        (`tvjax.checkpoints.TransportStore`).
      stream: task vectors of the source to move while it is fitted: the maps of a stage are applied to them and
        dropped, so that those of two stages are never held.
      tau: the task vector of the source that a link is fitted with (`ariadne`), and no other link reads; that of the
        stream, where there is one.
      write: takes the moved leaves as they are made, so that these are never all held either: called with the number of
        the task vector, the path in the target and the leaf, in float32 (or of low rank).

    Returns:
      The state, a pytree. Where there is a stream, the transported task vectors in its place, the same as
      ``[transport.apply(state, tau) for tau in stream]``; where these are written, the state without its maps, for
      `leaf_report`.

    Raises:
      ValueError: models that cannot be matched, missing labels or loss, no rows, parameters, inputs or gradients of the
        loss that are not finite, or a task vector that is not one of the source; one that is missing, or that no link
        is fitted with; the message names what and where.
    """
    check_kinds(transport, source, target)
    models = {"source": source.params, "target": target.params, "task vectors": (tau, stream)}
    processes.check_same("fit", {"transport": transport, **models, "depth": depth, "tokens": tokens})
    if stream is not None:
        _check_stream(source, stream)
        if transport.needs_task_vector and tau is None and len(stream) == 1:
            tau = stream[0]
    elif write is not None:
        raise ValueError("write takes the moved leaves of a stream of task vectors: give stream=[tau, ...] too")
    fitting = Fitting(
        transport, source, target, batches, depth, tokens, check_gradients, offload, task, progress, cache, tau
    )
    if stream is not None:
        return _streamed(fitting, stream, write)
    parts: tuple[LinkState, ...] | None = None
    for _, found in fitting:
        parts = _merged(parts, found)
    assert parts is not None
    return fitting.state(parts, fitting.notes(parts))


def _merged(parts: tuple[LinkState, ...] | None, found: tuple[LinkState, ...]) -> tuple[LinkState, ...]:
    return found if parts is None else tuple(a.merge(b) for a, b in zip(parts, found, strict=True))


def transport_stages(
    transport: Transport, source: Model, target: Model, batches: Any, taus: Sequence[PyTree], **options: Any
) -> Any:
    """The old name of ``fit(..., stream=taus)``."""
    warn("transport_stages(..., taus)", "fit(..., stream=taus)")
    return fit(transport, source, target, batches, stream=taus, **options)


def _check_stream(source: Model, taus: Sequence[PyTree]) -> None:
    """Raises a ValueError for a task vector that is not one of the source, or not finite."""
    shapes = {path: tuple(jnp.shape(leaf)) for path, leaf in tree.flatten(source.params).items()}
    for number, tau in enumerate(taus):
        check_leaves(tau, shapes)
        check_finite(tau, f"task vector {number}")


def _streamed(fitting: Fitting, taus: Sequence[PyTree], write: Write | None) -> list[PyTree] | State:
    """Task vectors moved stage by stage, the maps of a stage dropped once they are applied."""
    flats = [tree.flatten(tau) for tau in taus]
    moved: list[Flat] = [{} for _ in taus]
    parts: tuple[LinkState, ...] | None = None
    for pair, found in fitting:
        _move(fitting, pair, found, flats, write or (lambda number, path, leaf: moved[number].update({path: leaf})))
        parts = _merged(parts, tuple(dataclasses.replace(part, arrays={}) for part in found))
        del found  # gone before the next stage is fitted
        trim()
    assert parts is not None
    if write is not None:
        return dataclasses.replace(fitting.state(parts, fitting.notes(parts)), streamed=True)
    paths, structure = list(tree.flatten(fitting.target.params)), jax.tree.structure(fitting.target.params)
    return [
        jax.tree.unflatten(structure, [flat[path] for path in paths]) if set(flat) == set(paths) else tree.nest(flat)
        for flat in moved
    ]


def _move(fitting: Fitting, pair: Pair, found: tuple[LinkState, ...], flats: Sequence[Flat], give: Write) -> None:
    """The leaves that a stage takes, of each task vector, given to a function once they are moved."""
    sources = {leaf.source for leaf in pair.leaves}
    state = fitting.state(found, ())
    for number, flat in enumerate(flats):
        part = tree.nest({path: float32(leaf) for path, leaf in flat.items() if path in sources})
        for path, leaf in tree.flatten(fitting.transport.apply(state, part)).items():
            give(number, path, leaf)


class _Seen(NamedTuple):
    """The calibration batches inside both models, and the overlaps of their tokens by batch.

    Attributes:
      walks: of the source and of the target.
      overlaps: by batch.
      finetuned: of the fine-tuned source; None where no link is fitted with the task vector.
    """

    walks: tuple[Walk, Walk]
    overlaps: Sequence[Overlaps]
    finetuned: Walk | None


class Fitting:
    """Checks everything that can be checked before any compute, then yields the parts of one pair after another."""

    def __init__(
        self,
        transport: Transport,
        source: Model,
        target: Model,
        batches: Any,
        depth: Any,
        tokens: token_alignment.Mode,
        check_gradients: bool = False,
        offload: bool = False,
        task: str = "",
        progress: Progress | None = None,
        cache: StateCache | None = None,
        tau: PyTree = None,
    ):
        self.transport, self.source, self.target = transport, source, target
        self.tokens, self.check_gradients, self.task = tokens, check_gradients, task
        self.progress, self.cache = progress, cache
        self.depth, self.tau = depth, tau
        self.mesh, self.shardings = mesh_of(target.params, source.params), shardings_of(target.params)
        self.resharded: list[str] = []
        if self.mesh is not None and lies_elsewhere((source.params, source.loss_params), self.mesh):
            self.source = source = brought(source, self.mesh)
            self.resharded.append(f"the source lay on other devices, and is spread over the mesh {name_of(self.mesh)}")
        if tokens not in get_args(token_alignment.Mode):
            raise ValueError(f"tokens must be one of {get_args(token_alignment.Mode)}, found {tokens!r}")
        check_models(transport, source, target)
        for side, model in (("source", source), ("target", target)):
            check_finite(model.params, f"the {side} model")
        check_task_vector(transport, source, tau)
        if isinstance(batches, Mapping):
            unknown = [name for name in batches if name not in {link.name for link in transport.links}]
            if unknown:
                raise ValueError(f"calibration batches are given for {unknown}, which are no links of {transport.name}")
        self._known: dict[int, tuple[Any, _Seen]] = {}  # links that share batches share their walks
        seen = [self._seen(link.name, link.needs, batches, offload) for link in transport.links]
        self.walks = [one and one.walks for one in seen]
        self.finetuned = [one and one.finetuned for one in seen]
        self.overlaps = [one.overlaps if one else [] for one in seen]
        first = next(filter(None, seen), None)
        walks, overlaps = (None, ()) if first is None else (first.walks, first.overlaps)
        self.pairing = pair_stages(source, target, depth, walks, overlaps, tokens)
        check_common_leaves(source, target, self.pairing)

    def _seen(self, name: str, reads: Any, batches: Any, offload: bool) -> _Seen | None:
        if not reads.activations and not reads.gradients:
            return None
        if isinstance(batches, Mapping):
            if name not in batches:
                raise ValueError(f"no calibration batches for {name}: found batches for {sorted(batches)}")
            batches = batches[name]
        key = id(batches)
        known = self._known
        if key not in known:
            views = [views_of(batch) for batch in batches]
            processes.check_same(f"fit {name} on", {"batches": [(view.source, view.target) for view in views]})
            if self.mesh is not None:
                views = brought(views, self.mesh)
            check_batches(name, views, self.target)
            walks = (
                Walk(self.source, [view.source for view in views], offload),
                Walk(self.target, [view.target for view in views], offload),
            )
            overlaps = [view.overlaps if offload else jax.tree.map(jnp.asarray, dict(view.overlaps)) for view in views]
            finetuned = None
            if self.transport.needs_task_vector:
                tuned = self.source.replace(params=apply(self.source.params, self.tau))
                finetuned = Walk(tuned, walks[0].batches, offload)
            known[key] = batches, _Seen(walks, overlaps, finetuned)
        seen = known[key][1]
        if reads.gradients and any(batch.labels is None for walk in seen.walks for batch in walk.batches):
            raise ValueError(f"{name} reads gradients, so its calibration batches need labels: Batch(inputs, labels)")
        return seen

    def __iter__(self) -> Iterator[tuple[Pair, tuple[LinkState, ...]]]:
        read = next((walks for walks in self.walks if walks is not None), None)
        if self.check_gradients and read is not None:
            check_stages(read[1])
        order = list(enumerate(self.pairing))
        if self.transport.needs_gradients:
            order.reverse()
        boards: list[dict[str, Any]] = [{} for _ in self.walks]
        bare = Walk(self.source, []), Walk(self.target, [])
        for done, (target_index, source_index) in enumerate(order):
            pairs = []
            moved = False
            for link, walks, tuned, overlaps, board in zip(
                self.transport.links, self.walks, self.finetuned, self.overlaps, boards, strict=True
            ):
                a, b = walks or bare
                own = tuned if link.needs.task_vector else None
                pair = Pair(
                    a, source_index, b, target_index, self.tokens, board, moved, self.depth, overlaps, own, self.tau
                )
                pairs.append(pair)
                moved = moved or link.space == "source_to_target"
            stage = pairs[0].name
            parts = None if self.cache is None else self.cache.load(stage)
            cached = parts is not None
            for link, part in zip(self.transport.links, parts or (), strict=False):
                if link.needs.task_vector:
                    check_same(part.link, part.arrays, tree.flatten(self.tau))
            if parts is None:
                parts = tuple(link.fit(pair) for link, pair in zip(self.transport.links, pairs, strict=True))
            parts = tuple(placed_part(part, self.shardings, self.mesh) for part in parts)
            if cached and self.mesh is not None and len(self.resharded) < 2:
                self.resharded.append(f"what the cache held is spread over the mesh {name_of(self.mesh)}")
            if not cached:
                waiting = any(any(board.values()) for board in boards)  # a later stage needs what this one left
                if self.cache is not None and not waiting:
                    self.cache.save(stage, parts)
            if self.progress is not None:
                self.progress(done + 1, len(order), stage)
            if done + 1 < len(order):
                self._release(order[done + 1 :])
            for walk in {walk for walks in (bare, *filter(None, self.walks)) for walk in walks}:
                walk.let_go()
            yield pairs[0], parts
            del parts  # gone before the next stage is fitted

    def _release(self, rest: list[tuple[int, int]]) -> None:
        """Forgets the residual streams that the rest of the pairs, (target, source), does not need."""
        needed = [source for _, source in rest], [target for target, _ in rest]
        reads = [(link.needs, walks) for link, walks in zip(self.transport.links, self.walks, strict=True) if walks]
        for link_needs, (source, target) in reads:  # two links may share one walk: all ask before one forgets
            if link_needs.gradients:
                target.cotangents(max(needed[1]))
            if link_needs.gradients and link_needs.source:
                source.cotangents(max(needed[0]))
        tuned = [(walk, needed[0]) for walk in self.finetuned if walk is not None]
        for walks_needed in [*(zip(walks, needed, strict=True) for _, walks in reads), tuned]:
            for walk, stages in walks_needed:
                if self.transport.needs_gradients:
                    walk.release_after(max(stages))
                else:
                    walk.release_before(min(stages))

    def notes(self, parts: tuple[LinkState, ...]) -> tuple[str, ...]:
        """What the user should know of these parts."""
        notes = list(self.resharded)
        for part in parts:
            found = {info.name: part.measures[info.name]["rows"] for info in part.maps}
            if tree.is_traced(found):
                continue
            rows = processes.fetch(found)
            short = [info.name for info in part.maps if rows[info.name] < info.dimensions]
            if short:
                notes.append(
                    f"{part.link}: {len(short)} of {len(rows)} maps have fewer calibration rows "
                    f"({rows[short[0]]:.0f} at {short[0]}) than dimensions, so they are not unique; the data determine "
                    "only part of them"
                )
        if self.task:
            notes.append(f"fitted with the labels of {self.task}: for another task, fit again")
        return tuple(notes)

    def state(self, parts: tuple[LinkState, ...], notes: tuple[str, ...]) -> State:
        """The state that these parts make."""
        paths, sources = (tuple(tree.flatten(model.params)) for model in (self.target, self.source))
        return State(parts, jax.tree.structure(self.target.params), paths, sources, notes)
