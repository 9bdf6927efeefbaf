"""Models as Orbax directories: sharded state that is read straight to where an abstract tree says.

A folder of ours holds ``config.json``, the processors, and the parameters as an Orbax directory ``params``. What a
training run wrote is read too, given the config and where in its state the parameters are: plain trees, states of NNX
(``nnx.state``, ``nnx.split``), whose arrays lie one level deeper under ``value``, and the items of a CheckpointManager.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from tvjax import tree
from tvjax.checkpoints.atomic import new_folder
from tvjax.checkpoints.folder import copy_files
from tvjax.checkpoints.huggingface import (
    Pretrained,
    check_new,
    check_params,
    settings_with_dtype,
)
from tvjax.checkpoints.json_files import read_json, write_json
from tvjax.checkpoints.sentence_files import sentence_settings
from tvjax.checkpoints.tensor_dtypes import tensor_header
from tvjax.finite import check_finite
from tvjax.kinds import as_path
from tvjax.models.families import family_of_config, family_of_settings
from tvjax.models.generic import GenericConfig
from tvjax.sharding import Placement, leaf_shardings
from tvjax.stages import PyTree

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

PARAMS = "params"
METADATA = "_METADATA"  # in every Orbax directory
_VALUE = "/value"  # where NNX has the array of a variable
_RANDOM = re.compile(r"(^|/)(count|key)/value$")  # of a stream of random numbers


def save_orbax(pretrained: Pretrained, folder: str | os.PathLike[str]) -> None:
    """Writes a model as a new folder with an Orbax directory, every process its own shards.

    Args:
      pretrained: the model.
      folder: where to; it appears when it is complete.

    Raises:
      ValueError: parameters that do not fit the config, and a folder that is taken.
    """
    check_params(pretrained.config, pretrained.params)
    write_orbax(pretrained, folder, PARAMS, pretrained.params)


def write_orbax(
    pretrained: Pretrained,
    folder: str | os.PathLike[str],
    item: str,
    held: PyTree,
    beside: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Writes a new folder with a model's ``config.json`` and processors, and an Orbax directory.

    Args:
      pretrained: the model.
      folder: where to; it appears when it is complete.
      item: path of the Orbax directory in it.
      held: what the directory is to hold: the parameters.
      beside: what further JSON files of the folder hold, by name.

    Raises:
      ValueError: a folder that is taken.
    """
    check_new(folder)
    headers = [tensor_header(path, leaf) for path, leaf in tree.flatten(pretrained.params).items()]
    settings = pretrained.settings or pretrained.config.to_dict()
    if type(pretrained.config).from_dict(settings) != pretrained.config:  # some of it was read off the tensors
        settings = {**settings, **pretrained.config.to_dict()}
    settings = settings_with_dtype(settings, headers)
    with new_folder(folder) as temporary:
        for name, content in {"config.json": settings, **beside}.items():
            write_json(temporary / name, content)
        copy_files(pretrained.folder, temporary)
        with new_checkpointer() as checkpointer:
            checkpointer.save(temporary.absolute() / item, jax.tree.map(jnp.asarray, held))


def load_orbax(
    folder: str | os.PathLike[str],
    *,
    config: Any = None,
    subtree: str = "",
    abstract: PyTree = None,
    sharding: Placement | None = None,
    param_dtype: DTypeLike | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Pretrained:
    """Reads a model from an Orbax directory.

    Args:
      folder: of `save_orbax`; or, with `config`, an Orbax directory of a training run, or a step of its
        CheckpointManager.
      config: of the model; None reads the folder's ``config.json``.
      subtree: path of the parameters in the state (``params``, ``model``), after the name of the item where a step has
        several (``state/params``); nothing else of it is read.
      abstract: the parameters as ``jax.ShapeDtypeStruct`` with the dtype and the sharding that each is to have; None
        gives the dtypes of the files, on the default device.
      sharding: in the place of `abstract`: where the parameters are to lie, as `tvjax.load` takes it.
      param_dtype: dtype of the parameters with it; None keeps those of the files.
      dtype: dtype that activations are computed in.

    Returns:
      The model, its config, and where they come from.

    Raises:
      ValueError: no such directory, or one that does not fit the config; the message names every parameter that is
        missing, surplus or of another shape, or that a sharding does not fit, before anything is read.

    >>> import tempfile
    >>> from tvjax.models.vit import ViTConfig, modeling, vit
    >>> shape = ViTConfig(8, 16, 1, 2, image_size=8, patch_size=4)
    >>> made = Pretrained(vit(shape, modeling.init(shape, jax.random.key(0))), shape)
    >>> with tempfile.TemporaryDirectory() as parent:
    ...     save_orbax(made, f"{parent}/model")
    ...     load_orbax(f"{parent}/model").params["head"]["kernel"].shape
    (8, 2)
    """
    folder = as_path(folder, "the folder of a checkpoint").absolute()
    settings: dict[str, Any] | None = None
    where = folder
    if config is None:
        settings = read_json(folder / "config.json", "is it a folder of save_orbax? Else give the config")
        where = folder / PARAMS
        try:
            config = family_of_settings(settings).config.from_dict({**settings, **sentence_settings(folder)})
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from error
    where, subtree = _item(where, subtree)
    stored, is_nnx = _without_random_state(tree.get(stored_tree(where), subtree))
    leaves = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in _leaves(stored, is_nnx).items()}
    if isinstance(config, GenericConfig):  # its shapes are those of the file
        config = dataclasses.replace(config, shapes={path: leaf.shape for path, leaf in leaves.items()})
    check_params(config, tree.nest(leaves))
    if abstract is not None and (sharding is not None or param_dtype is not None):
        raise ValueError("abstract says where parameters lie and their dtypes: give it, or sharding and param_dtype")
    wanted = tree.flatten(abstract) if abstract is not None else {}
    if abstract is not None:
        check_params(config, abstract)
    elif sharding is not None or param_dtype is not None:
        kinds = {path: jax.ShapeDtypeStruct(leaf.shape, param_dtype or leaf.dtype) for path, leaf in leaves.items()}
        placed = {} if sharding is None else leaf_shardings(sharding, kinds, config)
        wanted = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed.get(path))
            for path, leaf in kinds.items()
        }
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def target(path: str, leaf: Any) -> jax.ShapeDtypeStruct:
        path = path.removesuffix(_VALUE) if is_nnx else path
        asked = wanted.get(path, leaf)
        sharding = getattr(asked, "sharding", None) if path in wanted else None
        return jax.ShapeDtypeStruct(leaf.shape, asked.dtype, sharding=sharding or here)

    restored = restore_tree(where, subtree, tree.map_with_path(target, stored), partial=bool(subtree) or is_nnx)
    params = tree.nest(_leaves(restored, is_nnx))
    check_finite(params, f"the checkpoint {folder}")
    model = family_of_config(config).build(config, params, dtype)
    return Pretrained(model, config, str(folder), "", folder if settings else None, settings)


def _item(folder: Path, subtree: str) -> tuple[Path, str]:
    """The Orbax directory in a step of a CheckpointManager, and the path of the parameters in it.

    Raises:
      ValueError: several, none, or a folder of steps.
    """
    if (folder / METADATA).is_file() or not folder.is_dir():
        return folder, subtree
    items = sorted(path.parent.name for path in folder.glob(f"*/{METADATA}"))
    name, _, rest = subtree.partition("/")
    if name in items:
        return folder / name, rest
    if len(items) == 1:
        return folder / items[0], subtree
    if items:
        raise ValueError(f"{folder} holds {', '.join(items)}: name the one with the parameters (subtree={items[0]!r})")
    parents = {path.parent.parent for path in folder.glob(f"*/*/{METADATA}")}
    steps = sorted((int(number[0]), step) for step in parents if (number := re.findall(r"\d+$", step.name)))
    if steps:
        names = tree.list_some([step.name for _, step in steps])
        raise ValueError(f"{folder} holds the steps of a training run:\n{names}\ngive one, such as {steps[-1][1]}")
    return folder, subtree


def _without_random_state(stored: PyTree) -> tuple[PyTree, bool]:
    """What a directory holds without the keys and counts of NNX's random streams, and whether it is a state of NNX."""
    leaves = tree.flatten(stored)
    if not leaves or not all(path.endswith(_VALUE) for path in leaves):
        return stored, False
    kept = {path: leaf for path, leaf in leaves.items() if not (_RANDOM.search(path) and leaf.dtype == jnp.uint32)}
    return tree.nest(kept), True


def _leaves(stored: PyTree, is_nnx: bool) -> dict[str, Any]:
    """The leaves by the paths of the parameters."""
    leaves = tree.flatten(stored)
    return {path.removesuffix(_VALUE): leaf for path, leaf in leaves.items()} if is_nnx else leaves


def stored_tree(folder: Path) -> Mapping[str, Any]:
    """What an Orbax directory holds, as a tree of shapes and dtypes."""
    if not (folder / METADATA).is_file():
        raise ValueError(f"{folder} is no complete Orbax directory: give the one that holds {METADATA}")
    with new_checkpointer() as checkpointer:
        metadata = checkpointer.metadata(folder).item_metadata
    return metadata.tree


def restore_tree(folder: Path, subtree: str, abstract: PyTree, *, partial: bool) -> PyTree:
    """A subtree of what an Orbax directory holds.

    Args:
      folder: the directory.
      subtree: path of the subtree; "" for all.
      abstract: the subtree as ``jax.ShapeDtypeStruct``, with the dtype and the sharding that each array is to have.
      partial: whether the directory holds more than that.
    """
    import orbax.checkpoint as ocp

    item = tree.put({}, subtree, abstract)
    arguments = ocp.args.PyTreeRestore(
        item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=partial
    )
    with new_checkpointer() as checkpointer:
        return tree.get(checkpointer.restore(folder, args=arguments), subtree)


def new_checkpointer() -> ocp.Checkpointer:
    """What reads and writes Orbax directories; to be closed."""
    import orbax.checkpoint as ocp

    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
