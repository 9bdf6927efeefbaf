"""Edit pre-trained models with task vectors, in JAX: arithmetic, composition, and transport across models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvjax import capture, compose, merge, transport, tree
    from tvjax.arithmetic import add, analogy, apply, interpolate, negate, scale, task_vector
    from tvjax.layers import stack, unstack
    from tvjax.stages import Batch, Model, Stage, Stream, single_stage
    from tvjax.transport.base import State, Transport, chain, identity, scale_by
    from tvjax.transport.bico import bico
    from tvjax.transport.fit import fit, transport_stages
    from tvjax.transport.gradfix import gradfix
    from tvjax.transport.leaf_report import leaf_report
    from tvjax.transport.orthogonal_shift import orthogonal_shift
    from tvjax.transport.permutation import transfusion
    from tvjax.transport.theseus import theseus

# Public names by module, imported on first use: the command line starts without JAX.
_NAMES = {
    "arithmetic": ("add", "analogy", "apply", "interpolate", "negate", "scale", "task_vector"),
    "layers": ("stack", "unstack"),
    "stages": ("Batch", "Model", "Stage", "Stream", "single_stage"),
    "transport": (
        *("State", "Transport", "bico", "chain", "fit", "gradfix", "identity", "leaf_report", "orthogonal_shift"),
        *("scale_by", "theseus", "transfusion", "transport_stages"),
    ),
}
_HOMES = {name: f"tvjax.{module}" for module, names in _NAMES.items() for name in names}
_MODULES = ("capture", "compose", "merge", "transport", "tree")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"tvjax.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tvjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "Batch",
    "Model",
    "Stream",
    "Stage",
    "State",
    "Transport",
    "add",
    "analogy",
    "apply",
    "bico",
    "capture",
    "chain",
    "compose",
    "fit",
    "gradfix",
    "identity",
    "interpolate",
    "leaf_report",
    "merge",
    "negate",
    "orthogonal_shift",
    "scale",
    "scale_by",
    "single_stage",
    "stack",
    "task_vector",
    "theseus",
    "transfusion",
    "transport",
    "transport_stages",
    "tree",
    "unstack",
]
