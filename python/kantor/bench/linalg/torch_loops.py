"""Conjugate gradients in plain torch: every update in place, every product into a workspace.

An iteration is four vector operations beside the product. `host_loop` keeps its scalars in Python, `device_loop` on the
GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from kantor.bench.linalg.problems import Problem, poisson_slices
from kantor.bench.linalg.solvers import Goal, Plan, Solution

CHECK_EVERY = 16  # iterations between two looks at the residual of a loop that must not wait for the GPU

Apply = Callable[[torch.Tensor, torch.Tensor], object]


def apply_slices(problem: Problem) -> Apply:
    """The 7-point stencil by shifted slices."""
    if problem.grid is None:
        raise ValueError("apply_slices: expected a grid")
    grid = problem.grid
    return lambda p, q: poisson_slices(p.view(grid), q.view(grid))


def apply_csr(problem: Problem) -> Apply:
    """Torch's sparse CSR product into a workspace."""
    matrix = problem.csr.torch()
    return lambda p, q: torch.mv(matrix, p, out=q)


def host_loop(problem: Problem, apply: Apply) -> Plan:
    """The loop for a CPU: scalars are Python floats."""
    b = problem.b
    x, r, p, q = (torch.empty_like(b) for _ in range(4))

    def solve(goal: Goal) -> Solution:
        x.zero_()
        r.copy_(b)
        p.copy_(b)
        rr = float(torch.dot(r, r))
        target = goal.rtol**2 * rr
        done = 0
        while done < goal.iterations and rr > target:
            apply(p, q)
            alpha = rr / float(torch.dot(p, q))
            x.add_(p, alpha=alpha)
            r.sub_(q, alpha=alpha)
            before, rr = rr, float(torch.dot(r, r))
            torch.add(r, p, alpha=rr / before, out=p)
            done += 1
        return Solution(x, done)

    return lambda goal: functools.partial(solve, goal)


def device_loop(problem: Problem, apply: Apply, graph: bool) -> Plan:
    """The loop for a GPU: scalars stay on the device and convergence is looked at every CHECK_EVERY iterations only.

    With `graph`, one iteration is captured as a CUDA graph and replayed.
    """
    b = problem.b
    x, r, p, q = (torch.empty_like(b) for _ in range(4))
    rr = torch.zeros((), dtype=b.dtype, device=b.device)

    def start() -> None:
        x.zero_()
        r.copy_(b)
        p.copy_(b)
        rr.copy_(torch.dot(r, r))

    def step() -> None:
        apply(p, q)
        alpha = rr / torch.dot(p, q)
        x.addcmul_(p, alpha)
        r.addcmul_(q, alpha, value=-1.0)
        new = torch.dot(r, r)
        torch.addcmul(r, p, new / rr, out=p)
        rr.copy_(new)

    advance: Callable[[], object] = step
    if graph:
        cuda: Any = torch.cuda  # its constructors have no annotations
        side = cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # capture needs the libraries' workspaces to exist
            start()
            step()
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            step()
        advance = captured.replay

    def solve(goal: Goal) -> Solution:
        start()
        target = goal.rtol**2 * float(rr) if goal.rtol > 0 else 0.0
        done = 0
        while done < goal.iterations:
            if goal.rtol > 0 and done % CHECK_EVERY == 0 and float(rr) <= target:
                break
            advance()
            done += 1
        return Solution(x, done)

    return lambda goal: functools.partial(solve, goal)


def torch_slices(problem: Problem, graph: bool = False) -> Plan:
    """The loop with the stencil by slices; on a GPU, as a CUDA graph if asked."""
    apply = apply_slices(problem)
    return device_loop(problem, apply, graph) if problem.b.is_cuda else host_loop(problem, apply)


def torch_csr(problem: Problem, graph: bool = False) -> Plan:
    """The loop with torch's sparse CSR; on a GPU, as a CUDA graph if asked."""
    apply = apply_csr(problem)
    return device_loop(problem, apply, graph) if problem.b.is_cuda else host_loop(problem, apply)
