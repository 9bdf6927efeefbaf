"""Language: the next token, and sequence to sequence.

A language model takes ``{"tokens", "mask", "wanted"}``, each ``[batch, tokens]``, and returns one of these:

- ``{"logits": [batch, tokens, vocabulary]}``;
- ``{"hidden": [batch, tokens, width], "unembedding": [width, vocabulary]}``, of which tasks make the logits of a few
  tokens at a time; not for gradients by example (GradFix), which need the example axis on whatever leaves a stage;
- ``{"losses", "predicted", "finite"}``, each ``[batch, tokens]``, which its last stage makes a few tokens at a time of
  the ``wanted`` tokens (`tvjax.models.chunked_loss.chunked`): these it must hand on from stage to stage.

With an encoder and a decoder the inputs also hold ``"decoder_tokens"`` and ``"decoder_mask"``, and the outputs are of
the decoder's tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tvjax.data.examples import Examples
from tvjax.data.loader import Loader, Processed
from tvjax.data.texts import Texts
from tvjax.data.tokens import Encoder
from tvjax.models.chunked_loss import chunked
from tvjax.stages import Batch, PyTree
from tvjax.tasks.base import Task, check_examples
from tvjax.tasks.classification import check_template, filled
from tvjax.tasks.losses import Judged, cannot_score

EXPECTED = "'logits' [batch, tokens, vocabulary], or 'hidden' [batch, tokens, width] and 'unembedding'"
_MADE = ("losses", "predicted", "finite")


def token_losses(
    logits: Float[Array, "batch tokens vocabulary"],
    tokens: Int[Array, "batch tokens"],
    mask: Bool[Array, "batch tokens"],
) -> Float[Array, "batch tokens"]:
    """``-log p(token)`` at every place, float32; 0 where the mask is False.

    >>> token_losses(jnp.zeros((1, 2, 4)), jnp.zeros((1, 2), int), jnp.array([[True, False]])).tolist()
    [[1.3862943649291992, 0.0]]
    """
    logits = logits.astype(jnp.float32)
    at = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return jnp.where(mask, jax.nn.logsumexp(logits, axis=-1) - at, 0.0)


def token_accuracy(
    logits: Float[Array, "batch tokens vocabulary"],
    tokens: Int[Array, "batch tokens"],
    mask: Bool[Array, "batch tokens"],
) -> Float[Array, ""]:
    """Share of the tokens under the mask that have the greatest score.

    >>> token_accuracy(jnp.eye(3)[None], jnp.array([[0, 1, 1]]), jnp.array([[True, True, False]])).item()
    1.0
    """
    return (logits.argmax(-1) == tokens).mean(where=mask)


def exact_match(
    logits: Float[Array, "batch tokens vocabulary"],
    tokens: Int[Array, "batch tokens"],
    mask: Bool[Array, "batch tokens"],
) -> Bool[Array, " batch"]:
    """Whether every token under the mask has the greatest score, those before it being given.

    >>> exact_match(jnp.eye(3)[None], jnp.array([[0, 1, 1]]), jnp.array([[True, True, True]])).tolist()
    [False]
    """
    return ((logits.argmax(-1) == tokens) | ~mask).all(-1)


def perplexity(
    logits: Float[Array, "batch tokens vocabulary"],
    tokens: Int[Array, "batch tokens"],
    mask: Bool[Array, "batch tokens"],
) -> Float[Array, ""]:
    """``exp`` of the mean of `token_losses` over the tokens under the mask.

    >>> round(perplexity(jnp.zeros((1, 2, 4)), jnp.zeros((1, 2), int), jnp.ones((1, 2), bool)).item(), 4)
    4.0
    """
    return jnp.exp(token_losses(logits, tokens, mask).mean(where=mask))


@dataclasses.dataclass(frozen=True)
class TokenLoss:
    """The mean loss of the tokens of each example; the labels are ``{"tokens", "mask"}``, both ``[batch, tokens]``.

    Attributes:
      task: what it is the loss of.
      chunk: tokens whose logits are alive at a time, where the model returns ``hidden`` and ``unembedding``.

    >>> labels = {"tokens": jnp.array([[1, 2]]), "mask": jnp.array([[True, False]])}
    >>> TokenLoss("next token")(None, {"logits": jnp.zeros((1, 2, 4))}, labels).tolist()
    [1.3862943649291992]
    """

    task: str
    chunk: int = 1024

    def __call__(self, loss_params: PyTree, outputs: PyTree, labels: PyTree) -> Float[Array, " batch"]:
        """The loss of each example."""
        losses, _, _ = self._of(outputs, labels)
        return losses.sum(-1) / jnp.maximum(labels["mask"].sum(-1), 1).astype(losses.dtype)

    def judge(self, loss_params: PyTree, outputs: PyTree, labels: PyTree) -> Judged:
        """The token of the greatest score at every place."""
        losses, greatest, finite = self._of(outputs, labels)
        return Judged(greatest, labels["tokens"], labels["mask"], losses, finite)

    def _of(self, outputs: PyTree, labels: PyTree) -> tuple[Array, Array, Array]:
        if not isinstance(labels, Mapping) or not {"tokens", "mask"} <= set(labels):
            raise ValueError(
                f"the task {self.task!r} has labels of tokens, {{'tokens', 'mask'}}, and not classes: make the batches "
                "with the task, or ask for classes with tvjax.tasks.label_words"
            )
        tokens, mask = labels["tokens"], labels["mask"]
        if isinstance(outputs, Mapping) and set(_MADE) <= set(outputs):
            losses, greatest, finite = (outputs[name] for name in _MADE)
            return jnp.where(mask, losses, 0.0), greatest, finite
        scores = scored_tokens(self.task, outputs)
        if jnp.shape(scores)[:2] != jnp.shape(tokens):
            raise cannot_score(self.task, outputs, f"{EXPECTED}, with [batch, tokens] {list(jnp.shape(tokens))}")
        if "logits" in outputs:
            return _whole(outputs["logits"], tokens, mask)
        losses, greatest, finite = chunked(outputs["hidden"], outputs["unembedding"], tokens, self.chunk)
        return jnp.where(mask, losses, 0.0), greatest, finite


@jax.jit
def _whole(logits: Array, tokens: Array, mask: Array) -> tuple[Array, Array, Array]:
    """What `chunked` returns, of logits that are there."""
    return token_losses(logits, tokens, mask), logits.argmax(-1), jnp.isfinite(logits.max(-1))


NEXT_TOKEN = TokenLoss("next token")
SEQUENCE_TO_SEQUENCE = TokenLoss("sequence to sequence")


def scored_tokens(task: str, outputs: PyTree, axes: int = 2) -> Array:
    """What a language model returns for every token, logits or hidden activations.

    Args:
      task: for messages.
      outputs: what the model returns.
      axes: of the tokens, those of the examples among them.

    Raises:
      ValueError: for outputs without them.
    """
    if isinstance(outputs, Mapping):
        found = outputs.get("logits", outputs.get("hidden") if "unembedding" in outputs else None)
        if found is not None and jnp.ndim(found) == axes + 1:
            return found
    raise cannot_score(task, outputs, EXPECTED)


def next_token(encoder: Encoder, template: str = "") -> Task:
    """The next token of texts; where there are answers, of the answers alone.

    Args:
      encoder: texts to tokens.
      template: the prompt, with columns in braces; "" for the one column that is no answer.

    The answer is a text's completion, or else the name of its class, and follows the prompt as it stands. What is
    scored are the tokens from the first in which prompt and answer differ from the prompt alone.

    Raises:
      ValueError: when batches are made, for examples that are no texts, or a template that does not fit their columns.

    >>> def letters(texts):
    ...     rows = [[*map(ord, one)] for one in texts]
    ...     return {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    >>> texts = Texts("sums", [0], lambda _: ("2+2=", "4"), columns=("sum", "answer"), completion="answer")
    >>> (batch,) = next_token(Encoder(letters, shortest=4)).batches(texts, 1)
    >>> batch.labels["mask"].tolist(), chr(batch.labels["tokens"][0, 3])
    ([[False, False, False, True, False, False, False, False]], '4')
    """
    name = NEXT_TOKEN.task

    def batches(examples: Examples, size: int) -> Loader:
        texts = _texts(name, examples, template)
        answered = bool(texts.completion) or texts.labels is not None

        def process(found: Sequence[dict[str, str]], labels: Any) -> Processed:
            prompts = [_prompt(texts, template, one) for one in found]
            rows, start = encoder.rows(prompts), [0] * len(found)
            if answered:
                alone = rows
                whole = [a + b for a, b in zip(prompts, _answers(texts, found, labels), strict=True)]
                rows = encoder.rows(whole)
                start = [common_opening(one, other) for one, other in zip(alone, rows, strict=True)]
            tokens = encoder.padded(rows)
            place = np.arange(tokens.ids.shape[1])
            scored = tokens.mask & (place >= np.array(start)[:, None])
            following = {"tokens": np.roll(tokens.ids, -1, 1), "mask": np.roll(scored, -1, 1) & (place < place[-1])}
            inputs = {"tokens": tokens.ids, "mask": tokens.mask, "wanted": following["tokens"]}
            return Processed(Batch(inputs, following), int(tokens.cut.sum()))

        return Loader(texts, process, size)

    return Task(name, lambda model: model.with_loss(NEXT_TOKEN), batches)


def sequence_to_sequence(encoder: Encoder, start: int, template: str = "", answers: Encoder | None = None) -> Task:
    """The tokens of an answer, by an encoder of the text and a decoder.

    Args:
      encoder: texts to tokens.
      start: the token that the decoder begins with (``decoder_start_token_id``).
      template: as for `next_token`.
      answers: answers to tokens, closing token included; None: as the texts.

    The answer is a text's completion, or else the name of its class.

    Raises:
      ValueError: when batches are made, as `next_token` does, and for texts without answers.

    >>> def letters(texts):
    ...     rows = [[*map(ord, one)] for one in texts]
    ...     return {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    >>> texts = Texts("sums", [0], lambda _: ("2+2=", "4"), columns=("sum", "answer"), completion="answer")
    >>> (batch,) = sequence_to_sequence(Encoder(letters, shortest=1), start=0).batches(texts, 1)
    >>> batch.inputs["decoder_tokens"].tolist(), batch.labels["tokens"].tolist()
    ([[0]], [[52]])
    """
    name = SEQUENCE_TO_SEQUENCE.task
    of_answers = answers or encoder

    def batches(examples: Examples, size: int) -> Loader:
        texts = _texts(name, examples, template)
        if not texts.completion and texts.labels is None:
            raise ValueError(f"{texts.name!r} has no answers, which the task {name!r} needs: name completion=COLUMN")

        def process(found: Sequence[dict[str, str]], labels: Any) -> Processed:
            tokens = encoder([_prompt(texts, template, one) for one in found])
            wanted = of_answers(_answers(texts, found, labels))
            before = np.concatenate([np.full((len(found), 1), start, np.int32), wanted.ids[:, :-1]], 1)
            inputs = {"tokens": tokens.ids, "mask": tokens.mask, "wanted": wanted.ids}
            inputs |= {"decoder_tokens": before, "decoder_mask": wanted.mask}
            cut = int((tokens.cut | wanted.cut).sum())
            return Processed(Batch(inputs, {"tokens": wanted.ids, "mask": wanted.mask}), cut)

        return Loader(texts, process, size)

    return Task(name, lambda model: model.with_loss(SEQUENCE_TO_SEQUENCE), batches)


def _texts(task: str, examples: Examples, template: str) -> Texts:
    check_examples(task, examples, Texts)
    assert isinstance(examples, Texts)
    if template:
        check_template(template, examples)
    elif len(examples.prompts) != 1:
        raise ValueError(
            f"{examples.name!r} has the columns {', '.join(examples.prompts)}: say with a template how the task "
            f"{task!r} puts them together"
        )
    return examples


def _prompt(texts: Texts, template: str, example: dict[str, str]) -> str:
    return filled(template, example) if template else example[texts.prompts[0]]


def _answers(texts: Texts, found: Sequence[dict[str, str]], labels: Any) -> list[str]:
    if texts.completion:
        return [one[texts.completion] for one in found]
    return [texts.class_names[label] for label in labels]


def common_opening(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two rows begin with alike."""
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
