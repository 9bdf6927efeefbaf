"""The maps of an attention's heads, solved together: which heads are pairs, and the phases that q and k share."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tvjax import processes, tree
from tvjax.align import heads, procrustes
from tvjax.align.heads import HeadPairs, Places
from tvjax.align.procrustes import OrthogonalMap
from tvjax.align.solving import Problem, solve
from tvjax.spread import spread_out
from tvjax.stages import Model, Stage
from tvjax.transport.rules import Map
from tvjax.transport.statistics import MomentAccumulator, Options, per_layer, settings, stored

if TYPE_CHECKING:
    from tvjax.transport.pair import Pair

Solved = dict[str, tuple[OrthogonalMap, dict[str, jax.Array]]]
Numbers = tuple[int, int]


class HeadMap(NamedTuple):
    """A map by heads to solve, and what it is estimated from.

    Attributes:
      found: the map.
      rows: what the two models see, or what the linear layers read whose outputs are mapped.
      factors: of these layers.
    """

    found: Map
    rows: MomentAccumulator
    factors: tuple[jax.Array, jax.Array] | None

    @property
    def numbers(self) -> Numbers:
        """Heads in the source and in the target."""
        assert self.found.heads is not None
        return self.found.heads[0].number, self.found.heads[1].number

    @property
    def shared(self) -> bool:
        """Whether all heads have this one map."""
        assert self.found.heads is not None
        return self.found.heads[0].shared

    def places(self, options: Options) -> Places | None:
        """The frequencies that both sides have; None where the map is no phase of positions."""
        assert self.found.heads is not None
        frequencies = [axis.frequencies for axis in self.found.heads]
        if options.heads != "rotary" or not all(frequencies):
            return None
        return heads.pair_frequencies(*frequencies)


def check_heads(options: Options, source: Model, target: Model) -> None:
    """Raises a ValueError where a model does not say which its heads are, or has no positions that rotate them."""
    for side, model in (("source", source), ("target", target)):
        layers = [layer for stage in model.stages for layer in dict(stage.heads).values()]
        axes = [axis for layer in layers for axis in layer if axis is not None]
        if not axes:
            raise ValueError(
                f"heads={options.heads!r} needs to know the heads, and no stage of the {side} says which they are: "
                "declare them (Stage(heads=...), single_stage(heads=...)), or use heads='free'"
            )
        if options.heads == "rotary" and not any(axis.frequencies for axis in axes):
            raise ValueError(
                f"heads='rotary' keeps what positions do to queries and keys, and no position of the {side} rotates "
                "its heads: use heads='blocks'"
            )


def solve_heads(options: Options, pair: Pair, maps: list[HeadMap]) -> Solved:
    """The maps of all attentions of a pair of stages, and what is measured of them."""
    solved: Solved = {}
    attentions: dict[tuple[str, str], list[HeadMap]] = {}
    for each in maps:
        assert each.found.heads is not None
        names = each.found.heads[0].attention, each.found.heads[1].attention
        attentions.setdefault(names, []).append(each)
    for names, members in attentions.items():
        groups = tuple(_key_heads(stage, name) for stage, name in zip(pair.stages, names, strict=True))
        solved |= _solve_attention(options, (groups[0], groups[1]), members, pair.mesh)
    return solved


def _key_heads(stage: Stage, attention: str) -> int:
    """The fewest heads of a layer of an attention: those of keys and values where queries share them."""
    layers = dict(stage.heads).values()
    return min(axis.number for axes in layers for axis in axes if axis is not None and axis.attention == attention)


def _solve_attention(options: Options, groups: Numbers, members: list[HeadMap], mesh: Mesh | None) -> Solved:
    moments = [spread_out(mesh, each.rows.cross(each.factors)) for each in members]
    matched = _match(options, groups, members, moments, mesh)
    phases: dict[Places, jax.Array] = {}
    for each, moment in zip(members, moments, strict=True):
        if (places := each.places(options)) is not None and not each.shared:
            of_group = _of_group(each.numbers, groups)
            group_moments = partial(_group_moments, places, each.numbers, of_group)
            own = per_layer(moment.ndim - 2, group_moments)(moment, *matched[each.numbers])
            phases[places] = phases[places] + own if places in phases else own
    problems = []
    for each, moment in zip(members, moments, strict=True):
        pairs, layers = matched[each.numbers], moment.ndim - 2
        places = each.places(options)
        if places is not None:
            of_group = _of_group(each.numbers, groups)
            sizes = moment.shape[-2] // each.numbers[0], moment.shape[-1] // each.numbers[1]
            about = options, layers, places, each.numbers, of_group, sizes, each.shared
            problems.append(Problem(_turn, about, (moment if each.shared else phases[places], *pairs)))
        else:
            grams = each.rows.grams(each.factors) if options.whiten else ()
            function = _shared if each.shared else _blocks
            problems.append(Problem(function, (options, layers, each.numbers), (moment, *pairs, *grams)))
    solved: Solved = {}
    for each, found in zip(members, solve(problems, mesh), strict=True):
        pairs, layers, rows = matched[each.numbers], found.left.ndim - 2, each.rows.count()
        if each.shared:
            residual = each.rows.residual_of_heads(found, pairs, each.numbers)
            rows = rows * pairs.source.shape[-1]
        else:
            residual = each.rows.residual(found, each.factors)
            if each.found.side.startswith("input"):
                found = per_layer(layers, partial(_for_inputs, each.numbers))(found, *pairs)
        solved[each.found.name] = found, {"rank": found.rank, "residual": residual, "rows": rows}
    return solved


def _of_group(numbers: Numbers, groups: Numbers) -> Numbers:
    """How many heads of a layer share a key head, in the source and in the target."""
    return numbers[0] // groups[0], numbers[1] // groups[1]


# -- which heads are pairs ------------------------------------------------------------------------------------------


def _match(
    options: Options, groups: Numbers, members: list[HeadMap], moments: list[jax.Array], mesh: Mesh | None
) -> dict[Numbers, HeadPairs]:
    """The pairs of heads for each number of heads that layers of the attention have, ``[*layers, pairs]``."""
    layers = moments[0].shape[:-2]
    numbers = dict.fromkeys(each.numbers for each in members)
    if options.head_matching == "index" or options.heads == "free" or tree.is_traced(moments):
        by_key = heads.by_index(*groups)
        found = {
            own: by_key if own == groups else heads.grouped_by_index(by_key, own, _of_group(own, groups))
            for own in numbers
        }
        return {own: _spread(pairs, layers) for own, pairs in found.items()}
    scores: dict[Numbers, np.ndarray] = {}
    own_heads = [(each, moment) for each, moment in zip(members, moments, strict=True) if not each.shared]
    problems = [Problem(_nuclear_norms, (len(layers), each.numbers), (moment,)) for each, moment in own_heads]
    for (each, _), norms in zip(own_heads, solve(problems, mesh), strict=True):
        shares = np.asarray(processes.fetch(norms), np.float64)
        scores[each.numbers] = scores.get(each.numbers, np.zeros_like(shares)) + shares
    queries = [own for own in numbers if own != groups]
    if len(queries) > 1:
        raise ValueError(
            f"an attention has layers of {sorted({n for own in queries for n in own})} heads: heads are matched by "
            "assignment where queries have one number of them, and keys and values one; use head_matching='index'"
        )
    chosen: dict[Numbers, list[HeadPairs]] = {own: [] for own in numbers}
    for layer in np.ndindex(*layers):
        of_keys = np.asarray(scores.get(groups, np.zeros((*layers, *groups))))[layer]
        of_queries = np.asarray(scores[queries[0]])[layer] if queries else None
        by_key, inside = heads.grouped_by_assignment(of_keys, of_queries)
        for own in numbers:
            chosen[own].append(by_key if inside is None or own == groups else inside)
    return {
        own: HeadPairs(*(jnp.asarray(np.stack(side).reshape(*layers, -1)) for side in zip(*pairs, strict=True)))
        for own, pairs in chosen.items()
    }


def _spread(pairs: HeadPairs, layers: tuple[int, ...]) -> HeadPairs:
    return HeadPairs(*(jnp.broadcast_to(jnp.asarray(side), (*layers, len(side))) for side in pairs))


# -- solving --------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=(0, 1))
def _nuclear_norms(layers: int, numbers: Numbers, moment: jax.Array) -> jax.Array:
    return per_layer(layers, partial(heads.nuclear_norms, numbers=numbers))(moment)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _blocks(options: Options, layers: int, numbers: Numbers, *arrays: jax.Array) -> OrthogonalMap:
    """A map for each pair of heads: from their moments, the pairs, and the Gram matrices where they whiten."""

    def blocks(moment: jax.Array, source: jax.Array, target: jax.Array, *grams: Any) -> OrthogonalMap:
        whitening = options.whiten, options.whiten_floor
        pairs = HeadPairs(source, target)
        return stored(heads.block_map(moment, pairs, numbers, settings(options), grams or None, whitening))

    return per_layer(layers, blocks)(*arrays)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _shared(options: Options, layers: int, numbers: Numbers, *arrays: jax.Array) -> OrthogonalMap:
    """One map for all pairs of heads, from the sum of their moments; arrays as for `_blocks`."""

    def shared(moment: jax.Array, source: jax.Array, target: jax.Array, *grams: Any) -> OrthogonalMap:
        summed = jnp.sum(heads.head_blocks(moment, numbers)[source, target], 0)
        if grams:
            own = [
                jnp.sum(heads.head_blocks(gram, (n, n))[side, side], 0)
                for gram, n, side in zip(grams, numbers, (source, target), strict=True)
            ]
            summed = procrustes.whiten(summed, own[0], own[1], options.whiten, options.whiten_floor)
        return stored(procrustes.polar(summed, **settings(options)))

    return per_layer(layers, shared)(*arrays)


def _group_moments(
    places: Places, numbers: Numbers, of_group: Numbers, moment: jax.Array, source: Any, target: Any
) -> jax.Array:
    """``c`` of each frequency, summed over the pairs of heads of each pair of key heads, ``[G_A, G_B, n]``."""
    own = heads.pair_moments(heads.head_blocks(moment, numbers)[source, target], places)
    groups = numbers[0] // of_group[0], numbers[1] // of_group[1]
    return jnp.zeros((*groups, own.shape[-1]), own.dtype).at[source // of_group[0], target // of_group[1]].add(own)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5, 6))
def _turn(
    options: Options,
    layers: int,
    places: Places,
    numbers: Numbers,
    of_group: Numbers,
    sizes: Numbers,
    shared: bool,
    *arrays: jax.Array,
) -> OrthogonalMap:
    """The phases of each pair of key heads for the pairs of heads of a layer; one for all where they share a map."""
    phases = partial(
        heads.phase_map,
        places=places,
        sizes=sizes,
        complete=options.complete,
        rank_tolerance=options.rank_tolerance,
    )

    def turn(moments: jax.Array, source: jax.Array, target: jax.Array) -> OrthogonalMap:
        if shared:
            own = heads.pair_moments(heads.head_blocks(moments, numbers)[source, target], places)
            return stored(phases(jnp.sum(own, 0)))
        of_pairs = moments[source // of_group[0], target // of_group[1]]
        return stored(heads.assembled(jax.vmap(phases)(of_pairs), HeadPairs(source, target), numbers))

    return per_layer(layers, turn)(*arrays)


@partial(jax.jit, static_argnums=0)
def _for_inputs(numbers: Numbers, found: OrthogonalMap, source: Any, target: Any) -> OrthogonalMap:
    return heads.for_inputs(found, HeadPairs(source, target), numbers)
