"""Permutation symmetries of a network in one table, and applying them.

The hidden units of a layer have no order: permuting them, in every leaf that writes or reads them, leaves the function
as it is. A `Symmetry` says for each axis of each leaf which *group* of units it runs over; applying a permutation and
its inverse are derived from that table. A group is plain (a residual stream, the units of an MLP), or the heads of an
attention layer, which have two levels: whole heads are exchanged, and inside each head the units that queries and keys
share, and those that values and the output projection share, may be permuted by themselves.

A permutation stands in gather order, ``permuted[j] = leaf[permutation[j]]``: unit j of the target is unit
``permutation[j]`` of the source.

The units of a *signed* group may change their signs as well: those of a residual stream that only RMS norms read, which
keep the sign of what they normalise. Its signs stand beside the order, under `sign_name`: ``permuted[j] = sign[j] *
leaf[permutation[j]]``, in every leaf but the even ones, the scales of the norms (arXiv 2606.31963).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from tvjax import tree
from tvjax.factors import LowRank, is_low_rank

PyTree = Any
Order = Int[Array | np.ndarray, "..."]
Permutations = dict[str, Int[Array, "..."]]


class Row(NamedTuple):
    """The groups that permute one leaf.

    Attributes:
      path: of the leaf; ``{name}`` stands for one key of it.
      axes: for each axis the group of its units, in which the same ``{name}`` may stand; None where the units have a
        meaning of their own. An axis of a heads group is named ``<group>:<units>``: all axes of one name share the
        permutations inside the heads.
      even: signs of its units do not reach it: it is multiplied with them (the scale of a norm).
    """

    path: str
    axes: tuple[str | None, ...]
    even: bool = False


class Symmetry(NamedTuple):
    """The permutation symmetry of a family of models.

    Attributes:
      rows: one for each leaf that a model of the family can have.
      heads: the number of heads of each heads group, by its name (with ``{name}``); every other group is plain.
      fixed: names of groups (with ``{name}``) that stay as they are in this model.
      rigid: names of axes (with ``{name}``) whose units stay in their order while their heads are exchanged.
      signed: names of plain groups (with ``{name}``) whose units may change their signs.

    >>> mlp = Symmetry((Row("{i}/up", (None, "{i}/hidden")), Row("{i}/down", ("{i}/hidden", None))))
    >>> axes(mlp, "3/up", 2)
    (None, '3/hidden')
    """

    rows: tuple[Row, ...]
    heads: Mapping[str, int] = {}
    fixed: tuple[str, ...] = ()
    rigid: tuple[str, ...] = ()
    signed: tuple[str, ...] = ()


class Use(NamedTuple):
    """One axis of one leaf that runs over a group; `units` names its units inside the heads, "" in a plain group."""

    path: str
    axis: int
    units: str


class Group(NamedTuple):
    """Units that are permuted together.

    Attributes:
      uses: the axes that run over it.
      sizes: the length of these axes, by their units.
      heads: the number of heads; 0 for a plain group.
      rigid: the units that stay in their order inside each head.
      signed: whether the units may change their signs.
    """

    uses: tuple[Use, ...]
    sizes: dict[str, int]
    heads: int
    rigid: frozenset[str] = frozenset()
    signed: bool = False


# -- the table ------------------------------------------------------------------------------------------------------


def axes(symmetry: Symmetry, path: str, ndim: int) -> tuple[str | None, ...]:
    """The names of the axes of a leaf.

    Raises:
      ValueError: no row, or more than one, covers the leaf; a row of another number of axes; a heads group without
        units or a plain one with units.

    >>> table = Symmetry((Row("blocks/{i}/up/kernel", (None, "blocks/{i}/hidden")),))
    >>> axes(table, "blocks/3/up/kernel", 2)
    (None, 'blocks/3/hidden')
    """
    row, match = row_of(symmetry, path)
    if len(row.axes) != ndim:
        raise ValueError(f"{path} has {ndim} axes, its row {row.path!r} of the symmetry table names {len(row.axes)}")
    names = tuple(None if name is None else _fill(name, match, row.path) for name in row.axes)
    for name in names:
        if name is not None and (":" in name) != bool(_heads(symmetry, group_of(name))):
            raise ValueError(
                f"{path}: the axis {name!r} must be '<group>:<units>' if its group is one of the heads groups "
                f"{list(symmetry.heads)}, and '<group>' if not"
            )
    groups = [group_of(name) for name in names if name is not None]
    if len(set(groups)) < len(groups):
        raise ValueError(f"{path}: a group may stand on one axis of a leaf only, found {groups}")
    fixed = {group for group in groups if any(_pattern(name).fullmatch(group) for name in symmetry.fixed)}
    return tuple(None if name is None or group_of(name) in fixed else name for name in names)


def row_of(symmetry: Symmetry, path: str) -> tuple[Row, re.Match[str]]:
    """The row that covers a leaf."""
    found = [(row, match) for row in symmetry.rows if (match := _pattern(row.path).fullmatch(path))]
    if len(found) != 1:
        rows = f"{len(found)} rows: {', '.join(row.path for row, _ in found)}" if found else "no row"
        raise ValueError(f"{path} is covered by {rows} of the symmetry table, expected one: each leaf needs its axes")
    return found[0]


def groups(symmetry: Symmetry, params: PyTree) -> dict[str, Group]:
    """The groups of a model by name, after checking that the table covers it completely.

    Args:
      symmetry: the table.
      params: parameters, or their shapes.

    Returns:
      The groups in the order of the leaves.

    Raises:
      ValueError: leaves that no row covers, rows that do not fit their leaves, or axes of one group that differ in
        length.

    >>> table = Symmetry((Row("up/kernel", (None, "hidden")), Row("down/kernel", ("hidden", None))))
    >>> groups(table, {"up": {"kernel": jnp.ones((3, 5))}, "down": {"kernel": jnp.ones((5, 2))}})["hidden"].uses
    (Use(path='down/kernel', axis=0, units=''), Use(path='up/kernel', axis=1, units=''))
    """
    shapes = {path: tree.leaf_type(leaf).shape for path, leaf in tree.flatten(params).items()}
    uncovered = [path for path in shapes if not any(_pattern(row.path).fullmatch(path) for row in symmetry.rows)]
    if uncovered:
        raise ValueError(
            f"the symmetry table covers {len(shapes) - len(uncovered)} of {len(shapes)} leaves, it has no row for\n"
            f"{tree.list_some(uncovered)}\nadd a Row for each; its axes are None where nothing may be permuted"
        )
    uses: dict[str, list[Use]] = {}
    sizes: dict[str, dict[str, int]] = {}
    for path, shape in shapes.items():
        for axis, name in enumerate(axes(symmetry, path, len(shape))):
            if name is None:
                continue
            group, _, units = name.partition(":")
            uses.setdefault(group, []).append(Use(path, axis, units))
            size = sizes.setdefault(group, {}).setdefault(units, shape[axis])
            if size != shape[axis]:
                first = next(use for use in uses[group] if use.units == units)
                raise ValueError(
                    f"the symmetry table gives {name!r} to axis {first.axis} of {first.path}, of length {size}, and to "
                    f"axis {axis} of {path}, of length {shape[axis]}: a group has one size"
                )
            heads = _heads(symmetry, group)
            if heads and size % heads:
                raise ValueError(f"axis {axis} of {path} has {size} units, which {heads} heads do not divide")
    return {
        name: Group(
            tuple(uses[name]),
            sizes[name],
            _heads(symmetry, name),
            _rigid(symmetry, name, sizes[name]),
            any(_pattern(signed).fullmatch(name) for signed in symmetry.signed),
        )
        for name in uses
    }


def permutation_names(names: Iterable[str | None]) -> list[str]:
    """The permutations that axes of these names need: of a heads group those of both levels; signs apart.

    >>> permutation_names((None, "blocks/0/heads:query_key"))
    ['blocks/0/heads', 'blocks/0/heads:query_key']
    """
    return list(dict.fromkeys(each for name in names if name is not None for each in (group_of(name), name)))


def sign_name(group: str) -> str:
    """The name of the signs of a signed group, among the permutations.

    >>> sign_name("residual")
    'sign of residual'
    """
    return f"sign of {group}"


def _is_sign(name: str) -> bool:
    return name.startswith(sign_name(""))


def group_of(name: str) -> str:
    """The group of the axes of a name."""
    return name.partition(":")[0]


def _heads(symmetry: Symmetry, group: str) -> int:
    return next((count for name, count in symmetry.heads.items() if _pattern(name).fullmatch(group)), 0)


def _rigid(symmetry: Symmetry, group: str, units: Iterable[str]) -> frozenset[str]:
    patterns = [_pattern(name) for name in symmetry.rigid]
    return frozenset(each for each in units if any(pattern.fullmatch(f"{group}:{each}") for pattern in patterns))


@cache
def _pattern(template: str) -> re.Pattern[str]:
    seen: set[str] = set()
    expression = ""
    for part in re.split(r"(\{\w+\})", template):
        name = part[1:-1]
        if not re.fullmatch(r"\{\w+\}", part):
            expression += re.escape(part)
        else:
            expression += f"(?P={name})" if name in seen else f"(?P<{name}>[^/]+)"
            seen.add(name)
    return re.compile(expression)


def _fill(name: str, match: re.Match[str], path: str) -> str:
    unknown = set(re.findall(r"\{(\w+)\}", name)) - set(match.groupdict())
    if unknown:
        raise ValueError(f"the axis {name!r} of the row {path!r} names {sorted(unknown)}, which its path does not have")
    return name.format(**match.groupdict())


# -- permutations ---------------------------------------------------------------------------------------------------


def index(permutations: Mapping[str, Order], name: str) -> Order:
    """The permutation of a whole axis: of a heads group both levels in one, ``heads[h] d + units[h, j]``.

    >>> two_heads = {"heads": jnp.array([1, 0]), "heads:qk": jnp.array([[0, 1], [1, 0]])}
    >>> index(two_heads, "heads:qk").tolist()
    [2, 3, 1, 0]
    """
    if name not in permutations or group_of(name) not in permutations:
        raise ValueError(
            f"there is no permutation of {name!r}, only of {', '.join(map(repr, list(permutations)[:8]))}: they were "
            "found with another symmetry table"
        )
    if ":" not in name:
        return permutations[name]
    heads, units = permutations[group_of(name)], permutations[name]
    return (heads[:, None] * units.shape[1] + units).reshape(-1)


def permute(symmetry: Symmetry, permutations: Permutations, params: PyTree) -> PyTree:
    """``P(theta)``: the leaves of a tree with their units in another order.

    Args:
      symmetry: the table.
      permutations: as in `tvjax.align.weight_matching.Match`.
      params: parameters, or a task vector, of the whole model or of some of its leaves.

    Returns:
      A tree of the same structure, shapes and dtypes; jittable.

    Raises:
      ValueError: a leaf that the table does not cover, or whose axes have another length than their permutation.

    >>> table = Symmetry((Row("kernel", (None, "units")),))
    >>> permute(table, {"units": jnp.array([2, 0, 1])}, {"kernel": jnp.array([[5, 6, 7]])})["kernel"].tolist()
    [[7, 5, 6]]
    """
    return tree.map_with_path(partial(_permute_leaf, symmetry, permutations), params)


def _permute_leaf(symmetry: Symmetry, permutations: Permutations, path: str, leaf: Any) -> Any:
    names = axes(symmetry, path, np.ndim(leaf))
    permuted = partial(_permute_axes, permutations, path, row_of(symmetry, path)[0].even)
    if not is_low_rank(leaf) or leaf.layers:  # an order of layers is none of one factor
        return permuted(jnp.asarray(leaf), names)
    inputs, outputs = leaf.shape[: leaf.cut], leaf.shape[leaf.cut :]
    left = permuted(leaf.left.reshape(*inputs, -1), (*names[: leaf.cut], None))
    right = permuted(leaf.right.reshape(-1, *outputs), (None, *names[leaf.cut :]))
    return LowRank(left.reshape(leaf.left.shape), right.reshape(leaf.right.shape), leaf.shape)


def _permute_axes(permutations: Permutations, path: str, even: bool, leaf: Array, names: Sequence[str | None]) -> Array:
    """An array in another order, and where it is not `even` with the signs of its axes."""
    for axis, name in enumerate(names):
        if name is not None:
            order = index(permutations, name)
            if order.shape != leaf.shape[axis : axis + 1]:
                raise ValueError(f"axis {axis} of {path} has {leaf.shape[axis]} units, {name!r} permutes {len(order)}")
            leaf = jnp.take(leaf, order, axis=axis)
            if sign_name(name) in permutations and not even:
                leaf = with_signs(leaf, permutations[sign_name(name)], axis)
    return leaf


def with_signs(leaf: Array, signs: Order, axis: int) -> Array:
    """A leaf whose units along an axis are multiplied by signs."""
    shape = [-1 if i == axis else 1 for i in range(leaf.ndim)]
    return leaf * jnp.asarray(signs).astype(leaf.dtype).reshape(shape)


def invert(permutations: Permutations) -> Permutations:
    """The permutations that undo these.

    >>> invert({"units": jnp.array([2, 0, 1])})["units"].tolist()
    [1, 2, 0]
    """
    inverse = {}
    for name, order in permutations.items():
        if _is_sign(name):
            inverse[name] = order[jnp.argsort(permutations[name.removeprefix(sign_name(""))])]
        elif ":" not in name:
            inverse[name] = jnp.argsort(order).astype(jnp.int32)
        else:  # head g of the source went to the head that the inverse names, in whose order its units lie
            inverse[name] = jnp.argsort(order, axis=1)[jnp.argsort(permutations[group_of(name)])].astype(jnp.int32)
    return inverse


def random_permutations(symmetry: Symmetry, params: PyTree, key: Array) -> Permutations:
    """A random element of the symmetry: ``permute`` by it must not change what the model computes.

    Args:
      symmetry: the table.
      params: parameters, or their shapes.
      key: a random key.

    Returns:
      Permutations as in `tvjax.align.weight_matching.Match`.

    Raises:
      ValueError: as `groups` does.

    >>> table = Symmetry((Row("up", (None, "hidden")), Row("down", ("hidden", None))))
    >>> params = {"up": jnp.array([[1.0, 2.0, 3.0]]), "down": jnp.array([[4.0], [5.0], [6.0]])}
    >>> moved = permute(table, random_permutations(table, params, jax.random.key(0)), params)
    >>> (moved["up"] @ moved["down"]).tolist() == (params["up"] @ params["down"]).tolist()
    True
    """
    found = groups(symmetry, params)
    shapes = shapes_of(found)
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    draws = jax.device_get(jax.random.uniform(key, (sum(sizes),)))
    parts = np.split(draws, np.cumsum(sizes)[:-1])
    orders = [np.argsort(part.reshape(shape), -1) for part, shape in zip(parts, shapes.values(), strict=True)]
    drawn = {name: jnp.asarray(order, jnp.int32) for name, order in zip(shapes, orders, strict=True)}
    rigid = [f"{name}:{units}" for name, group in found.items() for units in group.rigid]
    drawn |= {name: jnp.broadcast_to(jnp.arange(shapes[name][-1]), shapes[name]) for name in rigid}
    for number, name in enumerate(name for name, group in found.items() if group.signed):
        flipped = jax.random.bernoulli(jax.random.fold_in(key, number), shape=shapes[name])
        drawn[sign_name(name)] = 1 - 2 * flipped.astype(jnp.int32)
    return drawn


def shapes_of(found: Mapping[str, Group]) -> dict[str, tuple[int, ...]]:
    """The shape of each permutation, by its name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, group in found.items():
        shapes[name] = (group.heads,) if group.heads else (group.sizes[""],)
        if group.heads:
            shapes |= {f"{name}:{units}": (group.heads, size // group.heads) for units, size in group.sizes.items()}
    return shapes
