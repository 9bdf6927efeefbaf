"""What a model's folder or a file of tvjax holds: from its headers alone, or measured tensor by tensor.

Sums over the entries of a leaf add up to those of a block and of the whole, so memory is bounded by the largest tensor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from tvjax import tree
from tvjax.capture import SiteTable, sites
from tvjax.checkpoints import coefficients as coefficient_files
from tvjax.checkpoints import transport_state as map_files
from tvjax.checkpoints.fingerprints import Fingerprint
from tvjax.checkpoints.folder import open_checkpoint
from tvjax.checkpoints.reader import open_tensors
from tvjax.models.families import family_of_config
from tvjax.models.generic import GenericConfig, no_code
from tvjax.models.layer_table import Layout
from tvjax.stages import Model, PyTree, local_params

MODEL, TASK_VECTOR, TRANSPORT, COEFFICIENTS, TENSORS = (
    "model", "task vector", "fitted transport", "coefficients", "tensors",
)  # fmt: skip
_PIECE = 2**20  # entries that are measured at once, in float64


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


class Sums(NamedTuple):
    """Sums over the entries of a leaf, or of several leaves.

    Attributes:
      entries: how many.
      zeros: how many are zero.
      squares: sum of their squares.

    >>> sums = sums_of(np.array([3.0, 0.0, 4.0]))
    >>> sums.norm, sums.sparsity
    (5.0, 0.3333333333333333)
    """

    entries: int = 0
    zeros: int = 0
    squares: float = 0.0

    @property
    def norm(self) -> float:
        """The Euclidean norm."""
        return math.sqrt(self.squares)

    @property
    def sparsity(self) -> float:
        """The share of entries that are zero; 0 of none."""
        return self.zeros / self.entries if self.entries else 0.0


class PairSums(NamedTuple):
    """Sums over the entries of two leaves of one shape, or of several such pairs.

    Attributes:
      first: sum of the squares of the first.
      second: sum of the squares of the second.
      products: sum of their products.
      differences: sum of the squares of their differences.
      agreeing: entries at which both have the same sign.
      compared: entries at which neither is zero.

    >>> sums = pair_sums_of(np.array([1.0, -2.0, 0.0]), np.array([2.0, 4.0, 1.0]))
    >>> round(sums.cosine, 4), sums.sign_agreement
    (-0.5855, 0.5)
    """

    first: float = 0.0
    second: float = 0.0
    products: float = 0.0
    differences: float = 0.0
    agreeing: int = 0
    compared: int = 0

    @property
    def cosine(self) -> float:
        """Cosine of the angle between them; 0 where one of them is zero."""
        scale = math.prod(self.norms)
        return min(max(self.products / scale, -1.0), 1.0) if scale else 0.0

    @property
    def sign_agreement(self) -> float:
        """Share of the same signs, among the entries at which neither is zero; 0 of none."""
        return self.agreeing / self.compared if self.compared else 0.0

    @property
    def norms(self) -> tuple[float, float]:
        """The Euclidean norms of both."""
        return math.sqrt(self.first), math.sqrt(self.second)

    @property
    def distance(self) -> float:
        """Norm of the difference."""
        return math.sqrt(self.differences)


_Sums = TypeVar("_Sums", Sums, PairSums)


class Comparison(NamedTuple):
    """Two trees leaf by leaf.

    Attributes:
      sums: of each leaf that both have.
      only_first: leaves that the second lacks.
      only_second: leaves that the first lacks.
    """

    sums: dict[str, PairSums]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]


class StageSites(NamedTuple):
    """The sites of stages that compute alike.

    Attributes:
      stages: their names.
      table: the sites, paths within a stage.
      tokens: rows of each example at each site, in the table's order.
    """

    stages: tuple[str, ...]
    table: SiteTable
    tokens: tuple[int, ...]


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


def measure(found: Contents, progress: Callable[[int, int, str], None] | None = None) -> dict[str, Sums]:
    """Reads every tensor, and sums over its entries.

    Args:
      found: of `contents`.
      progress: called with (leaves done, leaves in all, path).

    Returns:
      Sums by path.

    Raises:
      ValueError: where values are not finite.
    """
    sums = {}
    with found.reading() as read:
        for leaf in found.leaves:
            sums[leaf.path] = sums_of(read(leaf.path))
            if progress is not None:
                progress(len(sums), len(found.leaves), leaf.path)
    return sums


def compare(first: Contents, second: Contents, progress: Callable[[int, int, str], None] | None = None) -> Comparison:
    """Reads two trees leaf by leaf, and sums over the pairs of entries.

    Args:
      first: of `contents`.
      second: the same; of the same kind.
      progress: called with (leaves done, leaves in all, path).

    Raises:
      ValueError: things of two kinds, no leaf in common, a leaf of two shapes, or values that are not finite.
    """
    trees = (TASK_VECTOR, TENSORS)
    if first.kind != second.kind and not (first.kind in trees and second.kind in trees):
        raise ValueError(
            f"{first.name!r} is a {first.kind} and {second.name!r} a {second.kind}: give two of one kind; a task "
            "vector and its model are one thing and --model"
        )
    ours, theirs = ({leaf.path: leaf.shape for leaf in found.leaves} for found in (first, second))
    common = [path for path in ours if path in theirs]
    if not common:
        raise ValueError(
            f"{first.name!r} and {second.name!r} have no leaf in common: the one has {_some(ours)}, the other "
            f"{_some(theirs)}"
        )
    different = [path for path in common if ours[path] != theirs[path]]
    if different:
        path = different[0]
        raise ValueError(
            f"{len(different)} leaves of {first.name!r} and {second.name!r} differ in shape: {path} is "
            f"{list(ours[path])} and {list(theirs[path])}; only what belongs to models of one shape can be compared"
        )
    sums = {}
    with first.reading() as read, second.reading() as read_second:
        for path in common:
            sums[path] = pair_sums_of(read(path), read_second(path))
            if progress is not None:
                progress(len(sums), len(common), path)
    only = (tuple(path for path in one if path not in other) for one, other in ((ours, theirs), (theirs, ours)))
    return Comparison(sums, *only)


def base_sums(vector: Contents, model: Contents) -> tuple[dict[str, Sums], bool | None]:
    """The sums of the parameters that a task vector covers, and whether it was made for these very weights.

    Returns:
      Sums by path; and True or False where the file of the vector says for which weights, else None. Where it does all
      parameters are read, each once.

    Raises:
      ValueError: `model` is none, lacks a leaf of the vector, or has one of another shape.
    """
    if model.kind != MODEL:
        raise ValueError(f"{model.name!r} is a {model.kind}, expected the pre-trained model of {vector.name!r}")
    shapes = {leaf.path: leaf.shape for leaf in model.leaves}
    foreign = [leaf for leaf in vector.leaves if shapes.get(leaf.path) != leaf.shape]
    if foreign:
        leaf = foreign[0]
        raise ValueError(
            f"{len(foreign)} of {len(vector.leaves)} leaves of {vector.name!r} do not fit {model.name!r}: {leaf.path} "
            f"is {list(leaf.shape)} here and {list(shapes[leaf.path]) if leaf.path in shapes else 'missing'} there"
        )
    wanted = vector.about.get("base_fingerprint")
    covered = {leaf.path: Sums() for leaf in vector.leaves}
    identity = Fingerprint()
    with model.reading() as read:
        for path in sorted(covered if wanted is None else shapes):
            array = read(path)
            identity.add(path, np.asarray(array, order="C"))
            if path in covered:
                covered[path] = sums_of(array)
    return covered, None if wanted is None else identity.hexdigest() == wanted


def sums_of(array: np.ndarray) -> Sums:
    """The sums over the entries of an array, in float64.

    Raises:
      ValueError: entries that are no real numbers.
    """
    pieces = (x.astype(np.float64) for x in _pieces(array))
    return add_up((Sums(x.size, x.size - int(np.count_nonzero(x)), float(np.vdot(x, x))) for x in pieces), Sums())


def pair_sums_of(first: np.ndarray, second: np.ndarray) -> PairSums:
    """The sums over the entries of two arrays of one shape, in float64."""
    found = []
    for pieces in zip(_pieces(first), _pieces(second), strict=True):
        x, y = (piece.astype(np.float64) for piece in pieces)
        signs, difference = np.sign(x) * np.sign(y), x - y
        found.append(
            PairSums(
                first=float(np.vdot(x, x)),
                second=float(np.vdot(y, y)),
                products=float(np.vdot(x, y)),
                differences=float(np.vdot(difference, difference)),
                agreeing=int(np.count_nonzero(signs > 0)),
                compared=int(np.count_nonzero(signs)),
            )
        )
    return add_up(found, PairSums())


def add_up(items: Iterable[_Sums], start: _Sums) -> _Sums:
    """The sums over several leaves, and those of `start`, together."""
    columns: Any = zip(start, *items, strict=True)
    maker: Any = type(start)
    return maker(*map(sum, columns))


def total(sums: Mapping[str, _Sums], paths: Iterable[str]) -> _Sums:
    """The sums over the leaves of some paths, one at least.

    >>> total({"a": Sums(1, 0, 9.0), "b": Sums(2, 1, 16.0)}, ["a", "b"]).norm
    5.0
    """
    found = [sums[path] for path in paths]
    return add_up(found[1:], found[0])


def by_block(paths: Iterable[str]) -> dict[str, list[str]]:
    """The paths of each block, blocks in the order of their first appearance.

    >>> by_block(["blocks/0/up", "blocks/0/down", "head/kernel"])
    {'blocks/0': ['blocks/0/up', 'blocks/0/down'], 'head': ['head/kernel']}
    """
    blocks: dict[str, list[str]] = {}
    for path in paths:
        blocks.setdefault(place(path)[0], []).append(path)
    return blocks


def place(path: str) -> tuple[str, str]:
    """The block that a leaf is of, and the part of the block.

    A block ends at the first whole number of a path; a leaf that stands in no stack is in the block of its layer.

    >>> place("vision/blocks/3/attention/query/kernel"), place("vision/pre_norm/scale"), place("logit_scale")
    (('vision/blocks/3', 'attention'), ('vision/pre_norm', ''), ('logit_scale', ''))
    >>> place("vision_model.encoder.layers.3.mlp.fc1.weight")
    ('vision_model.encoder.layers.3', 'mlp')
    """
    found = re.match(r"((?:[^/.]+[/.])*?\d+)[/.]([^/.]+)", path)
    if found:
        return found[1], found[2]
    return re.sub(r"[/.][^/.]*$", "", path), ""


def without_number(path: str) -> str:
    """A path or key with ``*`` for the number of the layer, one for all layers of a stack.

    >>> without_number("vision/blocks/3/mlp/up/kernel"), without_number("encoder.layers.10.0.weight")
    ('vision/blocks/*/mlp/up/kernel', 'encoder.layers.*.0.weight')
    """
    return re.sub(r"(^|[/.])\d+(?=[/.]|$)", r"\1*", path, count=1)


def stage_sites(model: Model, inputs: PyTree) -> tuple[StageSites, ...]:
    """The sites of every kind of stage, from shapes alone: nothing is computed.

    Args:
      model: its parameters arrays or `jax.ShapeDtypeStruct`.
      inputs: of the first stage, two examples, arrays or shapes.

    Returns:
      A table for each function; stages that share one are named together.
    """
    names: dict[Any, list[str]] = {}
    tables: dict[Any, SiteTable] = {}
    carry = inputs
    for stage in model.stages:
        params = local_params(stage, model.params)
        names.setdefault(stage.function, []).append(stage.name)
        if stage.function not in tables:
            tables[stage.function] = sites(stage.function, params, carry)
        carry = jax.eval_shape(stage.function, params, carry)
    return tuple(
        StageSites(tuple(names[function]), table, tuple(math.prod(site.rows[1:]) for site in table.sites))
        for function, table in tables.items()
    )


def model_sites(found: Contents) -> tuple[StageSites, ...]:
    """The sites of the model of a folder; no weight is read.

    Raises:
      ValueError: what is no model.
    """
    if found.kind != MODEL:
        raise ValueError(f"{found.name!r} is a {found.kind}: only a model has sites")
    if isinstance(found.config, GenericConfig):
        raise ValueError(f"{found.name!r}: {no_code(found.about['model_type'])}")
    params = tree.nest({leaf.path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for leaf in found.leaves})
    family = family_of_config(found.config)
    return stage_sites(family.build(found.config, params), family.inputs(found.config, 2))


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


def _pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    if np.iscomplexobj(array):
        raise ValueError(f"complex numbers ({array.dtype.name}) have no sign: only real tensors are measured")
    flat = array.reshape(-1)
    return (flat[start : start + _PIECE] for start in range(0, flat.size, _PIECE))


def _natural(path: str) -> list[tuple[int, str]]:
    """A key that sorts 2 before 10."""
    return [(int(text), "") if text.isdecimal() else (-1, text) for text in re.split(r"(\d+)", path)]


def _some(paths: Iterable[str]) -> str:
    listed = list(paths)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "") if listed else "none"
