"""Maps by head over meshes: an attention with grouped queries, whose queries and keys positions rotate."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.mesh.conftest import KINDS, Spread, mesh_of
from tvjax import Batch, fit, single_stage, theseus
from tvjax.stages import HeadAxis

SIZE = 4  # of a head
RATES = (1.0, 0.25)
NUMBERS = {"source": (4, 2), "target": (8, 4)}  # heads of the queries, and of the keys and values


def attention(params, x):
    q, k, v = ((x @ params[name]).reshape(*x.shape[:-1], -1, SIZE) for name in ("query", "key", "value"))
    k, v = (jnp.repeat(side, q.shape[-2] // side.shape[-2], axis=-2) for side in (k, v))
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    return x + jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*x.shape[:-1], -1) @ params["out"]


def make(side, width, seed):
    """A model of one attention, and its leaves."""
    queries, keys = NUMBERS[side]
    sizes = {
        "query": (width, queries * SIZE),
        "key": (width, keys * SIZE),
        "value": (width, keys * SIZE),
        "out": (queries * SIZE, width),
    }
    random = np.random.default_rng(seed)
    params = {name: jnp.asarray(0.4 * random.normal(size=size), jnp.float32) for name, size in sizes.items()}
    heads = {
        "query": (None, HeadAxis("heads:query_key", queries, RATES)),
        "key": (None, HeadAxis("heads:query_key", keys, RATES)),
        "value": (None, HeadAxis("heads:value_out", keys)),
        "out": (HeadAxis("heads:value_out", queries), None),
    }
    return single_stage(attention, params, heads=heads)


def test_the_numbers_of_one_device_where_the_target_lies(alike, bytes_per_device):
    """Phases of queries and keys, blocks of values and outputs, and which heads are pairs."""
    transport = theseus(heads="rotary", head_matching="assignment", rank_tolerance=1e-3)
    source, target = make("source", 16, 0), make("target", 32, 1)
    rows = jnp.asarray(np.random.default_rng(7).normal(size=(16, 6, 32)), jnp.float32)
    batches = [(Batch(rows[..., :16]), Batch(rows))]
    tau = make("source", 16, 2).params
    expected = transport.apply(fit(transport, source, target, batches), tau)
    for kind in KINDS:
        spread = Spread(mesh_of("three", kind))
        sides = (model.replace(params=spread.params(model.params)) for model in (source, target))
        state = fit(transport, *sides, spread.rows(batches))
        alike(transport.apply(state, spread.params(tau)), expected, spread.params(target.params), 1e-3)
        large = [x for x in jax.tree.leaves(state.parts[0].arrays) if x.ndim > 1]
        assert bytes_per_device(large) <= 1.3 * sum(x.nbytes for x in large) / 8
