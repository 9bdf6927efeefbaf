"""Theseus: orthogonal Procrustes on activations (Rinaldi et al., ICML 2026, arXiv 2602.12952)."""

from __future__ import annotations

from typing import Any

from tvjax.transport.base import Transport, make_options
from tvjax.transport.rotation import rotation
from tvjax.transport.statistics import Options


def theseus(**options: Any) -> Transport:
    """``K_B = R_in^T K_A R_out``, both maps from activations on unlabelled data; no backward pass.

    ``R_in`` aligns the inputs of a layer, ``R_out`` its outputs after the bias. The outputs of linear layers are not
    captured: with ``y = [x, 1] [K; b]`` their moment is ``[K_A; b_A]^T M [K_B; b_B]``, M the moment of ``[x, 1]``.

    Args:
      **options: of the maps, see `tvjax.transport.Options`; ``complete="thin", scale_rule="output"`` is the published
        behaviour.

    Returns:
      The transport.

    Raises:
      ValueError: an option that is unknown or out of range.

    >>> theseus(center=True, whiten=0.4).name
    'theseus'
    """
    return rotation("theseus", "input", "output", make_options("theseus", Options, options))
