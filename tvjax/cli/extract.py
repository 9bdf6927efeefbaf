"""``tvjax extract``: the task vector of a fine-tuning, as a file."""

from __future__ import annotations

from tvjax.cli.commands import Json, Quiet, command
from tvjax.cli.output import show
from tvjax.cli.progress import progress
from tvjax.jobs.configs import ExtractConfig


@command(ExtractConfig)
def extract(config: ExtractConfig, quiet: Quiet = False, json: Json = False) -> None:
    """Write a task vector, fine-tuned minus pre-trained parameters, of any model in safetensors."""
    with progress("extract", quiet or json) as report:
        from tvjax import jobs
        from tvjax.jobs import inputs

        found = jobs.extract(config, report)
    show(
        {"output": config.output, **found._asdict()},
        *(f"note: {note}" for note in (*found.notes, *inputs.left(found.left))),
        f"{config.output}: {found.leaves} leaves, {found.parameters} parameters, norm {found.norm:.4g}, of "
        f"{config.pretrained}",
        as_json=json,
        quiet=quiet,
    )
