"""A model at composed parameters, edited stage by stage while it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tvjax.arithmetic import apply
from tvjax.compose.coefficients import Coefficients, Share, change, combine, shares, zero_after
from tvjax.stages import Model, local_params, owner_paths

PyTree = Any
Function = Callable[[PyTree, PyTree], PyTree]


@partial(jax.tree_util.register_dataclass, data_fields=("params", "taus", "coefficients"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Edited:
    """The parameters ``combine(params, taus, coefficients)``, not yet computed; a pytree.

    Objectives take it for parameters. A model of stages then computes those of one stage at a time, in the forward pass
    and again in the backward pass, so that neither the edited parameters nor their gradient are ever there as a whole.

    Attributes:
      params: theta_0.
      taus: the task vectors.
      coefficients: of these.
    """

    params: PyTree
    taus: Sequence[PyTree]
    coefficients: Coefficients

    def combine(self) -> PyTree:
        """The parameters."""
        return combine(self.params, self.taus, self.coefficients)


def computed(params: PyTree) -> PyTree:
    """Parameters as arrays, whether they are an `Edited` or not."""
    return params.combine() if isinstance(params, Edited) else params


def outputs(model: Any, params: PyTree, inputs: PyTree) -> PyTree:
    """What a model returns at these parameters, which may be an `Edited`.

    >>> from tvjax.compose import init
    >>> from tvjax.stages import single_stage
    >>> taus = [{"w": jnp.ones((2, 2))}]
    >>> model = single_stage(lambda params, x: x @ params["w"], {"w": jnp.eye(2)})
    >>> outputs(model, Edited(model.params, taus, init(taus, value=0.5)), jnp.ones((1, 2))).tolist()
    [[2.0, 2.0]]
    """
    if not (isinstance(params, Edited) and isinstance(model, Model)):
        return model.replace(params=computed(params))(inputs)
    parts = shares(params.taus, params.coefficients)
    carry = inputs
    for stage in model.stages:
        owners = owner_paths(stage, params.params)
        own = {local: parts[path] for local, path in owners.items() if path in parts}
        carry = _run_compiled(stage.function, local_params(stage, params.params), own, carry)
    return carry


class _Pulled(NamedTuple):
    """How the residuals of a stage are put together again; static.

    Attributes:
      structure: of the pull-back.
      slots: for each of its leaves the index among the edited parameters and the carry, or None for one that is kept.
    """

    structure: Any
    slots: tuple[int | None, ...]


@jax.tree_util.register_static
class _Static:
    def __init__(self, content: _Pulled):
        self.content = content


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(function: Function, local: PyTree, parts: dict[str, Share], carry: PyTree) -> PyTree:
    return function(_edit(local, parts, carry), carry)


def _forward(function: Function, local: PyTree, parts: dict[str, Share], carry: PyTree) -> tuple[PyTree, PyTree]:
    """The outputs, and what the backward pass needs: products of matrices, the carry, and what is there anyway."""
    theta = _edit(local, parts, carry)
    results, pull_back = jax.vjp(jax.checkpoint(function, policy=_is_costly), theta, carry)
    leaves, structure = jax.tree.flatten(pull_back)
    places = {id(leaf): index for index, leaf in enumerate(jax.tree.leaves((theta, carry)))}
    slots = tuple(places.get(id(leaf)) for leaf in leaves)
    kept = [leaf for leaf, slot in zip(leaves, slots, strict=True) if slot is None]
    return results, (kept, local, parts, carry, _Static(_Pulled(structure, slots)))


def _backward(function: Function, residuals: PyTree, cotangent: PyTree) -> tuple[PyTree, PyTree, PyTree]:
    kept, local, parts, carry, static = residuals
    structure, slots = static.content
    theta, pull_edit = jax.vjp(lambda local, parts: _edit(local, parts, cotangent), local, parts)
    inputs = jax.tree.leaves((theta, jax.tree.map(lambda leaf: _add(leaf, zero_after(cotangent)), carry)))
    rest = iter(kept)
    pull_back = jax.tree.unflatten(structure, [next(rest) if slot is None else inputs[slot] for slot in slots])
    of_theta, of_carry = pull_back(cotangent)
    return (*pull_edit(of_theta), of_carry)


_run.defvjp(_forward, _backward)
_run_compiled = jax.jit(_run, static_argnums=0)


def _edit(local: PyTree, parts: dict[str, Share], after: PyTree) -> PyTree:
    """The edited parameters of a stage, computed when `after` is there, and not before.

    Without this order XLA computes the parameters of all stages first, and on a CPU, which drops optimisation barriers,
    takes those of the backward pass for the same as those of the forward pass, and keeps them.
    """
    nothing = zero_after(after)
    late = {
        path: dataclasses.replace(share, rows=[_add(row, nothing) for row in share.rows])
        for path, share in parts.items()
    }
    return apply(local, change(late))


def _add(leaf: Array, zero: Float[Array, ""]) -> Array:
    return leaf + zero.astype(leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _is_costly(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name in ("dot_general", "conv_general_dilated")
