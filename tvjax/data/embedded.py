"""The embedded models: four tiny CLIPs trained on the digits, and their fine-tuned vision towers as task vectors.

``scripts/build_demo_models.py`` makes them. A is the source; B has its shape but another seed and the other half of the
data; W is wider, D deeper, both on B's half. Every folder is an ordinary Hugging Face folder.
"""

from __future__ import annotations

from pathlib import Path

MODELS = ("A", "B", "W", "D")
TASKS = ("mirrored", "upside_down", "thick", "ruled", "framed", "blurred")
FOLDER = Path(__file__).parent.parent / "demo_models"


def model_folder(model: str) -> Path:
    """The Hugging Face folder of an embedded model.

    >>> model_folder("A").name
    'A'
    """
    return FOLDER / _known("model", model, MODELS)


def task_vector_file(model: str, task: str) -> Path:
    """The file of a task vector: fine-tuned minus pre-trained vision tower, 16 bits, for `load_tree`.

    >>> task_vector_file("W", "thick").name
    'thick.safetensors'
    """
    return model_folder(model) / "task_vectors" / f"{_known('task', task, TASKS)}.safetensors"


def _known(what: str, name: str, names: tuple[str, ...]) -> str:
    if name not in names:
        raise ValueError(f"there is no embedded {what} {name!r}: choose one of {list(names)}")
    return name
