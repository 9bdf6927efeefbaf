"""Task vectors that are extracted and applied tensor by tensor are those of the whole trees."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from tvjax import arithmetic, tree
from tvjax.checkpoints import Pretrained, fingerprint, from_pretrained, load_tree, save_pretrained, save_tree, streaming
from tvjax.models.clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, clip, init

CONFIG = CLIPConfig(
    CLIPVisionConfig(8, 16, 2, 2, image_size=8, patch_size=4, projection_dim=4),
    CLIPTextConfig(16, 8, 16, 1, 2, max_position_embeddings=6, eos_token_id=15, projection_dim=4),
)
TOWER = CLIPConfig(CONFIG.vision, None)


def random_params(config, seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    return jax.tree.map(lambda leaf: jax.device_put(np.float32(rng.normal(size=leaf.shape))).astype(dtype), shapes)


def write(folder, config, params, **options):
    save_pretrained(Pretrained(clip(config, params), config), folder, **options)
    return folder


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def folders(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    base = write(folder / "base", CONFIG, random_params(CONFIG, 0, request.param))
    tuned = write(folder / "tuned", TOWER, random_params(TOWER, 1, request.param))
    streaming.extract(base, tuned, folder / "tau.safetensors", subtree="vision")
    return folder


def test_extract_is_the_difference_of_the_trees(folders):
    base, tuned = from_pretrained(folders / "base"), from_pretrained(folders / "tuned")
    tau, metadata = load_tree(folders / "tau.safetensors")
    expected = arithmetic.task_vector({"vision": base.params["vision"]}, tuned.params)
    chex.assert_trees_all_equal(tau, expected)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(tau)} == {"float32"}
    assert metadata.items() >= base.identity().items()
    assert metadata["finetuned_model"] == str(folders / "tuned")
    assert metadata["finetuned_fingerprint"] == fingerprint(tuned.params)


def test_extract_says_what_it_wrote(folders, tmp_path):
    done = []
    found = streaming.extract(
        folders / "base",
        folders / "base",
        tmp_path / "none.safetensors",
        dtype=jnp.float16,
        progress=lambda *step: done.append(step),
    )
    leaves = tree.flatten(from_pretrained(folders / "base").params)
    assert (found.leaves, found.norm, found.changed_outside) == (len(leaves), 0, ())
    assert found.parameters == sum(leaf.size for leaf in leaves.values())
    assert done == [(i + 1, len(leaves), path) for i, path in enumerate(sorted(leaves))]
    tau, metadata = load_tree(tmp_path / "none.safetensors")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(tau)} == {"float16"} and metadata == found.metadata


def test_changes_outside_the_subtree_are_named(folders, tmp_path):
    base = from_pretrained(folders / "base")
    moved = tree.replace(base.params, {"logit_scale": base.params["logit_scale"] + 1})
    save_pretrained(base.with_params(moved), tmp_path / "tuned")
    found = streaming.extract(folders / "base", tmp_path / "tuned", tmp_path / "tau.safetensors", subtree="vision")
    assert found.changed_outside == ("logit_scale",) and found.norm == 0


@pytest.mark.parametrize("scale", [1.0, -0.3])
def test_apply_is_the_sum_of_the_trees(folders, tmp_path, scale):
    base, (tau, _) = from_pretrained(folders / "base"), load_tree(folders / "tau.safetensors")
    save_tree(tmp_path / "head.safetensors", {"logit_scale": jnp.float32(0.25), "vision": tau["vision"]})
    files = [folders / "tau.safetensors", tmp_path / "head.safetensors"]
    found = streaming.apply(folders / "base", files, tmp_path / "edited", scale=scale)
    edited = from_pretrained(tmp_path / "edited").params
    sums = {"vision": jax.tree.map(jnp.add, tau["vision"], tau["vision"]), "logit_scale": jnp.float32(0.25)}
    expected = arithmetic.apply(base.params, sums, scale)
    chex.assert_trees_all_equal_dtypes(edited, base.params)
    chex.assert_trees_all_equal(edited, expected)
    assert found.fingerprint == fingerprint(edited)
    assert set(found.changed) == set(tree.flatten(sums))
    assert set(found.changed) | set(found.copied) == set(tree.flatten(base.params))
    assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(base.params))


def test_the_card_says_what_was_done(folders, tmp_path):
    found = streaming.apply(folders / "base", [folders / "tau.safetensors"], tmp_path / "edited", scale=0.5)
    card = (tmp_path / "edited" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and str(tmp_path) not in card
    base, tuned = (from_pretrained(folders / name) for name in ("base", "tuned"))
    for text in (found.fingerprint, fingerprint(base.params), fingerprint(tuned.params), "| scale | `0.5` |"):
        assert text in card


def test_dtype_and_shards_are_chosen(folders, tmp_path):
    streaming.apply(
        folders / "base",
        [folders / "tau.safetensors"],
        tmp_path / "edited",
        dtype=jnp.float16,
        max_shard_size=2000,
    )
    index = json.loads((tmp_path / "edited" / "model.safetensors.index.json").read_text())
    files = {path.name for path in (tmp_path / "edited").glob("*.safetensors")}
    assert len(files) > 2 and set(index["weight_map"].values()) == files
    edited = from_pretrained(tmp_path / "edited")
    sizes = [leaf.size for leaf in jax.tree.leaves(edited.params)]
    assert index["metadata"] == {"total_size": 2 * sum(sizes), "total_parameters": sum(sizes)}
    assert edited.settings["dtype"] == "float16"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(edited.params)} == {"float16"}

    again = streaming.apply(tmp_path / "edited", [folders / "tau.safetensors"], tmp_path / "kept", any_base=True)
    kept = json.loads((tmp_path / "kept" / "model.safetensors.index.json").read_text())
    assert kept == index and again.parameters == sum(sizes)


def test_a_wider_dtype_is_rounded_once(folders, tmp_path):
    base, (tau, _) = from_pretrained(folders / "base"), load_tree(folders / "tau.safetensors")
    streaming.apply(folders / "base", [folders / "tau.safetensors"], tmp_path / "edited", scale=0.3, dtype=jnp.float32)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), base.params)
    chex.assert_trees_all_equal(from_pretrained(tmp_path / "edited").params, arithmetic.apply(wide, tau, 0.3))


def test_tensors_that_are_no_parameters_are_kept(folders, tmp_path):
    tensors = safetensors.numpy.load_file(folders / "base" / "model.safetensors")
    ids = {"vision_model.embeddings.position_ids": np.arange(5)[None]}
    for file in (folders / "base").iterdir():
        (tmp_path / "base").mkdir(exist_ok=True)
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    safetensors.numpy.save_file(tensors | ids, tmp_path / "base" / "model.safetensors")
    streaming.apply(tmp_path / "base", [folders / "tau.safetensors"], tmp_path / "edited", scale=0)
    kept = safetensors.numpy.load_file(tmp_path / "edited" / "model.safetensors")
    for key, tensor in (tensors | ids).items():
        np.testing.assert_array_equal(kept[key], tensor)
    assert kept.keys() == (tensors | ids).keys()


def test_what_was_made_for_other_weights_becomes_no_model(folders, tmp_path):
    other = write(tmp_path / "other", CONFIG, random_params(CONFIG, 5))
    with pytest.raises(ValueError, match="weights are not those of .*: move there first .* --any-base"):
        streaming.apply(other, [folders / "tau.safetensors"], tmp_path / "edited")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]
    streaming.apply(other, [folders / "tau.safetensors"], tmp_path / "edited", any_base=True)
    streaming.extract(other, folders / "tuned", tmp_path / "second.safetensors", subtree="vision")
    with pytest.raises(ValueError, match="whose weights differ"):
        streaming.apply(other, [folders / "tau.safetensors", tmp_path / "second.safetensors"], tmp_path / "both")


def test_what_does_not_fit_is_named_before_anything_is_read(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("tvjax.checkpoints.reader.Tensors.read_into", lambda *_: pytest.fail("weights were read"))
    config = CLIPConfig(CLIPVisionConfig(8, 16, 1, 2, image_size=8, patch_size=4, projection_dim=5), None)
    wrong = write(tmp_path / "wrong", config, random_params(config, 0))
    with pytest.raises(ValueError, match=r"17 leaves differ:\n.*vision/blocks/1/.*: only in the pre-trained model"):
        streaming.extract(folders / "base", wrong, tmp_path / "tau.safetensors", subtree="vision")
    with pytest.raises(ValueError, match="has no part 'vison', only logit_scale, text, vision"):
        streaming.extract(folders / "base", wrong, tmp_path / "tau.safetensors", subtree="vison")
    save_tree(tmp_path / "bad.safetensors", {"vision": {"x": np.ones(1, np.float32)}, "logit_scale": np.int32(1)})
    with pytest.raises(ValueError, match=r"(?s)at 2 leaves:.*logit_scale .* is I32.*vision/x .* not in the model"):
        streaming.apply(folders / "base", [tmp_path / "bad.safetensors"], tmp_path / "edited")
    with pytest.raises(ValueError, match="at least one task vector"):
        streaming.apply(folders / "base", [], tmp_path / "edited")
    assert not (tmp_path / "tau.safetensors").exists() and not (tmp_path / "edited").exists()


def test_values_beyond_the_dtype_leave_nothing(folders, tmp_path):
    with pytest.raises(ValueError, match="values that are NaN or infinite"):
        streaming.apply(folders / "base", [folders / "tau.safetensors"], tmp_path / "edited", scale=1e38)
    with pytest.raises(ValueError, match=r"\(float16\) .* values that are NaN or infinite"):
        streaming.apply(
            folders / "base", [folders / "tau.safetensors"], tmp_path / "edited", scale=1e6, dtype=jnp.float16
        )
    assert list(tmp_path.iterdir()) == []
