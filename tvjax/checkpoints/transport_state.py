"""Saving and loading a fitted transport, so that scaling sweeps and further task vectors reuse its maps."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from tvjax import processes
from tvjax.capture.views import Constant
from tvjax.checkpoints.json_files import read_json, write_json
from tvjax.checkpoints.reader import open_tensors
from tvjax.checkpoints.safetensors import save_tensors
from tvjax.kinds import as_path
from tvjax.placement import name_of
from tvjax.stages import Stream
from tvjax.transport import rotation  # noqa: F401 - registers what its states hold
from tvjax.transport.base import STATE_TYPES, LeafUse, LinkState, MapInfo, Rule, State

FORMAT = "tvjax transport 1"
STAGE_FORMAT = "tvjax transport stage 1"


def save_state(path: str | os.PathLike[str], state: State) -> None:
    """Writes a fitted transport as one safetensors file, replaced atomically; the rules stand in its metadata.

    Args:
      path: where to.
      state: what `fit` returned.

    Raises:
      ValueError: a state whose maps were dropped (``fit(..., stream=..., write=...)``).
    """
    state.check_kept()
    fitted = () if state.mesh is None else (f"fitted on the mesh {name_of(state.mesh)}",)
    about = {"paths": state.paths, "sources": state.sources, "notes": (*state.notes, *fitted)}
    _save_parts(path, FORMAT, state.parts, about)


def load_state(path: str | os.PathLike[str]) -> State:
    """Needs what `save_state` wrote; a transported task vector then comes as nested dicts.

    Raises:
      ValueError: a file that is absent, corrupt, or no fitted transport.
    """
    loaded, description = _load_parts(path, FORMAT)
    paths, sources, notes = (tuple(description[name]) for name in ("paths", "sources", "notes"))
    return State(loaded, None, paths, sources, notes)


class TransportStore:
    """What `tvjax.fit` has fitted, a file for each stage, in a folder: ``fit(..., cache=...)`` goes on from there.

    The folder belongs to one fit: it keeps what that depends on, and refuses anything else. A fit that went on gives
    the same maps; where it reads gradients, up to rounding. Several processes share it, and all make one store: each
    writes the shards that it owns.

    >>> import tempfile
    >>> from tvjax.stages import Batch, single_stage
    >>> from tvjax.transport import fit, theseus
    >>> model = single_stage(lambda p, x: x @ p["w"], {"w": jnp.eye(3)})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for _ in range(2):  # the second time nothing is computed
    ...         store = TransportStore(f"{folder}/maps", {"source": "a fingerprint"})
    ...         state = fit(theseus(), model, model, [Batch(jnp.eye(3))], cache=store)
    ...     store.stages
    ('model',)
    """

    def __init__(self, folder: str | os.PathLike[str], depends_on: Mapping[str, str]):
        """A store.

        Args:
          folder: made where it is absent.
          depends_on: what the maps depend on, by name: fingerprints of models and images, the method, its settings.

        Raises:
          ValueError: the folder holds the maps of another fit; the message names what differs.
        """
        self.folder = as_path(folder, "the path of a folder")
        file = self.folder / "depends_on.json"
        processes.check_same(f"keep in {folder}", depends_on)
        with processes.together(f"make the folder {folder}"):
            if processes.is_first() and not file.is_file():
                if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                    raise ValueError(f"{str(folder)!r} is not empty, and holds no maps: give another folder for them")
                self.folder.mkdir(parents=True, exist_ok=True)
                write_json(file, dict(depends_on))
        with processes.together(f"open {folder}"):
            if not file.is_file():
                raise ValueError(f"{str(folder)!r} is not the same folder in all processes: give one that is")
            found = read_json(file)
            differ = sorted(name for name in {**found, **depends_on} if found.get(name) != depends_on.get(name))
            if differ:
                raise ValueError(
                    f"{str(folder)!r} holds the maps of another fit, of other {', '.join(differ)}: "
                    "give another folder, or remove it"
                )

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages whose parts are kept."""
        return tuple(sorted(unquote(file.stem) for file in self.folder.glob("*.safetensors")))

    def load(self, stage: str) -> tuple[LinkState, ...] | None:
        """The parts of a stage; None where they are not kept.

        Raises:
          ValueError: a file that is corrupt.
        """
        file = self._file(stage)
        if not processes.from_first("kept" if file.is_file() else ""):
            return None
        with processes.together(f"read {file}"):
            return _load_parts(file, STAGE_FORMAT)[0]

    def save(self, stage: str, parts: tuple[LinkState, ...]) -> None:
        """Keeps the parts of a stage; a file is complete before it has its name."""
        _save_parts(self._file(stage), STAGE_FORMAT, parts, {})

    def _file(self, stage: str) -> Path:
        return self.folder / f"{quote(stage, safe='')}.safetensors"


def _save_parts(path: str | os.PathLike[str], kind: str, parts: Sequence[LinkState], about: Mapping[str, Any]) -> None:
    tensors: dict[str, jax.Array] = {}
    for number, part in enumerate(parts):
        for name, value in part.arrays.items():
            fields = value._asdict() if hasattr(value, "_asdict") else {"array": value}
            tensors |= {f"{number}|arrays|{name}|{field}": array for field, array in fields.items()}
        for name, values in part.measures.items():
            tensors |= {f"{number}|measures|{name}|{field}": jnp.asarray(array) for field, array in values.items()}
    described = [
        {
            "link": part.link,
            "rules": part.rules,
            "maps": part.maps,
            "types": {name: type(x).__name__ for name, x in part.arrays.items() if hasattr(x, "_asdict")},
        }
        for part in parts
    ]
    description = {"parts": described, **about}
    save_tensors(path, tensors, {"format": kind, "description": json.dumps(description, default=_plain)})


def _load_parts(path: str | os.PathLike[str], kind: str) -> tuple[tuple[LinkState, ...], dict[str, Any]]:
    with open_tensors(path) as file:
        if file.metadata.get("format") != kind:
            raise ValueError(f"{os.fspath(path)!r} holds no fitted transport: make it with save_state")
        description = json.loads(file.metadata["description"])
        found: list[dict[str, dict[str, Any]]] = [{"arrays": {}, "measures": {}} for _ in description["parts"]]
        for key in file.headers:
            number, group, name, field = key.split("|")
            found[int(number)][group].setdefault(name, {})[field] = jnp.asarray(file.read(key))
    parts = []
    for part, content in zip(found, description["parts"], strict=True):
        arrays = {}
        for name, fields in part["arrays"].items():
            kind = content["types"].get(name)
            if kind is not None and kind not in STATE_TYPES:
                raise ValueError(
                    f"{os.fspath(path)!r} holds a {kind} of {content['link']}: import what registers it first"
                )
            arrays[name] = fields["array"] if kind is None else STATE_TYPES[kind](**fields)
        maps = tuple(MapInfo(*map(_frozen, info)) for info in content["maps"])
        parts.append(LinkState(content["link"], arrays, part["measures"], tuple(map(_rule, content["rules"])), maps))
    return tuple(parts), description


def _rule(fields: Any) -> Rule:
    rule = Rule(*fields)
    pieces = tuple(
        LeafUse(kind, _view(a), _view(b), inner, outer, _frozen(groups), taps)
        for kind, a, b, inner, outer, groups, taps in rule.pieces
    )
    return rule._replace(shape=tuple(rule.shape), source_shape=tuple(rule.source_shape), pieces=pieces)


def _view(steps: Any) -> Any:
    return tuple(_step(step) for step in steps)


def _step(step: Any) -> Any:
    if step[0] == "grid":
        return (step[0], *map(_stream, step[1:]))
    if step[0] == "times" and isinstance(step[1], dict):
        return ("times", Constant(np.array(step[1]["constant"], step[1]["dtype"])))
    return _frozen(step)


def _plain(value: Any) -> Any:
    """A constant of a view as JSON; how a leaf lay is no part of a file."""
    if isinstance(value, NamedSharding):
        return None
    if isinstance(value, Constant):
        return {"constant": value.array.tolist(), "dtype": value.array.dtype.name}
    raise TypeError(f"{type(value).__name__} is no JSON")


def _stream(fields: Any) -> Stream:
    special, grid, mask = fields
    return Stream(special, None if grid is None else tuple(grid), mask)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
