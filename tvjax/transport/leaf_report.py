"""The report by leaf: what became of every parameter, with the rank and residual of its maps."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from tvjax.transport.base import State


class LeafReport(NamedTuple):
    """What one link does to one leaf of the target.

    Attributes:
      link: name of the link.
      target: path in the target; "" for a source leaf that goes nowhere.
      source: path in the source; "" where nothing corresponds.
      action: ``rotated``, ``masked``, ``permuted``, ``shifted``, ``scaled``, ``passed through``, ``zeroed by rule``,
        ``unmatched`` or ``dropped``.
      why: a phrase where the action is not the link's ordinary one.
      measures: rank and residual of the input and the output map, rows that they were fitted on, ties of votes.
    """

    link: str
    target: str
    source: str
    action: str
    why: str
    measures: dict[str, float]


def leaf_report(state: State) -> list[LeafReport]:
    """One entry for each link and leaf; the source leaves that no target leaf takes come last."""
    report = []
    for part in state.parts:
        found = jax.device_get(part.measures)
        for rule in part.rules:
            measures: dict[str, float] = {}
            for number, piece in enumerate(rule.pieces):
                for side, name in (("in", piece.inner), ("out", piece.outer)):
                    for key, value in found.get(name or "", {}).items():
                        suffix = "" if number == 0 else f"#{number}"
                        measures[f"{key}_{side}{suffix}"] = float(np.mean(value))
            for key, value in found.get(rule.target, {}).items():
                measures[key] = float(value)
            report.append(LeafReport(part.link, rule.target, rule.source, rule.action, rule.why, measures))
    taken = {rule.source for rule in state.parts[0].rules}
    report += [
        LeafReport(state.parts[0].link, "", path, "dropped", "no target layer is paired with its layer", {})
        for path in state.sources
        if path not in taken
    ]
    return report


def summary(state: State) -> str:
    """The report as lines of text, a line a leaf, with the notes of the fit at its end."""
    lines = [f"{'link':<10} {'leaf':<44} {'action':<15} rank in/out   residual in/out"]
    for leaf in leaf_report(state):
        m = leaf.measures
        ranks = "/".join(f"{m[k]:.0f}" if k in m else "-" for k in ("rank_in", "rank_out"))
        residuals = "/".join(f"{m[k]:.3f}" if k in m else "-" for k in ("residual_in", "residual_out"))
        ties = f"ties {100 * m['ties']:.0f} %" if "ties" in m else ""
        path, remark = leaf.target or leaf.source, ties or leaf.why
        lines.append(f"{leaf.link:<10} {path:<44} {leaf.action:<15} {ranks:<13} {residuals:<13} {remark}".rstrip())
    return "\n".join([*lines, *(f"note: {note}" for note in state.notes)])
