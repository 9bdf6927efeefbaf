"""How coefficients are laid out: which block of them each leaf, or each layer of a stacked leaf, belongs to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from tvjax import tree
from tvjax.layers import layer_path

Blocks = Literal["leaf", "vector"] | Mapping[str, str] | Callable[[str], str]


class Stacked(NamedTuple):
    """How a leaf holds a parameter of several layers.

    Attributes:
      stem: path of the stack.
      axis: of the layers.
      blocks: index of the block of each layer.
    """

    stem: str
    axis: int
    blocks: tuple[int, ...]


class Place(NamedTuple):
    """Where the coefficients of one leaf stand.

    Attributes:
      path: of the leaf.
      block: index of its block, of its first layer's where it is stacked; None for a leaf that takes no part, and stays
        as in the base model.
      vectors: indices of the task vectors that cover it.
      stacked: of a leaf with a coefficient for each layer.
    """

    path: str
    block: int | None
    vectors: tuple[int, ...]
    stacked: Stacked | None = None

    @property
    def blocks(self) -> dict[str, int]:
        """Indices of its blocks by path: its own, or those of its layers; none where it takes no part."""
        if self.stacked is not None:
            stem = self.stacked.stem
            return {layer_path(stem, self.path, n): block for n, block in enumerate(self.stacked.blocks)}
        return {} if self.block is None else {self.path: self.block}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which coefficient belongs to which entries of which task vector.

    Attributes:
      vectors: names of the task vectors.
      blocks: names of the blocks.
      places: one for each leaf that a task vector covers.
      partitions: K; 1: a block has one coefficient for each vector.
      seed: of the random parts.
    """

    vectors: tuple[str, ...]
    blocks: tuple[str, ...]
    places: tuple[Place, ...]
    partitions: int = 1
    seed: tuple[int, ...] = ()


def stems_of(shapes: Mapping[str, tuple[int, ...]], stacks: str | Sequence[str], axis: int) -> dict[str, str]:
    """The stack of each leaf that stands in one."""
    patterns = [stacks] if isinstance(stacks, str) else stacks
    stems = {path: stem for pattern in patterns for path, stem in tree.stems(list(shapes), pattern).items()}
    flat = [f"{path}: {shapes[path]}" for path in stems if not -len(shapes[path]) <= axis < len(shapes[path])]
    if flat:
        raise ValueError(
            f"stacks: {len(flat)} leaves have no layer axis {axis}:\n{tree.list_some(flat)}\n"
            "name the subtrees whose leaves are all stacked over layers, and their axis"
        )
    return stems


def layer_paths(path: str, shape: tuple[int, ...], stem: str | None, axis: int) -> list[str]:
    """The path of a leaf, or those of its layers."""
    return [path] if stem is None else [layer_path(stem, path, number) for number in range(shape[axis])]


def group_names(blocks: Blocks, paths: Sequence[str]) -> dict[str, str]:
    """The name of the block of each leaf."""
    if isinstance(blocks, Mapping):
        groups = {path: group for pattern, group in blocks.items() for path in tree.match(paths, pattern)}
        left = [path for path in paths if path not in groups]
        if left:
            raise ValueError(
                f"blocks: no pattern of {list(blocks)} matches {len(left)} leaves:\n{tree.list_some(left)}\n"
                "put one for all leaves first: {'**': 'rest', ...}"
            )
        return {path: groups[path] for path in paths}
    if callable(blocks):
        return {path: blocks(path) for path in paths}
    if blocks == "leaf":
        return {path: path for path in paths}
    if blocks == "vector":
        return dict.fromkeys(paths, "all")
    raise ValueError(f"blocks: found {blocks!r}, expected 'leaf', 'vector', a mapping from patterns, or a function")
