"""The task vector of a fine-tuning, as a file."""

from __future__ import annotations

from tvjax.checkpoints import streaming
from tvjax.checkpoints.streaming import Extracted
from tvjax.jobs import inputs
from tvjax.jobs.configs import ExtractConfig
from tvjax.jobs.schema import Progress


def extract(config: ExtractConfig, progress: Progress | None = None) -> Extracted:
    """Writes a task vector, fine-tuned minus pre-trained parameters: by default of the vision tower.

    Args:
      config: the two models, or one and an adapter.
      progress: called after every leaf.

    Raises:
      ValueError: what cannot be, before anything is written.
    """
    inputs.check_file(config.output)
    if config.finetuned is None:
        assert config.adapter is not None
        return streaming.extract_adapter(
            config.pretrained,
            config.adapter,
            config.output,
            dtype=config.dtype,
            any_base=config.any_base,
            progress=progress,
        )
    return streaming.extract(
        config.pretrained,
        config.finetuned,
        config.output,
        subtree=config.part,
        allow_config_differences=config.allow_config_differences,
        dtype=config.dtype,
        progress=progress,
    )
