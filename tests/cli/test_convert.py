"""`tvjax convert`: there and back again, dtypes, and state dicts of open_clip."""

import shutil

import numpy as np
import pytest

from tvjax import tree
from tvjax.checkpoints import Pretrained, fingerprint, from_pretrained, load_orbax, save_pretrained
from tvjax.checkpoints.code_trees import find_code_tree
from tvjax.checkpoints.orbax import stored_tree
from tvjax.cli.main import run
from tvjax.models.families import shapes_of
from tvjax.models.llama import LlamaConfig, Rope, llama


def test_orbax_and_back(models, tmp_path, capsys):
    assert run(["convert", models["source"], "--output", str(tmp_path / "orbax"), "--to", "orbax"]) == 0
    assert "as orbax" in capsys.readouterr().out
    assert fingerprint(load_orbax(tmp_path / "orbax").params) == fingerprint(from_pretrained(models["source"]).params)
    words = ["--output", str(tmp_path / "back"), "--max-shard-size", "4KB", "--quiet"]
    assert run(["convert", str(tmp_path / "orbax"), *words]) == 0
    back = from_pretrained(tmp_path / "back")
    assert fingerprint(back.params) == fingerprint(from_pretrained(models["source"]).params)
    assert len(list((tmp_path / "back").glob("model-*"))) > 1 and (tmp_path / "back" / "vocab.json").exists()


@pytest.mark.parametrize("kind", ["huggingface", "orbax"])
def test_another_dtype(models, tmp_path, kind):
    words = ["--output", str(tmp_path / "half"), "--dtype", "bfloat16", "--to", kind, "--quiet"]
    assert run(["convert", models["source"], *words]) == 0
    half = (load_orbax if kind == "orbax" else from_pretrained)(tmp_path / "half")
    expected = tree.flatten(from_pretrained(models["source"]).params)
    for path, leaf in tree.flatten(half.params).items():
        assert leaf.dtype.name == "bfloat16"
        np.testing.assert_array_equal(leaf, expected[path].astype("bfloat16"))
    assert half.settings["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{images}"], "has no config.json"),
        (["{source}", "--to", "onnx"], "orbax"),
        (["{source}", "--dtype", "int8"], "'int8' is not one of 'float32', 'float16', 'bfloat16'"),
        (["model.pt"], "such as openai/clip-vit-base-patch32"),
        (["model.pt", "--like", "{source}"], "is a pickle, which is opened only where you say so (--allow-pickle"),
        (["model.pt", "--like", "{source}", "--allow-pickle"], "there is no file 'model.pt'"),
        (["model.pt", "--revision", "main"], "has no revision"),
        (["{source}", "--to", "tunix"], "known for the model types llama, qwen2, qwen3, found 'CLIPConfig'"),
        (["{source}", "--no-scan-layers"], "say how trees of MaxText are laid out"),
    ],
)
def test_what_cannot_be_converted(models, images, tmp_path, capsys, words, message):
    words = [word.format(**models, images=images) for word in words]
    assert run(["convert", *words, "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A Llama whose heads have a power of two for their root, so that nothing is rounded on its way."""
    rope = Rope(
        kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=9
    )
    config, draw = LlamaConfig(20, 16, 24, 2, 4, 2, head_dim=4, rope=rope), np.random.default_rng(0).normal
    params = tree.nest({path: draw(size=shape).astype(np.float32) for path, shape in shapes_of(config).items()})
    folder = tmp_path_factory.mktemp("decoder") / "model"
    save_pretrained(Pretrained(llama(config, params), config), folder)
    return folder


def test_maxtext_and_tunix_and_back(decoder, tmp_path, capsys):
    words = [("maxtext", []), ("tunix", []), ("maxtext", ["--no-scan-layers"]), ("huggingface", [])]
    source = decoder
    for number, (kind, more) in enumerate(words):
        assert run(["convert", str(source), "--output", str(tmp_path / str(number)), "--to", kind, *more]) == 0
        assert f"as {kind}, 4560 parameters, float32" in capsys.readouterr().out
        source = tmp_path / str(number)
    assert fingerprint(from_pretrained(source).params) == fingerprint(from_pretrained(decoder).params)
    stacked = find_code_tree(tmp_path / "0")
    assert stacked == ("maxtext", tmp_path / "0/0/items", "params/params")
    assert find_code_tree(tmp_path / "1/0/model_params") == ("tunix", tmp_path / "1/0/model_params", "")
    shapes = {path: leaf.shape for path, leaf in tree.flatten(stored_tree(stacked.directory)).items()}
    assert shapes["params/params/decoder/layers/self_attention/query/kernel"] == (16, 2, 4, 4)
    shutil.move(tmp_path / "0/0/items", tmp_path / "items")  # as a training run leaves it: no config.json
    for words, message in (
        ([], "has no config.json"),
        (["--interleaved", "--like", str(decoder), "--revision", "main"], "has no revision"),
    ):
        assert run(["convert", str(tmp_path / "items"), "--output", str(tmp_path / "out"), *words]) == 2
        assert message in capsys.readouterr().err
    assert run(["convert", str(tmp_path / "items"), "--output", str(tmp_path / "out"), "--like", str(decoder)]) == 0
    assert fingerprint(from_pretrained(tmp_path / "out").params) == fingerprint(from_pretrained(decoder).params)
    # Pairs that lie otherwise than MaxText has them by default are read as they were written, and no other way.
    assert (
        run(["convert", str(decoder), "--output", str(tmp_path / "halves"), "--to", "maxtext", "--no-interleaved"]) == 0
    )
    assert run(["convert", str(tmp_path / "halves"), "--output", str(tmp_path / "again"), "--like", str(decoder)]) == 0
    assert fingerprint(from_pretrained(tmp_path / "again").params) == fingerprint(from_pretrained(decoder).params)
    assert not list((tmp_path / "again").glob("*layout*"))
    capsys.readouterr()
    assert run(["convert", str(tmp_path / "halves"), "--output", str(tmp_path / "other"), "--interleaved"]) == 2
    assert "was written with interleaved=False" in capsys.readouterr().err and not (tmp_path / "other").exists()
    shutil.copytree(tmp_path / "2/0", tmp_path / "2/1")
    assert run(["convert", str(tmp_path / "2"), "--output", str(tmp_path / "third")]) == 2
    assert "several checkpoints: 0/items; 1/items" in " ".join(capsys.readouterr().err.split())


def open_clip_tensors(params):
    """The parameters under the keys of open_clip, put together here by hand."""
    import torch

    def tensor(array):
        return torch.from_numpy(np.array(array))

    def linear(key, layer):
        return {f"{key}.weight": tensor(layer["kernel"].T), f"{key}.bias": tensor(layer["bias"])}

    def norm(key, layer):
        return {f"{key}.weight": tensor(layer["scale"]), f"{key}.bias": tensor(layer["bias"])}

    def blocks(prefix, tower):
        tensors = {}
        for i, block in tower["blocks"].items():
            key, attention = f"{prefix}transformer.resblocks.{i}", block["attention"]
            fused = [attention[name] for name in ("query", "key", "value")]
            tensors[f"{key}.attn.in_proj_weight"] = tensor(np.concatenate([part["kernel"].T for part in fused]))
            tensors[f"{key}.attn.in_proj_bias"] = tensor(np.concatenate([part["bias"] for part in fused]))
            tensors |= linear(f"{key}.attn.out_proj", attention["out"]) | linear(f"{key}.mlp.c_fc", block["mlp"]["up"])
            tensors |= linear(f"{key}.mlp.c_proj", block["mlp"]["down"])
            tensors |= norm(f"{key}.ln_1", block["norm1"]) | norm(f"{key}.ln_2", block["norm2"])
        return tensors

    vision, text = params["vision"], params["text"]
    return {
        "logit_scale": tensor(params["logit_scale"]),
        "visual.class_embedding": tensor(vision["embeddings"]["class_token"]),
        "visual.conv1.weight": tensor(np.transpose(vision["embeddings"]["patch"]["kernel"], (3, 2, 0, 1))),
        "visual.positional_embedding": tensor(vision["embeddings"]["positions"]),
        "visual.proj": tensor(vision["projection"]["kernel"]),
        "token_embedding.weight": tensor(text["embeddings"]["tokens"]),
        "positional_embedding": tensor(text["embeddings"]["positions"]),
        "text_projection": tensor(text["projection"]["kernel"]),
        **norm("visual.ln_pre", vision["pre_norm"]),
        **norm("visual.ln_post", vision["post_norm"]),
        **norm("ln_final", text["final_norm"]),
        **blocks("visual.", vision),
        **blocks("", text),
    }


@pytest.mark.torch
@pytest.mark.parametrize("spelling", ["plain", "training", "own text tower", "bfloat16", "parameters", "sparse"])
def test_state_dicts_of_open_clip(models, tmp_path, spelling):
    torch = pytest.importorskip("torch")
    params = from_pretrained(models["source"]).params
    content = open_clip_tensors(params)
    if spelling == "training":
        content = {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in content.items()}}
    elif spelling == "own text tower":
        outer = ("visual.", "logit_scale")
        content = {key if key.startswith(outer) else f"text.{key}": value for key, value in content.items()}
    elif spelling == "bfloat16":
        content = {key: value.to(torch.bfloat16) for key, value in content.items()}
    elif spelling == "parameters":
        content = {key: torch.nn.Parameter(value) for key, value in content.items()}
    elif spelling == "sparse":
        content = {**content, "visual.proj": content["visual.proj"].to_sparse()}
    torch.save(content, tmp_path / "model.pt")
    words = ["--like", models["source"], "--allow-pickle", "--output", str(tmp_path / "out"), "--quiet"]
    assert run(["convert", str(tmp_path / "model.pt"), *words]) == 0
    converted, expected = tree.flatten(from_pretrained(tmp_path / "out").params), tree.flatten(params)
    assert converted.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(converted[path], leaf.astype(converted[path].dtype))
    assert (tmp_path / "out" / "vocab.json").exists()


@pytest.mark.torch
def test_state_dicts_that_are_refused(models, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    content = open_clip_tensors(from_pretrained(models["source"]).params)
    words = ["--like", models["source"], "--allow-pickle", "--output", str(tmp_path / "out"), "--quiet"]
    for wrong, message in (
        ({**content, "visual.extra": content["visual.proj"]}, "surplus keys (1): visual.extra"),
        ({key: value for key, value in content.items() if key != "visual.proj"}, "missing keys (1): visual.proj"),
        ({"model": torch.nn.Linear(2, 2)}, "is no state dict of tensors"),
        ([1, 2], "holds a list"),
        ({"a": 1}, "'a' is an int, expected a tensor"),
    ):
        torch.save(wrong, tmp_path / "model.pt")
        assert run(["convert", str(tmp_path / "model.pt"), *words]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def foreign_contents(torch, tensors):
    """What else is in files that end in .pt, with what is said of it."""
    weight = tensors["visual.proj"]

    class Script(torch.nn.Module):
        def forward(self, x):
            return x

    yield {**tensors, "visual.proj": weight.to(torch.float8_e4m3fn)}, "'visual.proj' is of dtype torch.float8_e4m3fn"
    yield {**tensors, "visual.proj": weight.to(torch.complex64)}, "'visual.proj' is of dtype torch.complex64"
    yield {**tensors, "visual.proj": weight.to("meta")}, "'visual.proj' is a tensor on the meta device"
    rows = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    yield {**tensors, "visual.proj": rows}, "'visual.proj' is a nested tensor"
    quantized = torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)
    yield {**tensors, "visual.proj": quantized}, "'visual.proj' is quantized (torch.qint8)"
    yield {"state_dict": tensors, "best": np.float64(0.5)}, "it holds numpy._core.multiarray.scalar"
    yield {**tensors, "visual.proj": np.ones(3)}, "it holds numpy._core.multiarray._reconstruct"
    yield {**tensors, "module.visual.proj": weight}, "has 'visual.proj' twice, once as 'module.visual.proj'"
    yield torch.jit.script(Script()), "is a TorchScript archive, a program"


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_each_foreign_content_of_a_state_dict_is_said_in_a_sentence(models, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    tensors = open_clip_tensors(from_pretrained(models["source"]).params)
    file = tmp_path / "model.pt"
    words = ["--like", models["source"], "--allow-pickle", "--output", str(tmp_path / "out"), "--quiet"]
    for content, message in foreign_contents(torch, tensors):
        if isinstance(content, torch.jit.ScriptModule):
            content.save(file)
        else:
            torch.save(content, file)
        assert run(["convert", str(file), *words]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line and "weights_only" not in line and "option" not in line
    assert not (tmp_path / "out").exists()


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_state_dicts_are_said_to_be_so(models, tmp_path, capsys, zipped):
    torch = pytest.importorskip("torch")
    file = tmp_path / "model.pt"
    torch.save({"a": torch.ones(3)}, file, _use_new_zipfile_serialization=zipped)
    whole, rng = file.read_bytes(), np.random.default_rng(0)
    words = ["--like", models["source"], "--allow-pickle", "--output", str(tmp_path / "out"), "--quiet"]
    for number in range(60):
        damaged = bytearray(whole)
        if number % 2:
            damaged = damaged[: rng.integers(len(damaged))]
        else:
            damaged[rng.integers(min(len(damaged), 900))] ^= int(rng.integers(1, 256))
        file.write_bytes(damaged)
        assert run(["convert", str(file), *words]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "weights_only" not in line
