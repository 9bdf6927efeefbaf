"""Adding sites: their activations, probes and biases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from tvjax.capture.cuts import cuts_of_output
from tvjax.capture.layout import Layout, Tap, cut_layout
from tvjax.capture.marks import Mark, Marks, block_slice, signed, vector_view, with_axes
from tvjax.capture.region import RegionState, Var
from tvjax.capture.sites import Site
from tvjax.capture.views import View, follow_axes, restrict, step_of

Read = Callable[[Any], Any]


class Recorder(RegionState):
    """Adds sites to the collection, and to the region what observes them."""

    def activation(
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
        if key not in self.collection.names:
            occurrence = self.collection.occurrences[mark.path]
            self.collection.names[key] = f"{mark.path}#{occurrence}:{suffix}"
        name = self.collection.names[key]
        if not any(r.name == name and r.role == role for r in self.plan.records[variable]):
            self.plan.records[variable].append(Tap(name, layout, role, make or _value_of(identity)))
        return name

    def site(self, kind: str, mark: Mark, view: View, out: Var, layout: Layout, input_name: str | None) -> Site:
        """A site whose output is not yet known."""
        rows, labels = self.rows_of(out, layout)
        site = Site(mark.path, 0, kind, mark.view + view, mark.levels, rows, labels, 0, 0, input_name, "", "")
        return site._replace(exact=mark.exact, stopped=mark.stopped)

    def add_kernel(self, site: Site, out: Var, layout: Layout, cut: View, cuts: Sequence[View] = ()) -> None:
        """The site, with the bias that is added to its output; a site a part where the output is taken apart.

        Args:
          site: what is known of it.
          out: the output.
          layout: of the output.
          cut: the part of the output that is this kernel's, where several are joined; ``()``: all of it.
          cuts: the parts of all of them.
        """
        bias = self.bias_after(out, layout, cuts)
        if bias is not None:
            self.explained.add(id(bias.eqn))
        after = (out, (), layout) if bias is None else (bias.out, bias.steps, bias.layout)
        variable, steps, y_layout = after
        whole = Output(out, layout, cut, bias)
        if cut or site.kind == "scale" or site.groups is not None:
            self.add_site(site, whole)
            return
        parts: list[tuple[View, View]] = []
        for part in cuts_of_output(variable, y_layout, self.uses):
            columns = restrict((*steps, *part), out.aval.shape, layout.features)
            if columns is None or follow_axes(part, variable.aval.shape, y_layout.rows) is None:
                parts = []  # features mix with rows: the output is taken whole
                break
            parts.append((part, columns))
        if not parts:
            self.add_site(site, whole)
        for part, columns in parts:
            own = site._replace(view=(*site.view, ("each",), *columns))
            self.add_site(own, whole._replace(cut=(*steps, *part), y_cut=part, columns=columns))

    def add_site(self, site: Site, whole: Output) -> None:
        """Adds a site and its probe.

        Args:
          site: what is known of it.
          whole: the output that it is a part of.
        """
        out, layout, cut, bias, y_cut, _ = whole
        variable, y_layout = (out, layout) if bias is None else (bias.out, bias.layout)
        probe_layout = cut_layout(layout, cut, out.aval.shape)
        y_layout = cut_layout(y_layout, cut if y_cut is None else y_cut, variable.aval.shape)
        occurrence = self.collection.occurrences[site.path]
        probe = f"{site.path}#{occurrence}"
        self.plan.probes[out].append((probe, probe_layout))
        sizes = probe_layout.sizes(out.aval.shape)
        self.plan.shapes[probe] = jax.ShapeDtypeStruct(sizes, out.aval.dtype)
        mark = Mark(site.path, (), None, site.levels)
        output = self.activation(self.root(variable), y_layout, mark, "out", "output", at=variable)
        d_out = sizes[-1]
        d_in = site.d_in if site.kind in ("dense", "conv") else d_out
        site = site._replace(occurrence=occurrence, output=output, gradient=probe, d_in=d_in, d_out=d_out)
        self.collection.add(site)
        if bias is not None:
            self._add_biases(site, whole, bias, probe_layout)

    def _add_biases(self, site: Site, whole: Output, bias: Bias, probe_layout: Layout) -> None:
        """The sites of the bias of a site, which share its output and its gradient."""
        out, layout, cut, _, _, columns = whole
        for mark, view in zip(bias.marks, bias.views, strict=True):
            own = columns or (restrict(cut, out.aval.shape, layout.features) if cut and mark.block is None else ())
            theirs = mark.block is not None and cut != block_slice(out.aval.shape, mark.block[0], mark)
            key = (mark.path, probe_layout)
            if theirs or key in bias.recorded:  # of another block, or counted with another kernel of the same sum
                continue
            bias.recorded.add(key)
            assert own is not None
            self.collection.add(
                site._replace(
                    path=mark.path,
                    occurrence=self.collection.occurrences[mark.path],
                    kind="bias",
                    view=(*mark.view, *view, *own),
                    levels=mark.levels,
                    d_in=site.d_out,
                    input=None,
                    image=None,
                    taps=1,
                    exact=mark.exact,
                    stopped=mark.stopped,
                    raw=False,
                    positional=False,
                )
            )

    def bias_after(self, out: Var, layout: Layout, cuts: Sequence[View]) -> Bias | None:
        """The bias that is added to a value and to nothing else of it, or None."""
        steps: View = ()
        variable = out
        while (following := self.only_use(variable)) is not None:
            if following.primitive.name in ("add", "add_any", "sub"):
                break
            step = step_of(following)
            if step is None or any(s[0] not in ("transpose", "reshape") for s in step):
                return None
            steps += step
            variable = following.outvars[0]
        if following is None:
            return None
        other = other_operand(following, variable)
        if other is None or layout.batch or layout.cut:
            return None
        marks = with_axes(self.marks_of(other), other) if self.marks_of(other) else ()
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
        marks = tuple(signed(mark, following, position) for mark in marks)
        if features is None or rows is None or (steps and any(mark.block is not None for mark in marks)):
            return None
        blocks = [mark for mark in marks if mark.block is not None]
        if any(block_slice(shape, mark.block[0], mark) not in cuts for mark in blocks if mark.block):
            return None  # the bias is joined of other pieces than the kernel
        for mark in marks:
            wide = tuple(i for i in mark.axes or () if other.aval.shape[i] != 1)
            if wide != tuple(sorted(wide)) or wide != tuple(i for i in features if result.aval.shape[i] != 1):
                return None
        views = tuple(vector_view(mark, other.aval.shape) for mark in marks)
        found = Bias(following, marks, views, steps, result, Layout((), rows, features), set())
        return self.biases.setdefault(id(following), found)


class Bias(NamedTuple):
    """A bias: its equation, its marks and their vector views, the views from the output to it, and what follows.

    `recorded` are the parts that have a site already: several kernels may share a sum and its bias.
    """

    eqn: Any
    marks: Marks
    views: tuple[View, ...]
    steps: View
    out: Var
    layout: Layout
    recorded: set[Any]


class Output(NamedTuple):
    """The output of a kernel, and the part of it that is one site's.

    Attributes:
      out: the output.
      layout: of the output.
      cut: the part that is the site's own; ``()``: all of it.
      bias: that is added to the output, if there is one.
      y_cut: the same part after the bias; None: as before it.
      columns: the part of the kernel's outputs that it is.
    """

    out: Var
    layout: Layout
    cut: View
    bias: Bias | None = None
    y_cut: View | None = None
    columns: View = ()


def _value_of(variable: Var) -> Callable[[Read], Any]:
    return lambda read: read(variable)


def other_operand(eqn: Any, variable: Var) -> Any | None:
    """The operand beside `variable` in an equation of two, None where it stands on both sides."""
    if len(eqn.invars) != 2 or eqn.invars[0] is eqn.invars[1]:
        return None
    return eqn.invars[1] if eqn.invars[0] is variable else eqn.invars[0]
