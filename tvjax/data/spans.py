"""Which characters tokens cover, and so which tokens of two tokenizers are partners."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

OPENING, CLOSING, OTHER = 1, 2, 3  # what a token without characters is for

_LENGTH, _PLACE = 10, 20  # bits of a code: with one for the text of a pair, 31
_ROLES = 4


class Spans(NamedTuple):
    """The characters that tokens cover, each ``[texts, tokens]``.

    Attributes:
      start: first character of its text (a tokenizer's offsets).
      end: one past the last.
      mask: True at real tokens.
      role: 0, or of a token without characters what it is for: 1 opens a text (``[CLS]``, ``<s>``), 2 closes one
        (``[SEP]``, ``</s>``), 3 is any other; None: 3 where a token covers nothing.
      part: which text of a pair (0, 1); of tokens without characters how many texts have begun before; None: 0.
    """

    start: Int[np.ndarray, "texts tokens"]
    end: Int[np.ndarray, "texts tokens"]
    mask: Bool[np.ndarray, "texts tokens"]
    role: Int[np.ndarray, "texts tokens"] | None = None
    part: Int[np.ndarray, "texts tokens"] | None = None


def token_overlap(a: Spans, b: Spans) -> Float[np.ndarray, "texts tokens_b tokens_a"]:
    """The operator that brings A's tokens to B's, where two tokenizers cut the same texts differently.

    A token of B is the mean of the tokens of A that share characters with it, weighted by how many they share: what
    resizing a patch grid is to images, and a space that only one tokenizer counts to the word after it weighs little.
    Where A has a token of the same characters, it is this one alone, so that tokenizers that cut alike give the
    identity. Tokens of the same characters (bytes of one letter) share them equally. A token without characters is
    paired with those of its role at its place, among the texts of a pair.

    Args:
      a: of the source's tokens.
      b: of the target's tokens, of the same texts in the same order.

    Returns:
      float32; each row sums to one, or to zero where B's token is padding or has no partner.

    Raises:
      ValueError: for arrays of different shapes, or other numbers of texts.

    >>> whole = Spans(np.array([[0, 5]]), np.array([[5, 8]]), np.ones((1, 2), bool))
    >>> halves = Spans(np.array([[0, 3, 5]]), np.array([[3, 5, 8]]), np.ones((1, 3), bool))
    >>> token_overlap(whole, halves).tolist()
    [[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]]
    >>> token_overlap(halves, whole)[0].round(1).tolist()
    [[0.6000000238418579, 0.4000000059604645, 0.0], [0.0, 0.0, 1.0]]
    """
    for name, spans in (("A", a), ("B", b)):
        shapes = {np.shape(x) for x in spans if x is not None}
        if len(shapes) != 1 or len(next(iter(shapes))) != 2:
            raise ValueError(f"spans of {name}: found arrays of shapes {sorted(shapes)}, expected one [texts, tokens]")
    if len(a.mask) != len(b.mask):
        raise ValueError(f"found spans of {len(a.mask)} texts for A and {len(b.mask)} for B: give the same texts")
    operator = np.zeros((len(b.mask), b.mask.shape[1], a.mask.shape[1]), np.float32)
    for number, real in enumerate(zip(b.mask, a.mask, strict=True)):
        operator[number][np.ix_(*real)] = _shares(*(_intervals(spans, number) for spans in (b, a)))
    return operator


def _intervals(spans: Spans, text: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The real tokens of a text as intervals of lines: which line, from where, to where.

    Every text of a pair is a line, and every role at every place; tokens of one interval are cut out of it in order.
    """
    real = spans.mask[text]
    start, end = spans.start[text][real], spans.end[text][real]
    part = np.zeros_like(start) if spans.part is None else spans.part[text][real]
    role = np.where(end > start, 0, OTHER) if spans.role is None else spans.role[text][real]
    start, end = np.where(role > 0, 0, start), np.where(role > 0, 1, end)
    line = _ROLES * part + role
    alike = (line[:, None] == line) & (start[:, None] == start) & (end[:, None] == end)
    order, size = np.tril(alike, -1).sum(1), (end - start) / np.maximum(alike.sum(1), 1)
    return line, start + order * size, start + (order + 1) * size


def _shares(b: tuple[np.ndarray, ...], a: tuple[np.ndarray, ...]) -> np.ndarray:
    """``[tokens_b, tokens_a]``, how much of B's interval each of A's covers, normalised."""
    (line_b, start_b, end_b), (line_a, start_a, end_a) = (tuple(x[:, None] for x in b), a)
    shared = np.minimum(end_b, end_a) - np.maximum(start_b, start_a)
    shared = np.where(line_b == line_a, np.maximum(shared, 0), 0)
    same = (line_b == line_a) & (start_b == start_a) & (end_b == end_a)
    shared = np.where(same.any(1, keepdims=True), same, shared)
    total = shared.sum(1, keepdims=True)
    return shared / np.where(total > 0, total, 1)


class SpanTokenizer:
    """A fast tokenizer of transformers that gives a code of its span for the id of each token.

    So whatever puts token ids together (templates, truncation, padding) puts spans together too.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.model_max_length = tokenizer, tokenizer.model_max_length
        self._opening = {tokenizer.cls_token_id, tokenizer.bos_token_id}
        self._closing = {tokenizer.sep_token_id, tokenizer.eos_token_id}

    def __call__(self, *texts: list[str], **options: Any) -> Mapping[str, Any]:
        """The codes, and the tokenizer's mask."""
        found = self.tokenizer(*texts, return_offsets_mapping=True, **options)
        rows = [
            self._codes(ids, found.sequence_ids(number), places)
            for number, (ids, places) in enumerate(zip(found["input_ids"], found["offset_mapping"], strict=True))
        ]
        return {"input_ids": rows, "attention_mask": found["attention_mask"]}

    def _codes(self, ids: Sequence[int], parts: Sequence[int | None], places: Sequence[tuple[int, int]]) -> list[int]:
        """A number of 31 bits for each span, and a negative one for what covers no characters."""
        codes, before = [], 0
        for token, part, (start, end) in zip(ids, parts, places, strict=True):
            before = max(before, 0 if part is None else part + 1)
            if end > start:
                length = min(end - start, 2**_LENGTH - 1)
                codes.append(((part or 0) << _PLACE | start % 2**_PLACE) << _LENGTH | length)
            else:
                codes.append(-(_ROLES * before + self._role(token, before)))
        return codes

    def _role(self, token: int, before: int) -> int:
        """Some tokenizers have one token to open and to close texts."""
        if token in self._opening and (token not in self._closing or not before):
            return OPENING
        return CLOSING if token in self._closing else OTHER


def behind(codes: Sequence[int]) -> list[int]:
    """Codes of a text that stands behind another: of characters that no token of the other covers.

    >>> decoded(np.array([behind([5 << 10 | 3])]), np.ones((1, 1), bool)).start.item() > 2**18
    True
    """
    return [code + (2 ** (_PLACE - 1) << _LENGTH) if code >= 0 else code for code in codes]


def decoded(codes: Int[np.ndarray, "texts tokens"], mask: Bool[np.ndarray, "texts tokens"]) -> Spans:
    """The spans of codes that a `SpanTokenizer` gave.

    >>> spans = decoded(np.array([[-1, 5 << 10 | 3, -6]]), np.ones((1, 3), bool))
    >>> [x.tolist() for x in (spans.start, spans.end, spans.role, spans.part)]
    [[[0, 5, 0]], [[0, 8, 0]], [[1, 0, 2]], [[0, 0, 1]]]
    """
    special = codes < 0
    role, before = np.where(special, -codes % _ROLES, 0), -codes // _ROLES
    start = np.where(special, 0, codes >> _LENGTH & 2**_PLACE - 1)
    end = np.where(special, 0, start + (codes & 2**_LENGTH - 1))
    return Spans(start, end, mask, role, np.where(special, before, codes >> _LENGTH + _PLACE))
