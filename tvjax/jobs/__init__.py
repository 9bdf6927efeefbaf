"""The work of the commands as functions of a config: ``job(config, progress=None) -> result``.

Nothing is printed; what a job writes appears when it is complete. A config is a strict pydantic model, the one schema
of Python, recipes and the command line.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tvjax.jobs.configs import (
    ApplyConfig,
    ComposeConfig,
    ConvertConfig,
    EvaluateConfig,
    ExtractConfig,
    InspectConfig,
    MergeConfig,
    PlanConfig,
    TransportConfig,
)
from tvjax.jobs.mergekit import FromMergekit, from_mergekit
from tvjax.jobs.recipes import read_recipe

if TYPE_CHECKING:
    from tvjax.jobs._apply import apply
    from tvjax.jobs._compose import compose
    from tvjax.jobs._convert import convert
    from tvjax.jobs._evaluate import evaluate
    from tvjax.jobs._extract import extract
    from tvjax.jobs._inspect import inspect
    from tvjax.jobs._merge import merge
    from tvjax.jobs._plan import plan
    from tvjax.jobs._transport import transport

_JOBS = ("apply", "compose", "convert", "evaluate", "extract", "inspect", "merge", "plan", "transport")


def __getattr__(name: str) -> Any:  # the command line reads the configs, and starts without JAX
    if name in _JOBS:
        return getattr(import_module(f"tvjax.jobs._{name}"), name)
    raise AttributeError(f"module 'tvjax.jobs' has no attribute {name!r}")


__all__ = [
    "ApplyConfig",
    "ComposeConfig",
    "ConvertConfig",
    "EvaluateConfig",
    "ExtractConfig",
    "FromMergekit",
    "InspectConfig",
    "MergeConfig",
    "PlanConfig",
    "TransportConfig",
    "apply",
    "compose",
    "convert",
    "evaluate",
    "extract",
    "from_mergekit",
    "inspect",
    "merge",
    "plan",
    "read_recipe",
    "transport",
]
