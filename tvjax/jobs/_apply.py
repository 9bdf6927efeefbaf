"""Task vectors added to the model that they were made for."""

from __future__ import annotations

from tvjax.checkpoints import streaming
from tvjax.checkpoints.huggingface import check_new
from tvjax.checkpoints.streaming import Applied
from tvjax.jobs.configs import ApplyConfig
from tvjax.jobs.recipes import recipe_of, write_recipe
from tvjax.progress import Progress


def apply(config: ApplyConfig, progress: Progress | None = None) -> Applied:
    """Adds task vectors to the model that they were made for, tensor by tensor, and saves it.

    Args:
      config: the model and the task vectors.
      progress: called after every leaf.

    Raises:
      ValueError: what cannot be, before anything is written.
    """
    check_new(config.output)
    found = streaming.apply(
        config.model,
        config.task_vectors,
        config.output,
        scale=config.scale,
        any_base=config.any_base,
        dtype=config.dtype,
        max_shard_size=config.max_shard_size,
        progress=progress,
    )
    write_recipe(recipe_of(config), config.output)
    return found
