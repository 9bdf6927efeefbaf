"""What turns examples and a pre-trained model into a model with a loss, batches, and a score."""

from tvjax.tasks.base import Score, Task, judge, score
from tvjax.tasks.catalogue import GLUE, NLI, TASKS, KnownTask, find_task
from tvjax.tasks.classification import own_head, text_batches
from tvjax.tasks.language import (
    TokenLoss,
    exact_match,
    next_token,
    perplexity,
    sequence_to_sequence,
    token_accuracy,
    token_losses,
)
from tvjax.tasks.losses import ClassLoss, Judged, Loss
from tvjax.tasks.words import label_words
from tvjax.tasks.zero_shot import classifier, unit_embeddings, with_head, zero_shot, zero_shot_model

__all__ = [
    "ClassLoss",
    "GLUE",
    "Judged",
    "KnownTask",
    "Loss",
    "NLI",
    "Score",
    "TASKS",
    "Task",
    "TokenLoss",
    "classifier",
    "exact_match",
    "find_task",
    "judge",
    "label_words",
    "next_token",
    "own_head",
    "perplexity",
    "score",
    "sequence_to_sequence",
    "text_batches",
    "token_accuracy",
    "token_losses",
    "unit_embeddings",
    "with_head",
    "zero_shot",
    "zero_shot_model",
]
