"""The embedded texts: definitions of WordNet and sentences on films, with their classes.

``texts`` of ``tvjax/demo_language`` holds a folder for each task, with the texts in ``pool.jsonl`` (calibration and few
shots), ``validation.jsonl`` and ``test.jsonl``, and the notices of their sources. ``scripts/build_language_texts.py``
draws them.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tvjax.data.text_files import read_text_file
from tvjax.data.texts import Texts

FOLDER = Path(__file__).parent.parent / "demo_language" / "texts"
PARTS = ("pool", "validation", "test")
LENGTH = 64  # tokens that the embedded models take


class TextTask(NamedTuple):
    """What is asked of texts.

    Attributes:
      words: the classes, as the models are to answer.
      template: the prompt.
      trained: texts of each class, at most, that each model was fine-tuned on.
    """

    words: tuple[str, ...]
    template: str
    trained: int


TASKS = {
    "topics": TextTask(
        ("animal", "artifact", "body", "food", "place", "person", "plant", "substance"), "{text} The topic is", 800
    ),
    "actions": TextTask(("change", "talk", "contact", "motion", "possession", "social"), "{text} The action is", 800),
    "reviews": TextTask(("bad", "good"), "{text} The film is", 1000),
}


def embedded_texts(task: str, part: str) -> Texts:
    """The texts of a task, in the one column ``text``, with their classes.

    Args:
      task: name of the task.
      part: ``pool``, ``validation`` or ``test``; no text is in two of these.

    Raises:
      ValueError: for another task or part.

    >>> texts = embedded_texts("reviews", "test")
    >>> len(texts), texts.class_names
    (800, ('bad', 'good'))
    """
    for what, name, names in (("task", task, tuple(TASKS)), ("part", part, PARTS)):
        if name not in names:
            raise ValueError(f"the embedded texts have no {what} {name!r}: choose one of {', '.join(names)}")
    return read_text_file(FOLDER / task / f"{part}.jsonl", TASKS[task].words)
