"""Task vectors that a job is given as they are: the file of one, or the folder of an adapter, whose factors stay."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tvjax import tree
from tvjax.checkpoints.adapters import CONFIG, load_adapter, open_adapter
from tvjax.checkpoints.folder import Checkpoint
from tvjax.checkpoints.provenance import check_same_config
from tvjax.checkpoints.reader import open_tensors
from tvjax.checkpoints.safetensors import load_tree
from tvjax.jobs import inputs
from tvjax.jobs.opened import Opened
from tvjax.jobs.parts import Part
from tvjax.merge import to_task_vector
from tvjax.stages import PyTree


def is_adapter(name: str) -> bool:
    """Whether a task vector is given as an adapter, a folder or hub id, and not as a file.

    >>> is_adapter("tau.safetensors"), is_adapter("me/lora")
    (False, True)
    """
    return (Path(name) / CONFIG).is_file() or not (Path(name).exists() or name.endswith(".safetensors"))


def is_model(name: str) -> bool:
    """Whether a task vector is given as the folder of a fine-tuned model.

    >>> is_model("tau.safetensors")
    False
    """
    return (Path(name) / "config.json").is_file() and not is_adapter(name)


def check_given(name: str, source: Opened, part: Part, any_base: bool) -> tuple[str, ...]:
    """Checks a task vector against its model by headers alone.

    Returns:
      What the user should know.

    Raises:
      ValueError: it is of another model, or changes nothing of the part that is moved.
    """
    base = source.checkpoint
    notes: tuple[str, ...] = ()
    if is_adapter(name):
        with open_adapter(name, base, any_base=any_base) as opened:
            paths, notes = list(opened.factors), opened.notes
    else:
        with open_tensors(name) as tensors:
            check_same_config(tensors.metadata, base, [name], any_base)
            headers = tensors.headers
        wrong = [
            f"{path}: {header.shape}, the model has {base.shapes.get(path, 'no such leaf')}"
            for path, header in headers.items()
            if base.shapes.get(path) != header.shape
        ]
        if wrong:
            raise ValueError(f"{name!r} is no task vector of {source.name!r}:\n{tree.list_some(wrong)}")
        paths = list(headers)
    inside = _inside(paths, part)
    if not inside:
        raise ValueError(
            f"{name!r} changes {len(paths)} leaves of {source.name!r} ({', '.join(paths[:1])}, ...), none of which is "
            "moved: name the part that it changes (--part)"
        )
    outside = [path for path in paths if path not in inside]
    if outside:
        notes += (f"{name!r} changes {len(outside)} leaves outside what is moved too ({outside[0]}, ...), which stay",)
    return notes


def read_given(name: str, source: Opened, part: Part, any_base: bool) -> PyTree:
    """The task vector of a part; that of an adapter has leaves of low rank, that of a model on disk stays there.

    Raises:
      ValueError: it was made for other weights, or has values that are not finite.
    """
    if is_adapter(name):
        tau = read_adapter(name, source.checkpoint, any_base)
    else:
        tau, metadata = load_tree(name, on_disk=source.on_disk)
        inputs.check_base(metadata, source.pretrained, [Path(name)], any_base)
    flat = tree.flatten(tau)
    return tree.nest({path: flat[path] for path in _inside(flat, part)})


def read_adapter(name: str, base: Checkpoint, any_base: bool) -> PyTree:
    """An adapter of PEFT as a task vector of low rank."""
    return to_task_vector(load_adapter(name, base, any_base=any_base), low_rank=True)


def _inside(paths: Iterable[str], part: Part) -> list[str]:
    return list(part.of(tree.nest({path: 0 for path in paths})))
