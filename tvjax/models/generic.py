"""Models of which nothing is known but their tensors: the keys of a checkpoint are the paths, the layout is its own.

Arithmetic, merges and inspection need no more. What runs a model needs modelling code, and says so.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from jax.typing import DTypeLike

from tvjax.models.key_table import FLOATS, Tensor
from tvjax.models.layer_table import LayerTable, Row
from tvjax.models.settings import Settings
from tvjax.stages import Model, PyTree, single_stage

TABLE = LayerTable((Row("{path}", "{path}", "array"),), unused=("{path}",))  # a dot of a key is a slash of its path
COMMANDS = "extract, apply, merge, inspect and convert"

# Settings that say nothing of what a model computes when it is run: of training, of generation, of the file.
_NO_FUNCTION = re.compile(
    r"_.*|architectures|auto_map|transformers_version|(torch_)?dtype|.*drop(out|_rate|_prob|path|).*|layerdrop"
    r"|.*_token(_id)?s?(_ids)?|(begin_)?suppress_tokens|forced_decoder_ids|id2label|label2id|num_labels|problem_type"
    r"|finetuning_task|task_specific_params|.*_cache|.*initializer.*|output_.*|return_dict.*|gradient_checkpointing"
    r"|.*loss.*|max_length|min_length|num_beams|do_sample|temperature|top_[kp]|repetition_penalty|length_penalty"
    r"|mask_(time|feature)_.*|apply_spec_augment|router_jitter_noise|use_return_dict|pad_.*|classifier_.*"
)


@dataclasses.dataclass(frozen=True)
class GenericConfig:
    """What is known of a model without modelling code.

    Attributes:
      settings: the content of ``config.json``.
      shapes: of its parameters, by path.
    """

    settings: Settings
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_dict(cls, settings: Settings) -> GenericConfig:
        """The config of a ``config.json``."""
        return cls(settings)

    def to_dict(self) -> dict[str, Any]:
        """The content of ``config.json``."""
        return dict(self.settings)

    def function_values(self) -> dict[str, Any]:
        """The settings that can change what the model computes, those of a part under its name and a dot.

        >>> GenericConfig({"model_type": "bert", "hidden_act": "gelu", "dtype": "float32"}).function_values()
        {'model_type': 'bert', 'hidden_act': 'gelu'}
        """
        return _values(self.settings)


def shapes_of_tensors(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters among a checkpoint's tensors, by path: of those of floating values.

    Raises:
      ValueError: a key that no path stands for alone.

    >>> shapes_of_tensors({"wte.weight": Tensor("F32", (3, 2)), "ids": Tensor("I64", (3,))})
    {'wte/weight': (3, 2)}
    """
    slashed = next((key for key in tensors if "/" in key), None)
    if slashed is not None:
        raise ValueError(f"the key {slashed!r} has a slash, which parts the keys of a path: save it under another name")
    shapes = {key.replace(".", "/"): header.shape for key, header in tensors.items() if header.dtype in FLOATS}
    for path in shapes:
        parts = path.split("/")
        for length in range(1, len(parts)):
            if "/".join(parts[:length]) in shapes:
                raise ValueError(f"the tensor {path!r} lies under another, {'/'.join(parts[:length])!r}: rename one")
    return shapes


def build(config: GenericConfig, params: PyTree, dtype: DTypeLike | None = None) -> Model:
    """The parameters as a model that cannot be run."""
    del dtype
    kind = config.settings.get("model_type")

    def run(params: PyTree, inputs: PyTree) -> PyTree:
        raise ValueError(no_code(kind))

    return single_stage(run, params)


def no_code(model_type: Any, why: str = "") -> str:
    """What to say of a model that is to be run, but cannot be, and why its config is refused by a known family."""
    kind = f"this model_type {model_type!r} ({why})" if why else f"model_type {model_type!r}"
    return (
        f"there is no modelling code for {kind}, which this needs: only {COMMANDS}, and what they "
        "call, work on any model"
    )


def init(config: GenericConfig, key: Any) -> PyTree:
    """Raises a ValueError: how such a model is initialised is not known."""
    raise ValueError(no_code(config.settings.get("model_type")))


def inputs(config: GenericConfig, examples: int) -> PyTree:
    """Raises a ValueError: what such a model takes is not known."""
    raise ValueError(no_code(config.settings.get("model_type")))


def _values(settings: Settings, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if value is None or _NO_FUNCTION.fullmatch(name):
            continue
        if isinstance(value, Mapping):
            found |= _values(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
