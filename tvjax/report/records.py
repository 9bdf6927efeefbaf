"""Accuracies as plain records: what tables show and JSON files keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvjax.evaluate.accuracy import Accuracy, Predictions
from tvjax.evaluate.pairs import agreement, paired_difference

Record = dict[str, Any]


def of_accuracy(accuracy: Accuracy) -> Record:
    """An accuracy with its interval.

    >>> of_accuracy(Accuracy(1, 2))["accuracy"]
    0.5
    """
    return {
        "accuracy": accuracy.fraction,
        "interval": accuracy.interval(),
        "correct": accuracy.correct,
        "total": accuracy.total,
    }


def of_model(predicted: Predictions, class_names: Sequence[str], reference: Accuracy | None = None) -> Record:
    """The accuracy of a model, as a share of the reference's, and of each class; of tokens also the perplexity."""
    own = zip(class_names, predicted.by_class(len(class_names)), strict=True) if class_names else ()
    return {
        **of_accuracy(predicted.accuracy),
        **({} if class_names else {"perplexity": predicted.perplexity}),
        "normalised": normalised(predicted.accuracy, reference),
        "by_class": [{"class": name, **of_accuracy(found)} for name, found in own if found is not None],
    }


def normalised(accuracy: Accuracy, reference: Accuracy | None) -> float | None:
    """An accuracy as a share of the reference's; None without one, or where that is 0.

    >>> normalised(Accuracy(1, 4), Accuracy(1, 2))
    0.5
    """
    return accuracy.fraction / reference.fraction if reference is not None and reference.correct else None


def of_difference(predicted: Predictions, baseline: Predictions) -> Record:
    """The difference of the accuracies of a model and a baseline on the same images."""
    found = paired_difference(predicted, baseline)
    return {
        "difference": found.difference,
        "interval": found.interval,
        "p_value": found.p_value,
        "only_model": found.only_first,
        "only_baseline": found.only_second,
    }


def of_pair(predicted: Predictions, baseline: Predictions) -> Record:
    """The difference of a model and a baseline, and where they agree."""
    return {**of_difference(predicted, baseline), "agreement": agreement(predicted, baseline)._asdict()}


def of_curve(
    scales: Sequence[float], found: Sequence[Predictions], before: Predictions, reference: Accuracy | None = None
) -> list[Record]:
    """The accuracy at each scale of a task vector, and its difference to the model without it."""
    return [
        {
            "scale": scale,
            **of_accuracy(predicted.accuracy),
            "normalised": normalised(predicted.accuracy, reference),
            "difference_to_model": of_difference(predicted, before),
        }
        for scale, predicted in zip(scales, found, strict=True)
    ]
