"""Weights and densities by path and by depth."""

import numpy as np
import pytest

from tvjax.merge import ByDepth
from tvjax.merge.settings import require, resolve, resolve_each

PATHS = [f"{tower}/blocks/{i}/{leaf}" for tower in ("text", "vision") for i in (0, 1, 2) for leaf in ("up/bias", "w")]
PATHS += ["vision/patch/kernel", "logit_scale"]


def test_a_number_for_all():
    assert resolve(2, PATHS) == dict.fromkeys(PATHS, 2.0)


def test_a_later_pattern_wins():
    found = resolve({"**": 1, "vision": 2, "**/bias": 3}, PATHS)
    assert found["logit_scale"] == 1 and found["vision/patch/kernel"] == 2
    assert found["vision/blocks/1/w"] == 2 and found["vision/blocks/1/up/bias"] == found["text/blocks/0/up/bias"] == 3


def test_each_stack_is_spread_by_itself():
    deep = [*PATHS, "vision/blocks/3/w", "vision/blocks/4/w"]
    found = resolve(ByDepth((0.0, 1.0, 3.0), other=9.0), deep)
    assert [found[f"text/blocks/{i}/w"] for i in range(3)] == [0, 1, 3]
    assert [found[f"vision/blocks/{i}/w"] for i in range(5)] == [0, 0.5, 1, 2, 3]
    assert found["vision/patch/kernel"] == found["logit_scale"] == 9


def test_the_depth_is_the_first_number_of_the_path():
    found = resolve(ByDepth((1.0, 2.0), other=0.0), ["blocks/0/experts/5/w", "blocks/1/experts/0/w"])
    assert list(found.values()) == [1, 2]
    assert resolve(ByDepth((7.0, 8.0), other=0.0), ["blocks/0/w"]) == {"blocks/0/w": 7}


def test_a_depth_where_no_layers_are_in_sight():
    """A scanned model: one array holds a parameter of all layers."""
    with pytest.raises(ValueError, match=r"(?s)ByDepth finds no layers.*blocks/w.*by_layer.*unstack"):
        resolve(ByDepth((1.0, 2.0), other=0.0), ["blocks/w", "head"])


def test_one_for_each_vector():
    found = resolve_each([1, {"**": 2, "logit_scale": 3}, ByDepth((4.0,), other=5.0)], PATHS, 3, "weights")
    assert found["vision/blocks/1/w"].tolist() == [1, 2, 4] and found["logit_scale"].tolist() == [1, 3, 5]
    assert found["logit_scale"].dtype == np.float32


def test_what_is_wrong_is_named():
    with pytest.raises(ValueError, match=r"(?s)no pattern of \['vision'\] matches 7 leaves.*'\*\*'"):
        resolve({"vision": 1.0}, PATHS)
    with pytest.raises(ValueError, match="'visoin' matches none"):
        resolve({"**": 1.0, "visoin": 2.0}, PATHS)
    with pytest.raises(ValueError, match="a number, found 'a' for logit_scale"):
        resolve({"**": 1.0, "logit_scale": "a"}, PATHS)
    with pytest.raises(ValueError, match="finite, found nan"):
        resolve(float("nan"), PATHS)
    with pytest.raises(ValueError, match="at least one value"):
        ByDepth((), other=1.0)
    with pytest.raises(ValueError, match="density: 2 given for 3 task vectors"):
        resolve_each([1, 2], PATHS, 3, "density")
    with pytest.raises(ValueError, match=r"rate must be small, found \[1.0, 3.0\] for b"):
        require({"a": np.ones(2), "b": np.array([1.0, 3.0])}, "rate", lambda x: x < 2, "small")
