"""A closed form of distillation: the change of the stream that makes the logits a teacher's, solved into kernels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from tvjax import tree
from tvjax.align import moments as mm
from tvjax.align.ridge import constant, ridge
from tvjax.align.rows import padding_mask, row_axes
from tvjax.arithmetic import apply
from tvjax.capture import instrument
from tvjax.capture.residual import Residual, last_kernel, residual
from tvjax.capture.views import apply_view, restore_view
from tvjax.compose.objectives import task_scores
from tvjax.finite import check_finite
from tvjax.stages import Batch, Model, Stage, check_model, local_params, owner_paths, run_stage
from tvjax.walk import cast_like, differentiable

PyTree = Any

ALL_CLASSES = 64  # products of all classes up to so many, conjugate gradients from there on
STEPS = 8  # of conjugate gradients
PROBES = 4  # random vectors that a trace is estimated with
_CLOSE = 1e-4  # share of the missing logits at which they end
_AT_ONCE = 8  # classes that are sent back together


def logit_correction(
    model: Model,
    teacher_logits: Float[Array | np.ndarray, "examples classes"],
    batches: Batch | Iterable[Batch],
    *,
    passes: int = 3,
    mu: float = 0.1,
    ridge: float = 1.0,
    start: PyTree = None,
    all_classes: int = ALL_CLASSES,
) -> PyTree:
    """The task vector that brings the logits of some examples to a teacher's: no labels, no steps of a trainer.

    Blocks are edited from the first to the last, each on the model as it is by then. With h the stream that leaves
    block j of L, ``J = d logits / d h`` of an example, logits l and those of the teacher l* (all centred over the
    classes), the stream is wanted at

        h + eta J^T (J J^T + mu tr(J J^T) / (C - 1) I)^-1 (l* - l),  eta = 1 / (L - j + 1)

    and the kernel that writes it last (`tvjax.capture.residual`) takes the ridge solution of that change on its own
    inputs; its bias, where it has one, the constant. A pass ends with the model's last kernel, a projection or a head
    of classes, at eta = 1. (A prototype of this library; distillation by a trainer, `tvjax.compose.distillation`, is
    what it is to be compared with.)

    Args:
      model: the student, with a loss of classes (`tvjax.tasks`).
      teacher_logits: of the examples in their order, `tvjax.compose.class_scores`.
      batches: the examples as the student sees them; labels are not read. Memory holds ``classes * tokens * width``
        numbers for each example of a batch.
      passes: over all blocks.
      mu: how far the change of the logits is damped, relative to the mean eigenvalue of ``J J^T``.
      ridge: the penalty, relative to the mean eigenvalue of the Gram matrix of the inputs.
      start: a task vector to begin at, such as a transported one at its best scale; None: zero.
      all_classes: from more classes than that on, ``(J J^T + ..)^-1`` is applied by conjugate gradients, which need a
        few products with J in the place of one for each class.

    Returns:
      A float32 task vector over the leaves that were edited, and those of the start.

    Raises:
      ValueError: a model of no classes, scores of other examples, or settings out of range.

    >>> from tvjax.stages import single_stage
    >>> from tvjax.tasks.losses import OWN_HEAD
    >>> model = single_stage(lambda p, x: {"logits": x @ p["w"]}, {"w": jnp.zeros((3, 2))}, loss=OWN_HEAD)
    >>> teacher = jnp.array([[1.0, -1.0], [-2.0, 2.0]])
    >>> tau = logit_correction(model, teacher, Batch(jnp.eye(2, 3)), passes=1, mu=0.0, ridge=0.0)
    >>> bool(jnp.allclose(jnp.eye(2, 3) @ tau["w"], teacher, atol=1e-5))
    True
    """
    check_model("model", model)
    if passes < 1 or mu < 0 or ridge < 0:
        raise ValueError(f"found passes {passes}, mu {mu} and ridge {ridge}, expected one pass at least, and no sign")
    found = [batches] if isinstance(batches, Batch) else list(batches)
    counts = [jax.tree.leaves(batch.inputs)[0].shape[0] for batch in found]
    if jnp.ndim(teacher_logits) != 2 or len(teacher_logits) != sum(counts) or not counts:
        raise ValueError(
            f"the teacher's logits have shape {list(jnp.shape(teacher_logits))}, expected [examples, classes] of "
            f"{sum(counts)} examples, in their order"
        )
    check_finite({"logits": teacher_logits}, "what the teacher says")
    parts = jnp.split(_centred(jnp.asarray(teacher_logits, jnp.float32)), np.cumsum(counts)[:-1].tolist())
    work = _Correction(model, found, parts, _Settings(mu, ridge, all_classes), {} if start is None else start)
    for _ in range(passes):
        work.run()
    return tree.nest({path: work.change(path) for path in sorted(work.edited)})


class _Settings(NamedTuple):
    mu: float
    ridge: float
    all_classes: int


class _Correction:
    """The model as it is by now, and what leads on."""

    def __init__(
        self, model: Model, batches: Sequence[Batch], teacher: Sequence[Array], settings: _Settings, start: PyTree
    ):
        self.model, self.batches, self.teacher, self.settings = model, batches, teacher, settings
        self.base = tree.flatten(model.params)
        self.edited = {
            path: jnp.asarray(leaf, jnp.float32)
            for path, leaf in tree.flatten(apply(self._wide(start), start)).items()
            if path in tree.flatten(start)
        }
        self.places = self._find()

    def _wide(self, start: PyTree) -> PyTree:
        """The parameters, those that are changed in float32."""
        wide = {path: jnp.asarray(self.base[path], jnp.float32) for path in tree.flatten(start) if path in self.base}
        return tree.replace(self.model.params, wide)

    def change(self, path: str) -> Array:
        """What a leaf has been changed by."""
        return self.edited[path] - jnp.asarray(self.base[path], jnp.float32)

    def params(self, stage: Stage) -> PyTree:
        """The parameters of a stage as they are by now."""
        return local_params(stage, tree.replace(self.model.params, self.edited))

    def _find(self) -> dict[int, tuple[float, bool]]:
        """The stages to edit, with the share of the way that each goes, and whether it is a block."""
        carry = self.batches[0].inputs
        blocks: list[int] = []
        ends: list[int] = []
        for index, stage in enumerate(self.model.stages):
            params = self.params(stage)
            shapes = _shapes(params), _shapes(carry)
            kernel = _place(stage.function, False, *shapes)
            if _place(stage.function, True, *shapes) is not None:
                blocks.append(index)
                ends = []
            elif kernel is not None and kernel.writers[-1].kernel.path not in dict(stage.vocabulary).values():
                ends.append(index)
            carry = jax.eval_shape(stage.function, params, carry)
        places = {index: (1 / (len(blocks) - j), True) for j, index in enumerate(blocks)}
        places |= {index: (1.0, False) for index in ends[-1:]}
        if not places:
            raise ValueError("the model has no kernel that writes a residual stream, and none at its end")
        return places

    def run(self) -> None:
        """One pass over all places."""
        carries = [batch.inputs for batch in self.batches]
        for index, stage in enumerate(self.model.stages):
            if index in self.places:
                self._edit(index, carries, *self.places[index])
            params = self.params(stage)
            carries = [run_stage(stage.function, params, carry) for carry in carries]

    def _edit(self, index: int, carries: Sequence[PyTree], share: float, is_block: bool) -> None:
        """Changes the kernel of one place."""
        stage = self.model.stages[index]
        params, paths = self.params(stage), owner_paths(stage, self.model.params)
        sums = None
        for carry, teacher in zip(carries, self.teacher, strict=True):
            place = _place(stage.function, is_block, _shapes(params), _shapes(carry))
            assert place is not None
            writer = place.writers[-1]
            rest = _Rest(self, index, place, params, carry)
            wanted = share * _wanted(rest, teacher, self.settings)
            inputs = _inputs(stage.function, writer.kernel.input, params, carry)
            axes = row_axes(writer.kernel)
            mask = padding_mask(stage, carry, axes)
            weights = jnp.ones(inputs.shape[0]) if mask is None else mask.reshape(-1).astype(jnp.float32)
            if weights.shape[0] != inputs.shape[0]:
                weights = jnp.ones(inputs.shape[0])
            wanted = wanted.reshape(inputs.shape[0], -1)
            sums = mm.init(wanted.shape[1], inputs.shape[1], gram=True) if sums is None else sums
            sums = mm.update(sums, wanted, inputs.astype(jnp.float32), weights)
        assert sums is not None
        leaves = tree.flatten(params)
        scale = writer.scale and jnp.asarray(apply_view(writer.scale.view, leaves[writer.scale.path]), jnp.float32)
        kernel, bias = _solved(sums, scale, self.settings.ridge, writer.bias is not None)
        for site, change in ((writer.kernel, kernel), (writer.bias, bias)):
            if site is not None:
                leaf = jnp.asarray(leaves[site.path], jnp.float32)
                self.edited[paths[site.path]] = leaf + restore_view(site.view, change, leaf.shape)


class _Rest:
    """What follows the stream of a stage, on one batch: products with the derivative of the logits."""

    def __init__(self, work: _Correction, index: int, place: Residual, params: PyTree, carry: PyTree):
        self.place, self.given = place, (params, carry)
        self.stream = run_stage(place.stream, params, carry)
        out = _resumed(place.resume, params, carry, self.stream)
        self.after = []
        for stage in work.model.stages[index + 1 :]:
            own = work.params(stage)
            self.after.append((stage.function, own, out))
            out = run_stage(stage.function, own, out)
        self.head = work.model.replace(params=None), out
        self.logits = _centred(_scored(*self.head))

    def pull(self, cotangents: Float[Array, "n batch classes"]) -> Array:
        """``J^T`` of several, ``[n, *stream]``."""
        found = _pull_scores(*self.head, _centred(cotangents))
        for function, params, carry in reversed(self.after):
            found = _pull(function, params, carry, found)
        return _pull_stream(self.place.resume, *self.given, self.stream, found)

    def push(self, tangent: Array) -> Float[Array, "batch classes"]:
        """``J`` of one."""
        moved = _push_stream(self.place.resume, *self.given, self.stream, tangent)
        for function, params, carry in self.after:
            moved = _push(function, params, carry, moved)
        return _centred(_push_scores(*self.head, moved))


def _wanted(rest: _Rest, teacher: Array, settings: _Settings) -> Array:
    """The change of the stream by which the logits become the teacher's."""
    missing = teacher - rest.logits
    classes = missing.shape[-1]
    if classes <= settings.all_classes:
        units = jnp.broadcast_to(jnp.eye(classes)[:, None], (classes, *missing.shape))
        return _by_all_classes(rest.pull(units), missing, settings.mu)
    noise = jax.random.rademacher(jax.random.key(0), (PROBES, *missing.shape), jnp.float32)
    back = rest.pull(noise)
    trace = jnp.sum(jnp.square(back.reshape(PROBES, len(missing), -1)), -1).mean(0)
    damping = (settings.mu * trace / (classes - 1))[:, None]

    def operate(x: Array) -> Array:
        return rest.push(rest.pull(x[None])[0]) + damping * x

    return rest.pull(_conjugate_gradients(operate, missing)[None])[0]


def _conjugate_gradients(operate: Any, wanted: Float[Array, "batch classes"]) -> Float[Array, "batch classes"]:
    """A few steps towards ``A x = wanted``, for each example by itself."""
    x, left = jnp.zeros_like(wanted), wanted
    direction, size = left, jnp.sum(left**2, -1, keepdims=True)
    enough = _CLOSE**2 * size  # what is left from here on is rounding, and no direction
    for _ in range(STEPS):
        moved = operate(direction)
        curvature = jnp.sum(direction * moved, -1, keepdims=True)
        step = jnp.where((curvature > 0) & (size > enough), size / jnp.where(curvature > 0, curvature, 1), 0)
        x, left = x + step * direction, left - step * moved
        new = jnp.sum(left**2, -1, keepdims=True)
        direction = left + jnp.where(size > 0, new / jnp.where(size > 0, size, 1), 0) * direction
        size = new
    return x


@jax.jit
def _by_all_classes(back: Array, missing: Float[Array, "batch classes"], mu: float) -> Array:
    """``J^T (J J^T + mu tr / (C - 1) I)^+ missing`` with J by rows, ``[classes, batch, ...]``."""
    classes, examples = back.shape[:2]
    rows = back.reshape(classes, examples, -1).astype(jnp.float32)
    square = jnp.einsum("ibn,jbn->bij", rows, rows, precision=lax.Precision.HIGHEST)
    damping = mu * jnp.trace(square, axis1=-2, axis2=-1) / max(classes - 1, 1)
    square = square + damping[:, None, None] * jnp.eye(classes)
    solution = jnp.einsum("bij,bj->bi", jnp.linalg.pinv(square, hermitian=True), missing, precision="highest")
    return jnp.einsum("bi,ibn->bn", solution, rows, precision="highest").reshape(back.shape[1:])


@partial(jax.jit, static_argnames="with_bias")
def _solved(sums: mm.Moments, scale: Array | None, penalty: float, with_bias: bool) -> tuple[Array, Array]:
    gram = mm.grams(sums, with_bias)[1]
    found = ridge(gram, mm.cross(sums, with_bias).T, penalty * jnp.trace(gram) / gram.shape[0], scale)
    change, inputs = mm.means(sums)
    return found.kernel, constant(found.kernel, inputs, change, scale, with_constant=with_bias)


def _centred(logits: Array) -> Array:
    return logits - jnp.mean(logits, -1, keepdims=True)


# -- one stage at a time, compiled once for each kind ---------------------------------------------------------------


def _shapes(pytree: PyTree) -> Any:
    leaves, structure = jax.tree.flatten(jax.tree.map(tree.leaf_type, pytree))
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


@cache
def _place(function: Any, is_block: bool, params: Any, carry: Any) -> Residual | None:
    sides = [structure.unflatten([jax.ShapeDtypeStruct(*x) for x in leaves]) for structure, leaves in (params, carry)]
    return (residual if is_block else last_kernel)(function, *sides)


@partial(jax.jit, static_argnums=(0, 1))
def _inputs(function: Any, name: str, params: PyTree, carry: PyTree) -> Array:
    return instrument(function, params, carry)(params, carry, outputs=False)[1][name]


@partial(jax.jit, static_argnums=0)
def _resumed(resume: Any, params: PyTree, carry: PyTree, stream: Array) -> PyTree:
    return resume(params, carry, stream)


@jax.jit
def _scored(head: Model, outputs: PyTree) -> Array:
    return task_scores(head, outputs).astype(jnp.float32)


def _scores_of(head: Model, outputs: PyTree) -> tuple[Any, list[Array]]:
    floating, rebuild = differentiable(outputs)
    return lambda leaves: [_scored(head, rebuild(leaves))], floating


def _stage_of(function: Any, params: PyTree, carry: PyTree) -> tuple[Any, list[Array]]:
    floating, rebuild = differentiable(carry)
    return lambda leaves: differentiable(function(params, rebuild(leaves)))[0], floating


def _several(function: Any, at: Any, cotangents: list[Array]) -> Any:
    """The transposed derivative at one place, of several cotangents."""
    out, pull = jax.vjp(function, at)
    return lax.map(lambda one: pull(cast_like(one, out))[0], cotangents, batch_size=_AT_ONCE)


@jax.jit
def _pull_scores(head: Model, outputs: PyTree, cotangents: Array) -> list[Array]:
    return _several(*_scores_of(head, outputs), [cotangents])


@partial(jax.jit, static_argnums=0)
def _pull(function: Any, params: PyTree, carry: PyTree, cotangents: list[Array]) -> list[Array]:
    return _several(*_stage_of(function, params, carry), cotangents)


@partial(jax.jit, static_argnums=0)
def _pull_stream(resume: Any, params: PyTree, carry: PyTree, stream: Array, cotangents: list[Array]) -> Array:
    return _several(lambda x: differentiable(resume(params, carry, x))[0], stream, cotangents)


@partial(jax.jit, static_argnums=0)
def _push_stream(resume: Any, params: PyTree, carry: PyTree, stream: Array, tangent: Array) -> list[Array]:
    tangent = tangent.astype(stream.dtype)
    return jax.jvp(lambda x: differentiable(resume(params, carry, x))[0], (stream,), (tangent,))[1]


@partial(jax.jit, static_argnums=0)
def _push(function: Any, params: PyTree, carry: PyTree, tangents: list[Array]) -> list[Array]:
    own, floating = _stage_of(function, params, carry)
    return jax.jvp(own, (floating,), (tangents,))[1]


@jax.jit
def _push_scores(head: Model, outputs: PyTree, tangents: list[Array]) -> Array:
    own, floating = _scores_of(head, outputs)
    return jax.jvp(own, (floating,), (tangents,))[1][0]
