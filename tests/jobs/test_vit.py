"""Jobs on ViTs: the whole model but its head is moved, and the head is the task."""

import json
import re

import numpy as np
import pytest

from tvjax import jobs, tree
from tvjax.checkpoints import from_pretrained, load_tree
from tvjax.cli.main import run
from tvjax.data import open_examples
from tvjax.data.embedded import model_folder
from tvjax.jobs._evaluate import Evaluated
from tvjax.jobs.asking import with_task
from tvjax.jobs.opened import Models
from tvjax.tasks import own_head


def changed(before, after):
    one, other = (tree.flatten(from_pretrained(name).params) for name in (before, after))
    return {path for path, leaf in one.items() if not np.array_equal(leaf, other[path])}


def transport(vits, images, output, **more):
    target = vits[more.pop("target", "wider")]
    config = jobs.TransportConfig(
        source=vits["source"], finetuned=vits["finetuned"], target=target, output=output, data=str(images), **more
    )
    return jobs.transport(config), changed(target, output)


@pytest.mark.parametrize("method", ["theseus", "bico"])
def test_all_but_the_head_is_moved(vits, images, tmp_path, method):
    """The fine-tuned source has a head for other classes, which takes no part."""
    found, moved = transport(vits, images, tmp_path / "edited", method=method)
    assert "vision/blocks/2/mlp/up/kernel" in moved and all(path.startswith("vision/") for path in moved)
    assert found.norms["target"] > 0 and found.examples["count"] == 6


def test_naive_transport_into_the_source_is_the_fine_tuned_tower(vits, images, tmp_path):
    transport({**vits, "itself": vits["source"]}, images, tmp_path / "edited", method="naive", target="itself")
    edited, tuned = (tree.flatten(from_pretrained(name).params) for name in (tmp_path / "edited", vits["finetuned"]))
    for path in (path for path in tuned if path.startswith("vision/")):
        np.testing.assert_allclose(edited[path], tuned[path], rtol=1e-6, atol=1e-6)


def test_a_part_is_moved_and_nothing_else(vits, images, tmp_path):
    more = {"method": "naive", "target": "same", "part": "vision/blocks/1/mlp"}
    _, moved = transport(vits, images, tmp_path / "edited", **more)
    assert moved == {f"vision/blocks/1/mlp/{name}/{leaf}" for name in ("up", "down") for leaf in ("kernel", "bias")}


def test_no_labels_are_needed_where_no_gradients_are(vits, images, tmp_path):
    transport(vits, images / "cat", tmp_path / "edited", method="theseus", target="three")


def test_the_plan_is_what_the_transport_does(vits, images, tmp_path):

    given = {"source": vits["source"], "finetuned": vits["finetuned"], "target": vits["wider"], "data": str(images)}
    planned = jobs.plan(jobs.PlanConfig(**given, method="theseus"))
    transport(vits, images, tmp_path / "edited", method="theseus")
    done = json.loads((tmp_path / "edited" / "leaf_report.json").read_text())
    assert planned.leaves == [{k: v for k, v in leaf.items() if k != "measures"} for leaf in done["leaves"]]


def test_the_labels_are_those_of_the_head_and_not_the_order_of_folders(vits, images):
    found = jobs.evaluate(jobs.EvaluateConfig(models=vits["source"], data=str(images)))
    assert isinstance(found, Evaluated) and found.classes == ("polar bear", "cat") and found.templates == ()
    with Models() as models:
        opened = models[vits["source"]]
        pixels = opened.processor.pixels(list(open_examples(str(images))))
        logits = np.asarray(opened.pretrained.model({"pixels": pixels})["logits"])
    labels = np.array([1, 1, 1, 0, 0, 0])  # cat comes first among the folders, and second in the head
    assert found.models[0]["correct"] == (logits.argmax(1) == labels).sum()


def test_a_head_without_names_takes_the_order_of_folders(vits, images):
    found = jobs.evaluate(jobs.EvaluateConfig(models=[vits["numbered"]], data=str(images)))
    assert found.classes == ("cat", "polar bear")


def test_a_clip_and_a_vit_are_compared_on_the_classes_of_the_head(vits, images, tmp_path):
    names = [str(model_folder("A")), vits["source"]]
    found = jobs.evaluate(jobs.EvaluateConfig(models=names, data=str(images)))
    assert found.classes == ("polar bear", "cat") and found.templates == ("a photo of a {}.",)
    alone = jobs.evaluate(jobs.EvaluateConfig(models=names[0], data=str(images)))
    assert alone.classes == ("cat", "polar bear") and alone.models[0]["correct"] == found.models[0]["correct"]


def test_composition_learns_by_the_head(vits, images, tmp_path):
    tau = tmp_path / "tau.safetensors"
    jobs.extract(jobs.ExtractConfig(pretrained=vits["source"], finetuned=vits["finetuned"], output=tau))
    assert set(load_tree(tau)[0]) == {"vision"}
    given = {"task_vectors": tau, "model": vits["source"], "data": str(images), "output": tmp_path / "composed"}
    found = jobs.compose(jobs.ComposeConfig(**given, epochs=2, tune=False, validation=str(images)))
    assert found.coefficients == 38 and 0 <= found.validation_accuracy <= 1
    assert all(path.startswith("vision/") for path in changed(vits["source"], tmp_path / "composed"))


def test_the_loss_is_the_cross_entropy_of_the_head(vits):
    with Models() as models:
        opened = models[vits["source"]]
        model = with_task(opened, own_head(opened.processor, ("polar bear", "cat")))
    logits, labels = np.array([[1.0, -1.0], [0.5, 2.0]], np.float32), np.array([0, 1])
    expected = -(logits - np.log(np.exp(logits).sum(1, keepdims=True)))[np.arange(2), labels]
    np.testing.assert_allclose(model.loss(model.loss_params, {"logits": logits}, labels), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "theseus", "--part", "text"], "'text' matches no leaf that sees images: the parts are head"),
        (["--method", "bico", "--target", "{three}"], "none of the classes|has 3 classes, but the examples have 2"),
        (["--method", "theseus", "--target", "{clip}"], "a source and a target of one family"),
        (["--method", "theseus", "--finetuned", "{wider}"], "leaves differ"),
    ],
)
@pytest.mark.parametrize("command", ["transport", "plan"])
def test_what_cannot_be_is_one_line_before_any_weight_is_read(
    vits, images, tmp_path, capsys, monkeypatch, command, words, message
):
    monkeypatch.setattr("tvjax.checkpoints.reader.Tensors.read_into", lambda *_: pytest.fail("weights were read"))
    given = {"source": vits["source"], "finetuned": vits["finetuned"], "target": vits["wider"], "data": images}
    given["output"] = tmp_path / "out"
    options = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    words = [word.format(**vits, clip=model_folder("A")) for word in words]
    assert run([command, *options, *words]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tvjax: error: ")]
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists()


def test_evaluation_names_labels_that_do_not_match(vits, images, tmp_path, capsys):
    for names, message in (
        ([vits["source"], vits["three"]], "has 3 classes, but the examples have 2"),
        ([vits["finetuned"], vits["source"]], "has 2 classes, but the examples have 3"),
    ):
        assert run(["evaluate", *names, "--data", str(images)]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "1.png").write_bytes((images / "cat" / "0.png").read_bytes())
    assert run(["evaluate", vits["source"], "--data", str(tmp_path)]) == 2
    assert "['dog'], which are none of the classes ['polar bear', 'cat']" in capsys.readouterr().err


def test_examples_are_not_chosen_by_embeddings_that_a_model_does_not_give(vits, images, tmp_path):
    with pytest.raises(ValueError, match="gives no embeddings to choose images by: take --select random"):
        transport(vits, images, tmp_path / "edited", method="theseus", per_class=1, select="herding")
    assert not (tmp_path / "edited").exists()


def test_a_copy_of_the_task_vector_is_shown_beside_a_transport(vits, images, tmp_path):
    done, _ = transport(vits, images, tmp_path / "edited", method="theseus", target="same", validation=str(images))
    assert done.copy["scale"] in {round(0.05 * step, 2) for step in range(21)}
    found = jobs.evaluate(jobs.EvaluateConfig(models=[vits["same"], str(tmp_path / "edited")], data=str(images)))
    assert [one["model"] for one in found.models] == [
        vits["same"],
        str(tmp_path / "edited"),
        f"{tmp_path}/edited, copied",
    ]
    assert found.models[2]["accuracy"] == done.copy["accuracy"]  # on the same images
    assert len(found.pairs) == 3 and not any("copy" in note for note in found.notes)

    transport(vits, images, tmp_path / "wider", method="theseus")
    found = jobs.evaluate(jobs.EvaluateConfig(models=[str(tmp_path / "wider")], data=str(images)))
    assert len(found.models) == 1  # of another shape: nothing to copy

    report = json.loads((tmp_path / "edited" / "leaf_report.json").read_text()) | {"source": "gone"}
    (tmp_path / "edited" / "leaf_report.json").write_text(json.dumps(report))
    found = jobs.evaluate(jobs.EvaluateConfig(models=[str(tmp_path / "edited")], data=str(images)))
    assert len(found.models) == 1 and any("no copy is shown" in note and "gone" in note for note in found.notes)


def test_a_plan_compares_the_models_where_it_is_asked_to(vits, images):
    given = {"source": vits["source"], "method": "theseus", "data": str(images)}
    seen = []
    found = jobs.plan(jobs.PlanConfig(**given, target=vits["source"], compare=True), lambda *step: seen.append(step))
    assert [round(block["cka"], 5) for block in found.likeness] == [1.0, 1.0] and found.copy == ""
    assert [step[:2] for step in seen] == [(1, 2), (2, 2)]
    found = jobs.plan(jobs.PlanConfig(**given, target=vits["wider"], compare=True))
    assert len(found.likeness) == 3 and "8, 8" in found.copy.replace("(8,)", "8, 8")
    assert jobs.plan(jobs.PlanConfig(**given, target=vits["wider"])).likeness is None
    with pytest.raises(ValueError, match="a comparison of the models looks at calibration images: give --data"):
        jobs.plan(jobs.PlanConfig(source=vits["source"], target=vits["same"], method="naive", compare=True))
