"""Implicit diffusion: backward Euler steps ``(I + tau L) x_{k+1} = x_k``, stable for any tau."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from kantor._checks import check_finite, is_readable
from kantor._errors import ConvergenceWarning
from kantor._result import SolveResult
from kantor.graph._arguments import Similarity, check_count, check_fit, check_points, check_similarity, check_step
from kantor.graph._recurrence import row_sums
from kantor.graph.graph import Graph
from kantor.graph.stability import require_symmetric
from kantor.linalg import CSR, Dense, Diagonal, LinearOperator, cg


@dataclass(frozen=True, repr=False)
class ImplicitInfo:
    """How the linear solves of :func:`implicit_diffuse` went. Prints as a small table.

    Attributes
    ----------
    converged : bool
        Whether every column of every step met the tolerance.
    iterations : int
        Of conjugate gradients, over all steps.
    residual : float
        The largest relative residual ``|b - A x| / |b|``.
    message : str
        What happened and what to try.
    solves : tuple of SolveResult
        One a step, or one a step and batch entry for a batch of weights.
    """

    converged: bool
    iterations: int
    residual: float
    message: str
    solves: tuple[SolveResult, ...]

    def __repr__(self) -> str:
        rows = [
            ("converged", "yes" if self.converged else "no"),
            ("iterations", f"{self.iterations:,}"),
            ("|b - Ax| / |b|", f"{self.residual:.3e}"),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(["implicit diffusion", *(f"  {n:<{width}}  {v}" for n, v in rows), f"  {self.message}"])


def implicit_diffuse(
    u: Tensor,
    graph: Similarity,
    time: float | Tensor,
    num_steps: int = 1,
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    maxiter: int = 500,
) -> tuple[Tensor, ImplicitInfo]:
    """Diffuse for a time by backward Euler steps, each one linear solve: ``u <- (I + (time / num_steps) L)^-1 u``.

    Stable for any time. The matrix is an M-matrix: positive values stay positive, and rows that sum to one keep it, up
    to the tolerance of the solve.

    Parameters
    ----------
    u : Tensor
        ``(n, d)``, or ``(B, n, d)`` for a batch; float32 or float64; finite.
    graph : Graph or Tensor
        Symmetric weights: a graph, or dense ``(n, n)`` or ``(B, n, n)``, of the dtype and on the device of u.
    time : float or Tensor
        A number >= 0; may require a gradient.
    num_steps : int
        >= 1.
    rtol, atol : float
        Tolerances of conjugate gradients, for each column: ``|u_k - (I + tau L) u_{k+1}| <= max(rtol |u_k|, atol)``.
        Default of rtol: 1e-10 in float64, 1e-7 in float32.
    maxiter : int
        Of each solve.

    Returns
    -------
    u : Tensor
        Shaped like u; differentiable (implicitly) with respect to u, the weights and the time.
    info : ImplicitInfo
        ``converged``, ``iterations``, ``residual``, and the results of the solves.

    Raises
    ------
    TypeError
        u is no tensor of these dimensions and dtypes, graph none of these, time no number.
    ValueError
        u and graph differ in nodes, dtype or device; u is not finite; weights that are not symmetric, negative or not
        finite; an argument out of range.

    Warns
    -----
    ConvergenceWarning
        Once, when a solve stopped short of its tolerance. Not inside torch.compile and torch.vmap.

    Notes
    -----
    Conjugate gradients with the Jacobi preconditioner, all columns at once and in double precision, since single
    precision cannot meet a tolerance once ``tau lambda_max`` is in the hundreds. O(sqrt(1 + tau lambda_max)) products
    with the graph at most. Derivatives cost one more solve a step. Deterministic.

    Source: Wang, Bao and Shi, *Convection-Diffusion Equation: A Theoretically Certified Framework for Neural Networks*,
    arXiv 2403.15726, with the explicit steps replaced.

    Examples
    --------
    >>> import torch
    >>> from kantor.graph import implicit_diffuse
    >>> weights = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> u, info = implicit_diffuse(torch.tensor([[3.0], [0.0]]), weights, time=1.0)
    >>> u.T, info.converged
    (tensor([[2., 1.]]), True)
    """
    u = check_points("implicit_diffuse", u, "u")
    graph = check_similarity("implicit_diffuse", graph)
    check_fit("implicit_diffuse", u, graph, "u")
    check_finite(u, "implicit_diffuse", "u")
    time = check_step("implicit_diffuse", time, "time", graph)
    num_steps = check_count("implicit_diffuse", num_steps, least=1)
    maxiter = check_count("implicit_diffuse", maxiter, "maxiter")
    require_symmetric("implicit_diffuse", graph, "conjugate gradients")
    rtol = (1e-10 if u.dtype == torch.float64 else 1e-7) if rtol is None else rtol
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        check_step("implicit_diffuse", tolerance, name)

    # Inside torch.compile and torch.vmap nobody can tell how a solve went.
    inputs = (u, graph.weight if isinstance(graph, Graph) else graph, *([time] if isinstance(time, Tensor) else []))
    is_checked = all(map(is_readable, inputs))
    tau = (time.double() if isinstance(time, Tensor) else time) / num_steps
    if isinstance(graph, Tensor) and graph.ndim == 3:
        operators = [_operator(weights, tau) for weights in graph]
    else:
        operators = [_operator(graph, tau)]
    return solve_steps(u, operators, num_steps if u.numel() else 0, rtol, atol, maxiter, is_checked)


def solve_steps(
    u: Tensor, operators: list[LinearOperator], num_steps: int, rtol: float, atol: float, maxiter: int, is_checked: bool
) -> tuple[Tensor, ImplicitInfo]:
    """Solve with the one operator, or with that of each batch entry, num_steps times."""
    dtype, u = u.dtype, u.double()
    solves: list[SolveResult] = []

    def solve(A: LinearOperator, columns: Tensor) -> Tensor:
        with warnings.catch_warnings() if is_checked else nullcontext():
            if is_checked:
                warnings.simplefilter("ignore", RuntimeWarning)  # one of our own for all of them follows
            result = cg(A, columns.mT, M="jacobi", rtol=rtol, atol=atol, maxiter=maxiter)
        solves.append(result)
        return result.x.mT

    for _ in range(num_steps):
        if len(operators) == 1:
            u = solve(operators[0], u)
        else:
            u = torch.stack([solve(A, entry) for A, entry in zip(operators, u, strict=True)])
    info = _summary(solves)
    if is_checked and not info.converged:
        warnings.warn(f"implicit_diffuse: {info.message}", ConvergenceWarning, stacklevel=3)
    u = u.to(dtype)
    return (u if solves else u.clone()), info


def _operator(graph: Similarity, tau: float | Tensor) -> LinearOperator:
    """``I + tau (D - W)``: a diagonal and the graph's own pattern."""
    if not isinstance(graph, Graph):
        scaled = tau * graph.double()
        return Dense(torch.diag_embed(1 + scaled.sum(-1)) - scaled)
    scaled, n = tau * graph.weight.double(), graph.num_nodes
    return Diagonal(1 + row_sums(graph, scaled)) + CSR(graph.rowptr, graph.col, -scaled, (n, n))


def _summary(solves: list[SolveResult]) -> ImplicitInfo:
    failed = next((result for result in solves if not result.converged), None)
    return ImplicitInfo(
        converged=failed is None,
        iterations=sum(result.iterations for result in solves),
        residual=max([result.relative_residual for result in solves], default=0.0),
        message=(failed or solves[0]).message if solves else "nothing to solve",
        solves=tuple(solves),
    )


__all__ = ["ImplicitInfo", "implicit_diffuse"]
