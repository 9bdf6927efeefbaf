"""The eight usual tasks of task arithmetic, and the embedded digits: class names, prompts, and where the images are.

Class names are in ``class_names/``, one a line in the order of the labels. They and the prompts are those that CLIP was
published with (https://github.com/openai/CLIP/blob/main/data/prompts.md), but for SVHN, which takes those of MNIST as
the task arithmetic papers do. The labels of the datasets on the hub follow the sorted names of the original folders,
for GTSRB and Stanford Cars the numbers of the original classes; EuroSAT's names stand in that order, not in CLIP's.
Where a dataset stores names of its own, they must be as many, and not these in another order (`tvjax.data.images`).
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import NamedTuple

from tvjax.data import digits

_NAMES = Path(__file__).parent / "class_names"
_SCENES = ("a photo of a {}.", "a photo of the {}.")
_NUMBERS = ('a photo of the number: "{}".',)


class Task(NamedTuple):
    """A classification task.

    Attributes:
      name: of the task.
      templates: prompts with ``{}`` in place of the class name.
      train: where the training images are, as `tvjax.data.open_images` takes it; "" where one has to choose.
      test: where the test images are.
    """

    name: str
    templates: tuple[str, ...]
    train: str = ""
    test: str = ""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels."""
        if self.name == "digits":
            return digits.CLASS_NAMES
        return tuple((_NAMES / f"{self.name}.txt").read_text(encoding="utf-8").splitlines())


def _of_hub(name: str, dataset: str, templates: tuple[str, ...], config: str = "") -> Task:
    source = f"hf:{dataset}?{config and f'config={config}&'}split="
    return Task(name, templates, f"{source}train", f"{source}test")


_CARS = tuple(f"a photo of my {kind}{{}}." for kind in ("", "dirty ", "clean ", "new ", "old "))
_SIGNS = tuple(f'a {view} photo of a "{{}}" traffic sign.' for view in ("zoomed in", "centered", "close up"))
_TEXTURES = tuple(
    f"a photo of {article} {{}} {noun}."
    for article in ("a", "the")
    for noun in ("texture", "pattern", "thing", "object")
)
_LAND = tuple(f"a centered satellite photo of {article}{{}}." for article in ("", "a ", "the "))
_AERIAL = tuple(
    f"{view} {kind} of {article}{{}}."
    for article in ("", "a ", "the ")
    for kind in ("imagery", "photo", "view")
    for view in ("satellite", "aerial")
)

TASKS = {
    task.name: task
    for task in (
        _of_hub("sun397", "tanganke/sun397", _SCENES),
        _of_hub("cars", "tanganke/stanford_cars", (*_SCENES, _CARS[0], "i love my {}!", *_CARS[1:])),
        _of_hub("resisc45", "tanganke/resisc45", _AERIAL),
        _of_hub("eurosat", "tanganke/eurosat", _LAND),
        _of_hub("svhn", "ufldl-stanford/svhn", _NUMBERS, config="cropped_digits"),
        _of_hub("gtsrb", "tanganke/gtsrb", _SIGNS),
        _of_hub("mnist", "ylecun/mnist", _NUMBERS),
        _of_hub("dtd", "tanganke/dtd", _TEXTURES),
        Task("digits", digits.TEMPLATES),
    )
}


def find_task(name: str) -> Task:
    """The task of a name.

    Raises:
      ValueError: for another name, with the nearest.

    >>> task = find_task("eurosat")
    >>> task.class_names[:2], task.templates[0], task.test
    (('annual crop land', 'forest'), 'a centered satellite photo of {}.', 'hf:tanganke/eurosat?split=test')
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
        raise ValueError(f"there is no task {name!r}; the nearest of {', '.join(TASKS)} is {near!r}")
    return TASKS[name]
