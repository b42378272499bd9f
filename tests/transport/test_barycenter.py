"""Barycenters, against plain projections in torch, closed forms of Gaussians, transport.solve and POT."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kantor import ConvergenceError
from kantor.transport import solve
from kantor.transport.barycenter import BarycenterResult, barycenter

F64 = torch.float64

X = torch.linspace(0, 1, 120, dtype=F64)
LINE = (X[:, None] - X) ** 2


def gaussian(mean: float, deviation: float, x: Tensor = X) -> Tensor:
    h = torch.exp(-((x - mean) ** 2) / (2 * deviation**2))
    return h / h.sum()


THREE = torch.stack([gaussian(0.25, 0.05), gaussian(0.7, 0.1), gaussian(0.5, 0.03)])


def moments(p: Tensor, x: Tensor = X) -> tuple[float, float]:
    mean = float(p @ x / p.sum())
    return mean, math.sqrt(float(p @ (x - mean) ** 2 / p.sum()))


def random_problem(count: int, n: int, m: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Cost of points in the plane, histograms with empty cells, weights."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(n + m, 2, dtype=F64, generator=generator)
    C = (points[:n, None] - points[None, n:]).square().sum(-1)
    A = torch.rand(count, n, dtype=F64, generator=generator)
    A = torch.where(torch.rand(count, n, dtype=F64, generator=generator) < 0.3, 0.0, A) + 1e-300
    A[:, seed % n] += 1
    A = torch.where(A > 1e-200, A, 0.0)
    w = torch.rand(count, dtype=F64, generator=generator) + 0.1
    return C, A / A.sum(-1, keepdim=True), w / w.sum()


def by_plain_projections(C: Tensor, A: Tensor, w: Tensor, reg: float, iterations: int) -> Tensor:
    """Iterative Bregman projections with the kernel itself, no logarithms."""
    K = torch.exp(-C / reg)
    v = torch.ones(len(A), C.shape[1], dtype=F64)
    p = v[0]
    for _ in range(iterations):
        u = A / (v @ K.T)
        columns = u @ K
        p = torch.exp(w @ columns.log())
        v = p / columns
    return p


def stopped_early(*arguments: Any, **options: Any) -> BarycenterResult:
    with pytest.warns(RuntimeWarning, match=r"^barycenter: (max_iter|stalled)"):
        return barycenter(*arguments, **options)


# --- values ---


@pytest.mark.parametrize(("count", "n", "m"), [(1, 5, 7), (2, 30, 20), (4, 25, 25), (3, 1, 4), (3, 6, 1)])
def test_plain_projections(count: int, n: int, m: int) -> None:
    C, A, w = random_problem(count, n, m)
    result = barycenter(C, A, w, reg=0.05).check()
    expected = by_plain_projections(C, A, w, 0.05, 20_000)
    torch.testing.assert_close(result.barycenter, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("reg", [5e-3, 1e-3])
def test_pot(reg: float) -> None:
    ot = pytest.importorskip("ot")
    result = barycenter(LINE, THREE, reg=reg).check()
    expected = ot.bregman.barycenter_sinkhorn(
        THREE.T.numpy().copy(), LINE.numpy(), reg, numItermax=20_000, stopThr=1e-14, warn=False
    )
    np.testing.assert_allclose(result.barycenter, expected, rtol=0, atol=1e-6 * expected.max())


def test_pot_debiased() -> None:
    ot = pytest.importorskip("ot")
    result = barycenter(LINE, THREE, reg=1e-2, debiased=True, tol=1e-4).check()
    expected = ot.bregman.barycenter_debiased(
        THREE.T.numpy().copy(), LINE.numpy(), 1e-2, numItermax=result.n_iter, stopThr=0, warn=False
    )
    np.testing.assert_allclose(result.barycenter, expected, rtol=0, atol=1e-2 * expected.max())


def test_gaussians_of_one_width() -> None:
    """The regularised barycenter of translates has variance larger by reg / 2; the debiased one is exact.

    With cost |x - y|^2 the kernel is a normal density of variance reg / 2.
    """
    A = torch.stack([gaussian(0.3, 0.06), gaussian(0.7, 0.06)])
    w = torch.tensor([0.25, 0.75], dtype=F64)
    reg = 2e-3
    plain = barycenter(LINE, A, w, reg=reg).check()
    debiased = barycenter(LINE, A, w, reg=reg, debiased=True, tol=1e-6).check()
    mean, deviation = moments(plain.barycenter)
    assert mean == pytest.approx(0.6, abs=1e-5)
    assert deviation == pytest.approx(math.sqrt(0.06**2 + reg / 2), rel=1e-3)
    mean, deviation = moments(debiased.barycenter)
    assert mean == pytest.approx(0.6, abs=1e-5)
    assert deviation == pytest.approx(0.06, rel=1e-3)


def test_gaussians_of_other_widths() -> None:
    """As reg -> 0: the mean of the means and of the deviations."""
    result = barycenter(LINE, THREE, reg=2e-4, tol=1e-7).check()
    mean, deviation = moments(result.barycenter)
    assert mean == pytest.approx((0.25 + 0.7 + 0.5) / 3, abs=1e-3)
    assert deviation == pytest.approx(0.06, rel=2e-2)


def test_debiased_barycenter_of_one_histogram_is_that_histogram() -> None:
    h = gaussian(0.4, 0.1)
    result = barycenter(LINE, h[None], reg=1e-3, debiased=True, tol=1e-8).check()
    torch.testing.assert_close(result.barycenter, h, rtol=0, atol=1e-5)


def test_is_a_minimum() -> None:
    """The weighted sum of the values of transport.solve is stationary and does not fall in any direction."""
    C, A, w = random_problem(3, 8, 6, seed=2)
    result = barycenter(C, A, w, reg=0.1, tol=1e-11).check()
    p = (result.barycenter / result.barycenter.sum()).requires_grad_()

    def objective(p: Tensor) -> Tensor:
        return torch.stack([w_k * solve(C, h, p, reg=0.1, tol=1e-12).value for w_k, h in zip(w, A, strict=True)]).sum()

    value = objective(p)
    (grad,) = torch.autograd.grad(value, p)
    assert float((grad - grad.mean()).abs().max()) < 1e-8
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        q = p.detach() * torch.exp(0.1 * torch.randn(6, dtype=F64, generator=generator))
        assert float(objective(q / q.sum())) > float(value.detach())


def test_potentials_make_the_plans() -> None:
    C, A, w = random_problem(3, 20, 15, seed=1)
    result = barycenter(C, A, w, reg=0.02, tol=1e-10).check()
    f, g = result.potentials
    P = torch.exp((f[:, :, None] + g[:, None] - C) / 0.02)
    missed = (P.sum(-1) - A).abs().sum(-1) + (P.sum(-2) - result.barycenter).abs().sum(-1)
    assert float(missed.max()) < 2e-10
    assert result.marginal_error <= 1e-10
    assert bool((f[A == 0] == -math.inf).all())
    assert float((w @ g).abs().max()) < 1e-10
    assert float(result.barycenter.sum()) == pytest.approx(1, abs=1e-10)


def test_small_reg() -> None:
    """Where the kernel underflows: reg is 1e-4 of the range; two points meet in the middle."""
    A = torch.zeros(2, 120, dtype=F64)
    A[0, 10] = A[1, 90] = 1
    result = barycenter(LINE, A, reg=1e-4).check()
    assert int(result.barycenter.argmax()) == 50
    assert float(result.barycenter[48:53].sum()) > 0.8
    assert moments(result.barycenter)[0] == pytest.approx(float(X[50]), abs=1e-9)


def test_weight_zero_is_left_out() -> None:
    C, A, _ = random_problem(3, 12, 10)
    w = torch.tensor([0.4, 0.0, 0.6], dtype=F64)
    got = barycenter(C, A, w, reg=0.05).check()
    expected = barycenter(C, A[[0, 2]], w[[0, 2]], reg=0.05).check()
    torch.testing.assert_close(got.barycenter, expected.barycenter, rtol=1e-7, atol=1e-10)


def test_float32() -> None:
    C, A, w = random_problem(3, 20, 15)
    result = barycenter(C.float(), A.float(), w.float(), reg=0.05, tol=1e-6).check()
    assert result.barycenter.dtype == torch.float32
    assert result.potentials[0].dtype == F64
    torch.testing.assert_close(
        result.barycenter.double(), barycenter(C, A, w, reg=0.05).barycenter, rtol=1e-4, atol=1e-6
    )


def test_same_bits_again() -> None:
    first, second = (barycenter(LINE, THREE, reg=1e-3) for _ in range(2))
    assert torch.equal(first.barycenter, second.barycenter)
    assert first.n_iter == second.n_iter


# --- how it runs ---


def test_relaxation_saves_iterations() -> None:
    C, A, w = random_problem(5, 60, 60)
    result = barycenter(C, A, w, reg=3e-3).check()
    p = by_plain_projections(C, A, w, 3e-3, result.n_iter)
    plain = by_plain_projections(C, A, w, 3e-3, 20 * result.n_iter)
    assert float((result.barycenter - plain).abs().sum()) < 0.1 * float((p - plain).abs().sum())


def test_history_and_report() -> None:
    result = barycenter(LINE, THREE, reg=1e-3).check()
    errors, seconds = result.history["marginal_error"], result.history["seconds"]
    assert len(errors) == len(seconds) == result.n_iter
    assert errors[-1] == result.marginal_error <= 1e-9
    assert bool((np.diff(seconds) >= 0).all())
    assert result.converged
    assert result.status == "converged"
    for word in ("converged", "3 histograms of 120 cells to 120 cells", "1e-03|0.001"):
        assert any(part in repr(result) for part in word.split("|"))
    assert "debiased" in repr(barycenter(LINE, THREE, reg=1e-3, debiased=True, tol=1e-2))


def test_plot() -> None:
    pytest.importorskip("matplotlib")
    ax = barycenter(LINE, THREE, reg=1e-2).plot()
    assert ax.get_ylabel() == "marginal error"
    assert ax.get_yscale() == "log"


def test_iteration_limit_and_warm_start() -> None:
    early = stopped_early(LINE, THREE, reg=1e-3, max_iter=10)
    assert not early.converged
    assert early.n_iter == 10
    assert "pass x0=result" in early.message
    with pytest.raises(ConvergenceError, match=r"^barycenter: max_iter: ") as caught:
        early.check()
    assert caught.value.result is early
    full = barycenter(LINE, THREE, reg=1e-3).check()
    again = barycenter(LINE, THREE, reg=1e-3, **full.state).check()
    assert again.n_iter <= 2
    smaller = barycenter(LINE, THREE, reg=5e-4, x0=full).check()
    torch.testing.assert_close(smaller.barycenter, barycenter(LINE, THREE, reg=5e-4).barycenter, rtol=0, atol=1e-8)


def test_warm_start_of_the_debiased_iteration() -> None:
    options: dict[str, Any] = {"reg": 1e-3, "debiased": True, "tol": 1e-4}
    full = barycenter(LINE, THREE, **options).check()
    assert barycenter(LINE, THREE, **options, x0=full).n_iter <= 0.2 * full.n_iter
    plain = barycenter(LINE, THREE, reg=1e-3, x0=full).check()
    torch.testing.assert_close(plain.barycenter, barycenter(LINE, THREE, reg=1e-3).barycenter, rtol=0, atol=1e-8)


def test_tolerance_below_rounding_stalls() -> None:
    result = stopped_early(LINE, THREE, reg=1e-2, tol=1e-17)
    assert result.status == "stalled"
    assert result.marginal_error < 1e-12
    assert "rounding" in result.message
    assert result.n_iter < 1000


def test_callback_stops() -> None:
    seen = []

    def callback(info: Any) -> bool:
        seen.append((info.iteration, info.reg, info.marginal_error))
        return info.iteration == 4

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = barycenter(LINE, THREE, reg=1e-3, callback=callback)
    assert result.status == "stopped"
    assert [entry[0] for entry in seen] == [1, 2, 3, 4]
    assert [entry[2] for entry in seen] == list(result.history["marginal_error"])
    assert seen[0][1] == 1e-3


def test_interrupt_is_raised() -> None:
    def callback(info: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        barycenter(LINE, THREE, reg=1e-3, callback=callback)


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    barycenter(LINE, THREE, reg=1e-2, progress=True)
    assert "barycenter" in capsys.readouterr().err


# --- invariants ---


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000), st.floats(0.05, 1))
@settings(deadline=None, max_examples=25)
def test_invariants(count: int, n: int, m: int, seed: int, reg: float) -> None:
    C, A, w = random_problem(count, n, m, seed)
    p = barycenter(C, A, w, reg=reg).check().barycenter
    close = {"rtol": 1e-5, "atol": 1e-8}
    assert bool((p >= 0).all())
    assert float(p.sum()) == pytest.approx(1, abs=1e-8)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(barycenter(C, A[order], w[order], reg=reg).barycenter, p, **close)
    torch.testing.assert_close(barycenter(C.flip(1), A, w, reg=reg).barycenter, p.flip(0), **close)
    torch.testing.assert_close(barycenter(C.flip(0), A.flip(1), w, reg=reg).barycenter, p, **close)
    torch.testing.assert_close(barycenter(3 * C + 2, A, w, reg=3 * reg).barycenter, p, **close)
    doubled = torch.cat([A, A]), torch.cat([w, w]) / 2
    torch.testing.assert_close(barycenter(C, *doubled, reg=reg).barycenter, p, **close)


# --- messages ---


def test_messages() -> None:
    C, A, w = random_problem(3, 5, 4)

    def raises(error: type[Exception], match: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(error, match="^barycenter: " + match):
            barycenter(*arguments, **{"reg": 0.1, **options})

    raises(TypeError, r"C: expected a torch\.Tensor, got ndarray", C.numpy(), A)
    raises(TypeError, r"A: expected a torch\.Tensor, got NoneType", C, None)
    raises(TypeError, r"A: expected dtype float32 or float64, got int64", C, A.long())
    raises(TypeError, r"C is float64, A is float32", C, A.float())
    raises(TypeError, r"C is float64, weights is float32", C, A, w.float())
    raises(ValueError, r"C: expected shape \(n, m\) with n, m >= 1, got \(1, 5, 4\)", C[None], A)
    raises(ValueError, r"C: expected shape \(n, m\) with n, m >= 1, got \(5, 0\)", C[:, :0], A)
    raises(ValueError, r"A: expected histograms in rows, shape \(K, 5\) with K >= 1, got \(5, 3\)", C, A.T)
    raises(ValueError, r"A: expected histograms in rows, .*got \(0, 5\)", C, A[:0])
    raises(ValueError, r"A: expected histograms in rows, .*got \(5,\)", C, A[0])
    raises(ValueError, r"weights: expected shape \(3,\), got \(2,\)", C, A, w[:2])
    raises(ValueError, r"C: expected finite values, got inf", C.index_fill(0, torch.tensor(1), math.inf), A)
    raises(ValueError, r"A: expected finite values, got nan at \(0, 0\)", C, A * math.nan)
    raises(ValueError, r"A: expected numbers >= 0, got -", C, -A)
    raises(ValueError, r"A: expected numbers of sum 1, got 0\.999 in row 0; normalise them", C, 0.999 * A)
    raises(ValueError, r"weights: expected numbers of sum 1, got 2; normalise them", C, A, 2 * w)
    raises(ValueError, r"weights: expected numbers >= 0, got -0\.\d+ at 0", C, A, -w)
    raises(ValueError, r"C: expected a square matrix with debiased=True, got shape \(5, 4\)", C, A, debiased=True)
    raises(ValueError, r"C: expected a symmetric matrix .*\(C \+ C\.T\) / 2", LINE.triu(), THREE, debiased=True)
    for reg in (0, -1.0, math.nan, math.inf, "1"):
        raises(ValueError, r"reg: expected a finite number > 0, got", C, A, reg=reg)
    for tol in (0, math.inf, None):
        raises(ValueError, r"tol: expected a finite number > 0, got", C, A, tol=tol)
    for max_iter in (0, 1.5, True):
        raises(ValueError, r"max_iter: expected an integer >= 1, got", C, A, max_iter=max_iter)
    raises(TypeError, r"x0: expected a BarycenterResult, got Tensor", C, A, x0=A)
    other = barycenter(C, A[:2], reg=1.0)
    raises(ValueError, r"x0: expected the result for 3 histograms, 5 to 4 cells, got one", C, A, x0=other)
