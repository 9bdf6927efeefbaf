"""Where the leaves of a model are to lie: ordered rules from paths to partitions, and tables for the families.

Models carry no sharding (big_vision's way): a rule is a pattern that a path matches as a whole, and a
``PartitionSpec``, or a function that chooses one; the first that matches places the leaf. What takes a ``sharding``
(`tvjax.load`, `tvjax.checkpoints.load_orbax`) takes rules, one sharding for all leaves, or a function of path and leaf.

The ready tables leave tables of relative positions (T5, MPNet), which are tiny, whole on every device.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from tvjax import tree
from tvjax.kinds import kind_of
from tvjax.models.families import family_of_config
from tvjax.models.layer_table import Heads, config_of, leaf_spaces, locate
from tvjax.placement import axes_of, name_of


class PlacedLeaf(NamedTuple):
    """What a rule is asked about.

    Attributes:
      path: of the leaf.
      shape: of it.
      sizes: of the mesh's axes, by name.
      config: of the model; None where there is none.
    """

    path: str
    shape: tuple[int, ...]
    sizes: Mapping[str, int]
    config: Any = None


Choose = Callable[[PlacedLeaf], PartitionSpec]
Rule = tuple[str, PartitionSpec | Choose]


@dataclasses.dataclass(frozen=True)
class Rules:
    """Ordered rules on a mesh; made by `rules`, `fsdp` and `tensor_parallel`."""

    mesh: Mesh
    table: tuple[Rule, ...]


Placement = Rules | Sharding | Callable[[str, jax.ShapeDtypeStruct], Sharding]
"""What says where leaves are to lie."""


def rules(mesh: Mesh, table: Sequence[Rule]) -> Rules:
    """Ordered rules: the first whose pattern matches the whole path of a leaf places it.

    Args:
      mesh: of automatic or explicit axes.
      table: pairs of a regular expression and a ``PartitionSpec``, or a function such as `largest` that chooses one.

    Raises:
      ValueError: what is no pair of a pattern and a partition, or a partition that names an axis which the mesh lacks.

    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> placed = rules(mesh, [(".*kernel", PartitionSpec(None, "data")), (".*", PartitionSpec())])
    >>> leaves = {"up/kernel": jax.ShapeDtypeStruct((2, 3), "float32"), "scale": jax.ShapeDtypeStruct((), "float32")}
    >>> [tuple(found.spec) for found in leaf_shardings(placed, leaves).values()]
    [(None, 'data'), ()]
    """
    _check_mesh(mesh)
    for rule in table:
        if not isinstance(rule, tuple | list) or len(rule) != 2 or not isinstance(rule[0], str):
            raise ValueError(f"found the rule {rule!r}, expected a pair (pattern, PartitionSpec)")
        pattern, spec = rule
        if not isinstance(spec, PartitionSpec) and not callable(spec):
            raise ValueError(
                f"the rule {pattern!r} gives {spec!r}, expected a PartitionSpec or a function like largest()"
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"the rule {pattern!r} is no regular expression: {error}") from error
        for axis in axes_of(spec) if isinstance(spec, PartitionSpec) else ():
            _check_axis(mesh, axis, f"the rule {pattern!r}")
    return Rules(mesh, tuple((pattern, spec) for pattern, spec in table))


def largest(axis: str = "fsdp") -> Choose:
    """Chooses for each leaf its largest dimension that the axis divides, the last of equal ones; without one, none.

    Tables of relative positions (T5, MPNet) stay whole, on every device.

    >>> tuple(largest("fsdp")(PlacedLeaf("kernel", (6, 8, 3), {"fsdp": 4})))
    (None, 'fsdp', None)
    """
    return partial(_largest, axis)


def fsdp(mesh: Mesh, axis: str = "fsdp") -> Rules:
    """Every leaf over one axis of the mesh, by its largest dimension that the axis divides (see `largest`).

    Tables of relative positions (T5, MPNet) stay whole, on every device.

    >>> fsdp(jax.make_mesh((1,), ("fsdp",))).table[0][0]
    '.*'
    """
    _check_axis(mesh, axis, "fsdp")
    return Rules(mesh, ((".*", largest(axis)),))


def tensor_parallel(mesh: Mesh, axis: str = "tensor", fsdp: str | None = None) -> Rules:
    """Attention by heads and hidden layers by units, as the family's layer table has them (Megatron).

    A kernel into the heads or into the hidden layer of a block is cut by its outputs, the kernel out of it by its
    inputs, so that each block sums once over the axis after attention and once after the hidden layer. Heads that are
    fewer than the axis has devices stay whole (the keys and values of grouped attention); so do the residual stream,
    norms, positions and vocabularies, save for the second axis. Tables of relative positions (T5, MPNet) stay whole
    over both.

    Args:
      mesh: with the axes.
      axis: that heads and hidden units lie over.
      fsdp: a second axis, over which the largest dimension that is left lies; None: none.

    Returns:
      Rules for models of our families.

    Raises:
      ValueError: a mesh without the axes.

    >>> from tvjax.models.vit import ViTConfig
    >>> placed = tensor_parallel(jax.make_mesh((1, 1), ("fsdp", "tensor")), fsdp="fsdp")
    >>> leaves = {"vision/blocks/0/mlp/up/kernel": jax.ShapeDtypeStruct((8, 16), "float32")}
    >>> [tuple(found.spec) for found in leaf_shardings(placed, leaves, ViTConfig(8, 16)).values()]
    [('fsdp', 'tensor')]
    """
    for name in (axis, fsdp) if fsdp else (axis,):
        _check_axis(mesh, name, "tensor_parallel")
    return Rules(mesh, ((".*", partial(_by_table, axis, fsdp)),))


def leaf_shardings(placement: Placement, leaves: Mapping[str, Any], config: Any = None) -> dict[str, Sharding]:
    """Where each leaf is to lie, checked before anything is read or moved.

    Args:
      placement: rules; one sharding for all leaves; or a function of path and leaf.
      leaves: shapes and dtypes by path, such as ``jax.ShapeDtypeStruct``.
      config: of the model, which `tensor_parallel` asks.

    Raises:
      ValueError: a rule that places no leaf, a leaf that no rule places, or one whose dimensions the mesh does not
        divide; the message names the rule, the leaf, its shape and the sizes of the axes.

    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> leaf_shardings(rules(mesh, [("up", PartitionSpec())]), {"down": jax.ShapeDtypeStruct((2,), "float32")})
    Traceback (most recent call last):
    ValueError: the rule 'up' places no leaf: it matches none of
      down
    ...
    """
    if isinstance(placement, Rules):
        return _by_rules(placement, leaves, config)
    if isinstance(placement, Mesh | PartitionSpec) or not (isinstance(placement, Sharding) or callable(placement)):
        raise ValueError(
            f"found {kind_of(placement)} as the sharding, expected rules (tvjax.sharding.rules(mesh, [...]), "
            "fsdp, tensor_parallel), a jax.sharding.Sharding, or a function of a path and a leaf"
        )
    found: dict[str, Sharding] = {}
    for path, leaf in leaves.items():
        kind = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        found[path] = placement if isinstance(placement, Sharding) else placement(path, kind)
        if not isinstance(found[path], Sharding):
            raise ValueError(
                f"the sharding of {path} is {kind_of(found[path])}: give a jax.sharding.Sharding, such as "
                "NamedSharding(mesh, PartitionSpec())"
            )
        try:
            found[path].shard_shape(leaf.shape)
        except (ValueError, IndexError) as error:  # sizes that do not divide; more dimensions than there are
            raise ValueError(f"{path} of shape {list(leaf.shape)} cannot lie so: {error}") from error
    return found


def _by_rules(placement: Rules, leaves: Mapping[str, Any], config: Any) -> dict[str, Sharding]:
    sizes = dict(placement.mesh.shape)
    found: dict[str, Sharding] = {}
    used, unmatched = set(), []
    for path, leaf in leaves.items():
        number = next((n for n, (pattern, _) in enumerate(placement.table) if re.fullmatch(pattern, path)), None)
        if number is None:
            unmatched.append(f"{path} {list(leaf.shape)}")
            continue
        used.add(number)
        pattern, spec = placement.table[number]
        if not isinstance(spec, PartitionSpec):
            spec = spec(PlacedLeaf(path, tuple(leaf.shape), sizes, config))
        _check_spec(pattern, spec, path, tuple(leaf.shape), placement.mesh)
        found[path] = NamedSharding(placement.mesh, spec)
    for number, (pattern, _) in enumerate(placement.table):
        if number not in used:
            matched = [path for path in leaves if re.fullmatch(pattern, path)]
            why = "earlier rules place" if matched else "it matches none of"
            raise ValueError(
                f"the rule {pattern!r} places no leaf: {why}\n{tree.list_some(matched or list(leaves))}\n"
                "patterns are regular expressions for the whole path, and the first that matches counts"
            )
    if unmatched:
        raise ValueError(
            f"no rule places these leaves:\n{tree.list_some(unmatched)}\n"
            "end the rules with one for the rest, such as ('.*', PartitionSpec())"
        )
    return found


def _check_spec(pattern: str, spec: PartitionSpec, path: str, shape: tuple[int, ...], mesh: Mesh) -> None:
    """Raises a ValueError for a partition that does not fit a leaf."""
    about = f"the rule {pattern!r} gives {path} of shape {list(shape)} the partition {tuple(spec)} on {name_of(mesh)}"
    if len(spec) > len(shape):
        raise ValueError(f"{about}: it has more dimensions than the leaf")
    if len(set(axes_of(spec))) < len(axes_of(spec)):
        raise ValueError(f"{about}: an axis cuts one dimension only")
    for axis, size in enumerate(shape[: len(spec)]):
        names = spec[axis] if isinstance(spec[axis], tuple) else (spec[axis],)
        parts = math.prod(mesh.shape[name] for name in names if name in mesh.shape)
        if size % parts:
            raise ValueError(f"{about}: {parts} devices do not divide dimension {axis} of {size}")


def _check_mesh(mesh: Any) -> None:
    if not isinstance(mesh, Mesh):
        raise ValueError(f"found {mesh!r} for the mesh, expected a jax.sharding.Mesh, such as jax.make_mesh gives")


def _check_axis(mesh: Mesh, axis: str, who: str) -> None:
    _check_mesh(mesh)
    if axis not in mesh.shape:
        raise ValueError(f"{who} names the axis {axis!r}, and the mesh has {name_of(mesh)}: name one, or another mesh")


# Tables of relative positions are tiny, and every query, key and head reads them: to cut one is to gather it again.
_RELATIVE_POSITIONS = re.compile("(.*/)?(position_bias|relative_bias|relative_attention_bias)(/.*)?")


def _largest(axis: str, leaf: PlacedLeaf, taken: Sequence[str | None] = ()) -> PartitionSpec:
    spec = list(taken) or [None] * len(leaf.shape)
    if _RELATIVE_POSITIONS.fullmatch(leaf.path):
        return PartitionSpec(*spec)
    if axis not in leaf.sizes:
        raise ValueError(f"largest names the axis {axis!r}, and the mesh has {', '.join(leaf.sizes)}")
    free = [(size, place) for place, size in enumerate(leaf.shape) if spec[place] is None]
    fit = [(size, place) for size, place in free if size and size % leaf.sizes[axis] == 0]
    if fit:
        spec[max(fit)[1]] = axis
    return PartitionSpec(*spec)


def _by_table(axis: str, fsdp: str | None, leaf: PlacedLeaf) -> PartitionSpec:
    """The first axis of a leaf that runs over the heads or the hidden units of a block."""
    table = None if leaf.config is None else family_of_config(leaf.config).table
    if table is None or any(row.path == "{path}" for row in table.rows):
        raise ValueError("tensor_parallel asks a family's layer table, and this model has none: give rules, or fsdp")
    row, own, names = locate(table, leaf.path)
    spec: list[str | None] = [None] * len(leaf.shape)
    spaces = () if _RELATIVE_POSITIONS.fullmatch(leaf.path) else leaf_spaces(row, own)
    for place, space in enumerate(spaces):
        units = leaf.shape[place]
        if isinstance(space, Heads):
            units = getattr(config_of(leaf.config, space.group.format(**names)), space.number)
            if space.shared or leaf.sizes[axis] % units == 0 and units < leaf.sizes[axis]:
                continue
        elif space is None or not space.endswith("hidden"):  # a residual stream
            continue
        if units % leaf.sizes[axis]:
            kind = "heads" if isinstance(space, Heads) else "units"
            raise ValueError(
                f"tensor_parallel cannot cut dimension {place} of {leaf.path} of shape {list(leaf.shape)}: its {units} "
                f"{kind} do not divide over {axis}={leaf.sizes[axis]}; give another mesh, or rules"
            )
        spec[place] = axis
        break
    return PartitionSpec(*spec) if fsdp is None else _largest(fsdp, leaf, spec)
