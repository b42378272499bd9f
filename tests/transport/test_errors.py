"""Bad input: what raises, and that the message says which argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import measures
from kantor import ConvergenceError
from kantor.transport import (
    TransportResult,
    doubly_stochastic,
    sinkhorn,
    sinkhorn_divergence,
    solve,
    solve_sample,
    unbalanced,
)
from measures import F32, F64, ends_with, normal, uniform, weights

N, M = 5, 4
C, A, B = uniform(N, M), weights(N), weights(M)
X, Y = normal(N, 2), normal(M, 2, seed=1)
NAN, INF = math.nan, math.inf


def put(t: Tensor, index: Any, value: float) -> Tensor:
    t = t.clone()
    t[index] = value
    return t


# --- the arguments of solve ---

CALLS: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    # not tensors, dtypes, devices
    (TypeError, r"solve: C: expected a torch\.Tensor, got ndarray", lambda: solve(C.numpy(), reg=1)),
    (TypeError, r"solve: C: expected dtype float32 or float64, got int64", lambda: solve(C.long(), reg=1)),
    (TypeError, r"solve: C: expected dtype float32 or float64, got float16", lambda: solve(C.half(), reg=1)),
    (TypeError, r"solve: C: expected dtype float32 or float64, got complex128", lambda: solve(C + 0j, reg=1)),
    (TypeError, r"solve: C: expected a dense tensor, got layout", lambda: solve(C.to_sparse_csr(), reg=1)),
    (TypeError, r"solve: a: expected a torch\.Tensor, got list; call torch", lambda: solve(C, [1.0] * N, reg=1)),
    (ValueError, r"C is a matrix of costs: .*solve_sample", lambda: solve(C, torch.ones(9, 2, dtype=F64), reg=1)),
    (TypeError, r"solve: b: expected dtype float32 or float64, got int64", lambda: solve(C, A, B.long(), reg=1)),
    (TypeError, r"solve: C is float64, a is float32; convert one", lambda: solve(C, A.to(F32), B, reg=1)),
    (TypeError, r"solve: C is float32, b is float64; convert one", lambda: solve(C.to(F32), None, B, reg=1)),
    (ValueError, r"solve: C is on cpu, a on meta; move one", lambda: solve(C, A.to("meta"), B, reg=1)),
    # shapes
    (ValueError, r"solve: C: expected shape \(n, m\) or \(B, n, m\), got \(5,\)", lambda: solve(C[:, 0], reg=1)),
    (ValueError, r"solve: C: .*got \(1, 1, 5, 4\)", lambda: solve(C[None, None], reg=1)),
    (ValueError, r"solve: C: expected at least one problem, row and column, got", lambda: solve(C[:0], reg=1)),
    (ValueError, r"got shape \(5, 0\)", lambda: solve(C[:, :0], reg=1)),
    (ValueError, r"got shape \(0, 5, 4\)", lambda: solve(C.expand(0, N, M), reg=1)),
    (ValueError, r"solve: a: expected shape \(5,\), got \(4,\)", lambda: solve(C, B, B, reg=1)),
    (ValueError, r"solve: b: expected shape \(4,\), got \(5,\)", lambda: solve(C, A, A, reg=1)),
    (ValueError, r"solve: a: expected shape \(5,\), got \(5, 1\)", lambda: solve(C, A[:, None], B, reg=1)),
    (
        ValueError,
        r"solve: b: expected shape \(4,\) or \(3, 4\), got \(2, 4\)",
        lambda: solve(C.expand(3, N, M), A, B.expand(2, M), reg=1),
    ),
    # values
    (ValueError, r"solve: C: expected costs that are finite or \+inf \(a forbidden pair\), got NaN at \(2, 1\)",
     lambda: solve(put(C, (2, 1), NAN), A, B, reg=1)),
    (ValueError, r"solve: C: .*got -inf at \(0, 3\)", lambda: solve(put(C, (0, 3), -INF), A, B, reg=1)),
    (ValueError, r"solve: C: .*got NaN at \(1, 2, 1\)",
     lambda: solve(torch.stack([C, put(C, (2, 1), NAN)]), A, B, reg=1)),
    (ValueError, r"solve: C: .*got NaN", lambda: solve(put(put(C, (4, 0), INF), (2, 1), NAN), A, B, reg=1)),
    (ValueError, r"solve: C: .*got -inf", lambda: solve(put(put(C, (4, 0), INF), (2, 1), -INF), A, B, reg=1)),
    (ValueError, r"solve: a: expected finite values, got nan at 2", lambda: solve(C, put(A, 2, NAN), B, reg=1)),
    (ValueError, r"solve: b: expected finite values, got inf at 3", lambda: solve(C, A, put(B, 3, INF), reg=1)),
    (ValueError, r"solve: a: expected weights >= 0, got -0\.5 at 1", lambda: solve(C, put(A, 1, -0.5), B, reg=1)),
    (ValueError, r"solve: b: expected weights >= 0, got -1\.0 at 0", lambda: solve(C, A, put(B, 0, -1.0), reg=1)),
    (ValueError, r"solve: b: expected weights >= 0, got -1\.0 at \(1, 0\)",
     lambda: solve(C.expand(2, N, M), A, torch.stack([B, put(B, 0, -1.0)]), reg=1)),
    (ValueError, r"solve: a: expected weights with a positive sum, got zeros", lambda: solve(C, 0 * A, B, reg=1)),
    (ValueError, r"solve: a and b: expected equal masses, got 1 and 0\.999; normalise them, or use unbalanced=rho",
     lambda: solve(C, A, 0.999 * B, reg=1)),
    (ValueError, r"expected equal masses, got 1 and 2;",
     lambda: solve(C.expand(2, N, M), A, torch.stack([B, 2 * B]), reg=1)),
    # forbidden pairs
    (ValueError, r"solve: C: row 3 has mass but no allowed move: all its costs are \+inf, so no plan exists; allow a "
     r"pair, or set its weight to zero", lambda: solve(put(C, 3, INF), A, B, reg=1)),
    (ValueError, r"solve: C: column 1 has mass but no allowed move",
     lambda: solve(put(C, (slice(None), 1), INF), A, B, reg=1)),
    (ValueError, r"solve: C: row 3 of problem 1 has mass but no allowed move",
     lambda: solve(torch.stack([C, put(C, 3, INF)]), A, B, reg=1)),
    (ValueError, r"solve: C: row 0 has mass but no allowed move",  # only to a column without mass
     lambda: solve(put(C, (0, slice(1, None)), INF), A, put(B, 0, 0.0) / (1 - B[0]), reg=1)),
    (ValueError, r"solve: C: row 0 has mass", lambda: solve(torch.full((N, M), INF, dtype=F64), reg=1)),
    # reg
    (ValueError, r"solve: reg: expected a finite number >= 0, got -1\.0", lambda: solve(C, reg=-1)),
    (ValueError, r"solve: reg: expected a finite number >= 0, got nan", lambda: solve(C, reg=NAN)),
    (ValueError, r"solve: reg: expected a finite number >= 0, got inf", lambda: solve(C, reg=INF)),
    (ValueError, r"solve: reg: expected a finite number >= 0, got nan", lambda: solve(C, reg=torch.tensor(NAN))),
    (ValueError, r"solve: reg: expected one floating-point number, got \(2,\)", lambda: solve(C, reg=torch.ones(2))),
    (ValueError, r"solve: reg: .*int64", lambda: solve(C, reg=torch.tensor(1))),
    (TypeError, r"solve: reg: expected a number, got str", lambda: solve(C, reg="small")),  # type: ignore[arg-type]
    (TypeError, r"solve: reg: expected a number, got NoneType", lambda: solve(C, reg=None)),  # type: ignore[arg-type]
    (TypeError, r"solve: reg: expected a number, got bool", lambda: solve(C, reg=True)),
    (ValueError, r"reg: expected 0, or at least 1e-14 of the range of the cost", lambda: solve(C, reg=1e-16)),
    (ValueError, r"solve: reg: expected a positive number with unbalanced marginals, got 0",
     lambda: solve(C, reg=0, unbalanced=1.0)),
    (ValueError, r"solve: reg: 0 needs its own last reg for each problem; pass a list of matrices",
     lambda: solve(C.expand(2, N, M), reg=0)),
    # options
    (ValueError, r"solve: method: expected one of 'auto', 'newton', 'sns', 'sinkhorn', got 'adam'",
     lambda: solve(C, reg=1, method="adam")),
    (ValueError, r"solve: reg_type: expected one of 'entropy', 'kl', got 'l2'",
     lambda: solve(C, reg=1, reg_type="l2")),
    (ValueError, r"solve: grad: expected one of 'implicit', 'none', got 'unrolled'",
     lambda: solve(C, reg=1, grad="unrolled")),
    (ValueError, r"solve: interrupt: expected one of 'raise', 'return', got 'ignore'",
     lambda: solve(C, reg=1, interrupt="ignore")),
    (ValueError, r"solve: tol: expected a finite number > 0, got 0", lambda: solve(C, reg=1, tol=0)),
    (ValueError, r"solve: tol: .*got nan", lambda: solve(C, reg=1, tol=NAN)),
    (ValueError, r"solve: tol: .*got inf", lambda: solve(C, reg=1, tol=INF)),
    (ValueError, r"solve: tol: .*got '1'", lambda: solve(C, reg=1, tol="1")),  # type: ignore[arg-type]
    (ValueError, r"solve: max_iter: expected an integer >= 0, got -1", lambda: solve(C, reg=1, max_iter=-1)),
    (ValueError, r"solve: max_iter: .*got 2\.5", lambda: solve(C, reg=1, max_iter=2.5)),  # type: ignore[arg-type]
    (ValueError, r"solve: relaxation: expected a number in \(0, 2\), got 2", lambda: solve(C, reg=1, relaxation=2)),
    (ValueError, r"solve: density: expected a number in \(0, 1\], got 0", lambda: solve(C, reg=1, density=0)),
    (ValueError, r"solve: density: .*got 1\.5", lambda: solve(C, reg=1, density=1.5)),
    (ValueError, r"solve: warm_up: expected an integer >= 0, got -2", lambda: solve(C, reg=1, warm_up=-2)),
    (ValueError, r"solve: unbalanced: expected numbers > 0 or None, got -1", lambda: solve(C, reg=1, unbalanced=-1)),
    (ValueError, r"solve: unbalanced: .*got \(1, 0\)", lambda: solve(C, reg=1, unbalanced=(1, 0))),
    (ValueError, r"solve: unbalanced: .*got nan", lambda: solve(C, reg=1, unbalanced=NAN)),
    (ValueError, r"solve: unbalanced: expected a number or a pair, got \(1, 2, 3\)",
     lambda: solve(C, reg=1, unbalanced=(1, 2, 3))),  # type: ignore[arg-type]
    (ValueError, r"solve: unbalanced: expected None with method='sns'",
     lambda: solve(C, reg=1, method="sns", unbalanced=1.0)),
    (ValueError, r"solve: callback and progress: expected one problem, got a batch",
     lambda: solve(C.expand(2, N, M), reg=1, callback=lambda info: None)),
    (ValueError, r"solve: callback and progress: expected one", lambda: solve(C.expand(2, N, M), reg=1, progress=True)),
    # starts
    (TypeError, r"solve: x0: expected a TransportResult or a pair of potentials, got int",
     lambda: solve(C, reg=1, x0=3)),  # type: ignore[arg-type]
    (TypeError, r"solve: x0: expected a TransportResult or a pair", lambda: solve(C, reg=1, x0=(A,))),  # type: ignore[arg-type]
    (ValueError, r"solve: x0: expected potentials of shapes \(5,\) and \(4,\), got \(4,\) and \(5,\)",
     lambda: solve(C, reg=1, x0=(B, A))),
    (ValueError, r"solve: x0: expected potentials of shapes \(2, 5\) and \(2, 4\), got \(5,\) and \(4,\)",
     lambda: solve(C.expand(2, N, M), reg=1, x0=(A, B))),
    # sequences
    (ValueError, r"solve: a: expected a sequence of 2, one for each cost", lambda: solve([C, C], A, B, reg=1)),
    (ValueError, r"solve: x0: expected a sequence of 2", lambda: solve([C, C], reg=1, x0=solve(C, reg=1))),
    (TypeError, r"solve: C: expected a torch\.Tensor, got float", lambda: solve([C, 1.0], reg=1)),  # type: ignore[list-item]
]  # fmt: skip

POINTS: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    (TypeError, r"solve_sample: X: expected a torch\.Tensor, got ndarray", lambda: solve_sample(X.numpy(), Y, reg=1)),
    (TypeError, r"solve_sample: Y: expected dtype float32 or float64, got int64",
     lambda: solve_sample(X, Y.long(), reg=1)),
    (TypeError, r"solve_sample: X is float64, Y is float32; convert one", lambda: solve_sample(X, Y.to(F32), reg=1)),
    (TypeError, r"solve_sample: X is float32, a is float64; convert one",
     lambda: solve_sample(X.to(F32), Y.to(F32), A, B, reg=1)),
    (ValueError, r"solve_sample: X and Y: expected points of one dimension, got 2 and 3",
     lambda: solve_sample(X, normal(M, 3), reg=1)),
    (ValueError, r"solve_sample: X: expected points of shape \(n, d\) with n, d >= 1, got \(0, 2\)",
     lambda: solve_sample(X[:0], Y, reg=1)),
    (ValueError, r"solve_sample: Y: expected points .*got \(4, 0\)", lambda: solve_sample(X, Y[:, :0], reg=1)),
    (ValueError, r"solve_sample: X: expected points .*got \(1, 5, 2\)", lambda: solve_sample(X[None], Y, reg=1)),
    (ValueError, r"solve_sample: X: expected finite values, got nan at \(3, 1\)",
     lambda: solve_sample(put(X, (3, 1), NAN), Y, reg=1)),
    (ValueError, r"solve_sample: Y: expected finite values, got inf at \(0, 0\)",
     lambda: solve_sample(X, put(Y, (0, 0), INF), reg=1)),
    (ValueError, r"solve_sample: cost: expected 'sqeuclidean', 'euclidean', 'l1', 'lp', 'cosine' or a callable, got "
     r"'chebyshev'", lambda: solve_sample(X, Y, reg=1, cost="chebyshev")),
    (ValueError, r"solve_sample: p: expected a finite number > 0, got 0",
     lambda: solve_sample(X, Y, reg=1, cost="lp", p=0)),
    (ValueError, r"solve_sample: X: expected nonzero points for the cosine, got zeros in row 2",
     lambda: solve_sample(put(X, 2, 0.0), Y, reg=1, cost="cosine")),
    (ValueError, r"solve_sample: cost: expected a function of tiles of shapes \(k, d\) and \(m, d\) to return a tensor "
     r"\(k, m\) = \(5, 4\), got \(4, 5\)", lambda: solve_sample(X, Y, reg=1, cost=lambda x, y: measures.squared(y, x))),
    (ValueError, r"solve_sample: cost: .*got float", lambda: solve_sample(X, Y, reg=1, cost=lambda x, y: 1.0)),  # type: ignore[arg-type,return-value]
    (ValueError, r"solve_sample: C: expected costs that are finite or \+inf \(a forbidden pair\), got NaN",
     lambda: solve_sample(X, Y, reg=1, cost=lambda x, y: torch.full((len(x), len(y)), NAN, dtype=F64))),
    (ValueError, r"row 0 has mass but no allowed move",
     lambda: solve_sample(X, Y, reg=1, cost=lambda x, y: torch.full((len(x), len(y)), INF, dtype=F64))),
    (ValueError, r"solve_sample: a: expected shape \(5,\), got \(4,\)", lambda: solve_sample(X, Y, B, B, reg=1)),
    (ValueError, r"solve_sample: b: expected weights >= 0, got -1\.0 at 0",
     lambda: solve_sample(X, Y, A, put(B, 0, -1.0), reg=1)),
    (ValueError, r"solve_sample: a and b: expected equal masses, got 1 and 0\.999",
     lambda: solve_sample(X, Y, A, 0.999 * B, reg=1)),
    (ValueError, r"solve_sample: reg: expected a finite number >= 0, got nan", lambda: solve_sample(X, Y, reg=NAN)),
    (ValueError, r"solve_sample: reg: expected a positive number with unbalanced marginals, got 0",
     lambda: solve_sample(X, Y, reg=0, unbalanced=1.0)),
    (ValueError, r"solve_sample: unbalanced: expected None with method='sns'",
     lambda: solve_sample(X, Y, reg=1, method="sns", unbalanced=1.0)),
    (ValueError, r"solve_sample: method: expected one of", lambda: solve_sample(X, Y, reg=1, method="exact")),
    (ValueError, r"solve_sample: x0: expected potentials of shapes \(5,\) and \(4,\)",
     lambda: solve_sample(X, Y, reg=1, x0=(B, A))),
    (TypeError, r"solve_sample: x0: expected a TransportResult or a pair",
     lambda: solve_sample(X, Y, reg=1, x0="cold")),  # type: ignore[arg-type]
]  # fmt: skip

OTHERS: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    (ValueError, r"expected equal masses, got 1 and 0\.999", lambda: sinkhorn(C, A, 0.999 * B, reg=1)),
    (ValueError, r"unbalanced: expected numbers > 0 or None, got -1", lambda: unbalanced(C, A, B, reg=1, rho=-1)),
    (ValueError, r"sinkhorn_divergence: unbalanced: expected one strength for both, got \(1, 2\)",
     lambda: sinkhorn_divergence(X, Y, reg=1, unbalanced=(1, 2))),
    (ValueError, r"sinkhorn_divergence: a: expected shape \(5,\), got \(4,\)",
     lambda: sinkhorn_divergence(X, Y, B, B, reg=1)),
    (TypeError, r"sinkhorn_divergence: X: expected a torch\.Tensor, got int",
     lambda: sinkhorn_divergence(3, Y, reg=1)),  # type: ignore[arg-type]
    (ValueError, r"doubly_stochastic: A: expected a square matrix, got shape \(5, 4\)",
     lambda: doubly_stochastic(C, reg=1)),
    (ValueError, r"doubly_stochastic: A: expected a symmetric matrix; symmetrise it as \(A \+ A\.T\) / 2",
     lambda: doubly_stochastic(uniform(5, 5), reg=1)),
    (ValueError, r"doubly_stochastic: A: expected a symmetric matrix",
     lambda: doubly_stochastic(put(torch.eye(5, dtype=F64), (1, 2), -INF), reg=1)),
    (TypeError, r"doubly_stochastic: A: expected dtype float32 or float64, got int64",
     lambda: doubly_stochastic(torch.eye(5).long(), reg=1)),
    (ValueError, r"has mass but no allowed move", lambda: doubly_stochastic(torch.full((3, 3), -INF), reg=1)),
    (ValueError, r"NaN", lambda: doubly_stochastic(torch.full((3, 3), NAN), reg=1)),
    (ValueError, r"inf", lambda: doubly_stochastic(torch.full((3, 3), INF), reg=1)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "match", "call"), CALLS + POINTS + OTHERS, ids=[match[:60] for _, match, _ in CALLS + POINTS + OTHERS]
)
def test_bad_input(kind: type[Exception], match: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=match):
        call()


def test_infinite_strengths() -> None:
    """An infinite strength may only be given as None, or must mean the same."""
    try:
        result = solve(C, A, B, reg=0.1, unbalanced=INF)
    except ValueError as error:
        assert "unbalanced" in str(error)  # noqa: PT017
    else:
        assert measures.error(result.plan, solve(C, A, B, reg=0.1).plan) < 1e-9


def test_bad_input_with_gradients() -> None:
    """Points with derivatives take another way, with the same checks."""
    for kind, match, call in (
        (ValueError, r"solve_sample: a and b: expected equal masses", lambda x: solve_sample(x, Y, A, 2 * B, reg=1)),
        (ValueError, r"solve_sample: b: expected weights >= 0", lambda x: solve_sample(x, Y, A, -B, reg=1)),
        (ValueError, r"solve_sample: reg: expected", lambda x: solve_sample(x, Y, A, B, reg=-1)),
    ):
        with pytest.raises(kind, match=match):
            call(X.clone().requires_grad_())


def test_masses_may_differ_by_rounding() -> None:
    """A part in a million passes; the plan's own mass is that of a."""
    result = solve(C, A, B * (1 + 5e-7), reg=0.1, tol=1e-12)
    assert result.converged
    assert float(result.plan.sum()) == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError, match="equal masses"):
        solve(C, A, B * (1 + 2e-6), reg=0.1)
    single = solve(C.to(F32), (A / 3).to(F32), (B / 3).to(F32), reg=0.1)
    assert single.converged


def test_differing_masses_are_fine_when_a_marginal_is_soft() -> None:
    for rho in (1.0, (None, 1.0), (1.0, None)):
        assert solve(C, A, 0.5 * B, reg=0.1, unbalanced=rho).converged


# --- the methods of a result ---


def test_results_check_their_arguments() -> None:
    result = solve(C, A, B, reg=0.1)
    with pytest.raises(TypeError, match=r"apply: V: expected a torch\.Tensor, got ndarray"):
        result.apply(B.numpy())
    for wrong in (A, torch.ones(M, 2, 2, dtype=F64), torch.tensor(1.0, dtype=F64)):
        with pytest.raises(ValueError, match=r"apply: V: expected shape \(4,\) or \(4, k\), got"):
            result.apply(wrong)
    with pytest.raises(ValueError, match=r"apply: V: expected shape \(5,\) or \(5, k\), got \(4,\)"):
        result.apply(B, transpose=True)
    with pytest.raises(ValueError, match="barycentric_map: Y: expected the target points"):
        result.barycentric_map()
    for threshold in (-1.0, NAN):
        with pytest.raises(ValueError, match="plan_sparse: threshold: expected a number >= 0"):
            result.plan_sparse(threshold)
    with pytest.raises(ValueError, match="plan_sparse: more than 3 entries exceed the threshold"):
        result.plan_sparse(0.0, limit=3)
    batch = solve(C.expand(2, N, M), A, B, reg=0.1)
    with pytest.raises(ValueError, match=r"plan_sparse: expected the result of one problem, got a batch"):
        batch.plan_sparse()
    with pytest.raises(AttributeError):
        result.reg = 3.0


# --- solves that do not converge ---


def unfinished() -> TransportResult:
    result: TransportResult = ends_with("max_iter", lambda: solve(C, A, B, reg=1e-3, max_iter=1, tol=1e-13))
    return result


def test_a_solve_that_does_not_converge_warns_once_and_names_its_caller() -> None:
    with pytest.warns(RuntimeWarning) as caught:
        result = solve(C, A, B, reg=1e-3, max_iter=1, tol=1e-13)
    assert len(caught) == 1
    assert str(caught[0].message) == f"solve: {result.message}"
    assert caught[0].filename == __file__
    assert "raise max_iter" in result.message
    with pytest.warns(RuntimeWarning, match="solve_sample: max_iter") as caught:
        solve_sample(X, Y, A, B, reg=1e-3, max_iter=1, tol=1e-13)
    assert caught[0].filename == __file__


def test_check_raises_with_the_result() -> None:
    result = unfinished()
    with pytest.raises(ConvergenceError, match="max_iter") as caught:
        result.check()
    assert caught.value.result is result
    assert "raise max_iter" in repr(result)


def test_numpy_options() -> None:
    options: dict[str, Any] = {"tol": np.float64(1e-6), "max_iter": np.int64(50), "reg": np.float32(0.1)}
    assert solve(C, A, B, **options).converged
