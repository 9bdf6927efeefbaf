"""Files that are either the old or the new one, whenever a run is killed; with several processes, whichever is.

A file is written by the first process, or by all of them together (``shared``), a folder by all of them: they use one
temporary name, and it becomes the last one when all are well.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from tvjax import processes


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], *, shared: bool = False) -> Iterator[Path]:
    """Gives a path beside `path` to write to; the written file takes the place of `path` when the block ends.

    The data are on the disk before the rename. When the block raises, what it wrote is removed and `path` is untouched.

    Args:
      path: of the file.
      shared: all processes write into one file, each its part, and enter and leave the block together. Else each
        writes the same for itself, what the first process wrote stays, and none waits for another.

    Raises:
      ValueError: `path` is something else than a file, such as a folder or a device.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "note.txt"
    ...     with replacing(path) as temporary:
    ...         _ = temporary.write_text("new")
    ...     path.read_text(), len(list(Path(folder).iterdir()))
    ('new', 1)
    """
    path = Path(path)
    token = secrets.token_hex(4)
    temporary = path.with_name(f".{path.name}.{processes.from_first(token) if shared else token}.partial")
    try:
        with processes.together(f"write {path}") if shared else contextlib.nullcontext():
            if path.exists() and not path.is_file():  # a rename would replace a device such as /dev/null
                raise ValueError(f"{str(path)!r} is a folder or a device, not a file: give the name of a new file")
            yield temporary
            _sync(temporary)
        with processes.together(f"rename {temporary}") if shared else contextlib.nullcontext():
            if processes.is_first():
                temporary.chmod(0o666 & ~_umask())  # some writers make files for their owner alone
                _sync(temporary)
                os.replace(temporary, path)
                _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file of text, complete or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a folder beside `path` to fill; it becomes `path`, which is absent or empty, when the block ends.

    When the block raises, the folder and what is in it are removed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{processes.from_first(secrets.token_hex(4))}.partial")
    try:
        with processes.together(f"make the folder {path.parent}"):
            if processes.is_first():
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary.mkdir()
        with processes.together(f"write {path}"):
            if not temporary.is_dir():
                raise ValueError(f"{str(path.parent)!r} is not the same folder in all processes: give one that is")
            yield temporary
            _sync(temporary)
        with processes.together(f"rename {temporary}"):
            if processes.is_first():
                os.replace(temporary, path)
                _sync(path.parent)
    finally:
        if processes.is_first():
            shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0o022)  # it cannot be read without being set
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
