"""Two processes of two devices each do what one process of four does, on arrays that neither of them sees whole."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
import two_processes as program

import tvjax as tv


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder that one process wrote, what it found, and the folder and the exit codes of the two."""
    models, one, two = (tmp_path_factory.mktemp(name) for name in ("models", "one", "two"))
    program.write_models(models)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": str(Path(tv.__file__).parents[1])}
    command = [sys.executable, program.__file__]
    started = [
        subprocess.Popen(
            [*command, str(number), port, models, two],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    try:
        found = program.work(models, one, program.the_mesh())
        said = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert (two / "survivor.txt").exists(), "\n".join(said)
    return one, found, two, [process.returncode for process in started]


def test_two_processes_find_what_one_finds(runs):
    one, found, two, _ = runs
    theirs = json.loads((two / "found.json").read_text())
    np.testing.assert_allclose(theirs.pop("logits"), found.pop("logits"), atol=1e-5)
    assert theirs.pop("norm") == pytest.approx(found.pop("norm"), rel=1e-6)
    theirs["resumed"].pop("apart"), found["resumed"].pop("apart")
    assert theirs == json.loads(json.dumps(found)) and found["devices"] == [4]


def test_two_processes_go_on_from_what_they_kept(runs):
    """Nothing is trained the second time, and all stages are fitted from files that both have written."""
    kept = json.loads((runs[2] / "found.json").read_text())["resumed"]
    assert kept["apart"] < 1e-6 and kept["lie alike"] and "vision/blocks/0" in kept["stages"]
    (epochs, values), (further, again) = kept["trained"]
    assert (epochs, further) == (2, 0) and values == again and np.any(values)


def test_two_processes_write_the_files_of_one(runs):
    one, _, two, _ = runs
    for file in ("edited/model.safetensors", "edited/config.json"):
        assert (one / file).read_bytes() == (two / file).read_bytes(), file
    (ours, about), (theirs, their_about) = (tv.load_task_vector(folder / "moved.safetensors") for folder in (one, two))
    assert about == their_about
    widened = [jax.tree.map(lambda leaf: leaf.astype(np.float32), moved) for moved in (ours, theirs)]
    chex.assert_trees_all_close(*widened, rtol=2e-2, atol=1e-3)  # of 16 bits, after decompositions


def test_processes_that_disagree_or_fail_are_all_told(runs):
    _, _, two, _ = runs
    first, second = (json.loads((two / f"told{number}.json").read_text()) for number in range(2))
    for told in (first, second):
        assert "processes disagree about what they load" in told["load"]
        assert "config.json, tensors, sharding in process 1 is not that of process 0" in told["load"]
        assert "fit: transport in process 1" in told["fit"]
        assert "merge: task vectors in process 1" in told["merge"]
        assert "train: parameters, what is trained in process 1" in told["compose"]
        assert "train: key in process 1" in told["key"]
        assert "other: models in process 1" in told["store"]
        assert "evaluate on: inputs in process 1" in told["accuracy"]
    for call in ("save", "folder"):
        assert "process 1 could not write" in first[call]
        assert "has 8 of 8 values that are NaN" in second[call]
    assert not (two / "broken").exists() and not (two / "other").exists()


def test_a_killed_process_leaves_no_half_of_a_model(runs):
    _, _, two, codes = runs
    assert codes == [0, -9] and "Gloo" in (two / "survivor.txt").read_text()
    files = {"moved.safetensors", "found.json", "told0.json", "told1.json", "survivor.txt"}
    assert {path.name for path in two.iterdir()} == {*files, "edited", "orbax", "maps", "training"}
