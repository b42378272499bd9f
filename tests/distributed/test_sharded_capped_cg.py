"""Capped conjugate gradients over ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kantor._ops import emulated
from kantor._ranks import Ranks
from kantor.linalg import CSR, Callable, capped_cg
from ranks import outcomes, run
from systems_in_shares import COUNTS, F64, matrix, sharded, vector

SIZES = [1, 2, 3, 4]


def _indefinite() -> CSR:
    A = matrix()
    diagonal = torch.arange(177)
    shift = torch.linspace(-6.0, 2.0, 177, dtype=F64)
    rows = torch.repeat_interleave(diagonal, A.crow.diff())
    return CSR.from_coo(
        torch.cat([rows, diagonal]), torch.cat([A.col, diagonal]), torch.cat([A.values, shift]), (177, 177)
    )


def _numbers(result: Any) -> tuple[Any, ...]:
    return (
        [str(status) for status in result.per_system_status],
        result.per_system_iterations.tolist(),
        result.per_system_curvature.tolist(),
        result.per_system_hnorm.tolist(),
    )


CASES: list[tuple[str, dict[str, Any]]] = [
    ("definite", {"damping": 1e-3, "rtol": 1e-4, "rule": "step"}),
    ("definite", {"damping": 1e-2, "rtol": 0.1, "rule": "residual", "M_inv": "jacobi"}),
    ("indefinite", {"damping": 1e-3, "rtol": 1e-3, "rule": "truncated"}),
]


def _solve(ranks: Ranks, counts: list[int] | None, device: str) -> list[Any]:
    results = []
    for kind, options in CASES:
        S = sharded(ranks, matrix() if kind == "definite" else _indefinite(), counts)
        for scale in (1.0, 1e-160):
            g = scale * S.split(vector(2, 177))
            if device == "emulated":
                with emulated():
                    result = capped_cg(S, g, **options)
            else:
                result = capped_cg(S, g, **options)
            results.append((_numbers(result), S.gather(result.d) / scale))
    return results


@pytest.mark.parametrize(("size", "device"), [*((size, "cpu") for size in SIZES), (1, "emulated"), (3, "emulated")])
def test_directions_are_those_of_one_process(size: int, device: str) -> None:
    expected = []
    for kind, options in CASES:
        A = matrix() if kind == "definite" else _indefinite()
        expected += [(capped_cg(A, scale * vector(2, 177), **options), scale) for scale in (1.0, 1e-160)]
    statuses = set()
    for results in run(size, _solve, COUNTS[size], device):
        for ((status, iterations, curvature, hnorm), d), (single, scale) in zip(results, expected, strict=True):
            assert status == [str(s) for s in single.per_system_status]
            assert iterations == single.per_system_iterations.tolist()
            assert curvature == pytest.approx(single.per_system_curvature.tolist(), rel=1e-8)
            # A lower bound, the largest ratio of a run: near the end of one it hangs on rounding.
            assert hnorm == pytest.approx(single.per_system_hnorm.tolist(), rel=0.25)
            torch.testing.assert_close(d, single.d / scale, rtol=1e-7, atol=1e-8)
            statuses.update(status)
    assert statuses == {"SOL", "NC"}


def _suspicious(ranks: Ranks) -> tuple[Any, ...]:
    """Test 4's look at a direction, whose dot products go over all ranks."""
    from kantor.linalg.capped_cg import CappedSolver

    S = sharded(ranks, _indefinite())
    g = S.split(vector(177))
    solver = CappedSolver(g, ranks)
    solver.log_T_shift = -60.0
    solver.solve(S.matvec, g, 1e-3, 1e-3, rule="step")
    return tuple(solver.outcome()), solver.n_hvp, S.gather(solver.d)


def test_the_rare_branch_sums_over_ranks() -> None:
    (one,) = run(1, _suspicious)
    for outcome, products, d in run(3, _suspicious):
        assert outcome[:2] == one[0][:2]
        assert outcome[2:] == pytest.approx(one[0][2:], rel=1e-6)
        assert products == one[1]
        torch.testing.assert_close(d, one[2], rtol=1e-6, atol=1e-7)


def _fails(ranks: Ranks, case: str) -> None:
    S = sharded(ranks, matrix())
    g = S.split(vector(177))
    if case == "nan" and ranks.rank == 1:
        g[0] = torch.nan
    if case == "zero":
        g.zero_()
    damping = 0.1 * (1 + ranks.rank) if case == "damping" else 0.1
    capped_cg(Callable(S.matvec, len(g), ranks=ranks), g, damping=damping)


@pytest.mark.parametrize(
    ("case", "message"),
    [("nan", "rank 1: capped_cg: g"), ("zero", "not zero"), ("damping", "damping of system 0: expected the same")],
)
def test_errors_on_all_ranks(case: str, message: str) -> None:
    for error in outcomes(2, _fails, case):
        assert isinstance(error, ValueError)
        assert message in str(error)


def _traffic(ranks: Ranks, iterations: int) -> tuple[int, int]:
    S = sharded(ranks, matrix())
    g = S.split(vector(177))
    ranks.traffic.reset()
    capped_cg(S, g, damping=1e-9, rtol=1e-9, max_iter=iterations)
    return ranks.traffic.all_reduce.bytes, ranks.traffic.all_reduce.messages


def test_bytes_of_an_iteration() -> None:
    """Two reduction points of four sums, each with two numbers that end the iteration where a rank asks for it."""
    for (bytes_5, messages_5), (bytes_15, messages_15) in zip(run(2, _traffic, 5), run(2, _traffic, 15), strict=True):
        assert messages_15 - messages_5 == 10 * 2
        assert bytes_15 - bytes_5 == 10 * 2 * 8 * (4 + 2)
