"""Accuracy, the choice of the scale, the experiments of task arithmetic, and fine-tuning."""

from tvjax.evaluate.accuracy import Accuracy, Predictions, accuracy, predict, predictions
from tvjax.evaluate.fine_tune import FineTuned, fine_tune
from tvjax.evaluate.pairs import Agreement, PairedDifference, agreement, paired_difference
from tvjax.evaluate.protocols import Benchmark, Edit, addition, all_pairs, analogy, negation
from tvjax.evaluate.scale import ChosenScale, LeastLoss, choose_scale, scale_curve, scale_of_least_loss

__all__ = [
    "Accuracy",
    "Agreement",
    "Benchmark",
    "ChosenScale",
    "Edit",
    "FineTuned",
    "LeastLoss",
    "PairedDifference",
    "Predictions",
    "accuracy",
    "addition",
    "agreement",
    "all_pairs",
    "analogy",
    "choose_scale",
    "fine_tune",
    "negation",
    "paired_difference",
    "predict",
    "predictions",
    "scale_curve",
    "scale_of_least_loss",
]
