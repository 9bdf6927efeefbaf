"""The keys of a family's parameters in a Hugging Face checkpoint, both ways, derived from its layer table."""

from __future__ import annotations

import collections
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from tvjax import tree
from tvjax.models.layer_table import KINDS, LayerTable, Leaf, Part, Row, locate, matches
from tvjax.stages import PyTree


class Tensor(NamedTuple):
    """What the header of a checkpoint says of one tensor: its dtype's safetensors name, and its shape."""

    dtype: str
    shape: tuple[int, ...]


class Source(NamedTuple):
    """Where a parameter is read.

    What turns the tensor into the parameter is a view of it, so either is read and written in pieces by it.

    Attributes:
      key: in the checkpoint.
      leaf: how the layout changes, there and back.
      part: which part of the tensor it is; None: all of it.
    """

    key: str
    leaf: Leaf
    part: Part | None = None

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """The parameter, in our layout, of the tensor of the key."""
        whole = self.leaf.to_ours(tensor)
        return whole if self.part is None else np.split(whole, self.part.of, self.part.axis)[self.part.number]

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the tensor of which a parameter of this shape is read.

        >>> Source("c_attn.weight", KINDS["conv1d"][0], Part(0, 3)).shape((2, 4))
        (2, 12)
        """
        whole = list(ours)
        if self.part is not None:
            whole[self.part.axis] *= self.part.of
        return self.leaf.to_theirs(np.broadcast_to(np.int8(0), whole)).shape


FLOATS = ("F32", "F16", "BF16")
_ADAPTED = ("linear", "kernel", "conv1d")  # kinds of layers that LoRA can adapt


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
    names = {source.key for source in expected.values()}
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
    missing = [source.key for source in expected.values() if source.key not in found]
    shape_problems, dtype_problems = [], []
    for path, source in expected.items():
        name = source.key
        if name in found:
            tensor, shape = tensors[found[name]], source.shape(shapes[path])
            if tensor.shape != shape:
                shape_problems.append(f"{found[name]} is {list(tensor.shape)}, expected {list(shape)}")
            if tensor.dtype not in FLOATS:
                dtype_problems.append(f"{found[name]} is {tensor.dtype}")
    problems = [
        f"{title} ({len(items)}): {', '.join(items[:8])}{', ...' if len(items) > 8 else ''}"
        for title, items in (
            ("missing keys", list(dict.fromkeys(missing))),  # parts of one tensor say the same
            ("surplus keys", surplus),
            ("wrong shapes", list(dict.fromkeys(shape_problems))),
            (f"dtypes other than {', '.join(FLOATS)}", list(dict.fromkeys(dtype_problems))),
        )
        if items
    ]
    if problems:
        raise ValueError(
            f"the weights of {origin} do not fit its config.json; "
            + "; ".join(problems)
            + ". Use the config.json and the weights of one model, saved in float32, float16 or bfloat16"
        )
    return {path: source._replace(key=found[source.key]) for path, source in expected.items()}


def _spelled(table: LayerTable, key: str) -> str:
    """A key of a checkpoint as the table spells its end."""
    for theirs, ours in table.spellings:
        if key.endswith(theirs):
            return key.removesuffix(theirs) + ours
    return key


def sources_of(
    table: LayerTable, paths: Iterable[str], keys: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Source]:
    """Where each parameter of a whole model is written.

    Args:
      table: the family's layers.
      paths: of the parameters.
      keys: of parameters by path, where they are to be others than those of the table.

    Raises:
      ValueError: for parameters of another model, or a part of a tensor without the rest.
    """
    sources, parts = {}, collections.Counter[str]()
    for path in paths:
        source = _locate(table, path)
        sources[path] = source._replace(key=keys.get(path, source.key))
        parts[sources[path].key] += 1
    incomplete = {source.key for source in sources.values() if source.part and parts[source.key] < source.part.of}
    if incomplete:
        raise ValueError(f"parts of these tensors are missing: {', '.join(sorted(incomplete))}: give all parameters")
    return sources


def to_checkpoint(
    table: LayerTable, params: PyTree, keys: Mapping[str, str] = MappingProxyType({})
) -> dict[str, np.ndarray]:
    """The parameters as the tensors of a Hugging Face checkpoint, all in memory.

    Args:
      table: the family's layers.
      params: nested dicts of arrays.
      keys: of parameters by path, where they are to be others than those of the table.

    Returns:
      Arrays by key.

    Raises:
      ValueError: for parameters of another model, or a part of a tensor without the rest.
    """
    leaves, tensors = tree.flatten(params), dict[str, np.ndarray]()
    for path, source in sources_of(table, leaves, keys).items():
        leaf = np.asarray(leaves[path])
        tensor = tensors.setdefault(source.key, np.empty(source.shape(leaf.shape), leaf.dtype))
        source.to_ours(tensor)[...] = leaf
    return tensors


def kernels_by_module(table: LayerTable, paths: Iterable[str]) -> dict[str, str]:
    """The path of the kernel of each linear layer, by the name of its module in a checkpoint: what LoRA can adapt.

    Kernels that a checkpoint has in one are not among them: see `fused_kernels`.

    >>> from tvjax.models.clip.table import TABLE
    >>> kernels_by_module(TABLE, ["text/blocks/0/mlp/up/kernel", "text/blocks/0/mlp/up/bias", "text/final_norm/scale"])
    {'text_model.encoder.layers.0.mlp.fc1': 'text/blocks/0/mlp/up/kernel'}
    """
    found = {}
    for path in paths:
        row, leaf, names = locate(table, path)
        if row.kind in _ADAPTED and leaf.ours == "/kernel" and row.part is None:
            found[key_of(row, names)] = path
        elif row.path == "{path}" and path.endswith("/weight"):  # of a model without modelling code
            found[key_of(row, names).removesuffix(".weight")] = path
    return found


def fused_kernels(table: LayerTable, paths: Iterable[str]) -> dict[str, dict[str, Part]]:
    """The kernels that a checkpoint has in one, by the name of its module there: their paths, and which part each is.

    >>> from tvjax.models.gpt2.table import TABLE
    >>> fused_kernels(TABLE, [f"blocks/0/attention/{name}/kernel" for name in ("query", "key", "value", "out")])
    {'transformer.h.0.attn.c_attn': {'blocks/0/attention/query/kernel': Part(number=0, of=3, axis=-1),
     'blocks/0/attention/key/kernel': Part(number=1, of=3, axis=-1),
     'blocks/0/attention/value/kernel': Part(number=2, of=3, axis=-1)}}
    """
    found: dict[str, dict[str, Part]] = {}
    for path in paths:
        row, leaf, names = locate(table, path)
        if row.part is not None and row.kind in _ADAPTED and leaf.ours == "/kernel":
            found.setdefault(key_of(row, names), {})[path] = row.part
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


def module_name(table: LayerTable, key: str, model_class: str = "") -> str:
    """What recent transformers calls the module of a checkpoint's key; the inverse of `module_key`.

    Args:
      table: of the family.
      key: of the module in a checkpoint.
      model_class: of transformers; a tower alone leaves its name out.

    >>> from tvjax.models.vit.table import TABLE
    >>> module_name(TABLE, "vit.encoder.layer.3.output.dense"), module_name(TABLE, "classifier")
    ('vit.layers.3.mlp.fc2', 'classifier')
    >>> module_name(TABLE, "vit.encoder.layer.3.output.dense", "ViTModel")
    'layers.3.mlp.fc2'
    """
    for name, pattern in table.renamed:
        found = matches(pattern, key)
        if found is not None:
            key = name.format(**found)
            break
    return key.removeprefix(table.wrapper_of.get(model_class, ""))


def _locate(table: LayerTable, path: str) -> Source:
    """Where the parameter at a path is read, by the key that the table gives."""
    row, leaf, names = locate(table, path)
    return Source(key_of(row, names) + leaf.theirs, leaf, row.part)


def key_of(row: Row, names: Mapping[str, str]) -> str:
    """The key of a layer; a path's slashes are a key's dots."""
    return row.key.format(**{name: text.replace("/", ".") for name, text in names.items()})
