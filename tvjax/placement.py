"""Where arrays lie: the inside of an operation is placed by the compiler, its results lie like its arguments.

A mesh has automatic axes, along which XLA places what is computed, or explicit ones (what `jax.make_mesh` gives), where
the sharding of an array is part of its type and an operation that leaves a choice, such as a reshape or a contraction
of two sharded axes, is refused. Here an operation whose arguments lie over explicit axes runs with these axes
automatic: on the same buffers, by the same programs. What it returns lies over the caller's mesh again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

PyTree = Any
F = TypeVar("F", bound=Callable[..., Any])
R = TypeVar("R")


def automatic(like: Callable[..., PyTree]) -> Callable[[F], F]:
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

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def placed(*args: Any, **kwargs: Any) -> Any:
            mesh = explicit_mesh((args, kwargs))
            if mesh is None:
                return function(*args, **kwargs)
            with _inside((args, kwargs), mesh):
                inner_args, inner_kwargs = as_automatic((args, kwargs))
                results = function(*inner_args, **inner_kwargs)
            return _back(results, like(*args, **kwargs), mesh)

        return cast(F, placed)

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
                f"arrays of one operation must lie over one mesh, found {name_of(found)} and {name_of(mesh)}: "
                "move one of them first (jax.device_put)"
            )
        found = mesh
    if found is None:
        context = jax.sharding.get_abstract_mesh()
        found = context if context.explicit_axes else None
    return found


def within(mesh: AbstractMesh | None) -> AbstractContextManager[Any]:
    """A context in which the explicit axes of a mesh are automatic."""
    return nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(automatic_mesh(mesh))


@functools.cache
def automatic_mesh(mesh: Any) -> Any:
    """The same mesh, concrete or abstract, its explicit axes automatic."""
    types = tuple(AxisType.Auto if kind == AxisType.Explicit else kind for kind in mesh.axis_types)
    if isinstance(mesh, Mesh):
        return Mesh(mesh.devices, mesh.axis_names, axis_types=types)
    return mesh.update_axis_types(dict(zip(mesh.axis_names, types, strict=True)))


def as_automatic(tree: PyTree) -> PyTree:
    """The arrays of a tree, and those that its iterators will give, with automatic axes; concrete ones are views.

    Traced arrays take part in what is computed `within` their mesh.
    """

    def view(leaf: Any) -> Any:
        if _is_iterator(leaf):
            return map(as_automatic, leaf)
        mesh = _mesh(leaf)
        if mesh is None or not mesh.explicit_axes:
            return leaf
        if isinstance(leaf, jax.core.Tracer):
            kept = [tuple(n for n in _names(entry) if n not in mesh.explicit_axes) for entry in _spec(leaf)]
            return jax.sharding.reshard(leaf, NamedSharding(automatic_mesh(mesh), PartitionSpec(*kept)))
        return jax.device_put(leaf, NamedSharding(automatic_mesh(leaf.sharding.mesh), leaf.sharding.spec))

    return jax.tree.map(view, tree, is_leaf=_is_iterator)


def like(x: jax.Array, leaf: Any) -> jax.Array:
    """An array, placed as another one lies; unchanged where that does not lie over a mesh.

    The axes of `leaf` are the last ones of the array; one of another length is spread as that of `leaf` where it can be
    divided so, else it is whole everywhere, as axes before them are.

    >>> like(jax.numpy.ones(2), jax.numpy.zeros(2)).tolist()
    [1.0, 1.0]
    """
    if isinstance(x, jax.core.Tracer):
        return x
    sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return x
    mesh, spec = sharding.mesh, [*[None] * (x.ndim - leaf.ndim), *_spec(leaf)] if x.ndim >= leaf.ndim else []
    for axis, entry in enumerate(spec):
        if x.shape[axis] % math.prod(mesh.shape[name] for name in _names(entry)):
            spec[axis] = None
    wanted = NamedSharding(mesh, PartitionSpec(*spec))
    return x if wanted.is_equivalent_to(x.sharding, x.ndim) else jax.device_put(x, wanted)


def on_one_device(turn: int, function: Callable[..., R], *args: Any) -> R:
    """``function(*args)``, on one device, chosen in turn, where its arguments are spread over several.

    For what is decomposed: one device does it once, and others can decompose other arrays at the same time. (A program
    that gathers and then decomposes does it on every device; on few CPU cores it can wait for itself for ever.) Arrays
    of which this process sees a part only are left spread, and so is all within `jit`.

    >>> on_one_device(3, jax.numpy.linalg.norm, jax.numpy.ones(4)).tolist()
    2.0
    """

    def gathered(leaf: Any) -> Any:
        if devices(leaf) == 1:
            return leaf
        order = sorted(leaf.sharding.device_set, key=lambda device: device.id)
        return jax.device_put(leaf, order[turn % len(order)])

    spread = [leaf for leaf in jax.tree.leaves(args) if devices(leaf) > 1]
    if not spread or _is_traced(args) or not all(leaf.is_fully_addressable for leaf in spread):
        return function(*args)
    with jax.set_mesh(None):  # the mesh of the user's context has more devices
        return function(*jax.tree.map(gathered, args))


def devices(leaf: Any) -> int:
    """Over how many devices a concrete array lies, 1 for all else.

    >>> devices(jax.numpy.ones(2)), devices(3)
    (1, 1)
    """
    concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
    return len(leaf.sharding.device_set) if concrete else 1


def axes_of(spec: PartitionSpec) -> list[str]:
    """The axes of a mesh that a partition names.

    >>> axes_of(PartitionSpec(("data", "fsdp"), None, "tensor"))
    ['data', 'fsdp', 'tensor']
    """
    return [name for entry in spec for name in _names(entry) if isinstance(name, str)]


def name_of(mesh: Mesh | AbstractMesh) -> str:
    """The axes of a mesh and their sizes, as messages have them.

    >>> name_of(jax.make_mesh((1,), ("data",)))
    '(data=1)'
    """
    return f"({', '.join(f'{name}={size}' for name, size in mesh.shape.items())})"


def _inside(arguments: PyTree, mesh: AbstractMesh) -> AbstractContextManager[Any]:
    """`within` a mesh where the context, or what is traced, says something else; arrays say it themselves."""
    return within(mesh) if _is_traced(arguments) or not jax.sharding.get_abstract_mesh().empty else nullcontext()


def spread(leaf: Any) -> NamedSharding | None:
    """How a concrete array is cut over a mesh of automatic axes; None where it is not, and of a traced one.

    >>> spread(jax.numpy.ones(2)) is None
    True
    """
    sharding = leaf.sharding if devices(leaf) > 1 else None
    if not isinstance(sharding, NamedSharding) or sharding.mesh.abstract_mesh.explicit_axes:
        return None
    return sharding if any(sharding.spec) else None


def _is_traced(tree: PyTree) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree, is_leaf=_is_iterator))


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


def _back(results: PyTree, patterns: PyTree, mesh: AbstractMesh) -> PyTree:
    """Results over the mesh with its explicit axes."""
    arrays = [(path, x) for path, x in jax.tree_util.tree_leaves_with_path(patterns) if _mesh(x) is not None]
    inside = {
        path for path, x in arrays if isinstance(x, jax.core.Tracer) and not jax.typeof(x).sharding.mesh.explicit_axes
    }
    same = {(path, x.shape): _spec(x) for path, x in arrays}
    first = {x.shape[0]: PartitionSpec(_spec(x)[0]) for _, x in reversed(arrays) if x.ndim}

    def place(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or path in inside:
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
