"""Models from one kind of checkpoint into another: Hugging Face, Orbax, MaxText, Tunix, state dicts of open_clip.

A state dict is a pickle, which is opened only where the caller allows it, by torch, and with ``weights_only``: nothing
but tensors is made of it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np
from jax.typing import DTypeLike

from tvjax import tree
from tvjax.checkpoints.behind import Behind
from tvjax.checkpoints.code_trees import CODES, check_code, find_code_tree, load_code_tree, save_code_tree
from tvjax.checkpoints.fingerprints import Fingerprint, fingerprint
from tvjax.checkpoints.folder import open_checkpoint
from tvjax.checkpoints.huggingface import (
    MAX_SHARD_SIZE,
    Pretrained,
    check_new,
    from_pretrained,
    save_pretrained,
    write_checkpoint,
)
from tvjax.checkpoints.memory import contiguous, to_jax
from tvjax.checkpoints.model_card import model_card
from tvjax.checkpoints.orbax import METADATA, PARAMS, load_orbax, save_orbax
from tvjax.checkpoints.reader import check_finite
from tvjax.checkpoints.side_by_side import SideBySide
from tvjax.checkpoints.tensor_dtypes import cast, tensor_header
from tvjax.checkpoints.torch_files import load_tensors
from tvjax.kinds import as_path
from tvjax.models.clip.config import CLIPConfig
from tvjax.models.families import shapes_of
from tvjax.models.key_table import check_copies, find_sources
from tvjax.models.layer_table import LayerTable, Part, Row
from tvjax.progress import Progress, begin

Kind = Literal["huggingface", "orbax", "maxtext", "tunix"]
PICKLES = (".pt", ".pth", ".bin", ".ckpt")

# fmt: off
_BLOCK = (
    ("norm1", "ln_1", "norm", None), ("norm2", "ln_2", "norm", None),
    *((f"attention/{name}", "attn.in_proj", "in_proj", Part(i, 3)) for i, name in enumerate(("query", "key", "value"))),
    ("attention/out", "attn.out_proj", "linear", None),
    ("mlp/up", "mlp.c_fc", "linear", None), ("mlp/down", "mlp.c_proj", "linear", None),
)
OPEN_CLIP = LayerTable(
    rows=(
        Row("logit_scale",                   "logit_scale",                 "array"),
        Row("vision/embeddings/class_token", "visual.class_embedding",      "array"),
        Row("vision/embeddings/patch",       "visual.conv1",                "conv"),
        Row("vision/embeddings/positions",   "visual.positional_embedding", "array"),
        Row("vision/pre_norm",               "visual.ln_pre",               "norm"),
        Row("vision/post_norm",              "visual.ln_post",              "norm"),
        Row("vision/projection/kernel",      "visual.proj",                 "array"),
        Row("text/embeddings/tokens",        "token_embedding",             "embedding"),
        Row("text/embeddings/positions",     "positional_embedding",        "array"),
        Row("text/final_norm",               "ln_final",                    "norm"),
        Row("text/projection/kernel",        "text_projection",             "array"),
        *(Row(f"vision/blocks/{{i}}/{ours}", f"visual.transformer.resblocks.{{i}}.{theirs}", kind, part=part)
          for ours, theirs, kind, part in _BLOCK),
        *(Row(f"text/blocks/{{i}}/{ours}", f"transformer.resblocks.{{i}}.{theirs}", kind, part=part)
          for ours, theirs, kind, part in _BLOCK),
    ),
    unused=("attn_mask", "input_resolution", "context_length", "vocab_size"),  # buffers of OpenAI's models
)
# fmt: on


class Converted(NamedTuple):
    """What `convert` wrote.

    Attributes:
      parameters: number of their entries.
      dtypes: of the parameters.
      fingerprint: of the model as it was written.
      left: why tensors were not written, by key: no parameters, which an Orbax directory does not hold.
    """

    parameters: int
    dtypes: tuple[str, ...]
    fingerprint: str
    left: Mapping[str, str]


def convert(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    to: Kind = "huggingface",
    dtype: DTypeLike | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    like: str | os.PathLike[str] | None = None,
    allow_pickle: bool = False,
    revision: str | None = None,
    scan_layers: bool = True,
    interleaved: bool | None = None,
    progress: Progress | None = None,
) -> Converted:
    """Writes a model as another kind of checkpoint, or in another dtype.

    From one Hugging Face folder to another it goes tensor by tensor: a few of them are in memory at once.

    Args:
      source: a Hugging Face folder or hub id; a folder of `save_orbax`; a checkpoint of MaxText or Tunix (the folder of
        its one step, of its ``items`` or ``model_params``); or the file of a state dict.
      folder: where to; it appears when it is complete.
      to: the kind of checkpoint to write.
      dtype: dtype of the parameters; None keeps that of each.
      max_shard_size: of one safetensors file, in bytes or like ``5GB``.
      like: for a state dict, or a checkpoint of MaxText or Tunix without a ``config.json``, the folder or hub id whose
        ``config.json`` and processors fit it.
      allow_pickle: open a state dict, see `load_state_dict`.
      revision: branch, tag or commit of a hub repository.
      scan_layers: for MaxText, whether the layers are written as one stack.
      interleaved: for MaxText, both ways, whether the pairs that positions rotate lie side by side; None: as
        `tvjax.interop.to_maxtext`.
      progress: called with (leaves read or written, leaves in all, path of the last), and as each other part begins.

    Returns:
      What was written.

    Raises:
      ValueError: a source that is no model, or a folder that is taken; before anything is written.
    """
    check_new(folder)
    if to not in get_args(Kind):
        raise ValueError(f"to is {to!r}, expected {' or '.join(get_args(Kind))}")
    is_orbax = (as_path(source, "a model's folder, hub id or file") / PARAMS / METADATA).is_file()
    is_state_dict = Path(source).suffix in PICKLES and not Path(source).is_dir()
    found_code = None if is_orbax or is_state_dict else find_code_tree(source)
    codes = {to, found_code.code if found_code else ""}
    if "maxtext" not in codes and not (scan_layers and interleaved is None):
        raise ValueError(
            "--scan-layers and --interleaved (scan_layers, interleaved) say how trees of MaxText are laid out: there "
            "is none here"
        )
    if (is_orbax or is_state_dict or found_code) and revision is not None:
        raise ValueError(f"{os.fspath(source)!r} has no revision {revision!r}: leave the revision out")
    if not is_orbax and not is_state_dict and not found_code and to == "huggingface":
        return _rewrite(source, folder, dtype, max_shard_size, revision, progress)
    left: Mapping[str, str] = {}
    if is_state_dict:
        if like is None:
            raise ValueError(
                f"{os.fspath(source)!r} does not say the heads and the activation of its model: name a Hugging Face "
                "folder or hub id of the same shape (--like, like=...), such as openai/clip-vit-base-patch32"
            )
        model = load_state_dict(source, like, allow_pickle=allow_pickle)
    elif found_code is not None:
        options = {"interleaved": interleaved} if found_code.code == "maxtext" else {}
        model = load_code_tree(found_code, source, like, **options)
    elif is_orbax:
        model = load_orbax(source)
    else:
        with open_checkpoint(source, revision) as opened:
            if to in CODES:
                check_code(to, opened.config)
            begin(progress, f"reading {opened.name}")
            model, left = from_pretrained(opened, progress=progress), opened.others
    if dtype is not None:
        leaves = {path: cast(np.asarray(leaf), dtype) for path, leaf in tree.flatten(model.params).items()}
        for path, leaf in leaves.items():
            check_finite(path, leaf)
        model = model.with_params(tree.nest({path: to_jax(leaf) for path, leaf in leaves.items()}))
    arrays = jax.tree.leaves(model.params)
    dtypes = tuple(sorted({leaf.dtype.name for leaf in arrays}))
    found = Converted(sum(leaf.size for leaf in arrays), dtypes, fingerprint(model.params), left)
    begin(progress, f"writing {os.fspath(folder)}")
    if to == "orbax":
        save_orbax(model, folder)
    elif to in CODES:
        written: dict[str, Any] = {"interleaved": interleaved} if to == "maxtext" else {}
        save_code_tree(model, folder, to, **written, **({} if scan_layers else {"scan_axis": None}))
    else:
        card = _card(folder, model.name, model.revision, dtype, found)
        save_pretrained(model, folder, max_shard_size=max_shard_size, card=card, progress=progress)
    return found


def _rewrite(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    dtype: DTypeLike | None,
    max_shard_size: int | str,
    revision: str | None,
    progress: Progress | None,
) -> Converted:
    """A Hugging Face folder as another one, tensor by tensor."""
    written = Fingerprint()
    parameters = 0
    dtypes: set[str] = set()
    with open_checkpoint(source, revision) as opened, SideBySide(opened, hashed=()) as reader:

        def found() -> Converted:
            return Converted(parameters, tuple(sorted(dtypes)), written.hexdigest(), {})

        def card() -> str:
            return _card(folder, opened.name, opened.revision, dtype, found())

        with (
            write_checkpoint(opened, folder, dtype=dtype, max_shard_size=max_shard_size, card=card) as write,
            Behind() as behind,
        ):
            for path, (read,) in reader.leaves(progress):
                leaf = cast(read, dtype)
                behind.do(functools.partial(written.add, path, leaf), functools.partial(write, path, leaf))
                behind.wait()  # what was read is valid until the next
                parameters += leaf.size
                dtypes.add(leaf.dtype.name)
    return found()


def _card(folder: str | os.PathLike[str], name: str, revision: str, dtype: DTypeLike | None, found: Converted) -> str:
    return model_card(
        Path(folder).name,
        "Converted from another checkpoint.",
        {"base_model": name, "base_revision": revision},
        settings={"dtype": None if dtype is None else np.dtype(dtype).name, "source": name},
        results={"fingerprint": found.fingerprint, "parameters": found.parameters},
    )


def load_state_dict(
    file: str | os.PathLike[str], like: str | os.PathLike[str], *, allow_pickle: bool = False
) -> Pretrained:
    """Reads the state dict of a CLIP, with the keys of open_clip and OpenAI or with those of Hugging Face.

    Needs torch.

    Args:
      file: written by ``torch.save``; a checkpoint of open_clip's training (with a ``state_dict``) is one too.
      like: the folder or hub id whose ``config.json`` and processors fit it.
      allow_pickle: must be True: the file is a pickle. Even so only tensors are read from it (``weights_only``).

    Raises:
      ValueError: without `allow_pickle`, without torch, for a file that is none, or whose keys and shapes do not fit;
        the message names every key.
    """
    if not allow_pickle:
        raise ValueError(
            f"{os.fspath(file)!r} is a pickle, which is opened only where you say so (--allow-pickle, "
            "allow_pickle=True): do that for files that you trust"
        )
    if not Path(file).is_file():
        raise ValueError(f"there is no file {os.fspath(file)!r}")
    with open_checkpoint(like) as model:
        config, family = model.config, model.family
    tensors = load_tensors(file)
    table = family.table
    if isinstance(config, CLIPConfig) and any(".resblocks." in key for key in tensors):
        table = OPEN_CLIP
    headers = {key: tensor_header(key, tensor) for key, tensor in tensors.items()}
    sources = find_sources(table, shapes_of(config), headers, os.fspath(file))
    check_copies(table, sources, headers, tensors.__getitem__, os.fspath(file))
    leaves = {}
    for path, found in sources.items():
        check_finite(found.key, tensors[found.key])
        leaves[path] = to_jax(contiguous(found.to_ours(tensors[found.key])))
    return Pretrained(
        family.build(config, tree.nest(leaves)), config, os.fspath(file), "", model.folder, model.settings
    )
