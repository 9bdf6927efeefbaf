"""What is T5's own: configs of its relatives, two streams, position biases, tied heads, and transport between two."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tvjax import Batch, bico, chain, fit, gradfix, orthogonal_shift, scale_by, theseus, transfusion, tree
from tvjax.align.permutations import groups, permute, random_permutations
from tvjax.align.weight_matching import match_weights
from tvjax.capture import check_gradient_identity
from tvjax.checkpoints import from_pretrained, load_orbax, save_orbax, save_pretrained, streaming
from tvjax.models.families import family_of_config
from tvjax.models.symmetry import symmetry_of_config
from tvjax.models.t5 import T5Config, UMT5Config, init, t5
from tvjax.stages import run_stage
from tvjax.tasks import token_losses
from tvjax.tasks.language import SEQUENCE_TO_SEQUENCE
from tvjax.transport.leaf_report import leaf_report
from tvjax.transport.pairing import pair_stages
from tvjax.walk import Walk

GOLDENS = Path(__file__).parent / "goldens"
CASES = ("t5", "t5_v1_1", "mt5", "umt5")
CONFIG = T5Config(20, 12, 5, 16, 2, 2, 2, 8, 12)
GATED = T5Config(20, 12, 5, 16, 1, 2, 2, 8, 12, "gelu_new", True, 1e-3, False, False)
LARGER = T5Config(20, 18, 4, 30, 3, 1, 3, 8, 12)  # wider; deeper in the encoder, not in the decoder; of more heads
UNTIED = dataclasses.replace(LARGER, tie_word_embeddings=False, scale_decoder_outputs=False)
UMT5 = UMT5Config(20, 12, 5, 16, 2, 1, 2, 8, 12, "silu", True)


def make_model(config, seed=0):
    """No scale is one; the queries are smaller, for the scores are not scaled."""
    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: jax.device_put(np.float32(0.3 * random.normal(size=leaf.shape))), shapes)
    params = tree.map_with_path(lambda path, leaf: 1 + leaf if path.endswith("scale") else leaf, params)
    return t5(config, params).with_loss(SEQUENCE_TO_SEQUENCE)


def make_batch(seed=0, texts=12, length=7, answer=5):
    random = np.random.default_rng(seed)
    tokens, wanted = (random.integers(0, 20, (texts, n)).astype(np.int32) for n in (length, answer))
    masks = [np.arange(n) < random.integers(2, n + 1, (texts, 1)) for n in (length, answer)]
    before = np.concatenate([np.zeros((texts, 1), np.int32), wanted[:, :-1]], 1)
    inputs = {"tokens": tokens, "mask": masks[0], "decoder_tokens": before, "decoder_mask": masks[1], "wanted": wanted}
    return jax.tree.map(jnp.asarray, Batch(inputs, {"tokens": wanted, "mask": masks[1]}))


def with_other_padding(batch):
    """The same texts and answers; other tokens where there are none."""
    inputs = dict(batch.inputs)
    for name in ("tokens", "decoder_tokens", "wanted"):
        mask = inputs["mask" if name == "tokens" else "decoder_mask"]
        inputs[name] = jnp.where(mask, inputs[name], (inputs[name] + 7) % 20)
    return Batch(inputs, batch.labels | {"tokens": inputs["wanted"]})


def noise_like(params, seed=5):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jax.device_put(np.float32(0.1 * random.normal(size=leaf.shape))), params)


BATCHES = [make_batch(), make_batch(1)]


# -- the model --------------------------------------------------------------------------------------------------------


def test_a_token_of_the_answer_sees_none_that_come_later_and_all_of_the_text():
    model, inputs = make_model(CONFIG), dict(make_batch().inputs)
    del inputs["wanted"], inputs["mask"], inputs["decoder_mask"]
    answer, text = (inputs[name].at[:, 3:].add(1) % 20 for name in ("decoder_tokens", "tokens"))
    before, later, other = (
        model(given)["logits"] for given in (inputs, inputs | {"decoder_tokens": answer}, inputs | {"tokens": text})
    )
    np.testing.assert_allclose(before[:, :3], later[:, :3], atol=1e-6)
    assert np.abs(before[:, 3:] - later[:, 3:]).max() > 1e-2
    assert np.abs(before[:, 0] - other[:, 0]).max() > 1e-2


@pytest.mark.parametrize("config", [CONFIG, GATED])
def test_wanted_tokens_are_scored_in_the_place_of_logits(config):
    model, inputs = make_model(config), dict(make_batch().inputs)
    found = model(inputs)
    assert found.keys() == {"losses", "predicted", "finite"} and found["finite"].all()
    wanted = inputs.pop("wanted")
    logits = model(inputs)["logits"]
    expected = token_losses(logits, wanted, jnp.ones_like(inputs["decoder_mask"]))
    np.testing.assert_allclose(found["losses"], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found["predicted"], logits.argmax(-1))


def test_padding_of_either_side_is_not_seen():
    model, batch = make_model(UMT5), make_batch()
    outputs = [model(each.inputs)["losses"] for each in (batch, with_other_padding(batch))]
    mask = batch.labels["mask"]
    np.testing.assert_allclose(outputs[0][mask], outputs[1][mask], rtol=1e-6, atol=1e-6)


def test_an_input_without_an_answer():
    with pytest.raises(ValueError, match=r"the inputs are \['tokens'\], expected 'decoder_tokens' among them"):
        make_model(CONFIG)({"tokens": jnp.zeros((2, 3), int)})


def test_a_token_outside_the_vocabulary_is_no_number():
    inputs = {"tokens": jnp.zeros((1, 2), int), "decoder_tokens": jnp.full((1, 1), 20)}
    assert np.isnan(make_model(CONFIG)(inputs)["logits"]).all()


# -- capture and transport --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [GATED, UMT5], ids=["gated", "umt5"])  # of the others the fit below checks it
def test_gradient_identity(config):
    model, batch = make_model(config), make_batch(texts=3)
    check_gradient_identity(
        lambda params, inputs: model.loss(None, model.replace(params=params)(inputs), batch.labels).sum(),
        model.params,
        batch.inputs,
    )


TRANSPORTS = {"theseus": theseus(), "chain": chain(bico(), gradfix(), scale_by(1.5))}


@pytest.mark.parametrize(("name", "target"), [("theseus", UNTIED), ("chain", LARGER)], ids=["theseus", "chain"])
def test_transport_into_other_widths_depths_heads_and_heads_of_their_own(name, target):
    source, target, transport = make_model(CONFIG), make_model(target, 1), TRANSPORTS[name]
    state = fit(transport, source, target, BATCHES, check_gradients=name == "chain")
    moved = transport.apply(state, noise_like(source.params))
    assert jax.tree.map(jnp.shape, moved) == jax.tree.map(jnp.shape, target.params)
    report = {entry.target: entry for entry in leaf_report(state) if entry.link in ("theseus", "bico")}
    last = {entry.target: entry.action for entry in leaf_report(state) if entry.link in ("theseus", "gradfix")}
    flat = tree.flatten(moved)
    for path in tree.flatten(target.params):
        if "/blocks/" in path or path.endswith("scale"):
            assert report[path].action == "rotated" and np.any(flat[path]) and np.isfinite(flat[path]).all(), path
            assert last[path] == ("rotated" if name == "theseus" else "masked"), path
    for tower in ("encoder", "decoder"):
        assert report[f"{tower}/position_bias"].action == "zeroed by rule"
        paired = {path: entry.source for path, entry in report.items() if path.startswith(f"{tower}/blocks/")}
        for target_layer, source_layer in {"encoder": {0: 0, 1: 0, 2: 1}, "decoder": {0: 0}}[tower].items():
            source_path = f"{tower}/blocks/{source_layer}/mlp/up/kernel"
            assert paired.pop(f"{tower}/blocks/{target_layer}/mlp/up/kernel") == source_path
        assert not any(path.endswith("up/kernel") for path in paired)


@pytest.mark.parametrize("transport", [gradfix(), orthogonal_shift()], ids=["gradfix", "orthogonal_shift"])
def test_transport_between_models_of_one_shape(transport):
    source, target = make_model(CONFIG), make_model(CONFIG, 1)
    state = fit(transport, source, target, BATCHES)
    moved = tree.flatten(transport.apply(state, noise_like(source.params)))
    assert all(np.any(leaf) and np.isfinite(leaf).all() for leaf in moved.values())


@pytest.mark.parametrize(("method", "config"), [(theseus, CONFIG), (bico, UMT5)], ids=["theseus", "bico"])
def test_a_permuted_copy_receives_the_permuted_vector_and_the_model_itself_its_own(method, config):
    source = make_model(config)
    symmetry = symmetry_of_config(config)
    order = random_permutations(symmetry, source.params, jax.random.key(0))
    copy = source.replace(params=permute(symmetry, order, source.params))
    tau, transport = noise_like(source.params), method(rank_tolerance=1e-4)
    batches = [make_batch(seed, texts=16) for seed in range(2)]
    states = [fit(transport, source, target, batches) for target in (source, copy)]
    own, moved = (transport.apply(state, tau) for state in states)
    own, moved, expected = map(tree.flatten, (own, moved, permute(symmetry, order, own)))
    ranks = {entry.target: entry.measures for entry in leaf_report(states[0])}
    kernels = [path for path in own if "/blocks/" in path and path.endswith("kernel")]
    whole = {path for path in kernels if own[path].shape == (ranks[path]["rank_in"], ranks[path]["rank_out"])}
    assert len(whole) > len(kernels) / 3  # the data determine all directions of their inputs and outputs
    for path in kernels:
        leaf = tree.get(tau, path)
        np.testing.assert_allclose(moved[path], expected[path], atol=2e-3 * jnp.abs(leaf).max(), err_msg=path)
        if path in whole:
            np.testing.assert_allclose(own[path], leaf, atol=2e-3 * jnp.abs(leaf).max(), err_msg=path)


def test_padding_rows_of_either_stream_enter_no_map_and_no_vote():
    source, target = make_model(CONFIG), make_model(LARGER, 1)
    transport, tau = TRANSPORTS["chain"], noise_like(source.params)
    one, other = (
        transport.apply(fit(transport, source, target, batches), tau)
        for batches in (BATCHES[:1], [with_other_padding(BATCHES[0])])
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, other)


def test_compilations_do_not_grow_with_depth():
    counts = []
    for depth in (2, 4):
        config = dataclasses.replace(CONFIG, num_layers=depth, num_decoder_layers=depth + 1, d_ff=14)
        source, target = (make_model(config, seed) for seed in (0, 1))
        before = run_stage._cache_size()
        fit(theseus(), source, target, BATCHES[:1])
        counts.append(run_stage._cache_size() - before)
    assert counts[1] <= counts[0] and counts[0] <= 5


def test_layers_of_a_decoder_are_compared_by_their_own_stream():
    model = make_model(dataclasses.replace(CONFIG, num_decoder_layers=3))
    walks = (Walk(model, BATCHES), Walk(model, BATCHES))
    assert pair_stages(model, model, "cka", walks, (), "interpolate") == list(range(len(model.stages)))


# -- symmetry ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, GATED, UMT5], ids=["t5", "gated", "umt5"])
def test_a_permuted_model_computes_the_same_and_is_matched_back(config):
    symmetry, model, inputs = symmetry_of_config(config), make_model(config), dict(make_batch().inputs)
    del inputs["wanted"]
    expected, found = model(inputs)["logits"], groups(symmetry, model.params)
    assert ("encoder/heads" in found) == (not config.bias_in_each_block)
    assert found["decoder/blocks/0/cross_heads"].sizes == {"query_key": 10, "value_out": 10}
    for seed in range(2):
        true = random_permutations(symmetry, model.params, jax.random.key(seed))
        moved = permute(symmetry, true, model.params)
        np.testing.assert_allclose(model.replace(params=moved)(inputs)["logits"], expected, rtol=1e-4, atol=1e-4)
        matched = match_weights(symmetry, model.params, moved, key=jax.random.key(7))
        for group, order in true.items():
            np.testing.assert_array_equal(matched.permutations[group], order, err_msg=group)


def test_transfusion_follows_a_permuted_copy_to_the_bit():
    model, symmetry = make_model(CONFIG), symmetry_of_config(CONFIG)
    order = random_permutations(symmetry, model.params, jax.random.key(1))
    copy = model.replace(params=permute(symmetry, order, model.params))
    transport, tau = transfusion(symmetry, key=jax.random.key(0)), noise_like(model.params)
    moved = transport.apply(fit(transport, model, copy), tau)
    jax.tree.map(np.testing.assert_array_equal, moved, permute(symmetry, order, tau))


# -- configs and checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_configs_round_trip(case):
    config = from_pretrained(GOLDENS / case).config
    assert type(config).from_dict(config.to_dict()) == config
    assert config.tie_word_embeddings == (case in ("t5", "umt5"))
    assert config.scale_decoder_outputs == (case in ("t5", "umt5"))


def test_what_a_config_leaves_out():
    assert T5Config.from_dict({"model_type": "t5"}) == T5Config()
    flan = {"model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_layers": 4}
    found = T5Config.from_dict(flan)  # as versions 4 of transformers wrote it
    assert (found.dense_act_fn, found.is_gated_act, found.num_decoder_layers) == ("gelu_new", True, 4)
    assert not found.scale_decoder_outputs and not found.tie_word_embeddings
    found = T5Config.from_dict({"model_type": "mt5", "pad_token_id": 3})
    assert (found.vocab_size, found.num_heads, found.decoder_start_token_id) == (250112, 6, 3)
    assert not found.scale_decoder_outputs
    found = UMT5Config.from_dict({"model_type": "umt5", "feed_forward_proj": "gated-silu"})
    assert found.bias_in_each_block and found.dense_act_fn == "silu" and found.num_decoder_layers == 8
    assert family_of_config(found).table is not family_of_config(T5Config()).table


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architectures": ["T5EncoderModel"]}, "architecture 'T5EncoderModel' is not supported, only T5ForCondit"),
        ({"architectures": ["T5ForSequenceClassification"]}, "'T5ForSequenceClassification' is not supported"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder is False: only an encoder with a decoder"),
        ({"is_decoder": True}, "is_decoder is True: only an encoder with a decoder"),
        ({"feed_forward_proj": "gated-mish"}, "dense_act_fn 'mish' is not supported: use one of"),
        ({"feed_forward_proj": "doubly-gated-gelu"}, "feed_forward_proj is 'doubly-gated-gelu', expected an activ"),
        ({"feed_forward_proj": 3}, "feed_forward_proj is 3, expected an activation"),
        ({"relative_attention_num_buckets": 6}, "relative_attention_num_buckets is 6, .* expected a multiple of 4"),
        ({"relative_attention_max_distance": 16}, "max_distance 16, expected a multiple of 4, and more than half"),
        ({"decoder_start_token_id": 32128}, "decoder_start_token_id is 32128, expected one of 32128 tokens"),
        ({"decoder_start_token_id": -1}, "decoder_start_token_id is -1, expected a number from 0"),
        ({"num_layers": 20_000}, "num_layers is 20000, expected a number from 1 to 10000"),
        ({"d_model": "8"}, "d_model is '8', expected int"),
    ],
)
def test_unsupported_configs(settings, message):
    with pytest.raises(ValueError, match=message):
        T5Config.from_dict({"model_type": "t5"} | settings)


def copy_of(case, folder, settings=(), **tensors):
    """A golden with other settings and more tensors."""
    shutil.copytree(GOLDENS / case, folder)
    file = folder / "model.safetensors"
    save_file(load_file(file) | tensors, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | dict(settings)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_copies_of_the_embeddings_that_older_checkpoints_have(tmp_path):
    shared = load_file(GOLDENS / "t5" / "model.safetensors")["shared.weight"]
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    copies = {f"{tower}.embed_tokens.weight": shared for tower in ("encoder", "decoder")}
    folder = copy_of("t5", tmp_path / "model", **copies, **{unused: np.ones((8, 2), np.float32)})
    plain, found = from_pretrained(GOLDENS / "t5"), from_pretrained(folder)
    jax.tree.map(np.testing.assert_array_equal, found.params, plain.params)
    save_pretrained(found, tmp_path / "saved")
    own = load_file(GOLDENS / "t5" / "model.safetensors").keys()
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == own | {unused}  # carried along, no copies
    other = copy_of("t5", tmp_path / "other", **copies | {"decoder.embed_tokens.weight": shared + 1})
    with pytest.raises(ValueError, match=r"decoder.embed_tokens.weight and shared.weight with other values"):
        from_pretrained(other)


def test_a_head_is_separate_where_the_file_has_one(tmp_path):
    """Transformers 5 writes that all are tied; its versions 4 say in the same field whether outputs are scaled."""
    head = load_file(GOLDENS / "t5_v1_1" / "model.safetensors")["lm_head.weight"]
    found = from_pretrained(copy_of("t5", tmp_path / "scaled", **{"lm_head.weight": head}))
    assert not found.config.tie_word_embeddings and found.config.scale_decoder_outputs
    np.testing.assert_array_equal(found.params["head"]["kernel"], head.T)
    lean = copy_of("t5", tmp_path / "lean", {"tie_word_embeddings": False, "scale_decoder_outputs": None})
    found = from_pretrained(lean)
    assert found.config.tie_word_embeddings and not found.config.scale_decoder_outputs


def test_an_orbax_folder_says_whether_the_head_is_separate(tmp_path):
    pretrained = from_pretrained(GOLDENS / "t5_v1_1")
    save_orbax(pretrained, tmp_path / "model")
    found = load_orbax(tmp_path / "model")
    assert found.config == pretrained.config
    jax.tree.map(np.testing.assert_array_equal, found.params, pretrained.params)


@pytest.mark.parametrize("case", CASES)
def test_what_is_extracted_and_applied_gives_the_same_file(case, tmp_path):
    base, tuned = GOLDENS / case, tmp_path / "tuned"
    tensors = load_file(base / "model.safetensors")
    random = np.random.default_rng(0)
    changed = {key: np.round(x + random.normal(size=x.shape), 2).astype(np.float32) for key, x in tensors.items()}
    copy_of(case, tuned, **changed)
    streaming.extract(base, tuned, tmp_path / "tau.safetensors")
    streaming.apply(base, [tmp_path / "tau.safetensors"], tmp_path / "edited")
    edited = load_file(tmp_path / "edited" / "model.safetensors")
    assert edited.keys() == changed.keys()
    for key, tensor in changed.items():
        np.testing.assert_allclose(edited[key], tensor, rtol=1e-6, atol=1e-6, err_msg=key)


def test_an_encoder_alone_takes_arithmetic(tmp_path):
    tensors = load_file(GOLDENS / "t5" / "model.safetensors")
    alone = {key: x for key, x in tensors.items() if re.match("encoder|shared", key)}
    folder = copy_of("t5", tmp_path / "model", {"architectures": ["T5EncoderModel"], "is_encoder_decoder": False})
    save_file(alone, folder / "model.safetensors", {"format": "pt"})
    found = from_pretrained(folder)
    assert tree.flatten(found.params).keys() == {key.replace(".", "/") for key in alone}
    with pytest.raises(ValueError, match="there is no modelling code for model_type 't5'"):
        found.model({"tokens": jnp.zeros((1, 2), int)})
