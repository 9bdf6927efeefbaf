"""Fitting a transport: two models walked side by side, one pair of stages at a time.

For every stage of the target its partner in the source is found (depth pairing), both are run on the same calibration
rows with their sites observed, every link of the chain reduces what it needs to maps and masks, and what was observed
is dropped. Transports that read gradients are walked from the last stage to the first, others from the first on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol, get_args

import jax
import jax.numpy as jnp
import numpy as np

from tvjax import tree
from tvjax.align import depth as layers
from tvjax.align import tokens as token_alignment
from tvjax.align.procrustes import Rotation
from tvjax.align.rows import alignment, arranged, on_tokens, padding_mask
from tvjax.capture import SiteTable, check_gradient_identity
from tvjax.capture.axes import of_argument
from tvjax.finite import check_finite
from tvjax.stages import Batch, Model, Stage, layer_groups, owner_paths
from tvjax.transport.base import Flat, Part, State, Transport, check_leaves
from tvjax.walk import Walk, differentiable

PyTree = Any
Batches = Iterable[Batch | tuple[Batch, Batch]]
Progress = Callable[[int, int, str], None]


class PartStore(Protocol):
    """Where the fitted parts of stages are kept, so that a run that was interrupted goes on."""

    def load(self, stage: str) -> tuple[Part, ...] | None:
        """The parts of a stage of the target, one for each link; None where they are not kept."""

    def save(self, stage: str, parts: tuple[Part, ...]) -> None:
        """Keeps the parts of a stage."""


class Leaf(NamedTuple):
    """A leaf of a target stage and its partner.

    Attributes:
      local: path within the stage.
      target: path in the target model.
      source: path in the source model, None where the source stage has no such leaf.
      shape: of the target leaf.
      source_shape: of the source leaf, () where there is none.
    """

    local: str
    target: str
    source: str | None
    shape: tuple[int, ...]
    source_shape: tuple[int, ...]


class Pair:
    """A stage of the target and its partner in the source, with the calibration rows of both.

    Attributes:
      source: the source model on the calibration rows.
      source_index: position of the stage in the source.
      target: the target model on the calibration rows.
      target_index: position of the stage in the target.
      tokens: token alignment mode.
      board: what links leave for stages that are visited later (sums over tied leaves).
      moved: whether an earlier link has brought the task vector into the target's parameters.
      depth: which source layer a target layer is paired with, for layers that a stage stacks.
    """

    def paired_layers(self, depth_a: int, depth_b: int) -> tuple[int, ...]:
        """For each of the layers that a scan stacks in the target, the one in the source."""
        stage = self.stages[1]
        rule = self.depth
        if isinstance(rule, Mapping):
            rule = rule.get(stage.group or stage.name, "uniform")
        if rule == "cka":
            raise ValueError(
                f"stage {stage.name!r} stacks its layers, whose activations depth='cka' does not see: give a list of "
                "layers, or take the stack apart into stages (tvjax.unstack)"
            )
        return layers.pair_layers(depth_a, depth_b, rule)

    def __init__(
        self,
        source: Walk,
        source_index: int,
        target: Walk,
        target_index: int,
        tokens: token_alignment.Mode,
        board: dict[str, Any],
        moved: bool,
        depth: Any = "uniform",
    ):
        self.source, self.source_index = source, source_index
        self.target, self.target_index = target, target_index
        self.tokens, self.board, self.moved, self.depth = tokens, board, moved, depth
        self.name = target.model.stages[target_index].name
        self.batches = len(target.batches)
        self.stages = source.model.stages[source_index], target.model.stages[target_index]

    @cached_property
    def source_leaves(self) -> dict[str, jax.Array]:
        """The parameters of the source stage by local path."""
        return tree.flatten(self.source.params(self.source_index))

    @cached_property
    def target_leaves(self) -> dict[str, jax.Array]:
        """The parameters of the target stage by local path."""
        return tree.flatten(self.target.params(self.target_index))

    @cached_property
    def source_table(self) -> SiteTable:
        """The sites of the source stage."""
        return self.source.table(self.source_index)

    @cached_property
    def target_table(self) -> SiteTable:
        """The sites of the target stage."""
        return self.target.table(self.target_index)

    @cached_property
    def leaves(self) -> tuple[Leaf, ...]:
        """The floating leaves that the target stage owns, with their partners."""
        model, stage = self.target.model, self.target.model.stages[self.target_index]
        theirs = owner_paths(self.source.model.stages[self.source_index], self.source.model.params)
        owned = owner_of_leaves(model)
        return tuple(
            Leaf(
                local,
                path,
                theirs.get(local),
                tuple(jnp.shape(self.target_leaves[local])),
                tuple(jnp.shape(self.source_leaves[local])) if local in theirs else (),
            )
            for local, path in owner_paths(stage, model.params).items()
            if owned[path] == stage.name and jnp.issubdtype(jnp.result_type(self.target_leaves[local]), jnp.floating)
        )


def fit(
    transport: Transport,
    source: Model,
    target: Model,
    batches: Batches | Mapping[str, Batches] = (),
    *,
    depth: str | Sequence[int] | Mapping[str, str | Sequence[int]] = "uniform",
    tokens: token_alignment.Mode = "interpolate",
    check: bool = False,
    host: bool = False,
    task: str = "",
    progress: Progress | None = None,
    store: PartStore | None = None,
) -> State:
    """Fits a transport on a pair of models.

    Args:
      transport: what to fit.
      source: the model that task vectors come from.
      target: the model that they go to.
      batches: calibration batches: `Batch`es that both models take, or pairs ``(for the source, for the target)`` of
        views of the same examples; or a mapping from link names to such, for links that draw on different examples.
        Labels where a link reads gradients; none at all where every link needs only the parameters.
      depth: which source layer a target layer is paired with: ``"uniform"``, ``"cka"`` (the monotone pairing that
        maximises linear CKA of the residual streams of the first batch), or a list of source layers; or a mapping from
        groups to these.
      tokens: how rows are matched where the models see different tokens: ``"interpolate"``, ``"class_token"`` or
        ``"mean"``.
      check: verify the gradient identity once for each kind of target stage before fitting.
      host: keep residual streams in host memory.
      task: name of the task whose labels are used; noted in the state.
      progress: called with (stages done, stages in all, name of the stage).
      store: keeps what is fitted, stage by stage, and gives it back to a later run
        (`tvjax.checkpoints.TransportStore`).

    Returns:
      The state, a pytree.

    Raises:
      ValueError: models that cannot be matched, missing labels or loss, no rows, parameters, inputs or gradients of the
        loss that are not finite; the message names what and where.
    """
    parts: tuple[Part, ...] | None = None
    stream = Fitting(transport, source, target, batches, depth, tokens, check, host, task, progress, store)
    for _, found in stream:
        parts = found if parts is None else tuple(a.merge(b) for a, b in zip(parts, found, strict=True))
    assert parts is not None
    return stream.state(parts, stream.notes(parts))


def transport_stages(
    transport: Transport,
    source: Model,
    target: Model,
    batches: Batches | Mapping[str, Batches],
    taus: Sequence[PyTree],
    *,
    depth: str | Sequence[int] | Mapping[str, str | Sequence[int]] = "uniform",
    tokens: token_alignment.Mode = "interpolate",
    check: bool = False,
    host: bool = False,
    task: str = "",
    progress: Progress | None = None,
) -> list[PyTree]:
    """Fits a transport and applies it to task vectors stage by stage, dropping the maps of a stage once it is done.

    The same as ``[transport.apply(fit(...), tau) for tau in taus]`` without ever holding the maps of two stages.

    Args:
      transport: what to fit.
      source: the model that task vectors come from.
      target: the model that they go to.
      batches: as in `fit`.
      taus: task vectors of the source.
      depth: as in `fit`.
      tokens: as in `fit`.
      check: as in `fit`.
      host: as in `fit`.
      task: as in `fit`.
      progress: as in `fit`.

    Returns:
      The transported task vectors.

    Raises:
      ValueError: as `fit` does, and for a task vector that is not one of the source or not finite, before anything is
        computed.
    """
    shapes = {path: tuple(jnp.shape(leaf)) for path, leaf in tree.flatten(source.params).items()}
    for number, tau in enumerate(taus):
        check_leaves(tau, shapes)
        check_finite(tau, f"task vector {number}")
    stream = Fitting(transport, source, target, batches, depth, tokens, check, host, task, progress)
    flats = [{path: jnp.asarray(leaf, jnp.float32) for path, leaf in tree.flatten(tau).items()} for tau in taus]
    moved: list[Flat] = [{} for _ in taus]
    for pair, found in stream:
        sources = {leaf.source for leaf in pair.leaves}
        state = stream.state(found, ())
        for result, flat in zip(moved, flats, strict=True):
            piece = transport.apply(state, tree.nest({path: leaf for path, leaf in flat.items() if path in sources}))
            result.update(tree.flatten(piece))
    paths = list(tree.flatten(target.params))
    return [
        jax.tree.unflatten(jax.tree.structure(target.params), [flat[path] for path in paths])
        if set(flat) == set(paths)
        else tree.nest(flat)
        for flat in moved
    ]


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
        check: bool = False,
        host: bool = False,
        task: str = "",
        progress: Progress | None = None,
        store: PartStore | None = None,
    ):
        self.transport, self.source, self.target = transport, source, target
        self.tokens, self.check, self.task, self.progress, self.store = tokens, check, task, progress, store
        self.depth = depth
        if tokens not in get_args(token_alignment.Mode):
            raise ValueError(f"tokens must be one of {get_args(token_alignment.Mode)}, found {tokens!r}")
        _check_models(transport, source, target)
        for side, model in (("source", source), ("target", target)):
            check_finite(model.params, f"the {side} model")
        if isinstance(batches, Mapping):
            unknown = [name for name in batches if name not in {link.name for link in transport.links}]
            if unknown:
                raise ValueError(f"calibration batches are given for {unknown}, which are no links of {transport.name}")
        self._known: dict[int, tuple[Any, tuple[Walk, Walk]]] = {}  # links that share batches share their walks
        self.walks = [self._walks(link.name, link.reads, batches, host) for link in transport.links]
        walks = next((w for w in self.walks if w is not None), None)
        self.pairing = _pair_stages(source, target, depth, walks, tokens)
        _check_common_leaves(source, target, self.pairing)

    def _walks(self, name: str, reads: Any, batches: Any, host: bool) -> tuple[Walk, Walk] | None:
        if not reads.activations and not reads.gradients:
            return None
        if isinstance(batches, Mapping):
            if name not in batches:
                raise ValueError(f"no calibration batches for {name}: found batches for {sorted(batches)}")
            batches = batches[name]
        key = id(batches)
        known = self._known
        if key not in known:
            views = [_views(batch) for batch in batches]
            _check_batches(name, views)
            source, target = (
                Walk(model, [view[side] for view in views], host)
                for side, model in enumerate((self.source, self.target))
            )
            known[key] = batches, (source, target)
        walks = known[key][1]
        if reads.gradients and any(batch.labels is None for walk in walks for batch in walk.batches):
            raise ValueError(f"{name} reads gradients, so its calibration batches need labels: Batch(inputs, labels)")
        return walks

    def __iter__(self) -> Iterator[tuple[Pair, tuple[Part, ...]]]:
        read = next((walks for walks in self.walks if walks is not None), None)
        if self.check and read is not None:
            _check_stages(read[1])
        order = list(enumerate(self.pairing))
        if self.transport.needs_gradients:
            order.reverse()
        boards: list[dict[str, Any]] = [{} for _ in self.walks]
        bare = Walk(self.source, []), Walk(self.target, [])
        for done, (target_index, source_index) in enumerate(order):
            pairs = []
            moved = False
            for link, walks, board in zip(self.transport.links, self.walks, boards, strict=True):
                a, b = walks or bare
                pairs.append(Pair(a, source_index, b, target_index, self.tokens, board, moved, self.depth))
                moved = moved or link.space == "bridge"
            stage = pairs[0].name
            parts = None if self.store is None else self.store.load(stage)
            if parts is None:
                parts = tuple(link.fit(pair) for link, pair in zip(self.transport.links, pairs, strict=True))
                if self.store is not None and not any(boards):  # else a later stage needs what this one left there
                    self.store.save(stage, parts)
            if self.progress is not None:
                self.progress(done + 1, len(order), stage)
            yield pairs[0], parts
            if done + 1 < len(order):
                self._release(order[done + 1 :])

    def _release(self, rest: list[tuple[int, int]]) -> None:
        """Forgets the residual streams that the rest of the pairs, (target, source), does not need."""
        needed = [source for _, source in rest], [target for target, _ in rest]
        reads = [(link.reads, walks) for link, walks in zip(self.transport.links, self.walks, strict=True) if walks]
        for link_reads, (source, target) in reads:  # two links may share one walk: all ask before one forgets
            if link_reads.gradients:
                target.cotangents(max(needed[1]))
            if link_reads.gradients and link_reads.source:
                source.cotangents(max(needed[0]))
        for _, walks in reads:
            for walk, stages in zip(walks, needed, strict=True):
                if self.transport.needs_gradients:
                    walk.release_after(max(stages))
                else:
                    walk.release_before(min(stages))

    def notes(self, parts: tuple[Part, ...]) -> tuple[str, ...]:
        """What the user should know of these parts."""
        notes = []
        for part in parts:
            found = {name: m["rows"] for name, m in part.measures.items() if "rank" in m}
            if tree.is_traced(found):
                continue
            rows = jax.device_get(found)
            short = [name for name, count in rows.items() if _is_short(part.arrays[name], count)]
            if short:
                notes.append(
                    f"{part.link}: {len(short)} of {len(rows)} maps have fewer calibration rows "
                    f"({rows[short[0]]:.0f} at {short[0]}) than dimensions, so they are not unique; the data determine "
                    "only part of them"
                )
        if self.task:
            notes.append(f"fitted with the labels of {self.task}: for another task, fit again")
        return tuple(notes)

    def state(self, parts: tuple[Part, ...], notes: tuple[str, ...]) -> State:
        """The state that these parts make."""
        paths, sources = (tuple(tree.flatten(model.params)) for model in (self.target, self.source))
        return State(parts, jax.tree.structure(self.target.params), paths, sources, notes)


def _is_short(rotation: Rotation, rows: float) -> bool:
    return rows < min(rotation.left.shape[-2], rotation.right.shape[-1])


def _views(batch: Any) -> tuple[Batch, Batch]:
    if isinstance(batch, Batch):
        return batch, batch
    if isinstance(batch, tuple) and len(batch) == 2 and all(isinstance(view, Batch) for view in batch):
        return batch[0], batch[1]
    raise ValueError(
        "a calibration batch is a Batch, or a pair of Batches (for the source, for the target); found "
        f"{type(batch).__name__}"
    )


def _check_batches(name: str, views: list[tuple[Batch, Batch]]) -> None:
    if not views:
        raise ValueError(f"{name} needs calibration batches, found none (an iterator that was used up before?)")
    for number, view in enumerate(views):
        sizes = [_examples(f"calibration batch {number}", batch) for batch in view]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"calibration batch {number} has {sizes[0]} examples for the source and {sizes[1]} for the target: "
                "both are views of the same examples, in the same order"
            )
    for number, (source, target) in enumerate(views):
        check_finite({"source": source.inputs, "target": target.inputs}, f"calibration batch {number}")


def _examples(name: str, batch: Batch) -> int:
    """How many examples a batch has; its labels must be as many."""
    inputs, labels = ([jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(part)] for part in batch)
    if not inputs or () in inputs:
        raise ValueError(f"{name}: its inputs must be arrays with the example axis first")
    examples = inputs[0][0]
    if examples == 0:
        raise ValueError(f"{name} has no examples: its first axis is empty")
    for length in labels:
        if length != (examples,):
            raise ValueError(
                f"{name}: labels of leading shape {length} for {examples} examples, one for each is needed"
            )
    return examples


def _check_models(transport: Transport, source: Model, target: Model) -> None:
    for model in (source, target):
        tree.check_arrays(model.params)
    if transport.needs_gradients:
        reads_source = any(link.reads.gradients and link.reads.source for link in transport.links)
        for name, model in (("source", source), ("target", target)):
            if not model.has_loss and (name == "target" or reads_source):
                raise ValueError(
                    f"{transport.name} reads gradients, but the {name} model has no loss: Model.with_loss(...)"
                )
    first = next((link for link in transport.links if link.space != "any"), None)
    if first is None or first.same_shapes:
        shapes = [
            {path: tuple(jnp.shape(leaf)) for path, leaf in tree.flatten(model.params).items()}
            for model in (source, target)
        ]
        repeats = first is not None and first.space == "bridge"  # its layers may be paired, where the depths differ
        for path in {**shapes[1], **shapes[0]}:
            found = [s.get(path) for s in shapes]
            if found[0] == found[1] or (repeats and None in found):
                continue
            where = [
                f"{'missing' if shape is None else shape} in the {side}"
                for shape, side in zip(found, ("source", "target"), strict=True)
            ]
            raise ValueError(
                f"{transport.name} needs models of one shape: {path} is {' and '.join(where)}; put theseus() or bico() "
                "first, they move across widths and depths"
            )


def _check_common_leaves(source: Model, target: Model, pairing: Sequence[int]) -> None:
    """Raises unless at least one leaf of the target has a partner, and what stages call fixed is there."""
    common = 0
    for model in (source, target):
        for stage in model.stages:
            own = owner_paths(stage, model.params)
            if missing := [path for path in stage.fixed if path not in own]:
                raise ValueError(
                    f"stage {stage.name!r} calls {missing} fixed, and has no such leaves; it has {list(own)[:8]}"
                )
    for stage, index in zip(target.stages, pairing, strict=True):
        theirs = owner_paths(source.stages[index], source.params)
        common += len(theirs.keys() & owner_paths(stage, target.params).keys())
    if not common:
        paths = [list(tree.flatten(model.params)) for model in (source, target)]
        raise ValueError(
            "no leaf of the target has a partner of the same name in the source, so nothing would be moved. The source "
            f"has\n{tree.list_some(paths[0], 4)}\nthe target has\n{tree.list_some(paths[1], 4)}\nbring both into one "
            "layout first: the same module classes, and both stacks scanned or both unrolled (tvjax.unstack)"
        )


def _pair_stages(source: Model, target: Model, depth: Any, walks: tuple[Walk, Walk] | None, tokens: str) -> list[int]:
    """For each stage of the target the index of its partner in the source."""
    theirs, mine = layer_groups(source), layer_groups(target)
    missing = [name for name in mine if name not in theirs]
    if missing:
        raise ValueError(
            f"the target's stages {missing} have no partner in the source, whose stages are {sorted(theirs)}: "
            "transport between models of one family, or take their common tower"
        )
    if isinstance(depth, Mapping) and (unknown := [name for name in depth if name not in mine]):
        raise ValueError(f"depth names {unknown}, the target's groups of layers are {sorted(mine)}")
    partners: list[int] = []
    for stage in target.stages:
        name = stage.group or stage.name
        position = mine[name].index(stage)
        rule = depth.get(name, "uniform") if isinstance(depth, Mapping) else depth
        if len(mine[name]) == 1 and len(theirs[name]) == 1:
            rule = "uniform"
        if rule == "cka":
            if walks is None:
                raise ValueError(
                    "depth='cka' compares activations, and this transport reads none: give a list of layers"
                )
            rule = _cka_pairing(walks, theirs[name], mine[name], tokens)
            depth = {**(depth if isinstance(depth, Mapping) else {}), name: rule}
        chosen = layers.pair_layers(len(theirs[name]), len(mine[name]), rule)[position]
        partners.append(source.stages.index(theirs[name][chosen]))
    return partners


def _cka_pairing(
    walks: tuple[Walk, Walk], theirs: Sequence[Stage], mine: Sequence[Stage], tokens: Any
) -> tuple[int, ...]:
    """The monotone pairing that maximises linear CKA of what the layers return, on the first batch."""
    features, masks, axes = [], [], []
    for walk, stages in zip(walks, (theirs, mine), strict=True):
        carries = [walk.carries(walk.model.stages.index(stage) + 1)[0] for stage in stages]
        path = next(path for path, x in tree.flatten(carries[0]).items() if jnp.issubdtype(x.dtype, jnp.floating))
        features.append([tree.flatten(carry)[path] for carry in carries])
        rows_of = [factor for axis in of_argument(path, features[-1][0])[:-1] for factor in axis]
        axes.append(arranged([f.size for f in rows_of], [f.label for f in rows_of]))
        masks.append(padding_mask(stages[0], carries[0], axes[-1]))
    operators = alignment(axes[0], axes[1], (theirs[0], mine[0]), tokens)
    rows, weights = [], []
    for side, own, operator, mask in zip(features, axes, operators, masks, strict=True):
        aligned = [on_tokens(hidden.reshape(-1, hidden.shape[-1]), own, operator, mask) for hidden in side]
        rows.append([x for x, _ in aligned])
        weights.append(aligned[0][1])
    real = np.asarray(weights[0] * weights[1]) > 0
    similarity = jax.device_get([[layers.linear_cka(x[real], y[real]) for y in rows[1]] for x in rows[0]])
    return layers.monotone_pairing(np.array(similarity))


def _check_stages(walk: Walk) -> None:
    """The gradient identity, once for each function of a stage."""
    seen = set()
    compared = 0
    for index, stage in enumerate(walk.model.stages):
        if stage.function in seen:
            continue
        seen.add(stage.function)
        table = walk.table(index)
        if not {site.path for site in table.sites} - set(table.unclassified):
            continue  # nothing but look-ups, or no parameters at all
        compared += 1
        carry = walk.carries(index)[0]

        def loss(params: PyTree, carry: PyTree, function: Any = stage.function) -> jax.Array:
            return sum(
                (jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in differentiable(function(params, carry))[0]),
                jnp.float32(0),
            )

        try:
            check_gradient_identity(loss, walk.params(index), carry)
        except ValueError as error:
            raise ValueError(f"stage {stage.name}: {error}") from None
    if not compared:
        raise ValueError(
            "the gradient identity was asked for, and no stage has a parameter at an operation with a rule"
        )


def owner_of_leaves(model: Model) -> dict[str, str]:
    """For each leaf the name of the first stage that takes it: its owner."""
    owner: dict[str, str] = {}
    for stage in model.stages:
        for path in owner_paths(stage, model.params).values():
            owner.setdefault(path, stage.name)
    return owner
