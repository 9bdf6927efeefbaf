"""MaxText's trees: the same function of the same text, round trips, task vectors, and transports between stacks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvjax as tv
from tvjax import interop, tree
from tvjax.checkpoints import Pretrained, from_pretrained, save_pretrained
from tvjax.models.families import shapes_of
from tvjax.models.llama import LlamaConfig, Rope, llama

LLAMA3 = Rope(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
CONFIG = LlamaConfig(20, 16, 24, 2, 4, 2, head_dim=6, rms_norm_eps=1e-3, rope=LLAMA3)
CONFIGS = {
    "llama 3.1": CONFIG,
    "llama 2": dataclasses.replace(CONFIG, rope=Rope()),
    "mistral": dataclasses.replace(CONFIG, rope=Rope(), model_type="mistral"),
    "qwen2": dataclasses.replace(
        CONFIG, rope=Rope(), model_type="qwen2", attention_bias=True, tie_word_embeddings=True
    ),
    "qwen3": dataclasses.replace(CONFIG, rope=Rope(), model_type="qwen3", qk_norm=True),
}
WIDER = dataclasses.replace(CONFIG, hidden_size=20, intermediate_size=28, num_hidden_layers=3, num_attention_heads=6)


def make_params(config, seed=0, dtype=np.float32):
    draw = np.random.default_rng(seed).normal
    flat = {path: 0.3 * draw(size=shape) for path, shape in shapes_of(config).items()}
    return tree.nest({p: (leaf + p.endswith("scale")).astype(dtype) for p, leaf in flat.items()})


def norm(x, scale, config):
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + config.rms_norm_eps) * scale


def rotate(x, config, interleaved):
    """MaxText's two rotary embeddings: pairs side by side (Llama 3.1's), or in two halves of the head."""
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * config.rotary_frequencies(0)
    turn = jax.lax.complex(jnp.cos(angles), jnp.sin(angles))[:, None]
    one, two = (x[..., ::2], x[..., 1::2]) if interleaved else jnp.split(x, 2, -1)
    turned = jax.lax.complex(one, two) * turn
    parts = turned.real, turned.imag
    return jnp.stack(parts, -1).reshape(x.shape) if interleaved else jnp.concatenate(parts, -1)


def functions_of(config, interleaved):
    """The stages of a MaxText model, written for its tree: nothing here knows tvjax's Llama."""
    scale = 1.0 if config.model_type in ("llama", "mistral") else config.head_dim**-0.5
    groups = config.num_attention_heads // config.num_key_value_heads

    def embed(params, inputs):
        return {"hidden": params["embedding"][inputs["tokens"]]}

    def layer(params, carry):
        x, own = carry["hidden"], params["self_attention"]
        inputs = norm(x, params["pre_self_attention_layer_norm"]["scale"], config)
        query, key, value = (
            jnp.einsum("btd,dnh->btnh", inputs, own[name]["kernel"]) + own[name].get("bias", jnp.float32(0))
            for name in ("query", "key", "value")
        )
        if "query_norm" in own:
            query, key = (norm(q, own[n]["scale"], config) for q, n in ((query, "query_norm"), (key, "key_norm")))
        query, key = (rotate(units, config, interleaved) for units in (query, key))
        scores = jnp.einsum("bqnh,bknh->bnqk", query * scale, jnp.repeat(key, groups, 2))
        scores = jnp.where(jnp.tri(x.shape[1], dtype=bool), scores, -jnp.inf)
        mixed = jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(scores), jnp.repeat(value, groups, 2))
        x = x + jnp.einsum("btnh,nhd->btd", mixed, own["out"]["kernel"])
        inputs, mlp = norm(x, params["post_self_attention_layer_norm"]["scale"], config), params["mlp"]
        hidden = jax.nn.silu(inputs @ mlp["wi_0"]["kernel"]) * (inputs @ mlp["wi_1"]["kernel"])
        return {"hidden": x + hidden @ mlp["wo"]["kernel"]}

    def head(params, carry):
        x = norm(carry["hidden"], params["norm"]["scale"], config)
        return {"logits": x @ (params["logits"]["kernel"] if "logits" in params else params["embedding"].T)}

    return embed, layer, head


def maxtext_model(params, config, interleaved):
    embed, layer, head = functions_of(config, interleaved)
    tied = config.tie_word_embeddings
    last = ("embedding", "token_embedder/embedding") if tied else ("logits", "decoder/logits_dense")
    stages = (
        tv.Stage("embed", embed, (("", "token_embedder"),)),
        tv.Stage("layers", tv.scanned(layer, axis=1), (("", "decoder/layers"),)),
        tv.Stage("head", head, (("norm", "decoder/decoder_norm"), last), fixed=() if tied else ("logits/kernel",)),
    )
    return tv.Model(params, stages)


def tokens(seed=0, texts=6, length=9):
    return {"tokens": jnp.asarray(np.random.default_rng(seed).integers(0, 20, (texts, length)), jnp.int32)}


def assert_same(found, expected):
    assert tree.flatten(found).keys() == tree.flatten(expected).keys()
    for path, leaf in tree.flatten(expected).items():
        assert tree.flatten(found)[path].dtype == leaf.dtype
        np.testing.assert_array_equal(tree.flatten(found)[path], leaf, err_msg=path)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_logits_of_a_hugging_face_folder(name, tmp_path):
    config = CONFIGS[name]
    save_pretrained(Pretrained(llama(config, make_params(config)), config), tmp_path / "model")
    ours = from_pretrained(tmp_path / "model")
    theirs = maxtext_model(interop.to_maxtext(ours.params, ours.config), config, interleaved=name == "llama 3.1")
    np.testing.assert_allclose(theirs(tokens())["logits"], ours.model(tokens())["logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scan_axis", [0, 1, None])
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trips(name, scan_axis):
    config, params = CONFIGS[name], make_params(CONFIGS[name])
    theirs = interop.to_maxtext(params, config, scan_axis=scan_axis)
    back = interop.from_maxtext({"params": {"params": theirs}}, config, scan_axis=1 if scan_axis is None else scan_axis)
    rounded = {
        path for path in tree.flatten(params) if "/query/kernel" in path and name in ("llama 3.1", "llama 2", "mistral")
    }
    assert_same(*({**tree.flatten(side), **dict.fromkeys(rounded, np.zeros(1))} for side in (back, params)))
    for path in rounded:
        np.testing.assert_allclose(tree.flatten(back)[path], tree.flatten(params)[path], rtol=2e-7)
    exact = dataclasses.replace(config, head_dim=16)  # its root is a power of two: nothing is rounded
    params = make_params(exact, dtype=jnp.bfloat16)
    assert_same(interop.from_maxtext(interop.to_maxtext(params, exact), exact), params)


def test_the_names_are_complete_on_both_sides():
    for name, config in CONFIGS.items():
        for scan_axis in (1, None):
            found = interop.maxtext_names(config, scan_axis=scan_axis)
            made = interop.to_maxtext(make_params(config), config, scan_axis=scan_axis)
            assert set(found.values()) == set(tree.flatten(made)), name
            assert len(found) == len(shapes_of(config))
    assert found["model.layers.1.self_attn.q_norm.weight"] == "decoder/layers_1/self_attention/query_norm/scale"


def test_a_task_vector_converts_as_the_models_do():
    two = [make_params(CONFIG, seed) for seed in (0, 1)]
    expected = jax.tree.map(np.subtract, *(interop.to_maxtext(params, CONFIG) for params in reversed(two)))
    tau = jax.device_get(tv.task_vector(*two))
    found = interop.to_maxtext(tau, CONFIG)
    for path, leaf in tree.flatten(expected).items():
        np.testing.assert_allclose(tree.flatten(found)[path], leaf, atol=1e-6, err_msg=path)
    assert_same(jax.jit(lambda tau: interop.to_maxtext(tau, CONFIG))(tau), found)
    part = interop.to_maxtext(tree.select(tau, "blocks/*/mlp"), CONFIG, partial=True)
    assert_same(part, {"decoder": {"layers": {"mlp": found["decoder"]["layers"]["mlp"]}}})
    assert_same(
        interop.from_maxtext(part, CONFIG, partial=True),
        tree.nest({p: x for p, x in tree.flatten(tau).items() if "/mlp/" in p}),
    )


def test_the_result_lies_where_a_tree_of_the_code_lies():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    params = make_params(CONFIG)
    like = jax.tree.map(lambda leaf: jax.device_put(leaf, spec), {"params": interop.to_maxtext(params, CONFIG)})
    found = interop.to_maxtext(make_params(CONFIG, 1), CONFIG, like=like)
    assert all(leaf.sharding == spec for leaf in jax.tree.leaves(found))
    assert_same(found, {"params": interop.to_maxtext(make_params(CONFIG, 1), CONFIG)})
    with pytest.raises(ValueError, match=r"(?s)to be like.*wo/kernel: \(24, 2, 16\), expected \(28, 3, 20\)"):
        interop.to_maxtext(params, CONFIG, like=interop.to_maxtext(make_params(WIDER), WIDER))


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_sharded_trees_stay_sharded(kind):
    """Four devices share two heads of the keys: these lie whole on each, the heads of the queries are spread."""
    mesh, params = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(kind,) * 2), make_params(CONFIG)
    params = {"blocks": {i: {"attention": params["blocks"][i]["attention"]} for i in params["blocks"]}}
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor"))
    sharded = jax.tree.map(lambda leaf: jax.device_put(leaf, spec), params)
    found = interop.to_maxtext(sharded, CONFIG, partial=True)
    assert_same(found, interop.to_maxtext(params, CONFIG, partial=True))
    own = found["decoder"]["layers"]["self_attention"]
    assert {shard.data.shape for shard in own["query"]["kernel"].addressable_shards} == {(8, 2, 1, 6)}
    assert {shard.data.shape for shard in own["key"]["kernel"].addressable_shards} == {(8, 2, 2, 6)}
    back = interop.from_maxtext(found, CONFIG, partial=True)["blocks"]["1"]["attention"]
    assert {shard.data.shape for shard in back["query"]["kernel"].addressable_shards} == {(8, 6)}
    np.testing.assert_allclose(
        back["query"]["kernel"], params["blocks"]["1"]["attention"]["query"]["kernel"], rtol=2e-7
    )


def without_heads(model):
    return model.replace(stages=tuple(dataclasses.replace(s, heads=(), vocabulary=()) for s in model.stages))


def test_theseus_between_two_scanned_stacks_is_that_between_the_hugging_face_trees():
    configs, batches = (CONFIG, WIDER), [(tv.Batch(tokens(texts=12)), tv.Batch(tokens(texts=12)))]
    params = [make_params(config, seed) for seed, config in enumerate(configs)]
    tau = jax.tree.map(lambda leaf: 0.1 * leaf, make_params(CONFIG, 2))
    here = [without_heads(llama(config, own)) for config, own in zip(configs, params, strict=True)]
    rebase = tv.theseus()
    expected = rebase.apply(tv.fit(rebase, *here, batches), tau)
    stacked = [maxtext_model(interop.to_maxtext(p, c), c, True) for p, c in zip(params, configs, strict=True)]
    there = [tv.unstack(model, "decoder/layers", axis=1) for model in stacked]
    assert [stage.name for stage in there[1].stages] == ["embed", "layers/0", "layers/1", "layers/2", "head"]
    moved = rebase.apply(
        tv.fit(rebase, *there, batches), tv.unstack(interop.to_maxtext(tau, CONFIG), "decoder/layers", axis=1)
    )
    found = tv.stack(moved, "decoder/layers", axis=1)
    expected = interop.to_maxtext(expected, WIDER)
    for path, leaf in tree.flatten(expected).items():
        error = np.linalg.norm(tree.flatten(found)[path] - leaf)
        assert error <= 1e-3 * np.linalg.norm(leaf), (path, error, np.linalg.norm(leaf))
    assert np.linalg.norm(found["decoder"]["layers"]["self_attention"]["query"]["kernel"]) > 0.01


WITH_HEAD = interop.to_maxtext(make_params(CONFIG), CONFIG)
TIED = dataclasses.replace(CONFIG, tie_word_embeddings=True)
YARN = Rope(kind="yarn", factor=2.0, original_max_position_embeddings=8)
FACTORS = tv.LowRank(jnp.ones((16, 1)), jnp.ones((1, 24)))
UP = {"blocks": {str(i): {"mlp": {"up": {"kernel": FACTORS}}} for i in range(2)}}


def back(**changes):
    return interop.from_maxtext(WITH_HEAD, dataclasses.replace(CONFIG, **changes))


def there(params, partial=False, **changes):
    return interop.to_maxtext(params, dataclasses.replace(CONFIG, **changes), partial=partial)


# fmt: off
BAD = {
    "a head that the config ties": (
        lambda: back(tie_word_embeddings=True), r"(?s)1 leaves.*decoder/logits_dense/kernel: surplus.*tied embeddings"),
    "no head": (
        lambda: interop.from_maxtext(interop.to_maxtext(make_params(TIED), TIED), CONFIG),
        "decoder/logits_dense/kernel: missing"),
    "biases": (
        lambda: there({}, attention_bias=True),
        r"(?s)6 parameters of this LlamaConfig have no place in MaxText's llama.*attention/query/bias"),
    "heads": (
        lambda: back(num_attention_heads=12, head_dim=2), r"(?s)query/kernel: \(16, 4, 6\), expected \(16, 12, 2\)"),
    "a vocabulary": (lambda: back(vocab_size=24), r"token_embedder/embedding: \(20, 16\), expected \(24, 16\)"),
    "depth": (
        lambda: back(num_hidden_layers=3), r"decoder/layers/2/pre_self_attention_layer_norm/scale: missing"),
    "the other axis": (
        lambda: interop.from_maxtext(WITH_HEAD, CONFIG, scan_axis=0),
        r"(?s)'decoder/layers'.*one number of layers at axis 0"),
    "some layers": (
        lambda: there(tree.select(make_params(CONFIG), "blocks/1"), partial=True),
        r"(?s)9 leaves of decoder/layers.*mlp/wo/kernel: \[1\].*zeros"),
    "a part": (lambda: there({"head": {}}), "(?s)embeddings/tokens: missing.*partial=True"),
    "another family": (
        lambda: there({}, model_type="gemma"),
        "known for the model types llama, mistral, qwen2, qwen3, found 'gemma'"),
    "positions": (
        lambda: there({}, rope=YARN), "'yarn' is a setting of its own.*interleaved=True or interleaved=False"),
    "factors": (lambda: there(UP, partial=True), r"(?s)2 leaves are products.*blocks/0/mlp/up/kernel.*factors.dense"),
}
# fmt: on


@pytest.mark.parametrize("name", BAD)
def test_what_has_no_place_is_named(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
