import dataclasses

import numpy as np
import pytest

from tvjax.cli.main import run
from tvjax.demo import experiment, language, setup
from tvjax.demo.transports import EQUAL_SHAPES, Bench, methods
from tvjax.report.measurements import in_order

STUB = dataclasses.replace(
    language.QUICK,
    tasks=("reviews",),
    variants=(("blocks", {"heads": "blocks"}),),
    labels_per_class=2,
    unit_scales=(0.0, 1.0),
    rotation_scales=(0.0, 1.0),
    few_shot_steps=2,
    few_shot_checkpoints=1,
    learning_rates=(1e-3,),
    validation=6,
    test=10,
    targets=("llama-C",),
)


def test_every_method_is_measured_and_written(tmp_path):
    steps = []
    findings = language.run(STUB, lambda *step: steps.append(step))
    assert in_order(m.method for m in findings.measurements) == methods(STUB)
    assert all(m.target == "llama-C" and 0 <= m.accuracy <= 1 for m in findings.measurements)
    assert findings.counts == {"reviews": {"calibration": 4, "validation": 6, "test": 10}}
    assert {(c.method, c.baseline) for c in findings.comparisons} >= {("bico", "naive"), ("naive", "zero_shot")}
    assert all(c.over_examples.pairs == 10 for c in findings.comparisons)
    gaps = {c.method: c.over_examples.mean for c in findings.comparisons if c.baseline == "zero_shot"}
    reached = {m.method: m.accuracy for m in findings.measurements}
    assert all(abs(gap - (reached[method] - reached["zero_shot"])) < 1e-9 for method, gap in gaps.items())
    assert "over test texts" in experiment.footnotes(findings)[-1]
    assert steps == [(1, 1, f"{language.TITLES['llama-C']}, reviews")]
    content = experiment.results(findings)
    assert content["settings"]["texts"] == findings.counts and content["settings"]["targets"] == ("llama-C",)
    assert len(experiment.write(findings, tmp_path)) == 4


def test_a_target_of_another_shape_has_no_copy():
    source, target = (language.load(name, "reviews") for name in ("llama-A", "llama-B"))
    bench = Bench(source, target, "reviews", language.examples("llama-B", "reviews", STUB), STUB)
    assert not bench.same_shape
    assert not {result.method for result in bench.without_examples()} & set(EQUAL_SHAPES)


def test_texts_are_fixed_by_their_names_and_the_long_ones_go_apart():
    one, again = (language.examples("llama-A", "topics", language.QUICK) for _ in range(2))
    assert [len(part.labels) for part in one.test] == [len(part.labels) for part in again.test]
    counts = np.bincount(np.concatenate([part.labels for part in one.test]))
    assert counts.tolist() == [language.QUICK.test // 8] * 8
    short, long = one.test
    assert short.inputs["tokens"].shape[1] == language.SHORT < long.inputs["mask"].sum(1).min()
    np.testing.assert_array_equal(short.inputs["tokens"], again.test[0].inputs["tokens"])


@pytest.mark.parametrize(
    ("change", "message"),
    [({"tasks": ()}, "found 0 tasks"), ({"draws": 0}, "0 draws"), ({"targets": ("gpt",)}, "no embedded target 'gpt'")],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        language.run(dataclasses.replace(STUB, **change))


def test_the_command_measures_language_alone_or_after_the_digits(monkeypatch, tmp_path, capsys):
    ran = []

    def of(kind, full, titles):
        counts = {str(n): {"calibration": n, "validation": 6, "test": 5 + n} for n in (4, 8)}
        empty = experiment.Findings(STUB, titles, kind, counts, *[[]] * 4, {}, 1)
        return lambda settings, progress: ran.append((kind, settings == full)) or empty

    monkeypatch.setattr(experiment, "run", of("photographs", setup.FULL, {}))
    monkeypatch.setattr(language, "run", of("texts", language.FULL, {}))
    monkeypatch.setattr(experiment, "write", lambda findings, folder: [folder / findings.kind])
    assert run(["demo", "--language", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert ran == [("texts", False)] and "language/texts" in printed
    assert "9 to 13 test texts a task" in printed and "same 6 labelled validation texts" in printed
    assert run(["demo", "--full", "--output", str(tmp_path), "--json"]) == 0
    assert ran[1:] == [("photographs", True), ("texts", True)]
    assert '"language": {' in capsys.readouterr().out
    assert run(["demo", "--output", str(tmp_path)]) == 0
    assert ran[3:] == [("photographs", False)]
