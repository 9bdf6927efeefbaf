"""Values that are not finite, found before they hide.

A sum with NaN is NaN, but much that reads a task vector passes it by: a comparison with NaN is false, so masks drop it
and votes count it as zero; a factorisation spreads it over a leaf. So it is looked for once, where values enter.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from tvjax import processes, tree
from tvjax.factors import is_low_rank
from tvjax.on_disk import is_on_disk

PyTree = Any

WAY_OUT = "take an earlier checkpoint of the run, a smaller scale, or a dtype of wider range"

# The bits of infinity: what is not finite has these or more, its sign aside.
_INFINITY = {
    np.dtype(np.float64): 0x7FF << 52,
    np.dtype(np.float32): 0xFF << 23,
    np.dtype(np.float16): 0x1F << 10,
    np.dtype(ml_dtypes.bfloat16): 0xFF << 7,
}


def check_finite(values: PyTree, what: str) -> None:
    """Raises where an array has values that are NaN or infinite.

    Each leaf is passed over once, where it lies: NumPy arrays, memory maps and JAX arrays of one CPU device on the
    host, without new memory and with nothing to compile; other JAX arrays by one reduction on their own devices, all
    answers fetched together. Leaves on disk (`tvjax.on_disk`) are read, but for those that were read and found finite
    before. Leaves without values, those that are traced (inside `jit`) or are shapes, cannot be looked at, and are not.

    Args:
      values: any pytree; leaves that are no floating-point arrays are finite.
      what: the whole, for the message.

    Raises:
      ValueError: naming the leaves, and how many of their values are not finite.

    >>> check_finite({"up": np.ones(3)}, "the task vector")
    >>> check_finite({"up": np.array([1.0, np.nan, np.inf])}, "the task vector")
    Traceback (most recent call last):
    ValueError: the task vector has values that are NaN or infinite:
      up: 2 of 3
    take an earlier checkpoint of the run, a smaller scale, or a dtype of wider range
    """
    flat = {
        path: leaf
        for path, leaf in _arrays(values).items()
        if not isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct)
    }
    with jax.ensure_compile_time_eval():  # inside `jit` too, arrays that the function closes over have values
        finite = processes.fetch({path: _is_finite(leaf) for path, leaf in flat.items()})
        wrong = [path for path in flat if not finite[path]]
        if not wrong:
            return
        counts = [f"{path}: {int(_count(flat[path]))} of {jnp.size(flat[path])}" for path in wrong]
    raise ValueError(f"{what} has values that are NaN or infinite:\n{tree.list_some(counts)}\n{WAY_OUT}")


def check_factor(factor: Any, name: str) -> None:
    """Raises a ValueError where a factor that is at hand, and on no device, is NaN or infinite.

    >>> check_factor(float("nan"), "the scale")
    Traceback (most recent call last):
    ...
    ValueError: the scale must be finite, found nan
    """
    if isinstance(factor, float | np.generic | np.ndarray) and not np.isfinite(factor):
        raise ValueError(f"{name} must be finite, found {factor}")


def count_not_finite(array: np.ndarray) -> int:
    """How many values of an array on the host are NaN or infinite.

    >>> count_not_finite(np.array([1.0, np.nan], np.float16))
    1
    """
    if not array.size or not jnp.issubdtype(array.dtype, jnp.inexact) or not _may_be_infinite(array):
        return 0
    return array.size - int(np.count_nonzero(np.isfinite(array)))


def _arrays(values: PyTree) -> dict[str, Any]:
    """The leaves by path; those of low rank by their factors."""
    found: dict[str, Any] = {}
    for path, leaf in tree.flatten(values).items():
        found |= {f"{path}/left": leaf.left, f"{path}/right": leaf.right} if is_low_rank(leaf) else {path: leaf}
    return found


def _may_be_infinite(array: np.ndarray) -> bool:
    """By the greatest bits of either sign, as integers: a single pass without new memory, for every dtype alike."""
    if array.dtype not in _INFINITY:
        return True
    bits, width = _INFINITY[array.dtype], 8 * array.dtype.itemsize
    positive, any_sign = array.view(f"i{width // 8}").max(), array.view(f"u{width // 8}").max()
    return int(positive) >= bits or int(any_sign) >= bits + (1 << (width - 1))


def _is_finite(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return True
        if not _is_on_host(leaf):
            return _all_finite(leaf)
    if is_on_disk(leaf) and leaf.known_finite:
        return True
    return not count_not_finite(np.asarray(leaf))


def _is_on_host(leaf: Any) -> bool:
    """Whether NumPy can look at an array without a copy."""
    return leaf.is_fully_addressable and [device.platform for device in leaf.sharding.device_set] == ["cpu"]


def _count(leaf: Any) -> Any:
    return jnp.sum(~jnp.isfinite(leaf)) if isinstance(leaf, jax.Array) else count_not_finite(np.asarray(leaf))


@jax.jit
def _all_finite(leaf: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(leaf))
