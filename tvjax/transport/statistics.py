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

from tvjax.align import moments as mm
from tvjax.align import procrustes
from tvjax.align.procrustes import OrthogonalMap
from tvjax.align.products import product

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
      method: decomposition: ``"svd"``, ``"polar"`` (by products alone, for accelerators) or ``"randomised"`` (needs
        `rank`).
      scale_rule: for normalisation scales: ``"diagonal"``: ``(R_in * R_out)^T s``; ``"output"``: ``s R_out``
        (published); ``"zero"``.
      transport_embeddings: also move class token, positions and patch kernel, by the map of the patches' outputs;
        otherwise they are zero, as published.
      keep_fixed: outputs that a stage calls fixed (classes, vocabulary) are not rotated, where the widths agree.
      rescale: give each moved leaf the norm of the source leaf.
    """

    center: bool = False
    whiten: float = 0.0
    whiten_floor: float = 1e-4
    dtype: Literal["float32", "float64"] = "float32"
    complete: procrustes.Completion = "zero"
    rank_tolerance: float | None = None
    rank: int | float | None = None
    method: procrustes.Method = "svd"
    scale_rule: Literal["diagonal", "output", "zero"] = "diagonal"
    transport_embeddings: bool = False
    keep_fixed: bool = True
    rescale: bool = False


class MomentAccumulator:
    """The rows of one task, kept while they are fewer than the dimensions, then summed into moments."""

    def __init__(self, options: Options):
        self.options = options
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
            self.sample = sample[0].astype(jnp.float32), sample[1].astype(jnp.float32), sample[2]
        dtype = jnp.dtype(self.options.dtype)
        self.rows.append((a.astype(dtype), b.astype(dtype), weights.astype(dtype)))
        rows = sum(chunk[0].shape[-2] for chunk in self.rows)
        enough = rows >= min(a.shape[-1], b.shape[-1])
        if self.moments is not None or enough or self.options.whiten:
            self._fold()

    def _fold(self) -> None:
        gram = self.options.whiten > 0
        for a, b, weights in self.rows:
            layers = a.shape[:-2]
            if self.moments is None:
                empty = mm.init(a.shape[-1], b.shape[-1], gram=gram, dtype=a.dtype)
                self.moments = jax.tree.map(lambda x, layers=layers: jnp.broadcast_to(x, (*layers, *x.shape)), empty)
            self.moments = per_layer(len(layers), partial(_update, weights=weights))(self.moments, a, b)
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

    def solve(self) -> OrthogonalMap:
        """The map between the rows."""
        if self.moments is None:
            a, b, layers = self._kept_rows()
            return per_layer(layers, partial(_solve_rows, self.options))(a, b)
        return per_layer(self.moments.count.ndim, partial(_solve, self.options))(self.moments)

    def solve_outputs(self, factor_a: jax.Array, factor_b: jax.Array) -> OrthogonalMap:
        """The map between the outputs ``[x, 1] @ factor.T`` of linear layers that read the rows."""
        if self.moments is None:
            a, b, layers = self._kept_rows()
            ones = 0.0 if self.options.center else jnp.concatenate([chunk[2] for chunk in self.rows])
            solve = partial(_solve_output_rows, self.options, jnp.asarray(ones, a.dtype))
            return per_layer(layers, solve)(a, b, factor_a, factor_b)
        layers = self.moments.count.ndim
        core = per_layer(layers, lambda m: mm.augmented(m, self.options.center))(self.moments)
        if self.options.whiten:
            solve = partial(_solve_whitened_outputs, self.options)
            return per_layer(layers, solve)(self.moments, core, factor_a, factor_b)
        return per_layer(layers, partial(_solve_outputs, self.options))(factor_a, core, factor_b)

    def residual(self, found: OrthogonalMap, factors: tuple[jax.Array, jax.Array] | None = None) -> jax.Array:
        """``||H_A R - H_B|| / ||H_B||`` on a sample of the rows (of the outputs, where factors are given)."""
        assert self.sample is not None
        a, b, weights = self.sample
        return _residual(a, b, weights, found, factors, self.options.center)


def _update(moments: Any, a: jax.Array, b: jax.Array, weights: jax.Array) -> Any:
    return mm.update(moments, a, b, weights)


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


@partial(jax.jit, static_argnums=0)
def _solve(options: Options, moments: Any) -> OrthogonalMap:
    cross = mm.cross(moments, options.center)
    if options.whiten:
        cross = procrustes.whiten(cross, *mm.grams(moments, options.center), options.whiten, options.whiten_floor)
    return _polar(options, cross)


@partial(jax.jit, static_argnums=0)
def _solve_rows(options: Options, a: jax.Array, b: jax.Array) -> OrthogonalMap:
    if a.shape[0] >= min(a.shape[1], b.shape[1]):
        return _polar(options, product(a.T, b))
    return _polar_of_product(options, a.T, None, b.T)


@partial(jax.jit, static_argnums=0)
def _solve_output_rows(
    options: Options, ones: jax.Array, a: jax.Array, b: jax.Array, factor_a: jax.Array, factor_b: jax.Array
) -> OrthogonalMap:
    return _solve_rows(options, product(_append(a, ones), factor_a.T), product(_append(b, ones), factor_b.T))


@partial(jax.jit, static_argnums=0)
def _solve_outputs(options: Options, p: jax.Array, core: jax.Array, q: jax.Array) -> OrthogonalMap:
    return _polar_of_product(options, p, core, q)


@partial(jax.jit, static_argnums=0)
def _solve_whitened_outputs(
    options: Options, moments: Any, core: jax.Array, p: jax.Array, q: jax.Array
) -> OrthogonalMap:
    cross = product(product(p, core), q.T)
    gram_a, gram_b = mm.augmented_grams(moments, options.center)
    outputs = [product(product(factor, gram), factor.T) for factor, gram in ((p, gram_a), (q, gram_b))]
    return _polar(options, procrustes.whiten(cross, *outputs, options.whiten, options.whiten_floor))


def _polar(options: Options, moment: jax.Array) -> OrthogonalMap:
    return _stored(procrustes.polar(moment, **_settings(options)))


def _polar_of_product(options: Options, p: jax.Array, core: jax.Array | None, q: jax.Array) -> OrthogonalMap:
    return _stored(procrustes.polar_of_product(p, core, q, **_settings(options)))


def _settings(options: Options) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("complete", "rank_tolerance", "rank", "method")}


def _stored(found: OrthogonalMap) -> OrthogonalMap:
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
