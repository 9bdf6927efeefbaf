"""Maps between the heads of attention layers: which heads correspond, and one map for each pair of them.

The outputs of q, k and v and the inputs of o are heads, one head's units after the other's. A map that turns them as a
whole mixes heads, which the softmax of each head does not forgive. Here each pair of heads has a map of its own, from
its block of the cross-moment ``C [H_A d_a, H_B d_b]``.

**Which heads correspond** (`by_index`): target head h takes source head ``floor(h H_A / H_B)`` where the target has as
many heads or more; where it has fewer, source head s goes to target head ``floor(s H_B / H_A)``, and several fall on
one. Every head of both models is in a pair. Where keys and values have fewer heads than queries (grouped queries), the
key heads are paired so, and the query heads as well unless that would pair two whose keys are not paired: then they are
paired inside each pair of key heads.

**What a pair adds** (`block_map`): each pair has its own map ``R_sh``, the polar factor of its block of C. As a map of
outputs, a target head is the mean over the heads that fall on it of what they become; as a map of inputs, a source head
that goes to several target heads gives each an equal share. So a target whose heads are copies of the source's, with
the rows of o shared among them, receives exactly the copied task vector, and so does one whose heads are those of
which the source has copies.

**Positions** (`phase_map`): rotary positions turn the pair of units (j, j + d/2) of every query and key by ``position *
frequency_j``. A map of both keeps the attention scores at every distance only if it commutes with that: a rotation by
one phase for each frequency, the same for a key head and its queries. With ``z = x_j + i x_{j + d/2}`` the moments of
q and of k before positions rotate them add up to one number ``c = sum conj(z_A) z_B``, and ``c / |c|`` is the map that
serves both best.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tvjax.align import procrustes
from tvjax.align.decompositions import singular_values
from tvjax.align.procrustes import Completion, OrthogonalMap

Structure = Literal["free", "blocks", "rotary"]
Matching = Literal["index", "assignment"]
STRUCTURES: tuple[Structure, ...] = ("free", "blocks", "rotary")
MATCHINGS: tuple[Matching, ...] = ("index", "assignment")
DEFAULT_STRUCTURE: Structure = "free"
Places = tuple[tuple[int, ...], tuple[int, ...]]


class HeadPairs(NamedTuple):
    """Heads that correspond: ``source[p]`` and ``target[p]``, int32 ``[pairs]``, sorted by target."""

    source: Any
    target: Any


# -- which heads correspond -----------------------------------------------------------------------------------------


def by_index(number_a: int, number_b: int) -> HeadPairs:
    """The pairs of the heads of two layers by their places; as many as the layer with more heads has.

    >>> [by_index(2, 4).source.tolist(), by_index(3, 2).target.tolist()]
    [[0, 0, 1, 1], [0, 0, 1]]
    """
    source, target = np.arange(max(number_a, number_b)), np.arange(max(number_a, number_b))
    if number_a < number_b:
        source = target * number_a // number_b
    else:
        target = source * number_b // number_a
    return _pairs(source, target)


def grouped_by_index(groups: HeadPairs, numbers: tuple[int, int], of_group: tuple[int, int]) -> HeadPairs:
    """The pairs of query heads by their places, inside paired key heads only.

    Args:
      groups: the pairs of key heads.
      numbers: of the query heads in the source and in the target.
      of_group: how many of them share one key head, in either.

    >>> pairs = grouped_by_index(by_index(3, 2), (9, 8), (3, 4))  # 0-2 and 3-5 on 0-3, 6-8 on 4-7
    >>> pairs.source.tolist(), pairs.target.tolist()
    ([0, 3, 0, 3, 1, 4, 2, 5, 6, 6, 7, 8], [0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7])
    """
    whole = by_index(*numbers)
    allowed = set(zip(groups.source.tolist(), groups.target.tolist(), strict=True))
    found = {(int(s) // of_group[0], int(h) // of_group[1]) for s, h in zip(*whole, strict=True)}
    if found == allowed:
        return whole
    inside = by_index(*of_group)
    return _inside(groups, [inside] * len(groups.source), of_group)


def by_assignment(scores: np.ndarray) -> HeadPairs:
    """The pairs of heads with the greatest total score ``[H_A, H_B]``.

    Each head of the side that has more is in one pair; a head of the other side is in at most
    ``ceil(more / fewer)`` pairs.

    >>> by_assignment(np.array([[0.0, 2.0], [1.0, 0.0]])).source.tolist()
    [1, 0]
    """
    from scipy.optimize import linear_sum_assignment  # takes as long to import as the rest of tvjax

    number_a, number_b = scores.shape
    copies_a, copies_b = -(-number_b // number_a), -(-number_a // number_b)
    tiled = np.tile(np.asarray(scores, np.float64), (copies_a, copies_b))
    rows, columns = linear_sum_assignment(tiled, maximize=True)
    return _pairs(rows % number_a, columns % number_b)


def grouped_by_assignment(group_scores: np.ndarray, scores: np.ndarray | None) -> tuple[HeadPairs, HeadPairs | None]:
    """The pairs of key heads, and of query heads inside them, with the greatest total score.

    For every pair of key heads the best assignment of their queries is found first; its value is added to that of the
    pair.

    Args:
      group_scores: of the key heads, ``[G_A, G_B]``.
      scores: of the query heads, ``[H_A, H_B]``; None where there are none beside the key heads.

    >>> groups, queries = grouped_by_assignment(np.zeros((2, 2)), np.flip(np.eye(4), 0))
    >>> groups.source.tolist(), queries.source.tolist()
    ([1, 0], [3, 2, 1, 0])
    """
    if scores is None:
        return by_assignment(group_scores), None
    of_group = tuple(n // g for n, g in zip(scores.shape, group_scores.shape, strict=True))
    blocks = scores.reshape(group_scores.shape[0], of_group[0], group_scores.shape[1], of_group[1])
    total, inside = np.array(group_scores, np.float64), {}
    for a, b in np.ndindex(*group_scores.shape):
        inside[a, b] = by_assignment(blocks[a, :, b, :])
        total[a, b] += blocks[a, :, b, :][inside[a, b].source, inside[a, b].target].sum()
    groups = by_assignment(total)
    chosen = [inside[int(a), int(b)] for a, b in zip(*groups, strict=True)]
    return groups, _inside(groups, chosen, of_group)


def _inside(groups: HeadPairs, inside: Sequence[HeadPairs], of_group: tuple[int, ...]) -> HeadPairs:
    source = [a * of_group[0] + pairs.source for a, pairs in zip(groups.source, inside, strict=True)]
    target = [b * of_group[1] + pairs.target for b, pairs in zip(groups.target, inside, strict=True)]
    return _pairs(np.concatenate(source), np.concatenate(target))


def _pairs(source: np.ndarray, target: np.ndarray) -> HeadPairs:
    order = np.lexsort((source, target))
    return HeadPairs(source[order].astype(np.int32), target[order].astype(np.int32))


# -- moments by head ------------------------------------------------------------------------------------------------


def head_blocks(moment: Array, numbers: tuple[int, int]) -> Array:
    """A cross-moment ``[H_A d_a, H_B d_b]`` by pairs of heads, ``[H_A, H_B, d_a, d_b]``."""
    (rows, columns), (number_a, number_b) = moment.shape, numbers
    return moment.reshape(number_a, rows // number_a, number_b, columns // number_b).transpose(0, 2, 1, 3)


@partial(jax.jit, static_argnames="numbers")
def nuclear_norms(moment: Array, numbers: tuple[int, int]) -> Array:
    """The nuclear norm of each pair of heads' block of a cross-moment, ``[H_A, H_B]``, as shares of their sum.

    The nuclear norm is ``max_R tr(R^T C)``: what the pair's own map reaches.

    >>> nuclear_norms(jnp.diag(jnp.array([3.0, -1.0])), (2, 2)).tolist()
    [[0.75, 0.0], [0.0, 0.25]]
    """
    blocks = head_blocks(moment, numbers)
    norms = jnp.sum(jax.vmap(jax.vmap(singular_values))(blocks), -1)
    total = jnp.sum(norms)
    return norms / jnp.where(total > 0, total, 1)


# -- maps -----------------------------------------------------------------------------------------------------------


def block_map(
    moment: Array,
    pairs: HeadPairs,
    numbers: tuple[int, int],
    settings: dict[str, Any],
    grams: tuple[Array, Array] | None = None,
    whitening: tuple[float, float] = (0.0, 0.0),
) -> OrthogonalMap:
    """The map of outputs whose blocks are the polar factors of those of a cross-moment.

    Args:
      moment: C, ``[H_A d_a, H_B d_b]``.
      pairs: the heads that correspond.
      numbers: of heads in the source and in the target.
      settings: of `tvjax.align.procrustes.polar`, for each block.
      grams: Gram matrices of both sides, for whitening inside each head.
      whitening: its power and floor (`tvjax.align.procrustes.whiten`).

    Returns:
      ``R [H_A d_a, H_B d_b]``; its rank is the sum over the blocks. `for_inputs` makes the map of inputs of it.

    >>> found = block_map(jnp.array([[2.0, 3.0]]), by_index(1, 2), (1, 2), {})
    >>> procrustes.matrix(found).tolist()
    [[1.0, 1.0]]
    """
    blocks = head_blocks(moment, numbers)[pairs.source, pairs.target]
    if grams is not None:
        gram_a, gram_b = (
            jnp.moveaxis(jnp.diagonal(head_blocks(gram, (n, n))), -1, 0)[heads]
            for gram, n, heads in zip(grams, numbers, pairs, strict=True)
        )
        blocks = jax.vmap(lambda c, a, b: procrustes.whiten(c, a, b, *whitening))(blocks, gram_a, gram_b)
    return assembled(jax.vmap(lambda block: procrustes.polar(block, **settings))(blocks), pairs, numbers)


def assembled(blocks: OrthogonalMap, pairs: HeadPairs, numbers: tuple[int, int]) -> OrthogonalMap:
    """The maps of pairs of heads ``[pairs, ...]`` as one map of outputs: a target head is the mean of its pairs."""
    (count, d_a, k), d_b = blocks.left.shape, blocks.right.shape[-1]
    places = jnp.arange(count)
    left = jnp.zeros((numbers[0], d_a, count, k), blocks.left.dtype)
    left = left.at[pairs.source, :, places].set(blocks.left * _shares(pairs.target, numbers[1])[:, None, None])
    right = jnp.zeros((count, k, numbers[1], d_b), blocks.right.dtype)
    right = right.at[places, :, pairs.target].set(blocks.right)
    return OrthogonalMap(
        left.reshape(numbers[0] * d_a, count * k),
        right.reshape(count * k, numbers[1] * d_b),
        jnp.sum(blocks.rank, dtype=jnp.int32),
    )


def for_inputs(outputs: OrthogonalMap, pairs: HeadPairs, numbers: tuple[int, int]) -> OrthogonalMap:
    """The map of inputs that goes with a map of outputs: a source head is shared among its pairs.

    With x_B = x_A R the kernel that gives the same outputs is ``pinv(R) K``; where a head of the source has copies in
    the target, that is ``R^T K`` by shares.
    """
    ratio = _shares(pairs.source, numbers[0]) / _shares(pairs.target, numbers[1])
    directions = outputs.left.shape[-1] // ratio.shape[0]
    weights = jnp.repeat(ratio, directions, total_repeat_length=outputs.left.shape[-1])
    return outputs._replace(left=outputs.left * weights)


def _shares(heads: Any, number: int) -> Array:
    """For each pair one over the number of pairs that its head is in."""
    return 1 / jnp.zeros(number, jnp.float32).at[heads].add(1)[heads]


# -- rotary positions -----------------------------------------------------------------------------------------------


def pair_frequencies(frequencies_a: Sequence[float], frequencies_b: Sequence[float]) -> Places:
    """Which pairs of units of a source head and of a target head positions turn alike.

    One to one, nearest in the logarithm; pairs farther apart than half of the wider spacing of the two correspond to
    none. Heads of 64 and 128 units at one base share every second frequency, and only those.

    Returns:
      Places in the source and in the target, ascending in the target.

    >>> pair_frequencies((1.0, 0.01), (1.0, 0.1, 0.01, 0.001))
    ((0, 1), (0, 2))
    """
    from scipy.optimize import linear_sum_assignment  # takes as long to import as the rest of tvjax

    logs = [np.log(np.maximum(np.asarray(side, np.float64), 1e-30)) for side in (frequencies_a, frequencies_b)]
    spacings = [np.ptp(side) / max(len(side) - 1, 1) for side in logs]
    limit = max(max(spacings) / 2, 1e-4)  # frequencies of one model in float32 and in another's rounding are alike
    distances = np.abs(logs[0][:, None] - logs[1])
    rows, columns = linear_sum_assignment(np.where(distances < limit, distances, 1e6))
    near = distances[rows, columns] < limit
    order = np.argsort(columns[near])
    return tuple(rows[near][order].tolist()), tuple(columns[near][order].tolist())


def pair_moments(blocks: Array, places: Places) -> Array:
    """``c = sum conj(z_A) z_B`` of each frequency from blocks of a cross-moment, ``[..., d_a, d_b]`` to ``[..., n]``.

    >>> quarter_turn = jnp.array([[0.0, 2.0], [-2.0, 0.0]])  # x_B = (-x_A2, x_A1): the second unit is 90 degrees on
    >>> pair_moments(quarter_turn, ((0,), (0,))).tolist()
    [4j]
    """
    i, j = map(np.array, places)
    first_a, first_b = blocks.shape[-2] // 2, blocks.shape[-1] // 2
    ends = ((i, i + first_a), (j, j + first_b))
    c = [[blocks[..., a, b] for b in ends[1]] for a in ends[0]]
    return jax.lax.complex(c[0][0] + c[1][1], c[0][1] - c[1][0])


def phase_map(
    moments: Array,
    places: Places,
    sizes: tuple[int, int],
    complete: Completion,
    rank_tolerance: float | None,
) -> OrthogonalMap:
    """The rotation by ``c / |c|`` of each frequency, as a map ``[d_a, d_b]`` of a head, 0 for those of one side only.

    Args:
      moments: c, ``[n]`` complex.
      places: of the frequencies in the source and in the target, from `pair_frequencies`.
      sizes: units of a head, d_a and d_b.
      complete: what the phase is where the moments are zero up to rounding: ``"zero"``: the pair is left out, partly at
        the edge as in `tvjax.align.procrustes.polar`; ``"thin"``: whatever it is; ``"eye"``: none.
      rank_tolerance: relative to the largest c; None: as in `tvjax.align.procrustes.polar`.

    >>> found = phase_map(jnp.array([4j]), ((0,), (0,)), (2, 2), "zero", None)
    >>> procrustes.matrix(found).tolist()
    [[0.0, 1.0], [-1.0, 0.0]]
    """
    size = jnp.abs(moments)
    if rank_tolerance is None:
        rank_tolerance = procrustes.default_rank_tolerance(size.dtype)
    edge = rank_tolerance * jnp.max(size, initial=0)
    safe = jnp.where(size > 0, size, 1)
    cosine, sine = moments.real / safe, moments.imag / safe
    share = jnp.clip(jnp.where(edge > 0, 2 * size / jnp.where(edge > 0, edge, 1) - 1, jnp.sign(size)), 0, 1)
    if complete == "zero":
        cosine, sine = share * cosine, share * sine
    elif complete == "eye":
        cosine, sine = jnp.where(size > edge, cosine, 1), jnp.where(size > edge, sine, 0)
    i, j = map(np.array, places)
    ends = ((i, i + sizes[0] // 2), (j, j + sizes[1] // 2))
    whole = jnp.zeros(sizes, size.dtype)
    for (a, b), entries in zip(np.ndindex(2, 2), (cosine, sine, -sine, cosine), strict=True):
        whole = whole.at[ends[0][a], ends[1][b]].set(entries)
    rank = 2 * jnp.sum(size > edge, dtype=jnp.int32)
    if sizes[0] < sizes[1]:
        return OrthogonalMap(jnp.eye(sizes[0], dtype=size.dtype), whole, rank)
    return OrthogonalMap(whole, jnp.eye(sizes[1], dtype=size.dtype), rank)
