"""Edit pre-trained models with task vectors, in JAX: arithmetic, composition, and transport across models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvjax import (
        capture,
        checkpoints,
        compose,
        data,
        evaluate,
        interop,
        jobs,
        merge,
        models,
        sharding,
        tasks,
        transport,
        tree,
    )
    from tvjax.arithmetic import add, analogy, apply, interpolate, negate, scale, task_vector
    from tvjax.checkpoints import from_pretrained as load
    from tvjax.checkpoints import load_tree as load_task_vector
    from tvjax.checkpoints import save_pretrained as save
    from tvjax.checkpoints import save_tree as save_task_vector
    from tvjax.citations import cite
    from tvjax.compose.logit_correction import logit_correction
    from tvjax.factors import LowRank
    from tvjax.layers import scanned, stack, unstack
    from tvjax.stages import Batch, Model, Stage, Stream, single_stage
    from tvjax.transport.ariadne import ariadne
    from tvjax.transport.base import State, Transport, chain, identity, scale_by
    from tvjax.transport.bico import bico
    from tvjax.transport.fit import fit
    from tvjax.transport.gradfix import gradfix
    from tvjax.transport.leaf_report import leaf_report
    from tvjax.transport.orthogonal_shift import orthogonal_shift
    from tvjax.transport.permutation import transfusion
    from tvjax.transport.plan import plan
    from tvjax.transport.theseus import theseus
    from tvjax.truncate import low_rank

# Public names by module, imported on first use: the command line starts without JAX.
_NAMES = {
    "compose": ("logit_correction",),
    "arithmetic": ("add", "analogy", "apply", "interpolate", "negate", "scale", "task_vector"),
    "citations": ("cite",),
    "factors": ("LowRank",),
    "layers": ("scanned", "stack", "unstack"),
    "stages": ("Batch", "Model", "Stage", "Stream", "single_stage"),
    "transport.plan": ("plan",),
    "truncate": ("low_rank",),
    "transport": (
        *("State", "Transport", "ariadne", "bico", "chain", "fit", "gradfix", "identity", "leaf_report"),
        *("orthogonal_shift", "scale_by", "theseus", "transfusion"),
    ),
}
_HOMES = {name: (f"tvjax.{module}", name) for module, names in _NAMES.items() for name in names} | {
    "load": ("tvjax.checkpoints", "from_pretrained"),
    "load_task_vector": ("tvjax.checkpoints", "load_tree"),
    "save": ("tvjax.checkpoints", "save_pretrained"),
    "save_task_vector": ("tvjax.checkpoints", "save_tree"),
    "transport_stages": ("tvjax.transport.fit", "transport_stages"),  # an old name, which warns where it is called
}
_MODULES = (
    *("capture", "checkpoints", "compose", "data", "evaluate", "interop", "jobs", "merge", "models", "sharding"),
    *("tasks", "transport", "tree"),
)
_RENAMED = {"Rows": "Stream"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"tvjax.{name}")
    if name == "__version__":
        from importlib.metadata import version

        return version("tvjax")
    if name in _RENAMED:
        from tvjax.renamed import warn

        warn(f"tvjax.{name}", _RENAMED[name])
        name = _RENAMED[name]
    if name in _HOMES:
        module, own = _HOMES[name]
        return getattr(import_module(module), own)
    raise AttributeError(f"module 'tvjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "Batch",
    "LowRank",
    "Model",
    "Stage",
    "State",
    "Stream",
    "Transport",
    "add",
    "analogy",
    "apply",
    "ariadne",
    "bico",
    "capture",
    "chain",
    "checkpoints",
    "cite",
    "compose",
    "data",
    "evaluate",
    "fit",
    "gradfix",
    "identity",
    "interop",
    "interpolate",
    "jobs",
    "leaf_report",
    "load",
    "load_task_vector",
    "logit_correction",
    "low_rank",
    "merge",
    "models",
    "negate",
    "orthogonal_shift",
    "plan",
    "save",
    "save_task_vector",
    "scale",
    "scale_by",
    "scanned",
    "sharding",
    "single_stage",
    "stack",
    "task_vector",
    "tasks",
    "theseus",
    "transfusion",
    "transport",
    "tree",
    "unstack",
]
