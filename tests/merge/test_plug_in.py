"""A merge of one's own: a function and a registration; it is a command's method, with its options and its report."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax import merge
from tvjax.checkpoints import load_tree, save_tree
from tvjax.cli.main import run
from tvjax.jobs.configs import MERGES
from tvjax.merge.leaf_report import MergedLeaf


def loudest(taus, *, share: float = 1.0, report=None):
    """The task vector that is largest in each leaf, times a share."""

    def pick(*leaves):
        norms = jnp.stack([jnp.linalg.norm(leaf) for leaf in leaves])
        return share * jnp.stack(leaves)[jnp.argmax(norms)]

    merged = jax.tree.map(pick, *taus)
    if report is not None:
        for path, leaf in merged.items():
            report(MergedLeaf(path, leaf.shape, "the loudest", {}))
    return merged


merge.register("loudest", loudest)


def test_the_names_of_recipes_are_the_merges():
    assert set(MERGES) == set(merge.merges()) - {"loudest"}


def test_it_is_a_method_of_the_command(tmp_path, capsys):
    vectors = [{"w": np.full((2, 2), value, np.float32)} for value in (1.0, -3.0)]
    files = [str(tmp_path / f"{number}.safetensors") for number in range(2)]
    for file, tau in zip(files, vectors, strict=True):
        save_tree(file, tau, {"base_fingerprint": "same", "base_model": "one"})
    out = tmp_path / "merged.safetensors"
    arguments = ["merge", *files, "--method", "loudest", "--options", "share=0.5", "--output", str(out), "--json"]
    assert run(arguments) == 0
    assert json.loads(capsys.readouterr().out)["method"] == "loudest"
    np.testing.assert_array_equal(load_tree(out)[0]["w"], np.full((2, 2), -1.5))
    assert run([*arguments[:5], "--options", "shar=1", "--output", str(tmp_path / "no.safetensors")]) == 2
    assert "the nearest of share is 'share'" in capsys.readouterr().err


def test_what_is_no_merge_is_not_taken():
    with pytest.raises(ValueError, match="there is a merge 'ties' already"):
        merge.register("ties", loudest)
    with pytest.raises(ValueError, match="a merge takes"):
        merge.register("mine", lambda vectors: vectors)
    assert "mine" not in merge.merges()
