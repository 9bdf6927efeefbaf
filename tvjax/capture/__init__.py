"""Sites in any JAX function: where a parameter meets an activation, and what can be seen there."""

from tvjax.capture.check import check_gradient_identity, gradient_from_sites
from tvjax.capture.finder import sites
from tvjax.capture.probe import Captured, Instrumented, capture, capture_gradients, instrument
from tvjax.capture.sites import Site, SiteTable

__all__ = [
    "Captured",
    "Instrumented",
    "Site",
    "SiteTable",
    "capture",
    "capture_gradients",
    "check_gradient_identity",
    "gradient_from_sites",
    "instrument",
    "sites",
]
