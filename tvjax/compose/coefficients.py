"""Coefficients of task vectors: how they are laid out, and the parameters that they give.

``theta = theta_0 + sum_i Lambda_i tau_i`` (aTLAS, Zhang et al., NeurIPS 2024, arXiv 2407.02880, equation 3): Lambda_i
holds one coefficient for each parameter block of task vector i. A block is a leaf, a group of leaves, a whole vector,
or one of K random parts of each of these. The gradient of a coefficient is the inner product of the gradient of its
block with the task vector's block, so that learning keeps one model, one gradient, and the vectors as they are stored.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tvjax import tree
from tvjax.arithmetic import apply
from tvjax.compose.layout import Blocks, Layout, Place, Stacked, group_names, layer_paths, stems_of
from tvjax.compose.partitions import partition_ids
from tvjax.factors import dense
from tvjax.kinds import kind_of
from tvjax.placement import automatic

PyTree = Any


@partial(jax.tree_util.register_dataclass, data_fields=("values",), meta_fields=("layout",))
@dataclasses.dataclass(frozen=True)
class Coefficients:
    """Coefficients with their layout; a pytree whose only leaf is the array.

    Attributes:
      values: ``[vectors, blocks, partitions]``, float32; those of blocks that a vector does not cover are not read.
      layout: static.
    """

    values: Float[Array, "vectors blocks partitions"]
    layout: Layout


class Entry(NamedTuple):
    """The coefficients of one leaf of one task vector.

    Attributes:
      vector: name of the task vector.
      path: of the leaf.
      block: name of its block; None for a leaf that takes no part.
      values: one for each partition; none for a leaf that takes no part.
    """

    vector: str
    path: str
    block: str | None
    values: tuple[float, ...]


def init(
    taus: Sequence[PyTree],
    *,
    blocks: Blocks = "leaf",
    partitions: int = 1,
    matrices_only: bool = False,
    stacks: str | Sequence[str] = (),
    axis: int = 0,
    key: Array | None = None,
    value: float = 0.0,
    names: Sequence[str] | None = None,
) -> Coefficients:
    """Coefficients for some task vectors, all of one value.

    Args:
      taus: task vectors of one model; each may cover a part of the leaves (None elsewhere, or no such paths).
      blocks: ``"leaf"`` (one block a leaf), ``"vector"`` (one coefficient a task vector), a mapping from path patterns
        (those of `tvjax.tree.select`, a later one winning) to names of groups, or a function from path to group.
      partitions: K; the entries of every leaf are split at random into K parts with a coefficient each (aTLAS x K).
        The parts of a leaf are the same for all task vectors and depend on the key and the leaf's path alone.
      matrices_only: leaves of fewer than two axes take no part, as published for K parts; by default all do.
      stacks: subtrees whose leaves are stacked over layers, as `tvjax.unstack` takes them: each layer of a leaf is a
        leaf of its own, ``blocks/3/up/kernel``, with a coefficient and parts of its own.
      axis: the layer axis of these.
      key: a random key, for K > 1.
      value: of every coefficient; at 0 the model is the base model.
      names: of the task vectors; their numbers by default.

    Returns:
      The coefficients.

    Raises:
      ValueError: no task vectors, vectors of different shapes, leaves that are not floating, leaves without a group,
        names that are not one each, parts without a key, or stacks that are not there or have no such axis.

    >>> import jax.numpy as jnp
    >>> tau = {"up": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    >>> coefficients = init([tau, tau], names=["thick", "mirrored"])
    >>> coefficients.layout.blocks, coefficients.values.shape
    (('up/bias', 'up/kernel'), (2, 2, 1))
    """
    flat = _checked(taus)
    names = tuple(map(str, range(len(flat)))) if names is None else tuple(names)
    if len(names) != len(flat) or len(set(names)) < len(names):
        raise ValueError(f"names: found {list(names)} for {len(flat)} task vectors, expected a different one for each")
    if partitions < 1 or (partitions > 1 and key is None):
        raise ValueError(
            f"partitions: found {partitions} and {'no key' if key is None else 'a key'}, expected 1 or more, and for "
            "more than 1 a key, jax.random.key(0)"
        )
    shapes = {path: np.shape(leaf) for vector in flat for path, leaf in vector.items()}
    stems = stems_of(shapes, stacks, axis)
    chosen = [path for path, shape in shapes.items() if len(shape) - (path in stems) >= 2 or not matrices_only]
    if not chosen:
        raise ValueError("the task vectors cover no leaf that may take part: give them leaves, or matrices_only=False")
    layers = {path: layer_paths(path, shapes[path], stems.get(path), axis) for path in chosen}
    groups = group_names(blocks, [name for each in layers.values() for name in each])
    order = {group: index for index, group in enumerate(dict.fromkeys(groups.values()))}
    places = []
    for path, shape in shapes.items():
        own = tuple(order[groups[name]] for name in layers.get(path, ()))
        covering = tuple(index for index, vector in enumerate(flat) if path in vector)
        stacked = Stacked(stems[path], axis % len(shape), own) if own and path in stems else None
        places.append(Place(path, own[0] if own else None, covering, stacked))
    seed: tuple[int, ...] = ()
    if partitions > 1 and key is not None:
        seed = tuple(int(word) for word in np.asarray(jax.random.key_data(key)).reshape(-1))
    layout = Layout(names, tuple(order), tuple(places), partitions, seed)
    return Coefficients(jnp.full((len(flat), len(order), partitions), value, jnp.float32), layout)


@automatic(lambda params, *_, **__: params)
def combine(params: PyTree, taus: Sequence[PyTree], coefficients: Coefficients) -> PyTree:
    """``theta_0 + sum_i Lambda_i tau_i`` in the stored dtypes of the parameters.

    The sum of a leaf is taken in float32 in one pass, whatever the vectors are stored in, and rounded once. Pure,
    jittable, and differentiable in everything.

    Args:
      params: theta_0, any pytree.
      taus: the task vectors that the coefficients were made for, in that order.
      coefficients: of `init`.

    Returns:
      theta, of the structure of `params`; a leaf that no vector covers is passed through as it is.

    Raises:
      ValueError: task vectors that the coefficients were not made for, or that do not fit the parameters.

    >>> import jax.numpy as jnp
    >>> taus = [{"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([0.0, 10.0], jnp.bfloat16)}]
    >>> coefficients = init(taus, value=0.5)
    >>> combine({"w": jnp.ones(2)}, taus, coefficients)["w"].tolist()
    [1.5, 7.0]
    """
    return apply(params, weighted_sum(taus, coefficients))


@automatic(lambda taus, *_, **__: taus[0])
def weighted_sum(taus: Sequence[PyTree], coefficients: Coefficients) -> PyTree:
    """``sum_i Lambda_i tau_i``: the composition as one task vector, to be saved, scaled or transported.

    Args:
      taus: the task vectors that the coefficients were made for, in that order.
      coefficients: of `init`.

    Returns:
      A float32 task vector over the leaves that take part: in the structure of the first vector where that covers them
      all and no others, else as nested dicts.

    Raises:
      ValueError: task vectors that the coefficients were not made for.

    >>> import jax.numpy as jnp
    >>> taus = [{"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([0.0, 10.0])}]
    >>> weighted_sum(taus, init(taus, value=0.5))["w"].tolist()
    [0.5, 6.0]
    """
    total = {path: _weighted(share) for path, share in shares(taus, coefficients).items()}
    first = tree.flatten(taus[0])
    if total.keys() == first.keys():
        return jax.tree.unflatten(tree.structure(taus[0]), [total[path] for path in first])
    return tree.nest(total)


@partial(jax.tree_util.register_dataclass, data_fields=("leaves", "rows", "seed"), meta_fields=("axis",))
@dataclasses.dataclass(frozen=True)
class Share:
    """What the change of one leaf is made of; a pytree.

    Attributes:
      leaves: that leaf of each task vector that covers it, as stored.
      rows: their coefficients, ``[partitions]`` each; of a stacked leaf ``[layers, partitions]``.
      seed: of the partition of this leaf, or of each layer of it, uint32; None where it has one part.
      axis: of the layers; None for a leaf that is not stacked.
    """

    leaves: list[Any]
    rows: list[Float[Array, "*layers partitions"]]
    seed: Int[Array, "*layers words"] | None
    axis: int | None = None


def shares(taus: Sequence[PyTree], coefficients: Coefficients) -> dict[str, Share]:
    """What the change of each leaf that takes part is made of, by path.

    Raises:
      ValueError: task vectors that the coefficients were not made for, or what are no coefficients.
    """
    if not isinstance(coefficients, Coefficients):
        raise ValueError(f"the coefficients are {kind_of(coefficients)}, expected what tvjax.compose.init gives")
    layout = coefficients.layout
    flat = [tree.flatten(tau) for tau in taus]
    _check_made_for(layout, flat)
    # A seed that the compiler knows would have it compute all parts while compiling, and keep them.
    unknown = zero_after(coefficients.values).astype(jnp.uint32)
    columns = jax.lax.split(coefficients.values, [1] * len(layout.blocks), axis=1)
    found = {}
    for place in layout.places:
        if place.block is None:
            continue
        stacked, blocks = place.stacked is not None, place.blocks
        rows = [[columns[block][index, 0] for block in blocks.values()] for index in place.vectors]
        seed = None
        if layout.partitions > 1:
            words = [[*layout.seed, zlib.crc32(path.encode())] for path in blocks]
            seed = unknown + jnp.array(words if stacked else words[0], jnp.uint32)
        found[place.path] = Share(
            [dense(flat[index][place.path]) for index in place.vectors],
            [jnp.stack(row) if stacked else row[0] for row in rows],
            seed,
            place.stacked.axis if place.stacked is not None else None,
        )
    return found


def zero_after(values: PyTree) -> Float[Array, ""]:
    """A zero that the compiler does not know to be one, and that is there when the values are.

    >>> float(zero_after({"w": jnp.array([jnp.inf])}))
    0.0
    """
    floating = [leaf for leaf in jax.tree.leaves(values) if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size]
    if not floating:
        return jnp.float32(0)
    entry = jax.lax.stop_gradient(floating[0][(0,) * floating[0].ndim]).astype(jnp.float32)
    return 0 * jnp.where(jnp.isfinite(entry), entry, 1)


def change(parts: Mapping[str, Share]) -> PyTree:
    """The task vector, as nested dicts, of some leaves given by path."""
    return tree.nest({path: _weighted(share) for path, share in parts.items()})


def entries(coefficients: Coefficients) -> list[Entry]:
    """The coefficients leaf by leaf, of a stacked leaf layer by layer, for reports and plots.

    >>> import jax.numpy as jnp
    >>> entries(init([{"w": jnp.ones((2, 2)), "b": jnp.ones(2)}], value=0.5, matrices_only=True))
    [Entry(vector='0', path='b', block=None, values=()), Entry(vector='0', path='w', block='w', values=(0.5,))]
    """
    layout, values = coefficients.layout, np.asarray(coefficients.values)
    return [
        entry
        for index, vector in enumerate(layout.vectors)
        for place in layout.places
        if index in place.vectors
        for entry in (
            [
                Entry(vector, path, layout.blocks[block], tuple(values[index, block].tolist()))
                for path, block in place.blocks.items()
            ]
            or [Entry(vector, place.path, None, ())]
        )
    ]


# Its backward pass reads the vectors as they are stored and computes the parts again: what it would keep otherwise, the
# vectors in float32 and the parts, is larger than the model.
@jax.checkpoint
@partial(jax.jit, inline=True)
def _weighted(share: Share) -> Float[Array, "*shape"]:
    """``sum_i row_i[part] * leaf_i`` in float32; without a seed there is one part."""
    total = jnp.zeros(np.shape(share.leaves[0]), jnp.float32)
    ids = None if share.seed is None else _ids(share, total.shape)
    for leaf, row in zip(share.leaves, share.rows, strict=True):
        total += _factor(row, ids, share.axis, total.ndim) * jnp.asarray(leaf).astype(jnp.float32)
    return total


def _ids(share: Share, shape: tuple[int, ...]) -> Int[Array, ...]:
    """The part of every entry; of a stacked leaf layer by layer, the layers first."""
    assert share.seed is not None
    count = share.rows[0].shape[-1]
    if share.axis is None:
        return partition_ids(shape, count, share.seed)
    layer = shape[: share.axis] + shape[share.axis + 1 :]
    return jax.vmap(lambda seed: partition_ids(layer, count, seed))(share.seed)


def _factor(
    row: Float[Array, "*layers partitions"], ids: Int[Array, ...] | None, axis: int | None, ndim: int
) -> Float[Array, ...]:
    """The coefficients of the entries of a leaf, to multiply it by."""
    if axis is None:
        return row[0] if ids is None else row.at[ids].get(mode="promise_in_bounds")
    if ids is None:
        return row[:, 0].reshape([-1 if i == axis else 1 for i in range(ndim)])
    return jnp.moveaxis(jax.vmap(lambda own, ids: own.at[ids].get(mode="promise_in_bounds"))(row, ids), 0, axis)


def _checked(taus: Sequence[PyTree]) -> list[dict[str, Any]]:
    """The leaves of task vectors of one model, by path."""
    if not isinstance(taus, Sequence) or not taus:
        raise ValueError(f"taus: expected a list of task vectors, one at least, found {kind_of(taus)} {taus!r:.40}")
    flat = [tree.flatten(tau) for tau in taus]
    shapes: dict[str, tuple[int, ...]] = {}
    problems = []
    for index, vector in enumerate(flat):
        for path, leaf in vector.items():
            kind = tree.leaf_type(leaf)
            if shapes.setdefault(path, kind.shape) != kind.shape:
                problems.append(f"{path}: {shapes[path]}, in task vector {index} {kind.shape}")
            if not jnp.issubdtype(kind.dtype, jnp.floating):
                problems.append(f"{path}: {kind.dtype} in task vector {index}")
    if problems:
        raise ValueError(
            f"task vectors that are composed belong to one model, {len(problems)} leaves do not fit:\n"
            f"{tree.list_some(problems)}\nof different models? transport them first (tvjax.fit)"
        )
    return flat


def _check_made_for(layout: Layout, flat: Sequence[dict[str, Any]]) -> None:
    if len(flat) != len(layout.vectors):
        raise ValueError(
            f"found {len(flat)} task vectors, but the coefficients were made for {len(layout.vectors)}: "
            f"{', '.join(layout.vectors)}"
        )
    problems = []
    for index, vector in enumerate(flat):
        expected = {place.path for place in layout.places if index in place.vectors}
        name = layout.vectors[index]
        problems += [f"{path}: {name} lacks it" for path in sorted(expected - vector.keys())]
        problems += [f"{path}: {name} had no such leaf" for path in sorted(vector.keys() - expected)]
        problems += [
            f"{place.path}: {name} has {np.shape(vector[place.path])}, expected {len(place.stacked.blocks)} layers at "
            f"axis {place.stacked.axis}"
            for place in layout.places
            if place.stacked is not None and place.path in vector
            if np.shape(vector[place.path])[place.stacked.axis :][:1] != (len(place.stacked.blocks),)
        ]
    if problems:
        raise ValueError(
            f"the coefficients were made for other task vectors, {len(problems)} leaves differ:\n"
            f"{tree.list_some(problems)}\nmake coefficients for these with tvjax.compose.init"
        )
