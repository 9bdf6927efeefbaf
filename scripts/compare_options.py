"""What the options of the maps cost or gain in accuracy, on the embedded models.

For every target, some tasks and some draws of five calibration images a class, each variant of Theseus and BiCo is
fitted, its scale chosen on the validation images, and measured on the test images, exactly as in the demo.

    python scripts/compare_options.py --draws 1
    python scripts/compare_options.py --draws 1 --variants "a quarter of the rank, randomised"    # that one anew
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

import tvjax
from tvjax.align.depth import pair_layers
from tvjax.arithmetic import apply
from tvjax.demo.base import draw_examples
from tvjax.demo.setup import QUICK, SOURCE, TARGETS, load, photographs, style_of
from tvjax.evaluate.accuracy import accuracy
from tvjax.evaluate.scale import choose_scale
from tvjax.report.measurements import paired_difference
from tvjax.stages import Model, layer_groups, reindex

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "a quarter of the rank, randomised": {"rank": 0.25, "method": "randomised"},
    "polar": {"method": "polar"},
    "tolerance 1e-3": {"rank_tolerance": 1e-3},
    "thin (published)": {"complete": "thin"},
    "published scale rule": {"scale_rule": "output"},
    "centred": {"center": True},
    "centred and whitened, 0.4": {"center": True, "whiten": 0.4},
    "embeddings too": {"transport_embeddings": True},
}
REINDEXED = "source rebuilt to the target's depth"


def rebuilt(source: Model, target: Model) -> Model:
    """The source with its layers repeated or dropped to the target's depth."""
    theirs, mine = layer_groups(source), layer_groups(target)
    name = "vision/blocks"
    return reindex(source, {name: pair_layers(len(theirs[name]), len(mine[name]))})


def main() -> None:
    """Measures every variant and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/compare_options.json"))
    parser.add_argument("--tasks", nargs="+", default=list(QUICK.tasks))
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS, REINDEXED], help="only these; others stay")
    arguments = parser.parse_args()
    measured = arguments.variants or [*VARIANTS, REINDEXED]
    source = load(SOURCE, tuple(arguments.tasks))
    records = []
    if arguments.variants and arguments.output.exists():
        records = [r for r in json.loads(arguments.output.read_text())["records"] if r["variant"] not in measured]
    for name in TARGETS:
        target = load(name, tuple(arguments.tasks))
        for task in arguments.tasks:
            images = photographs(task, style_of(task), QUICK)
            for draw in range(arguments.draws):
                examples = draw_examples(images.pool, task, draw, QUICK)
                for method in ("theseus", "bico"):
                    for variant in measured:
                        if variant == REINDEXED and name != "D":
                            continue
                        transport = getattr(tvjax, method)(**VARIANTS.get(variant, {}))
                        start = rebuilt(source.model, target.model) if variant == REINDEXED else source.model
                        state = tvjax.fit(transport, start, target.model, [examples])
                        tau = transport.apply(state, source.taus[task])
                        chosen = choose_scale(target.model, tau, QUICK.rotation_scales, images.validation)
                        edited = target.model.replace(params=apply(target.model.params, tau, chosen.scale))
                        found = accuracy(edited, images.test).fraction
                        records.append(
                            {"target": name, "task": task, "draw": draw, "method": method, "variant": variant,
                             "alpha": chosen.scale, "accuracy": found}
                        )  # fmt: skip
                print(f"A to {name}, {task}, draw {draw}", flush=True)
    summary = []
    for method in ("theseus", "bico"):
        default = {key(r): r["accuracy"] for r in records if (r["method"], r["variant"]) == (method, "default")}
        for variant in [*VARIANTS, REINDEXED]:
            mine = [r for r in records if (r["method"], r["variant"]) == (method, variant)]
            if not mine:
                continue
            gain = paired_difference([r["accuracy"] - default[key(r)] for r in mine])
            mean = float(np.mean([r["accuracy"] for r in mine]))
            summary.append({"method": method, "variant": variant, "accuracy": mean, "gain": gain._asdict()})
            half_width = 100 * (gain.half_width or 0)
            print(f"{method:8} {variant:40} {100 * mean:5.1f} {100 * gain.mean:+5.1f} +- {half_width:.1f}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"summary": summary, "records": records}, indent=1) + "\n")


def key(record: dict[str, Any]) -> tuple[str, str, int]:
    """What a record is paired by."""
    return record["target"], record["task"], record["draw"]


if __name__ == "__main__":
    main()
