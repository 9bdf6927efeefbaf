"""Texts as arrays of token ids: cut to what a model takes, and padded to one of a few lengths."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

Tokenizer = Callable[..., Mapping[str, Any]]
_LONGEST = 2**10  # characters of one token, so that the spans of texts of two million of them have 31 bits


class Tokens(NamedTuple):
    """Token ids of texts.

    Attributes:
      ids: ``[texts, tokens]`` int32, 0 where the mask is False.
      mask: the tokenizer's attention mask, False at what was padded; a real token that looks like padding stays.
      cut: ``[texts]``, whether a text was longer than the model takes.
      types: of pairs of texts 0 at the first and 1 at the second, where the tokenizer says it; else None.
    """

    ids: Int[np.ndarray, "texts tokens"]
    mask: Bool[np.ndarray, "texts tokens"]
    cut: Bool[np.ndarray, " texts"]
    types: Int[np.ndarray, "texts tokens"] | None = None


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Texts to token ids.

    XLA compiles a program for every shape, so the tokens of a batch are padded to the least of a few lengths that holds
    its longest text: ``shortest``, twice that, and so on up to ``length``.

    Attributes:
      tokenizer: texts, and where there are pairs the second texts, to ``input_ids`` and ``attention_mask``, a row each;
        a tokenizer of transformers, or any callable that does the same.
      length: tokens that the model takes; of longer texts the end is lost, or what a tokenizer of transformers drops so
        that its closing tokens stay.
      shortest: the least length.

    >>> def letters(texts):
    ...     ids = [[ord(letter) for letter in text] for text in texts]
    ...     return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
    >>> tokens = Encoder(letters, length=8, shortest=2)(["a", "abc"])
    >>> tokens.ids.tolist(), tokens.mask.sum(1).tolist()
    ([[97, 0, 0, 0], [97, 98, 99, 0]], [1, 3])
    """

    tokenizer: Tokenizer
    length: int = 512
    shortest: int = 16

    def __post_init__(self) -> None:
        if not callable(self.tokenizer):
            raise ValueError(
                "there is no tokenizer, which texts need: the folder has neither tokenizer.json nor vocab.json, so "
                "copy the one of the model's original folder"
            )
        if self.length < 1 or self.shortest < 1:
            raise ValueError(f"found a length of {self.length}, {self.shortest} at least, expected 1 token or more")

    def __call__(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Tokens:
        """The tokens of texts, or of pairs of texts.

        Raises:
          ValueError: for a text without tokens, or a tokenizer that gives no mask, or rows of unequal lengths.
        """
        given = (list(texts),) if pairs is None else (list(texts), list(pairs))
        rows, types = self._rows(given, {})
        cut = np.array([len(row) > self.length for row in rows])
        if cut.any() and hasattr(self.tokenizer, "model_max_length"):  # of transformers: closing tokens are kept
            rows, types = self._rows(given, {"truncation": True, "max_length": self.length})
        tokens = self._padded([row[: self.length] for row in rows], cut)
        if pairs is None or not types:
            return tokens
        return tokens._replace(types=self._padded([row[: self.length] for row in types], cut).ids)

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of texts, neither cut nor padded."""
        return self._rows((list(texts),), {})[0]

    def padded(self, rows: Sequence[Sequence[int]]) -> Tokens:
        """Rows of tokens, cut and padded.

        >>> Encoder(lambda texts: {}, length=4, shortest=2).padded([[1, 2, 3, 4, 5]]).cut.tolist()
        [True]
        """
        return self._padded([row[: self.length] for row in rows], np.array([len(row) > self.length for row in rows]))

    @property
    def of_spans(self) -> Encoder:
        """An encoder whose ids say which characters of its text a token covers, and its role where it covers none.

        Two tokenizers for which these are equal cut a text alike, whatever ids they give the pieces. Where a tokenizer
        does not know the characters (one that is not fast, a callable) the ids are its own.
        """
        if not getattr(self.tokenizer, "is_fast", False):
            return self
        return dataclasses.replace(self, tokenizer=_Spans(self.tokenizer))

    def _rows(
        self, texts: tuple[list[str], ...], options: Mapping[str, Any]
    ) -> tuple[list[list[int]], list[list[int]]]:
        """The ids of texts, and their types where the tokenizer gives any."""
        found = self.tokenizer(*texts, **options)
        absent = [name for name in ("input_ids", "attention_mask") if name not in found]
        if absent:
            raise ValueError(f"the tokenizer gives {sorted(found)}, expected {' and '.join(absent)} among them")
        rows: list[list[int]] = []
        types: list[list[int]] = []
        of_pairs = found.get("token_type_ids") if len(texts) > 1 else None
        for text, ids, mask in zip(texts[0], found["input_ids"], found["attention_mask"], strict=True):
            if len(ids) != len(mask):
                raise ValueError(f"the tokenizer gives {len(ids)} ids and a mask of {len(mask)} for {text!r}")
            real = [int(one) for one, kept in zip(ids, mask, strict=True) if kept]
            if not real:
                raise ValueError(f"the text {text!r} has no tokens: do the tokenizer and the texts belong together?")
            rows.append(real)
            if of_pairs is not None:
                own = of_pairs[len(types)]
                types.append([int(one) for one, kept in zip(own, mask, strict=True) if kept])
        return rows, types

    def _padded(self, rows: Sequence[Sequence[int]], cut: Bool[np.ndarray, " texts"]) -> Tokens:
        longest = max(map(len, rows))
        width = min(self.shortest, self.length)
        while width < longest:
            width = min(2 * width, self.length)
        ids, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
        for number, row in enumerate(rows):
            ids[number, : len(row)], mask[number, : len(row)] = row, True
        return Tokens(ids, mask, cut)


class _Spans:
    """A fast tokenizer that gives spans for ids: what two tokenizers of one text can be compared by."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.model_max_length = tokenizer, tokenizer.model_max_length
        self._roles = {tokenizer.cls_token_id: -1, tokenizer.bos_token_id: -1}
        self._roles |= {tokenizer.sep_token_id: -2, tokenizer.eos_token_id: -2}

    def __call__(self, *texts: list[str], **options: Any) -> Mapping[str, Any]:
        found = self.tokenizer(*texts, return_offsets_mapping=True, **options)
        rows = [
            [self._span(one, *place) for one, place in zip(ids, places, strict=True)]
            for ids, places in zip(found["input_ids"], found["offset_mapping"], strict=True)
        ]
        return {"input_ids": rows, "attention_mask": found["attention_mask"]}

    def _span(self, token: int, start: int, end: int) -> int:
        """A number for each span, and a negative one for what stands for no characters, by its role."""
        if end <= start:
            return self._roles.get(token, -3)
        return (start * _LONGEST + min(end - start, _LONGEST - 1)) % 2**31
