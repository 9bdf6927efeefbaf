"""Merges that act by leaf are read, merged and written leaf by leaf: the same bits as of the whole vectors."""

import json

import jax
import numpy as np
import pytest

from tests.cli.conftest import write_clip
from tvjax import jobs, tree
from tvjax.checkpoints import from_pretrained, load_tree, streaming
from tvjax.jobs import _merge
from tvjax.jobs.configs import MERGES, MergeConfig
from tvjax.jobs.merges import acts_by_leaf
from tvjax.on_disk import is_on_disk


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merges")
    base = write_clip(folder / "base", 8, 1, 0)
    for seed in (1, 2):
        tuned = write_clip(folder / f"tuned{seed}", 8, 1, 0, change=0.1 * seed)
        streaming.extract(base, tuned, folder / f"tau{seed}.safetensors", subtree="vision")
    return {"model": base, "task_vectors": (folder / "tau1.safetensors", folder / "tau2.safetensors")}


@pytest.mark.parametrize(
    ("method", "options"),
    [("dare", {"density": 0.5}), ("ties", {"scope": "leaf"}), ("tsv_m", {}), ("slerp", {})],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_leaf_by_leaf_is_what_it_is_at_once(files, tmp_path, monkeypatch, method, options):
    assert acts_by_leaf(method, options)
    found, seen = {}, []
    write = streaming.apply_trees
    monkeypatch.setattr(
        streaming, "apply_trees", lambda base, taus, *a, **k: seen.append(taus) or write(base, taus, *a, **k)
    )
    for lazily in (True, False):
        monkeypatch.setattr(_merge, "acts_by_leaf", lambda *_, lazily=lazily: lazily)
        output = tmp_path / str(lazily)
        given = {**files, "method": method, "options": options, "scale": 0.5, "seed": 3}
        found[lazily] = jobs.merge(MergeConfig(**given, output=output))
        found[lazily, "file"] = jobs.merge(MergeConfig(**given, output=output.with_suffix(".safetensors")))
    assert [all(map(is_on_disk, jax.tree.leaves(taus))) for taus in seen] == [True, False]
    pairs = [
        (from_pretrained(tmp_path / str(lazily)).params, load_tree(tmp_path / f"{lazily}.safetensors")[0])
        for lazily in (True, False)
    ]
    for one, other in zip(*pairs, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    assert found[True].norm == pytest.approx(found[False].norm, rel=1e-5) and found[True, "file"].norm > 0
    reports = [
        json.loads((tmp_path / str(lazily) / "leaf_report.json").read_text())["leaves"] for lazily in (True, False)
    ]
    paths = [sorted(row["path"] for row in rows) for rows in reports]
    assert paths[0] == paths[1] == sorted(tree.flatten(load_tree(files["task_vectors"][0])[0]))


def test_which_merges_act_by_leaf():
    whole = {name for name in MERGES if not acts_by_leaf(name, {})}
    assert whole == {"ties", "iso_cts", "knots", "core_space", "nuslerp", "multi_slerp", "ace", "lines", "svc"}
    assert not acts_by_leaf("average", {"weights": [{"**": 1.0}, 2.0]})
    assert not acts_by_leaf("slerp", {"scope": "vector"}) and not acts_by_leaf("mine", {})


def test_a_merge_that_cannot_be_leaves_nothing(files, tmp_path):
    with pytest.raises(ValueError, match="slerp takes two task vectors, found 3"):
        jobs.merge(
            MergeConfig(
                **files | {"task_vectors": (*files["task_vectors"], files["task_vectors"][0])},
                method="slerp",
                output=tmp_path / "out",
            )
        )
    assert list(tmp_path.iterdir()) == []
