"""Zero-shot heads, accuracy, the choice of the scale, the experiments of task arithmetic, and fine-tuning."""

from tvjax.evaluate.accuracy import Accuracy, Predictions, accuracy, predict, predictions
from tvjax.evaluate.fine_tune import FineTuned, fine_tune
from tvjax.evaluate.pairs import Agreement, PairedDifference, agreement, paired_difference
from tvjax.evaluate.protocols import Edit, Task, addition, all_pairs, analogy, negation
from tvjax.evaluate.scale import ChosenScale, choose_scale, scale_curve
from tvjax.evaluate.zero_shot import classifier, zero_shot, zero_shot_loss, zero_shot_model

__all__ = [
    "Accuracy",
    "Agreement",
    "ChosenScale",
    "Edit",
    "FineTuned",
    "PairedDifference",
    "Predictions",
    "Task",
    "accuracy",
    "addition",
    "agreement",
    "all_pairs",
    "analogy",
    "choose_scale",
    "classifier",
    "fine_tune",
    "negation",
    "paired_difference",
    "predict",
    "predictions",
    "scale_curve",
    "zero_shot",
    "zero_shot_loss",
    "zero_shot_model",
]
