import re

import pytest

from tvjax.data.source import _reader
from tvjax.tasks.catalogue import GLUE, NLI, TASKS, find_task

CLASSES = {"sun397": 397, "cars": 196, "resisc45": 45, "eurosat": 10, "svhn": 10, "gtsrb": 43, "mnist": 10, "dtd": 47}
TEMPLATES = {"sun397": 2, "cars": 8, "resisc45": 18, "eurosat": 3, "svhn": 1, "gtsrb": 3, "mnist": 1, "dtd": 8}


def test_the_usual_eight_are_complete():
    assert set(TASKS) == {*CLASSES, "digits", *GLUE, *NLI}
    for name, count in CLASSES.items():
        task = find_task(name)
        assert len(task.class_names) == len(set(task.class_names)) == count, name
        assert all(one == one.strip() and one for one in task.class_names), name
        assert len(set(task.templates)) == TEMPLATES[name], name
        assert all(template.count("{}") == 1 for template in task.templates)


@pytest.mark.parametrize(
    ("task", "known"),
    [
        ("sun397", {0: "abbey", 18: "assembly line", 396: "youth hostel"}),
        ("cars", {0: "AM General Hummer SUV 2000", 195: "smart fortwo Convertible 2012"}),
        ("resisc45", {0: "airplane", 44: "wetland"}),
        ("eurosat", {2: "brushland or shrubland", 9: "lake or sea"}),
        ("svhn", {0: "0", 9: "9"}),
        ("gtsrb", {14: "stop", 17: "red circle with white horizonal stripe no entry"}),
        ("dtd", {0: "banded", 46: "zigzagged"}),
        ("digits", {3: "three"}),
    ],
)
def test_names_are_in_the_order_of_the_labels(task, known):
    names = find_task(task).class_names
    assert {label: names[label] for label in known} == known


def test_prompts_and_places():
    assert find_task("cars").templates[2:4] == ("a photo of my {}.", "i love my {}!")
    assert find_task("gtsrb").templates[0].format("stop") == 'a zoomed in photo of a "stop" traffic sign.'
    assert find_task("dtd").templates[5] == "a photo of the {} pattern."
    assert find_task("svhn").train == "hf:ufldl-stanford/svhn?config=cropped_digits&split=train"
    for task in TASKS.values():
        for place in filter(None, (task.train, task.test)):
            path, _, words = place.partition("?")
            assert {word.partition("=")[0] for word in words.split("&")} <= set(_reader(path, words)[1])


def test_another_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="no task 'euroset'; the nearest of .* is 'eurosat'"):
        find_task("euroset")


def test_the_tasks_of_texts_name_their_columns_words_and_places():
    for name in {*GLUE, *NLI}:
        task = find_task(name)
        (template,) = task.templates
        columns = re.search(r"text=([a-z0-9,]+)&", task.train)[1].split(",")
        assert template.format_map({column: "x" for column in columns}).count("'x'") == len(columns) <= 2, name
        assert task.kind == "texts" and (name == "stsb") == (not task.words), name
        assert all(f"'{word}'" in template for word in task.words), name
    assert find_task("mnli").test == (
        "hf:nyu-mll/glue?config=mnli&text=premise,hypothesis&label=label&split=validation_matched"
    )
    assert find_task("rte").class_names == find_task("qnli").class_names == ("yes", "no")  # 0 is entailment
    assert find_task("stsb").train.count("completion=label") == 1 and NLI[0] == "snli"
    assert {find_task(name).kind for name in CLASSES} == {"images"}
