"""The task vector of a fine-tuning, as a file."""

from __future__ import annotations

from tvjax.checkpoints import streaming
from tvjax.checkpoints.folder import open_checkpoint
from tvjax.checkpoints.streaming import Extracted
from tvjax.jobs import inputs
from tvjax.jobs.configs import ExtractConfig
from tvjax.jobs.recipes import recipe_of, write_recipe
from tvjax.jobs.schema import Progress


def extract(config: ExtractConfig, progress: Progress | None = None) -> Extracted:
    """Writes a task vector, fine-tuned minus pre-trained parameters: by default of the vision tower of a CLIP or a ViT.

    Args:
      config: the two models, or one and an adapter.
      progress: called after every leaf.

    Raises:
      ValueError: what cannot be, before anything is written.
    """
    inputs.check_file(config.output)
    with open_checkpoint(config.pretrained) as base:
        if config.finetuned is None:
            assert config.adapter is not None
            found = streaming.extract_adapter(
                base, config.adapter, config.output, dtype=config.dtype, any_base=config.any_base, progress=progress
            )
        else:
            found = streaming.extract(
                base,
                config.finetuned,
                config.output,
                subtree=base.family.part if config.part is None else config.part,
                allow_config_differences=config.allow_config_differences,
                dtype=config.dtype,
                progress=progress,
            )
    write_recipe(recipe_of(config), config.output)
    if not found.changed_outside:
        return found
    first, number = found.changed_outside[0], len(found.changed_outside)
    part = base.family.part if config.part is None else config.part
    note = f"fine-tuning changed {number} leaves outside {part!r} too ({first}, ...), which stay"
    return found._replace(notes=(*found.notes, note))
