"""What a plain copy of a task vector would have done in the place of a transport, to be shown beside it."""

from __future__ import annotations

import json
from typing import Any

from tvjax.arithmetic import apply
from tvjax.jobs.opened import Models, Opened
from tvjax.jobs.parts import copied, find_part, part_task_vector
from tvjax.jobs.task_vectors import read_given

REPORT = "leaf_report.json"


def copy_beside(moved: Opened, models: Models) -> Opened | str | None:
    """The target of a transport with the same task vector added as it is.

    The scale is the one that was best for the copy on the validation examples of the transport, 1 where there were
    none.

    Args:
      moved: a model; what `tvjax.jobs.transport` wrote says which models it is made of.
      models: opens them.

    Returns:
      The model; why it cannot be made; or None for a model that no transport wrote, or where shapes do not agree.
    """
    try:
        text = (moved.checkpoint.folder / REPORT).read_text(encoding="utf-8")
    except OSError:
        return None
    try:
        report: dict[str, Any] = json.loads(text)
        names = report["source"], report["target"]
        given, tuned = report.get("task_vector"), report["finetuned"]
        scale = float((report.get("copy") or {}).get("scale", 1.0))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{REPORT} does not say what the model is made of ({type(error).__name__}: {error})"
    try:
        source, target = (models[name] for name in names)
        part = find_part(source, report.get("part"))
        if given:
            tau = read_given(given, source, part, any_base=True)
        else:
            tau = part_task_vector(part, source.pretrained.params, models[tuned].pretrained.params, tuned)
            models[tuned].release()
        tau = copied(tau, target.pretrained.params)
    except ValueError as error:  # a model that has moved away or changed since
        return str(error)
    if isinstance(tau, str):
        return None
    made = Opened(target.checkpoint)
    made.pretrained = target.pretrained.with_params(apply(target.pretrained.params, tau, scale))
    source.release()
    target.release()
    return made
