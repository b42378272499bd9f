"""Optimal transport: entropic problems to machine precision, and what is built on them."""

from kantor.transport._result import TransportResult, TransportStatus
from kantor.transport.barycenter import BarycenterResult, barycenter
from kantor.transport.densities import DensityDistance, wasserstein
from kantor.transport.divergence import sinkhorn_divergence
from kantor.transport.doubly_stochastic import doubly_stochastic
from kantor.transport.one_dimensional import plan_1d, wasserstein_1d
from kantor.transport.sliced import sliced_wasserstein
from kantor.transport.solve import TransportInfo, sinkhorn, solve
from kantor.transport.solve_sample import solve_sample
from kantor.transport.unbalanced import unbalanced

__all__ = [
    "BarycenterResult",
    "DensityDistance",
    "TransportInfo",
    "TransportResult",
    "TransportStatus",
    "barycenter",
    "doubly_stochastic",
    "plan_1d",
    "sinkhorn",
    "sinkhorn_divergence",
    "sliced_wasserstein",
    "solve",
    "solve_sample",
    "unbalanced",
    "wasserstein",
    "wasserstein_1d",
]
