import json
from pathlib import Path

import jax
import numpy as np
import pytest

from tvjax.arithmetic import apply
from tvjax.checkpoints import fingerprint, from_pretrained, load_processor, load_tree
from tvjax.data import digits, embedded
from tvjax.evaluate.accuracy import accuracy
from tvjax.tasks.zero_shot import zero_shot_model

RECORD = json.loads((Path(__file__).parents[2] / "results" / "build_demo_models.json").read_text())
SEEDS = {name: 1000 + index for index, name in enumerate(("base", *embedded.TASKS))}


def load(name):
    folder = embedded.model_folder(name)
    pretrained = from_pretrained(folder)
    head = (load_processor(folder).tokens, digits.CLASS_NAMES, digits.TEMPLATES)
    return pretrained, zero_shot_model(pretrained.model, *head)


def percent(model, style, name):
    batch = digits.photograph(digits.load_splits()["test"], style, jax.random.key(SEEDS[name]), repeats=2)
    return 100 * accuracy(model, batch).fraction


@pytest.mark.parametrize("name", embedded.MODELS)
def test_models_reach_the_recorded_accuracies(name):
    pretrained, model = load(name)
    assert fingerprint(pretrained.params) == RECORD["fingerprints"][name]
    recorded = RECORD["accuracy"][name]
    assert percent(model, digits.BASE, "base") == pytest.approx(recorded["base"]["zero_shot"], abs=0.5)
    task = embedded.TASKS[0]
    assert percent(model, digits.STYLES[task], task) == pytest.approx(recorded[task]["zero_shot"], abs=0.5)
    tau, metadata = load_tree(embedded.task_vector_file(name, task))
    assert metadata["base_fingerprint"] == RECORD["fingerprints"][name]
    tuned = model.replace(params=apply(model.params, tau))
    assert percent(tuned, digits.STYLES[task], task) == pytest.approx(recorded[task]["fine_tuned"], abs=0.8)


def test_every_task_has_a_vector_of_every_model():
    for name in embedded.MODELS:
        assert {file.stem for file in embedded.model_folder(name).glob("task_vectors/*")} == set(embedded.TASKS)
    assert sum(file.stat().st_size for file in embedded.FOLDER.rglob("*.*")) < 12e6


def test_tasks_leave_something_to_learn():
    for name in embedded.MODELS:
        for task in embedded.TASKS:
            recorded = RECORD["accuracy"][name][task]
            assert 25 <= recorded["zero_shot"] <= 65 and recorded["fine_tuned"] >= 85, (name, task)


def test_captions_are_whole_words():
    processor = load_processor(embedded.model_folder("A"))
    caption = digits.TEMPLATES[0].format("seven")
    assert processor.tokens([caption])["mask"].sum() == len(caption.split()) + 2


def test_processors_give_the_pixels_of_photographs():
    processor = load_processor(embedded.model_folder("W"))
    photos = np.asarray(digits.BASE(digits.load_splits()["validation"].images[:100], jax.random.key(0)))
    pixels = processor.pixels(list((255 * photos).round().astype(np.uint8)))
    assert abs(pixels - (photos - digits.PIXEL_MEAN) / digits.PIXEL_STD).max() < 0.01


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no embedded model 'X': choose one of"):
        embedded.model_folder("X")
    with pytest.raises(ValueError, match="no embedded task 'painted'"):
        embedded.task_vector_file("A", "painted")
