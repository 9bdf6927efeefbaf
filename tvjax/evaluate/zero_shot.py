"""Zero-shot heads: the classes of a CLIP as the embeddings of prompts (Radford et al. 2021, section 3.1.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tvjax.models.clip.modeling import text_model, vision_model
from tvjax.stages import Batch, Model, PyTree

Tokenize = Callable[[Sequence[str]], PyTree]


def classifier(
    model: Model, tokenize: Tokenize, class_names: Sequence[str], templates: Sequence[str]
) -> Float[Array, "embedding classes"]:
    """The classifier of a CLIP's prompts.

    Column c is the normalised mean, over the templates, of the normalised embeddings of the prompts of class c.

    Args:
      model: a CLIP with a text tower.
      tokenize: texts to ``{"tokens", "mask"}``, as `tvjax.checkpoints.Processor.tokens` does.
      class_names: one name a class.
      templates: prompts with ``{}`` in place of the name.

    Returns:
      Unit columns.

    Raises:
      ValueError: for no classes, no templates, or a template without ``{}``.

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
    prompts = [template.replace("{}", name) for name in class_names for template in templates]
    embeddings = normalise(text_model(model)(tokenize(prompts))["text"])
    means = embeddings.reshape(len(class_names), len(templates), -1).mean(1)
    return normalise(means).T


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
      ValueError: for no batches.

    >>> from tvjax.stages import Stage
    >>> tower = Model({}, (Stage("tower", lambda params, pixels: {"image": pixels}),))
    >>> embed_images(tower, Batch(jnp.array([[3.0, 4.0]]))).tolist()
    [[0.6000000238418579, 0.800000011920929]]
    """
    batches = [batches] if isinstance(batches, Batch) else batches
    found = [np.asarray(normalise(model(batch.inputs)["image"].astype(jnp.float32))) for batch in batches]
    if not found:
        raise ValueError("there are no images to embed: give at least one batch")
    return np.concatenate(found)


def zero_shot_scores(loss_params: PyTree, outputs: PyTree) -> Float[Array, "batch classes"]:
    """``exp(logit_scale) cos(image, classifier)``.

    Args:
      loss_params: ``{"classifier": [embedding, classes], "logit_scale": []}``.
      outputs: ``{"image": [batch, embedding]}``.
    """
    scale = jnp.exp(loss_params["logit_scale"].astype(jnp.float32))
    return scale * normalise(outputs["image"].astype(jnp.float32)) @ loss_params["classifier"]


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

    Args:
      model: the vision tower (`tvjax.models.clip.vision_model`).
      classifier: unit columns, from `classifier`.
      logit_scale: logarithm of the factor of the cosines, the CLIP's own parameter.

    Returns:
      The model with `zero_shot_loss`.
    """
    head = {"classifier": jnp.asarray(classifier), "logit_scale": jnp.asarray(logit_scale, jnp.float32)}
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
    """
    head = classifier(model, tokenize, class_names, templates)
    return zero_shot(vision_model(model), head, jnp.asarray(model.params["logit_scale"], jnp.float32))
