"""One battery for families: every transport moves a task vector of theirs, and is exact where theory says so."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax import Batch, bico, chain, fit, gradfix, leaf_report, orthogonal_shift, theseus, transfusion, tree
from tvjax.align.permutations import permute, random_permutations
from tvjax.capture import check_gradient_identity
from tvjax.models.dinov2 import Dinov2Config, Dinov2WithRegistersConfig
from tvjax.models.families import family_of_config
from tvjax.models.gpt2 import GPT2Config
from tvjax.models.siglip import SiglipConfig, SiglipVisionConfig
from tvjax.models.symmetry import symmetry_of_config
from tvjax.stages import run_stage
from tvjax.transport import make_transport

TOKENS, CLASSES = 20, 3
FAMILIES = {  # a model, and one of another width, depth and number of heads
    "dinov2": (
        Dinov2Config(12, 2, 2, 2, image_size=8, patch_size=4, num_labels=3),
        Dinov2WithRegistersConfig(18, 3, 3, 2, image_size=12, patch_size=4, num_register_tokens=2, num_labels=3),
    ),
    "gpt2": (
        GPT2Config(TOKENS, 12, 20, 2, 2, max_position_embeddings=8),
        GPT2Config(TOKENS, 18, 30, 3, 3, max_position_embeddings=9, tie_word_embeddings=False),
    ),
    "siglip": (
        SiglipConfig(SiglipVisionConfig(12, 20, 2, 2, image_size=8, patch_size=4), None),
        SiglipConfig(SiglipVisionConfig(18, 30, 3, 3, image_size=12, patch_size=4), None),
    ),
}


def image_loss(_, outputs, labels):
    """Cross-entropy of classes that are read off an embedding, or off logits."""
    scores = outputs.get("logits", outputs.get("image"))[:, :CLASSES]
    return -jnp.take_along_axis(jax.nn.log_softmax(scores), labels[:, None], 1)[:, 0]


def next_token_loss(_, outputs, labels):
    scores = jax.nn.log_softmax(outputs["logits"][:, :-1])
    losses = -jnp.take_along_axis(scores, labels["tokens"][:, 1:, None], -1)[..., 0]
    return jnp.sum(jnp.where(labels["mask"][:, 1:], losses, 0), 1)


def make_model(config, seed):
    """No bias is zero, and no scale one."""
    family, random = family_of_config(config), np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: family.init(config, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: jax.device_put(np.float32(0.3 * random.normal(size=leaf.shape))), shapes)
    params = tree.map_with_path(lambda path, leaf: 1 + leaf if path.endswith("scale") else leaf, params)
    return family.build(config, params).with_loss(next_token_loss if hasattr(config, "vocab_size") else image_loss)


def make_batches(config, seeds=(0, 1), size=12):
    return [make_batch(config, np.random.default_rng(seed), size) for seed in seeds]


def make_batch(config, random, size):
    if not hasattr(config, "vocab_size"):
        side = getattr(config, "vision", config).image_size
        colours = random.normal(size=(size, 4, 4, 3))  # the same images at each model's resolution
        pixels = jnp.asarray(np.kron(colours, np.ones((1, side // 4, side // 4, 1))), jnp.float32)
        return Batch({"pixels": pixels}, jnp.asarray(random.integers(0, CLASSES, size), jnp.int32))
    mask = np.arange(7) < random.integers(3, 8, (size, 1))
    inputs = {"tokens": jnp.asarray(random.integers(0, TOKENS, (size, 7)), jnp.int32), "mask": jnp.asarray(mask)}
    return Batch(inputs, inputs)


def noise(params, seed=7):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jax.device_put(np.float32(random.normal(size=leaf.shape))), params)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """A model, a permuted copy of it, one of another shape, and batches of what both see."""
    config, other = FAMILIES[request.param]
    model, symmetry = make_model(config, 0), symmetry_of_config(config)
    order = random_permutations(symmetry, model.params, jax.random.key(1))
    return SimpleNamespace(
        symmetry=symmetry,
        order=order,
        model=model,
        copy=model.replace(params=permute(symmetry, order, model.params)),
        other=make_model(other, 1),
        tau=noise(model.params),
        batches=[(one, two) for one, two in zip(make_batches(config), make_batches(other), strict=True)],
    )


def kernels(params):
    """Those of blocks, which every method rotates."""
    return {path for path in tree.flatten(params) if "blocks/" in path and path.endswith("/kernel")}


def test_gradient_identity(family):
    model, batch = family.model, family.batches[0][0]
    check_gradient_identity(
        lambda params, batch: model.loss(None, model.replace(params=params)(batch.inputs), batch.labels).sum(),
        model.params,
        batch,
    )


@pytest.mark.parametrize("method", ["theseus", "bico", "bico+gradfix"])
def test_a_task_vector_moves_to_another_width_depth_and_heads(family, method):
    moving = make_transport(method)
    state = fit(moving, family.model, family.other, family.batches)
    moved = moving.apply(state, family.tau)
    assert jax.tree.map(jnp.shape, moved) == jax.tree.map(jnp.shape, family.other.params)
    flat = tree.flatten(moved)
    assert all(np.isfinite(leaf).all() for leaf in flat.values())
    wanted = kernels(family.other.params)
    assert all(np.any(flat[path]) for path in wanted)
    first = {leaf.target: leaf.action for leaf in leaf_report(state) if leaf.link == method.split("+")[0]}
    assert {first[path] for path in wanted} == {"rotated"}


@pytest.mark.parametrize("method", [theseus, bico])
def test_what_the_data_determine_follows_a_permuted_copy(family, method):
    moving = method(rank_tolerance=1e-4)
    batches = [(one, one) for one, _ in family.batches]
    seen = moving.apply(fit(moving, family.model, family.model, batches), family.tau)
    moved = moving.apply(fit(moving, family.model, family.copy, batches), family.tau)
    expected = tree.flatten(permute(family.symmetry, family.order, seen))
    for path in kernels(family.model.params):
        scale = np.abs(tree.get(family.tau, path)).max()
        assert tree.cosine(tree.get(seen, path), tree.get(family.tau, path)) > 0.6, path  # on itself it is most of it
        np.testing.assert_allclose(tree.get(moved, path), expected[path], atol=5e-3 * scale, err_msg=path)


def test_the_weights_alone_find_a_permuted_copy(family):
    moving = transfusion(family.symmetry, key=jax.random.key(0))
    moved = tree.flatten(moving.apply(fit(moving, family.model, family.copy), family.tau))
    for path, leaf in tree.flatten(permute(family.symmetry, family.order, family.tau)).items():
        np.testing.assert_array_equal(moved[path], leaf, err_msg=path)


def test_a_mask_lies_on_the_target(family):
    batches = [(one, one) for one, _ in family.batches]
    moving = chain(orthogonal_shift(), gradfix())
    state = fit(moving, family.model, family.copy, batches)
    moved = tree.flatten(moving.apply(state, family.tau))
    kept = np.mean([np.mean(moved[path] != 0) for path in kernels(family.model.params)])
    assert 0.2 < kept < 0.8


def test_compilations_do_not_grow_with_depth(family):
    rebase, before = theseus(), run_stage._cache_size()
    fit(rebase, family.model, family.other, [(one, two) for one, two in family.batches[:1]])
    functions = {stage.function for model in (family.model, family.other) for stage in model.stages}
    assert run_stage._cache_size() - before <= len(functions)
    assert len(functions) < len(family.model.stages) + len(family.other.stages)
