"""The ``adapter_config.json`` of a LoRA adapter: what of it is understood, and everything else refused by name.

The list is of what is known, so that a setting which a later PEFT brings is refused until somebody has looked at it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

Settings = Mapping[str, Any]

# Initialisations whose product is zero, or is no part of the base: what was learned is alpha/r B A.
_PLAIN = (True, False, "gaussian", "orthogonal", "eva", "mica")
# Initialisations that take their product out of the base, and that the base alone gives again.
FROM_BASE = ("pissa", "olora")

_READ = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias")
_NAMES = ("base_model_name_or_path", "revision", "auto_mapping", "task_type", "peft_version", "inference_mode")
# Which modules were trained is seen from the keys; the rest is about training, or of initialisations named above.
_WITHOUT_EFFECT = (
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "fan_in_fan_out"),
    *("megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
)
_KNOWN = {*_READ, *_NAMES, *_WITHOUT_EFFECT}
_MERGE = "merge it into its base with PEFT (merge_and_unload), save that, and extract the task vector from it"


def check_settings(settings: Settings) -> None:
    """Raises a ValueError that names a setting under which the change of a kernel is not known from the file.

    >>> check_settings({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "use_dora": True})
    Traceback (most recent call last):
    ValueError: use_dora is True: what that does to the change is not known here; merge it into its base with PEFT \
(merge_and_unload), save that, and extract the task vector from it
    """
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {settings.get('peft_type')!r}, only LORA adapters are read")
    for name, value in settings.items():
        if name not in _KNOWN and value not in (None, False, [], {}):
            raise ValueError(f"{name} is {value!r}: what that does to the change is not known here; {_MERGE}")
    if settings.get("bias", "none") != "none":
        raise ValueError(f"bias is {settings['bias']!r}, which changes the base's biases: merge it with PEFT first")
    initialisation(settings)
    for name, kind in (("r", int), ("lora_alpha", (int, float))):
        value = settings.get(name)
        if not isinstance(value, kind) or isinstance(value, bool) or not math.isfinite(value) or value < (name == "r"):
            raise ValueError(f"{name} is {value!r}, expected a positive number")
    for name, kind in (("rank_pattern", int), ("alpha_pattern", (int, float))):
        patterns = settings.get(name) or {}
        if not isinstance(patterns, dict) or not all(
            isinstance(value, kind)
            and not isinstance(value, bool)
            and math.isfinite(value)
            and value >= (name == "rank_pattern")
            for value in patterns.values()
        ):
            raise ValueError(f"{name} is {patterns!r}, expected numbers by pattern, ranks from 1 on")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{name}: {pattern!r} is no pattern ({error})") from error


def initialisation(settings: Settings) -> str:
    """``pissa`` or ``olora`` where that was taken out of the base, "" where the base was left as it is.

    Raises:
      ValueError: an initialisation that changed the base by what the file does not say, or one that is not known.

    >>> initialisation({"init_lora_weights": "gaussian"}), initialisation({"init_lora_weights": "pissa"})
    ('', 'pissa')
    """
    found = settings.get("init_lora_weights", True)
    name = found.lower() if isinstance(found, str) else found
    if name in FROM_BASE:
        return str(name)
    if name not in _PLAIN or (not isinstance(name, str) and not isinstance(name, bool)):
        raise ValueError(
            f"init_lora_weights is {found!r}, which may have changed the base, by what this folder does not say: save "
            "the adapter where it was trained with save_pretrained(..., path_initial_model_for_weight_conversion="
            f"FOLDER), the adapter as it was before training, so that it belongs to the unchanged base; or {_MERGE}"
        )
    return ""


def rank_and_scale(settings: Settings, module: str) -> tuple[int, float]:
    """The rank of a module's factors, and the factor of their product: ``alpha / r``, or ``alpha / sqrt(r)``.

    >>> rank_and_scale({"r": 4, "lora_alpha": 8, "rank_pattern": {"fc1": 2}}, "layers.0.mlp.fc1")
    (2, 4.0)
    """
    rank = _by_pattern(settings.get("rank_pattern"), module, settings["r"])
    alpha = _by_pattern(settings.get("alpha_pattern"), module, settings["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def model_class(settings: Settings) -> str:
    """The class of transformers that the adapter was trained in, "" where the config names none.

    >>> model_class({"auto_mapping": {"base_model_class": "CLIPTextModel", "parent_library": "transformers"}})
    'CLIPTextModel'
    """
    mapping = settings.get("auto_mapping")
    found = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return found if isinstance(found, str) else ""


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that the end of a module's name matches, as PEFT decides it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
