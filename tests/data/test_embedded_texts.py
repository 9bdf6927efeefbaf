import itertools
import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from tvjax.data import embedded_texts as texts
from tvjax.data import open_examples

RECORD = json.loads((Path(__file__).parents[2] / "results" / "build_language_models.json").read_text())


@pytest.mark.parametrize("task", texts.TASKS)
def test_classes_are_balanced_and_no_text_is_in_two_parts(task):
    parts = {part: texts.embedded_texts(task, part) for part in texts.PARTS}
    for part, found in parts.items():
        assert len(found) == RECORD["texts"][task][part]
        assert len(set(np.bincount(found.labels))) == 1 and found.class_names == texts.TASKS[task].words
    contents = [{found[number]["text"].lower() for number in range(len(found))} for found in parts.values()]
    assert all(not one & other for one, other in itertools.combinations(contents, 2))


def test_the_texts_are_those_that_were_recorded_and_their_sources_are_named():
    found = {file: sha256((texts.FOLDER / file).read_bytes()).hexdigest() for file in RECORD["files"]}
    assert found == RECORD["files"] and len(found) == 10
    notice = (texts.FOLDER / "NOTICE").read_text()
    assert "WordNet 3.1 Copyright 2011 by Princeton University" in notice and "C.J. Hutto" in notice


def test_the_files_are_ordinary_text_files():
    file = texts.FOLDER / "reviews" / "validation.jsonl"
    assert open_examples(str(file), texts.TASKS["reviews"].words)[0] == texts.embedded_texts("reviews", "validation")[0]


@pytest.mark.parametrize(("task", "part", "what"), [("poems", "test", "task 'poems'"), ("topics", "train", "part 'tr")])
def test_unknown_names_are_refused(task, part, what):
    with pytest.raises(ValueError, match=f"the embedded texts have no {what}.*choose one of"):
        texts.embedded_texts(task, part)
