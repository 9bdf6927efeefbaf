"""The polar factor of a matrix by products alone, for devices whose products are fast and whose SVD is slow.

An odd polynomial of a matrix acts on its singular values and leaves its singular vectors. Three of them, each applied a
number of times, take every singular value to 1 or to 0:

- growth: ``3.4445 s - 4.775 s^3 + 2.0315 s^5`` multiplies small values by 3.4 and keeps large ones between 0.68 and
  1.13 (Jordan et al., Muon, 2024);
- polish: ``(15 s - 10 s^3 + 3 s^5) / 8``, Newton and Schulz's of fifth order, brings values near 1 to 1;
- cut: ``(5 s^3 - 3 s^5) / 2`` takes values below ``sqrt(2 / 3)`` towards 0 and those above it towards 1.

The matrix is scaled so that the values at the cut end at 1/2.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array

from tvjax.align.products import product

_GROWTH = (3.4445, -4.775, 2.0315)
_POLISH = (15 / 8, -10 / 8, 3 / 8)
_CUT = (0.0, 5 / 2, -3 / 2)
_LAST = (_GROWTH,) * 3 + (_POLISH,) * 2 + (_CUT,) * 3  # until then the values at the cut are small
_LARGEST = 0.95  # where the largest singular value starts, at most: its estimate may be a little low
_POWER_ITERATIONS = 30


def _start_of_the_cut() -> float:
    """The small value that `_LAST` takes to 1/2, by bisection."""
    low, high = 0.0, 0.02
    for _ in range(60):
        middle = value = (low + high) / 2
        for a, b, c in _LAST:
            value = value * (a + value**2 * (b + value**2 * c))
        low, high = (middle, high) if value < 1 / 2 else (low, middle)
    return low


_START = _start_of_the_cut()


def polar_factor(matrix: Array, cut: float | Array) -> Array:
    """``U_k V_k^T`` over the singular values above ``cut`` times the largest.

    The cut is soft: of a value at the cut half is kept, of one a third larger 0.99, of one a third smaller 0.01.
    Rounding in ten to twenty products decides on values below a few eps times the largest.

    Args:
      matrix: ``[m, n]``, float32 or float64.
      cut: in (0, 1).

    Returns:
      ``[m, n]``; zeros for a matrix of zeros.

    >>> polar_factor(jnp.array([[0.0, 3.0], [-2.0, 0.0], [0.0, 0.0]]), 1e-5).round(4).tolist()
    [[0.0, 1.0], [-1.0, 0.0], [0.0, 0.0]]
    """
    if matrix.shape[0] > matrix.shape[1]:
        return polar_factor(matrix.T, cut).T
    entry = jnp.max(jnp.abs(matrix), initial=0)  # squares of the entries must neither overflow nor vanish
    unit = matrix / jnp.where(entry > 0, entry, 1)
    largest = _largest_singular_value(unit)
    cut = jnp.asarray(cut, matrix.dtype)
    growth = math.log(_GROWTH[0])
    steps = jnp.maximum(jnp.ceil(jnp.log(_START / (_LARGEST * cut)) / growth), 0)
    scale = _START / cut * jnp.exp(-growth * steps)
    x = unit * (scale / jnp.where(largest > 0, largest, 1))
    x = jax.lax.fori_loop(0, steps.astype(jnp.int32), lambda _, x: _step(x, _GROWTH), x)
    for coefficients in _LAST:
        x = _step(x, coefficients)
    return x


def _step(x: Array, coefficients: tuple[float, float, float]) -> Array:
    """``a X + b G X + c G^2 X`` with ``G = X X^T``."""
    a, b, c = coefficients
    gram = product(x, x.T)
    return a * x + product(b * gram + c * product(gram, gram), x)


def _largest_singular_value(matrix: Array) -> Array:
    """By power iterations, from below: to a few percent where several values are nearly the largest."""

    def direction(vector: Array) -> Array:
        return vector / jnp.maximum(jnp.linalg.norm(vector), jnp.finfo(vector.dtype).tiny)

    def iterate(_: int, vector: Array) -> Array:
        return direction(product(matrix.T, product(matrix, vector)))

    start = direction(jnp.linalg.norm(matrix, axis=0))
    return jnp.linalg.norm(product(matrix, jax.lax.fori_loop(0, _POWER_ITERATIONS, iterate, start)))
