"""The embedded language models: what the record says of them, and what makes them worth moving task vectors between."""

import itertools
import json
from pathlib import Path

import pytest

from tvjax.arithmetic import apply
from tvjax.checkpoints import fingerprint, from_pretrained, load_processor, load_tree
from tvjax.data import embedded
from tvjax.data.embedded_texts import TASKS
from tvjax.demo.language import Settings, examples, load
from tvjax.evaluate import accuracy

RECORD = json.loads((Path(__file__).parents[2] / "results" / "build_language_models.json").read_text())


@pytest.mark.parametrize(("name", "task"), [*zip(embedded.LANGUAGE_MODELS, itertools.cycle(TASKS))])
def test_models_reach_the_recorded_accuracies(name, task):
    recorded = RECORD["models"][name]
    model, taus = load(name, task)
    _, metadata = load_tree(embedded.task_vector_file(name, task))
    found = fingerprint(from_pretrained(embedded.model_folder(name)).params)
    assert found == recorded["fingerprint"] == metadata["base_fingerprint"]
    test = examples(name, task, Settings(test=RECORD["texts"][task]["test"])).test
    assert 100 * accuracy(model, test).fraction == pytest.approx(recorded["accuracy"][task]["zero_shot"], abs=0.5)
    tuned = model.replace(params=apply(model.params, taus[task]))
    assert 100 * accuracy(tuned, test).fraction == pytest.approx(recorded["accuracy"][task]["fine_tuned"], abs=0.8)


def test_every_task_has_a_vector_of_every_model_and_all_of_it_is_small():
    for name in embedded.LANGUAGE_MODELS:
        assert {file.stem for file in embedded.model_folder(name).glob("task_vectors/*")} == set(TASKS)
    assert sum(file.stat().st_size for file in embedded.LANGUAGE_FOLDER.rglob("*") if file.is_file()) < 8e6


def test_tasks_leave_something_to_learn():
    for name in embedded.LANGUAGE_MODELS:
        for task, (words, _, _) in TASKS.items():
            recorded = RECORD["models"][name]["accuracy"][task]
            assert recorded["zero_shot"] > 100 / len(words) - 1 and recorded["fine_tuned"] > recorded["zero_shot"]


def test_the_models_share_a_tokenizer_to_which_every_answer_is_one_token():
    tokenizers = [load_processor(embedded.model_folder(name)).tokenizer for name in embedded.LANGUAGE_MODELS]
    answers = [f"{template.format(text='dull')} {word}" for words, template, _ in TASKS.values() for word in words]
    rows = [tokenizer(answers)["input_ids"] for tokenizer in tokenizers]
    assert all(row == rows[0] for row in rows)
    asked = [template.format(text="dull") for words, template, _ in TASKS.values() for _ in words]
    assert [len(row) for row in rows[0]] == [len(row) + 1 for row in tokenizers[0](asked)["input_ids"]]


def test_shapes_differ_where_transport_is_to_bridge_them():
    configs = [from_pretrained(embedded.model_folder(name)).config for name in embedded.LANGUAGE_MODELS]
    llamas, t5s = configs[:3], configs[3:]
    assert llamas[0] == llamas[2]
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        assert getattr(llamas[0], name) < getattr(llamas[1], name), name
    for name in ("d_model", "num_decoder_layers", "num_heads"):
        assert getattr(t5s[0], name) < getattr(t5s[1], name), name
