"""Moving a task vector into another pre-trained model, without training."""

from tvjax.transport.ariadne import ariadne
from tvjax.transport.base import State, Transport, chain, identity, scale_by
from tvjax.transport.bico import bico
from tvjax.transport.fit import fit, transport_stages
from tvjax.transport.gradfix import gradfix
from tvjax.transport.leaf_report import LeafReport, leaf_forms, leaf_report, summary
from tvjax.transport.likeness import Likeness, likeness
from tvjax.transport.orthogonal_shift import orthogonal_shift
from tvjax.transport.permutation import transfusion
from tvjax.transport.placed import place
from tvjax.transport.registry import make_transport, methods, register
from tvjax.transport.statistics import Options
from tvjax.transport.theseus import theseus

__all__ = [
    "LeafReport",
    "Likeness",
    "Options",
    "State",
    "Transport",
    "ariadne",
    "bico",
    "chain",
    "fit",
    "gradfix",
    "identity",
    "leaf_forms",
    "leaf_report",
    "likeness",
    "make_transport",
    "methods",
    "orthogonal_shift",
    "place",
    "register",
    "scale_by",
    "summary",
    "theseus",
    "transfusion",
    "transport_stages",
]
