"""``tvjax transport``: one task vector moved into another model."""

from __future__ import annotations

from tvjax.cli.commands import Json, Quiet, command
from tvjax.cli.output import show
from tvjax.cli.progress import progress
from tvjax.jobs.configs import TransportConfig


@command(TransportConfig)
def transport(config: TransportConfig, quiet: Quiet = False, json: Json = False) -> None:
    """Move what a fine-tuning learned into another model, and save the edited model with a report by leaf."""
    with progress(config.method or "transport", quiet or json) as report:
        from tvjax import jobs

        found = jobs.transport(config, report)
    show(
        found._asdict(),
        *(f"note: {note}" for note in found.notes),
        f"{found.output}: {'an adapter for ' if found.form == 'adapter' else ''}{found.target} with {found.scale:g} "
        f"times the task of {found.finetuned}, moved by {found.method}",
        f"norm {found.norms['source']:.4g} in the source, {found.norms['target']:.4g} in the target; by leaf: "
        "leaf_report.txt, and as a picture: norms.png",
        *(
            [f"on the validation examples {100 * max(found.validation['accuracy']):.1f} %"]
            if found.validation is not None
            else []
        ),
        *(
            [
                f"then taught by the fine-tuned source ({config.refine}): its loss on {found.refined['examples']} "
                f"examples {found.refined['loss_of_start']:.4g} -> {found.refined['loss']:.4g}"
            ]
            if found.refined is not None
            else []
        ),
        *(
            [f"copied as it is, at its best scale {found.copy['scale']:g}: {100 * found.copy['accuracy']:.1f} %"]
            if found.copy is not None
            else []
        ),
        as_json=json,
        quiet=quiet,
    )
