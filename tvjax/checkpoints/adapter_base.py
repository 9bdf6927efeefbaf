"""Whether an adapter was trained on the base that it is to be read for, as far as its config can tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tvjax.checkpoints.folder import Checkpoint, open_checkpoint
from tvjax.checkpoints.huggingface import Pretrained, read_leaf
from tvjax.checkpoints.model_card import is_hub_id
from tvjax.models.families import shapes_of

_COMMIT = re.compile("[0-9a-f]{40}")
_CACHED = re.compile(r"models--([^/]+)--([^/]+)/snapshots/[0-9a-f]{40}$")  # a hub repository on a disk


def check_base(settings: Mapping[str, Any], base: Pretrained | Checkpoint, any_base: bool = False) -> tuple[str, ...]:
    """Compares the base that an adapter's config names with the one that is given.

    Two hub ids that differ, and a folder that is there and holds other weights, are another base. A folder that is no
    longer there, or one name on the hub and the other on a disk, say nothing: that is a note.

    Args:
      settings: of the adapter.
      base: the model that is given.
      any_base: note another base too, in the place of the error.

    Returns:
      What is to be noted; empty where the base is the one that is named.

    Raises:
      ValueError: the adapter was trained on another base.
    """
    named = settings.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return (f"the adapter names no base model, so nothing shows that it was trained on {base.name!r}",)
    revision = settings.get("revision")
    if _name(named) == _name(base.name) and _are_other_commits(revision, base.revision):
        return (f"the adapter was trained on {named!r} at {revision}, and {base.name!r} is at {base.revision}",)
    if _name(named) == _name(base.name) or (base.folder is not None and Path(named).resolve() == base.folder.resolve()):
        return ()
    if Path(named).is_dir():
        leaf = _first_difference(Path(named), base)
        if leaf == "":
            return ()
        another = leaf is not None
    else:
        leaf, another = None, is_hub_id(_name(named)) and is_hub_id(_name(base.name))
    if not another:
        return (f"the adapter was trained on {named!r}, and nothing shows whether {base.name!r} has the same weights",)
    if any_base:
        return (f"the adapter was trained on {named!r}, another base than {base.name!r}, and is taken all the same",)
    raise ValueError(
        f"the adapter was trained on {named!r}, and {base.name!r} is another model"
        + (f" ({leaf} differs)" if leaf else "")
        + ": give the base that it was trained on; where you know that it fits, say --any-base (any_base=True)"
    )


def _are_other_commits(first: Any, second: str) -> bool:
    """Whether both are commits, not branches or nothing, and differ."""
    return isinstance(first, str) and bool(_COMMIT.fullmatch(first) and _COMMIT.fullmatch(second)) and first != second


def _name(name: str) -> str:
    """The hub id where the name is that of its copy on this disk, else the name without a slash at its end."""
    match = _CACHED.search(name.rstrip("/"))
    return f"{match[1]}/{match[2]}" if match else name.rstrip("/")


def _first_difference(folder: Path, base: Pretrained | Checkpoint) -> str | None:
    """The first parameter that differs between a folder's model and the base, "" for none; None if there is no model.

    A tower alone is compared with that tower.
    """
    if not (folder / "config.json").is_file():
        return None
    try:
        with open_checkpoint(folder) as named:
            shapes = {path: shape for path, shape in _shapes(base).items() if path in named.shapes}
            for path, shape in shapes.items():
                if named.shapes[path] != shape:
                    return path
                if not np.array_equal(read_leaf(named, path), read_leaf(base, path)):
                    return path
    except ValueError:
        return None  # no model of a family that is known
    return "" if shapes else None


def _shapes(base: Pretrained | Checkpoint) -> Mapping[str, tuple[int, ...]]:
    return base.shapes if isinstance(base, Checkpoint) else shapes_of(base.config)
