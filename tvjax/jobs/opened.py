"""The models that a job names, each opened once."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from tvjax.checkpoints.folder import Checkpoint, open_checkpoint
from tvjax.checkpoints.huggingface import Pretrained, from_pretrained
from tvjax.checkpoints.processors import Processor
from tvjax.data.examples import Examples
from tvjax.data.images import Images
from tvjax.data.loader import image_batches
from tvjax.data.tokens import Encoder
from tvjax.kinds import kind_of
from tvjax.models.bert.config import BertConfig
from tvjax.progress import Progress, begin
from tvjax.stages import tower
from tvjax.tasks.classification import text_batches
from tvjax.tasks.zero_shot import unit_embeddings


class Opened:
    """A model by its name; what is asked of it is read when it is first asked for, and kept.

    Attributes:
      checkpoint: its folder, config and tensors.
      on_disk: whether the weights stay in their files (`tvjax.on_disk`).
      progress: told when weights are read.
    """

    def __init__(self, checkpoint: Checkpoint, on_disk: bool = False, progress: Progress | None = None):
        self.checkpoint, self.on_disk, self.progress = checkpoint, on_disk, progress

    @property
    def name(self) -> str:
        """The folder or hub id."""
        return self.checkpoint.name

    @functools.cached_property
    def config(self) -> Any:
        """The config of its family."""
        return self.checkpoint.config

    @functools.cached_property
    def pretrained(self) -> Pretrained:
        """The model with its weights."""
        begin(self.progress, f"reading {self.name}")
        return from_pretrained(self.checkpoint, on_disk=self.on_disk)

    @functools.cached_property
    def processor(self) -> Processor:
        """What turns images and texts into its inputs."""
        return self.checkpoint.processor

    def encoder(self, length: int) -> Encoder:
        """Texts to the tokens of a language model, so many of a text.

        Raises:
          ValueError: for a model without a tokenizer, or one that does not fit.
        """
        with self._named():
            self.processor.check_tokenizer()
        return Encoder(self.processor.tokenizer, length)

    def check_images(self) -> None:
        """Raises a ValueError for a model without an image processor; no weight is read."""
        with self._named():
            self.processor.check_image_processor()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.name!r}: {error}") from error

    def release(self) -> None:
        """Drops the weights, which are read again where they are asked for again."""
        self.__dict__.pop("pretrained", None)

    def embed(self, examples: Examples, batch_size: int) -> np.ndarray:
        """Unit embeddings of images by the vision tower of a CLIP, or of texts by a sentence encoder.

        Raises:
          ValueError: for another model, before its weights are read.
        """
        if isinstance(self.config, BertConfig) and self.config.num_labels is None:
            encoder = self.encoder(self.config.length)
            return unit_embeddings(self.pretrained.model, text_batches("embedding", examples, encoder, batch_size))
        if self.checkpoint.family.asked != "zero_shot" or not isinstance(examples, Images):
            raise ValueError(
                f"{self.name!r} is {kind_of(self.config)}, which gives no embeddings to choose {examples.kind} "
                "by: take --select random"
            )
        model, pixels = self.pretrained.model, self.processor.pixels
        return unit_embeddings(tower(model, "vision"), image_batches(examples, pixels, batch_size))


class Models(contextlib.ExitStack):
    """Opens models by their names, each once, until the block ends; their weights may stay in their files."""

    def __init__(self, on_disk: bool = False, progress: Progress | None = None) -> None:
        super().__init__()
        self._on_disk, self._progress = on_disk, progress
        self._opened: dict[str, Opened] = {}

    def __getitem__(self, name: str) -> Opened:
        if name not in self._opened:
            self._opened[name] = Opened(self.enter_context(open_checkpoint(name)), self._on_disk, self._progress)
        return self._opened[name]
