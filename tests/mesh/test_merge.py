"""Every merge over meshes: the numbers of one device, each leaf lying like that of the first vector."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax import merge

SHAPES = {"0": {"kernel": (16, 24), "bias": (24,)}, "down": {"kernel": (24, 16)}, "stack": (2, 8, 16), "scale": ()}
LETTERS = {"0/kernel": "io", "down/kernel": "io", "stack": "lio"}
INNER = dict.fromkeys(("knots", "core_space", "lines", "svc"), merge.task_arithmetic)


def vectors(count, seed=0):
    random = np.random.default_rng(seed)
    draw = lambda shape: jnp.asarray(1e-2 * random.normal(size=shape), jnp.float32)  # noqa: E731
    return [jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple)) for _ in range(count)]


def arguments_of(name, count):
    """What a merge takes beside the vectors."""
    if name == "regmean":
        rows = np.random.default_rng(1).normal(size=(count, 40, 16)).astype(np.float32)
        return ([{"0/kernel": jnp.asarray(x.T @ x)} for x in rows],)
    return ([jax.tree.map(jnp.square, tau) for tau in vectors(count, 2)],) if name == "fisher" else ()


def merged(name, taus, *arguments):
    function = {**merge.merges(), "regmean": merge.regmean, "fisher": merge.fisher}[name]
    parameters = inspect.signature(function).parameters
    options = {"matrices": LETTERS, "key": jax.random.key(3), "merge": INNER.get(name)}
    return function(taus, *arguments, **{key: value for key, value in options.items() if key in parameters})


def placed_and_expected(name, spread):
    count = 2 if name in ("slerp", "nuslerp") else 3
    taus, others = vectors(count), arguments_of(name, count)
    return [spread.params(tau) for tau in taus], spread.params(others), lambda: merged(name, taus, *others)


@pytest.mark.parametrize("name", [*merge.merges(), "regmean", "fisher"])
def test_every_merge(name, alike, spread_of):
    """One compilation for both kinds: explicit axes are automatic inside."""
    expected = None
    for kind in ("automatic", "explicit"):
        taus, others, on_one = placed_and_expected(name, spread_of("three", kind))
        expected = on_one() if expected is None else expected
        found = merged(name, taus, *others)
        alike(found, expected, taus[0], 2e-4)


@pytest.mark.parametrize("name", ("ties", "slerp", "iso_c", "knots", "regmean"))
def test_in_the_context_of_a_mesh(name, alike, spread_of):
    spread = spread_of("three", "explicit")
    taus, others, on_one = placed_and_expected(name, spread)
    expected = on_one()
    with jax.set_mesh(spread.mesh):
        alike(merged(name, taus, *others), expected, taus[0], 2e-4)
