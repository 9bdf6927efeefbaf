"""One readable table per family says where each layer lies here and in a Hugging Face checkpoint.

Both directions are derived from it. A row names a layer on both sides and its kind; `KINDS` says what the arrays of a
layer of that kind are called, and how they are laid out, on either side.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from tvjax import tree
from tvjax.stages import PyTree

Layout = Callable[[np.ndarray], np.ndarray]


class Leaf(NamedTuple):
    """One array of a layer.

    Attributes:
      ours: suffix of its path.
      theirs: suffix of its key.
      to_ours: their layout to ours.
      to_theirs: our layout to theirs.
    """

    ours: str
    theirs: str
    to_ours: Layout
    to_theirs: Layout


def _same(x: np.ndarray) -> np.ndarray:
    return x


_BIAS = Leaf("/bias", ".bias", _same, _same)
KINDS: dict[str, tuple[Leaf, ...]] = {
    "array": (Leaf("", "", _same, _same),),
    "batched array": (Leaf("", "", lambda x: x[0], lambda x: x[None]),),
    "batched token": (Leaf("", "", lambda x: x[0, 0], lambda x: x[None, None]),),
    "embedding": (Leaf("", ".weight", _same, _same),),
    "norm": (Leaf("/scale", ".weight", _same, _same), _BIAS),
    "linear": (Leaf("/kernel", ".weight", np.transpose, np.transpose), _BIAS),
    "conv": (  # height, width, in, out here; out, in, height, width there
        Leaf("/kernel", ".weight", lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)),
        _BIAS,
    ),
}


class Row(NamedTuple):
    """One layer: ``{i}`` stands for a number, ``{tower}`` for ``vision`` or ``text``, on both sides.

    ``{path}`` stands for anything; its parts are joined by slashes here, and by dots in a checkpoint.

    Attributes:
      path: where it lies in our parameters.
      key: its name in a checkpoint.
      kind: a key of `KINDS`.
    """

    path: str
    key: str
    kind: str


class KeyTable(NamedTuple):
    """The layers of a family.

    Attributes:
      rows: every layer that a model of the family can have.
      unused: keys (with ``{tower}``) that checkpoints may have and the model does not read.
      wrappers: beginnings of keys that some checkpoints leave out.
      wrapper_of: by class of transformers, the beginning that its modules' names leave out.
      renamed: names of modules in recent transformers (with ``{i}``), which its checkpoints do not have, and the keys
        that stand for them there.
    """

    rows: tuple[Row, ...]
    unused: tuple[str, ...] = ()
    wrappers: tuple[str, ...] = ()
    wrapper_of: Mapping[str, str] = MappingProxyType({})
    renamed: tuple[tuple[str, str], ...] = ()


class Tensor(NamedTuple):
    """What the header of a checkpoint says of one tensor: its dtype's safetensors name, and its shape."""

    dtype: str
    shape: tuple[int, ...]


class Source(NamedTuple):
    """Where a parameter is read: the key in the checkpoint, and the change of layout, there and back."""

    key: str
    to_ours: Layout
    to_theirs: Layout


FLOATS = ("F32", "F16", "BF16")
_PLACEHOLDERS = {"i": r"\d+", "tower": "vision|text", "path": ".+"}


def find_sources(
    table: KeyTable, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], origin: str
) -> dict[str, Source]:
    """Where to read each parameter, after checking that parameters and checkpoint match completely.

    Args:
      table: the family's layers.
      shapes: shape of each parameter of the model, by path.
      tensors: each tensor of the checkpoint, by key.
      origin: name of the checkpoint, for the error.

    Returns:
      The source of each parameter, by path.

    Raises:
      ValueError: naming every missing key, surplus key, wrong shape and unsupported dtype.
    """
    expected = {path: _locate(table, path) for path in shapes}
    names = {key for key, _ in expected.values()}
    found: dict[str, str] = {}  # key as the table spells it -> key in the checkpoint
    surplus = []
    for key in tensors:
        spellings = (key, *(wrapper + key for wrapper in table.wrappers))
        name = next((spelling for spelling in spellings if spelling in names), None)
        if name is None or name in found:
            if not any(_match(pattern, spelling) for pattern in table.unused for spelling in spellings):
                surplus.append(key)
        else:
            found[name] = key
    missing = [key for key, _ in expected.values() if key not in found]
    shape_problems, dtype_problems = [], []
    for path, (name, leaf) in expected.items():
        if name in found:
            tensor = tensors[found[name]]
            shape = leaf.to_theirs(np.broadcast_to(np.int8(0), shapes[path])).shape
            if tensor.shape != shape:
                shape_problems.append(f"{found[name]} is {list(tensor.shape)}, expected {list(shape)}")
            if tensor.dtype not in FLOATS:
                dtype_problems.append(f"{found[name]} is {tensor.dtype}")
    problems = [
        f"{title} ({len(items)}): {', '.join(items[:8])}{', ...' if len(items) > 8 else ''}"
        for title, items in (
            ("missing keys", missing),
            ("surplus keys", surplus),
            ("wrong shapes", shape_problems),
            (f"dtypes other than {', '.join(FLOATS)}", dtype_problems),
        )
        if items
    ]
    if problems:
        raise ValueError(
            f"the weights of {origin} do not fit its config.json; "
            + "; ".join(problems)
            + ". Use the config.json and the weights of one model, saved in float32, float16 or bfloat16"
        )
    return {path: Source(found[name], leaf.to_ours, leaf.to_theirs) for path, (name, leaf) in expected.items()}


def to_checkpoint(table: KeyTable, params: PyTree) -> dict[str, np.ndarray]:
    """The parameters as the tensors of a Hugging Face checkpoint.

    Args:
      table: the family's layers.
      params: nested dicts of arrays.

    Returns:
      Arrays by key.
    """
    tensors = {}
    for path, leaf in tree.flatten(params).items():
        key, layout = _locate(table, path)
        tensors[key] = layout.to_theirs(np.asarray(leaf))
    return tensors


def keys_of(table: KeyTable, paths: Iterable[str]) -> dict[str, str]:
    """The key of each parameter, as the table spells it, by path."""
    return {path: _locate(table, path)[0] for path in paths}


def module_key(table: KeyTable, module: str) -> str:
    """The key that stands in checkpoints for a module, whatever the version of transformers calls it."""
    for name, key in table.renamed:
        match = _pattern(name).fullmatch(module)
        if match:
            return key.format(**match.groupdict())
    return module


def _locate(table: KeyTable, path: str) -> tuple[str, Leaf]:
    """The key of the parameter at a path, and how its layout changes."""
    for pattern, row, leaf in _leaves(table.rows):
        match = pattern.fullmatch(path)
        if match:
            names = {name: text.replace("/", ".") for name, text in match.groupdict().items()}
            return row.key.format(**names) + leaf.theirs, leaf
    raise ValueError(f"no row of the key table names the parameter {path!r}: the model's parameters have other paths")


@functools.cache
def _leaves(rows: tuple[Row, ...]) -> list[tuple[re.Pattern[str], Row, Leaf]]:
    return [(_pattern(row.path + leaf.ours), row, leaf) for row in rows for leaf in KINDS[row.kind]]


def _match(pattern: str, key: str) -> bool:
    return _pattern(pattern).fullmatch(key) is not None


@functools.cache
def _pattern(text: str) -> re.Pattern[str]:
    escaped = re.escape(text)
    for name, expression in _PLACEHOLDERS.items():
        escaped = escaped.replace(re.escape(f"{{{name}}}"), f"(?P<{name}>{expression})")
    return re.compile(escaped)
