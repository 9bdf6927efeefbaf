"""Learned coefficients of task vectors: layouts, objectives, training, and the linearised model."""

from tvjax.compose.ada_merging import ada_merging
from tvjax.compose.coefficients import Coefficients, Entry, Layout, Place, Stacked, combine, entries, init, weighted_sum
from tvjax.compose.edited import Edited
from tvjax.compose.linearised import Linearised, linearise
from tvjax.compose.logit_correction import logit_correction
from tvjax.compose.objectives import (
    Objective,
    Term,
    Trusted,
    addition,
    average,
    entropy,
    few_shot,
    fix_match,
    negation,
    of_loss,
    scaled,
    sharpen,
    trusted_examples,
    value,
)
from tvjax.compose.select import Kept, select_informative
from tvjax.compose.teachers import class_scores, distillation, distillation_losses
from tvjax.compose.train import Store, Trained, clipped_adamw, constant, cosine, learn, patience, train
from tvjax.compose.tuned import Tuned, best_start, tune

__all__ = [
    "Coefficients",
    "Edited",
    "Entry",
    "Kept",
    "Layout",
    "Linearised",
    "Objective",
    "Place",
    "Stacked",
    "Store",
    "Term",
    "Trained",
    "Trusted",
    "Tuned",
    "ada_merging",
    "addition",
    "average",
    "best_start",
    "class_scores",
    "clipped_adamw",
    "combine",
    "constant",
    "cosine",
    "distillation",
    "distillation_losses",
    "entries",
    "entropy",
    "few_shot",
    "fix_match",
    "init",
    "learn",
    "linearise",
    "logit_correction",
    "negation",
    "of_loss",
    "patience",
    "scaled",
    "select_informative",
    "sharpen",
    "train",
    "trusted_examples",
    "tune",
    "value",
    "weighted_sum",
]
