"""Paths, selection, norms and similarities of pytrees.

A *path* names one leaf: the keys on the way to it, joined by ``/`` (``vision/blocks/3/mlp/up/kernel``). It is the
same for a dict, a list, a dataclass, a Flax or an Equinox module, so trees of different make are matched by path.
``None`` is a childless node, as everywhere in JAX: a leaf that was not selected.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

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
    for key_path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = path_string(key_path)
        if path in flat:
            raise ValueError(f"two leaves share the path {path!r}: rename one of the keys that contain '/'")
        flat[path] = leaf
    return flat


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
    return jax.tree_util.tree_map_with_path(lambda kp, *leaves: function(path_string(kp), *leaves), tree, *rest)


def get(tree: PyTree, prefix: str) -> PyTree:
    """The subtree of nested dicts at a path prefix; ``""`` is the whole tree.

    >>> get({"a": {"b": 1}}, "a")
    {'b': 1}
    """
    node = tree
    for key in prefix.split("/") if prefix else ():
        if not isinstance(node, Mapping) or key not in node:
            raise ValueError(f"no subtree {prefix!r}: {key!r} is missing, found {sorted(node)[:8]}")
        node = node[key]
    return node


def put(tree: dict[str, Any], prefix: str, subtree: PyTree) -> PyTree:
    """A copy of nested dicts with the subtree at a path prefix; ``""`` replaces the whole tree.

    >>> put({"a": {"b": 1}}, "a/c", 2)
    {'a': {'b': 1, 'c': 2}}
    """
    if not prefix:
        return subtree
    first, _, rest = prefix.partition("/")
    return {**tree, first: put(tree.get(first, {}) if isinstance(tree, dict) else {}, rest, subtree)}
