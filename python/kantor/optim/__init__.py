"""Minimisers: a function, or a model, and its curvature."""

from kantor.optim import curvature
from kantor.optim._result import OptimizeResult, OptimizeStatus
from kantor.optim.adahessian import AdaHessian
from kantor.optim.arncg_optimizer import ARNCG
from kantor.optim.empirical_fisher import EmpiricalFisher
from kantor.optim.gns import gradient_normalized_smoothness, minimize_gns
from kantor.optim.hessian_diagonal import hessian_diagonal
from kantor.optim.lanton import LANTON
from kantor.optim.lmo import dual_norm, lmo, lmo_param_groups, primal_norm
from kantor.optim.mfac import MFAC
from kantor.optim.minimize import minimize
from kantor.optim.prune_obs import prune_obs

__all__ = [
    "ARNCG",
    "LANTON",
    "MFAC",
    "AdaHessian",
    "EmpiricalFisher",
    "OptimizeResult",
    "OptimizeStatus",
    "curvature",
    "dual_norm",
    "gradient_normalized_smoothness",
    "hessian_diagonal",
    "lmo",
    "lmo_param_groups",
    "minimize",
    "minimize_gns",
    "primal_norm",
    "prune_obs",
]
