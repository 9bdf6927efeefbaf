"""Leaves of task vectors that stay products of two factors, as a LoRA adapter has them."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tvjax import placement
from tvjax.align.decompositions import qr, svd
from tvjax.align.products import product, wide

PyTree = Any


@partial(jax.tree_util.register_dataclass, data_fields=("left", "right"), meta_fields=("shape",))
@dataclasses.dataclass(frozen=True, eq=False)
class LowRank:
    """``left @ right``, one leaf of a task vector in the place of the matrix that it is.

    Arithmetic (`tvjax.apply`, `tvjax.add`, `tvjax.scale`, ...), norms (`tvjax.tree`) and transports take it as one leaf
    under one path, and keep it low rank where they can. Wherever JAX or NumPy expects an array it is the product, in
    float32 at ``Precision.HIGHEST``. It is a pytree of its two factors, so that it passes through `jax.jit` and
    `jax.vmap`; `jax.tree.map` therefore sees the factors, not the leaf: `tvjax.tree.map_with_path` sees the leaf.

    Attributes:
      left: ``[*layers, d_in, r]``.
      right: ``[*layers, r, d_out]``, a scale such as alpha / r folded in.
      shape: of the leaf: ``[*layers, ...]``, the first of its other axes being the inputs, the rest the outputs (a
        kernel ``[width, heads, head]`` has factors ``[width, r]`` and ``[r, heads * head]``); by default a matrix.

    >>> leaf = LowRank(jnp.array([[1.0], [2.0]]), jnp.array([[3.0, 0.0, 1.0]]))
    >>> leaf.shape, leaf.rank, jnp.asarray(leaf).tolist()
    ((2, 3), 1, [[3.0, 0.0, 1.0], [6.0, 0.0, 2.0]])
    """

    left: Array
    right: Array
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.shape:  # JAX puts the leaf together again from anything
            return
        left, right = np.shape(self.left), np.shape(self.right)
        if len(left) < 2 or left[:-2] != right[:-2] or left[-1:] != right[-2:-1]:
            raise ValueError(f"the factors of a leaf are [..., d_in, r] and [..., r, d_out], found {left} and {right}")
        object.__setattr__(self, "shape", (*left[:-1], right[-1]))

    @classmethod
    def zeros(cls, shape: tuple[int, ...]) -> LowRank:
        """No change of a leaf: rank 0.

        >>> LowRank.zeros((2, 3)).rank
        0
        """
        return cls(jnp.zeros((math.prod(shape[:-1]), 0)), jnp.zeros((0, shape[-1])), shape)

    @property
    def rank(self) -> int:
        """How many columns the left factor has; the product may have a smaller rank."""
        return int(self.left.shape[-1])

    @property
    def ndim(self) -> int:
        """Axes of the leaf."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Entries of the leaf, not of its factors."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> Any:
        """Of the product."""
        return np.dtype(np.float64 if np.float64 in (self.left.dtype, self.right.dtype) else np.float32)

    @property
    def layers(self) -> int:
        """Leading axes that stack matrices."""
        return self.left.ndim - 2

    @property
    def cut(self) -> int:
        """Where the axes of the outputs begin."""
        cuts = range(self.layers + 1, len(self.shape) + 1)
        return next(cut for cut in cuts if math.prod(self.shape[self.layers : cut]) == self.left.shape[-2])

    def __jax_array__(self) -> Array:
        return product(self.left, self.right).reshape(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.__jax_array__(), dtype)


def is_low_rank(leaf: Any) -> bool:
    """Whether it is a leaf that is kept as factors.

    >>> is_low_rank(jnp.ones((2, 2)))
    False
    """
    return isinstance(leaf, LowRank)


def dense(tau: PyTree) -> PyTree:
    """The tree with arrays in the place of low-rank leaves.

    >>> dense({"up": LowRank(jnp.ones((2, 1)), jnp.ones((1, 2)))})["up"].tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if is_low_rank(leaf) else leaf, tau, is_leaf=is_low_rank)


def float32(leaf: Any) -> Any:
    """A leaf in float32, its factors where it has some.

    >>> float32(np.ones(2, np.float16)).dtype.name
    'float32'
    """
    if not is_low_rank(leaf):
        return jnp.asarray(leaf, jnp.float32)
    return LowRank(jnp.asarray(leaf.left, jnp.float32), jnp.asarray(leaf.right, jnp.float32), leaf.shape)


def scaled(leaf: Any, factor: Any) -> Any:
    """``factor * leaf`` in the dtype of the leaf, float32 or wider; a low-rank leaf stays one.

    >>> jnp.asarray(scaled(LowRank(jnp.ones((1, 1)), jnp.ones((1, 2))), -2.0)).tolist()
    [[-2.0, -2.0]]
    """
    if not is_low_rank(leaf):
        return wide(jnp.asarray(leaf)) * jnp.asarray(factor, wide(jnp.asarray(leaf)).dtype)
    return LowRank(leaf.left, wide(leaf.right) * jnp.asarray(factor, leaf.dtype), leaf.shape)


def total(leaves: list[LowRank]) -> LowRank | None:
    """The sum of low-rank leaves, of the sum of their ranks: the factors side by side.

    Returns:
      None where they split the axes of their leaf in different ways.

    >>> one, two = LowRank(jnp.eye(2, 1), jnp.ones((1, 2))), LowRank(jnp.ones((2, 1)), jnp.ones((1, 2)))
    >>> total([one, two]).rank, jnp.asarray(total([one, two])).tolist()
    (2, [[2.0, 2.0], [1.0, 1.0]])
    """
    if len({(leaf.layers, leaf.cut) for leaf in leaves}) > 1:
        return None
    dtype = jnp.result_type(*(leaf.dtype for leaf in leaves))
    left = jnp.concatenate([jnp.asarray(leaf.left, dtype) for leaf in leaves], axis=-1)
    return LowRank(left, jnp.concatenate([jnp.asarray(leaf.right, dtype) for leaf in leaves], axis=-2), leaves[0].shape)


def core(leaf: LowRank) -> Array:
    """``[*layers, r, r]``, what is between orthonormal bases of both sides: of the leaf's norm and singular values.

    >>> core(LowRank(jnp.ones((4, 1)), jnp.full((1, 9), 2.0))).round(4).tolist()
    [[12.0]]
    """
    if not leaf.rank:
        return jnp.zeros((*leaf.left.shape[:-2], 0, 0), leaf.dtype)
    return placement.like(placement.on_one_device(0, _core, leaf), leaf.left)


def _core(leaf: LowRank) -> Array:
    left, right = (_triangle(wide(side)) for side in (leaf.left, jnp.swapaxes(leaf.right, -1, -2)))
    return product(left, jnp.swapaxes(right, -1, -2))


@jax.jit
def triplets(left: Array, right: Array) -> tuple[Array, Array, Array]:
    """The singular value decomposition of a product ``[d_in, r] [r, d_out]``, from its factors.

    ``A = Q_A R_A`` and ``B^T = Q_B R_B`` leave the small core ``R_A R_B^T = U S V^T``: ``(Q_A U) S (V^T Q_B^T)``.

    >>> triplets(jnp.ones((4, 1)), jnp.full((1, 9), 2.0))[1].round(4).tolist()
    [12.0]
    """
    (basis_a, small_a), (basis_b, small_b) = qr(left), qr(right.T)
    turn_a, values, turn_b = svd(product(small_a, small_b.T))
    return product(basis_a, turn_a), values, product(turn_b, basis_b.T)


def dot(x: Any, y: Any) -> Array:
    """The inner product of two leaves of one shape, of which one at least is low rank, without a dense product.

    >>> ones = LowRank(jnp.ones((2, 1)), jnp.ones((1, 3)))
    >>> float(dot(ones, ones)), float(dot(jnp.ones((2, 3)), ones))
    (6.0, 6.0)
    """
    if is_low_rank(x) and is_low_rank(y) and (x.layers, x.cut) == (y.layers, y.cut):
        left = product(jnp.swapaxes(x.left, -1, -2), y.left)
        return jnp.sum(left * product(x.right, jnp.swapaxes(y.right, -1, -2)))
    low, other = (x, y) if is_low_rank(x) else (y, x)
    matrix = jnp.asarray(other).reshape(*low.left.shape[:-1], low.right.shape[-1])
    return jnp.sum(product(jnp.swapaxes(low.left, -1, -2), matrix) * wide(low.right))


def _triangle(columns: Array) -> Array:
    function = lambda matrix: qr(matrix)[1]  # noqa: E731
    for _ in range(columns.ndim - 2):
        function = jax.vmap(function)
    return function(columns)
