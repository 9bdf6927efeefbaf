"""Rotating kernels between two models: what Theseus and BiCo share.

At each site the input side and the output side of a kernel have a map each, ``R_in [d_in_A, d_in_B]`` and
``R_out [d_out_A, d_out_B]``, the polar factors of cross-moments of what the two models see there:

=========  ===========================================
leaf       transported
=========  ===========================================
kernel     ``R_in^T K R_out``
bias       ``b R_out``
scale      ``(R_in * R_out)^T s`` (elementwise product)
=========  ===========================================

Where the heads of an attention have maps of their own, R is block by block (`tvjax.transport.head_maps`). The methods
differ only in what they take the maps from (`theseus`, `bico`). Three kernels that read one activation share its map;
the uses of a tied leaf share one moment.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tvjax import tree
from tvjax.align import moments as mm
from tvjax.align import procrustes, tokens
from tvjax.align.heads import MATCHINGS, STRUCTURES
from tvjax.align.procrustes import OrthogonalMap
from tvjax.align.products import product, wide
from tvjax.align.rows import RowAxes, alignment, arranged, check_streams, on_tokens, padding_mask, row_axes
from tvjax.align.solving import solve
from tvjax.capture import Captured, Site, SiteTable
from tvjax.capture.axes import PART
from tvjax.capture.views import apply_view, restore_view
from tvjax.factors import LowRank, is_low_rank, scaled
from tvjax.spread import spread_out
from tvjax.transport.base import Flat, LeafUse, Link, LinkState, MapInfo, Needs, Rule, Transport, register_state
from tvjax.transport.factored import rotate_factors
from tvjax.transport.head_maps import HeadMap, check_heads, solve_heads
from tvjax.transport.rules import Map, MapTable, SitePair, maps_and_rules
from tvjax.transport.statistics import MomentAccumulator, Options, matmul, per_layer, settings

if TYPE_CHECKING:
    from tvjax.transport.pair import Pair


def rotation(name: str, inputs: str, outputs: str, options: Options) -> Transport:
    """The transport whose input maps come from `inputs` and whose output maps come from `outputs`.

    Args:
      name: of the method.
      inputs: ``input`` (activations) or ``input gradient``.
      outputs: ``output`` (activations) or ``gradient``.
      options: hyperparameters.
    """
    if options.scale_rule not in ("diagonal", "output", "zero"):
        raise ValueError(f"scale_rule must be 'diagonal', 'output' or 'zero', found {options.scale_rule!r}")
    procrustes.check_options(options.complete, settings(options)["method"], options.rank)
    if options.rank_tolerance is not None and not 0 <= options.rank_tolerance < 1:
        raise ValueError(f"rank_tolerance must lie in [0, 1), found {options.rank_tolerance}")
    if not 0 <= options.whiten <= 0.5:
        raise ValueError(f"whiten must lie in [0, 0.5], found {options.whiten}: 0 is no whitening, 0.5 the whole")
    if not 0 <= options.whiten_floor < 1:
        raise ValueError(f"whiten_floor must lie in [0, 1), found {options.whiten_floor}")
    for option, value, known in (
        ("heads", options.heads, STRUCTURES),
        ("head_matching", options.head_matching, MATCHINGS),
    ):
        if value not in known:
            raise ValueError(f"{option} must be one of {known}, found {value!r}")
    if options.dtype not in ("float32", "float64"):
        raise ValueError(f"dtype must be 'float32' or 'float64', found {options.dtype!r}")
    if jax.dtypes.canonicalize_dtype(options.dtype) != jnp.dtype(options.dtype):
        raise ValueError(
            "dtype='float64' needs JAX with 64 bits: set jax_enable_x64 (JAX_ENABLE_X64=1 in the environment) first"
        )
    reads = Needs(activations=True, gradients="gradient" in inputs + outputs)
    fit = partial(_fit, name, inputs, outputs, options)
    check = None if options.heads == "free" else partial(check_heads, options)
    return Transport((Link(name, "source_to_target", reads, fit, partial(_transform, options), check=check),))


register_state(OrthogonalMap)

# -- fitting --------------------------------------------------------------------------------------------------------


def _fit(name: str, inputs: str, outputs: str, options: Options, pair: Pair) -> LinkState:
    for stage, sites_of_stage in zip(pair.stages, (pair.source_table, pair.target_table), strict=True):
        check_streams(stage, sites_of_stage)
    table, rules = maps_and_rules(inputs, outputs, options, pair)
    used = {name for rule in rules for piece in rule.pieces for name in (piece.inner, piece.outer)}
    statistics = _observe(options, pair, table)
    whole: list[tuple[Map, MomentAccumulator]] = []
    by_heads: list[HeadMap] = []
    for found in table.maps.values():
        if found.name not in used:
            continue  # asked for by the outputs of a linear layer, for its rows
        rows = statistics[(table.input_of(found) if found.linear else found).rows]
        if found.heads is None:
            whole.append((found, rows))
        else:
            by_heads.append(HeadMap(found, rows, _factors(pair, found)))
    solved: dict[str, tuple[OrthogonalMap, dict[str, jax.Array]]] = {}
    for group in [whole] if pair.mesh is not None else [[one] for one in whole]:
        solved |= _solve_maps(pair, group)
    solved |= solve_heads(options, pair, by_heads)
    infos = []
    for found in table.maps.values():
        if found.name in used:
            base = table.input_of(found) if found.linear else found
            infos.append(_info(found, solved[found.name][0], statistics[base.rows].seen, pair))
    return LinkState(
        name,
        {key: own for key, (own, _) in solved.items()},
        {key: measures for key, (_, measures) in solved.items()},
        tuple(rules),
        tuple(infos),
    )


def _solve_maps(
    pair: Pair, maps: list[tuple[Map, MomentAccumulator]]
) -> dict[str, tuple[OrthogonalMap, dict[str, jax.Array]]]:
    """Maps, and what is measured of them, from what the two models see; on a mesh side by side."""
    factors = [_factors(pair, found) for found, _ in maps]
    problems = [rows.problem(own) for (_, rows), own in zip(maps, factors, strict=True)]
    solved = {}
    for (found, rows), own, rotation in zip(maps, factors, solve(problems, pair.mesh), strict=True):
        measures = {"rank": rotation.rank, "residual": rows.residual(rotation, own), "rows": rows.count()}
        solved[found.name] = rotation, measures
    return solved


def _observe(options: Options, pair: Pair, table: MapTable) -> dict[str, MomentAccumulator]:
    """What the two models see at the sites of the maps, on all batches; rows of tables as they are."""
    observed = {found.rows: found for found in table.maps.values() if not found.linear}
    statistics = {rows: MomentAccumulator(options, pair.mesh) for rows in observed}
    for rows, found in observed.items():
        if found.table is not None:
            a, b = pair.source_leaves[found.table[0]], pair.target_leaves[found.table[1]]
            common = min(a.shape[0], b.shape[0])
            statistics[rows].add(jnp.asarray(a[:common]), jnp.asarray(b[:common]), jnp.ones(common, jnp.float32))
    names = [_names(list(observed.values()), model) for model in (0, 1)]
    for batch in range(pair.batches):
        seen = (
            pair.source.observe(pair.source_index, batch, *names[0]),
            pair.target.observe(pair.target_index, batch, *names[1]),
        )
        for rows, found in observed.items():
            for sites in found.sites:
                statistics[rows].add(*_aligned_rows(pair, batch, found, sites, seen))
    return statistics


def _factors(pair: Pair, found: Map) -> tuple[jax.Array, jax.Array] | None:
    """The factors of the outputs of linear layers; None where the rows themselves are mapped."""
    if not found.linear:
        return None
    site_a, site_b = found.sites[0]
    return (
        _output_factor(pair.source_leaves, site_a, pair.source_table, pair.mesh),
        _output_factor(pair.target_leaves, site_b, pair.target_table, pair.mesh),
    )


def _info(found: Map, rotation: OrthogonalMap, rows: int, pair: Pair) -> MapInfo:
    """What shapes tell of a map."""
    shape = rotation.left.shape[-2], rotation.right.shape[-1]
    if found.table is not None:
        return MapInfo(found.name, shape, rows, 0)
    site_a, site_b = found.sites[0]
    of_image = found.side == "input" and site_b.kind == "conv"
    axes = row_axes(site_a, of_image), row_axes(site_b, of_image)
    examples = sum(jax.tree.leaves(batch.inputs)[0].shape[0] for batch in pair.target.batches)
    seen = None
    if all(rows_of.tokens for rows_of in axes):
        rest = axes[1].count(axes[1].rest)
        tokens_a, tokens_b = (rows_of.count(rows_of.tokens) for rows_of in axes)
        operators = alignment(*axes, pair.stages, pair.tokens, pair.overlaps[0])
        aligned = tokens_b if operators.b is None else operators.b.shape[0]
        seen = (tokens_a * rest, tokens_b * rest, aligned * rest)
    info = MapInfo(found.name, shape, rows, 0, seen)
    if found.heads is not None:
        numbers = found.heads[0].number, found.heads[1].number
        info = info._replace(heads=numbers, shared=found.heads[0].shared)
        rows *= max(numbers) if info.shared else 1
    return info._replace(examples=math.ceil(info.dimensions * examples / max(rows, 1)))


def _names(maps: list[Map], model: int) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the activations and of the gradients to capture."""
    activations = {name for found in maps if "gradient" not in found.side for name in found.names(model)}
    gradients = {name for found in maps if "gradient" in found.side for name in found.names(model)}
    return frozenset(activations), frozenset(gradients)


def _output_factor(leaves: dict[str, jax.Array], site: Site, table: SiteTable, mesh: Mesh | None) -> jax.Array:
    """``[K; b]^T`` of a dense site: ``[*layers, d_out, d_in + 1]``."""
    biases = [s for s in table.sites if s.kind == "bias" and s.output == site.output and s.gradient == site.gradient]
    kernel = apply_view(site.view, leaves[site.path])
    return _with_bias(mesh, kernel, apply_view(biases[0].view, leaves[biases[0].path]) if biases else None)


@partial(jax.jit, static_argnums=0)
def _with_bias(mesh: Mesh | None, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    kernel = spread_out(mesh, kernel.astype(jnp.float32), axis=-1)
    bias = jnp.zeros(kernel.shape[-1], jnp.float32) if bias is None else bias.astype(jnp.float32)
    bias = jnp.broadcast_to(bias, (*kernel.shape[:-2], kernel.shape[-1]))
    return spread_out(mesh, per_layer(kernel.ndim - 2, mm.output_factor)(kernel, bias), axis=-2)


def _aligned_rows(
    pair: Pair, batch: int, found: Map, sites: SitePair, seen: tuple[Captured, Captured]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows ``[*layers, n, d]`` of both models on the same tokens, and their weights ``[n]``.

    Where heads share a map, a row holds all heads of a token side by side: which of them are pairs is said later.
    """
    tables = pair.source.table(pair.source_index, batch), pair.target.table(pair.target_index, batch)
    carries = pair.source.carries(pair.source_index)[batch], pair.target.carries(pair.target_index)[batch]
    axes, rows, masks = [], [], []
    for number, leaves in enumerate((pair.source_leaves, pair.target_leaves)):
        site = sites[number]
        here = next(other for other in tables[number].sites if other.key == site.key)  # rows depend on the batch
        own, array = _rows_of(found.side, site, here, seen[number], leaves)
        axes.append(own)
        rows.append(array)
        masks.append(padding_mask(pair.stages[number], carries[number], own))
    operators = alignment(axes[0], axes[1], pair.stages, pair.tokens, pair.overlaps[batch])
    a, weight_a = on_tokens(rows[0], axes[0], operators.a, masks[0])
    b, weight_b = on_tokens(rows[1], axes[1], operators.b, masks[1])
    if found.heads is not None and found.heads[0].shared:
        (a, weight_a), (b, weight_b) = (
            (x.reshape(*x.shape[:-2], -1, axis.number * x.shape[-1]), weight[:: axis.number])
            for x, weight, axis in ((a, weight_a, found.heads[0]), (b, weight_b, found.heads[1]))
        )
    return a, b, weight_a * weight_b


def _rows_of(
    side: str, site: Site, here: Site, captured: Captured, leaves: dict[str, jax.Array]
) -> tuple[RowAxes, jax.Array]:
    """What one side of a site saw, ``[*layers, n, d]``, the features of all its groups side by side."""
    if side == "input" and site.kind == "conv":
        return row_axes(here, of_image=True), captured.image(site)
    axes = row_axes(here)
    if side == "input":
        array = captured.input(site)
        assert array is not None
    elif side == "output":
        array = captured.output(site)
    else:
        array = captured.gradient(site)
        if side == "input gradient":
            kernel = wide(apply_view(site.view, leaves[site.path]))
            array = product(array, jnp.swapaxes(kernel, -1, -2))
    if side in ("input", "input gradient") and site.kind == "conv":  # every pixel of a patch is a row
        array = jnp.swapaxes(array.reshape(*array.shape[:-1], -1, site.taps), -1, -2)
        array = array.reshape(*array.shape[:-3], -1, array.shape[-1])
        axes = arranged((*axes.sizes, site.taps), (*axes.labels, PART))
    if site.groups is not None:
        array = jnp.swapaxes(array, -3, -2)
        array = array.reshape(*array.shape[:-2], -1)
    return axes, array


# -- applying -------------------------------------------------------------------------------------------------------


def _transform(options: Options, part: LinkState, flat: Flat) -> Flat:
    moved: Flat = {}
    covered = all(isinstance(flat.get(rule.source), jax.Array) for rule in part.rules if rule.source)
    for rule in part.rules:
        if rule.source not in flat:
            if rule.target and not rule.source and covered:
                moved[rule.target] = jnp.zeros(rule.shape, jnp.float32)
            continue
        leaf = flat[rule.source]
        if rule.action == "passed through":
            moved[rule.target] = leaf
        elif rule.action == "rotated":
            result = _rotated(rule, part.arrays, leaf, options)
            if options.rescale:
                norm = tree.norm(result)
                result = scaled(result, tree.norm(leaf) / jnp.where(norm > 0, norm, 1))
            moved[rule.target] = result
        else:
            low = is_low_rank(leaf) and len(rule.shape) > 1
            moved[rule.target] = LowRank.zeros(rule.shape) if low else jnp.zeros(rule.shape, jnp.float32)
    return moved


def _rotated(
    rule: Rule, maps: dict[str, OrthogonalMap], leaf: jax.Array | LowRank, options: Options
) -> jax.Array | LowRank:
    """A leaf moved by its maps; one of low rank stays so where it is a matrix."""
    if isinstance(leaf, LowRank):
        found = rotate_factors(rule.pieces, maps, leaf, rule.shape)
        if found is not None:
            return found
    pieces = [_rotate(piece, maps, jnp.asarray(leaf), rule, options) for piece in rule.pieces]
    return sum(pieces[1:], pieces[0])


def _rotate(piece: LeafUse, maps: dict[str, OrthogonalMap], leaf: jax.Array, rule: Rule, options: Options) -> jax.Array:
    mesh = None if rule.sharding is None else rule.sharding.mesh
    if piece.kind == "positions":
        table = leaf.reshape(-1, leaf.shape[-1])
        for _, layout_a, layout_b in piece.source_view:  # on another patch grid
            table = tokens.interpolate_positions(table, layout_a, layout_b)
        return procrustes.apply_right(table, maps[piece.outer or ""]).reshape(rule.shape)
    value = apply_view(piece.source_view, leaf)
    inner, outer = (None if name is None else maps[name] for name in (piece.inner, piece.outer))
    kernel = piece.kind in ("dense", "conv")
    layers = value.ndim - (1 if not kernel else 2 if piece.groups is None else 3)
    if kernel and piece.groups is not None:
        value = per_layer(layers, partial(_rotate_blocks, piece, inner, outer))(value)
    elif kernel:
        value = _rotate_kernel(layers, piece.taps, mesh, inner, outer, value)
    elif piece.kind == "scale" and options.scale_rule == "diagonal" and inner is not None and outer is not None:
        value = _rotate_scale(layers, mesh, inner, outer, value)
    elif outer is not None:
        value = per_layer(layers, procrustes.apply_right)(value, outer)
    return restore_view(piece.target_view, value, rule.shape)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _rotate_kernel(
    layers: int,
    taps: int,
    mesh: Mesh | None,
    inner: OrthogonalMap | None,
    outer: OrthogonalMap | None,
    kernel: jax.Array,
) -> jax.Array:
    """``R_in^T K R_out`` at every tap of kernels ``[*layers, channels * taps, d_out]``; on a mesh no step is whole."""

    def rotate(inner: OrthogonalMap | None, outer: OrthogonalMap | None, kernel: jax.Array) -> jax.Array:
        if inner is not None:
            columns = kernel.reshape(inner.left.shape[0], -1)
            directions = spread_out(mesh, product(inner.left.T, columns))
            moved = spread_out(mesh, product(inner.right.T, directions))
            kernel = moved.reshape(-1, kernel.shape[-1])
        if outer is not None:
            directions = spread_out(mesh, product(kernel, outer.left))
            kernel = spread_out(mesh, product(directions, outer.right))
        return kernel

    return per_layer(layers, rotate)(inner, outer, kernel)


def _rotate_blocks(
    piece: LeafUse, inner: OrthogonalMap | None, outer: OrthogonalMap | None, kernel: jax.Array
) -> jax.Array:
    """The diagonal blocks of ``R_in^T diag(K_1, .., K_G) R_out``, ``[groups, channels * taps, d_out]``.

    ``K'_b = sum_a R_in[a, b]^T K_a R_out[a, b]``; with blocks of one entry this is the rule of a scale.
    """
    assert piece.groups is not None
    groups_a, groups_b = piece.groups
    kernel = kernel.reshape(groups_a, -1, piece.taps, kernel.shape[-1])
    sides = []
    for found, width in ((inner, kernel.shape[1]), (outer, kernel.shape[3])):
        whole = jnp.eye(groups_a * width) if found is None else procrustes.matrix(found)
        sides.append(whole.reshape(groups_a, width, groups_b, -1))
    moved = jnp.einsum("aibj,aito,aobp->bjtp", sides[0], kernel, sides[1], precision=jax.lax.Precision.HIGHEST)
    return moved.reshape(groups_b, -1, moved.shape[-1])


@partial(jax.jit, static_argnums=(0, 1))
def _rotate_scale(
    layers: int, mesh: Mesh | None, inner: OrthogonalMap, outer: OrthogonalMap, scale: jax.Array
) -> jax.Array:
    """``(R_in * R_out)^T s``."""

    def rotate(inner: OrthogonalMap, outer: OrthogonalMap, scale: jax.Array) -> jax.Array:
        both = [spread_out(mesh, procrustes.matrix(rotation)) for rotation in (inner, outer)]
        return matmul((both[0] * both[1]).T, scale)

    return per_layer(layers, rotate)(inner, outer, scale)
