"""What a language model says of tokens: their scores, or over a large vocabulary the loss, a few tokens at a time."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@partial(jax.jit, static_argnums=(3, 4))
def chunked(
    hidden: Float[Array, "batch tokens width"],
    unembedding: Float[Array, "width vocabulary"],
    tokens: Int[Array, "batch tokens"],
    chunk: int = 1024,
    cap: float | None = None,
) -> tuple[Float[Array, "batch tokens"], Int[Array, "batch tokens"], Bool[Array, "batch tokens"]]:
    """Losses, greatest tokens, and whether the scores are finite, of ``hidden @ unembedding``, never held as a whole.

    The logits of `chunk` tokens are alive at a time, and made anew in the backward pass, so that the memory is that of
    ``chunk * vocabulary`` numbers, however many the tokens.

    Args:
      hidden: the last activations.
      unembedding: kernel of the head.
      tokens: what is right.
      chunk: tokens at a time.
      cap: of the logits, see `capped`.

    >>> losses, greatest, _ = chunked(jnp.eye(3)[None], 9 * jnp.eye(3), jnp.array([[0, 1, 1]]), 2)
    >>> greatest.tolist(), (losses[0] < 0.01).tolist()
    ([[0, 1, 2]], [True, True, False])
    """
    count = tokens.size
    chunk = min(chunk, count)
    filler = -count % chunk
    rows = jnp.pad(hidden.reshape(count, -1), ((0, filler), (0, 0))).reshape(-1, chunk, hidden.shape[-1])
    wanted = jnp.pad(tokens.reshape(count), (0, filler)).reshape(-1, chunk)

    @jax.checkpoint
    def one(rows: Array, wanted: Array, kernel: Array) -> tuple[Array, Array, Array]:
        logits = capped(jnp.matmul(rows, kernel.astype(rows.dtype), preferred_element_type=jnp.float32), cap)
        at = jnp.take_along_axis(logits, wanted[:, None], axis=-1)[:, 0]
        finite = jnp.isfinite(jnp.max(logits, axis=-1))
        return jax.nn.logsumexp(logits, axis=-1) - at, jnp.argmax(logits, axis=-1), finite

    _, found = jax.lax.scan(lambda _, given: (None, one(*given, unembedding)), None, (rows, wanted))
    losses, greatest, finite = (part.reshape(-1)[:count].reshape(tokens.shape) for part in found)
    return losses, greatest, finite


def token_scores(
    carry: dict[str, Array],
    hidden: Float[Array, "batch tokens width"],
    kernel: Float[Array, "width vocabulary"],
    replaced: Collection[str],
    cap: float | None = None,
) -> dict[str, Array]:
    """What a head returns: the logits; where the carry names the tokens that are ``wanted``, how likely these are.

    Args:
      carry: what the head is given.
      hidden: the last activations.
      kernel: of the head.
      replaced: what of the carry is not handed on, ``wanted`` apart.
      cap: of the logits, see `capped`.

    Returns:
      The rest of the carry, with float32 ``logits``, or ``losses``, ``predicted`` and ``finite``.

    >>> sorted(token_scores({"wanted": jnp.zeros((1, 2), int)}, jnp.ones((1, 2, 3)), jnp.ones((3, 4)), ()))
    ['finite', 'losses', 'predicted']
    """
    rest = {name: leaf for name, leaf in carry.items() if name not in (*replaced, "wanted")}
    if "wanted" in carry:
        losses, predicted, finite = chunked(hidden, kernel, carry["wanted"], cap=cap)
        return {**rest, "losses": losses, "predicted": predicted, "finite": finite}
    return {**rest, "logits": capped(hidden @ kernel.astype(hidden.dtype), cap).astype(jnp.float32)}


def capped(scores: Float[Array, "*any"], cap: float | None) -> Float[Array, "*any"]:
    """``cap tanh(scores / cap)``: scores that cannot grow above a cap (Gemma); None leaves them as they are.

    >>> capped(jnp.array([0.0, 1e9]), 30.0).tolist()
    [0.0, 30.0]
    """
    return scores if cap is None else cap * jnp.tanh(scores / cap)
