"""Classes by their words: which of them a language model would say next.

A class whose word is one token is scored where the text ends, in one pass over the texts. Where a word has several
tokens each class of an example is a text of its own, ``[batch, classes, tokens]``: the text with the word behind it,
or the word as what a decoder says. The model's stages see them as so many examples more, and what they hand on keeps
the example axis first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tvjax.data.examples import Examples
from tvjax.data.loader import Loader, Processed
from tvjax.data.spans import behind
from tvjax.data.tokens import Encoder
from tvjax.kinds import kind_of
from tvjax.models.chunked_loss import chunked
from tvjax.stages import Model, PyTree
from tvjax.tasks.base import Task
from tvjax.tasks.classification import text_batches
from tvjax.tasks.language import EXPECTED, common_opening, scored_tokens, token_losses
from tvjax.tasks.losses import ClassLoss, cannot_score

_REFERENCES = ("0", "?", " A")  # texts of nothing in common


def label_words(encoder: Encoder, words: Sequence[str], template: str = "", start: int | None = None) -> Task:
    """Classification by the words of the classes: which of them a language model would say next.

    ``score(class) = sum_k log p(token k of its word | the text, the tokens before it)``, without the tokens that close
    a text. Where every word is one token, that is its log-probability at the last token of the text, up to a constant.

    A causal model is told where the last token is, ``"last": [batch]`` among the inputs, and must return that, or the
    mask, beside its scores. Where a word has several tokens all inputs are ``[batch, classes, ...]``: see
    `tvjax.tasks.words`; that costs as much as so many times the texts.

    Args:
      encoder: texts to tokens.
      words: one a class, as they follow the text (`` yes``).
      template: as for `next_token`.
      start: the token that the decoder begins with, where the model has one; None: a causal model.

    Raises:
      ValueError: for fewer than two words; when the model is made, for words without tokens of their own, or one whose
        tokens begin another, which would always be the less likely.

    >>> def letters(texts):
    ...     rows = [[*map(ord, one)] for one in texts]
    ...     return {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    >>> task = label_words(Encoder(letters), ["n", "y"], "Is {sum} right? ")
    >>> task.model(Model({}, ())).loss_params["words"].tolist()
    [110, 121]
    >>> task = label_words(Encoder(letters), ["no", "yes"], "Is {sum} right? ")
    >>> task.model(Model({}, ())).loss_params["words"].tolist()
    [[110, 111, 0], [121, 101, 115]]
    """
    if len(words) < 2:
        raise ValueError(f"found {len(words)} words of classes, expected one for each of two classes or more")
    before = "?" if start is None else ""
    one_token, whole = (NEXT_WORD, NEXT_WORDS) if start is None else (FIRST_WORD, FIRST_WORDS)

    def model(given: Model) -> Model:
        rows = _word_tokens(encoder, words, before)
        _check_words(words, rows)
        if max(map(len, rows)) == 1:
            return given.with_loss(one_token, {"words": jnp.asarray(rows, jnp.int32)[:, 0]})
        of_each = (dataclasses.replace(stage, function=OfEachClass(stage.function)) for stage in given.stages)
        ids, real = _padded(rows)
        loss_params = {"words": jnp.asarray(ids), "real": jnp.asarray(real)}
        return given.replace(stages=tuple(of_each)).with_loss(whole, loss_params)

    def batches(examples: Examples, size: int) -> Loader:
        rows = _word_tokens(encoder, words, before)
        longest = max(map(len, rows))
        kept = encoder if start is not None else dataclasses.replace(encoder, length=encoder.length - longest + 1)
        loader = text_batches(one_token.task, examples, kept, size, words, template)

        def process(found: Sequence[Any], labels: Any) -> Processed:
            made = loader.process(found, labels)
            inputs = dict(made.batch.inputs)
            if longest > 1:
                inputs = _continued(inputs, rows, encoder) if start is None else _answered(inputs, rows, start)
            elif start is None:
                inputs["last"] = np.asarray(_last(inputs["mask"]), np.int32)
            else:
                first = np.full((len(found), 1), start, np.int32)
                inputs |= {"decoder_tokens": first, "decoder_mask": np.ones_like(first, bool)}
            return Processed(made.batch._replace(inputs=inputs), made.cut)

        return dataclasses.replace(loader, process=process)

    return Task(one_token.task, model, batches)


# --- Words of several tokens ---


@dataclasses.dataclass(frozen=True)
class OfEachClass:
    """The function of a stage on a carry ``[batch, classes, ...]``, each class of an example being an example to it.

    What the stages hand on beside that, and has no such axes, stays as it is.

    >>> doubled = OfEachClass(lambda params, carry: {"mask": carry["mask"], "hidden": 2 * carry["hidden"][:, None]})
    >>> doubled({}, {"mask": jnp.ones((2, 3)), "hidden": jnp.ones((2, 3))})["hidden"].shape
    (2, 3, 1)
    """

    function: Callable[[PyTree, PyTree], PyTree]

    def __call__(self, params: PyTree, carry: PyTree) -> PyTree:
        """What the function makes of the classes of every example."""
        if not isinstance(carry, dict) or "mask" not in carry:
            found = sorted(carry) if isinstance(carry, dict) else kind_of(carry)
            raise ValueError(
                f"a stage of the model takes {found}, expected the 'mask' among it, which words of several tokens "
                "need in every stage: hand it on, or choose words of one token"
            )
        both = tuple(carry["mask"].shape[:2])
        merged = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]) if tuple(x.shape[:2]) == both else x, carry)
        made = self.function(params, merged)
        count = both[0] * both[1]
        return jax.tree.map(lambda x: x.reshape(*both, *x.shape[1:]) if x.shape[:1] == (count,) else x, made)


def _continued(inputs: dict[str, np.ndarray], words: Sequence[Sequence[int]], encoder: Encoder) -> dict[str, Any]:
    """Texts with each of the words behind them, but for its last token, which is only wanted."""
    tails = words if encoder.of_ids is encoder else [behind(word) for word in words]
    texts = [row[real].tolist() for row, real in zip(inputs["tokens"], inputs["mask"], strict=True)]
    rows = [[*text, *word] for text in texts for word in tails]
    given, wanted = (encoder.padded(part) for part in ([row[:-1] for row in rows], [row[1:] for row in rows]))
    shape = (len(texts), len(words), -1)
    found = {"tokens": given.ids, "mask": given.mask, "wanted": wanted.ids, "last": _last(given.mask).astype(np.int32)}
    return {name: x.reshape(shape if x.ndim > 1 else shape[:2]) for name, x in found.items()}


def _answered(inputs: dict[str, np.ndarray], words: Sequence[Sequence[int]], start: int) -> dict[str, np.ndarray]:
    """Texts once for each word, which is what the decoder says."""
    ids, real = _padded(words)
    before = np.concatenate([np.full_like(ids[:, :1], start), ids[:, :-1]], 1)
    asked = {name: np.repeat(inputs[name][:, None], len(words), 1) for name in ("tokens", "mask")}
    said = {"decoder_tokens": before, "decoder_mask": real, "wanted": ids}
    texts = len(inputs["tokens"])
    return asked | {name: np.broadcast_to(x, (texts, *x.shape)).copy() for name, x in said.items()}


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Int[np.ndarray, "words tokens"], Bool[np.ndarray, "words tokens"]]:
    """Rows as one array, and which of it is real."""
    real = np.arange(max(map(len, rows))) < np.array([len(row) for row in rows])[:, None]
    ids = np.zeros(real.shape, np.int32)
    ids[real] = [token for row in rows for token in row]
    return ids, real


# --- Scores ---


def _next_word(loss_params: PyTree, outputs: PyTree) -> Float[Array, "batch classes"]:
    found = scored_tokens(NEXT_WORD.task, outputs)
    last = _last_of(outputs)
    return _of_words(loss_params, outputs, jnp.take_along_axis(found, last[:, None, None], axis=1)[:, 0])


def _first_word(loss_params: PyTree, outputs: PyTree) -> Float[Array, "batch classes"]:
    return _of_words(loss_params, outputs, scored_tokens(FIRST_WORD.task, outputs)[:, 0])


def _of_words(loss_params: PyTree, outputs: PyTree, found: Array) -> Float[Array, "batch classes"]:
    """The scores of words of one token, of logits or hidden activations ``[batch, ...]``."""
    words = loss_params["words"]
    if "logits" in outputs:
        return found[:, words].astype(jnp.float32)
    return jnp.matmul(found, outputs["unembedding"][:, words].astype(found.dtype), preferred_element_type=jnp.float32)


def _next_words(loss_params: PyTree, outputs: PyTree) -> Float[Array, "batch classes"]:
    words, real = loss_params["words"], loss_params["real"]
    first = _last_of(outputs) - real.sum(-1) + 1  # where the first token of a word is said
    places = jnp.clip(first[..., None] + jnp.arange(words.shape[1]), 0)
    return _of_whole_words(NEXT_WORD.task, loss_params, outputs, places)


def _first_words(loss_params: PyTree, outputs: PyTree) -> Float[Array, "batch classes"]:
    return _of_whole_words(FIRST_WORD.task, loss_params, outputs, jnp.arange(loss_params["words"].shape[1])[None, None])


def _of_whole_words(
    task: str, loss_params: PyTree, outputs: PyTree, places: Int[Array, "#batch #classes tokens"]
) -> Float[Array, "batch classes"]:
    """The scores of words of which token k is said at ``places[..., k]``."""
    words, real = loss_params["words"], loss_params["real"]
    if isinstance(outputs, dict) and "losses" in outputs:
        losses = jnp.take_along_axis(outputs["losses"], places, axis=2)
        return -jnp.where(real, losses, 0.0).sum(-1)
    found = jnp.take_along_axis(scored_tokens(task, outputs, axes=3), places[..., None], axis=2)
    rows = found.reshape(len(found), -1, found.shape[-1])
    wanted, kept = (jnp.broadcast_to(x, found.shape[:3]).reshape(rows.shape[:2]) for x in (words, real))
    if "logits" in outputs:
        losses = token_losses(rows, wanted, kept)
    else:
        kernel = outputs["unembedding"]  # which has no examples, whatever its first axis looks like
        losses, _, _ = chunked(rows, kernel.reshape(-1, kernel.shape[-1]), wanted)
    return -jnp.where(real, losses.reshape(found.shape[:3]), 0.0).sum(-1)


NEXT_WORD = ClassLoss("label words of a causal language model", _next_word)
FIRST_WORD = ClassLoss("label words of a decoder", _first_word)
NEXT_WORDS = ClassLoss(NEXT_WORD.task, _next_words)
FIRST_WORDS = ClassLoss(FIRST_WORD.task, _first_words)


def _last_of(outputs: PyTree) -> Int[Array, "*batch"]:
    """The place of each text's last token.

    Raises:
      ValueError: for outputs that do not say it.
    """
    if not isinstance(outputs, dict) or not {"last", "mask"} & set(outputs):
        raise cannot_score(NEXT_WORD.task, outputs, f"{EXPECTED}, and the 'mask' of the tokens or the 'last' of them")
    return outputs["last"] if "last" in outputs else _last(outputs["mask"])


def _last(mask: Bool[Any, "*batch tokens"]) -> Int[Any, "*batch"]:
    """The place of each text's last token."""
    return mask.shape[-1] - 1 - mask[..., ::-1].argmax(-1)


# --- The tokens of the words ---


def _word_tokens(encoder: Encoder, words: Sequence[str], before: str) -> list[list[int]]:
    """The tokens of each word where it follows `before`, without what a tokenizer puts around every text.

    Many tokenizers give a word other tokens at the beginning of a text than within it.
    """
    texts = [before + word for word in words]
    of_ids = encoder.of_ids
    ids, plain = of_ids.rows(texts), of_ids.rows(_REFERENCES)
    others = (*ids[1:], *(of_ids.rows([before]) if before else plain))
    opening = min(common_opening(ids[0], other) for other in others)
    # of two words the longer may end in the shorter: what closes a text closes the references too
    backwards = [row[::-1] for row in plain]
    closing = min(common_opening(backwards[0], other) for other in (*backwards[1:], *(row[::-1] for row in ids)))
    return [row[opening : len(row) - closing] for row in encoder.rows(texts)]


def _check_words(words: Sequence[str], rows: Sequence[Sequence[int]]) -> None:
    """Raises a ValueError for a word without tokens, or one whose tokens another begins with."""
    advice = "so that the class cannot be told from the others: choose other words"
    for word, row in zip(words, rows, strict=True):
        if not row or not word.strip():
            raise ValueError(f"the word {word!r} has no token of its own, {advice}")
    order = sorted(range(len(words)), key=lambda i: (rows[i], i))
    for one, other in zip(order[:-1], order[1:], strict=True):  # what begins alike comes side by side
        if rows[one] == rows[other]:
            raise ValueError(f"the words {words[one]!r} and {words[other]!r} are the same tokens, {advice}")
        if common_opening(rows[one], rows[other]) == len(rows[one]):
            raise ValueError(
                f"the word {words[other]!r} begins with all tokens of {words[one]!r}, which is therefore always the "
                "more likely: choose other words"
            )
