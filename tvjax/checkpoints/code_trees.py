"""Orbax checkpoints of other codes, MaxText's and Tunix's: their parameter trees (`tvjax.interop`) on disk.

Either code keeps the steps of a training run as folders of a CheckpointManager, the parameters under an item of one
name (``0/items``, ``0/model_params``), with the optimizer's state in it or beside it. No config that says the model's
shape lies there: it comes from a Hugging Face folder of the same model, or from the ``config.json`` that is written
beside the steps here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from tvjax import tree
from tvjax.checkpoints.folder import open_checkpoint
from tvjax.checkpoints.huggingface import Pretrained, check_params
from tvjax.checkpoints.json_files import read_json
from tvjax.checkpoints.orbax import METADATA, restore_tree, stored_tree, write_orbax
from tvjax.finite import check_finite
from tvjax.interop import from_maxtext, from_tunix, maxtext, to_maxtext, to_tunix, tunix
from tvjax.interop.table import TreeTable, check_known
from tvjax.kinds import as_path
from tvjax.models.families import family_of_settings
from tvjax.stages import PyTree


class Code(NamedTuple):
    """How a code keeps parameters on disk.

    Attributes:
      table: of its trees, with the model types that are known.
      item: of a step, which holds them.
      around: path of the tree in the item.
      leaf: path of an array under its parameter.
      sign: path of a leaf in the tree, by which the tree is found.
      to_theirs: `tvjax.interop`'s conversion, ``(params, config, **options)``.
      to_ours: its inverse.
    """

    table: TreeTable
    item: str
    around: str
    leaf: str
    sign: str
    to_theirs: Callable[..., PyTree]
    to_ours: Callable[..., PyTree]


CODES = {
    "maxtext": Code(maxtext.TABLE, "items", "params/params", "", "token_embedder/embedding", to_maxtext, from_maxtext),
    "tunix": Code(tunix.TABLE, "model_params", "", "value", "embedder/input_embedding", to_tunix, from_tunix),
}


_LAYOUT = ("interleaved",)  # options that the tree does not show, and that reading it needs
_LAYOUT_FILE = "maxtext_layout.json"


class Found(NamedTuple):
    """Where the parameters of another code lie.

    Attributes:
      code: a key of `CODES`.
      directory: of Orbax.
      subtree: path of the parameter tree in it.
    """

    code: str
    directory: Path
    subtree: str


def save_code_tree(pretrained: Pretrained, folder: str | os.PathLike[str], code: str, **options: Any) -> None:
    """Writes a model as a checkpoint of another code: step 0 of a CheckpointManager, and ``config.json`` beside it.

    What the tree does not show of its layout is kept in ``maxtext_layout.json``, which `load_code_tree` reads.

    MaxText reads it with ``load_parameters_path=<folder>/0/items``, Tunix's CheckpointManager with ``<folder>``.

    Args:
      pretrained: the model.
      folder: where to; it appears when it is complete.
      code: a key of `CODES`.
      options: of the conversion (`tvjax.interop`).

    Raises:
      ValueError: parameters that have no place there, and a folder that is taken.
    """
    way = CODES[code]
    held = way.to_theirs(pretrained.params, pretrained.config, **options)
    flat = {"/".join(filter(None, (way.around, path, way.leaf))): leaf for path, leaf in tree.flatten(held).items()}
    said = {name: value for name, value in options.items() if name in _LAYOUT and value is not None}
    write_orbax(pretrained, folder, f"0/{way.item}", tree.nest(flat), {_LAYOUT_FILE: said} if said else {})


def check_code(code: str, config: Any) -> None:
    """Raises a ValueError where a code, a key of `CODES`, has no tree for the model of a config."""
    check_known(CODES[code].table, config)


def find_code_tree(source: str | os.PathLike[str]) -> Found | None:
    """Where the parameters of another code lie; None where there are none.

    Args:
      source: the folder of a CheckpointManager with one step, the folder of a step, or an Orbax directory.

    Raises:
      ValueError: several steps, or several trees in one.
    """
    folder = as_path(source, "the folder of a checkpoint").absolute()
    directories = [folder] if (folder / METADATA).is_file() else []
    for item in {code.item for code in CODES.values()}:
        directories += [path.parent for depth in ("", "*/") for path in folder.glob(f"{depth}{item}/{METADATA}")]
    if len(directories) > 1:
        steps = tree.list_some(sorted(str(path.relative_to(folder)) for path in directories))
        raise ValueError(f"{source} holds several checkpoints:\n{steps}\ngive one of these folders")
    if not directories:
        return None
    paths = [path.removesuffix("/value") for path in tree.flatten(stored_tree(directories[0]))]
    parameters = [path for path in paths if not path.startswith(("opt_state/", "optimizer/"))]
    trees = [
        Found(code, directories[0], path.removesuffix(way.sign).rstrip("/"))
        for code, way in CODES.items()
        for path in parameters
        if f"/{path}".endswith(f"/{way.sign}")
    ]
    if len(trees) > 1:
        raise ValueError(
            f"{directories[0]} holds {len(trees)} parameter trees, under {[found.subtree for found in trees]}: give a "
            "checkpoint with one"
        )
    return trees[0] if trees else None


def load_code_tree(
    found: Found, source: str | os.PathLike[str], like: str | os.PathLike[str] | None = None, **options: Any
) -> Pretrained:
    """Reads a model from a checkpoint of another code.

    Args:
      found: where its parameters lie.
      source: what was given, as the name of the model.
      like: a Hugging Face folder or hub id of the same model, for its config and processors; None: the folder of the
        steps has them, as one of `save_code_tree`.
      options: of the conversion (`tvjax.interop`).

    Raises:
      ValueError: no config, a tree that does not fit it, of which every leaf is named, or another layout than it was
        written in; before an array is read.
    """
    beside = found.directory.parents[1]  # the folder of the steps
    if like is not None:
        with open_checkpoint(like) as model:
            config, folder, settings = model.config, model.folder, model.settings
    elif not (beside / "config.json").is_file():
        raise ValueError(
            f"{os.fspath(source)!r} has no config.json, and trees of {found.code} do not say the heads and the "
            "positions of their model: name a Hugging Face folder or hub id of the same model (--like, like=...)"
        )
    else:
        folder, settings = beside, read_json(beside / "config.json")
        config = family_of_settings(settings).config.from_dict(settings)
    options = _as_written(beside, options)
    stored: Mapping[str, Any] = tree.get(stored_tree(found.directory), found.subtree)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), stored)
    to_ours = CODES[found.code].to_ours
    jax.eval_shape(lambda params: to_ours(params, config, **options), abstract)  # names what does not fit
    params = to_ours(restore_tree(found.directory, found.subtree, abstract, partial=True), config, **options)
    check_params(config, params)
    check_finite(params, f"the checkpoint {found.directory}")
    family = family_of_settings(settings)
    return Pretrained(family.build(config, params), config, os.fspath(source), "", folder, settings)


def _as_written(folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a conversion, with what the folder says of its layout where they leave it open."""
    written = read_json(folder / _LAYOUT_FILE) if (folder / _LAYOUT_FILE).is_file() else {}
    for name, value in written.items():
        if options.get(name) not in (None, value):
            raise ValueError(
                f"{str(folder)!r} was written with {name}={value} ({_LAYOUT_FILE}), found {name}={options[name]}: "
                "leave it out"
            )
    return {**options, **written}
