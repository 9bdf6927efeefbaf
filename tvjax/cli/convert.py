"""``tvjax convert``: a model as another kind of checkpoint."""

from __future__ import annotations

from tvjax.cli.commands import Json, Quiet, command
from tvjax.cli.output import show
from tvjax.cli.progress import progress
from tvjax.jobs.configs import ConvertConfig


@command(ConvertConfig)
def convert(config: ConvertConfig, quiet: Quiet = False, json: Json = False) -> None:
    """Write a model for Hugging Face, Orbax, MaxText or Tunix, or in another dtype."""
    with progress("convert", quiet or json) as report:
        from tvjax import jobs
        from tvjax.jobs import inputs

        found = jobs.convert(config, report)
    show(
        {"output": config.output, "source": config.source, "to": config.to, **found._asdict()},
        *(f"note: {note}" for note in inputs.left(found.left)),
        f"{config.output}: {config.source} as {config.to}, {found.parameters} parameters, {', '.join(found.dtypes)}",
        as_json=json,
        quiet=quiet,
    )
