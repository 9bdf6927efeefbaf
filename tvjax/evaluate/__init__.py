"""Zero-shot heads, accuracy, the choice of the scale, and fine-tuning as the baseline."""

from tvjax.evaluate.accuracy import Accuracy, accuracy, predict
from tvjax.evaluate.fine_tune import FineTuned, fine_tune
from tvjax.evaluate.scale import ChosenScale, choose_scale
from tvjax.evaluate.zero_shot import classifier, zero_shot, zero_shot_loss, zero_shot_model

__all__ = [
    "Accuracy",
    "ChosenScale",
    "FineTuned",
    "accuracy",
    "choose_scale",
    "classifier",
    "fine_tune",
    "predict",
    "zero_shot",
    "zero_shot_loss",
    "zero_shot_model",
]
