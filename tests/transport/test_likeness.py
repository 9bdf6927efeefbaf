"""How alike two models are, by pair of blocks: linear CKA, streamed over batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.transport.conftest import make_batches, make_config, make_model
from tvjax import Batch
from tvjax.align.depth import linear_cka
from tvjax.align.permutations import permute, random_permutations
from tvjax.models.llama import LlamaConfig, init, llama
from tvjax.models.symmetry import symmetry_of_config
from tvjax.stages import local_params, run_stage
from tvjax.transport import likeness


def streams(model, batch):
    """The hidden stream that every block leaves."""
    carry, seen = batch.inputs, {}
    for stage in model.stages:
        carry = run_stage(stage.function, local_params(stage, model.params), carry)
        if stage.group:
            seen[stage.name] = carry["hidden"]
    return seen


def test_it_is_the_cka_of_all_rows_at_once():
    source, target = make_model(make_config(16), 0), make_model(make_config(24, depth=3), 1)
    batches = make_batches(3)
    found = likeness(source, target, batches)
    theirs, mine = ([streams(model, batch) for batch in batches] for model in (source, target))
    assert [one.target for one in found] == list(mine[0])
    for one in found:
        a, b = (
            jnp.concatenate([side[name].reshape(-1, side[name].shape[-1]) for side in sides])
            for sides, name in ((theirs, one.source), (mine, one.target))
        )
        assert one.rows == len(a)
        np.testing.assert_allclose(one.cka, linear_cka(a, b), atol=1e-5)


def test_a_permuted_copy_is_wholly_alike():
    config = make_config(16)
    model = make_model(config, 0)
    symmetry = symmetry_of_config(config)
    orders = random_permutations(symmetry, model.params, jax.random.key(1))
    copy = model.replace(params=permute(symmetry, orders, model.params))
    assert [round(one.cka, 5) for one in likeness(model, copy, make_batches())] == [1.0, 1.0]
    assert likeness(model, make_model(config, 1), make_batches())[1].cka < 0.9


def test_other_grids_are_compared_on_the_targets():
    source, target = make_model(make_config(), 0), make_model(make_config(image=16), 1)
    pairs = list(zip(make_batches(image=8), make_batches(image=16), strict=True))
    assert {one.rows for one in likeness(source, target, pairs)} == {2 * 8 * 17}


def test_padding_takes_no_part():
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    source, target = (llama(config, init(config, jax.random.key(seed))) for seed in (0, 1))
    tokens = jax.random.randint(jax.random.key(2), (6, 9), 0, 20)
    short = Batch({"tokens": tokens[:, :5]})
    mask = jnp.arange(9)[None] < 5
    padded = Batch({"tokens": jnp.where(mask, tokens, 7), "mask": jnp.broadcast_to(mask, tokens.shape)})
    plain, with_padding = (likeness(source, target, [batch]) for batch in (short, padded))
    assert {one.rows for one in with_padding} == {30}
    np.testing.assert_allclose([one.cka for one in plain], [one.cka for one in with_padding], atol=1e-5)


def test_what_cannot_be_compared():
    model = make_model(make_config(), 0)
    with pytest.raises(ValueError, match="needs calibration batches, found none"):
        likeness(model, model, [])
    broken = model.replace(params=jax.tree.map(lambda x: x * jnp.nan, model.params))
    with pytest.raises(ValueError, match="the target model"):
        likeness(model, broken, make_batches())
