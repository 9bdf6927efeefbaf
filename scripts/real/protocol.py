"""What all draws of the experiment on real models have in common: grids, budgets, and how many texts there are.

The fields are settings of a results file (`scripts/real_models.py`), which is refused where they changed.
"""

from __future__ import annotations

from typing import NamedTuple

from real.texts import Counts

TRAINED = ("blocks/*",)
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
RATES, RATES_MANY = (3e-5, 1e-4, 3e-4), (2e-4, 8e-4)  # of the leaves, with few labels and with many
SHARE = 1e-3  # where coefficients are trained too, theirs are a thousand times greater
CHECKPOINTS = 3  # numbers of steps to choose from, up to all
CALIBRATION, EVALUATION = 48, 200  # texts at once, at most


class Steps(NamedTuple):
    """How many steps a training takes at most, and of how many texts."""

    steps: int
    size: int


FEW, MANY, TEACHER = Steps(60, 16), Steps(90, 32), Steps(60, 32)


class Setting(NamedTuple):
    """How texts of a task are read and how many of each class there are in each part.

    Attributes:
      length: tokens that are kept of a text.
      counts: of the parts.
    """

    length: int
    counts: Counts


SENTENCES = Setting(24, Counts(test=500, source=400, few=48, validation=80, unlabelled=500))
SETTINGS = {
    "nouns": Setting(16, Counts(test=44, source=40, few=4, validation=7, unlabelled=500)),
    "verbs": Setting(16, Counts(test=67, source=60, few=6, validation=10, unlabelled=500)),
    **dict.fromkeys(("film", "amazon", "nyt", "tweets"), SENTENCES),
}
