"""``tvjax merge``: several task vectors of one model in one."""

from __future__ import annotations

from tvjax.cli.commands import Json, Quiet, command
from tvjax.cli.output import counted, show
from tvjax.cli.progress import progress
from tvjax.jobs.configs import MergeConfig


@command(MergeConfig)
def merge(config: MergeConfig, json: Json = False, quiet: Quiet = False) -> None:
    """Merge task vectors of one model into one, and write it or the model with it.

    A leaf that only some of them cover, as with adapters of different target modules, counts as zero in the others. A
    YAML recipe of mergekit is taken too: tvjax merge --config FILE --output PATH.
    """
    with progress(config.method, quiet) as report:
        from tvjax import jobs

        found = jobs.merge(config, report)
    show(
        found._asdict(),
        *(f"note: {note}" for note in found.notes),
        f"{found.output}: {counted(len(found.task_vectors), 'task vector')} of {found.base_model or 'one model'} "
        f"merged by {found.method}",
        f"norm {found.norm:.4g}, scaled by {found.scale:g}; by leaf: {found.leaf_report.name}",
        as_json=json,
        quiet=quiet,
    )
