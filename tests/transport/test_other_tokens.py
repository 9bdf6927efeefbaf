"""Transport between models whose tokenizers cut a text differently."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax import Batch, Stream, bico, fit, single_stage, theseus, tree
from tvjax.align.permutations import permute, random_permutations
from tvjax.align.procrustes import matrix
from tvjax.align.rows import on_tokens
from tvjax.data import Spans, token_overlap
from tvjax.models.llama import LlamaConfig, init, llama
from tvjax.models.symmetry import symmetry_of_config
from tvjax.tasks.language import NEXT_TOKEN
from tvjax.transport import likeness
from tvjax.transport.plan import plan

WORDS = 20


def texts(seed, size=8, longest=7, width=9):
    """Random words of each text for one tokenizer, the halves of each for another; and the overlap of the tokens."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, WORDS, (size, width))
    mask = np.arange(width) < rng.integers(2, longest + 1, size)[:, None]
    halves = np.stack([2 * ids, 2 * ids + 1], -1).reshape(size, -1)
    start = np.broadcast_to(5 * np.arange(width), ids.shape)
    middle, end = start + 3, start + 5
    both = (np.stack(x, -1).reshape(size, -1) for x in ((start, middle), (middle, end)))
    spans = Spans(start, end, mask), Spans(*both, np.repeat(mask, 2, 1))
    views = [Batch(*_language(x, s.mask)) for x, s in zip((ids, halves), spans, strict=True)]
    return (*views, {"mask": token_overlap(*spans)})


def _language(ids, mask):
    following, place = np.roll(ids, -1, 1), np.arange(ids.shape[1])
    scored = np.roll(mask, -1, 1) & (place < place[-1])
    return {"tokens": ids, "mask": mask, "wanted": following}, {"tokens": following, "mask": scored}


def by_token(params, inputs):
    hidden = jnp.tanh(params["table"][inputs["tokens"]] @ params["inner"])
    return {"out": hidden @ params["outer"], "mask": inputs["mask"]}


def of_each_token(loss_params, outputs, labels):
    return jnp.where(outputs["mask"][..., None], jnp.sin(2 * outputs["out"]), 0).sum((1, 2))


def token_models():
    """A model that sees one token at a time; its copy has both halves of a word in the word's place."""
    rng = np.random.default_rng(0)
    shapes = {"table": (WORDS, 6), "inner": (6, 5), "outer": (5, 4)}
    params = {name: jax.device_put(np.float32(rng.normal(size=shape))) for name, shape in shapes.items()}
    halved = {**params, "table": jnp.repeat(params["table"], 2, axis=0)}
    return [single_stage(by_token, p, streams=Stream(mask="mask")).with_loss(of_each_token) for p in (params, halved)]


@pytest.mark.parametrize("transport", [theseus(), bico()], ids=lambda t: t.name)
def test_halves_of_words_see_what_the_words_see(transport):
    source, target = token_models()
    batches = [texts(seed) for seed in range(3)]
    tau = jax.tree.map(lambda x: x[::-1] + 1, source.params)
    moved = transport.apply(fit(transport, source, target, batches), tau)
    for name in ("inner", "outer"):
        np.testing.assert_allclose(moved[name], tau[name], atol=1e-4)
    shuffled = [(a, b, {"mask": x["mask"][:, :, ::-1]}) for a, b, x in batches]
    wrong = transport.apply(fit(transport, source, target, shuffled), tau)
    assert np.abs(wrong["inner"] - tau["inner"]).max() > 0.1


def llamas():
    """A model, and a permuted copy that reads the halves of words."""
    config = LlamaConfig(WORDS, 16, 24, 2, 2, 1, head_dim=8)
    params = init(config, jax.random.key(0))
    symmetry = symmetry_of_config(config)
    copy = permute(symmetry, random_permutations(symmetry, params, jax.random.key(1)), params)
    copy["embeddings"]["tokens"] = jnp.repeat(copy["embeddings"]["tokens"], 2, 0)
    copy["head"]["kernel"] = jnp.repeat(copy["head"]["kernel"], 2, 1)
    other = LlamaConfig(2 * WORDS, 16, 24, 2, 2, 1, head_dim=8)
    return llama(config, params).with_loss(NEXT_TOKEN), llama(other, copy).with_loss(NEXT_TOKEN)


@pytest.mark.parametrize("transport", [theseus(), bico()], ids=lambda t: t.name)
def test_a_copy_with_another_tokenizer(transport):
    source, target = llamas()
    batches = [texts(seed) for seed in range(3)]
    turned = [(jax.tree.map(lambda x: x[::-1], a), b, overlaps) for a, b, overlaps in batches]  # of other texts
    residuals = []
    for given in (batches, turned):
        state = fit(transport, source, target, given)
        measures = state.parts[0].measures
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
        residuals.append(np.mean([float(jnp.mean(own["residual"])) for own in measures.values()]))
    assert residuals[0] < 0.95 * residuals[1]
    alike = [np.mean([one.cka for one in likeness(source, target, given)]) for given in (batches, turned)]
    assert alike[0] > alike[1]


def maps_of(state):
    return {name: np.asarray(matrix(own)) for name, own in state.parts[0].arrays.items()}


@pytest.mark.parametrize("transport", [theseus(), bico()], ids=lambda t: t.name)
def test_equal_tokens_give_the_same_bits(transport):
    source, _ = llamas()
    _, other = llamas()
    other = other.replace(params=jax.tree.map(lambda x: x, source.params))
    plain = [texts(seed)[:1] * 2 for seed in range(2)]
    identity = [(a, b, {"mask": np.eye(9, dtype=np.float32)[None] * a.inputs["mask"][..., None]}) for a, b in plain]
    one, same = (maps_of(fit(transport, source, other, batches)) for batches in (plain, identity))
    assert set(same) <= set(one) and len(same) > 10
    for name, own in same.items():
        np.testing.assert_array_equal(own, one[name])


def padded(batch, more):
    """The same texts with more padding on both sides, of other ids."""
    a, b, overlaps = batch

    def wider(x, places):
        filled = np.zeros_like(x, shape=(len(x), places))
        return np.concatenate([x, filled if x.dtype == bool else filled + 3], 1)

    views = [jax.tree.map(lambda x, n=n: wider(x, n), view) for view, n in ((a, more), (b, 2 * more))]
    return (*views, {"mask": np.pad(overlaps["mask"], ((0, 0), (0, 2 * more), (0, more)))})


def test_neither_padding_nor_order_matters():
    batches = [texts(seed) for seed in range(2)]
    turned = [jax.tree.map(lambda x: x[::-1], batch) for batch in reversed(batches)]
    wide = [padded(batch, 4) for batch in batches]
    for transport in (theseus(), bico()):
        found = [maps_of(fit(transport, *token_models(), given)) for given in (batches, turned, wide)]
        for name, own in found[0].items():
            for other in found[1:]:
                np.testing.assert_allclose(other[name], own, atol=1e-4, err_msg=name)
    one, *others = ([pair.cka for pair in likeness(*llamas(), given)] for given in (batches, turned, wide))
    for other in others:
        np.testing.assert_allclose(other, one, atol=1e-4)


def test_nothing_is_compiled_for_more_batches():
    source, target = llamas()
    fit(theseus(), source, target, [texts(0)])
    before = on_tokens._cache_size()
    fit(theseus(), source, target, [texts(seed) for seed in range(4)])
    assert on_tokens._cache_size() == before


def test_tokens_without_a_partner_take_no_part():
    source, target = token_models()
    a, b, overlaps = texts(0)
    none = overlaps["mask"].copy()
    none[:, 4:] = 0
    alone = b._replace(inputs={**b.inputs, "mask": b.inputs["mask"] & (np.arange(18) < 4)})
    one, other = (maps_of(fit(theseus(), source, target, [(a, x, {"mask": none})])) for x in (b, alone))
    for name, own in one.items():
        np.testing.assert_allclose(other[name], own, atol=1e-6)


def test_words_of_other_vocabularies_stay():
    source, target = llamas()
    transport = theseus(transport_embeddings=True)
    tau = jax.tree.map(jnp.ones_like, source.params)
    moved = tree.flatten(transport.apply(fit(transport, source, target, [texts(0)]), tau))
    assert not moved["head/kernel"].any() and not moved["embeddings/tokens"].any()
    shapes = jax.tree.map(tree.leaf_type, texts(0))
    planned = plan(transport, source, target, [shapes])
    why = {leaf.target: leaf.why for leaf in planned.leaves}
    assert why["head/kernel"] == "its outputs are words of other vocabularies"
    assert why["embeddings/tokens"] == "its rows are of the tokens of other tokenizers"
    assert {stage.tokens for stage in planned.stages if stage.tokens} == {(9, 18, 18)}


def test_the_layers_are_paired_on_the_overlap():
    source, target = llamas()
    state = fit(theseus(), source, target, [texts(0)], depth="cka")
    pairs = {rule.target: rule.source for rule in state.parts[0].rules if rule.target.startswith("blocks")}
    assert all(path == partner for path, partner in pairs.items())


def test_bad_overlaps_are_named():
    source, target = llamas()
    a, b, overlaps = texts(0)
    for given, message in (
        ({"other": overlaps["mask"]}, r"under the mask 'other'; the target's stages declare \['mask'\]"),
        ({"mask": overlaps["mask"][:, :3]}, r"shape \(8, 3, 9\), expected .* = \[8, 18, 9\]"),
        ({"mask": overlaps["mask"] * np.nan}, "calibration batch 0 has values that are NaN"),
        (overlaps["mask"], "a mapping of masks to overlaps"),
    ):
        for function in (likeness, lambda *x: fit(theseus(), *x)):
            with pytest.raises(ValueError, match=message):
                function(source, target, [(a, b, given)])
    with pytest.raises(ValueError, match="some calibration batches have overlaps of tokens, and others do not"):
        fit(theseus(), source, target, [(a, b, overlaps), (a, b)])
