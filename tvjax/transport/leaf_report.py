"""The report by leaf: what became of every parameter, with the rank and residual of its maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tvjax import processes, tree
from tvjax.factors import LowRank, float32
from tvjax.transport.base import State, Transport

PyTree = Any
Forms = Sequence[Mapping[str, str]]


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
      form: of the leaf after the link, as `leaf_forms` says it; "" where that was not asked.
    """

    link: str
    target: str
    source: str
    action: str
    why: str
    measures: dict[str, float]
    form: str = ""


def leaf_forms(transport: Transport, state: State, tau: PyTree) -> Forms:
    """Whether each leaf of a task vector is of low rank after each link, by its path; nothing is computed.

    Args:
      transport: that was fitted.
      state: what `fit` returned for it.
      tau: task vector of the source; its values are not looked at.

    Returns:
      For each link ``rank 16`` or ``dense`` by path in the target, for the leaves that `tau` covers; ``dense, from rank
      16`` where the link could not keep the form.

    >>> import jax.numpy as jnp
    >>> from tvjax import fit, identity, single_stage
    >>> model = single_stage(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 2))})
    >>> tau = {"w": LowRank(jnp.ones((2, 1)), jnp.ones((1, 2)))}
    >>> leaf_forms(identity(), fit(identity(), model, model), tau)
    [{'w': 'rank 1'}]
    """
    flat = jax.eval_shape(lambda tau: {path: float32(leaf) for path, leaf in tree.flatten(tau).items()}, tau)
    forms: list[dict[str, str]] = []
    for link, part in zip(transport.links, state.parts, strict=True):
        before, flat = flat, jax.eval_shape(link.transform, part, flat)
        sources = {rule.target: rule.source for rule in part.rules}
        forms.append({path: _form(leaf, before.get(sources.get(path, path))) for path, leaf in flat.items()})
    return forms


def _form(leaf: Any, before: Any) -> str:
    if isinstance(leaf, LowRank):
        return f"rank {leaf.rank}"
    return f"dense, from rank {before.rank}" if isinstance(before, LowRank) else "dense"


def leaf_report(state: State, forms: Forms = ()) -> list[LeafReport]:
    """One entry for each link and leaf; the source leaves that no target leaf takes come last.

    Args:
      state: what `fit` returned.
      forms: of the leaves of a task vector, as `leaf_forms` gives them.
    """
    report = []
    for number, part in enumerate(state.parts):
        found = processes.fetch(part.measures)
        for rule in part.rules:
            measures: dict[str, float] = {}
            for number, piece in enumerate(rule.pieces):
                for side, name in (("in", piece.inner), ("out", piece.outer)):
                    for key, value in found.get(name or "", {}).items():
                        suffix = "" if number == 0 else f"#{number}"
                        measures[f"{key}_{side}{suffix}"] = float(np.mean(value))
            for key, value in found.get(rule.target, {}).items():
                measures[key] = float(value)
            form = forms[number].get(rule.target, "") if forms else ""
            report.append(LeafReport(part.link, rule.target, rule.source, rule.action, rule.why, measures, form))
    taken = {rule.source for rule in state.parts[0].rules}
    report += [
        LeafReport(state.parts[0].link, "", path, "dropped", "no target layer is paired with its layer", {})
        for path in state.sources
        if path not in taken
    ]
    return report


def summary(state: State, forms: Forms = ()) -> str:
    """The report as lines of text, a line a leaf, with the notes of the fit at its end; see `leaf_report`."""
    lines = [f"{'link':<10} {'leaf':<44} {'action':<15} rank in/out   residual in/out"]
    for leaf in leaf_report(state, forms):
        m = leaf.measures
        ranks = "/".join(f"{m[k]:.0f}" if k in m else "-" for k in ("rank_in", "rank_out"))
        residuals = "/".join(f"{m[k]:.3f}" if k in m else "-" for k in ("residual_in", "residual_out"))
        ties = f"ties {100 * m['ties']:.0f} %" if "ties" in m else ""
        path, remark = leaf.target or leaf.source, "; ".join(filter(None, (ties or leaf.why, leaf.form)))
        lines.append(f"{leaf.link:<10} {path:<44} {leaf.action:<15} {ranks:<13} {residuals:<13} {remark}".rstrip())
    return "\n".join([*lines, *(f"note: {note}" for note in state.notes)])
