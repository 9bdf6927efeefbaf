"""Walking a model stage by stage over a calibration set, forwards and backwards.

A `Walk` keeps the residual stream at stage boundaries, and recomputes one stage at a time with its sites observed. So
no activation of more than one stage of a model is alive at once, and what XLA compiles is one function per kind of
stage. Memory: a walk forwards holds the boundaries from the first that is still needed on, two where stages are visited
in order; a walk backwards, for gradients, begins with those of all stages, ``(stages + 1) * rows * width`` values.
Parameters on disk (`tvjax.on_disk`) are read when their stage is reached, and let go when another is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Var

from tvjax import tree
from tvjax.capture import Captured, SiteTable, instrument, jaxprs, sites
from tvjax.capture.residual import Residual, residual
from tvjax.finite import check_finite
from tvjax.on_disk import is_on_disk, read, trim
from tvjax.stages import Batch, Model, check_model, local_params, run_stage

PyTree = Any


class Walk:
    """The calibration batches inside one model.

    Args:
      model: the model; with a loss where gradients are asked for.
      batches: its views of the calibration batches.
      offload: keep the residual streams and cotangents in host memory.
    """

    def __init__(self, model: Model, batches: Sequence[Batch], offload: bool = False):
        check_model("model", model)
        self.model, self.batches = model, batches
        self._keep = jax.device_get if offload else lambda carry: carry
        self._carries: list[list[PyTree] | None] = [[batch.inputs for batch in batches]]
        self._first = 0  # stages before this one are done with
        self._read: tuple[int, PyTree] | None = None  # the parameters of one stage that were read from disk
        self._cotangents: dict[int, list[PyTree]] = {}

    def params(self, index: int) -> PyTree:
        """The parameters of a stage; those on disk are read, and kept until they are let go, or others are read."""
        stored = self.stored(index)
        if not any(map(is_on_disk, jax.tree.leaves(stored))):
            return stored
        if self._read is None or self._read[0] != index:
            self._read = None  # first let go: never those of two stages
            self._read = index, read(stored)
        return self._read[1]

    def let_go(self) -> None:
        """Drops the parameters that were read from disk, once the next stage has what it takes."""
        if self._read is not None:
            if len(self._carries) == self._read[0] + 1 < len(self.model.stages):
                self.carries(self._read[0] + 1)
            self._read = None
            trim()

    def stored(self, index: int) -> PyTree:
        """The parameters of a stage as the model has them, for their shapes and dtypes."""
        return local_params(self.model.stages[index], self.model.params)

    def carries(self, index: int) -> list[PyTree]:
        """What a stage takes, for every batch; runs the stages before it on first use."""
        while len(self._carries) <= index:
            stage = self.model.stages[len(self._carries) - 1]
            params = self.params(len(self._carries) - 1)
            inputs = self._carries[-1]
            assert inputs is not None
            self._carries.append([self._keep(run_stage(stage.function, params, carry)) for carry in inputs])
            if len(self._carries) - 2 < self._first:
                self._carries[-2] = None
        carries = self._carries[index]
        assert carries is not None
        return carries

    def cotangents(self, index: int) -> list[PyTree]:
        """The gradient of the summed loss with respect to what a stage returns (its floating leaves), by batch."""
        if index not in self._cotangents:
            if index == len(self.model.stages) - 1:
                outputs = self.carries(index + 1)
                found = [
                    _loss_cotangent(self.model.loss, self.model.loss_params, output, batch.labels)
                    for output, batch in zip(outputs, self.batches, strict=True)
                ]
                # Votes are signs, and count a NaN as zero: none may begin here.
                check_finite({f"batch {number}": each for number, each in enumerate(found)}, "the gradient of the loss")
                self._cotangents[index] = found
            else:
                stage, params = self.model.stages[index + 1], self.params(index + 1)
                self._cotangents[index] = [
                    self._keep(_pull_back(stage.function, params, carry, cotangent))
                    for carry, cotangent in zip(self.carries(index + 1), self.cotangents(index + 1), strict=True)
                ]
        return self._cotangents[index]

    def table(self, index: int, batch: int = 0) -> SiteTable:
        """The sites of a stage; only their rows depend on the batch."""
        carry = self.carries(index)[batch]
        return _table(self.model.stages[index].function, _shapes(self.stored(index)), _shapes(carry))

    def residual(self, index: int, batch: int = 0) -> Residual | None:
        """The residual stream of a stage and what writes it; None for a stage without one."""
        carry = self.carries(index)[batch]
        return _residual(self.model.stages[index].function, _shapes(self.params(index)), _shapes(carry))

    @cached_property
    def reached(self) -> frozenset[str]:
        """Paths of the leaves that the loss depends on, by structure: the gradient of all others is zero."""

        def loss(params: PyTree, loss_params: PyTree, batch: Batch) -> jax.Array:
            return self.model.loss(loss_params, self.model.replace(params=params)(batch.inputs), batch.labels)

        arguments = jax.tree.map(tree.leaf_type, (self.model.params, self.model.loss_params, self.batches[0]))
        region, _ = jaxprs.trace(loss, *arguments)
        needed = {atom for atom in region.results if isinstance(atom, Var)}
        for eqn in reversed(region.eqns):
            if needed.intersection(eqn.outvars):
                needed.update(atom for atom in eqn.invars if isinstance(atom, Var) and is_floating(atom.aval))
        variables = region.variables[len(region.consts) :]
        return frozenset(path for path, v in zip(tree.flatten(arguments[0]), variables, strict=False) if v in needed)

    def observe(self, index: int, batch: int, activations: frozenset[str], gradients: frozenset[str]) -> Captured:
        """The activations and output gradients of these names at a stage, for one batch.

        Where gradients are read, the cotangent that leaves the stage downwards is kept: the walk back costs no more.
        """
        function, params, carry = self.model.stages[index].function, self.params(index), self.carries(index)[batch]
        if not gradients:
            return Captured(_observe(function, activations, params, carry), {})
        if index > 0 and index - 1 not in self._cotangents:
            self._cotangents[index - 1] = [None] * len(self.batches)
        seen, down = _observe_gradients(
            function, activations, gradients, index > 0, params, carry, self.cotangents(index)[batch]
        )
        if index > 0 and self._cotangents[index - 1][batch] is None:
            self._cotangents[index - 1][batch] = self._keep(down)
        return seen

    def keep_cotangent(self, index: int, batch: int, cotangent: list[jax.Array]) -> None:
        """Keeps the gradient with respect to what a stage returns, where a pass over the next one has found it."""
        self._cotangents.setdefault(index, [None] * len(self.batches))[batch] = self._keep(cotangent)

    def release_before(self, index: int) -> None:
        """Forgets what the stages before this one take: a walk forwards is done with them."""
        self._first = max(self._first, index)
        done = min(index, len(self._carries) - 1)  # the last is what the rest is computed from
        self._carries[:done] = [None] * done

    def release_after(self, index: int) -> None:
        """Forgets what the stages after this one take and send back: a walk backwards is done with them.

        Where gradients are read, `cotangents` of this stage must be asked for first.
        """
        self._carries[index + 1 :] = [None] * (len(self._carries) - index - 1)
        self._cotangents = {i: kept for i, kept in self._cotangents.items() if i <= index}


def differentiable(carry: PyTree) -> tuple[list[jax.Array], Callable[[list[jax.Array]], PyTree]]:
    """The floating leaves of a carry, and the function that puts others in their place."""
    leaves, structure = jax.tree.flatten(carry)
    floating = list(map(is_floating, leaves))

    def rebuild(replacements: list[jax.Array]) -> PyTree:
        new = iter(replacements)
        both = [next(new) if is_float else old for old, is_float in zip(leaves, floating, strict=True)]
        return jax.tree.unflatten(structure, both)

    return [leaf for leaf, is_float in zip(leaves, floating, strict=True) if is_float], rebuild


def is_floating(array: Any) -> bool:
    """Whether an array holds numbers that a gradient can be taken of."""
    return jnp.issubdtype(jnp.result_type(array), jnp.floating)


@partial(jax.jit, static_argnums=(0, 1))
def _observe(function: Any, names: frozenset[str], params: PyTree, carry: PyTree) -> dict[str, jax.Array]:
    _, activations = instrument(function, params, carry)(params, carry, patches=True)
    return {name: activations[name] for name in names}


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _observe_gradients(
    function: Any,
    activations: frozenset[str],
    gradients: frozenset[str],
    downwards: bool,
    params: PyTree,
    carry: PyTree,
    cotangent: list[jax.Array],
) -> tuple[Captured, list[jax.Array]]:
    observed = instrument(function, params, carry)
    floating, rebuild = differentiable(carry)
    probes = {name: probe for name, probe in observed.probes().items() if name in gradients}

    def forward(probes: dict[str, jax.Array], moving: list[jax.Array]) -> Any:
        out, seen = observed(params, rebuild(moving) if downwards else carry, probes=probes, patches=True)
        return differentiable(out)[0], {name: seen[name] for name in activations}

    out, pull, seen = jax.vjp(forward, probes, floating if downwards else [], has_aux=True)
    found, down = pull(cast_like(cotangent, out))
    return Captured(seen, found), down


@partial(jax.jit, static_argnums=0)
def _pull_back(function: Any, params: PyTree, carry: PyTree, cotangent: list[jax.Array]) -> list[jax.Array]:
    floating, rebuild = differentiable(carry)
    out, pull = jax.vjp(lambda f: differentiable(function(params, rebuild(f)))[0], floating)
    return pull(cast_like(cotangent, out))[0]


@partial(jax.jit, static_argnums=0)
def _loss_cotangent(loss: Any, loss_params: PyTree, outputs: PyTree, labels: PyTree) -> list[jax.Array]:
    floating, rebuild = differentiable(outputs)

    def summed(floating: list[jax.Array]) -> jax.Array:
        losses = loss(loss_params, rebuild(floating), labels)
        if jnp.ndim(losses) != 1:
            raise ValueError(
                f"a model's loss must return one value for each example, [batch], found shape {jnp.shape(losses)}: "
                "leave out the mean or sum over the batch"
            )
        return jnp.sum(losses)

    return jax.grad(summed)(floating)


def cast_like(cotangent: Sequence[jax.Array], outputs: Sequence[jax.Array]) -> list[jax.Array]:
    """Cotangents in the dtypes of what they are of."""
    return [c.astype(o.dtype) for c, o in zip(cotangent, outputs, strict=True)]


def _shapes(pytree: PyTree) -> Any:
    leaves, structure = jax.tree.flatten(pytree)
    return structure, tuple((tuple(jnp.shape(leaf)), jnp.result_type(leaf)) for leaf in leaves)


def _abstract(shapes: Any) -> PyTree:
    return shapes[0].unflatten([jax.ShapeDtypeStruct(*leaf) for leaf in shapes[1]])


@cache
def _table(function: Any, params: Any, carry: Any) -> SiteTable:
    return sites(function, _abstract(params), _abstract(carry))


@cache
def _residual(function: Any, params: Any, carry: Any) -> Residual | None:
    return residual(function, _abstract(params), _abstract(carry))
