"""Products at full precision: what feeds a decomposition is multiplied in float32 or wider, on every device."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax


def wide(array: Array | np.ndarray) -> Array:
    """The array in float32, or as it is in float64.

    >>> import jax.numpy as jnp
    >>> wide(jnp.ones(2, jnp.bfloat16)).dtype.name
    'float32'
    """
    return jnp.asarray(array, jnp.float64 if array.dtype == jnp.float64 else jnp.float32)


def product(x: Array | np.ndarray, y: Array | np.ndarray) -> Array:
    """``x @ y`` of `wide` operands at ``Precision.HIGHEST`` (no TF32, no bfloat16 passes).

    >>> import jax.numpy as jnp
    >>> product(jnp.ones((1, 2), jnp.bfloat16), jnp.ones((2, 1))).tolist()
    [[2.0]]
    """
    x, y = wide(x), wide(y)
    dtype = x.dtype if x.dtype == jnp.float64 else y.dtype
    return jnp.matmul(x.astype(dtype), y.astype(dtype), precision=lax.Precision.HIGHEST)
