"""Paths, selection, norms and similarities of pytrees.

A *path* names one leaf: the keys on the way to it, joined by ``/`` (``vision/blocks/3/mlp/up/kernel``). It is the
same for a dict, a list, a dataclass, a Flax or an Equinox module, so trees of different make are matched by path.
``None`` is a childless node, as everywhere in JAX: a leaf that was not selected. A `tvjax.LowRank` is one leaf.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tvjax import factors
from tvjax.factors import is_low_rank
from tvjax.kinds import kind_of
from tvjax.placement import automatic

PyTree = Any


def path_string(key_path: Sequence[Any]) -> str:
    """The path of a leaf as one string, its keys joined by ``/``."""
    return jax.tree_util.keystr(tuple(key_path), simple=True, separator="/")


def flatten(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by path, in the tree's own order.

    >>> flatten({"a": {"b": 1, "c": None}, "d": [2]})
    {'a/b': 1, 'd/0': 2}
    """
    flat: dict[str, Any] = {}
    for key_path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_low_rank)[0]:
        path = path_string(key_path)
        if path in flat:
            raise ValueError(f"two leaves share the path {path!r}: rename one of the keys that contain '/'")
        flat[path] = leaf
    return flat


def structure(tree: PyTree) -> Any:
    """The tree's structure, with one leaf for each path of `flatten`.

    >>> structure({"a": factors.LowRank(jnp.ones((2, 1)), jnp.ones((1, 2)))}).num_leaves
    1
    """
    return jax.tree.structure(tree, is_leaf=is_low_rank)


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict whose leaves have the given paths; the inverse of `flatten` for dicts with string keys.

    >>> nest({"a/b": 1, "d/0": 2})
    {'a': {'b': 1}, 'd': {'0': 2}}
    """
    root: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = root
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"the path {path!r} passes through a leaf at {key!r}")
        if last in node:
            raise ValueError(f"the path {path!r} is already taken by a subtree or another leaf")
        node[last] = leaf
    return root


def map_with_path(function: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """``jax.tree.map`` whose function gets the leaf's path first.

    >>> map_with_path(lambda path, x: f"{path}={x}", {"a": 1, "b": [2]})
    {'a': 'a=1', 'b': ['b/0=2']}
    """
    by_path = lambda key_path, *leaves: function(path_string(key_path), *leaves)  # noqa: E731
    return jax.tree_util.tree_map_with_path(by_path, tree, *rest, is_leaf=is_low_rank)


def get(tree: PyTree, prefix: str) -> PyTree:
    """The subtree at a path prefix; ``""`` is the whole tree.

    Any pytree: dicts, lists, modules and states of Flax and Equinox; a key may itself contain ``/``, as Haiku's do.

    >>> get({"a": {"b": 1}}, "a")
    {'b': 1}
    >>> get({"mlp/~/linear": [{"w": 1}]}, "mlp/~/linear/0")
    {'w': 1}
    """
    if not prefix:
        return tree
    children = _children(tree)
    for name, child in children.items():
        if prefix == name:
            return child
        if prefix.startswith(f"{name}/"):
            return get(child, prefix[len(name) + 1 :])
    raise ValueError(f"no subtree {prefix!r}: {prefix.split('/')[0]!r} is missing, found {sorted(children)[:8]}")


def _children(node: PyTree) -> dict[str, PyTree]:
    """What a node of a tree holds, by the name of its key."""
    if isinstance(node, Mapping):
        return {str(key): child for key, child in node.items()}
    below = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
    return {path_string(key_path): child for key_path, child in below if key_path}


def put(tree: dict[str, Any], prefix: str, subtree: PyTree) -> PyTree:
    """A copy of nested dicts with the subtree at a path prefix; ``""`` replaces the whole tree.

    >>> put({"a": {"b": 1}}, "a/c", 2)
    {'a': {'b': 1, 'c': 2}}
    """
    if not prefix:
        return subtree
    first, _, rest = prefix.partition("/")
    return {**tree, first: put(tree.get(first, {}) if isinstance(tree, dict) else {}, rest, subtree)}


def select(tree: PyTree, include: str | Sequence[str], exclude: str | Sequence[str] = ()) -> PyTree:
    """The tree with only the leaves whose paths match; the others are None.

    A pattern is matched against the whole path and against each of its prefixes, so ``vision/blocks/3`` selects all of
    that block. ``*`` and ``?`` stay within one key, ``**`` spans any number of keys (none included), ``[03]`` is one
    of these characters.

    Args:
      tree: any pytree.
      include: a pattern or several; a leaf is selected if one of them matches.
      exclude: a pattern or several; a leaf that one of them matches is not selected.

    Returns:
      A tree of the same structure but for the Nones.

    Raises:
      ValueError: a pattern that matches no leaf; the message names the nearest paths.

    >>> select({"a": {"kernel": 1, "bias": 2}, "b": {"kernel": 3}}, "**/kernel")
    {'a': {'bias': None, 'kernel': 1}, 'b': {'kernel': 3}}
    >>> select({"a": {"kernel": 1, "bias": 2}, "b": {"kernel": 3}}, "a", exclude="*/bias")
    {'a': {'bias': None, 'kernel': 1}, 'b': {'kernel': None}}
    """
    paths = list(flatten(tree))
    kept, dropped = (
        {path for pattern in ([patterns] if isinstance(patterns, str) else patterns) for path in match(paths, pattern)}
        for patterns in (include, exclude)
    )
    return map_with_path(lambda path, leaf: leaf if path in kept - dropped else None, tree)


def replace(tree: PyTree, leaves: Mapping[str, Any]) -> PyTree:
    """The tree with other leaves at some paths; paths that it does not have are passed over.

    >>> replace({"up": {"kernel": 1, "bias": 2}}, {"up/bias": 5})
    {'up': {'bias': 5, 'kernel': 1}}
    """
    return map_with_path(lambda path, leaf: leaves.get(path, leaf), tree)


def match(paths: Sequence[str], pattern: str) -> list[str]:
    """The paths that a pattern selects, in their order; the rules are those of `select`.

    Raises:
      ValueError: it selects none; the message names the nearest paths.

    >>> match(["blocks/0/up/kernel", "blocks/0/up/bias", "blocks/10/up/bias"], "blocks/?/**/bias")
    ['blocks/0/up/bias']
    """
    expression = re.compile(_expression(pattern.split("/")) + "(/.*)?", re.DOTALL)
    found = [path for path in paths if expression.fullmatch(path)]
    if not found:
        near = difflib.get_close_matches(pattern, _with_prefixes(paths), n=3, cutoff=0.3) or list(paths[:3])
        raise ValueError(
            f"the pattern {pattern!r} matches none of {len(paths)} paths; nearest: {', '.join(map(repr, near))}. "
            "'*' stays within one key, '**' spans several"
        )
    return found


def stems(paths: Sequence[str], pattern: str) -> dict[str, str]:
    """For each path that a pattern selects, the shortest part of it, from the left, that the pattern matches.

    Raises:
      ValueError: it selects none, as `match`.

    >>> stems(["text/blocks/up", "vision/blocks/up", "scale"], "*/blocks")
    {'text/blocks/up': 'text/blocks', 'vision/blocks/up': 'vision/blocks'}
    """
    if not pattern:
        return dict.fromkeys(paths, "")
    expression = re.compile(_expression(pattern.split("/")), re.DOTALL)
    found = {}
    for path in match(paths, pattern):
        ends = [place.start() for place in re.finditer("/", path)] + [len(path)]
        found[path] = next(path[:end] for end in ends if expression.fullmatch(path[:end]))
    return found


def _expression(keys: Sequence[str]) -> str:
    """The regular expression of a glob pattern, its keys given."""
    expression = ""
    for position, key in enumerate(keys):
        last = position == len(keys) - 1
        if key == "**":
            expression += ".*" if last else "(?:[^/]+/)*"
        else:
            parts = re.split(r"(\*|\?|\[[^\]]+\])", key)
            wild = {"*": "[^/]*", "?": "[^/]"}
            expression += "".join(
                part if part.startswith("[") and part.endswith("]") else wild.get(part, re.escape(part))
                for part in parts
            )
            expression += "" if last else "/"
    return expression


def _with_prefixes(paths: Sequence[str]) -> list[str]:
    prefixes = {path.rsplit("/", n)[0]: None for path in paths for n in range(path.count("/") + 1)}
    return list(prefixes)


@automatic(lambda *_: ())
def norm(tree: PyTree) -> jax.Array:
    """The Euclidean norm of all leaves together, a float32 scalar (float64 if a leaf is).

    >>> import jax.numpy as jnp
    >>> float(norm({"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}))
    5.0
    """
    cores = jax.tree.map(lambda leaf: factors.core(leaf) if is_low_rank(leaf) else leaf, tree, is_leaf=is_low_rank)
    leaves = jax.tree.leaves(cores)
    wide = _common_dtype(leaves)
    return jnp.sqrt(sum((_sum_of_squares(jnp.asarray(leaf), wide) for leaf in leaves), jnp.zeros((), wide)))


@automatic(lambda *_: ())
def dot(a: PyTree, b: PyTree) -> jax.Array:
    """The inner product of two trees of one structure, a float32 scalar (float64 if a leaf is).

    Raises:
      ValueError: the structures or the shapes differ.

    >>> import jax.numpy as jnp
    >>> float(dot({"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([3.0, 4.0])}))
    11.0
    """
    _check_alike(a, b)
    pairs = list(zip(*(flatten(side).values() for side in (a, b)), strict=True))
    low = [pair for pair in pairs if any(map(is_low_rank, pair))]
    if not low:
        return optax.tree.vdot(_wide(a), _wide(b))
    x, y = ([pair[side] for pair in pairs if not any(map(is_low_rank, pair))] for side in (0, 1))
    return optax.tree.vdot(_wide(x), _wide(y)) + sum(factors.dot(*pair) for pair in low)


def cosine(a: PyTree, b: PyTree) -> jax.Array:
    """The cosine between two trees of one structure, a scalar in [-1, 1]; 0 where one of them is zero.

    Raises:
      ValueError: the structures or the shapes differ.

    >>> import jax.numpy as jnp
    >>> float(cosine({"a": jnp.array([1.0, 0.0])}, {"a": jnp.array([-2.0, 0.0])}))
    -1.0
    """
    norms = norm(a) * norm(b)
    zero = norms == 0  # NaN is not, and is seen in the result
    return jnp.where(zero, 0, dot(a, b) / jnp.where(zero, 1, norms))


@automatic(lambda *_: ())
def sign_agreement(a: PyTree, b: PyTree) -> jax.Array:
    """The share of the entries, among those where neither tree is zero, at which the signs are the same; 0 of none.

    Raises:
      ValueError: the structures or the shapes differ.

    >>> import jax.numpy as jnp
    >>> float(sign_agreement({"a": jnp.array([1.0, -2.0, 0.0])}, {"a": jnp.array([5.0, 3.0, 1.0])}))
    0.5
    """
    _check_alike(a, b)
    signs = jax.tree.map(lambda x, y: jnp.sign(x) * jnp.sign(y), _wide(a), _wide(b))
    # Each leaf is counted in integers: float32 would stop counting at 2^24.
    agreeing = sum((jnp.sum(s > 0).astype(jnp.float32) for s in jax.tree.leaves(signs)), jnp.float32(0))
    compared = sum((jnp.sum(s != 0).astype(jnp.float32) for s in jax.tree.leaves(signs)), jnp.float32(0))
    broken = sum((jnp.sum(s * 0) for s in jax.tree.leaves(signs)), jnp.float32(0))  # NaN where a sign is, else 0
    return jnp.where(compared > 0, agreeing / jnp.where(compared > 0, compared, 1), 0) + broken


def by_leaf(function: Callable[..., Any], *trees: PyTree) -> dict[str, Any]:
    """``function(leaf, ...)`` for each leaf of trees of one structure, by path.

    Raises:
      ValueError: the structures or the shapes differ.

    >>> import jax.numpy as jnp
    >>> x = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([1.0])}
    >>> {path: float(value) for path, value in by_leaf(norm, x).items()}
    {'a': 5.0, 'b': 1.0}
    >>> {path: float(value) for path, value in by_leaf(dot, x, x).items()}
    {'a': 25.0, 'b': 1.0}
    """
    _check_alike(*trees)
    leaves = zip(*(flatten(tree).values() for tree in trees), strict=True)
    return {path: function(*parts) for path, parts in zip(flatten(trees[0]), leaves, strict=True)}


def wide_dtype(dtype: Any) -> jnp.dtype:
    """The dtype that differences and sums are taken in: float64 for float64, float32 for everything else.

    >>> wide_dtype("bfloat16").name
    'float32'
    """
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def leaf_type(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array or a Python scalar, without computing.

    >>> leaf_type(1.0).dtype.name
    'float32'
    """
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))
    if not isinstance(leaf, int | float | complex | list | tuple) and not hasattr(leaf, "__jax_array__"):
        instead = ": give its .params" if hasattr(leaf, "params") else ""  # a model, as tvjax.load gives one
        raise ValueError(f"found {kind_of(leaf)} where an array is expected{instead}")
    return jax.eval_shape(jnp.asarray, leaf)


def check_whole(tree: PyTree) -> None:
    """Raises a ValueError where what is meant to be a tree is one thing that is no array, such as a whole model.

    >>> check_whole({"kernel": 1.0})
    >>> check_whole("kernel")
    Traceback (most recent call last):
    ...
    ValueError: found a str where an array is expected
    """
    flat = flatten(tree)
    if flat.keys() == {""}:
        leaf_type(flat[""])


def nbytes(tree: PyTree) -> int:
    """Bytes of all leaves, arrays or their shapes.

    >>> nbytes({"a": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)})
    12
    """
    return sum(math.prod(jnp.shape(leaf)) * jnp.result_type(leaf).itemsize for leaf in jax.tree.leaves(tree))


def check_arrays(tree: PyTree) -> None:
    """Raises a ValueError unless every leaf is an array or a number.

    >>> check_arrays({"kernel": 1.0, "activation": abs})
    Traceback (most recent call last):
    ...
    ValueError: the leaf 'activation' is a builtin_function_or_method and no array: split off what is static first, such
    as params, static = equinox.partition(model, equinox.is_array), and put it back inside the function
    """
    for path, leaf in flatten(tree).items():
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")) and not isinstance(leaf, int | float | complex):
            raise ValueError(
                f"the leaf {path!r} is {kind_of(leaf)} and no array: split off what is static first, such as "
                "params, static = equinox.partition(model, equinox.is_array), and put it back inside the function"
            )


def is_traced(tree: PyTree) -> bool:
    """Whether a leaf has no value yet, within `jax.jit` or `jax.eval_shape`.

    >>> is_traced({"a": 1.0})
    False
    """
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def list_some(entries: Sequence[str], limit: int = 8) -> str:
    """The entries of a message, one a line, the rest counted.

    >>> print(list_some(["a", "b", "c"], limit=2))
      a
      b
      and 1 more
    """
    rest = [f"and {len(entries) - limit} more"] if len(entries) > limit else []
    return "\n".join(f"  {entry}" for entry in [*entries[:limit], *rest])


def _wide(tree: PyTree) -> PyTree:
    """Every leaf in its `wide_dtype`, one dtype for the whole tree."""
    dtype = _common_dtype(flatten(tree).values())
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree, is_leaf=is_low_rank)


def _common_dtype(leaves: Iterable[Any]) -> Any:
    """The widest `wide_dtype` of some leaves."""
    dtypes = [wide_dtype(leaf_type(leaf).dtype) for leaf in leaves]
    return jnp.float64 if jnp.float64 in dtypes else jnp.float32


@partial(jax.jit, static_argnums=1)
def _sum_of_squares(leaf: jax.Array, dtype: Any) -> jax.Array:
    """One program for each shape, one leaf in memory at a time."""
    return jnp.sum(jnp.square(jnp.abs(leaf).astype(dtype)))


def _check_alike(*trees: PyTree) -> None:
    """Raise unless all trees have the paths and the shapes of the first."""
    first, *rest = ({path: leaf_type(leaf).shape for path, leaf in flatten(tree).items()} for tree in trees)
    for shapes in rest:
        different = [
            f"{path}: {first.get(path, 'missing')} and {shapes.get(path, 'missing')}"
            for path in {**first, **shapes}
            if first.get(path) != shapes.get(path)
        ]
        if different:
            raise ValueError(
                "the trees must have the same paths and shapes, found\n"
                f"{list_some(different)}\nselect the common leaves first (tvjax.tree.select)"
            )
