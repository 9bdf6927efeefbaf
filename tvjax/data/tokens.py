"""Texts as arrays of token ids: cut to what a model takes, and padded to one of a few lengths."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from tvjax.data.spans import Spans, SpanTokenizer, decoded

Tokenizer = Callable[..., Mapping[str, Any]]


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

    def spans(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Spans:
        """The characters that the tokens of a call with these texts cover, see `tvjax.data.token_overlap`.

        Raises:
          ValueError: for a tokenizer that does not know them (one that is not fast, a callable).
        """
        if not self.knows_spans:
            raise ValueError("the tokenizer does not say which characters its tokens cover: give a fast one")
        found = self.of_spans(texts, pairs)
        return decoded(found.ids, found.mask)

    @property
    def knows_spans(self) -> bool:
        """Whether the tokenizer knows which characters its tokens cover."""
        return bool(getattr(self.tokenizer, "is_fast", False))

    @property
    def of_spans(self) -> Encoder:
        """An encoder whose ids are codes of the characters of its text that a token covers, or of its role.

        Two tokenizers for which these are equal cut a text alike, whatever ids they give the pieces. Where a tokenizer
        does not know the characters the ids are its own.
        """
        return dataclasses.replace(self, tokenizer=SpanTokenizer(self.tokenizer)) if self.knows_spans else self

    @property
    def of_ids(self) -> Encoder:
        """The encoder that `of_spans` was made of; another is its own."""
        if not isinstance(self.tokenizer, SpanTokenizer):
            return self
        return dataclasses.replace(self, tokenizer=self.tokenizer.tokenizer)

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
