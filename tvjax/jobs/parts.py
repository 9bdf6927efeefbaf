"""The part of a model that a job moves, and whether its own head is for the classes of examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tvjax import tree
from tvjax.arithmetic import task_vector
from tvjax.checkpoints.huggingface import Pretrained
from tvjax.data.examples import spelled
from tvjax.jobs.asking import asking, parameters
from tvjax.jobs.opened import Opened
from tvjax.stages import PyTree, owner_paths


class Part(NamedTuple):
    """The leaves of a model that a job moves.

    Attributes:
      towers: the first names of the paths of what reads the examples.
      prefix: a path that the leaves lie under; "" for all.
      fixed: leaves that stay: those of a classifier, whose classes are of one task.
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
    way = asking(opened)
    model = way.tower(opened.checkpoint.family.build(opened.config, parameters(opened)))
    fixed = [
        path
        for stage in model.stages
        for local, path in owner_paths(stage, model.params).items()
        if part is None and way.head_stays and local in stage.fixed
    ]
    found = Part(frozenset(model.params), (part or "").rstrip("/"), frozenset(fixed))
    if not found.of(model.params):
        parts = {
            path.partition("blocks/")[0] + "blocks" if "blocks/" in path else path.rpartition("/")[0]
            for path in tree.flatten(model.params)
        }
        raise ValueError(
            f"--part {part!r} matches no leaf that sees {way.kind.kind}: the parts are {', '.join(sorted(parts))}"
        )
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


def copied(tau: PyTree, params: PyTree) -> PyTree | str:
    """A task vector as it is for another model, the plainest transport; or what is against it.

    Args:
      tau: of the source.
      params: of the target, or their shapes.
    """
    theirs = tree.flatten(params)
    for path, leaf in tree.flatten(tau).items():
        if path not in theirs:
            return f"the target has no {path}"
        if leaf.shape != theirs[path].shape:
            return f"{path} is {tuple(leaf.shape)} in the source, {tuple(theirs[path].shape)} in the target"
    return tau


def check_labels(opened: Opened, class_names: Sequence[str], named: bool) -> None:
    """Raises a ValueError where a model's own head is not for these classes.

    Args:
      opened: the model; one without a head of its own takes any.
      class_names: of the examples, in the order of their labels.
      named: whether the user gave the names, in the order of the head; else they must be the head's own.
    """
    labels = asking(opened).labels(opened)
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


def changed_elsewhere(part: Part, pretrained: Pretrained, finetuned: Pretrained) -> list[str]:
    """What fine-tuning changed outside the part that is moved, which takes no part."""
    before, after = tree.flatten(pretrained.params), tree.flatten(finetuned.params)
    others = [path for path in before if path in after and path not in part.of(pretrained.params)]
    changed = [path for path in others if not np.array_equal(np.asarray(before[path]), np.asarray(after[path]))]
    if not changed:
        return []
    return [f"fine-tuning changed {len(changed)} leaves outside what is moved too ({changed[0]}, ...), which stay"]
