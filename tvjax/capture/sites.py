"""Sites: where the parameters of a function meet its activations.

The function is traced to a jaxpr; the parameter inputs are marked, the marks carried through whatever is affine in the
parameter (views, products with constants, sums with constants), and every equation that reads a mark is classified:

========  =====================================  ==========================  ==============================
kind      the equation                           x                           y, and g = dL/dy
========  =====================================  ==========================  ==============================
dense     contraction with an activation         the activation              its output, after its bias
conv      convolution of an activation           its patches                 its output, after its bias
scale     product with activations               the product of the others   what leaves the chain of products
bias      sum with the output of one of these    (ones)                      that sum
shift     sum with any other activation          (ones)                      that sum
========  =====================================  ==========================  ==============================

The gradient of a leaf is then the sum over its sites of ``x^T g`` (dense, conv), ``sum_rows x * g`` (scale) and
``sum_rows g`` (bias, shift), brought back to the leaf by the transpose of its view. What has no rule is reported.
"""

from __future__ import annotations

from typing import NamedTuple

from tvjax.capture.views import View


class Site(NamedTuple):
    """One place where a parameter meets an activation.

    Attributes:
      path: the leaf.
      occurrence: 0, 1, ... over the sites of the leaf.
      kind: ``dense``, ``conv``, ``scale``, ``bias`` or ``shift``.
      view: from the leaf to ``[*layers, groups, d_in, d_out]`` (dense, conv; no groups where there is one) or
        ``[*layers, d_out]``.
      levels: for each scan around the site, outermost first, whether the leaf is scanned over (else it is shared).
      rows: shape of the row axes of the activations, the example axis first as a rule.
      axes: where each of them comes from, see `tvjax.capture.axes`.
      d_in: width of x in one group; for kinds without a matrix the same as d_out.
      d_out: width of y and g in one group.
      input: name of the activation x; sites that read the same value share it. None for bias and shift.
      output: name of the activation y; equal to the `input` of the sites that read it.
      gradient: name of the output gradient g; a bias shares its kernel's.
      groups: blocks of a block-diagonal kernel: batch axes of the contraction that the activation owns (heads,
        experts), groups of a convolution; None where the kernel is one matrix.
      taps: pixels of the window of a convolution, whose d_in is channels times taps, in this order.
      image: of a convolution, name of the activation that its patches are cut from, ``[pixels, channels]``.
      image_rows: shape of the row axes of the image.
      image_axes: where they come from.
      raw: whether x is an argument that no parameter has touched (pixels).
      positional: whether the leaf has an entry for each token (a position table), not only for each feature.
      exact: whether the operation reads the view itself, not the view plus a constant.
      stopped: whether the leaf's gradient is stopped before it gets here.
      layers: which of the stacked layers are looked at, in order; () for all of them.
    """

    path: str
    occurrence: int
    kind: str
    view: View
    levels: tuple[bool, ...]
    rows: tuple[int, ...]
    axes: tuple[str, ...]
    d_in: int
    d_out: int
    input: str | None
    output: str
    gradient: str
    groups: int | None = None
    taps: int = 1
    image: str | None = None
    image_rows: tuple[int, ...] = ()
    image_axes: tuple[str, ...] = ()
    raw: bool = False
    positional: bool = False
    exact: bool = True
    stopped: bool = False
    layers: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """``path#occurrence``."""
        return f"{self.path}#{self.occurrence}"


class SiteTable(NamedTuple):
    """The sites of a function, and the leaves that have none.

    Attributes:
      sites: in a fixed order; occurrences of a leaf in the order in which it is met.
      unclassified: for each leaf with a use that has no rule, what those uses are.
      unused: leaves that the function never reads, or whose reading changes nothing that it returns.
    """

    sites: tuple[Site, ...]
    unclassified: dict[str, tuple[str, ...]]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{'site':<48} {'kind':<6} {'d_in':>6} {'d_out':>6}  rows"]
        lines += [f"{s.key:<48} {s.kind:<6} {s.d_in:>6} {s.d_out:>6}  {s.rows}" for s in self.sites]
        lines += [f"{path:<48} unclassified: {', '.join(why)}" for path, why in self.unclassified.items()]
        lines += [f"{path:<48} unused" for path in self.unused]
        return "\n".join(lines)
