"""Which maps a pair of stages needs, and the rule of every leaf of the target."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from tvjax.capture import Site
from tvjax.capture.views import View, is_slice
from tvjax.transport.base import Piece, Rule
from tvjax.transport.statistics import Options

if TYPE_CHECKING:
    from tvjax.transport.fit import Leaf, Pair

SitePair = tuple[Site, Site]


class Map(NamedTuple):
    """One map to estimate, from what pairs of sites (source, target) see on one side.

    Attributes:
      name: of the map, unique within the model.
      side: ``input``, ``output``, ``gradient`` (of the output) or ``input gradient``.
      sites: the uses that share the map: the occurrences of a tied leaf.
      linear: it is the output of one linear layer, so its moment follows from that of its input.
    """

    name: str
    side: str
    sites: tuple[SitePair, ...]
    linear: bool = False

    def names(self, model: int) -> tuple[str, ...]:
        """Names of the captured arrays that it reads in the source (0) or the target (1)."""
        attribute = self.side if self.side in ("input", "output") else "gradient"
        return tuple(getattr(sites[model], attribute) for sites in self.sites)


class MapTable:
    """The maps of a pair of stages. What is one activation in both models gets one map."""

    def __init__(self, stage: str):
        self.stage = stage
        self.maps: dict[Any, Map] = {}

    def request(self, side: str, sites: tuple[SitePair, ...]) -> str:
        """The name of the map of one side of these sites."""
        linear = side == "output" and len(sites) == 1 and sites[0][1].kind == "dense"
        if linear:
            self.request("input", sites)
        found = Map("", side, sites, linear)
        space = "linear" if linear else side if "gradient" in side else "activation"
        identity = (space, found.names(0), found.names(1))
        if identity not in self.maps:
            seen = "&".join(dict.fromkeys((*found.names(1), *found.names(0))))  # in the target, then what differs
            self.maps[identity] = found._replace(name=f"{self.stage}:{seen}:{space}")
        return self.maps[identity].name

    def input_of(self, linear: Map) -> Map:
        """The map of the activation that a linear layer reads."""
        base = linear._replace(side="input")
        return self.maps["activation", base.names(0), base.names(1)]


def seen_by(name: str) -> tuple[str, ...]:
    """The names of the activations or gradients that a map was fitted on, those of the target first.

    >>> seen_by("vision/blocks/0:norm1/scale#0:out:activation")
    ('norm1/scale#0:out',)
    """
    return tuple(name.partition(":")[2].rpartition(":")[0].split("&"))


def maps_and_rules(inputs: str, outputs: str, options: Options, pair: Pair) -> tuple[MapTable, list[Rule]]:
    """The maps to estimate at a pair of stages and the rule of every target leaf.

    Args:
      inputs: the side that input maps are taken from.
      outputs: the side that output maps are taken from.
      options: hyperparameters.
      pair: the stages.

    Raises:
      ValueError: a leaf that the two models use in different ways.
    """
    table = MapTable(pair.name)
    rules = [_rule(leaf, inputs, outputs, options, pair, table) for leaf in pair.leaves]
    return table, rules


def _rule(leaf: Leaf, inputs: str, outputs: str, options: Options, pair: Pair, table: MapTable) -> Rule:
    rule = Rule(leaf.target, leaf.source or "", "rotated", leaf.shape, leaf.source_shape)
    if leaf.source is None:
        return rule._replace(action="unmatched", why="the source has no such leaf")
    sites = _paired_sites(leaf, pair)
    if not sites or _is_embedding(sites[0][1], leaf):
        return _embedding_rule(rule, sites, leaf, outputs, options, pair, table)
    if sites[0][1].kind == "scale" and options.scale_rule == "zero":
        return rule._replace(action="zeroed by rule", why="scale_rule='zero'")
    pieces = []
    for group in _uses(sites):
        site_a, site_b = group[0]
        if len(leaf.source_shape) != len(leaf.shape) or site_a.kind != site_b.kind:
            raise ValueError(
                f"{leaf.target}: a {site_b.kind} leaf of shape {leaf.shape} in the target, a {site_a.kind} leaf of "
                f"shape {leaf.source_shape} in the source ({leaf.source}): the two models must use it alike"
            )
        fixed = options.keep_fixed and _is_fixed(pair, site_b) and site_a.d_out == site_b.d_out
        outer = None if fixed else table.request(outputs, _producers(group, pair))
        inner = None
        if site_b.kind == "dense":
            inner = table.request(inputs, group)
        elif site_b.kind == "scale" and options.scale_rule == "diagonal":
            inner = table.request("input", group)
        pieces.append(Piece(site_b.kind, site_a.view, site_b.view, inner, outer))
    why = "its outputs have a meaning of their own" if pieces[0].outer is None else ""
    return rule._replace(pieces=tuple(pieces), why=why)


def _embedding_rule(
    rule: Rule, sites: list[SitePair], leaf: Leaf, outputs: str, options: Options, pair: Pair, table: MapTable
) -> Rule:
    """Leaves that no activation enters: class token, position table, patch kernel, token table, temperatures."""
    if math.prod(leaf.shape) == 1 and leaf.shape == leaf.source_shape:
        return rule._replace(action="passed through", why="a scalar")
    zeroed = rule._replace(
        action="zeroed by rule", why=", ".join(pair.target_table.unclassified.get(leaf.local, ())) or "an embedding"
    )
    patch = _patch(pair)
    if not options.transport_embeddings or patch is None or leaf.shape[-1] != patch[1].d_out:
        return zeroed
    view: View = ()
    if sites and sites[0][1].kind == "conv":
        kind = "conv"
        if leaf.shape[:-1] != leaf.source_shape[:-1]:
            return zeroed._replace(why="patch sizes differ")
    elif len(leaf.shape) == 1:
        kind = "bias"
    else:
        kind = "positions"
        if leaf.shape[:-1] != leaf.source_shape[:-1]:
            if (pair.source_rows.tokens, pair.target_rows.tokens) != (leaf.source_shape[0], leaf.shape[0]):
                return zeroed._replace(why="tables of different lengths and no patch grid")
            view = (("grid", pair.source_rows, pair.target_rows),)
    return rule._replace(pieces=(Piece(kind, view, (), None, table.request(outputs, (patch,))),), why="embedding")


def _patch(pair: Pair) -> SitePair | None:
    found = [[site for site in table.sites if site.kind == "conv"] for table in (pair.source_table, pair.target_table)]
    return (found[0][0], found[1][0]) if all(found) else None


def _paired_sites(leaf: Leaf, pair: Pair) -> list[SitePair]:
    if leaf.local in pair.target_table.unclassified:
        return []
    theirs = {site.occurrence: site for site in pair.source_table.sites if site.path == leaf.local}
    mine = [site for site in pair.target_table.sites if site.path == leaf.local]
    return [(theirs[site.occurrence], site) for site in mine if site.occurrence in theirs]


def _producers(group: tuple[SitePair, ...], pair: Pair) -> tuple[SitePair, ...]:
    """For a bias the dense sites that it is added to, whose output is its own: one map, from the cheaper moment."""
    found = []
    for site_a, site_b in group:
        makers = [
            [maker for maker in sites if site.kind == "bias" and maker.kind == "dense" and maker.output == site.output]
            for site, sites in ((site_a, pair.source_table.sites), (site_b, pair.target_table.sites))
        ]
        found.append((makers[0][0], makers[1][0]) if len(makers[0]) == len(makers[1]) == 1 else (site_a, site_b))
    return tuple(found)


def _is_embedding(site: Site, leaf: Leaf) -> bool:
    return site.kind == "conv" or (site.kind == "shift" and len(leaf.shape) > 1)


def _is_fixed(pair: Pair, site: Site) -> bool:
    fixed = pair.target.model.stages[pair.target_index].fixed
    return site.gradient in {s.gradient for s in pair.target_table.sites if s.path in fixed}


def _uses(sites: list[SitePair]) -> list[tuple[SitePair, ...]]:
    """Sites grouped by the part of the leaf that they see. Of several views of the whole leaf the first decides."""
    groups: dict[View, list[SitePair]] = {}
    for pair in sites:
        groups.setdefault(pair[1].view, []).append(pair)
    whole = [tuple(group) for view, group in groups.items() if not _is_part(view)]
    return whole[:1] or [tuple(group) for group in groups.values()]


def _is_part(view: View) -> bool:
    # A vector that is read through a broadcast is cut back to one row of it: that leaves no entry out.
    broadcast = next((i for i, step in enumerate(view) if step[0] == "broadcast"), len(view))
    return is_slice(view[:broadcast])
