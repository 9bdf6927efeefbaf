"""The gradient identity: the library's own proof that it saw every use of a parameter rightly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tvjax import tree
from tvjax.capture.finder import sites
from tvjax.capture.probe import Captured, capture_gradients
from tvjax.capture.sites import Site
from tvjax.capture.views import transpose_view

PyTree = Any


def site_gradient(site: Site, captured: Captured) -> jax.Array:
    """``x^T g`` of a site: ``[*layers, d_in, d_out]`` for a kernel, ``[*layers, d_out]`` for a vector; float32."""
    g = captured.gradient(site).astype(jnp.float32)
    x = captured.input(site)
    if x is None:
        return g.sum(-2)
    x = x.astype(jnp.float32)
    if site.kind == "scale":
        return (x * g).sum(-2)
    return jnp.einsum("...ni,...no->...io", x, g, precision=jax.lax.Precision.HIGHEST)


def gradient_from_sites(loss: Callable[..., Any], params: PyTree, *args: Any) -> dict[str, jax.Array]:
    """The gradient of every leaf all of whose uses are sites, from x and g alone, by path.

    ``grad(leaf) = sum over sites of view^T(x^T g)``

    >>> loss = lambda p, x: (x @ p["kernel"]).sum()
    >>> gradient_from_sites(loss, {"kernel": jnp.ones((3, 2))}, jnp.ones((5, 3)))["kernel"][0]
    Array([5., 5.], dtype=float32)
    """
    table = sites(loss, params, *args)
    _, captured = capture_gradients(loss, params, *args)
    leaves = tree.flatten(params)
    total: dict[str, jax.Array] = {}
    for site in table.sites:
        if site.path in table.unclassified:
            continue
        if site.stopped:
            total.setdefault(site.path, jnp.zeros(leaves[site.path].shape, jnp.float32))
            continue
        part = transpose_view(site.view, site_gradient(site, captured), leaves[site.path].shape)
        total[site.path] = total[site.path] + part if site.path in total else part
    return total


def check_gradient_identity(
    loss: Callable[..., Any], params: PyTree, *args: Any, tolerance: float | None = None
) -> None:
    """Raises if the gradients that the sites give differ from those of `jax.grad`.

    Args:
      loss: scalar ``loss(params, *args)``.
      params: pytree of parameters.
      *args: further arguments.
      tolerance: largest error relative to the leaf's largest gradient entry (or to a hundredth of the largest of all
        leaves where that is more: a gradient can be nothing but rounding); by default 200 units in the last place of
        the coarsest dtype at the function's sites, three square roots of it for 16-bit floats.

    Raises:
      ValueError: naming the leaf with the largest error, the error and the tolerance; or no leaf has a rule for all
        its uses, so that nothing was compared.
    """

    @jax.jit
    def compared(params: PyTree, *args: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
        found = gradient_from_sites(loss, params, *args)
        exact = tree.flatten(jax.grad(loss, allow_int=True)(params, *args))
        return {path: _size_and_error(gradient, exact[path]) for path, gradient in found.items()}

    sizes = {path: (float(size), float(error)) for path, (size, error) in compared(params, *args).items()}
    if not sizes:
        raise ValueError(
            "the gradient identity compared nothing: no leaf is read by operations that have a rule only\n"
            f"{sites(loss, params, *args)}"
        )
    scale = max(size for size, _ in sizes.values())
    if tolerance is None:
        _, captured = jax.eval_shape(lambda p, *a: capture_gradients(loss, p, *a), params, *args)
        leaves = tree.flatten(params)
        arrays = [*captured.activations.values(), *captured.gradients.values(), *(leaves[path] for path in sizes)]
        eps = max((float(jnp.finfo(jnp.result_type(a)).eps) for a in arrays), default=0.0)
        tolerance = 200 * eps if eps < 1e-4 else 3 * float(np.sqrt(eps))
    for path, (size, error) in sizes.items():
        if not error <= tolerance * max(size, 1e-2 * scale):
            raise ValueError(
                f"the gradient identity fails at {path!r}: sites give a gradient that is off by {error:.3g} where its "
                f"largest entry is {size:.3g} (tolerance {tolerance:.1g}): a use of this parameter was not seen"
            )


def _size_and_error(found: jax.Array, exact: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest entry of the gradient of `jax.grad`, and the largest error of the other."""

    def largest(array: jax.Array) -> jax.Array:
        return jnp.max(jnp.abs(array), initial=0.0)

    exact = exact.astype(jnp.float32)
    return largest(exact), largest(found - exact)
