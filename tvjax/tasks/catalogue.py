"""The tasks by name: the usual eight of task arithmetic, the digits, the eight of GLUE, and the five of NLI.

Class names of images are in ``class_names/``, one a line in the order of the labels. They and the prompts are those
that CLIP was published with (https://github.com/openai/CLIP/blob/main/data/prompts.md), but for SVHN, which takes those
of MNIST as the task arithmetic papers do. The labels of the datasets on the hub follow the sorted names of the original
folders, for GTSRB and Stanford Cars the numbers of the original classes; EuroSAT's names stand in that order, not in
CLIP's. Where a dataset stores names of its own, they must be as many, and not these in another order
(`tvjax.data.examples`).

Class names of texts are the words that a language model is to answer, in the order of the labels. The prompts ask for
them in plain words, with the columns in braces. The test sets of GLUE have no labels, so its validation sets are the
test.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from string import Formatter
from typing import NamedTuple

from tvjax.data import digits

GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")
NLI = ("snli", "mnli", "rte", "qnli", "scitail")
_NAMES = Path(__file__).parent / "class_names"
_SCENES = ("a photo of a {}.", "a photo of the {}.")
_NUMBERS = ('a photo of the number: "{}".',)


class KnownTask(NamedTuple):
    """A task that has a name: what its classes are called, how to ask, and where its examples are.

    Attributes:
      name: of the task.
      templates: prompts; of images with ``{}`` in place of the class name, of texts one, with columns in braces.
      train: where the training examples are, as `tvjax.data.open_examples` takes it; "" where one has to choose.
      test: where the test examples are.
      words: names of the classes of texts, in the order of the labels; none where the answer is a number.
    """

    name: str
    templates: tuple[str, ...]
    train: str = ""
    test: str = ""
    words: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """``images`` or ``texts``."""
        return "texts" if "text=" in self.train else "images"

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels."""
        if self.kind == "texts":
            return self.words
        if self.name == "digits":
            return digits.CLASS_NAMES
        return tuple((_NAMES / f"{self.name}.txt").read_text(encoding="utf-8").splitlines())


def _of_hub(name: str, dataset: str, templates: tuple[str, ...], config: str = "") -> KnownTask:
    source = f"hf:{dataset}?{config and f'config={config}&'}split="
    return KnownTask(name, templates, f"{source}train", f"{source}test")


def _of_texts(
    name: str, place: str, template: str, words: tuple[str, ...] = (), test: str = "validation", answer: str = "label"
) -> KnownTask:
    """A task of texts; its columns are those that the template names."""
    columns = ",".join(column for _, column, _, _ in Formatter().parse(template) if column)
    question = "&" if "?" in place else "?"
    source = f"hf:{place}{question}text={columns}&{answer}=label&split="
    return KnownTask(name, (template,), f"{source}train", f"{source}{test}", words)


def _of_glue(name: str, template: str, words: tuple[str, ...] = (), **more: str) -> KnownTask:
    return _of_texts(name, f"nyu-mll/glue?config={name}", template, words, **more)


_CARS = tuple(f"a photo of my {kind}{{}}." for kind in ("", "dirty ", "clean ", "new ", "old "))
_SIGNS = tuple(f'a {view} photo of a "{{}}" traffic sign.' for view in ("zoomed in", "centered", "close up"))
_TEXTURES = tuple(
    f"a photo of {article} {{}} {noun}."
    for article in ("a", "the")
    for noun in ("texture", "pattern", "thing", "object")
)
_INFERENCE = (
    "Does the premise '{premise}' entail or contradict the hypothesis '{hypothesis}', or is it neutral? Answer with "
    "'entailment', 'neutral' or 'contradiction'."
)
_THREE = ("entailment", "neutral", "contradiction")
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
        KnownTask("digits", digits.TEMPLATES),
        _of_glue(
            "cola",
            "Is the sentence '{sentence}' grammatically correct? Answer with 'acceptable' or 'unacceptable'.",
            ("unacceptable", "acceptable"),
        ),
        _of_glue("mnli", _INFERENCE, _THREE, test="validation_matched"),
        _of_glue(
            "mrpc",
            "Do the sentences '{sentence1}' and '{sentence2}' mean the same? Answer with 'yes' or 'no'.",
            ("no", "yes"),
        ),
        _of_glue(
            "qnli",
            "Is the question '{question}' answered by the text '{sentence}'? Answer with 'yes' or 'no'.",
            ("yes", "no"),
        ),
        _of_glue(
            "qqp",
            "Do the questions '{question1}' and '{question2}' ask the same? Answer with 'yes' or 'no'.",
            ("no", "yes"),
        ),
        _of_glue(
            "rte",
            "Does the text '{sentence1}' entail that '{sentence2}'? Answer with 'yes' or 'no'.",
            ("yes", "no"),
        ),
        _of_glue(
            "sst2",
            "Is the sentiment of '{sentence}' positive or negative? Answer with 'positive' or 'negative'.",
            ("negative", "positive"),
        ),
        _of_glue(
            "stsb",
            "How alike are the sentences '{sentence1}' and '{sentence2}', from 0 (not at all) to 5 (the same)?",
            answer="completion",
        ),
        _of_texts("snli", "stanfordnlp/snli", _INFERENCE, _THREE, test="test"),
        _of_texts(
            "scitail",
            "allenai/scitail?config=tsv_format",
            "Does the text '{premise}' entail that '{hypothesis}'? Answer with 'entails' or 'neutral'.",
            ("entails", "neutral"),
            test="test",
        ),
    )
}


def find_task(name: str) -> KnownTask:
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
