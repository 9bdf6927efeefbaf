"""Parameter trees of other codes: one readable table a code, from which both directions follow.

A row names a leaf here and there, and says in a word how its array differs; which axes run over heads is known from the
family's own layer table (`tvjax.models.layer_table`). Every conversion is linear: a task vector or a gradient converts
as the parameters do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from tvjax import tree
from tvjax.factors import is_low_rank
from tvjax.layers import stack, unstack
from tvjax.models.families import family_of_config, shapes_of
from tvjax.models.key_table import key_of
from tvjax.models.layer_table import locate, matches, spaces_of

PyTree = Any
_VALUE = "/value"  # where NNX has the array of a variable


class TreeRow(NamedTuple):
    """One leaf; ``{i}`` stands for the number of a layer.

    Attributes:
      ours: its path here.
      theirs: its path there, the layers taken apart.
      kind: ``same``: the same array; ``heads``: an axis over the units of heads is two, heads and units; ``rotary``:
        also, the pairs of units that positions rotate may lie side by side; ``query``: also, it may hold the scale of
        the attention.
      only: values of ``model_type`` whose models have it there; () for all.
    """

    ours: str
    theirs: str
    kind: Literal["same", "heads", "rotary", "query"] = "same"
    only: tuple[str, ...] = ()


class TreeTable(NamedTuple):
    """How a code lays out the parameters of its models.

    Attributes:
      code: its name.
      rows: every leaf that it has a place for.
      model_types: values of ``model_type`` that it has models of.
      stack: path of the layers, whose leaves are stacked where it scans over them.
      unrolled: beginning of the paths of one layer where it does not.
    """

    code: str
    rows: tuple[TreeRow, ...]
    model_types: tuple[str, ...]
    stack: str
    unrolled: str


class Variant(NamedTuple):
    """What differs between two trees of one code.

    Attributes:
      scan_axis: the layer axis of the stacked leaves; None: a leaf for each layer.
      interleaved: whether the units that positions rotate in pairs lie side by side, (2 j, 2 j + 1), instead of in two
        halves of the head, (j, j + size / 2).
      folded: whether the queries hold the scale of the attention, 1 / sqrt(size of a head).
    """

    scan_axis: int | None = None
    interleaved: bool = False
    folded: bool = False


class Place(NamedTuple):
    """Where one of our leaves lies in the tree of another code, and how its array differs there.

    Attributes:
      path: there, the layers taken apart.
      ours: its shape here.
      theirs: its shape there.
      interleaved: whether the units of a head change their order.
      scale: what it is multiplied by on its way there.
    """

    path: str
    ours: tuple[int, ...]
    theirs: tuple[int, ...]
    interleaved: bool
    scale: float

    def to_theirs(self, leaf: Any) -> Any:
        """Our array as theirs."""
        leaf = _reshape(leaf, self.theirs)
        if self.interleaved:  # unit j of the first half, then its partner of the second
            halves = (*self.theirs[:-1], 2, self.theirs[-1] // 2)
            leaf = _reshape(_reshape(leaf, halves).swapaxes(-1, -2), self.theirs)
        return _scaled(leaf, self.scale)

    def to_ours(self, leaf: Any) -> Any:
        """Their array as ours."""
        leaf = _scaled(leaf, 1 / self.scale)
        if self.interleaved:
            pairs = (*self.theirs[:-1], self.theirs[-1] // 2, 2)
            leaf = _reshape(_reshape(leaf, pairs).swapaxes(-1, -2), self.theirs)
        return _reshape(leaf, self.ours)


def to_tree(
    table: TreeTable, params: PyTree, config: Any, variant: Variant, *, partial: bool = False, like: PyTree = None
) -> PyTree:
    """Our parameters, or a task vector of them, as the tree of another code.

    Args:
      table: of the code.
      params: of the config's model; None leaves are passed over.
      config: of the model.
      variant: which of the code's trees.
      partial: whether leaves may be missing, as from a task vector that covers a part of a model.
      like: a tree of the code: the result has its structure, and lies where its arrays lie.

    Returns:
      Nested dicts, or the structure of `like`.

    Raises:
      ValueError: naming every leaf that is missing, surplus, of another shape, or has no place.
    """
    places = _places(table, config, variant)
    flat = tree.flatten(params)
    _check(flat, {path: place.ours for path, place in places.items()}, partial, f"the model of this {_name(config)}")
    made: PyTree = {places[path].path: places[path].to_theirs(leaf) for path, leaf in flat.items()}
    if variant.scan_axis is None:
        made = tree.nest({_rename(path, table.stack + "/{i}", table.unrolled): leaf for path, leaf in made.items()})
    else:
        stacked = _check_layers(table, made, config)
        made = stack(tree.nest(made), table.stack, variant.scan_axis) if stacked else tree.nest(made)
    return made if like is None else _placed_like(table, made, like, partial)


def from_tree(table: TreeTable, params: PyTree, config: Any, variant: Variant, *, partial: bool = False) -> PyTree:
    """The tree of another code as our parameters; the inverse of `to_tree`.

    Args:
      table: of the code.
      params: a tree of it, or what wraps one: dicts, an ``nnx.State``, a Flax collection (``params/params``).
      config: of the model.
      variant: which of the code's trees; whether its layers are stacked is told by their names.
      partial: whether leaves may be missing.

    Returns:
      Nested dicts, as the models of `tvjax.models` take them.

    Raises:
      ValueError: naming every leaf that is missing, surplus, of another shape, or has no place.
    """
    places = _places(table, config, variant)
    found = tree.flatten(params)
    flat = dict(zip(_bare(table, found), found.values(), strict=True))
    if any(matches(table.unrolled + "/{path}", path) for path in flat):
        flat = {_rename(path, table.unrolled, table.stack + "/{i}"): leaf for path, leaf in flat.items()}
    elif variant.scan_axis is not None and any(path.startswith(table.stack + "/") for path in flat):
        flat = tree.flatten(unstack(tree.nest(flat), table.stack, variant.scan_axis))
    shapes = {place.path: place.theirs for place in places.values()}
    _check(flat, shapes, partial, f"{table.code}'s tree (layers taken apart) of this {_name(config)}")
    ours = {place.path: path for path, place in places.items()}
    return tree.nest({ours[path]: places[ours[path]].to_ours(leaf) for path, leaf in flat.items()})


def names(table: TreeTable, config: Any, variant: Variant) -> dict[str, str]:
    """The path in the tree of another code for each key of a Hugging Face checkpoint."""
    family = family_of_config(config).table
    found = {}
    for path, place in _places(table, config, variant).items():
        row, leaf, found_names = locate(family, path)
        renamed = table.unrolled if variant.scan_axis is None else table.stack
        found[key_of(row, found_names) + leaf.theirs] = _rename(place.path, table.stack + "/{i}", renamed)
    return found


def check_known(table: TreeTable, config: Any) -> str:
    """The model type of a config, which the table must know.

    Raises:
      ValueError: it does not.
    """
    model_type = getattr(config, "model_type", None)
    if model_type is None or model_type not in table.model_types:
        raise ValueError(
            f"{table.code}'s trees are known for the model types {', '.join(table.model_types)}, found "
            f"{model_type or _name(config)!r}"
        )
    return str(model_type)


def _places(table: TreeTable, config: Any, variant: Variant) -> dict[str, Place]:
    """The place of each leaf of a config's model, by its path."""
    model_type = check_known(table, config)
    rows = [row for row in table.rows if not row.only or model_type in row.only]
    found, homeless = {}, []
    for path, shape in shapes_of(config).items():
        named = next(((row, number) for row in rows if (number := matches(row.ours, path)) is not None), None)
        if named is None:
            homeless.append(path)
            continue
        row, number = named
        spaces = spaces_of(family_of_config(config).table, config, path) if row.kind != "same" else ()
        heads = [space.heads if space else 0 for space in spaces] or [0] * len(shape)
        sizes = [(n, units // n) if n else (units,) for units, n in zip(shape, heads, strict=True)]
        interleaved = variant.interleaved and row.kind in ("rotary", "query")
        scale = 1 / math.sqrt(config.head_dim) if variant.folded and row.kind == "query" else 1.0
        found[path] = Place(row.theirs.format(**number), shape, sum(sizes, ()), interleaved, scale)
    if homeless:
        raise ValueError(
            f"{len(homeless)} parameters of this {_name(config)} have no place in {table.code}'s {model_type}:\n"
            f"{tree.list_some(homeless)}\n{table.code} has no such model"
        )
    return found


def _reshape(leaf: Any, shape: tuple[int, ...]) -> Any:
    """The array in another shape; over explicit axes of a mesh, spread like the first of the axes that are regrouped.

    Where that cannot be divided so (fewer heads than devices), the axis is whole everywhere.
    """
    sharding = getattr(jax.typeof(leaf), "sharding", None)
    if sharding is None or not sharding.mesh.explicit_axes:
        return leaf.reshape(shape)
    before = list(zip(leaf.shape, (*sharding.spec, *[None] * leaf.ndim), strict=False))
    spread: list[Any] = []
    start = 0
    while len(spread) < len(shape):  # the next axes here and there that hold the same units
        stop, end = start + 1, len(spread) + 1
        while (here := math.prod(leaf.shape[start:stop])) != (there := math.prod(shape[len(spread) : end])):
            stop, end = (stop + 1, end) if here < there else (stop, end + 1)
        (_, names), *inner = before[start:stop]
        ways = math.prod(sharding.mesh.shape[name] for name in ((names,) if isinstance(names, str) else names or ()))
        divides = shape[len(spread)] % ways == 0 and not any(entry for _, entry in inner)
        spread += [names if divides else None, *[None] * (end - len(spread) - 1)]
        start = stop
    spec = jax.sharding.PartitionSpec(*spread)
    return jax.lax.reshape(leaf, shape, out_sharding=jax.sharding.NamedSharding(sharding.mesh, spec))


def _scaled(leaf: Any, scale: float) -> Any:
    if scale == 1:
        return leaf
    wide = tree.wide_dtype(leaf.dtype)
    return (leaf.astype(wide) * np.asarray(scale, wide)).astype(leaf.dtype)


def _check(flat: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], partial: bool, whose: str) -> None:
    """Raises unless the leaves are those that are expected."""
    problems = [f"{path}: surplus" for path in flat if path not in shapes]
    problems += [f"{path}: missing" for path in shapes if path not in flat and not partial]
    problems += [
        f"{path}: {tuple(leaf.shape)}, expected {shapes[path]}"
        for path, leaf in flat.items()
        if path in shapes and tuple(leaf.shape) != shapes[path]
    ]
    if problems:
        raise ValueError(
            f"{len(problems)} leaves are not those of {whose}:\n{tree.list_some(problems)}\ngive the config.json of "
            "this very model (heads, tied embeddings, vocabulary; tvjax convert --like); from Python partial=True "
            "takes a task vector of a part of it"
        )
    factored = [path for path, leaf in flat.items() if is_low_rank(leaf)]
    if factored:
        raise ValueError(
            f"{len(factored)} leaves are products of two factors:\n{tree.list_some(factored)}\nmake arrays of them "
            "first (tvjax.factors.dense)"
        )


def _check_layers(table: TreeTable, paths: Iterable[str], config: Any) -> bool:
    """Whether there are layers to stack; raises where some of them lack a leaf that others have."""
    layers: dict[str, list[int]] = {}
    for path in paths:
        found = matches(table.stack + "/{i}/{path}", path)
        if found is not None:
            layers.setdefault(found["path"], []).append(int(found["i"]))
    short = [f"{path}: {own}" for path, own in layers.items() if len(own) != config.num_hidden_layers]
    if short:
        raise ValueError(
            f"{len(short)} leaves of {table.stack} are there for some of {config.num_hidden_layers} layers, and a "
            f"stack has no place for them:\n{tree.list_some(short)}\ngive zeros for the others"
        )
    return bool(layers)


def _rename(path: str, layer: str, renamed: str) -> str:
    """A path with another name of its layer."""
    found = matches(layer + "/{path}", path)
    return path if found is None else f"{renamed.format(**found)}/{found['path']}"


def _bare(table: TreeTable, paths: Iterable[str]) -> list[str]:
    """Paths in the code's own tree, without what NNX and a training state put around it."""
    paths = list(paths)
    if all(path.endswith(_VALUE) for path in paths):
        paths = [path.removesuffix(_VALUE) for path in paths]
    tops = {row.theirs.partition("/")[0] for row in table.rows}
    while paths and paths[0].partition("/")[0] not in tops:
        first = paths[0].partition("/")[0] + "/"
        if not all(path.startswith(first) for path in paths):
            break
        paths = [path.removeprefix(first) for path in paths]
    return paths


def _placed_like(table: TreeTable, made: PyTree, like: PyTree, partial: bool) -> PyTree:
    """The leaves of a tree in the structure of another, each where its counterpart lies."""
    flat, wanted = tree.flatten(made), tree.flatten(like)
    bare = dict(zip(wanted, _bare(table, wanted), strict=True))
    shapes = {path: tuple(wanted[wrapped].shape) for wrapped, path in bare.items()}
    _check(flat, shapes, partial, f"the {table.code} tree that the result is to be like")

    def placed(wrapped: str, leaf: Any) -> Any:
        found, sharding = flat.get(bare[wrapped]), getattr(leaf, "sharding", None)
        return found if found is None or sharding is None else jax.device_put(found, sharding)

    return tree.map_with_path(placed, like)


def _name(config: Any) -> str:
    return type(config).__name__
