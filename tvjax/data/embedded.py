"""The embedded models, and their task vectors; every folder is an ordinary Hugging Face folder.

Four tiny CLIPs trained on the digits, with their fine-tuned vision towers, made by ``scripts/build_demo_models.py``: A
is the source; B has its shape but another seed and the other half of the data; W is wider, D deeper, both on B's
half.

Three tiny Llamas trained on definitions of WordNet and sentences of reviews and editorials, made by
``scripts/build_language_models.py``: llama-A is the source; llama-B is wider and deeper, with more heads, another seed
and the other half of the texts; llama-C is llama-A trained further on B's half. Two tiny T5s, t5-A and t5-B, differ as
llama-A and llama-B do.
"""

from __future__ import annotations

from pathlib import Path

from tvjax.data.embedded_texts import TASKS as TEXT_TASKS

MODELS = ("A", "B", "W", "D")
TASKS = ("mirrored", "upside_down", "thick", "ruled", "framed", "blurred")
FOLDER = Path(__file__).parent.parent / "demo_models"
LANGUAGE_MODELS = ("llama-A", "llama-B", "llama-C", "t5-A", "t5-B")
LANGUAGE_FOLDER = FOLDER.with_name("demo_language")


def model_folder(model: str) -> Path:
    """The Hugging Face folder of an embedded model.

    >>> model_folder("A").name
    'A'
    """
    _check_known("model", model, MODELS + LANGUAGE_MODELS)
    return (FOLDER if model in MODELS else LANGUAGE_FOLDER) / model


def task_vector_file(model: str, task: str) -> Path:
    """The file of a task vector: fine-tuned minus pre-trained model, 16 bits, for `load_tree`.

    Of a CLIP it covers the vision tower, of a language model all but its token embeddings.

    >>> task_vector_file("W", "thick").name
    'thick.safetensors'
    >>> task_vector_file("llama-A", "topics").parent.parent.name
    'llama-A'
    """
    folder = model_folder(model)
    _check_known("task", task, TASKS if model in MODELS else tuple(TEXT_TASKS))
    return folder / "task_vectors" / f"{task}.safetensors"


def _check_known(what: str, name: str, names: tuple[str, ...]) -> None:
    if name not in names:
        raise ValueError(f"there is no embedded {what} {name!r}: choose one of {list(names)}")
