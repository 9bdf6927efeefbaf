"""Tiny CLIP vision towers, and a second, independent implementation of them that shows what every layer sees."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax import Batch, bico, chain, fit, gradfix, identity, orthogonal_shift, scale_by, theseus, transfusion, tree
from tvjax.models.clip import CLIPConfig, CLIPVisionConfig, clip, init
from tvjax.models.symmetry import symmetry_of_config

CLASSES = 5


def make_config(width=16, depth=2, image=8, embedding=6):
    vision = CLIPVisionConfig(width, 2 * width, depth, 2, image_size=image, patch_size=4, projection_dim=embedding)
    return CLIPConfig(vision, None)


def noise_like(params, seed, size):
    """Normal numbers in the structure of the parameters, float32."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jax.device_put(np.float32(size * random.normal(size=leaf.shape))), params)


def cross_entropy(classifier, outputs, labels):
    scores = jax.nn.log_softmax(4 * outputs["image"] @ classifier)
    return -jnp.take_along_axis(scores, labels[:, None], 1)[:, 0]


def random_params(config, seed):
    """No bias is zero, no scale one, and attention is not uniform."""
    params = noise_like(jax.eval_shape(lambda: init(config, jax.random.key(0))), seed, 0.4)
    return tree.map_with_path(lambda path, leaf: 1 + leaf if path.endswith("scale") else leaf, params)


def make_model(config, seed):
    params = random_params(config, seed)
    classifier = np.random.default_rng(7).normal(size=(config.vision.projection_dim, CLASSES))
    return clip(config, params).with_loss(cross_entropy, jnp.asarray(classifier, jnp.float32))


def make_batches(count=2, size=8, image=8, seed=0):
    random = np.random.default_rng(seed)
    return [
        Batch(
            {"pixels": jnp.asarray(random.normal(size=(size, image, image, 3)), jnp.float32)},
            jnp.asarray(random.integers(0, CLASSES, size), jnp.int32),
        )
        for _ in range(count)
    ]


def forward(params, pixels, taps, heads=2, patch=4, eps=1e-5):
    """The vision tower written out, `taps` added to what each layer returns: (embedding, {layer: (x, y)})."""
    seen = {}

    def record(name, x, y):
        y = y + taps[name] if name in taps else y
        seen[name] = x, y
        return y

    def dense(name, x):
        p = tree.get(params, name)
        return record(name, x, x @ p["kernel"] + p.get("bias", jnp.float32(0)))

    def norm(name, x):
        p = tree.get(params, name)
        x = x - x.mean(-1, keepdims=True)
        x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + eps)
        return record(name, x, x * p["scale"] + p["bias"])

    embeddings = params["vision"]["embeddings"]
    n, side = pixels.shape[0], pixels.shape[1] // patch
    patches = pixels.reshape(n, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5).reshape(n, side**2, -1)
    kernel = embeddings["patch"]["kernel"]
    width = kernel.shape[-1]
    hidden = record("vision/embeddings/patch", patches, patches @ kernel.reshape(-1, width))
    first = jnp.broadcast_to(embeddings["class_token"], (n, 1, width))
    hidden = norm("vision/pre_norm", jnp.concatenate([first, hidden], 1) + embeddings["positions"])
    for i in range(len(params["vision"]["blocks"])):
        block = f"vision/blocks/{i}"
        x = norm(f"{block}/norm1", hidden)
        q, k, v = (
            dense(f"{block}/attention/{part}", x).reshape(n, -1, heads, width // heads)
            for part in ("query", "key", "value")
        )
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(jnp.float32(width // heads)))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(hidden.shape)
        hidden = hidden + dense(f"{block}/attention/out", mixed)
        up = dense(f"{block}/mlp/up", norm(f"{block}/norm2", hidden))
        hidden = hidden + dense(f"{block}/mlp/down", up * jax.nn.sigmoid(1.702 * up))
    return dense("vision/projection", norm("vision/post_norm", hidden[:, 0])), seen


def naive_loss(params, taps, classifier, batch):
    embedding, seen = forward(params, batch.inputs["pixels"], taps)
    return cross_entropy(classifier, {"image": embedding}, batch.labels).sum(), seen


_by_taps = jax.jit(jax.grad(naive_loss, 1, has_aux=True))
_by_params = jax.jit(jax.grad(naive_loss, 0, has_aux=True))


def naive_gradient(model, batch):
    """`jax.grad` of the summed loss of a batch through the written-out tower, by path."""
    return tree.flatten(_by_params(model.params, {}, model.loss_params, batch)[0])


def observations(model, batches):
    """For each layer the rows ``x``, ``y`` and ``g`` over all batches, float64."""
    found = {}
    for batch in batches:
        shapes = jax.eval_shape(lambda p, b: forward(p, b, {})[1], model.params, batch.inputs["pixels"])
        taps = {name: jnp.zeros(y.shape, y.dtype) for name, (_, y) in shapes.items()}
        gradients, seen = _by_taps(model.params, taps, model.loss_params, batch)
        for name, (x, y) in seen.items():
            rows = [np.asarray(a, np.float64).reshape(-1, a.shape[-1]) for a in (x, y, gradients[name])]
            found.setdefault(name, []).append(rows)
    return {
        name: dict(zip("xyg", map(np.concatenate, zip(*rows, strict=True)), strict=True))
        for name, rows in found.items()
    }


def polar(rows_a, rows_b, center=False, tolerance=1e-3):
    """``U V^T`` of ``H_A^T H_B`` over the singular values above the tolerance, in proportion from half of it on."""
    if center:
        rows_a, rows_b = rows_a - rows_a.mean(0), rows_b - rows_b.mean(0)
    u, s, vt = np.linalg.svd(rows_a.T @ rows_b, full_matrices=False)
    return (u * np.clip(2 * s / (tolerance * s[0]) - 1, 0, 1)) @ vt


def projector(rows, tolerance=1e-4):
    """Onto the span of some rows, the polar factor of ``H^T H``; partly where that is at its edge."""
    return polar(rows, rows, tolerance=tolerance)


def move(tau, maps, fixed=()):
    """The task vector moved by explicit maps ``maps(layer) -> (R_in, R_out)``; leaves without an input are zero."""
    moved = {}
    for path, leaf in tree.flatten(tau).items():
        layer, _, kind = path.rpartition("/")
        leaf = np.asarray(leaf, np.float64)
        if layer.startswith("vision/embeddings"):
            moved[path] = None
            continue
        inner, outer = maps(layer)
        outer = np.eye(leaf.shape[-1]) if layer in fixed else outer
        if kind == "kernel":
            moved[path] = inner.T @ leaf @ outer
        elif kind == "bias":
            moved[path] = leaf @ outer
        else:
            moved[path] = (inner * outer).T @ leaf
    return moved


def assert_moved(found, expected, tolerance=2e-3):
    """Leaf by leaf, relative to the largest entry; leaves expected to be None must be zero."""
    found = tree.flatten(found)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        if leaf is None:
            assert not np.any(found[path]), path
        else:
            error = np.abs(np.asarray(found[path]) - leaf).max() / np.abs(leaf).max()
            assert error < tolerance, f"{path}: off by {error:.2g} of its largest entry"


@pytest.fixture(scope="session")
def tiny():
    """Models A, B (same shape), W (wider), D (deeper), calibration batches, a task vector of A, and the naive tools."""
    a, b = (make_model(make_config(), seed) for seed in (0, 1))
    return SimpleNamespace(
        a=a,
        b=b,
        w=make_model(make_config(width=24), 2),
        d=make_model(make_config(depth=3), 3),
        batches=make_batches(),
        tau=noise_like(a.params, 11, 0.1),
        make_config=make_config,
        make_model=make_model,
        random_params=random_params,
        make_batches=make_batches,
        noise_like=noise_like,
        observations=observations,
        naive_gradient=naive_gradient,
        polar=polar,
        projector=projector,
        move=move,
        assert_moved=assert_moved,
    )


# A tolerance far above rounding, so that no direction stands on the edge of being kept.
TRANSPORTS = {
    "theseus": theseus(rank_tolerance=1e-3),
    "bico": bico(rank_tolerance=1e-3),
    "bico gradients": bico(input="gradients", rank_tolerance=1e-3),
    "gradfix": gradfix(),
    "orthogonal_shift": orthogonal_shift(),
    "transfusion": transfusion(symmetry_of_config(make_config()), key=jax.random.key(0)),
    "identity": identity(),
    "scale_by": scale_by(1.5),
    "theseus+gradfix": chain(theseus(rank_tolerance=1e-3), gradfix(), scale_by(2.0)),
    "bico+gradfix": chain(bico(rank_tolerance=1e-3), gradfix(mode="tanh")),
    "scale_by+theseus": chain(scale_by(0.5), theseus(rank_tolerance=1e-3)),
}


@pytest.fixture(params=TRANSPORTS)
def name(request):
    """Every transport in turn."""
    return request.param


@pytest.fixture(scope="session")
def fitted(tiny):
    """By name: a transport, and its state from A to B, fitted once."""
    states = {}

    def get(name):
        if name not in states:
            states[name] = fit(TRANSPORTS[name], tiny.a, tiny.b, tiny.batches)
        return TRANSPORTS[name], states[name]

    return get
