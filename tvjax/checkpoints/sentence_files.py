"""What sentence-transformers keeps beside a model: how its tokens become one embedding, and how many are read.

``modules.json`` lists what is run after one another: the transformer in the folder itself, a pooling in a folder of its
own, and where there is one a normalisation.
"""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from tvjax.checkpoints.atomic import replacing
from tvjax.checkpoints.json_files import read_json, read_json_list

MODULES = "modules.json"
_LENGTH = "sentence_bert_config.json"
_MODES = {  # as older versions name them
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def sentence_settings(folder: Path) -> dict[str, Any]:
    """What the files of sentence-transformers in a folder say, as fields of a config; empty where there are none.

    Returns:
      ``pooling``, ``normalise`` and ``max_seq_length``. The pooling of modules that are not known is named after them,
      which a config refuses.

    Raises:
      ValueError: files that are damaged, or one that ``modules.json`` names and the folder lacks.
    """
    if not (folder / MODULES).is_file():
        return {}
    found: dict[str, Any] = {"normalise": False}
    kinds = []
    for kind, path in _modules(folder):
        kinds.append(kind)
        if kind == "Pooling":
            found["pooling"] = _pooling(folder / path / "config.json")
        if kind == "Normalize":
            found["normalise"] = True
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"], ["Transformer"]):
        found["pooling"] = " and ".join(kinds)
    if (folder / _LENGTH).is_file():
        length = read_json(folder / _LENGTH)
        if length.get("max_seq_length") is not None:
            found["max_seq_length"] = length["max_seq_length"]
        if length.get("do_lower_case"):
            found["pooling"] = f"{found.get('pooling', 'mean')} of lower-cased texts (do_lower_case in {_LENGTH})"
    return found


def copy_sentence_files(source: Path, target: Path) -> None:
    """Copies the folders of the modules, which hold a config each."""
    if not (source / MODULES).is_file():
        return
    for _, path in _modules(source):
        config = source / path / "config.json"
        if path and config.is_file() and not (target / path / "config.json").exists():
            (target / path).mkdir(exist_ok=True)
            with replacing(target / path / "config.json") as temporary:
                shutil.copyfile(config, temporary)


def _modules(folder: Path) -> list[tuple[str, str]]:
    """The class and the folder of each module.

    Raises:
      ValueError: a list of something else, or a path that leaves the folder.
    """
    file = folder / MODULES
    found = []
    for module in read_json_list(file):
        kind, path = (module.get(name) for name in ("type", "path")) if isinstance(module, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(path, str):
            raise ValueError(f"{file} has {module!r}, expected an object with a type and a path: download it again")
        if len(PurePosixPath(path).parts) > 1 or path in ("..", "/") or "\\" in path:
            raise ValueError(f"{file} names the path {path!r}, expected a folder beside it: download it again")
        found.append((kind.rpartition(".")[2], path))
    return found


def _pooling(file: Path) -> str:
    """How the tokens of a text become one embedding.

    Raises:
      ValueError: a file that is damaged or not there.
    """
    settings = read_json(file)
    mode = settings.get("pooling_mode")
    modes = [mode] if isinstance(mode, str) else [_MODES[name] for name in _MODES if settings.get(name)]
    if not modes:
        raise ValueError(f"{file} names no pooling, expected one of {', '.join(_MODES)}: download it again")
    return " and ".join(modes)
