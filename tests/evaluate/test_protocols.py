"""The protocols on a model whose accuracies can be counted by hand."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import tvjax as tv
from tvjax.evaluate.protocols import MEAN, Benchmark, addition, all_pairs, analogy, negation
from tvjax.stages import Batch, Model, Stage

# Logits are x @ kernel; task i asks for class 1 where feature i is on, and its task vector turns that on.
HEAD = Stage("head", lambda params, x: {"logits": x @ params["kernel"]})
BASE = Model({"kernel": jnp.tile(jnp.array([0.5, 0.0]), (3, 1))}, (HEAD,))


def task(feature, label=1, count=4):
    batch = Batch(jnp.zeros((count, 3)).at[:, feature].set(1.0), jnp.full(count, label))
    return Benchmark(BASE, batch, batch)


def vector(feature, size=1.0):
    return {"kernel": jnp.zeros((3, 2)).at[feature, 1].set(size)}


TASKS = {"a": task(0), "b": task(1)}
TAUS = {"a": vector(0), "b": vector(1)}
GRID = (0.0, 0.25, 0.75, 1.0)


def test_addition_solves_both_tasks_and_picks_the_smallest_scale_that_does():
    first, second, mean = addition(TASKS, TAUS, GRID)
    assert [row.measured_on for row in (first, second, mean)] == ["a", "b", MEAN]
    for row in (first, second, mean):
        assert (row.alpha, row.before, row.after, row.normalised) == (0.75, 0.0, 1.0, 1.0)


def test_a_scale_for_each_task_vector_finds_what_one_scale_cannot():
    # The first vector spoils the second task when it is long, the second must be long.
    spoiling = {"kernel": vector(0)["kernel"].at[1, 1].set(-0.5)}
    short = {"a": spoiling, "b": vector(1)}
    one = addition(TASKS, short, (0.0, 0.75, 1.0))[-1]
    each = addition(TASKS, short, (0.0, 0.75, 1.0), each=True)[-1]
    assert one.after == 0.5 and each.after == 1.0


def test_a_merge_takes_the_place_of_the_sum():
    seen = []

    def merge(taus):
        seen.append(len(taus))
        return tv.add(*taus)

    assert addition(TASKS, TAUS, GRID, merge=merge)[-1].after == 1.0
    assert set(seen) == {2}


def test_all_pairs_are_all_pairs():
    tasks, taus = {**TASKS, "c": task(2)}, {**TAUS, "c": vector(2)}
    rows = all_pairs(tasks, taus, GRID)
    assert [row.edit for row in rows] == ["a + b", "a + c", "b + c"]
    assert all(row.measured_on == MEAN and row.normalised == 1.0 for row in rows)
    with pytest.raises(ValueError, match="two tasks or more"):
        all_pairs({"a": TASKS["a"]}, {"a": TAUS["a"]}, GRID)


def test_negation_stops_where_the_control_would_fall():
    # Forgetting feature 0 (label 0 is right at the start) also pulls feature 1 down, further out.
    forgets = {"kernel": jnp.zeros((3, 2)).at[0, 0].set(1.0).at[1, 0].set(0.6)}
    gone, control = negation("a", task(0, label=0), ("b", task(1, label=0)), forgets, GRID)
    assert (gone.alpha, gone.before, gone.after) == (0.75, 1.0, 0.0)
    assert (control.before, control.after) == (1.0, 1.0)
    kept = negation(
        "a", task(0, label=0), ("b", task(1, label=0)), {"kernel": jnp.ones((3, 2)) * jnp.array([9.0, 0])}, GRID
    )
    assert [row.alpha for row in kept] == [0.0, 0.0]  # no scale but 0 spares the control


def test_analogy_takes_the_best_scale_of_each_edit():
    rows = analogy("c", task(2), {"right": vector(2), "wrong": vector(0)}, GRID)
    assert [(row.alpha, row.after) for row in rows] == [(0.75, 1.0), (0.0, 0.0)]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"\['a', 'b'\] and task vectors \['a'\]"):
        addition(TASKS, {"a": TAUS["a"]}, GRID)
    with pytest.raises(ValueError, match="expected 0 among them"):
        negation("a", TASKS["a"], ("b", TASKS["b"]), TAUS["a"], (0.5, 1.0))
    with pytest.raises(ValueError, match="keep: found 2"):
        negation("a", TASKS["a"], ("b", TASKS["b"]), TAUS["a"], GRID, keep=2)


def test_nothing_of_the_task_vectors_is_changed():
    before = {name: np.asarray(tau["kernel"]).copy() for name, tau in TAUS.items()}
    addition(TASKS, TAUS, GRID, each=True)
    chex.assert_trees_all_equal({name: np.asarray(tau["kernel"]) for name, tau in TAUS.items()}, before)
