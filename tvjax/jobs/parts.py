"""The part of a model that a job moves, and its task: the vision tower of a CLIP, a ViT with its own head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tvjax import tree
from tvjax.arithmetic import task_vector
from tvjax.checkpoints.folder import Checkpoint
from tvjax.checkpoints.huggingface import Pretrained
from tvjax.checkpoints.safetensors import numpy_dtype
from tvjax.data.examples import spelled
from tvjax.jobs.opened import Opened
from tvjax.models.clip.config import CLIPConfig
from tvjax.models.clip.modeling import vision_model
from tvjax.models.families import GENERIC
from tvjax.models.generic import no_code
from tvjax.stages import Model, PyTree, owner_paths
from tvjax.tasks.losses import OWN_HEAD
from tvjax.tasks.zero_shot import ZERO_SHOT, zero_shot_model


def parameters(checkpoint: Checkpoint) -> PyTree:
    """The parameters of a checkpoint, in shapes."""
    keys = {path: source.key for path, source in checkpoint.sources.items()}
    headers = checkpoint.tensors.headers
    leaves = {
        path: jax.ShapeDtypeStruct(shape, numpy_dtype(keys[path], headers[keys[path]]))
        for path, shape in checkpoint.shapes.items()
    }
    return tree.nest(leaves)


def sees(opened: Opened) -> Any:
    """The config of what sees the images: of the vision tower of a CLIP, of a ViT.

    Raises:
      ValueError: for a text tower alone, or a model without modelling code.
    """
    if opened.checkpoint.family is GENERIC:
        raise ValueError(f"{opened.name!r}: {no_code(opened.checkpoint.settings.get('model_type'))}")
    config = opened.config
    if isinstance(config, CLIPConfig) and config.vision is None:
        raise ValueError(f"{opened.name!r} is a CLIPConfig without a CLIP vision tower: give a CLIP, or a ViT")
    return config.vision if isinstance(config, CLIPConfig) else config


def tower(model: Model) -> Model:
    """What sees the images: the vision tower of a CLIP, or the whole of another model."""
    beside = any(stage.name.startswith("text/") for stage in model.stages)
    return vision_model(model) if beside else model


class Part(NamedTuple):
    """The leaves of a model that a job moves.

    Attributes:
      towers: the first names of the paths of what sees the images.
      prefix: a path that the leaves lie under; "" for all.
      fixed: leaves that stay, such as those of a classifier.
    """

    towers: frozenset[str]
    prefix: str
    fixed: frozenset[str]

    def of(self, params: PyTree) -> dict[str, Any]:
        """The leaves of parameters that belong to the part, by path."""
        return {
            path: leaf
            for path, leaf in tree.flatten(params).items()
            if path.partition("/")[0] in self.towers
            and (not self.prefix or f"{path}/".startswith(f"{self.prefix}/"))
            and path not in self.fixed
        }


def find_part(opened: Opened, part: str | None) -> Part:
    """The part of a model that a job moves; no weight is read.

    Args:
      opened: the model.
      part: a path in it; None: all but what is fixed.

    Raises:
      ValueError: a part that the model does not have.
    """
    checkpoint = opened.checkpoint
    model = tower(checkpoint.family.build(checkpoint.config, parameters(checkpoint)))
    fixed = [
        path
        for stage in model.stages
        for local, path in owner_paths(stage, model.params).items()
        if part is None and local in stage.fixed
    ]
    found = Part(frozenset(model.params), (part or "").rstrip("/"), frozenset(fixed))
    if not found.of(model.params):
        parts = {path.rpartition("/")[0].partition("/blocks/")[0] for path in tree.flatten(model.params)}
        raise ValueError(f"--part {part!r} matches no leaf that sees images: the parts are {', '.join(sorted(parts))}")
    return found


def part_task_vector(part: Part, pretrained: PyTree, finetuned: PyTree, name: str) -> PyTree:
    """The task vector of a part; that of a fine-tuned tower without projection does not cover it.

    Args:
      part: the part.
      pretrained: parameters, or their shapes.
      finetuned: the same of the fine-tuned model.
      name: of the fine-tuned model, for messages.

    Raises:
      ValueError: a fine-tuned model without the part, or leaves of different shapes.
    """
    before, after = part.of(pretrained), part.of(finetuned)
    if not after:
        raise ValueError(f"the fine-tuned model {name!r} has none of the {len(before)} leaves that are moved")
    before = {path: leaf for path, leaf in before.items() if path in after or "/projection/" not in path}
    sides = tree.nest(before), tree.nest(after)
    shapes = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in after.values())
    return jax.eval_shape(task_vector, *sides) if shapes else task_vector(*sides)


def head_labels(opened: Opened) -> tuple[str, ...] | None:
    """The names of the classes of a model's own head; empty where they are only numbered, None where it has none."""
    config = opened.config
    if isinstance(config, CLIPConfig):
        return None
    names = opened.checkpoint.settings.get("id2label") or {}
    labels = tuple(str(names[key]) for key in sorted(names, key=int))
    return () if all(label == f"LABEL_{number}" for number, label in enumerate(labels)) else labels


def has_head(opened: Opened) -> bool:
    """Whether class names make a classifier of the model: a CLIP with both towers, or a model with its own head."""
    return not isinstance(opened.config, CLIPConfig) or opened.config.text is not None


def check_labels(opened: Opened, class_names: Sequence[str], named: bool) -> None:
    """Raises a ValueError where a model's own head is not for these classes.

    Args:
      opened: the model; a CLIP takes any.
      class_names: of the examples, in the order of their labels.
      named: whether the user gave the names, in the order of the head; else they must be the head's own.
    """
    labels = head_labels(opened)
    if labels is None:
        return
    count = opened.config.num_labels
    if len(class_names) != count:
        raise ValueError(
            f"the head of {opened.name!r} has {count} classes, but the examples have {len(class_names)} "
            f"({', '.join(class_names[:3])}, ...): give the examples of all classes, or --classes with a name for each "
            "class of the head, in its order"
        )
    other = [(own, given) for own, given in zip(labels, class_names, strict=False) if spelled(own) != given]
    if other and not named:
        raise ValueError(
            f"the classes of the head of {opened.name!r} are not those of the examples ({other[0][0]!r} is "
            f"{other[0][1]!r}): give examples whose classes have the names of id2label in config.json, or --classes "
            "with their names in the order of the head"
        )


def with_task(opened: Opened, class_names: Sequence[str], templates: Sequence[str]) -> Model:
    """What sees the images in float32, with the loss of its task: a zero-shot head of prompts, or its own head."""
    model = opened.pretrained.model.replace(params=float32(opened.pretrained.params))
    if isinstance(opened.config, CLIPConfig):
        return zero_shot_model(model, opened.processor.tokens, class_names, templates)
    return model.with_loss(OWN_HEAD)


def shapes_with_task(checkpoint: Checkpoint, params: PyTree, classes: int) -> Model:
    """What sees the images with a task of so many classes, in shapes; parameters are computed with in float32."""
    model = tower(checkpoint.family.build(checkpoint.config, params))
    model = model.replace(params=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), model.params))
    if not isinstance(checkpoint.config, CLIPConfig):
        return model.with_loss(OWN_HEAD)
    width = checkpoint.config.vision.projection_dim if checkpoint.config.vision else None
    head = {
        "classifier": jax.ShapeDtypeStruct((width, classes), jnp.float32),
        "logit_scale": jax.ShapeDtypeStruct((), jnp.float32),
    }
    return model.with_loss(ZERO_SHOT, head)


def changed_elsewhere(part: Part, pretrained: Pretrained, finetuned: Pretrained) -> list[str]:
    """What fine-tuning changed outside the part that is moved, which takes no part."""
    before, after = tree.flatten(pretrained.params), tree.flatten(finetuned.params)
    others = [path for path in before if path in after and path not in part.of(pretrained.params)]
    changed = [path for path in others if not np.array_equal(np.asarray(before[path]), np.asarray(after[path]))]
    if not changed:
        return []
    return [f"fine-tuning changed {len(changed)} leaves outside what is moved too ({changed[0]}, ...), which stay"]


def float32(params: PyTree) -> PyTree:
    """The parameters in float32: gradients of 16-bit ones would vanish below their range."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
