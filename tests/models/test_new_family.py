"""A family of a user's own: one config, one module, one table and one entry, and no file of the package."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from tvjax import Batch, fit, theseus, tree
from tvjax.align.permutations import permute, random_permutations
from tvjax.checkpoints import from_pretrained, save_pretrained
from tvjax.checkpoints.streaming import extract
from tvjax.models.families import FAMILIES, Family
from tvjax.models.key_table import kernels_by_module
from tvjax.models.layer_table import LayerTable, Row, fix_outputs
from tvjax.models.settings import fields
from tvjax.models.symmetry import symmetry_of_config
from tvjax.models.transformer import linear, parameters, stage_function
from tvjax.stages import Model, Stage

FLOAT32 = jnp.dtype("float32")
TABLE = LayerTable(
    rows=(
        Row("embed", "wte", "kernel", (None, "residual")),
        Row("blocks/{i}/up", "h.{i}.mlp.c_fc", "conv1d", ("residual", "blocks/{i}/hidden")),
        Row("blocks/{i}/down", "h.{i}.mlp.c_proj", "conv1d", ("blocks/{i}/hidden", "residual")),
        Row("head", "score", "linear", ("residual", None), fixed=True),
    ),
)


@dataclasses.dataclass(frozen=True)
class Config:
    inputs: int = 3
    width: int = 6
    hidden: int = 8
    num_hidden_layers: int = 2
    classes: int = 4

    @classmethod
    def from_dict(cls, settings):
        return cls(**fields(cls, settings))

    def to_dict(self):
        return {"model_type": "mlp", **dataclasses.asdict(self)}


class Embed(nnx.Module):
    def __init__(self, config, *, rngs):
        self.embed = linear(config.inputs, config.width, FLOAT32, rngs, 1.0, use_bias=False)

    def __call__(self, carry):
        return {"hidden": self.embed(carry["x"])}


class Block(nnx.Module):
    def __init__(self, config, *, rngs):
        self.up = linear(config.width, config.hidden, FLOAT32, rngs, 0.5)
        self.down = linear(config.hidden, config.width, FLOAT32, rngs, 0.5)

    def __call__(self, carry):
        return {"hidden": carry["hidden"] + self.down(nnx.relu(self.up(carry["hidden"])))}


class Head(nnx.Module):
    def __init__(self, config, *, rngs):
        self.head = linear(config.width, config.classes, FLOAT32, rngs, 1.0)

    def __call__(self, carry):
        return {"logits": self.head(carry["hidden"])}


class MLP(nnx.Module):
    def __init__(self, config, *, rngs):
        self.embed = Embed(config, rngs=rngs).embed
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.head = Head(config, rngs=rngs).head


def build(config, params, dtype=jnp.float32):
    stages = [Stage("embed", stage_function(Embed, config), (("embed", "embed"),))]
    for i in range(config.num_hidden_layers):
        stages.append(Stage(f"blocks/{i}", stage_function(Block, config), (("", f"blocks/{i}"),), group="blocks"))
    stages.append(Stage("head", stage_function(Head, config), (("head", "head"),)))
    return Model(params, fix_outputs(TABLE, stages))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    family = Family(
        Config,
        lambda config, key: parameters(MLP(config, rngs=nnx.Rngs(key))),
        build,
        TABLE,
        lambda config, examples: {"x": jax.ShapeDtypeStruct((examples, config.inputs), jnp.float32)},
    )
    monkeypatch.setitem(FAMILIES, "mlp", family)
    return family


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    shapes = {"wte.weight": (6, 3), "score.weight": (4, 6), "score.bias": (4,)}
    for i in range(2):
        shapes |= {f"h.{i}.mlp.c_fc.weight": (6, 8), f"h.{i}.mlp.c_fc.bias": (8,)}  # Conv1D: [in, out]
        shapes |= {f"h.{i}.mlp.c_proj.weight": (8, 6), f"h.{i}.mlp.c_proj.bias": (6,)}
    tensors = {key: random.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
    (tmp_path / "model").mkdir()
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    (tmp_path / "model" / "config.json").write_text(json.dumps(Config().to_dict()))
    return tmp_path / "model"


def make_inputs(seed=0):
    return {"x": jnp.asarray(np.random.default_rng(seed).normal(size=(9, 3)), jnp.float32)}


def test_it_is_read_run_and_written(folder, tmp_path):
    pretrained, tensors = from_pretrained(folder), load_file(folder / "model.safetensors")
    hidden = np.asarray(make_inputs()["x"]) @ tensors["wte.weight"].T
    for i in range(2):
        up = hidden @ tensors[f"h.{i}.mlp.c_fc.weight"] + tensors[f"h.{i}.mlp.c_fc.bias"]
        hidden = hidden + np.maximum(up, 0) @ tensors[f"h.{i}.mlp.c_proj.weight"] + tensors[f"h.{i}.mlp.c_proj.bias"]
    expected = hidden @ tensors["score.weight"].T + tensors["score.bias"]
    np.testing.assert_allclose(pretrained.model(make_inputs())["logits"], expected, rtol=1e-4, atol=1e-4)
    save_pretrained(pretrained, tmp_path / "saved")
    written = load_file(tmp_path / "saved" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(written[key], tensor)


def test_its_table_says_the_rest(folder):
    pretrained = from_pretrained(folder)
    symmetry, inputs = symmetry_of_config(pretrained.config), make_inputs()
    moved = permute(symmetry, random_permutations(symmetry, pretrained.params, jax.random.key(0)), pretrained.params)
    assert np.any(moved["blocks"]["0"]["up"]["kernel"] != pretrained.params["blocks"]["0"]["up"]["kernel"])
    outputs = [pretrained.with_params(params).model(inputs)["logits"] for params in (pretrained.params, moved)]
    np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-4)
    assert pretrained.model.stages[-1].fixed == ("head/kernel", "head/bias")
    assert kernels_by_module(TABLE, tree.flatten(pretrained.params))["h.1.mlp.c_fc"] == "blocks/1/up/kernel"


def test_a_task_vector_is_extracted_and_moved_to_another_width_and_depth(folder, tmp_path, registered):
    pretrained = from_pretrained(folder)
    tuned = pretrained.with_params(jax.tree.map(lambda leaf: 1.5 * leaf, pretrained.params))
    save_pretrained(tuned, tmp_path / "tuned")
    assert extract(folder, tmp_path / "tuned", tmp_path / "tau.safetensors", subtree="").leaves == 11
    wide = Config(width=10, hidden=12, num_hidden_layers=3)
    target = build(wide, registered.init(wide, jax.random.key(0)))
    rebase = theseus()
    state = fit(rebase, pretrained.model, target, [(Batch(make_inputs(seed)),) * 2 for seed in range(2)])
    moved = rebase.apply(state, pretrained.params)
    assert jax.tree.map(jnp.shape, moved) == jax.tree.map(jnp.shape, target.params)
    assert all(np.any(leaf) for path, leaf in tree.flatten(moved).items() if path.endswith("kernel"))
