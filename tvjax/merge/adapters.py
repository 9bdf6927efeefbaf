"""Low-rank adapters (LoRA, Hu et al., ICLR 2022, arXiv 2106.09685): merged by their products, never by their factors.

An adapter changes a kernel by ``scale * A B``, ``A [in, r]``, ``B [r, out]``. The factors are no coordinates that two
adapters share (``A M`` and ``M^-1 B`` are the same adapter), so only the products can be added. A sum of products is a
product of longer factors, so the merged adapter stays low-rank, and is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tvjax import tree
from tvjax.align.products import product
from tvjax.factors import LowRank, triplets
from tvjax.finite import check_finite
from tvjax.merge.base import PyTree
from tvjax.merge.settings import Settings, resolve_each


class Adapter(NamedTuple):
    """The low-rank change ``scale * a @ b`` of one kernel.

    Attributes:
      a: ``[in, r]``, in Flax orientation (PEFT's ``lora_A`` transposed).
      b: ``[r, out]`` (PEFT's ``lora_B`` transposed).
      scale: ``alpha / r``.
    """

    a: Float[Array, "inputs rank"]
    b: Float[Array, "rank outputs"]
    scale: float | Float[Array, ""] = 1.0


Adapters = Mapping[str, Adapter]


def merge_adapters(
    adapters: Sequence[Adapters],
    *,
    weights: Settings = 1.0,
    rank: int | None = None,
) -> dict[str, Adapter]:
    """``sum_i w_i s_i A_i B_i`` as adapters: the factors side by side, compressed to a rank if one is given.

    Exact without a rank: ``A = [w_1 s_1 A_1 .. w_T s_T A_T]``, ``B = [B_1; ..; B_T]``, of the sum of the ranks. With a
    rank it is the best approximation of that rank (`compress`).

    Args:
      adapters: for each task the adapters by the path of their kernel. An adapter that one task lacks is no change.
      weights: of the tasks; a number, by path pattern or by depth, or a list of these.
      rank: of the result, at most; None: the sum of the ranks.

    Returns:
      Adapters of scale 1 by path, float32.

    Raises:
      ValueError: factors that do not chain, or kernels that differ in shape between the tasks.

    >>> one = {"up/kernel": Adapter(jnp.array([[1.0], [0.0]]), jnp.array([[2.0, 0.0]]), 0.5)}
    >>> two = {"up/kernel": Adapter(jnp.array([[0.0], [1.0]]), jnp.array([[0.0, 3.0]]))}
    >>> merged = merge_adapters([one, two])
    >>> merged["up/kernel"].a.shape, to_task_vector(merged)["up"]["kernel"].tolist()
    ((2, 2), [[1.0, 0.0], [0.0, 3.0]])
    """
    shapes = check_adapters(adapters)
    numbers = resolve_each(weights, list(shapes), len(adapters), "weights")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be 1 or more, found {rank}")
    merged = {}
    for path in shapes:
        present = [i for i, each in enumerate(adapters) if path in each]
        joined = _join([adapters[i][path] for i in present], numbers[path][present])
        merged[path] = joined if rank is None else compress(joined, rank)
    return merged


def compress(adapter: Adapter, rank: int) -> Adapter:
    """The best approximation of an adapter of at most a rank, without forming its product.

    ``A B = U S V^T`` from the factors alone (`tvjax.factors.triplets`): ``(U_k sqrt(S_k)) (sqrt(S_k) V_k^T)``.

    Args:
      adapter: of any rank.
      rank: of the result.

    Returns:
      An adapter of scale 1, of rank ``min(rank, r, in, out)``, float32.

    >>> tall = Adapter(jnp.eye(3, 2), jnp.array([[5.0, 0.0], [0.0, 1.0]]))
    >>> small = compress(tall, 1)
    >>> small.a.shape, jnp.round(small.a @ small.b, 4).tolist()
    ((3, 1), [[5.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    """
    return _compress(_wide(adapter), min(rank, adapter.a.shape[1], adapter.a.shape[0], adapter.b.shape[1]))


def to_task_vector(adapters: Adapters, like: PyTree = None, *, low_rank: bool = False) -> PyTree:
    """The products ``scale * A B`` as a task vector of nested dicts, for any merge of `tvjax.merge`.

    Args:
      adapters: by the path of their kernel.
      like: parameters; the products get the shapes of their kernels (a kernel ``[width, heads, head]`` has adapters of
        ``[width, heads * head]``). None: matrices.
      low_rank: leave each product as its two factors (`tvjax.LowRank`), the scale in the second.

    Returns:
      A task vector that covers these kernels only, float32.

    Raises:
      ValueError: factors that do not chain, or that do not fit their kernel.

    >>> to_task_vector({"up/kernel": Adapter(jnp.ones((2, 1)), jnp.ones((1, 2)), 2.0)})
    {'up': {'kernel': Array([[2., 2.], [2., 2.]], dtype=float32)}}
    """
    shapes: dict[str, tuple[int, ...]] = check_adapters([adapters])
    if like is not None:
        leaves = {path: tuple(jnp.shape(leaf)) for path, leaf in tree.flatten(like).items()}
        problems = [
            f"{path}: adapter of {shapes[path]}, kernel {leaves.get(path, 'missing')}"
            for path in shapes
            if not _fits(shapes[path], leaves.get(path, ()))
        ]
        if problems:
            raise ValueError(
                f"adapters must fit the kernels of the parameters, found\n{tree.list_some(problems)}\n"
                "rename the paths of the adapters to those of the parameters"
            )
        shapes = {path: leaves[path] for path in shapes}
    if low_rank:
        return tree.nest({path: _factors(adapter, shapes[path]) for path, adapter in adapters.items()})
    return tree.nest({path: _product(_wide(adapter)).reshape(shapes[path]) for path, adapter in adapters.items()})


def check_adapters(adapters: Sequence[Adapters]) -> dict[str, tuple[int, ...]]:
    """Shapes ``(in, out)`` of the kernels by path.

    Raises:
      ValueError: no adapters, factors or tasks that do not fit, or values that are not finite.
    """
    if not isinstance(adapters, Sequence) or not adapters:
        raise ValueError("expected a list of one or more mappings from paths to adapters")
    shapes: dict[str, tuple[int, ...]] = {}
    problems = []
    for task, each in enumerate(adapters):
        for path, adapter in each.items():
            a, b = tuple(jnp.shape(adapter.a)), tuple(jnp.shape(adapter.b))
            if len(a) != 2 or len(b) != 2 or a[1] != b[0] or jnp.shape(adapter.scale) != ():
                problems.append(
                    f"{path} of task {task}: a {a}, b {b}, scale {jnp.shape(adapter.scale)}; "
                    "expected [in, r], [r, out] and a number"
                )
            elif shapes.setdefault(path, (a[0], b[1])) != (a[0], b[1]):
                problems.append(f"{path} of task {task}: a kernel of {(a[0], b[1])}, another task has {shapes[path]}")
    if problems:
        raise ValueError(f"{len(problems)} adapters do not fit:\n{tree.list_some(problems)}")
    if not shapes:
        raise ValueError("the mappings hold no adapters")
    for task, each in enumerate(adapters):
        check_finite(dict(each), f"the set of adapters of task {task}")
    return shapes


def _factors(adapter: Adapter, shape: tuple[int, ...]) -> LowRank:
    a, b, scale = _wide(adapter)
    return LowRank(a, scale * b, shape)


@jax.jit
def _wide(adapter: Adapter) -> Adapter:
    return Adapter(*(jnp.asarray(part, jnp.float32) for part in adapter))


@jax.jit
def _product(adapter: Adapter) -> Float[Array, "inputs outputs"]:
    return adapter.scale * product(adapter.a, adapter.b)


@jax.jit
def _join(parts: Sequence[Adapter], weights: Float[Array, " tasks"]) -> Adapter:
    parts = [_wide(part) for part in parts]
    a = jnp.concatenate([weight * part.scale * part.a for weight, part in zip(weights, parts, strict=True)], axis=1)
    return Adapter(a, jnp.concatenate([part.b for part in parts], axis=0), jnp.float32(1))


def _compress(adapter: Adapter, rank: int) -> Adapter:
    left, values, right = triplets(adapter.a, adapter.scale * adapter.b)
    root = jnp.sqrt(values[:rank])
    return Adapter(left[:, :rank] * root, root[:, None] * right[:rank], jnp.float32(1))


def _fits(shape: tuple[int, ...], kernel: tuple[int, ...]) -> bool:
    """Whether a kernel is a matrix of this shape once its leading axes are one and its trailing axes another."""
    return any((_size(kernel[:cut]), _size(kernel[cut:])) == shape for cut in range(1, len(kernel)))


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
