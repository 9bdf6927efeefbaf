"""What a fit refuses before it computes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tvjax import tree
from tvjax.capture import check_gradient_identity
from tvjax.finite import check_finite
from tvjax.kinds import kind_of
from tvjax.stages import Batch, Model, Stream, check_model, owner_paths
from tvjax.transport.base import Transport, check_leaves
from tvjax.walk import Walk, differentiable

PyTree = Any


class Views(NamedTuple):
    """What two models see of a calibration batch.

    Attributes:
      source: what the source sees.
      target: what the target sees.
      overlaps: of texts that two tokenizers cut differently, by the mask of the tokens in the target,
        ``[examples, tokens_b, tokens_a]`` each (`tvjax.data.token_overlap`).
    """

    source: Batch
    target: Batch
    overlaps: Mapping[str, Any]


def views_of(batch: Any) -> Views:
    """What the source and what the target sees of a calibration batch."""
    if isinstance(batch, Batch):
        return Views(batch, batch, {})
    if isinstance(batch, tuple) and len(batch) in (2, 3) and all(isinstance(view, Batch) for view in batch[:2]):
        overlaps = batch[2] if len(batch) == 3 else {}
        if isinstance(overlaps, Mapping):
            return Views(batch[0], batch[1], overlaps)
    raise ValueError(
        "a calibration batch is a Batch, or a pair of Batches (for the source, for the target), with a mapping of "
        f"masks to overlaps where their tokens differ; found {kind_of(batch)}"
    )


def check_batches(name: str, views: list[Views], target: Model) -> None:
    """Raises a ValueError unless the views of each batch are of the same examples, and finite."""
    if not views:
        raise ValueError(f"{name} needs calibration batches, found none (an iterator that was used up before?)")
    for number, view in enumerate(views):
        sizes = [_examples(f"calibration batch {number}", batch) for batch in view[:2]]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"calibration batch {number} has {sizes[0]} examples for the source and {sizes[1]} for the target: "
                "both are views of the same examples, in the same order"
            )
        _check_overlaps(f"calibration batch {number}", view, sizes[0], target)
    if len({frozenset(view.overlaps) for view in views}) > 1:
        raise ValueError("some calibration batches have overlaps of tokens, and others do not: give them to all")
    for number, (source, receiver, overlaps) in enumerate(views):
        check_finite(
            {"source": source.inputs, "target": receiver.inputs, "overlaps": dict(overlaps)},
            f"calibration batch {number}",
        )


def _check_overlaps(name: str, view: Views, examples: int, target: Model) -> None:
    """Overlaps are called by masks of the target, and have the shapes of both sides' tokens."""
    layouts = [[s] if isinstance(s, Stream) else dict(s).values() for s in (stage.streams for stage in target.stages)]
    masks = sorted({layout.mask for found in layouts for layout in found if layout.mask is not None})
    for mask, overlap in view.overlaps.items():
        if mask not in masks:
            raise ValueError(
                f"{name}: an overlap of the tokens under the mask {mask!r}; the target's stages declare {masks} "
                "(tvjax.Stream(mask=...))"
            )
        sides = [batch.inputs if isinstance(batch.inputs, Mapping) else {} for batch in (view.target, view.source)]
        found = tuple(overlap.shape)
        tokens = [math.prod(jnp.shape(side[mask])[1:]) if mask in side else None for side in sides]
        expected = (examples, *tokens)
        if len(found) != 3 or any(wanted not in (None, size) for wanted, size in zip(expected, found, strict=True)):
            raise ValueError(
                f"{name}: the overlap of {mask!r} has shape {found}, expected [examples, tokens of the target, tokens "
                f"of the source] = {list(expected)}"
            )


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


def check_kinds(transport: Any, source: Any, target: Any) -> None:
    """Raises a ValueError unless these are a transport and two models, such as a name or a folder is not."""
    if not isinstance(transport, Transport):
        raise ValueError(
            f"the transport is {kind_of(transport)}, expected what tvjax.theseus() and the like give, or "
            "tvjax.chain of several"
        )
    check_model("source", source)
    check_model("target", target)


def check_models(transport: Transport, source: Model, target: Model) -> None:
    """Raises a ValueError where a model lacks what the transport reads, or shapes differ that must not."""
    for model in (source, target):
        tree.check_arrays(model.params)
    for link in transport.links:
        if link.check is not None:
            link.check(source, target)
    if transport.needs_gradients:
        reads_source = any(link.needs.gradients and link.needs.source for link in transport.links)
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
        repeats = (
            first is not None and first.space == "source_to_target"
        )  # its layers may be paired, where the depths differ
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


def check_task_vector(transport: Transport, source: Model, tau: PyTree) -> None:
    """Raises a ValueError unless a task vector is given just where a link is fitted with it, and is the source's."""
    readers = [link.name for link in transport.links if link.needs.task_vector]
    if tau is None and readers:
        raise ValueError(
            f"{readers[0]} is fitted with one task vector, and its state is of that one alone: "
            "fit(transport, source, target, batches, tau=tau)"
        )
    if tau is not None and not readers:
        raise ValueError(
            f"no link of {transport.name} is fitted with the task vector: leave tau out, and give it to apply"
        )
    if tau is not None:
        check_leaves(tau, {path: tuple(jnp.shape(leaf)) for path, leaf in tree.flatten(source.params).items()})
        check_finite(tau, "the task vector")


def check_common_leaves(source: Model, target: Model, pairing: Sequence[int]) -> None:
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


def check_stages(walk: Walk) -> None:
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
