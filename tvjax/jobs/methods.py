"""Transports by their names, and what the configs of models say of whether one can be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvjax import transport as methods
from tvjax.compose.tuned import SCALES
from tvjax.jobs.configs import TRANSPORTS
from tvjax.jobs.opened import Opened
from tvjax.jobs.parts import has_head, sees
from tvjax.transport import Transport

SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "image_size", "patch_size", "projection_dim")


def make_transport(method: str, options: Mapping[str, Any] | None = None) -> Transport:
    """The transport of a name, or the chain of several joined by ``+``.

    Args:
      method: the names.
      options: hyperparameters; those of one link of a chain by ``link.name``.

    Raises:
      ValueError: an unknown name or hyperparameter, or links in an order that cannot be.

    >>> make_transport("bico+gradfix", {"bico.rank": 0.5}).name
    'bico+gradfix'
    """
    makers = (methods.identity, methods.orthogonal_shift, methods.gradfix, methods.theseus, methods.bico)
    known = dict(zip(TRANSPORTS, makers, strict=True))
    names = method.split("+")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"there is no method {unknown[0]!r}: choose among {', '.join(TRANSPORTS)}, or join some by '+'"
        )
    settings: dict[str, dict[str, Any]] = {name: {} for name in names}
    for option, value in (options or {}).items():
        link, dot, key = option.rpartition(".")
        if dot and link not in settings:
            raise ValueError(f"the option {option!r} is of {link!r}, which is not in {method!r}")
        if not dot and len(names) > 1:
            raise ValueError(f"say whose option {option!r} is: {' or '.join(f'{name}.{option}' for name in names)}")
        settings[link or names[0]][key] = value
    if settings.get("naive"):
        raise ValueError(f"naive has no options, found {', '.join(map(repr, settings['naive']))}")
    return methods.chain(*(known[name](**settings[name]) for name in names))


def read_depth(text: str) -> str | list[int]:
    """The depth pairing that an option names.

    Raises:
      ValueError: neither a rule nor a list of layers.

    >>> read_depth("0, 0, 1")
    [0, 0, 1]
    """
    if text in ("uniform", "cka"):
        return text
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--depth is {text!r}, expected uniform, cka, or source layers such as 0,0,1,1") from error


def reads_examples(moving: Transport) -> bool:
    """Whether a link of the transport looks at calibration examples."""
    return any(link.reads.activations or link.reads.gradients for link in moving.links)


def rotates(moving: Transport) -> bool:
    """Whether a link of the transport moves into a model of another shape."""
    return any(link.space == "bridge" and not link.same_shapes for link in moving.links)


def scales_of(moving: Transport) -> tuple[float, ...]:
    """The grid of scales: 0 to 5 where a task vector is rotated, else 0 to 1."""
    return SCALES if rotates(moving) else tuple(round(0.05 * step, 2) for step in range(21))


def check_pair(moving: Transport, source: Opened, target: Opened) -> None:
    """Raises a ValueError where the configs alone show that the transport cannot be.

    Args:
      moving: the transport.
      source: the pre-trained source.
      target: the model to move into.
    """
    ours, theirs = sees(target), sees(source)
    if type(ours) is not type(theirs):
        raise ValueError(
            f"{source.name!r} is a {type(source.config).__name__} and {target.name!r} a "
            f"{type(target.config).__name__}: give a source and a target of one family"
        )
    for model in (source, target) if moving.needs_gradients else ():
        if not has_head(model):
            raise ValueError(
                f"{moving.name} reads gradients of the zero-shot loss, but {model.name!r} has no text tower: "
                "give the full CLIP"
            )
    if rotates(moving):
        return
    for field in SHAPE:
        before, after = (getattr(config, field, None) for config in (theirs, ours))
        if before != after:
            raise ValueError(
                f"{moving.name} needs towers of one shape: {field} is {before} in {source.name!r} and {after} in "
                f"{target.name!r}; theseus and bico move across shapes, and gradfix may follow one of them "
                "(bico+gradfix)"
            )
