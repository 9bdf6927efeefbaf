"""JSON on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tvjax.checkpoints.atomic import write_text
from tvjax.kinds import kind_of


def read_json(path: Path, hint: str = "is it the folder of a Hugging Face model?") -> dict[str, Any]:
    """The object in a file.

    Args:
      path: of the file.
      hint: what the error says where there is no such file.

    Raises:
      ValueError: a file that is absent, malformed, or holds something else.
    """
    content = _content(path, hint)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {kind_of(content)}, expected an object: download it again")
    return content


def read_json_list(path: Path) -> list[Any]:
    """The list in a file.

    Raises:
      ValueError: a file that is absent, malformed, or holds something else.
    """
    content = _content(path, "download it again")
    if not isinstance(content, list):
        raise ValueError(f"{path} holds {kind_of(content)}, expected a list: download it again")
    return content


def _content(path: Path, hint: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent} has no {path.name}: {hint}") from error
    except (ValueError, RecursionError) as error:  # malformed JSON or UTF-8
        raise ValueError(f"{path} is no JSON ({error}): download it again") from error


def write_json(path: Path, content: Mapping[str, Any], sort_keys: bool = True) -> None:
    """Writes an object, replacing the file when it is complete."""
    write_text(path, json.dumps(content, indent=2, sort_keys=sort_keys) + "\n")
