"""Live parity with transformers in PyTorch, on random models and inputs of this run."""

import importlib.util
import logging
from pathlib import Path

import numpy as np
import pytest

from tvjax import tree
from tvjax.checkpoints.huggingface import from_pretrained, save_pretrained

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
spec = importlib.util.spec_from_file_location("record_goldens", Path(__file__).with_name("record_goldens.py"))
record_goldens = importlib.util.module_from_spec(spec)
spec.loader.exec_module(record_goldens)


@pytest.fixture(autouse=True, scope="module")
def quiet():
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity(logging.ERROR)


@pytest.mark.parametrize("case", sorted(record_goldens.CASES))
def test_outputs_and_saved_folder(case, tmp_path, assert_equal_at_tokens):
    torch.manual_seed(1)
    model = record_goldens.CASES[case]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "theirs")
    pretrained = from_pretrained(tmp_path / "theirs")
    inputs = record_goldens.inputs(model, seed=1)
    expected = record_goldens.activations(model, inputs)
    outputs = pretrained.model(inputs)
    for name in outputs.keys() & expected.keys():
        assert_equal_at_tokens(outputs[name], expected[name], inputs, name)

    save_pretrained(pretrained, tmp_path / "ours")
    loaded = type(model).from_pretrained(tmp_path / "ours").state_dict()
    assert loaded.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert loaded[key].dtype == tensor.dtype and torch.equal(loaded[key], tensor), key


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_checkpoints_are_exchanged_exactly(dtype, tmp_path):
    model = record_goldens.build("clip_gelu").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "theirs")
    pretrained = from_pretrained(tmp_path / "theirs")
    assert {leaf.dtype.name for leaf in tree.flatten(pretrained.params).values()} == {dtype}
    save_pretrained(pretrained, tmp_path / "ours")
    loaded = type(model).from_pretrained(tmp_path / "ours").state_dict()
    for key, tensor in model.state_dict().items():
        assert loaded[key].dtype == tensor.dtype and torch.equal(loaded[key], tensor), key


@pytest.mark.parametrize("case", ["clip_gelu", "vit"])
def test_shards_with_an_index(case, tmp_path):
    model = record_goldens.build(case)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    model.save_pretrained(tmp_path / "single")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    sharded, single = (from_pretrained(tmp_path / name).params for name in ("sharded", "single"))
    for path, leaf in tree.flatten(single).items():
        np.testing.assert_array_equal(leaf, tree.get(sharded, path))


def test_configs_are_written_as_transformers_reads_them(tmp_path):
    for case in record_goldens.CASES:
        model = record_goldens.build(case)
        model.save_pretrained(tmp_path / case)
        config = from_pretrained(tmp_path / case).config
        again = type(model.config).from_dict(config.to_dict())
        fresh = type(model)(again).state_dict()
        assert {k: v.shape for k, v in fresh.items()} == {k: v.shape for k, v in model.state_dict().items()}
        assert type(config).from_dict(again.to_dict() | {"architectures": [type(model).__name__]}) == config
