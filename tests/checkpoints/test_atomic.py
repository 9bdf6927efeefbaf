"""Files and folders are the old or the new ones, whenever a run ends."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tvjax.checkpoints.atomic import new_folder, replacing, write_text

KILLED = """
import os, sys
from tvjax.checkpoints.atomic import {manager}
with {manager}(sys.argv[1]) as path:
    ({write}).write_text("half")
    os.kill(os.getpid(), 9)
"""


def killed(manager, write, path):
    script = KILLED.format(manager=manager, write=write)
    return subprocess.run([sys.executable, "-c", script, str(path)], check=False).returncode


def test_a_block_that_raises_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_killed_run_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    assert killed("replacing", "path", path) == -9
    assert path.read_text() == "old"
    (left,) = set(tmp_path.iterdir()) - {path}
    with replacing(path) as temporary:
        assert not left.exists()
        temporary.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_killed_run_leaves_no_folder(tmp_path):
    path = tmp_path / "deep" / "folder"
    assert killed("new_folder", "path / 'file'", path) == -9
    (left,) = path.parent.iterdir()
    assert not path.exists() and (left / "file").is_file()
    with new_folder(path) as temporary:
        assert not left.exists()
        (temporary / "file").write_text("new")
    assert (path / "file").read_text() == "new" and list(path.parent.iterdir()) == [path]


def test_what_another_process_still_writes_stays(tmp_path):
    path = tmp_path / "[a]"
    script = KILLED.format(manager="new_folder", write="path / 'file'").replace("os.kill(os.getpid(), 9)", "input()")
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, text=True) as other:
        try:
            while not list(tmp_path.glob(".*.partial/file")):
                assert other.poll() is None
                time.sleep(0.01)
            with new_folder(path) as outer, pytest.raises(RuntimeError), new_folder(path) as inner:
                assert len(list(tmp_path.iterdir())) == 3 and outer.is_dir() and inner.is_dir()
                raise RuntimeError
            path.rmdir()
        finally:
            other.communicate("\n")
    assert other.returncode == 0 and (path / "file").read_text() == "half" and list(tmp_path.iterdir()) == [path]


def test_what_only_looks_like_a_temporary_name_stays(tmp_path):
    names = [".file.partial", ".file.12345678.partial~", ".other.12345678.partial", ".file.tar.12345678.partial"]
    for name in names:
        (tmp_path / name).touch()
    write_text(tmp_path / "file", "new")
    assert {file.name for file in tmp_path.iterdir()} == {"file", *names}


def test_a_block_that_raises_leaves_no_folder(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "folder") as temporary:
        (temporary / "file").write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_killing_writes_at_random_moments_leaves_whole_targets():
    script = Path(__file__).parents[2] / "scripts" / "kill_writes.py"
    command = [sys.executable, str(script), "--kills", "8", "--megabytes", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "8 kills, no corrupt target" in done.stdout, done.stdout + done.stderr


def test_nothing_but_a_file_is_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(ValueError, match="is a folder or a device"), replacing(tmp_path / name):
            pytest.fail("there is nothing to write to")
    assert (tmp_path / "pipe").is_fifo() and sorted(tmp_path.iterdir()) == [tmp_path / "folder", tmp_path / "pipe"]


def test_a_disk_without_space_is_named(tmp_path):
    """A write to an open file fails without the name of the file."""
    for making in (replacing, new_folder):
        with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'out'}'"), making(tmp_path / "out"):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())
