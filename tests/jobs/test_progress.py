"""Every job tells what it begins and how far it is; long calls of the library take a function to tell it to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvjax as tv
from tvjax import jobs
from tvjax.checkpoints import from_pretrained, save_pretrained
from tvjax.checkpoints.conversion import convert
from tvjax.compose import best_start, of_loss
from tvjax.evaluate import choose_scale, predictions, scale_curve
from tvjax.jobs import configs
from tvjax.stages import Batch, Model, Stage


@pytest.fixture
def heard():
    return []


@pytest.fixture
def tell(heard):
    return lambda *step: heard.append(step)


@pytest.fixture(scope="module")
def tau(vits, tmp_path_factory):
    file = tmp_path_factory.mktemp("tau") / "tau.safetensors"
    jobs.extract(configs.ExtractConfig(pretrained=vits["source"], finetuned=vits["finetuned"], output=file))
    return file


def rounds(heard):
    """The counts of each round of steps, which must be whole: 1 to all."""
    found = [step for step in heard if step[1]]
    starts = [number for number, step in enumerate(found) if step[0] == 1]
    assert starts and starts[0] == 0
    for begin, end in zip(starts, [*starts[1:], len(found)], strict=True):
        own = found[begin:end]
        assert [step[0] for step in own] == list(range(1, own[0][1] + 1)), own
    return [found[start][1] for start in starts]


def begun(heard):
    return [step[2] for step in heard if not step[1]]


def test_convert_tells_every_leaf(vits, heard, tell, tmp_path):
    config = configs.ConvertConfig(source=vits["source"], output=tmp_path / "half", dtype="float16")
    jobs.convert(config, tell)
    count = len(tv.tree.flatten(from_pretrained(vits["source"]).params))
    assert rounds(heard) == [count]
    heard.clear()
    convert(vits["source"], tmp_path / "orbax", to="orbax", progress=tell)
    assert rounds(heard) == [count] and begun(heard) == [f"reading {vits['source']}", f"writing {tmp_path / 'orbax'}"]


def test_loading_and_saving_tell_every_leaf(vits, heard, tell, tmp_path):
    model = from_pretrained(vits["source"], progress=tell)
    save_pretrained(model, tmp_path / "copy", progress=tell)
    assert rounds(heard) == [len(tv.tree.flatten(model.params))] * 2


def test_a_merge_and_a_model_beside_a_task_vector_are_told(vits, tau, heard, tell, tmp_path):
    options = {"task_vectors": (tau, vits["same"]), "model": vits["source"], "method": "ties"}
    jobs.merge(configs.MergeConfig(**options, output=tmp_path / "merged.safetensors"), tell)
    assert len(rounds(heard)) == 2  # of the differences, of the merge
    assert begun(heard) == ["reading the task vectors", f"writing {tmp_path / 'merged.safetensors'}"]
    heard.clear()
    jobs.inspect(configs.InspectConfig(things=(str(tau),), model=vits["source"]), tell)
    assert len(rounds(heard)) == 2  # of the model, of the task vector


def test_transport_evaluate_and_plan_tell_what_they_begin(vits, images, heard, tell, tmp_path):
    models = {name: vits[name] for name in ("source", "finetuned")} | {"target": vits["wider"]}
    data = {"data": str(images), "batch_size": 2}
    config = configs.TransportConfig(
        **models, method="theseus", validation=str(images), output=tmp_path / "edited", **data
    )
    jobs.transport(config, tell)
    said = begun(heard)
    for what in ("reading the examples", f"reading {vits['source']}", "fitting", f"writing {tmp_path / 'edited'}"):
        assert what in said
    of_scales = [step for step in heard if step[2] == "batch"]
    assert of_scales and of_scales[-1][0] == of_scales[-1][1]
    heard.clear()
    jobs.evaluate(configs.EvaluateConfig(models=(vits["wider"], str(tmp_path / "edited")), **data), tell)
    (count,) = rounds(heard)
    assert count % 2 == 0 and {step[2] for step in heard if step[1]} == {vits["wider"], str(tmp_path / "edited")}
    heard.clear()
    jobs.plan(configs.PlanConfig(source=vits["source"], target=vits["wider"], method="theseus"), tell)
    assert begun(heard) == ["looking at the models", "tracing the fit"]


def test_library_calls_over_batches_tell_each(heard, tell):
    stage = Stage("head", lambda params, x: {"logits": x @ params["kernel"]})
    model, batches = Model({"kernel": jnp.eye(2)}, (stage,)), [Batch(jnp.eye(2), jnp.arange(2))] * 3
    tau = {"kernel": jnp.ones((2, 2))}
    predictions(model, batches, tell)
    scale_curve(model, tau, (0.0, 1.0), batches, tell)
    choose_scale(model, tau, (0.0, 1.0), batches, tell)
    assert rounds(heard) == [3, 3, 3]
    heard.clear()
    predictions(model, iter(batches), tell)  # nobody knows how many
    assert heard == [(0, 0, f"batch {number}") for number in (1, 2, 3)]
    heard.clear()
    goal = of_loss(lambda params, batch: jnp.abs(params["w"] - batch), jnp.array([2.0]))
    best_start({"w": jnp.float32(0)}, [{"w": np.float32(1)}] * 2, goal, key=jax.random.key(0), progress=tell)
    assert rounds(heard) == [2]
