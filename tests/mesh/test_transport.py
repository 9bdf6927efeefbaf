"""Transports over meshes: the numbers of one device, lying like the target's leaves, nothing whole on every device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax import Batch, bico, chain, fit, gradfix, identity, orthogonal_shift, theseus, transfusion
from tvjax.align.permutations import Row, Symmetry
from tvjax.stages import Model, Stage

CLASSES = 8
TABLE = Symmetry(
    (
        Row("embed/kernel", (None, "residual")),
        Row("blocks/{i}/scale", ("residual",), even=True),
        Row("blocks/{i}/up/kernel", ("residual", "hidden/{i}")),
        Row("blocks/{i}/up/bias", ("hidden/{i}",)),
        Row("blocks/{i}/down/kernel", ("hidden/{i}", "residual")),
        Row("head/kernel", ("residual", None)),
    )
)
CUT = {"rank_tolerance": 1e-3}
TRANSPORTS = {
    "theseus": theseus(**CUT),
    "theseus-polar-whitened": theseus(method="polar", whiten=0.25, **CUT),
    "bico": bico(**CUT),
    "bico+gradfix": chain(bico(**CUT), gradfix()),
    "gradfix": gradfix(),
    "orthogonal_shift": orthogonal_shift(),
    "transfusion": transfusion(TABLE, key=jax.random.key(0)),
    "identity": identity(),
}
ACROSS = ("theseus", "theseus-polar-whitened", "bico", "bico+gradfix")  # these change the width


def embed(params, inputs):
    return inputs @ params["kernel"]


def block(params, x):
    normed = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * params["scale"]
    hidden = jax.nn.gelu(normed @ params["up"]["kernel"] + params["up"]["bias"])
    return x + hidden @ params["down"]["kernel"]


def head(params, x):
    return jnp.mean(x, 1) @ params["kernel"]


def loss(_, outputs, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(outputs), labels[:, None], 1)[:, 0]


def make_params(seed, width, depth=2, scale=0.3):
    random = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(scale * random.normal(size=shape), jnp.float32)

    blocks = {
        str(i): {
            "scale": 1 + normal(width),
            "up": {"kernel": normal(width, 2 * width), "bias": normal(2 * width)},
            "down": {"kernel": normal(2 * width, width)},
        }
        for i in range(depth)
    }
    return {"embed": {"kernel": normal(24, width)}, "blocks": blocks, "head": {"kernel": normal(width, CLASSES)}}


def make_model(params):
    stages = [Stage("embed", embed, (("", "embed"),))]
    stages += [Stage(f"blocks/{i}", block, (("", f"blocks/{i}"),), "blocks") for i in params["blocks"]]
    stages += [Stage("head", head, (("", "head"),), fixed=("kernel",))]
    return Model(params, tuple(stages), loss)


def make_batches():
    random = np.random.default_rng(7)
    return [
        Batch(
            jnp.asarray(random.normal(size=(8, 6, 24)), jnp.float32),
            jnp.asarray(random.integers(0, CLASSES, 8), jnp.int32),
        )
        for _ in range(2)
    ]


def make(name):
    """Source, target, batches and a task vector of the source, all on one device."""
    source, target = make_params(0, 16), make_params(1, 32 if name in ACROSS else 16)
    tau = make_params(2, 16, scale=1e-2)
    return make_model(source), make_model(target), make_batches(), tau


@functools.cache
def on_one_device(name):
    source, target, batches, tau = make(name)
    state = fit(TRANSPORTS[name], source, target, batches)
    return jax.tree.map(np.asarray, TRANSPORTS[name].apply(state, tau))


def spread_models(spread, name):
    source, target, batches, tau = make(name)
    return (
        source.replace(params=spread.params(source.params)),
        target.replace(params=spread.params(target.params)),
        spread.rows(batches),
        spread.params(tau),
    )


@pytest.mark.parametrize("name", TRANSPORTS)
def test_numbers_and_places(spread, name, alike, bytes_per_device):
    source, target, batches, tau = spread_models(spread, name)
    transport = TRANSPORTS[name]
    state = fit(transport, source, target, batches)
    moved = transport.apply(state, tau)
    alike(moved, on_one_device(name), like=target.params, tolerance=2e-4)
    arrays = [part.arrays for part in state.parts]
    large = [x for x in jax.tree.leaves(arrays) if x.ndim > 1]
    assert all(x.sharding.mesh.axis_types == spread.mesh.axis_types for x in large)
    whole = sum(x.nbytes for x in large)
    assert bytes_per_device(large) <= 1.3 * whole / 8
