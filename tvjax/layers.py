"""Stacks of layers, as `nn.scan` and `nnx.scan` keep them: taken apart into layers, and put together again.

Where a model is scanned over its layers, one array holds a parameter of all of them. Merging, coefficients and weights
by depth act on the parameters of one layer: `unstack` gives them, `stack` gives the tree of the model back. A transport
walks stage by stage: `unstack` of a model gives a stage for each layer of a stage that is `scanned`, so that stacks of
unlike depth are paired layer by layer and no more than one layer of either is in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tvjax import tree
from tvjax.kinds import kind_of
from tvjax.stages import Model

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Scanned:
    """The function of a stage whose parameters are stacked over layers; see `scanned`."""

    layer: Callable[[PyTree, PyTree], PyTree]
    axis: int = 0

    def __call__(self, params: PyTree, carry: PyTree) -> PyTree:
        """Runs the layers in order."""
        first = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, self.axis, 0), params)
        return jax.lax.scan(lambda carry, params: (self.layer(params, carry), None), carry, first)[0]


def scanned(layer: Callable[[PyTree, PyTree], PyTree], axis: int = 0) -> Scanned:
    """The function of a stage that runs a stack of layers, ``carry = layer(params of layer i, carry)`` for each i.

    The model runs on its own tree, and `unstack` takes the stage apart into one for each layer.

    Args:
      layer: pure ``(params, carry) -> carry``, of one element of the stack; that may be a block of several unlike
        layers (local and global attention), which stay together as one stage.
      axis: the layer axis of every leaf.

    >>> from tvjax import Stage
    >>> layer = lambda params, x: jnp.tanh(x @ params["kernel"])
    >>> stage = Stage("blocks", scanned(layer, axis=1), (("", "decoder/layers"),))
    >>> model = Model({"decoder": {"layers": {"kernel": jnp.ones((4, 3, 4))}}}, (stage,))
    >>> [stage.name for stage in unstack(model, "decoder/layers", axis=1).stages]
    ['blocks/0', 'blocks/1', 'blocks/2']
    """
    return Scanned(layer, axis)


def unstack(params: PyTree, stacks: str | Sequence[str], axis: int = 0) -> PyTree:
    """Takes stacks apart: the subtree at ``blocks`` becomes ``blocks/0``, ``blocks/1``, ..., one for each layer.

    Pure, the inverse of `stack`, and at home inside `jit`; NumPy arrays and memory maps are not copied.

    Args:
      params: any pytree: parameters, a task vector, gradients; None leaves (not selected) stay None. Or a
        `tvjax.Model`, whose stages that are `scanned` over these stacks become one for each layer, a group for depth
        pairing; what is fitted on it is of the unstacked parameters, and `stack` brings it into the model's own tree.
      stacks: paths of the stacked subtrees, or patterns of them (those of `tvjax.tree.select`); one inside another is
        taken apart by a second call, ``unstack(unstack(params, "groups"), "groups/*/layers")``.
      axis: the layer axis of every leaf in them.

    Returns:
      The same tree with a dict of layers, ``"0"``, ``"1"``, ..., in the place of each stack.

    Raises:
      ValueError: a pattern that matches nothing, a leaf without such an axis, leaves of unlike numbers of layers, or a
        stage that reads a stack as a whole and is not `scanned`.

    >>> params = {"blocks": {"kernel": jnp.ones((2, 3, 4)), "scale": jnp.ones((2, 3))}, "head": jnp.ones(4)}
    >>> {path: leaf.shape for path, leaf in tree.flatten(unstack(params, "blocks")).items()}
    {'blocks/0/kernel': (3, 4), 'blocks/0/scale': (3,), 'blocks/1/kernel': (3, 4), 'blocks/1/scale': (3,), 'head': (4,)}
    """
    if isinstance(params, Model):
        return _unstacked_model(params, stacks, axis)
    return _at_stacks(params, stacks, lambda stem, subtree: _layers(stem, subtree, axis))


def stack(params: PyTree, stacks: str | Sequence[str], axis: int = 0) -> PyTree:
    """Puts layers together: ``blocks/0``, ``blocks/1``, ... become one subtree ``blocks`` of stacked leaves.

    Pure, the inverse of `unstack`.

    Args:
      params: any pytree.
      stacks: paths, or patterns of paths, whose children are the layers: a dict with the keys 0, 1, ... or a sequence.
      axis: where the layer axis is to be.

    Returns:
      The same tree with the stacked leaves in the place of each dict of layers.

    Raises:
      ValueError: a pattern that matches nothing, children that are no layers 0, 1, ..., or layers that differ in
        structure, shape or dtype.

    >>> layers = {"blocks": {"0": {"kernel": jnp.zeros((3, 4))}, "1": {"kernel": jnp.ones((3, 4))}}}
    >>> stack(layers, "blocks", axis=1)["blocks"]["kernel"].shape
    (3, 2, 4)
    """
    return _at_stacks(params, stacks, lambda stem, layers: _stacked(stem, layers, axis))


def layer_path(stem: str, path: str, layer: int) -> str:
    """The path of a layer of a stacked leaf, as `unstack` has it.

    >>> layer_path("blocks", "blocks/up/kernel", 3), layer_path("", "kernel", 0)
    ('blocks/3/up/kernel', '0/kernel')
    """
    return "/".join(filter(None, (stem, str(layer), path[len(stem) :].strip("/"))))


def _unstacked_model(model: Model, stacks: str | Sequence[str], axis: int) -> Model:
    params, stages = unstack(model.params, stacks, axis), []
    stems = _stems(model.params, stacks)
    for stage in model.stages:
        read = sorted(stem for stem in stems for _, path in stage.paths if _overlap(stem, path))
        if not read:
            stages.append(stage)
            continue
        function, (stem, *_) = stage.function, read
        if not isinstance(function, Scanned) or stage.paths != (("", stem),) or function.axis != axis:
            how = (
                f"scans axis {function.axis} of"
                if isinstance(function, Scanned)
                else "reads, in a function of its own,"
            )
            raise ValueError(
                f"stage {stage.name!r} {how} {[path for _, path in stage.paths]}, and cannot be taken apart over axis "
                f"{axis} of {stem!r}: give it the function of one layer, Stage({stage.name!r}, tvjax.scanned(layer, "
                f"axis={axis}), (('', {stem!r}),))"
            )
        stages += [
            dataclasses.replace(
                stage,
                name=f"{stage.name}/{number}",
                function=function.layer,
                paths=(("", layer_path(stem, stem, number)),),
                group=stage.group or stage.name,
            )
            for number in range(len(tree.get(params, stem)))
        ]
    return model.replace(params=params, stages=tuple(stages))


def _overlap(one: str, two: str) -> bool:
    """Whether of two paths of subtrees one lies in the other."""
    shorter, longer = sorted((one, two), key=len)
    return not shorter or f"{longer}/".startswith(f"{shorter}/")


def _stems(params: PyTree, stacks: str | Sequence[str]) -> set[str]:
    """The paths of the stacks that the patterns name."""
    found, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_none)
    stems: set[str] = set()
    for pattern in [stacks] if isinstance(stacks, str) else stacks:
        stems |= set(tree.stems([tree.path_string(keys) for keys, _ in found], pattern).values())
    return stems


def _at_stacks(params: PyTree, stacks: str | Sequence[str], change: Any) -> PyTree:
    """The tree with each subtree that a pattern names, itself or a part of its path, changed."""
    tree.check_whole(params)
    stems = _stems(params, stacks)

    def is_stack(keys: Any, node: Any) -> bool:
        return tree.path_string(keys) in stems or node is None

    return jax.tree_util.tree_map_with_path(
        lambda keys, node: change(tree.path_string(keys), node) if tree.path_string(keys) in stems else node,
        params,
        is_leaf=is_stack,
        is_leaf_takes_path=True,
    )


def _layers(stem: str, subtree: PyTree, axis: int) -> dict[str, PyTree]:
    shapes = {path: tree.leaf_type(leaf).shape for path, leaf in tree.flatten(subtree).items()}
    where = f"the stack {stem!r}"
    flat = [f"{path or stem}: {shape}" for path, shape in shapes.items() if not -len(shape) <= axis < len(shape)]
    if flat:
        raise ValueError(
            f"{where}: {len(flat)} leaves have no axis {axis}:\n{tree.list_some(flat)}\n"
            "name the subtree whose leaves are all stacked over layers, and the layer axis"
        )
    lengths = {shape[axis] for shape in shapes.values()}
    if len(lengths) != 1:
        some = [f"{path or stem}: {shape}" for path, shape in shapes.items()]
        raise ValueError(
            f"{where}: its leaves must have one number of layers at axis {axis}, found {sorted(lengths)}:\n"
            f"{tree.list_some(some)}\nname the subtree whose leaves are all stacked over layers, and the layer axis"
        )

    def layer(number: int) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[(slice(None),) * (axis % jnp.ndim(leaf)) + (number,)], subtree)

    return {str(number): layer(number) for number in range(lengths.pop())}


def _stacked(stem: str, layers: PyTree, axis: int) -> PyTree:
    found = list(layers.items()) if isinstance(layers, Mapping) else None
    if found is None and isinstance(layers, Sequence) and not isinstance(layers, str):
        found = list(enumerate(layers))
    by_number = {str(key): layer for key, layer in found or ()}
    numbers = [str(number) for number in range(len(by_number))]
    if not by_number or by_number.keys() != set(numbers):
        seen = sorted(by_number)[:8] if found else kind_of(layers)
        raise ValueError(f"{stem!r} holds no layers: expected the keys 0, 1, ..., found {seen}")
    first, *rest = (by_number[number] for number in numbers)
    for number, other in enumerate(rest, start=1):
        one, two = ({p: tree.leaf_type(x) for p, x in tree.flatten(layer).items()} for layer in (first, other))
        different = [
            f"{path}: {one.get(path, 'missing')} and {two.get(path, 'missing')}"
            for path in {**one, **two}
            if one.get(path) != two.get(path)
        ]
        structures: list[Any] = [jax.tree.structure(layer) for layer in (first, other)]
        if not different and structures[0] != structures[1]:
            different = [f"{structures[0]} and {structures[1]}"]
        if different:
            raise ValueError(
                f"the layers {stem}/0 and {stem}/{number} cannot be stacked, they differ:\n{tree.list_some(different)}"
            )

    def joined(*leaves: Any) -> Any:
        on_host = all(isinstance(leaf, np.ndarray | np.generic) for leaf in leaves)
        return (np.stack if on_host else jnp.stack)(leaves, axis=axis)

    return jax.tree.map(joined, first, *rest)


def _is_none(node: Any) -> bool:
    return node is None
