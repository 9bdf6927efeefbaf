"""Zero-shot heads: the classes of a CLIP as the embeddings of prompts (Radford et al. 2021, section 3.1.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tvjax import tree
from tvjax.finite import check_finite
from tvjax.models.clip.modeling import text_model, vision_model
from tvjax.stages import Batch, Model, PyTree

Tokenize = Callable[[Sequence[str]], PyTree]

_TEXTS = 1024  # embedded at once
_SAME = 1e-5  # by how much an entry of two unit columns may differ by rounding


def classifier(
    model: Model, tokenize: Tokenize, class_names: Sequence[str], templates: Sequence[str]
) -> Float[Array, "embedding classes"]:
    """The classifier of a CLIP's prompts.

    Column c is the normalised mean, over the templates, of the normalised embeddings of the prompts of class c. Classes
    of one name have one column; other names whose columns are equal are refused: the tower does not read the texts.

    Args:
      model: a CLIP with a text tower.
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
    tower = text_model(model)
    parts = [tower(tokenize(prompts[start : start + _TEXTS]))["text"] for start in range(0, len(prompts), _TEXTS)]
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


def embed_images(model: Model, batches: Batch | Iterable[Batch]) -> Float[np.ndarray, "n embedding"]:
    """Unit embeddings of images, such as herding and k-medoids choose by.

    Args:
      model: a vision tower that returns ``{"image": [batch, embedding]}``.
      batches: one batch or several; labels are not looked at.

    Raises:
      ValueError: for no batches, or embeddings that are not finite.

    >>> from tvjax.stages import Stage
    >>> tower = Model({}, (Stage("tower", lambda params, pixels: {"image": pixels}),))
    >>> embed_images(tower, Batch(jnp.array([[3.0, 4.0]]))).tolist()
    [[0.6000000238418579, 0.800000011920929]]
    """
    batches = [batches] if isinstance(batches, Batch) else batches
    found = [np.asarray(normalise(model(batch.inputs)["image"].astype(jnp.float32))) for batch in batches]
    if not found:
        raise ValueError("there are no images to embed: give at least one batch")
    embeddings = np.concatenate(found)
    check_finite({"image": embeddings}, "the output of the vision tower")
    return embeddings


def zero_shot_scores(loss_params: PyTree, outputs: PyTree) -> Float[Array, "batch classes"]:
    """``exp(logit_scale) cos(image, classifier)``.

    Args:
      loss_params: ``{"classifier": [embedding, classes], "logit_scale": []}``, and where columns are equal ``"first":
        [classes]``, the first that is equal to each.
      outputs: ``{"image": [batch, embedding]}``.
    """
    scale = jnp.exp(loss_params["logit_scale"].astype(jnp.float32))
    scores = scale * normalise(outputs["image"].astype(jnp.float32)) @ loss_params["classifier"]
    return scores[:, loss_params["first"]] if "first" in loss_params else scores


def zero_shot_loss(loss_params: PyTree, outputs: PyTree, labels: Int[Array, " batch"]) -> Float[Array, " batch"]:
    """Cross-entropy of each example under `zero_shot_scores`.

    >>> head = {"classifier": jnp.eye(2), "logit_scale": jnp.zeros(())}
    >>> zero_shot_loss(head, {"image": jnp.array([[1.0, 1.0]])}, jnp.array([0])).tolist()
    [0.6931471824645996]
    """
    log_probabilities = jax.nn.log_softmax(zero_shot_scores(loss_params, outputs))
    return -jnp.take_along_axis(log_probabilities, labels[:, None], axis=1)[:, 0]


def zero_shot(
    model: Model, classifier: Float[Array, "embedding classes"], logit_scale: Float[Array, ""] | float
) -> Model:
    """A vision tower with the zero-shot head as its loss; the head is no parameter.

    Of equal columns the first wins: their scores are equal to the last bit, whatever the order of summation.

    Args:
      model: the vision tower (`tvjax.models.clip.vision_model`).
      classifier: unit columns, from `classifier`.
      logit_scale: logarithm of the factor of the cosines, the CLIP's own parameter.

    Returns:
      The model with `zero_shot_loss`.

    Raises:
      ValueError: a head that is not finite.
    """
    head = {"classifier": jnp.asarray(classifier), "logit_scale": jnp.asarray(logit_scale, jnp.float32)}
    check_finite(head, "the zero-shot head")
    if not tree.is_traced(head):
        _, index, place = np.unique(np.asarray(classifier), axis=1, return_index=True, return_inverse=True)
        if len(index) < len(place):
            head["first"] = jnp.asarray(index[place], jnp.int32)
    return model.with_loss(zero_shot_loss, head)


def zero_shot_model(model: Model, tokenize: Tokenize, class_names: Sequence[str], templates: Sequence[str]) -> Model:
    """The vision tower of a CLIP with the zero-shot head of these classes as its loss.

    Args:
      model: a CLIP with both towers.
      tokenize: texts to ``{"tokens", "mask"}``, as `tvjax.checkpoints.Processor.tokens` does.
      class_names: one name a class.
      templates: prompts with ``{}`` in place of the name.

    Returns:
      The vision tower; its parameters are under ``vision/`` as before.

    Raises:
      ValueError: as `classifier` does.
    """
    head = classifier(model, tokenize, class_names, templates)
    return zero_shot(vision_model(model), head, jnp.asarray(model.params["logit_scale"], jnp.float32))
