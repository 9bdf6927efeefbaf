"""Shards are read from their places in a file and written to them: the same bytes as without shards."""

import os

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import tvjax as tv
from tvjax import sharding, tree
from tvjax.checkpoints import Pretrained, load_orbax, load_tree, save_orbax, save_tree, shards
from tvjax.checkpoints.reader import Tensors
from tvjax.models.clip.config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from tvjax.models.families import family_of_config, shapes_of
from tvjax.models.gpt2.config import GPT2Config
from tvjax.models.key_table import Source
from tvjax.models.layer_table import KINDS, Part
from tvjax.models.siglip.config import SiglipConfig, SiglipVisionConfig

CONFIGS = {
    "clip": CLIPConfig(
        CLIPVisionConfig(16, 32, 1, 2, image_size=8, patch_size=4, projection_dim=8),
        CLIPTextConfig(16, 8, 16, 1, 4, max_position_embeddings=6, projection_dim=8),
    ),
    "gpt2": GPT2Config(16, 16, 32, 1, 4, max_position_embeddings=6),  # queries, keys and values in one
    "siglip": SiglipConfig(SiglipVisionConfig(16, 32, 1, 2, image_size=8, patch_size=4), None),  # the same transposed
}
AXES = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}


def a_mesh(kind):
    return jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AXES[kind],) * 2)


def made(config):
    rng = np.random.default_rng(0)
    leaves = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes_of(config).items()}
    return Pretrained(family_of_config(config).build(config, tree.nest(leaves)), config)


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request, tmp_path_factory):
    where = tmp_path_factory.mktemp(request.param) / "model"
    tv.save(made(CONFIGS[request.param]), where)
    return where


@pytest.mark.parametrize("axes", AXES)
def test_a_model_is_read_and_written_in_shards(folder, tmp_path, axes, monkeypatch):
    mesh = a_mesh(axes)
    whole = tv.load(folder)
    taken, copied = [], shards._copied
    monkeypatch.setattr(shards, "_copied", lambda piece: taken.append(piece.nbytes) or copied(piece))
    monkeypatch.setattr(Tensors, "read_into", lambda *_: pytest.fail("a tensor is read whole"))
    loaded = tv.load(folder, sharding=sharding.fsdp(mesh, "tensor"))
    chex.assert_trees_all_equal(loaded.params, whole.params)
    leaves = jax.tree.leaves(loaded.params)
    assert sum(taken) == sum(leaf.nbytes for leaf in leaves)  # what two devices have is read once
    spread = [leaf for leaf in leaves if not leaf.is_fully_replicated]
    assert len(spread) > len(leaves) / 2
    assert all(4 * shard.data.size == leaf.size for leaf in spread for shard in leaf.addressable_shards)
    tv.save(loaded, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_shards_are_cast_one_by_one(folder, tmp_path):
    loaded = tv.load(folder, sharding=sharding.fsdp(a_mesh("automatic")), param_dtype=jnp.bfloat16)
    halves = tv.load(folder, param_dtype=jnp.bfloat16)
    chex.assert_trees_all_equal(loaded.params, halves.params)
    chex.assert_trees_all_equal_dtypes(loaded.params, halves.params)
    tv.save(tv.load(folder, sharding=sharding.fsdp(a_mesh("automatic"))), tmp_path / "cast", dtype=jnp.bfloat16)
    chex.assert_trees_all_equal(tv.load(tmp_path / "cast").params, halves.params)
    large = jax.tree.map(lambda leaf: 1e6 * leaf, tv.load(folder).params)
    tv.save(tv.load(folder).with_params(large), tmp_path / "large")
    for where in (None, sharding.fsdp(a_mesh("automatic"))):
        with pytest.raises(ValueError, match="values that are NaN or infinite"):
            tv.load(tmp_path / "large", sharding=where, param_dtype=jnp.float16)


def test_a_sharding_that_does_not_fit_is_refused_before_anything_is_read(folder, monkeypatch):
    for name in ("map", "read_into"):
        monkeypatch.setattr(Tensors, name, lambda *_: pytest.fail("a tensor is read"))
    with pytest.raises(ValueError, match="places no leaf"):
        tv.load(folder, sharding=sharding.rules(a_mesh("automatic"), [("nothing", PartitionSpec())]))


def test_orbax_and_files_of_leaves_take_the_same_rules(tmp_path):
    model = made(CONFIGS["gpt2"])
    where = sharding.tensor_parallel(a_mesh("automatic"), fsdp="fsdp")
    save_orbax(model, tmp_path / "orbax")
    loaded = load_orbax(tmp_path / "orbax", sharding=where, param_dtype=jnp.bfloat16)
    kernel = loaded.params["blocks"]["0"]["mlp"]["up"]["kernel"]
    assert tuple(kernel.sharding.spec) == ("fsdp", "tensor") and kernel.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="give it, or sharding"):
        load_orbax(tmp_path / "orbax", sharding=where, abstract=loaded.params)
    save_tree(tmp_path / "tau.safetensors", loaded.params)
    placed, _ = load_tree(
        tmp_path / "tau.safetensors", sharding=lambda path, leaf: tree.get(loaded.params, path).sharding
    )
    chex.assert_trees_all_equal(placed, loaded.params)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a.sharding == b.sharding, placed, loaded.params)))
    with pytest.raises(ValueError, match="cannot lie so"):
        load_tree(tmp_path / "tau.safetensors", sharding=kernel.sharding)


LAYOUTS = [(leaf, kind) for kind, row in KINDS.items() for leaf in row]


@pytest.mark.parametrize(("leaf", "kind"), LAYOUTS, ids=[f"{kind}{leaf.ours}" for leaf, kind in LAYOUTS])
@pytest.mark.parametrize("part", [None, Part(1, 2), Part(2, 3, 0)])
def test_every_layout_of_the_tables_is_a_view(leaf, kind, part, tmp_path):
    """Pieces of a parameter, written to the places that `runs_of` gives, make the tensor."""
    rank = {"scalar": 0, "conv kernel": 4, "conv": 4, "batched token": 1}.get(kind, 2)
    rank = 1 if leaf.ours in ("/bias", "/scale") else rank
    if part is not None and not rank:
        return
    shape = (2, 4, 6, 8)[:rank]
    whole = list(shape)
    if part is not None:
        whole[part.axis] *= part.of
    source = Source("key", leaf, part)
    everything = np.arange(np.prod(whole, dtype=int), dtype=np.float32).reshape(whole) + 1
    theirs = np.ascontiguousarray(leaf.to_theirs(everything))
    ours = source.to_ours(theirs)
    assert ours.shape == shape == leaf.to_ours(leaf.to_theirs(ours)).shape
    file = os.open(tmp_path / "tensor", os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, 8 + theirs.nbytes)
    halves = [(slice(0, shape[0] // 2),), (slice(shape[0] // 2, None),)] if rank else [()]
    for half in halves:
        runs = shards.runs_of(source.to_ours, theirs.shape, half)
        shards.write_piece(file, 8, runs, ours[half])
    os.close(file)
    found = np.fromfile(tmp_path / "tensor", np.float32, offset=8).reshape(theirs.shape)
    mine = np.zeros_like(theirs)
    source.to_ours(mine)[...] = ours
    np.testing.assert_array_equal(found, mine)
    assert part is not None or np.array_equal(found, theirs)
