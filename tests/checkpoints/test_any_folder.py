"""Any folder of safetensors: task vectors, merges and conversions of models that tvjax has no modelling code for."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from tvjax import arithmetic, merge, tree
from tvjax.checkpoints import fingerprint, from_pretrained, load_orbax, load_tree, reader, save_pretrained, streaming
from tvjax.checkpoints.folder import open_checkpoint
from tvjax.cli.main import run

WIDTH = 8


def linear(name, inputs, outputs, bias=True):
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def norm(name, bias=True):
    return {f"{name}.weight": (WIDTH,)} | ({f"{name}.bias": (WIDTH,)} if bias else {})


def olmo():  # a head that is tied to the tokens, and is not in the file
    shapes = {"model.embed_tokens.weight": (12, WIDTH)} | norm("model.norm", False)
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes |= norm(f"{layer}.input_layernorm", False) | norm(f"{layer}.post_attention_layernorm", False)
        for name, size in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4), ("o_proj", 8)):
            shapes |= linear(f"{layer}.self_attn.{name}", WIDTH, size, False)
        shapes |= linear(f"{layer}.mlp.gate_proj", WIDTH, 16, False) | linear(f"{layer}.mlp.up_proj", WIDTH, 16, False)
        shapes |= linear(f"{layer}.mlp.down_proj", 16, WIDTH, False)
    return {"model_type": "olmo", "tie_word_embeddings": True, "rms_norm_eps": 1e-6}, shapes, {}


def longt5():
    shapes = {"shared.weight": (12, WIDTH), "decoder.embed_tokens.weight": (12, WIDTH)}
    for side in ("encoder", "decoder"):
        block = f"{side}.block.0.layer"
        shapes |= linear(f"{block}.0.SelfAttention.q", WIDTH, 8, False) | norm(f"{block}.0.layer_norm", False)
        shapes |= {f"{block}.0.SelfAttention.relative_attention_bias.weight": (4, 2)}
        shapes |= linear(f"{block}.1.DenseReluDense.wi", WIDTH, 16, False)
    return {"model_type": "longt5", "d_model": WIDTH}, shapes, {}


def imagegpt():  # Conv1D: matrices are stored [in, out]; masks are stored too
    shapes = {"wte.weight": (12, WIDTH), "wpe.weight": (6, WIDTH)} | norm("ln_f")
    shapes |= {"h.0.attn.c_attn.weight": (WIDTH, 24), "h.0.attn.c_attn.bias": (24,)} | norm("h.0.ln_1")
    mask = np.tril(np.ones((6, 6), bool))[None, None]
    return {"model_type": "imagegpt", "activation_function": "gelu_new"}, shapes, {"h.0.attn.bias": mask}


def electra():
    shapes = {"bert.embeddings.word_embeddings.weight": (12, WIDTH)} | norm("bert.embeddings.LayerNorm")
    shapes |= linear("bert.encoder.layer.0.attention.self.query", WIDTH, 8) | linear("bert.pooler.dense", WIDTH, 8)
    ids = np.arange(6)[None]
    return {"model_type": "electra", "hidden_act": "gelu"}, shapes, {"bert.embeddings.position_ids": ids}


def mixtral():  # experts one by one, and stacked
    layer = "model.layers.0.block_sparse_moe"
    shapes = {"model.embed_tokens.weight": (12, WIDTH), "lm_head.weight": (12, WIDTH)}
    shapes |= linear(f"{layer}.gate", WIDTH, 2, False) | linear(f"{layer}.experts.0.w1", WIDTH, 16, False)
    shapes |= linear(f"{layer}.experts.1.w1", WIDTH, 16, False) | {f"{layer}.experts.gate_up_proj": (2, WIDTH, 16)}
    return {"model_type": "mixtral", "num_local_experts": 2}, shapes, {}


def ijepa():
    shapes = {"embeddings.cls_token": (1, 1, WIDTH), "embeddings.position_embeddings": (1, 5, WIDTH)}
    shapes |= {"embeddings.patch_embeddings.projection.weight": (WIDTH, 3, 2, 2)} | norm("layernorm")
    shapes |= {"encoder.layer.0.layer_scale1.lambda1": (WIDTH,)} | linear("encoder.layer.0.mlp.fc1", WIDTH, 16)
    return {"model_type": "ijepa", "layer_norm_eps": 1e-6}, shapes, {}


def siglip2():
    shapes = {"logit_scale": (1,), "logit_bias": (1,), "vision_model.head.probe": (1, 1, WIDTH)}
    for tower in ("text_model", "vision_model"):
        shapes |= linear(f"{tower}.encoder.layers.0.self_attn.q_proj", WIDTH, 8)
    return {"model_type": "siglip2", "vision_config": {"hidden_act": "gelu"}}, shapes, {}


def whisper():
    shapes = {"model.encoder.conv1.weight": (WIDTH, 4, 3), "model.encoder.conv1.bias": (WIDTH,)}
    shapes |= {"model.decoder.embed_tokens.weight": (12, WIDTH), "proj_out.weight": (12, WIDTH)}
    shapes |= linear("model.decoder.layers.0.encoder_attn.k_proj", WIDTH, 8, False)
    return {"model_type": "whisper", "activation_function": "gelu"}, shapes, {}


MODELS = {make.__name__: make for make in (olmo, longt5, imagegpt, electra, mixtral, ijepa, siglip2, whisper)}


def values(shapes, seed, around=None):
    """Multiples of 1/1024, whose sums and differences are exact in float32."""
    rng = np.random.default_rng(seed)
    near = around or dict.fromkeys(shapes, 0)
    return {
        key: (near[key] + rng.integers(-512, 512, shape) / 1024).astype(np.float32) for key, shape in shapes.items()
    }


def write(folder, settings, tensors, shards=1):
    folder.mkdir(parents=True)
    keys = sorted(tensors)
    names = ["model.safetensors"]
    if shards > 1:
        names = [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    file_of = {key: names[number % shards] for number, key in enumerate(keys)}
    for name in names:
        part = {key: np.ascontiguousarray(tensors[key]) for key in keys if file_of[key] == name}
        safetensors.numpy.save_file(part, folder / name, {"format": "pt"})
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def read(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= safetensors.numpy.load_file(file)
    return found


def check_same(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        np.testing.assert_array_equal(found[key], tensor, err_msg=key)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_extract_and_apply_give_the_fine_tuned_folder_back(tmp_path, name, shards):
    settings, shapes, others = MODELS[name]()
    theta_0 = values(shapes, 0)
    theta_ft = values(shapes, 1, theta_0)
    base = write(tmp_path / "base", settings, theta_0 | others, shards)
    (base / "tokenizer.model").write_bytes(b"sentences")
    (base / "chat_template.jinja").write_text("{{ text }}")
    (base / "pytorch_model.bin").write_bytes(b"the weights that were not edited")
    tuned = write(tmp_path / "tuned", {**settings, "architectures": ["Other"], "_name_or_path": "x"}, theta_ft | others)

    found = streaming.extract(base, tuned, tmp_path / "tau.safetensors")
    assert found.leaves == len(shapes) and set(found.left) == set(others) and found.changed_outside == ()
    tau, metadata = load_tree(tmp_path / "tau.safetensors")
    assert tree.flatten(tau).keys() == {key.replace(".", "/") for key in shapes}
    assert json.loads(metadata["base_config"])["model_type"] == name
    for key in shapes:
        np.testing.assert_array_equal(tree.flatten(tau)[key.replace(".", "/")], theta_ft[key] - theta_0[key])

    applied = streaming.apply(base, [tmp_path / "tau.safetensors"], tmp_path / "edited")
    check_same(read(tmp_path / "edited"), theta_ft | others)
    assert applied.copied == () and set(applied.left) == set(others)
    assert applied.fingerprint == fingerprint(from_pretrained(tuned).params)
    kept = {"tokenizer.model", "chat_template.jinja", "config.json", "README.md"}
    weights = {file.name for file in base.iterdir() if "safetensors" in file.name}
    assert {file.name for file in (tmp_path / "edited").iterdir()} == kept | weights
    assert json.loads((tmp_path / "edited" / "config.json").read_text()) == {**settings, "dtype": "float32"}


@pytest.mark.parametrize("name", MODELS)
def test_a_merge_into_a_folder_is_the_merge_in_memory(tmp_path, name, capsys):
    settings, shapes, others = MODELS[name]()
    theta_0 = values(shapes, 0)
    base = write(tmp_path / "base", settings, theta_0 | others, 2)
    taus, files = [], []
    for seed in (1, 2):
        tuned = write(tmp_path / f"tuned{seed}", settings, values(shapes, seed, theta_0) | others)
        files.append(str(tmp_path / f"{seed}.safetensors"))
        streaming.extract(base, tuned, files[-1])
        taus.append(load_tree(files[-1])[0])
    output = tmp_path / "merged"
    words = ["--method", "ties", "--options", "density=0.5", "--model", str(base), "--output", str(output)]
    assert run(["merge", *files, *words, "--scale", "0.5"]) == 0
    for key in others:
        assert key in capsys.readouterr().out
    params = from_pretrained(base).params
    expected = tree.flatten(arithmetic.apply(params, merge.ties(taus, density=0.5), 0.5))
    check_same(read(output), {key: np.asarray(expected[key.replace(".", "/")]) for key in shapes} | others)
    assert json.loads((output / "model.safetensors.index.json").read_text())["weight_map"].keys() == {*shapes, *others}


def test_weights_of_16_bits_are_rounded_once(tmp_path):
    settings, shapes, _ = olmo()
    theta_0 = {key: x.astype(ml_dtypes.bfloat16) for key, x in values(shapes, 0).items()}
    theta_ft = {key: x.astype(ml_dtypes.bfloat16) for key, x in values(shapes, 1).items()}
    base, tuned = write(tmp_path / "base", settings, theta_0), write(tmp_path / "tuned", settings, theta_ft)
    streaming.extract(base, tuned, tmp_path / "tau.safetensors")
    streaming.apply(base, [tmp_path / "tau.safetensors"], tmp_path / "edited")
    wide = {key: (x.astype(np.float32), theta_ft[key].astype(np.float32)) for key, x in theta_0.items()}
    rounded = {key: (x + (y - x)).astype(ml_dtypes.bfloat16) for key, (x, y) in wide.items()}
    check_same(read(tmp_path / "edited"), rounded)


def test_what_takes_no_part_is_reported(tmp_path, capsys):
    settings, shapes, others = electra()
    theta_0, theta_ft = values(shapes, 0), values(shapes, 1)
    tokens = "bert.embeddings.word_embeddings.weight"
    theta_ft[tokens] = np.zeros((13, WIDTH), np.float32)
    theta_ft["classifier.weight"] = theta_ft.pop("bert.pooler.dense.weight")
    base = write(tmp_path / "base", settings, theta_0 | others)
    tuned = write(tmp_path / "tuned", settings, theta_ft | others)
    models = ["--pretrained", str(base), "--finetuned", str(tuned)]
    assert run(["extract", *models, "--output", f"{tmp_path}/a.safetensors"]) == 0
    said = capsys.readouterr().out
    for line in (
        "takes no part (I64, no parameter): bert.embeddings.position_ids",
        "takes no part (only in the pre-trained model): bert/pooler/dense/weight",
        "takes no part (only in the fine-tuned model): classifier/weight",
        "takes no part (pre-trained (12, 8), fine-tuned (13, 8)): bert/embeddings/word_embeddings/weight",
    ):
        assert line in said
    tau = tree.flatten(load_tree(tmp_path / "a.safetensors")[0])
    assert len(tau) == len(shapes) - 2


def test_a_part_is_named_by_its_path(tmp_path):
    settings, shapes, _ = olmo()
    base = write(tmp_path / "base", settings, values(shapes, 0))
    tuned = write(tmp_path / "tuned", settings, values(shapes, 1))
    found = streaming.extract(base, tuned, tmp_path / "tau.safetensors", subtree="model/layers/1")
    tau = tree.flatten(load_tree(tmp_path / "tau.safetensors")[0])
    inside = {key.replace(".", "/") for key in shapes if key.startswith("model.layers.1.")}
    assert tau.keys() == inside and set(found.changed_outside) == {key.replace(".", "/") for key in shapes} - inside
    with pytest.raises(ValueError, match="has no part 'layers', only model"):
        streaming.extract(base, tuned, tmp_path / "none.safetensors", subtree="layers")


def test_a_tied_copy_that_one_file_lacks_changes_with_its_owner(tmp_path):
    settings, shapes, _ = longt5()
    theta_0, theta_ft = values(shapes, 0), values(shapes, 1)
    theta_0["decoder.embed_tokens.weight"] = theta_0["shared.weight"]
    theta_ft["decoder.embed_tokens.weight"] = theta_ft["shared.weight"]
    lean = {key: tensor for key, tensor in theta_ft.items() if key != "decoder.embed_tokens.weight"}
    base, tuned = write(tmp_path / "base", settings, theta_0), write(tmp_path / "tuned", settings, lean)
    assert streaming.extract(base, tuned, tmp_path / "tau.safetensors").left == {}
    streaming.apply(base, [tmp_path / "tau.safetensors"], tmp_path / "edited")
    check_same(read(tmp_path / "edited"), theta_ft)


def test_matrices_of_two_axes_are_merged_whichever_way_they_lie(tmp_path):
    shapes = imagegpt()[1]
    stored = [{key.replace(".", "/"): x for key, x in values(shapes, seed).items()} for seed in (1, 2)]
    turned = [{path: x.T for path, x in tau.items()} for tau in stored]
    here, there = merge.tsv_m(stored), merge.tsv_m(turned)
    for path, leaf in here.items():
        np.testing.assert_allclose(leaf, there[path].T, atol=2e-6, err_msg=path)


def test_a_merge_of_matrices_asks_how_stacked_experts_lie(tmp_path, capsys):
    settings, shapes, _ = mixtral()
    base = write(tmp_path / "base", settings, values(shapes, 0))
    files = []
    for seed in (1, 2):
        tuned = write(tmp_path / f"tuned{seed}", settings, values(shapes, seed))
        files.append(f"{tmp_path}/{seed}.safetensors")
        streaming.extract(base, tuned, files[-1])
    words = ["merge", *files, "--model", str(base), "--output", str(tmp_path / "merged"), "--method", "iso_c"]
    assert run(words) == 2
    said = capsys.readouterr().err
    assert "experts/gate_up_proj: (2, 8, 16)" in said and "matrices={" in said
    assert not (tmp_path / "merged").exists()
    assert run([*words, "--options", "matrices={'**/weight': io, '**/gate_up_proj': sio}"]) == 0


@pytest.mark.parametrize("to", ["huggingface", "orbax"])
def test_convert_there_and_back(tmp_path, to):
    settings, shapes, others = imagegpt()
    theta = values(shapes, 0)
    base = write(tmp_path / "base", settings, theta | others, 2)
    (base / "merges.txt").write_text("#version\n")
    words = ["--to", to, "--dtype", "bfloat16", "--quiet"]
    assert run(["convert", str(base), "--output", str(tmp_path / "out"), *words]) == 0
    assert (tmp_path / "out" / "merges.txt").exists()
    half = {key: x.astype(ml_dtypes.bfloat16) for key, x in theta.items()}
    if to == "huggingface":
        check_same(read(tmp_path / "out"), half | others)
    else:
        params = load_orbax(tmp_path / "out").params
        check_same(tree.flatten(params), {key.replace(".", "/"): jax.numpy.asarray(x) for key, x in half.items()})
        assert run(["convert", str(tmp_path / "out"), "--output", str(tmp_path / "back"), "--quiet"]) == 0
        check_same(read(tmp_path / "back"), half)


def test_parameters_in_memory_are_edited_and_saved(tmp_path):
    settings, shapes, others = imagegpt()
    others = others | {"scale": np.ones(1, np.float64)}
    base = from_pretrained(write(tmp_path / "base", settings, values(shapes, 0) | others))
    doubled = jax.tree.map(lambda leaf: 2 * leaf, base.params)
    save_pretrained(base.with_params(doubled), tmp_path / "edited")
    check_same(read(tmp_path / "edited"), {key: 2 * x for key, x in values(shapes, 0).items()} | others)
    save_pretrained(base, tmp_path / "half", dtype="bfloat16")
    half = {key: x.astype(ml_dtypes.bfloat16) for key, x in values(shapes, 0).items()}
    check_same(read(tmp_path / "half"), half | {**others, "scale": np.ones(1, ml_dtypes.bfloat16)})
    with pytest.raises(ValueError, match="1 parameters do not fit the GenericConfig: wte/weight is missing"):
        base.with_params({**doubled, "wte": {}})
    with pytest.raises(ValueError, match="no modelling code for model_type 'imagegpt'.*: only extract, apply, merge"):
        base.model({"tokens": np.zeros((1, 2), np.int32)})


def test_inspect_shows_keys_and_norms(tmp_path, capsys):
    settings, shapes, others = olmo()
    base = write(tmp_path / "base", settings, values(shapes, 0) | others)
    assert run(["inspect", str(base), "--norms", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["about"]["model_type"] == "olmo" and "model/layers/1" in found["blocks"]
    assert {leaf["key"] for leaf in found["leaves"]} == shapes.keys()
    assert run(["inspect", str(base), "--sites"]) == 2
    assert "no modelling code for model_type 'olmo'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "{base}", "--images", "digits:mnist/test"],
        ["transport", "--source", "{base}", "--target", "{base}", "--finetuned", "{base}", "--method", "theseus"],
        ["plan", "--source", "{base}", "--target", "{base}", "--finetuned", "{base}", "--method", "theseus"],
        ["compose", "{tau}", "--model", "{base}", "--images", "digits:mnist/test"],
    ],
)
def test_what_runs_a_model_says_what_works_without(tmp_path, capsys, words):
    base = write(tmp_path / "base", {"model_type": "electra"}, {"w.weight": np.ones((2, 2), np.float32)})
    streaming.extract(base, base, tmp_path / "tau.safetensors")
    words = [word.format(base=base, tau=tmp_path / "tau.safetensors") for word in words]
    output = [] if words[0] in ("evaluate", "plan") else ["--output", str(tmp_path / "out")]
    assert run([*words, *output]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "no modelling code for model_type 'electra'" in line and "extract, apply, merge, inspect and convert" in line


def test_what_is_no_model_of_floats(tmp_path):
    quantised = {"model_type": "olmo", "quantization_config": {"quant_method": "bitsandbytes"}}
    folder = write(tmp_path / "a", quantised, {"w.weight": np.ones((2, 2), np.uint8)})
    with pytest.raises(ValueError, match=r"a/config.json: the weights are quantised \(bitsandbytes\)"):
        streaming.extract(folder, folder, tmp_path / "tau.safetensors")
    one = write(tmp_path / "b", {"model_type": "olmo"}, {"w": np.ones(2, np.float32)})
    other = write(tmp_path / "c", {"model_type": "olmo"}, {"v": np.ones(2, np.float32)})
    with pytest.raises(ValueError, match="2 leaves differ"):
        streaming.extract(one, other, tmp_path / "tau.safetensors")
    relu = write(tmp_path / "d", {"model_type": "olmo", "hidden_act": "relu"}, {"w": np.ones(2, np.float32)})
    silu = write(tmp_path / "e", {"model_type": "olmo", "hidden_act": "silu"}, {"w": np.ones(2, np.float32)})
    with pytest.raises(ValueError, match=r"differ in what the models compute: hidden_act \('relu' and 'silu'\)"):
        streaming.extract(relu, silu, tmp_path / "tau.safetensors")
    assert not (tmp_path / "tau.safetensors").exists()


def test_a_command_opens_each_config_and_reads_each_weight_once(tmp_path, monkeypatch):
    settings, shapes, others = olmo()
    base = write(tmp_path / "base", settings, values(shapes, 0) | others, 2)
    tuned = write(tmp_path / "tuned", settings, values(shapes, 1) | others)
    opened, weights = [], []
    read_text, read_tensor = Path.read_text, reader.Tensors.read_into

    def text_of(path, *arguments, **options):
        opened.append(str(path))
        return read_text(path, *arguments, **options)

    def open_file(path, *arguments, **options):
        opened.append(str(path))
        return open(path, *arguments, **options)

    def tensor_of(self, key, out):
        weights.append((self.file_of[key], key))
        return read_tensor(self, key, out)

    monkeypatch.setattr(Path, "read_text", text_of)
    monkeypatch.setattr(reader, "open", open_file, raising=False)
    monkeypatch.setattr(reader.Tensors, "read_into", tensor_of)
    tau = f"{tmp_path}/a.safetensors"
    models = ["--pretrained", str(base), "--finetuned", str(tuned)]
    for words, sides in (
        (["extract", *models, "--output", tau], (base, tuned)),
        (["apply", tau, "--model", str(base), "--output", f"{tmp_path}/applied"], (base,)),
        (["merge", tau, tau, "--method", "average", "--model", str(base), "--output", f"{tmp_path}/merged"], (base,)),
    ):
        opened.clear()
        weights.clear()
        assert run(words) == 0
        files = [str(file) for side in sides for file in side.glob("*.safetensors")]
        for file in (*files, *(f"{side}/config.json" for side in sides)):
            assert opened.count(file) == 1, file
        read_of_models = [entry for entry in weights if entry[0] in files]
        twice = {entry for entry in read_of_models if read_of_models.count(entry) > 1}
        assert len(set(read_of_models)) == len(shapes) * len(sides)
        assert len(read_of_models) == len(set(read_of_models)) + len(twice)
        assert len({key for _, key in twice}) <= (words[0] == "extract"), twice  # is this its base?


def test_what_is_open_stays_open(tmp_path):
    settings, shapes, _ = olmo()
    base = write(tmp_path / "base", settings, values(shapes, 0))
    with open_checkpoint(base) as opened:
        one, other = from_pretrained(opened), from_pretrained(opened)
        assert opened.config is one.config is other.config and opened.name == str(base)
        streaming.extract(opened, opened, tmp_path / "tau.safetensors")
        assert from_pretrained(opened).params.keys() == one.params.keys()


SMALL = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
T5 = {"d_model": 8, "d_ff": 16, "d_kv": 4, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
IMAGES = {"image_size": 8, "patch_size": 4}
WHISPER = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 20}
WHISPER |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_mel_bins": 4}
WHISPER |= {"max_source_positions": 8, "max_target_positions": 8, "pad_token_id": 0}
REAL = {
    "LlamaForCausalLM": SMALL | {"vocab_size": 20, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "T5ForConditionalGeneration": T5,
    "GPT2LMHeadModel": {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8, "vocab_size": 20},
    "BertForSequenceClassification": SMALL | {"vocab_size": 20},
    "MixtralForCausalLM": SMALL | {"vocab_size": 20, "num_key_value_heads": 2, "num_local_experts": 2},
    "Dinov2Model": SMALL | IMAGES,
    "SiglipModel": {"text_config": SMALL | {"vocab_size": 20}, "vision_config": SMALL | IMAGES},
    "WhisperForConditionalGeneration": WHISPER,
}


def make_real(name, folder, seed):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(seed)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**REAL[name]))
    with torch.no_grad():
        for parameter in model.parameters():  # whatever is zero or one at first
            parameter.copy_(torch.round(torch.randn_like(parameter) * 64) / 128)
    model.save_pretrained(folder)
    return kind


@pytest.mark.torch
@pytest.mark.parametrize("name", REAL)
def test_models_of_transformers_come_back(tmp_path, name):
    for seed in (0, 1):
        kind = make_real(name, tmp_path / str(seed), seed)
    streaming.extract(tmp_path / "0", tmp_path / "1", tmp_path / "tau.safetensors")
    streaming.apply(tmp_path / "0", [tmp_path / "tau.safetensors"], tmp_path / "edited")
    edited, tuned = (kind.from_pretrained(tmp_path / folder).state_dict() for folder in ("edited", "1"))
    check_same({key: x.numpy() for key, x in edited.items()}, {key: x.numpy() for key, x in tuned.items()})


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of PEFT's own calls
@pytest.mark.parametrize(
    ("name", "modules", "initial"),
    [
        ("LlamaForCausalLM", "q_proj", True),
        ("LlamaForCausalLM", "q_proj", "pissa"),
        ("GPT2LMHeadModel", "c_attn", True),  # a fused kernel; pissa of one is refused
    ],
)
def test_adapters_of_models_of_transformers(tmp_path, name, modules, initial):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    kind = make_real(name, tmp_path / "base", 0)
    settings = {"r": 2, "target_modules": [modules], "fan_in_fan_out": name.startswith("GPT2")}
    model = peft.get_peft_model(
        kind.from_pretrained(tmp_path / "base"), peft.LoraConfig(init_lora_weights=initial, **settings)
    )
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "lora")
    streaming.extract_adapter(tmp_path / "base", tmp_path / "lora", tmp_path / "tau.safetensors", any_base=True)
    streaming.apply(tmp_path / "base", [tmp_path / "tau.safetensors"], tmp_path / "edited")
    edited, merged = kind.from_pretrained(tmp_path / "edited").state_dict(), model.merge_and_unload().state_dict()
    for key, tensor in merged.items():
        torch.testing.assert_close(edited[key], tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "asks", [{"architectures": ["LlamaModel"]}, {"rope_parameters": {"rope_type": "proportional"}}]
)
def test_a_known_family_whose_code_does_not_do_all_takes_arithmetic(tmp_path, asks, capsys):
    tensors = {"w.weight": np.ones((2, 2), np.float32)}
    base = write(tmp_path / "base", {"model_type": "llama", **asks}, tensors)
    tuned = write(tmp_path / "tuned", {"model_type": "llama", **asks}, {"w.weight": 3 * tensors["w.weight"]})
    out = tmp_path / "tau.safetensors"
    assert run(["extract", "--pretrained", str(base), "--finetuned", str(tuned), "--output", str(out)]) == 0
    np.testing.assert_array_equal(load_tree(out)[0]["w"]["weight"], np.full((2, 2), 2.0))
    capsys.readouterr()
    assert run(["evaluate", str(base), "--data", "digits:thick/test"]) == 2
    assert "no modelling code" in capsys.readouterr().err
