"""What a transport needs of its models and examples, and what their configs say of whether it can be."""

from __future__ import annotations

from tvjax.compose.tuned import SCALES
from tvjax.jobs.asking import asking
from tvjax.jobs.opened import Opened
from tvjax.kinds import kind_of
from tvjax.transport import Transport

SHAPE = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "image_size", "patch_size", "projection_dim"),
    *("d_model", "d_ff", "num_layers", "num_decoder_layers"),
)


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


def rotates(moving: Transport) -> bool:
    """Whether a link of the transport moves into a model of another shape."""
    return any(link.space == "source_to_target" and not link.same_shapes for link in moving.links)


def scales_of(moving: Transport) -> tuple[float, ...]:
    """The grid of scales: 0 to 5 where a task vector is rotated, else 0 to 1."""
    return SCALES if rotates(moving) else tuple(round(0.05 * step, 2) for step in range(21))


def check_family(source: Opened, target: Opened) -> None:
    """Raises a ValueError where two models are not of one family, or only one of them has a head of its own."""
    if source.checkpoint.family.build is not target.checkpoint.family.build:  # MPNet is a BERT, and no CLIP is a ViT
        raise ValueError(
            f"{source.name!r} is {kind_of(source.config)} and {target.name!r} "
            f"{kind_of(target.config)}: give a source and a target of one family"
        )
    if asking(source) is not asking(target):
        heads = [f"{m.name!r} {'has no head' if asking(m).labels(m) is None else 'has one'}" for m in (source, target)]
        raise ValueError(f"one model has a head of its own: {heads[0]}, {heads[1]}; give two with a head, or none")


def check_pair(moving: Transport, source: Opened, target: Opened) -> None:
    """Raises a ValueError where the configs alone show that the transport cannot be.

    Args:
      moving: the transport.
      source: the pre-trained source.
      target: the model to move into.
    """
    check_family(source, target)
    ours, theirs = (asking(model).config(model) for model in (target, source))
    for model in (source, target) if moving.needs_gradients else ():
        if not asking(model).can_score(model):
            raise ValueError(f"{moving.name} reads gradients of the loss, but {model.name!r} {asking(model).lacks}")
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
