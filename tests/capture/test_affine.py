"""Parameters worked on before they meet an activation, block-diagonal kernels, outputs that are taken apart."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from tvjax import tree
from tvjax.capture import capture, check_gradient_identity, gradient_from_sites, sites


def normal(seed, *shape):
    """Drawn by NumPy: the cases below are made while tests are collected, by every worker, and compile nothing."""
    return jax.device_put(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


X = normal(10, 2, 5, 6)
IMAGE = normal(11, 2, 9, 8, 6)
MASK = jax.device_put(np.arange(36, dtype=np.float32).reshape(6, 6) % 3)


def loss_of(function):
    return lambda params, *args: jnp.sum(jnp.sin(function(params, *args).astype(jnp.float32) * 1.3 + 0.2))


def conv(x, w, **options):
    return jax.lax.conv_general_dilated(
        x, w, **{"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC"), **options}
    )


def heads(q, k, v):
    return jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", q, k)) @ v


def fused_last(p, x):
    return heads(*jnp.split(x @ p["w"] + p["b"], 3, axis=-1))


def fused_by_head(p, x):
    qkv = (x @ p["w"] + p["b"]).reshape(2, 5, 2, 3, 3)  # heads, then q, k, v
    return jnp.einsum("bqhd,bkhd,bkhe->bqhe", qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :])


def concatenated(p, x):
    w = jnp.concatenate([p["q"], p["k"], p["v"]], axis=1)
    b = jnp.concatenate([p["bq"], p["bk"], p["bv"]])
    return heads(*jnp.split(x @ w + b, 3, axis=-1))


def stacked_at_run_time(p, x):
    return jnp.einsum("btd,edf->ebtf", x, jnp.stack([p["a"], p["b"]]))


def dead_code(p, x):
    _ = jnp.tanh(x[:1] @ p["w"])
    return jnp.tanh(x @ p["w"])


def gemma_norm(p, x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True)) * (1 + p["scale"])


def batch_norm(p, x):
    return (x - p["mean"]) / p["deviation"] * p["scale"] + p["bias"]


def masked_in_scan(p, x):
    def step(h, w):
        return h + jnp.tanh(h @ jnp.where(MASK > 0, w, 0)), None

    return jax.lax.scan(step, x, p["w"])[0]


CASES = {
    "one plus scale": (gemma_norm, {"scale": normal(1, 6)}),
    "scale by einsum": (lambda p, x: jnp.einsum("btd,d->btd", x, p["s"]), {"s": normal(1, 6)}),
    "scale of heads by einsum": (
        lambda p, x: jnp.einsum("bthk,hk->bthk", x.reshape(2, 5, 2, 3), p["s"]),
        {"s": normal(1, 2, 3)},
    ),
    "a kernel for each head": (
        lambda p, x: jnp.einsum("bthk,hkm->bthm", x.reshape(2, 5, 2, 3), p["w"]),
        {"w": normal(1, 2, 3, 4)},
    ),
    "experts on broadcast rows": (
        lambda p, x: jnp.einsum("ebtd,edf->ebtf", jnp.broadcast_to(x, (3, *x.shape)), p["w"]),
        {"w": normal(1, 3, 6, 4)},
    ),
    "dead code": (dead_code, {"w": normal(1, 6, 6)}),
    "size-one axes": (
        lambda p, x: (x + p["position"]) * p["scale"] + p["bias"],
        {"position": normal(1, 1, 5, 6), "scale": normal(2, 1, 1, 6), "bias": normal(3, 1, 6)},
    ),
    "times a constant": (lambda p, x: x @ (p["w"] * 0.5) / 3, {"w": normal(1, 6, 6)}),
    "fixed mask": (lambda p, x: x @ (p["w"] * MASK) + x @ (p["w"] / 2 - MASK), {"w": normal(1, 6, 6)}),
    "masked in a scan": (masked_in_scan, {"w": normal(1, 3, 6, 6)}),
    "batch norm at inference": (
        batch_norm,
        {name: 1 + 0.1 * normal(i, 6) for i, name in enumerate(("mean", "deviation", "scale", "bias"))},
    ),
    "subtracted": (
        lambda p, x: p["m"] - x @ p["w"] - p["b"],
        {"m": normal(1, 6), "w": normal(2, 6, 6), "b": normal(3, 6)},
    ),
    "stop gradient": (
        lambda p, x: jnp.tanh(x @ jax.lax.stop_gradient(p["w"])) @ p["w"],
        {"w": normal(1, 6, 6)},
    ),
    "name and barrier": (
        lambda p, x: x @ checkpoint_name(p["w"], "w") + jax.lax.optimization_barrier((p["b"], x))[0],
        {"w": normal(1, 6, 6), "b": normal(2, 6)},
    ),
    "unstack and tile": (
        lambda p, x: x @ jnp.unstack(p["w"])[1] + jnp.tile(p["b"], 2) + x @ jnp.unstack(p["w"])[0],
        {"w": normal(1, 2, 6, 6), "b": normal(2, 3)},
    ),
    "fused, split": (fused_last, {"w": normal(1, 6, 12), "b": normal(2, 12)}),
    "fused by head": (fused_by_head, {"w": normal(1, 6, 18), "b": normal(2, 18)}),
    "concatenated": (
        concatenated,
        {
            **{n: normal(i, 6, 4) for i, n in enumerate("qkv")},
            **{f"b{n}": normal(i + 3, 4) for i, n in enumerate("qkv")},
        },
    ),
    "concatenated along the inputs": (
        lambda p, x: x @ jnp.concatenate([p["a"], p["b"]]),
        {"a": normal(1, 2, 4), "b": normal(2, 4, 4)},
    ),
    "concatenated along the inputs, one bias": (
        lambda p, x: x @ jnp.concatenate([p["a"], p["b"]]) + p["c"],
        {"a": normal(1, 2, 4), "b": normal(2, 4, 4), "c": normal(3, 4)},
    ),
    "concatenated, one bias": (
        lambda p, x: x @ jnp.concatenate([p["a"], p["b"]], 1) + p["c"],
        {"a": normal(1, 6, 3), "b": normal(2, 6, 4), "c": normal(3, 7)},
    ),
    "one kernel, concatenated bias": (
        lambda p, x: x @ p["w"] + jnp.concatenate([p["a"], p["b"]]),
        {"w": normal(1, 6, 7), "a": normal(2, 3), "b": normal(3, 4)},
    ),
    "concatenated otherwise than its bias": (
        lambda p, x: x @ jnp.concatenate([p["a"], p["b"]], 1) + jnp.concatenate([p["c"], p["d"]]),
        {"a": normal(1, 6, 3), "b": normal(2, 6, 4), "c": normal(3, 2), "d": normal(4, 5)},
    ),
    "stacked at run time": (stacked_at_run_time, {"a": normal(1, 6, 4), "b": normal(2, 6, 4)}),
    "gated": (lambda p, x: jax.nn.silu((h := jnp.split(x @ p["w"], 2, -1))[0]) * h[1], {"w": normal(1, 6, 8)}),
    "glu by slices": (lambda p, x: (h := x @ p["w"])[..., :4] * jnp.tanh(h[..., 4:]), {"w": normal(1, 6, 8)}),
}
CONVOLUTIONS = {
    "strided": ((3, 3, 6, 4), {"window_strides": (2, 1)}),
    "dilated": ((3, 2, 6, 4), {"rhs_dilation": (2, 1), "padding": "VALID"}),
    "transposed": ((3, 3, 6, 4), {"lhs_dilation": (2, 2), "padding": ((1, 2), (2, 1))}),
    "grouped": ((3, 3, 3, 8), {"feature_group_count": 2}),
    "depthwise": ((3, 3, 1, 6), {"feature_group_count": 6}),
    "depthwise with a multiplier": ((3, 3, 1, 12), {"feature_group_count": 6}),
}


@pytest.mark.parametrize("name", CASES)
def test_gradient_identity(name):
    function, params = CASES[name]
    loss = loss_of(function)
    table = sites(loss, params, X)
    assert not table.unclassified and not table.unused, str(table)
    check_gradient_identity(loss, params, X)
    assert set(jax.eval_shape(partial(gradient_from_sites, loss), params, X)) == set(tree.flatten(params))
    out, _ = jax.jit(lambda p, x: capture(function, p, x))(params, X)
    chex.assert_trees_all_close(out, function(params, X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_gradient_identity_of_convolutions(name, bias):
    shape, options = CONVOLUTIONS[name]
    params = {"w": normal(1, *shape)} | ({"b": normal(2, shape[-1])} if bias else {})
    loss = loss_of(lambda p, x: conv(x, p["w"], **options) + p.get("b", 0.0))
    table = sites(loss, params, IMAGE)
    site = next(site for site in table.sites if site.kind == "conv")
    groups = options.get("feature_group_count", 1)
    assert (site.groups or 1, site.taps, site.d_in * groups) == (groups, shape[0] * shape[1], 6 * shape[0] * shape[1])
    assert site.raw and site.image is not None and site.image_rows == (2, 9, 8)
    check_gradient_identity(loss, params, IMAGE)


def views(function, params, path, x=X):
    return [site.view for site in sites(function, params, x).sites if site.path == path]


@pytest.mark.parametrize("name", ["fused, split", "fused by head", "gated", "glu by slices"])
def test_a_fused_kernel_has_a_site_for_each_part_of_its_output(name):
    function, params = CASES[name]
    found = [site for site in sites(function, params, X).sites if site.path == "w"]
    parts = 3 if "fused" in name else 2
    assert [site.d_out for site in found] == [params["w"].shape[1] // parts] * parts
    assert len({site.input for site in found}) == 1 and len({site.output for site in found}) == parts
    if "b" in params:  # the bias is cut alike, and belongs to the same outputs
        biases = [site for site in sites(function, params, X).sites if site.path == "b"]
        assert [(b.kind, b.output) for b in biases] == [("bias", site.output) for site in found]


def test_halves_of_a_head_are_no_parts():
    def rotary(p, x):
        q = (x @ p["w"]).reshape(2, 5, 3, 4)
        return jnp.concatenate([q[..., :2] * 0.3 - q[..., 2:], q[..., 2:] + q[..., :2]], -1)

    assert len(views(rotary, {"w": normal(1, 6, 12)}, "w")) == 1


def test_an_output_that_is_also_read_whole_is_not_cut():
    assert len(views(lambda p, x: (h := x @ p["w"]).sum() + h[..., :2].sum() + h[..., 2:].max(), {"w": MASK}, "w")) == 1


def test_a_constant_added_to_a_parameter_is_told():
    table = sites(gemma_norm, {"scale": normal(1, 6)}, X)
    assert [(site.kind, site.exact) for site in table.sites] == [("scale", False)]


def test_a_scale_by_einsum_is_a_scale():
    for name in ("scale by einsum", "scale of heads by einsum"):
        (site,) = sites(CASES[name][0], CASES[name][1], X).sites
        assert (site.kind, site.d_out, site.groups) == ("scale", 6, None)


def test_batch_axes_that_the_activation_owns_are_groups_and_those_broadcast_are_outputs():
    (site,) = sites(*CASES["a kernel for each head"], X).sites
    assert (site.kind, site.groups, site.d_in, site.d_out) == ("dense", 2, 3, 4)
    (site,) = sites(*CASES["experts on broadcast rows"], X).sites
    assert (site.kind, site.groups, site.d_in, site.d_out) == ("dense", None, 6, 12)


def test_what_is_not_affine_is_still_reported():
    weight_norm = lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0) * p["g"])  # noqa: E731
    table = sites(weight_norm, {"w": normal(1, 6, 6), "g": normal(2, 6)}, X)
    assert set(table.unclassified) == {"w", "g"} and not table.sites


def test_leaves_that_hold_no_real_numbers_are_no_trouble():
    params = {"w": normal(1, 6, 6), "key": jax.random.key(0), "count": jnp.zeros((), jnp.int32)}
    function = lambda p, x: x @ p["w"] + jax.random.uniform(p["key"], (6,))  # noqa: E731
    assert [site.path for site in sites(function, params, X).sites] == ["w"]
    table = sites(lambda p, x: (x @ p["w"]).real, {"w": normal(1, 6, 6).astype(jnp.complex64)}, X.astype(jnp.complex64))
    assert "complex64" in table.unclassified["w"][0]


def test_leaves_in_eight_bits_have_sites():
    params = {"w": normal(1, 6, 6).astype(jnp.float8_e4m3fn)}
    (site,) = sites(lambda p, x: x @ p["w"].astype(jnp.float32), params, X).sites
    assert site.kind == "dense"


def test_a_model_with_random_state():
    model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)), nnx.Dropout(0.1, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    assert any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(state))
    table = sites(lambda p, x: nnx.merge(graph, p).layers[0](x), state, X)
    assert {site.kind for site in table.sites} == {"dense", "bias"}
