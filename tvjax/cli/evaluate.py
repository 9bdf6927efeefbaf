"""``tvjax evaluate``: accuracies of models, one beside the other, or along the scale of a task vector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tvjax.cli.commands import Json, Quiet, command
from tvjax.cli.output import show
from tvjax.cli.progress import progress
from tvjax.jobs.configs import EvaluateConfig

if TYPE_CHECKING:
    from tvjax.jobs._evaluate import Evaluated


@command(EvaluateConfig)
def evaluate(
    config: EvaluateConfig,
    by_class: Annotated[bool, typer.Option("--by-class", help="Print the accuracy of each class too.")] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Accuracy with its 95 % interval (Wilson), and how sure a difference on the same examples is.

    That of a CLIP is zero-shot, that of a ViT by its own head, that of a language model by the words of the classes
    that it would say next; on texts without classes that of the next token, with the perplexity. With several models
    every pair is compared: the difference of accuracies with an interval for the same examples, McNemar's exact test,
    and how often the two predict the same.
    """
    with progress("evaluate", quiet or json) as report:
        from tvjax import jobs
        from tvjax.jobs.harness import Harnessed
        from tvjax.report import tables

        found = jobs.evaluate(config, report)
    if isinstance(found, Harnessed):
        table = tables.harness_table(found.models, f"lm-evaluation-harness {found.harness}")
        show(found._asdict(), table, as_json=json, quiet=quiet)
        return
    said = [f"note: {note}" for note in found.notes]
    show(found._asdict(), *said, *_tables(found, by_class), as_json=json, quiet=quiet)


def _tables(found: Evaluated, by_class: bool) -> list[Any]:
    from tvjax.report import tables

    kind = "Next-token accuracy" if not found.classes else "Zero-shot accuracy" if found.templates else "Accuracy"
    title = f"{kind} on {found.examples['source']}, %"
    shown: list[Any] = [tables.evaluation_table(found.models, title, found.reference)]
    if found.pairs:
        shown.append(tables.pairs_table(found.pairs, "Differences on the same examples, points (p: McNemar)"))
        shown.append(tables.agreement_table(found.pairs, "Agreement, % of the answers"))
    if found.curve is not None:
        shown.append(tables.curve_table(found.curve["points"], f"With {found.curve['task_vector']}, %"))
        best = found.curve["best_scale"]
        shown.append(f"best: scale {best:g}; a scale is to be chosen on examples that are no test")
    if by_class:
        shown.append(tables.class_table(found.models, "By class, %"))
    return shown
