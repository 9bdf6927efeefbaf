"""What writes the residual stream of a block: the kernels whose outputs are added to it, found by data flow.

The output of such a kernel meets nothing but its bias, perhaps a scale of its own (LayerScale), and the sum with the
stream. The *stream* of a block is the last of these sums: what the block returns where it normalises first, the sum
before the last normalisation where it normalises after (BERT). There is no other path from the kernel to it, so it is
linear in the kernel: ``stream = rest + (x K + b) * scale``.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal, Var

from tvjax import tree
from tvjax.capture import jaxprs
from tvjax.capture.finder import plan_of
from tvjax.capture.sites import Site, SiteTable
from tvjax.capture.views import TRANSPARENT

PyTree = Any

_RESHAPES = ("reshape", "squeeze")


class Writer(NamedTuple):
    """A kernel whose output is added to the residual stream.

    Attributes:
      kernel: its site.
      bias: that of the bias that is added to its output; None where there is none.
      scale: that of the vector that its output is multiplied with; None where there is none.
      direct: whether what it writes reaches the stream of the block by sums alone.
    """

    kernel: Site
    bias: Site | None
    scale: Site | None
    direct: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Residual:
    """The residual stream of a block, traced for the shapes of some arguments.

    Attributes:
      path: of the stream among the leaves of what the block takes, and returns.
      writers: in the order in which they write; the last one writes the stream.
    """

    path: str
    writers: tuple[Writer, ...]
    _region: jaxprs.Region
    _variable: Any
    _returned: Any

    @cached_property
    def stream(self) -> Callable[[PyTree, PyTree], jax.Array]:
        """``(params, carry) -> stream``, one object for each `Residual`."""
        needed = jaxprs.Region(*self._region[:2], (), (self._variable,))
        eqns = jaxprs.live(self._region._replace(results=(self._variable,)), [True])

        def stream(params: PyTree, carry: PyTree) -> jax.Array:
            return jaxprs.evaluate(needed._replace(eqns=tuple(eqns)), jax.tree.leaves((params, carry)))[0]

        return stream

    @cached_property
    def resume(self) -> Callable[[PyTree, PyTree, jax.Array], PyTree]:
        """``(params, carry, stream) -> what the block returns`` with this stream in the place of its own."""
        region, variable = self._region, self._variable
        after = jaxprs.without(region, variable)
        given = (*region.variables[len(region.consts) :], variable)
        rest = jaxprs.Region((*region.variables[: len(region.consts)], *given), region.consts, after, region.results)

        def resume(params: PyTree, carry: PyTree, stream: jax.Array) -> PyTree:
            results = jaxprs.evaluate(rest, [*jax.tree.leaves((params, carry)), stream])
            return jax.tree.unflatten(jax.tree.structure(self._returned), results)

        return resume


def residual(function: Callable[..., Any], params: PyTree, carry: PyTree) -> Residual | None:
    """The residual stream of ``function(params, carry) -> carry``, and what writes it; nothing is computed.

    Args:
      function: a block.
      params: its parameters, arrays or `jax.ShapeDtypeStruct`.
      carry: what it takes, arrays or shapes.

    Returns:
      The stream; None for a function that adds no kernel's output to an activation which it hands on.

    >>> def block(params, carry):
    ...     hidden = carry["hidden"]
    ...     return {"hidden": hidden + jnp.tanh(hidden @ params["up"]) @ params["down"]}
    >>> shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    >>> found = residual(block, {"up": shape(4, 8), "down": shape(8, 4)}, {"hidden": shape(2, 3, 4)})
    >>> found.path, [writer.kernel.path for writer in found.writers]
    ('hidden', ['down'])
    """
    region, returned = jaxprs.trace(_without_remat(function, params, carry), params, carry)
    plan, table, _ = plan_of(lambda *args: _evaluated(region, returned, args), params, carry)
    flow = _Flow(plan.region, len(jax.tree.leaves(params)))
    found: list[tuple[Var, Site, Site | None]] = []
    probed = {variable: probes[0][0] for variable, probes in plan.probes.items() if len(probes) == 1}
    by_kind = {kind: {site.gradient: site for site in table.sites if site.kind == kind} for kind in ("dense", "scale")}
    for variable, probe in probed.items():
        site = by_kind["dense"].get(probe)
        if site is None or site.groups is not None or site.levels or not (end := flow.written_by(variable)):
            continue
        scales = [by_kind["scale"].get(probed.get(product, "")) for product in end[1]]
        if len(scales) < 2 and None not in scales:  # a product with what is no parameter is no LayerScale
            found.append((end[0], site, scales[0] if scales else None))
    if not found:
        return None
    found.sort(key=lambda one: flow.order[one[0]])
    stream = found[-1][0]
    path = _handed_on(flow, stream, carry, returned)
    if path is None:
        return None
    summed = flow.summands(stream)
    writers = tuple(Writer(site, _bias(table, site), scale, own in summed) for own, site, scale in found)
    return Residual(path, writers, plan.region, stream, returned)


def last_kernel(function: Callable[..., Any], params: PyTree, carry: PyTree) -> Residual | None:
    """The output of the last kernel of a stage that writes no stream, such as a projection or a head of classes.

    Returns:
      As `residual` does, the output, after its bias, in the place of the stream; None for a stage without a kernel.

    >>> found = last_kernel(lambda p, x: {"out": jnp.tanh(x @ p["w"])}, {"w": jnp.ones((3, 2))}, jnp.ones((4, 3)))
    >>> found.writers[0].kernel.path, found.stream({"w": jnp.ones((3, 2))}, jnp.ones((4, 3))).shape
    ('w', (4, 2))
    """
    region, returned = jaxprs.trace(_without_remat(function, params, carry), params, carry)
    plan, table, _ = plan_of(lambda *args: _evaluated(region, returned, args), params, carry)
    flow = _Flow(plan.region, len(jax.tree.leaves(params)))
    sites = {site.gradient: site for site in table.sites if site.kind == "dense" and site.groups is None}
    found = [
        (variable, sites[probes[0][0]])
        for variable, probes in plan.probes.items()
        if len(probes) == 1 and probes[0][0] in sites and variable in flow.order
    ]
    if not found:
        return None
    variable, site = max(found, key=lambda one: flow.order[one[0]])
    bias = _bias(table, site)
    if bias is not None:
        variable = flow.after_bias(variable)
    return Residual("", (Writer(site, bias, None, True),), plan.region, variable, returned)


def _handed_on(flow: _Flow, stream: Var, carry: PyTree, returned: PyTree) -> str | None:
    """Path of the floating leaf of the carry that the stream goes on in; None where it goes on in none."""
    taken = tree.flatten(carry)
    for path, atom in zip(tree.flatten(returned), flow.region.results, strict=True):
        alike = path in taken and jnp.shape(taken[path]) == _shape(atom) == _shape(stream)
        if alike and jnp.issubdtype(atom.aval.dtype, jnp.floating) and stream in flow.ancestors(atom):
            return path
    return None


def _bias(table: SiteTable, kernel: Site) -> Site | None:
    return next((site for site in table.sites if site.kind == "bias" and site.output == kernel.output), None)


def _evaluated(region: jaxprs.Region, returned: PyTree, args: Sequence[PyTree]) -> PyTree:
    return jax.tree.unflatten(jax.tree.structure(returned), jaxprs.evaluate(region, jax.tree.leaves(args)))


def _without_remat(function: Callable[..., Any], params: PyTree, carry: PyTree) -> Callable[..., Any]:
    """The function with its rematerialised parts inlined: their values are what is looked at here."""
    region, returned = jaxprs.trace(function, params, carry)

    def step(eqn: Any, *operands: Any) -> list[Any]:
        if eqn.primitive.name in jaxprs.REMAT:
            return jaxprs.evaluate(jaxprs.body(eqn), operands, step)
        return jaxprs.bind(eqn, *operands)

    def inlined(*args: PyTree) -> PyTree:
        results = jaxprs.evaluate(region, jax.tree.leaves(args), step)
        return jax.tree.unflatten(jax.tree.structure(returned), results)

    return inlined


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(atom.aval.shape)


class _Flow:
    """Who makes and who reads the variables of a region, and which of them depend on the carry."""

    def __init__(self, region: jaxprs.Region, parameters: int):
        self.region = region
        self.makers: dict[Var, Any] = {}
        self.uses: dict[Var, list[Any]] = defaultdict(list)
        self.order: dict[Var, int] = {}
        self.data = set(region.variables[len(region.consts) + parameters :])
        for number, eqn in enumerate(jaxprs.live(region, [True] * len(region.results))):
            operands = [atom for atom in eqn.invars if isinstance(atom, Var)]
            for atom in operands:
                self.uses[atom].append(eqn)
            for out in eqn.outvars:
                self.makers[out], self.order[out] = eqn, number
                if not self.data.isdisjoint(operands):
                    self.data.add(out)
        for atom in region.results:
            if isinstance(atom, Var):
                self.uses[atom].append(None)

    def written_by(self, variable: Var) -> tuple[Var, list[Var]] | None:
        """The sum with other activations that a kernel's output ends in, and the products before it."""
        products: list[Var] = []
        summed: Var | None = None
        while len(uses := self.uses[variable]) == 1 and (eqn := uses[0]) is not None:
            name = eqn.primitive.name
            others = [atom for atom in eqn.invars if atom is not variable]
            of_data = any(isinstance(atom, Var) and atom in self.data for atom in others)
            if name in ("add", "add_any") and len(eqn.invars) == 2:
                summed = eqn.outvars[0] if of_data else summed
            elif name == "mul" and len(others) == 1 and not of_data and summed is None:
                products.append(eqn.outvars[0])
            elif name not in (*TRANSPARENT, *_RESHAPES) or len(eqn.outvars) != 1 or "stop_gradient" in name:
                break
            elif summed is not None and _shape(eqn.outvars[0]) != _shape(summed):
                break
            variable = eqn.outvars[0]
        return None if summed is None else (summed, products)

    def after_bias(self, variable: Var) -> Var:
        """The sum of a kernel's output and its bias, the next that it meets."""
        while True:
            eqn = self.uses[variable][0]
            variable = eqn.outvars[0]
            if eqn.primitive.name in ("add", "add_any", "sub"):
                return variable

    def ancestors(self, atom: Any) -> set[Var]:
        """What an atom is computed from, itself included."""
        found: set[Var] = set()
        waiting = [atom]
        while waiting:
            atom = waiting.pop()
            if isinstance(atom, Literal) or atom in found:
                continue
            found.add(atom)
            waiting += self.makers[atom].invars if atom in self.makers else ()
        return found

    def summands(self, variable: Var) -> set[Var]:
        """What a variable is a sum of: the sums and casts on the way to it, itself included."""
        found: set[Var] = set()
        waiting = [variable]
        while waiting:
            variable = waiting.pop()
            found.add(variable)
            eqn = self.makers.get(variable)
            if eqn is not None and eqn.primitive.name in ("add", "add_any", *TRANSPARENT):
                waiting += [atom for atom in eqn.invars if isinstance(atom, Var) and atom not in found]
        return found
