"""Sums tensor by tensor are those of the whole trees; headers alone say what a model is."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax import capture, tree
from tvjax.arithmetic import apply
from tvjax.checkpoints import Pretrained, from_pretrained, load_tree, save_coefficients, save_pretrained, save_tree
from tvjax.checkpoints.reader import Tensors
from tvjax.checkpoints.safetensors import save_tensors
from tvjax.compose import init as init_coefficients
from tvjax.models.clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, clip, init
from tvjax.report import inspection
from tvjax.report import sums as adding
from tvjax.report.comparison import compare
from tvjax.report.contents import contents

CONFIG = CLIPConfig(
    CLIPVisionConfig(8, 16, 2, 2, image_size=8, patch_size=4, projection_dim=4),
    CLIPTextConfig(16, 8, 16, 1, 2, max_position_embeddings=6, eos_token_id=15, projection_dim=4),
)

QUANTISED = '{"quantization_config": {"quant_method": "gptq"}}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and two task vectors of its vision tower, one of them in bfloat16 and of fewer leaves."""
    folder = tmp_path_factory.mktemp("inspection")
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init(CONFIG, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: jax.device_put(np.float32(rng.normal(size=leaf.shape))), shapes)
    save_pretrained(Pretrained(clip(CONFIG, params), CONFIG), folder / "model")
    base = from_pretrained(folder / "model")
    for name, dtype, leave_out in (("a", None, ()), ("b", "bfloat16", ("pre_norm",))):
        vision = {key: leaf for key, leaf in params["vision"].items() if key not in leave_out}
        tau = jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape) * (rng.uniform(size=x.shape) > 0.3)), vision)
        save_tree(folder / f"{name}.safetensors", {"vision": tau}, base.identity(), dtype)
    return folder


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr(Tensors, "read_into", lambda *_: pytest.fail("weights were read"))


@pytest.fixture(params=[50, 2**20], ids=["in small pieces", "whole"])
def pieces(request, monkeypatch):
    monkeypatch.setattr(adding, "_PIECE", request.param)


def test_a_model_is_known_from_its_headers(folder, no_weights):
    found = contents(folder / "model")
    shapes = {path: leaf.shape for path, leaf in tree.flatten(init(CONFIG, jax.random.key(0))).items()}
    assert found.kind == "model" and found.about["config"]["vision"]["hidden_size"] == 8
    assert {leaf.path: leaf.shape for leaf in found.leaves} == shapes
    assert found.bytes == 4 * found.entries == 4 * sum(np.prod(shape, dtype=int) for shape in shapes.values())
    keys = {leaf.path: leaf.key for leaf in found.leaves}
    assert keys["vision/blocks/1/mlp/up/kernel"] == "vision_model.encoder.layers.1.mlp.fc1.weight"


def test_sites_are_those_of_each_kind_of_stage(folder, no_weights):
    found = inspection.model_sites(contents(folder / "model"))
    stages = [kind.stages for kind in found]
    assert ("vision/blocks/0", "vision/blocks/1") in stages and ("text/blocks/0",) in stages
    assert sum(map(len, stages)) == 2 + 2 + 1 + 2 + 1
    block = found[stages.index(("vision/blocks/0", "vision/blocks/1"))]
    model = clip(CONFIG, init(CONFIG, jax.random.key(0)))
    stage = next(stage for stage in model.stages if stage.name == "vision/blocks/1")
    table = capture.sites(stage.function, model.params["vision"]["blocks"]["1"], {"hidden": jnp.ones((2, 5, 8))})
    shown = [(site.key, site.kind, site.d_in, site.d_out) for site in block.table.sites]
    assert shown == [(site.key, site.kind, site.d_in, site.d_out) for site in table.sites]
    assert set(block.tokens) == {5}
    covered = {path for kind in found for path in (*kind.table.unclassified, *kind.table.unused)}
    assert covered == {"embeddings/class_token", "embeddings/tokens", "logit_scale"}


def test_sites_of_a_language_model():
    folder = Path(__file__).parents[1] / "models" / "goldens" / "mistral"
    found = inspection.model_sites(contents(folder))
    assert [kind.stages for kind in found] == [("embeddings",), ("blocks/0", "blocks/1", "blocks/2"), ("head",)]
    assert {site.path for site in found[1].table.sites} >= {"attention/key/kernel", "mlp/gate/kernel", "norm1/scale"}
    assert [kind.table.unclassified for kind in found] == [{"tokens": ("gather",)}, {}, {}]


@pytest.mark.parametrize("name", ["a.safetensors", "b.safetensors"])
def test_sums_by_leaf_block_and_whole(folder, pieces, name):
    found = contents(folder / name)
    tau, metadata = load_tree(folder / name)
    assert found.kind == "task vector" and found.about["base_fingerprint"] == metadata["base_fingerprint"]
    sums = inspection.measure(found)
    for path, leaf in tree.flatten(tau).items():
        np.testing.assert_allclose(sums[path].norm, tree.norm(leaf), rtol=1e-5)
        assert sums[path].zeros == np.sum(np.asarray(leaf) == 0) and sums[path].entries == leaf.size
    blocks = adding.by_block(sums)
    assert sorted(path for paths in blocks.values() for path in paths) == sorted(sums)
    of_block = adding.total(sums, blocks["vision/blocks/1"])
    np.testing.assert_allclose(of_block.norm, tree.norm(tau["vision"]["blocks"]["1"]), rtol=1e-5)
    np.testing.assert_allclose(adding.total(sums, sums).norm, tree.norm(tau), rtol=1e-5)


def test_likeness_by_leaf_and_whole(folder, pieces):
    first, second = (contents(folder / f"{name}.safetensors") for name in "ab")
    told = []
    compared = compare(first, second, lambda *step: told.append(step))
    assert compared.only_first == ("vision/pre_norm/bias", "vision/pre_norm/scale") and compared.only_second == ()
    assert [step[:2] for step in told] == [(i + 1, len(compared.paths)) for i in range(len(compared.paths))]
    a, b = (load_tree(folder / f"{name}.safetensors")[0] for name in "ab")
    a["vision"].pop("pre_norm")
    for path, x, y in zip(tree.flatten(a), jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        own = compared.sums[path]
        np.testing.assert_allclose(own.cosine, tree.cosine(x, y), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(own.sign_agreement, tree.sign_agreement(x, y), rtol=1e-6)
        np.testing.assert_allclose(own.distance, tree.norm(x - y.astype(jnp.float32)), rtol=1e-5)
    whole = adding.total(compared.sums, compared.sums)
    np.testing.assert_allclose(whole.cosine, tree.cosine(a, b), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(whole.sign_agreement, tree.sign_agreement(a, b), rtol=1e-6)


def test_other_shapes_dtypes_and_bases_are_said_and_norms_compared(folder, tmp_path):
    wider = {"vision": {"pre_norm": {"bias": np.full(9, 2.0, np.float32)}}, "new": np.ones(4, np.float32)}
    save_tree(tmp_path / "wider.safetensors", wider, {"base_model": "another", "base_fingerprint": "1"})
    found = compare(contents(folder / "a.safetensors"), contents(tmp_path / "wider.safetensors"))
    bias = tree.get(load_tree(folder / "a.safetensors")[0], "vision/pre_norm/bias")
    assert found.shapes == {"vision/pre_norm/bias": ((8,), (9,))} and not found.sums
    row = found.row(["vision/pre_norm/bias"])
    np.testing.assert_allclose(row.norms, (tree.norm(bias), 6.0), rtol=1e-5)
    assert row[1:] == (0.0, None, None, None) and found.row(["new"]).norms == (None, 2.0)
    assert found.one_base is False and found.about["base_model"][1] == "another"
    np.testing.assert_allclose(found.row(found.paths).norms[1], np.sqrt(36 + 4), rtol=1e-6)
    near = compare(contents(folder / "a.safetensors"), contents(folder / "b.safetensors"))
    assert near.one_base is True and set(near.dtypes.values()) == {("F32", "BF16")} and not near.shapes
    whole, leaves = near.row(near.paths), load_tree(folder / "a.safetensors")[0]
    np.testing.assert_allclose(whole.norms[0], tree.norm(leaves), rtol=1e-5)  # with what only the first has
    np.testing.assert_allclose(whole.reference**2, whole.norms[0] ** 2 - tree.norm(leaves["vision"]["pre_norm"]) ** 2)


def test_a_tree_is_like_itself_and_zero_like_nothing():
    x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    same, opposite, zero = (adding.pair_sums_of(x, y) for y in (x, -x, 0 * x))
    assert (same.cosine, same.sign_agreement, same.distance) == (1, 1, 0)
    assert (opposite.cosine, opposite.sign_agreement) == (-1, 0)
    assert (zero.cosine, zero.sign_agreement) == (0, 0)
    empty = np.zeros((0, 3))
    assert adding.sums_of(empty) == adding.Sums() and adding.pair_sums_of(empty, empty).cosine == 0


def test_a_leaf_that_is_zero_has_no_cosine(tmp_path):
    for name, value in (("zero", 0.0), ("one", 1.0)):
        save_tree(tmp_path / f"{name}.safetensors", {"a": np.full(3, value), "b": np.ones(2)}, {})
    zero, one = (contents(tmp_path / f"{name}.safetensors") for name in ("zero", "one"))
    for found in (compare(zero, zero), compare(zero, one), compare(one, zero)):
        assert found.row(["a"]).cosine is None
        np.testing.assert_allclose(found.row(["b"]).cosine, 1.0)


def test_models_are_compared_in_the_layout_of_their_leaves(folder, tmp_path):
    base, tau = from_pretrained(folder / "model"), load_tree(folder / "a.safetensors")[0]
    save_pretrained(base.with_params(apply(base.params, tau)), tmp_path / "edited")
    first, second = contents(folder / "model"), contents(tmp_path / "edited")
    compared, norms = (
        compare(first, second),
        inspection.measure(contents(folder / "a.safetensors")),
    )
    for path, own in compared.sums.items():
        np.testing.assert_allclose(own.distance, norms[path].norm if path in norms else 0, rtol=1e-4)


def test_a_task_vector_beside_the_model_that_it_was_made_for(folder, tmp_path):
    vector, model = contents(folder / "a.safetensors"), contents(folder / "model")
    params = tree.flatten(from_pretrained(folder / "model").params)
    sums, made_for = inspection.base_sums(vector, model)
    for path, own in sums.items():
        np.testing.assert_allclose(own.norm, tree.norm(params[path]), rtol=1e-5)
    assert made_for is True
    base = from_pretrained(folder / "model")
    changed = apply(base.params, {"text": {"final_norm": {"bias": np.ones(8, np.float32)}}})
    save_pretrained(base.with_params(changed), tmp_path / "other")
    assert inspection.base_sums(vector, contents(tmp_path / "other"))[1] is False
    save_tree(tmp_path / "nameless.safetensors", {"vision": {"pre_norm": {"bias": np.ones(8, np.float32)}}})
    nameless = contents(tmp_path / "nameless.safetensors")
    assert nameless.kind == "tensors" and inspection.base_sums(nameless, model)[1] is None


def test_layers_are_sorted_as_numbers(tmp_path):
    layers = {str(i): np.ones(1, np.float32) for i in range(12)}
    save_tree(tmp_path / "t.safetensors", {"blocks": layers})
    paths = [leaf.path for leaf in contents(tmp_path / "t.safetensors").leaves]
    assert paths == [f"blocks/{i}" for i in range(12)]


@pytest.fixture
def things(folder, tmp_path):
    """Damaged and unfitting things by name."""
    rng = np.random.default_rng(1)
    save_tensors(tmp_path / "empty.safetensors", {}, {"base_model": "demo"})
    for name, layout in (("no_layout", "{"), ("foreign_layout", "[]"), ("half_layout", '{"vectors": []}')):
        save_tensors(
            tmp_path / f"{name}.safetensors",
            {"values": rng.normal(size=(1, 1, 1))},
            {"format": "tvjax coefficients 1", "layout": layout},
        )
    save_tree(tmp_path / "elsewhere.safetensors", {"other": np.ones(2, np.float32)})
    save_tree(tmp_path / "wider.safetensors", {"vision": {"pre_norm": {"bias": np.ones(9, np.float32)}}})
    save_coefficients(tmp_path / "coefficients.safetensors", init_coefficients([{"w": jnp.ones(2)}]))
    (tmp_path / "cut.safetensors").write_bytes((folder / "a.safetensors").read_bytes()[:100])
    (tmp_path / "text.safetensors").write_text("hello")
    for name, config in (("broken", "{"), ("list", "[]"), ("number", '{"model_type": 3}'), ("int4", QUANTISED)):
        shutil.copytree(folder / "model", tmp_path / name)
        (tmp_path / name / "config.json").write_text(config)
    (tmp_path / "no_config").mkdir()
    settings = json.loads((folder / "model" / "config.json").read_text())
    settings["vision_config"]["hidden_size"] = 16
    shutil.copytree(folder / "model", tmp_path / "unfitting")
    (tmp_path / "unfitting" / "config.json").write_text(json.dumps(settings))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty.safetensors", "holds no tensors"),
        ("no_layout.safetensors", "is marked as coefficients, but does not describe them"),
        ("foreign_layout.safetensors", "does not describe them"),
        ("half_layout.safetensors", "does not describe them"),
        ("cut.safetensors", "no complete safetensors file"),
        ("text.safetensors", "no complete safetensors file"),
        ("none.safetensors", "there is no file"),
        ("broken", "config.json"),
        ("list", "holds a list, expected an object"),
        ("number", "model_type 3 is not supported"),
        ("int4", r"the weights are quantised \(gptq\)"),
        ("no_config", "has no config.json"),
        ("unfitting", "do not fit its config.json"),
    ],
)
def test_what_cannot_be_inspected(things, name, message):
    with pytest.raises(ValueError, match=message):
        contents(things / name)


def test_what_cannot_be_compared(folder, things):
    vector, model = contents(folder / "a.safetensors"), contents(folder / "model")
    with pytest.raises(ValueError, match="no leaf in common"):
        compare(vector, contents(things / "elsewhere.safetensors"))
    with pytest.raises(ValueError, match="give two of one kind"):
        compare(vector, model)
    with pytest.raises(ValueError, match="expected the pre-trained model"):
        inspection.base_sums(vector, vector)
    with pytest.raises(ValueError, match="1 of 1 leaves .* is \\[2\\] here and missing there"):
        inspection.base_sums(contents(things / "elsewhere.safetensors"), model)
    with pytest.raises(ValueError, match="only a model has sites"):
        inspection.model_sites(vector)
    save_tensors(things / "nan.safetensors", {"a": np.ones(2, np.float32)})
    data = bytearray((things / "nan.safetensors").read_bytes())
    data[-4:] = np.float32("nan").tobytes()
    (things / "nan.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="1 of 2 values that are NaN"):
        inspection.measure(contents(things / "nan.safetensors"))
