"""Where arrays lie: the inside of an operation is placed by the compiler, its results lie like its arguments.

A mesh has automatic axes, along which XLA places what is computed, or explicit ones (what `jax.make_mesh` gives), where
the sharding of an array is part of its type and an operation that leaves a choice, such as a reshape or a contraction
of two sharded axes, is refused. Here an operation whose arguments lie over explicit axes runs with these axes
automatic: on the same buffers, by the same programs. What it returns lies over the caller's mesh again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

PyTree = Any
P = ParamSpec("P")
R = TypeVar("R")


def automatic(like: Callable[P, PyTree]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: explicit axes are automatic inside of the function, and its results lie like arguments of it.

    An array of the result lies like the array of ``like(*args)`` that has its path and shape; else its first axis lies
    like a first axis there of the same length (the examples'); else it stays as it was computed, or lies on every
    device when it is traced. Arguments without explicit axes are left as they are.

    Args:
      like: takes what the function takes, returns the pytree that results are like.

    >>> double = automatic(lambda x: x)(lambda x: 2 * x)
    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> x = jax.device_put(jax.numpy.ones(4), NamedSharding(mesh, PartitionSpec("data")))
    >>> double(x).sharding == x.sharding
    True
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def placed(*args: P.args, **kwargs: P.kwargs) -> R:
            mesh = explicit_mesh((args, kwargs))
            if mesh is None:
                return function(*args, **kwargs)
            with within(mesh):
                inner_args, inner_kwargs = _to_automatic((args, kwargs))
                results = function(*inner_args, **inner_kwargs)
            return _back(results, like(*args, **kwargs), mesh)

        return placed

    return decorate


def explicit_mesh(tree: PyTree) -> AbstractMesh | None:
    """The mesh with explicit axes that arrays of a tree lie over, or that the context has; None without one.

    Raises:
      ValueError: arrays of two such meshes.

    >>> explicit_mesh({"a": jax.numpy.ones(2)}) is None
    True
    """
    found: AbstractMesh | None = None
    for leaf in jax.tree.leaves(tree, is_leaf=_is_iterator):
        mesh = _mesh(leaf)
        if mesh is None or not mesh.explicit_axes:
            continue
        if found is not None and mesh != found:
            raise ValueError(
                f"arrays of one operation must lie over one mesh, found {_axes(found)} and {_axes(mesh)}: "
                "move one of them first (jax.device_put)"
            )
        found = mesh
    if found is None:
        context = jax.sharding.get_abstract_mesh()
        found = context if context.explicit_axes else None
    return found


def within(mesh: AbstractMesh | None) -> AbstractContextManager[Any]:
    """A context in which the explicit axes of a mesh are automatic."""
    return nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(_automatic(mesh))


def like(x: jax.Array, leaf: Any) -> jax.Array:
    """An array, placed as another one of its shape lies; unchanged where that is no array over a mesh.

    >>> like(jax.numpy.ones(2), jax.numpy.zeros(2)).tolist()
    [1.0, 1.0]
    """
    if isinstance(x, jax.core.Tracer) or isinstance(leaf, jax.core.Tracer):
        sharding = None if _mesh(leaf) is None else jax.typeof(leaf).sharding
        return jax.sharding.reshard(x, sharding) if sharding is not None and sharding.mesh.explicit_axes else x
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.is_equivalent_to(x.sharding, x.ndim):
        return x
    return jax.device_put(x, sharding)


def on_one_device(tree: PyTree, turn: int) -> PyTree:
    """Arrays that are spread over devices, gathered to one of them, chosen in turn; others stay where they are.

    For what is decomposed: one device does it once, and others can decompose other arrays at the same time. (A program
    that gathers and then decomposes does it on every device; on few CPU cores it can wait for itself for ever.) Arrays
    of which this process sees a part only are left spread.

    >>> on_one_device({"a": jax.numpy.ones(2)}, 3)["a"].tolist()
    [1.0, 1.0]
    """

    def gathered(leaf: Any) -> Any:
        if not is_spread(leaf) or not leaf.is_fully_addressable:
            return leaf
        devices = sorted(leaf.sharding.device_set, key=lambda device: device.id)
        return jax.device_put(leaf, devices[turn % len(devices)])

    return jax.tree.map(gathered, tree)


def is_spread(leaf: Any) -> bool:
    """Whether a concrete array lies over several devices.

    >>> is_spread(jax.numpy.ones(2))
    False
    """
    concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
    return concrete and len(leaf.sharding.device_set) > 1


def _is_iterator(leaf: Any) -> bool:
    return isinstance(leaf, Iterator)


def _mesh(leaf: Any) -> AbstractMesh | None:
    """The mesh in the type of an array, or of a shape that says how an array is to lie."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.sharding.mesh.abstract_mesh if isinstance(leaf.sharding, NamedSharding) else None
    if not isinstance(leaf, jax.Array):
        return None
    mesh = jax.typeof(leaf).sharding.mesh
    return None if mesh.empty else mesh


def _axes(mesh: AbstractMesh) -> str:
    return ", ".join(f"{name}: {size}" for name, size in mesh.shape.items())


def _automatic(mesh: Any) -> Any:
    """The same mesh, concrete or abstract, its explicit axes automatic."""
    types = tuple(AxisType.Auto if kind == AxisType.Explicit else kind for kind in mesh.axis_types)
    if isinstance(mesh, Mesh):
        return Mesh(mesh.devices, mesh.axis_names, axis_types=types)
    return mesh.update_axis_types(dict(zip(mesh.axis_names, types, strict=True)))


def _to_automatic(tree: PyTree) -> PyTree:
    """The arrays of a tree, and those that its iterators will give, with automatic axes; concrete ones are views."""

    def view(leaf: Any) -> Any:
        if _is_iterator(leaf):
            return map(_to_automatic, leaf)
        mesh = _mesh(leaf)
        if mesh is None or not mesh.explicit_axes:
            return leaf
        if isinstance(leaf, jax.core.Tracer):
            kept = [tuple(n for n in _names(entry) if n not in mesh.explicit_axes) for entry in _spec(leaf)]
            return jax.sharding.reshard(leaf, NamedSharding(_automatic(mesh), PartitionSpec(*kept)))
        return jax.device_put(leaf, NamedSharding(_automatic(leaf.sharding.mesh), leaf.sharding.spec))

    return jax.tree.map(view, tree, is_leaf=_is_iterator)


def _back(results: PyTree, patterns: PyTree, mesh: AbstractMesh) -> PyTree:
    """Results over the mesh with its explicit axes."""
    arrays = [(path, x) for path, x in jax.tree_util.tree_leaves_with_path(patterns) if _mesh(x) is not None]
    same = {(path, x.shape): _spec(x) for path, x in arrays}
    first = {x.shape[0]: PartitionSpec(_spec(x)[0]) for _, x in reversed(arrays) if x.ndim}

    def place(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        own = leaf.sharding if not isinstance(leaf, jax.core.Tracer) else None
        if own is not None and not isinstance(own, NamedSharding):
            return leaf
        spec = same.get((path, leaf.shape)) or first.get(leaf.shape[0] if leaf.ndim else None)
        if own is None:
            return jax.sharding.reshard(leaf, NamedSharding(mesh, PartitionSpec() if spec is None else spec))
        explicit = Mesh(own.mesh.devices, own.mesh.axis_names, axis_types=mesh.axis_types)
        return jax.device_put(leaf, NamedSharding(explicit, own.spec if spec is None else spec))

    return jax.tree_util.tree_map_with_path(place, results)


def _spec(array: jax.Array | jax.ShapeDtypeStruct) -> PartitionSpec:
    """One entry an axis, from the type or, where that says nothing, the placement of an array."""
    own = None if isinstance(array, jax.core.Tracer) else array.sharding
    spec = own.spec if isinstance(own, NamedSharding) else jax.typeof(array).sharding.spec
    return PartitionSpec(*spec, *[None] * (array.ndim - len(spec)))


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)
