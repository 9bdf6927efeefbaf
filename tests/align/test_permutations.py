"""The symmetry table, permutations that it derives, and matching by weights."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax import tree
from tvjax.align.permutations import (
    Row,
    Symmetry,
    axes,
    groups,
    index,
    invert,
    permutation_names,
    permute,
    random_permutations,
)
from tvjax.align.weight_matching import match_weights

# Every kind of leaf: convolution, scalar, biases, matrices, two-level axes of unlike size, and no leaf that fixes the
# places of the stream but by its values.
TABLE = Symmetry(
    (
        Row("temperature", ()),
        Row("conv/kernel", (None, None, None, "stream")),
        Row("stem/bias", ("stream",)),
        Row("layers/{i}/query", ("stream", "layers/{i}/heads:qk")),
        Row("layers/{i}/query_bias", ("layers/{i}/heads:qk",)),
        Row("layers/{i}/value", ("stream", "layers/{i}/heads:vo")),
        Row("layers/{i}/out", ("layers/{i}/heads:vo", "stream")),
        Row("layers/{i}/up", ("stream", "layers/{i}/hidden")),
        Row("layers/{i}/down", ("layers/{i}/hidden", "stream")),
        Row("read", ("stream", None)),
    ),
    {"layers/{i}/heads": 3},
)


def make_params(seed, width=12, hidden=10, layers=2):
    random = np.random.default_rng(seed)

    def normal(*shape):
        return jax.device_put(np.float32(random.normal(size=shape)))

    def layer():
        return {
            "query": normal(width, 6),
            "query_bias": normal(6),
            "value": normal(width, 15),
            "out": normal(15, width),
            "up": normal(width, hidden),
            "down": normal(hidden, width),
        }

    return {
        "temperature": normal(),
        "conv": {"kernel": normal(2, 2, 3, width)},
        "stem": {"bias": normal(width)},
        "layers": {str(i): layer() for i in range(layers)},
        "read": normal(width, 4),
    }


def inner_product(a, b):
    a, b = tree.flatten(a), tree.flatten(b)
    return sum(
        float((np.asarray(a[p], np.float64) * np.asarray(b[p], np.float64)).sum()) for p in a if p != "temperature"
    )


def assert_equal(found, expected):
    found, expected = tree.flatten(found), tree.flatten(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        assert found[path].dtype == leaf.dtype, path
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


def assert_permutations_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, order in expected.items():
        assert order.dtype == jnp.int32
        np.testing.assert_array_equal(found[name], order, err_msg=name)


# -- the table ------------------------------------------------------------------------------------------------------


def test_groups_hold_every_axis_that_runs_over_them():
    found = groups(TABLE, make_params(0))
    assert set(found) == {"stream", *(f"layers/{i}/{kind}" for i in (0, 1) for kind in ("heads", "hidden"))}
    heads = found["layers/1/heads"]
    assert (heads.heads, heads.sizes) == (3, {"qk": 6, "vo": 15})
    assert {(use.path, use.axis, use.units) for use in heads.uses} == {
        ("layers/1/query", 1, "qk"),
        ("layers/1/query_bias", 0, "qk"),
        ("layers/1/value", 1, "vo"),
        ("layers/1/out", 0, "vo"),
    }
    assert len(found["stream"].uses) == 3 + 2 * 5
    assert found["stream"].heads == 0


def test_names_of_permutations():
    assert permutation_names(axes(TABLE, "layers/7/out", 2)) == ["layers/7/heads", "layers/7/heads:vo", "stream"]
    assert permutation_names(axes(TABLE, "temperature", 0)) == []


@pytest.mark.parametrize(
    ("rows", "heads", "message"),
    [
        ([Row("a", (None, "g"))], {}, "it has no row for\n  b\n"),
        ([Row("a", ("g",)), Row("b", ("g",))], {}, "a has 2 axes, its row 'a' of the symmetry table names 1"),
        ([Row("{x}", (None, "g")), Row("b", ("g",))], {}, "b is covered by 2 rows: {x}, b"),
        ([Row("a", ("g", None)), Row("b", ("g",))], {}, "axis 0 of a, of length 3, and to axis 0 of b, of length 4"),
        ([Row("a", (None, "g:u")), Row("b", ("g:u",))], {"g": 3}, "axis 1 of a has 4 units, which 3 heads"),
        ([Row("a", (None, "g:u")), Row("b", ("g:u",))], {}, "a: the axis 'g:u' must be"),
        ([Row("a", (None, "g")), Row("b", ("g",))], {"g": 2}, "a: the axis 'g' must be"),
        ([Row("a", ("g:u", "g:v")), Row("b", (None,))], {"g": 1}, "a: a group may stand on one axis"),
        ([Row("a", (None, "g{i}")), Row("b", (None,))], {}, "the axis 'g{i}' of the row 'a' names ['i']"),
    ],
)
def test_a_table_that_does_not_fit_says_where(rows, heads, message):
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones(4)}
    with pytest.raises(ValueError) as error:
        groups(Symmetry(tuple(rows), heads), params)
    assert message in str(error.value)


def test_a_key_that_stands_twice_in_a_path_is_one_key():
    table = Symmetry((Row("{i}/to/{i}", ("g{i}",)), Row("{i}/to/{j}", (None,))))
    assert axes(table._replace(rows=table.rows[:1]), "3/to/3", 1) == ("g3",)
    assert axes(table, "3/to/4", 1) == (None,)


def test_a_fixed_group_stays():
    params = make_params(0)
    held = TABLE._replace(fixed=("stream", "layers/{i}/heads"))
    assert axes(held, "layers/0/query", 2) == (None, None)
    assert axes(held, "layers/0/up", 2) == (None, "layers/0/hidden")
    assert set(groups(held, params)) == {"layers/0/hidden", "layers/1/hidden"}
    true = random_permutations(held, params, jax.random.key(0))
    found = match_weights(held, params, permute(held, true, params), key=jax.random.key(0))
    assert_permutations_equal(found.permutations, true)


# -- permutations ---------------------------------------------------------------------------------------------------


def test_permuting_moves_units_as_written():
    params = make_params(0, layers=1)
    random = np.random.default_rng(1)
    found = random_permutations(TABLE, params, jax.random.key(0))
    chosen = {
        "stream": random.permutation(12),
        "layers/0/heads": np.array([2, 0, 1]),
        "layers/0/heads:qk": np.array([[1, 0], [0, 1], [1, 0]]),
        "layers/0/heads:vo": np.array([[4, 3, 2, 1, 0], [0, 1, 2, 3, 4], [1, 2, 3, 4, 0]]),
        "layers/0/hidden": random.permutation(10),
    }
    assert {name: order.shape for name, order in found.items()} == {n: order.shape for n, order in chosen.items()}
    moved = permute(TABLE, {name: jnp.asarray(order, jnp.int32) for name, order in chosen.items()}, params)
    before, layer = params["layers"]["0"], moved["layers"]["0"]
    stream, query, value = chosen["stream"], [5, 4, 0, 1, 3, 2], [14, 13, 12, 11, 10, 0, 1, 2, 3, 4, 6, 7, 8, 9, 5]
    np.testing.assert_array_equal(moved["conv"]["kernel"], np.asarray(params["conv"]["kernel"])[..., stream])
    np.testing.assert_array_equal(moved["stem"]["bias"], np.asarray(params["stem"]["bias"])[stream])
    np.testing.assert_array_equal(moved["read"], np.asarray(params["read"])[stream])
    np.testing.assert_array_equal(moved["temperature"], params["temperature"])
    np.testing.assert_array_equal(layer["query"], np.asarray(before["query"])[stream][:, query])
    np.testing.assert_array_equal(layer["query_bias"], np.asarray(before["query_bias"])[query])
    np.testing.assert_array_equal(layer["value"], np.asarray(before["value"])[stream][:, value])
    np.testing.assert_array_equal(layer["out"], np.asarray(before["out"])[value][:, stream])
    np.testing.assert_array_equal(layer["up"], np.asarray(before["up"])[stream][:, chosen["layers/0/hidden"]])


def test_the_inverse_undoes_on_both_sides():
    params = make_params(0)
    for seed in range(3):
        order = random_permutations(TABLE, params, jax.random.key(seed))
        assert_equal(permute(TABLE, invert(order), permute(TABLE, order, params)), params)
        assert_equal(permute(TABLE, order, permute(TABLE, invert(order), params)), params)
        assert_permutations_equal(invert(invert(order)), order)


def test_random_permutations_are_permutations_and_come_from_the_key():
    params = make_params(0)
    first, again, other = (random_permutations(TABLE, params, jax.random.key(seed)) for seed in (0, 0, 1))
    assert_permutations_equal(again, first)
    assert any((first[name] != other[name]).any() for name in first)
    for name, order in first.items():
        np.testing.assert_array_equal(np.sort(order, -1), np.broadcast_to(np.arange(order.shape[-1]), order.shape))
        if ":" not in name:
            np.testing.assert_array_equal(np.sort(index(first, name)), np.arange(len(order)))
    inside = np.asarray(first["layers/0/heads:vo"])
    assert (inside != inside[0]).any(), "each head has an order of its own"


def test_a_part_of_a_tree_is_permuted_under_jit_and_other_permutations_are_refused():
    params = make_params(0)
    order = random_permutations(TABLE, params, jax.random.key(0))
    whole = permute(TABLE, order, params)
    part = {"layers": {"1": {"up": params["layers"]["1"]["up"].astype(jnp.bfloat16), "down": None}}}
    found = jax.jit(lambda order, part: permute(TABLE, order, part))(order, part)
    expected = whole["layers"]["1"]["up"].astype(jnp.bfloat16)
    assert_equal(found, {"layers": {"1": {"up": expected, "down": None}}})
    with pytest.raises(ValueError, match="no permutation of 'layers/2/hidden'"):
        permute(TABLE, order, {"layers": {"2": {"up": params["layers"]["1"]["up"]}}})
    with pytest.raises(ValueError, match="axis 0 of read has 3 units, 'stream' permutes 12"):
        permute(TABLE, order, {"read": jnp.ones((3, 4))})
    with pytest.raises(ValueError, match="bias is covered by no row"):
        permute(TABLE, order, {"bias": jnp.ones(3)})


# -- matching -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_permuted_copy_is_matched_back_exactly(seed):
    params = make_params(seed)
    true = random_permutations(TABLE, params, jax.random.key(seed))
    copy = permute(TABLE, true, params)
    found = match_weights(TABLE, params, copy, key=jax.random.key(99))
    assert_permutations_equal(found.permutations, true)
    assert found.after == pytest.approx(found.limit, rel=1e-6) == pytest.approx(inner_product(copy, copy), rel=1e-6)
    assert_permutations_equal(
        match_weights(TABLE, copy, params, key=jax.random.key(99)).permutations, invert(found.permutations)
    )


def test_a_permuted_copy_is_matched_back_where_no_leaf_has_a_fixed_axis():
    table = Symmetry(tuple(row for row in TABLE.rows if row.path.startswith("layers")), TABLE.heads)
    for seed in range(3):
        params = {"layers": make_params(seed)["layers"]}
        true = random_permutations(table, params, jax.random.key(seed))
        found = match_weights(table, params, permute(table, true, params), key=jax.random.key(0))
        assert_permutations_equal(found.permutations, true)


def test_a_noisy_permuted_copy_is_matched_back():
    params = make_params(0)
    true = random_permutations(TABLE, params, jax.random.key(3))
    noise = make_params(1)
    copy = jax.tree.map(lambda leaf, other: leaf + 0.3 * other, permute(TABLE, true, params), noise)
    found = match_weights(TABLE, params, copy, key=jax.random.key(0))
    assert_permutations_equal(found.permutations, true)
    assert found.after < 0.99 * found.limit


@pytest.mark.parametrize("seed", range(3))
def test_what_is_reached_is_what_is_said_and_never_below_the_start(seed):
    a, b = make_params(seed), make_params(seed + 100)
    found = match_weights(TABLE, a, b, key=jax.random.key(0))
    assert found.before == pytest.approx(inner_product(a, b), abs=1e-3)
    assert found.after == pytest.approx(inner_product(permute(TABLE, found.permutations, a), b), rel=1e-5)
    assert found.before < found.after < found.limit
    itself = match_weights(TABLE, a, a, key=jax.random.key(0))
    assert itself.after == itself.before == pytest.approx(itself.limit, rel=1e-6)


def test_no_exchange_of_two_units_gains():
    a, b = make_params(5), make_params(6)
    best = match_weights(TABLE, a, b, key=jax.random.key(0))
    exchanges = 0
    for name, order in best.permutations.items():
        for row in np.ndindex(order.shape[:-1]):
            for i, j in itertools.combinations(range(order.shape[-1]), 2):
                other = np.array(order)
                other[(*row, i)], other[(*row, j)] = order[(*row, j)], order[(*row, i)]
                if ":" not in name:  # whole heads take the order of their units along
                    inside = {k: v for k, v in best.permutations.items() if k.startswith(f"{name}:")}
                    swapped = {k: v.at[jnp.array([i, j])].set(v[jnp.array([j, i])]) for k, v in inside.items()}
                else:
                    swapped = {}
                moved = permute(TABLE, {**best.permutations, **swapped, name: jnp.asarray(other)}, a)
                assert inner_product(moved, b) <= best.after + 1e-3, (name, row, i, j)
                exchanges += 1
    assert exchanges > 150


def test_one_group_is_solved_to_its_optimum():
    random = np.random.default_rng(0)
    table = Symmetry((Row("up", (None, "hidden")), Row("down", ("hidden", None))))
    a, b = ({"up": random.normal(size=(3, 5)), "down": random.normal(size=(5, 2))} for _ in range(2))
    a, b = (jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), x) for x in (a, b))
    values = {
        order: inner_product(permute(table, {"hidden": jnp.array(order)}, a), b)
        for order in itertools.permutations(range(5))
    }
    found = match_weights(table, a, b, key=jax.random.key(0))
    assert tuple(found.permutations["hidden"].tolist()) == max(values, key=values.get)
    assert found.after == pytest.approx(max(values.values()), rel=1e-5)


def test_heads_are_solved_to_their_optimum_in_both_levels():
    table = Symmetry(
        (Row("query", (None, "heads:qk")), Row("value", (None, "heads:vo")), Row("out", ("heads:vo", None))),
        {"heads": 3},
    )
    random = np.random.default_rng(1)
    shapes = {"query": (4, 6), "value": (4, 6), "out": (6, 3)}
    a, b = ({k: jax.device_put(np.float32(random.normal(size=s))) for k, s in shapes.items()} for _ in range(2))
    inside = list(itertools.product(((0, 1), (1, 0)), repeat=3))
    best = max(
        (inner_product(permute(table, order, a), b), [v.tolist() for v in order.values()])
        for heads in itertools.permutations(range(3))
        for qk in inside
        for vo in inside
        for order in [{"heads": jnp.array(heads), "heads:qk": jnp.array(qk), "heads:vo": jnp.array(vo)}]
    )
    found = match_weights(table, a, b, key=jax.random.key(0))
    assert found.after == pytest.approx(best[0], rel=1e-5)
    assert [found.permutations[name].tolist() for name in ("heads", "heads:qk", "heads:vo")] == best[1]


def test_the_key_decides():
    a, b = make_params(7), make_params(8)
    runs = [match_weights(TABLE, a, b, key=jax.random.key(seed)) for seed in (1, 1, 2, 3)]
    assert_permutations_equal(runs[1].permutations, runs[0].permutations)
    assert runs[1][1:] == runs[0][1:]
    assert len({run.before for run in runs}) == 1


def test_weights_of_sixteen_bits():
    table = Symmetry((Row("up", (None, "hidden")), Row("down", ("hidden", None))))
    layer = make_params(0)["layers"]["0"]
    params = {name: layer[name].astype(jnp.bfloat16) for name in ("up", "down")}
    true = random_permutations(table, params, jax.random.key(1))
    copy = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), permute(table, true, params))
    assert_permutations_equal(match_weights(table, params, copy, key=jax.random.key(0)).permutations, true)


def test_progress_tells_every_group():
    seen = []
    match_weights(TABLE, make_params(0), make_params(1), key=jax.random.key(0), progress=lambda *x: seen.append(x))
    assert [entry for entry in seen if entry[2].startswith("start")][0] == (0, 5, "start: stream")
    assert {name.partition(": ")[2] for _, _, name in seen} == set(groups(TABLE, make_params(0)))
    assert all(0 <= done < count <= 5 for done, count, _ in seen)


def test_bad_models_are_refused():
    params = make_params(0)
    for other, message in (
        (make_params(0, hidden=11), r"layers/0/up: \(12, 10\) in the source, \(12, 11\) in the target"),
        ({k: v for k, v in params.items() if k != "read"}, r"read: \(12, 4\) in the source, missing in the target"),
        ({**params, "read": params["read"].at[0, 0].set(jnp.nan)}, "NaN or infinite values.*\n  read"),
        ({**params, "more": jnp.ones(3)}, r"more: missing in the source, \(3,\) in the target"),
    ):
        with pytest.raises(ValueError, match=message):
            match_weights(TABLE, params, other, key=jax.random.key(0))
    with pytest.raises(ValueError, match="it has no row for\n  more"):
        match_weights(TABLE, {**params, "more": jnp.ones(3)}, params, key=jax.random.key(0))


SIGNED = Symmetry(
    (Row("up", (None, "units")), Row("down", ("units", None)), Row("scale", ("units",), even=True)), signed=("units",)
)


def test_a_signed_group_is_solved_to_its_optimum():
    random = np.random.default_rng(2)
    shapes = {"up": (2, 4), "down": (4, 3), "scale": (4,)}
    a, b = ({name: jax.device_put(np.float32(random.normal(size=n))) for name, n in shapes.items()} for _ in "ab")
    found = match_weights(SIGNED, a, b, key=jax.random.key(0))

    def value(order, signs):
        moved = permute(SIGNED, {"units": jnp.array(order), "sign of units": jnp.array(signs)}, a)
        return sum(float(jnp.vdot(moved[name], b[name])) for name in shapes)

    best = max(
        value(order, signs)
        for order in itertools.permutations(range(4))
        for signs in itertools.product((1, -1), repeat=4)
    )
    assert abs(found.after - best) < 1e-4
    assert abs(value(*(np.asarray(found.permutations[name]) for name in ("units", "sign of units"))) - best) < 1e-4


def test_signs_are_undone_by_the_inverse_and_leave_even_leaves_alone():
    params = {"up": jnp.arange(8.0).reshape(2, 4), "down": jnp.ones((4, 3)), "scale": jnp.arange(4.0)}
    order = random_permutations(SIGNED, params, jax.random.key(0))
    assert -1 in order["sign of units"]
    moved = permute(SIGNED, order, params)
    assert (moved["scale"] >= 0).all() and (moved["up"] < 0).any()
    jax.tree.map(np.testing.assert_array_equal, permute(SIGNED, invert(order), moved), params)
