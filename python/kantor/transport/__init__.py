"""Optimal transport: entropic problems to machine precision, and what is built on them."""

from kantor.transport._result import TransportResult, TransportStatus
from kantor.transport.divergence import sinkhorn_divergence
from kantor.transport.doubly_stochastic import doubly_stochastic
from kantor.transport.solve import TransportInfo, sinkhorn, solve
from kantor.transport.solve_sample import solve_sample
from kantor.transport.unbalanced import unbalanced

__all__ = [
    "TransportInfo",
    "TransportResult",
    "TransportStatus",
    "doubly_stochastic",
    "sinkhorn",
    "sinkhorn_divergence",
    "solve",
    "solve_sample",
    "unbalanced",
]
