"""Tokenizers and image processors of transformers, without torch, in the layout of tvjax's models."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from tvjax.checkpoints.folder import Name, open_checkpoint
from tvjax.checkpoints.json_files import read_json
from tvjax.models.clip.config import LEGACY_END_TOKEN

_IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
_TOKEN_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")


_PROCESSOR_FILES = (  # all that the two are read from
    *(*_IMAGE_FILES, "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("*.model", "*.tiktoken"),
)


@dataclasses.dataclass(frozen=True)
class Processor:
    """What turns images and texts into the inputs of one model.

    Attributes:
      image_processor: transformers' image processor on its PIL backend; None where the folder has none.
      tokenizer: transformers' tokenizer; None where the folder has none.
      length: tokens that every text is padded or cut to.
      vocabulary: tokens that the model has embeddings for; None: not known, and not looked at.
      end_token: the id at which the model reads a text's embedding; None: not known, and not looked at.
      padding: the id of the padding that the model's config names; None: not known, and not looked at.
      reads_padding: whether the model reads padding as any other token (SigLIP): then the mask has none.
      unusable: why the folder's tokenizer cannot be opened, "" where it can.
    """

    image_processor: Any = None
    tokenizer: Any = None
    length: int = 77
    vocabulary: int | None = None
    end_token: int | None = None
    padding: int | None = None
    reads_padding: bool = False
    unusable: str = ""

    def pixels(self, images: Sequence[Any]) -> Float[np.ndarray, "images height width 3"]:
        """Resized, cropped and normalised images, channels last.

        Args:
          images: PIL images, or arrays ``[height, width, 3]`` of 8-bit values.

        Raises:
          ValueError: for a model without an image processor.
        """
        self.check_image_processor()
        batch = self.image_processor(list(images), return_tensors="np")["pixel_values"]
        return np.ascontiguousarray(np.asarray(batch, np.float32).transpose(0, 2, 3, 1))

    @property
    def normalisation(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Mean and deviation of each channel that the pixels are normalised with; 0 and 1 where they are not."""
        if self.image_processor is None or not self.image_processor.do_normalize:
            return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        return tuple(self.image_processor.image_mean), tuple(self.image_processor.image_std)

    def tokens(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Token ids and the padding mask, ``{"tokens": int32, "mask": bool}``, both ``[texts, length]``.

        Raises:
          ValueError: for a model without a tokenizer; for a tokenizer that knows more tokens than the model has
            embeddings for, or does not end a text with the token that the model's config names.
        """
        self.check_tokenizer()
        batch = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.length, return_tensors="np"
        )
        ids = np.asarray(batch["input_ids"], np.int32)
        self._check(texts, ids)
        mask = np.ones(ids.shape, bool) if self.reads_padding else np.asarray(batch["attention_mask"], bool)
        return {"tokens": ids, "mask": mask}

    def check_image_processor(self) -> None:
        """Raises a ValueError without an image processor."""
        if self.image_processor is None:
            raise ValueError("the folder has no preprocessor_config.json: copy the one of the model's original folder")

    def check_tokenizer(self) -> None:
        """Raises a ValueError without a tokenizer, and for one that is another model's.

        Such a one has more tokens than the model has embeddings for, or another token of padding.
        """
        if self.unusable:
            raise ValueError(f"the folder's tokenizer cannot be opened: {self.unusable}")
        if self.tokenizer is None:
            raise ValueError(
                "the folder has neither tokenizer.json nor vocab.json: copy the one of the original folder"
            )
        self._check_vocabulary(len(self.tokenizer))
        own = self.tokenizer.pad_token_id
        if None not in (self.padding, own) and own != self.padding:
            raise ValueError(
                f"the tokenizer pads with the token {own} ({self.tokenizer.pad_token!r}), and config.json names "
                f"{self.padding} (pad_token_id): copy the tokenizer of the model's original folder"
            )

    def _check_vocabulary(self, known: int) -> None:
        if self.vocabulary is not None and known > self.vocabulary:
            raise ValueError(
                f"the tokenizer knows {known} tokens, but the model has embeddings for {self.vocabulary} (vocab_size "
                "in config.json): copy the tokenizer of the model's original folder"
            )

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of texts, without those that begin and end a text."""
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    def _check(self, texts: Sequence[str], ids: np.ndarray) -> None:
        """Raises a ValueError unless the tokenizer and the model that the config describes belong together."""
        self._check_vocabulary(int(ids.max(initial=0)) + 1)
        empty = [text for text, own in zip(texts, self._plain(texts), strict=True) if not own]
        if empty:
            raise ValueError(f"the tokenizer makes no token of {empty[0]!r}: give a name or text of letters")
        if self.end_token in (None, LEGACY_END_TOKEN):
            return
        endless = [text for text, row in zip(texts, ids, strict=True) if self.end_token not in row]
        if endless:
            raise ValueError(
                f"{len(endless)} of {len(texts)} texts ({endless[0]!r}, ...) lack the token {self.end_token} that "
                "config.json names as their end (eos_token_id), where they are read; the tokenizer's is "
                f"{self.tokenizer.eos_token_id} ({self.tokenizer.eos_token!r}): name it in text_config, or copy the "
                "tokenizer of the model's original folder"
            )


def load_processor(source: Name, revision: str | None = None) -> Processor:
    """The tokenizer and the image processor of a Hugging Face folder or hub id, those that it has.

    Args:
      source: a folder or a hub id, or a model that is open.
      revision: branch, tag or commit of the hub repository.

    Returns:
      The processor; no code of the folder is run.

    Raises:
      ValueError: a file of the processors, or the config, that is damaged.
    """
    with open_checkpoint(source, revision) as opened:
        return opened.processor


def read_processor(folder: Path, text: Any = None) -> Processor:
    """The processor of a folder.

    Args:
      folder: of the files.
      text: config of the text tower or language model that the tokens are for; None where it is not known.
    """
    for name in (*_IMAGE_FILES, *_TOKEN_FILES[:2], "tokenizer_config.json"):
        if (folder / name).is_file() and not read_json(folder / name):
            raise ValueError(f"{folder / name} is empty: download it again")
    transformers = _import_transformers()
    image_processor, tokenizer, unusable = None, None, ""
    if any((folder / name).is_file() for name in _IMAGE_FILES):
        load = transformers.AutoImageProcessor.from_pretrained
        image_processor = load(folder, backend="pil", trust_remote_code=False)
    if any((folder / name).is_file() for name in _TOKEN_FILES):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except ImportError as error:  # said when it is needed: images go without
            unusable = " ".join(str(error).split())
    if text is None:
        return Processor(image_processor, tokenizer, unusable=unusable)
    return Processor(
        image_processor,
        tokenizer,
        length=getattr(text, "max_position_embeddings", Processor.length),  # relative positions have no end
        vocabulary=text.vocab_size,
        end_token=getattr(text, "eos_token_id", None),
        padding=getattr(text, "pad_token_id", None),
        reads_padding=getattr(text, "reads_padding", False),
        unusable=unusable,
    )


def processor_fingerprint(folder: Path) -> str:
    """The SHA-256 of the files that a folder's tokenizer and image processor are read from."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _PROCESSOR_FILES for file in folder.glob(pattern) if file.is_file()}):
        digest.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _import_transformers() -> Any:
    """The package transformers, imported when it is needed and without its advice to install torch."""
    logging.getLogger("transformers").addFilter(_is_no_torch_advice)
    import transformers

    return transformers


def _is_no_torch_advice(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("PyTorch was not found")
