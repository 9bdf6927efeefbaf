"""Edit pre-trained models with task vectors, in JAX: arithmetic, composition, and transport across models."""

from tvjax import capture, transport, tree
from tvjax.arithmetic import add, analogy, apply, interpolate, negate, scale, task_vector
from tvjax.stages import Batch, Model, Rows, Stage, single_stage
from tvjax.transport import (
    State,
    Transport,
    bico,
    chain,
    fit,
    gradfix,
    identity,
    leaf_report,
    orthogonal_shift,
    scale_by,
    theseus,
    transport_stages,
)

__all__ = [
    "Batch",
    "Model",
    "Rows",
    "Stage",
    "State",
    "Transport",
    "add",
    "analogy",
    "apply",
    "bico",
    "capture",
    "chain",
    "fit",
    "gradfix",
    "identity",
    "interpolate",
    "leaf_report",
    "negate",
    "orthogonal_shift",
    "scale",
    "scale_by",
    "single_stage",
    "task_vector",
    "theseus",
    "transport",
    "transport_stages",
    "tree",
]
