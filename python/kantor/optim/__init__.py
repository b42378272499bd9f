"""Minimisers: a function, or a model, and its curvature."""

from kantor.optim import curvature
from kantor.optim._result import OptimizeResult, OptimizeStatus
from kantor.optim.arncg_optimizer import ARNCG
from kantor.optim.gns import gradient_normalized_smoothness, minimize_gns
from kantor.optim.minimize import minimize

__all__ = [
    "ARNCG",
    "OptimizeResult",
    "OptimizeStatus",
    "curvature",
    "gradient_normalized_smoothness",
    "minimize",
    "minimize_gns",
]
