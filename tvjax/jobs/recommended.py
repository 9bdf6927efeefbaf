"""The transport that is taken where none is named, by what there is to fit it on."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

from tvjax import tree
from tvjax.jobs import inputs
from tvjax.jobs.asking import Prompts, asking, parameters
from tvjax.jobs.configs import PlanConfig, TransportConfig
from tvjax.jobs.methods import check_family
from tvjax.jobs.opened import Models
from tvjax.jobs.parts import copied, find_part
from tvjax.tasks.catalogue import find_task

MovingT = TypeVar("MovingT", TransportConfig, PlanConfig)


class Recommended(NamedTuple):
    """A method to take, and why.

    Attributes:
      method: its name.
      options: its hyperparameters.
      why: what speaks for it.
    """

    method: str
    options: dict[str, Any]
    why: str


def recommended(*, examples: bool, labels: bool, apart: str) -> Recommended:
    """The method for what is at hand; an adapter is moved by the same ones, and stays an adapter.

    BiCo's rows are centred: that gained 3 points on sentence encoders, whose activations have outlier dimensions, and
    neither gained nor lost on CLIPs (0.0 +- 1.5; ``results/real_models.json``, ``results/compare_options.json``).
    Ariadne is named, not taken. At a chosen scale it is 3 to 5 points above Theseus on CLIPs
    (``results/compare_carry.json``), 7 on one task of sentence encoders, next to none on two others, and 5 to 7 below
    it on small language models (``results/compare_carry_language.json``); at scale 1, where nothing chooses, its
    vector was worse than none in 7 of 10 fits, that of Theseus in none (``results/real_models.json``). It also keeps
    no factors of an adapter, and its state serves one task vector.

    Args:
      examples: whether there are any.
      labels: whether they have classes, by which both models can be scored.
      apart: what is against adding the task vector as it is; "" where nothing is.

    Raises:
      ValueError: there is nothing to fit a transport on, and the shapes differ.

    >>> recommended(examples=True, labels=False, apart="").method
    'theseus'
    """
    if labels:
        return Recommended(
            "bico", {"center": True}, "the examples have labels, and it reads the gradients of their loss"
        )
    if examples:
        why = (
            "it needs no labels: it reads the activations of the examples alone (where the task has classes, "
            "--method ariadne --refine correction carried more between CLIPs, and less between language models)"
        )
        return Recommended("theseus", {}, why)
    if not apart:
        return Recommended("naive", {}, "there are no examples to fit on, and every leaf fits as it is")
    raise ValueError(
        f"there is no transport without examples between these models: {apart}. Give examples with --data; unlabelled "
        "ones will do, labelled ones carry more over"
    )


def with_method(config: MovingT, models: Models) -> tuple[MovingT, tuple[str, ...]]:
    """The config with its method, and a note of which was taken and why where it named none; no weight is read.

    Raises:
      ValueError: no method can be recommended, or there are no such examples.
    """
    if config.method is not None:
        return config, ()
    source, target = models[config.source], models[config.target]
    check_family(source, target)
    place = config.data or (config.task and find_task(config.task).train)
    labels = False
    if place:
        names = inputs.read_prompts(config, (source, target)).class_names
        found = inputs.read_examples(str(place), Prompts(names, ()), (target,))
        labels = found.labels is not None and all(asking(model).can_score(model) for model in (source, target))
    apart = copied(tree.nest(find_part(source, config.part).of(parameters(source))), parameters(target))
    taken = recommended(examples=bool(place), labels=labels, apart=apart if isinstance(apart, str) else "")
    options = "".join(f" --options {name}={str(value).lower()}" for name, value in taken.options.items())
    note = f"no --method is given, so it is {taken.method}{options}: {taken.why}"
    return config.model_copy(update={"method": taken.method, "options": taken.options}), (note,)
