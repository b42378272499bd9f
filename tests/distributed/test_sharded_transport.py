"""Transport whose rows are spread over ranks: the results of one process, the traffic of the model, errors on all."""

from __future__ import annotations

import math
import signal
from typing import Any

import pytest
import torch
from torch import Tensor

import devices
import ranks as processes
from kantor._ops import emulated
from kantor._ranks import Ranks
from kantor.transport import TransportInfo, TransportResult, TransportStatus, solve, solve_sample
from kantor.transport.solve_sample import _drawn

# Shares of 60 rows: of one, two, three and four ranks, one of them without a row.
SHARES = {1: (60,), 2: (23, 37), 3: (31, 0, 29), 4: (7, 26, 1, 26)}
N, M = 60, 48


def _points() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """X, Y, a, b; some weights are zero."""
    generator = torch.Generator().manual_seed(0)
    X, Y = (torch.rand(k, 2, dtype=torch.float64, generator=generator) for k in (N, M))
    a, b = (torch.rand(k, dtype=torch.float64, generator=generator) + 0.1 for k in (N, M))
    a[[3, 59]], b[[0, 17]] = 0.0, 0.0
    return X, Y, a / a.sum(), b / b.sum()


def _cost() -> Tensor:
    X, Y, _, _ = _points()
    return torch.cdist(X, Y).square()


def _feasible() -> Tensor:
    C = _cost()
    C[C > 0.8] = math.inf
    return C


def _light_row() -> Tensor:
    """All weights are positive but one, on one rank."""
    a = torch.ones(N, dtype=torch.float64)
    a[2] = 0.0
    return a / a.sum()


def _slow_cost(x: Tensor, y: Tensor) -> Tensor:
    return (x[:, None] - y[None]).abs().sum(-1).sqrt()


MATRIX: dict[str, dict[str, Any]] = {
    "newton": {"reg": 1e-3},
    "newton, sparse": {"reg": 1e-5},
    "newton, sweeps": {"reg": 0.1},
    "newton, penalties": {"reg": 1e-2, "unbalanced": 0.5},
    "newton, one penalty": {"reg": 1e-2, "unbalanced": (None, 0.3), "reg_type": "kl"},
    "sinkhorn": {"reg": 2e-2, "method": "sinkhorn"},
    "sinkhorn, scaled": {"reg": 1e-2, "method": "sinkhorn", "eps_scaling": True},
    "stopped": {"reg": 1e-3, "max_iter": 3},
}
POINTS: dict[str, dict[str, Any]] = {
    "sqeuclidean": {"reg": 1e-3},
    "euclidean": {"reg": 1e-2, "cost": "euclidean"},
    "cosine": {"reg": 1e-3, "cost": "cosine"},
    "function": {"reg": 1e-2, "cost": _slow_cost},
}


def _own(ranks: Ranks, *tensors: Tensor) -> list[Tensor]:
    first = sum(SHARES[ranks.size][: ranks.rank])
    return [t[first : first + SHARES[ranks.size][ranks.rank]] for t in tensors]


def _numbers(result: TransportResult, ranks: Ranks | None = None) -> dict[str, Any]:
    V, W = torch.arange(float(M), dtype=torch.float64), torch.arange(float(N), dtype=torch.float64)
    if ranks is not None:
        (W,) = _own(ranks, W)
    return {
        "f": result.potentials[0], "g": result.potentials[1], "plan": result.plan, "value": float(result.value),
        "linear": float(result.value_linear), "apply": result.apply(V), "transposed": result.apply(W, transpose=True),
        "sparse": result.plan_sparse(1e-9).to_dense(), "status": result.status, "steps": result.n_iter,
        "error": result.marginal_error,
    }  # fmt: skip


def _alone() -> dict[str, dict[str, Any]]:
    X, Y, a, b = _points()
    results = {name: _numbers(solve(_cost(), a, b, **options)) for name, options in MATRIX.items()}
    results |= {name: _numbers(solve_sample(X, Y, a, b, **options)) for name, options in POINTS.items()}
    results["uniform"] = _numbers(solve(_cost(), reg=1e-3))
    results["light row"] = _numbers(solve(_cost(), _light_row(), reg=1e-2))
    results["feasible"] = _numbers(solve(_feasible(), a, b, reg=1e-3))
    return results


def _shared(ranks: Ranks, few: bool) -> dict[str, dict[str, Any]]:
    X, Y, a, b = _points()
    x, own_a, C, D = _own(ranks, X, a, _cost(), _feasible())
    matrix, points = ({"newton": MATRIX["newton"]}, {}) if few else (MATRIX, POINTS)
    results = {name: _numbers(solve(C, own_a, b, **o, ranks=ranks), ranks) for name, o in matrix.items()}
    results |= {name: _numbers(solve_sample(x, Y, own_a, b, **o, ranks=ranks), ranks) for name, o in points.items()}
    results["uniform"] = _numbers(solve(C, reg=1e-3, ranks=ranks), ranks)
    (light,) = _own(ranks, _light_row())
    results["light row"] = _numbers(solve(C, light, reg=1e-2, ranks=ranks), ranks)
    results["feasible"] = _numbers(solve(D, own_a, b, reg=1e-3, ranks=ranks), ranks)
    return results


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    with pytest.warns(RuntimeWarning, match="max_iter"):
        return _alone()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_same_as_one_process(size: int, alone: dict[str, dict[str, Any]]) -> None:
    parts = processes.run(size, _shared, size == 4)
    for name in parts[0]:
        one = alone[name]
        many = [part[name] for part in parts]
        for key in ("f", "plan", "apply", "sparse"):  # of each rank's rows
            torch.testing.assert_close(torch.cat([part[key] for part in many]), one[key], rtol=1e-7, atol=1e-9)
        for part in many:
            assert part["status"] is one["status"], name
            assert abs(part["steps"] - one["steps"]) <= 1, name
            assert part["value"] == pytest.approx(one["value"], rel=1e-10), name
            assert part["linear"] == pytest.approx(one["linear"], rel=1e-8), name
            torch.testing.assert_close(part["g"], one["g"], rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(part["transposed"], one["transposed"], rtol=1e-7, atol=1e-9)
            for key in ("g", "transposed", "value", "error", "steps"):  # the very same on all ranks
                same = part[key] == many[0][key]
                assert bool(same.all() if isinstance(same, Tensor) else same), (name, key)


def _sweeps(ranks: Ranks) -> list[tuple[int, int]]:
    """Bytes and sweeps of runs of different lengths."""
    _, _, a, b = _points()
    own, C = _own(ranks, a, _cost())
    counts = []
    for limit in (5, 12):
        ranks.traffic.reset()
        result = solve(C, own, b, reg=1e-3, method="sinkhorn", relaxation=1.0, max_iter=limit, ranks=ranks)
        counts.append((ranks.traffic.all_reduce.bytes, result.n_sweeps))
    return counts


@pytest.mark.parametrize("size", [2, 3])
def test_bytes_of_a_sweep(size: int) -> None:
    """The column sums, value, its scale, the rows' error and three flags: no more than 8 (m + 6) bytes a sweep."""
    columns = int((_points()[3] > 0).sum())
    for (short, few), (long, many) in processes.run(size, _sweeps):
        assert many - few == 7
        assert long - short == 7 * 8 * (columns + 6)


def _from_start(ranks: Ranks) -> tuple[int, int, int]:
    _, _, a, b = _points()
    own, C = _own(ranks, a, _cost())
    first = solve(C, own, b, reg=1e-3, ranks=ranks)
    again = solve(C, own, b, reg=1e-3, x0=first, ranks=ranks)
    seen: list[int] = []
    stop = lambda info: seen.append(info.iteration) or (ranks.rank == 1 and info.iteration == 4)  # noqa: E731
    stopped = solve(C, own, b, reg=1e-3, callback=stop, ranks=ranks)
    assert stopped.status is TransportStatus.STOPPED
    return again.n_iter, len(seen), stopped.n_iter


def test_warm_start_and_a_callback_that_stops_on_one_rank() -> None:
    for steps, seen, taken in processes.run(3, _from_start):
        assert steps <= 2
        assert seen == taken == 4


def _wrong(ranks: Ranks, what: str) -> None:
    X, Y, a, b = _points()
    x, own, C = _own(ranks, X, a, _cost())
    here = ranks.rank == 1
    if what == "blocked":
        C[-2] = math.inf if here else C[-2]
        solve(C, own, b, reg=1e-2, ranks=ranks)
    elif what == "nan":
        C[-1, -1] = math.nan if here else 0.0
        solve(C, own, b, reg=1e-2, ranks=ranks)
    elif what == "negative":
        own[-1] = -1.0 if here else own[-1]
        solve(C, own, b, reg=1e-2, ranks=ranks)
    elif what == "masses":
        solve(C, 2 * own, b, reg=1e-2, ranks=ranks)
    elif what == "b":
        solve(C, own, b.roll(int(here)), reg=1e-2, ranks=ranks)
    elif what == "reg":
        solve(C, own, b, reg=2e-2 if here else 1e-2, ranks=ranks)
    elif what == "columns":
        solve(C[:, 1:] if here else C, own, b[1:] if here else b, reg=1e-2, ranks=ranks)
    elif what == "exact":
        solve(C, own, b, reg=0, ranks=ranks)
    elif what == "sns":
        solve(C, own, b, reg=1e-2, method="sns", ranks=ranks)
    elif what == "gradient":
        solve(C.requires_grad_(), own, b, reg=1e-2, ranks=ranks)
    elif what == "callback":

        def broken(info: TransportInfo) -> None:
            if here and info.iteration == 3:
                raise ValueError("broken callback")

        solve(C, own, b, reg=1e-3, callback=broken, ranks=ranks)
    elif what == "cost":
        calls: list[int] = []

        def cost(points: Tensor, others: Tensor) -> Tensor:
            calls.append(1)
            if here and len(calls) > 5:
                raise ValueError("broken cost")
            return _slow_cost(points, others)

        solve_sample(x, Y, own, b, reg=1e-2, cost=cost, ranks=ranks)
    else:
        solve_sample(x[:, :1] if here else x, Y, own, b, reg=1e-2, ranks=ranks)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("blocked", "rank 1: solve: C: row 35 has mass but no allowed move"),
        ("nan", r"rank 1: solve: C: expected costs that are finite .* at \(36, 47\)"),
        ("negative", "rank 1: solve: a: expected weights >= 0"),
        ("masses", "expected equal masses, got 2 and 1"),
        ("b", "b: expected the same on all ranks"),
        ("reg", "options: expected the same on all ranks"),
        ("columns", "number of columns: expected the same on all ranks"),
        ("exact", "reg: expected a positive number with ranks"),
        ("sns", "use 'newton'"),
        ("gradient", "expected tensors without gradients"),
        ("callback", "rank 1: broken callback"),
        ("cost", "rank 1: broken cost"),
        ("points", "rank 1: solve_sample: X and Y: expected points of one dimension"),
    ],
)
def test_an_error_on_one_rank_is_one_on_all(what: str, message: str) -> None:
    for error in processes.outcomes(2, _wrong, what):
        with pytest.raises(ValueError, match=message):
            raise error


def _infeasible(ranks: Ranks) -> TransportStatus:
    _, _, a, b = _points()
    C = _cost()
    C[: N // 2, M // 4 :] = math.inf  # the mass of these rows does not fit the columns that are left
    own, C = _own(ranks, a, C)
    with pytest.warns(RuntimeWarning, match="infeasible"):
        return solve(C, own, b, reg=1e-2, ranks=ranks).status


def test_no_plan_is_no_plan_on_all_ranks() -> None:
    assert processes.run(3, _infeasible) == [TransportStatus.INFEASIBLE] * 3


def _press_ctrl_c(ranks: Ranks) -> tuple[TransportStatus, int]:
    _, _, a, b = _points()
    own, C = _own(ranks, a, _cost())

    def press(info: TransportInfo) -> None:
        if ranks.rank == 1 and info.iteration == 5:
            signal.raise_signal(signal.SIGINT)

    result = solve(C, own, b, reg=1e-3, callback=press, interrupt="return", ranks=ranks)
    with pytest.raises(KeyboardInterrupt):
        solve(C, own, b, reg=1e-3, callback=press, ranks=ranks)
    return result.status, result.n_iter


def test_ctrl_c_on_one_rank_ends_all() -> None:
    for status, steps in processes.run(3, _press_ctrl_c):
        assert status is TransportStatus.INTERRUPTED
        assert steps == 5


def _draw(ranks: Ranks) -> tuple[Tensor | None, Tensor]:
    weights = torch.rand(3000, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(0)
    if ranks.size == 1:
        return _drawn(weights, 3000, generator, None)
    ends = torch.tensor([0, *(count * 50 for count in SHARES[ranks.size])]).cumsum(0).tolist()
    first, last = ends[ranks.rank : ranks.rank + 2]
    index, drawn = _drawn(weights[first:last], 3000, generator, ranks)
    assert index is not None
    return index + first, drawn


def test_the_sample_of_a_large_problem_is_that_of_one_process() -> None:
    (one,) = processes.run(1, _draw)
    many = processes.run(3, _draw)
    for k in range(2):
        torch.testing.assert_close(torch.cat([part[k] for part in many]), one[k], rtol=1e-12, atol=0)


def _emulated(ranks: Ranks) -> dict[str, Any]:
    _, _, a, b = _points()
    own, C = _own(ranks, a, _cost())
    with emulated():
        return _numbers(solve(C, own, b, reg=0.05, tol=1e-6, ranks=ranks), ranks)


def test_cuda_code() -> None:
    """On the emulator; one rank has no rows."""
    devices.require("emulated")
    _, _, a, b = _points()
    one = _numbers(solve(_cost(), a, b, reg=0.05, tol=1e-6))
    for part in processes.run(3, _emulated):
        assert part["value"] == pytest.approx(one["value"], rel=1e-9)
        torch.testing.assert_close(part["g"], one["g"], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(part["transposed"], one["transposed"], rtol=1e-6, atol=1e-8)
