"""What a transport is: links of pure functions, chained; a fitted state; and applying it to a task vector.

A transport is fitted once on a pair of models and applied to as many task vectors as one likes:

    rebase = chain(bico(), gradfix(), scale_by(1.5))
    state = fit(rebase, source, target, batches)
    edited = apply(target.params, rebase.apply(state, tau))

The state is a pytree: maps and masks are its leaves, and the rule of each parameter (which source leaf, seen how,
through which maps) is static. So ``jit(rebase.apply)`` works, and so do `vmap` over task vectors and `grad`.

Some links are fitted with the task vector (``fit(..., tau=tau)``): their state is the moved task vector, and is of no
other (`tvjax.transport.ariadne`).

Leaves of low rank (`tvjax.LowRank`) stay so through links that only multiply their two sides, and become arrays in the
others; `tvjax.transport.leaf_forms` says where.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from tvjax import placement, tree
from tvjax.capture.views import View
from tvjax.factors import float32, scaled
from tvjax.finite import check_factor, check_finite
from tvjax.placement import name_of
from tvjax.spread import brought, lies_elsewhere, like_leaf, mesh_of

PyTree = Any
Flat = dict[str, Any]  # of arrays, and leaves of low rank
OptionsT = TypeVar("OptionsT", bound=tuple)


class LeafUse(NamedTuple):
    """One way in which a leaf is used, in both models, and the maps of its two sides (None: identity).

    Attributes:
      kind: of the site.
      source_view: from the source's leaf to the kernel or vector.
      target_view: from the target's leaf to it.
      inner: name of the map of the inputs.
      outer: name of the map of the outputs.
      groups: blocks of a block-diagonal kernel in the source and in the target, None where it is one matrix.
      taps: pixels of a convolution's window.
    """

    kind: str
    source_view: View
    target_view: View
    inner: str | None
    outer: str | None
    groups: tuple[int, int] | None = None
    taps: int = 1


class Rule(NamedTuple):
    """What one link does to one leaf of the target.

    Attributes:
      target: path in the target model.
      source: path in the space that the link takes its task vectors from; "" where nothing corresponds.
      action: ``rotated``, ``permuted``, ``masked``, ``shifted``, ``scaled``, ``passed through``, ``zeroed by rule`` or
        ``unmatched``; ``fitted`` by a link that is
        fitted with the task vector.
      shape: of the target leaf.
      source_shape: of the source leaf.
      pieces: the uses of a rotated leaf.
      why: one phrase where the action is not the link's ordinary one.
      sharding: how the target leaf lies, where it lies over a mesh (its axes automatic).
    """

    target: str
    source: str
    action: str
    shape: tuple[int, ...]
    source_shape: tuple[int, ...]
    pieces: tuple[LeafUse, ...] = ()
    why: str = ""
    sharding: NamedSharding | None = None


class MapInfo(NamedTuple):
    """What is known of a map from shapes alone.

    Attributes:
      name: of the map, among the arrays of its part.
      shape: ``(d_a, d_b)``.
      rows: calibration rows that it is fitted on, padding included.
      examples: calibration examples from which on it is unique: as many rows as the smaller dimension.
      tokens: tokens of an example in the source, in the target, and after alignment; None without a token axis.
      heads: heads of the source and of the target that have maps of their own, or that share this one.
      shared: whether all heads share it; its shape is then that of a head.
    """

    name: str
    shape: tuple[int, int]
    rows: int
    examples: int
    tokens: tuple[int, int, int] | None = None
    heads: tuple[int, int] = (1, 1)
    shared: bool = False

    @property
    def dimensions(self) -> int:
        """How many rows make it unique: as many as the smaller dimension, that of a head where heads have maps."""
        if self.shared:
            return min(self.shape)
        return min(size // heads for size, heads in zip(self.shape, self.heads, strict=True))

    @property
    def moment(self) -> tuple[int, int]:
        """Shape of the cross-moment that it is taken from."""
        if not self.shared:
            return self.shape
        return self.shape[0] * self.heads[0], self.shape[1] * self.heads[1]


@partial(jax.tree_util.register_dataclass, data_fields=("arrays", "measures"), meta_fields=("link", "rules", "maps"))
@dataclasses.dataclass(frozen=True)
class LinkState:
    """The fitted state of one link.

    Attributes:
      link: its name.
      arrays: maps, masks and the like, by name: arrays, or NamedTuples of arrays. Only the link knows what they mean.
      measures: numbers for the report (rank, residual, ties ...), by the names of the arrays.
      rules: one for each leaf of the target.
      maps: what shapes tell of the arrays that are maps between activations.
    """

    link: str
    arrays: dict[str, PyTree]
    measures: dict[str, dict[str, jax.Array]]
    rules: tuple[Rule, ...]
    maps: tuple[MapInfo, ...] = ()

    def merge(self, other: LinkState) -> LinkState:
        """Both parts in one: the stages of a model, put together."""
        return LinkState(
            self.link,
            self.arrays | other.arrays,
            self.measures | other.measures,
            self.rules + other.rules,
            self.maps + other.maps,
        )


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("parts",),
    meta_fields=("structure", "paths", "sources", "notes", "streamed"),
)
@dataclasses.dataclass(frozen=True)
class State:
    """A fitted transport.

    Attributes:
      parts: one for each link of the chain.
      structure: tree structure of the target's parameters; None for a state read from a file of nested dicts.
      paths: the target's leaves, in the order of the structure.
      sources: the source's leaves; those of layers that the depth pairing drops go nowhere.
      notes: what a user should know (rows fewer than dimensions, layers that were dropped, the task of the labels).
      streamed: whether the maps were applied to a stream and dropped, so that only the report is left.
    """

    parts: tuple[LinkState, ...]
    structure: Any
    paths: tuple[str, ...]
    sources: tuple[str, ...]
    notes: tuple[str, ...] = ()
    streamed: bool = False

    def check_kept(self) -> None:
        """Raises a ValueError where the maps were dropped."""
        if self.streamed:
            raise ValueError(
                "the maps of this fit were applied to its stream and dropped: keep them with fit(..., cache=...), or "
                "fit without write"
            )

    @property
    def mesh(self) -> Mesh | None:
        """The mesh that the target lies over; None where it lies on one device."""
        return mesh_of([rule.sharding for part in self.parts for rule in part.rules])


STATE_TYPES: dict[str, type] = {}


def register_state(kind: type) -> type:
    """Makes a NamedTuple of arrays known, so that a fitted state that holds it can be read from a file.

    >>> class Pair(NamedTuple):
    ...     left: jax.Array
    ...     right: jax.Array
    >>> register_state(Pair) is STATE_TYPES.pop("Pair")
    True
    """
    known = STATE_TYPES.setdefault(kind.__name__, kind)
    if known is not kind:
        raise ValueError(f"two kinds of state are called {kind.__name__!r}: {known.__module__} and {kind.__module__}")
    return kind


class Needs(NamedTuple):
    """What a link needs while it is fitted."""

    activations: bool = False
    gradients: bool = False  # implies labels and a loss
    source: bool = True
    task_vector: bool = False  # what is fitted is the moved task vector


class Link(NamedTuple):
    """One link of a transport: a pair of pure functions and what they need.

    Attributes:
      name: of the method.
      space: ``"source_to_target"`` (from the source's parameters to the target's), ``"target"`` (within the
        target's) or ``"any"``.
      needs: what `fit` looks at.
      fit: ``(pair) -> LinkState`` for one pair of stages (`tvjax.transport.pair.Pair`).
      transform: ``(part, flat task vector) -> flat task vector``.
      same_shapes: whether source and target leaf must have one shape.
      check: ``(source, target)``, raises a ValueError where options do not fit the models; looks at no array.
    """

    name: str
    space: Literal["source_to_target", "target", "any"]
    needs: Needs
    fit: Callable[[Any], LinkState]
    transform: Callable[[LinkState, Flat], Flat]
    same_shapes: bool = False
    check: Callable[[Any, Any], None] | None = None


class Transport(NamedTuple):
    """A chain of links; made by `theseus`, `bico`, `gradfix`, ..., and joined by `chain`."""

    links: tuple[Link, ...]

    @property
    def name(self) -> str:
        """Names of the links, joined by ``+``."""
        return "+".join(link.name for link in self.links)

    @property
    def needs_examples(self) -> bool:
        """Whether fitting looks at calibration examples, labelled or not."""
        return any(link.needs.activations or link.needs.gradients for link in self.links)

    @property
    def needs_gradients(self) -> bool:
        """Whether fitting needs labels and a loss."""
        return any(link.needs.gradients for link in self.links)

    @property
    def needs_task_vector(self) -> bool:
        """Whether it is fitted with the task vector, and serves no other."""
        return any(link.needs.task_vector for link in self.links)

    def apply(self, state: State, tau: PyTree) -> PyTree:
        """The task vector in the target's parameters.

        Args:
          state: what `fit` returned for this transport.
          tau: task vector of the source model, or of a subtree of it; None leaves are not covered. Its leaves may be of
            low rank.

        Returns:
          Float32 task vector over the target leaves whose source leaf `tau` covers: in the structure of the target's
          parameters where it covers them all, else as nested dicts.

        Raises:
          ValueError: a state of another transport, or without its maps; a leaf that the source does not have, or of
            another shape; values that are not finite (inside `jit` there are none to look at); another task vector than
            the one that a link was fitted with (inside `jit`, where nothing can be raised, the result is NaN).
        """
        names = tuple(part.link for part in state.parts)
        if names != tuple(link.name for link in self.links):
            raise ValueError(f"this state was fitted for {'+'.join(names)}, not for {self.name}")
        state.check_kept()
        flat = _moved(self.links, state, tree.flatten(tau))
        if state.structure is not None and set(flat) == set(state.paths):
            return jax.tree.unflatten(state.structure, [flat[path] for path in state.paths])
        return tree.nest(flat)


def _target_leaves(links: Sequence[Link], state: State, flat: Flat) -> Flat:
    """The shapes of the target's leaves, and how they lie."""
    return {
        rule.target: jax.ShapeDtypeStruct(rule.shape, np.float32, sharding=rule.sharding)
        for rule in state.parts[-1].rules
        if rule.sharding is not None
    }


@placement.automatic(like=_target_leaves)
def _moved(links: Sequence[Link], state: State, flat: Flat) -> Flat:
    flat = {path: float32(leaf) for path, leaf in flat.items()}
    expected = {rule.source: rule.source_shape for rule in state.parts[0].rules if rule.source}
    check_leaves(flat, expected, also=state.sources)
    check_finite(flat, "the task vector")
    mesh = state.mesh
    if mesh is not None and lies_elsewhere(flat, mesh):
        warnings.warn(
            f"the task vector lies on other devices than the state, which was fitted on the mesh {name_of(mesh)}, and "
            "is moved there; tvjax.transport.place(state, params) brings the state to where parameters lie",
            stacklevel=4,
        )
        flat = brought(flat, mesh)
    for link, part in zip(links, state.parts, strict=True):
        flat = link.transform(part, flat)
    shardings = {rule.target: rule.sharding for rule in state.parts[-1].rules}
    return {path: like_leaf(leaf, shardings.get(path)) for path, leaf in flat.items()}


def chain(*transports: Transport) -> Transport:
    """Transports one after another: the task vector goes through the first, then the second, and so on.

    Raises:
      ValueError: a link that works in the source's parameters after one that works in the target's, or one that is
        fitted with the task vector behind another.

    >>> from tvjax.transport import bico, gradfix, scale_by
    >>> chain(bico(), gradfix(), scale_by(1.5)).name
    'bico+gradfix+scale_by'
    """
    links = tuple(link for transport in transports for link in transport.links)
    if not links:
        raise ValueError("chain() needs at least one transport; identity() is the one that does nothing")
    in_target: str | None = None
    for link in links:
        if link.space == "source_to_target" and in_target is not None:
            raise ValueError(
                f"{link.name} takes task vectors of the source model, but after {in_target} they are the target's: "
                f"put {link.name} first"
            )
        if link.needs.task_vector and link is not links[0]:
            raise ValueError(f"{link.name} is fitted with the task vector as it is given: put it first")
        if link.space != "any":
            in_target = link.name
    names = [link.name for link in links if link.needs != Needs(source=False)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} stands twice in one chain: its second pass would be fitted like the first")
    return Transport(links)


def scale_by(factor: float | jax.Array) -> Transport:
    """Multiplies the task vector by a number."""
    check_factor(factor, "the factor")

    def transform(part: LinkState, flat: Flat) -> Flat:
        return {path: scaled(leaf, factor) for path, leaf in flat.items()}

    fit = partial(_nothing_to_fit, "scale_by", "scaled")
    return Transport((Link("scale_by", "any", Needs(source=False), fit, transform),))


def identity(name: str = "identity") -> Transport:
    """Leaves the task vector as it is: naive addition, the baseline of every table. Same shapes on both sides.

    Args:
      name: what reports call it.
    """
    fit = partial(_nothing_to_fit, name, "passed through")
    return Transport((Link(name, "any", Needs(source=False), fit, lambda part, flat: flat),))


def _nothing_to_fit(name: str, action: str, pair: Any) -> LinkState:
    rules = []
    for leaf in pair.leaves:
        if pair.moved:  # by an earlier link, into the target's parameters
            rules.append(Rule(leaf.target, leaf.target, action, leaf.shape, leaf.shape))
        elif leaf.source is not None:
            rules.append(Rule(leaf.target, leaf.source, action, leaf.shape, leaf.source_shape))
        else:
            rules.append(Rule(leaf.target, "", "unmatched", leaf.shape, (), why="the source has no such leaf"))
    return LinkState(name, {}, {}, tuple(rules))


def make_options(name: str, kind: type[OptionsT], options: Mapping[str, Any]) -> OptionsT:
    """The hyperparameters of a method.

    Args:
      name: of the method.
      kind: its NamedTuple of hyperparameters.
      options: those that are given.

    Raises:
      ValueError: a hyperparameter that the method does not have, the message names the nearest; or a value of another
        kind than its default.
    """
    fields, defaults = kind._fields, kind._field_defaults  # type: ignore[attr-defined]
    for option in options:
        if option not in fields:
            near = difflib.get_close_matches(option, fields, n=1, cutoff=0.0)[0]
            raise ValueError(f"{name} has no option {option!r}; the nearest of {', '.join(fields)} is {near!r}")
        _check_kind(name, option, options[option], defaults[option])
    return kind(**options)


def _check_kind(name: str, option: str, value: Any, default: Any) -> None:
    """Text where the default is text, true or false where it is that, else a number; no float that is not finite."""
    if isinstance(default, bool | str):
        kind: Any = type(default)
        if not isinstance(value, kind):
            raise ValueError(f"{name}: {option} is {value!r}, expected {'text' if kind is str else 'true or false'}")
    elif isinstance(value, bool | str | list | tuple | dict) or (value is None and default is not None):
        raise ValueError(f"{name}: {option} is {value!r}, expected a number")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}: {option} is {value}, expected a finite number")


def check_leaves(tau: PyTree, shapes: Mapping[str, tuple[int, ...]], also: Sequence[str] = ()) -> None:
    """Raises a ValueError unless the leaves of a task vector are leaves of the source.

    Args:
      tau: the task vector.
      shapes: shapes of the source's leaves, by path.
      also: paths of further leaves of the source.
    """
    problems = []
    for path, leaf in tree.flatten(tau).items():
        if path in shapes and shapes[path] != tuple(np.shape(leaf)):
            problems.append(f"{path}: shape {tuple(np.shape(leaf))}, the source has {shapes[path]}")
        elif path not in shapes and path not in also:
            problems.append(f"{path}: no such leaf in the source model")
    if problems:
        raise ValueError(f"this task vector is not one of the source model:\n{tree.list_some(problems)}")
