"""One readable table a family: where each layer lies here and in a checkpoint, and over what its axes run.

Everything that is to be known of a family's layers is derived from its table, so that it is said once: the keys of a
Hugging Face checkpoint, both ways (`tvjax.models.key_table`); which units may be permuted (`tvjax.models.symmetry`);
which outputs are never rotated (`fix_outputs`); the heads that an axis runs over (`spaces_of`); and the layers that a
LoRA adapter names (`tvjax.models.key_table.kernels_by_module`).

A row names a layer on both sides, and its kind; `KINDS` says what the arrays of a layer of that kind are called, how
they are laid out on either side, and which of the row's spaces their axes run over.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from tvjax import tree
from tvjax.stages import Stage

Layout = Callable[[np.ndarray], np.ndarray]


class Leaf(NamedTuple):
    """One array of a layer.

    Attributes:
      ours: suffix of its path.
      theirs: suffix of its key.
      to_ours: their layout to ours.
      to_theirs: our layout to theirs.
      axes: for each of its axes which of the row's spaces it runs over, None for one of its own; without it the row
        gives a space for each axis.
    """

    ours: str
    theirs: str
    to_ours: Layout
    to_theirs: Layout
    axes: tuple[int | None, ...] | None = None


def _same(x: np.ndarray) -> np.ndarray:
    return x


_SCALE = Leaf("/scale", ".weight", _same, _same, (0,))
_KERNEL = Leaf("/kernel", ".weight", np.transpose, np.transpose, (0, 1))
_CONV = Leaf(  # height, width, in, out here; out, in, height, width there
    "/kernel", ".weight", lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1), (None, None, 0, 1)
)
_BIAS = Leaf("/bias", ".bias", _same, _same, (1,))
KINDS: dict[str, tuple[Leaf, ...]] = {
    "array": (Leaf("", "", _same, _same),),
    "batched array": (Leaf("", "", lambda x: x[0], lambda x: x[None]),),
    "batched token": (Leaf("", "", lambda x: x[0, 0], lambda x: x[None, None]),),
    "embedding": (Leaf("", ".weight", _same, _same),),
    "scale": (_SCALE,),
    "norm": (_SCALE, _BIAS._replace(axes=(0,))),
    "kernel": (_KERNEL,),
    "linear": (_KERNEL, _BIAS),
    "conv1d": (_KERNEL._replace(to_ours=_same, to_theirs=_same), _BIAS),  # GPT-2's: [in, out] on both sides
    "conv kernel": (_CONV,),
    "conv": (_CONV, _BIAS),
}


class Heads(NamedTuple):
    """The units of the heads of an attention layer: those of the first head, then those of the second.

    Attributes:
      group: name of the heads; those of one name are exchanged together (``{tower}/blocks/{i}/heads``).
      units: name of the units inside a head; in axes of one name they correspond (``query_key``).
      number: field of the config that says how many heads there are.
      rotary: positions rotate the units by pairs, each at a frequency of its own.
    """

    group: str
    units: str
    number: str
    rotary: bool = False


class Row(NamedTuple):
    """One layer: ``{i}`` stands for a number, ``{tower}`` for ``vision`` or ``text``, in path, key and spaces.

    ``{path}`` stands for anything; its parts are joined by slashes here, and by dots in a checkpoint.

    Attributes:
      path: where it lies in our parameters.
      key: its name in a checkpoint.
      kind: a key of `KINDS`.
      spaces: of a layer its inputs and outputs, of an elementwise one its features, of an array each axis: the name of
        the stream or hidden layer that the axis runs over, its `Heads`, or None where its units have a meaning of
        their own (pixels, tokens, positions, classes).
      fixed: its outputs have a meaning in every model of the family (classes, a vocabulary): they are never rotated.
      tied: path of the leaf that a model without this layer uses in its place.
    """

    path: str
    key: str
    kind: str
    spaces: tuple[str | Heads | None, ...] = ()
    fixed: bool = False
    tied: str = ""


class LayerTable(NamedTuple):
    """The layers of a family.

    Attributes:
      rows: every layer that a model of the family can have.
      outputs: streams that a model returns as they are where its config has None in the field that is given here.
      unused: keys (with ``{i}`` or ``{tower}``) that checkpoints may have and the model does not read.
      wrappers: beginnings of keys that some checkpoints leave out.
      wrapper_of: by class of transformers, the beginning that its modules' names leave out.
      renamed: names of modules in recent transformers (with ``{i}``), which its checkpoints do not have, and the keys
        that stand for them there.
      spellings: ends of keys that some checkpoints have, and those that the table has in their place.
    """

    rows: tuple[Row, ...]
    outputs: Mapping[str, str] = MappingProxyType({})
    unused: tuple[str, ...] = ()
    wrappers: tuple[str, ...] = ()
    wrapper_of: Mapping[str, str] = MappingProxyType({})
    renamed: tuple[tuple[str, str], ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()


class Space(NamedTuple):
    """What one axis of one leaf runs over.

    Attributes:
      name: of the stream, the hidden layer, or ``<group>:<units>`` of heads.
      heads: how many heads its units are split into; 0 for none.
      rotary: whether positions rotate the units inside a head.
    """

    name: str
    heads: int = 0
    rotary: bool = False


_PLACEHOLDERS = {"i": r"\d+", "tower": "vision|text", "path": ".+"}


def locate(table: LayerTable, path: str) -> tuple[Row, Leaf, dict[str, str]]:
    """The layer of the parameter at a path, which of its arrays it is, and what the placeholders stand for.

    Raises:
      ValueError: no row names it.
    """
    for match_row, row, leaf in _leaves(table.rows):
        match = match_row.fullmatch(path)
        if match:
            return row, leaf, match.groupdict()
    raise ValueError(f"no row of the layer table names the parameter {path!r}: the model's parameters have other paths")


def leaf_spaces(row: Row, leaf: Leaf) -> tuple[str | Heads | None, ...]:
    """What the axes of an array of a layer run over, as the row spells it."""
    if leaf.axes is None:
        return row.spaces
    return tuple(None if axis is None else row.spaces[axis] for axis in leaf.axes)


def spaces_of(table: LayerTable, config: Any, path: str) -> tuple[Space | None, ...]:
    """What each axis of a leaf runs over in a model, None where the units have a meaning of their own.

    >>> from tvjax.models.vit.config import ViTConfig
    >>> from tvjax.models.vit.table import TABLE
    >>> spaces_of(TABLE, ViTConfig(num_attention_heads=6), "vision/blocks/3/attention/out/kernel")[0]
    Space(name='vision/blocks/3/heads:value_out', heads=6, rotary=False)
    """
    row, leaf, names = locate(table, path)
    return tuple(None if space is None else _space(space, config, names) for space in leaf_spaces(row, leaf))


def _space(space: str | Heads, config: Any, names: Mapping[str, str]) -> Space:
    if isinstance(space, str):
        return Space(space.format(**names))
    group = space.group.format(**names)
    name = f"{group}:{space.units.format(**names)}"
    return Space(name, getattr(config_of(config, group), space.number), space.rotary)


def config_of(config: Any, path: str) -> Any:
    """The part of a config that a path is about: a tower's, or the whole where it has no towers."""
    return getattr(config, path.split("/")[0], config)


def in_towers(table: LayerTable, config: Any) -> LayerTable:
    """The table of one model: each row of several towers once for each tower that the model has.

    >>> from tvjax.models.clip import CLIPConfig, CLIPVisionConfig
    >>> from tvjax.models.clip.table import TABLE
    >>> one_tower = in_towers(TABLE, CLIPConfig(CLIPVisionConfig(), None))
    >>> len(TABLE.rows), one_tower.rows[-1].path, dict(one_tower.outputs)
    (19, 'vision/blocks/{i}/mlp/down', {'vision/residual': 'projection_dim'})
    """
    towers = [tower for tower in _PLACEHOLDERS["tower"].split("|") if config_of(config, tower) is not None]

    def place(value: Any, tower: str) -> Any:
        if isinstance(value, str):
            return value.replace("{tower}", tower)
        if isinstance(value, Heads):
            return value._replace(group=place(value.group, tower), units=place(value.units, tower))
        return tuple(place(each, tower) for each in value) if type(value) is tuple else value

    rows = [
        row._replace(path=place(row.path, tower), key=place(row.key, tower), spaces=place(row.spaces, tower))
        for row in table.rows
        for tower in (towers if "{tower}" in row.path else towers[:1])
        if config_of(config, row.path) is not None
    ]
    outputs = {place(name, tower): field for name, field in table.outputs.items() for tower in towers}
    return table._replace(rows=tuple(rows), outputs=outputs)


def fix_outputs(table: LayerTable, stages: Iterable[Stage]) -> tuple[Stage, ...]:
    """The stages of a model, each with its `fixed`: the layers whose outputs the table calls fixed.

    A tied leaf is fixed in the stage that uses it in the layer's place, not in the one that owns it.
    """
    fixed = [(row.path + leaf.ours, row.tied) for row, leaf in leaves(table) if row.fixed]
    owned: set[str] = set()
    found = []
    for stage in stages:
        parameters = stage.function.parameters  # type: ignore[attr-defined]  # a family's stages are StageFunctions
        local_of = {
            f"{prefix}/{path}".strip("/"): f"{local}/{path}".strip("/")
            for local, prefix in stage.paths
            for path in tree.flatten(tree.get(parameters, local))
        }
        names = [
            local
            for pattern, tied in fixed
            for path, local in local_of.items()
            if matches(pattern, path) is not None or (path == tied and path in owned)
        ]
        found.append(dataclasses.replace(stage, fixed=tuple(dict.fromkeys(names))))
        owned |= local_of.keys()
    return tuple(found)


def matches(pattern: str, text: str) -> dict[str, str] | None:
    """What the placeholders of a pattern stand for in a text; None where it does not match."""
    match = _pattern(pattern).fullmatch(text)
    return None if match is None else match.groupdict()


def leaves(table: LayerTable) -> Iterator[tuple[Row, Leaf]]:
    """Every array of every layer."""
    for _, row, leaf in _leaves(table.rows):
        yield row, leaf


@functools.cache
def _leaves(rows: tuple[Row, ...]) -> list[tuple[re.Pattern[str], Row, Leaf]]:
    return [(_pattern(row.path + leaf.ours), row, leaf) for row in rows for leaf in KINDS[row.kind]]


@functools.cache
def _pattern(text: str) -> re.Pattern[str]:
    escaped = re.escape(text)
    for name, expression in _PLACEHOLDERS.items():
        escaped = escaped.replace(re.escape(f"{{{name}}}"), f"(?P<{name}>{expression})")
    return re.compile(escaped)
