"""Learned coefficients as one safetensors file, and the state of their training as Orbax checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from tvjax.checkpoints.reader import open_tensors
from tvjax.checkpoints.safetensors import save_tensors
from tvjax.compose.coefficients import Coefficients, Layout, Place, Stacked
from tvjax.kinds import as_path
from tvjax.stages import PyTree

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

FORMAT = "tvjax coefficients 1"


def save_coefficients(
    path: str | os.PathLike[str], coefficients: Coefficients, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes coefficients as one safetensors file, replaced atomically; the layout stands in its metadata.

    Args:
      path: where to.
      coefficients: of `tvjax.compose.init` or `learn`.
      metadata: text to carry along, such as ``Pretrained.identity()`` of the base model.

    Raises:
      ValueError: where values are not finite.

    >>> import tempfile
    >>> from tvjax.compose import init
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_coefficients(f"{folder}/c.safetensors", init([{"w": jnp.ones(2)}]), {"base_model": "demo"})
    ...     loaded, metadata = load_coefficients(f"{folder}/c.safetensors")
    >>> loaded.layout.blocks, metadata
    (('w',), {'base_model': 'demo'})
    """
    layout = coefficients.layout
    description = {
        "vectors": layout.vectors,
        "blocks": layout.blocks,
        "places": layout.places,
        "partitions": layout.partitions,
        "seed": layout.seed,
    }
    about = {"format": FORMAT, "layout": json.dumps(description)}
    save_tensors(path, {"values": coefficients.values}, {**(metadata or {}), **about})


def load_coefficients(path: str | os.PathLike[str]) -> tuple[Coefficients, dict[str, str]]:
    """Reads what `save_coefficients` wrote.

    Returns:
      The coefficients, and the metadata that were given.

    Raises:
      ValueError: a file that is absent, corrupt, or holds no coefficients.
    """
    with open_tensors(path) as file:
        metadata = dict(file.metadata)
        if metadata.pop("format", None) != FORMAT:
            raise ValueError(f"{os.fspath(path)!r} holds no coefficients: make it with save_coefficients")
        values = jnp.asarray(file.read("values"))
    found = json.loads(metadata.pop("layout"))
    places = tuple(
        Place(leaf, block, tuple(vectors), *(_stacked(each) for each in stacked))
        for leaf, block, vectors, *stacked in found["places"]
    )
    layout = Layout(tuple(found["vectors"]), tuple(found["blocks"]), places, found["partitions"], tuple(found["seed"]))
    return Coefficients(values, layout), metadata


def _stacked(found: list[Any] | None) -> Stacked | None:
    return None if found is None else Stacked(found[0], found[1], tuple(found[2]))


class TrainingStore:
    """The state of a training in a folder, for ``tvjax.compose.learn(store=...)``.

    A state is complete before it replaces the one before, so a run that is killed goes on from the last whole epoch.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 1):
        """A store.

        Args:
          folder: made where it is absent.
          keep: how many states stay.
        """
        self.folder = as_path(folder, "the path of a folder").absolute()
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{os.fspath(folder)!r} is a file, expected the folder of a training's states")
        self.keep = keep

    def load(self, like: PyTree) -> PyTree | None:
        """The newest state, with the structure, dtypes and placement of `like`; None where there is none.

        Raises:
          ValueError: the state has another structure or other shapes.
        """
        import orbax.checkpoint as ocp

        with self._manager() as manager:
            step = manager.latest_step()
            if step is None:
                return None
            found = manager.item_metadata(step).tree
            expected = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
            difference = _difference(found, expected)
            if difference:
                raise ValueError(f"{str(self.folder)!r} holds the state of another training ({difference}): remove it")
            return manager.restore(step, args=ocp.args.StandardRestore(expected))

    def save(self, step: int, state: PyTree) -> None:
        """Writes a state, and removes the oldest beyond those to keep."""
        import orbax.checkpoint as ocp

        with self._manager() as manager:
            manager.save(step, args=ocp.args.StandardSave(state))

    def _manager(self) -> ocp.CheckpointManager:
        import orbax.checkpoint as ocp

        options = ocp.CheckpointManagerOptions(max_to_keep=self.keep, create=True, enable_async_checkpointing=False)
        return ocp.CheckpointManager(self.folder, options=options, item_handlers=ocp.StandardCheckpointHandler())


def _difference(found: Any, expected: PyTree) -> str:
    """How two trees of arrays differ, in a few words; empty where they do not."""
    shapes = [sorted(str(tuple(leaf.shape)) for leaf in jax.tree.leaves(item)) for item in (found, expected)]
    if shapes[0] == shapes[1]:
        return ""
    return f"{len(shapes[0])} arrays found and {len(shapes[1])} expected, or of other shapes"
