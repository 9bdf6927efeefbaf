"""Finding the sites of a function: marks, activations and their axes carried through its equations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from tvjax import tree
from tvjax.capture import axes as axis_labels
from tvjax.capture import jaxprs
from tvjax.capture.layout import Instrumentation
from tvjax.capture.marks import Mark, Marks, propagate
from tvjax.capture.recorder import Recorder
from tvjax.capture.region import Collection, Known, Var
from tvjax.capture.rules import RULES
from tvjax.capture.sites import SiteTable
from tvjax.capture.views import TRANSPARENT

PyTree = Any


class RegionFinder(Recorder):
    """Finds the sites of a region and of the regions inside it."""

    def __init__(self, collection: Collection, region: jaxprs.Region, known: Known, wanted: Sequence[bool]):
        super().__init__(collection, region, known, wanted)
        for eqn in self.eqns:
            self._propagate(eqn)
        for eqn in self.eqns:
            if id(eqn) not in self.explained:
                self._classify(eqn)
        self.result_marks = [
            self.marks_of(atom) if want else () for atom, want in zip(region.results, wanted, strict=True)
        ]

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

    def _classify(self, eqn: Any) -> None:
        marked = [i for i, atom in enumerate(eqn.invars) if self.marks_of(atom)]
        if not marked or id(eqn) in self.plan.inner:
            return
        name = eqn.primitive.name
        others = [atom for i, atom in enumerate(eqn.invars) if i not in marked]
        if len(marked) > 1 or any(self.is_in(atom, self.derived) for atom in others):
            why: str | None = f"{name} of two parameters"
        elif name in RULES and not any(map(self.is_data, others)):
            why = f"{name} with a constant"
        elif name in RULES:
            why = RULES[name](self, eqn, marked[0])
        else:
            why = name
        if why:
            for i in marked:
                for mark in self.marks_of(eqn.invars[i]):
                    self.collection.report(mark, why)

    def _enter(self, eqn: Any) -> None:
        scan = eqn.primitive.name == "scan"
        inner = jaxprs.body(eqn)
        n_consts, n_carry = jaxprs.scan_operands(eqn) if scan else (len(eqn.invars), 0)
        known = Known({}, {}, set(), set(), {})
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
        found = RegionFinder(self.collection, inner, known, wanted)
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
                self.collection.report(mark, "carry of a scan" if carried else "concatenate of scanned parameters")
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
                self.collection.report(mark, "result of a scan")


def plan_of(function: Callable[..., Any], params: PyTree, *args: Any) -> tuple[Instrumentation, SiteTable, Any]:
    """Traces a function and finds its sites: how to run it with probes, the table, and its output shapes."""
    leaves = tree.flatten(params)
    tree.check_arrays(params)
    region, shapes = jaxprs.trace(function, params, *args)
    arguments = region.variables[len(region.consts) :]
    finder = Collection()
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
    known = Known(marks, data, derived, set(), {})
    found = RegionFinder(finder, region, known, [True] * len(region.results))
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
