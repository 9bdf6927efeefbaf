"""Weight matching: the permutations of a symmetry that bring a network's weights nearest another's."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tvjax import processes, tree
from tvjax.align.permutations import (
    Permutations,
    PyTree,
    Symmetry,
    axes,
    group_of,
    groups,
    index,
    row_of,
    shapes_of,
    sign_name,
    with_signs,
)
from tvjax.align.products import product, wide
from tvjax.progress import Progress

_TOLERANCE = 1e-6  # a gain below this share of the product of the norms is rounding


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

    >>> from tvjax.align.permutations import Row, permute
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
        self.even = {path for path in shapes[0] if row_of(symmetry, path)[0].even}
        paths = [path for path, names in self.axes.items() if any(names)]
        self.leaves = {path: (jnp.asarray(a[path]), jnp.asarray(b[path])) for path in paths}
        self.norms = {path: tuple(map(float, norms)) for path, norms in processes.fetch(_norms(self.leaves)).items()}
        infinite = [path for path, norms in self.norms.items() if not np.isfinite(norms).all()]
        if infinite:
            raise ValueError(f"weights with NaN or infinite values cannot be matched:\n{tree.list_some(infinite)}")
        self.limit = sum(a * b for a, b in self.norms.values())

    def identity(self) -> dict[str, np.ndarray]:
        """Every unit where it is."""
        shapes = shapes_of(self.groups)
        orders = {name: np.broadcast_to(np.arange(n[-1], dtype=np.int32), n) for name, n in shapes.items()}
        signed = [name for name, group in self.groups.items() if group.signed]
        return orders | {sign_name(name): np.ones(shapes[name], np.int32) for name in signed}

    def product(self, permutations: Mapping[str, np.ndarray]) -> float:
        """``<P(A), B>`` over the leaves that a group permutes."""
        indices = {path: self._indices(path, permutations) for path in self.leaves}
        return float(sum(processes.fetch([_product(*self.leaves[path], indices[path]) for path in self.leaves])))

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
            order = processes.fetch(jax.random.permutation(jax.random.fold_in(key, passes), len(names)))
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
            if name is None or group_of(name) not in permutations
            else (index(permutations, name), permutations.get(sign_name(name)) if self._turns(path, name) else None)
            for name in self.axes[path]
        )

    def _turns(self, path: str, name: str) -> bool:
        """Whether the signs of a group reach a leaf."""
        return self.groups[group_of(name)].signed and path not in self.even

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
        return processes.fetch(scores)

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
        found = {
            group_of(other) for use in self.groups[name].uses for other in self.axes[use.path] if other is not None
        }
        return found - {name}

    def _known_entries(self, name: str, permutations: Mapping[str, np.ndarray]) -> int:
        """How many entries of a unit lie at known places."""
        entries = 0
        for path, axis, _ in self.groups[name].uses:
            others = [other for i, other in enumerate(self.axes[path]) if i != axis and other is not None]
            if all(group_of(other) in permutations for other in others):
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
            leaf = leaf if signs is None else with_signs(leaf, signs, axis)
    return leaf
