"""The deep conjugate direction method: its numbers against references."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from devices import home
from flexible_reference import ends, network, noise, numpy_of, quietly, reference
from kantor._ops import backend, emulated
from kantor.linalg import Dense, Diagonal, LinearOperator, LowRank, PoissonGrid, Stencil, cg, dcdm, ic0, jacobi
from systems import F32, F64, KINDS, error, example_operators, random, spd


def iterates(count: int, call: Callable[[int], Any]) -> list[Tensor]:
    """x after 0, 1, ... iterations."""
    return [quietly(lambda k=k: call(k)).x for k in range(count)]  # type: ignore[misc]


# --- against conjugate gradients and a dense reference ---


@pytest.mark.parametrize("k_prev", [1, 2, 5])
@pytest.mark.parametrize("native", [True, False])
def test_identity_is_conjugate_gradients(k_prev: int, native: bool, device: str) -> None:
    A = Stencil((20, 23), device=home(device))
    b = random(460, device=home(device))
    expected = cg(A, b, rtol=1e-10)
    result = dcdm(A if native else A.matvec, b, lambda r: r, k_prev=k_prev, rtol=1e-10)
    assert result.converged
    assert abs(result.iterations - expected.iterations) <= 1
    np.testing.assert_allclose(result.history.residual_norms[:30], expected.history.residual_norms[:30], rtol=1e-8)
    assert result.fallbacks == 0
    assert error(result.x, expected.x) < 1e-8


@pytest.mark.parametrize("k_prev", [0, 1, 2, 7])
def test_equals_the_reference_for_a_map_that_is_not_linear(k_prev: int) -> None:
    A, b, f = spd(40), random(40, seed=3), network(40)
    states = reference(A.numpy(), b.numpy(), numpy_of(f), k_prev, normalised=True)
    for k in range(1, 14):
        x = quietly(lambda k=k: dcdm(A, b, f, k_prev=k_prev, rtol=0.0, maxiter=k)).x  # type: ignore[misc]
        if k == 1:
            next(states)
        assert error(x, torch.from_numpy(next(states))) < 1e-9


@pytest.mark.parametrize("size", [1e1, 1e6, 1e11])
def test_directions_stay_orthogonal_where_little_is_left(size: float) -> None:
    """A map that repeats one vector, `size` times longer than the residual: all but a trace is taken out again."""
    A, b, v = spd(60, condition=1e3), random(60, seed=1), random(60, seed=2)
    v = v / v.norm()
    f = lambda r: r + size * v  # noqa: E731
    x = iterates(8, lambda k: dcdm(A, b, f, k_prev=7, rtol=0.0, maxiter=k, true_residual_every=0))
    P = torch.stack([new - old for old, new in pairwise(x)])
    P = P / (P @ A * P).sum(-1, keepdim=True).sqrt()
    gram = P @ A @ P.T
    for i in range(7):
        for j in range(i):
            assert abs(float(gram[i, j])) < 1e-7, (i, j)


@pytest.mark.parametrize("seed", range(3))
def test_all_directions_kept_end_within_n_iterations(seed: int) -> None:
    A, b = spd(200, condition=50, seed=seed), random(200, seed=seed + 9)
    result = dcdm(A, b, network(200, seed=seed, gain=0.3), k_prev=200, maxiter=200, rtol=1e-10)
    assert result.converged
    assert result.fallbacks == 0
    assert error(A @ result.x, b) < 1e-10


def test_more_directions_need_fewer_iterations() -> None:
    A = Stencil((40, 40))
    b = random(1600, seed=4)
    inverse = torch.linalg.inv(A.dense() + 0.1 * torch.eye(1600, dtype=F64))

    def f(r: Tensor) -> Tensor:
        return inverse @ (r + 0.3 * torch.roll(r, 1).abs())  # neither linear nor symmetric

    counts = [dcdm(A, b, f, k_prev=k, maxiter=2000).iterations for k in (0, 2, 8)]
    assert counts[0] > 1.5 * counts[1]
    assert counts[1] > counts[2]
    assert counts[1] < 0.5 * cg(A, b, rtol=1e-6).iterations


# --- the guarantee ---


def adversaries(n: int) -> dict[str, Callable[[], Any]]:
    """Makers of maps: those that draw random numbers start anew each time."""
    A = spd(n, condition=1e3)

    def worst(r: Tensor) -> Tensor:  # almost orthogonal to the residual
        d = random(n, seed=int(1e6 * float(r[0].abs())) % 1000)
        return d - (1 - 1e-6) * (d @ r) / (r @ r) * r

    def sometimes(r: Tensor) -> Tensor:
        return r * torch.nan if float(r[0]) > 0 else r

    return {
        "network": lambda: network(n, gain=30.0),
        "noise": noise,
        "uphill": lambda: lambda r: -r,
        "uphill in the norm of A": lambda: lambda r: -(A @ (A @ r)),
        "almost orthogonal": lambda: worst,
        "constant": lambda: torch.ones_like,
        "sometimes NaN": lambda: sometimes,
        "half precision": lambda: lambda r: A.bfloat16() @ r.bfloat16(),
        "sign": lambda: torch.sign,
        "largest entry": lambda: lambda r: r * (r.abs() == r.abs().max()),
    }


@pytest.mark.parametrize("k_prev", [0, 2])
@pytest.mark.parametrize("name", list(adversaries(2)))
def test_the_error_never_grows(name: str, k_prev: int) -> None:
    n = 60
    A, b = spd(n, condition=1e3), random(n, seed=8)
    solution = torch.linalg.solve(A, b)
    make = adversaries(n)[name]
    errors = []
    for x in iterates(40, lambda k: dcdm(A, b, make(), k_prev=k_prev, rtol=0.0, maxiter=k)):
        e = x - solution
        errors.append(float(e @ A @ e) ** 0.5)
    for before, after in pairwise(errors):
        assert after <= before * (1 + 1e-12) + 1e-13 * errors[0]
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("name", list(adversaries(2)))
def test_it_converges_whatever_the_map_says(name: str, device: str) -> None:
    n = 60
    A, b = spd(n), random(n, seed=8)
    f = adversaries(n)[name]()
    with torch.no_grad():
        result = dcdm(A.to(home(device)), b.to(home(device)), lambda r: f(r.cpu()).to(r.device), maxiter=1000)
    assert result.converged
    assert error(result.x.cpu(), torch.linalg.solve(A, b)) < 1e-4
    assert float((b - A @ result.x.cpu()).norm()) <= 1e-6 * float(b.norm())


# --- devices, dtypes, batches, threads ---


def maps(A: LinearOperator) -> dict[str, Any]:
    n = A.shape[0]
    f = network(n, gain=0.2)
    return {
        "function": lambda r: f(r.cpu()).to(r.device),
        "float32 inside": lambda r: f(r.float().cpu()).float().to(r.device),
        "diagonal": Diagonal(torch.linspace(0.5, 1.5, n, dtype=A.dtype, device=A.device)),
        "matrix": Dense(torch.eye(n, dtype=A.dtype, device=A.device) * 0.3),
        "ic0": ic0(Stencil((4, 5), dtype=A.dtype, device=A.device)),
        "none": lambda r: r * torch.nan,
        "low rank": LowRank(torch.eye(n, dtype=A.dtype, device=A.device) * 0.5),
    }


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("kind", KINDS)
def test_every_operator(kind: str, dtype: torch.dtype, device: str) -> None:
    A = example_operators(dtype, home(device))[kind]
    b = random(2, 20, dtype=dtype, device=home(device))
    solution = torch.linalg.solve(example_operators()[kind].dense(), b.cpu().double().T).T
    for f in maps(A).values():
        with torch.no_grad():
            result = dcdm(A, b, f, rtol=1e-10 if dtype is F64 else 1e-4)
        assert result.converged
        assert result.x.dtype is dtype
        assert error(result.x, solution) < (1e-7 if dtype is F64 else 3e-2)


@pytest.mark.parametrize("kind", ["function", "diagonal", "matrix", "ic0", "none", "low rank"])
@pytest.mark.parametrize("fallback", [None, "jacobi", "ic0", "matrix", "low rank", "function"])
def test_devices_agree(kind: str, fallback: str | None, device: str) -> None:
    A = Stencil((4, 5), shift=0.1, device=home(device))
    b = random(3, 20, device=home(device))
    matrix = torch.eye(20, dtype=F64, device=home(device)) * 0.2

    def other(matrix: Tensor) -> Any:
        forms = {"matrix": Dense(matrix), "low rank": LowRank(matrix), "function": lambda r: r @ matrix}
        return forms.get(fallback or "", fallback)

    options: dict[str, Any] = {"rtol": 1e-12, "fallback": other(matrix)}
    result = dcdm(A, b, maps(A)[kind], **options)
    if device == "cpu":
        assert error(result.x, torch.linalg.solve(A.dense(), b.T).T) < 1e-9
        return
    host = Stencil((4, 5), shift=0.1)
    options["fallback"] = other(matrix.cpu())
    expected = dcdm(host, b.cpu(), maps(host)[kind], **options)
    assert result.per_system_iterations.tolist() == expected.per_system_iterations.tolist()
    assert result.per_system_fallbacks.tolist() == expected.per_system_fallbacks.tolist()  # type: ignore[union-attr]
    torch.testing.assert_close(result.x.cpu(), expected.x, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("schedule", range(3))
def test_emulator_schedules_give_one_answer(schedule: int) -> None:
    A, b, f = Stencil((20, 30)), random(2, 600), network(600, gain=0.1)
    options: dict[str, Any] = {"k_prev": 12, "rtol": 1e-9, "maxiter": 400}
    with emulated():
        backend().set_schedule(schedule)
        try:
            result = dcdm(A, b, f, **options)
        finally:
            backend().set_schedule(0)
    expected = dcdm(A, b, f, **options)
    assert result.per_system_iterations.tolist() == expected.per_system_iterations.tolist()
    torch.testing.assert_close(result.x, expected.x, rtol=1e-8, atol=1e-9)


def test_systems_of_a_batch_do_not_know_of_each_other(device: str) -> None:
    """One of them has a map that fails, others converge early: each does what it does alone."""
    A = Stencil((6, 7), device=home(device))
    b = random(2, 3, 42, device=home(device)) * torch.tensor([1.0, 1e-8, 1e8], dtype=F64, device=home(device))[:, None]
    b[1, 1] = A.matvec(torch.ones(42, dtype=F64, device=home(device)))
    b[0, 2] = 0

    def f(r: Tensor) -> Tensor:
        return torch.where(r[..., :1] > 0.25, torch.nan, r.sign() * r.abs().sqrt())

    result = dcdm(A, b, f, rtol=1e-9)
    assert result.converged
    assert result.per_system_fallbacks is not None
    assert result.per_system_fallbacks.max() > 0
    for k, (row, x) in enumerate(zip(b.reshape(6, 42), result.x.reshape(6, 42), strict=True)):
        alone = dcdm(A, row, f, rtol=1e-9)
        assert int(result.per_system_iterations[k]) == alone.iterations
        assert int(result.per_system_fallbacks[k]) == alone.fallbacks
        torch.testing.assert_close(x, alone.x, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("kind", ["native", "function", "callable operator"])
def test_threads_do_not_change_a_bit(kind: str) -> None:
    A, b = Stencil((300, 300)), random(90_000)
    f: Any = jacobi(A) if kind == "native" else lambda r: r + 0.1 * torch.sign(r)
    operator = A.matvec if kind == "callable operator" else A
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(quietly(lambda: dcdm(operator, b, f, k_prev=3, maxiter=25)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(results[0].x, other.x)
        assert results[0].history.residual_norms.tolist() == other.history.residual_norms.tolist()


def test_a_map_may_use_all_threads() -> None:
    """Parallel code in the map, between parallel passes of the loop."""
    A = PoissonGrid(torch.nn.functional.pad(torch.full((200, 200), 2), (1, 1, 1, 1), value=3))
    b = random(202, 202)
    layer = torch.nn.Conv2d(1, 1, 3, padding=1, bias=False, dtype=F64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2, 1], [2, 8, 2], [1, 2, 1]], dtype=F64) / 20)
    result = dcdm(A, b, lambda r: layer(r[None, None])[0, 0], maxiter=2000)
    assert result.converged
    assert result.fallbacks == 0


# --- voxel grids ---


def test_what_the_map_says_outside_the_fluid_does_not_count(device: str) -> None:
    flags = torch.full((12, 14), 2)
    flags[0] = 3
    flags[4:7, 5:9] = 0
    A = PoissonGrid(flags, device=home(device))
    b = random(12, 14, device=home(device))
    f = lambda r: torch.where(A.mask, r, 1e6)  # noqa: E731
    result = dcdm(A, b, f, x0=torch.full_like(b, 3.0))
    assert result.converged
    assert result.fallbacks == 0
    assert bool((result.x[~A.mask] == 0).all())
    assert error(result.x, cg(A, b, rtol=1e-10).x) < 1e-5


def test_closed_components_get_the_solution_of_mean_zero() -> None:
    A = PoissonGrid(torch.full((10, 10), 2))
    b = random(10, 10)
    b -= b.mean()
    result = dcdm(A, b, lambda r: r + 5.0, rtol=1e-9)  # with a part in the null space
    assert result.converged
    assert abs(float(result.x.mean())) < 1e-12
    assert error(result.x, cg(A, b, rtol=1e-12).x) < 1e-7
    with pytest.raises(ValueError, match="dcdm: b: its sum over closed component 0"):
        dcdm(A, b + 1, lambda r: r)


# --- ends ---


def test_the_true_residual_decides(device: str) -> None:
    """Rounding in float32 holds the residual up; the recurrence alone would have claimed success."""
    A = spd(60, condition=1e5).to(home(device), F32)
    b = random(60, dtype=F32, device=home(device))
    result = quietly(lambda: dcdm(A, b, lambda r: r, rtol=1e-7, maxiter=3000))
    true = float((b.double() - A.double() @ result.x.double()).norm())
    assert result.residual_norm == pytest.approx(true, rel=0.05)
    assert result.converged == (true <= 1e-7 * float(b.norm()))
    assert not result.converged
    assert result.iterations < 3000


def test_exactly_maxiter_iterations_without_a_tolerance() -> None:
    A, b = Stencil((9, 9)), random(81)
    for count in (0, 1, 5, 300):
        result = ends("maxiter", lambda count=count: dcdm(A, b, torch.sign, rtol=0.0, maxiter=count))  # type: ignore[misc]
        assert result.iterations == count
    assert error(A.matvec(result.x), b) < 1e-12


def test_start_zero_and_state() -> None:
    A, b = Stencil((9, 9)), random(81)
    solution = cg(A, b, rtol=1e-13).x
    assert dcdm(A, b, torch.sign, x0=solution).iterations == 0
    zero = dcdm(A, 0 * b, torch.sign, x0=solution)
    assert zero.converged
    assert bool((zero.x == 0).all())
    part = ends("maxiter", lambda: dcdm(A, b, lambda r: r, maxiter=10))
    rest = dcdm(A, b, lambda r: r, **part.state)
    assert rest.converged
    assert rest.history.residual_norms[0] == pytest.approx(part.residual_norm, rel=1e-9)
    assert dcdm(A, b, torch.sign, atol=1e9).iterations == 0
    for empty in (b[:0].reshape(0, 81), torch.empty(3, 0, 81, dtype=F64)):
        assert dcdm(A, empty, torch.sign).x.shape == empty.shape


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("power", [-200, -100, 90, 200])
def test_squares_out_of_range_do_no_harm(dtype: torch.dtype, power: int) -> None:
    power = power if dtype is F64 else power // 2
    A, b = Stencil((9, 9), dtype=dtype), random(2, 81, dtype=dtype)
    expected = dcdm(A, b, torch.sign, rtol=1e-4)
    factor = 2.0 ** (4 * power if dtype is F64 else power)
    result = dcdm(A, b * factor, torch.sign, rtol=1e-4)
    assert result.converged
    assert result.iterations == expected.iterations
    assert torch.equal(result.x / factor, expected.x)
    assert result.residual_norm == pytest.approx(expected.residual_norm * factor, rel=1e-3)


@pytest.mark.parametrize("native", [True, False])
def test_negative_curvature_of_the_matrix(native: bool, device: str) -> None:
    matrix = torch.diag(torch.tensor([3.0, 1.0, 2.0, -0.5], dtype=F64, device=home(device)))
    b = torch.ones(2, 4, dtype=F64, device=home(device))
    b[1, 3] = 0  # this one does not see it
    A: Any = matrix if native else lambda x: x @ matrix
    with torch.no_grad():
        result = ends("negative_curvature", lambda: dcdm(A, b, lambda r: r * torch.nan, fallback=lambda r: r.clone()))
    assert result.direction is not None
    d = result.direction[0].cpu()
    assert float(d @ matrix.cpu() @ d) < 0
    assert result.curvature == pytest.approx(float(d @ matrix.cpu() @ d / (d @ d)))
    assert bool((result.direction[1] == 0).all())
    assert str(result.per_system_status[1]) == "converged"


def test_singular_matrix() -> None:
    A = Stencil((5, 5), boundary="neumann")
    b = random(25)
    result = quietly(lambda: dcdm(A, b, lambda r: r))
    assert str(result.status) in ("singular", "stagnated", "maxiter")
    assert dcdm(A, b - b.mean(), lambda r: r).converged


@pytest.mark.parametrize("fallback", [lambda r: -r, lambda r: 0 * r, Diagonal(-torch.ones(25, dtype=F64))])
def test_a_fallback_that_is_no_preconditioner(fallback: Any) -> None:
    A, b = Stencil((5, 5)), random(25)
    ends("indefinite_preconditioner", lambda: dcdm(A, b, lambda r: r * torch.nan, fallback=fallback))
    ends("breakdown", lambda: dcdm(A, b, lambda r: r * torch.nan, fallback=lambda r: r * torch.inf))
    assert dcdm(A, b, lambda r: r, fallback=fallback).converged  # not asked
