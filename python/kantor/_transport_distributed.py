"""``kantor transport --distributed``: every process reads and solves its rows, the first writes what they find."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from kantor._ranks import Ranks
from kantor._transport_problem import Problem
from kantor.distributed import gather


def gather_problem(ranks: Ranks, problem: Problem) -> Problem:
    """On the first process the problem with all points."""
    X = None if problem.X is None else gather(problem.X, ranks, dim=0, target=0)
    return problem if X is None else replace(problem, X=X)


def gather_plan(ranks: Ranks, plan: Tensor | None, full_shape: tuple[int, int]) -> Tensor | None:
    """On the first process the plan of all rows; None where a process has none, and on the others."""
    if ranks.max(plan is None)[0]:
        return None
    assert plan is not None
    parts = (plan.crow_indices().diff(), plan.col_indices(), plan.values())
    lengths, columns, values = (gather(part, ranks, target=0) for part in parts)
    if lengths is None or columns is None or values is None:
        return None
    crow = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's sparse matrices are in beta
        return torch.sparse_csr_tensor(crow, columns, values, full_shape)
