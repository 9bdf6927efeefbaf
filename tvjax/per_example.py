"""Gradients of single examples, reduced (signs, squares) and summed, stage by stage from the last to the first.

The sign of a sum is not the sum of signs: what reduces the gradient of ONE example needs all of it, so the uses of a
tied leaf are added up over the stages that share it BEFORE they are reduced. What stages hand on may hold arrays
without an example axis (a position bias, the texts of a zero-shot head): all examples read them, and what flows back to
them is kept by example.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from tvjax import placement, tree
from tvjax.stages import owner_paths
from tvjax.walk import Walk, cast_like, differentiable, is_floating

PyTree = Any
Flat = dict[str, jax.Array]
Reduction = Callable[[Flat], Flat]


class ExampleGradients:
    """Sums over the examples of a walk of what a reduction makes of their gradients.

    True as long as tied leaves wait for a stage that also reads them.

    Args:
      walk: over a model with a loss, its batches labelled.
      reduce: the gradients of one example, by path, to what is summed over the examples, by path; hashable, one object
        for equal reductions, so that XLA compiles once.
      chunk: examples whose gradients are taken at once.
    """

    def __init__(self, walk: Walk, reduce: Reduction, chunk: int = 1):
        self.walk, self.reduce, self.chunk = walk, reduce, chunk
        reads = [set(owner_paths(stage, walk.model.params).values()) for stage in walk.model.stages]
        self._readers = Counter(path for paths in reads for path in paths)
        self._first = {path: index for index in reversed(range(len(reads))) for path in reads[index]}
        self._waiting: dict[str, dict[int, jax.Array]] = {}  # gradients by example of tied leaves, by batch
        self._back: dict[tuple[int, int], list[jax.Array]] = {}  # by example, where a stage returns shared arrays
        self.examples = sum(jax.tree.leaves(batch.inputs)[0].shape[0] for batch in walk.batches)

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def stage(self, index: int) -> Flat:
        """The sums for the leaves that a stage owns, by their path in the model; call it from the last stage on."""
        walk = self.walk
        stage = walk.model.stages[index]
        owners = owner_paths(stage, walk.model.params)
        floating = [local for local, leaf in tree.flatten(walk.stored(index)).items() if is_floating(leaf)]
        tied = frozenset(local for local in floating if self._readers[owners[local]] > 1)
        sums: Flat = {}
        for batch in range(len(walk.batches)):
            found, examples = self._pull(index, batch, tied, self.reduce)
            for local, value in found.items():
                path = owners[local]
                sums[path] = sums[path] + value if path in sums else value
            for local, gradients in examples.items():
                waiting = self._waiting.setdefault(owners[local], {})
                waiting[batch] = waiting[batch] + gradients if batch in waiting else gradients
        for path in [path for path in self._waiting if self._first[path] == index]:  # every reader has been visited
            waiting = self._waiting.pop(path)
            parts = [_reduced(self.reduce, gradients) for gradients in waiting.values()]
            sums[path] = sum(parts[1:], parts[0])
        return sums

    def _pull(self, index: int, batch: int, tied: frozenset[str], reduce: Reduction) -> tuple[Flat, Flat]:
        """One batch through a stage, backwards; what leaves it downwards is kept."""
        walk = self.walk
        carry, count = walk.carries(index)[batch], _count(walk, batch)
        function, params = walk.model.stages[index].function, walk.params(index)
        lie = _rows_lie(walk.batches[batch].inputs, params)
        found, examples, down = per_example_gradients(
            function, tied, reduce, self.chunk, index > 0, count, lie, params, carry, self._cotangent(index, batch)
        )
        self._back.pop((index, batch), None)
        if down is not None:
            shared = [not _is_example(leaf, count) for leaf in jax.tree.leaves(carry) if is_floating(leaf)]
            if any(shared):
                self._back[index - 1, batch] = down
            whole = [d.sum(0) if is_shared else d for d, is_shared in zip(down, shared, strict=True)]
            walk.keep_cotangent(index - 1, batch, whole)
        return found, examples

    def _cotangent(self, index: int, batch: int) -> list[jax.Array]:
        """The gradient of each example's loss with respect to what a stage returns, the examples first."""
        walk = self.walk
        if (index, batch) in self._back:
            return self._back[index, batch]
        stage, count = walk.model.stages[index], _count(walk, batch)
        out = jax.eval_shape(stage.function, _types(walk.stored(index)), walk.carries(index)[batch])
        if all(_is_example(leaf, count) for leaf in jax.tree.leaves(out) if is_floating(leaf)):
            return walk.cotangents(index)[batch]
        if index == len(walk.model.stages) - 1:
            labels = walk.batches[batch].labels
            return _loss_by_example(
                walk.model.loss, count, walk.model.loss_params, walk.carries(index + 1)[batch], labels
            )
        self._pull(index + 1, batch, frozenset(), _nothing)  # a later stage was read from a file
        return self._back[index, batch]


def _types(params: PyTree) -> PyTree:
    return jax.tree.map(tree.leaf_type, params)


def _nothing(gradients: Flat) -> Flat:
    return {}


def _count(walk: Walk, batch: int) -> int:
    return int(jax.tree.leaves(walk.batches[batch].inputs)[0].shape[0])


def _rows_lie(inputs: PyTree, params: PyTree) -> NamedSharding | None:
    """How examples are cut over the axes of a mesh that cut no parameter, which share the work already; None: not.

    (Where one axis cuts both, every device would need the parameters whole; the examples are gathered there.)
    """
    lie = placement.spread(jax.tree.leaves(inputs)[0])
    if lie is None:
        return None
    cuts = filter(None, map(placement.spread, jax.tree.leaves(params)))
    taken = {name for own in cuts for name in placement.axes_of(own.spec)}
    free = tuple(name for name in placement.axes_of(PartitionSpec(lie.spec[0])) if name not in taken)
    return NamedSharding(lie.mesh, PartitionSpec(free)) if free else None


def _is_example(leaf: Any, count: int) -> bool:
    return tuple(jnp.shape(leaf)[:1]) == (count,)


@partial(jax.jit, static_argnums=(0, 1))
def _loss_by_example(loss: Any, count: int, loss_params: PyTree, outputs: PyTree, labels: PyTree) -> list[jax.Array]:
    """``dL_n / d outputs``: rows of what has an example axis, ``[examples, *array]`` of what has none."""
    floating, rebuild = differentiable(outputs)

    def losses(floating: list[jax.Array]) -> jax.Array:
        return loss(loss_params, rebuild(floating), labels)

    found = jax.grad(lambda floating: jnp.sum(losses(floating)))(floating)
    for i, leaf in enumerate(floating):
        if not _is_example(leaf, count):
            found[i] = jax.jacrev(lambda x, i=i: losses([*floating[:i], x, *floating[i + 1 :]]))(leaf)
    return found


@partial(jax.jit, static_argnums=0)
def _reduced(reduce: Reduction, gradients: jax.Array) -> jax.Array:
    return jax.vmap(lambda g: reduce({"": g})[""])(gradients).sum(0)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5, 6))
def per_example_gradients(
    function: Any,
    tied: frozenset[str],
    reduce: Reduction,
    chunk: int,
    downwards: bool,
    samples: int,
    lie: NamedSharding | None,
    params: PyTree,
    carry: PyTree,
    cotangent: list[jax.Array],
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], list[jax.Array] | None]:
    """``sum_n reduce(dL_n / dparams)`` over the samples of a batch, one batched backward pass.

    The vector-Jacobian products of `chunk` samples are taken at once (`vmap`), the chunks one after another (`scan`).
    Where samples lie over a mesh, every device takes `chunk` of its own at once.

    Args:
      function: of the stage.
      tied: local paths of leaves whose per-sample gradients are returned instead, for other stages add to them.
      reduce: one sample's gradients by path -> what is summed, by path.
      chunk: samples at once, at most; the largest such number that divides the batch, or a device's share of it.
      downwards: whether the cotangent of the carry is wanted.
      samples: how many there are.
      lie: how they are cut over a mesh, along their first axis; None where they are not.
      params: local parameters.
      carry: of the batch; a leaf whose first axis is not that of the examples is shared by all of them.
      cotangent: of the stage's floating outputs, of each example: rows, or ``[batch, *array]`` of shared ones.

    Returns:
      Sums by local path; per-sample gradients ``[batch, *leaf]`` of tied leaves; the cotangent of the carry, made as
      that of the outputs.
    """
    if lie is not None:
        one_device = partial(per_example_gradients, function, tied, reduce, chunk, downwards)
        return _each_its_own(one_device, samples, lie, params, carry, cotangent)
    params = jax.tree.map(_at_least_float32, params)  # a gradient in 16 bits is mostly rounding
    names = [path for path, leaf in tree.flatten(params).items() if is_floating(leaf)]
    chunk = max(size for size in range(1, min(chunk, samples) + 1) if samples % size == 0)

    leaves, structure = jax.tree.flatten(carry)
    own_rows = [_is_example(leaf, samples) for leaf in leaves]
    rows = [leaf for leaf, is_row in zip(leaves, own_rows, strict=True) if is_row]

    def one_sample(rows: list[jax.Array], cotangent: list[jax.Array]) -> Any:
        mine = iter(rows)
        carry = [next(mine)[None] if is_row else leaf for leaf, is_row in zip(leaves, own_rows, strict=True)]
        floating, rebuild = differentiable(jax.tree.unflatten(structure, carry))
        moving, rebuild_params = differentiable(params)
        out, pull = jax.vjp(lambda p, f: differentiable(function(rebuild_params(p), rebuild(f)))[0], moving, floating)
        cotangent = [c.reshape(o.shape) for c, o in zip(cotangent, out, strict=True)]
        gradients, down = pull(cast_like(cotangent, out))
        flat = dict(zip(names, gradients, strict=True))
        own = reduce({path: g for path, g in flat.items() if path not in tied})
        is_row = [row for row, leaf in zip(own_rows, leaves, strict=True) if is_floating(leaf)]
        down = [d[0] if row else d for d, row in zip(down, is_row, strict=True)]
        return own, {path: flat[path] for path in tied}, down if downwards else None

    def one_chunk(total: dict[str, jax.Array], inputs: Any) -> Any:
        own, kept, down = jax.vmap(one_sample)(*inputs)
        return jax.tree.map(lambda t, v: t + jnp.sum(v, 0, dtype=t.dtype), total, own), (kept, down)

    chunks = jax.tree.map(lambda x: x.reshape(samples // chunk, chunk, *x.shape[1:]), (rows, cotangent))
    shapes = jax.eval_shape(one_sample, *jax.tree.map(lambda x: x[0], (rows, cotangent)))[0]
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, stacked = jax.lax.scan(one_chunk, zero, chunks)
    kept, down = jax.tree.map(lambda x: x.reshape(samples, *x.shape[2:]), stacked)
    return total, kept, down


def _each_its_own(
    one_device: Any, samples: int, lie: NamedSharding, params: PyTree, carry: PyTree, cotangent: list[jax.Array]
) -> Any:
    """`per_example_gradients` where every device runs the program of one on its share of the samples.

    Left to XLA's partitioner, the convolutions that gradients of examples are made of gave other numbers over several
    devices, and nothing was said (JAX 0.10, 0.12).
    """
    axes, share = placement.axes_of(lie.spec), lie.shard_shape((samples,))[0]

    def own(*arguments: PyTree) -> Any:
        total, *others = one_device(share, None, *arguments)
        return jax.lax.psum(total, axes), *others

    cuts = jax.tree.map(lambda leaf: lie.spec if _is_example(leaf, samples) else PartitionSpec(), carry)
    in_specs, out_specs = (PartitionSpec(), cuts, lie.spec), (PartitionSpec(), lie.spec, lie.spec)
    mapped = jax.shard_map(
        own, mesh=lie.mesh, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes), check_vma=False
    )
    return mapped(params, carry, cotangent)


def _at_least_float32(leaf: jax.Array) -> jax.Array:
    narrow = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
    return leaf.astype(jnp.float32) if narrow else leaf
