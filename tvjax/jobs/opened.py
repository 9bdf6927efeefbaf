"""The models that a job names, each opened once."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import numpy as np

from tvjax.checkpoints.huggingface import Checkpoint, Described, Pretrained, describe, open_described, read_model
from tvjax.checkpoints.processors import Processor, read_processor
from tvjax.data.images import Images
from tvjax.data.loader import Loader
from tvjax.evaluate.zero_shot import embed_images
from tvjax.models.clip.config import CLIPConfig
from tvjax.models.clip.modeling import vision_model


class Opened:
    """A model by its name: its config is read at once, headers, weights and processors when they are first asked for.

    Attributes:
      described: its folder and config.
    """

    def __init__(self, described: Described, stack: contextlib.ExitStack):
        """A model whose files are closed with the stack."""
        self.described, self._stack = described, stack

    @property
    def name(self) -> str:
        """The folder or hub id."""
        return self.described.name

    @property
    def config(self) -> Any:
        """The config of its family."""
        return self.described.config

    @functools.cached_property
    def checkpoint(self) -> Checkpoint:
        """Its tensors, to be read one by one."""
        return self._stack.enter_context(open_described(self.described))

    @functools.cached_property
    def pretrained(self) -> Pretrained:
        """The model with its weights."""
        return read_model(self.checkpoint)

    @functools.cached_property
    def processor(self) -> Processor:
        """What turns images and texts into its inputs."""
        return read_processor(self.described.folder, getattr(self.config, "text", None))

    def with_config(self, config: Any) -> Opened:
        """The model with another config, to be given other weights."""
        return Opened(self.described._replace(config=config), self._stack)

    def release(self) -> None:
        """Drops the weights, which are read again where they are asked for again."""
        self.__dict__.pop("pretrained", None)

    def embed(self, images: Images, batch_size: int) -> np.ndarray:
        """Unit embeddings of images by the vision tower of a CLIP.

        Raises:
          ValueError: for another model, before its weights are read.
        """
        if not isinstance(self.config, CLIPConfig):
            raise ValueError(
                f"{self.name!r} is a {type(self.config).__name__}, which gives no embeddings to choose examples by: "
                "take --select random"
            )
        model, pixels = self.pretrained.model, self.processor.pixels
        return embed_images(vision_model(model), Loader(images, pixels, batch_size))


class Models(contextlib.ExitStack):
    """Opens models by their names, each once, until the block ends."""

    def __init__(self) -> None:
        super().__init__()
        self._opened: dict[str, Opened] = {}

    def __getitem__(self, name: str) -> Opened:
        if name not in self._opened:
            self._opened[name] = Opened(describe(name), self)
        return self._opened[name]
