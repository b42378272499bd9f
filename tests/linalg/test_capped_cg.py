"""Capped conjugate gradients: guarantees, the reference, batches, devices, callables."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from capped_reference import capped_reference
from devices import home
from kantor import _C
from kantor._ops import backend, emulated
from kantor.linalg import CSR, CappedCGStatus, Dense, Diagonal, Stencil, capped_cg, jacobi
from kantor.linalg.capped_cg import CappedSolver

F64 = torch.float64
RULES = ("residual", "step", "truncated")
KINDS = ("definite", "indefinite", "singular", "negative", "nearly")


def matrix(kind: str, n: int, generator: torch.Generator) -> Tensor:
    Q, _ = torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=generator))
    values = torch.rand(n, dtype=F64, generator=generator) * 10
    if kind == "definite":
        values += 0.1
    elif kind == "indefinite":
        values -= 5
    elif kind == "singular":
        values[: n // 2] = 0
    elif kind == "negative":
        return -2 * torch.eye(n, dtype=F64)
    else:
        values[0] = -1e-9
    H = (Q * values) @ Q.T
    return (H + H.T) / 2


def cases(count: int) -> list[tuple[str, Tensor, Tensor, float]]:
    """Random matrices with right-hand sides and dampings; sizes 1 to 120."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        n = int(torch.randint(1, 121, (1,), generator=generator))
        H = matrix(kind, n, generator)
        g = torch.randn(n, dtype=F64, generator=generator)
        eps = float(10 ** (-3 * torch.rand(1, generator=generator, dtype=F64)))
        out.append((kind, H, g, eps))
    return out


def check_guarantees(H: Tensor, g: Tensor, eps: float, zeta: float, rule: str, result: Any, rtol: float) -> None:
    """What section "What a result guarantees" promises, in float64."""
    d = result.d.double()
    dd = float(d @ d)
    Hb = H + 2 * eps * torch.eye(len(g), dtype=F64)
    if result.status is CappedCGStatus.NC:
        assert float(d @ H @ d) < -eps * dd * (1 - rtol)
        return
    assert result.status is CappedCGStatus.SOL
    assert float(d @ Hb @ d) >= eps * dd * (1 - rtol)
    assert float(g @ d) < 0
    assert math.sqrt(dd) <= 1.1 * float(g.norm()) / eps
    if rule != "truncated":
        assert float((Hb @ d + g).norm()) <= 0.5 * eps * zeta * math.sqrt(dd) * (1 + rtol) + 1e-13 * float(g.norm())
        if float(torch.linalg.eigvalsh(H)[0]) >= -eps:
            exact = -torch.linalg.solve(Hb, g)
            assert float((d - exact).norm()) <= zeta * math.sqrt(dd)


# --- guarantees and the reference ---


@pytest.mark.parametrize("rule", RULES)
def test_guarantees_on_random_matrices(rule: str) -> None:
    for kind, H, g, eps in cases(200):
        result = capped_cg(H, g, damping=eps, rule=rule)
        lowest = float(torch.linalg.eigvalsh(H)[0])
        if lowest >= -eps:
            assert result.status is CappedCGStatus.SOL, kind
        check_guarantees(H, g, eps, 0.01, rule, result, 1e-6)
        assert result.n_iter <= 2 * len(g)


@pytest.mark.parametrize("rule", RULES)
def test_guarantees_in_float32(rule: str) -> None:
    for kind, H, g, eps in cases(200):
        single = H.float()
        lowest = float(torch.linalg.eigvalsh(single.double())[0])
        result = capped_cg(single, g.float(), damping=eps, rule=rule)
        if lowest > -eps / 2:
            assert result.status is CappedCGStatus.SOL, (kind, result)
        if result.status is CappedCGStatus.NC:
            d = result.d.double()
            assert float(d @ single.double() @ d) < -0.9 * eps * float(d @ d)


@pytest.mark.parametrize("rule", RULES)
def test_equals_the_reference(rule: str) -> None:
    """Same status, iterations, direction; one product fewer where a rule is tested before it."""
    for _, H, g, eps in cases(100):
        expected = capped_reference(H, g, eps, rule=rule)
        result = capped_cg(H, g, damping=eps, rule=rule)
        assert str(result.status) == expected.status
        assert result.n_iter == expected.iterations
        early = rule != "residual" and expected.status == "SOL"
        y_bends = rule != "residual" and expected.status == "NC" and torch.equal(expected.d, expected.iterates[-1])
        assert result.n_hvp == expected.iterations + (0 if early or y_bends else 1)
        assert (result.d - expected.d).norm() <= 1e-7 * expected.d.norm()
        norm = float(torch.linalg.matrix_norm(H, 2))
        assert float((H @ g).norm() / g.norm()) * (1 - 1e-9) <= result.hnorm <= norm * (1 + 1e-6)


def test_one_product_proves_negative_curvature_along_g() -> None:
    H = torch.diag(torch.tensor([-1.0, 2.0, 3.0], dtype=F64))
    g = torch.tensor([1.0, 0.0, 0.0], dtype=F64)
    result = capped_cg(H, g, damping=0.5)
    assert (result.status, result.n_iter, result.n_hvp) == (CappedCGStatus.NC, 0, 1)
    assert result.curvature == -1.0
    assert torch.equal(result.d, -g)


@pytest.mark.parametrize("rule", RULES)
def test_one_unknown(rule: str) -> None:
    result = capped_cg(torch.tensor([[4.0]], dtype=F64), torch.tensor([2.0], dtype=F64), damping=0.5, rule=rule)
    assert result.status is CappedCGStatus.SOL
    assert result.d.item() == pytest.approx(-0.4, rel=1e-15)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
@pytest.mark.parametrize("rule", ["residual", "step"])
def test_scale_does_not_matter(scale: float, rule: str) -> None:
    for _, H, g, eps in cases(40):
        plain = capped_cg(H, g, damping=eps, rule=rule)
        scaled = capped_cg(scale * H, scale * g, damping=scale * eps, rule=rule)
        assert (plain.status, plain.n_iter) == (scaled.status, scaled.n_iter)
        if plain.status is CappedCGStatus.SOL:
            torch.testing.assert_close(scaled.d, plain.d, rtol=1e-6, atol=1e-9)
        else:  # a direction has no length of its own
            torch.testing.assert_close(scaled.d / scaled.d.norm(), plain.d / plain.d.norm(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("size", [1e-300, 1e-170, 1e170, 1e300])
def test_right_hand_sides_whose_squares_are_out_of_range(size: float) -> None:
    H = torch.diag(torch.linspace(1, 5, 20, dtype=F64))
    g = torch.randn(20, dtype=F64, generator=torch.Generator().manual_seed(1))
    plain, extreme = (capped_cg(H, c * g, damping=0.1) for c in (1.0, size))
    assert extreme.status is CappedCGStatus.SOL
    torch.testing.assert_close(extreme.d / size, plain.d, rtol=1e-12, atol=1e-14)


def test_limit_of_iterations_is_term_and_atol_asks_for_more() -> None:
    H = torch.diag(torch.logspace(0, 2, 50, dtype=F64))
    g = torch.ones(50, dtype=F64)
    short = capped_cg(H, g, damping=1e-3, max_iter=3)
    assert (short.status, short.n_iter) == (CappedCGStatus.TERM, 3)
    assert float(g @ short.d) < 0
    loose, tight = (capped_cg(H, g, damping=1e-3, rule="truncated", atol=a) for a in (math.inf, 1e-8))
    assert tight.n_iter > loose.n_iter
    assert tight.residual_norm < 1e-8


# --- test 4 ---


def test_scan_without_iterates_equals_brute_force_over_them() -> None:
    generator = torch.Generator().manual_seed(6)
    for _ in range(100):
        n = int(torch.randint(12, 60, (1,), generator=generator))
        H = matrix("definite", n, generator) + torch.eye(n, dtype=F64)
        g, eps = torch.randn(n, dtype=F64, generator=generator), 0.01
        reference = capped_reference(H, g, eps, 1e-9, max_iter=min(n // 2, 12))
        j = reference.iterations
        assert reference.status == "TERM"
        Hb = H + 2 * eps * torch.eye(n, dtype=F64)
        steps = [torch.stack(reference.steps[i:]).sum(0) for i in range(j)]  # y+ - y_i, without cancellation
        ratios = torch.stack([(s @ Hb @ s) / (s @ s) for s in steps])
        arrays = torch.zeros(4, j + 1, dtype=F64)
        arrays[:2] = torch.tensor([reference.alphas, reference.rhos], dtype=F64)
        smallest, index = _C.capped_scan(arrays, j)
        assert smallest == pytest.approx(float(ratios.min()), rel=1e-8)
        assert float(ratios[index]) == pytest.approx(float(ratios.min()), rel=1e-8)


def injected(H: Any, g: Tensor, eps: float, shift: float, **options: Any) -> tuple[CappedSolver, Any]:
    solver = CappedSolver(g)
    solver.log_T_shift = shift
    solver.solve(H, g, eps, 0.01, **options)
    return solver, solver.outcome()


# --- preconditioning ---


@pytest.mark.parametrize("rule", RULES)
def test_preconditioned_variant_equals_the_reference(rule: str) -> None:
    for _, H, g, eps in cases(60):
        scales = 1 / (H.diagonal().abs() + 2 * eps)
        expected = capped_reference(H, g, eps, rule=rule, precondition=lambda r, s=scales: s * r)
        if expected.iterations > 30:  # conjugacy is lost, and with it any hope that two programs agree
            continue
        for M_inv in (Diagonal(scales), lambda r, s=scales: s * r):
            result = capped_cg(H, g, damping=eps, rule=rule, M_inv=M_inv)
            assert str(result.status) == expected.status
            # n iterations leave rounding errors, which may or may not meet a tolerance: then one more is made.
            assert abs(result.n_iter - expected.iterations) <= (expected.iterations >= len(g))
            assert (result.d - expected.d).norm() <= 1e-6 * expected.d.norm()


def test_named_preconditioners() -> None:
    A = CSR.from_any(Stencil((15, 15)).to_csr().to_scipy())
    g = torch.randn(225, dtype=F64, generator=torch.Generator().manual_seed(2))
    plain = capped_cg(A, g, damping=1e-3, rule="step")
    for M_inv in ("jacobi", "ic0", jacobi(A)):
        result = capped_cg(A, g, damping=1e-3, rule="step", M_inv=M_inv)
        assert result.status is CappedCGStatus.SOL
        torch.testing.assert_close(result.d, plain.d, rtol=1e-2, atol=1e-2)


# --- batches, threads, devices ---


def batch(B: int = 7, n: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    H = matrix("indefinite", n, generator)
    return H, torch.randn(B, n, dtype=F64, generator=generator), torch.logspace(-2, 1, B, dtype=F64)


@pytest.mark.parametrize("rule", RULES)
def test_batch_equals_a_loop_bit_for_bit(rule: str) -> None:
    H, G, damping = batch()
    together = capped_cg(H, G, damping=damping, rule=rule)
    alone = [capped_cg(H, g, damping=float(e), rule=rule) for g, e in zip(G, damping, strict=True)]
    assert {str(s) for s in together.per_system_status} == {"SOL", "NC"}
    for k, one in enumerate(alone):
        assert torch.equal(together.d[k], one.d)
        assert together.per_system_status[k] is one.status
        assert together.per_system_iterations[k] == one.n_iter
        assert together.per_system_hnorm[k] == one.hnorm
    assert together.n_hvp == max(one.n_hvp for one in alone)


def test_finished_systems_are_left_alone_and_zero_ones_left_out() -> None:
    _, G, damping = batch()
    solver = CappedSolver(G)
    G[2] = 0
    solver.solve(lambda v: 3 * v, G, damping.numpy(), 0.01, rule="step")
    assert torch.equal(solver.d[2], torch.zeros(40, dtype=F64))
    torch.testing.assert_close(solver.d, -G / (3 + 2 * damping).unsqueeze(-1))
    for k in range(len(G)):
        assert solver.outcome(k).length == pytest.approx(float(solver.d[k].norm()), rel=1e-14)


def test_threads_do_not_change_a_bit() -> None:
    n = 100_003
    d = torch.linspace(-0.5, 5, n, dtype=F64)
    g = torch.randn(n, dtype=F64, generator=torch.Generator().manual_seed(4))
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append([capped_cg(H, g, damping=0.6) for H in (Diagonal(d), lambda v: d * v)])
    torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one.d, two.d)
        assert one.n_iter == two.n_iter


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("rule", RULES)
def test_devices_agree(device: str, dtype: torch.dtype, rule: str) -> None:
    H, G, damping = batch(3, 60)
    on_host = capped_cg(H.to(dtype), G.to(dtype), damping=damping, rule=rule, max_iter=50)
    A = H.to(home(device), dtype)
    for operator in (A, lambda v: v @ A):
        for M_inv in (None, Diagonal(A.diagonal().abs() + 1)):
            expected = on_host
            if M_inv is not None:
                cpu = Diagonal((H.diagonal().abs() + 1).to(dtype))
                expected = capped_cg(H.to(dtype), G.to(dtype), damping=damping, rule=rule, max_iter=50, M_inv=cpu)
            got = capped_cg(operator, G.to(home(device), dtype), damping=damping, rule=rule, max_iter=50, M_inv=M_inv)
            tolerance = 1e-10 if dtype is F64 else 2e-3
            for k in range(3):
                assert got.per_system_status[k] is expected.per_system_status[k]
                difference = (got.d[k].cpu() - expected.d[k]).norm()
                assert difference <= tolerance * expected.d[k].norm()


def test_host_looks_at_the_device_once_a_window() -> None:
    """Between two looks nothing is copied to the host: all that the emulator does there is launches."""
    H = Diagonal(torch.logspace(0, 3, 200, dtype=F64))
    g = torch.ones(200, dtype=F64)
    with emulated():
        looks = []
        for every in (1, 8):
            before = backend().host_copies()
            result = capped_cg(H, g, damping=1e-3, check_every=every)
            looks.append((backend().host_copies() - before, result.n_iter))
    (each, iterations), (few, same) = looks
    assert iterations == same > 30
    assert few <= iterations / 8 + 3 < each


@pytest.mark.parametrize("schedule", range(3))
def test_emulator_schedules_give_one_answer(schedule: int) -> None:
    H, G, damping = batch(2, 50)
    expected = capped_cg(H, G, damping=damping[:2])
    with emulated():
        backend().set_schedule(schedule)
        try:
            got = capped_cg(H, G, damping=damping[:2])
        finally:
            backend().set_schedule(0)
    torch.testing.assert_close(got.d, expected.d, rtol=1e-10, atol=1e-12)


# --- operators and callables ---


def test_every_kind_of_operator() -> None:
    A = Stencil((6, 7)).dense() - 1.5 * torch.eye(42, dtype=F64)
    g = torch.randn(42, dtype=F64, generator=torch.Generator().manual_seed(5))
    expected = capped_cg(A, g, damping=0.3)
    scipy_sparse = pytest.importorskip("scipy.sparse")
    operators = (
        Dense(A), CSR.from_any(A.to_sparse_csr()), A.to_sparse_csr(), scipy_sparse.csr_array(A.numpy()),
        Stencil((6, 7)) - Diagonal(torch.full((42,), 1.5, dtype=F64)), lambda v: v @ A,
    )  # fmt: skip
    for operator in operators:
        result = capped_cg(operator, g, damping=0.3)
        assert result.status is expected.status
        torch.testing.assert_close(result.d, expected.d, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("rule", RULES)
def test_products_are_counted(rule: str) -> None:
    for _, H, g, eps in cases(30):
        calls = 0

        def product(v: Tensor, H: Tensor = H) -> Tensor:
            nonlocal calls
            calls += 1
            return H @ v

        assert capped_cg(product, g, damping=eps, rule=rule).n_hvp == calls


def test_strided_right_hand_sides_and_products() -> None:
    H, G, damping = batch()
    wide = torch.zeros(40, 14, dtype=F64)
    wide[:, ::2] = G.T
    strided = capped_cg(H, wide[:, ::2].T, damping=damping)
    assert torch.equal(strided.d, capped_cg(H, G, damping=damping).d)
    product = capped_cg(lambda v: (v @ H).repeat_interleave(2, -1)[..., ::2], G, damping=damping)
    torch.testing.assert_close(product.d, strided.d, rtol=1e-9, atol=1e-11)


def test_lazy_negations_and_zeros_are_read_as_values() -> None:
    H, G, damping = batch()
    plain = capped_cg(lambda v: -(v @ H), G, damping=damping)
    lazy = capped_cg(lambda v: torch._neg_view(v @ H), G, damping=damping)
    assert torch.equal(plain.d, lazy.d)
    zeros = capped_cg(lambda v: torch._efficientzerotensor(v.shape, dtype=v.dtype), G, damping=damping)
    torch.testing.assert_close(zeros.d, -G / (2 * damping).unsqueeze(-1))


def test_indefinite_preconditioner_is_told() -> None:
    result = capped_cg(torch.eye(3, dtype=F64), torch.ones(3, dtype=F64), damping=0.1, M_inv=lambda r: -r)
    assert result.status is CappedCGStatus.INDEFINITE_PRECONDITIONER
    assert "not positive definite" in repr(result)


class Budget(RuntimeError):
    pass


@pytest.mark.parametrize("error", [Budget("spent"), KeyboardInterrupt(), StopIteration(), MemoryError()])
@pytest.mark.parametrize("after", [0, 2])
def test_exceptions_of_a_callable_come_out_as_they_are(error: BaseException, after: int) -> None:
    H = torch.diag(torch.logspace(0, 3, 30, dtype=F64))
    calls = 0

    def product(v: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > after:
            raise error
        return H @ v

    g = torch.ones(30, dtype=F64)
    with pytest.raises(type(error)) as caught:
        capped_cg(product, g, damping=1e-3)
    if isinstance(error, Budget):
        assert caught.value is error
    assert capped_cg(H, g, damping=1e-3).status is CappedCGStatus.SOL


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_products_that_are_not_finite_are_a_breakdown(value: float) -> None:
    result = capped_cg(lambda v: v * value, torch.ones(5, dtype=F64), damping=0.1)
    assert result.status is CappedCGStatus.BREAKDOWN
    assert "NaN" in repr(result)


def test_result_prints_and_gradients_are_cut() -> None:
    g = torch.ones(4, dtype=F64, requires_grad=True)
    result = capped_cg(torch.eye(4, dtype=F64), g, damping=0.1)
    assert not result.d.requires_grad
    assert "SOL" in repr(result)
    assert str(result.status) == "SOL"
    assert all(status.advice for status in CappedCGStatus)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"g": [1.0, 2.0, 3.0]}, TypeError, "torch.Tensor"),
        ({"g": torch.ones(3, dtype=torch.int64)}, TypeError, "float32 or float64"),
        ({"g": torch.zeros(3, dtype=F64)}, ValueError, "not zero"),
        ({"g": torch.tensor([1.0, math.nan, 0.0], dtype=F64)}, ValueError, "finite"),
        ({"g": torch.ones(0, dtype=F64)}, ValueError, "not empty"),
        ({"g": torch.ones(2, 2, 3, dtype=F64)}, ValueError, r"\(B, n\)"),
        ({"g": torch.ones(4, dtype=F64)}, ValueError, r"\(4, 4\)"),
        ({"g": torch.ones(3)}, TypeError, "float32"),
        ({"damping": 0.0}, ValueError, "damping"),
        ({"damping": -1.0}, ValueError, "damping"),
        ({"damping": math.nan}, ValueError, "damping"),
        ({"damping": "1"}, TypeError, "damping"),
        ({"damping": torch.ones(2)}, ValueError, "damping"),
        ({"rtol": 0.0}, ValueError, "rtol"),
        ({"rtol": 1.0}, ValueError, "rtol"),
        ({"atol": 0.0}, ValueError, "atol"),
        ({"hnorm": -1.0}, ValueError, "hnorm"),
        ({"rule": "tight"}, ValueError, "rule"),
        ({"max_iter": -1}, ValueError, "max_iter"),
        ({"check_every": 0}, ValueError, "check_every"),
        ({"A": lambda v: v[:2]}, ValueError, "shape"),
        ({"A": lambda v: v.float()}, TypeError, "float32"),
        ({"A": lambda v: 3.0}, ValueError, "float"),
        ({"A": torch.triu(torch.ones(3, 3, dtype=F64)), "debug": True}, RuntimeError, "not symmetric"),
    ],
)
def test_bad_input_says_what_was_wrong(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    given = {"A": torch.eye(3, dtype=F64), "g": torch.ones(3, dtype=F64), "damping": 0.1} | arguments
    with pytest.raises(error, match=match):
        capped_cg(given.pop("A"), given.pop("g"), **given)


def test_numbers_may_be_arrays() -> None:
    H, G, damping = batch()
    expected = capped_cg(H, G, damping=damping, rtol=torch.full((7,), 0.1))
    got = capped_cg(H, G, damping=damping.numpy(), rtol=np.full(7, 0.1))
    assert torch.equal(got.d, expected.d)


@pytest.mark.gpu
def test_torch_does_not_synchronise_inside_a_window(device: str) -> None:
    """With a torch function as operator: no call between two looks makes the host wait."""
    if device != "cuda":
        pytest.skip("about CUDA's synchronisation")
    d = torch.logspace(0, 3, 500, dtype=F64, device="cuda")
    calls = 0

    def product(v: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        torch.cuda.set_sync_debug_mode("error" if 2 <= calls < 8 else "default")
        return d * v

    try:
        result = capped_cg(product, torch.ones_like(d), damping=1e-3, check_every=8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.status is CappedCGStatus.SOL
    assert calls > 8
