"""What a model's folder or a file of tvjax holds, from its headers alone."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tvjax.checkpoints import coefficients as coefficient_files
from tvjax.checkpoints import transport_state as map_files
from tvjax.checkpoints.folder import open_checkpoint
from tvjax.checkpoints.reader import open_tensors
from tvjax.models.generic import GenericConfig
from tvjax.models.layer_table import Layout

MODEL, TASK_VECTOR, TRANSPORT, COEFFICIENTS, TENSORS = (
    "model", "task vector", "fitted transport", "coefficients", "tensors",
)  # fmt: skip


class Leaf(NamedTuple):
    """One tensor, as a header names it.

    Attributes:
      path: of the leaf; for files that are no trees of tvjax, the key.
      key: in the file.
      shape: of the leaf, in the layout of tvjax.
      dtype: as safetensors call it, such as ``F32`` or ``BF16``.
    """

    path: str
    key: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def entries(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size in the file.

        >>> Leaf("a", "a", (2, 3), "BF16").bytes, Leaf("a", "a", (2,), "BOOL").bytes
        (12, 2)
        """
        bits = re.search(r"\d+", self.dtype)
        return self.entries * (int(bits[0]) if bits else 8) // 8


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a folder or file holds, known from its headers.

    Attributes:
      name: the folder, hub id or file.
      kind: ``model``, ``task vector``, ``fitted transport``, ``coefficients`` or ``tensors``.
      about: what it says of itself: a model's config, a file's metadata.
      leaves: its tensors, in the order of the model, or of their paths.
      files: the safetensors files.
      config: of a model.
      layouts: for each leaf of a model, from the layout of the file to that of tvjax.
    """

    name: str
    kind: str
    about: Mapping[str, Any]
    leaves: tuple[Leaf, ...]
    files: tuple[Path, ...]
    config: Any = None
    layouts: Mapping[str, Layout] = dataclasses.field(default_factory=dict)

    @property
    def entries(self) -> int:
        """Number of entries of all leaves: of a model, its parameters."""
        return sum(leaf.entries for leaf in self.leaves)

    @property
    def bytes(self) -> int:
        """Size of all leaves in the files."""
        return sum(leaf.bytes for leaf in self.leaves)

    @property
    def dtypes(self) -> dict[str, int]:
        """Number of leaves of each dtype."""
        return dict(Counter(leaf.dtype for leaf in self.leaves))

    @contextlib.contextmanager
    def reading(self) -> Iterator[Callable[[str], np.ndarray]]:
        """Gives a function that reads the leaf of a path, in the layout of tvjax.

        Raises:
          ValueError: where values are not finite, with the tensor's name and their number.
        """
        keys = {leaf.path: leaf.key for leaf in self.leaves}
        with open_tensors(*self.files) as tensors:

            def read(path: str) -> np.ndarray:
                array = tensors.read(keys[path])
                return self.layouts[path](array) if path in self.layouts else array

            yield read


def contents(source: str | os.PathLike[str]) -> Contents:
    """What a model's folder, a hub id or a safetensors file holds; of files, only the headers are read.

    Args:
      source: a Hugging Face folder, a hub id, or a file.

    Raises:
      ValueError: what is neither, or is damaged.

    >>> import tempfile
    >>> from tvjax.checkpoints import save_tree
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_tree(f"{folder}/tau.safetensors", {"a": {"b": np.ones(2, np.float32)}}, {"base_model": "demo"})
    ...     found = contents(f"{folder}/tau.safetensors")
    >>> found.kind, found.leaves
    ('task vector', (Leaf(path='a/b', key='a/b', shape=(2,), dtype='F32'),))
    """
    path = Path(source)
    if path.is_file() or path.suffix == ".safetensors":
        return _file_contents(path)
    return _model_contents(os.fspath(source))


def _model_contents(source: str) -> Contents:
    with open_checkpoint(source) as found:
        sources, headers = found.sources, found.tensors.headers
        leaves = [Leaf(path, s.key, found.shapes[path], headers[s.key].dtype) for path, s in sources.items()]
    generic = isinstance(found.config, GenericConfig)
    config = _settings(found.settings) if generic else dataclasses.asdict(found.config)
    about = {"model_type": found.settings.get("model_type"), "config": config}
    if found.others:
        about["no parameters"] = [f"{key} ({why})" for key, why in found.others.items()]
    if generic:
        leaves.sort(key=lambda leaf: _natural(leaf.path))
    if found.revision:
        about["revision"] = found.revision
    layouts = {path: s.to_ours for path, s in found.sources.items()}
    return Contents(source, MODEL, about, tuple(leaves), found.files, found.config, layouts)


def _settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are single values, those of parts under their names."""
    kept = {name: value for name, value in settings.items() if not isinstance(value, list) and value is not None}
    return {name: _settings(value) if isinstance(value, Mapping) else value for name, value in kept.items()}


def _file_contents(file: Path) -> Contents:
    with open_tensors(file) as tensors:
        headers, metadata = tensors.headers, dict(tensors.metadata)
    kind = {map_files.FORMAT: TRANSPORT, coefficient_files.FORMAT: COEFFICIENTS}.get(metadata.get("format", ""))
    if not headers:
        raise ValueError(f"{str(file)!r} holds no tensors")
    if kind is None:
        kind = TASK_VECTOR if any(name.startswith("base_") for name in metadata) else TENSORS
    about: dict[str, Any] = {
        name: text for name, text in sorted(metadata.items()) if name not in ("description", "layout")
    }
    try:
        if kind == TRANSPORT:
            description = json.loads(metadata["description"])
            parts = description["parts"]
            about |= {"links": [part["link"] for part in parts], "rules": [len(part["rules"]) for part in parts]}
            about["notes"] = description["notes"]
        elif kind == COEFFICIENTS:
            layout = json.loads(metadata["layout"])
            about |= {"vectors": layout["vectors"], "blocks": len(layout["blocks"]), "leaves": len(layout["places"])}
            about["partitions"] = layout["partitions"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(file)!r} is marked as {kind}, but does not describe them ({error}): save it again"
        ) from error
    leaves = [Leaf(key, key, header.shape, header.dtype) for key, header in headers.items()]
    return Contents(str(file), kind, about, tuple(sorted(leaves, key=lambda leaf: _natural(leaf.path))), (file,))


def _natural(path: str) -> list[tuple[int, str]]:
    """A key that sorts 2 before 10."""
    return [(int(text), "") if text.isdecimal() else (-1, text) for text in re.split(r"(\d+)", path)]
