"""Reading and evaluating jaxprs: all that depends on the JAX version lives here.

JAX 0.10 to 0.12 differ in how a jaxpr carries its constants (`ClosedJaxpr` became one class with `Jaxpr`) and in how
a scan says which of its operands are constants, carry and scanned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax._src import source_info_util  # the only way to keep the user's name stack when a jaxpr is evaluated again
from jax.extend.core import Literal, Var

INLINED = ("jit", "pjit", "closed_call", "core_call")
REMAT = ("remat2", "checkpoint", "remat")


class Region(NamedTuple):
    """A flat run of equations: a function, or the body of a scan or of a remat, with its calls inlined.

    Attributes:
      variables: the variables that are given, constants first, then the arguments.
      consts: values of the first variables.
      eqns: the equations, each object unique to this region.
      results: the variables or literals that are returned.
    """

    variables: tuple[Any, ...]
    consts: tuple[Any, ...]
    eqns: tuple[Any, ...]
    results: tuple[Any, ...]


def _open(jaxpr: Any) -> Region:
    if hasattr(jaxpr, "all_invars"):  # JAX >= 0.12: one class, constants lead the variables
        return Region(tuple(jaxpr.all_invars), tuple(jaxpr.consts), tuple(jaxpr.eqns), tuple(jaxpr.outvars))
    consts = tuple(getattr(jaxpr, "consts", ()))
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return Region((*inner.constvars, *inner.invars), consts, tuple(inner.eqns), tuple(inner.outvars))


def bind(eqn: Any, *operands: Any) -> list[Any]:
    """The results of one equation on these operands, always a list."""
    name_stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=name_stack), eqn.ctx.manager:
        result = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return list(result) if eqn.primitive.multiple_results else [result]


def evaluate(region: Region, arguments: Sequence[Any], step: Callable[..., list[Any]] = bind) -> list[Any]:
    """Runs a region; `step(eqn, *operands)` gives the results of one equation."""
    values: dict[Var, Any] = dict(zip(region.variables, (*region.consts, *arguments), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for eqn in region.eqns:
        values.update(zip(eqn.outvars, step(eqn, *map(read, eqn.invars)), strict=True))
    return [read(atom) for atom in region.results]


def _inline(eqn: Any, *operands: Any) -> list[Any]:
    if eqn.primitive.name in INLINED:
        name = "jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"
        return evaluate(_open(eqn.params[name]), operands, _inline)
    return bind(eqn, *operands)


def flat_region(jaxpr: Any) -> Region:
    """The region of a jaxpr with every `jit` and `closed_call` inlined."""
    region = _open(jaxpr)
    arguments = region.variables[len(region.consts) :]
    shapes = [_placed_type(v.aval) for v in arguments]
    return _open(jax.make_jaxpr(lambda *args: evaluate(region, args, _inline))(*shapes))


def _placed_type(aval: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype, and the sharding where it is part of the type."""
    sharding = aval.sharding if hasattr(aval, "sharding") and aval.sharding.mesh.explicit_axes else None
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding)


def trace(function: Callable[..., Any], *args: Any) -> tuple[Region, Any]:
    """The flat region of a function over the flattened arguments, and the tree of shapes that it returns."""
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    return flat_region(jaxpr), shapes


def body(eqn: Any) -> Region:
    """The flat region of the body of a scan or a remat."""
    return flat_region(eqn.params["jaxpr"])


def called(eqn: Any) -> Region | None:
    """The region of a function with a derivative rule of its own, whose operands are the equation's; else None."""
    for name in ("call_jaxpr", "fun_jaxpr") if eqn.primitive.name.startswith("custom_") else ():
        if name in eqn.params:
            return flat_region(eqn.params[name])
    return None


def live(region: Region, wanted: Sequence[bool]) -> list[Any]:
    """The equations that the wanted results (or an effect) need; what code computes and drops is left out."""
    needed = {atom for atom, want in zip(region.results, wanted, strict=True) if want and isinstance(atom, Var)}
    kept = []
    for eqn in reversed(region.eqns):
        if eqn.effects or needed.intersection(eqn.outvars):
            kept.append(eqn)
            needed.update(atom for atom in eqn.invars if isinstance(atom, Var))
    return kept[::-1]


def without(region: Region, variable: Any) -> tuple[Any, ...]:
    """The equations that the results still need where the value of a variable is given."""
    eqns = [eqn for eqn in region.eqns if variable not in eqn.outvars]
    return tuple(live(region._replace(eqns=tuple(eqns)), [True] * len(region.results)))


def scan_operands(eqn: Any) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many its carry; the rest is scanned over."""
    if "ft_in" in eqn.params:  # JAX >= 0.12
        consts, carry, _ = eqn.params["ft_in"].unpack()
        return len(consts), len(carry)
    return eqn.params["num_consts"], eqn.params["num_carry"]
