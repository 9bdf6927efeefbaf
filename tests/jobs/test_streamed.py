"""`tvjax transport --stream` writes, from models on disk, what the transport of models in memory writes."""

import collections
import json
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.cli.conftest import write_clip
from tvjax import jobs, tree
from tvjax.checkpoints import TransportStore, from_pretrained, reader, save_pretrained
from tvjax.cli.main import run
from tvjax.jobs.configs import PlanConfig, TransportConfig


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    names = {
        "source": write_clip(folder / "source", 8, 2, 0),
        "finetuned": write_clip(folder / "finetuned", 8, 2, 0, change=0.1, vision_only=True),
        "target": write_clip(folder / "target", 12, 3, 2),
    }
    halved = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), from_pretrained(names["target"]).params)
    target = from_pretrained(names["target"]).with_params(halved)
    save_pretrained(target, folder / "sharded", max_shard_size=3000)
    return names | {"target": str(folder / "sharded")}


def config(folders, images, output, method="theseus", **options):
    return TransportConfig(**folders, method=method, data=str(images), output=output, batch_size=3, **options)


def leaves(folder):
    return tree.flatten(jax.tree.map(np.asarray, from_pretrained(folder).params))


def test_a_streamed_run_writes_what_one_in_memory_writes(folders, images, tmp_path):
    method = "bico+gradfix"  # whose walk begins at the last stage; theseus is run below
    whole = jobs.transport(config(folders, images, tmp_path / "whole", method, scale=0.5))
    streamed = jobs.transport(config(folders, images, tmp_path / "streamed", method, scale=0.5, stream=True))
    expected, found, before = (leaves(name) for name in (tmp_path / "whole", tmp_path / "streamed", folders["target"]))
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        assert leaf.dtype == before[path].dtype == np.dtype("bfloat16")
        np.testing.assert_array_equal(leaf, expected[path])
    assert any((leaf != before[path]).any() for path, leaf in found.items())
    np.testing.assert_allclose(list(streamed.norms.values()), list(whole.norms.values()), rtol=1e-5)
    for side, norms in whole.leaf_norms.items():
        assert norms.keys() == streamed.leaf_norms[side].keys()
        np.testing.assert_allclose(np.linalg.norm(list(norms.values())), whole.norms[side], rtol=1e-5)
        for path, norm in norms.items():
            np.testing.assert_allclose(streamed.leaf_norms[side][path], norm, rtol=1e-5, atol=1e-7)
    for name in ("whole", "streamed"):
        assert "(norms.png)" in (tmp_path / name / "README.md").read_text()
        assert (tmp_path / name / "norms.png").stat().st_size > 10_000
    reports = [json.loads((tmp_path / name / "leaf_report.json").read_text()) for name in ("whole", "streamed")]
    assert reports[0]["leaves"] == reports[1]["leaves"] and streamed.notes == whole.notes
    shards = sorted(file.name for file in (tmp_path / "streamed").glob("*.safetensors"))
    assert len(shards) > 2 and (tmp_path / "streamed" / "preprocessor_config.json").is_file()
    index = json.loads((tmp_path / "streamed" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == shards


def test_no_weight_is_read_only_to_be_checked_or_measured(folders, images, tmp_path, monkeypatch):
    counts, read = collections.Counter(), reader._read_checked

    def counted(key, file, path, *rest):
        counts[str(path), key] += 1
        read(key, file, path, *rest)

    monkeypatch.setattr(reader, "_read_checked", counted)
    jobs.transport(config(folders, images, tmp_path / "streamed", stream=True))
    most = {
        name: max(number for (file, _), number in counts.items() if file.startswith(f"{folder}/"))
        for name, folder in folders.items()
    }
    # Of all the fingerprint; of the target the walk and the sum; of the source, a block of which is paired with two,
    # the difference as it is checked, and twice the walk and the difference that is moved.
    assert most == {"source": 1 + 1 + 2 * 2, "finetuned": 1 + 1 + 2, "target": 1 + 2}


def test_a_killed_run_goes_on(folders, images, tmp_path, monkeypatch):
    made = config(folders, images, tmp_path / "edited", stream=True, maps=tmp_path / "maps")
    code = (
        "import os, signal, sys; from tvjax import jobs; from tvjax.jobs.configs import TransportConfig;"
        "stop = lambda done, count, stage: done == 3 and os.kill(os.getpid(), signal.SIGKILL);"
        "jobs.transport(TransportConfig.model_validate_json(sys.argv[1]), stop)"
    )
    killed = subprocess.run([sys.executable, "-c", code, made.model_dump_json()], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (tmp_path / "edited").exists()
    fitted = []
    keep = TransportStore.save
    monkeypatch.setattr(
        TransportStore, "save", lambda self, stage, parts: fitted.append(stage) or keep(self, stage, parts)
    )
    jobs.transport(made)
    assert len(fitted) == 2  # of five stages
    jobs.transport(config(folders, images, tmp_path / "whole"))
    expected, found = leaves(tmp_path / "whole"), leaves(tmp_path / "edited")
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected[path])


def test_what_needs_the_whole_task_vector_is_refused(folders, images, tmp_path):
    for kind in (TransportConfig, PlanConfig):
        with pytest.raises(ValueError, match="--validation chooses a scale with the whole.*give --scale in its place"):
            kind.read({**folders, "method": "theseus", "output": "out", "stream": True, "validation": "digits:a"})
        with pytest.raises(ValueError, match="--save-task-vector writes the whole.*leave one of the two out"):
            kind.read({**folders, "method": "theseus", "output": "out", "stream": True, "save_task_vector": "tau"})
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    given = {name: folder for name, folder in folders.items() if name != "finetuned"}
    words = [f"--{name}={folder}" for name, folder in given.items()]
    words += ["--method=theseus", "--stream", f"--output={tmp_path / 'out'}", f"--task-vector={tmp_path / 'lora'}"]
    assert run(["transport", *words, f"--data={images}"]) == 2
    assert not (tmp_path / "out").exists()


def test_a_plan_refuses_what_the_streamed_transport_refuses(folders, tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    ends = {name: str(folders[name]) for name in ("source", "target")}
    for more, message in (
        ({"method": "ariadne"}, "ariadne runs the fine-tuned source, which is made in memory: leave --stream out"),
        ({"method": "theseus", "task_vector": str(tmp_path / "lora")}, "is an adapter, which is moved by its factors"),
    ):
        with pytest.raises(ValueError, match=message):
            jobs.plan(PlanConfig(**ends, **more, stream=True))


def test_a_task_vector_from_a_file(folders, images, tmp_path):
    extract = ["extract", f"--pretrained={folders['source']}", f"--finetuned={folders['finetuned']}"]
    assert run([*extract, f"--output={tmp_path / 'tau.safetensors'}", "--quiet"]) == 0
    given = {name: folder for name, folder in folders.items() if name != "finetuned"}
    given["task_vector"] = str(tmp_path / "tau.safetensors")
    jobs.transport(config(given, images, tmp_path / "file", stream=True, per_class=3, select="herding"))
    jobs.transport(config(folders, images, tmp_path / "model", stream=True, per_class=3, select="herding"))
    expected, found = leaves(tmp_path / "model"), leaves(tmp_path / "file")
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected[path])
