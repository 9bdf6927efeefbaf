"""Every merge with what it keeps to, and small task vectors with every kind of leaf."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax import Batch, Model, Stage, merge, tree

KEY = jax.random.key(7)


@dataclasses.dataclass(frozen=True)
class Method:
    """A merge with the invariants that it declares.

    Attributes:
      merge: ``(taus, **options) -> tau``.
      one: options with which one vector of weight 1 is the identity; None: it is not.
      two: options with which two equal vectors are the identity; None: they are not.
      symmetric: the order of the vectors does not matter.
      zeros: a further zero vector changes nothing: in ``"all"`` leaves, in ``"matrices"``, or in none (None).
      traced: works inside `jit`.
      least: how many vectors it needs.
      most: how many it takes.
      tolerance: of float32 results that are computed in another order.
      settings: its options that are weights or shares, with values that are out of range.
    """

    merge: Callable[..., Any]
    one: dict[str, Any] | None = dataclasses.field(default_factory=dict)
    two: dict[str, Any] | None = None
    symmetric: bool = True
    zeros: str | None = None
    traced: bool = True
    least: int = 1
    most: int = 9
    tolerance: float = 1e-6
    settings: dict[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)


SHARE, FRACTION = (0.0, 1.5, -0.1), (1.0, -0.1)
VOTES = (-1.0, [0.0, 0.0, 0.0])
matrix = partial(Method, tolerance=2e-4)


def with_grams(taus, **options):
    def gram(number, leaf):
        rows = np.random.default_rng(number).normal(size=(40, int(np.prod(leaf.shape[:-1])))).astype(np.float32)
        return rows.T @ rows / 40

    flats = [tree.flatten(tau) for tau in taus]
    grams = [{path: gram(i, leaf) for path, leaf in flat.items() if np.ndim(leaf) == 2} for i, flat in enumerate(flats)]
    return merge.regmean(taus, grams, **options)


def narrow(params, rows):
    return (rows @ params["kernel"] + params["bias"])[:, :24]


def with_rows(taus, **options):
    """RegMean++ of a linear model of the two blocks, whose base is zero: so it scales with the vectors."""
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape), SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    model = Model(zeros, tuple(Stage(f"blocks/{i}", narrow, (("", f"blocks/{i}"),)) for i in range(2)))
    draw = lambda i: jnp.asarray(np.random.default_rng(i).normal(size=(40, 24)), jnp.float32)  # noqa: E731
    return merge.regmean_plus_plus(taus, model, [[Batch(draw(i))] for i in range(len(taus))], **options)


def with_fishers(taus, **options):
    def information(number, leaf):
        return np.random.default_rng(number).uniform(0.1, 1, np.shape(leaf)).astype(np.float32)

    fishers = [jax.tree.map(partial(information, i), tau) for i, tau in enumerate(taus)]
    return merge.fisher(taus, fishers, **options)


METHODS = {
    "average": Method(merge.average, two={}, settings={"weights": ([1.0, -1.0, 0.0], 0.0)}),
    "task_arithmetic": Method(merge.task_arithmetic, two={"weights": 0.5}, zeros="all", settings={"weights": ()}),
    "slerp": Method(
        merge.slerp, one=None, two={"t": 0.3}, least=2, most=2, tolerance=1e-5, settings={"t": FRACTION[1:] + (1.1,)}
    ),
    "slerp-vector": Method(partial(merge.slerp, scope="vector"), one=None, two={}, least=2, most=2, tolerance=1e-5),
    "nuslerp": Method(
        merge.nuslerp, one=None, two={}, least=2, most=2, tolerance=1e-5, settings={"weights": (-1.0, 0.0)}
    ),
    "multi_slerp": Method(merge.multi_slerp, two={}, tolerance=1e-5, settings={"weights": VOTES}),
    "karcher_mean": Method(merge.karcher_mean, two={}, tolerance=1e-5, settings={"weights": VOTES}),
    "karcher_mean-vector": Method(partial(merge.karcher_mean, scope="vector"), two={}, tolerance=1e-5),
    "ties": Method(
        merge.ties,
        one={"density": 1.0},
        two={"density": 1.0},
        zeros="all",
        traced=False,
        settings={"weights": VOTES, "density": SHARE},
    ),
    "ties-leaf": Method(
        partial(merge.ties, scope="leaf"), one={"density": 1.0}, two={"density": 1.0}, zeros="all",
        settings={"density": SHARE},
    ),
    "dare": Method(
        partial(merge.dare, key=KEY), one={"density": 1.0}, two={"density": 1.0, "weights": 0.5}, symmetric=False,
        zeros="all", settings={"density": SHARE, "weights": ()},
    ),
    "dare-ties": Method(
        partial(merge.dare, key=KEY, combine="ties", density=0.5), one={"density": 1.0}, two={"density": 1.0},
        symmetric=False, zeros="all", settings={"weights": VOTES},
    ),
    "della": Method(
        partial(merge.della, key=KEY), one={"density": 1.0, "epsilon": 0.0}, two={"density": 1.0, "epsilon": 0.0},
        symmetric=False, zeros="all", settings={"weights": VOTES, "density": (0.95, 0.05, *SHARE), "epsilon": (-0.1,)},
    ),
    "della-leaf": Method(
        partial(merge.della, key=KEY, combine="linear", ranked="leaf"), one={"density": 1.0, "epsilon": 0.0},
        symmetric=False, zeros="all",
    ),
    "breadcrumbs": Method(
        merge.breadcrumbs, one={"density": 1.0, "gamma": 0.0}, zeros="all",
        settings={"density": (*SHARE, 0.995), "gamma": (*FRACTION, 0.9), "weights": ()},
    ),
    "breadcrumbs-ties": Method(
        partial(merge.breadcrumbs, combine="ties", density=0.49), one={"density": 1.0, "gamma": 0.0}, zeros="all",
        settings={"weights": VOTES},
    ),
    "model_stock": Method(merge.model_stock, one=None, two={}, least=2, tolerance=1e-5),
    "model_stock-vector": Method(
        partial(merge.model_stock, scope="vector"), one=None, two={}, least=2, tolerance=1e-5
    ),
    "sce": Method(merge.sce, two={}, tolerance=1e-5, settings={"density": SHARE}),
    "tsv_m": matrix(merge.tsv_m, settings={"weights": ()}),
    "iso_c": matrix(merge.iso_c, one=None, zeros="matrices", settings={"weights": ()}),
    "iso_cts": matrix(merge.iso_cts, one=None, settings={"weights": ()}),
    "wudi": matrix(merge.wudi, zeros="matrices", settings={"weights": ()}),
    "ace": matrix(
        partial(merge.ace, epsilon=0.0, balance=False), one=None, zeros="matrices", settings={"weights": ()},
    ),
    "lines": Method(merge.lines, two={"merge": merge.average}, tolerance=1e-5),
    "svc": matrix(merge.svc, two={"merge": merge.average}),
    "knots": matrix(
        partial(merge.knots, merge=merge.task_arithmetic), zeros="all", traced=False,
    ),
    "core_space": Method(partial(merge.core_space, merge=merge.task_arithmetic), two=None, zeros="all"),
    "regmean": matrix(with_grams, symmetric=False, two={}, settings={"weights": ()}),
    "regmean_plus_plus": matrix(with_rows, symmetric=False, two={}),
    "fisher": Method(with_fishers, symmetric=False, two={}, tolerance=1e-5, settings={"weights": ()}),
}  # fmt: skip
SHAPES = {
    "blocks": [{"kernel": (24, 40), "bias": (40,)}, {"kernel": (24, 40), "bias": (40,)}],
    "patch": {"kernel": (3, 3, 2, 40), "frozen": None},
    "norm": (40,),
    "logit_scale": (),
}


def random_taus(count, seed=0):
    """Task vectors with something in common."""
    random = np.random.default_rng(seed)

    def noise():
        draw = lambda shape: 1e-2 * random.standard_t(4, shape)  # noqa: E731
        return jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))

    common = noise()
    return [jax.tree.map(lambda x, y: jnp.asarray(x + y, jnp.float32), common, noise()) for _ in range(count)]


def pytest_generate_tests(metafunc):
    if "method" in metafunc.fixturenames and metafunc.module.__name__.endswith("test_contract"):
        metafunc.parametrize("method", METHODS.values(), ids=METHODS)


@pytest.fixture
def methods():
    return METHODS


@pytest.fixture
def taus(request):
    """Three random task vectors, or as many as the method takes."""
    return random_taus(min(3, request.getfixturevalue("method").most if "method" in request.fixturenames else 3))


@pytest.fixture
def close():
    """Asserts that two trees are equal up to a share of each leaf's largest entry."""

    def compare(found, expected, tolerance=1e-6, paths=None):
        found, expected = tree.flatten(found), tree.flatten(expected)
        assert found.keys() == expected.keys()
        for path in expected if paths is None else paths:
            size = np.max(np.abs(expected[path]), initial=1e-30)
            np.testing.assert_allclose(found[path], expected[path], rtol=0, atol=tolerance * size, err_msg=path)

    return compare
