"""Files that are either the old or the new one, whenever a run is killed; with several processes, whichever is.

A file is written by the first process, or by all of them together (``shared``), a folder by all of them: they use one
temporary name, and it becomes the last one when all are well.

What a killed run leaves under its temporary name, the next one that writes to the same path removes. It knows it by a
lock, which the system lets go when a process ends: what another process still writes is locked, and stays.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import glob
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tvjax import processes
from tvjax.kinds import as_path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
    path = as_path(path)
    with processes.together(f"write {path}") if shared else contextlib.nullcontext():
        if path.exists() and not path.is_file():  # a rename would replace a device such as /dev/null
            raise ValueError(f"{str(path)!r} is a folder or a device, not a file: give the name of a new file")
    with _partial(path, functools.partial(Path.touch, exist_ok=False), shared=shared) as temporary:
        with processes.together(f"write {path}") if shared else contextlib.nullcontext():
            yield temporary
            _sync(temporary)
        with processes.together(f"rename {temporary}") if shared else contextlib.nullcontext():
            if processes.is_first():
                temporary.chmod(0o666 & ~_umask())  # some writers make files for their owner alone
                _sync(temporary)
                os.replace(temporary, path)
                _sync(path.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file of text, complete or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a folder beside `path` to fill; it becomes `path`, which is absent or empty, when the block ends.

    When the block raises, the folder and what is in it are removed. A folder that is being filled so is given as it is:
    what writes a part of it makes no folder of its own.
    """
    path = as_path(path, "the path of a new folder")
    if path.is_dir() and becomes(path) != path:
        yield path
        return
    with processes.together(f"make the folder {path.parent}"):
        if processes.is_first():
            path.parent.mkdir(parents=True, exist_ok=True)
    with _partial(path, Path.mkdir, shared=True) as temporary:
        with processes.together(f"write {path}"):
            if not temporary.is_dir():
                raise ValueError(f"{str(path.parent)!r} is not the same folder in all processes: give one that is")
            yield temporary
            _sync(temporary)
        with processes.together(f"rename {temporary}"):
            if processes.is_first():
                os.replace(temporary, path)
                _sync(path.parent)


@contextlib.contextmanager
def folder_beside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a folder for what is needed only while `path` is made, on the same disk; it is removed with its content."""
    with _partial(Path(path), Path.mkdir) as temporary:
        yield temporary


@contextlib.contextmanager
def _partial(path: Path, make: Callable[[Path], None], *, shared: bool = False) -> Iterator[Path]:
    """Makes something beside a path under a temporary name, and removes it again where it still has that name.

    Args:
      path: that it is made for; what killed runs left beside it is removed.
      make: a file or a folder.
      shared: one for all processes, which the first makes; else one for each.
    """
    token, lock = "", None
    try:
        with processes.together(f"make a file beside {path}") if shared else contextlib.nullcontext():
            if not shared or processes.is_first():
                _remove_left_behind(path)
                token, lock = _made(path, make)
        yield _named(path, processes.from_first(token) if shared else token)
    except OSError as error:
        if error.filename is None and error.errno in _FULL:  # of a write, which knows no name
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        if lock is not None:
            _remove(_named(path, token))
            os.close(lock)


def becomes(path: str | os.PathLike[str]) -> Path:
    """What the path of a file or folder that is being filled will be; any other path is itself.

    >>> becomes("out/.edited.0a1b2c3d.partial").as_posix(), becomes("out/edited").as_posix()
    ('out/edited', 'out/edited')
    """
    path = Path(path)
    found = re.fullmatch(r"\.(.+)\.[0-9a-f]{8}\.partial", path.name)
    return path.with_name(found[1]) if found else path


def _named(path: Path, token: str) -> Path:
    return path.with_name(f".{path.name}.{token}.partial")


def _made(path: Path, make: Callable[[Path], None]) -> tuple[str, int]:
    """The token of a new temporary name, and the descriptor that holds the lock on what is made there."""
    while True:
        token = secrets.token_hex(4)
        make(_named(path, token))
        with contextlib.suppress(FileNotFoundError):  # another run took it for left behind, before it was locked
            descriptor = os.open(_named(path, token), os.O_RDONLY)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _named(path, token).exists():
                return token, descriptor
            os.close(descriptor)


def _remove_left_behind(path: Path) -> None:
    """Removes what processes that have ended left beside a path."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????.partial"):
        with contextlib.suppress(OSError):  # it is gone by now, or another user's
            descriptor = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where a process still writes it
                _remove(left)
            finally:
                os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


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
