"""BiCo: bilinear coordinate alignment (Son et al., 2026, arXiv 2605.28444)."""

from __future__ import annotations

from typing import Any, Literal

from tvjax.transport.base import Transport, make_options
from tvjax.transport.rotation import rotation
from tvjax.transport.statistics import Options


def bico(*, input: Literal["activations", "gradients"] = "activations", **options: Any) -> Transport:
    """``K_B = R_in^T K_A R_out``, ``R_in`` from input activations and ``R_out`` from output gradients ``dL/dy``.

    A gradient step on a linear layer is ``x^T g``: a task vector is a sum of products of input activations and output
    gradients, and each side has its own coordinates. One forward and backward pass of each model on a few labelled
    examples, the same loss on both sides; no parameter is updated.

    Args:
      input: what ``R_in`` is taken from: the input activations, or their gradients ``dL/dx = g K^T``.
      **options: of the maps, see `tvjax.transport.Options`.

    Returns:
      The transport.

    Raises:
      ValueError: an option that is unknown or out of range.

    >>> bico(rank=0.25, method="randomised").name
    'bico'
    """
    if input not in ("activations", "gradients"):
        raise ValueError(f"input must be 'activations' or 'gradients', found {input!r}")
    side = "input" if input == "activations" else "input gradient"
    return rotation("bico", side, "gradient", make_options("bico", Options, options))
