"""Zero-shot heads: the classes as the embeddings of prompts (Radford et al. 2021, section 3.1.4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tvjax import processes, tree
from tvjax.data.examples import Examples
from tvjax.data.images import Images
from tvjax.data.loader import Loader, image_batches
from tvjax.data.tokens import Encoder
from tvjax.finite import check_finite
from tvjax.stages import Batch, Model, PyTree, tower
from tvjax.tasks.base import Task, check_examples
from tvjax.tasks.classification import inputs_of, text_batches
from tvjax.tasks.losses import ClassLoss, cannot_score

Tokenize = Callable[[Sequence[str]], PyTree]

TEMPLATES = ("a photo of a {}.",)
TEXT_TEMPLATES = ("{}",)
SCALE = 20.0  # of sentence encoders: by what the losses of sentence-transformers, that train them, multiply
_TEXTS = 1024  # embedded at once
_SAME = 1e-5  # by how much an entry of two unit columns may differ by rounding


def classifier(
    model: Model, tokenize: Tokenize, class_names: Sequence[str], templates: Sequence[str]
) -> Float[Array, "embedding classes"]:
    """The classifier of prompts.

    Column c is the normalised mean, over the templates, of the normalised embeddings of the prompts of class c. Classes
    of one name have one column; other names whose columns are equal are refused: the tower does not read the texts.

    Args:
      model: a dual encoder, its text tower's stages named ``text/...``, or an encoder of texts; returns ``"text"``.
      tokenize: texts to ``{"tokens", "mask"}``, as `tvjax.checkpoints.Processor.tokens` does.
      class_names: one name a class.
      templates: prompts with ``{}`` in place of the name.

    Returns:
      Unit columns.

    Raises:
      ValueError: for no classes, no templates, or a template without ``{}``; for columns that are not finite, or equal
        for classes of different names, naming the classes.

    >>> from tvjax.checkpoints import from_pretrained, load_processor
    >>> from tvjax.data.embedded import model_folder
    >>> folder = model_folder("A")
    >>> tokenize = load_processor(folder).tokens
    >>> classifier(from_pretrained(folder).model, tokenize, ["one", "two"], ["a photo of the digit {}"]).shape
    (32, 2)
    """
    if not class_names or not templates:
        raise ValueError(f"found {len(class_names)} class names and {len(templates)} templates, expected some of both")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"the template {template!r} has no '{{}}' in place of the class name")
    names = list(dict.fromkeys(class_names))
    prompts = [template.replace("{}", name) for name in names for template in templates]
    in_towers = any(stage.name.startswith(("text/", "vision/")) for stage in model.stages)
    reader = tower(model, "text") if in_towers else model
    starts = range(0, len(prompts), _TEXTS)
    parts = [_embeddings(reader(tokenize(prompts[start : start + _TEXTS]))) for start in starts]
    means = normalise(jnp.concatenate(parts)).reshape(len(names), len(templates), -1).mean(1)
    columns = normalise(means).T
    _check_columns(columns, names)
    column = {name: number for number, name in enumerate(names)}
    return columns[:, np.array([column[name] for name in class_names])]


def _check_columns(columns: Float[Array, "embedding classes"], names: Sequence[str]) -> None:
    """Raises a ValueError where columns of different names are equal or not finite; inside `jit` it cannot look."""
    if tree.is_traced(columns):
        return
    found = np.asarray(columns, np.float64).T
    broken = [repr(name) for name, column in zip(names, found, strict=True) if not np.isfinite(column).all()]
    if broken:
        raise ValueError(
            f"the text embeddings of {len(broken)} of {len(names)} classes are NaN or infinite:\n"
            f"{tree.list_some(broken)}\ndo the tokenizer and the weights belong to one model?"
        )
    order = np.argsort(found @ np.cos(np.arange(found.shape[1])))  # what is equal comes side by side
    alike = [
        f"{names[one]!r} and {names[other]!r}"
        for one, other in zip(order[:-1], order[1:], strict=True)
        if np.abs(found[one] - found[other]).max() <= _SAME
    ]
    if alike:
        raise ValueError(
            f"{len(alike)} pairs of classes have one text embedding, so none could be told from the other:\n"
            f"{tree.list_some(alike)}\ndoes the tokenizer end texts with the token that the model's config names "
            "(eos_token_id), does it know the words, and are the names different where texts are cut?"
        )


def normalise(embeddings: Float[Array, "*n embedding"]) -> Float[Array, "*n embedding"]:
    """Embeddings of unit length.

    >>> normalise(jnp.array([[3.0, 4.0]])).tolist()
    [[0.6000000238418579, 0.800000011920929]]
    """
    return embeddings / jnp.linalg.norm(embeddings, axis=-1, keepdims=True)


def unit_embeddings(model: Model, batches: Batch | Iterable[Batch]) -> Float[np.ndarray, "n embedding"]:
    """Unit embeddings of examples, such as herding and k-medoids choose by.

    Args:
      model: returns ``{"image": [batch, embedding]}``, or ``"text"``.
      batches: one batch or several; labels are not looked at.

    Raises:
      ValueError: for no batches, outputs without embeddings, or ones that are not finite.

    >>> from tvjax.stages import Stage
    >>> tower = Model({}, (Stage("tower", lambda params, pixels: {"image": pixels}),))
    >>> unit_embeddings(tower, Batch(jnp.array([[3.0, 4.0]]))).tolist()
    [[0.6000000238418579, 0.800000011920929]]
    """
    batches = [batches] if isinstance(batches, Batch) else batches
    found = [processes.fetch(normalise(_embeddings(model(batch.inputs)).astype(jnp.float32))) for batch in batches]
    if not found:
        raise ValueError("there are no examples to embed: give at least one batch")
    embeddings = np.concatenate(found)
    check_finite({"embeddings": embeddings}, "what the model returns")
    return embeddings


def zero_shot_scores(loss_params: PyTree, outputs: PyTree) -> Float[Array, "batch classes"]:
    """``exp(logit_scale) cos(embedding, classifier)``.

    Args:
      loss_params: ``{"classifier": [embedding, classes], "logit_scale": []}``, and where columns are equal ``"first":
        [classes]``, the first that is equal to each.
      outputs: ``{"image": [batch, embedding]}``, or ``"text"``.

    Raises:
      ValueError: for outputs without either.
    """
    scale = jnp.exp(loss_params["logit_scale"].astype(jnp.float32))
    scores = scale * normalise(_embeddings(outputs).astype(jnp.float32)) @ loss_params["classifier"]
    return scores[:, loss_params["first"]] if "first" in loss_params else scores


def _embeddings(outputs: PyTree) -> Float[Array, "batch embedding"]:
    for name in ("image", "text"):
        if isinstance(outputs, dict) and name in outputs:
            return outputs[name]
    raise cannot_score("zero-shot classification", outputs, "the embeddings 'image' or 'text'")


ZERO_SHOT = ClassLoss("zero-shot classification", zero_shot_scores)


def with_head(
    model: Model, classifier: Float[Array, "embedding classes"], logit_scale: Float[Array, ""] | float
) -> Model:
    """An encoder with the zero-shot head as its loss; the head is no parameter.

    Of equal columns the first wins: their scores are equal to the last bit, whatever the order of summation.

    Args:
      model: the tower that embeds what is classified.
      classifier: unit columns, from `classifier`.
      logit_scale: logarithm of the factor of the cosines, the CLIP's own parameter.

    Returns:
      The model with the loss `ZERO_SHOT`.

    Raises:
      ValueError: a head that is not finite.
    """
    head = {"classifier": jnp.asarray(classifier), "logit_scale": jnp.asarray(logit_scale, jnp.float32)}
    check_finite(head, "the zero-shot head")
    if not tree.is_traced(head):
        _, index, place = np.unique(processes.fetch(head["classifier"]), axis=1, return_index=True, return_inverse=True)
        if len(index) < len(place):
            head["first"] = jnp.asarray(index[place], jnp.int32)
    return model.with_loss(ZERO_SHOT, head)


def zero_shot_model(model: Model, tokenize: Tokenize, class_names: Sequence[str], templates: Sequence[str]) -> Model:
    """The vision tower of a dual encoder with the zero-shot head of these classes as its loss.

    Args:
      model: a dual encoder, its stages named ``vision/...`` and ``text/...``; a CLIP.
      tokenize: texts to ``{"tokens", "mask"}``, as `tvjax.checkpoints.Processor.tokens` does.
      class_names: one name a class.
      templates: prompts with ``{}`` in place of the name.

    Returns:
      The vision tower; its parameters are under ``vision/`` as before.

    Raises:
      ValueError: as `classifier` does.
    """
    head = classifier(model, tokenize, class_names, templates)
    return with_head(tower(model, "vision"), head, _logit_scale(model))


def zero_shot(
    process: Any,
    class_names: Sequence[str],
    templates: Sequence[str] | None = None,
    text: tuple[Model, Tokenize] | None = None,
    scale: float | None = None,
) -> Task:
    """Classification by the names of the classes, without a head of the model's own.

    Images are classified by a dual encoder; its vision tower becomes the model. Texts are classified by a sentence
    encoder, which embeds the prompts too.

    Args:
      process: a `tvjax.checkpoints.Processor` for images, an `Encoder` for texts.
      class_names: one name a class.
      templates: prompts with ``{}`` in place of the name; None: a photo of it, or of texts the name itself.
      text: the dual encoder whose text tower reads the names, and its tokenizer (`Processor.tokens`), for a vision
        tower that has none beside it; None: the model's own.
      scale: factor of the cosines. The loss, and so its gradient, depends on it, and the predicted class does not.
        None: the model's own, or `SCALE` of a sentence encoder.

    Raises:
      ValueError: when the model is made, as `classifier` does; for a scale that is no positive number.

    >>> from tvjax.checkpoints import from_pretrained, load_processor
    >>> from tvjax.data import digits, open_examples
    >>> from tvjax.data.embedded import model_folder
    >>> folder = model_folder("A")
    >>> task = zero_shot(load_processor(folder), digits.CLASS_NAMES, digits.TEMPLATES)
    >>> batches = task.batches(open_examples("digits:base/validation"), 100)
    >>> task.score(task.model(from_pretrained(folder).model), batches).accuracy > 0.8
    True
    """
    name = ZERO_SHOT.task
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}, expected a positive number")

    def of_texts(model: Model) -> Model:
        head = classifier(model, lambda texts: inputs_of(process(texts)), class_names, templates or TEXT_TEMPLATES)
        return with_head(model, head, _logit_scale(model, scale))

    def of_images(model: Model) -> Model:
        reader, tokenize = text or (model, process.tokens)
        head = classifier(reader, tokenize, class_names, templates or TEMPLATES)
        return with_head(tower(model, "vision"), head, _logit_scale(reader, scale))

    def images(examples: Examples, size: int) -> Loader:
        check_examples(name, examples, Images, class_names)
        return image_batches(cast(Images, examples), process.pixels, size)

    if isinstance(process, Encoder):
        return Task(name, of_texts, lambda examples, size: text_batches(name, examples, process, size, class_names))
    return Task(name, of_images, images)


def _logit_scale(model: Model, scale: float | None = None) -> Float[Array, ""]:
    """The logarithm of a factor of cosines; None: the model's own, or that of a sentence encoder."""
    if scale is None and isinstance(model.params, dict) and "logit_scale" in model.params:
        return jnp.asarray(model.params["logit_scale"], jnp.float32)
    return jnp.asarray(math.log(SCALE if scale is None else scale), jnp.float32)
