"""Models and trees of arrays on disk."""

from tvjax.checkpoints.adapter_writer import save_adapter
from tvjax.checkpoints.adapters import load_adapter
from tvjax.checkpoints.coefficients import TrainingStore, load_coefficients, save_coefficients
from tvjax.checkpoints.conversion import convert
from tvjax.checkpoints.fingerprints import fingerprint
from tvjax.checkpoints.huggingface import Pretrained, from_pretrained, save_pretrained
from tvjax.checkpoints.model_card import model_card
from tvjax.checkpoints.orbax import load_orbax, save_orbax
from tvjax.checkpoints.processors import Processor, load_processor
from tvjax.checkpoints.safetensors import load_tree, map_tree, save_tree
from tvjax.checkpoints.transport_state import TransportStore, load_state, save_state

__all__ = [
    "Pretrained",
    "Processor",
    "TrainingStore",
    "TransportStore",
    "convert",
    "fingerprint",
    "from_pretrained",
    "load_adapter",
    "load_coefficients",
    "load_orbax",
    "load_processor",
    "load_state",
    "load_tree",
    "map_tree",
    "model_card",
    "save_adapter",
    "save_coefficients",
    "save_orbax",
    "save_pretrained",
    "save_state",
    "save_tree",
]
