"""Ariadne: what the fine-tuned source does to its residual stream, written by the target's own kernels.

The method of the Theseus group's public code; there is no paper. The weights of the source are not moved: their effect
is, block by block, and the kernel that writes the residual stream last is solved for.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array

from tvjax import tree
from tvjax.align import moments as mm
from tvjax.align import procrustes
from tvjax.align.products import product
from tvjax.align.ridge import Ridge, constant, ridge
from tvjax.align.rows import RowAxes, arranged, padding_mask, row_axes, stream_of
from tvjax.align.solving import Problem, solve
from tvjax.capture.axes import of_argument
from tvjax.capture.residual import Residual, Writer
from tvjax.capture.views import apply_view, restore_view
from tvjax.spread import spread_out
from tvjax.stages import run_stage
from tvjax.transport import statistics
from tvjax.transport.base import Flat, LeafUse, Link, LinkState, MapInfo, Needs, Rule, Transport, make_options
from tvjax.transport.fingerprint import check_same, fingerprints
from tvjax.transport.pairing import Hidden, aligned
from tvjax.walk import Walk

if TYPE_CHECKING:
    from tvjax.transport.pair import Pair

Leaves = Literal["mlp", "attention_and_mlp"]
Bias = Literal["auto", "always", "never"]
Rows = Literal["uniform", "class_token"]


class Options(NamedTuple):
    """Hyperparameters of `ariadne`.

    Attributes:
      ridge: the penalty over the mean eigenvalue of ``H^T H``; None: by empirical Bayes,
        ``tr(S) / (n - 1) * tr(L L^T) / d_out`` with S the centred Gram matrix of the n rows of H.
      bias: whether the fit has a constant, which the kernel's bias takes: ``"auto"``: where the target has one;
        ``"always"``: it is an error if it has none; ``"never"``: the fit goes through the origin.
      leaves: ``"mlp"``: the kernel that writes the residual stream last; ``"attention_and_mlp"``: all that write it,
        fitted together.
      rows: ``"uniform"``: every token counts the same; ``"class_token"``: the class token counts as much as all others.
      rank_tolerance: of the orthogonal map between the streams, see `tvjax.transport.Options`.
    """

    ridge: float | None = None
    bias: Bias = "auto"
    leaves: Leaves = "mlp"
    rows: Rows = "uniform"
    rank_tolerance: float | None = None


def ariadne(**options: Any) -> Transport:
    """Fits the kernels that write the residual stream, so that it moves as the fine-tuned source's does.

    At a block, S are the rows of the source's residual stream, S' those of the fine-tuned source, T those of the
    target, H the inputs of the target's kernel, and L what its output is multiplied with (LayerScale), or the identity:

        Q = polar factor of S^T T, centred;  D = (S' - S) Q;  min ||(H dK + 1 db^T) L - D||^2 + penalty ||dK||^2

    D is the whole displacement of the stream at that depth, and every block is fitted on its own, on the untouched
    target: the scale is searched afterwards. It is forward passes alone, without labels; widths, depths, heads and
    positions may be any. Where a block normalises after its sum (BERT), the stream is that sum. Every other leaf is
    zero.

    What is fitted is the moved task vector itself, ``fit(..., tau=tau)``: the state is of this one, and another is
    refused.

    Args:
      **options: see `tvjax.transport.ariadne.Options`.

    Returns:
      The transport; it comes first in a chain.

    Raises:
      ValueError: an option that is unknown or out of range.

    >>> from tvjax import Batch, fit, single_stage
    >>> def block(params, x):
    ...     return {"x": x["x"] + jnp.tanh(x["x"] @ params["up"]) @ params["down"]}
    >>> params = {"up": jnp.eye(2), "down": jnp.ones((2, 2))}
    >>> model, tau = single_stage(block, params), {"down": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    >>> rows = {"x": jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])}
    >>> state = fit(ariadne(ridge=0.0), model, model, [Batch(rows)], tau=tau)
    >>> bool(jnp.allclose(ariadne(ridge=0.0).apply(state, tau)["down"], tau["down"], atol=1e-5))
    True
    """
    own = make_options("ariadne", Options, options)
    if own.ridge is not None and own.ridge < 0:
        raise ValueError(f"ridge must be 0 or more, found {own.ridge}")
    for name, known in (("bias", Bias), ("leaves", Leaves), ("rows", Rows)):
        if getattr(own, name) not in get_args(known):
            raise ValueError(f"{name} must be one of {get_args(known)}, found {getattr(own, name)!r}")
    if own.rank_tolerance is not None and not 0 <= own.rank_tolerance < 1:
        raise ValueError(f"rank_tolerance must lie in [0, 1), found {own.rank_tolerance}")
    reads = Needs(activations=True, task_vector=True)
    return Transport((Link("ariadne", "source_to_target", reads, partial(_fit, own), _transform),))


# -- fitting --------------------------------------------------------------------------------------------------------


class _Sums(NamedTuple):
    """What all rows add up to.

    Attributes:
      stream: of the streams of the source and the target.
      effect: of the displacement of the source's stream and the inputs of the target's kernels.
      before: the same without the last batch; None where there is one batch alone.
      last: of the last batch.
    """

    stream: mm.Moments
    effect: mm.Moments
    before: mm.Moments | None
    last: mm.Moments


def _fit(options: Options, pair: Pair) -> LinkState:
    tau = fingerprints(tree.flatten(pair.tau))
    residual = pair.target.residual(pair.target_index)
    if residual is None:
        _check_unstacked(pair)
        return LinkState("ariadne", tau, {}, tuple(_zeroed(pair, "its stage writes no residual stream")))
    writers = _writers(options, pair, residual)
    sums, seen = _summed(options, pair, writers)
    solved, measures, rank = _solve(options, pair, writers, sums)
    name = f"{pair.name}:stream"
    by_path = {leaf.local: leaf.target for leaf in pair.leaves}
    rules = []
    for leaf, rule in zip(pair.leaves, _zeroed(pair, "it does not write the residual stream"), strict=True):
        if leaf.local in solved:
            kind = "dense" if len(leaf.shape) > 1 else "bias"
            rule = rule._replace(action="fitted", pieces=(LeafUse(kind, (), (), None, name),), why="")
        rules.append(rule)
    arrays = {by_path[local]: array for local, array in solved.items() if local in by_path}
    of_stream = {"rank": rank, "rows": sums.stream.count}
    of_leaves = {by_path[w.kernel.path]: measures for w in writers if w.kernel.path in by_path}
    d_a, d_b = sums.stream.cross.shape
    info = _info(pair, name, (d_a, d_b), seen)
    return LinkState("ariadne", arrays | tau, {name: of_stream} | of_leaves, tuple(rules), (info,))


def _zeroed(pair: Pair, why: str) -> list[Rule]:
    return [
        Rule(leaf.target, leaf.source or "", "zeroed by rule", leaf.shape, leaf.source_shape, why=why)
        for leaf in pair.leaves
    ]


def _check_unstacked(pair: Pair) -> None:
    """Layers that a scan stacks inside one stage are blocks that nobody sees.

    A kernel that a scan shares, such as the head's over the pieces of a chunked loss, is no stack.
    """
    stacked = next((site.path for site in pair.target_table.sites if site.kind == "dense" and any(site.levels)), None)
    if stacked is not None:
        raise ValueError(
            f"stage {pair.name!r} runs the layers of {stacked} in a scan, so that its residual stream is not seen "
            "layer by layer: take the stack apart into stages (tvjax.unstack)"
        )


def _writers(options: Options, pair: Pair, residual: Residual) -> tuple[Writer, ...]:
    """The kernels to fit, the last of those that write the stream coming last."""
    writers = residual.writers if options.leaves == "attention_and_mlp" else residual.writers[-1:]
    if len(writers) > 1:
        apart = [writer.kernel.path for writer in writers if not writer.direct or writer.scale is not None]
        if apart:
            raise ValueError(
                f"{pair.name}: what {apart[0]} writes is normalised, or scaled by a vector, before it meets what "
                f"{writers[-1].kernel.path} writes, so that the two have no joint ridge solution: take leaves='mlp'"
            )
    if options.bias == "always" and writers[-1].bias is None:
        raise ValueError(
            f"{pair.name}: {writers[-1].kernel.path} has no bias in the target, which has no place for the constant of "
            "the fit: take bias='auto' or bias='never'"
        )
    return writers


def _summed(options: Options, pair: Pair, writers: tuple[Writer, ...]) -> tuple[_Sums, tuple[int, Any]]:
    """The sums over all batches, and how many rows there are, of which tokens."""
    stream = effect = before = last = None
    rows, tokens = 0, None
    for batch in range(pair.batches):
        (base, change, target, inputs), weights, tokens = _rows(options, pair, writers, batch)
        rows += weights.shape[0]
        empty = spread_out(pair.mesh, mm.init(change.shape[1], inputs.shape[1], gram=True))
        before = empty if effect is None else effect
        add = partial(statistics.add_rows, 0, pair.mesh)
        stream = add(False, stream, base, target, weights)
        effect = add(True, before, change, inputs, weights)
        last = add(True, empty, change, inputs, weights) if batch == pair.batches - 1 else empty
    assert stream is not None and effect is not None and last is not None
    return _Sums(stream, effect, before if pair.batches > 1 else None, last), (rows, tokens)


def _rows(
    options: Options, pair: Pair, writers: tuple[Writer, ...], batch: int
) -> tuple[tuple[Array, ...], Array, tuple[int, int, int] | None]:
    """Source's stream, its displacement, target's stream and its kernels' inputs on the same rows; weights; tokens."""
    assert pair.finetuned is not None
    base, axes_a, mask_a = _stream(pair.source, pair.source_index, batch)
    tuned, _, _ = _stream(pair.finetuned, pair.source_index, batch)
    target, axes_b, mask_b = _stream(pair.target, pair.target_index, batch)
    table = pair.target.table(pair.target_index, batch)
    names = frozenset(writer.kernel.input for writer in writers if writer.kernel.input)
    seen = pair.target.observe(pair.target_index, batch, names, frozenset())
    inputs = []
    for writer in writers:
        here = next(site for site in table.sites if site.key == writer.kernel.key)
        if row_axes(here).sizes != axes_b.sizes:
            raise ValueError(
                f"{pair.name}: {writer.kernel.path} reads rows {row_axes(here).sizes}, and the stream that it writes "
                f"has rows {axes_b.sizes}: they must be the same tokens"
            )
        inputs.append(seen.input(writer.kernel))
    sides = (
        Hidden(jnp.concatenate([base, tuned - base], -1), axes_a, mask_a),
        Hidden(jnp.concatenate([target, *(jnp.asarray(x, jnp.float32) for x in inputs)], -1), axes_b, mask_b),
    )
    a, b, weights = aligned(sides, pair.stages, pair.tokens, pair.overlaps[batch])
    if options.rows == "class_token":
        weights = weights * _of_class_token(pair, axes_a, axes_b, weights)
    tokens = None
    if axes_a.tokens and axes_b.tokens:
        tokens_a, tokens_b = (axes.count(axes.tokens) for axes in (axes_a, axes_b))
        tokens = (tokens_a, tokens_b, weights.shape[0] // axes_b.count(axes_b.examples))
    width_a, width_b = base.shape[-1], target.shape[-1]
    return (a[:, :width_a], a[:, width_a:], b[:, :width_b], b[:, width_b:]), weights, tokens


def _stream(walk: Walk, index: int, batch: int) -> tuple[Array, RowAxes, Array | None]:
    """The residual stream of a stage, ``[n, d]`` float32, what its rows are, and their padding mask."""
    stage, carry = walk.model.stages[index], walk.carries(index)[batch]
    residual = walk.residual(index, batch)
    if residual is None:
        raise ValueError(
            f"stage {stage.name!r} of the source writes no residual stream, and its partner in the target does: pair "
            "stages that both do (--depth, depth=[...])"
        )
    rows = run_stage(residual.stream, walk.params(index), carry)
    factors = [factor for axis in of_argument(residual.path, rows)[:-1] for factor in axis]
    axes = arranged([factor.size for factor in factors], [factor.label for factor in factors])
    return rows.reshape(-1, rows.shape[-1]).astype(jnp.float32), axes, padding_mask(stage, carry, axes)


def _of_class_token(pair: Pair, axes_a: RowAxes, axes_b: RowAxes, weights: Array) -> Array:
    """Weights of the rows by which each example's class token counts as much as its other tokens together."""
    special = [stream_of(stage, axes).special for stage, axes in zip(pair.stages, (axes_a, axes_b), strict=True)]
    tokens = weights.shape[0] // axes_b.count(axes_b.examples)
    if not min(special) or tokens < 2:
        raise ValueError(
            f"{pair.name}: rows='class_token' needs streams with a class token and others, Stream(special=1, ...); "
            "take rows='uniform'"
        )
    share = jnp.full(tokens, tokens / (2 * (tokens - 1))).at[0].set(tokens / 2)
    return jnp.tile(share, axes_b.count(axes_b.examples))


def _solve(
    options: Options, pair: Pair, writers: tuple[Writer, ...], sums: _Sums
) -> tuple[dict[str, Array], dict[str, Array], Array]:
    """The change of each leaf by its local path, what is known of the fit, and the rank of the map of the streams."""
    last = writers[-1]
    with_bias = options.bias != "never" and last.bias is not None
    scale = None
    if last.scale is not None:
        scale = apply_view(last.scale.view, pair.target_leaves[last.scale.path]).astype(jnp.float32)
    problem = Problem(_fitted, (options, with_bias), (sums, scale))
    [(kernel, bias, measures, rank)] = solve([problem], pair.mesh)
    solved, start = {}, 0
    for writer in writers:
        site = writer.kernel
        part = kernel[start : start + site.d_in]
        solved[site.path] = restore_view(site.view, part, jnp.shape(pair.target_leaves[site.path]))
        start += site.d_in
    if with_bias and last.bias is not None:
        path = last.bias.path
        solved[path] = restore_view(last.bias.view, bias, jnp.shape(pair.target_leaves[path]))
    return solved, measures, rank


@partial(jax.jit, static_argnums=(0, 1))
def _fitted(
    options: Options, with_bias: bool, sums: _Sums, scale: Array | None
) -> tuple[Array, Array, dict[str, Array], Array]:
    """The kernels, one under the other, the bias, what is known of the fit, and the rank of the map of the streams."""
    settings = statistics.settings(statistics.Options(rank_tolerance=options.rank_tolerance))
    found = procrustes.polar(mm.cross(sums.stream, center=True), **settings)
    turn = procrustes.matrix(found)
    own, bias = _regression(options, sums.effect, turn, scale, with_bias)
    wanted = jnp.sum(turn * product(mm.grams(sums.effect, with_bias)[0], turn))
    share = jnp.where(wanted > 0, own.explained / jnp.where(wanted > 0, wanted, 1), 0)
    measures = {"rank": own.rank, "in_range": share}
    measures["realised"] = _realised(sums.effect, turn, own.kernel, bias, scale)
    if sums.before is not None:
        held = _regression(options, sums.before, turn, scale, with_bias)
        measures["realised_held_out"] = _realised(sums.last, turn, held[0].kernel, held[1], scale)
    return own.kernel, bias, measures, found.rank


def _regression(
    options: Options, effect: mm.Moments, turn: Array, scale: Array | None, with_bias: bool
) -> tuple[Ridge, Array]:
    """The kernels, one under the other, and the bias."""
    gram = mm.grams(effect, with_bias)[1]
    cross = product(mm.cross(effect, with_bias).T, turn)
    if options.ridge is None:
        variance = mm.energies(effect, center=True)[1] / jnp.maximum(effect.count - 1, 1)
        penalty = variance * (1.0 if scale is None else jnp.mean(scale**2))
    else:
        penalty = options.ridge * jnp.trace(gram) / gram.shape[0]
    own = ridge(gram, cross, penalty, scale)
    change, inputs = mm.means(effect)
    return own, constant(own.kernel, inputs, product(change, turn), scale, with_constant=with_bias)


def _realised(effect: mm.Moments, turn: Array, kernel: Array, bias: Array, scale: Array | None) -> Array:
    """``1 - ||(H K + 1 b^T) L - D||^2 / ||D||^2``, from sums."""
    if scale is not None:
        kernel, bias = kernel * scale, bias * scale
    gram_change, gram = mm.grams(effect)
    mean_change, mean_inputs = mm.means(effect)
    cross, mean_wanted = product(mm.cross(effect).T, turn), product(mean_change, turn)
    wanted = jnp.sum(turn * product(gram_change, turn))
    made = jnp.sum(kernel * product(gram, kernel)) - 2 * jnp.sum(kernel * cross)
    made += effect.count * jnp.sum(bias * (bias + 2 * product(mean_inputs, kernel) - 2 * mean_wanted))
    return jnp.where(wanted > 0, -made / jnp.where(wanted > 0, wanted, 1), 0)


def _info(pair: Pair, name: str, shape: tuple[int, int], seen: tuple[int, Any]) -> MapInfo:
    rows, tokens = seen
    examples = sum(jax.tree.leaves(batch.inputs)[0].shape[0] for batch in pair.target.batches)
    return MapInfo(name, shape, rows, math.ceil(min(shape) * examples / max(rows, 1)), tokens)


# -- applying -------------------------------------------------------------------------------------------------------


def _transform(part: LinkState, flat: Flat) -> Flat:
    sources = [rule.source for rule in part.rules if rule.source]
    same = check_same("ariadne", part.arrays, flat, sources)
    covered = all(source in flat for source in sources)
    moved: Flat = {}
    for rule in part.rules:
        if rule.action == "fitted":
            moved[rule.target] = jnp.where(same, part.arrays[rule.target], jnp.nan)
        elif rule.source in flat or (not rule.source and covered):
            moved[rule.target] = jnp.zeros(rule.shape, jnp.float32)
    return moved
