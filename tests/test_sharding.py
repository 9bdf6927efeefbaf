"""Rules say where leaves lie, for every family, or say why they cannot."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tvjax.models.bert.config import BertConfig
from tvjax.models.families import shapes_of
from tvjax.models.generic import GenericConfig
from tvjax.models.gpt2.config import GPT2Config
from tvjax.models.llama.config import LlamaConfig
from tvjax.models.t5.config import T5Config
from tvjax.models.vit.config import ViTConfig
from tvjax.sharding import fsdp, largest, leaf_shardings, rules, tensor_parallel


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("fsdp", "tensor"))


def kinds(shapes):
    return {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()}


LEAVES = kinds({"blocks/0/up/kernel": (8, 12), "blocks/0/up/bias": (12,), "head/kernel": (8, 3)})


def test_the_first_rule_that_matches_the_whole_path_counts(mesh):
    table = [("blocks/.*kernel", PartitionSpec(None, "tensor")), (".*kernel", largest("fsdp")), (".*", PartitionSpec())]
    found = leaf_shardings(rules(mesh, table), LEAVES)
    assert [tuple(sharding.spec) for sharding in found.values()] == [(None, "tensor"), (), ("fsdp", None)]
    assert all(sharding.mesh is mesh for sharding in found.values())


def test_one_sharding_for_all_and_a_function(mesh):
    replicated = NamedSharding(mesh, PartitionSpec())
    assert set(leaf_shardings(replicated, LEAVES).values()) == {replicated}
    by_size = leaf_shardings(lambda path, leaf: NamedSharding(mesh, PartitionSpec(*["fsdp"][: leaf.ndim - 1])), LEAVES)
    assert [tuple(sharding.spec) for sharding in by_size.values()] == [("fsdp",), (), ("fsdp",)]


def test_a_rule_that_does_not_fit_is_named_with_leaf_shape_and_axes(mesh):
    rest = (".*", PartitionSpec())
    for table, message in (
        ([(".*kernel", PartitionSpec(None, "tensor")), rest], r"'\.\*kernel' gives head/kernel of shape \[8, 3\] the "
         r"partition \(None, 'tensor'\) on \(fsdp=2, tensor=4\): 4 devices do not divide dimension 1 of 3"),
        ([(".*", PartitionSpec(("fsdp", "tensor"), None))], r"up/bias of shape \[12\].*more dimensions than the leaf"),
        ([("kernel", PartitionSpec()), rest], "(?s)'kernel' places no leaf: it matches none of.*head/kernel"),
        ([rest, ("head/.*", PartitionSpec())], "(?s)'head/.*' places no leaf: earlier rules place\n  head/kernel\n"),
        ([("head/.*", PartitionSpec())], r"(?s)no rule places these leaves.*up/kernel \[8, 12\].*end the rules with"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            leaf_shardings(rules(mesh, table), LEAVES)


def test_what_can_be_said_without_leaves_is_said_when_rules_are_made(mesh):
    with pytest.raises(ValueError, match=r"names the axis 'data', and the mesh has \(fsdp=2, tensor=4\)"):
        rules(mesh, [(".*", PartitionSpec("data"))])
    with pytest.raises(ValueError, match="is no regular expression"):
        rules(mesh, [("*", PartitionSpec())])
    for table in (lambda: fsdp(mesh, "data"), lambda: tensor_parallel(mesh, fsdp="data")):
        with pytest.raises(ValueError, match="names the axis 'data'"):
            table()


def test_functions_and_shardings_that_do_not_fit(mesh):
    with pytest.raises(ValueError, match="the sharding of blocks/0/up/kernel is None"):
        leaf_shardings(lambda path, leaf: None, LEAVES)
    columns = NamedSharding(mesh, PartitionSpec(None, "tensor"))
    with pytest.raises(ValueError, match=r"head/kernel of shape \[8, 3\] cannot lie so"):
        leaf_shardings(columns, {"head/kernel": LEAVES["head/kernel"]})


def specs(placed, config):
    return {path: tuple(found.spec) for path, found in leaf_shardings(placed, kinds(shapes_of(config)), config).items()}


def test_fsdp_spreads_all_that_it_divides():
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    config = ViTConfig(24, 48, 2, 2, image_size=8, patch_size=4, num_labels=3)
    shapes = shapes_of(config)
    for path, spec in specs(fsdp(mesh), config).items():
        assert ("fsdp" in spec) == any(size % 8 == 0 for size in shapes[path]), path
    assert specs(fsdp(mesh), config)["vision/blocks/0/mlp/up/kernel"] == (None, "fsdp")


# Of each family: a block, its layers into and out of hidden units and heads.
FAMILIES = {
    "vit": (ViTConfig(16, 32, 1, 4, image_size=8, patch_size=4), "vision/blocks/0"),
    "bert": (BertConfig(16, 16, 32, 1, 4, max_position_embeddings=6), "blocks/0"),
    "gpt2": (GPT2Config(16, 16, 32, 1, 4, max_position_embeddings=6), "blocks/0"),
    "llama": (LlamaConfig(16, 16, 32, 1, 4, 4, attention_bias=True), "blocks/0"),
    "t5": (T5Config(16, 16, 4, 32, 1, 1, 4), "decoder/blocks/0"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_tensor_parallel_cuts_heads_and_hidden_units(mesh, name):
    config, block = FAMILIES[name]
    found = specs(tensor_parallel(mesh), config)
    for layer in ("attention/query", "attention/key", "attention/value", "mlp/up"):
        assert found[f"{block}/{layer}/kernel"] == (None, "tensor"), layer
        assert found.get(f"{block}/{layer}/bias", ("tensor",)) == ("tensor",), layer
    for layer in ("attention/out", "mlp/down"):
        assert found[f"{block}/{layer}/kernel"] == ("tensor", None), layer
        assert found.get(f"{block}/{layer}/bias", (None,)) == (None,), layer
    assert not any("tensor" in spec for path, spec in found.items() if "norm" in path or "embeddings" in path)
    both = specs(tensor_parallel(mesh, fsdp="fsdp"), config)
    assert both[f"{block}/mlp/up/kernel"] == ("fsdp", "tensor") and both[f"{block}/mlp/down/kernel"] == (
        "tensor",
        "fsdp",
    )


def test_heads_fewer_than_devices_stay_whole_and_others_must_divide(mesh):
    found = specs(tensor_parallel(mesh), LlamaConfig(16, 16, 32, 1, 4, 2))
    assert found["blocks/0/attention/query/kernel"] == (None, "tensor")
    assert found["blocks/0/attention/key/kernel"] == found["blocks/0/attention/value/kernel"] == (None, None)
    with pytest.raises(ValueError, match=r"kernel of shape .* its 6 heads do not divide over tensor=4"):
        specs(tensor_parallel(mesh), LlamaConfig(16, 24, 32, 1, 6, 2, head_dim=4))
    with pytest.raises(ValueError, match="its 30 units do not divide over tensor=4"):
        specs(tensor_parallel(mesh), LlamaConfig(16, 16, 30, 1, 4, 4))
    with pytest.raises(ValueError, match="this model has none: give rules, or fsdp"):
        specs(tensor_parallel(mesh), GenericConfig({}, {"wte/weight": (4, 4)}))


def test_what_is_no_placement_is_named():
    mesh = jax.make_mesh((8,), ("x",))
    leaves = {"kernel": jax.ShapeDtypeStruct((8, 8), "float32")}
    for placement, said in (
        (mesh, "found a Mesh"),
        (PartitionSpec("x"), "as the sharding, expected rules"),
        ([], "found a list"),
    ):
        with pytest.raises(ValueError, match=said):
            leaf_shardings(placement, leaves)
    for table, said in (
        ([".*"], "expected a pair"),
        ([(3, PartitionSpec())], "expected a pair"),
        ([(".*", "x")], "expected a PartitionSpec"),
    ):
        with pytest.raises(ValueError, match=said):
            rules(mesh, table)
    with pytest.raises(ValueError, match="found None for the mesh"):
        fsdp(None)
    with pytest.raises(ValueError, match="largest names the axis 'fsdp'"):
        leaf_shardings(rules(mesh, [(".*", largest("fsdp"))]), leaves)
    with pytest.raises(ValueError, match="an axis cuts one dimension only"):
        leaf_shardings(rules(mesh, [(".*", lambda leaf: PartitionSpec("x", "x"))]), leaves)
