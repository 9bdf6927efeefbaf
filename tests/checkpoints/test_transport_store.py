"""A fit that was interrupted goes on from the stages that it kept, to the same state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax import Batch, bico, chain, fit, gradfix, theseus
from tvjax.align.procrustes import matrix
from tvjax.checkpoints import TransportStore
from tvjax.models.clip import CLIPConfig, CLIPVisionConfig, clip, init

DEPENDS_ON = {"source": "a", "method": "theseus"}


def cross_entropy(classifier, outputs, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(outputs["image"] @ classifier), labels[:, None], 1)[:, 0]


@pytest.fixture(scope="module")
def models():
    config = CLIPConfig(CLIPVisionConfig(8, 16, 2, 2, image_size=8, patch_size=4, projection_dim=4), None)
    classifier = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    return [clip(config, init(config, jax.random.key(seed))).with_loss(cross_entropy, classifier) for seed in (0, 1)]


@pytest.fixture(scope="module")
def batches():
    random = np.random.default_rng(1)
    pixels = jnp.asarray(random.normal(size=(3, 8, 8, 3)), jnp.float32)
    return [Batch({"pixels": pixels}, jnp.array([0, 1, 2], jnp.int32))]


class Interrupted(Exception):
    pass


def interrupt_after(stages):
    def progress(done, total, name):
        if done == stages:
            raise Interrupted

    return progress


@pytest.mark.parametrize(
    "transport", [theseus(), chain(bico(rank_tolerance=1e-3), gradfix())], ids=lambda transport: transport.name
)
def test_an_interrupted_fit_goes_on_to_the_same_state(tmp_path, models, batches, transport):
    whole = fit(transport, *models, batches)
    with pytest.raises(Interrupted):
        fit(transport, *models, batches, cache=TransportStore(tmp_path, DEPENDS_ON), progress=interrupt_after(2))
    kept = TransportStore(tmp_path, DEPENDS_ON).stages
    assert len(kept) == 2
    solved = []
    link = transport.links[0]
    counting = transport._replace(
        links=(link._replace(fit=lambda pair: solved.append(pair.name) or link.fit(pair)), *transport.links[1:])
    )
    state = fit(counting, *models, batches, cache=TransportStore(tmp_path, DEPENDS_ON))
    assert sorted([*solved, *kept]) == sorted(stage.name for stage in models[1].stages)
    assert state.notes == whole.notes and state.paths == whole.paths
    for found, expected in zip(state.parts, whole.parts, strict=True):
        assert found.rules == expected.rules
        assert {n: set(m) for n, m in found.measures.items()} == {n: set(m) for n, m in expected.measures.items()}
    for name, rotation in whole.parts[0].arrays.items():
        found = state.parts[0].arrays[name]
        assert found.rank == rotation.rank
        # What is walked forwards is the same to the bit; gradients come back through another program.
        tolerance = 0 if transport.name == "theseus" else 1e-3
        np.testing.assert_allclose(matrix(found), matrix(rotation), rtol=0, atol=tolerance)


def test_the_maps_of_another_fit_are_refused(tmp_path):
    TransportStore(tmp_path / "maps", DEPENDS_ON)
    with pytest.raises(ValueError, match="of another fit, of other images, method: give another folder"):
        TransportStore(tmp_path / "maps", {"source": "a", "method": "bico", "images": "b"})


def test_a_folder_with_other_things_is_refused_and_kept(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty, and holds no maps"):
        TransportStore(tmp_path, DEPENDS_ON)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_corrupt_file_is_named(tmp_path, models, batches):
    fit(theseus(), *models, batches, cache=TransportStore(tmp_path, DEPENDS_ON))
    file = next(tmp_path.glob("*blocks*1.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{file.name}.* is no complete safetensors file"):
        fit(theseus(), *models, batches, cache=TransportStore(tmp_path, DEPENDS_ON))
