"""Models from Hugging Face folders and hub ids, and back into folders that transformers loads."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from tvjax import processes, tree
from tvjax.checkpoints.atomic import new_folder, write_text
from tvjax.checkpoints.fingerprints import fingerprint
from tvjax.checkpoints.folder import (
    INDEX,
    WEIGHTS,
    Checkpoint,
    Name,
    copy_files,
    has_weights,
    open_checkpoint,
    weight_files,
)
from tvjax.checkpoints.json_files import read_json, write_json
from tvjax.checkpoints.memory import Scratch
from tvjax.checkpoints.tensor_dtypes import cast_header, numpy_dtype, tensor_bytes, tensor_header
from tvjax.checkpoints.writer import write_tensors
from tvjax.kinds import as_bytes, as_path, kind_of
from tvjax.models.differences import function_values, to_text
from tvjax.models.families import family_of_config, shapes_of
from tvjax.models.key_table import Source, Tensor, copies_of_tied, sources_of
from tvjax.models.settings import Settings
from tvjax.progress import Progress
from tvjax.sharding import Placement, leaf_shardings
from tvjax.stages import Model, PyTree

_CARD = "README.md"
MAX_SHARD_SIZE = "5GB"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model with what is needed to save it again.

    Attributes:
      model: the stages and their parameters.
      config: the config of its family.
      name: the folder or hub id that it was read from.
      revision: the commit of the hub repository.
      folder: the local folder that it was read from; None for a model that was made here.
      settings: the content of that folder's ``config.json``.
      keys: the key of each parameter in its files, by path, where it is not the usual one.
      others: keys of its files that are no parameters, and stay as they are.

    >>> import jax
    >>> from tvjax.models.vit import config, modeling
    >>> shape = config.ViTConfig(8, 16, 1, 2, image_size=8, patch_size=4)
    >>> made_here = Pretrained(modeling.vit(shape, modeling.init(shape, jax.random.key(0))), shape)
    >>> made_here.params["head"]["kernel"].shape
    (8, 2)
    """

    model: Model
    config: Any
    name: str = ""
    revision: str = ""
    folder: Path | None = None
    settings: Settings | None = None
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    others: tuple[str, ...] = ()

    @property
    def params(self) -> PyTree:
        """The parameters of the model."""
        return self.model.params

    def with_params(self, params: PyTree) -> Pretrained:
        """The same model with other parameters, of any of the dtypes that checkpoints have.

        Raises:
          ValueError: naming every parameter that is missing, surplus or of another shape.
        """
        check_params(self.config, params)
        return dataclasses.replace(self, model=self.model.replace(params=params))

    def identity(self) -> dict[str, str]:
        """Name, revision, config and fingerprint, as a task vector's file names the model that it belongs to."""
        return {
            "base_model": self.name,
            "base_revision": self.revision,
            "base_config": to_text(function_values(self.config)),
            "base_fingerprint": self._fingerprint,
        }

    @functools.cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.params)  # reads every weight


def read_leaf(model: Pretrained | Checkpoint, path: str) -> np.ndarray:
    """One parameter of a model that is in memory or on disk, in its own dtype and our layout."""
    if isinstance(model, Checkpoint):
        return model.read(path, Scratch(), keep=True)
    return np.asarray(tree.get(model.params, path))


def from_pretrained(
    source: Name,
    revision: str | None = None,
    dtype: DTypeLike = jnp.float32,
    *,
    sharding: Placement | None = None,
    param_dtype: DTypeLike | None = None,
    on_disk: bool = False,
    progress: Progress | None = None,
) -> Pretrained:
    """Reads a model from a Hugging Face folder or from the hub.

    Config, keys, shapes and dtypes are checked before any weight is read. The parameters keep the dtypes of the file.
    Only safetensors are read, in one file or several with an index; no pickle is opened. The weights are in memory
    once: each tensor is read and transposed into the memory that it stays in. A model for which there is no modelling
    code has its tensors as parameters, and cannot be run.

    Args:
      source: a folder with ``config.json`` and safetensors, or a hub id (``openai/clip-vit-base-patch32``, or with
        a revision ``openai/clip-vit-base-patch32@main``), or a model that is open.
      revision: branch, tag or commit of the hub repository.
      dtype: dtype that activations are computed in.
      sharding: where the parameters are to lie: rules (`tvjax.sharding.rules`, or a table such as
        `tvjax.sharding.fsdp`), one ``jax.sharding.Sharding`` for all, or a function of a path and a
        ``jax.ShapeDtypeStruct`` that gives one. Each shard is read straight to its device, and a process reads no
        shards but its own. None: the default device.
      param_dtype: dtype of the parameters; None keeps those of the files.
      on_disk: leave the weights in their files: the parameters are `tvjax.on_disk.DiskArray`, read when a stage that
        uses them is run or fitted, and let go after it. The files must stay as they are.
      progress: called with (leaves read, leaves in all, path of the last).

    Returns:
      The model, its config, and where they come from.

    Raises:
      ValueError: naming what is wrong and the way out; before any weight is read, where a sharding does not fit.
    """
    with open_checkpoint(source, revision) as opened:
        if on_disk and (sharding is not None or param_dtype is not None):
            raise ValueError(
                "weights that stay on disk have the dtype of their files and lie on no device: give on_disk=True, or "
                "sharding and param_dtype"
            )
        if on_disk:
            params = opened.on_disk()
        elif sharding is not None:
            params = _sharded(opened, sharding, param_dtype, progress)
        else:
            params = opened.params(dtype=param_dtype, progress=progress)
        model = opened.family.build(opened.config, params, dtype)
        stale = copies_of_tied(opened.family.table, opened.sources)
        keys = {path: source.key for path, source in opened.sources.items()}
        others = tuple(key for key in opened.others if key not in stale)
    return Pretrained(
        model,
        opened.config,
        opened.name,
        opened.revision,
        opened.folder,
        opened.settings,
        keys,
        others,
    )


def _sharded(opened: Checkpoint, sharding: Placement, dtype: DTypeLike | None, progress: Progress | None) -> PyTree:
    """The parameters where rules say, after it is certain that all processes mean the same."""
    headers = opened.tensors.headers
    leaves = {
        path: jax.ShapeDtypeStruct(opened.shapes[path], dtype or numpy_dtype(source.key, headers[source.key]))
        for path, source in opened.sources.items()
    }
    shardings = leaf_shardings(sharding, leaves, opened.config)
    told = {path: processes.told_sharding(shardings[path], leaf.shape) for path, leaf in leaves.items()}
    facts = {"config.json": dict(opened.settings), "tensors": headers, "dtype": str(dtype), "sharding": told}
    processes.check_same(f"load from {opened.name}", facts)
    with processes.together(f"read {opened.name}"):
        return opened.params(shardings, dtype, progress)


def save_pretrained(
    pretrained: Pretrained,
    folder: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    card: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes a model as a Hugging Face folder, with the other files of the folder that it was read from.

    A new folder appears when it is complete. In a folder that holds this model already, with the same
    ``config.json``, the weights are replaced by one rename. A killed run leaves the old or the new model.
    Of sharded parameters one shard after another is fetched and written to its place; several processes write into the
    same files, each the shards that it owns, in a folder that all of them see.

    Args:
      pretrained: the model; ``pretrained.with_params(edited)`` for one with other parameters.
      folder: where to.
      dtype: dtype of the parameters in the files; None keeps that of each.
      max_shard_size: of one file, in bytes or like ``5GB``; a larger model has several, with an index.
      card: the content of ``README.md``, such as that of `model_card`; None writes none.
      progress: called with (leaves written, leaves in all, path of the last).

    Raises:
      ValueError: for parameters that do not fit the config or are not finite, and for a folder with another model.
    """
    if not isinstance(pretrained, Pretrained):
        raise ValueError(
            f"found {kind_of(pretrained)} to save, expected a model as tvjax.load gives it: "
            "save(base.with_params(edited), folder)"
        )
    folder = as_path(folder, "the path of a folder")
    family = family_of_config(pretrained.config)
    check_params(pretrained.config, pretrained.params)
    leaves = tree.flatten(pretrained.params)
    sources = sources_of(family.table, leaves, pretrained.keys)
    others = {}
    if pretrained.others and pretrained.folder is not None and has_weights(pretrained.folder):
        with open_checkpoint(pretrained.folder) as like:
            others = {key: like.tensors.map(key) for key in pretrained.others if key in like.tensors.headers}
    headers = _headers(leaves, sources, dtype)
    settings = settings_with_dtype(pretrained.settings or pretrained.config.to_dict(), headers.values())
    headers |= {key: tensor_header(key, tensor, dtype) for key, tensor in others.items()}
    file_of = plan_shards(headers, max_shard_size)
    if folder.is_dir() and any(folder.iterdir()):
        if len(set(file_of.values())) > 1:
            raise ValueError(
                f"{folder} holds a model already, and several files cannot replace it at once: give a new folder, or a "
                "greater max_shard_size"
            )
        with _replaced_model(folder, settings, headers) as write:
            _write_all(write, leaves, sources, others, progress)
        copy_files(pretrained.folder, folder)
        if card is not None:
            write_text(folder / _CARD, card)
        return
    with _new_model(folder, headers, file_of, settings, pretrained.folder) as (write, temporary):
        _write_all(write, leaves, sources, others, progress)
        if card is not None:
            write_text(temporary / _CARD, card)


Write = Callable[..., None]  # of a key, its tensor or a part of it, and the view of the tensor that the part is


def _headers(leaves: Mapping[str, Any], sources: Mapping[str, Source], dtype: DTypeLike | None) -> dict[str, Tensor]:
    """Dtype and shape of the tensors of parameters; of parts of one tensor that are of several dtypes the widest."""
    headers: dict[str, Tensor] = {}
    for path, source in sources.items():
        known = headers.get(source.key)
        own = np.dtype(leaves[path].dtype)
        widest = own if known is None else np.promote_types(own, numpy_dtype(source.key, known))
        stored = jax.ShapeDtypeStruct(source.shape(leaves[path].shape), widest)
        headers[source.key] = tensor_header(source.key, stored, dtype)
    return headers


def _write_all(
    write: Write,
    leaves: Mapping[str, Any],
    sources: Mapping[str, Source],
    others: Mapping[str, np.ndarray],
    progress: Progress | None,
) -> None:
    for number, (path, source) in enumerate(sources.items(), 1):
        write(source.key, leaves[path], source.to_ours)
        if progress is not None:
            progress(number, len(sources), path)
    for key, tensor in others.items():
        write(key, tensor)


@contextlib.contextmanager
def write_checkpoint(
    like: Checkpoint,
    folder: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    max_shard_size: int | str | None = None,
    card: Callable[[], str] | None = None,
) -> Iterator[Callable[[str, np.ndarray], None]]:
    """Opens a new Hugging Face folder like another one, to be written parameter by parameter.

    Keys and settings are those of the other folder; so are its other files, and tensors that are no parameters.

    Args:
      like: the other folder.
      folder: where to; it appears when the block ends and every parameter was written.
      dtype: dtype of the parameters; None keeps that of each. Those that are written have it already.
      max_shard_size: of one file, in bytes or like ``5GB``; None keeps the files of the other folder.
      card: gives the content of ``README.md`` when all is written; None writes none.

    Returns:
      A function of a path and its array, in our layout.
    """
    sources, tensors = like.sources, like.tensors
    headers = {
        key: header if key in like.others else cast_header(key, header, dtype)
        for key, header in tensors.headers.items()
    }
    if max_shard_size is None:
        file_of = {key: Path(path).name for key, path in tensors.file_of.items()}
    else:
        file_of = plan_shards(headers, max_shard_size)
    settings = settings_with_dtype(like.settings, [headers[source.key] for source in sources.values()])
    with _new_model(folder, headers, file_of, settings, like.folder) as (write, temporary):
        yield lambda path, array: write(sources[path].key, array, sources[path].to_ours)
        for key in sorted(like.others):
            write(key, tensors.read(key))
        if card is not None:
            write_text(temporary / _CARD, card())


@contextlib.contextmanager
def _new_model(
    folder: str | os.PathLike[str],
    headers: Mapping[str, Tensor],
    file_of: Mapping[str, str],
    settings: Settings,
    files: Path | None,
) -> Iterator[tuple[Write, Path]]:
    """Opens a new folder; gives a function that writes a tensor under its key, and the folder as long as it is none."""
    check_new(folder)
    with new_folder(folder) as temporary, contextlib.ExitStack() as stack:
        writers = {}
        for name in sorted(set(file_of.values())):
            part = {key: header for key, header in headers.items() if file_of[key] == name}
            writers[name] = stack.enter_context(write_tensors(temporary / name, part, {"format": "pt"}))
        yield lambda key, *tensor: writers[file_of[key]].write(key, *tensor), temporary
        if set(file_of.values()) != {WEIGHTS}:
            total = sum(tensor_bytes(key, header) for key, header in headers.items())
            count = sum(math.prod(header.shape) for header in headers.values())
            about = {"total_size": total, "total_parameters": count}
            write_json(temporary / INDEX, {"metadata": about, "weight_map": dict(file_of)})
        write_json(temporary / "config.json", settings)
        copy_files(files, temporary)


def plan_shards(headers: Mapping[str, Tensor], max_shard_size: int | str) -> dict[str, str]:
    """The file of each tensor, filled in the order of the keys up to a size.

    Args:
      headers: dtype and shape of every tensor, by key.
      max_shard_size: of one file, in bytes or like ``5GB``; a larger tensor has a file of its own.

    Raises:
      ValueError: a size that is none.

    >>> plan_shards({key: Tensor("F32", (2,)) for key in "abc"}, 16)  # doctest: +NORMALIZE_WHITESPACE
    {'a': 'model-00001-of-00002.safetensors', 'b': 'model-00001-of-00002.safetensors',
     'c': 'model-00002-of-00002.safetensors'}
    """
    sizes = {key: tensor_bytes(key, header) for key, header in headers.items()}
    plan = huggingface_hub.split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=as_bytes(max_shard_size),
    )
    return plan.tensor_to_filename or dict.fromkeys(sizes, WEIGHTS)


def check_new(folder: str | os.PathLike[str]) -> None:
    """Raises a ValueError where something stands already where a new folder is to be written, or none may be."""
    folder = as_path(folder, "the path of a new folder")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"the output {str(folder)!r} exists: give a new folder, or remove it")
    standing = next(above for above in folder.absolute().parents if above.exists())
    if not standing.is_dir():
        raise ValueError(f"the output {str(folder)!r} cannot be: {str(standing)!r} is no folder")
    check_writable(folder, standing)


def check_writable(output: Path, folder: Path) -> None:
    """Raises a ValueError where nothing can be written into the folder that an output goes to."""
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"the output {str(output)!r} cannot be: nothing may be written into {str(folder)!r}")


def check_params(config: Any, params: PyTree) -> None:
    """Raises a ValueError that names every parameter that is missing, surplus, or of another shape or dtype."""
    expected = shapes_of(config)
    leaves = tree.flatten(params)
    problems = [f"{path} is missing" for path in expected.keys() - leaves.keys()]
    problems += [f"{path} is surplus" for path in leaves.keys() - expected.keys()]
    problems += [
        f"{path} is {list(leaves[path].shape)}, expected {list(shape)}"
        for path, shape in expected.items()
        if path in leaves and leaves[path].shape != shape
    ]
    problems += [
        f"{path} is {leaf.dtype}, expected float32, float16 or bfloat16"
        for path, leaf in leaves.items()
        if leaf.dtype not in (jnp.float32, jnp.float16, jnp.bfloat16)
    ]
    if problems:
        listed = "; ".join(sorted(problems)[:8]) + ("; ..." if len(problems) > 8 else "")
        raise ValueError(
            f"{len(problems)} parameters do not fit the {type(config).__name__}: {listed}. Give all parameters of the "
            "model, those that were not edited too"
        )


def settings_with_dtype(settings: Settings, headers: Iterable[Tensor]) -> dict[str, Any]:
    """The settings with the dtype that transformers is to load the weights in, so that it changes no value."""
    dtypes = {numpy_dtype("", header).name for header in headers}
    return {**_without_dtypes(settings), "dtype": dtypes.pop() if len(dtypes) == 1 else "float32"}


def _without_dtypes(settings: Settings) -> dict[str, Any]:
    kept = {name: value for name, value in settings.items() if name not in ("dtype", "torch_dtype")}
    return {name: _without_dtypes(value) if isinstance(value, dict) else value for name, value in kept.items()}


@contextlib.contextmanager
def _replaced_model(folder: Path, settings: Settings, headers: Mapping[str, Tensor]) -> Iterator[Write]:
    """Gives a function that writes a tensor under its key; the file replaces the weights of a folder's model."""
    same = (folder / "config.json").is_file() and read_json(folder / "config.json") == settings
    if has_weights(folder) and not same:
        raise ValueError(
            f"{folder} holds another model (its config.json differs), which one rename cannot replace: give "
            "a new folder, or remove the old one"
        )
    if not same:
        write_json(folder / "config.json", settings)
    shards = weight_files(folder) if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file() else []
    with write_tensors(folder / WEIGHTS, headers, {"format": "pt"}) as writer:
        yield writer.write
    for stale in ([folder / INDEX, *shards]) if shards else ():
        stale.unlink(missing_ok=True)
