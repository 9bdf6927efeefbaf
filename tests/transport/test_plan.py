"""A plan says, from shapes alone, what the fit then does."""

import jax
import jax.numpy as jnp
import pytest

import tvjax
from tvjax import walk as walk_module
from tvjax.align.procrustes import OrthogonalMap
from tvjax.transport import leaf_report
from tvjax.transport.plan import plan
from tvjax.walk import Walk


def abstract(arrays):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)


def rotations(state):
    return {name: r for part in state.parts for name, r in part.arrays.items() if isinstance(r, OrthogonalMap)}


def assert_is_plan_of(found, state):
    assert found.leaves == tuple(leaf._replace(measures={}) for leaf in leaf_report(state))
    maps = {m.name: m for stage in found.stages for m in stage.maps}
    assert {name: m.shape for name, m in maps.items()} == {
        name: (r.left.shape[-2], r.right.shape[-1]) for name, r in rotations(state).items()
    }
    measures = {name: found for part in state.parts for name, found in part.measures.items()}
    for name, planned in maps.items():
        assert planned.rows == int(measures[name]["rows"]), name
    size = sum(x.size * x.dtype.itemsize for part in state.parts for x in jax.tree.leaves(part.arrays))
    assert found.memory["maps"] == size


def test_a_plan_is_what_the_fit_does(tiny, name, fitted):
    transport, state = fitted(name)
    if name == "transfusion":
        with pytest.raises(ValueError, match="transfusion compares the weights themselves"):
            plan(transport, abstract(tiny.a), abstract(tiny.b), [])
        return
    assert_is_plan_of(plan(transport, abstract(tiny.a), abstract(tiny.b), abstract(tiny.batches)), state)


@pytest.mark.parametrize("target", ["w", "d"])
def test_across_widths_and_depths(tiny, target):
    target = getattr(tiny, target)
    found = plan(tvjax.theseus(), abstract(tiny.a), abstract(target), abstract(tiny.batches))
    assert_is_plan_of(found, tvjax.fit(tvjax.theseus(), tiny.a, target, tiny.batches))
    assert [stage.target for stage in found.stages] == [stage.name for stage in target.stages]
    partners = dict.fromkeys(stage.source for stage in found.stages)
    assert list(partners) == [stage.name for stage in tiny.a.stages]


def test_tokens_and_the_examples_that_a_unique_map_needs(tiny):
    larger = tiny.make_model(tiny.make_config(image=12), 4)
    pixels = [jax.ShapeDtypeStruct((3, size, size, 3), jnp.float32) for size in (8, 12)]
    views = tuple(tvjax.Batch({"pixels": x}) for x in pixels)
    found = plan(tvjax.theseus(), abstract(tiny.a), abstract(larger), [views])
    block = next(stage for stage in found.stages if stage.target == "vision/blocks/1")
    assert block.tokens == (5, 10, 10)
    assert {(m.shape, m.rows, m.examples) for m in block.maps} == {((16, 16), 30, 2), ((32, 32), 30, 4)}


def test_gradients_cost_memory_and_residual_streams_grow_with_the_examples(tiny):
    def memory(transport, count):
        batch = abstract(tiny.make_batches(1, count)[0])
        return plan(transport, abstract(tiny.a), abstract(tiny.w), [batch]).memory

    few, many, bico = memory(tvjax.theseus(), 4), memory(tvjax.theseus(), 8), memory(tvjax.bico(), 4)
    assert many["residual streams"] == 2 * few["residual streams"]
    assert bico["residual streams"] > few["residual streams"]
    assert bico["largest stage"] > few["largest stage"]
    assert bico["parameters"] == few["parameters"]


@pytest.mark.parametrize(
    ("link", "depth"),
    [
        (tvjax.theseus(), "uniform"),
        (tvjax.theseus(), [5, 0, 3]),
        (tvjax.bico(), "uniform"),
        (tvjax.chain(tvjax.bico(), tvjax.gradfix()), "uniform"),
        (tvjax.gradfix(), "uniform"),
    ],
    ids=["forwards", "in another order", "backwards", "two links", "the target alone"],
)
def test_residual_streams_are_those_that_the_walks_hold(tiny, monkeypatch, link, depth):
    deep, target = (tiny.make_model(tiny.make_config(depth=n), n) for n in (6, 3))
    source = target if link.name == "gradfix" else deep
    walks, making, most = [], [], [0]

    def held():
        parts = [making, *((walk._carries, walk._cotangents, [b.inputs for b in walk.batches]) for walk in walks)]
        unique = {id(leaf): leaf.nbytes for leaf in jax.tree.leaves(parts)}
        return sum(unique.values())

    def watched(name):
        original = getattr(Walk, name)

        def method(self, *arguments):
            if self.batches and self not in walks:
                walks.append(self)
            result = original(self, *arguments)
            most[0] = max(most[0], held())
            making.clear()
            return result

        return method

    def run(*arguments, original=walk_module.run_stage):
        making.append(original(*arguments))
        most[0] = max(most[0], held())
        return making[-1]

    found = plan(link, abstract(source), abstract(target), abstract(tiny.batches), depth=depth)
    for name in ("carries", "cotangents", "observe", "keep_cotangent", "params"):
        monkeypatch.setattr(Walk, name, watched(name))
    monkeypatch.setattr(walk_module, "run_stage", run)
    tvjax.fit(link, source, target, tiny.batches, depth=depth)
    shared = sum(batch.inputs["pixels"].nbytes for batch in tiny.batches)  # by both models, which are planned apart
    planned = found.memory["residual streams"] - shared
    assert most[0] <= planned <= 1.15 * most[0]


def test_residual_streams_do_not_grow_with_the_depth_of_a_walk_forwards(tiny):
    shallow, deep = (abstract(tiny.make_model(tiny.make_config(depth=depth), 0)) for depth in (3, 9))
    batch = abstract(tiny.batches[0])
    few, many = (plan(tvjax.theseus(), model, model, [batch]).memory for model in (shallow, deep))
    names = ("residual streams", "largest stage", "largest streamed stage")
    assert [few[name] for name in names] == [many[name] for name in names] and many["parameters"] > few["parameters"]
    few, many = (plan(tvjax.bico(), model, model, [batch]).memory for model in (shallow, deep))
    assert many["residual streams"] > 1.5 * few["residual streams"]


def test_what_is_traced_does_not_grow_with_depth(tiny):
    shallow, deep = (abstract(tiny.make_model(tiny.make_config(depth=depth), 0)) for depth in (3, 9))
    batch = abstract(tiny.batches[0])
    traced = []

    def counting(function):
        def wrapped(*args):
            traced.append(1)
            return function(*args)

        return wrapped

    link = tvjax.theseus().links[0]
    counted = tvjax.Transport((link._replace(fit=counting(link.fit)),))
    plan(counted, shallow, shallow, [batch])
    once = len(traced)
    plan(counted, deep, deep, [batch])
    assert len(traced) == 2 * once


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": [0, 7]}, "layer"),
        ({"tokens": "every other"}, "tokens must be one of"),
    ],
)
def test_what_a_fit_refuses_is_refused(tiny, change, message):
    with pytest.raises(ValueError, match=message):
        plan(tvjax.theseus(), abstract(tiny.a), abstract(tiny.b), abstract(tiny.batches), **change)


@pytest.mark.parametrize("depth", ["cka", {"vision/blocks": "cka"}], ids=str)
def test_a_pairing_by_activations_is_planned_as_uniform_and_said(tiny, depth):
    arguments = abstract(tiny.a), abstract(tiny.d), abstract(tiny.batches)
    found, uniform = plan(tvjax.theseus(), *arguments, depth=depth), plan(tvjax.theseus(), *arguments)
    assert found._replace(notes=()) == uniform
    assert "paired by cka" in found.notes[0] and "shown is uniform" in found.notes[0] and not uniform.notes
    with pytest.raises(ValueError, match="this transport reads none"):
        plan(tvjax.orthogonal_shift(), *arguments, depth=depth)


def test_shapes_that_do_not_fit_are_refused(tiny):
    with pytest.raises(ValueError, match="gradfix needs models of one shape"):
        plan(tvjax.gradfix(), abstract(tiny.a), abstract(tiny.w), abstract(tiny.batches))
    bare = [tvjax.Batch(batch.inputs) for batch in abstract(tiny.batches)]
    with pytest.raises(ValueError, match="bico reads gradients, so its calibration batches need labels"):
        plan(tvjax.bico(), abstract(tiny.a), abstract(tiny.w), bare)
