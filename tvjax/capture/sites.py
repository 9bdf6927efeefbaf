"""Finding the sites of a function: where each of its parameters meets an activation.

The function is traced to a jaxpr; the parameter inputs are marked, the marks carried through view operations, and
every equation that reads a mark is classified:

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

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from tvjax import tree
from tvjax.capture import jaxprs
from tvjax.capture.views import TRANSPARENT, View, follow_axes, split_step, step_of

PyTree = Any
Var = Any  # a `jax.extend.core.Var`, whose `aval` has a shape and a dtype


class Site(NamedTuple):
    """One place where a parameter meets an activation.

    Attributes:
      path: the leaf.
      occurrence: 0, 1, ... over the sites of the leaf.
      kind: ``dense``, ``conv``, ``scale``, ``bias`` or ``shift``.
      view: from the leaf to ``[*layers, d_in, d_out]`` (dense, conv) or ``[*layers, d_out]``.
      levels: for each scan around the site, outermost first, whether the leaf is scanned over (else it is shared).
      rows: shape of the row axes of the activations, the example axis first as a rule.
      d_in: width of x; for kinds without a matrix the same as d_out.
      d_out: width of y and g.
      input: name of the activation x; sites that read the same value share it. None for bias and shift.
      output: name of the activation y; equal to the `input` of the sites that read it.
      gradient: name of the output gradient g; a bias shares its kernel's.
    """

    path: str
    occurrence: int
    kind: str
    view: View
    levels: tuple[bool, ...]
    rows: tuple[int, ...]
    d_in: int
    d_out: int
    input: str | None
    output: str
    gradient: str

    @property
    def key(self) -> str:
        """``path#occurrence``."""
        return f"{self.path}#{self.occurrence}"


class SiteTable(NamedTuple):
    """The sites of a function, and the leaves that have none.

    Attributes:
      sites: in a fixed order; occurrences of a leaf in the order in which it is met.
      unclassified: for each leaf with a use that has no rule, what those uses are.
      unused: leaves that the function never reads.
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


class Mark(NamedTuple):
    """What a variable shows of a parameter.

    `axes` are the axes of the variable that carry the leaf's entries (others are broadcast); None where unknown.
    """

    path: str
    view: View
    axes: tuple[int, ...] | None
    levels: tuple[bool, ...]


class Layout(NamedTuple):
    """Which axes of a value are batch axes of the contraction, rows, and features."""

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    features: tuple[int, ...]

    def sizes(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape ``[*batch, rows, features]`` of a value of this shape."""
        return (
            *(shape[i] for i in self.batch),
            math.prod(shape[i] for i in self.rows),
            math.prod(shape[i] for i in self.features),
        )


class Record(NamedTuple):
    """Take the value ``make(read)`` of a region, in a layout, as activation `name`."""

    name: str
    layout: Layout
    role: str  # "input" or "output"
    make: Callable[[Callable[[Any], Any]], Any]


@dataclasses.dataclass
class Plan:
    """What to do while a region is run: where to add probes, what to record, which inner regions to enter."""

    region: jaxprs.Region
    probes: dict[Var, list[tuple[str, Layout]]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    records: dict[Var, list[Record]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    inner: dict[int, Plan] = dataclasses.field(default_factory=dict)
    shapes: dict[str, jax.ShapeDtypeStruct] = dataclasses.field(default_factory=dict)


class _Sites:
    """Collects sites over all regions of one function."""

    def __init__(self) -> None:
        self.sites: list[Site] = []
        self.reasons: dict[str, list[str]] = defaultdict(list)
        self.occurrences: Counter[str] = Counter()
        self.names: dict[tuple[Any, Layout], str] = {}

    def report(self, mark: Mark, why: str) -> None:
        if why not in self.reasons[mark.path]:
            self.reasons[mark.path].append(why)


class _RegionFinder:
    def __init__(self, finder: _Sites, region: jaxprs.Region, marks: dict[Var, Mark], data: set[Var]):
        self.finder, self.marks, self.data = finder, dict(marks), set(data)
        self.plan = Plan(region)
        self.uses: dict[Var, list[Any]] = defaultdict(list)
        self.roots: dict[Var, Var] = {}  # a variable that is only a cast of another
        self.claimed: set[int] = set()  # equations that a site already explains
        for eqn in region.eqns:
            for atom in eqn.invars:
                if isinstance(atom, core.Var):
                    self.uses[atom].append(eqn)
        for atom in region.results:
            if isinstance(atom, core.Var):
                self.uses[atom].append(None)
        for eqn in region.eqns:
            self._propagate(eqn)
        for eqn in region.eqns:
            if id(eqn) not in self.claimed:
                self._classify(eqn)
        self.result_marks = [self.mark(atom) for atom in region.results]

    # -- marks ---------------------------------------------------------------------------------------------------

    def mark(self, atom: Any) -> Mark | None:
        return self.marks.get(atom) if isinstance(atom, core.Var) else None

    def is_data(self, atom: Any) -> bool:
        return isinstance(atom, core.Var) and atom in self.data

    def root(self, atom: Any) -> Any:
        return self.roots.get(atom, atom) if isinstance(atom, core.Var) else atom

    def _propagate(self, eqn: Any) -> None:
        if any(map(self.is_data, eqn.invars)):
            self.data.update(eqn.outvars)
        if eqn.primitive.name == "scan" or eqn.primitive.name in jaxprs.REMAT:
            self._enter(eqn)
            return
        if not eqn.invars or not isinstance(eqn.invars[0], core.Var):
            return
        source: Var = eqn.invars[0]
        if eqn.primitive.name in TRANSPARENT:
            self.roots[eqn.outvars[0]] = self.root(source)
        mark = self.marks.get(source)
        if mark is None:
            return
        is_split = eqn.primitive.name == "split"
        for index, out in enumerate(eqn.outvars):
            view = split_step(eqn, index) if is_split else step_of(eqn)
            if view is not None:
                self.marks[out] = _extend(mark, view, source.aval.shape)

    def _is_view_of_mark(self, eqn: Any) -> bool:
        return all(out in self.marks for out in eqn.outvars)

    # -- classification ------------------------------------------------------------------------------------------

    def _classify(self, eqn: Any) -> None:
        marked = [i for i, atom in enumerate(eqn.invars) if self.mark(atom)]
        name = eqn.primitive.name
        if not marked or id(eqn) in self.plan.inner or self._is_view_of_mark(eqn):
            return
        rules = {
            "dot_general": self._contraction,
            "conv_general_dilated": self._convolution,
            "mul": self._product,
            "add": self._sum,
            "add_any": self._sum,
        }
        others_are_data = any(self.is_data(atom) for i, atom in enumerate(eqn.invars) if i not in marked)
        if len(marked) > 1:
            why: str | None = f"{name} of two parameters"
        elif name in rules and not others_are_data:
            why = f"{name} with a constant"
        elif name in rules:
            why = rules[name](eqn, marked[0])
        else:
            why = name
        if why:
            for i in marked:
                self.finder.report(self.marks[eqn.invars[i]], why)

    def _contraction(self, eqn: Any, position: int) -> str | None:
        (contract_left, contract_right), (batch_left, batch_right) = eqn.params["dimension_numbers"]
        contracts, batches = (contract_left, contract_right), (batch_left, batch_right)
        parameter, activation = eqn.invars[position], eqn.invars[1 - position]
        mark = self.marks[parameter]
        free = _others(parameter.aval.ndim, (*contracts[position], *batches[position]))
        rows = _others(activation.aval.ndim, (*contracts[1 - position], *batches[1 - position]))
        n_batch = len(batch_left)
        out_axes = (rows, free) if position == 1 else (free, rows)
        first = tuple(range(n_batch, n_batch + len(out_axes[0])))
        second = tuple(range(n_batch + len(first), n_batch + len(first) + len(out_axes[1])))
        out = eqn.outvars[0]
        layout = Layout(tuple(range(n_batch)), *((first, second) if position == 1 else (second, first)))
        shape = parameter.aval.shape
        order = (*batches[position], *contracts[position], *free)
        matrix = (
            *(shape[i] for i in batches[position]),
            math.prod(shape[i] for i in contracts[position]),
            math.prod(shape[i] for i in free),
        )
        x_layout = Layout(tuple(batches[1 - position]), rows, tuple(contracts[1 - position]))
        name = self._activation(self.root(activation), x_layout, mark, "in", "input")
        self._add_site(
            "dense", mark, _matrix_view(shape, order, matrix), out, layout, x_layout, activation.aval.shape, name
        )
        return None

    def _convolution(self, eqn: Any, position: int) -> str | None:
        params = eqn.params
        if position != 1:
            return "conv_general_dilated of a parameter as its image"
        if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
            return "conv_general_dilated with groups"
        image, kernel = eqn.invars
        numbers, out = params["dimension_numbers"], eqn.outvars[0]
        mark, shape = self.marks[kernel], kernel.aval.shape
        order = (*numbers.rhs_spec[1:2], *numbers.rhs_spec[2:], numbers.rhs_spec[0])
        d_out = shape[numbers.rhs_spec[0]]
        matrix = (math.prod(shape) // d_out, d_out)
        layout = Layout((), (numbers.out_spec[0], *numbers.out_spec[2:]), (numbers.out_spec[1],))
        window = tuple(shape[i] for i in numbers.rhs_spec[2:])

        def patches(read: Callable[[Any], Any]) -> Any:
            return jax.lax.conv_general_dilated_patches(
                read(image),
                filter_shape=window,
                window_strides=params["window_strides"],
                padding=params["padding"],
                lhs_dilation=params["lhs_dilation"],
                rhs_dilation=params["rhs_dilation"],
                dimension_numbers=jax.lax.ConvDimensionNumbers(numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec),
                precision=jax.lax.Precision.HIGHEST,
            )

        patch_shape = tuple(matrix[0] if i == layout.features[0] else n for i, n in enumerate(out.aval.shape))
        name = self._activation((image, eqn), layout, mark, "in", "input", at=out, make=patches)
        self._add_site("conv", mark, _matrix_view(shape, order, matrix), out, layout, layout, patch_shape, name)
        return None

    def _product(self, eqn: Any, position: int) -> str | None:
        mark = self.marks[eqn.invars[position]]
        if mark.axes is None:
            return "mul with a mixed view"
        factors: list[tuple[Any, bool]] = [(eqn.invars[1 - position], False)]
        out = eqn.outvars[0]
        while (following := self._only_use(out)) is not None:
            name = following.primitive.name
            if name in TRANSPARENT:
                out = following.outvars[0]
                continue
            other = _other_operand(following, out)
            # Stop at a square, and at a product with another parameter.
            if other is None or name not in ("mul", "div") or self.mark(other) is not None:
                break
            if name == "div" and following.invars[0] is not out:
                break
            factors.append((other, name == "div"))
            out = following.outvars[0]
        layout = _elementwise_layout(mark, out)

        def unit(read: Callable[[Any], Any]) -> Any:
            value = jax.numpy.ones(out.aval.shape, out.aval.dtype)
            for factor, inverse in factors:
                operand = jax.numpy.asarray(read(factor)).astype(out.aval.dtype)
                value = value / operand if inverse else value * operand
            return value

        name = self._activation((out, "unit"), layout, mark, "in", "input", at=out, make=unit)
        self._add_site(
            "scale", mark, _vector_view(mark, eqn.invars[position]), out, layout, layout, out.aval.shape, name
        )
        return None

    def _sum(self, eqn: Any, position: int) -> str | None:
        mark = self.marks[eqn.invars[position]]
        if mark.axes is None:
            return "add with a mixed view"
        out = eqn.outvars[0]
        layout = _elementwise_layout(mark, out)
        view = _vector_view(mark, eqn.invars[position])
        self._add_site("shift", mark, view, out, layout, layout, out.aval.shape, None)
        return None

    # -- helpers of the rules --------------------------------------------------------------------------------------

    def _only_use(self, variable: Var) -> Any | None:
        uses = self.uses[variable]
        return uses[0] if len(uses) == 1 else None

    def _activation(
        self,
        identity: Any,
        layout: Layout,
        mark: Mark,
        suffix: str,
        role: str,
        at: Var | None = None,
        make: Callable[[Callable[[Any], Any]], Any] | None = None,
    ) -> str:
        """The name of an activation, recorded once however many sites read it."""
        key = (identity, layout)
        variable = at if at is not None else identity
        if key not in self.finder.names:
            occurrence = self.finder.occurrences[mark.path]
            self.finder.names[key] = f"{mark.path}#{occurrence}:{suffix}"
        name = self.finder.names[key]
        if not any(r.name == name and r.role == role for r in self.plan.records[variable]):
            self.plan.records[variable].append(Record(name, layout, role, make or _value_of(identity)))
        return name

    def _add_site(
        self,
        kind: str,
        mark: Mark,
        view: View,
        out: Var,
        layout: Layout,
        x_layout: Layout,
        x_shape: Sequence[int],
        input_name: str | None,
    ) -> None:
        bias = self._bias_after(out, layout) if kind != "shift" else None
        y_variable, y_layout = (out, layout) if bias is None else (bias.out, bias.layout)
        occurrence = self.finder.occurrences[mark.path]
        probe = f"{mark.path}#{occurrence}"
        self.plan.probes[out].append((probe, layout))
        self.plan.shapes[probe] = jax.ShapeDtypeStruct(layout.sizes(out.aval.shape), out.aval.dtype)
        output = self._activation(self.root(y_variable), y_layout, mark, "out", "output", at=y_variable)
        rows = tuple(out.aval.shape[i] for i in layout.rows)
        d_out = layout.sizes(out.aval.shape)[-1]
        d_in = x_layout.sizes(x_shape)[-1] if kind in ("dense", "conv") else d_out
        levels = mark.levels
        site = Site(mark.path, occurrence, kind, mark.view + view, levels, rows, d_in, d_out, input_name, output, probe)
        self.finder.sites.append(site)
        self.finder.occurrences[mark.path] += 1
        if bias is not None:
            self.claimed.add(id(bias.eqn))
            b = bias.mark
            number = self.finder.occurrences[b.path]
            self.finder.occurrences[b.path] += 1
            self.finder.sites.append(
                Site(b.path, number, "bias", b.view + bias.view, b.levels, rows, d_out, d_out, None, output, probe)
            )

    def _bias_after(self, out: Var, layout: Layout) -> _Bias | None:
        """The bias that is added to a value and to nothing else of it, or None."""
        view: View = ()
        variable = out
        while (following := self._only_use(variable)) is not None:
            if following.primitive.name in ("add", "add_any"):
                break
            step = step_of(following)
            if step is None or any(s[0] in ("broadcast", "slice", "rev") for s in step):
                return None
            view += step
            variable = following.outvars[0]
        if following is None:
            return None
        other = _other_operand(following, variable)
        mark = self.mark(other)
        if other is None or mark is None or mark.axes is None or layout.batch:
            return None
        result = following.outvars[0]
        if tuple(result.aval.shape) != tuple(variable.aval.shape):
            return None
        shape = out.aval.shape
        features = follow_axes(view, shape, layout.features)
        rows = follow_axes(view, shape, layout.rows)
        wide = tuple(i for i in mark.axes if other.aval.shape[i] != 1)
        if features is None or rows is None or tuple(sorted(wide)) != wide:
            return None
        if tuple(i for i in features if result.aval.shape[i] != 1) != wide:
            return None
        return _Bias(following, mark, _vector_view(mark, other), result, Layout((), rows, features))

    # -- inner regions -----------------------------------------------------------------------------------------------

    def _enter(self, eqn: Any) -> None:
        scan = eqn.primitive.name == "scan"
        inner = jaxprs.body(eqn)
        n_consts, n_carry = jaxprs.scan_operands(eqn) if scan else (len(eqn.invars), 0)
        marks: dict[Var, Mark] = {}
        data: set[Var] = set()
        arguments = inner.variables[len(inner.consts) :]
        any_data = any(map(self.is_data, eqn.invars))
        for i, (atom, variable) in enumerate(zip(eqn.invars, arguments, strict=True)):
            carried, scanned = n_consts <= i < n_consts + n_carry, i >= n_consts + n_carry
            if self.is_data(atom) or (carried and any_data):
                data.add(variable)
            mark = self.mark(atom)
            if mark is None:
                continue
            if carried:
                self.finder.report(mark, "carry of a scan")
                continue
            if not scan:
                marks[variable] = mark
                continue
            view = mark.view + (("each",),) if scanned else mark.view
            axes = mark.axes
            if scanned:
                axes = None if axes is None else tuple(a - 1 for a in axes if a != 0)
            marks[variable] = Mark(mark.path, view, axes, (*mark.levels, scanned))
        found = _RegionFinder(self.finder, inner, marks, data)
        self.plan.inner[id(eqn)] = found.plan
        lead = (eqn.params["length"],) if scan else ()
        for name, shape in found.plan.shapes.items():
            self.plan.shapes[name] = jax.ShapeDtypeStruct((*lead, *shape.shape), shape.dtype)
        for i, (mark, out) in enumerate(zip(found.result_marks, eqn.outvars, strict=True)):
            if mark is None or not self.uses[out]:
                continue
            if not scan:
                self.marks[out] = mark
            elif i >= n_carry and mark.view[-1:] == (("each",),) and mark.axes is not None:
                axes = (0, *(a + 1 for a in mark.axes))  # each slice put back where it came from
                self.marks[out] = Mark(mark.path, mark.view[:-1], axes, mark.levels[:-1])
            else:
                self.finder.report(mark, "result of a scan")


def _value_of(variable: Var) -> Callable[[Callable[[Any], Any]], Any]:
    return lambda read: read(variable)


class _Bias(NamedTuple):
    eqn: Any
    mark: Mark
    view: View
    out: Var
    layout: Layout


def _others(ndim: int, axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(i for i in range(ndim) if i not in axes)


def _other_operand(eqn: Any, variable: Var) -> Any | None:
    """The operand beside `variable` in an equation of two, None where it stands on both sides."""
    if len(eqn.invars) != 2 or eqn.invars[0] is eqn.invars[1]:
        return None
    return eqn.invars[1] if eqn.invars[0] is variable else eqn.invars[0]


def _extend(mark: Mark, view: View, shape: Sequence[int]) -> Mark:
    axes = mark.axes
    if axes is not None and view and view[0][0] != "slice":  # a slice keeps the axes, cut or not
        axes = follow_axes(view, shape, axes)
    return mark._replace(view=mark.view + view, axes=axes)


def _matrix_view(shape: Sequence[int], order: Sequence[int], matrix: Sequence[int]) -> View:
    view: View = ()
    if tuple(order) != tuple(range(len(shape))):
        view += (("transpose", tuple(order)),)
    if tuple(shape[i] for i in order) != tuple(matrix):
        view += (("reshape", tuple(matrix)),)
    return view


def _vector_view(mark: Mark, operand: Var) -> View:
    """From an elementwise operand to the vector of the leaf's entries: one row of it."""
    shape = operand.aval.shape
    assert mark.axes is not None
    limit = tuple(n if i in mark.axes else 1 for i, n in enumerate(shape))
    view: View = () if limit == tuple(shape) else (("slice", (0,) * len(shape), limit, (1,) * len(shape)),)
    size = math.prod(limit)
    return view if limit == (size,) else (*view, ("reshape", (size,)))


def _elementwise_layout(mark: Mark, out: Var) -> Layout:
    assert mark.axes is not None
    features = tuple(sorted(i for i in mark.axes if out.aval.shape[i] != 1))
    return Layout((), _others(out.aval.ndim, features), features)


def plan_of(function: Callable[..., Any], params: PyTree, *args: Any) -> tuple[Plan, SiteTable, Any]:
    """Traces a function and finds its sites: the plan to run it with probes, the table, and its output shapes."""
    leaves = tree.flatten(params)
    region, shapes = jaxprs.trace(function, params, *args)
    arguments = region.variables[len(region.consts) :]
    finder = _Sites()
    marks = {
        variable: Mark(path, (), tuple(range(variable.aval.ndim)), ())
        for (path, leaf), variable in zip(leaves.items(), arguments, strict=False)
        if np.issubdtype(variable.aval.dtype, np.floating) or variable.aval.dtype == jax.numpy.bfloat16
    }
    found = _RegionFinder(finder, region, marks, set(arguments[len(leaves) :]))
    for mark in filter(None, found.result_marks):
        finder.report(mark, "returned")
    used = {site.path for site in finder.sites} | set(finder.reasons)
    unused = tuple(mark.path for mark in marks.values() if mark.path not in used)
    table = SiteTable(tuple(finder.sites), {path: tuple(why) for path, why in finder.reasons.items()}, unused)
    return found.plan, table, shapes


def sites(function: Callable[..., Any], params: PyTree, *args: Any) -> SiteTable:
    """The sites of ``function(params, *args)``; nothing is computed.

    Args:
      function: any JAX function; parameters are the leaves of its first argument.
      params: pytree of arrays or of `jax.ShapeDtypeStruct`.
      *args: further arguments, arrays or shapes.

    Returns:
      The table of sites, of leaves with uses that have no rule, and of leaves never read.

    >>> import jax.numpy as jnp
    >>> dense = lambda p, x: jnp.tanh(x @ p["kernel"] + p["bias"])
    >>> table = sites(dense, {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}, jnp.ones((5, 3)))
    >>> [(site.key, site.kind, site.d_in, site.d_out) for site in table.sites]
    [('kernel#0', 'dense', 3, 2), ('bias#0', 'bias', 2, 2)]
    """
    return plan_of(function, params, *args)[1]
