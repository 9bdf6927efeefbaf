"""A model that is named by a folder or hub id: its config, tensors, tokenizer and image processor, each read once."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import jax
import numpy as np
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from jax.typing import DTypeLike

from tvjax import tree
from tvjax.checkpoints.atomic import replacing
from tvjax.checkpoints.json_files import read_json
from tvjax.checkpoints.memory import Scratch, aligned_memory, contiguous, to_jax
from tvjax.checkpoints.reader import Tensors, check_finite, open_tensors
from tvjax.checkpoints.sentence_files import MODULES, copy_sentence_files, sentence_settings
from tvjax.checkpoints.shards import read_sharded
from tvjax.checkpoints.tensor_dtypes import cast, numpy_dtype, tensor_bytes
from tvjax.kinds import as_path
from tvjax.models.differences import function_values, to_text
from tvjax.models.families import GENERIC, Family, family_of_settings, shapes_of
from tvjax.models.key_table import Source, check_copies, find_sources
from tvjax.models.settings import NoCode, Settings, check_not_quantised
from tvjax.progress import Progress
from tvjax.stages import PyTree

if TYPE_CHECKING:
    from tvjax.checkpoints.processors import Processor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_THREADS = 2  # read and transpose at once; more would only wait for the memory
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_DOWNLOADED = (
    *(WEIGHTS, "model-*.safetensors", "adapter_model.safetensors"),
    *("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py"),  # tokenizers and templates; no code is run
)
# What belongs to the weights of one folder alone, and to no edited copy of it.
_NOT_COPIED = (
    *_PICKLES,
    *("*.safetensors", "*.index.json", "config.json", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.npz", "*.ot"),
    *("README.md", ".*", "tvjax.yaml", "*.safetensors.yaml", "*leaf_report.*", "trainer_state.json"),
    "maxtext_layout.json",  # of the tree that lies beside it
    *("examples.json", "images.json", "coefficients.png"),  # beside a composed model
)


class Checkpoint:
    """A model in a Hugging Face folder or on the hub, opened once; made by `open_checkpoint`.

    What is asked of it is read when it is first asked for, checked, and kept; parameters are read one by one, or all by
    `params`, and not kept. A model whose ``model_type`` has no modelling code has the tensors of its files as they are:
    their keys are the paths, with slashes for dots.

    Attributes:
      folder: the local folder.
      name: the folder or hub id that was asked for.
      revision: the commit of the hub repository.
      no_code: once `family` was asked for, why a model of a known family has no modelling code; "" where it has.
    """

    no_code = ""

    def __init__(self, source: str | os.PathLike[str], revision: str | None = None):
        """Finds the folder; of a hub id it is downloaded."""
        self.folder, commit = fetch(source, revision)
        self.name, self.revision = hub_name(source, commit), commit or ""
        self._files = contextlib.ExitStack()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: Any) -> None:
        self._files.close()

    @functools.cached_property
    def settings(self) -> Settings:
        """The content of its ``config.json``."""
        if (self.folder / "adapter_config.json").is_file() and not (self.folder / "config.json").is_file():
            raise ValueError(
                f"{self.name!r} is an adapter and no model: make a task vector of it with tvjax extract --adapter, and "
                "add that to its base with tvjax apply"
            )
        return read_json(self.folder / "config.json")

    @functools.cached_property
    def described(self) -> Settings:
        """The settings, and what the files of sentence-transformers beside them say."""
        return {**self.settings, **sentence_settings(self.folder)}

    @functools.cached_property
    def family(self) -> Family:
        """The family of the model."""
        settings = self.described
        with self._naming_config():
            check_not_quantised(settings)
            family = family_of_settings(settings)
            try:
                family.config.from_dict(settings)
            except NoCode as error:  # arithmetic needs no modelling code
                self.no_code = str(error)
                return GENERIC
            return family

    @functools.cached_property
    def config(self) -> Any:
        """The config of the model; no weight is read."""
        family = self.family
        with self._naming_config():
            config = family.config.from_dict(self.settings if family is GENERIC else self.described)
        return config if family.completed is None else family.completed(config, self.tensors.headers)

    @functools.cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of the parameters, by path."""
        config = self.config
        with self._naming_config():
            return shapes_of(config)

    @functools.cached_property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files."""
        return tuple(weight_files(self.folder))

    @functools.cached_property
    def tensors(self) -> Tensors:
        """The tensors of its files."""
        return self._files.enter_context(open_tensors(*self.files))

    @functools.cached_property
    def sources(self) -> Mapping[str, Source]:
        """Where to read each parameter, by path; keys, shapes and dtypes are checked."""
        shapes = self.shapes
        table, headers = self.family.table, self.tensors.headers
        sources = find_sources(table, shapes, headers, str(self.folder))
        check_copies(table, sources, headers, self.tensors.read, str(self.folder))
        return sources

    @functools.cached_property
    def others(self) -> Mapping[str, str]:
        """Why tensors are no parameters, by key: integers, and buffers that the family leaves."""
        keys = {source.key for source in self.sources.values()}
        others = {key: header for key, header in self.tensors.headers.items() if key not in keys}
        return {key: f"{header.dtype}, no parameter" for key, header in others.items()}

    @functools.cached_property
    def processor(self) -> Processor:
        """The tokenizer and the image processor, those that it has."""
        from tvjax.checkpoints.processors import read_processor

        known = (self.folder / "config.json").is_file() and self.family is not GENERIC
        read = self.config if known and hasattr(self.config, "vocab_size") else None
        return read_processor(self.folder, getattr(self.config, "text", read) if known else None)

    def identity(self, fingerprint: str) -> dict[str, str]:
        """Name, revision, config and fingerprint, as `tvjax.checkpoints.Pretrained.identity` has them."""
        return {
            "base_model": self.name,
            "base_revision": self.revision,
            "base_config": to_text(function_values(self.config)),
            "base_fingerprint": fingerprint,
        }

    def leaf_bytes(self, path: str) -> int:
        """The size of a parameter in its file."""
        key = self.sources[path].key
        return math.prod(self.shapes[path]) * numpy_dtype(key, self.tensors.headers[key]).itemsize

    def read(self, path: str, scratch: Scratch, keep: bool = False) -> np.ndarray:
        """One parameter, in its own dtype and our layout, contiguous.

        Args:
          path: of the parameter.
          scratch: memory to read into.
          keep: whether the array gets memory of its own; else it lies in the scratch, until the next is read.

        Raises:
          ValueError: where values are not finite.
        """
        source = self.sources[path]
        header = self.tensors.headers[source.key]
        size = tensor_bytes(source.key, header)
        if source.part is None:
            memory = aligned_memory(size) if keep else scratch.take("ours", size)
            ours = memory.view(numpy_dtype(source.key, header)).reshape(self.shapes[path])
            self.tensors.read_into(source.key, source.leaf.to_theirs(ours))
            return ours
        moves = not source.to_ours(np.empty(header.shape, np.bool_)).flags.c_contiguous
        raw = self.tensors.read(source.key, None if keep and not moves else scratch.take("raw", size))
        if not moves:
            return source.to_ours(raw)
        return contiguous(source.to_ours(raw), None if keep else scratch.take("ours", size))

    def params(
        self,
        shardings: Mapping[str, jax.sharding.Sharding] | None = None,
        dtype: DTypeLike | None = None,
        progress: Progress | None = None,
    ) -> PyTree:
        """All parameters, each read and transposed into the memory that it stays in.

        Args:
          shardings: where each is to lie, by path; a process then reads no more than its own shards.
          dtype: of the parameters; None keeps those of the files.
          progress: called with (leaves done, leaves in all, path of the last).

        Raises:
          ValueError: where values are not finite.
        """
        local = threading.local()  # memory that each thread reads into before it transposes

        def load(path: str) -> jax.Array:
            if shardings is not None:
                source = self.sources[path]
                check = functools.partial(check_finite, source.key)
                return read_sharded(source.to_ours(self.tensors.map(source.key)), shardings[path], dtype, check)
            read = self.read(path, local.__dict__.setdefault("scratch", Scratch()), keep=True)
            found = cast(read, dtype)
            if found is not read:
                check_finite(path, found)
            return to_jax(found)

        with ThreadPoolExecutor(_THREADS) as pool:
            try:
                leaves: dict[str, jax.Array] = {}
                for path, leaf in zip(self.sources, pool.map(load, self.sources), strict=True):
                    leaves[path] = leaf
                    if progress is not None:
                        progress(len(leaves), len(self.sources), path)
                return tree.nest(leaves)
            except BaseException:
                pool.shutdown(cancel_futures=True)  # nothing more is read
                raise

    def on_disk(self) -> PyTree:
        """All parameters, each read whenever it is used (`tvjax.on_disk`), after this is closed too."""
        sources = self.sources.items()
        return tree.nest({path: self.tensors.on_disk(source.key, source.to_ours) for path, source in sources})

    @contextlib.contextmanager
    def _naming_config(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.folder / 'config.json'}: {error}") from error


Name = str | os.PathLike[str] | Checkpoint  # of a model


@contextlib.contextmanager
def open_checkpoint(source: Name, revision: str | None = None) -> Iterator[Checkpoint]:
    """Opens a model in a Hugging Face folder or on the hub; what is open already stays so.

    Nothing is read before it is asked for; see `Checkpoint`.

    Args:
      source: a folder or a hub id, or a model that is open.
      revision: branch, tag or commit of the hub repository.

    Raises:
      ValueError: naming what is wrong and the way out.
    """
    if isinstance(source, Checkpoint):
        yield source
        return
    with Checkpoint(source, revision) as opened:
        yield opened


def fetch(source: str | os.PathLike[str], revision: str | None = None) -> tuple[Path, str | None]:
    """The local folder of a source, downloaded where it is a hub id; of that no pickle and no folder.

    Args:
      source: a folder or a hub id; ``owner/name@revision`` names the revision too.
      revision: branch, tag or commit of the hub repository.

    Returns:
      The folder, and the commit where the source is a hub id.

    Raises:
      ValueError: for what is neither a folder nor can be downloaded.
    """
    folder = as_path(source, "the folder or the hub id of a model")
    name, at, named = os.fspath(source).partition("@")
    if at and not folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"{os.fspath(source)!r} names a revision, and {revision!r} is another: give one of the two"
            )
        folder, revision = Path(name), named
    if folder.is_file():
        raise ValueError(f"{os.fspath(source)!r} is a file, expected the folder of a Hugging Face model, or a hub id")
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"{folder} is a local folder, which has no revision {revision!r}: leave the revision out")
        return folder, None
    try:
        snapshot = huggingface_hub.snapshot_download(
            os.fspath(folder),
            revision=revision,
            allow_patterns=list(_DOWNLOADED),
            ignore_patterns=["*/*"],
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{os.fspath(source)!r} is no folder, and no hub id that can be downloaded: {reason}"
        ) from error
    if (Path(snapshot) / MODULES).is_file():
        huggingface_hub.snapshot_download(
            os.fspath(folder), revision=Path(snapshot).name, allow_patterns=["*/config.json"], ignore_patterns=["*/*/*"]
        )
    return Path(snapshot), Path(snapshot).name


def hub_name(source: str | os.PathLike[str], revision: str | None) -> str:
    """The name of a model: its folder, or its hub id without the revision.

    >>> hub_name("openai/clip-vit-base-patch32@main", "3d74acf"), hub_name("a@b/clip", None)
    ('openai/clip-vit-base-patch32', 'a@b/clip')
    """
    return os.fspath(source) if revision is None else os.fspath(source).partition("@")[0]


def has_weights(folder: Path) -> bool:
    """Whether a folder holds a model in safetensors."""
    return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder: the single one, or those that its index names.

    Raises:
      ValueError: where there are none, or the index names one that is absent.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        raise ValueError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}"
            + (f", only {', '.join(pickles)}: pickles can run code and are never opened" if pickles else "")
            + ". Load the model with transformers where you trust it, and save it with save_pretrained"
        )
    shard_of = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(name, str) for name in shard_of.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map from keys to files: download it again")
    names = sorted(set(shard_of.values()))
    absent = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if absent:
        raise ValueError(f"{folder / INDEX} names {', '.join(absent)}, which the folder lacks: download them again")
    return [folder / name for name in names]


def copy_files(source: Path | None, target: Path) -> None:
    """Copies the files of a folder that are not of its weights alone: tokenizer, processors, and what is not known."""
    for file in sorted(source.iterdir()) if source else ():
        copied = file.is_file() and not any(file.match(pattern) for pattern in _NOT_COPIED)
        if copied and not (target / file.name).exists():
            with replacing(target / file.name) as temporary:
                shutil.copyfile(file, temporary)
    if source:
        copy_sentence_files(source, target)
