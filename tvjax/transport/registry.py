"""Transports by name, and chains of them: what recipes and the command line speak of.

A method is one file that returns a `Transport`, and one line here or in one's own code:

    register("mine", mine)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from tvjax.transport.ariadne import ariadne
from tvjax.transport.base import Transport, chain, identity
from tvjax.transport.bico import bico
from tvjax.transport.gradfix import gradfix
from tvjax.transport.orthogonal_shift import orthogonal_shift
from tvjax.transport.theseus import theseus

Maker = Callable[..., Transport]
_METHODS: dict[str, Maker] = {}
_NO_METHOD = {
    "identity": "the method 'identity' is called 'naive' here",
    "transfusion": "the method 'transfusion' needs the table of a model's symmetries, and is made from Python: "
    "tvjax.transfusion(tvjax.models.symmetry.symmetry_of_config(config), key=...)",
    "scale_by": "the method 'scale_by' is the option --scale here",
}


def register(name: str, make: Maker) -> None:
    """Makes a method known by a name.

    Args:
      name: of the method; no ``+`` and no ``.``, which join names and options.
      make: ``make(**options) -> Transport``.

    Raises:
      ValueError: a name that is taken, or that cannot stand in a recipe.
    """
    if not name or set(name) & set("+.= "):
        raise ValueError(f"{name!r} cannot name a method: leave out '+', '.', '=' and spaces")
    if _METHODS.setdefault(name, make) is not make:
        raise ValueError(f"there is a method {name!r} already")


def methods() -> tuple[str, ...]:
    """The names of the methods that are known.

    >>> methods()[:6]
    ('naive', 'orthogonal_shift', 'gradfix', 'theseus', 'bico', 'ariadne')
    """
    return tuple(_METHODS)


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
    names = method.split("+")
    unknown = [name for name in names if name not in _METHODS]
    if unknown and unknown[0] in _NO_METHOD:
        raise ValueError(f"{_NO_METHOD[unknown[0]]}; the methods by name are {', '.join(_METHODS)}")
    if unknown:
        raise ValueError(f"there is no method {unknown[0]!r}: choose among {', '.join(_METHODS)}, or join some by '+'")
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
    return chain(*(_METHODS[name](**settings[name]) for name in names))


_OURS: dict[str, Maker] = {
    "naive": partial(identity, "naive"),
    "orthogonal_shift": orthogonal_shift,
    "gradfix": gradfix,
    "theseus": theseus,
    "bico": bico,
    "ariadne": ariadne,
}
for _name, _make in _OURS.items():
    register(_name, _make)
