"""From the rows that two models see at a site to the map between them.

Stream are kept as they are while they are fewer than the dimensions (a QR of the rows is then the cheapest exact way to
the map), and summed into streaming moments as soon as they are more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tvjax.align import moments as mm
from tvjax.align import procrustes
from tvjax.align.heads import DEFAULT_STRUCTURE, Matching, Structure
from tvjax.align.procrustes import OrthogonalMap
from tvjax.align.products import product
from tvjax.align.solving import Problem
from tvjax.spread import spread_out

SAMPLE = 256  # rows on which the residual of a map is measured


class Options(NamedTuple):
    """Hyperparameters of the maps of `theseus` and `bico`.

    Attributes:
      center: take moments about the mean.
      whiten: w in [0, 0.5]: ``G_A^-w C G_B^-w`` in the place of the cross-moment C.
      whiten_floor: eigenvalues of the Gram matrices G are raised to this share of the largest before they are whitened.
      dtype: in which moments are summed and decomposed: ``"float32"``, or ``"float64"`` where JAX has it enabled
        (``jax_enable_x64``): the default tolerance is then `16 eps` of that. Maps are kept in float32.
      complete: what a map is where the data do not determine it: ``"zero"``, ``"thin"`` (published: rounding decides)
        or ``"eye"`` (`tvjax.align.procrustes.polar`).
      rank_tolerance: singular values below this share of the largest count as undetermined; None: 16 eps
        (`tvjax.align.procrustes.default_rank_tolerance`). Between half of it and the whole a direction takes part in
        proportion, so that rounding cannot switch it on or off.
      rank: keep only the leading directions: a number (int) or a fraction (float).
      method: decomposition: ``"svd"``, ``"polar"`` (by products alone) or ``"randomised"`` (needs `rank`).
        ``"auto"``: where a whole map is wanted (``complete="zero"``, no rank), ``"polar"`` on an accelerator, where it
        takes a ninth to a thirtieth of the time of an SVD and is as exact (H200, 768 to 4096 dimensions); ``"svd"`` on
        a CPU, where products take twice its time, and wherever else.
      scale_rule: for normalisation scales: ``"diagonal"``: ``(R_in * R_out)^T s``; ``"output"``: ``s R_out``
        (published); ``"zero"``.
      transport_embeddings: also move class token, positions and patch kernel, by the map of the patches' outputs, and
        the tables of tokens and positions of a model of texts, by the map between the two models' tables, whose rows
        correspond (also where a table is the head's kernel too); otherwise they are zero, as published.
      keep_fixed: outputs that a stage calls fixed (classes, vocabulary) are not rotated. Where the two models have
        other numbers of them, the leaf is zero, unless they are words and less than a twentieth of them is of one model
        alone: such vocabularies differ by padding, which comes last.
      rescale: give each moved leaf the norm of the source leaf.
      heads: the maps of the outputs of queries, keys and values and of the inputs of the attention's output projection,
        where both models say which their heads are (`tvjax.stages.HeadAxis`): ``"free"``: one map over all heads, as
        for any other layer; ``"blocks"``: a map for each pair of heads (`tvjax.align.heads`); ``"rotary"``: the same,
        and for queries and keys that positions rotate one phase for each frequency, the same for a key head and its
        queries. A norm inside the heads has one map for all of them, fitted on the pairs of heads (also under
        ``"free"``, where the numbers of heads differ).
      head_matching: which heads are pairs: ``"index"``: by their places; ``"assignment"``: those whose moments agree
        most, query heads inside their key heads (under ``"blocks"`` and ``"rotary"``).
    """

    center: bool = False
    whiten: float = 0.0
    whiten_floor: float = 1e-4
    dtype: Literal["float32", "float64"] = "float32"
    complete: procrustes.Completion = "zero"
    rank_tolerance: float | None = None
    rank: int | float | None = None
    method: procrustes.Method | Literal["auto"] = "auto"
    scale_rule: Literal["diagonal", "output", "zero"] = "diagonal"
    transport_embeddings: bool = False
    keep_fixed: bool = True
    rescale: bool = False
    heads: Structure = DEFAULT_STRUCTURE
    head_matching: Matching = "index"


class MomentAccumulator:
    """The rows of one task, kept while they are fewer than the dimensions, then summed into moments.

    Args:
      options: of the maps.
      mesh: over which what is kept is spread; None: it lies where it is computed.
    """

    def __init__(self, options: Options, mesh: Mesh | None = None):
        self.options, self.mesh = options, mesh
        self.rows: list[tuple[jax.Array, jax.Array, jax.Array]] = []
        self.moments: Any = None
        self.seen = 0  # rows, padding included
        self.sample: tuple[jax.Array, jax.Array, jax.Array] | None = None

    def add(self, a: jax.Array, b: jax.Array, weights: jax.Array) -> None:
        """More rows ``[*layers, n, d]``, with weights ``[n]``."""
        self.seen += a.shape[-2]
        if self.sample is None:
            step = max(1, a.shape[-2] // SAMPLE)
            sample = a[..., ::step, :], b[..., ::step, :], weights[::step]
            kept = sample[0].astype(jnp.float32), sample[1].astype(jnp.float32), sample[2]
            self.sample = spread_out(self.mesh, kept, axis=-1)
        dtype = jnp.dtype(self.options.dtype)
        self.rows.append((a.astype(dtype), b.astype(dtype), weights.astype(dtype)))
        rows = sum(chunk[0].shape[-2] for chunk in self.rows)
        enough = rows >= min(a.shape[-1], b.shape[-1])
        if self.moments is not None or enough or self.options.whiten:
            self._fold()
        else:
            self.rows[-1] = spread_out(self.mesh, self.rows[-1])

    def _fold(self) -> None:
        gram = self.options.whiten > 0
        for a, b, weights in self.rows:
            self.moments = add_rows(a.ndim - 2, self.mesh, gram, self.moments, a, b, weights)
        self.rows = []

    def count(self) -> jax.Array:
        """How many rows took part."""
        if self.moments is None:
            return jnp.float32(sum(chunk[2].sum() for chunk in self.rows))
        return jnp.ravel(self.moments.count)[0]

    def _kept_rows(self) -> tuple[jax.Array, jax.Array, int]:
        a, b = (jnp.concatenate([chunk[i] for chunk in self.rows], -2) for i in (0, 1))
        weights = jnp.concatenate([chunk[2] for chunk in self.rows])[:, None]
        if self.options.center:
            a, b = (x - jnp.sum(x * weights, -2, keepdims=True) / jnp.maximum(weights.sum(), 1) for x in (a, b))
        return a * weights, b * weights, a.ndim - 2

    def problem(self, factors: tuple[jax.Array, jax.Array] | None = None) -> Problem:
        """The map between the rows, or between the outputs ``[x, 1] @ factor.T`` of linear layers that read them."""
        if self.moments is None:
            a, b, layers = self._kept_rows()
            if factors is None:
                return Problem(_solve_rows, (self.options, layers), (a, b))
            ones = 0.0 if self.options.center else jnp.concatenate([chunk[2] for chunk in self.rows])
            return Problem(_solve_output_rows, (self.options, layers), (jnp.asarray(ones, a.dtype), a, b, *factors))
        options = self.options, self.moments.count.ndim
        if factors is None:
            return Problem(_solve, options, (self.moments,))
        return Problem(_solve_outputs, options, (self.moments, *factors))

    def cross(self, factors: tuple[jax.Array, jax.Array] | None = None) -> jax.Array:
        """The cross-moment ``[*layers, d_a, d_b]`` of the rows, or of the outputs ``[x, 1] @ factor.T`` of layers."""
        if self.moments is None:
            a, b, layers = self._kept_rows()
            if factors is not None:
                ones = 0.0 if self.options.center else jnp.concatenate([chunk[2] for chunk in self.rows])
                a, b = (
                    matmul(_append(x, ones), jnp.swapaxes(factor, -1, -2).astype(x.dtype))
                    for x, factor in zip((a, b), factors, strict=True)
                )
            return per_layer(layers, _product_of_rows)(a, b)
        layers = self.moments.count.ndim
        if factors is None:
            return per_layer(layers, lambda m: mm.cross(m, self.options.center))(self.moments)
        core = per_layer(layers, lambda m: mm.augmented(m, self.options.center))(self.moments)
        return per_layer(layers, _between)(factors[0], core, factors[1])

    def grams(self, factors: tuple[jax.Array, jax.Array] | None = None) -> tuple[jax.Array, jax.Array]:
        """The Gram matrices of both sides, as `cross`; kept where ``whiten`` is set."""
        layers = self.moments.count.ndim
        if factors is None:
            return per_layer(layers, lambda m: mm.grams(m, self.options.center))(self.moments)
        grams = per_layer(layers, lambda m: mm.augmented_grams(m, self.options.center))(self.moments)
        first, second = (
            per_layer(layers, _between)(factor, gram, factor) for factor, gram in zip(factors, grams, strict=True)
        )
        return first, second

    def residual(self, found: OrthogonalMap, factors: tuple[jax.Array, jax.Array] | None = None) -> jax.Array:
        """``||H_A R - H_B|| / ||H_B||`` on a sample of the rows (of the outputs, where factors are given)."""
        assert self.sample is not None
        return _residual(*self.sample, found, factors, self.options.center)

    def residual_of_heads(self, found: OrthogonalMap, pairs: Any, numbers: tuple[int, int]) -> jax.Array:
        """The residual of a map that pairs of heads share, on rows that hold the heads side by side."""
        assert self.sample is not None
        a, b, weights = self.sample
        of_pairs = per_layer(a.ndim - 2, partial(_rows_of_pairs, numbers))
        a, b = of_pairs(a, b, *pairs)
        count = a.shape[-2] // weights.shape[0]
        return _residual(a, b, jnp.repeat(weights, count), found, None, self.options.center)


@partial(jax.jit, static_argnums=(0, 1, 2))
def add_rows(
    layers: int,
    mesh: Mesh | None,
    gram: bool,
    moments: mm.Moments | None,
    a: jax.Array,
    b: jax.Array,
    weights: jax.Array,
) -> mm.Moments:
    """Every device sums its own rows, then the sums are shared out; None are the moments of no rows."""
    if moments is None:
        empty = mm.init(a.shape[-1], b.shape[-1], gram=gram, dtype=a.dtype)
        moments = jax.tree.map(lambda x: jnp.broadcast_to(x, (*a.shape[:-2], *x.shape)), empty)
    a, b = spread_out(mesh, (a, b), axis=-2)
    return spread_out(mesh, per_layer(layers, partial(mm.update, weights=weights))(moments, a, b))


def _product_of_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    return product(a.T, b)


def _between(p: jax.Array, core: jax.Array, q: jax.Array) -> jax.Array:
    """``P M Q^T``."""
    return product(product(p.astype(core.dtype), core), q.T.astype(core.dtype))


def _rows_of_pairs(
    numbers: tuple[int, int], a: jax.Array, b: jax.Array, source: jax.Array, target: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Rows ``[n, H d]`` of both sides as those of the pairs of heads, ``[n pairs, d]``."""
    a = a.reshape(len(a), numbers[0], -1)[:, source]
    b = b.reshape(len(b), numbers[1], -1)[:, target]
    return a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])


@partial(jax.jit, static_argnames="center")
def _residual(
    a: jax.Array, b: jax.Array, weights: jax.Array, found: OrthogonalMap, factors: Any, center: bool
) -> jax.Array:
    if factors is not None:
        a = matmul(_append(a, 1.0), jnp.swapaxes(factors[0], -1, -2))
        b = matmul(_append(b, 1.0), jnp.swapaxes(factors[1], -1, -2))
    weights = weights[:, None]
    if center:
        a, b = (x - jnp.sum(x * weights, -2, keepdims=True) / jnp.maximum(weights.sum(), 1) for x in (a, b))
    moved = matmul(matmul(a, found.left), found.right)
    error, size = (jnp.sqrt(jnp.sum(jnp.square(x * weights), (-1, -2))) for x in (moved - b, b))
    return error / jnp.where(size > 0, size, 1)


@partial(jax.jit, static_argnums=(0, 1))
def _solve(options: Options, layers: int, moments: Any) -> OrthogonalMap:
    def solve(moments: Any) -> OrthogonalMap:
        cross = mm.cross(moments, options.center)
        if options.whiten:
            cross = procrustes.whiten(cross, *mm.grams(moments, options.center), options.whiten, options.whiten_floor)
        return _polar(options, cross)

    return per_layer(layers, solve)(moments)


@partial(jax.jit, static_argnums=(0, 1))
def _solve_rows(options: Options, layers: int, a: jax.Array, b: jax.Array) -> OrthogonalMap:
    return per_layer(layers, partial(_between_rows, options))(a, b)


def _between_rows(options: Options, a: jax.Array, b: jax.Array) -> OrthogonalMap:
    if a.shape[0] >= min(a.shape[1], b.shape[1]):
        return _polar(options, product(a.T, b))
    return _polar_of_product(options, a.T, None, b.T)


@partial(jax.jit, static_argnums=(0, 1))
def _solve_output_rows(
    options: Options,
    layers: int,
    ones: jax.Array,
    a: jax.Array,
    b: jax.Array,
    factor_a: jax.Array,
    factor_b: jax.Array,
) -> OrthogonalMap:
    def solve(a: jax.Array, b: jax.Array, factor_a: jax.Array, factor_b: jax.Array) -> OrthogonalMap:
        return _between_rows(options, product(_append(a, ones), factor_a.T), product(_append(b, ones), factor_b.T))

    return per_layer(layers, solve)(a, b, factor_a, factor_b)


@partial(jax.jit, static_argnums=(0, 1))
def _solve_outputs(options: Options, layers: int, moments: Any, p: jax.Array, q: jax.Array) -> OrthogonalMap:
    def solve(moments: Any, p: jax.Array, q: jax.Array) -> OrthogonalMap:
        core = mm.augmented(moments, options.center)
        if not options.whiten:
            return _polar_of_product(options, p, core, q)
        cross = product(product(p, core), q.T)
        gram_a, gram_b = mm.augmented_grams(moments, options.center)
        outputs = [product(product(factor, gram), factor.T) for factor, gram in ((p, gram_a), (q, gram_b))]
        return _polar(options, procrustes.whiten(cross, *outputs, options.whiten, options.whiten_floor))

    return per_layer(layers, solve)(moments, p, q)


def _polar(options: Options, moment: jax.Array) -> OrthogonalMap:
    return stored(procrustes.polar(moment, **settings(options)))


def _polar_of_product(options: Options, p: jax.Array, core: jax.Array | None, q: jax.Array) -> OrthogonalMap:
    return stored(procrustes.polar_of_product(p, core, q, **settings(options)))


def settings(options: Options) -> dict[str, Any]:
    """The options of `tvjax.align.procrustes.polar`."""
    method = options.method
    if method == "auto":
        whole = options.complete == "zero" and options.rank is None
        method = "polar" if whole and jax.default_backend() != "cpu" else "svd"
    return {name: getattr(options, name) for name in ("complete", "rank_tolerance", "rank")} | {"method": method}


def stored(found: OrthogonalMap) -> OrthogonalMap:
    """A map in the dtype that maps are kept in."""
    return found._replace(left=found.left.astype(jnp.float32), right=found.right.astype(jnp.float32))


def _append(rows: jax.Array, ones: Any) -> jax.Array:
    column = jnp.broadcast_to(jnp.asarray(ones, rows.dtype), rows.shape[:-1])
    return jnp.concatenate([rows, column[..., None]], -1)


def per_layer(layers: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function over so many leading axes of stacked layers."""
    for _ in range(layers):
        function = jax.vmap(function)
    return function


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """``x @ y`` at full precision."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
