"""The gradient identity on every kind of function, and what cannot be seen is reported."""

import functools

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tvjax import tree
from tvjax.capture import (
    capture,
    capture_gradients,
    check_gradient_identity,
    gradient_from_sites,
    sites,
)


def normal(seed, *shape):
    return jax.device_put(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def loss_of(function):
    """A scalar loss with a gradient that differs at every output."""

    def loss(params, *args):
        out = function(params, *args).astype(jnp.float32)
        return jnp.sum(jnp.sin(out * 1.3 + 0.2))

    return loss


def nnx_case(module, *args):
    graph, state = nnx.split(module)
    return (lambda params, *a: nnx.merge(graph, params)(*a)), state, args


def linen_case(module, *args):
    params = module.init(jax.random.key(0), *args)["params"]
    params = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)
    return (lambda p, *a: module.apply({"params": p}, *a)), params, args


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm()(x)
        h = nn.MultiHeadDotProductAttention(num_heads=2)(h, h)
        x = x + h
        return x + nn.Dense(6)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(x)))), None


class ScannedLinen(nn.Module):
    axis: int = 0
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(LinenBlock, prevent_cse=False) if self.remat else LinenBlock
        return nn.scan(block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3)()(x, None)[0]


class LinenConv(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(5, (3, 3), strides=2)(x))
        return nn.Conv(4, (2, 2), padding="VALID", use_bias=False, kernel_dilation=2)(x)


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
        self.up = nnx.Linear(6, 12, rngs=rngs)
        self.down = nnx.Linear(12, 6, rngs=rngs)
        self.rms = nnx.RMSNorm(6, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(jax.nn.gelu(self.up(self.rms(x))))


class NNXScan(nnx.Module):
    def __init__(self, rngs, remat=False):
        self.remat = remat

        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(r):
            return NNXBlock(r)

        self.blocks = make(rngs)

    def __call__(self, x):
        def step(h, block):
            return block(h)

        step = nnx.remat(step) if self.remat else step
        return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)


def fused_qkv(p, x):
    qkv = jnp.einsum("btd,dchk->cbthk", x, p["qkv"]) + p["bias"][:, None, None]
    q, k, v = qkv
    weights = jax.nn.softmax(jnp.einsum("bqhk,bthk->bhqt", q, k))
    return jnp.einsum("bhqt,bthk,hkd->bqd", weights, v, p["out"])


def sliced_qkv(p, x):
    q, k, v = (x @ w + b for w, b in zip(jnp.split(p["qkv"], 3, axis=1), jnp.split(p["bias"], 3), strict=True))
    return jax.nn.softmax(q @ k.mT) @ v


def tied(p, x):
    return jnp.tanh(jnp.tanh(x @ p["w"] + p["b"]) @ p["w"] + p["b"]) @ p["w"].T


def shared_in_scan(p, x):
    def step(h, w):
        return jnp.tanh(h @ p["shared"] + h @ w), None

    return jax.lax.scan(step, x, p["stack"])[0]


def nested_scan(p, x):
    def outer(h, group):
        def inner(h, layer):
            return h + jnp.tanh(h @ layer["w"] + layer["b"]) * layer["gain"], None

        return jax.lax.scan(inner, h, group)[0], None

    return jax.lax.scan(outer, x, p)[0]


def post_norm_torch_style(p, x):
    normal_form = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return normal_form * p["scale"] + p["bias"] + p["position"]


def flattened_rows(p, x):
    b, t, d = x.shape
    return (x.reshape(b * t, d) @ p["w"]).reshape(b, t, -1) + p["b"]


def bfloat16_dense(p, x):
    return jax.nn.relu(x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16) + p["b"].astype(jnp.bfloat16))


def stacked_experts(p, x):
    return jax.vmap(lambda w, h: jnp.tanh(h @ w))(p["experts"], x)


def jit_inside(p, x):
    dense = jax.jit(lambda w, b, h: h @ w + b)
    return dense(p["w2"], p["b"], dense(p["w1"], p["b"], x))


def layer_scale_branch(p, x):
    return x + p["gamma"] * jnp.tanh(x @ p["w"])


def vmapped(p, x):
    return jax.vmap(lambda row: jnp.tanh(row @ p["w"] + p["b"]))(x)


class Equinox(eqx.Module):
    first: eqx.nn.Linear
    second: eqx.nn.Linear

    def __call__(self, x):
        return jax.vmap(lambda row: self.second(jax.nn.relu(self.first(row))))(x)


def equinox_case():
    module = Equinox(eqx.nn.Linear(6, 7, key=jax.random.key(3)), eqx.nn.Linear(7, 4, key=jax.random.key(4)))
    return (lambda m, a: m(a)), module, (normal(1, 5, 6),)


def case_of(function, *args, **shapes):
    """A function with parameters of these shapes."""
    return function, {name: normal(seed, *shape) for seed, (name, shape) in enumerate(shapes.items(), 2)}, args


def x():
    return normal(1, 2, 5, 6)


def image():
    return normal(2, 2, 8, 8, 3)


# Made when a test asks for one: collecting the tests compiles nothing.
CASES = {
    "nnx block": lambda: nnx_case(NNXBlock(nnx.Rngs(0)), x()),
    "nnx scan": lambda: nnx_case(NNXScan(nnx.Rngs(0)), x()),
    "nnx scan remat": lambda: nnx_case(NNXScan(nnx.Rngs(0), remat=True), x()),
    "nnx conv": lambda: nnx_case(nnx.Conv(3, 4, (3, 3), strides=(2, 1), rngs=nnx.Rngs(0)), image()),
    "nnx einsum": lambda: nnx_case(nnx.Einsum("btd,dhk->hbtk", (6, 2, 4), (2, 1, 1, 4), rngs=nnx.Rngs(0)), x()),
    "linen block": lambda: linen_case(ScannedLinen(), x()),
    "linen scan axis 1": lambda: linen_case(ScannedLinen(axis=1), x()),
    "linen scan remat": lambda: linen_case(ScannedLinen(remat=True), x()),
    "linen conv": lambda: linen_case(LinenConv(), image()),
    "fused qkv": lambda: case_of(fused_qkv, x(), qkv=(6, 3, 2, 4), bias=(3, 2, 4), out=(2, 4, 6)),
    "sliced qkv": lambda: case_of(sliced_qkv, x(), qkv=(6, 12), bias=(12,)),
    "tied": lambda: case_of(tied, x(), w=(6, 6), b=(6,)),
    "shared in scan": lambda: case_of(shared_in_scan, x(), shared=(6, 6), stack=(4, 6, 6)),
    "nested scan": lambda: case_of(nested_scan, x(), w=(2, 3, 6, 6), b=(2, 3, 6), gain=(2, 3, 6)),
    "torch layer norm": lambda: case_of(post_norm_torch_style, x(), scale=(6,), bias=(6,), position=(5, 6)),
    "flattened rows": lambda: case_of(flattened_rows, x(), w=(6, 4), b=(4,)),
    "bfloat16": lambda: case_of(bfloat16_dense, x(), w=(6, 4), b=(4,)),
    "experts": lambda: case_of(stacked_experts, x(), experts=(2, 6, 4)),
    "jit inside": lambda: case_of(jit_inside, x(), w1=(6, 6), w2=(6, 6), b=(6,)),
    "layer scale": lambda: case_of(layer_scale_branch, x(), gamma=(6,), w=(6, 6)),
    "vmapped": lambda: case_of(vmapped, x(), w=(6, 4), b=(4,)),
    "equinox": equinox_case,
}


@functools.cache
def case(name):
    return CASES[name]()


@pytest.mark.parametrize("name", CASES)
def test_gradient_identity(name):
    function, params, args = case(name)
    loss = loss_of(function)
    table = sites(loss, params, *args)
    assert not table.unclassified and not table.unused, str(table)
    assert {site.path for site in table.sites} == set(tree.flatten(params))
    check_gradient_identity(loss, params, *args)


@pytest.mark.parametrize("name", CASES)
def test_probes_change_nothing(name):
    function, params, args = case(name)
    out, seen = jax.jit(lambda p, *a: capture(function, p, *a))(params, *args)
    chex.assert_trees_all_close(out, jax.jit(function)(params, *args), rtol=1e-5, atol=1e-5)
    for site in sites(function, params, *args).sites:
        assert seen.output(site).shape[-1] == site.d_out


@pytest.mark.parametrize("name", ["fused qkv", "nested scan", "flattened rows"])
def test_jit_equals_eager(name):
    function, params, args = case(name)
    loss = loss_of(function)
    eager = capture_gradients(loss, params, *args)
    chex.assert_trees_all_close(
        jax.jit(lambda p, *a: capture_gradients(loss, p, *a))(params, *args), eager, rtol=1e-4, atol=1e-4
    )


def test_the_output_is_taken_after_the_bias_and_after_the_whole_norm():
    params = {"w": normal(1, 6, 4), "b": normal(2, 4), "scale": normal(3, 4), "shift": normal(4, 4)}

    def function(p, x):
        h = x @ p["w"] + p["b"]
        centred = h - h.mean(-1, keepdims=True)
        return centred * (jax.lax.rsqrt(h.var(-1, keepdims=True)) * p["scale"]) + p["shift"]

    x = normal(5, 7, 6)
    out, seen = capture(function, params, x)
    by_key = {site.key: site for site in sites(function, params, x).sites}
    chex.assert_trees_all_close(seen.output(by_key["w#0"]), x @ params["w"] + params["b"], rtol=1e-5)
    for key in ("scale#0", "shift#0"):
        chex.assert_trees_all_close(seen.output(by_key[key]), out, rtol=1e-5)
    assert by_key["b#0"].output == by_key["w#0"].output and by_key["b#0"].gradient == by_key["w#0"].gradient


def test_one_activation_that_feeds_three_kernels_is_one_activation():
    function, params, args = case("nnx block")
    by_path = {site.path: site for site in sites(function, params, *args).sites}
    names = {
        by_path[
            f"attention/{part}/kernel/value"
            if f"attention/{part}/kernel/value" in by_path
            else f"attention/{part}/kernel"
        ].input
        for part in ("query", "key", "value")
    }
    assert len(names) == 1
    norm = next(site for site in by_path.values() if site.path.startswith("norm") and site.kind == "scale")
    assert names == {norm.output}


def test_a_cast_for_each_kernel_does_not_split_an_activation():
    def function(p, x):
        return (x.astype(jnp.bfloat16) @ p["a"].astype(jnp.bfloat16)) + (
            x.astype(jnp.bfloat16) @ p["b"].astype(jnp.bfloat16)
        )

    table = sites(function, {"a": normal(1, 3, 2), "b": normal(2, 3, 2)}, normal(3, 4, 3))
    assert len({site.input for site in table.sites}) == 1


def test_scanned_layers_keep_their_axis_and_shared_leaves_make_rows():
    function, params, args = case("shared in scan")
    _, seen = capture(function, params, *args)
    by_path = {site.path: site for site in sites(function, params, *args).sites}
    chex.assert_shape(seen.input(by_path["stack"]), (4, 10, 6))
    chex.assert_shape(seen.input(by_path["shared"]), (40, 6))


def reported(function, params, *args):
    table = sites(function, params, *args)
    assert set(tree.flatten(params)) == {s.path for s in table.sites} | set(table.unclassified) | set(table.unused)
    return {path: " ".join(why) for path, why in table.unclassified.items()}, table.unused


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda p, x: jax.lax.cond(x.sum() > 0, lambda w: x @ w, lambda w: x @ w.T, p["w"]), "cond"),
        (lambda p, x: jax.lax.while_loop(lambda c: c[1] < 3, lambda c: (c[0] @ p["w"], c[1] + 1), (x, 0))[0], "while"),
        (lambda p, x: p["w"][jnp.argmax(x, axis=-1)], "gather"),
        (lambda p, x: x @ (p["w"] * p["w"]), "mul of two parameters"),
        (lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"])), "two parameters"),
        (lambda p, x: jnp.ones((5, 4)) @ p["w"] + x, "dot_general with a constant"),
        (lambda p, x: x @ (p["w"] @ p["w"]), "dot_general of two parameters"),
        (lambda p, x: x @ jnp.exp(p["w"]), "exp"),
        (lambda p, x: jnp.concatenate([x, p["w"]]), "concatenate"),
        (lambda p, x: jax.lax.scan(lambda w, _: (w * 0.9, x @ w), p["w"], None, length=2)[1], "carry of a scan"),
    ],
)
def test_what_has_no_rule_is_reported_by_leaf(function, reason):
    why, unused = reported(function, {"w": normal(1, 4, 4), "unused": normal(2, 3)}, normal(3, 5, 4))
    assert reason in why["w"]
    assert unused == ("unused",)


def test_a_custom_rule_with_a_parameter_inside_is_reported():
    @jax.custom_vjp
    def dense(w, x):
        return x @ w

    dense.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: (r[1].T @ g, g @ r[0].T))
    why, _ = reported(lambda p, x: dense(p["w"], x), {"w": normal(1, 4, 4)}, normal(3, 5, 4))
    assert "custom_vjp" in why["w"]


def test_a_custom_rule_without_a_parameter_is_left_alone():
    @jax.custom_jvp
    def clip(x):
        return jnp.clip(x, -1, 1)

    clip.defjvp(lambda primals, tangents: (clip(primals[0]), 2.0 * tangents[0]))
    loss = loss_of(lambda p, x: clip(x @ p["w"]))
    params, x = {"w": normal(1, 4, 4)}, normal(3, 5, 4)
    check_gradient_identity(loss, params, x)
    assert set(gradient_from_sites(loss, params, x)) == {"w"}


def test_the_check_fails_where_a_use_is_missed():
    @jax.custom_jvp
    def wrong(x):
        return x

    wrong.defjvp(lambda primals, tangents: (primals[0], tangents[0]))
    params, x = {"w": normal(1, 4, 4)}, normal(3, 5, 4)
    loss = loss_of(lambda p, x: x @ p["w"])
    with pytest.raises(ValueError, match="gradient identity fails at 'w'"):
        check_gradient_identity(loss, params, x, tolerance=-1.0)


def test_the_identity_is_checked_by_one_program_whatever_the_number_of_leaves(programs):
    function, params, args = case_of(lambda p, x: (x @ p["a"] + p["b"]) @ p["c"], x(), a=(6, 3), b=(3,), c=(3, 5))
    assert len(programs(check_gradient_identity, loss_of(function), params, *args)) == 1
