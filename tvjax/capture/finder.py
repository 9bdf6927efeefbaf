"""Finding the sites of a function: marks, activations and their axes carried through its equations."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from tvjax import tree
from tvjax.capture import axes as axis_labels
from tvjax.capture import jaxprs
from tvjax.capture.axes import Axes
from tvjax.capture.cuts import cuts_of_output
from tvjax.capture.layout import Instrumentation, Layout, Record
from tvjax.capture.marks import Constants, Mark, Marks, propagate
from tvjax.capture.sites import Site, SiteTable
from tvjax.capture.views import TRANSPARENT, View, follow_axes, restrict, shape_after, step_of

PyTree = Any
Var = Any  # a `jax.extend.core.Var`, whose `aval` has a shape and a dtype
Read = Callable[[Any], Any]


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

    def add(self, site: Site) -> None:
        self.sites.append(site)
        self.occurrences[site.path] += 1


class _Known(NamedTuple):
    """What is known of the variables of a region when it is entered."""

    marks: dict[Var, Marks]
    axes: dict[Var, Axes]  # of the activations
    derived: set[Var]  # made of parameters, in a way that left no mark
    touched: set[Var]  # made with the help of parameters
    constants: dict[Var, Callable[[], Any]]


class _RegionFinder:
    def __init__(self, finder: _Sites, region: jaxprs.Region, known: _Known, wanted: Sequence[bool]):
        self.finder = finder
        self.marks, self.axes = dict(known.marks), dict(known.axes)
        self.derived, self.touched = set(known.derived), set(known.touched)
        self.constants = Constants(region, known.constants)
        self.plan = Instrumentation(region)
        self.eqns = jaxprs.live(region, wanted)
        self.uses: dict[Var, list[Any]] = defaultdict(list)
        self.makers: dict[Var, Any] = {}
        self.roots: dict[Var, Var] = {}  # a variable that is only a cast of another
        self.explained: set[int] = set()  # equations that a mark went through or a site accounts for
        for eqn in self.eqns:
            self.makers.update((out, eqn) for out in eqn.outvars)
            for atom in eqn.invars:
                if isinstance(atom, core.Var):
                    self.uses[atom].append(eqn)
        for atom, want in zip(region.results, wanted, strict=True):
            if want and isinstance(atom, core.Var):
                self.uses[atom].append(None)
        for eqn in self.eqns:
            self._propagate(eqn)
        for eqn in self.eqns:
            if id(eqn) not in self.explained:
                self._classify(eqn)
        self.result_marks = [
            self.marks_of(atom) if want else () for atom, want in zip(region.results, wanted, strict=True)
        ]

    # -- what is known of a variable -----------------------------------------------------------------------------------

    def marks_of(self, atom: Any) -> Marks:
        return self.marks.get(atom, ()) if isinstance(atom, core.Var) else ()

    def axes_of(self, atom: Any) -> Axes | None:
        return self.axes.get(atom) if isinstance(atom, core.Var) else None

    def is_data(self, atom: Any) -> bool:
        return self.axes_of(atom) is not None

    def is_in(self, atom: Any, variables: set[Var]) -> bool:
        return isinstance(atom, core.Var) and atom in variables

    def is_parameter(self, atom: Any) -> bool:
        return bool(self.marks_of(atom)) or self.is_in(atom, self.derived)

    def root(self, atom: Any) -> Any:
        return self.roots.get(atom, atom) if isinstance(atom, core.Var) else atom

    def _propagate(self, eqn: Any) -> None:
        name = eqn.primitive.name
        if any(self.marks_of(atom) or self.is_in(atom, self.touched) for atom in eqn.invars):
            self.touched.update(eqn.outvars)
        if name == "scan" or name in jaxprs.REMAT:
            self._enter(eqn)
            return
        if name in TRANSPARENT:
            for atom, out in zip(eqn.invars, eqn.outvars, strict=True):
                if isinstance(atom, core.Var):
                    self.roots[out] = self.root(atom)
        if name == "optimization_barrier":
            for atom, out in zip(eqn.invars, eqn.outvars, strict=True):
                if (axes := self.axes_of(atom)) is not None:
                    self.axes[out] = axes
        elif any(map(self.is_data, eqn.invars)):
            self.axes.update(zip(eqn.outvars, axis_labels.follow(eqn, self.axes_of, self.is_parameter), strict=True))
            return
        derived = any(self.is_in(atom, self.derived) for atom in eqn.invars)
        if not derived and not any(map(self.marks_of, eqn.invars)):
            return
        found = None if derived else propagate(eqn, self.marks_of, self.constants)
        if found is None:
            self.derived.update(out for out in eqn.outvars if not self.is_data(out))
            return
        self.explained.add(id(eqn))
        self.marks.update((eqn.outvars[i], marks) for i, marks in found.items() if marks)

    # -- classification ------------------------------------------------------------------------------------------------

    def _classify(self, eqn: Any) -> None:
        marked = [i for i, atom in enumerate(eqn.invars) if self.marks_of(atom)]
        if not marked or id(eqn) in self.plan.inner:
            return
        name = eqn.primitive.name
        rules: dict[str, Callable[[Any, int], str | None]] = {
            "dot_general": self._contraction,
            "conv_general_dilated": self._convolution,
            "mul": self._product,
            "div": self._product,
            "add": self._sum,
            "add_any": self._sum,
            "sub": self._sum,
        }
        others = [atom for i, atom in enumerate(eqn.invars) if i not in marked]
        if len(marked) > 1 or any(self.is_in(atom, self.derived) for atom in others):
            why: str | None = f"{name} of two parameters"
        elif name in rules and not any(map(self.is_data, others)):
            why = f"{name} with a constant"
        elif name in rules:
            why = rules[name](eqn, marked[0])
        else:
            why = name
        if why:
            for i in marked:
                for mark in self.marks_of(eqn.invars[i]):
                    self.finder.report(mark, why)

    def _contraction(self, eqn: Any, position: int) -> str | None:
        contracts, batches = eqn.params["dimension_numbers"]
        parameter, activation, out = eqn.invars[position], eqn.invars[1 - position], eqn.outvars[0]
        inner, shared = tuple(contracts[position]), tuple(batches[position])
        free = _others(parameter.aval.ndim, (*inner, *shared))
        n_batch = len(shared)
        if not inner and not free:
            return self._scale_by_contraction(eqn, position)
        rows = _others(activation.aval.ndim, (*contracts[1 - position], *batches[1 - position]))
        first, second = (rows, free) if position == 1 else (free, rows)
        places = tuple(range(n_batch)), *_consecutive(n_batch, first, second)
        out_rows, out_free = (places[1], places[2]) if position == 1 else (places[2], places[1])
        x_axes: tuple[tuple[int, ...], ...] = (tuple(batches[1 - position]), rows, tuple(contracts[1 - position]))
        source = activation
        if n_batch and (before := self._before_broadcast(activation, x_axes[0])) is not None:
            # The activation is the same for every block: one matrix whose outputs are those of all blocks.
            source, kept = before
            x_axes = (), *(tuple(kept.index(i) for i in axes) for axes in x_axes[1:])
            free, shared, out_free = (*shared, *free), (), (*places[0], *out_free)
            n_batch = 0
        layout = Layout(places[0][:n_batch], out_rows, out_free)
        for mark in self.marks_of(parameter):
            shape = mark.shape(parameter.aval.shape)
            matrix = tuple(math.prod(shape[i] for i in axes) for axes in (shared, inner, free))
            view = _matrix_view(shape, (*shared, *inner, *free), matrix if n_batch else matrix[1:])
            x_cut: View = ()
            y_cut: View = ()
            if mark.block is not None:
                axis = mark.block[0]
                if axis in inner:
                    x_cut = _slice(source.aval.shape, x_axes[2][inner.index(axis)], mark)
                elif axis in free:
                    y_cut = _slice(out.aval.shape, out_free[free.index(axis)], mark)
                else:
                    x_cut = _slice(source.aval.shape, x_axes[0][shared.index(axis)], mark)
                    y_cut = _slice(out.aval.shape, layout.batch[shared.index(axis)], mark)
            x_layout = Layout(x_axes[0], x_axes[1], x_axes[2], x_cut)
            name = self._activation(self.root(source), x_layout, mark, "in", "input")
            site = self._site("dense", mark, view, out, layout, name)
            site = site._replace(d_in=matrix[1], raw=not self.is_in(source, self.touched))
            self._add_kernel(site._replace(groups=matrix[0] if n_batch else None), out, layout, y_cut)
        return None

    def _before_broadcast(self, variable: Var, batch: tuple[int, ...]) -> tuple[Var, list[int]] | None:
        """What was broadcast over these axes, and the axes of the broadcast that were there before."""
        maker = self.makers.get(variable)
        if maker is None or maker.primitive.name != "broadcast_in_dim":
            return None
        source, kept = maker.invars[0], [int(i) for i in maker.params["broadcast_dimensions"]]
        if sorted((*batch, *kept)) != list(range(variable.aval.ndim)):
            return None
        same = all(source.aval.shape[i] == variable.aval.shape[k] for i, k in enumerate(kept))
        return (source, kept) if same and self.is_data(source) else None

    def _convolution(self, eqn: Any, position: int) -> str | None:
        params = eqn.params
        if position != 1:
            return "conv_general_dilated of a parameter as its image"
        if params["batch_group_count"] != 1:
            return "conv_general_dilated with batch groups"
        image, kernel = eqn.invars
        if any(mark.block is not None for mark in self.marks_of(kernel)):
            return "conv_general_dilated of concatenated parameters"
        numbers, out, groups = params["dimension_numbers"], eqn.outvars[0], params["feature_group_count"]
        shape = kernel.aval.shape
        places = (numbers.rhs_spec[1], *numbers.rhs_spec[2:], numbers.rhs_spec[0])
        window = tuple(shape[i] for i in numbers.rhs_spec[2:])
        d_in, d_out = math.prod(shape[i] for i in places[:-1]), shape[places[-1]] // groups
        view = _matrix_view(shape, places, (d_in, groups * d_out))
        if groups > 1:
            view += (("reshape", (d_in, groups, d_out)), ("transpose", (1, 0, 2)))
        channel = numbers.out_spec[1]
        spatial = (numbers.out_spec[0], *numbers.out_spec[2:])
        layout = _grouped(out.aval.shape, spatial, channel, groups)
        patch_shape = tuple(groups * d_in if i == channel else n for i, n in enumerate(out.aval.shape))

        def patches(read: Read) -> Any:
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

        pixels = Layout((), (numbers.lhs_spec[0], *numbers.lhs_spec[2:]), (numbers.lhs_spec[1],))
        pixel_rows, pixel_axes = self._rows(image, pixels)
        for mark in self.marks_of(kernel):
            patch_layout = _grouped(patch_shape, spatial, channel, groups)
            name = self._activation((image, id(eqn)), patch_layout, mark, "patches", "patches", at=out, make=patches)
            seen = self._activation(self.root(image), pixels, mark, "in", "input")
            rows = Layout((), spatial, (channel,))
            site = self._site("conv", mark, view, out, rows, name)._replace(
                d_in=d_in,
                d_out=d_out,
                groups=groups if groups > 1 else None,
                taps=math.prod(window),
                image=seen,
                image_rows=pixel_rows,
                image_axes=pixel_axes,
                raw=not self.is_in(image, self.touched),
            )
            self._add_kernel(site, out, layout, ())
        return None

    def _scale_by_contraction(self, eqn: Any, position: int) -> str | None:
        """A contraction over batch axes alone: a product, its features in front."""
        batches = eqn.params["dimension_numbers"][1]
        parameter, activation, out = eqn.invars[position], eqn.invars[1 - position], eqn.outvars[0]
        own, theirs = batches[position], batches[1 - position]
        order = (*theirs, *_others(activation.aval.ndim, theirs))
        step = (("transpose", tuple(own)),)
        marks = []
        for mark in _with_axes(self.marks_of(parameter), parameter):
            if mark.block is not None:
                return "dot_general of concatenated parameters"
            axes = follow_axes(step, parameter.aval.shape, mark.axes or ())
            marks.append(mark._replace(view=mark.view + step, axes=axes))
        shape = tuple(parameter.aval.shape[i] for i in own) + (1,) * (out.aval.ndim - len(own))
        padded = [mark._replace(view=mark.view + (("reshape", shape),)) for mark in marks]
        self._scales(out, padded, shape, [lambda read: jnp.transpose(jnp.asarray(read(activation)), order)])
        return None

    def _product(self, eqn: Any, position: int) -> str | None:
        parameter, other, out = eqn.invars[position], eqn.invars[1 - position], eqn.outvars[0]
        marks = _with_axes(self.marks_of(parameter), parameter)

        def divided(read: Read) -> Any:  # y = x / s is not linear in s: dy/ds = -x / s^2
            divisor = jnp.asarray(read(parameter))
            return -jnp.asarray(read(other)) / (divisor * divisor)

        factor: Callable[[Read], Any] = lambda read: read(other)  # noqa: E731
        if eqn.primitive.name == "div":
            factor = divided if position == 1 else lambda read: 1 / jnp.asarray(read(other))
        self._scales(out, marks, parameter.aval.shape, [factor])
        return None

    def _scales(self, out: Var, marks: Sequence[Mark], shape: Sequence[int], factors: list[Callable]) -> None:
        """Scales of what the factors make; the product goes on as long as nothing else reads it."""
        while (following := self._only_use(out)) is not None:
            name = following.primitive.name
            if name in TRANSPARENT and len(following.invars) == 1:
                out = following.outvars[0]
                continue
            other = _other_operand(following, out)
            # Stop at a square, and at a product with another parameter.
            if other is None or name not in ("mul", "div") or self.marks_of(other) or self.is_in(other, self.derived):
                break
            if name == "div" and following.invars[0] is not out:
                break
            inverse = name == "div"
            factors.append(
                lambda read, other=other, inverse=inverse: 1 / jnp.asarray(read(other)) if inverse else read(other)
            )
            out = following.outvars[0]

        def unit(read: Read) -> Any:
            value = jnp.ones(out.aval.shape, out.aval.dtype)
            for factor in factors:
                value = value * jnp.asarray(factor(read)).astype(out.aval.dtype)
            return value

        for mark in marks:
            layout = _elementwise_layout(mark, shape, out)
            cut = () if mark.block is None else _slice(out.aval.shape, mark.block[0], mark)
            seen = layout._replace(cut=cut)
            name = self._activation((out, "unit"), seen, mark, "in", "input", at=out, make=unit)
            site = self._site("scale", mark, _vector_view(mark, shape), out, layout, name)
            self._add_kernel(site._replace(positional=self._is_positional(out, layout)), out, layout, cut)

    def _sum(self, eqn: Any, position: int) -> str | None:
        parameter, out = eqn.invars[position], eqn.outvars[0]
        marks, shape = _with_axes(self.marks_of(parameter), parameter), parameter.aval.shape
        for mark in marks:
            mark = _signed(mark, eqn, position)
            layout = _elementwise_layout(mark, shape, out)
            cut = () if mark.block is None else _slice(out.aval.shape, mark.block[0], mark)
            site = self._site("shift", mark, _vector_view(mark, shape), out, layout, None)
            self._add_site(site._replace(positional=self._is_positional(out, layout)), out, layout, cut, None)
        return None

    def _is_positional(self, out: Var, layout: Layout) -> bool:
        """Whether an elementwise parameter has its own entries along a token axis of the activation."""
        axes = self.axes_of(out)
        labels = set() if axes is None else {factor.label for i in layout.features for factor in axes[i]}
        return any(axis_labels.is_stream(label) or label == axis_labels.EXAMPLE for label in labels)

    # -- helpers of the rules ------------------------------------------------------------------------------------------

    def _only_use(self, variable: Var) -> Any | None:
        uses = self.uses[variable]
        return uses[0] if len(uses) == 1 else None

    def _rows(self, variable: Var, layout: Layout) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Sizes and labels of the row axes of an activation, merged axes taken apart."""
        axes = self.axes_of(variable) or axis_labels.unknown(variable.aval.shape)
        factors = [factor for i in layout.rows for factor in axes[i]]
        return tuple(factor.size for factor in factors), tuple(factor.label for factor in factors)

    def _activation(
        self,
        identity: Any,
        layout: Layout,
        mark: Mark,
        suffix: str,
        role: str,
        at: Var | None = None,
        make: Callable[[Read], Any] | None = None,
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

    def _site(self, kind: str, mark: Mark, view: View, out: Var, layout: Layout, input_name: str | None) -> Site:
        """A site whose output is not yet known."""
        rows, labels = self._rows(out, layout)
        site = Site(mark.path, 0, kind, mark.view + view, mark.levels, rows, labels, 0, 0, input_name, "", "")
        return site._replace(exact=mark.exact, stopped=mark.stopped)

    def _add_kernel(self, site: Site, out: Var, layout: Layout, cut: View) -> None:
        """The site, with the bias that is added to its output; a site a part where the output is taken apart."""
        bias = self._bias_after(out, layout)
        if bias is not None:
            self.explained.add(id(bias.eqn))
        after = (out, (), layout) if bias is None else (bias.out, bias.steps, bias.layout)
        variable, steps, y_layout = after
        if cut or site.kind == "scale" or site.groups is not None:
            self._add_site(site, out, layout, cut, bias)
            return
        parts = cuts_of_output(variable, y_layout, self.uses)
        matrix = site.view
        for part in parts:
            columns = restrict((*steps, *part), out.aval.shape, layout.features)
            rows = follow_axes(part, variable.aval.shape, y_layout.rows)
            if columns is None or rows is None:
                parts = []
                break
        if not parts:
            self._add_site(site, out, layout, cut, bias)
        for part in parts:
            columns = restrict((*steps, *part), out.aval.shape, layout.features)
            assert columns is not None
            own = site._replace(view=(*matrix, ("each",), *columns))
            self._add_site(own, out, layout, (*steps, *part), bias, part, columns)

    def _add_site(
        self,
        site: Site,
        out: Var,
        layout: Layout,
        cut: View,
        bias: _Bias | None,
        y_cut: View | None = None,
        columns: View = (),
    ) -> None:
        """Adds a site and its probe; `cut` is the part of the output that is its own, `y_cut` that after the bias."""
        variable, y_layout = (out, layout) if bias is None else (bias.out, bias.layout)
        probe_layout = _cut_layout(layout, cut, out.aval.shape)
        y_layout = _cut_layout(y_layout, cut if y_cut is None else y_cut, variable.aval.shape)
        occurrence = self.finder.occurrences[site.path]
        probe = f"{site.path}#{occurrence}"
        self.plan.probes[out].append((probe, probe_layout))
        sizes = probe_layout.sizes(out.aval.shape)
        self.plan.shapes[probe] = jax.ShapeDtypeStruct(sizes, out.aval.dtype)
        mark = Mark(site.path, (), None, site.levels)
        output = self._activation(self.root(variable), y_layout, mark, "out", "output", at=variable)
        d_out = sizes[-1]
        d_in = site.d_in if site.kind in ("dense", "conv") else d_out
        site = site._replace(occurrence=occurrence, output=output, gradient=probe, d_in=d_in, d_out=d_out)
        self.finder.add(site)
        for b, view in () if bias is None else zip(bias.marks, bias.views, strict=True):
            own = columns
            if b.block is not None or cut:
                if not columns and (b.block is None or cut != _slice(out.aval.shape, b.block[0], b)):
                    continue
            self.finder.add(
                site._replace(
                    path=b.path,
                    occurrence=self.finder.occurrences[b.path],
                    kind="bias",
                    view=(*b.view, *view, *own),
                    levels=b.levels,
                    d_in=d_out,
                    d_out=d_out,
                    input=None,
                    image=None,
                    taps=1,
                    exact=b.exact,
                    stopped=b.stopped,
                    raw=False,
                    positional=False,
                )
            )

    def _bias_after(self, out: Var, layout: Layout) -> _Bias | None:
        """The bias that is added to a value and to nothing else of it, or None."""
        steps: View = ()
        variable = out
        while (following := self._only_use(variable)) is not None:
            if following.primitive.name in ("add", "add_any", "sub"):
                break
            step = step_of(following)
            if step is None or any(s[0] not in ("transpose", "reshape") for s in step):
                return None
            steps += step
            variable = following.outvars[0]
        if following is None:
            return None
        other = _other_operand(following, variable)
        if other is None or layout.batch or layout.cut:
            return None
        marks = _with_axes(self.marks_of(other), other) if self.marks_of(other) else ()
        if not marks:
            return None
        position = 1 if following.invars[1] is other else 0
        if following.primitive.name == "sub" and position == 0:
            return None  # the bias minus the output
        result = following.outvars[0]
        if tuple(result.aval.shape) != tuple(variable.aval.shape):
            return None
        shape = out.aval.shape
        features = follow_axes(steps, shape, layout.features)
        rows = follow_axes(steps, shape, layout.rows)
        marks = tuple(_signed(mark, following, position) for mark in marks)
        if features is None or rows is None or (steps and any(mark.block is not None for mark in marks)):
            return None
        for mark in marks:
            wide = tuple(i for i in mark.axes or () if other.aval.shape[i] != 1)
            if wide != tuple(sorted(wide)) or wide != tuple(i for i in features if result.aval.shape[i] != 1):
                return None
        views = tuple(_vector_view(mark, other.aval.shape) for mark in marks)
        return _Bias(following, marks, views, steps, result, Layout((), rows, features))

    # -- inner regions -------------------------------------------------------------------------------------------------

    def _enter(self, eqn: Any) -> None:
        scan = eqn.primitive.name == "scan"
        inner = jaxprs.body(eqn)
        n_consts, n_carry = jaxprs.scan_operands(eqn) if scan else (len(eqn.invars), 0)
        known = _Known({}, {}, set(), set(), {})
        any_data = any(map(self.is_data, eqn.invars))
        arguments = inner.variables[len(inner.consts) :]
        for i, (atom, variable) in enumerate(zip(eqn.invars, arguments, strict=True)):
            carried, scanned = n_consts <= i < n_consts + n_carry, i >= n_consts + n_carry
            axes = self.axes_of(atom)
            if axes is not None:
                known.axes[variable] = axes[1:] if scanned else axes
            elif carried and any_data:
                known.axes[variable] = axis_labels.unknown(variable.aval.shape)
            if self.is_in(atom, self.touched) or (carried and self.marks):
                known.touched.add(variable)
            if self.is_in(atom, self.derived):
                known.derived.add(variable)
            marks = self.marks_of(atom)
            if marks:
                known.touched.add(variable)
                inside = self._inside(marks, scan, carried, scanned)
                known.marks.update({variable: inside} if inside else {})
                known.derived.update(() if inside else (variable,))
            elif axes is None and not carried and not scanned:
                known.constants[variable] = partial(self.constants.value, atom)
        wanted = [i < n_carry or bool(self.uses[out]) for i, out in enumerate(eqn.outvars)]
        found = _RegionFinder(self.finder, inner, known, wanted)
        self.plan.inner[id(eqn)] = found.plan
        lead = (eqn.params["length"],) if scan else ()
        for name, shape in found.plan.shapes.items():
            self.plan.shapes[name] = jax.ShapeDtypeStruct((*lead, *shape.shape), shape.dtype)
        if any_data:
            scanned_axes = map(self.axes_of, eqn.invars[n_consts + n_carry :])
            along = next((axes[0] for axes in scanned_axes if axes), None)
            for i, (atom, out) in enumerate(zip(inner.results, eqn.outvars, strict=True)):
                own = found.axes_of(atom) or axis_labels.unknown(atom.aval.shape)
                stacked = scan and i >= n_carry
                layers = along or tuple(axis_labels.Factor(n, axis_labels.NEW) for n in lead)
                self.axes[out] = (layers, *own) if stacked else own
        for i, (marks, out) in enumerate(zip(found.result_marks, eqn.outvars, strict=True)):
            if self.uses[out] and marks:
                self._outside(marks, out, scan, stacked=i >= n_carry)

    def _inside(self, marks: Marks, scan: bool, carried: bool, scanned: bool) -> Marks:
        """Marks of an operand of a scan or a remat, within its body."""
        if not scan:
            return marks
        inside: Marks = ()
        for mark in marks:
            if carried or (scanned and mark.block is not None):
                self.finder.report(mark, "carry of a scan" if carried else "concatenate of scanned parameters")
                return ()
            axes = mark.axes
            if scanned:
                axes = None if axes is None else tuple(a - 1 for a in axes if a != 0)
            view = mark.view + (("each",),) if scanned else mark.view
            inside += (mark._replace(view=view, axes=axes, levels=(*mark.levels, scanned)),)
        return inside

    def _outside(self, marks: Marks, out: Var, scan: bool, stacked: bool) -> None:
        if not scan:
            self.marks[out] = marks
            return
        for mark in marks:
            if stacked and mark.view[-1:] == (("each",),) and mark.axes is not None and mark.block is None:
                axes = (0, *(a + 1 for a in mark.axes))  # each slice put back where it came from
                self.marks[out] = (mark._replace(view=mark.view[:-1], axes=axes, levels=mark.levels[:-1]),)
            else:
                self.finder.report(mark, "result of a scan")


class _Bias(NamedTuple):
    """A bias: its equation, its marks and their vector views, the views from the output to it, and what follows."""

    eqn: Any
    marks: Marks
    views: tuple[View, ...]
    steps: View
    out: Var
    layout: Layout


def _value_of(variable: Var) -> Callable[[Read], Any]:
    return lambda read: read(variable)


def _others(ndim: int, axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(i for i in range(ndim) if i not in axes)


def _consecutive(start: int, first: Sequence[int], second: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    middle = start + len(first)
    return tuple(range(start, middle)), tuple(range(middle, middle + len(second)))


def _other_operand(eqn: Any, variable: Var) -> Any | None:
    """The operand beside `variable` in an equation of two, None where it stands on both sides."""
    if len(eqn.invars) != 2 or eqn.invars[0] is eqn.invars[1]:
        return None
    return eqn.invars[1] if eqn.invars[0] is variable else eqn.invars[0]


def _with_axes(marks: Marks, operand: Var) -> Marks:
    """Where a view mixes axes (a tile) the operand's own entries are looked at, each copy apart."""
    every = tuple(range(operand.aval.ndim))
    return tuple(mark if mark.axes is not None else mark._replace(axes=every) for mark in marks)


def _signed(mark: Mark, eqn: Any, position: int) -> Mark:
    """A mark that is subtracted."""
    subtracted = eqn.primitive.name == "sub" and position == 1
    return mark._replace(view=(*mark.view, ("times", -1.0))) if subtracted else mark


def _slice(shape: Sequence[int], axis: int, mark: Mark) -> View:
    """The block of a mark, along an axis of a value of this shape."""
    assert mark.block is not None
    _, start, stop = mark.block
    low = tuple(start if i == axis else 0 for i in range(len(shape)))
    high = tuple(stop if i == axis else n for i, n in enumerate(shape))
    return (("slice", low, high, (1,) * len(shape)),)


def _cut_layout(layout: Layout, cut: View, shape: Sequence[int]) -> Layout:
    """The layout of what a cut leaves of a value."""
    if not cut:
        return layout
    if all(step[0] == "slice" for step in cut):
        return layout._replace(cut=cut)
    rows = follow_axes(cut, shape, layout.rows)
    assert rows is not None and not layout.batch
    return Layout((), rows, _others(len(shape_after(cut, shape)), rows), cut)


def _matrix_view(shape: Sequence[int], order: Sequence[int], matrix: Sequence[int]) -> View:
    view: View = ()
    if tuple(order) != tuple(range(len(shape))):
        view += (("transpose", tuple(order)),)
    if tuple(shape[i] for i in order) != tuple(matrix):
        view += (("reshape", tuple(matrix)),)
    return view


def _vector_view(mark: Mark, shape: Sequence[int]) -> View:
    """From an elementwise operand of this shape to the vector of the leaf's entries: one row of it."""
    assert mark.axes is not None
    own = mark.shape(shape)
    limit = tuple(n if i in mark.axes else 1 for i, n in enumerate(own))
    view: View = () if limit == own else (("slice", (0,) * len(own), limit, (1,) * len(own)),)
    size = math.prod(limit)
    return view if limit == (size,) else (*view, ("reshape", (size,)))


def _elementwise_layout(mark: Mark, shape: Sequence[int], out: Var) -> Layout:
    """Features are the axes along which the operand, whose shape is given, has entries of its own."""
    assert mark.axes is not None
    features = tuple(sorted(i for i in mark.axes if shape[i] != 1))
    return Layout((), _others(out.aval.ndim, features), features)


def _grouped(shape: Sequence[int], rows: Sequence[int], channel: int, groups: int) -> Layout:
    """The layout of a convolution's output, its channels in groups."""
    if groups == 1:
        return Layout((), tuple(rows), (channel,))
    split = tuple(m for i, n in enumerate(shape) for m in ((groups, n // groups) if i == channel else (n,)))
    moved = tuple(i + (i > channel) for i in rows)
    return Layout((channel,), moved, (channel + 1,), (("reshape", split),))


def plan_of(function: Callable[..., Any], params: PyTree, *args: Any) -> tuple[Instrumentation, SiteTable, Any]:
    """Traces a function and finds its sites: how to run it with probes, the table, and its output shapes."""
    leaves = tree.flatten(params)
    tree.check_arrays(params)
    region, shapes = jaxprs.trace(function, params, *args)
    arguments = region.variables[len(region.consts) :]
    finder = _Sites()
    marks: dict[Var, Marks] = {}
    derived = set()
    for (path, _), variable in zip(leaves.items(), arguments, strict=False):
        whole = Mark(path, (), tuple(range(variable.aval.ndim)), ())
        if jnp.issubdtype(variable.aval.dtype, jnp.floating):
            marks[variable] = (whole,)
        else:
            derived.add(variable)
            if jnp.issubdtype(variable.aval.dtype, jnp.inexact):
                finder.report(whole, variable.aval.dtype.name)
    paths = tree.flatten(args[0] if len(args) == 1 else args)
    data = {
        variable: axis_labels.of_argument(path, variable.aval)
        for path, variable in zip(paths, arguments[len(leaves) :], strict=True)
    }
    known = _Known(marks, data, derived, set(), {})
    found = _RegionFinder(finder, region, known, [True] * len(region.results))
    for result in found.result_marks:
        for mark in result:
            finder.report(mark, "returned")
    used = {site.path for site in finder.sites} | set(finder.reasons)
    unused = tuple(mark.path for (mark,) in marks.values() if mark.path not in used)
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

    >>> dense = lambda p, x: jnp.tanh(x @ p["kernel"] + p["bias"])
    >>> table = sites(dense, {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}, jnp.ones((5, 3)))
    >>> [(site.key, site.kind, site.d_in, site.d_out) for site in table.sites]
    [('kernel#0', 'dense', 3, 2), ('bias#0', 'bias', 2, 2)]
    """
    return plan_of(function, params, *args)[1]
