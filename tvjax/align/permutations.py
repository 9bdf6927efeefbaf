"""Permutation symmetries of a network in one table, and the permutations that bring its weights onto another's.

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
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tvjax import tree
from tvjax.align.products import product, wide

PyTree = Any
Order = Int[Array | np.ndarray, "..."]
Permutations = dict[str, Int[Array, "..."]]
Progress = Callable[[int, int, str], None]

_TOLERANCE = 1e-6  # a gain below this share of the product of the norms is rounding


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


class Match(NamedTuple):
    """What `match_weights` found.

    Attributes:
      permutations: of the source onto the target: ``[units]`` by plain group; by heads group ``[heads]``, and by each
        of its axis names ``[heads, units]``, for each head of the target the order of the units inside its partner; by
        `sign_name` of a signed group ``[units]``, 1 and -1.
      before: ``<A, B>``, summed over the leaves that a group permutes.
      after: ``<P(A), B>``.
      limit: the sum of ``||A|| ||B||`` of these leaves, which nothing exceeds and a permuted copy reaches.
    """

    permutations: Permutations
    before: float
    after: float
    limit: float


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
    row, match = _row(symmetry, path)
    if len(row.axes) != ndim:
        raise ValueError(f"{path} has {ndim} axes, its row {row.path!r} of the symmetry table names {len(row.axes)}")
    names = tuple(None if name is None else _fill(name, match, row.path) for name in row.axes)
    for name in names:
        if name is not None and (":" in name) != bool(_heads(symmetry, _group(name))):
            raise ValueError(
                f"{path}: the axis {name!r} must be '<group>:<units>' if its group is one of the heads groups "
                f"{list(symmetry.heads)}, and '<group>' if not"
            )
    groups = [_group(name) for name in names if name is not None]
    if len(set(groups)) < len(groups):
        raise ValueError(f"{path}: a group may stand on one axis of a leaf only, found {groups}")
    fixed = {group for group in groups if any(_pattern(name).fullmatch(group) for name in symmetry.fixed)}
    return tuple(None if name is None or _group(name) in fixed else name for name in names)


def _row(symmetry: Symmetry, path: str) -> tuple[Row, re.Match[str]]:
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
    return list(dict.fromkeys(each for name in names if name is not None for each in (_group(name), name)))


def sign_name(group: str) -> str:
    """The name of the signs of a signed group, among the permutations.

    >>> sign_name("residual")
    'sign of residual'
    """
    return f"sign of {group}"


def _is_sign(name: str) -> bool:
    return name.startswith(sign_name(""))


def _group(name: str) -> str:
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
    if name not in permutations or _group(name) not in permutations:
        raise ValueError(
            f"there is no permutation of {name!r}, only of {', '.join(map(repr, list(permutations)[:8]))}: they were "
            "found with another symmetry table"
        )
    if ":" not in name:
        return permutations[name]
    heads, units = permutations[_group(name)], permutations[name]
    return (heads[:, None] * units.shape[1] + units).reshape(-1)


def permute(symmetry: Symmetry, permutations: Permutations, params: PyTree) -> PyTree:
    """``P(theta)``: the leaves of a tree with their units in another order.

    Args:
      symmetry: the table.
      permutations: as in `Match`.
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


def _permute_leaf(symmetry: Symmetry, permutations: Permutations, path: str, leaf: Any) -> Array:
    leaf = jnp.asarray(leaf)
    for axis, name in enumerate(axes(symmetry, path, leaf.ndim)):
        if name is not None:
            order = index(permutations, name)
            if order.shape != leaf.shape[axis : axis + 1]:
                raise ValueError(f"axis {axis} of {path} has {leaf.shape[axis]} units, {name!r} permutes {len(order)}")
            leaf = jnp.take(leaf, order, axis=axis)
            if sign_name(name) in permutations and not _row(symmetry, path)[0].even:
                leaf = _with_signs(leaf, permutations[sign_name(name)], axis)
    return leaf


def _with_signs(leaf: Array, signs: Order, axis: int) -> Array:
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
            inverse[name] = jnp.argsort(order, axis=1)[jnp.argsort(permutations[_group(name)])].astype(jnp.int32)
    return inverse


def random_permutations(symmetry: Symmetry, params: PyTree, key: Array) -> Permutations:
    """A random element of the symmetry: ``permute`` by it must not change what the model computes.

    Args:
      symmetry: the table.
      params: parameters, or their shapes.
      key: a random key.

    Returns:
      Permutations as in `Match`.

    Raises:
      ValueError: as `groups` does.

    >>> table = Symmetry((Row("up", (None, "hidden")), Row("down", ("hidden", None))))
    >>> params = {"up": jnp.array([[1.0, 2.0, 3.0]]), "down": jnp.array([[4.0], [5.0], [6.0]])}
    >>> moved = permute(table, random_permutations(table, params, jax.random.key(0)), params)
    >>> (moved["up"] @ moved["down"]).tolist() == (params["up"] @ params["down"]).tolist()
    True
    """
    found = groups(symmetry, params)
    shapes = _shapes(found)
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


def _shapes(found: Mapping[str, Group]) -> dict[str, tuple[int, ...]]:
    """The shape of each permutation, by its name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, group in found.items():
        shapes[name] = (group.heads,) if group.heads else (group.sizes[""],)
        if group.heads:
            shapes |= {f"{name}:{units}": (group.heads, size // group.heads) for units, size in group.sizes.items()}
    return shapes


# -- matching -------------------------------------------------------------------------------------------------------


def match_weights(
    symmetry: Symmetry, source: PyTree, target: PyTree, *, key: Array, progress: Progress | None = None
) -> Match:
    """The permutations P that maximise ``<P(A), B>``, the inner product of the weights, by coordinate descent.

    With all groups but one held, the best permutation of that one is a linear assignment. For a heads group it is one
    in two levels: for every pair of a source and a target head the best order of the units inside, then the best
    exchange of whole heads by the values of those; in a signed group every pair of units has the sign that agrees more.
    Groups are solved in random order until none gains any more; one
    whose neighbours have not changed is not solved again.

    The descent starts twice and the better end is kept. One start leaves every unit where it is. The other needs no
    permutation to begin with: groups are solved one after another, those with most known neighbours first, and an axis
    whose permutation is not known yet counts with the most that it can give, ``max_P <P x, y> = <sort x, sort y>``. A
    permuted copy of the source reaches that bound at the right permutation, so it is found there and then, whatever
    the residual stream's.

    Args:
      symmetry: the table; it must cover every leaf.
      source: parameters of A.
      target: parameters of B, the same paths and shapes.
      key: a random key, for the order of the descent.
      progress: called with (groups solved in this pass, groups of it, what is being solved).

    Returns:
      The permutations, and what they reach.

    Raises:
      ValueError: as `groups` does; models of other paths or shapes, or weights that are not finite.

    >>> table = Symmetry((Row("up", (None, "hidden")), Row("down", ("hidden", None))))
    >>> a = {"up": jnp.array([[1.0, 2.0, 3.0]]), "down": jnp.array([[4.0], [5.0], [6.0]])}
    >>> b = permute(table, {"hidden": jnp.array([2, 0, 1])}, a)
    >>> match_weights(table, a, b, key=jax.random.key(0)).permutations["hidden"].tolist()
    [2, 0, 1]

    Sources: weight matching of Git Re-Basin (Ainsworth et al., ICLR 2023, arXiv 2209.04836, section 3.2) and the two
    levels of TransFusion (Rinaldi et al., ICML 2025, arXiv 2505.22697, section 3). TransFusion pairs heads by the
    distance of their singular values, which sees no more than their spectra, lets q, k and v share the units inside a
    head, and gives each side of an addition its own permutation, with a permuted identity on the residual path. Here
    heads are paired by the inner product that they really reach, values have units of their own (both are symmetries),
    and one permutation runs through the residual stream, so that P(A) computes what A does as it is.
    """
    weights = _Weights(symmetry, source, target)
    first, second = jax.random.split(key)
    before = weights.product(weights.identity())
    start = weights.start(progress)
    best = weights.descend(start, first, progress)
    after = weights.product(best)
    if after < (1 - _TOLERANCE) * weights.limit:
        other = weights.descend(weights.identity(), second, progress)
        if (value := weights.product(other)) > after:
            best, after = other, value
    return Match({name: jnp.asarray(order) for name, order in best.items()}, before, after, weights.limit)


class _Weights:
    """The leaves of both models, and what their groups reach under some permutations."""

    def __init__(self, symmetry: Symmetry, source: PyTree, target: PyTree):
        self.groups = groups(symmetry, source)
        a, b = tree.flatten(source), tree.flatten(target)
        shapes = [{path: tree.leaf_type(leaf).shape for path, leaf in flat.items()} for flat in (a, b)]
        problems = [
            f"{path}: {shapes[0].get(path, 'missing')} in the source, {shapes[1].get(path, 'missing')} in the target"
            for path in {**shapes[0], **shapes[1]}
            if shapes[0].get(path) != shapes[1].get(path)
        ]
        if problems:
            raise ValueError(
                f"permutations match models of one shape, {len(problems)} leaves differ:\n{tree.list_some(problems)}\n"
                "theseus() and bico() move across widths and depths"
            )
        self.axes = {path: axes(symmetry, path, len(shape)) for path, shape in shapes[0].items()}
        self.even = {path for path in shapes[0] if _row(symmetry, path)[0].even}
        paths = [path for path, names in self.axes.items() if any(names)]
        self.leaves = {path: (jnp.asarray(a[path]), jnp.asarray(b[path])) for path in paths}
        self.norms = {path: tuple(map(float, norms)) for path, norms in jax.device_get(_norms(self.leaves)).items()}
        infinite = [path for path, norms in self.norms.items() if not np.isfinite(norms).all()]
        if infinite:
            raise ValueError(f"weights with NaN or infinite values cannot be matched:\n{tree.list_some(infinite)}")
        self.limit = sum(a * b for a, b in self.norms.values())

    def identity(self) -> dict[str, np.ndarray]:
        """Every unit where it is."""
        shapes = _shapes(self.groups)
        orders = {name: np.broadcast_to(np.arange(n[-1], dtype=np.int32), n) for name, n in shapes.items()}
        signed = [name for name, group in self.groups.items() if group.signed]
        return orders | {sign_name(name): np.ones(shapes[name], np.int32) for name in signed}

    def product(self, permutations: Mapping[str, np.ndarray]) -> float:
        """``<P(A), B>`` over the leaves that a group permutes."""
        indices = {path: self._indices(path, permutations) for path in self.leaves}
        return float(sum(jax.device_get([_product(*self.leaves[path], indices[path]) for path in self.leaves])))

    def start(self, progress: Progress | None) -> dict[str, np.ndarray]:
        """Permutations from nothing: group after group, the unknown axes of its leaves sorted."""
        known: dict[str, np.ndarray] = {}
        rest = list(self.groups)
        while rest:
            name = max(rest, key=lambda name: self._known_entries(name, known))
            if progress is not None:
                progress(len(self.groups) - len(rest), len(self.groups), f"start: {name}")
            known |= self._solve(name, self._scores(name, known))
            rest.remove(name)
        return known

    def descend(
        self, permutations: Mapping[str, np.ndarray], key: Array, progress: Progress | None
    ) -> dict[str, np.ndarray]:
        """Solves one group after another until none gains any more."""
        permutations = dict(permutations)
        stale = set(self.groups)
        passes = 0
        while stale:
            names = [name for name in self.groups if name in stale]
            passes += 1
            order = jax.device_get(jax.random.permutation(jax.random.fold_in(key, passes), len(names)))
            for done, name in enumerate(names[i] for i in order):
                if progress is not None:
                    progress(done, len(names), f"pass {passes}: {name}")
                stale.discard(name)
                scores = self._scores(name, permutations)
                found = self._solve(name, scores)
                gain = self._value(name, scores, found) - self._value(name, scores, permutations)
                if gain > _TOLERANCE * self._scale(name):
                    permutations |= found
                    stale |= self._neighbours(name)
        return permutations

    def _indices(self, path: str, permutations: Mapping[str, np.ndarray]) -> tuple[Any, ...]:
        """The order of each axis of a leaf and its signs (None: all 1); None where it is fixed or not known."""
        return tuple(
            None
            if name is None or _group(name) not in permutations
            else (index(permutations, name), permutations.get(sign_name(name)) if self._turns(path, name) else None)
            for name in self.axes[path]
        )

    def _turns(self, path: str, name: str) -> bool:
        """Whether the signs of a group reach a leaf."""
        return self.groups[_group(name)].signed and path not in self.even

    def _scores(self, name: str, permutations: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """``<a_i, b_j>`` of all units i of the source and j of the target, but for terms of i alone or of j alone.

        Those of a signed group stand under ``""`` as they are, and under ``"-"`` with the source's units negated.
        """
        scores: dict[str, Array] = {}
        signed = self.groups[name].signed
        for path, axis, units in self.groups[name].uses:
            indices = self._indices(path, permutations)
            names = enumerate(self.axes[path])
            unknown = tuple(i for i, other in names if i != axis and other is not None and indices[i] is None)
            others = (*indices[:axis], None, *indices[axis + 1 :])
            sizes = any(self._turns(path, self.axes[path][i] or "") for i in unknown)
            for sign in (1, -1) if signed else (1,):
                turned = -1 if sign < 0 and path not in self.even else 1
                part = _agreement(*self.leaves[path], others, axis, unknown, turned, sizes, not signed)
                key = "-" if sign < 0 else units
                scores[key] = scores[key] + part if key in scores else part
        return jax.device_get(scores)

    def _solve(self, name: str, scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The best permutation of one group for these scores."""
        heads = self.groups[name].heads
        if self.groups[name].signed:
            order = _assign(np.maximum(scores[""], scores["-"]))[0]
            kept, turned = (scores[key][order, np.arange(len(order))] for key in ("", "-"))
            return {name: order, sign_name(name): np.where(kept >= turned, 1, -1).astype(np.int32)}
        if not heads:
            return {name: _assign(scores[""])[0]}
        values = np.zeros((heads, heads))
        inside = {}
        for units, table in scores.items():
            size = len(table) // heads
            inside[units] = np.empty((heads, heads, size), np.int32)
            for pair in np.ndindex(heads, heads):
                block = table.reshape(heads, size, heads, size)[pair[0], :, pair[1], :]
                rigid = units in self.groups[name].rigid
                inside[units][pair], value = (np.arange(size), np.trace(block)) if rigid else _assign(block)
                values[pair] += value
        partners, _ = _assign(values)
        chosen = {f"{name}:{units}": orders[partners, np.arange(heads)] for units, orders in inside.items()}
        return {name: partners, **chosen}

    def _value(self, name: str, scores: Mapping[str, np.ndarray], permutations: Mapping[str, np.ndarray]) -> float:
        total = 0.0
        if self.groups[name].signed:
            places = permutations[name], np.arange(len(permutations[name]))
            chosen = np.where(permutations[sign_name(name)] > 0, scores[""][places], scores["-"][places])
            return float(chosen.sum(dtype=np.float64))
        for units, table in scores.items():
            order = index(permutations, f"{name}:{units}" if units else name)
            total += float(table[order, np.arange(len(order))].sum(dtype=np.float64))
        return total

    def _scale(self, name: str) -> float:
        return sum(self.norms[use.path][0] * self.norms[use.path][1] for use in self.groups[name].uses)

    def _neighbours(self, name: str) -> set[str]:
        """The groups that share a leaf with this one."""
        found = {_group(other) for use in self.groups[name].uses for other in self.axes[use.path] if other is not None}
        return found - {name}

    def _known_entries(self, name: str, permutations: Mapping[str, np.ndarray]) -> int:
        """How many entries of a unit lie at known places."""
        entries = 0
        for path, axis, _ in self.groups[name].uses:
            others = [other for i, other in enumerate(self.axes[path]) if i != axis and other is not None]
            if all(_group(other) in permutations for other in others):
                shape = self.leaves[path][0].shape
                entries += int(np.prod(shape)) // shape[axis]
        return entries


def _assign(scores: np.ndarray) -> tuple[np.ndarray, float]:
    """For each unit of the target its unit of the source, one to one, with the greatest total score; and that score."""
    from scipy.optimize import linear_sum_assignment  # takes as long to import as the rest of tvjax

    targets, sources = linear_sum_assignment(scores.T, maximize=True)
    return sources.astype(np.int32), float(scores[sources, targets].sum(dtype=np.float64))


@jax.jit
def _norms(leaves: dict[str, tuple[Array, Array]]) -> dict[str, tuple[Array, Array]]:
    return jax.tree.map(lambda leaf: jnp.linalg.norm(wide(leaf).reshape(-1)), leaves)


@jax.jit
def _product(a: Array, b: Array, indices: tuple[Any, ...]) -> Float[Array, ""]:
    return jnp.sum(_permuted(a, indices) * wide(b))


@partial(jax.jit, static_argnames=("axis", "unknown", "sign", "sizes", "center"))
def _agreement(
    a: Array,
    b: Array,
    indices: tuple[Any, ...],
    axis: int,
    unknown: tuple[int, ...],
    sign: int,
    sizes: bool,
    center: bool,
) -> Float[Array, "units units"]:
    """Inner products of the units of both sides along an axis, the other axes of `a` in the order of `indices`.

    The axes `unknown` are sorted within each unit, all of them together; their `sizes` alone where signs are not known
    either. With `center` the mean unit is subtracted on both sides: that adds terms of one side alone, which no
    assignment sees, and takes away most of the rounding. Where signs are chosen it would not be the same.
    """
    known = tuple(i for i in range(a.ndim) if i != axis and i not in unknown)

    def rows(leaf: Array) -> Float[Array, "units entries"]:
        leaf = jnp.transpose(leaf, (axis, *known, *unknown))
        if sizes:
            leaf = jnp.abs(leaf)
        if unknown:
            leaf = jnp.sort(leaf.reshape(*leaf.shape[: 1 + len(known)], -1))
        return leaf.reshape(leaf.shape[0], -1)

    a, b = rows(sign * _permuted(a, indices)), rows(wide(b))
    mean = jnp.mean(b, axis=0) if center else jnp.zeros((), b.dtype)
    return product(a - mean, (b - mean).T)


def _permuted(leaf: Array, indices: tuple[Any, ...]) -> Array:
    leaf = wide(leaf)
    for axis, known in enumerate(indices):
        if known is not None:
            order, signs = known
            leaf = jnp.take(leaf, order, axis=axis)
            leaf = leaf if signs is None else _with_signs(leaf, signs, axis)
    return leaf
