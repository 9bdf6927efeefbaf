"""Dtypes of tensors in safetensors files, and the headers that say them."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from tvjax.models.key_table import Tensor

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_FLOATING = tuple(DTYPES[name] for name in ("F64", "F32", "F16", "BF16"))
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def numpy_dtype(key: str, header: Tensor) -> np.dtype[Any]:
    """The dtype of a tensor.

    Raises:
      ValueError: one that NumPy has not.
    """
    if header.dtype not in DTYPES:
        raise ValueError(f"the tensor {key!r} is of dtype {header.dtype}, expected one of {', '.join(DTYPES)}")
    return DTYPES[header.dtype]


def tensor_bytes(key: str, header: Tensor) -> int:
    """The size of a tensor in bytes."""
    return math.prod(header.shape) * numpy_dtype(key, header).itemsize


def tensor_header(key: str, tensor: Any, dtype: DTypeLike | None = None) -> Tensor:
    """What the header of a file says of an array that is stored in a dtype, see `cast`.

    Raises:
      ValueError: a dtype that is not written.

    >>> tensor_header("x", np.ones((2, 3)), jnp.bfloat16)
    Tensor(dtype='BF16', shape=(2, 3))
    """
    own = np.dtype(tensor.dtype if hasattr(tensor, "dtype") else np.asarray(tensor).dtype)
    if own not in NAMES:
        raise ValueError(f"the tensor {key!r} is of dtype {own.name}, expected one of {', '.join(map(str, NAMES))}")
    return cast_header(key, Tensor(NAMES[own], tuple(np.shape(tensor))), dtype)


def cast_header(key: str, header: Tensor, dtype: DTypeLike | None) -> Tensor:
    """The header of a tensor after `cast`.

    Raises:
      ValueError: a dtype that is not written, or that has no fractions.
    """
    if dtype is None or numpy_dtype(key, header) not in _FLOATING:
        return header
    stored = np.dtype(jnp.dtype(dtype))
    if stored not in _FLOATING:
        raise ValueError(f"weights are stored in {', '.join(map(str, _FLOATING))}, not in {stored.name}")
    return header._replace(dtype=NAMES[stored])


def cast(array: np.ndarray, dtype: DTypeLike | None) -> np.ndarray:
    """Floating values in another dtype, rounded; None, and values that are not floating, leave it."""
    if dtype is None or array.dtype not in _FLOATING:
        return array
    with np.errstate(over="ignore"):  # what became infinite is reported where it is written
        return array.astype(jnp.dtype(dtype), copy=False)
