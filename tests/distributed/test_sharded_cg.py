"""Conjugate gradients over ranks: the same answers as on one process, the same decisions on all, counted bytes."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch

from kantor import ConvergenceError
from kantor._ops import emulated
from kantor._ranks import Ranks
from kantor.linalg import Callable, SolveStatus, cg, fcg
from ranks import outcomes, run
from systems_in_shares import COUNTS, F64, laplacian, matrix, sharded, vector

SIZES = [1, 2, 3, 4]


def _summary(result: Any, S: Any) -> dict[str, Any]:
    return {
        "x": S.gather(result.x),
        "status": result.status,
        "iterations": result.iterations,
        "per_system": result.per_system_iterations.tolist(),
        "residual": result.residual_norm,
        "history": result.history.residual_norms if hasattr(result.history, "residual_norms") else None,
        "curvature": result.curvature,
    }


def _solve(ranks: Ranks, counts: list[int] | None, M: str | None, device: str) -> dict[str, Any]:
    A = matrix()
    S = sharded(ranks, A, counts)
    b = vector(3, 177)
    b[1] = 0
    x0 = vector(3, 177, seed=5)
    if device == "emulated":
        with emulated():
            return _summary(cg(S, S.split(b), S.split(x0), M=M, rtol=1e-10), S)
    return _summary(cg(S, S.split(b), S.split(x0), M=M, rtol=1e-10), S)


@pytest.mark.parametrize(("size", "device"), [*((size, "cpu") for size in SIZES), (1, "emulated"), (3, "emulated")])
@pytest.mark.parametrize("M", [None, "jacobi"])
def test_solutions_are_those_of_one_process(size: int, M: str | None, device: str) -> None:
    A, b, x0 = matrix(), vector(3, 177), vector(3, 177, seed=5)
    b[1] = 0
    single = cg(A, b, x0, M=M, rtol=1e-10)
    for result in run(size, _solve, COUNTS[size], M, device):
        assert result["status"] is SolveStatus.CONVERGED
        assert all(abs(a - b) <= 1 for a, b in zip(result["per_system"], single.per_system_iterations, strict=True))
        torch.testing.assert_close(result["x"], single.x, rtol=1e-7, atol=1e-8)


def _cases(ranks: Ranks, counts: list[int] | None) -> dict[str, Any]:
    """Every status and option once, in one job."""
    A = matrix()
    S = sharded(ranks, A, counts)
    b = S.split(vector(177))
    tiny = 1e-170 * b
    return {
        "ic0": _summary(cg(S, b, M="ic0", rtol=1e-10), S),
        "callable": _summary(cg(S, b, M=lambda r: r / S.diagonal(), rtol=1e-10), S),
        "bare": _summary(cg(Callable(S.matvec, len(b), ranks=ranks), b, rtol=1e-10), S),
        "sum": _summary(cg(2.0 * S + 0.5 * S, b, rtol=1e-10), S),
        "maxiter": _summary(cg(S, b, rtol=1e-10, maxiter=3), S),
        "indefinite": _summary(cg(-1.0 * S, b), S),
        "stopped": _summary(cg(S, b, rtol=1e-10, callback=lambda k: ranks.rank == 0 and k.iteration == 4), S),
        "tiny": _summary(cg(S, tiny, rtol=1e-10), S),
        "refined": _summary(cg(S, b, rtol=1e-12, storage=torch.float32, M="jacobi"), S),
        "zero": _summary(cg(S, 0 * b, S.split(vector(177, seed=3))), S),
        "atol": _summary(cg(S, tiny, atol=1e-171), S),
    }


@pytest.mark.parametrize("size", SIZES)
def test_every_way_to_end(size: int) -> None:
    A, b = matrix(), vector(177)
    exact = torch.linalg.solve(A.dense(), b)
    results = run(size, _cases, COUNTS[size])
    for result in results:
        for name in ("ic0", "callable", "bare", "refined"):
            assert result[name]["status"] is SolveStatus.CONVERGED, name
            torch.testing.assert_close(result[name]["x"], exact, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(result["sum"]["x"], exact / 2.5, rtol=1e-7, atol=1e-8)
        single = cg(A, b, rtol=1e-10)
        assert abs(result["bare"]["iterations"] - single.iterations) <= 1
        assert result["bare"]["history"][:20] == pytest.approx(single.history.residual_norms[:20], rel=1e-9)
        with pytest.warns(RuntimeWarning):
            limited = cg(A, b, rtol=1e-10, maxiter=3)
        assert result["maxiter"]["status"] is SolveStatus.MAXITER
        assert result["maxiter"]["residual"] == pytest.approx(limited.residual_norm, rel=1e-10)
        torch.testing.assert_close(result["maxiter"]["x"], limited.x, rtol=1e-10, atol=1e-12)
        with pytest.warns(RuntimeWarning):
            indefinite = cg(-1.0 * A, b)
        assert result["indefinite"]["status"] is SolveStatus.NEGATIVE_CURVATURE
        assert result["indefinite"]["curvature"] == pytest.approx(indefinite.curvature, rel=1e-10)
        assert result["stopped"]["status"] is SolveStatus.STOPPED
        assert result["stopped"]["iterations"] == 4
        torch.testing.assert_close(result["tiny"]["x"] / 1e-170, exact, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(result["atol"]["x"] / 1e-170, exact, rtol=1.0, atol=1.0)
        assert not result["zero"]["x"].any()
        assert all(result[name]["iterations"] == results[0][name]["iterations"] for name in result)


def _fails(ranks: Ranks, case: str) -> Any:
    S = sharded(ranks, matrix())
    b = S.split(vector(177))
    last = ranks.rank == ranks.size - 1
    if case == "nan" and last:
        b[2] = torch.nan
    if case == "length" and last:
        b = b[1:]
    if case == "dtype" and last:
        b = b.float()
    if case == "fcg":
        return fcg(S, b)
    if case == "check":
        return cg(S, b, maxiter=1).check()
    if case == "asymmetric" and last:
        S._coupling.values.mul_(-2.0)
    rtol = 1e-5 if last or case != "rtol" else 1e-6
    x0 = b if last and case == "x0" else None
    M = "jacobi" if last and case == "M" else None
    return cg(S, b, x0, M=M, rtol=rtol, maxiter=2 if case == "asymmetric" else None)


@pytest.mark.parametrize(
    ("case", "kind", "message"),
    [
        ("nan", ValueError, "rank 2: cg: b: expected finite values, got nan at 2"),
        ("length", ValueError, "rank 2: cg: b: expected shape"),
        ("dtype", TypeError, "rank 2: cg: A is float64, b is float32"),
        ("rtol", ValueError, "cg: rtol: expected the same on every rank, got 1e-06 to 1e-05"),
        ("x0", ValueError, "x0 .given or not.: expected the same"),
        ("M", ValueError, "cg: M: expected the same"),
        ("asymmetric", ValueError, "A is not symmetric"),
        ("fcg", TypeError, "across them there are cg and capped_cg"),
        ("check", ConvergenceError, ""),
    ],
)
def test_what_is_wrong_on_one_rank_is_an_error_on_all(case: str, kind: type[Exception], message: str) -> None:
    for error in outcomes(3, _fails, case):
        assert isinstance(error, kind)
        assert message.replace(".given or not.", "(given or not)") in str(error)
    run(3, _shape)  # the ranks still understand each other


def _shape(ranks: Ranks) -> int:
    return sharded(ranks, matrix()).n


def _interrupted(ranks: Ranks, how: str) -> Any:
    S = sharded(ranks, laplacian((40, 10)))
    calls = 0

    def product(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 8 and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return S.matvec(x)

    A = Callable(product, S.shape[0], ranks=ranks)
    b = torch.ones(S.shape[0], dtype=F64)
    with torch.no_grad():
        result = cg(A, b, rtol=1e-12, callback=lambda _: None, interrupt=how)  # type: ignore[arg-type]
    return result.status, result.iterations, float((S.matvec(result.x) - b).norm())


def test_an_interrupt_on_one_rank_ends_all_at_the_same_iteration() -> None:
    results = run(3, _interrupted, "return")
    assert {status for status, _, _ in results} == {SolveStatus.INTERRUPTED}
    assert len({iterations for _, iterations, _ in results}) == 1
    assert 5 <= results[0][1] <= 12
    assert all(isinstance(error, KeyboardInterrupt) for error in outcomes(3, _interrupted, "raise"))


def _gradients(ranks: Ranks, counts: list[int] | None) -> list[Any]:
    A = matrix()
    S = sharded(ranks, A, counts)
    b = S.split(vector(2, 177)).requires_grad_()
    S.own.values.requires_grad_()
    weight = S.split(vector(2, 177, seed=2))
    (cg(S, b, rtol=1e-12).x * weight).sum().backward()
    return [S.gather(b.grad), float(ranks.sum(float(S.own.values.grad @ S.own.values.detach()))[0])]


@pytest.mark.parametrize("size", [1, 3])
def test_derivatives_of_a_solution(size: int) -> None:
    A = matrix()
    x = torch.linalg.solve(A.dense(), vector(2, 177).T).T
    adjoint = torch.linalg.solve(A.dense(), vector(2, 177, seed=2).T).T
    for grad_b, grad_own in run(size, _gradients, COUNTS[size]):
        torch.testing.assert_close(grad_b, adjoint, rtol=1e-7, atol=1e-8)
        if size == 1:
            assert grad_own == pytest.approx(-float((adjoint * A.matvec(x)).sum()), rel=1e-7)


def _traffic(ranks: Ranks, M: str | None, iterations: int) -> tuple[int, int, int]:
    S = sharded(ranks, laplacian((24, 6, 5)))
    b = torch.ones(S.shape[0], dtype=F64)
    with torch.no_grad():
        ranks.traffic.reset()
        cg(S, b, M=M, rtol=0.0, maxiter=iterations)
        return S.ghosts, ranks.traffic.exchange.bytes, ranks.traffic.all_reduce.bytes


@pytest.mark.parametrize(("M", "sums"), [(None, 2), ("jacobi", 3)])
def test_bytes_of_an_iteration(M: str | None, sums: int) -> None:
    """Two reduction points, each with two numbers that end the iteration where a rank asks for it, and one exchange."""
    short, long = run(3, _traffic, M, 5), run(3, _traffic, M, 15)
    for (ghosts, exchanged, reduced), (_, exchanged_long, reduced_long) in zip(short, long, strict=True):
        assert ghosts in (30, 60)
        assert exchanged_long - exchanged == 10 * 8 * ghosts  # on this grid every rank sends as much as it gets
        assert reduced_long - reduced == 10 * 8 * (sums + 2 * 2)
