"""Low-rank task vectors as LoRA adapters of PEFT: the folder that PEFT loads onto the model that they are for."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from tvjax import tree
from tvjax.checkpoints.adapters import CONFIG, PREFIX, WEIGHTS
from tvjax.checkpoints.atomic import new_folder
from tvjax.checkpoints.folder import Checkpoint
from tvjax.checkpoints.huggingface import Pretrained, check_new
from tvjax.checkpoints.json_files import write_json
from tvjax.checkpoints.model_card import is_hub_id
from tvjax.checkpoints.safetensors import save_tensors
from tvjax.factors import LowRank
from tvjax.kinds import as_path
from tvjax.models.families import GENERIC, family_of_config, shapes_of
from tvjax.models.key_table import kernels_by_module, module_name
from tvjax.models.layer_table import locate
from tvjax.stages import PyTree

_TASK_TYPES = {"ForCausalLM": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}


def save_adapter(
    tau: PyTree,
    folder: str | os.PathLike[str],
    base: Pretrained | Checkpoint,
    *,
    metadata: Mapping[str, str] | None = None,
    dtype: DTypeLike = np.float32,
    card: str | None = None,
) -> None:
    """Writes a low-rank task vector as the folder of a LoRA adapter, which PEFT and `load_adapter` read.

    Each leaf keeps its own rank; ``lora_alpha`` is the rank, so that the factors are taken as they are. Leaves of rank
    0 are no change, and are left out.

    Args:
      tau: nested dicts with `tvjax.LowRank` leaves, each at the kernel of a linear layer.
      folder: where to; a new folder, which appears when it is complete.
      base: the model that the task vector is for; its name is the ``base_model_name_or_path``.
      metadata: text for the file of the factors, such as ``Pretrained.identity()`` of the base.
      dtype: of the factors in the file.
      card: the content of ``README.md``; None writes none.

    Raises:
      ValueError: naming every leaf that an adapter of linear layers cannot hold, before anything is written; values
        that are not finite, and nothing is left behind.
    """
    folder = as_path(folder, "the path of a new folder")
    check_new(folder)
    modules = adapted_modules(tau, base)
    tensors = {}
    for module, (leaf, outputs_first) in modules.items():
        a, b = (leaf.right, leaf.left) if outputs_first else (leaf.left.T, leaf.right.T)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(a)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(b)
    ranks = {module: leaf.rank for module, (leaf, _) in modules.items()}
    with new_folder(folder) as temporary:
        save_tensors(temporary / WEIGHTS, tensors, {"format": "pt", **(metadata or {})}, dtype)
        write_json(temporary / CONFIG, adapter_config(ranks, base, tree.flatten(tau)))
        if card is not None:
            (temporary / "README.md").write_text(card, encoding="utf-8")


def adapted_modules(tau: PyTree, base: Pretrained | Checkpoint) -> dict[str, tuple[LowRank, bool]]:
    """The leaves by the module that they change, and whether the weight lies ``[out, in]``.

    Raises:
      ValueError: leaves that an adapter of linear layers cannot hold.
    """
    names, shapes = _module_of(base), shapes_of(base.config)
    outputs_first = family_of_config(base.config) is GENERIC
    found, problems = {}, []
    for path, leaf in tree.flatten(tau).items():
        if not isinstance(leaf, LowRank):
            problems.append(f"{path}: an array, not two factors (tvjax.low_rank makes them)")
        elif path not in shapes:
            problems.append(f"{path}: not in the model")
        elif path not in names:
            problems.append(f"{path}: no kernel of a linear layer")
        elif leaf.shape != shapes[path]:
            problems.append(f"{path}: model {shapes[path]}, adapter {leaf.shape}")
        elif leaf.rank:
            found[names[path]] = leaf, outputs_first
    if not found and not problems:
        problems.append("there is no leaf that changes anything")
    if problems:
        raise ValueError(
            f"an adapter of {base.name!r} cannot hold this task vector, for {len(problems)} reasons:\n"
            f"{tree.list_some(problems)}\nwrite it as a model or a task vector, or leave these leaves out "
            "(tvjax.tree.select)"
        )
    return found


def adapter_config(ranks: Mapping[str, int], base: Pretrained | Checkpoint, paths: Collection[str]) -> dict[str, Any]:
    """The ``adapter_config.json`` of adapters of these ranks, by module."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: own for module, own in ranks.items() if own != rank}
    architecture, table = _architecture(base), family_of_config(base.config).table
    hub = is_hub_id(base.name)
    name = base.name if hub or base.folder is None else str(base.folder.resolve())
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": name or None,
        "revision": (base.revision or None) if hub else None,
        "task_type": next((kind for end, kind in _TASK_TYPES.items() if architecture.endswith(end)), None),
        "auto_mapping": {"base_model_class": architecture, "parent_library": "transformers"} if architecture else None,
        "target_modules": _targets(list(ranks), list(_module_of(base).values())),
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "fan_in_fan_out": all(locate(table, path)[0].kind == "conv1d" for path in paths),
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def linear_kernels(base: Pretrained | Checkpoint) -> frozenset[str]:
    """The paths of the kernels that an adapter can change."""
    return frozenset(_module_of(base))


def _module_of(base: Pretrained | Checkpoint) -> dict[str, str]:
    """What recent transformers calls the module of each linear layer, by the path of its kernel."""
    table, shapes = family_of_config(base.config).table, shapes_of(base.config)
    modules = kernels_by_module(table, (path for path, shape in shapes.items() if len(shape) == 2))
    return {path: module_name(table, key, _architecture(base)) for key, path in modules.items()}


def _architecture(base: Pretrained | Checkpoint) -> str:
    """The class of transformers that the model's ``config.json`` names."""
    found = (base.settings or {}).get("architectures")
    return found[0] if isinstance(found, list) and found and isinstance(found[0], str) else ""


def _targets(modules: list[str], every: list[str]) -> list[str]:
    """The last names of modules where these name no others, else the whole names."""
    last = {module.rpartition(".")[2] for module in modules}
    return sorted(last if {m for m in every if m.rpartition(".")[2] in last} == set(modules) else modules)
