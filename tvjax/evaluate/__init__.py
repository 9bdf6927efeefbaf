"""Zero-shot heads, accuracy, the choice of the scale, the experiments of task arithmetic, and fine-tuning."""

from tvjax.evaluate.accuracy import Accuracy, accuracy, predict
from tvjax.evaluate.fine_tune import FineTuned, fine_tune
from tvjax.evaluate.protocols import Edit, Task, addition, all_pairs, analogy, negation
from tvjax.evaluate.scale import ChosenScale, choose_scale
from tvjax.evaluate.zero_shot import classifier, zero_shot, zero_shot_loss, zero_shot_model

__all__ = [
    "Accuracy",
    "ChosenScale",
    "Edit",
    "FineTuned",
    "Task",
    "accuracy",
    "addition",
    "all_pairs",
    "analogy",
    "choose_scale",
    "classifier",
    "fine_tune",
    "negation",
    "predict",
    "zero_shot",
    "zero_shot_loss",
    "zero_shot_model",
]
