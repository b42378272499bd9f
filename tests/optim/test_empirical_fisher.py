"""Products with the inverse of the empirical Fisher matrix, against its definition and the published recursions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from devices import home
from kantor.linalg import cg
from kantor.optim import EmpiricalFisher
from mfac_reference import F64, Dynamic, correlated, dense, inverse, inverse_times_row, random, recursion

NARROW = (torch.bfloat16, torch.float16, torch.int8)


def error(value: Tensor, exact: Tensor) -> float:
    return float((value.cpu().to(F64) - exact).norm() / exact.norm())


def pushed(G: Tensor, **options: Any) -> EmpiricalFisher:
    fisher = EmpiricalFisher(**{"m": len(G), "dim": G.shape[1], "storage_dtype": G.dtype, "device": G.device} | options)
    for g in G:
        fisher.push(g)
    return fisher


def product(G: Tensor, damping: float, x: Tensor) -> Tensor:
    """``F^-1 x`` for rows x, by Woodbury's formula."""
    m = len(G)
    return (x - torch.linalg.solve(damping * m * torch.eye(m, dtype=F64) + G @ G.T, G @ x.T).T @ G) / damping


# --- the definition ---


@pytest.mark.parametrize("m", [1, 7, 8, 33])
@pytest.mark.parametrize("d", [5, 20, 257])
def test_everything_is_what_the_dense_matrix_gives(device: str, m: int, d: int) -> None:
    G, x = random(m, d), random(3, d, seed=1)
    for damping in (1e-6, 1e-3, 1.0):
        exact, tolerance = inverse(G, damping, m), 1e-10
        for fisher in (
            EmpiricalFisher(G.to(home(device)), damping=damping),
            pushed(G.to(home(device)), damping=damping),
        ):
            assert error(fisher.ihvp(x.to(home(device))), x @ exact) <= tolerance
            assert error(fisher.ihvp(x[0].to(home(device))), exact @ x[0]) <= tolerance
            assert error(fisher.ihvp_last(), inverse_times_row(G, damping, m, -1)) <= tolerance
            assert error(fisher.diag_inverse(), exact.diagonal()) <= tolerance
            assert float(fisher.logdet()) == pytest.approx(-float(torch.logdet(exact)), rel=1e-9, abs=1e-7)
            for i, j in ((0, 0), (0, d - 1), (d // 2, 1)):
                size = float(exact.diagonal().max())
                assert float(fisher.inverse_entry(i, j)) == pytest.approx(float(exact[i, j]), abs=tolerance * size)


@pytest.mark.parametrize(
    ("d", "block"), [(20, 1), (257, 7), (257, 16), (257, 128), (300, 300), (300, 400), (9000, 5000)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *NARROW])
def test_blocks(device: str, d: int, block: int, dtype: torch.dtype) -> None:
    """Whatever the storage, results are those of the gradients as stored."""
    if device == "emulated" and d > 1000 and dtype != torch.float32:
        pytest.skip("slow on the emulator, and the same kernel")
    fisher = pushed(random(9, d).to(home(device)), block_size=block, storage_dtype=dtype, damping=0.1)
    G = fisher._window.columns(0, d).cpu()
    x = random(2, d, seed=1, dtype=fisher.dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 3e-7
    parts = list(zip(G.split(block, 1), x.to(F64).split(block, 1), strict=True))
    assert (
        error(fisher.ihvp(x.to(home(device))), torch.cat([product(part, 0.1, v) for part, v in parts], 1)) <= tolerance
    )
    last = torch.cat([inverse_times_row(part, 0.1, 9, -1) for part, _ in parts])
    assert error(fisher.ihvp_last(), last) <= tolerance
    if d <= 300:
        exact = torch.linalg.inv(dense(G, 0.1, 9, block))
        assert error(fisher.diag_inverse(), exact.diagonal()) <= tolerance
        assert float(fisher.logdet()) == pytest.approx(-float(torch.logdet(exact)), rel=1e-9)
        assert float(fisher.inverse_entry(0, d - 1)) == pytest.approx(float(exact[0, d - 1]), abs=1e-6)
        if block < d:
            assert float(fisher.inverse_entry(0, d - 1)) == 0
    if block == 1:
        assert error(fisher.ihvp(x.to(home(device))), x.to(F64) / (0.1 + G.square().mean(0))) <= tolerance


def test_repeated_and_zero_gradients(device: str) -> None:
    g = random(40).to(home(device))
    repeated, F = pushed(g.expand(6, 40), damping=1e-3), dense(g.cpu().expand(6, 40), 1e-3, 6)
    assert error(repeated.ihvp_last(), torch.linalg.solve(F, g.cpu())) <= 1e-10
    zero = pushed(torch.zeros_like(g).expand(3, 40), damping=0.25)
    assert torch.equal(zero.ihvp(g), g / 0.25)
    assert torch.equal(zero.diag_inverse(), torch.full_like(g, 4.0))
    assert not zero.ihvp_last().any()
    assert torch.equal(EmpiricalFisher(m=2, dim=40, damping=0.25, storage_dtype=F64).ihvp(g.cpu()), g.cpu() / 0.25)


def test_published_recursions_and_the_cholesky_factor_are_one() -> None:
    G, x, damping = random(12, 50), random(50, seed=1), 1e-3
    V, q = recursion(G, damping)
    fisher = EmpiricalFisher(G, damping=damping)
    W = torch.linalg.solve_triangular(fisher._cholesky()[0], G, upper=False) / math.sqrt(12 * damping)
    assert (W - V / q.sqrt().unsqueeze(1)).norm() <= 1e-10 * W.norm()
    assert error(fisher.ihvp(x), x / damping - V.T @ ((V @ x) / q)) <= 1e-10
    assert error(fisher.diag_inverse(), 1 / damping - (V.square() / q.unsqueeze(1)).sum(0)) <= 1e-10
    assert error(fisher.ihvp(x), Dynamic(G, damping).ihvp(x)) <= 1e-10


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 20), d=st.integers(1, 60), block=st.integers(1, 70), seed=st.integers(0, 1000))
def test_inverse_symmetric_positive(m: int, d: int, block: int, seed: int) -> None:
    G, x, y = random(m, d, seed=seed), random(d, seed=seed + 1), random(d, seed=seed + 2)
    fisher = EmpiricalFisher(G, damping=0.01, block_size=block)
    u = fisher.ihvp(x)
    torch.testing.assert_close(dense(G, 0.01, m, block) @ u, x, rtol=1e-9, atol=1e-9)
    assert 0 < float(x @ u) <= float(x @ x) / 0.01 * (1 + 1e-12)
    torch.testing.assert_close(y @ u, x @ fisher.ihvp(y), rtol=1e-9, atol=1e-9)
    eigenvalues = torch.linalg.eigvalsh(fisher.ihvp(torch.eye(d, dtype=F64)))
    assert float(eigenvalues[0]) > 0
    assert float(eigenvalues[-1]) <= 100 * (1 + 1e-10)


# --- the window ---


@pytest.mark.parametrize("factor", ["refactor", "update"])
@pytest.mark.parametrize("block", [None, 16])
def test_window_keeps_the_last_gradients(device: str, factor: str, block: int | None) -> None:
    G, x = random(43, 50).to(home(device)), random(50, seed=1).to(home(device))
    fisher = EmpiricalFisher(
        m=8, dim=50, damping=1e-3, block_size=block, storage_dtype=F64, factor=factor, device=G.device
    )
    for count in range(1, 44):
        assert fisher.push(G[count - 1])
        F = dense(G[max(0, count - 8) : count].cpu(), 1e-3, 8, block)
        if count % 3 == 0:
            assert error(fisher.ihvp_last(), torch.linalg.solve(F, G[count - 1].cpu())) <= 1e-10
    assert fisher.count == 8
    fresh = EmpiricalFisher(G[-8:], damping=1e-3, block_size=block)
    assert error(fisher.ihvp(x), fresh.ihvp(x).cpu()) <= 1e-10


def test_updated_factor_after_many_gradients(device: str) -> None:
    G = random(110, 30).to(home(device))  # more gradients than coordinates
    updated, anew = (pushed(G, m=10, damping=1e-4, factor=factor) for factor in ("update", "refactor"))
    for g in random(15, 30, seed=5).to(home(device)):
        updated.push(g)
        anew.push(g)
        assert error(updated.ihvp_last(), anew.ihvp_last().cpu()) <= 1e-8


def test_divisor(device: str) -> None:
    G = random(3, 20).to(home(device))
    for divisor, expected in (("window", 10), ("mean", 3)):
        fisher = pushed(G, m=10, damping=0.1, divisor=divisor)
        F = dense(G.cpu(), 0.1, expected)
        assert error(fisher.ihvp_last(), torch.linalg.solve(F, G[-1].cpu())) <= 1e-12
        assert error(fisher.diag_inverse(), torch.linalg.inv(F).diagonal()) <= 1e-12
        assert float(fisher.logdet()) == pytest.approx(float(torch.logdet(F)))


def test_static_window_goes_on(device: str) -> None:
    G, g = random(6, 33).to(home(device)), random(33, seed=4).to(home(device))
    fisher = EmpiricalFisher(G, damping=0.01)
    fisher.push(g)
    expected = torch.cat([g.unsqueeze(0), G[1:]])
    assert error(fisher.ihvp_last(), torch.linalg.solve(dense(expected.cpu(), 0.01, 6), g.cpu())) <= 1e-10


@pytest.mark.parametrize("d", [6, 30])  # fewer coordinates than gradients, and more
def test_a_huge_gradient_leaves_no_trace_once_it_is_gone(device: str, d: int) -> None:
    G = random(20, d)
    G[9] *= 1e7
    fisher = EmpiricalFisher(m=8, dim=d, damping=1e-6, storage_dtype=F64, device=home(device))
    for count, g in enumerate(G, 1):
        fisher.push(g.to(home(device)))
        if count > 17:
            window = G[count - 8 : count]
            assert error(fisher.ihvp_last(), inverse_times_row(window, 1e-6, 8, -1)) <= 1e-10


@pytest.mark.parametrize("d", [3, 30])
def test_an_interrupt_leaves_a_window_that_agrees_with_itself(monkeypatch: pytest.MonkeyPatch, d: int) -> None:
    G, fisher = random(9, d), EmpiricalFisher(m=4, dim=d, damping=0.1, storage_dtype=F64)
    for g in G[:6]:
        fisher.push(g)
    for name in ("insert", "fill"):
        store = getattr(fisher._window, name)

        def interrupted(*arguments: Any, store: Any = store) -> None:
            store(*arguments)
            raise KeyboardInterrupt

        monkeypatch.setattr(fisher._window, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        fisher.push(G[6])
    monkeypatch.undo()
    F = dense(fisher._window.columns(0, d), 0.1, 4)
    assert error(fisher.ihvp(G[0]), torch.linalg.solve(F, G[0])) <= 1e-10
    for g in G[6:]:
        fisher.push(g)
    assert error(fisher.ihvp_last(), torch.linalg.solve(dense(G[5:], 0.1, 4), G[8])) <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_state_continues_bit_by_bit(dtype: torch.dtype) -> None:
    G = random(30, 70, dtype=torch.float32)
    options: dict[str, Any] = {"m": 8, "dim": 70, "storage_dtype": dtype, "block_size": 32, "factor": "update"}
    whole, other = pushed(G[:11], **options), EmpiricalFisher(**options)
    whole.ihvp_last()
    other.load_state_dict(whole.state_dict())
    for g in G[11:]:
        whole.push(g)
        other.push(g)
        assert torch.equal(whole.ihvp_last(), other.ihvp_last())
    with pytest.raises(ValueError, match="load_state_dict: expected .*'m': 9"):
        EmpiricalFisher(**options | {"m": 9}).load_state_dict(whole.state_dict())
    before, state = other.ihvp_last(), whole.state_dict()
    for damage, message in (
        ({"rows": state["rows"][:, :64]}, r"rows: expected shape \(8, 128\), got \(8, 64\)"),
        ({"gram": state["gram"][:1]}, r"gram: expected shape \(3, 8, 8\), got \(1, 8, 8\)"),
        ({"settings": None}, "expected .* got None"),
    ):
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state | damage)
    with pytest.raises(ValueError, match="expected counters, got a state without"):
        other.load_state_dict({name: value for name, value in state.items() if name != "counters"})
    assert torch.equal(other.ihvp_last(), before)


# --- precision ---


def test_single_precision_with_small_damping(device: str) -> None:
    """The published forms lose all digits here: their errors grow like eps |g|^2 / damping."""
    G = correlated(m=64, d=1000 if device == "emulated" else 4000)
    x = random(G.shape[1], seed=9)
    for damping in (1e-6, 1e-5):
        fisher = EmpiricalFisher(G.float().to(home(device)), damping=damping)
        stored = G.float().to(F64)
        exact = EmpiricalFisher(stored, damping=damping)
        assert error(fisher.ihvp_last(), exact.ihvp_last()) <= 1e-6
        assert error(fisher.ihvp(x.float().to(home(device))), exact.ihvp(x.float())) <= 1e-6
        g = stored[3]  # in the span, where nearly all of x / damping cancels
        assert error(fisher.ihvp(g.float().to(home(device))), exact.ihvp(g)) <= 1e-4
        assert error(fisher.diag_inverse(), exact.diag_inverse()) <= 1e-6
        if device == "cpu":
            published = Dynamic(stored.float(), damping).ihvp(stored[-1].float())
            assert error(published, exact.ihvp_last()) > 1e-2
            assert error(fisher.ihvp_last(), EmpiricalFisher(G, damping=damping).ihvp_last()) <= 1e-4


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 3e-2), (torch.float16, 3e-3), (torch.int8, 5e-2)])
def test_narrow_storage(device: str, dtype: torch.dtype, bound: float) -> None:
    G = random(32, 1000, dtype=torch.float32) * torch.logspace(-6, 2, 32).unsqueeze(1)
    fisher = pushed(G.to(home(device)), storage_dtype=dtype, damping=1e-2)
    exact = torch.linalg.solve(dense(G, 1e-2, 32), G[-1].to(F64))
    assert fisher.ihvp_last().dtype == torch.float32
    assert error(fisher.ihvp_last(), exact) <= bound
    filled = EmpiricalFisher(G.to(home(device)), storage_dtype=dtype, damping=1e-2)
    assert torch.equal(filled._window.rows, fisher._window.rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_storage_is_torchs(device: str, dtype: torch.dtype) -> None:
    g = random(4096, seed=2, dtype=torch.float32) * torch.logspace(-9, 0, 4096)
    g[0], g[1], g[2] = 1.0, -0.0, 1 + 2**-8  # a tie
    fisher = pushed(g.to(home(device)).unsqueeze(0), storage_dtype=dtype)
    scale = 1.0 if fisher._window.scales is None else float(fisher._window.scales[0])
    assert torch.equal(fisher._window.rows[0, :4096].cpu(), (g / scale).to(dtype))


def test_threads_do_not_change_a_bit() -> None:
    G, x = random(10, 40_000, dtype=torch.float32), random(2, 40_000, seed=1, dtype=torch.float32)
    many = random(101, 2000, seed=2, dtype=torch.float32)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        fisher = pushed(G, damping=1e-3)
        results.append((fisher.ihvp(x), fisher.ihvp_last(), fisher._gram, EmpiricalFisher(many)._grams()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))  # type: ignore[arg-type]
    torch.testing.assert_close(results[0][3][0], many.to(F64) @ many.to(F64).T, rtol=1e-12, atol=1e-10)


def test_cuda_code_gives_what_the_cpu_gives(device: str) -> None:
    if device == "cpu":
        pytest.skip("nothing to compare with")
    G, x = random(37, 9000 if device == "cuda" else 5000, dtype=torch.float32), random(5000, seed=1)
    x = random(G.shape[1], seed=1, dtype=torch.float32)
    there = pushed(G.to(home(device)), damping=1e-3)
    here = EmpiricalFisher(G, damping=1e-3)
    assert error(there.ihvp(x.to(home(device))), here.ihvp(x).to(F64)) <= 1e-6
    assert error(there._grams(), here._grams()) <= 1e-13


# --- others ---


def test_damping_below_roundoff_is_raised_and_said() -> None:
    fisher = EmpiricalFisher(1e8 * torch.ones(4, 6, dtype=F64), damping=1e-9)
    with pytest.warns(RuntimeWarning, match="damping 1e-09 is below the roundoff"):
        u = fisher.ihvp_last()
    torch.testing.assert_close(u, torch.full((6,), 1 / (6 * 1e8), dtype=F64), rtol=0.05, atol=0)


def test_raised_damping_is_that_of_all_results() -> None:
    """A matrix is inverted that is F with one damping, whatever is asked."""
    d = 6
    G = 1e8 + random(4, d)
    fisher = EmpiricalFisher(G, damping=1e-9)
    with pytest.warns(RuntimeWarning, match="is added to it") as caught:
        inverted = fisher.ihvp(torch.eye(d, dtype=F64))
    assert caught[0].filename == __file__  # it points at the caller
    torch.testing.assert_close(fisher.ihvp_last(), inverted @ G[-1], rtol=0.1, atol=0)
    torch.testing.assert_close(fisher.diag_inverse(), inverted.diagonal(), rtol=1e-9, atol=0)
    torch.testing.assert_close(fisher.inverse_entry(0, 2), inverted[0, 2], rtol=1e-9, atol=0)
    raised = fisher.damping + fisher._shift
    eigenvalues = raised + torch.nn.functional.pad(torch.linalg.svdvals(G).square() / 4, (0, d - 4))
    assert float(fisher.logdet()) == pytest.approx(float(eigenvalues.log().sum()), rel=0.05)
    assert float(torch.linalg.eigvalsh(inverted)[-1]) == pytest.approx(1 / raised, rel=1e-6)


def test_diagonal_stays_positive_where_all_digits_cancel() -> None:
    G = random(3, 10)
    G[0], G[1:, 0] = 0, 0
    G[0, 0] = 1e5
    fisher = EmpiricalFisher(G, damping=1e-8)
    assert float(fisher.diag_inverse()[0]) == pytest.approx(3e-10)
    assert float(fisher.inverse_entry(0, 0)) == pytest.approx(3e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
def test_largest_float32_numbers(device: str, dtype: torch.dtype) -> None:
    g = (random(40, dtype=torch.float32) * 7e37).to(home(device))
    filled, inserted = EmpiricalFisher(g.unsqueeze(0), storage_dtype=dtype), pushed(g.unsqueeze(0), storage_dtype=dtype)
    assert error(filled._window.columns(0, 40)[0], g.to(F64).cpu()) <= 0.01
    assert torch.equal(filled._window.rows, inserted._window.rows)


def test_vectors_of_every_kind(device: str) -> None:
    """Strided, expanded, negated without a copy, none at all."""
    for m in (4, 9):
        fisher, x = EmpiricalFisher(random(m, 6).to(home(device)), damping=0.1), random(6, seed=1).to(home(device))
        u = fisher.ihvp(x)
        assert torch.equal(fisher.ihvp(torch.stack([x, x], 1)[:, 0]), u)
        torch.testing.assert_close(fisher.ihvp(x.expand(3, 6))[2], u, rtol=1e-13, atol=0)
        assert torch.equal(fisher.ihvp(torch._neg_view(-x)), u)
        assert torch.equal(fisher.ihvp(x.requires_grad_()), u)
        assert fisher.ihvp(x.new_zeros(0, 6)).shape == (0, 6)
        with pytest.raises(TypeError, match="ihvp: x: expected a plain tensor, got one of torch.func"):
            torch.vmap(fisher.ihvp)(x.detach().expand(3, 6))


def test_preconditioner_of_cg() -> None:
    """A matrix close to F: few iterations."""
    G, b = random(30, 200) * 10, random(200, seed=1)
    A = dense(G, 0.1, 30) + 1e-3 * torch.diag(random(200, seed=2).abs())
    plain, helped = cg(A, b, rtol=1e-8), cg(A, b, rtol=1e-8, M=EmpiricalFisher(G, damping=0.1).ihvp)
    assert helped.converged
    assert helped.iterations < plain.iterations / 3


def test_independent_implementation() -> None:
    """curvlinops: the empirical Fisher matrix of a model, per sample, inverted by conjugate gradients."""
    curvlinops, examples = pytest.importorskip("curvlinops"), pytest.importorskip("curvlinops.examples")
    X, y, net = random(15, 4), torch.arange(15) % 2, torch.nn.Linear(4, 2, dtype=F64)
    loss = torch.nn.CrossEntropyLoss()
    operator = curvlinops.EFLinearOperator(net, loss, list(net.parameters()), [(X, y)])
    shapes = [tuple(p.shape) for p in net.parameters()]
    damped = operator + 0.01 * examples.IdentityLinearOperator(shapes, X.device, F64)
    inverted = curvlinops.CGInverseLinearOperator(damped, tolerance=1e-9, max_iter=1000)
    rows = []
    for i in range(15):
        parts = torch.autograd.grad(loss(net(X[i : i + 1]), y[i : i + 1]), list(net.parameters()))
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    x = random(10, seed=3)
    assert error(EmpiricalFisher(torch.stack(rows), damping=0.01).ihvp(x), (inverted @ x).detach()) <= 1e-6


# --- bad arguments ---


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"damping": 0.0}, ValueError, "EmpiricalFisher: damping: expected a finite number > 0, got 0.0"),
        ({"damping": math.nan}, ValueError, "damping"),
        ({"damping": "1e-3"}, ValueError, "damping: expected a finite number > 0, got '1e-3'"),
        ({"m": 0}, ValueError, "EmpiricalFisher: m: expected an integer >= 1, got 0"),
        ({"block_size": 0}, ValueError, "block_size: expected an integer >= 1"),
        ({"storage_dtype": torch.int32}, TypeError, "storage_dtype: expected one of float32, .* got torch.int32"),
        ({"divisor": "count"}, ValueError, "divisor: expected 'window' or 'mean', got 'count'"),
        ({"factor": "qr"}, ValueError, "factor"),
        ({"on_nonfinite": "warn"}, ValueError, "on_nonfinite"),
        ({"dim": None}, ValueError, "expected grads, or m and dim"),
        ({"grads": torch.ones(5, 3)}, ValueError, r"grads: expected at most m = 4 rows of dim = 10, got \(5, 3\)"),
        ({"grads": torch.ones(10)}, ValueError, r"grads: expected shape \(n, d\), got \(10,\)"),
        ({"grads": torch.ones(2, 10, dtype=torch.int64)}, TypeError, "real floating-point dtype, got int64"),
        ({"grads": torch.ones(2, 10, dtype=torch.complex64)}, TypeError, "real floating-point dtype, got complex64"),
        ({"grads": torch.full((2, 10), math.nan)}, ValueError, "grads: expected finite values"),
        ({"grads": torch.full((2, 10), 1e300, dtype=F64), "storage_dtype": torch.float32}, ValueError,
         r"grads: expected magnitudes of at most 3.4e\+38, got 1e\+300"),
        ({"grads": torch.full((2, 10), 1e200, dtype=F64)}, ValueError, r"at most .*e\+153"),
        ({"dim": 10**6, "m": 100, "max_bytes": 10**6}, MemoryError, "100 gradients of 1000000 .* 0.373 GiB.*bfloat16"),
    ],
)  # fmt: skip
def test_bad_options(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        EmpiricalFisher(**{"m": 4, "dim": 10} | options)


def test_bad_vectors_leave_the_window_as_it_was() -> None:
    fisher = EmpiricalFisher(m=3, dim=10)
    with pytest.raises(ValueError, match="ihvp_last: expected a gradient"):
        fisher.ihvp_last()
    fisher.push(torch.ones(10))
    before = fisher.ihvp_last()
    for g, kind, message in (
        (torch.ones(9), ValueError, r"push: g: expected 10 elements, got shape \(9,\)"),
        (torch.ones(2, 10), ValueError, "push: g"),
        (torch.ones(10, dtype=torch.int32), TypeError, "push: g: expected a real floating-point dtype, got int32"),
        (torch.ones(10, device="meta"), ValueError, "push: g is on meta, the window on cpu"),
        ([1.0] * 10, TypeError, "expected a torch.Tensor, got list"),
        (
            torch.full((10,), math.inf),
            ValueError,
            "expected finite values, at most 3.4e.38 in magnitude, got NaN, infinity",
        ),
    ):
        with pytest.raises(kind, match=message):
            fisher.push(g)  # type: ignore[arg-type]
    assert torch.equal(fisher.ihvp_last(), before)
    assert fisher.count == 1
    skipping = EmpiricalFisher(m=3, dim=2, on_nonfinite="skip")
    assert not skipping.push(torch.tensor([math.nan, 0.0]))
    assert skipping.count == 0
    with pytest.raises(ValueError, match="inverse_entry: j: expected 0 to 9, got 10"):
        fisher.inverse_entry(0, 10)
