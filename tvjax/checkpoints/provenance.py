"""Whether task vectors and models belong together, by what the files of task vectors say and by the configs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tvjax.checkpoints.folder import Checkpoint
from tvjax.checkpoints.huggingface import Pretrained
from tvjax.checkpoints.memory import Scratch
from tvjax.models.differences import differences, from_text, function_values, to_text


def check_same_base(files: Sequence[str], metadata: Sequence[Mapping[str, str]], any_base: bool) -> dict[str, str]:
    """What the metadata of task vectors say of the model that they were made for.

    Args:
      files: their names, for the error.
      metadata: of each.
      any_base: whether they may have been made for different models.

    Raises:
      ValueError: they were made for different models.
    """
    said = [(file, about) for file, about in zip(files, metadata, strict=True) if "base_fingerprint" in about]
    if not said:
        return {}
    first, base = said[0]
    config: dict[str, Any] = {}
    for file, about in said:
        if about["base_fingerprint"] != base["base_fingerprint"] and not any_base:
            raise ValueError(
                f"{file!r} was made for {about.get('base_model')!r}, and {first!r} for "
                f"{base.get('base_model')!r}, whose weights differ: move one there first (tvjax transport), or "
                "say --any-base"
            )
        own = from_text(about.get("base_config", "{}"), file)
        differ = [] if any_base else differences(config, own)
        if differ:
            raise ValueError(
                f"{first!r} and {file!r} were made for models whose configs differ in what they compute: "
                f"{', '.join(differ)}; give task vectors of one model, or say --any-base"
            )
        config = own | config
    found = {key: base[key] for key in base if key.startswith("base_")}
    return found | ({"base_config": to_text(config)} if config else {})


def check_same_config(
    made_for: Mapping[str, str], base: Pretrained | Checkpoint, files: Sequence[str], any_base: bool
) -> None:
    """Raises a ValueError where task vectors were made for a model that computes another function than this one.

    Args:
      made_for: what `check_same_base` gave.
      base: the model.
      files: names of the task vectors, for the error.
      any_base: whether they may have been made for another model.
    """
    config = from_text(made_for.get("base_config", "{}"), files[0])
    differ = [] if any_base else differences(config, function_values(base.config))
    if differ:
        raise ValueError(
            f"{', '.join(map(repr, files))} made for {made_for.get('base_model')!r}, whose config differs from that of "
            f"{base.name!r} in what the model computes: {', '.join(differ)}; give the config.json that the weights "
            "were trained with, move there first (tvjax transport), or say --any-base (any_base=True)"
        )


def check_configs(names: tuple[str, str], configs: tuple[Any, Any], part: str, allow: bool) -> tuple[str, ...]:
    """Compares the configs of two models whose weights are subtracted, in what the models compute.

    Args:
      names: of the model before fine-tuning and after it.
      configs: of the two.
      part: the tower that is taken, "" for all.
      allow: whether the two may differ.

    Returns:
      A note where they differ.

    Raises:
      ValueError: they differ; the message names each field with both values.
    """
    before, after = (function_values(config, part) for config in configs)
    differ = differences(before, after)
    if not differ:
        return ()
    found = f"the configs of {names[0]!r} and {names[1]!r} differ in what the models compute: "
    if allow:
        return (found + ", ".join(differ),)
    raise ValueError(
        f"{found}{', '.join(differ)}; the difference of their weights is no task vector: give the config.json that the "
        "weights were trained with, or say --allow-config-differences (allow_config_differences=True)"
    )


def doubts(base: Checkpoint, tuned: Checkpoint, paths: Iterable[str]) -> tuple[str, ...]:
    """A note where a model does not look fine-tuned from another: they agree in shapes, and in nothing else.

    Fine-tuning moves a matrix by a small part of its norm; two matrices that were trained apart are about
    sqrt(2) times their norm away from each other. One of middle size is looked at, and nothing else is read.

    Args:
      base: the model before fine-tuning.
      tuned: that after it.
      paths: of leaves that both have in one shape.

    Raises:
      ValueError: values that are not finite.
    """
    matrices = sorted((path for path in paths if len(base.shapes[path]) > 1), key=base.leaf_bytes)
    if not matrices:
        return ()
    path = matrices[len(matrices) // 2]
    before, after = (side.read(path, Scratch(), keep=True).astype(np.float32).ravel() for side in (base, tuned))
    size, moved = np.linalg.norm(before), np.linalg.norm(after - before)
    if moved <= size or not size:
        return ()
    return (
        f"{path} of {tuned.name!r} is {moved / size:.1f} times its norm away from that of {base.name!r}: are these the "
        "weights that it was fine-tuned from?",
    )


def check_made_for(
    made_for: Mapping[str, str], name: str, fingerprint: str, files: Sequence[str], any_base: bool
) -> None:
    """Raises a ValueError where task vectors were made for other weights than a model's.

    Args:
      made_for: what `check_same_base` gave.
      name: of the model.
      fingerprint: of its weights.
      files: names of the task vectors, for the error.
      any_base: whether they may have been made for other weights.
    """
    if made_for.get("base_fingerprint", fingerprint) != fingerprint and not any_base:
        raise ValueError(
            f"{', '.join(map(repr, files))} made for {made_for.get('base_model')!r}, whose weights are not those of "
            f"{name!r}: move there first (tvjax transport), or say --any-base (any_base=True)"
        )
