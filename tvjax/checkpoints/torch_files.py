"""The tensors in files of ``torch.save``, opened so that nothing but tensors is made of them (``weights_only``)."""

from __future__ import annotations

import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from tvjax.kinds import kind_of

if TYPE_CHECKING:
    import torch

# What the unpickler of torch fails with, at whatever it reads first in a damaged file.
_DAMAGED = (RuntimeError, EOFError, ValueError, LookupError, AssertionError, struct.error)
_STATE_DICT = "save model.state_dict() with torch.save"


def load_tensors(file: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a state dict as arrays, which share its memory where they lie in it as they are.

    Sparse tensors are read as dense ones. A checkpoint of a training run is looked up under ``state_dict``.

    Raises:
      ValueError: a file that is no state dict, or a tensor that is none of plain numbers; the message names it.
    """
    content = _open(file)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{os.fspath(file)!r} holds {kind_of(content)}, expected tensors by name")
    tensors: dict[str, np.ndarray] = {}
    for key, value in content.items():
        name = key.removeprefix("module.")
        if re.match(r"text\.(transformer|token_embedding|positional_embedding|ln_final|text_projection)\b", name):
            name = name.removeprefix("text.")  # as open_clip's models with a text tower of its own class have it
        if name in tensors:
            raise ValueError(f"{os.fspath(file)!r} has {name!r} twice, once as {key!r}: {_STATE_DICT} of one model")
        try:
            tensors[name] = _array(value)
        except ValueError as error:
            raise ValueError(f"{os.fspath(file)!r}: {key!r} {error}") from error
    return tensors


def _open(file: str | os.PathLike[str]) -> Any:
    """What a file of ``torch.save`` holds, as far as it consists of tensors and plain values."""
    try:
        import torch
    except ImportError as error:
        raise ValueError("a state dict is read with torch, which is not installed: pip install torch") from error

    name = os.fspath(file)
    if _is_torchscript(name):
        raise ValueError(
            f"{name!r} is a TorchScript archive, a program: load it where you trust it with torch.jit.load, and "
            f"{_STATE_DICT}"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the versions that a damaged file pretends to be of
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # its text advises to open the file unsafely
        kinds = re.findall(r"GLOBAL (\S+)", str(error))
        held = f"{kinds[0]}, which only code from outside can make" if kinds else "what is no pickle of tensors"
        raise ValueError(
            f"{name!r} is no state dict of tensors, it holds {held}: {_STATE_DICT}, and nothing beside it"
        ) from error
    except _DAMAGED as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name!r} is no state dict of tensors, or is damaged ({reason}): {_STATE_DICT}") from error


def _is_torchscript(file: str) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def _array(value: torch.Tensor | Any) -> np.ndarray:
    """A tensor's values.

    Raises:
      ValueError: what it is instead of a tensor of plain numbers.
    """
    import torch

    if not isinstance(value, torch.Tensor):
        raise ValueError(f"is {kind_of(value)}, expected a tensor")
    value = value.detach()
    if value.is_nested:
        raise ValueError("is a nested tensor, of rows of unlike lengths: save one tensor for each")
    if value.is_meta:
        raise ValueError("is a tensor on the meta device, which has no values: load the weights, then save them")
    if value.is_quantized:
        raise ValueError(f"is quantized ({value.dtype}): save it as tensor.dequantize()")
    if value.layout != torch.strided:
        value = value.to_dense()
    if value.dtype == torch.bfloat16:
        return value.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    if value.dtype not in _plain_dtypes():
        raise ValueError(
            f"is of dtype {value.dtype}, expected float32, float16 or bfloat16: save it as tensor.to(torch.float32), "
            "multiplied by its scale where it has one"
        )
    return value.numpy()


def _plain_dtypes() -> tuple[torch.dtype, ...]:
    """Those that state dicts have and NumPy has too; what parameters may be of is decided where they are matched."""
    import torch

    floats = (torch.float64, torch.float32, torch.float16)
    return (*floats, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
