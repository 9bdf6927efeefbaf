"""Models whose weights stay on disk: the same numbers, a stage at a time, from files that must not change."""

import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvjax as tv
from tvjax import tree, walk
from tvjax.checkpoints import Pretrained, save_pretrained
from tvjax.models.gpt2 import GPT2Config, gpt2
from tvjax.models.gpt2 import init as init_gpt2
from tvjax.models.llama import LlamaConfig, init, llama
from tvjax.on_disk import DiskArray, is_on_disk
from tvjax.transport import leaf_report


def config(depth=3, width=8, tied=False):
    return LlamaConfig(16, width, 12, depth, 2, 1, head_dim=4, tie_word_embeddings=tied)


def random_params(shapes, seed, dtype=jnp.bfloat16):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), dtype), shapes)


def write(folder, config, seed, **options):
    params = random_params(jax.eval_shape(lambda: init(config, jax.random.key(0))), seed)
    save_pretrained(Pretrained(llama(config, params), config), folder, **options)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write(folder / "source", config(), 0, max_shard_size=500)
    write(folder / "tuned", config(), 1)
    write(folder / "target", config(4, width=16), 2)
    write(folder / "tied", config(tied=True), 3)
    return folder


def batches(count=2):
    tokens = jax.random.randint(jax.random.key(1), (count, 3, 5), 0, 16)
    return [tv.Batch({"tokens": one}) for one in tokens]


def twice(leaf):
    return DiskArray(leaf.shape, leaf.dtype, lambda: 2 * np.asarray(leaf))


def test_leaves_are_those_of_memory(folders):
    for name in ("source", "tied"):
        here, there = tv.load(folders / name), tv.load(folders / name, on_disk=True)
        assert all(map(is_on_disk, jax.tree.leaves(there.params)))
        chex.assert_trees_all_equal(jax.tree.map(np.asarray, there.params), jax.tree.map(np.asarray, here.params))
        chex.assert_trees_all_equal(jax.tree.map(jnp.asarray, there.params), here.params)
        assert there.identity() == here.identity() and tree.nbytes(there.params) == tree.nbytes(here.params)
        inputs = batches()[0].inputs
        chex.assert_trees_all_equal(there.model(inputs), here.model(inputs))


def test_parts_of_one_tensor(tmp_path):
    shape = GPT2Config(16, 8, 6, 2, 2)
    params = random_params(jax.eval_shape(lambda: init_gpt2(shape, jax.random.key(0))), 0)
    save_pretrained(Pretrained(gpt2(shape, params), shape), tmp_path / "gpt2")
    chex.assert_trees_all_equal(jax.tree.map(jnp.asarray, tv.load(tmp_path / "gpt2", on_disk=True).params), params)


def test_a_program_says_that_it_needs_the_values(folders):
    leaf = tv.load(folders / "source", on_disk=True).params["final_norm"]["scale"]
    with pytest.raises((TypeError, ValueError), match="__jax_array__|DiskArray"):
        jax.jit(lambda x: x + 1)(leaf)
    with pytest.raises(ValueError, match="makes a copy"):
        np.asarray(leaf, copy=False)


def test_a_task_vector_stays_on_disk_and_is_that_of_memory(folders):
    both = [[tv.load(folders / name, on_disk=where).params for name in ("source", "tuned")] for where in (True, False)]
    there, here = (tv.task_vector(*sides) for sides in both)
    assert all(map(is_on_disk, jax.tree.leaves(there)))
    chex.assert_trees_all_equal(jax.tree.map(jnp.asarray, there), here)


def test_a_fit_from_disk_writes_what_one_in_memory_returns(folders, monkeypatch):
    source, tuned, target = (tv.load(folders / name) for name in ("source", "tuned", "target"))
    tau = tv.task_vector(source.params, tuned.params)
    expected = tv.fit(tv.theseus(), source.model, target.model, batches())
    moved = [tv.theseus().apply(expected, one) for one in (tau, {"blocks": tv.scale(tau, 2.0)["blocks"]})]

    source, tuned, target = (tv.load(folders / name, on_disk=True) for name in ("source", "tuned", "target"))
    tau = tv.task_vector(source.params, tuned.params)
    taus = [tau, {"blocks": jax.tree.map(twice, tau["blocks"])}]
    written, read = [{}, {}], []
    monkeypatch.setattr(walk, "read", lambda params, original=walk.read: read.append(params) or original(params))
    state = tv.fit(
        tv.theseus(),
        source.model,
        target.model,
        batches(),
        stream=taus,
        write=lambda number, path, leaf: written[number].update({path: leaf}),
    )
    for flat, whole in zip(written, moved, strict=True):
        chex.assert_trees_all_close(flat, tree.flatten(whole), rtol=1e-5, atol=1e-6)
        assert {leaf.dtype.name for leaf in flat.values()} == {"float32"}
    without = [[leaf._replace(measures={}) for leaf in leaf_report(one)] for one in (state, expected)]
    assert without[0] == without[1] and not any(part.arrays for part in state.parts)
    assert len(read) == 2 * 6  # of either model the stages once, for all batches
    with pytest.raises(ValueError, match="were applied to its stream and dropped"):
        tv.theseus().apply(state, tau)


@pytest.mark.parametrize("link", [tv.gradfix(), tv.chain(tv.bico(), tv.gradfix())], ids=lambda link: link.name)
def test_gradients_and_tied_leaves_from_disk(folders, link):
    tokens = [batch.inputs["tokens"] for batch in batches()]
    labelled = [tv.Batch({"tokens": x}, x[:, 0]) for x in tokens]

    def loss(params, outputs, labels):
        return -jnp.take_along_axis(jax.nn.log_softmax(outputs["logits"][:, -1]), labels[:, None], 1)[:, 0]

    found = []
    for on_disk in (False, True):
        model = tv.load(folders / "tied", on_disk=on_disk).model.with_loss(loss)
        model = model.replace(params=jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model.params))
        found.append(tv.fit(link, model, model, labelled, stream=[model.params])[0])
    chex.assert_trees_all_close(*found, rtol=1e-4, atol=1e-5)


def test_write_needs_a_stream(folders):
    model = tv.load(folders / "source", on_disk=True).model
    with pytest.raises(ValueError, match="give stream="):
        tv.fit(tv.theseus(), model, model, batches(), write=print)


@pytest.mark.parametrize("change", ["written to", "cut", "replaced", "removed"])
def test_files_must_stay_as_they_are(folders, tmp_path, change):
    shutil.copytree(folders / "tuned", tmp_path / "model")
    model, file = tv.load(tmp_path / "model", on_disk=True).model, tmp_path / "model" / "model.safetensors"
    content = file.read_bytes()
    if change == "written to":
        file.write_bytes(content[:-2] + b"\0\0")
    elif change == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif change == "replaced":
        (tmp_path / "other").write_bytes(content)
        (tmp_path / "other").replace(file)
    else:
        file.unlink()
    with pytest.raises(ValueError, match=r"model.safetensors' (has changed since it was opened|is gone).*begin again"):
        tv.fit(tv.theseus(), model, model, batches())


def test_values_that_are_not_finite_are_found_before_anything_is_fitted(folders):
    model = tv.load(folders / "tuned", on_disk=True).model
    bad = DiskArray((8, 16), np.float32, lambda: np.full((8, 16), np.nan, np.float32))
    wrong = model.replace(params=tree.put(model.params, "head/kernel", bad))
    with pytest.raises(ValueError, match=r"source model has values that are NaN or infinite:\n  head/kernel: 128 of"):
        tv.fit(tv.theseus(), wrong, model, batches())


def test_a_file_of_a_task_vector(tmp_path):
    tau = {"a": {"b": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3)}}
    tv.save_task_vector(tmp_path / "tau.safetensors", tau, {"base_model": "demo"})
    there, metadata = tv.load_task_vector(tmp_path / "tau.safetensors", on_disk=True)
    assert is_on_disk(there["a"]["b"]) and metadata == {"base_model": "demo"}
    chex.assert_trees_all_equal(jax.tree.map(jnp.asarray, there), tau)
