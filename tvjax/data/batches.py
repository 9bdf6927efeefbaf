"""Batches of arrays, and the choice of a few labelled examples (random, herding, k-medoids)."""

from __future__ import annotations

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from tvjax.stages import Batch, PyTree


def as_batch(inputs: PyTree, labels: ArrayLike | None = None, classes: int | None = None) -> Batch:
    """One batch of all examples, checked.

    Args:
      inputs: pytree of arrays, the example axis first.
      labels: class of each example, integers ``[n]``; None where there are none.
      classes: number of classes; labels must lie below it.

    Returns:
      The inputs as given, the labels as int32.

    Raises:
      ValueError: for no examples, leaves of unequal lengths, labels that are no integers or lie out of range.

    >>> as_batch({"pixels": np.zeros((3, 4, 4, 3))}, [0, 2, 1], classes=3).labels
    array([0, 2, 1], dtype=int32)
    """
    lengths = {np.shape(leaf)[0] if np.ndim(leaf) else None for leaf in jax.tree.leaves(inputs)}
    if len(lengths) != 1 or None in lengths:
        raise ValueError(f"inputs: found leading axes {sorted(map(str, lengths))}, expected one number of examples")
    (count,) = lengths
    if count == 0:
        raise ValueError("inputs: there are no examples (the leading axis is 0): give at least one")
    if labels is None:
        return Batch(inputs)
    labels = np.asarray(labels)
    if labels.shape != (count,):
        raise ValueError(f"labels: found shape {labels.shape}, expected ({count},), one for each example")
    return Batch(inputs, _checked(labels, classes))


def split(batch: Batch, size: int) -> list[Batch]:
    """Batches of at most `size` examples, in order; the last holds what is left.

    >>> [len(part.labels) for part in split(as_batch(np.zeros((5, 2)), np.zeros(5, int)), 2)]
    [2, 2, 1]
    """
    if size < 1:
        raise ValueError(f"size: found {size}, expected at least 1 example in a batch")
    count = len(jax.tree.leaves(batch.inputs)[0])
    return [take(batch, slice(start, start + size)) for start in range(0, count, size)]


def take(batch: Batch, indices: ArrayLike | slice) -> Batch:
    """The examples of a batch at these indices.

    >>> take(as_batch(np.arange(4), [3, 2, 1, 0]), [2, 0]).labels
    array([1, 3], dtype=int32)
    """
    index = indices if isinstance(indices, slice) else np.asarray(indices)
    return Batch(*jax.tree.map(lambda leaf: leaf[index], tuple(batch)))


def few_shot(labels: ArrayLike, per_class: int, key: Array) -> np.ndarray:
    """Indices of examples drawn at random, `per_class` of each class that occurs, class after class.

    Args:
      labels: class of each example, integers ``[n]``.
      per_class: examples of each class.
      key: a random key.

    Returns:
      Indices ``[classes * per_class]``.

    Raises:
      ValueError: where a class has fewer examples.

    >>> labels = np.array([0, 1, 0, 1, 1, 0])
    >>> labels[few_shot(labels, 2, jax.random.key(0))].tolist()
    [0, 0, 1, 1]
    """
    groups = _groups(labels, per_class)
    chosen = [
        group[np.asarray(jax.random.choice(class_key, len(group), (per_class,), replace=False))]
        for group, class_key in zip(groups, jax.random.split(key, len(groups)), strict=True)
    ]
    return np.concatenate(chosen)


def herding(features: Float[ArrayLike, "n d"], labels: Int[ArrayLike, " n"], per_class: int) -> np.ndarray:
    """Indices of the examples whose mean features follow their class's mean best, picked greedily (Welling 2009).

    Args:
      features: features of each example.
      labels: class of each example.
      per_class: examples of each class.

    Returns:
      Indices ``[classes * per_class]``, class after class, in the order picked.

    >>> herding(np.array([[0.0], [1.0], [5.0]]), np.zeros(3, int), 1).tolist()
    [1]
    """
    features = _features(features, labels)
    chosen = []
    for group in _groups(labels, per_class):
        own = features[group]
        mean, total = own.mean(0), np.zeros(own.shape[1])
        free = np.ones(len(group), bool)
        for count in range(1, per_class + 1):
            distance = np.linalg.norm((total + own) / count - mean, axis=1)
            pick = int(np.where(free, distance, np.inf).argmin())
            free[pick] = False
            total += own[pick]
            chosen.append(group[pick])
    return np.array(chosen)


def k_medoids(
    features: Float[ArrayLike, "n d"], labels: Int[ArrayLike, " n"], per_class: int, key: Array, sweeps: int = 20
) -> np.ndarray:
    """Indices of examples in the middle of `per_class` clusters of each class (Park and Jun 2009).

    From a random start, assignment to the nearest medoid and the choice of each cluster's medoid alternate until
    nothing changes.

    Args:
      features: features of each example.
      labels: class of each example.
      per_class: clusters, and so examples, of each class.
      key: a random key.
      sweeps: greatest number of alternations.

    Returns:
      Indices ``[classes * per_class]``, class after class.

    >>> points = np.array([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2]])
    >>> sorted(k_medoids(points, np.zeros(6, int), 2, jax.random.key(0)).tolist())
    [1, 4]
    """
    from scipy.spatial.distance import cdist  # slow to import

    features = _features(features, labels)
    groups = _groups(labels, per_class)
    chosen = []
    for group, class_key in zip(groups, jax.random.split(key, len(groups)), strict=True):
        own = features[group]
        distance = cdist(own, own)
        medoids = _spread(distance, per_class, int(jax.random.randint(class_key, (), 0, len(group))))
        for _ in range(sweeps):
            nearest = distance[:, medoids].argmin(1)
            nearest[medoids] = np.arange(per_class)
            clusters = [np.flatnonzero(nearest == cluster) for cluster in range(per_class)]
            moved = np.array([cluster[distance[np.ix_(cluster, cluster)].sum(0).argmin()] for cluster in clusters])
            if (moved == medoids).all():
                break
            medoids = moved
        chosen.append(group[medoids])
    return np.concatenate(chosen)


def _spread(distance: np.ndarray, count: int, first: int) -> np.ndarray:
    """Indices of `count` points, each the farthest from those before it."""
    picked = [first]
    for _ in range(count - 1):
        gap = distance[:, picked].min(1)
        gap[picked] = -1.0
        picked.append(int(gap.argmax()))
    return np.array(picked)


def _checked(labels: np.ndarray, classes: int | None = None) -> np.ndarray:
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels: found dtype {labels.dtype}, expected integers, the index of each example's class")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (classes is not None and high >= classes):
        bound = "0 or more" if classes is None else f"0 to {classes - 1}"
        raise ValueError(f"labels: found values from {low} to {high}, expected {bound}")
    return labels.astype(np.int32)


def _groups(labels: ArrayLike, per_class: int) -> list[np.ndarray]:
    """The indices of each class's examples."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.size == 0:
        raise ValueError(f"labels: found shape {labels.shape}, expected [n] with at least one example")
    labels = _checked(labels)
    if per_class < 1:
        raise ValueError(f"per_class: found {per_class}, expected at least 1 example of each class")
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    for group in groups:
        if len(group) < per_class:
            raise ValueError(
                f"per_class: found {per_class}, but class {labels[group[0]]} has {len(group)} examples: ask for at "
                f"most {min(map(len, groups))}, or give more examples"
            )
    return groups


def _features(features: ArrayLike, labels: ArrayLike) -> np.ndarray:
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) != len(np.asarray(labels)):
        raise ValueError(f"features: found shape {features.shape}, expected [{len(np.asarray(labels))}, d]")
    return features
