"""The linearised model: the first-order Taylor expansion of a network in its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tvjax import tree
from tvjax.stages import Model, check_model

PyTree = Any


@partial(jax.tree_util.register_dataclass, data_fields=("params", "model"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Linearised:
    """``f_lin(x; theta) = f(x; theta_0) + J_theta f(x; theta_0) (theta - theta_0)``, used like a model; a pytree.

    (Ortiz-Jimenez et al., NeurIPS 2023, arXiv 2305.12827, equation 4.) One forward-mode pass gives both terms, so it
    costs about two forward passes and never holds the Jacobian.

    Attributes:
      params: theta.
      model: the network, with theta_0 as its parameters.
    """

    params: PyTree
    model: Model

    def __call__(self, inputs: PyTree) -> PyTree:
        """The outputs at `params`, linear in them."""

        def outputs(params: PyTree) -> PyTree:
            return self.model.replace(params=params)(inputs)

        changes = jax.tree.map(_change, self.params, self.model.params)
        values, tangents = jax.jvp(outputs, (self.model.params,), (changes,))
        return jax.tree.map(_moved, values, tangents)

    def replace(self, **changes: Any) -> Linearised:
        """A copy with other fields."""
        return dataclasses.replace(self, **changes)

    @property
    def loss(self) -> Callable[[PyTree, PyTree, PyTree], jax.Array]:
        """The loss of the network."""
        return self.model.loss

    @property
    def loss_params(self) -> PyTree:
        """The arrays of the loss."""
        return self.model.loss_params

    @property
    def has_loss(self) -> bool:
        """Whether a loss was given."""
        return self.model.has_loss


def linearise(model: Model) -> Linearised:
    """The first-order Taylor expansion of a model at its parameters.

    Every objective, and `tvjax.evaluate`, takes it in the model's place. The outputs that are linear are those of the
    last stage; what the loss does to them is not.

    Args:
      model: the network, with theta_0 as its parameters.

    Returns:
      The expansion, standing at theta_0.

    >>> from tvjax.stages import single_stage
    >>> cube = linearise(single_stage(lambda params, x: x * params["w"] ** 3, {"w": jnp.float32(2)}))
    >>> float(cube(jnp.float32(1))), float(cube.replace(params={"w": jnp.float32(3)})(jnp.float32(1)))
    (8.0, 20.0)
    """
    check_model("model", model)
    return Linearised(model.params, model)


def _change(theta: Any, theta_0: Any) -> Any:
    kind = tree.leaf_type(theta_0)
    if not jnp.issubdtype(kind.dtype, jnp.floating):
        return np.zeros(kind.shape, jax.dtypes.float0)
    wide = tree.wide_dtype(kind.dtype)
    return (jnp.asarray(theta, wide) - jnp.asarray(theta_0, wide)).astype(kind.dtype)


def _moved(value: Any, tangent: Any) -> Any:
    return value if tangent.dtype == jax.dtypes.float0 else value + tangent
