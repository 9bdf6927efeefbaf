"""How alike two pre-trained models are, block by block, before anything is moved between them.

A task vector carries over where the models see the same things: between releases of one family even a plain copy does.
Linear CKA of the two residual streams on some examples tells beforehand (rank correlation 0.74 with what a copy keeps,
UpgradeBench, arXiv 2608.20918), needs no labels, and does not see rotations, so it speaks for transports by maps too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from tvjax.align import moments
from tvjax.align.moments import Moments
from tvjax.finite import check_finite
from tvjax.progress import Progress
from tvjax.stages import Model, check_model
from tvjax.transport.checks import check_batches, views_of
from tvjax.transport.pairing import aligned, hidden, pair_stages
from tvjax.walk import Walk


class Likeness(NamedTuple):
    """How alike a pair of blocks is.

    Attributes:
      target: the target's stage.
      source: the source's stage.
      cka: linear CKA of what they leave in the residual stream, in [0, 1].
      rows: how many rows were compared.
    """

    target: str
    source: str
    cka: float
    rows: int


def likeness(
    source: Model,
    target: Model,
    batches: Sequence[Any],
    *,
    depth: Any = "uniform",
    tokens: Any = "interpolate",
    progress: Progress | None = None,
) -> tuple[Likeness, ...]:
    """Linear CKA of the residual streams of two models, by pair of blocks.

    ``||H_A^T H_B||_F^2 / (||H_A^T H_A||_F ||H_B^T H_B||_F)`` of the centred rows of all batches, streamed (Kornblith et
    al., ICML 2019, arXiv 1905.00414, equation 4). With fewer rows than features it is biased upwards: some hundreds of
    rows are wanted. Memory: two residual streams of the examples and three moments of a width.

    Args:
      source: the one model.
      target: the other.
      batches: as for `tvjax.fit`; no labels are read.
      depth: which blocks are compared, as in `tvjax.fit`.
      tokens: as in `tvjax.fit`.
      progress: called with (stages done, stages in all, name of the stage).

    Returns:
      One for each block of the target; for each stage where the target has no blocks of one group.

    Raises:
      ValueError: as `tvjax.fit` does.

    >>> import jax
    >>> from tvjax import Batch, single_stage
    >>> model = single_stage(lambda p, x: x @ p["kernel"], {"kernel": jnp.eye(3)})
    >>> rows = Batch(jax.random.normal(jax.random.key(0), (8, 3)))
    >>> [(one.target, round(one.cka, 4)) for one in likeness(model, model, [rows])]
    [('model', 1.0)]
    """
    for side, model in (("source", source), ("target", target)):
        check_model(side, model)
        check_finite(model.params, f"the {side} model")
    views = [views_of(batch) for batch in batches]
    check_batches("likeness", views, target)
    walks = Walk(source, [view.source for view in views]), Walk(target, [view.target for view in views])
    pairing = pair_stages(source, target, depth, walks, [view.overlaps for view in views], tokens)
    blocks = [i for i, stage in enumerate(target.stages) if stage.group] or list(range(len(target.stages)))
    found = []
    for done, index in enumerate(blocks):
        stages = source.stages[pairing[index]], target.stages[index]
        state = None
        for batch in range(len(views)):
            sides = hidden(walks[0], pairing[index], batch), hidden(walks[1], index, batch)
            a, b, weights = aligned(sides, stages, tokens, views[batch].overlaps)
            if state is None:
                state = moments.init(a.shape[-1], b.shape[-1], gram=True)
            state = moments.update(state, a, b, weights)
        assert state is not None
        found.append((stages[1].name, stages[0].name, _cka(state), state.count))
        for walk, needed in zip(walks, ([pairing[i] for i in blocks[done:]], blocks[done:]), strict=True):
            walk.release_before(min(needed))
        if progress is not None:
            progress(done + 1, len(blocks), stages[1].name)
    return tuple(Likeness(ours, theirs, float(cka), round(float(rows))) for ours, theirs, cka, rows in found)


@jax.jit
def _cka(state: Moments) -> Array:
    """Linear CKA from the sums of the rows."""
    cross, (gram_a, gram_b) = moments.cross(state, center=True), moments.grams(state, center=True)
    norms = jnp.linalg.norm(gram_a) * jnp.linalg.norm(gram_b)
    return jnp.sum(jnp.square(cross)) / jnp.where(norms > 0, norms, 1)
