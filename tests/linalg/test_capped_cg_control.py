"""Capped conjugate gradients: limits, test 4 in batches, Ctrl-C, solves within solves and side by side."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from capped_reference import capped_reference
from devices import home
from kantor.linalg import CappedCGStatus, Dense, Diagonal, Stencil, capped_cg
from kantor.linalg.capped_cg import CappedSolver
from systems import F32, F64, csr_of, random, spd
from test_capped_cg import RULES, injected
from test_cg_control import interrupt_after

# --- limits ---


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("limit", [0, 1, 5])
def test_limit_is_kept(rule: str, limit: int, device: str) -> None:
    """TERM with the iterate of that iteration; a solution that is found at the limit is one."""
    d, g = torch.logspace(0, 3, 40, dtype=F64), random(40)
    d, g = d.to(home(device)), g.to(home(device))
    result = capped_cg(Diagonal(d), g, damping=1e-3, rtol=1e-6, rule=rule, atol=1e-12, max_iter=limit)
    assert (result.status, result.n_iter) == (CappedCGStatus.TERM, limit)
    y = result.d.cpu()
    residual = d.cpu() * y + 2e-3 * y + g.cpu()
    assert result.residual_norm == pytest.approx(float(residual.norm()), rel=1e-12)
    if limit:
        expected = capped_reference(torch.diag(d.cpu()), g.cpu(), 1e-3, 1e-6, rule=rule, atol=1e-12, max_iter=limit)
        assert expected.status == "TERM"
        torch.testing.assert_close(y, expected.d, rtol=1e-10, atol=1e-13)
        assert result.curvature == pytest.approx(float(y @ (d.cpu() * y) / (y @ y)), rel=1e-12)
    whole = capped_cg(Diagonal(d), g, damping=1e-3, rule=rule)
    exact = capped_cg(Diagonal(d), g, damping=1e-3, rule=rule, max_iter=whole.n_iter)
    assert exact.status is CappedCGStatus.SOL
    assert torch.equal(exact.d, whole.d)


def test_limits_of_one_system_each() -> None:
    """The entry of the minimisers takes arrays."""
    G, limits = random(3, 40), [2, 7, 100]
    H = Dense(torch.diag(torch.logspace(0, 2, 40, dtype=F64))).encode()
    solver = CappedSolver(G)
    solver.solve(H, G, 1e-3, 0.01, max_iter=torch.tensor(limits).numpy())
    for k, limit in enumerate(limits):
        alone = CappedSolver(G[k])
        alone.solve(H, G[k], 1e-3, 0.01, max_iter=limit)
        assert alone.outcome() == solver.outcome(k)
        assert torch.equal(alone.d, solver.d[k])
        assert solver.outcome(k).status == ("SOL" if limit == 100 else "TERM")


@pytest.mark.parametrize("limit", [10**9, 10**20])
def test_limits_cost_no_memory(limit: int) -> None:
    H, g = torch.diag(torch.logspace(0, 2, 30, dtype=F64)), random(30)
    assert torch.equal(capped_cg(H, g, damping=0.1, max_iter=limit).d, capped_cg(H, g, damping=0.1).d)


def test_more_than_twice_n_iterations() -> None:
    """Rounding keeps them from converging; the arrays of test 4, which ended long before, are not overrun."""
    n = 30
    g = random(n)
    d = torch.logspace(-7, 3, n, dtype=F64)
    short = capped_cg(Diagonal(d), g, damping=1e-9, rule="step")
    assert (short.status, short.n_iter) == (CappedCGStatus.TERM, 2 * n)
    long = capped_cg(Diagonal(d), g, damping=1e-9, rule="step", max_iter=10_000)
    assert long.status is CappedCGStatus.SOL
    assert 2 * n < long.n_iter < 1000
    residual = float((d * long.d + 2e-9 * long.d + g).norm())
    assert residual <= 1.1 * 0.5 * 1e-9 * 0.01 * float(long.d.norm())


def test_solver_is_used_again() -> None:
    """After other rules, limits, preconditioners and an exception: the bits of a new one."""
    H, g = torch.diag(torch.logspace(0, 2, 40, dtype=F64)), random(40)
    solver = CappedSolver(g)

    def failing(v: Tensor) -> Tensor:
        raise ZeroDivisionError

    def run(solver: CappedSolver) -> list[Any]:
        out = []
        for options in ({"max_iter": 3}, {"rule": "step", "M_inv": Diagonal(1 / H.diagonal())}, {"max_iter": 500}, {}):
            with pytest.raises(ZeroDivisionError):
                solver.solve(failing, g, 1e-3, 0.01)
            solver.solve(lambda v: H @ v, g, 1e-3, 0.01, **options)
            out.append((solver.outcome(), solver.n_hvp, solver.d.clone()))
        return out

    for (outcome, products, d), (again, more, e) in zip(run(solver), run(CappedSolver(g)), strict=True):
        assert (outcome, products) == (again, more)
        assert torch.equal(d, e)


# --- test 4 in batches, on every device ---


SUSPICIOUS = -1e4  # a shift of ln T with which test 4 looks at every iteration
SUSPECT, SUSPECT_INDEX = 6.0, 12  # status, and column of the table, of a suspicion


def concealed(count: int) -> list[tuple[Tensor, Tensor, float]]:
    """Curvature below -eps that the differences of iterates show before iterates and directions do."""
    generator, out = torch.Generator().manual_seed(9), []
    for _ in range(count):
        n = int(torch.randint(3, 9, (1,), generator=generator))  # few unknowns: rounding plays no part yet
        first, eps, *values = (10 ** torch.rand(n + 1, dtype=F64, generator=generator)).tolist()
        eps = eps**2 / 100
        H = torch.diag(torch.tensor([-eps * first, *(0.01 * v**4 for v in values)], dtype=F64))
        g = torch.randn(n, dtype=F64, generator=generator)
        out.append((H, g * 10 ** (2 * torch.randn(n, dtype=F64, generator=generator)), eps))
    return out


@pytest.mark.parametrize("native", [True, False])
def test_differences_of_iterates_show_negative_curvature(native: bool) -> None:
    """The direction is the best of all y+ - y_i, rebuilt; its i + 1 products are counted."""
    found = 0
    for H, g, eps in concealed(600):
        expected = capped_reference(H, g, eps, log_T_shift=SUSPICIOUS)
        calls: list[int] = []

        def product(v: Tensor, H: Tensor = H, calls: list[int] = calls) -> Tensor:
            calls.append(1)
            return H @ v

        solver, outcome = injected(Dense(H).encode() if native else product, g, eps, SUSPICIOUS)
        assert (outcome.status, outcome.n_iter) == (expected.status, expected.iterations)
        assert native or solver.n_hvp == len(calls)
        if solver.n_hvp == outcome.n_iter + 1:
            continue
        found += 1
        Hb = H + 2 * eps * torch.eye(len(g), dtype=F64)
        assert expected.trial is not None
        steps = [expected.trial - y for y in expected.iterates[: outcome.n_iter]]
        best = min(range(len(steps)), key=lambda i: float(steps[i] @ Hb @ steps[i] / steps[i].square().sum()))
        assert solver.n_hvp == outcome.n_iter + 1 + best + 1
        torch.testing.assert_close(solver.d, steps[best], rtol=1e-6, atol=1e-8 * float(steps[best].norm()))
        d = solver.d
        assert float(d @ H @ d) < -eps * float(d @ d)
        assert outcome.curvature == pytest.approx(float(d @ H @ d / (d @ d)), rel=1e-12)
        assert outcome.length == pytest.approx(float(d.norm()), rel=1e-14)
    assert found >= 20


def test_threshold_of_the_residual() -> None:
    """sqrt(T) tau^(j/2) |g|, with T and tau of the present estimate of |H|: it is passed when the reference says so."""
    found, dropped = 0, 0
    for H, g, eps in concealed(600):
        solver, looked = injected(Dense(H).encode(), g, eps, SUSPICIOUS)
        if solver.n_hvp == looked.n_iter + 1:
            continue
        for shift in range(-52, -20):
            expected = capped_reference(H, g, eps, log_T_shift=shift)
            _, outcome = injected(Dense(H).encode(), g, eps, shift)
            assert (outcome.status, outcome.n_iter) == (expected.status, expected.iterations)
            found += outcome == looked
            dropped += outcome.n_iter > looked.n_iter
    assert min(found, dropped) >= 100


def one_concealed() -> tuple[Tensor, Tensor, float]:
    """A case that test 4 ends, at a late iteration."""
    for H, g, eps in concealed(600):
        solver, outcome = injected(lambda v, H=H: H @ v, g, eps, SUSPICIOUS)
        if solver.n_hvp > outcome.n_iter + 1 and outcome.n_iter >= 3:
            return H, g, eps
    raise AssertionError("no such case")


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("kind", ["dense", "csr", "sum", "callable"])
def test_the_iterate_is_rebuilt_to_the_last_bit(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise rounding, which the iteration amplifies, would hide a small y+ - y_i."""
    A = Dense(spd(200, 1e3).to(dtype))
    kinds = {"dense": A, "csr": csr_of(A.dense()), "sum": A - 5e-4 * Diagonal(torch.ones(200, dtype=dtype))}
    operator: Any = A.matvec if kind == "callable" else kinds[kind].encode()
    g = random(200, dtype=dtype)
    solver, other = CappedSolver(g), CappedSolver(g)
    solver.solve(operator, g, 1e-3, 1e-6, max_iter=40)
    assert solver.outcome().status == "TERM"
    alphas = solver._arrays[:41]
    product = CappedSolver._product
    seen: list[Tensor] = []
    monkeypatch.setattr(CappedSolver, "_product", lambda *args: (seen.append(args[2].clone()), product(*args))[1])
    for i in (0, 1, 2, 25):
        other.solve(operator, g, 1e-3, 1e-6, max_iter=i)
        solver._table[0, SUSPECT_INDEX] = i
        solver._settle([SUSPECT], operator, g, solver._arrays[: 4 * 41].view(1, 4, 41))
        assert torch.equal(seen[-1], solver._y[0] + float(alphas[40]) * solver._p[0] - other.d)


def test_unfounded_suspicion_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """What rounding may do once, made here by wrong products: the iteration goes on as if nothing had been, or ends."""
    H, g, eps = one_concealed()
    _, looked = injected(lambda v: H @ v, g, eps, SUSPICIOUS)
    plain, plain_outcome = injected(lambda v: H @ v, g, eps, 0.0)
    assert plain_outcome.n_iter > looked.n_iter
    monkeypatch.setattr(CappedSolver, "_product", lambda self, H, v, k: 1e-3 * v)
    solver, outcome = injected(lambda v: H @ v, g, eps, SUSPICIOUS)
    assert outcome == plain_outcome
    assert torch.equal(solver.d, plain.d)
    _, ended = injected(lambda v: H @ v, g, eps, SUSPICIOUS, max_iter=looked.n_iter)
    _, limited = injected(lambda v: H @ v, g, eps, 0.0, max_iter=looked.n_iter)
    assert ended == limited
    assert ended.status == "TERM"


def test_unfounded_suspicion_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The iterations that follow would be suspected as well, and cost no more products."""
    suspected = 0
    for H, g, eps in concealed(600):
        encoded = Dense(H).encode()
        solver, looked = injected(encoded, g, eps, SUSPICIOUS)
        products = solver.n_hvp - looked.n_iter - 1
        _, plain = injected(encoded, g, eps, 0.0)
        if products == 0 or plain.n_iter <= looked.n_iter + 1:
            continue
        suspected += 1
        wrong: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(CappedSolver, "_product", lambda self, H, v, k, wrong=wrong: (wrong.append(k), 1e-3 * v)[1])
            _, outcome = injected(encoded, g, eps, SUSPICIOUS)
        assert outcome == plain
        assert len(wrong) == products
    assert suspected >= 7


@pytest.mark.parametrize("native", [True, False])
def test_suspects_of_a_batch_are_looked_at_one_by_one(native: bool, device: str) -> None:
    """Two suspicions at different iterations, and systems that end before and after: as each of them alone."""
    H, g, eps = one_concealed()
    n = len(g)
    G = torch.stack([g, torch.cat([torch.zeros(1, dtype=F64), g[1:]]), torch.eye(n, dtype=F64)[n - 1], 2.5 * g])
    H, G = H.to(home(device)), G.to(home(device))
    operator = Dense(H).encode() if native else lambda v: v @ H
    solver, _ = injected(operator, G, eps, SUSPICIOUS)
    outcomes = [solver.outcome(k) for k in range(4)]
    assert [o.status for o in outcomes] == ["NC", "SOL", "SOL", "NC"]
    d = solver.d.clone()
    looks = 0
    for k in range(4):
        alone, outcome = injected(operator, G[k], eps, SUSPICIOUS)
        assert (outcome.status, outcome.n_iter) == (outcomes[k].status, outcomes[k].n_iter)
        torch.testing.assert_close(alone.d, d[k], rtol=1e-8, atol=1e-10)
        looks += alone.n_hvp - outcome.n_iter - 1 if outcome.status == "NC" else 0
    assert looks > 0
    assert solver.n_hvp == max(o.n_iter for o in outcomes) + 1 + looks


# --- Ctrl-C, threads, solves within solves ---


def endless(kind: str) -> dict[str, Any]:
    """Runs for minutes if nobody stops it."""
    A = Stencil((200, 300), weights=(1.0, 1e-3))
    options: dict[str, Any] = {"A": A, "g": random(60_000), "damping": 1e-12, "rtol": 1e-300, "max_iter": 10**6}
    options["atol"] = 1e-300
    if kind == "callable":
        options["A"] = lambda v: A.matvec(v)
    elif kind == "batch":
        options["g"] = random(3, 60_000)
    elif kind == "ic0":
        options |= {"A": A.to_csr(), "M_inv": "ic0"}
    elif kind == "callable preconditioner":
        options["M_inv"] = lambda r: r.clone()
    return options


@pytest.mark.parametrize("kind", ["native", "callable", "batch", "ic0", "callable preconditioner"])
def test_ctrl_c_raises(kind: str) -> None:
    options = endless(kind)
    delays: list[float] = []
    while len(delays) < 5 and min(delays, default=1.0) > 0.1:  # the machine may be busy with something else
        with interrupt_after(0.2) as sent, pytest.raises(KeyboardInterrupt):
            capped_cg(options["A"], options["g"], **{k: v for k, v in options.items() if k not in ("A", "g")})
        delays.append(time.perf_counter() - sent[0])
    assert min(delays) <= 0.1, delays
    assert capped_cg(torch.eye(3, dtype=F64), random(3), damping=0.1).status is CappedCGStatus.SOL


def test_solves_within_a_solve_and_side_by_side() -> None:
    """(A + 0.2 I)^-1 as the operator of a solve, in several threads at once."""
    A = Stencil((12, 12), shift=1.0)
    rows = random(4, 144)

    def inverse(v: Tensor) -> Tensor:
        return -capped_cg(A, v, damping=0.1, rule="step", rtol=1e-10, atol=1e-12).d

    def solve(g: Tensor) -> Tensor:
        return capped_cg(inverse, g, damping=0.5, rule="step", rtol=1e-8).d

    results: dict[int, Tensor] = {}
    workers = [threading.Thread(target=lambda k=k: results.update({k: solve(rows[k])})) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    H = torch.linalg.inv(A.dense() + 0.2 * torch.eye(144, dtype=F64)) + torch.eye(144, dtype=F64)
    for k in range(4):
        assert torch.equal(results[k], solve(rows[k]))
        exact = -torch.linalg.solve(H, rows[k])
        assert (results[k] - exact).norm() <= 1e-8 * exact.norm()


def test_products_may_share_memory() -> None:
    """A callable may give back its argument, or the same memory every time; what it keeps may change later."""
    g, buffer = random(20), torch.empty(20, dtype=F64)
    torch.testing.assert_close(capped_cg(lambda v: v, g, damping=0.5).d, -g / 2)
    torch.testing.assert_close(capped_cg(lambda v: torch.mul(v, 3, out=buffer), g, damping=0.5).d, -g / 4)
    d = torch.linspace(1, 4, 20, dtype=F64)
    identity = capped_cg(Diagonal(d), g, damping=0.5, rule="step", M_inv=lambda r: r)
    plain = capped_cg(Diagonal(d), g, damping=0.5, rule="step")
    torch.testing.assert_close(identity.d, plain.d, rtol=1e-13, atol=1e-15)
