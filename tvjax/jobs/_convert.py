"""A model as another kind of checkpoint."""

from __future__ import annotations

from tvjax.checkpoints import conversion
from tvjax.checkpoints.conversion import Converted
from tvjax.jobs.configs import ConvertConfig
from tvjax.jobs.recipes import recipe_of, write_recipe
from tvjax.progress import Progress


def convert(config: ConvertConfig, progress: Progress | None = None) -> Converted:
    """Writes a model as a Hugging Face folder, an Orbax directory, or a checkpoint of MaxText or Tunix.

    Args:
      config: the model, and what becomes of it.
      progress: called after every leaf that is read or written.

    Raises:
      ValueError: a source that is no model, or a folder that is taken; before anything is written.
    """
    settings = config.model_dump(exclude={"source", "output"})
    found = conversion.convert(config.source, config.output, **settings, progress=progress)
    write_recipe(recipe_of(config), config.output)
    return found
