"""Low-rank task vectors as PEFT folders: what is written is read again, here and by PEFT."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import tvjax as tv
from tvjax import tree
from tvjax.checkpoints import Pretrained, from_pretrained, load_adapter, save_adapter, save_pretrained
from tvjax.merge import to_task_vector
from tvjax.models.clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, clip, init
from tvjax.models.llama import LlamaConfig
from tvjax.models.llama import modeling as llama
from tvjax.models.vit import ViTConfig
from tvjax.models.vit import modeling as vit

VISION = CLIPVisionConfig(8, 16, 2, 2, image_size=8, patch_size=4, projection_dim=4)
TEXT = CLIPTextConfig(20, 8, 16, 2, 2, max_position_embeddings=6, eos_token_id=19, projection_dim=4)
VIT = ViTConfig(8, 16, 2, 2, image_size=8, patch_size=4)
LLAMA = LlamaConfig(
    vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=16,
)  # fmt: skip
MODELS = {
    "clip": lambda: (CLIPConfig(VISION, TEXT), clip, init),
    "vision": lambda: (CLIPConfig(VISION, None), clip, init),
    "vit": lambda: (VIT, vit.vit, vit.init),
    "llama": lambda: (LLAMA, llama.llama, llama.init),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            config, build, start = MODELS[name]()
            folder = tmp_path_factory.mktemp("bases") / name
            save_pretrained(Pretrained(build(config, start(config, jax.random.key(0))), config), folder)
            made[name] = from_pretrained(folder)
        return made[name]

    return get


def adapter(base, ranks, size=0.3):
    """A low-rank task vector of the kernels that patterns choose, each pattern with its rank."""
    random, paths = np.random.default_rng(0), list(tree.flatten(base.params))
    found = {}
    for pattern, rank in ranks.items():
        for path in tree.match(paths, pattern):
            rows, columns = tree.get(base.params, path).shape
            sides = (size * random.normal(size=shape) for shape in ((rows, rank), (rank, columns)))
            found[path] = tv.LowRank(*(jnp.asarray(side, jnp.float32) for side in sides))
    return tree.nest(found)


CASES = [
    ("clip", {"vision/**/query/kernel": 2, "vision/**/up/kernel": 3}),
    ("clip", {"**/query/kernel": 2}),
    ("vision", {"**/value/kernel": 1, "vision/blocks/1/mlp/down/kernel": 4}),
    ("vit", {"**/query/kernel": 2, "**/down/kernel": 3}),
    ("llama", {"**/gate/kernel": 2, "blocks/0/attention/key/kernel": 1}),
]


@pytest.mark.parametrize(("name", "ranks"), CASES)
def test_what_is_written_is_read_again(bases, tmp_path, name, ranks):
    base = bases(name)
    tau = adapter(base, ranks)
    save_adapter(tau, tmp_path / "lora", base, metadata=base.identity(), card="# An adapter\n")
    again = to_task_vector(load_adapter(tmp_path / "lora", base), base.params, low_rank=True)
    for path, leaf in tree.flatten(tau).items():
        found = tree.get(again, path)
        assert isinstance(found, tv.LowRank) and found.rank == leaf.rank
        np.testing.assert_array_equal(found.left, leaf.left)
        np.testing.assert_array_equal(found.right, leaf.right)
    assert tree.flatten(again).keys() == tree.flatten(tau).keys()
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base.folder) and settings["peft_type"] == "LORA"
    assert (tmp_path / "lora" / "README.md").read_text() == "# An adapter\n"


def test_the_shortest_names_that_choose_no_others(bases, tmp_path):
    def targets(name, ranks):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        save_adapter(adapter(bases(name), ranks), folder, bases(name))
        return json.loads((folder / "adapter_config.json").read_text())["target_modules"]

    assert targets("clip", {"**/query/kernel": 2}) == ["q_proj"]
    assert targets("clip", {"vision/blocks/1/**/query/kernel": 2}) == ["vision_model.encoder.layers.1.self_attn.q_proj"]
    assert targets("vit", {"**/up/kernel": 2}) == ["fc1"]


def test_ranks_by_pattern(bases, tmp_path):
    save_adapter(
        adapter(bases("llama"), {"**/gate/kernel": 2, "blocks/0/attention/key/kernel": 1}),
        tmp_path / "lora",
        bases("llama"),
    )
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    key = "model.layers.0.self_attn.k_proj"
    assert settings["r"] == settings["lora_alpha"] == 2
    assert settings["rank_pattern"] == settings["alpha_pattern"] == {key: 1}
    assert settings["task_type"] == "CAUSAL_LM"


def test_a_model_without_modelling_code(tmp_path):
    """Its weights lie as torch has them, and so do its adapters' products."""
    random = np.random.default_rng(0)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "of_next_year"}))
    weights = {f"layers.{i}.fc.weight": random.normal(size=(6, 4)).astype(np.float32) for i in (0, 1)}
    safetensors.numpy.save_file(weights, tmp_path / "base" / "model.safetensors")
    base = from_pretrained(tmp_path / "base")
    sides = (random.normal(size=shape).astype(np.float32) for shape in ((6, 2), (2, 4)))
    tau = {"layers": {"1": {"fc": {"weight": tv.LowRank(*map(jnp.asarray, sides))}}}}
    save_adapter(tau, tmp_path / "lora", base)
    written = safetensors.numpy.load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert written["base_model.model.layers.1.fc.lora_A.weight"].shape == (2, 4)
    again = to_task_vector(load_adapter(tmp_path / "lora", base), base.params, low_rank=True)
    np.testing.assert_array_equal(tree.get(again, "layers/1/fc/weight").left, tau["layers"]["1"]["fc"]["weight"].left)


def test_what_an_adapter_cannot_hold_is_named_and_nothing_is_written(bases, tmp_path):
    base = bases("vit")
    ok = adapter(base, {"**/query/kernel": 1})
    wrong = {
        "vision/blocks/0/mlp/up/bias": (jnp.ones(16), "an array, not two factors"),
        "vision/embeddings/patch/kernel": (tv.LowRank.zeros((4, 4, 3, 8)), "no kernel of a linear layer"),
        "vision/blocks/0/mlp/up/kernel": (
            tv.LowRank(jnp.ones((8, 1)), jnp.ones((1, 8))),
            r"model \(8, 16\), adapter \(8, 8\)",
        ),
        "vision/blocks/7/mlp/up/kernel": (tv.LowRank.zeros((8, 16)), "not in the model"),
    }
    for path, (leaf, message) in wrong.items():
        with pytest.raises(ValueError, match=f"{path}: {message}"):
            save_adapter(tree.nest({**tree.flatten(ok), path: leaf}), tmp_path / "lora", base)
    with pytest.raises(ValueError, match="no leaf that changes anything"):
        save_adapter({"head": {"kernel": tv.LowRank.zeros((8, 2))}}, tmp_path / "lora", base)
    bad = tree.nest({path: tv.LowRank(leaf.left * jnp.nan, leaf.right) for path, leaf in tree.flatten(ok).items()})
    with pytest.raises(ValueError, match="lora_A.weight.*NaN"):
        save_adapter(bad, tmp_path / "lora", base)
    assert not list(tmp_path.iterdir())


def classes(name):
    import transformers

    return {
        "clip": transformers.CLIPModel,
        "vision": transformers.CLIPVisionModelWithProjection,
        "vit": transformers.ViTForImageClassification,
        "llama": transformers.LlamaForCausalLM,
    }[name]


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "ranks"), CASES)
def test_peft_loads_it_and_computes_the_same(bases, tmp_path, name, ranks):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    base = bases(name)
    tau = adapter(base, ranks)
    save_adapter(tau, tmp_path / "lora", base)
    plain = classes(name).from_pretrained(base.folder)
    random = np.random.default_rng(1)
    pixels = random.normal(size=(2, 8, 8, 3)).astype(np.float32)
    tokens = random.integers(0, 19, (2, 5))
    inputs = {"pixel_values": torch.tensor(pixels.transpose(0, 3, 1, 2))}
    if name == "clip":
        inputs["input_ids"] = torch.tensor(tokens)
    if name == "llama":
        inputs = {"input_ids": torch.tensor(tokens)}
    field = {"clip": "logits_per_image", "vision": "image_embeds"}.get(name, "logits")
    with torch.no_grad():
        before = getattr(plain(**inputs), field).numpy()
        model = peft.PeftModel.from_pretrained(plain, tmp_path / "lora").eval()
        expected = getattr(model(**inputs), field).numpy()
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
    changed = sum(1 for key, _ in model.named_parameters() if "lora_A" in key) or len(tree.flatten(tau))
    assert changed == len(tree.flatten(tau)) and np.abs(expected - before).max() > 1e-3
    edited = base.with_params(tv.apply(base.params, tau))
    merged = from_pretrained(tmp_path / "merged")
    for path, leaf in tree.flatten(merged.params).items():
        np.testing.assert_allclose(tree.get(edited.params, path), leaf, atol=1e-5, err_msg=path)
    if name == "vit":
        np.testing.assert_allclose(edited.model({"pixels": jnp.asarray(pixels)})["logits"], expected, atol=1e-5)
    if name == "vision":
        np.testing.assert_allclose(edited.model({"pixels": jnp.asarray(pixels)})["image"], expected, atol=1e-5)
    if name == "llama":
        found = edited.model({"tokens": jnp.asarray(tokens), "mask": jnp.ones((2, 5), bool)})["logits"]
        np.testing.assert_allclose(found, expected, atol=1e-5)
