"""Classification with the head that a model has, of images or texts."""

from __future__ import annotations

from collections.abc import Sequence
from string import Formatter
from typing import Any

import numpy as np

from tvjax.data.examples import Examples
from tvjax.data.images import Images
from tvjax.data.loader import Loader, Processed, image_batches
from tvjax.data.texts import Texts
from tvjax.data.tokens import Encoder, Tokens
from tvjax.stages import Batch
from tvjax.tasks.base import Task, check_examples
from tvjax.tasks.losses import OWN_HEAD


def own_head(process: Any, class_names: Sequence[str] = ()) -> Task:
    """Classification with the head that the model has: a ViT, a sequence classifier.

    Args:
      process: what turns examples into inputs: a `tvjax.checkpoints.Processor` for images, an `Encoder` for texts.
      class_names: names of the classes, in the order of the head's outputs; none where they are not known.

    >>> task = own_head(Encoder(lambda texts: {}), ["bad", "good"])
    >>> task.name
    "classification with the model's own head"
    """
    name = OWN_HEAD.task

    def batches(examples: Examples, size: int) -> Loader:
        if isinstance(process, Encoder):
            return text_batches(name, examples, process, size, class_names)
        check_examples(name, examples, Images, class_names)
        assert isinstance(examples, Images)
        return image_batches(examples, process.pixels, size)

    return Task(name, lambda model: model.with_loss(OWN_HEAD), batches)


def text_batches(
    task: str, examples: Examples, encoder: Encoder, size: int, class_names: Sequence[str] = (), template: str = ""
) -> Loader:
    """Batches of texts, ``{"tokens", "mask"}`` and of pairs ``"types"``, with their classes.

    Args:
      task: for messages.
      examples: texts of one column or two, or of any where there is a template.
      encoder: texts to tokens.
      size: texts in a batch.
      class_names: of the task.
      template: the text, with columns in braces; "" for the columns themselves, two as a pair.

    Raises:
      ValueError: for no texts, classes of another number, or columns that do not fit.
    """
    check_examples(task, examples, Texts, class_names)
    assert isinstance(examples, Texts)
    columns = examples.prompts
    if template:
        check_template(template, examples)
    elif len(columns) > 2:
        raise ValueError(f"{examples.name!r} has {len(columns)} columns of texts, expected one, or two as a pair")

    def process(found: Sequence[dict[str, str]], labels: Any) -> Processed:
        if template:
            tokens = encoder([filled(template, one) for one in found])
        else:
            tokens = encoder(*([one[column] for one in found] for column in columns))
        return Processed(Batch(inputs_of(tokens), labels), int(tokens.cut.sum()))

    return Loader(examples, process, size)


def inputs_of(tokens: Tokens) -> dict[str, np.ndarray]:
    """The tokens of texts as a model takes them."""
    types = {} if tokens.types is None else {"types": tokens.types}
    return {"tokens": tokens.ids, "mask": tokens.mask, **types}


def filled(template: str, example: dict[str, str]) -> str:
    """A template with its columns filled in; braces in the texts stay.

    >>> filled("{a} or {b}?", {"a": "one", "b": "{a}"})
    'one or {a}?'
    """
    return template.format_map(example)


def check_template(template: str, examples: Texts) -> None:
    """Raises a ValueError for a template that names no column, or one that is not there."""
    try:
        named = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"the template {template!r} cannot be filled in ({error})") from error
    absent = [name for name in named if name not in examples.prompts]
    if absent or not named:
        raise ValueError(
            f"the template {template!r} names {', '.join(absent) or 'no column'}; {examples.name!r} has the columns "
            f"{', '.join(examples.prompts)}"
        )
