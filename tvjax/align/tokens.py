"""Token alignment: linear operators on the token axis that bring two layouts of one image to the same rows.

Two models may cut an image into different numbers of patches. Stream can only be compared one to one, so A's tokens are
resampled to B's, or both are reduced to one token. Every operator is a matrix ``[tokens', tokens]`` whose rows sum to
one: it acts on activations and on their gradients alike, and None stands for the identity. Texts that two tokenizers
cut differently have an operator each, and a row of zeros where a token has no partner.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
from jax import Array

from tvjax.align.products import product, wide
from tvjax.stages import Stream

Mode = Literal["interpolate", "class_token", "mean"]


class Alignment(NamedTuple):
    """The operators that bring both sides to the same tokens.

    Attributes:
      a: ``[tokens', tokens_a]`` float32, or one for each example, or None for the identity.
      b: ``[tokens', tokens_b]`` float32, or None for the identity.
    """

    a: np.ndarray | Array | None = None
    b: np.ndarray | None = None


def alignment(rows_a: Stream, rows_b: Stream, tokens_a: int, tokens_b: int, mode: Mode = "interpolate") -> Alignment:
    """The operators that align A's tokens with B's; identities where the two layouts are the same.

    A patch grid is recognised where the token count is that of the layout, with its special tokens or without them
    (the output of a patch kernel), or that of another square grid where the layout's is square. Equal counts without a
    grid (text, pooled outputs) are aligned as they are.

    Args:
      rows_a: layout of A's token axis.
      rows_b: layout of B's token axis.
      tokens_a: tokens of A's activation.
      tokens_b: tokens of B's activation.
      mode: ``"interpolate"``: special tokens are kept apart, paired in order (what one side has more is dropped), and
        A's patch grid is resized bilinearly to B's (half-pixel centres, no antialiasing). ``"class_token"``: the first
        special token of either side. ``"mean"``: the mean over the tokens of either side.

    Returns:
      The two operators.

    Raises:
      ValueError: an unknown mode, different counts without grids on both sides, or no special token for
        ``"class_token"``.

    >>> small, large = Stream(special=1, grid=(1, 1)), Stream(special=1, grid=(2, 2))
    >>> alignment(small, large, 2, 5).a.tolist()
    [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]
    >>> alignment(large, large, 5, 5)
    Alignment(a=None, b=None)
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {get_args(Mode)}, found {mode!r}")
    layout_a, layout_b = _layout(rows_a, tokens_a), _layout(rows_b, tokens_b)
    if tokens_a == tokens_b and (layout_a is None or layout_b is None or layout_a == layout_b):
        return Alignment()
    if mode == "mean":
        return Alignment(
            np.full((1, tokens_a), 1 / tokens_a, np.float32), np.full((1, tokens_b), 1 / tokens_b, np.float32)
        )
    found = f"A has {tokens_a} tokens of {rows_a}, B has {tokens_b} tokens of {rows_b}"
    if mode == "class_token":
        if not (rows_a.special and rows_b.special):
            raise ValueError(f'no class token to align by: {found}. Use mode="mean", or declare Stream(special=1, ...)')
        return Alignment(np.eye(1, tokens_a, dtype=np.float32), np.eye(1, tokens_b, dtype=np.float32))
    if layout_a is None or layout_b is None:
        raise ValueError(
            f"tokens cannot be aligned: {found}. Declare the patch grid of both stages in their Stream, "
            'or use mode="class_token" or "mean"'
        )
    (special_a, grid_a), (special_b, grid_b) = layout_a, layout_b
    special = min(special_a, special_b)
    resize = _resize(grid_a, grid_b)
    operator_a = np.zeros((special + resize.shape[0], tokens_a), np.float32)
    operator_a[:special, :special] = np.eye(special)
    operator_a[special:, special_a:] = resize
    operator_b = None
    if special < special_b:
        operator_b = np.delete(np.eye(tokens_b, dtype=np.float32), slice(special, special_b), axis=0)
    return Alignment(operator_a, operator_b)


def align(operator: np.ndarray | Array | None, activations: Array, mask: Array | None = None) -> tuple[Array, Array]:
    """Activations on the aligned tokens, and the weight of each row.

    Padding takes no part: with operator P and mask m the output is ``sum_t P_st m_t h_t / sum_t P_st m_t``, and a row
    made of padding alone, or of nothing, is zero with weight 0.

    Args:
      operator: ``[tokens', tokens]``, or one for each example ``[batch, tokens', tokens]``, or None for the identity.
      activations: ``[batch, tokens, features]``.
      mask: ``[batch, tokens]``, True at real tokens; None: all are.

    Returns:
      Activations ``[batch, tokens', features]``, float32 or wider, and weights ``[batch, tokens']``, 0 or 1, in the
      same dtype.

    >>> import jax.numpy as jnp
    >>> hidden = jnp.array([[[1.0], [3.0], [100.0]]])
    >>> rows, weights = align(jnp.full((1, 3), 1 / 3), hidden, jnp.array([[True, True, False]]))
    >>> round(float(rows[0, 0, 0]), 5), weights.tolist()
    (2.0, [[1.0]])
    """
    hidden = wide(activations)
    if mask is not None:
        hidden = jnp.where(mask[..., None], hidden, 0)
    real = jnp.ones(hidden.shape[:-1], hidden.dtype) if mask is None else mask.astype(hidden.dtype)
    if operator is None:
        return hidden, real
    summed = product(operator, hidden)
    if mask is None:
        made = jnp.any(jnp.asarray(operator) != 0, axis=-1)
        return summed, jnp.broadcast_to(made, summed.shape[:-1]).astype(summed.dtype)
    share = product(operator, real[..., None])[..., 0]
    present = share > 0
    return summed / jnp.where(present, share, 1)[..., None], present.astype(summed.dtype)


def interpolate_positions(table: Array, rows_a: Stream, rows_b: Stream) -> Array:
    """A position table resized to another patch grid, bilinearly; the special tokens' rows stay as they are.

    Args:
      table: ``[special + height * width, d]`` of the layout `rows_a`.
      rows_a: layout of the table.
      rows_b: layout wanted; the same special tokens.

    Returns:
      ``[special + height' * width', d]``, in the table's dtype. Linear in the table, so it moves task vectors as well.

    Raises:
      ValueError: a layout without a grid, different special tokens, or a table of another length.

    >>> import jax.numpy as jnp
    >>> table = jnp.array([[9.0], [1.0], [2.0]])
    >>> interpolate_positions(table, Stream(1, (1, 2)), Stream(1, (1, 4))).ravel().tolist()
    [9.0, 1.0, 1.25, 1.75, 2.0]
    """
    if rows_a.grid is None or rows_b.grid is None or rows_a.special != rows_b.special:
        raise ValueError(
            f"a position table needs patch grids and the same special tokens on both sides, found {rows_a} and {rows_b}"
        )
    if table.shape[0] != rows_a.tokens:
        raise ValueError(f"a position table of {rows_a} has {rows_a.tokens} rows, found shape {table.shape}")
    operator = alignment(rows_a, rows_b, table.shape[0], rows_b.special + rows_b.grid[0] * rows_b.grid[1]).a
    if operator is None:
        return table
    return product(operator, table).astype(table.dtype)


def _layout(rows: Stream, tokens: int) -> tuple[int, tuple[int, int]] | None:
    """Special tokens and grid of an activation with so many tokens, None where it is no grid.

    Images of another size than the layout is declared for (DINOv2 resizes its positions) have another square grid.
    """
    if rows.grid is None:
        return None
    if tokens == rows.tokens:
        return rows.special, rows.grid
    if tokens == rows.grid[0] * rows.grid[1]:
        return 0, rows.grid
    sides = {special: math.isqrt(tokens - special) for special in {0, rows.special} if tokens > special}
    square = [(special, (side, side)) for special, side in sides.items() if special + side * side == tokens]
    return square[0] if len(square) == 1 and rows.grid[0] == rows.grid[1] else None


def _resize(grid_a: tuple[int, int], grid_b: tuple[int, int]) -> np.ndarray:
    """Bilinear resizing of a row-major grid, ``[height_b * width_b, height_a * width_a]``."""
    return np.kron(*(_resize_axis(size_a, size_b) for size_a, size_b in zip(grid_a, grid_b, strict=True)))


def _resize_axis(size_a: int, size_b: int) -> np.ndarray:
    centres = np.clip((np.arange(size_b) + 0.5) * size_a / size_b - 0.5, 0, size_a - 1)
    return np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(size_a)[None]))
