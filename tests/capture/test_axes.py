"""Where the rows of a site come from."""

import jax
import jax.numpy as jnp
import pytest

from tvjax.capture import sites
from tvjax.capture.axes import EXAMPLE, FEATURE, NEW, PART, ROUTED

W = jnp.ones((6, 4))


def rows(function, inputs, params=None):
    """Sizes and labels of the rows of the last site of w."""
    found = [site for site in sites(function, {"w": W} if params is None else params, inputs).sites if site.path == "w"]
    return tuple(zip(found[-1].rows, found[-1].axes, strict=True))


HIDDEN = {"hidden": jnp.ones((2, 5, 6)), "memory": jnp.ones((2, 7, 6)), "ids": jnp.ones((2, 5), jnp.int32)}


def attend(p, c):
    return jax.nn.softmax(c["hidden"] @ jnp.swapaxes(c["memory"], 1, 2)) @ c["memory"] @ p["w"]


def routed(p, c):
    x = c["hidden"].reshape(10, 6)
    order = jnp.argsort(x[:, 0])
    return x[order] @ p["w"]


def dispatched(p, c):
    x = c["hidden"].reshape(10, 6)
    place = jax.nn.one_hot(jnp.argmax(x, -1), 3)
    return jnp.einsum("nc,nd->cd", place, x) @ p["w"]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda p, c: c["hidden"] @ p["w"], ((2, EXAMPLE), (5, "hidden"))),
        (lambda p, c: c["memory"] @ p["w"], ((2, EXAMPLE), (7, "memory"))),
        (lambda p, c: c["hidden"].reshape(10, 6) @ p["w"], ((2, EXAMPLE), (5, "hidden"))),
        (lambda p, c: jnp.swapaxes(c["hidden"], 0, 1) @ p["w"], ((5, "hidden"), (2, EXAMPLE))),
        (lambda p, c: jax.nn.relu(jnp.tanh(c["hidden"])).mean(1) @ p["w"], ((2, EXAMPLE),)),
        (lambda p, c: jnp.ones((9, 6))[c["ids"]] @ p["w"], ((2, EXAMPLE), (5, "ids"))),
        (lambda p, c: jax.vmap(lambda row: row @ p["w"])(c["hidden"]), ((2, EXAMPLE), (5, "hidden"))),
        (attend, ((2, EXAMPLE), (5, "hidden"))),
        (routed, ((10, ROUTED),)),
        (dispatched, ((3, NEW),)),
        (lambda p, c: c["hidden"][jnp.arange(2), c["ids"].argmax(1)] @ p["w"], ((2, EXAMPLE),)),
    ],
)
def test_rows_are_followed(function, expected):
    assert rows(function, HIDDEN) == expected


def test_features_as_rows_are_told():
    mixer = lambda p, c: jnp.swapaxes(c["hidden"], 1, 2) @ p["w"]  # noqa: E731
    assert rows(mixer, HIDDEN, {"w": jnp.ones((5, 4))})[1] == (6, FEATURE)
    by_head = lambda p, c: (c["hidden"] @ p["q"]).reshape(2, 5, 2, 4) * p["w"]  # noqa: E731
    assert rows(by_head, HIDDEN, {"q": jnp.ones((6, 8)), "w": jnp.ones(4)})[2] == (2, PART)


def test_a_table_of_positions_is_told_from_a_bias_by_heads():
    function = lambda p, c: (c["hidden"] + p["position"]).reshape(2, 5, 2, 3) + p["bias"]  # noqa: E731
    params = {"position": jnp.ones((5, 6)), "bias": jnp.ones((2, 3))}
    found = {site.path: site.positional for site in sites(function, params, HIDDEN).sites}
    assert found == {"position": True, "bias": False}


def test_a_single_array_is_a_stream_of_its_own():
    assert rows(lambda p, x: x @ p["w"], jnp.ones((2, 5, 6))) == ((2, EXAMPLE), (5, ""))
