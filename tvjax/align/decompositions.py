"""Decompositions of dense matrices that may be batched by `vmap`: on a CPU one matrix after another.

There jaxlib spreads the matrices of a batch over the threads that also run XLA's programs, and waits for them: two such
calls at once can wait for each other for ever (seen with jaxlib 0.10.2 on two cores). One after another, each on all
threads of BLAS, takes no longer, and the bytes do not depend on the batch. Elsewhere a batch is decomposed as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


def eigh(matrix: Float[Array, "n n"]) -> tuple[Float[Array, " n"], Float[Array, "n n"]]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric matrix, in columns.

    >>> eigh(jnp.diag(jnp.array([2.0, 1.0])))[0].tolist()
    [1.0, 2.0]
    """
    return _in_turn_on_cpu(_eigh, matrix)


def svd(matrix: Float[Array, "m n"]) -> tuple[Float[Array, "m r"], Float[Array, " r"], Float[Array, "r n"]]:
    """The thin singular value decomposition: left vectors, values, descending, right vectors.

    >>> svd(jnp.diag(jnp.array([3.0, -4.0])))[1].tolist()
    [4.0, 3.0]
    """
    return _in_turn_on_cpu(_svd, matrix)


def singular_values(matrix: Float[Array, "m n"]) -> Float[Array, " r"]:
    """Descending.

    >>> singular_values(jnp.diag(jnp.array([1.0, -2.0]))).tolist()
    [2.0, 1.0]
    """
    return _in_turn_on_cpu(_singular_values, matrix)


def qr(matrix: Float[Array, "m n"]) -> tuple[Float[Array, "m r"], Float[Array, "r n"]]:
    """Orthonormal columns, and the triangle that they are multiplied with.

    >>> abs(qr(jnp.array([[3.0], [4.0]]))[1]).round(4).tolist()
    [[5.0]]
    """
    return _in_turn_on_cpu(_qr, matrix)


def range_basis(matrix: Float[Array, "m n"]) -> Float[Array, "m n"]:
    """Columns that span those of a tall matrix and are well conditioned, though not orthonormal.

    The unit lower triangle of an LU decomposition with its rows back in place: a quarter of the work of a QR.

    >>> range_basis(jnp.array([[1.0], [4.0]])).tolist()
    [[0.25], [1.0]]
    """
    return _in_turn_on_cpu(_range_basis, matrix)


def _eigh(matrix: Array) -> tuple[Array, Array]:
    values, vectors = jnp.linalg.eigh(matrix)
    return values, vectors


def _svd(matrix: Array) -> tuple[Array, Array, Array]:
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    return left, values, right


def _singular_values(matrix: Array) -> Array:
    return jnp.linalg.svd(matrix, compute_uv=False)


def _qr(matrix: Array) -> tuple[Array, Array]:
    basis, triangle = jnp.linalg.qr(matrix)
    return basis, triangle


def _range_basis(matrix: Array) -> Array:
    factors, _, rows = jax.lax.linalg.lu(matrix)
    lower = jnp.tril(factors, -1) + jnp.eye(matrix.shape[0], matrix.shape[1], dtype=matrix.dtype)
    return jnp.zeros_like(lower).at[rows].set(lower)


def _in_turn_on_cpu(function: Callable[[Array], Any], matrix: Array) -> Any:
    in_turn = jax.custom_batching.sequential_vmap(function)
    return jax.lax.platform_dependent(matrix, cpu=in_turn, default=function)
