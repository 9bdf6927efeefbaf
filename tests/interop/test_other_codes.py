"""Trees as Levanter, EasyDeL and Bonsai keep them: arithmetic, stacks, and transports between unlike depths.

Each tree is made of the same plain one, and what comes out must be what comes out of the plain ones, in its form.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tvjax as tv
from tvjax import tree

HEADS, SIZE, WORDS = 2, 4, 11
WIDTHS, DEPTHS = {"source": 8, "target": 12}, {"source": 2, "target": 3}
ATTENTION, HIDDEN = HEADS * SIZE, 16


def plain(side, seed):
    """``{"embed": .., "layers": [{..}, ..], "head": ..}``, each kernel ``[d_in, d_out]``."""
    width, random = WIDTHS[side], np.random.default_rng(seed)
    shapes = {name: (width, ATTENTION) for name in ("q", "k", "v")} | {"o": (ATTENTION, width)}
    shapes |= {"gate": (width, HIDDEN), "up": (width, HIDDEN), "down": (HIDDEN, width), "norm": (width,)}
    draw = lambda *shape: jnp.asarray(0.4 * random.normal(size=shape), jnp.float32)  # noqa: E731
    layers = [{name: draw(*shape) for name, shape in shapes.items()} for _ in range(DEPTHS[side])]
    return {"embed": draw(WORDS, width), "layers": layers, "head": draw(width, WORDS)}


def layer(weights, x):
    normed = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * weights["norm"]
    q, k, v = ((normed @ weights[name]).reshape(*x.shape[:2], HEADS, SIZE) for name in "qkv")
    scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    x = x + jnp.einsum("bhqk,bkhd->bqhd", scores, v).reshape(*x.shape[:2], -1) @ weights["o"]
    return x + (jax.nn.silu(x @ weights["gate"]) * (x @ weights["up"])) @ weights["down"]


# -- Levanter: Equinox modules whose layers are stacked, of arrays with named axes -----------------------------------


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class NamedArray:
    """Haliax's: the names of the axes are part of the tree's structure, and stay when a layer is taken out of it."""

    array: Any
    axes: tuple[tuple[str, int], ...]

    def tree_flatten(self):
        return (self.array,), self.axes

    @classmethod
    def tree_unflatten(cls, axes, children):
        return cls(children[0], axes)


class Linear(eqx.Module):
    weight: NamedArray  # the outputs' axes first
    bias: NamedArray | None
    In: tuple[str, ...] = eqx.field(static=True)


class Layer(eqx.Module):
    config: tuple[int, ...] = eqx.field(static=True)
    self_attn: dict[str, Linear]
    mlp: dict[str, Linear]
    input_layernorm: NamedArray


class Stacked(eqx.Module):
    stacked: Layer
    Block: tuple[str, int] = eqx.field(static=True)


class Transformer(eqx.Module):
    embeddings: NamedArray
    layers: Stacked
    lm_head: NamedArray


def named(array, *names):
    return NamedArray(array, tuple(zip(names, array.shape, strict=True)))


def levanter_layer(weights):
    """Kernels as ``[outputs.., inputs..]``, those of queries with an axis for the heads of a group."""

    def linear(name):
        kernel = weights[name].T
        if name == "o":
            return Linear(named(kernel.reshape(-1, HEADS, SIZE), "embed", "heads", "head_size"), None, ("heads",))
        if name == "q":
            kernel = kernel.reshape(HEADS, 1, SIZE, -1)
            return Linear(named(kernel, "kv_heads", "q_heads_per_group", "head_size", "embed"), None, ("embed",))
        if name in "kv":
            return Linear(named(kernel.reshape(HEADS, SIZE, -1), "kv_heads", "head_size", "embed"), None, ("embed",))
        return Linear(named(kernel, "out", "in"), None, ("in",))

    attention, mlp = ({name: linear(name) for name in names} for names in ("qkvo", ("gate", "up", "down")))
    return Layer((weights["norm"].size,), attention, mlp, named(weights["norm"], "embed"))


def levanter(params):
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(levanter_layer, params["layers"]))
    names = lambda x: NamedArray(x.array, (("layers", len(x.array)), *x.axes))  # noqa: E731
    stacked = jax.tree.map(names, stacked, is_leaf=lambda x: isinstance(x, NamedArray))
    layers = Stacked(stacked, ("layers", len(params["layers"])))
    return Transformer(named(params["embed"], "vocab", "embed"), layers, named(params["head"].T, "vocab", "embed"))


def levanter_step(params, x):
    weights = {name: params.self_attn[name].weight.array for name in "qkvo"}
    weights |= {name: linear.weight.array for name, linear in params.mlp.items()}
    turned = {name: w.reshape(-1, w.shape[-1]).T for name, w in weights.items() if name != "o"}
    return layer({**turned, "o": weights["o"].reshape(x.shape[-1], -1).T, "norm": params.input_layernorm.array}, x)


def levanter_model(params):
    stages = (
        tv.Stage("embed", lambda p, x: p["w"].array[x], (("w", "embeddings"),)),
        tv.Stage("layers", tv.scanned(levanter_step), (("", "layers/stacked"),)),
        tv.Stage("head", lambda p, x: x @ p["w"].array.T, (("w", "lm_head"),), fixed=("w/0",)),
    )
    return tv.Model(params, stages)


# -- EasyDeL and Bonsai: NNX, a list of layers -------------------------------------------------------------------------


def module(**leaves):
    return nnx.Dict(**{name: nnx.Param(leaf) for name, leaf in leaves.items()})


def easydel_layer(weights):
    attention = nnx.Dict(**{f"{name}_proj": module(kernel=weights[name]) for name in "qkvo"})
    mlp = nnx.Dict(**{f"{name}_proj": module(kernel=weights[name]) for name in ("gate", "up", "down")})
    return nnx.Dict(self_attn=attention, mlp=mlp, input_layernorm=module(kernel=weights["norm"]))


def bonsai_layer(weights):
    """Einsum kernels ``[D, N, H]`` and ``[N, H, D]``."""
    attention = {f"{name}_proj": module(w=weights[name].reshape(-1, HEADS, SIZE)) for name in "qkv"}
    attention["o_proj"] = module(w=weights["o"].reshape(HEADS, SIZE, -1))
    mlp = nnx.Dict(**{f"{name}_proj": module(kernel=weights[name]) for name in ("gate", "up", "down")})
    return nnx.Dict(attn=nnx.Dict(**attention), mlp=mlp, input_layernorm=module(w=weights["norm"]))


def nnx_step(params, x):
    attention = params["self_attn"] if "self_attn" in params else params["attn"]
    leaf = lambda module: next(iter(module.values()))[...]  # noqa: E731
    weights = {name: leaf(attention[f"{name}_proj"]) for name in "qkvo"}
    weights = {name: w.reshape((-1, w.shape[-1]) if name == "o" else (w.shape[0], -1)) for name, w in weights.items()}
    weights |= {name: leaf(params["mlp"][f"{name}_proj"]) for name in ("gate", "up", "down")}
    return layer({**weights, "norm": leaf(params["input_layernorm"])}, x)


def easydel(params):
    model = nnx.Dict(
        embed_tokens=module(embedding=params["embed"]), layers=nnx.List(map(easydel_layer, params["layers"]))
    )
    return nnx.state(nnx.Dict(model=model, lm_head=module(kernel=params["head"])))


def easydel_scanned(params):
    """The same with the layers stacked."""
    return tv.stack(easydel(params), "model/layers")


def bonsai(params):
    layers = nnx.List(map(bonsai_layer, params["layers"]))
    embedder = module(input_emb=params["embed"])
    return nnx.state(nnx.Dict(embedder=embedder, layers=layers, lm_head=module(w=params["head"])))


def nnx_model(table, layers, kernel, scanned=False):
    def model(params):
        count = len(tree.get(params, layers))
        blocks = [tv.Stage(f"layers/{i}", nnx_step, (("", f"{layers}/{i}"),), "layers") for i in range(count)]
        if scanned:
            blocks = [tv.Stage("layers", tv.scanned(nnx_step), (("", layers),))]
        embed = tv.Stage("embed", lambda p, x: p["w"][...][x], (("w", table),))
        head = tv.Stage("head", lambda p, x: x @ p["w"][...], (("w", kernel),), fixed=("w/value",))
        return tv.Model(params, (embed, *blocks, head))

    return model


CODES = {  # the tree, the model of it, and the path of the stack
    "levanter": (levanter, levanter_model, "layers/stacked"),
    "easydel": (easydel, nnx_model("model/embed_tokens/embedding", "model/layers", "lm_head/kernel"), None),
    "easydel scanned": (
        easydel_scanned,
        nnx_model("model/embed_tokens/embedding", "model/layers", "lm_head/kernel", scanned=True),
        "model/layers",
    ),
    "bonsai": (bonsai, nnx_model("embedder/input_emb", "layers", "lm_head/w"), None),
}


def plain_model(params):
    blocks = [tv.Stage(f"layers/{i}", layer, (("", f"layers/{i}"),), "layers") for i in range(len(params["layers"]))]
    embed = tv.Stage("embed", lambda p, x: p["w"][x], (("w", "embed"),))
    head = tv.Stage("head", lambda p, x: x @ p["w"], (("w", "head"),), fixed=("w",))
    return tv.Model(params, (embed, *blocks, head))


def close(found, expected, tolerance=1e-6):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for path, leaf in tree.flatten(expected).items():
        atol = tolerance * float(jnp.abs(leaf).max())
        np.testing.assert_allclose(tree.flatten(found)[path], leaf, rtol=0, atol=atol, err_msg=path)


@pytest.fixture(scope="module")
def batches():
    return [tv.Batch(jnp.asarray(np.random.default_rng(0).integers(0, WORDS, (24, 5)), jnp.int32))]


@pytest.fixture(scope="module")
def moved(batches):
    """What Theseus makes of the task vector between the plain models."""
    models, rebase = (plain_model(plain("source", 0)), plain_model(plain("target", 1))), tv.theseus(rank_tolerance=1e-3)
    return rebase.apply(tv.fit(rebase, *models, batches), plain("source", 2))


@pytest.mark.parametrize("code", CODES)
def test_arithmetic_and_stacks(code):
    make, _, stack = CODES[code]
    base, tuned = (plain("source", seed) for seed in (0, 2))
    tau = tv.task_vector(make(base), make(tuned))
    close(tau, make(jax.tree.map(jnp.subtract, tuned, base)))
    close(tv.apply(make(base), tau), make(tuned), 1e-5)
    close(tv.merge.ties([tau, tau], density=1.0), tau)
    if stack is not None:
        apart = tv.unstack(tau, stack)
        assert len(tree.get(apart, stack)) == DEPTHS["source"]
        close(tv.stack(apart, stack), tau, 0)


@pytest.mark.parametrize("code", CODES)
def test_a_transport_between_unlike_depths(code, moved, batches):
    make, model_of, stack = CODES[code]
    source, target = model_of(make(plain("source", 0))), model_of(make(plain("target", 1)))
    for model, side, seed in ((source, "source", 0), (target, "target", 1)):
        tokens = batches[0].inputs
        np.testing.assert_allclose(model(tokens), plain_model(plain(side, seed))(tokens), atol=2e-4)
    tau = make(plain("source", 2))
    if stack is not None:
        source, target, tau = (tv.unstack(each, stack) for each in (source, target, tau))
    rebase = tv.theseus(rank_tolerance=1e-3)
    found = rebase.apply(tv.fit(rebase, source, target, batches), tau)
    close(found if stack is None else tv.stack(found, stack), make(moved), 2e-3)
