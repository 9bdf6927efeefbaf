"""Every table that a command prints fits 80 columns: no line is longer, no number cut, no name lost."""

import re

import numpy as np
import pytest
from rich.table import Table

from tvjax.cli import output, plan
from tvjax.cli.fold import broken, folded
from tvjax.compose import init
from tvjax.evaluate.accuracy import Predictions
from tvjax.jobs import PlanConfig
from tvjax.jobs import plan as planned
from tvjax.report import inspection, inspection_tables, records, tables
from tvjax.report.comparison import compare
from tvjax.report.contents import contents
from tvjax.report.measurements import Measurement
from tvjax.report.measurements import compare as difference
from tvjax.report.sums import by_block, by_kind

LONG = "results/edited/clip-vit-large-patch14_sun397_theseus+gradfix"
HUB = "openai/clip-vit-base-patch32"


def predicted(right):
    labels = np.arange(1000) % 10
    return Predictions(np.where(np.arange(1000) < right, labels, (labels + 1) % 10), labels, np.ones(1000, np.float32))


def of_evaluation():
    seen = {HUB: predicted(612), LONG: predicted(874), f"{LONG}, copied": predicted(633)}
    names = tuple(f"a long name of class {number}" for number in range(10))
    reference = predicted(912).accuracy
    rows = [{"model": name, **records.of_model(one, names, reference)} for name, one in seen.items()]
    tokens = [{**row, "perplexity": 12345.678} for row in rows]
    pairs = [{"model": LONG, "baseline": HUB, **records.of_pair(seen[LONG], seen[HUB])}]
    curve = records.of_curve([0.0, 0.05], list(seen.values())[:2], seen[HUB], reference)
    last = {"model": "its own fine-tuned model", **records.of_accuracy(reference)}
    harness = {"model": LONG, "task": "arc_challenge", "metric": "acc_norm", "filter": "strict-match", "value": 0.51234}
    return {
        "evaluate": tables.evaluation_table(rows, "Zero-shot accuracy on images, %", last),
        "perplexity": tables.evaluation_table(tokens, "Next-token accuracy on texts, %", last | {"perplexity": 1.0}),
        "pairs": tables.pairs_table(pairs, "Differences on the same examples, points (p: McNemar)"),
        "agreement": tables.agreement_table(pairs, "Agreement, % of the answers"),
        "curve": tables.curve_table(curve, "With sun397.safetensors, %"),
        "classes": tables.class_table(rows, "By class, %"),
        "harness": tables.harness_table([harness | {"stderr": 0.01234, "examples": 1234}], "lm-evaluation-harness"),
    }


def of_demo():
    methods = ("zero_shot", "naive", "orthogonal_shift", "theseus+gradfix", "few_shot", "fine_tuned")
    rng = np.random.default_rng(0)
    found = [
        Measurement(task, "W", method, 5, draw, 1.0, float(rng.uniform(0.3, 0.9)))
        for task in ("mirrored", "upside_down", "thick", "inverted")
        for draw in range(3)
        for method in methods
    ]
    differences = [difference(found, "W", method, other) for method in methods[1:] for other in ("zero_shot", "naive")]
    edit = {"operation": "negation", "edit": "- upside_down + thick", "measured_on": "the control task", "alpha": 0.5}
    edit |= {"before": 0.912, "after": 0.885, "normalised": 0.97}
    return {
        "demo": tables.accuracy_table(found, differences, "W", "A to W: wider and deeper"),
        "arithmetic": tables.arithmetic_table([edit], "Arithmetic on A"),
    }


@pytest.fixture(scope="module")
def shown(models):
    source, wider = (contents(models[name]) for name in ("source", "wider"))
    compared = compare(source, contents(models["same"]))
    sums = inspection.measure(source)
    config = PlanConfig(source=models["source"], target=models["wider"], method="theseus+gradfix")
    of_plan = [text for text in plan._texts(planned(config), config) if isinstance(text, Table)]
    tau = {f"blocks/{layer}/up": np.ones((2, 2), np.float32) for layer in range(3)}
    return {
        **of_evaluation(),
        **of_demo(),
        "leaves": inspection_tables.leaf_table(wider),
        "every leaf": inspection_tables.leaf_table(wider, by_leaf=True),
        "norms": inspection_tables.norm_table(sums, sums),
        "norms of every leaf": inspection_tables.norm_table(sums, by_leaf=True),
        "blocks": inspection_tables.comparison_table(compared, by_block(compared.paths), "block"),
        "kinds": inspection_tables.comparison_table(compared, by_kind(compared.paths), "kind"),
        "coefficients": inspection_tables.coefficient_table(init([tau], names=[LONG])),
        "sites": inspection_tables.site_table(inspection.model_sites(wider)),
        "plan": of_plan[0],
        "memory": of_plan[1],
    }


NAMES = (
    *("evaluate", "perplexity", "pairs", "agreement", "curve", "classes", "harness", "demo", "arithmetic", "leaves"),
    *("every leaf", "norms", "norms of every leaf", "blocks", "kinds", "coefficients", "sites", "plan", "memory"),
)


@pytest.mark.parametrize("name", NAMES)
def test_no_table_is_wider_than_80_columns(name, shown, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    table = shown[name]
    output.show({}, table)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    words = {word for line in lines for word in line.split()}
    for column in table.columns:
        if column.justify == "right":
            assert all(set(str(cell).split()) <= words for cell in column.cells), column.header


@pytest.mark.parametrize("name", ["every leaf", "kinds", "plan"])
def test_a_path_goes_on_after_a_slash(name, shown, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    output.show({}, shown[name])
    printed = capsys.readouterr().out
    words = set(re.split(r"[\s/│]+", printed))
    paths = [
        str(cell) for column in shown[name].columns for cell in column.cells if re.fullmatch(r"\S+/\S+", str(cell))
    ]
    assert paths and max(map(len, paths)) > 20
    assert {word for path in paths for word in path.split("/")} <= words


@pytest.mark.parametrize("text", ["vision/embeddings/class_token", "a/b", "one two  three", "ä" * 9, "/x/.y_z/", ""])
def test_a_broken_text_fits_and_loses_nothing(text):
    for width in range(1, 31):
        lines = broken(text, width)
        assert max(map(len, lines)) <= width
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_all_tables_are_here(shown):
    assert set(shown) == set(NAMES)


def test_a_fold_repeats_the_names_and_keeps_every_number():
    table = Table("model", "of", title="Accuracy", caption="of all")
    for number in range(12):
        table.add_column(f"measure {number}", justify="right")
    for row in ("one", "two"):
        table.add_row(row, "x", *(f"{row} {number}" for number in range(12)))
    parts = folded(table, 60)
    assert len(parts) > 1 and [part.title for part in parts] == ["Accuracy", *[None] * (len(parts) - 1)]
    assert parts[-1].caption == "of all" and all([*map(str, part.columns[0].cells)] == ["one", "two"] for part in parts)
    headers = [
        str(column.header) for part in parts for column in part.columns if re.match("measure", str(column.header))
    ]
    assert headers == [f"measure {number}" for number in range(12)]
    (whole,) = folded(table, 400)
    assert (whole.title, whole.caption, len(whole.columns)) == ("Accuracy", "of all", 14)
