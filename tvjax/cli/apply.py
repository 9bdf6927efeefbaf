"""``tvjax apply``: task vectors added to the model that they were made for."""

from __future__ import annotations

from tvjax.cli.commands import Json, Quiet, command
from tvjax.cli.output import counted, show
from tvjax.cli.progress import progress
from tvjax.jobs.configs import ApplyConfig


@command(ApplyConfig)
def apply(config: ApplyConfig, quiet: Quiet = False, json: Json = False) -> None:
    """Add task vectors to the model that they were made for, tensor by tensor, and save it."""
    with progress("apply", quiet or json) as report:
        from tvjax import jobs
        from tvjax.jobs import inputs

        found = jobs.apply(config, report)
    given = {name: getattr(config, name) for name in ("output", "model", "task_vectors", "scale")}
    show(
        {**given, **found._asdict()},
        *(f"note: {note}" for note in inputs.left(found.left)),
        f"{config.output}: {config.model} with {counted(len(config.task_vectors), 'task vector')}, "
        f"scale {config.scale:g}; {len(found.changed)} leaves changed, {len(found.copied)} copied, "
        f"{found.parameters} parameters",
        as_json=json,
        quiet=quiet,
    )
