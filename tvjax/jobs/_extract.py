"""The task vector of a fine-tuning, as a file."""

from __future__ import annotations

from typing import Any

import jax

from tvjax.checkpoints import streaming
from tvjax.checkpoints.atomic import new_folder
from tvjax.checkpoints.folder import open_checkpoint
from tvjax.checkpoints.huggingface import check_new
from tvjax.checkpoints.json_files import write_json
from tvjax.checkpoints.streaming import Extracted, ExtractedAdapter
from tvjax.jobs import inputs
from tvjax.jobs.configs import ExtractConfig
from tvjax.jobs.recipes import recipe_of, write_recipe
from tvjax.progress import Progress


def extract(config: ExtractConfig, progress: Progress | None = None) -> Extracted | ExtractedAdapter:
    """Writes a task vector, fine-tuned minus pre-trained parameters: by default of the vision tower of a CLIP or a ViT.

    With a rank or an energy it is written as an adapter, with what each leaf lost in ``leaf_report.json``.

    Args:
      config: the two models, or one and an adapter.
      progress: called after every leaf.

    Raises:
      ValueError: what cannot be, before anything is written.
    """
    low = config.rank is not None or config.energy is not None
    (check_new if low else inputs.check_file)(config.output)
    with open_checkpoint(config.pretrained) as base:
        part = base.family.part if config.part is None else config.part
        options: dict[str, Any] = {
            "subtree": part,
            "allow_config_differences": config.allow_config_differences,
            "dtype": config.dtype,
            "progress": progress,
        }
        found: Extracted | ExtractedAdapter
        if config.finetuned is None:
            assert config.adapter is not None
            found = streaming.extract_adapter(
                base, config.adapter, config.output, dtype=config.dtype, any_base=config.any_base, progress=progress
            )
        elif low:
            size: dict[str, Any] = {"rank": config.rank, "energy": config.energy, "key": jax.random.key(config.seed)}
            with new_folder(config.output) as output:
                found = short = streaming.extract_low_rank(base, config.finetuned, output, **size, **options)
                report = {"error": short.error, "leaves": short.truncated}
                write_json(output / "leaf_report.json", report, sort_keys=False)
                write_recipe(recipe_of(config), output)
        else:
            found = streaming.extract(base, config.finetuned, config.output, **options)
    if not low:
        write_recipe(recipe_of(config), config.output)
    if not found.changed_outside:
        return found
    first, number = found.changed_outside[0], len(found.changed_outside)
    note = f"fine-tuning changed {number} leaves outside {part!r} too ({first}, ...), which stay"
    return found._replace(notes=(*found.notes, note))
