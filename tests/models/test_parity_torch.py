"""Live parity with transformers in PyTorch, on random models and inputs of this run."""

import importlib.util
import json
import logging
from pathlib import Path

import numpy as np
import pytest

from tvjax import tree
from tvjax.checkpoints.adapters import load_adapter
from tvjax.checkpoints.huggingface import from_pretrained, save_pretrained
from tvjax.models.relative_positions import position_buckets

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT asks for it
]
TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
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
        (tmp_path / case / "config.json").write_text(
            json.dumps(again.to_dict() | {"architectures": [type(model).__name__]})
        )
        assert from_pretrained(tmp_path / case).config == config


@pytest.mark.parametrize("case", ["gpt2", "llama", "qwen3"])
def test_texts_padded_on_the_left_with_positions(case):
    model = record_goldens.build(case)
    pretrained = from_pretrained(Path(__file__).parent / "goldens" / case)
    tokens = np.random.default_rng(0).integers(0, 30, (3, 8))
    mask = np.arange(8) >= np.array([[0], [2], [5]])
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    with torch.no_grad():
        ids, attention, places = (torch.from_numpy(each).long() for each in (tokens, mask, positions))
        expected = model(input_ids=ids, attention_mask=attention, position_ids=places).logits.numpy()
    found = pretrained.model({"tokens": tokens.astype(np.int32), "mask": mask, "positions": positions.astype(np.int32)})
    np.testing.assert_allclose(np.asarray(found["logits"])[mask], expected[mask], rtol=1e-5, atol=1e-5)


PAIRS = [[1.0, 1.5, 3.0], [2.0, 4.0, 8.0]]  # what longrope divides by, in short and in long texts
ROPES = {
    "yarn": {},
    "yarn_of_a_ramp_between_pairs": {"truncate": False, "beta_fast": 2, "beta_slow": 0.2},
    "yarn_of_one_end": {"beta_fast": 1, "beta_slow": 1, "original_max_position_embeddings": 4, "truncate": False},
    "yarn_with_attention_factor": {"attention_factor": 0.8, "mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn_with_mscale": {"mscale": 2.0, "mscale_all_dim": 0.5},
    "yarn_with_half_of_mscale": {"mscale": 0.7, "mscale_all_dim": 0, "beta_fast": 0},
    "yarn_by_the_ratio": {"factor": None},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "longrope": {"rope_type": "longrope", "short_factor": PAIRS[0], "long_factor": PAIRS[1]},
    "longrope_with_attention_factor": {
        **{"rope_type": "longrope", "short_factor": PAIRS[0], "long_factor": PAIRS[1], "attention_factor": 1.3},
    },
}


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2"])
@pytest.mark.parametrize("case", sorted(ROPES))
def test_rotary_positions(case, family, tmp_path):
    rope = ROPES[case]
    if rope.get("rope_type", "yarn") == "yarn":
        rope = record_goldens.YARN | rope
    elif rope["rope_type"] == "longrope":
        rope = {"original_max_position_embeddings": 16, **rope}
    torch.manual_seed(0)
    model = record_goldens.decoder(family, rope_parameters={"rope_theta": 30.0, **rope}, max_position_embeddings=40)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.eval().save_pretrained(tmp_path / "theirs")
    pretrained = from_pretrained(tmp_path / "theirs")
    tokens = np.random.default_rng(0).integers(0, 30, (3, 16))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    found = pretrained.model({"tokens": tokens.astype(np.int32)})["logits"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)

    save_pretrained(pretrained, tmp_path / "ours")
    with torch.no_grad():
        again = type(model).from_pretrained(tmp_path / "ours")(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(again, expected, rtol=1e-6, atol=1e-6)
    assert from_pretrained(tmp_path / "ours").config == pretrained.config


@pytest.mark.parametrize("case", ["t5", "umt5"])
def test_texts_and_answers_padded_on_the_left(case):
    model = record_goldens.build(case)
    pretrained = from_pretrained(Path(__file__).parent / "goldens" / case)
    random = np.random.default_rng(0)
    tokens, answers = (random.integers(0, 30, (3, length)) for length in (8, 20))  # further than the last bucket
    mask, decoder_mask = np.arange(8) >= np.array([[0], [2], [5]]), np.arange(20) >= np.array([[4], [0], [1]])
    with torch.no_grad():
        given = [torch.from_numpy(each).long() for each in (tokens, mask, answers, decoder_mask)]
        expected = model(*given).logits.numpy()
    found = pretrained.model(
        {
            **{"tokens": tokens.astype(np.int32), "mask": mask},
            **{"decoder_tokens": answers.astype(np.int32), "decoder_mask": decoder_mask},
        }
    )
    np.testing.assert_allclose(np.asarray(found["logits"])[decoder_mask], expected[decoder_mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("both_sides", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 12), (64, 256), (4, 5), (12, 200)])
def test_position_buckets_are_those_of_transformers(buckets, max_distance, both_sides):
    bucket_of = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket
    distances = torch.arange(-max_distance, max_distance + 1)
    expected = bucket_of(distances, both_sides, buckets, max_distance).numpy()
    np.testing.assert_array_equal(position_buckets(buckets, max_distance, both_sides), expected)


@pytest.mark.parametrize("side", [9, 20, (12, 25)])
@pytest.mark.parametrize("case", ["dinov2", "dinov2_backbone", "dinov2_with_registers"])
def test_positions_of_images_of_another_size(case, side):
    height, width = side if isinstance(side, tuple) else (side, side)
    model = record_goldens.build(case)
    pixels = np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32)
    expected = record_goldens.activations(model, {"pixels": pixels})
    for name, found in from_pretrained(Path(__file__).parent / "goldens" / case).model({"pixels": pixels}).items():
        np.testing.assert_allclose(found, expected[name], rtol=1e-5, atol=1e-5)


LORA_TARGETS = {
    **dict.fromkeys(("llama", "qwen2"), ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]),
    **dict.fromkeys(("t5", "umt5"), ["q", "v", "o", "wi", "wi_0", "wo"]),
    "dinov2": ["q_proj", "o_proj", "fc1"],
    "gpt2": ["c_attn", "attn.c_proj", "c_fc"],
}
ADAPTED = {"t5": 3 * 5 + 2 * 8, "umt5": 2 * 5 + 3 * 8, "gpt2": 3 * 5}  # a fused kernel is three


@pytest.mark.parametrize("case", LORA_TARGETS)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_lora_adapters_by_the_names_of_transformers(case, tmp_path):
    peft = pytest.importorskip("peft")
    folder = Path(__file__).parent / "goldens" / case
    model = type(record_goldens.build(case)).from_pretrained(folder)
    targets = LORA_TARGETS[case]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    base = from_pretrained(folder)
    factors = load_adapter(tmp_path / "adapter", base, any_base=True)
    assert len(factors) == ADAPTED.get(case, 3 * len(targets))
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = tree.flatten(from_pretrained(tmp_path / "merged").params)
    for path, leaf in tree.flatten(base.params).items():
        change = factors[path].scale * (factors[path].a @ factors[path].b) if path in factors else 0.0
        np.testing.assert_allclose(leaf + change, merged[path], rtol=1e-5, atol=1e-6, err_msg=path)
