"""The keys of a family's parameters in a Hugging Face checkpoint, both ways, derived from its layer table."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from tvjax import tree
from tvjax.models.layer_table import KINDS, LayerTable, Layout, Leaf, Row, locate, matches
from tvjax.stages import PyTree


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


def find_sources(
    table: LayerTable, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], origin: str
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
    unused = [*table.unused, *copies_of_tied(table, shapes)]
    for key in tensors:
        spelled = _spelled(table, key)
        spellings = (spelled, *(wrapper + spelled for wrapper in table.wrappers))
        name = next((spelling for spelling in spellings if spelling in names), None)
        if name is None or name in found:
            if not any(matches(pattern, spelling) is not None for pattern in unused for spelling in spellings):
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


def _spelled(table: LayerTable, key: str) -> str:
    """A key of a checkpoint as the table spells its end."""
    for theirs, ours in table.spellings:
        if key.endswith(theirs):
            return key.removesuffix(theirs) + ours
    return key


def to_checkpoint(table: LayerTable, params: PyTree) -> dict[str, np.ndarray]:
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


def kernels_by_module(table: LayerTable, paths: Iterable[str]) -> dict[str, str]:
    """The path of the kernel of each linear layer, by the name of its module in a checkpoint: what LoRA can adapt.

    >>> from tvjax.models.clip.table import TABLE
    >>> kernels_by_module(TABLE, ["text/blocks/0/mlp/up/kernel", "text/blocks/0/mlp/up/bias", "text/final_norm/scale"])
    {'text_model.encoder.layers.0.mlp.fc1': 'text/blocks/0/mlp/up/kernel'}
    """
    found = {}
    for path in paths:
        row, leaf, names = locate(table, path)
        if row.kind in ("linear", "kernel", "conv1d") and leaf.ours == "/kernel":
            found[key_of(row, names)] = path
        elif row.path == "{path}" and path.endswith("/weight"):  # of a model without modelling code
            found[key_of(row, names).removesuffix(".weight")] = path
    return found


def copies_of_tied(table: LayerTable, paths: Iterable[str]) -> dict[str, str]:
    """Keys of layers for which the model uses another's leaf, and the path of that leaf: checkpoints may have both."""
    known = set(paths)
    tied = [(row, leaf) for row in table.rows if row.tied in known for leaf in KINDS[row.kind]]
    return {row.key + leaf.theirs: row.tied for row, leaf in tied if row.path + leaf.ours not in known}


def check_copies(
    table: LayerTable,
    sources: Mapping[str, Source],
    keys: Collection[str],
    read: Callable[[str], np.ndarray],
    origin: str,
) -> None:
    """Raises where a checkpoint has a tied leaf twice, with other values: which of them is meant cannot be told.

    Args:
      table: the family's layers.
      sources: as `find_sources` returns them.
      keys: of the checkpoint.
      read: the tensor of a key; called for copies only.
      origin: name of the checkpoint, for the error.
    """
    for key, path in copies_of_tied(table, sources).items():
        owner = sources[path].key
        if key in keys and not np.array_equal(read(key), read(owner)):
            raise ValueError(
                f"{origin} has {key} and {owner} with other values, and its config.json says that they are one: write "
                '"tie_word_embeddings": false into it, or leave the first out of the weights'
            )


def module_key(table: LayerTable, module: str) -> str:
    """The key that stands in checkpoints for a module, whatever the version of transformers calls it."""
    for name, key in table.renamed:
        found = matches(name, module)
        if found is not None:
            return key.format(**found)
    return module


def _locate(table: LayerTable, path: str) -> tuple[str, Leaf]:
    """The key of the parameter at a path, and how its layout changes."""
    row, leaf, names = locate(table, path)
    return key_of(row, names) + leaf.theirs, leaf


def key_of(row: Row, names: Mapping[str, str]) -> str:
    """The key of a layer; a path's slashes are a key's dots."""
    return row.key.format(**{name: text.replace("/", ".") for name, text in names.items()})
