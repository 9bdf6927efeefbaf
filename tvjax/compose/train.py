"""Learning coefficients: a training loop that keeps everything on the device and resumes to the same result."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from tvjax import processes, tree
from tvjax.compose.coefficients import Coefficients, combine, init
from tvjax.compose.edited import Edited, computed
from tvjax.compose.objectives import Objective, check_objective, value
from tvjax.placement import automatic, devices, like
from tvjax.progress import Progress

PyTree = Any
Schedule = Callable[[Array], Array]
Optimiser = Callable[[Schedule], optax.GradientTransformation]
Score = Callable[[PyTree], float]
Stop = Callable[[Sequence[float]], bool]


class Store(Protocol):
    """Where training keeps its state to go on later: `tvjax.checkpoints.coefficients.TrainingStore` is one."""

    def load(self, like: PyTree) -> PyTree | None:
        """The newest state, in the structure of `like`; None where nothing was saved."""

    def save(self, step: int, state: PyTree) -> None:
        """Keeps a state; the steps grow."""


class Trained(NamedTuple):
    """What training arrived at.

    Attributes:
      trainable: what was trained, at the kept step: the `Coefficients` for `learn`.
      learning_rate: the learning rate that was kept.
      epochs: after how many epochs.
      score: of the kept step; None where there is no score.
      losses: ``[epochs, steps]``, of the kept learning rate up to the kept epoch.
      scores: ``[learning rates, epochs]``, in the order of rising rates; NaN where training had stopped.
    """

    trainable: PyTree
    learning_rate: float
    epochs: int
    score: float | None
    losses: np.ndarray
    scores: np.ndarray


def cosine(progress: Float[Array, ""]) -> Float[Array, ""]:
    """Factor of the learning rate, from 1 down to 0 over the training.

    >>> [round(float(cosine(jnp.float32(at))), 3) for at in (0, 0.5, 1)]
    [1.0, 0.5, 0.0]
    """
    return 0.5 * (1 + jnp.cos(jnp.pi * progress))


def constant(progress: Float[Array, ""]) -> Float[Array, ""]:
    """Factor 1 throughout."""
    return jnp.ones_like(progress)


def clipped_adamw(learning_rate: Schedule) -> optax.GradientTransformation:
    """AdamW with weight decay 0.1 after clipping the gradient to norm 1: the published optimiser of aTLAS."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, weight_decay=0.1))


def patience(epochs: int) -> Stop:
    """Stops when the best score is so many epochs old.

    >>> stop = patience(2)
    >>> stop([0.1, 0.3, 0.2]), stop([0.1, 0.3, 0.2, 0.3])
    (False, True)
    """
    if epochs < 1:
        raise ValueError(f"patience: found {epochs}, expected 1 epoch or more")

    def stop(scores: Sequence[float]) -> bool:
        return len(scores) - 1 - int(np.argmax(scores)) >= epochs

    return stop


@automatic(lambda *_, **__: ())
def learn(
    params: PyTree,
    taus: Sequence[PyTree],
    objective: Objective,
    *,
    key: Array,
    coefficients: Coefficients | None = None,
    **options: Any,
) -> Trained:
    """Trains coefficients of task vectors, and nothing else (aTLAS, arXiv 2407.02880).

    Few-shot learning is the default: AdamW with weight decay 0.1, gradients clipped at 1, learning rate 0.1 with a
    cosine, 10 epochs of batches of 128, the examples repeated so that an epoch has 10 batches at least. Published for
    addition: learning rate 1e-3, 20 epochs, on validation data; for negation: 2e-3 to 1e-2, constant, 2 to 20 epochs;
    without labels: 1e-3.

    Args:
      params: theta_0.
      taus: task vectors, in any floating dtype.
      objective: of `few_shot`, `addition`, `negation`, `entropy`, `fix_match` or `of_loss`.
      key: a random key, for the order of the examples and for augmentation.
      coefficients: where to start; one for each leaf of each vector, all 0, by default.
      **options: those of `train`.

    Returns:
      The `Coefficients` and how they were found; `combine` gives the parameters.

    Raises:
      ValueError: task vectors that do not fit, or as `train`.

    >>> import optax
    >>> from tvjax.compose import few_shot
    >>> from tvjax.stages import Batch, single_stage
    >>> model = single_stage(lambda p, x: x @ p["w"], {"w": jnp.zeros((2, 2))}, loss=lambda _, logits, labels:
    ...     optax.softmax_cross_entropy_with_integer_labels(logits, labels))
    >>> objective = few_shot(model, Batch(jnp.eye(2), jnp.arange(2)))
    >>> found = learn(model.params, [{"w": jnp.eye(2)}], objective, key=jax.random.key(0), batch_size=2)
    >>> bool(found.trainable.values[0, 0, 0] > 0.5)
    True
    """
    tree.check_whole(params)
    start = init(taus) if coefficients is None else coefficients
    jax.eval_shape(combine, params, list(taus), start)
    return train(_edited, (params, list(taus)), start, objective, key=key, **options)


@automatic(lambda *_, **__: ())
def train(
    assemble: Callable[[PyTree, PyTree], PyTree],
    fixed: PyTree,
    trainable: PyTree,
    objective: Objective,
    *,
    key: Array,
    learning_rates: Sequence[float] = (0.1,),
    schedule: Schedule = cosine,
    optimiser: Optimiser = clipped_adamw,
    epochs: int = 10,
    batch_size: int | None = 128,
    batches_per_epoch: int | None = None,
    micro_batches: int = 1,
    score: Score | None = None,
    stop: Stop | None = None,
    progress: Progress | None = None,
    store: Store | None = None,
) -> Trained:
    """Trains whatever the parameters of a model are assembled from.

    An epoch is one compiled scan over examples that stay on the device: the examples of each term in random order,
    pass after pass, as many as its batches take. The learning rate and the number of epochs are those of the greatest
    score; ties go to the smaller learning rate, then to fewer epochs. Another learning rate compiles nothing.

    Examples that lie over a mesh (a `NamedSharding` of their first axis) are trained on in batches that lie over it
    too; what is trained lies as it was given, that on one device on all of that mesh.

    Args:
      assemble: ``(fixed, trainable) -> params``, or an `Edited`; a module-level function.
      fixed: arrays that `assemble` reads.
      trainable: what is trained, a pytree of floating arrays.
      objective: what for.
      key: a random key, for the order of the examples and for augmentation.
      learning_rates: those to try.
      schedule: factor of the learning rate by the share of the training that is done, from 0 to 1.
      optimiser: from a learning rate by step to an optax transformation; the same object compiles once.
      epochs: how many, at most.
      batch_size: examples of each step, for each term its share of them; None: all examples at every step.
      batches_per_epoch: by default one pass over the examples of the largest term, and 10 at least.
      micro_batches: pieces that every batch is cut into, one after another, to save memory; they divide its size.
      score: of parameters, the greater the better: the accuracy on validation data. Asked after every epoch.
      stop: from the scores so far to whether to stop, such as `patience`; the next learning rate then starts.
      progress: called with (epochs done, epochs in all, what was done) after each epoch.
      store: keeps the state after each epoch. A later call with the same arguments goes on from there, and returns
        what it would have returned without the interruption, to the bit.

    Returns:
      What was trained and how it was found.

    Raises:
      ValueError: counts out of range, terms of unequal number of examples, several learning rates without a score to
        choose by, a rule to stop without one, pieces that do not divide a batch, or a store of another training.
    """
    check_objective(objective)
    rates = sorted(float(rate) for rate in learning_rates)
    settings = rates, epochs, batch_size, batches_per_epoch, micro_batches
    facts = {"parameters": fixed, "what is trained": trainable, "objective": objective, "key": key}
    processes.check_same("train", {**facts, "settings": settings})
    _check_counts(rates, epochs, batches_per_epoch, micro_batches, score, stop)
    sizes, steps = _sizes(objective, batch_size, batches_per_epoch, micro_batches)
    placements = tuple(_placements(term.examples) for term in objective)
    objective, fixed = jax.tree.map(jnp.asarray, (objective, fixed))
    trainable = _on_mesh(jax.tree.map(jnp.asarray, trainable), placements)
    plan = _Plan(assemble, optimiser, schedule, epochs, steps, sizes, micro_batches, placements)
    fresh = _transformation(plan, jnp.float32(0)).init(trainable)
    shape = (len(rates), epochs)
    identity = _identity(rates, plan, key, trainable, objective)
    state = _State(
        *(trainable, fresh, trainable, np.zeros(2, np.int32), np.full(2, -1, np.int32), np.array(identity, np.int64)),
        *(np.full((*shape, steps), np.nan, np.float32), np.full(shape, np.nan, np.float64)),
    )
    saved = None if store is None else store.load(state)
    if saved is not None:
        if int(saved.identity) != identity:
            raise ValueError(
                "the store holds the state of a training with other settings, data shapes or key: give a new folder"
            )
        state = saved
    while state.at[0] < len(rates):
        number, epoch = (int(index) for index in state.at)
        if epoch == 0:
            state = state._replace(trainable=trainable, optimiser=fresh)
        trained, optimiser_state, losses = _epoch(
            plan, fixed, objective, state.trainable, state.optimiser, jnp.float32(rates[number]), jnp.int32(epoch), key
        )
        trained, optimiser_state = jax.tree.map(like, (trained, optimiser_state), (state.trainable, state.optimiser))
        losses = processes.fetch(losses)
        if not np.isfinite(losses).all():
            raise ValueError(f"loss: not finite in epoch {epoch + 1} of learning rate {rates[number]:g}: lower it")
        found = np.nan if score is None else float(score(_assembled(assemble, fixed, trained)))
        if score is not None and math.isnan(found):
            raise ValueError(f"score: found NaN after epoch {epoch + 1} of learning rate {rates[number]:g}: lower it")
        state = state._replace(
            trainable=trained,
            optimiser=optimiser_state,
            losses=_written(state.losses, (number, epoch), losses),
            scores=_written(state.scores, (number, epoch), found),
        )
        # Without a score the last epoch is kept, with one the first of the greatest score.
        if score is None or state.best_at[0] < 0 or found > state.scores[tuple(state.best_at)]:
            state = state._replace(best=trained, best_at=state.at)
        over = epoch + 1 == epochs or (stop is not None and stop(state.scores[number, : epoch + 1].tolist()))
        state = state._replace(at=np.array([number + 1, 0] if over else [number, epoch + 1], np.int32))
        done = number * epochs + epoch + 1
        if store is not None:
            store.save(done, state)
        if progress is not None:
            text = f"learning rate {rates[number]:g}, epoch {epoch + 1}: loss {np.mean(losses):.4f}"
            progress(done, len(rates) * epochs, text)
    number, epoch = (int(index) for index in state.best_at)
    return Trained(
        state.best,
        rates[number],
        epoch + 1,
        None if score is None else float(state.scores[number, epoch]),
        np.asarray(state.losses[number, : epoch + 1]),
        np.asarray(state.scores),
    )


class _Plan(NamedTuple):
    """What an epoch is compiled for."""

    assemble: Callable[[PyTree, PyTree], PyTree]
    optimiser: Optimiser
    schedule: Schedule
    epochs: int
    steps: int
    sizes: tuple[int | None, ...]
    micro_batches: int
    placements: tuple[tuple[NamedSharding | None, ...], ...]


class _State(NamedTuple):
    """All that changes while training; a pytree of arrays of fixed shapes, so that it can be stored."""

    trainable: PyTree
    optimiser: PyTree
    best: PyTree
    at: np.ndarray  # numbers of the learning rate and the epoch to come
    best_at: np.ndarray
    identity: np.ndarray
    losses: np.ndarray
    scores: np.ndarray


def _edited(fixed: tuple[PyTree, list[PyTree]], coefficients: Coefficients) -> Edited:
    return Edited(*fixed, coefficients)


@partial(jax.jit, static_argnums=0)
def _epoch(
    plan: _Plan,
    fixed: PyTree,
    objective: Objective,
    trainable: PyTree,
    optimiser_state: PyTree,
    rate: Float[Array, ""],
    epoch: Int[Array, ""],
    key: Array,
) -> tuple[PyTree, PyTree, Float[Array, " steps"]]:
    transformation = _transformation(plan, rate)
    order_key, noise_key = jax.random.split(jax.random.fold_in(key, epoch))
    order_keys = jax.random.split(order_key, len(objective))
    orders = [
        None if size is None else _order(term_key, term.count, plan.steps, size)
        for term, size, term_key in zip(objective, plan.sizes, order_keys, strict=True)
    ]

    def step(carry: PyTree, at: PyTree) -> tuple[PyTree, Float[Array, ""]]:
        trainable, optimiser_state = carry
        chosen, step_key = at
        batches = [
            term.examples if rows is None else _taken(term.examples, rows, placement)
            for term, rows, placement in zip(objective, chosen, plan.placements, strict=True)
        ]
        loss, gradient = _gradient(plan, fixed, objective, trainable, batches, step_key)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes floats with its integer count of steps
            updates, optimiser_state = transformation.update(gradient, optimiser_state, trainable)
            trainable = optax.apply_updates(trainable, updates)
        return (trainable, optimiser_state), loss

    keys = jax.random.split(noise_key, plan.steps)
    (trainable, optimiser_state), losses = jax.lax.scan(step, (trainable, optimiser_state), (orders, keys))
    return trainable, optimiser_state, losses


def _gradient(
    plan: _Plan, fixed: PyTree, objective: Objective, trainable: PyTree, batches: list[PyTree], key: Array
) -> tuple[Float[Array, ""], PyTree]:
    """The objective on one batch of each term, and its gradient; piece by piece where the plan says so."""

    def loss(trainable: PyTree, batches: list[PyTree], key: Array) -> Float[Array, ""]:
        return value(objective, plan.assemble(fixed, trainable), batches, key)

    if plan.micro_batches == 1:
        return jax.value_and_grad(loss)(trainable, batches, key)

    def add(total: PyTree, piece: PyTree) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(trainable, *piece)), None

    pieces = [jax.tree.map(lambda leaf: leaf.reshape(plan.micro_batches, -1, *leaf.shape[1:]), b) for b in batches]
    nothing = jnp.float32(0), jax.tree.map(jnp.zeros_like, trainable)
    total, _ = jax.lax.scan(add, nothing, (pieces, jax.random.split(key, plan.micro_batches)))
    return jax.tree.map(lambda leaf: leaf / plan.micro_batches, total)


def _order(key: Array, count: int, steps: int, size: int) -> Int[Array, "steps size"]:
    """Indices of the examples of each step: the examples in random order, pass after pass."""
    passes = math.ceil(steps * size / count)
    orders = jax.vmap(lambda k: jax.random.permutation(k, count))(jax.random.split(key, passes))
    return orders.reshape(-1)[: steps * size].reshape(steps, size)


def _taken(examples: PyTree, rows: Int[Array, " size"], placements: tuple[NamedSharding | None, ...]) -> PyTree:
    leaves, structure = jax.tree.flatten(examples)
    taken = [
        leaf[rows] if where is None else jax.lax.with_sharding_constraint(leaf[rows], where)
        for leaf, where in zip(leaves, placements, strict=True)
    ]
    return jax.tree.unflatten(structure, taken)


@partial(jax.jit, static_argnums=0)
def _assembled(assemble: Callable[[PyTree, PyTree], PyTree], fixed: PyTree, trainable: PyTree) -> PyTree:
    return computed(assemble(fixed, trainable))


def _transformation(plan: _Plan, rate: Float[Array, ""]) -> optax.GradientTransformation:
    total = plan.epochs * plan.steps
    return plan.optimiser(lambda count: rate * plan.schedule(jnp.asarray(count).astype(jnp.float32) / total))


def _written(array: np.ndarray, index: tuple[int, int], entry: Any) -> np.ndarray:
    copy = np.array(array)
    copy[index] = entry
    return copy


def _check_counts(
    rates: Sequence[float],
    epochs: int,
    batches_per_epoch: int | None,
    micro_batches: int,
    score: Score | None,
    stop: Stop | None,
) -> None:
    if not rates or epochs < 1 or micro_batches < 1 or (batches_per_epoch is not None and batches_per_epoch < 1):
        raise ValueError(
            f"found learning_rates {rates}, epochs {epochs}, batches_per_epoch {batches_per_epoch} and micro_batches "
            f"{micro_batches}, expected one of each at least"
        )
    if not all(0 < rate < math.inf for rate in rates):
        raise ValueError(f"learning_rates: found {rates}, expected positive numbers")
    if score is None and (len(rates) > 1 or stop is not None):
        raise ValueError(
            f"found {len(rates)} learning rates{' and a rule to stop' if stop else ''} but no score, expected one to "
            "choose by: score=lambda params: accuracy(model.replace(params=params), validation).fraction"
        )


def _sizes(
    objective: Objective, batch_size: int | None, batches_per_epoch: int | None, micro_batches: int
) -> tuple[tuple[int | None, ...], int]:
    """Examples of each term in a batch (None: all of them), and batches in an epoch."""
    for term in objective:
        counts = {np.shape(leaf)[0] if np.ndim(leaf) else 0 for leaf in jax.tree.leaves(term.examples)}
        if len(counts) != 1 or 0 in counts:
            raise ValueError(f"examples: found leading axes {sorted(counts)}, expected one number of examples, not 0")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: found {batch_size}, expected 1 or more, or None for all examples")
    sizes = tuple(None if batch_size is None else max(1, round(batch_size * term.share)) for term in objective)
    for term, size in zip(objective, sizes, strict=True):
        if (size or term.count) % micro_batches:
            raise ValueError(
                f"micro_batches: {micro_batches} pieces do not divide a batch of {size or term.count} examples: choose "
                "another batch_size"
            )
    passes = [math.ceil(term.count / (size or term.count)) for term, size in zip(objective, sizes, strict=True)]
    return sizes, batches_per_epoch or max(10, *passes)


def _placements(examples: PyTree) -> tuple[NamedSharding | None, ...]:
    """Where a batch goes: over the mesh that the examples lie over."""

    def placement(leaf: Any) -> NamedSharding | None:
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding) or not sharding.spec or sharding.spec[0] is None:
            return None
        return NamedSharding(sharding.mesh, sharding.spec)

    return tuple(placement(leaf) for leaf in jax.tree.leaves(examples))


def _on_mesh(trainable: PyTree, placements: tuple[tuple[NamedSharding | None, ...], ...]) -> PyTree:
    """What lies on one device goes to all of the mesh of the examples, so that the first epoch compiles for all."""
    meshes = {sharding.mesh for term in placements for sharding in term if sharding is not None}
    if len(meshes) != 1:
        return trainable
    everywhere = NamedSharding(meshes.pop(), PartitionSpec())
    return jax.tree.map(lambda leaf: leaf if devices(leaf) > 1 else jax.device_put(leaf, everywhere), trainable)


def _identity(rates: list[float], plan: _Plan, key: Array, trainable: PyTree, objective: Objective) -> int:
    """A number that two trainings share only if they have the same settings, key and shapes."""
    words = jax.random.key_data(key)
    shapes = [[(leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(t)] for t in (trainable, objective)]
    weights = [(term.weight, term.share) for term in objective]
    settings = rates, plan.epochs, plan.steps, plan.sizes, plan.micro_batches, np.asarray(words).tolist()
    return zlib.crc32(repr((settings, shapes, weights)).encode())
