"""Saving and loading a fitted transport, so that scaling sweeps and further task vectors reuse its maps."""

from __future__ import annotations

import json
import os
from typing import Any

import jax
import jax.numpy as jnp

from tvjax.align.procrustes import Rotation
from tvjax.checkpoints.safetensors import open_tensors, save_tensors
from tvjax.stages import Rows
from tvjax.transport.base import Part, Piece, Rule, State

FORMAT = "tvjax transport 1"


def save_state(path: str | os.PathLike[str], state: State) -> None:
    """Writes a fitted transport as one safetensors file, replaced atomically; the rules stand in its metadata.

    Args:
      path: where to.
      state: what `fit` returned.
    """
    tensors: dict[str, jax.Array] = {}
    for number, part in enumerate(state.parts):
        for name, value in part.arrays.items():
            fields = value._asdict() if isinstance(value, Rotation) else {"array": value}
            tensors |= {f"{number}|arrays|{name}|{field}": array for field, array in fields.items()}
        for name, values in part.measures.items():
            tensors |= {f"{number}|measures|{name}|{field}": jnp.asarray(array) for field, array in values.items()}
    description = {
        "parts": [{"link": part.link, "rules": part.rules} for part in state.parts],
        "paths": state.paths,
        "sources": state.sources,
        "notes": state.notes,
    }
    save_tensors(path, tensors, {"format": FORMAT, "description": json.dumps(description)})


def load_state(path: str | os.PathLike[str]) -> State:
    """Reads what `save_state` wrote; a transported task vector then comes as nested dicts.

    Raises:
      ValueError: a file that is absent, corrupt, or no fitted transport.
    """
    with open_tensors(path) as file:
        if file.metadata.get("format") != FORMAT:
            raise ValueError(f"{os.fspath(path)!r} holds no fitted transport: make it with save_state")
        description = json.loads(file.metadata["description"])
        found: list[dict[str, dict[str, Any]]] = [{"arrays": {}, "measures": {}} for _ in description["parts"]]
        for key in file.headers:
            number, group, name, field = key.split("|")
            found[int(number)][group].setdefault(name, {})[field] = jnp.asarray(file.read(key))
    parts = []
    for part, content in zip(found, description["parts"], strict=True):
        arrays = {
            name: fields["array"] if "array" in fields else Rotation(**fields)
            for name, fields in part["arrays"].items()
        }
        parts.append(Part(content["link"], arrays, part["measures"], tuple(map(_rule, content["rules"]))))
    paths, sources, notes = (tuple(description[name]) for name in ("paths", "sources", "notes"))
    return State(tuple(parts), None, paths, sources, notes)


def _rule(fields: Any) -> Rule:
    rule = Rule(*fields)
    pieces = tuple(Piece(kind, _view(a), _view(b), *names) for kind, a, b, *names in rule.pieces)
    return rule._replace(shape=tuple(rule.shape), source_shape=tuple(rule.source_shape), pieces=pieces)


def _view(steps: Any) -> Any:
    return tuple((step[0], *map(_rows, step[1:])) if step[0] == "grid" else _frozen(step) for step in steps)


def _rows(fields: Any) -> Rows:
    special, grid, mask = fields
    return Rows(special, None if grid is None else tuple(grid), mask)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
