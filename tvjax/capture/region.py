"""What is known of the variables of a region while its sites are looked for."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax.extend import core

from tvjax.capture import axes as axis_labels
from tvjax.capture import jaxprs
from tvjax.capture.axes import Axes
from tvjax.capture.layout import Instrumentation, Layout
from tvjax.capture.marks import Constants, Mark, Marks
from tvjax.capture.sites import Site

Var = Any  # a `jax.extend.core.Var`, whose `aval` has a shape and a dtype


class Collection:
    """Collects sites over all regions of one function."""

    def __init__(self) -> None:
        self.sites: list[Site] = []
        self.reasons: dict[str, list[str]] = defaultdict(list)
        self.occurrences: Counter[str] = Counter()
        self.names: dict[tuple[Any, Layout], str] = {}

    def report(self, mark: Mark, why: str) -> None:
        """Says why a use of a leaf has no site."""
        if why not in self.reasons[mark.path]:
            self.reasons[mark.path].append(why)

    def add(self, site: Site) -> None:
        """Adds a site; the next one of its leaf is another occurrence."""
        self.sites.append(site)
        self.occurrences[site.path] += 1


class Known(NamedTuple):
    """What is known of the variables of a region when it is entered."""

    marks: dict[Var, Marks]
    axes: dict[Var, Axes]  # of the activations
    derived: set[Var]  # made of parameters, in a way that left no mark
    touched: set[Var]  # made with the help of parameters
    constants: dict[Var, Callable[[], Any]]


class RegionState:
    """The variables of a region: marks of parameters, axes of activations, constants, and who makes and reads them."""

    def __init__(self, collection: Collection, region: jaxprs.Region, known: Known, wanted: Sequence[bool]):
        self.collection = collection
        self.marks, self.axes = dict(known.marks), dict(known.axes)
        self.derived, self.touched = set(known.derived), set(known.touched)
        self.constants = Constants(region, known.constants)
        self.plan = Instrumentation(region)
        self.eqns = jaxprs.live(region, wanted)
        self.uses: dict[Var, list[Any]] = defaultdict(list)
        self.makers: dict[Var, Any] = {}
        self.roots: dict[Var, Var] = {}  # a variable that is only a cast of another
        self.biases: dict[int, Any] = {}  # by the equation that adds them
        self.explained: set[int] = set()  # equations that a mark went through or a site accounts for
        for eqn in self.eqns:
            self.makers.update((out, eqn) for out in eqn.outvars)
            for atom in eqn.invars:
                if isinstance(atom, core.Var):
                    self.uses[atom].append(eqn)
        for atom, want in zip(region.results, wanted, strict=True):
            if want and isinstance(atom, core.Var):
                self.uses[atom].append(None)

    def marks_of(self, atom: Any) -> Marks:
        """What a variable shows of parameters, () where it shows nothing of one."""
        return self.marks.get(atom, ()) if isinstance(atom, core.Var) else ()

    def axes_of(self, atom: Any) -> Axes | None:
        """The axes of an activation, None of what is none."""
        return self.axes.get(atom) if isinstance(atom, core.Var) else None

    def is_data(self, atom: Any) -> bool:
        """Whether it is an activation: made of the arguments."""
        return self.axes_of(atom) is not None

    def is_in(self, atom: Any, variables: set[Var]) -> bool:
        """Whether an atom is one of these variables."""
        return isinstance(atom, core.Var) and atom in variables

    def is_parameter(self, atom: Any) -> bool:
        """Whether it is made of parameters alone, with a mark or without."""
        return bool(self.marks_of(atom)) or self.is_in(atom, self.derived)

    def root(self, atom: Any) -> Any:
        """What an atom is a cast of: a cast for each kernel does not make one activation several."""
        return self.roots.get(atom, atom) if isinstance(atom, core.Var) else atom

    def only_use(self, variable: Var) -> Any | None:
        """The one equation that reads a variable, None where there are several or it is a result."""
        uses = self.uses[variable]
        return uses[0] if len(uses) == 1 else None

    def rows_of(self, variable: Var, layout: Layout) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Sizes and labels of the row axes of an activation, merged axes taken apart."""
        axes = self.axes_of(variable) or axis_labels.unknown(variable.aval.shape)
        factors = [factor for i in layout.rows for factor in axes[i]]
        return tuple(factor.size for factor in factors), tuple(factor.label for factor in factors)

    def is_positional(self, out: Var, layout: Layout) -> bool:
        """Whether an elementwise parameter has its own entries along a token axis of the activation."""
        axes = self.axes_of(out)
        labels = set() if axes is None else {factor.label for i in layout.features for factor in axes[i]}
        return any(axis_labels.is_stream(label) or label == axis_labels.EXAMPLE for label in labels)
