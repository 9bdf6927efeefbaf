"""Any merge on a scanned model, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvjax.layers import stack, unstack
from tvjax.merge.base import over_meshes

PyTree = Any


def by_layer(merge: Callable[..., PyTree], stacks: str | Sequence[str], axis: int = 0) -> Callable[..., PyTree]:
    """The merge that takes stacked layers apart, merges, and stacks the result: that of the unrolled model.

    Without it a rule by leaf (a density, an angle, a rank) takes all layers of a stacked leaf as one leaf, and weights
    by path and by depth see no layers.

    Args:
      merge: any merge of this package, ``(taus, **options) -> tau``.
      stacks: paths, or patterns of paths, of the stacked subtrees (`tvjax.unstack`).
      axis: their layer axis. Stacks of other axes are told by a second call around the first.

    Returns:
      ``(taus, *arguments, **options) -> tau``; patterns, depths and the report are of the unstacked paths,
      ``blocks/3/up/kernel``.

    Raises:
      ValueError: when called, as `tvjax.unstack` and the merge.

    >>> import jax.numpy as jnp
    >>> from tvjax.merge import ByDepth, task_arithmetic
    >>> scanned = by_layer(task_arithmetic, "blocks")
    >>> scanned([{"blocks": {"w": jnp.ones((3, 1))}}], weights=ByDepth((1.0, 2.0), other=0.0))["blocks"]["w"].tolist()
    [[1.0], [1.5], [2.0]]
    """

    @over_meshes
    def merged(taus: Sequence[PyTree], *arguments: Any, **options: Any) -> PyTree:
        return stack(merge([unstack(tau, stacks, axis) for tau in taus], *arguments, **options), stacks, axis)

    return merged
