"""Model cards: the ``README.md`` of an edited model, which says from what and how it was made."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from tvjax.citations import cite, is_cited

_CONFIGS = ("config", "base_config")  # the model has its own beside the card
_PACKAGES = ("tvjax", "jax", "numpy", "safetensors")
_CITED = ("method", "objective")  # settings whose value is a name that `tvjax.cite` may know


def model_card(
    title: str,
    action: str,
    base: Mapping[str, str],
    *,
    inputs: Mapping[str, Mapping[str, str]] | None = None,
    settings: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    pictures: Mapping[str, str] | None = None,
    license: str | None = None,  # noqa: A002 - the hub's name of the field
    library: str = "transformers",
) -> str:
    """The text of a model card, with the fields that the hub reads in its YAML front matter.

    The field ``base_model`` stands there where the base is a hub id; a local folder is named in the text by its last
    part only.

    Args:
      title: name of the model.
      action: what was done, a sentence.
      base: identity of the model that was edited, as `Pretrained.identity` gives it.
      inputs: metadata of the task vectors by name of their file.
      settings: of the command or function; the papers behind a ``method`` or an ``objective`` are cited at the end.
      results: what came out, such as the fingerprint and the number of parameters.
      pictures: files beside the card, by what they show.
      license: the hub's identifier of one.
      library: that loads it; ``peft`` for adapters.

    >>> card = model_card("edited", "A task vector was added.", {"base_model": "openai/clip-vit-base-patch32"})
    >>> card.splitlines()[:3]
    ['---', 'base_model: openai/clip-vit-base-patch32', 'library_name: transformers']
    """
    name = base.get("base_model", "")
    data = ModelCardData(
        base_model=name if is_hub_id(name) else None,
        library_name=library,
        license=license,
        tags=["task-vectors", "tvjax"],
    )
    versions = {package: _version(package) for package in _PACKAGES} | {"python": platform.python_version()}
    parts = [f"---\n{data.to_yaml(line_break=chr(10))}\n---\n", f"# {title}\n", f"{action}\n"]
    for heading, content in (
        ("Base model", _identity(base, "base_")),
        *((f"Input `{_short(file)}`", about) for file, about in (inputs or {}).items()),
        ("Settings", settings or {}),
        ("Result", results or {}),
        ("Versions", versions),
    ):
        known = {key: value for key, value in content.items() if value not in (None, "") and key not in _CONFIGS}
        if known:
            rows = "\n".join(f"| {key} | {_cell(value)} |" for key, value in known.items())
            parts.append(f"## {heading}\n\n| | |\n|---|---|\n{rows}\n")
    parts += [f"![{shown}]({file})\n" for shown, file in (pictures or {}).items()]
    used = [str(value) for key, value in (settings or {}).items() if key in _CITED]
    parts.append(f"## Citation\n\n```bibtex\n{cite(*filter(is_cited, used))}\n```\n")
    return "\n".join(parts)


def is_hub_id(name: str) -> bool:
    """Whether a model's name is one of the hub, ``owner/name``, and no local folder.

    >>> is_hub_id("openai/clip-vit-base-patch32"), is_hub_id("/home/me/clip"), is_hub_id("../clip")
    (True, False, False)
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and not Path(name).exists()


def _identity(about: Mapping[str, str], prefix: str) -> dict[str, str]:
    return {key.removeprefix(prefix): value for key, value in about.items() if key.startswith(prefix)}


def _cell(value: Any) -> str:
    text = _short(value) if isinstance(value, str) else json.dumps(value, default=str)
    return "`" + text.replace("|", "\\|").replace("\n", " ").replace("`", "'") + "`"


def _short(name: str) -> str:
    """A name without the folders of one's own machine."""
    return Path(name).name if Path(name).is_absolute() or name.startswith(".") or Path(name).exists() else name


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
