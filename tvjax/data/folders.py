"""Images in folders, one folder a class."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from tvjax.data.examples import by_name, spelled
from tvjax.data.images import Images, read_file

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF", "WEBP")  # photographs, not documents
_SYSTEM = (
    *("__MACOSX", "__pycache__", "@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN", "System Volume Information"),
    *("lost+found", "Thumbs.db", "desktop.ini"),
)
_SPLITS = ("dev", "eval", "test", "testing", "train", "training", "val", "valid", "validation")


def read_folder(folder: str | os.PathLike[str], class_names: Sequence[str] | None = None) -> Images:
    """The images of a folder whose subfolders are the classes, in the order of names.

    A file is an image by its ending, or else by its first bytes. Images in folders inside a class's folder are of that
    class. What is hidden or made by systems (``.ipynb_checkpoints``, ``__MACOSX``, ``@eaDir``) is passed over. The
    notes say what was passed over or is no image.

    Args:
      folder: a folder of folders of images, or of images without classes.
      class_names: the classes in the order of a model's outputs, as `ls` writes them or with spaces for underscores;
        None: the subfolders, sorted.

    Returns:
      The images, none of them read yet.

    Raises:
      ValueError: for a folder that is not there, a class without images, images beside the classes, splits in the place
        of classes, or a subfolder that is none of the given classes.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     (Path(folder) / "polar_bear").mkdir()
    ...     Image.new("RGB", (4, 3)).save(Path(folder) / "polar_bear" / "1.png")
    ...     found = read_folder(folder)
    ...     found.class_names, found.labels.tolist(), found[0].shape
    (('polar bear',), [0], (3, 4, 3))
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"{str(folder)!r} is a file: give a folder of images, or an archive that ends in .npz")
    if not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r}: give one whose subfolders are the classes")
    if any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        raise ValueError(f"{str(folder)!r} is a saved Hugging Face dataset: give it as 'hf:{folder}'")
    left_out = _LeftOut(folder)
    subfolders = left_out.folders(sorted(path for path in folder.iterdir() if path.is_dir()))
    loose = left_out.files(sorted(path for path in folder.iterdir() if not path.is_dir()))
    if not subfolders:
        if not loose:
            raise ValueError(
                f"{str(folder)!r} has no subfolders and no images{left_out.found()}: put the images of each class into "
                "a folder of its name"
            )
        return Images(str(folder), loose, read_file, notes=left_out.notes())
    if loose:
        raise ValueError(
            f"{str(folder)!r} has {len(loose)} images beside its subfolders ({loose[0].name}, ...), which are in no "
            "class: move or remove them"
        )
    _check_twice(folder, subfolders)
    if class_names is not None:  # what `ls` lists that is no class
        others = {path.name for path in folder.iterdir()} - {path.name for path in subfolders}
        class_names = [name for name in class_names if name.strip().rstrip("/") not in others]
    names, number = by_name(str(folder), [path.name for path in subfolders], class_names, "subfolders")
    files: list[Path] = []
    labels: list[int] = []
    for path in subfolders:
        own = _images(path, left_out)
        files += own
        labels += [number[path.name]] * len(own)
    return Images(str(folder), files, read_file, np.array(labels, np.int32), names, left_out.notes())


@dataclasses.dataclass
class _LeftOut:
    """What is in a folder and was not read.

    Attributes:
      root: the folder.
      passed: folders that were passed over.
      kinds: how many files were not read, by kind.
      deeper: folders of images inside those of classes.
    """

    root: Path
    passed: list[str] = dataclasses.field(default_factory=list)
    kinds: Counter[str] = dataclasses.field(default_factory=Counter)
    deeper: Counter[str] = dataclasses.field(default_factory=Counter)

    def folders(self, found: Sequence[Path]) -> list[Path]:
        """Those that are not passed over."""
        self.passed += [str(path.relative_to(self.root)) for path in found if _is_system(path.name)]
        return [path for path in found if not _is_system(path.name)]

    def files(self, found: Sequence[Path]) -> list[Path]:
        """Those that are images."""
        images = [path for path in found if not _is_system(path.name) and _is_image(path)]
        for path in set(found) - set(images):
            self.kinds["hidden" if _is_system(path.name) else path.suffix.lower() or "without ending"] += 1
        return images

    def found(self) -> str:
        """The files that were not read, in brackets; empty where there are none."""
        return f" ({self._kinds()})" if self.kinds else ""

    def notes(self) -> tuple[str, ...]:
        """What is to be said."""
        notes = []
        if self.passed:
            notes.append(f"folders that are hidden or made by a system were passed over: {', '.join(self.passed[:8])}")
        if self.kinds:
            total = self.kinds.total()
            notes.append(f"{total} {'file is no image' if total == 1 else 'files are no images'}: {self._kinds()}")
        if self.deeper:
            places = ", ".join(list(self.deeper)[:4])
            notes.append(f"{self.deeper.total()} images lie in folders inside those of their classes ({places})")
        return tuple(notes)

    def _kinds(self) -> str:
        return ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))


def _images(folder: Path, left_out: _LeftOut) -> list[Path]:
    """The images of a class, those of its own folder and of the folders inside it.

    Raises:
      ValueError: where there are none, or the folder is one of splits.
    """
    before = left_out.kinds.copy()
    found: list[Path] = []
    deeper: Counter[str] = Counter()
    for place, files in _walk(folder, left_out):
        own = left_out.files(files)
        found += own
        if own and place != folder:
            deeper[str(place.relative_to(left_out.root))] = len(own)
    if not found:
        seen = dataclasses.replace(left_out, kinds=left_out.kinds - before).found()
        raise ValueError(f"{str(folder)!r} has no images{seen}: remove it, or put some there")
    if folder.name.lower() in _SPLITS and deeper.total() == len(found):
        raise ValueError(
            f"{str(folder)!r} has no images of its own, but folders of images ({next(iter(deeper))}, ...): it looks "
            "like a split and not like a class, so give it in the place of the folder that it is in"
        )
    left_out.deeper += deeper
    return sorted(found)


def _walk(folder: Path, left_out: _LeftOut) -> Iterator[tuple[Path, list[Path]]]:
    """A folder and those inside it that are not passed over, each with its files."""
    for place, folders, files in os.walk(folder):
        here = Path(place)
        links = [name for name in folders if (here / name).is_symlink()]  # which may lead in a circle
        left_out.kinds["links to folders"] += len(links)
        kept = left_out.folders([here / name for name in sorted(folders) if name not in links])
        folders[:] = [path.name for path in kept]
        yield here, [here / name for name in files]
    left_out.kinds += Counter()  # without zeros


def _check_twice(folder: Path, subfolders: Sequence[Path]) -> None:
    for name, count in Counter(spelled(path.name) for path in subfolders).items():
        if count > 1:
            raise ValueError(f"{str(folder)!r} has two folders of the class {name!r}: put their images into one")


def _is_system(name: str) -> bool:
    return name.startswith(".") or name in _SYSTEM


def _is_image(file: Path) -> bool:
    """By its ending, or else by its first bytes."""
    formats, endings = _readable()
    if file.suffix.lower() in endings:
        return True
    try:
        Image.open(file, formats=formats).close()
    except Image.DecompressionBombError:
        return True  # which is said when it is read
    except (OSError, ValueError):  # no known format, or a header that is none after all
        return False
    return True


@cache
def _readable() -> tuple[tuple[str, ...], frozenset[str]]:
    """The formats that this Pillow can read, and their endings."""
    Image.init()
    formats = tuple(name for name in FORMATS if name in Image.OPEN)
    return formats, frozenset(ending for ending, name in Image.registered_extensions().items() if name in formats)
