"""What commands read: models, images, class names, prompts; and where they may write."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tvjax import tree
from tvjax.arithmetic import task_vector
from tvjax.checkpoints import Pretrained
from tvjax.checkpoints.huggingface import fetch
from tvjax.checkpoints.streaming import check_same_base
from tvjax.data.batches import few_shot
from tvjax.data.images import SUFFIXES, read_folder, read_image
from tvjax.models.clip.config import CLIPConfig
from tvjax.models.families import family_of_settings
from tvjax.stages import PyTree

TEMPLATES = ("a photo of a {}.",)


class Images(NamedTuple):
    """Images with their classes.

    Attributes:
      images: arrays ``[height, width, 3]`` of 8-bit values.
      labels: ``[n]``; None where the folder has no subfolders.
      class_names: names of the classes.
    """

    images: list[np.ndarray]
    labels: np.ndarray | None
    class_names: tuple[str, ...]

    def parts(self, size: int) -> Iterator[tuple[list[np.ndarray], np.ndarray | None]]:
        """Images and labels, at most `size` at once."""
        for start in range(0, len(self.images), size):
            chosen = slice(start, start + size)
            yield self.images[chosen], None if self.labels is None else self.labels[chosen]


def read_images(folder: Path, classes: Path | None, labelled_for: str = "") -> Images:
    """The images of a folder.

    Args:
      folder: one folder a class; or images without classes, where nothing needs them.
      classes: file of class names.
      labelled_for: what needs the classes; "" where nothing does.

    Raises:
      ValueError: no such folder, unreadable images, or no classes though they are needed.
    """
    if folder.is_dir() and not any(path.is_dir() for path in folder.iterdir()):
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
        if labelled_for or not files:
            need = f"{labelled_for} needs labelled images" if labelled_for else "there are no images"
            raise ValueError(
                f"{str(folder)!r} has no subfolders and {need}: put those of each class into a folder of its name"
            )
        return Images([read_image(file) for file in files], None, ())
    found = read_folder(folder, None if classes is None else read_lines(classes, "class names"))
    return Images(found.images, found.labels, found.class_names)


def draw_images(found: Images, per_class: int, seed: int) -> Images:
    """So many images of each class, at random; 0 for all.

    Raises:
      ValueError: where a class has fewer, or there are no classes.
    """
    if not per_class:
        return found
    if found.labels is None:
        raise ValueError("--per-class needs labelled images: put those of each class into a folder of its name")
    chosen = few_shot(found.labels, per_class, jax.random.key(seed))
    return found._replace(images=[found.images[index] for index in chosen], labels=found.labels[chosen])


def read_templates(file: Path | None) -> tuple[str, ...]:
    """The prompts of a file, or the default ones."""
    return TEMPLATES if file is None else read_lines(file, "prompts")


def read_lines(file: Path, what: str) -> tuple[str, ...]:
    """The lines of a text file that are not blank."""
    if not file.is_file():
        raise ValueError(f"there is no file {str(file)!r} of {what}")
    lines = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    if not lines:
        raise ValueError(f"{str(file)!r} is empty: write {what} into it, one a line")
    return lines


def read_clip_config(source: str) -> CLIPConfig:
    """The config of a CLIP with a vision tower; no weights are read.

    Raises:
      ValueError: what is no such model.
    """
    file = fetch(source)[0] / "config.json"
    if not file.is_file():
        raise ValueError(f"{source!r} has no config.json: is it the folder of a Hugging Face model?")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        config = family_of_settings(settings).config.from_dict(settings)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file}: {error}") from error
    if not isinstance(config, CLIPConfig) or config.vision is None:
        raise ValueError(f"{source!r} is a {type(config).__name__} without a CLIP vision tower: give a CLIP")
    return config


def check_output(folder: Path) -> None:
    """Raises a ValueError where the output folder is taken, before anything heavy is done."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"the output {str(folder)!r} exists: give a new folder, or remove it")


def check_file(file: Path) -> None:
    """Raises a ValueError where an output file cannot be written, before anything heavy is done."""
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise ValueError(f"the output {str(file)!r} is a folder, or its folder does not exist: give the name of a file")


def check_dtype(dtype: str) -> None:
    """Raises a ValueError unless task vectors can be stored in this dtype."""
    if dtype not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"--dtype is {dtype!r}, expected float32, float16 or bfloat16")


def common_base(files: Sequence[Path], metadata: Sequence[Mapping[str, str]], any_base: bool) -> dict[str, str]:
    """What the metadata of task vector files say of the model that they were made for.

    Raises:
      ValueError: they were made for different models, unless `any_base`.
    """
    return check_same_base([str(file) for file in files], metadata, any_base)


def check_base(metadata: Mapping[str, str], base: Pretrained, files: Sequence[Path], any_base: bool) -> None:
    """Raises a ValueError where task vectors were made for other weights than these, unless `any_base`."""
    own = base.identity()["base_fingerprint"]
    if metadata.get("base_fingerprint", own) != own and not any_base:
        raise ValueError(
            f"{', '.join(repr(str(file)) for file in files)} made for {metadata.get('base_model')!r}, whose weights "
            f"are not those of {base.name!r}: move there first (tvjax transport), or say --any-base"
        )


def vision_task_vector(pretrained: Pretrained, finetuned: Pretrained) -> PyTree:
    """The task vector of the vision tower; of a fine-tuned tower without projection, one that does not cover it.

    Raises:
      ValueError: a side without a vision tower, or towers of different shapes.
    """
    sides = []
    for name, model in (("pre-trained", pretrained), ("fine-tuned", finetuned)):
        if "vision" not in model.params:
            raise ValueError(f"the {name} model {model.name!r} has no vision tower")
        sides.append(model.params["vision"])
    theta_0, theta_ft = sides
    if "projection" in theta_0 and "projection" not in theta_ft:
        theta_0 = {name: leaf for name, leaf in theta_0.items() if name != "projection"}
    return task_vector({"vision": theta_0}, {"vision": theta_ft})


def notes(pretrained: Pretrained, finetuned: Pretrained) -> list[str]:
    """What fine-tuning changed outside the vision tower, which takes no part."""
    before, after = tree.flatten(pretrained.params), tree.flatten(finetuned.params)
    others = [path for path in before if path in after and not path.startswith("vision/")]
    changed = [path for path in others if not np.array_equal(np.asarray(before[path]), np.asarray(after[path]))]
    if not changed:
        return []
    return [f"fine-tuning changed {len(changed)} leaves outside the vision tower too ({changed[0]}, ...), which stay"]


def float32(params: PyTree) -> PyTree:
    """The parameters in float32: gradients of 16-bit ones would vanish below their range."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
