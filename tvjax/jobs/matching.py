"""Which tokens of two models are partners: those in the same place, or those that cover the same characters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from tvjax.data.spans import OPENING, decoded, token_overlap
from tvjax.stages import Batch

_MASKS = {"tokens": "mask", "decoder_tokens": "decoder_mask"}


def cut_alike(a: Batch, b: Batch) -> bool:
    """Whether two batches of the same texts, whose ids are codes of spans, have the same tokens."""
    names = [name for name in ("tokens", "mask", "wanted") if name in a.inputs]
    return all(np.array_equal(a.inputs[name], b.inputs[name]) for name in names)


def overlaps_of(a: Batch, b: Batch) -> dict[str, np.ndarray]:
    """What brings A's tokens to B's, of batches whose ids are codes of spans, by the mask of B's tokens."""
    found = {}
    for name, mask in _MASKS.items():
        if name in b.inputs:
            found[mask] = _overlap(*((_opened(name, one.inputs[name]), np.asarray(one.inputs[mask])) for one in (a, b)))
    return found


def _overlap(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The overlap of codes under masks, ``[texts, tokens]``, or ``[texts, classes, tokens]``: of each class its own."""
    rows = [[x.reshape(-1, x.shape[-1]) for x in side] for side in (a, b)]
    found = token_overlap(*(decoded(*side) for side in rows))
    if a[0].ndim == 2:
        return found
    texts, classes = a[0].shape[:2]
    own = np.einsum(
        "ncba,cd->ncbda", found.reshape(texts, classes, *found.shape[1:]), np.eye(classes, dtype=np.float32)
    )
    return own.reshape(texts, classes * found.shape[1], classes * found.shape[2])


def overlap_shapes(a: Batch, b: Batch) -> dict[str, tuple[int, ...]]:
    """The shapes of `overlaps_of`."""
    names = {name: mask for name, mask in _MASKS.items() if name in b.inputs}
    return {
        mask: (len(b.inputs[name]), *(math.prod(side.inputs[name].shape[1:]) for side in (b, a)))
        for name, mask in names.items()
    }


def partnered(batches: Iterable[tuple[Batch, Batch]]) -> float:
    """The share of the target's tokens that have a partner in the source."""
    real = matched = 0
    for a, b in batches:
        for mask, overlap in overlaps_of(a, b).items():
            real += int(b.inputs[mask].sum())
            matched += int(overlap.any(-1).sum())
    return matched / real


def note(share: float) -> str:
    """What the user should know of tokens that were matched by characters.

    >>> note(0.934)
    "tokens matched by characters: 93 % of the target's tokens have a partner"
    """
    return f"tokens matched by characters: {100 * share:.0f} % of the target's tokens have a partner"


def _opened(name: str, codes: Any) -> np.ndarray:
    """The codes of tokens, a decoder's first, which stands for no text, as one that opens it."""
    codes = np.array(codes)
    if name == "decoder_tokens":
        codes[..., 0] = -OPENING
    return codes
