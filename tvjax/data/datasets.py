"""Images and texts in Hugging Face datasets, of the hub or on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tvjax.data.examples import by_name, with_names
from tvjax.data.images import Images, read_file
from tvjax.data.texts import Texts


def read_dataset(
    path: str,
    class_names: Sequence[str] | None = None,
    *,
    split: str | None = None,
    image: str | None = None,
    label: str | None = None,
    config: str | None = None,
    revision: str | None = None,
) -> Images:
    """The images of a Hugging Face dataset; no code of the dataset is run.

    Args:
      path: what ``save_to_disk`` wrote, or a hub id or folder that ``load_dataset`` reads.
      class_names: names of numbered classes, in that order; None: those of the column. Classes that are stored as
        texts are sorted, or in the order of these names.
      split: of the dataset, also a slice (``train[:10%]``); may be left out where there is one.
      image: the column of the images; None: the only one that holds images.
      label: the column of the classes; None: the only one of class labels, or else ``label``; "" for images without.
      config: of a hub dataset that has several.
      revision: branch, tag or commit of a hub dataset.

    Returns:
      The images, decoded when they are asked for.

    Raises:
      ValueError: where the package datasets is not installed; for a dataset, split or column that is not there, naming
        those that are; for labels that are no classes.
    """
    name = f"hf:{path}" + (f"?split={split}" if split else "")
    datasets = _import_datasets()
    rows = _rows(datasets, path, split, config, revision)
    features = rows.features
    image = _column(name, features, image, [c for c, f in features.items() if isinstance(f, datasets.Image)], "images")
    if label != "":
        classes = [c for c, f in features.items() if isinstance(f, datasets.ClassLabel)]
        label = _column(name, features, label, classes or [c for c in features if c == "label"], "classes")
    if isinstance(features[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    stored = rows.select_columns([image])

    def read(row: int) -> bytes | np.ndarray:
        return _content(stored[row][image])

    if not label:
        return Images(name, range(len(rows)), read)
    numbers, names = _labels(name, rows, label, class_names)
    return Images(name, range(len(rows)), read, numbers, names)


def read_text_dataset(
    path: str,
    class_names: Sequence[str] | None = None,
    *,
    text: str = "text",
    completion: str = "",
    split: str | None = None,
    label: str | None = None,
    config: str | None = None,
    revision: str | None = None,
) -> Texts:
    """The texts of a Hugging Face dataset; no code of the dataset is run.

    Args:
      path: as for `read_dataset`.
      class_names: as for `read_dataset`.
      text: the columns of the texts, joined by commas.
      completion: the column of the answers; "" for none.
      split: as for `read_dataset`.
      label: the column of the classes; None: the only one of class labels, or else ``label``, if there is one; "" for
        texts without. Rows of the class -1, by which datasets mean none, are left out, and the notes say so; where all
        rows are, the texts have no labels.
      config: as for `read_dataset`.
      revision: as for `read_dataset`.

    Returns:
      The texts, read when they are asked for.

    Raises:
      ValueError: as `read_dataset` does.
    """
    name = f"hf:{path}" + (f"?split={split}" if split else "")
    datasets = _import_datasets()
    rows = _rows(datasets, path, split, config, revision)
    features = rows.features
    columns = tuple(filter(None, (*text.split(","), completion)))
    for column in columns:
        _column(name, features, column, [], "texts")
    if label is None and not completion:
        classes = [c for c, f in features.items() if isinstance(f, datasets.ClassLabel)]
        classes = classes or [c for c in features if c == "label"]
        label = _column(name, features, None, classes, "classes") if classes else ""
    elif label:
        _column(name, features, label, [], "classes")
    stored = rows.select_columns(list(dict.fromkeys(columns)))

    def read(row: int) -> list[Any]:
        found = stored[row]
        return [found[column] for column in columns]

    notes: tuple[str, ...] = ()
    keys, numbers, names = np.arange(len(rows)), None, tuple(class_names or ())
    if label:
        numbers, names = _labels(name, rows, label, class_names)
        kept = numbers != -1
        keys, numbers = (keys[kept], numbers[kept]) if kept.any() else (keys, None)
        if not kept.all():
            notes = (f"{int((~kept).sum())} rows have no class (-1)" + (" and were left out" if kept.any() else ""),)
    return Texts(name, keys.tolist(), read, numbers, names, notes, columns, completion)


def _labels(name: str, rows: Any, label: str, class_names: Sequence[str] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """The class of each row, and the names of the classes, which are stored by name or by number."""
    values = rows.select_columns([label])[:][label]
    if any(value is None for value in values):
        raise ValueError(f"{name!r}: {sum(v is None for v in values)} rows have nothing in the column {label!r}")
    if values and all(isinstance(value, str) for value in values):
        names, number = by_name(name, sorted(set(values)), class_names)
        return np.array([number[value] for value in values]), names
    names = with_names(name, getattr(rows.features[label], "names", None) or [], class_names)
    return np.asarray(values), names


def _rows(datasets: Any, path: str, split: str | None, config: str | None, revision: str | None) -> Any:
    """The rows of one split."""
    folder = Path(path)
    if any((folder / file).is_file() for file in ("dataset_dict.json", "dataset_info.json")):
        if config is not None or revision is not None:
            raise ValueError(f"'hf:{path}' is saved on disk, where it has no config and no revision: leave them out")
        found = datasets.load_from_disk(path)
        if not isinstance(found, datasets.DatasetDict):
            if split is not None and split != str(found.split):
                raise ValueError(f"'hf:{path}' is one split ({found.split}), found split={split}: leave it out")
            return found
        return found[_split(path, split, list(found))]
    try:
        names = datasets.get_dataset_split_names(path, config, revision=revision)
        split = _split(path, split, names)
        return datasets.load_dataset(path, config, split=split, revision=revision)
    except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
        # no such dataset, no network, a config to be chosen, files that are no dataset
        causes = [line for one in (error, error.__cause__) for line in str(one or "").splitlines()[:1]]
        raise ValueError(f"'hf:{path}' cannot be read: {'; '.join(causes) or type(error).__name__}") from error


def _split(path: str, split: str | None, names: Sequence[str]) -> str:
    if split is None and len(names) == 1:
        return names[0]
    base = (split or "").partition("[")[0]
    if not set(base.split("+")) <= set(names):
        found = "no split" if split is None else f"split={split}"
        raise ValueError(f"'hf:{path}' has the splits {', '.join(names)}; found {found}")
    return split or base


def _column(name: str, features: Any, wanted: str | None, candidates: Sequence[str], what: str) -> str:
    """The column that was asked for, or the only candidate."""
    if wanted is not None and wanted in features:
        return wanted
    if wanted is None and len(candidates) == 1:
        return candidates[0]
    option = {"images": "image", "classes": "label", "texts": "text"}[what]
    found = f"no column {wanted!r}" if wanted is not None else f"{len(candidates) or 'no'} columns of {what}"
    raise ValueError(
        f"{name!r} has {found}; its columns are {', '.join(features)}: name one with {option}=COLUMN"
        + (" (text=COLUMN for texts)" if what == "images" else "")
    )


def _content(value: Any) -> bytes | np.ndarray:
    """What a cell of the column of images stores; nothing is an empty file."""
    if isinstance(value, dict):  # an Image feature that is not decoded
        return value["bytes"] if value["bytes"] is not None else read_file(Path(value["path"]))
    if value is None or isinstance(value, bytes):
        return value or b""
    pixels = np.asarray(value)
    in_bytes = pixels.dtype == np.int64 and pixels.size and 0 <= pixels.min() and pixels.max() <= 255
    return pixels.astype(np.uint8) if in_bytes else pixels  # lists of numbers come as 64 bits


def _import_datasets() -> Any:
    """The package datasets, imported when it is needed."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ValueError(
            "Hugging Face datasets are read with the package datasets, which is not installed: "
            "pip install 'tvjax[datasets]'"
        ) from error
    return datasets
