"""Recipes of mergekit, each against mergekit's own formula on the tensors of the files, in numpy and float64."""

import shutil

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from tests.jobs.test_texts import write_llama
from tvjax.cli.main import run
from tvjax.jobs import MergeConfig, from_mergekit, merge

LAYERS = 3


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Many tiny programs are compiled here."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base of three layers and two models fine-tuned from it."""
    folder = tmp_path_factory.mktemp("mergekit")
    found = {"base": write_llama(folder / "base", 8, LAYERS, 2, 0)}
    for number, name in enumerate(("a", "b"), start=1):
        shutil.copytree(found["base"], folder / name)
        rng = np.random.default_rng(number)
        file = folder / name / "model.safetensors"
        tensors = {key: (x + 0.3 * rng.normal(size=x.shape)).astype(np.float32) for key, x in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
        found[name] = str(folder / name)
    return found


@pytest.fixture
def recipe(models, tmp_path):
    """Writes a recipe, the names of models being those of the fixture."""

    def write(**keys):
        def placed(value):
            if isinstance(value, dict):
                return {key: placed(each) for key, each in value.items()}
            return [placed(each) for each in value] if isinstance(value, list) else models.get(value, value)

        file = tmp_path / "mergekit.yaml"
        file.write_text(
            yaml.safe_dump({key: placed(value) if key != "parameters" else value for key, value in keys.items()})
        )
        return file

    return write


def tensors(folder):
    return {key: np.asarray(x, np.float64) for key, x in load_file(f"{folder}/model.safetensors").items()}


def depth(key):
    """mergekit's t: 0 before the layers, 1 after them."""
    numbers = [int(word) for word in key.split(".") if word.isdigit()]
    return numbers[0] / (LAYERS - 1) if numbers else float("embed" not in key)


def at(setting, key):
    """The value of a setting at a tensor, as mergekit evaluates it."""
    if not isinstance(setting, list):
        return setting
    if not isinstance(setting[0], dict):
        return np.interp(depth(key) * (len(setting) - 1), range(len(setting)), setting)
    return next(
        (at(each["value"], key) for each in setting if each.get("filter", "*") in ("*", key) or each["filter"] in key),
        None,
    )


def merged_by_hand(models, rule, names=("base", "a", "b")):
    """The rule on ``(key, {name: tensor})`` of every tensor."""
    found = {name: tensors(models[name]) for name in names}
    return {key: rule(key, {name: found[name][key] for name in names}) for key in found[names[0]]}


def check(file, output, expected, tolerance=2e-5):
    imported = from_mergekit(file, output)
    assert isinstance(imported.config, MergeConfig)
    merge(imported.config)
    found = tensors(output)
    assert found.keys() == expected.keys()
    for key, x in expected.items():
        np.testing.assert_allclose(found[key], x, rtol=0, atol=tolerance, err_msg=key)
    assert not list(output.parent.glob(".tvjax-*"))
    return imported


def sparse_magnitude(x, density):
    kept = np.argsort(-np.abs(x).ravel(), kind="stable")[: int(density * x.size)]
    mask = np.zeros(x.size)
    mask[kept] = 1
    return x * mask.reshape(x.shape)


def without_outliers(x, density, gamma):
    if density >= 1:
        return x
    size, top = x.size, int(gamma * x.size)
    bottom = size - int(density * size) - top
    top, bottom = (top + bottom, 0) if bottom < 0 else (top, bottom)
    mask = np.zeros(size)
    mask[np.argsort(np.abs(x).ravel(), kind="stable")[bottom : size - top]] = 1
    return x * mask.reshape(x.shape)


def gta(deltas, weights, consensus, normalize):
    """mergekit's generalised task arithmetic, after sparsification."""
    weighted = [w * x for w, x in zip(weights, deltas, strict=True)]
    if not consensus:
        return sum(weighted) / (sum(weights) if normalize else 1)
    majority = np.where(sum(weighted) >= 0, 1, -1)
    masks = [np.sign(x) == majority for x in weighted]
    divisor = sum(w * mask for w, mask in zip(weights, masks, strict=True))
    return sum(x * mask for x, mask in zip(weighted, masks, strict=True)) / (
        np.where(divisor == 0, 1, divisor) if normalize else 1
    )


BY_PLACE = [{"filter": "mlp", "value": 0.5}, {"filter": "self_attn", "value": [0.25, 1.0]}, {"value": 2.0}]


def test_task_arithmetic(models, recipe, tmp_path):
    weights = BY_PLACE, 0.75
    file = recipe(
        merge_method="task_arithmetic", base_model="base", dtype="bfloat16",
        models=[
            {"model": "a", "parameters": {"weight": weights[0]}}, {"model": "base"},
            {"model": "b", "parameters": {"weight": weights[1]}},
        ],
        parameters={"lambda": 0.7, "int8_mask": True, "normalize": True},
    )  # fmt: skip

    def rule(key, x):
        numbers = [at(each, key) for each in weights]
        return x["base"] + 0.7 * gta([x["a"] - x["base"], x["b"] - x["base"]], numbers, False, True)

    imported = check(file, tmp_path / "out", merged_by_hand(models, rule))
    assert [note.split()[0] for note in imported.notes] == ["int8_mask", "dtype"]


@pytest.mark.parametrize("base", [True, False])
def test_linear(models, recipe, tmp_path, base):
    weights = {"base": 0.5, "a": [1.0, 0.0, 2.0], "b": 1.5}
    names = ("base", "a", "b") if base else ("a", "b")
    file = recipe(
        merge_method="linear", models=[{"model": name, "parameters": {"weight": weights[name]}} for name in names],
        **({"base_model": "base"} if base else {}),
    )  # fmt: skip

    def rule(key, x):
        numbers = {name: at(weights[name], key) for name in names}
        return sum(numbers[name] * x[name] for name in names) / sum(numbers.values())

    check(file, tmp_path / "out", merged_by_hand(models, rule, names))


def test_ties(models, recipe, tmp_path):
    density = [0.5, 1.0]
    file = recipe(
        merge_method="ties", base_model="base",
        models=[{"model": "a", "parameters": {"weight": 0.5}}, {"model": "b", "parameters": {"density": 0.25}}],
        parameters={"weight": 1.0, "density": density},
    )  # fmt: skip

    def rule(key, x):
        shares = {"a": at(density, key), "b": 0.25}
        deltas = [sparse_magnitude(x[name] - x["base"], share) for name, share in shares.items()]
        return x["base"] + gta(deltas, (0.5, 1.0), True, True)

    check(file, tmp_path / "out", merged_by_hand(models, rule))


@pytest.mark.parametrize(("method", "density", "gamma"), [("breadcrumbs", 0.5, 0.25), ("breadcrumbs_ties", 0.75, 0.5)])
def test_breadcrumbs(models, recipe, tmp_path, method, density, gamma):
    file = recipe(
        merge_method=method, base_model="base", models=[{"model": "a"}, {"model": "b"}],
        parameters={"weight": 0.5, "density": [{"filter": "norm", "value": 1.0}, {"value": density}], "gamma": gamma},
    )  # fmt: skip

    def rule(key, x):
        deltas = [without_outliers(x[name] - x["base"], 1 if "norm" in key else density, gamma) for name in "ab"]
        return x["base"] + gta(deltas, (0.5, 0.5), method == "breadcrumbs_ties", False)

    check(file, tmp_path / "out", merged_by_hand(models, rule))


def arc(t, a, b, axis=None, straight=1e-8):
    sizes = [np.sqrt((x**2).sum(axis, keepdims=True)) for x in (a, b)]
    theta = np.arccos(np.clip((a / sizes[0] * b / sizes[1]).sum(axis, keepdims=True), -1, 1))
    turned = (np.sin((1 - t) * theta) * a + np.sin(t * theta) * b) / np.sin(theta)
    return np.where(np.abs(np.cos(theta)) > 1 - straight, (1 - t) * a + t * b, turned)


def test_slerp_of_one_slice_of_all_layers(models, recipe, tmp_path):
    t = [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"value": 0.25}]
    keys = {
        "merge_method": "slerp", "base_model": "a", "parameters": {"t": t},
        "slices": [{"sources": [{"model": name, "layer_range": [0, LAYERS]} for name in ("b", "a")]}],
    }  # fmt: skip
    expected = merged_by_hand(models, lambda key, x: arc(at(t, key), x["a"], x["b"], straight=5e-4), ("a", "b"))
    check(recipe(**keys), tmp_path / "out", expected)
    keys["slices"][0]["sources"][0]["layer_range"] = [0, 2]
    with pytest.raises(ValueError, match=r"layer_range \[0, 2\] of models with 3 layers: only slices of all layers"):
        from_mergekit(recipe(**keys), tmp_path / "other")


@pytest.mark.parametrize(
    ("more", "axis", "base"),
    [
        ({}, None, True),
        ({"nuslerp_flatten": False}, -1, False),
        ({"nuslerp_flatten": False, "nuslerp_row_wise": True}, 0, True),
    ],
)
def test_nuslerp(models, recipe, tmp_path, more, axis, base):
    file = recipe(
        merge_method="nuslerp", parameters=more, **({"base_model": "base"} if base else {}),
        models=[{"model": "a", "parameters": {"weight": 1}}, {"model": "b", "parameters": {"weight": 3}}],
    )  # fmt: skip

    def rule(key, x):
        start = x["base"] * base
        return start + arc(0.75, x["a"] - start, x["b"] - start, axis)

    check(file, tmp_path / "out", merged_by_hand(models, rule))


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_means_on_the_sphere(models, recipe, tmp_path, method, base):
    if method == "karcher" and base:
        with pytest.raises(ValueError, match="leave base_model out"):
            from_mergekit(recipe(merge_method=method, base_model="base", models=[{"model": "a"}]), tmp_path / "out")
        return
    parameters = {"weight": 1.0} if method == "multislerp" else {}
    file = recipe(
        merge_method=method, models=[{"model": "a"}, {"model": "b"}], parameters=parameters,
        **({"base_model": "base"} if base else {}),
    )  # fmt: skip

    def rule(key, x):
        start = x["base"] * base
        vectors = [x[name] - start for name in "ab"]
        norms = [np.linalg.norm(v) for v in vectors]
        mean = sum(v / n for v, n in zip(vectors, norms, strict=True))
        return start + mean / np.linalg.norm(mean) * sum(norms) / 2  # of two: the middle of the arc

    check(file, tmp_path / "out", merged_by_hand(models, rule))


def test_model_stock_and_sce(models, recipe, tmp_path):
    def stock(key, x):
        a, b = x["a"] - x["base"], x["b"] - x["base"]
        cosine = np.clip((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b), 0, 1)
        return x["base"] + 2 * cosine / (1 + cosine) * (a + b) / 2

    def sce(key, x):
        deltas = [x[name] - x["base"] for name in "ab"]
        squares = [(d**2).sum() for d in deltas]
        majority = np.where(sum(deltas) >= 0, 1, -1)
        shares = [s / sum(squares) * (np.sign(d) == majority) for s, d in zip(squares, deltas, strict=True)]
        return x["base"] + sum(s * d for s, d in zip(shares, deltas, strict=True)) / sum(shares)

    for method, rule in (("model_stock", stock), ("sce", sce)):
        file = recipe(merge_method=method, base_model="base", models=[{"model": "a"}, {"model": "b"}])
        check(file, tmp_path / method, merged_by_hand(models, rule))


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_what_is_dropped_at_random(models, recipe, tmp_path, method):
    """With a density of 1 by the formula; else every entry is dropped, or divided by its probability."""
    parameters = {"weight": 0.5, "density": [{"filter": "mlp", "value": 0.5}, {"value": 1.0}], "epsilon": 0.25}
    parameters = {name: value for name, value in parameters.items() if "della" in method or name != "epsilon"}
    file = recipe(
        merge_method=method, base_model="base", models=[{"model": "a"}, {"model": "b"}], parameters=parameters
    )
    found = from_mergekit(file, tmp_path / "out")
    merge(found.config)
    result, base, a, b = (
        tensors(folder) for folder in (tmp_path / "out", *(models[name] for name in ("base", "a", "b")))
    )
    for key, x in base.items():
        deltas = [a[key] - x, b[key] - x]
        if "mlp" not in key:
            np.testing.assert_allclose(result[key], x + sum(deltas) / 2, atol=2e-5, err_msg=key)
        elif method == "dare_linear":
            options = np.stack([x + i * deltas[0] + j * deltas[1] for i in (0, 1) for j in (0, 1)])
            assert np.abs(options - result[key]).min(0).max() < 2e-5
        elif method == "della_linear":  # the largest of a row of the file: with 0.75
            row = np.abs(deltas[0]).argmax(1), np.abs(deltas[1]).argmax(1)
            for number, (i, j) in enumerate(zip(*row, strict=True)):
                if i == j:
                    parts = [deltas[n][number, i] * 0.5 / 0.75 for n in range(2)]
                    sums = [x[number, i] + p for p in (0, parts[0], parts[1], sum(parts))]
                    assert np.abs(np.array(sums) - result[key][number, i]).min() < 2e-5
    assert any("draws" in note for note in found.notes)


@pytest.mark.parametrize(
    ("method", "more", "combine"),
    [("dare_ties", {}, "ties_sum"), ("dare_ties", {"normalize": True}, "ties"), ("della", {}, "ties"),
     ("della", {"normalize": False}, "ties_sum"), ("breadcrumbs_ties", {"normalize": True}, "ties")],
)  # fmt: skip
def test_elections_and_divisors(recipe, tmp_path, method, more, combine):
    file = recipe(merge_method=method, base_model="base", models=AB, parameters={"weight": 0.5, **more})
    found = from_mergekit(file, tmp_path / "out", seed=3).config
    assert found.options["combine"] == combine and found.options["weights"] == [0.5, 0.5] and found.seed == 3
    assert found.options["density"] == [1.0, 1.0] and found.options.get("epsilon", [0.0, 0.0]) == [0.0, 0.0]


# -- what is refused ---------------------------------------------------------------------------------------------------

AB = [{"model": "a"}, {"model": "b"}]
HALF = {"weight": 0.5}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"merge_method": "passthrough", "models": AB}, "passthrough' has no counterpart here: .*frankenmerges"),
        ({"merge_method": "cabs", "models": AB}, "those that both have are linear, task_arithmetic, ties"),
        ({"merge_method": "linear", "modules": {}}, "modules is not read here"),
        ({"merge_method": "linear", "models": AB, "chat_template": "auto"}, "chat_template is not read here"),
        (
            {"merge_method": "linear", "slices": [{"sources": []}] * 2},
            "found 2 slices: .*frankenmerges.*merge whole models",
        ),
        ({"merge_method": "linear"}, "give a list of models"),
        ({"merge_method": "linear", "models": []}, "there are no models"),
        ({"merge_method": "linear", "models": [{"name": "a"}]}, "an entry of models has model and parameters"),
        ({"merge_method": "linear", "models": [AB[0], AB[0]]}, "stands twice"),
        ({"merge_method": "linear", "models": AB}, "weight is missing for .*a"),
        ({"merge_method": "linear", "models": AB, "parameters": {"weight": 0.0}}, "the weights add up to 0"),
        (
            {"merge_method": "linear", "models": AB, "parameters": {**HALF, "normalize": "yes"}},
            "normalize must be true or",
        ),
        ({"merge_method": "linear", "models": AB, "parameters": {**HALF, "t": 1}}, "the parameter t of linear has no"),
        ({"merge_method": "linear", "models": AB, "parameters": {"weight": "1"}}, "weight must be a number, a list of"),
        (
            {"merge_method": "linear", "models": AB, "parameters": {"weight": [{"filter": "mlp", "value": 1}]}},
            "weight is missing for .*a at model.embed_tokens",
        ),
        (
            {"merge_method": "linear", "models": AB, "parameters": {"weight": 2.0, "normalize": False}},
            "add up to 1, found 4",
        ),
        (
            {"merge_method": "linear", "models": AB, "base_model": "base", "parameters": HALF},
            "leave base_model out, or list",
        ),
        ({"merge_method": "ties", "models": AB, "parameters": HALF}, "ties needs base_model"),
        ({"merge_method": "ties", "models": [AB[0]], "base_model": "a"}, "no model beside base_model"),
        (
            {"merge_method": "ties", "models": AB, "base_model": "base", "parameters": {**HALF, "rescale": True}},
            "rescale is not done here for ties",
        ),
        (
            {"merge_method": "ties", "models": AB, "base_model": "base", "parameters": {**HALF, "lambda": [0.5, 1]}},
            "lambda must be one number here",
        ),
        (
            {"merge_method": "slerp", "models": AB, "base_model": "base", "parameters": {"t": 0.5}},
            "one of which is base_model",
        ),
        (
            {"merge_method": "nuslerp", "models": AB, "base_model": "a", "parameters": HALF},
            "neither of which is base_model",
        ),
        (
            {"merge_method": "model_stock", "models": AB, "base_model": "base", "parameters": {"filter_wise": True}},
            "filter_wise is not done here",
        ),
        (
            {"merge_method": "linear", "models": AB, "tokenizer_source": "union", "parameters": HALF},
            "tokenizer_source 'union'",
        ),
        ({"merge_method": "linear", "models": [{"model": "m+lora"}]}, "a model with an adapter: merge adapters by"),
        ({"merge_method": "linear", "models": [{"model": "m@main"}]}, "names a revision"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(recipe, tmp_path, keys, message):
    file = recipe(**keys)
    with pytest.raises(ValueError, match=f"mergekit.yaml', a recipe of mergekit: .*{message}") as found:
        from_mergekit(file, tmp_path / "out")
    assert len(str(found.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


# -- on the command line -----------------------------------------------------------------------------------------------


def test_tvjax_merge_takes_a_recipe_of_mergekit(models, recipe, tmp_path, capsys):
    file = recipe(
        merge_method="task_arithmetic", base_model="base", models=[{"model": "a"}, {"model": "b"}],
        parameters={"weight": [{"filter": "mlp", "value": [0.0, 1.0]}, {"value": 0.5}], "int8_mask": True},
    )  # fmt: skip
    assert run(["merge", "--config", str(file), "--output", str(tmp_path / "out")]) == 0
    found = capsys.readouterr()
    assert "note: int8_mask saves mergekit memory" in found.err and "2 task vectors" in found.out
    again = tmp_path / "again"
    assert run(["--config", str(tmp_path / "out" / "tvjax.yaml"), f"output={again}", "--quiet"]) == 0
    for key, x in tensors(tmp_path / "out").items():
        np.testing.assert_array_equal(tensors(again)[key], x)
    assert run(["merge", "--config", str(recipe(merge_method="passthrough", models=AB)), "--output", str(again)]) == 2
    line = capsys.readouterr().err
    assert len(line.splitlines()) == 1 and "passthrough" in line


def test_models_are_merged_by_their_folders(models, tmp_path, capsys):
    """Without a recipe of mergekit too: the task vector of a folder is made leaf by leaf."""
    words = ["merge", models["a"], models["b"], "--method", "average", "--output"]
    assert run([*words, str(tmp_path / "out"), "--model", models["base"], "--quiet"]) == 0
    expected = merged_by_hand(models, lambda key, x: (x["a"] + x["b"]) / 2)
    for key, x in tensors(tmp_path / "out").items():
        np.testing.assert_allclose(x, expected[key], atol=1e-6)
    assert run([*words, str(tmp_path / "tau.safetensors")]) == 2
    assert "is a model: give --model, the one that it was fine-tuned from" in capsys.readouterr().err
    base = ["--model", models["base"], "--options", "base=true"]
    assert run([*words[:4], "ties", "--output", str(tmp_path / "other"), *base]) == 2
    assert "ties has no option 'base'" in capsys.readouterr().err
    assert run([*words[:4], "karcher_mean", "--output", str(tmp_path / "other"), *base[:3], "base=1"]) == 2
    assert "base is 1, expected true" in capsys.readouterr().err
    assert run([*words[:4], "karcher_mean", "--output", str(tmp_path / "a.safetensors"), "--options", "base=true"]) == 2
    assert "base=true merges the models" in capsys.readouterr().err
    assert not (tmp_path / "other").exists() and not list(tmp_path.glob(".tvjax-*"))
