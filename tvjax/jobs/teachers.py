"""A fine-tuned model as a teacher: its scores of the classes on examples, by its own processor and tokenizer."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from tvjax import compose, tree
from tvjax.data.images import Images
from tvjax.data.texts import Texts
from tvjax.jobs.asking import Prompts, asking, float32, parameters, with_task
from tvjax.jobs.opened import Opened
from tvjax.jobs.parts import check_labels


class Teacher(NamedTuple):
    """A teacher.

    Attributes:
      tuned: the fine-tuned model, all of it or the part that was trained.
      reader: the model that says how it is asked: the pre-trained one beside it, whose head it has, or itself.
    """

    tuned: Opened
    reader: Opened

    def asked(self, found: Images | Texts, prompts: Prompts, named: bool) -> Images | Texts:
        """The examples as they are asked about: by their classes, whether or not it is known which is whose.

        Raises:
          ValueError: a teacher of other classes, or that cannot be asked; no weight is read.
        """
        check_labels(self.reader, found.class_names, named)
        if found.labels is None:
            found = dataclasses.replace(found, labels=np.zeros(len(found), np.int32))
        asking(self.reader).check(self.reader, found, prompts)
        return found

    def scores(self, found: Images | Texts, prompts: Prompts, size: int) -> np.ndarray:
        """What it says of the examples, ``[examples, classes]``."""
        task = asking(self.reader).task(self.reader, found, prompts)
        model = with_task(self.reader, task)
        if self.tuned is not self.reader:
            known = tree.flatten(model.params)
            tuned = tree.flatten(self.tuned.pretrained.params)
            model = model.replace(
                params=tree.replace(model.params, float32({path: tuned[path] for path in known if path in tuned}))
            )
        return compose.class_scores(model, task.batches(found, size))

    def release(self) -> None:
        """Drops its weights."""
        for one in self:
            one.release()


def find_teacher(tuned: Opened, base: Opened | None) -> Teacher:
    """A fine-tuned model as a teacher; no weight is read.

    Args:
      tuned: the fine-tuned model.
      base: the pre-trained one whose head it was fine-tuned with; None: it has its own.

    Raises:
      ValueError: a teacher that cannot score classes, or that is no fine-tuning of the base.
    """
    reader = tuned if base is None else base
    way = asking(reader)
    if not way.can_score(reader):
        also = "" if base is not None else ", or the full model that it was fine-tuned from (--teacher-base)"
        raise ValueError(f"the teacher {reader.name!r} {way.lacks}{also}")
    if base is not None:
        before, after = (tree.flatten(parameters(one)) for one in (base, tuned))
        common = before.keys() & after.keys()
        wrong = [
            f"{path}: {after[path].shape}, the base has {before[path].shape}"
            for path in sorted(common)
            if before[path].shape != after[path].shape
        ]
        if wrong or not common:
            raise ValueError(
                f"the teacher {tuned.name!r} is no fine-tuning of {base.name!r}:\n"
                + tree.list_some(wrong or ["no leaf of the same name"])
            )
    return Teacher(tuned, reader)
