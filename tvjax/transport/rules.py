"""Which maps a pair of stages needs, and the rule of every leaf of the target."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from tvjax.align.rows import mismatch, row_axes, stream_of
from tvjax.capture import Site
from tvjax.capture.axes import NEW
from tvjax.capture.views import View, is_slice, shape_after
from tvjax.stages import HeadAxis
from tvjax.transport.base import LeafUse, Rule
from tvjax.transport.statistics import Options

if TYPE_CHECKING:
    from tvjax.transport.pair import Leaf, Pair

SitePair = tuple[Site, Site]
HeadAxes = tuple[HeadAxis, HeadAxis]

_COMMON = 0.95  # of the larger of two vocabularies that differ by padding alone, the least that both have


class Map(NamedTuple):
    """One map to estimate, from what pairs of sites (source, target) see on one side.

    Attributes:
      name: of the map, unique within the model.
      side: ``input``, ``output``, ``gradient`` (of the output) or ``input gradient``.
      sites: the uses that share the map: the occurrences of a tied leaf.
      linear: it is the output of one linear layer, so its moment follows from that of its input.
      heads: the heads of the source and of the target, where they have maps of their own.
      rows: name of what it is estimated from; maps of one activation share it.
      table: local paths of the tables, in the source and in the target, whose rows it is estimated from.
    """

    name: str
    side: str
    sites: tuple[SitePair, ...]
    linear: bool = False
    heads: HeadAxes | None = None
    rows: str = ""
    table: tuple[str, str] | None = None

    def names(self, model: int) -> tuple[str, ...]:
        """Names of the captured arrays that it reads in the source (0) or the target (1)."""
        return tuple(_name(self.side, sites[model]) for sites in self.sites)


def _name(side: str, site: Site) -> str:
    if side == "input":
        return site.image or site.input or ""
    return site.output if side == "output" else site.gradient


class MapTable:
    """The maps of a pair of stages. What is one activation in both models gets one map."""

    def __init__(self, pair: Pair):
        self.stage, self.pair = pair.name, pair
        self.maps: dict[Any, Map] = {}

    def request(self, side: str, sites: tuple[SitePair, ...], heads: HeadAxes | None = None) -> str:
        """The name of the map of one side of these sites, by heads where they are given."""
        linear = side == "output" and len(sites) == 1 and self._is_linear(*sites[0])
        if linear:
            self.request("input", sites)
        found = Map("", side, sites, linear, heads)
        space = "linear" if linear else side if "gradient" in side else "activation"
        identity = (space, found.names(0), found.names(1), heads)
        if identity not in self.maps:
            seen = "&".join(dict.fromkeys((*found.names(1), *found.names(0))))  # in the target, then what differs
            rows = f"{self.stage}:{seen}:{space}"
            name = rows if heads is None else f"{rows}:heads"
            if heads is not None and heads[0].shared:
                rows = name
            self.maps[identity] = found._replace(name=name, rows=rows)
        return self.maps[identity].name

    def request_table(self, source: str, target: str) -> str:
        """The name of the map between the rows of two tables, which correspond."""
        name = f"{self.stage}:{target}:table"
        self.maps["table", source, target] = Map(name, "table", (), rows=name, table=(source, target))
        return name

    def _is_linear(self, site_a: Site, site_b: Site) -> bool:
        """Whether the outputs are ``[x, 1] [K; b]`` of leaves as they are."""
        for site, sites in ((site_a, self.pair.source_table.sites), (site_b, self.pair.target_table.sites)):
            biases = [other for other in sites if other.kind == "bias" and other.output == site.output]
            if site.kind != "dense" or site.groups or not all(part.exact for part in (site, *biases)):
                return False
        return True

    def input_of(self, linear: Map) -> Map:
        """The map of the activation that a linear layer reads."""
        base = linear._replace(side="input")
        return self.maps["activation", base.names(0), base.names(1), None]


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
    table = MapTable(pair)
    rules = [_rule(leaf, inputs, outputs, options, pair, table) for leaf in pair.leaves]
    return table, rules


def _rule(leaf: Leaf, inputs: str, outputs: str, options: Options, pair: Pair, table: MapTable) -> Rule:
    rule = Rule(leaf.target, leaf.source or "", "rotated", leaf.shape, leaf.source_shape)
    if leaf.source is None:
        return rule._replace(action="unmatched", why="the source has no such leaf")
    sites = _paired_sites(leaf, pair)
    if not sites or _is_embedding(sites[0][1], pair):
        return _embedding_rule(rule, sites, leaf, outputs, options, pair, table)
    heads = _heads(leaf, sites, options, pair)
    if (why := _no_correspondence(leaf, sites, inputs, pair, heads[1])) is not None:
        return rule._replace(action="zeroed by rule", why=why)
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
        if pair.other_words and _is_of_words(pair, site_b):
            return rule._replace(action="zeroed by rule", why="its outputs are words of other vocabularies")
        fixed = options.keep_fixed and _is_fixed(pair, site_b)
        if fixed and site_a.d_out != site_b.d_out:
            return _between_vocabularies(rule, leaf, group, inputs, pair, table)
        outer = None if fixed else table.request(outputs, _producers(group, pair), heads[1])
        inner = None
        if site_b.kind in ("dense", "conv"):
            inner = table.request(inputs, group, heads[0])
        elif site_b.kind == "scale" and options.scale_rule == "diagonal":
            inner = table.request("input", group, heads[1])
        groups = (site_a.groups, site_b.groups) if site_a.groups and site_b.groups else None
        pieces.append(LeafUse(site_b.kind, site_a.view, site_b.view, inner, outer, groups, site_b.taps))
    why = "its outputs have a meaning of their own" if pieces[0].outer is None else ""
    return rule._replace(pieces=tuple(pieces), why=why)


def _between_vocabularies(
    rule: Rule, leaf: Leaf, group: tuple[SitePair, ...], inputs: str, pair: Pair, table: MapTable
) -> Rule:
    """The rule of a layer with outputs of their own meaning, of which the two models have other numbers."""
    site_a, site_b = group[0]
    sizes = site_a.d_out, site_b.d_out
    head_of_words = leaf.local in dict(pair.stages[1].vocabulary).values()
    if not head_of_words or not _padded(*sizes) or site_b.kind != "dense" or any(site_b.levels):
        why = f"{sizes[0]} outputs of their own meaning in the source, {sizes[1]} in the target"
        return rule._replace(action="zeroed by rule", why=why)
    common = min(sizes)
    views = [(*site.view, ("slice", (0, 0), (site.d_in, common), (1, 1))) for site in (site_a, site_b)]
    piece = LeafUse("dense", views[0], views[1], table.request(inputs, group), None)
    return rule._replace(
        pieces=(piece,), why=f"its outputs have a meaning of their own, {common} of them in both models"
    )


def _padded(size_a: int, size_b: int) -> bool:
    """Whether the sizes of two vocabularies are near enough that they differ by rows of padding, which come last."""
    return min(size_a, size_b) >= _COMMON * max(size_a, size_b)


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
    if options.transport_embeddings and patch is None and len(leaf.shape) == len(leaf.source_shape) == 2:
        if pair.other_words:
            return zeroed._replace(why="its rows are of the tokens of other tokenizers")
        if not _padded(leaf.shape[0], leaf.source_shape[0]):
            return zeroed._replace(why=f"{leaf.source_shape[0]} rows in the source, {leaf.shape[0]} in the target")
        outer = table.request_table(leaf.source_local, leaf.local)
        common = min(leaf.shape[0], leaf.source_shape[0])
        first, second = (
            () if shape[0] == common else (("slice", (0, 0), (common, shape[1]), (1, 1)),)
            for shape in (leaf.source_shape, leaf.shape)
        )
        return rule._replace(pieces=(LeafUse("dense", first, second, None, outer),), why="embedding")
    if not options.transport_embeddings or patch is None or leaf.shape[-1] != patch[1].d_out:
        return zeroed
    outer = table.request(outputs, (patch,))
    if sites and sites[0][1].kind == "conv":
        site_a, site_b = sites[0]
        if site_a.d_in != site_b.d_in or site_a.taps != site_b.taps:
            return zeroed._replace(why="patch sizes differ")
        piece = LeafUse("conv", site_a.view, site_b.view, None, table.request(outputs, (sites[0],)), None, site_b.taps)
    elif len(leaf.shape) == 1:
        piece = LeafUse("bias", (), (), None, outer)
    else:
        view: View = ()
        if leaf.shape[:-1] != leaf.source_shape[:-1]:
            layouts = tuple(stream_of(stage, row_axes(site)) for stage, site in zip(pair.stages, patch, strict=True))
            lengths = tuple(math.prod(shape[:-1]) for shape in (leaf.source_shape, leaf.shape))
            if tuple(layout.tokens for layout in layouts) != lengths:
                return zeroed._replace(why="tables of different lengths and no patch grid")
            view = (("grid", *layouts),)
        piece = LeafUse("positions", view, (), None, outer)
    return rule._replace(pieces=(piece,), why="embedding")


def _patch(pair: Pair) -> SitePair | None:
    """The convolutions of both models that read the pixels."""
    tables = (pair.source_table, pair.target_table)
    found = [[site for site in table.sites if site.kind == "conv" and site.raw] for table in tables]
    return (found[0][0], found[1][0]) if all(found) and pair.target_index == 0 else None


def _paired_sites(leaf: Leaf, pair: Pair) -> list[SitePair]:
    if leaf.local in pair.target_table.unclassified:
        return []
    theirs, mine = (
        [site for site in table.sites if site.path == path]
        for table, path in ((pair.source_table, leaf.source_local), (pair.target_table, leaf.local))
    )
    parts = any(_is_part(site.view) for site in (*theirs, *mine))
    if parts and len(theirs) != len(mine):
        raise ValueError(
            f"{leaf.target}: its parts are used {len(mine)} times in the target and {len(theirs)} times in the source "
            f"({leaf.source}): the two models must use it alike"
        )
    return [(_layers(a, b, leaf, pair), b) for a, b in zip(theirs, mine, strict=False)]


def _layers(site_a: Site, site_b: Site, leaf: Leaf, pair: Pair) -> Site:
    """The source's site at the stacked layers that the target's are paired with."""
    if not any(site_b.levels) or site_a.levels != site_b.levels:
        return site_a
    depths = [
        shape_after(site.view, shape)[: sum(site.levels)]
        for site, shape in ((site_a, leaf.source_shape), (site_b, leaf.shape))
    ]
    if depths[0] == depths[1]:
        return site_a
    if len(depths[0]) > 1:
        raise ValueError(
            f"{leaf.target}: stacks of {depths[1]} layers in the target and {depths[0]} in the source cannot be "
            "paired: take them apart into stages (tvjax.unstack)"
        )
    layers = pair.paired_layers(depths[0][0], depths[1][0])
    stacked = site_a.view.index(("each",))  # where the view goes into the layers
    view = (*site_a.view[:stacked], ("take", layers), *site_a.view[stacked:])
    return site_a._replace(view=view, layers=layers)


def _heads(leaf: Leaf, sites: list[SitePair], options: Options, pair: Pair) -> tuple[HeadAxes | None, HeadAxes | None]:
    """The heads by which the inputs and the outputs of a leaf are mapped, None where one map is over all of them.

    A norm over all heads together has one map: it is no matrix whose sides could be shared out.

    Raises:
      ValueError: heads that do not divide the units of a layer, or are rotated in part.
    """
    layers = [
        dict(stage.heads).get(path, (None, None))
        for stage, path in zip(pair.stages, (leaf.source_local, leaf.local), strict=True)
    ]
    site_a, site_b = sites[0]
    sides: list[HeadAxes | None] = []
    for side in (0, 1):
        a, b = (layer[side] for layer in layers)
        alike = a is not None and b is not None and a.shared == b.shared and not site_a.groups and not site_b.groups
        if a is None or b is None or not alike or (site_b.kind == "scale" and not a.shared):
            sides.append(None)
            continue
        sizes = [(site.d_in, site.d_out)[side] for site in (site_a, site_b)]
        for axis, size, model in zip((a, b), sizes, ("source", "target"), strict=True):
            if not a.shared and size % axis.number:
                raise ValueError(
                    f"{leaf.target}: {size} units in the {model} are declared to be {axis.number} heads, which do not "
                    "divide them: correct the heads of its stage"
                )
            size //= 1 if a.shared else axis.number
            if options.heads == "rotary" and axis.frequencies and 2 * len(axis.frequencies) != size:
                raise ValueError(
                    f"{leaf.target}: heads of {size} units in the {model}, of which positions rotate "
                    f"{2 * len(axis.frequencies)}: heads='rotary' is for whole heads; use heads='blocks'"
                )
        own_maps = options.heads != "free" or (a.shared and a.number != b.number)
        sides.append((a, b) if own_maps else None)
    return sides[0], sides[1]


def _no_correspondence(
    leaf: Leaf, sites: list[SitePair], inputs: str, pair: Pair, heads: HeadAxes | None
) -> str | None:
    """Why the rows at the sites of a leaf do not correspond, or the leaf cannot be moved by them; else None."""
    numbers = (heads[0].number, heads[1].number) if heads is not None and heads[0].shared else None
    for site_a, site_b in sites:
        if site_a.kind != site_b.kind:
            return None
        if bool(site_a.groups) != bool(site_b.groups):
            return "blocks in one model, one matrix in the other"
        if site_b.groups and NEW in (*site_a.axes, *site_b.axes):
            return "its rows are places that each model fills with tokens of its own"
        if site_a.taps != site_b.taps:
            return f"windows of {site_a.taps} pixels in the source and {site_b.taps} in the target"
        if inputs == "input gradient" and not (site_a.exact and site_b.exact):
            return "a constant is added to it, so that the gradient of its input is not that of the leaf alone"
        images = (False, True) if site_b.kind == "conv" else (False,)
        for of_image in images:
            why = mismatch(row_axes(site_a, of_image), row_axes(site_b, of_image), numbers)
            if why is not None:
                return why
    return None


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


def _is_embedding(site: Site, pair: Pair) -> bool:
    """Whether no activation of the model enters a leaf: the convolution that reads the pixels, tables of positions."""
    return site.positional or (site.kind == "conv" and site.raw and pair.target_index == 0)


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
    # What follows in a fused kernel's view picks columns, behind an "each".
    broadcast = next((i for i, step in enumerate(view) if step[0] == "broadcast"), len(view))
    return is_slice(view[:broadcast])


def _is_of_words(pair: Pair, site: Site) -> bool:
    """Whether a site's outputs are the words of the target's vocabulary."""
    words = dict(pair.stages[1].vocabulary).values()
    return site.gradient in {s.gradient for s in pair.target_table.sites if s.path in words}
