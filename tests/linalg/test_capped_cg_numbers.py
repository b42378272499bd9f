"""Capped conjugate gradients: the numbers reported, ranges of floating point, and the same answers however computed."""

from __future__ import annotations

import importlib
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import devices
from capped_reference import capped_reference
from kantor._ops import emulated
from kantor.linalg import CSR, CappedCGStatus, Dense, Diagonal, LinearOperator, LowRank, Stencil, capped_cg
from systems import F32, F64, random
from test_capped_cg import RULES, cases

# --- what the result says ---


@pytest.mark.parametrize("rule", RULES)
def test_reported_numbers_are_true(rule: str) -> None:
    """Residual, curvature and the estimate of the norm come from recurrences; here they are formed anew."""
    for _, H, g, eps in cases(200):
        result = capped_cg(H, g, damping=eps, rule=rule)
        d = result.d
        curvature = float(d @ H @ d / (d @ d))
        assert result.curvature == pytest.approx(curvature, rel=1e-11, abs=1e-11 * eps)
        if result.status is CappedCGStatus.SOL:
            residual = float((H @ d + 2 * eps * d + g).norm())
            assert result.residual_norm == pytest.approx(residual, abs=1e-12 * float(g.norm()))
        expected = capped_reference(H, g, eps, rule=rule)
        if rule == "residual" and expected.iterations <= 30 and result.residual_norm > 1e-8 * float(g.norm()):
            assert result.hnorm == pytest.approx(expected.hnorm, rel=1e-6)  # r is more than rounding errors


@pytest.mark.parametrize("rule", RULES)
def test_iterations_are_capped(rule: str) -> None:
    """At most min(n, J) iterations, with RON's J(kappa, zeta); rounding does not count for systems as easy as these."""
    for _, H, g, eps in cases(200):
        result = capped_cg(H, g, damping=eps, rule=rule)
        root = math.sqrt((result.hnorm + 2 * eps) / eps)
        cap = math.ceil((root + 0.5) * math.log(144 * (root + 1) ** 2 * root**12 / 0.01**2))
        assert result.n_iter <= min(len(g), cap)


def test_cap_without_the_help_of_a_small_dimension() -> None:
    """Evenly spread eigenvalues keep CG as slow as it can be; J is still far above."""
    d = torch.linspace(0, 100, 20_000, dtype=F64)
    result = capped_cg(Diagonal(d), random(20_000), damping=0.1)
    root = math.sqrt((100 + 0.2) / 0.1)
    assert 3 * root < result.n_iter <= (root + 0.5) * math.log(144 * (root + 1) ** 2 * root**12 / 0.01**2)


# --- ranges ---


@pytest.mark.parametrize("size", [1e-300, 1e-170, 1e170, 1e300, 1.7e308])
def test_truncated_rule_for_right_hand_sides_whose_squares_are_out_of_range(size: float) -> None:
    """The rule asks for min(1/2, sqrt|g|) |g|: half of |g| for large g, as good as the solution for tiny g."""
    H = torch.diag(torch.linspace(1, 5, 20, dtype=F64))
    g = random(20, seed=1)
    g = g / g.abs().max()
    result = capped_cg(H, size * g, damping=0.1, rule="truncated")
    d = result.d / size
    residual = float((H @ d + 0.2 * d + g).norm() / g.norm())
    if size > 1:
        assert result.status is CappedCGStatus.SOL
        assert residual <= 0.5
        alike = capped_cg(H, 1e3 * g, damping=0.1, rule="truncated")
        assert result.n_iter == alike.n_iter
        torch.testing.assert_close(d, alike.d / 1e3, rtol=1e-12, atol=0.0)
    else:  # more than float64 can tell from zero: the solution, and no claim that the bound was met
        assert result.status is CappedCGStatus.TERM
        assert residual < 1e-14


def test_truncated_rule_in_a_batch_of_all_sizes() -> None:
    """A system that has to be scaled changes nothing for the others."""
    H = torch.diag(torch.linspace(-0.05, 5, 20, dtype=F64))
    G = random(4, 20)
    alone = [capped_cg(H, g, damping=0.1, rule="truncated") for g in 1e-2 * G]
    together = capped_cg(H, torch.cat([1e-2 * G, 1e200 * G]), damping=0.1, rule="truncated")
    for k, one in enumerate(alone):
        assert together.per_system_status[k] is one.status
        assert together.per_system_iterations[k] == one.n_iter
        torch.testing.assert_close(together.d[k], one.d, rtol=1e-13, atol=0.0)
        assert together.per_system_residual_norm[k] == pytest.approx(one.residual_norm, rel=1e-13)


@pytest.mark.parametrize("size", [1e-170, 1.0, 1e170])
@pytest.mark.parametrize("rule", ["residual", "step"])
def test_bound_on_the_residual_is_that_of_the_given_system(size: float, rule: str) -> None:
    """Also where the system that is solved is a scaled one."""
    H, g = torch.diag(torch.logspace(0, 2, 50, dtype=F64)), size * random(50)
    result = capped_cg(H, g, damping=0.1, rule=rule, rtol=0.9, atol=1e-9 * size)
    assert result.status is CappedCGStatus.SOL
    assert 1e-12 * size < result.residual_norm < 1e-9 * size


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("rule", RULES)
def test_largest_and_smallest_numbers(dtype: torch.dtype, rule: str) -> None:
    info = torch.finfo(dtype)
    g = torch.tensor([1.0, -0.5, 0.25], dtype=dtype)
    H = 2 * torch.eye(3, dtype=dtype)
    for size in (info.max, info.tiny):
        result = capped_cg(H, size * g, damping=0.25, rule=rule)
        torch.testing.assert_close(result.d, -size * g / 2.5, rtol=4 * info.eps, atol=0.0)
        assert result.status is CappedCGStatus.SOL


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [1e-160, 1e160])
def test_overflow_is_not_called_a_solution(rule: str, scale: float) -> None:
    """|d|^2 or |Hd|^2 beyond the largest number: breakdown, or an answer that holds."""
    H = torch.diag(torch.linspace(1, 5, 20, dtype=F64))
    g = random(20, seed=1)
    result = capped_cg(scale * H, g, damping=0.1 * scale, rule=rule)
    if result.status is not CappedCGStatus.BREAKDOWN:
        d = result.d * scale
        bound = 0.5 * float(g.norm()) if rule == "truncated" else 0.5 * 0.1 * 0.01 * float(d.norm())
        assert float((H @ d + 0.2 * d + g).norm()) <= bound


# --- one answer, however it is computed ---


def mixtures(count: int) -> list[tuple[Any, Tensor, dict[str, Any]]]:
    """Operators, right-hand sides and options of all kinds."""
    generator = torch.Generator().manual_seed(8)
    uniform = lambda *shape: torch.rand(shape, dtype=F64, generator=generator)  # noqa: E731
    out: list[tuple[Any, Tensor, dict[str, Any]]] = []
    for number in range(count):
        n, systems = (int(torch.randint(1, most, (1,), generator=generator)) for most in (80, 5))
        Q = torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=generator))[0]
        values = 10 * uniform(n) - (0, 1, 5)[number % 3]
        S = (Q * values) @ Q.T
        S = (S + S.T) / 2
        damping = 10 ** (3 * uniform(systems) - 2)
        near = S.diagonal().abs() + damping.min()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on torch's sparse tensors
            csr = CSR.from_any(S.to_sparse_csr())
        A = (Dense(S), csr, lambda v, S=S: v @ S, Dense(S) - 0.5 * Diagonal(torch.ones(n, dtype=F64)),
             LowRank(Q.T.contiguous(), values))[number % 5]  # fmt: skip
        options: dict[str, Any] = {
            "damping": damping,
            "rtol": 10 ** (-0.1 - 3 * uniform(systems)),
            "rule": RULES[number // 2 % 3],
            "M_inv": (None, Diagonal(1 / near), lambda r, near=near: r / near)[number // 5 % 3],
            "max_iter": int(torch.randint(0, 2 * n + 1, (1,), generator=generator)) if number % 4 == 0 else None,
        }
        out.append((A, torch.randn(systems, n, dtype=F64, generator=generator), options))
    return out


def amplification(A: Any, G: Tensor, options: dict[str, Any], expected: Any) -> Tensor:
    """What becomes of rounding errors in g: some indefinite systems blow them up, tenfold every iteration."""
    disturbed = capped_cg(A, G * (1 + 1e-15 * random(*G.shape, seed=7)), **options)
    return (disturbed.d - expected.d).norm(dim=-1) / expected.d.norm(dim=-1).clamp_min(1e-300)


def agree(got: Any, expected: Any, k: int, j: int, tolerance: float) -> None:
    assert got.per_system_status[k] is expected.per_system_status[j]
    assert got.per_system_iterations[k] == expected.per_system_iterations[j]
    actual, wanted = (r.d.reshape(-1, r.d.shape[-1])[i].cpu() for r, i in ((got, k), (expected, j)))
    assert (actual - wanted).norm() <= tolerance * wanted.norm()


def test_mixed_batches_equal_their_loops() -> None:
    for A, G, options in mixtures(90):
        together = capped_cg(A, G, **options)
        torch_made = not isinstance(A, LinearOperator)  # torch's products of one vector and of several differ
        tolerance = 100 * amplification(A, G, options, together) + 1e-12 if torch_made else torch.zeros(len(G))
        for k, g in enumerate(G):
            settings = options | {"damping": float(options["damping"][k]), "rtol": float(options["rtol"][k])}
            agree(capped_cg(A, g, **settings), together, 0, k, float(tolerance[k]))


@pytest.fixture(params=range(4), ids=["forward", "reverse", "shuffled", "shuffled again"])
def schedule(request: pytest.FixtureRequest) -> Any:
    """Run the emulator's threads and blocks in this order."""
    devices.require("emulated")
    emulator: Any = importlib.import_module("kantor._emu")
    emulator.set_schedule(request.param)
    yield request.param
    emulator.set_schedule(0)


def test_mixed_batches_on_the_emulator(schedule: int) -> None:
    for number, (A, G, options) in enumerate(mixtures(60)):
        if number % 4 != schedule:
            continue
        expected = capped_cg(A, G, **options)
        with emulated():
            got = capped_cg(A, G, check_every=1 + number % 11, **options)
        tolerance = 100 * amplification(A, G, options, expected) + 1e-12
        for k in range(len(G)):
            agree(got, expected, k, k, float(tolerance[k]))


SEEN: dict[str, Tensor] = {}


@pytest.mark.parametrize("kind", ["stencil", "dense", "sum", "callable", "jacobi"])
def test_schedules_do_not_change_a_bit(kind: str, schedule: int) -> None:
    """Several blocks, so that the last one of a reduction is another each time; iterates after a few iterations."""
    A = Stencil((9, 10, 11), weights=(1.0, 2.0, 3.0), boundary=("neumann", "dirichlet", "neumann"))
    S = A - 0.5 * Diagonal(random(990).abs())
    H = {"stencil": A, "dense": S.dense(), "callable": A.matvec}.get(kind, S)
    M_inv = Diagonal(1 / (1 + random(990, seed=1).abs())) if kind == "jacobi" else None
    G, options = random(3, 990, seed=2), {"damping": torch.tensor([0.1, 0.5, 2.0]), "max_iter": 7, "M_inv": M_inv}
    expected = capped_cg(H, G, rule="step", **options)
    with emulated():
        got = capped_cg(H, G, rule="step", **options)
    for k in range(3):
        agree(got, expected, k, k, 1e-12)
    assert torch.equal(SEEN.setdefault(kind, got.d), got.d), "the schedule changes bits"
