"""``tvjax compose``: learned coefficients of task vectors."""

from __future__ import annotations

from tvjax.cli.commands import Json, Quiet, command
from tvjax.cli.output import counted, show
from tvjax.cli.progress import progress
from tvjax.jobs.configs import ComposeConfig


@command(ComposeConfig)
def compose(config: ComposeConfig, json: Json = False, quiet: Quiet = False) -> None:
    """Learn coefficients of task vectors on a few examples, and save the model that they give.

    By default, with labels, what did best with one and two of them a class: start from the best vector, and fine-tune
    the model's leaves along with the coefficients (--start best --tune). aTLAS as published is --start zero --no-tune.
    With --teacher, a fine-tuned model, no labels are needed: its scores of the classes are learned from.
    """
    with progress(config.learned_by, quiet) as report:
        from tvjax import jobs

        found = jobs.compose(config, report)
    also = f" and {found.tuned_leaves} leaves" if found.tuned_leaves else ""
    accuracy = found.validation_accuracy
    by = "" if accuracy is None else f", accuracy {100 * accuracy:.1f} % on {config.validation}"
    show(
        found._asdict(),
        *(f"note: {note}" for note in found.notes),
        f"{found.output}: {found.model} with {counted(len(found.task_vectors), 'task vector')}, {found.coefficients} "
        f"coefficients{also},",
        f"learning rate {found.learning_rate:g}, {found.epochs} epochs{by}",
        as_json=json,
        quiet=quiet,
    )
