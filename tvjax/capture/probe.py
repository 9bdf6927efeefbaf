"""Running a function with its sites observed: inputs, outputs and output gradients.

A zero *probe* is added to the output of each site; the gradient with respect to the probe is the output gradient
``g = dL/dy``. Nothing else of the function changes, so it stays what XLA would have compiled anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from tvjax import placement
from tvjax.capture import jaxprs
from tvjax.capture.finder import plan_of
from tvjax.capture.layout import Instrumentation, Layout, from_rows, to_rows
from tvjax.capture.sites import Site, SiteTable

PyTree = Any


class Captured(NamedTuple):
    """What the sites of one run saw, by the names that a `Site` gives.

    Attributes:
      activations: arrays ``[*scans, groups, rows, d]`` by `Site.input` and `Site.output`; groups where a site has some.
      gradients: arrays of the same make by `Site.gradient`.
    """

    activations: dict[str, jax.Array]
    gradients: dict[str, jax.Array]

    def input(self, site: Site) -> jax.Array | None:
        """X of a site, ``[*layers, groups, rows, d_in]``; None for a bias or shift (x is 1)."""
        return None if site.input is None else _of_layers(self.activations[site.input], site)

    def image(self, site: Site) -> jax.Array:
        """What a convolution reads, ``[*layers, pixels, channels]``."""
        assert site.image is not None
        return _of_layers(self.activations[site.image], site)

    def output(self, site: Site) -> jax.Array:
        """Y of a site, ``[*layers, groups, rows, d_out]``."""
        return _of_layers(self.activations[site.output], site)

    def gradient(self, site: Site) -> jax.Array:
        """G of a site, ``[*layers, groups, rows, d_out]``."""
        return _of_layers(self.gradients[site.gradient], site)


def _of_layers(array: jax.Array, site: Site) -> jax.Array:
    array = _shared_to_rows(array, site)
    return array[np.array(site.layers)] if site.layers else array


def _shared_to_rows(array: jax.Array, site: Site) -> jax.Array:
    """Scans that a leaf is shared over become rows."""
    scanned = [i for i, is_scanned in enumerate(site.levels) if is_scanned]
    shared = [i for i, is_scanned in enumerate(site.levels) if not is_scanned]
    if not shared:
        return array
    batch = range(len(site.levels), array.ndim - 2)
    order = (*scanned, *batch, *shared, array.ndim - 2, array.ndim - 1)
    array = jnp.transpose(array, order)
    lead = len(scanned) + len(batch)
    return array.reshape(*array.shape[:lead], -1, array.shape[-1])


class RowSharding(NamedTuple):
    """How rows lie over explicit axes: like the examples that they belong to.

    Attributes:
      mesh: with explicit axes; None: there is nothing to be said.
      axes: entry of a partition spec.
    """

    mesh: AbstractMesh | None
    axes: Any = None

    def place(self, array: jax.Array) -> jax.Array:
        """``[..., rows, features]`` with the rows in their place, on every device where they cannot be divided."""
        if self.mesh is None:
            return array
        names = self.axes if isinstance(self.axes, tuple) else (self.axes,) if self.axes else ()
        divisible = array.shape[-2] % math.prod(self.mesh.shape[name] for name in names) == 0
        spec = PartitionSpec(*[None] * (array.ndim - 2), self.axes if divisible else None, None)
        return jax.sharding.reshard(array, NamedSharding(self.mesh, spec))

    def context(self) -> AbstractContextManager[Any]:
        """The mesh."""
        return nullcontext() if self.mesh is None else jax.sharding.use_abstract_mesh(self.mesh)


@placement.automatic(lambda value, probe, layout: value)
def _with_probe(value: jax.Array, probe: jax.Array, layout: Layout) -> jax.Array:
    return value + from_rows(probe, layout, value.shape)


def _row_sharding(params: PyTree, args: PyTree) -> RowSharding:
    mesh = placement.explicit_mesh((params, args))
    if mesh is None:
        return RowSharding(None)
    first = (jax.typeof(leaf).sharding.spec for leaf in jax.tree.leaves(args) if jnp.ndim(leaf))
    return RowSharding(mesh, next((spec[0] for spec in first if spec and spec[0] is not None), None))


def run(
    plan: Instrumentation,
    arguments: Sequence[Any],
    probes: dict[str, jax.Array],
    roles: frozenset[str],
    lie: RowSharding,
) -> tuple[list[Any], dict[str, jax.Array]]:
    """Evaluates a plan: the results of its region, and the activations whose role is wanted, by name."""
    region = plan.region
    captured: dict[str, jax.Array] = {}
    values: dict[Any, Any] = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    def write(variable: Any, value: Any) -> None:
        for name, layout in plan.probes.get(variable, ()):
            if name in probes:
                value = _with_probe(value, probes[name], layout)
        values[variable] = value
        for record in plan.records.get(variable, ()):
            if record.role in roles and record.name not in captured:
                with placement.within(lie.mesh):
                    seen = record.make(lambda atom: placement.as_automatic(read(atom)))
                    rows = to_rows(jnp.asarray(seen), record.layout)
                captured[record.name] = lie.place(rows)

    for variable, value in zip(region.variables, (*region.consts, *arguments), strict=True):
        write(variable, value)
    for eqn in region.eqns:
        operands = [read(atom) for atom in eqn.invars]
        if id(eqn) in plan.inner:
            results, inner = _run_inner(eqn, plan.inner[id(eqn)], operands, probes, roles, lie)
            captured.update(inner)
        else:
            results = jaxprs.bind(eqn, *operands)
        for variable, value in zip(eqn.outvars, results, strict=True):
            write(variable, value)
    return [read(atom) for atom in region.results], captured


def _run_inner(
    eqn: Any,
    plan: Instrumentation,
    operands: list[Any],
    probes: dict[str, jax.Array],
    roles: frozenset[str],
    lie: RowSharding,
) -> tuple[list[Any], dict[str, jax.Array]]:
    own = {name: probes[name] for name in plan.shapes if name in probes}
    if eqn.primitive.name in jaxprs.REMAT:
        block = jax.checkpoint(
            lambda arguments, inner_probes: run(plan, arguments, inner_probes, roles, lie),
            policy=eqn.params["policy"],
            prevent_cse=eqn.params["prevent_cse"],
        )
        return block(operands, own)
    n_consts, n_carry = jaxprs.scan_operands(eqn)
    consts = operands[:n_consts]

    def body(carry: list[Any], scanned: tuple[list[Any], dict[str, jax.Array]]) -> tuple[list[Any], Any]:
        results, captured = run(plan, [*consts, *carry, *scanned[0]], scanned[1], roles, lie)
        return results[:n_carry], (results[n_carry:], captured)

    carry, (outputs, captured) = lax.scan(
        body,
        operands[n_consts : n_consts + n_carry],
        (operands[n_consts + n_carry :], own),
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    return [*carry, *outputs], captured


class Instrumented(NamedTuple):
    """A function with its sites observed; traced for the shapes of the arguments that it was made with.

    Attributes:
      table: its sites.
      plan: how it is run.
      output_tree: structure of what the function returns.
      lie: how what it observes lies.
    """

    table: SiteTable
    plan: Instrumentation
    output_tree: Any
    lie: RowSharding

    def probes(self) -> dict[str, jax.Array]:
        """Zero probes for every site."""
        return {name: self.lie.place(jnp.zeros(shape.shape, shape.dtype)) for name, shape in self.plan.shapes.items()}

    def __call__(
        self,
        params: PyTree,
        *args: Any,
        probes: dict[str, jax.Array] | None = None,
        inputs: bool = True,
        outputs: bool = True,
        patches: bool = False,
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """What the function returns, and its activations by name; with probes added where they are given."""
        wanted = (("input", inputs), ("output", outputs), ("patches", patches))
        roles = frozenset(role for role, want in wanted if want)
        arguments = jax.tree.leaves((params, *args))
        with self.lie.context():
            results, captured = run(self.plan, arguments, probes or {}, roles, self.lie)
        return jax.tree.unflatten(self.output_tree, results), captured


def instrument(function: Callable[..., Any], params: PyTree, *args: Any) -> Instrumented:
    """Traces ``function(params, *args)`` once and finds its sites; call it inside `jit`."""
    plan, table, shapes = plan_of(function, params, *args)
    return Instrumented(table, plan, jax.tree.structure(shapes), _row_sharding(params, args))


def capture(function: Callable[..., Any], params: PyTree, *args: Any) -> tuple[PyTree, Captured]:
    """Runs ``function(params, *args)`` and returns its result with x and y of every site.

    Pure and jittable. The gradients of the result are empty: see `capture_gradients`.

    >>> dense = lambda p, x: x @ p["kernel"]
    >>> out, seen = capture(dense, {"kernel": jnp.ones((3, 2))}, jnp.ones((5, 3)))
    >>> {name: array.shape for name, array in seen.activations.items()}
    {'kernel#0:in': (5, 3), 'kernel#0:out': (5, 2)}
    """
    out, activations = instrument(function, params, *args)(params, *args, patches=True)
    return out, Captured(activations, {})


def capture_gradients(loss: Callable[..., Any], params: PyTree, *args: Any) -> tuple[jax.Array, Captured]:
    """Runs a scalar ``loss(params, *args)`` and returns it with x, y and ``g = dL/dy`` of every site.

    A loss that sums over examples gives each row its own gradient, whatever the batch size; a mean divides by it.

    >>> loss = lambda p, x: (x @ p["kernel"]).sum()
    >>> value, seen = capture_gradients(loss, {"kernel": jnp.ones((3, 2))}, jnp.ones((5, 3)))
    >>> float(value), seen.gradients["kernel#0"].shape
    (30.0, (5, 2))
    """
    observed = instrument(loss, params, *args)
    (value, activations), gradients = jax.value_and_grad(
        lambda probes: observed(params, *args, probes=probes, patches=True), has_aux=True
    )(observed.probes())
    return value, Captured(activations, gradients)
