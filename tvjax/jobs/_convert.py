"""A model as another kind of checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tvjax import tree
from tvjax.checkpoints import conversion
from tvjax.jobs.configs import ConvertConfig
from tvjax.jobs.schema import Progress


class Converted(NamedTuple):
    """What `convert` wrote.

    Attributes:
      output: the folder.
      source: the model before.
      to: the kind of checkpoint.
      parameters: number of entries of all leaves.
      dtypes: of the leaves.
    """

    output: Path
    source: str
    to: str
    parameters: int
    dtypes: list[str]


def convert(config: ConvertConfig, progress: Progress | None = None) -> Converted:
    """Writes a model as a Hugging Face folder or an Orbax directory, or in another dtype.

    Args:
      config: the model, and what becomes of it.
      progress: not called.

    Raises:
      ValueError: a source that is no model, or a folder that is taken; before anything is written.
    """
    settings = config.model_dump(exclude={"source", "output"})
    model = conversion.convert(config.source, config.output, **settings)
    leaves = tree.flatten(model.params).values()
    dtypes = sorted({leaf.dtype.name for leaf in leaves})
    return Converted(config.output, config.source, config.to, sum(leaf.size for leaf in leaves), dtypes)
