"""What the map, the callback and the user may do to a solve by dcdm, and what becomes of it."""

from __future__ import annotations

import logging
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from devices import home
from flexible_reference import ends, noise, quietly
from kantor.linalg import CSR, Dense, Diagonal, FlexibleResult, PoissonGrid, SolveStatus, Stencil, dcdm, jacobi
from systems import F32, F64, csr_of, error, random, spd


def system() -> tuple[Stencil, Tensor]:
    return Stencil((9, 9)), random(81)


# --- what the map gets and returns ---


@pytest.mark.parametrize("shape", [(81,), (9, 9), (2, 81), (2, 3, 9, 9)])
def test_the_map_sees_unit_residuals_shaped_like_b(shape: tuple[int, ...], device: str) -> None:
    A = Stencil((9, 9), device=home(device))
    b = random(*shape, device=home(device))
    calls = 0

    def f(r: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        assert r.shape == b.shape
        assert r.dtype is b.dtype
        assert r.device == b.device
        assert not r.requires_grad
        assert not torch.is_grad_enabled()
        norms = r.reshape(-1, 81).norm(dim=-1)
        torch.testing.assert_close(norms, torch.ones_like(norms))
        return r

    result = dcdm(A, b, f)
    assert result.converged
    assert result.x.shape == b.shape
    assert calls == result.iterations  # once each


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F32, F64])
@pytest.mark.parametrize("of_b", [F32, F64])
def test_the_map_may_work_in_any_precision(dtype: torch.dtype, of_b: torch.dtype, device: str) -> None:
    A = Stencil((9, 9), dtype=of_b, device=home(device))
    b = random(81, dtype=of_b, device=home(device))
    result = dcdm(A, b, lambda r: r.to(dtype), rtol=1e-5)
    assert result.converged
    assert result.fallbacks == 0
    assert result.x.dtype is of_b


def test_the_map_may_be_a_module_with_parameters() -> None:
    A, b = system()
    layer = torch.nn.Conv2d(1, 1, 3, padding=1, bias=False, dtype=F64)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(3, dtype=F64)[1] * torch.eye(3, dtype=F64)[:, 1:2] + 0.1)
    module = torch.nn.Sequential(torch.nn.Unflatten(0, (1, 1, 9, 9)), layer, torch.nn.Flatten(0))
    module[0] = torch.nn.Unflatten(0, (1, 9, 9))
    result = dcdm(A, b, module)
    assert result.converged
    assert not result.x.requires_grad


def test_the_map_may_overwrite_its_argument(device: str) -> None:
    A = Stencil((9, 9), device=home(device))
    b = random(81, device=home(device))
    expected = dcdm(A, b, lambda r: r.sign())

    def in_place(r: Tensor) -> Tensor:
        q = r.sign()
        r.fill_(torch.nan)
        return q

    assert torch.equal(dcdm(A, b, in_place).x, expected.x)
    assert torch.equal(dcdm(A, b, lambda r: r.sign_()).x, expected.x)
    spoils: Any = lambda r: r.mul_(0.5)  # noqa: E731
    with torch.no_grad():
        assert dcdm(A, b, lambda r: r * torch.nan, fallback=spoils, rtol=1e-9).converged


def test_the_map_may_return_the_same_memory_each_time() -> None:
    A, b = system()
    out = torch.empty(81, dtype=F64)
    assert torch.equal(dcdm(A, b, lambda r: torch.sign(r, out=out)).x, dcdm(A, b, torch.sign).x)
    assert dcdm(A, b, lambda r: torch._neg_view(r)).converged
    assert dcdm(A, b, lambda r: torch.ones(1, dtype=F64).expand(81) + 0 * r + r).converged
    assert dcdm(A.matvec, b, torch.sign).converged  # products as well
    product = torch.empty(81, dtype=F64)
    with torch.no_grad():
        x = dcdm(lambda v: product.copy_(A.matvec(v)), b, torch.sign).x
    assert error(x, dcdm(A, b, torch.sign).x) < 1e-12


@pytest.mark.parametrize(
    ("f", "exception", "message"),
    [
        (lambda r: r[:-1], ValueError, r"dcdm: f: expected it to return shape \(81,\), like b, got \(80,\)"),
        (lambda r: r.view(9, 9), ValueError, r"got \(9, 9\)"),
        (lambda r: r.sum(), ValueError, r"got \(\)"),
        (lambda r: r.tolist(), TypeError, "dcdm: f: expected it to return a tensor, got list"),
        (lambda r: None, TypeError, "got NoneType"),
        (lambda r: r.long(), TypeError, "floating-point numbers, got torch.int64"),
        (lambda r: r + 1j, TypeError, "got torch.complex128"),
        (lambda r: r.to("meta"), ValueError, "a tensor on cpu, got one on meta"),
    ],
)
def test_what_a_map_may_not_return(f: Any, exception: type[Exception], message: str) -> None:
    A, b = system()
    with pytest.raises(exception, match=message):
        dcdm(A, b, f)
    with pytest.raises(exception, match=message.replace("dcdm: f", "dcdm: fallback")):
        dcdm(A, b, lambda r: r * torch.nan, fallback=f)


@pytest.mark.parametrize("where", ["map", "fallback", "operator", "callback"])
def test_exceptions_pass_through(where: str, device: str) -> None:
    A = Stencil((9, 9), device=home(device))
    b = random(81, device=home(device))
    calls = 0

    def failing(value: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ZeroDivisionError("on purpose")
        return value

    options: dict[str, Any] = {
        "map": {"f": failing},
        "fallback": {"f": lambda r: r * torch.nan, "fallback": failing},
        "operator": {"A": lambda x: A.matvec(failing(x)), "f": torch.sign},
        "callback": {"f": torch.sign, "callback": failing},
    }[where]
    with torch.no_grad(), pytest.raises(ZeroDivisionError, match="on purpose"):
        dcdm(**{"A": A, "b": b, **options})
    assert calls == 3
    assert dcdm(A, b, torch.sign).converged


# --- maps of no use ---


@pytest.mark.parametrize(
    ("f", "why"),
    [
        (lambda r: r * torch.nan, "NaN or infinity"),
        (lambda r: r * 1e200, "NaN or infinity"),
        (lambda r: torch.where(r == r.max(), torch.inf, r), "NaN or infinity"),
        (lambda r: 0 * r, "zero"),
        (torch.ones_like, "a combination of the directions before it"),
        (lambda r: torch.stack([-r[1], r[0]] + [0 * r[0]] * 79), "orthogonal to the residual"),
        (noise(), "gained next to nothing"),
    ],
    ids=["nan", "overflow", "one infinity", "zero", "constant", "orthogonal", "noise"],
)
def test_a_map_of_no_use_is_given_up(f: Any, why: str, device: str, caplog: pytest.LogCaptureFixture) -> None:
    A = Stencil((9, 9), device=home(device))
    b = random(81, device=home(device))
    with caplog.at_level(logging.WARNING, logger="kantor"):
        result = dcdm(A, b, lambda r: f(r.cpu()).to(r.device), rtol=1e-9, maxiter=1000)
    assert result.converged
    assert result.breakdown
    assert result.fallbacks >= 5
    assert why in result.reason
    assert "f was given up after iteration" in result.reason
    assert [record.getMessage() for record in caplog.records] == [f"dcdm: {result.reason}"]
    assert result.reason in repr(result)
    if why in ("NaN or infinity", "zero"):  # nothing is lost but the history of five iterations
        plain = dcdm(A, b, jacobi(A), rtol=1e-9)
        assert result.iterations <= plain.iterations + 12


def test_a_map_that_gets_nowhere_is_given_up() -> None:
    """Coordinate descent: no single step is bad, a hundred of them are."""
    A, b = spd(60, condition=1e3), random(60, seed=8)
    result = dcdm(A, b, lambda r: r * (r.abs() == r.abs().max()), maxiter=1000)
    assert result.converged
    assert result.breakdown
    assert result.fallbacks == 1
    assert "f was given up after iteration 100, because the residual did not halve in 100 iterations" in result.reason
    ends("maxiter", lambda: dcdm(A, b, lambda r: r * (r.abs() == r.abs().max()), maxiter=90))


def test_a_map_that_fails_now_and_then_stays(caplog: pytest.LogCaptureFixture) -> None:
    A, b = Stencil((30, 30)), random(900)
    calls = 0

    def f(r: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return r if calls % 7 else r * torch.nan

    result = dcdm(A, b, f, maxiter=2000)  # each time the history is lost
    assert result.converged
    assert not result.breakdown
    assert result.fallbacks == calls // 7
    assert "replaced" in result.reason
    assert not caplog.records


@pytest.mark.parametrize("fallback", [None, "jacobi", "ic0"])
def test_the_fallback_makes_the_directions_then(fallback: Any) -> None:
    """With NaN only, after five steps along it, conjugate gradients with the fallback: known iterates."""
    A = csr_of(spd(40, condition=1e3) + torch.diag(torch.linspace(0, 50, 40, dtype=F64)))
    b = random(40)
    counts = {}
    for name in (None, "jacobi", "ic0"):
        counts[name] = dcdm(A, b, lambda r: r * torch.nan, fallback=name, rtol=1e-10).iterations
    assert counts[None] == counts["jacobi"]
    assert counts["ic0"] < counts["jacobi"]
    assert dcdm(A.matvec, b, lambda r: r * torch.nan, rtol=1e-10, maxiter=400).iterations > counts["jacobi"]


# --- callbacks, progress, Ctrl-C ---


def test_callback_sees_every_iteration_and_stops(device: str) -> None:
    A = Stencil((9, 9), device=home(device))
    b = random(81, device=home(device))
    seen: list[Any] = []
    result = dcdm(A, b, torch.sign, callback=seen.append)
    assert [info.iteration for info in seen] == list(range(1, result.iterations + 1))
    assert [info.residual_norm for info in seen[:9]] == result.history.residual_norms[1:10].tolist()
    stopped = dcdm(A, b, torch.sign, callback=lambda info: info.iteration == 4)
    assert stopped.status is SolveStatus.STOPPED
    assert stopped.iterations == 4
    true = float((b - A.matvec(stopped.x)).norm())
    assert stopped.residual_norm == pytest.approx(true, rel=1e-9)
    assert torch.equal(stopped.x, ends("maxiter", lambda: dcdm(A, b, torch.sign, maxiter=4)).x)
    seen.clear()
    failing = dcdm(A, b, lambda r: r * torch.nan, callback=seen.append)  # rounds without a step are not told
    assert [info.iteration for info in seen] == list(range(1, failing.iterations + 1))


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    A, b = system()
    dcdm(A, b, torch.sign, progress=True)
    assert "dcdm: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["map", "fallback", "operator", "callback", "true residual"])
def test_interrupt(where: str, device: str) -> None:
    A = Stencil((9, 9), device=home(device))
    b = random(81, device=home(device))

    def options() -> dict[str, Any]:
        calls = 0

        def interrupted(value: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 6:
                raise KeyboardInterrupt
            return value

        return {
            "map": {"f": interrupted},
            "fallback": {"f": lambda r: r * torch.nan, "fallback": interrupted},
            "operator": {"A": lambda x: A.matvec(interrupted(x)), "f": torch.sign},
            "callback": {"f": torch.sign, "callback": lambda info: bool(interrupted(None))},
            "true residual": {"A": lambda x: A.matvec(interrupted(x)), "f": torch.sign, "true_residual_every": 5},
        }[where]

    with torch.no_grad():
        with pytest.raises(KeyboardInterrupt):
            dcdm(**{"A": A, "b": b, **options()})
        result = ends("interrupted", lambda: dcdm(**{"A": A, "b": b, "interrupt": "return", **options()}))
    assert 4 <= result.iterations <= 6
    true = float((b - A.matvec(result.x)).norm())
    assert result.residual_norm == pytest.approx(true, rel=1e-9)


def test_solves_in_several_threads_and_inside_each_other() -> None:
    A, rows = Stencil((30, 30)), random(3, 900)
    results: dict[int, FlexibleResult] = {}

    def inner(r: Tensor) -> Tensor:
        return dcdm(A, r, torch.sign, callback=lambda info: info.iteration == 3).x

    def work(k: int) -> None:
        results[k] = dcdm(A, rows[k], inner)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for k in range(3):
        assert torch.equal(results[k].x, dcdm(A, rows[k], inner).x)


# --- arguments ---


def bad_arguments() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    b = random(81)
    A = Stencil((9, 9))
    nan = b.clone()
    nan[3] = torch.nan
    return {
        "integers": (
            {"b": torch.ones(81, dtype=torch.int64)},
            TypeError,
            r"dcdm: b: expected dtype float32 or float64",
        ),
        "half": ({"b": b.half()}, TypeError, "expected dtype float32 or float64, got float16"),
        "list": ({"b": b.tolist()}, TypeError, "b: expected a torch.Tensor, got list"),
        "nan": ({"b": nan}, ValueError, r"dcdm: b: expected finite values, got nan at 3"),
        "nan start": ({"x0": nan}, ValueError, "dcdm: x0: expected finite values"),
        "shape": (
            {"b": b[:-1]},
            ValueError,
            r"dcdm: b: expected shape \(\.\.\., 81\) or \(\.\.\., 9, 9\), got \(80,\)",
        ),
        "columns": ({"b": random(81, 2)}, ValueError, "pass b.T"),
        "start": ({"x0": b[None]}, ValueError, "x0: expected the shape of b"),
        "mixed": ({"b": b.float()}, TypeError, "A is float64, b is float32"),
        "mixed start": ({"x0": b.float()}, TypeError, "b is float64, x0 is float32"),
        "device": ({"b": torch.empty(81, dtype=F64, device="meta")}, ValueError, "A is on cpu, b on meta"),
        "rtol": ({"rtol": -1e-3}, ValueError, "rtol: expected a finite number >= 0, got -0.001"),
        "rtol nan": ({"rtol": float("nan")}, ValueError, "rtol"),
        "atol": ({"atol": float("inf")}, ValueError, "atol"),
        "maxiter": ({"maxiter": -1}, ValueError, "maxiter: expected an integer >= 0, got -1"),
        "maxiter float": ({"maxiter": 2.5}, ValueError, "maxiter"),
        "maxiter none": ({"maxiter": None}, ValueError, "maxiter"),
        "k_prev": ({"k_prev": -1}, ValueError, "k_prev: expected an integer >= 0"),
        "every": ({"true_residual_every": -2}, ValueError, "true_residual_every"),
        "interrupt": ({"interrupt": "ignore"}, ValueError, "interrupt: expected 'raise' or 'return'"),
        "map": ({"f": None}, TypeError, "dcdm: f: expected a function of a residual or an operator, got NoneType"),
        "map tensor": ({"f": b}, TypeError, "f: expected a function"),
        "map shape": ({"f": Diagonal(torch.ones(5, dtype=F64))}, ValueError, r"dcdm: f: expected shape \(81, 81\)"),
        "map dtype": ({"f": Diagonal(torch.ones(81))}, TypeError, "dcdm: f is .*float32.*convert"),
        "fallback": ({"fallback": "ilu"}, ValueError, "dcdm: fallback: expected 'jacobi', 'ic0'"),
        "fallback type": ({"fallback": 3}, TypeError, "dcdm: fallback"),
        "fallback of a callable": ({"A": A.matvec, "fallback": "jacobi"}, TypeError, "diagonal"),
        "rectangular": ({"A": torch.ones(3, 4, dtype=F64)}, ValueError, "square"),
        "operator": ({"A": "laplace"}, TypeError, "as_operator"),
    }


@pytest.mark.parametrize("name", list(bad_arguments()))
def test_bad_arguments(name: str) -> None:
    changes, exception, message = bad_arguments()[name]
    options = {"A": Stencil((9, 9)), "b": random(81), "f": torch.sign, **changes}
    with torch.no_grad(), pytest.raises(exception, match=message):
        dcdm(**options)


@pytest.mark.parametrize("form", ["csr", "dense", "sum"])
def test_a_matrix_that_is_not_symmetric(form: str) -> None:
    matrix = spd(30)
    matrix[2, 7] += 0.5
    b = random(30)
    A = {"csr": csr_of(matrix), "dense": Dense(matrix), "sum": Dense(matrix) + Diagonal(torch.ones(30, dtype=F64))}[
        form
    ]
    with pytest.raises(ValueError, match=r"dcdm: A is not symmetric: .*Symmetrise it as \(A \+ A.T\) / 2"):
        dcdm(A, b, torch.sign)
    assert str(quietly(lambda: dcdm(A, b, torch.sign, assume_symmetric=True, maxiter=5)).status) == "maxiter"


def test_a_function_that_is_not_symmetric_is_told_when_it_fails() -> None:
    matrix = spd(30)
    matrix[2, 7] += 5
    with torch.no_grad(), pytest.raises(ValueError, match="not symmetric"):
        dcdm(lambda x: x @ matrix.T, random(30), torch.sign, maxiter=5)


def test_the_probe_lets_symmetric_matrices_pass() -> None:
    for dtype in (F32, F64):
        for condition in (1.0, 1e6):
            A = spd(100, condition=condition).to(dtype)
            quietly(lambda A=A, dtype=dtype: dcdm(A, random(100, dtype=dtype), torch.sign, maxiter=2))  # type: ignore[misc]
    scaled = torch.diag(10.0 ** torch.linspace(-8, 8, 50, dtype=F64)).sqrt()
    quietly(lambda: dcdm(csr_of(scaled @ spd(50) @ scaled), random(50), torch.sign, maxiter=2))


def test_traced_code_is_told_what_to_do() -> None:
    A, b = system()
    with pytest.raises(TypeError, match="use cg there"):
        torch.vmap(lambda v: dcdm(A, v, torch.sign).x)(b[None])
    with pytest.raises(TypeError, match="use cg there"):
        torch.func.grad(lambda v: dcdm(A, v, torch.sign).x.sum())(b)


# --- results ---


def test_results_print_and_pickle() -> None:
    A, b = system()
    good, bad = dcdm(A, b, torch.sign), dcdm(A, b, lambda r: r * torch.nan)
    assert "fallback" not in repr(good)
    assert "5 fallbacks: f was given up" in repr(bad)
    assert repr(bad).startswith("dcdm on float64")
    assert good.check() is good
    for result in (good, bad):
        again = pickle.loads(pickle.dumps(result))
        assert repr(again) == repr(result)
        assert torch.equal(again.x, result.x)


@pytest.mark.parametrize(
    "A", [spd(81), csr_of(spd(81)), spd(81).to_sparse(), spd(81).numpy(), PoissonGrid(torch.full((9, 9), 2))], ids=str
)
def test_operators_of_all_kinds(A: Any) -> None:
    import scipy.sparse

    if not isinstance(A, Tensor | CSR | PoissonGrid):
        A = scipy.sparse.csr_array(A)
    b = random(81)
    result = dcdm(A, b - b.mean(), lambda r: r, maxiter=500)
    assert result.converged
