"""Transports over meshes: the numbers of one device, lying like the target's leaves, nothing whole on every device.

Every method of the registry, and those that are made from Python alone, meet every mesh with both kinds of axes; what
shares their programs (a chain, maps of low rank or whitened) one mesh. (Explicit axes are automatic inside: what is
compiled for a mesh serves both. Another context is another compilation, and is met by the chain, which has links of
every kind.)
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import tvjax.transport
from tests.mesh.conftest import AXES, KINDS, Spread, mesh_of
from tvjax import Batch, LowRank, bico, chain, factors, fit, gradfix, scale_by, theseus, transfusion, tree
from tvjax.align import procrustes, solving
from tvjax.align.permutations import Row, Symmetry
from tvjax.align.solving import Problem, solve
from tvjax.checkpoints import TransportStore, load_state, save_state
from tvjax.spread import spread_out
from tvjax.stages import Model, Stage
from tvjax.transport import State, make_transport, methods, place
from tvjax.transport.plan import plan

TABLE = Symmetry(
    (
        Row("block/scale", (None,)),
        Row("block/up/kernel", (None, "hidden")),
        Row("block/up/bias", ("hidden",)),
        Row("block/down/kernel", ("hidden", None)),
        Row("head/kernel", (None, None)),
    )
)
CUT = {"rank_tolerance": 1e-3}  # a direction at the default's edge moves with the order of a sum
OPTIONS = {"theseus": CUT, "bico": CUT, "ariadne": {**CUT, "ridge": 0.1}}
TRANSPORTS = {
    **{name: make_transport(name, OPTIONS.get(name, {})) for name in methods()},
    "transfusion": transfusion(TABLE, key=jax.random.key(0)),
    "whitened": theseus(method="polar", whiten=0.25, **CUT),
    "low rank": theseus(rank=5, **CUT),
    "chain": chain(bico(**CUT), gradfix(), scale_by(1.5)),
}
WIDTHS = dict.fromkeys(("theseus", "bico", "ariadne", "whitened", "low rank", "chain"), 32)  # of wider targets
WIDTH = 16


def block(params, x):
    normed = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * params["scale"]
    hidden = jax.nn.gelu(normed @ params["up"]["kernel"] + params["up"]["bias"])
    return x + hidden @ params["down"]["kernel"]


def head(params, x):
    return jnp.mean(x, 1) @ params["kernel"]


def loss(_, outputs, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(outputs), labels[:, None], 1)[:, 0]


def make_params(seed, width, scale=0.3):
    random = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(scale * random.normal(size=shape), jnp.float32)

    return {
        "block": {
            "scale": 1 + normal(width),
            "up": {"kernel": normal(width, width), "bias": normal(width)},
            "down": {"kernel": normal(width, width)},
        },
        "head": {"kernel": normal(width, 8)},
    }


def make_model(params):
    stages = Stage("block", block, (("", "block"),)), Stage("head", head, (("", "head"),), fixed=("kernel",))
    return Model(params, stages, loss)


def make_batch(width):
    random = np.random.default_rng(7)
    rows = random.normal(size=(8, 6, 32))[..., :width]
    return Batch(jnp.asarray(rows, jnp.float32), jnp.asarray(random.integers(0, 8, 8), jnp.int32))


def make(name):
    """Source, target, batches and a task vector of the source, all on one device."""
    width = WIDTHS.get(name, WIDTH)
    models = make_model(make_params(0, WIDTH)), make_model(make_params(1, width))
    return *models, [(make_batch(WIDTH), make_batch(width))], make_params(2, WIDTH, 1e-2)


def fitted_with(name, tau):
    """The task vector, where the transport is fitted with one."""
    return tau if TRANSPORTS[name].needs_task_vector else None


@functools.cache
def on_one_device(name):
    source, target, batches, tau = make(name)
    state = fit(TRANSPORTS[name], source, target, batches, tau=fitted_with(name, tau))
    return jax.tree.map(np.asarray, TRANSPORTS[name].apply(state, tau))


class Case(NamedTuple):
    """Models, batches and a task vector over a mesh, and what a fit on them gave.

    Attributes:
      problems: the arrays of each decomposition of the fit.
      whole: shapes of matrices that lay on every device, though the mesh cuts leaves, when a stage was fitted.
    """

    spread: Spread
    source: Model
    target: Model
    batches: list
    tau: dict
    state: State
    problems: list
    whole: list


@functools.cache
def fitted(axes, kind, name):
    spread = Spread(mesh_of(axes, "explicit" if kind == "context" else kind), kind == "context")
    problems, whole = [], []

    def watched(mesh, found):
        problems.extend(found)
        return one_each(mesh, found)

    def look(*_):
        names = spread.mesh.axis_names  # arrays of other meshes are those of other cases
        arrays = [x for x in jax.live_arrays() if x.ndim > 1 and len(x.sharding.device_set) == 8]
        arrays = [x for x in arrays if getattr(x.sharding, "mesh", spread.mesh).axis_names == names != ("data",)]
        whole.extend(x.shape for x in arrays if x.is_fully_replicated)

    one_each = solving._one_each
    with spread.context(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(solving, "_one_each", watched)
        source, target, batches, tau = make(name)
        source, target = (m.replace(params=spread.params(m.params)) for m in (source, target))
        batches, tau = spread.rows(batches), spread.params(tau)
        state = fit(TRANSPORTS[name], source, target, batches, tau=fitted_with(name, tau), progress=look)
    return Case(spread, source, target, batches, tau, state, problems, whole)


ON_ONE_MESH = {"whitened": "three", "low rank": "three", "chain": "fsdp"}
CASES = [
    (axes, kind, name) for name in TRANSPORTS for axes in AXES for kind in KINDS if ON_ONE_MESH.get(name, axes) == axes
] + [("three", "context", "chain")]


def test_every_transport_is_here():
    """What is public and makes a transport is here; a method that is registered is, by its name."""
    makers = {
        name
        for name in tvjax.transport.__all__
        if getattr(getattr(tvjax.transport, name), "__annotations__", {}).get("return") == "Transport"
    }
    links = {link.name for transport in TRANSPORTS.values() for link in transport.links}
    assert makers - {"chain", "make_transport", "identity"} <= links and {"naive", *methods()} <= links


@pytest.mark.parametrize(("axes", "kind", "name"), CASES)
def test_the_numbers_of_one_device_where_the_target_lies(axes, kind, name, alike):
    case = fitted(axes, kind, name)
    with case.spread.context():
        moved = TRANSPORTS[name].apply(case.state, case.tau)
    alike(moved, on_one_device(name), like=case.target.params, tolerance=1e-3)
    assert jax.tree.structure(moved) == jax.tree.structure(case.target.params)


@pytest.mark.parametrize(("axes", "kind", "name"), CASES)
def test_nothing_fitted_is_whole_on_every_device(axes, kind, name, bytes_per_device):
    case = fitted(axes, kind, name)
    leaves = tree.flatten(case.target.params)
    for part in case.state.parts:
        for path, array in part.arrays.items():
            if path in leaves:
                assert array.sharding == leaves[path].sharding, path
    maps = [x for part in case.state.parts for path, x in part.arrays.items() if path not in leaves]
    for arrays in (maps, case.problems):
        large = [x for x in jax.tree.leaves(arrays) if x.ndim > 1]
        if large:
            assert bytes_per_device(large) <= 1.3 * sum(x.nbytes for x in large) / 8
    assert bool(case.problems) == (WIDTHS.get(name) is not None) and not case.whole
    types = {x.sharding.mesh.axis_types for x in jax.tree.leaves(maps)}
    assert types <= {case.spread.mesh.axis_types}


@pytest.mark.parametrize(
    ("kind", "name"), [("automatic", "theseus"), ("explicit", "theseus"), ("explicit", "ariadne"), ("context", "chain")]
)
def test_a_stream_is_moved_as_by_its_state(kind, name, alike):
    case = fitted("three", kind, name)
    with case.spread.context():
        moved = fit(TRANSPORTS[name], case.source, case.target, case.batches, stream=[case.tau])[0]
    alike(moved, on_one_device(name), like=case.target.params, tolerance=1e-3)


def test_inside_jit_results_have_the_types_of_the_target(alike):
    case = fitted("three", "context", "chain")
    with case.spread.context():
        moved = jax.jit(TRANSPORTS["chain"].apply)(case.state, case.tau)
    alike(moved, on_one_device("chain"), like=case.target.params, tolerance=1e-3)
    types, wanted = (jax.tree.map(lambda x: jax.typeof(x).sharding, t) for t in (moved, case.target.params))
    assert types == wanted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rescale", (False, True))
def test_leaves_of_low_rank_stay_so(rescale, kind, alike):
    case, transport = fitted("three", kind, "theseus"), theseus(rescale=rescale, **CUT)
    random, decomposed = np.random.default_rng(3), []
    sides = [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((WIDTH, 2), (2, WIDTH))]

    def move(kernel):
        return transport.apply(case.state, {"block": {"up": {"kernel": kernel}}})["block"]["up"]["kernel"]

    def watched(columns):
        decomposed.append(len(columns.sharding.device_set))
        return triangle(columns)

    triangle = factors._triangle
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factors, "_triangle", watched)
        moved = move(LowRank(*map(case.spread.params, sides)))
    dense = move(case.spread.params(sides[0] @ sides[1]))
    assert moved.rank == 2 and decomposed == [1] * 4 * rescale
    alike({"kernel": jnp.asarray(moved)}, {"kernel": dense}, tolerance=1e-4)
    rows, columns = case.target.params["block"]["up"]["kernel"].sharding.spec
    assert moved.left.sharding.spec == PartitionSpec(rows) and moved.right.sharding.spec == PartitionSpec(None, columns)


def test_a_state_of_another_mesh(alike, tmp_path):
    case = fitted("three", "automatic", "theseus")
    transport, expected = TRANSPORTS["theseus"], on_one_device("theseus")
    save_state(tmp_path / "state.safetensors", case.state)
    assert load_state(tmp_path / "state.safetensors").notes[-1:] == ("fitted on the mesh (data=2, fsdp=2, tensor=2)",)
    half = Spread(jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4]))
    _, target, _, tau = make("theseus")
    params = half.params(target.params)
    for state in (case.state, load_state(tmp_path / "state.safetensors")):
        there = place(state, params)
        assert "fsdp=4" in there.notes[-1] and there.notes[:-1] == state.notes
        alike(transport.apply(there, half.params(tau)), expected, like=params, tolerance=1e-3)
    with pytest.warns(UserWarning, match="lies on other devices than the state"):
        moved = transport.apply(case.state, half.params(tau))
    alike(moved, expected, like=case.target.params, tolerance=1e-3)
    one = place(case.state, target.params)
    assert "resharded onto one device" in one.notes[-1]
    alike(transport.apply(one, tau), expected, tolerance=1e-3)


def test_a_source_elsewhere_is_brought_to_the_target(alike):
    case = fitted("three", "automatic", "orthogonal_shift")
    source, _, _, tau = make("orthogonal_shift")
    other = source.replace(params=jax.device_put(source.params, jax.devices()[3]))
    state = fit(TRANSPORTS["orthogonal_shift"], other, case.target)
    assert any("the source lay on other devices" in note for note in state.notes)
    expected = on_one_device("orthogonal_shift")
    alike(TRANSPORTS["orthogonal_shift"].apply(state, tau), expected, like=case.target.params)


def test_what_a_cache_held_is_spread(alike, tmp_path):
    source, target, batches, tau = make("theseus")
    case = fitted("three", "automatic", "theseus")
    for models in ((source, target, batches), (case.source, case.target, case.batches)):
        state = fit(TRANSPORTS["theseus"], *models, cache=TransportStore(tmp_path / "maps", {"test": "one"}))
    assert any("what the cache held is spread" in note for note in state.notes)
    assert jax.tree.map(lambda x: x.sharding, state.parts[0].arrays) == jax.tree.map(
        lambda x: x.sharding, case.state.parts[0].arrays
    )
    alike(
        TRANSPORTS["theseus"].apply(state, case.tau), on_one_device("theseus"), like=case.target.params, tolerance=1e-3
    )


def test_a_plan_says_what_a_device_holds(bytes_per_device):
    for case in (fitted("three", "automatic", "theseus"), fitted("three", "context", "chain")):
        name = "theseus" if len(case.state.parts) == 1 else "chain"
        with case.spread.context():
            found = plan(TRANSPORTS[name], case.source, case.target, case.batches)
        held = found.on_device
        assert held["parameters"] == bytes_per_device(case.source.params, case.target.params)
        assert held["maps"] == bytes_per_device([part.arrays for part in case.state.parts])
        assert 0 < held["moments"] < found.memory["largest stage"] / 4
        assert held["residual streams"] < found.memory["residual streams"] / 3.9  # rows lie over data and fsdp
        assert held["decomposition"] >= 4 * WIDTH * 32
    assert plan(TRANSPORTS["theseus"], *make("theseus")[:3]).on_device == {}


def test_problems_are_solved_without_communication():
    mesh = mesh_of("three", "automatic")
    random = np.random.default_rng(0)
    moments = [jnp.asarray(random.normal(size=(16, 24)), jnp.float32) for _ in range(9)]  # one more than devices
    problems = [Problem(_polar, (), (spread_out(mesh, moment),)) for moment in moments]
    texts = []
    inner = solving._solve_own

    def watched(*args):
        texts.append(inner.lower(*args).compile().as_text())
        return inner(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solving, "_solve_own", watched)
        found = solve(problems, mesh)
    for moment, rotation_found in zip(moments, found, strict=True):
        for one, other in zip(_polar(moment), rotation_found, strict=True):
            np.testing.assert_array_equal(one, other)
    assert not any(name in text for text in texts for name in ("all-reduce", "all-gather", "all-to-all", "permute("))


@jax.jit
def _polar(moment):
    return procrustes.polar(moment)
