"""More than one process, and more than one machine: operators and functions shared over ``torch.distributed``.

The solvers are the ones of :mod:`kantor.linalg` and :mod:`kantor.optim`: every process calls them with its own rows.
"""

from kantor._ranks import Ranks, Traffic
from kantor.distributed.init import init
from kantor.distributed.multigrid import ShardedMultigrid
from kantor.distributed.poisson_grid import ShardedPoissonGrid
from kantor.distributed.sharded_csr import ShardedCSR
from kantor.distributed.sharded_graph import ShardedGraph
from kantor.distributed.shares import gather, shares, split
from kantor.distributed.sum_over_ranks import sum_over_ranks

__all__ = [
    "Ranks",
    "ShardedCSR",
    "ShardedGraph",
    "ShardedMultigrid",
    "ShardedPoissonGrid",
    "Traffic",
    "gather",
    "init",
    "shares",
    "split",
    "sum_over_ranks",
]
