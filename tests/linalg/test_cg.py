"""Conjugate gradients against direct solves and against scipy's; batches, threads, warm starts, stopping."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from devices import home
from kantor.linalg import CSR, Dense, Diagonal, LinearOperator, SolveStatus, Stencil, cg
from op_checks import same_bits, threads
from systems import F32, F64, KINDS, csr_of, error, example_operators, expect, random, random_faces, solve, spd

DTYPES = (F64, F32)


# --- the solution ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_solution(kind: str, dtype: torch.dtype, device: str) -> None:
    """|x - A^-1 b| within condition times tolerance, and the residual that is reported is the true one."""
    operator = example_operators(dtype, home(device))[kind]
    matrix = operator.dense().double().cpu()
    condition = float(torch.linalg.cond(matrix))
    b = random(20, dtype=dtype, device=home(device))
    rtol = 1e-12 if dtype is F64 else 1e-5
    result = solve(operator, b, rtol=rtol)
    assert result.x.shape == b.shape
    assert result.x.dtype is dtype
    assert error(result.x, torch.linalg.solve(matrix, b.double().cpu())) <= 2 * condition * rtol
    true = b.double().cpu() - matrix @ result.x.double().cpu()
    rounding = 64 * torch.finfo(F64 if dtype is F64 else F32).eps * matrix.norm() * result.x.double().norm().cpu()
    assert abs(result.residual_norm - float(true.norm())) <= rounding
    assert result.relative_residual == pytest.approx(result.residual_norm / float(b.double().norm()), rel=1e-6)
    assert result.relative_residual <= rtol
    assert result.tolerance == pytest.approx(rtol * float(b.double().norm()), rel=1e-6)
    assert (result.status, result.method) == (SolveStatus.CONVERGED, "cg")
    assert (result.direction, result.curvature) == (None, None)
    assert result.check() is result


@pytest.mark.parametrize(
    "form", ["numpy", "torch csr", "torch coo", "scipy csr", "scipy operator", "callable", "dense"]
)
def test_forms_of_the_matrix(form: str) -> None:
    matrix = spd(12)
    b = random(12)
    forms: dict[str, Callable[[], Any]] = {
        "torch csr": matrix.to_sparse_csr,
        "torch coo": matrix.to_sparse,
        "scipy csr": lambda: csr_of(matrix).to_scipy(),
        "scipy operator": lambda: Dense(matrix).to_scipy(),
        "callable": lambda: lambda x: x @ matrix,
        "dense": lambda: matrix,
    }
    if form == "numpy":
        with pytest.raises(TypeError, match="as_operator: A: expected a tensor, .*got ndarray"):
            cg(matrix.numpy(), b)
        return
    if form.startswith("scipy"):
        pytest.importorskip("scipy")
    result = solve(forms[form](), b, rtol=1e-12)
    assert error(result.x, torch.linalg.solve(matrix, b)) < 1e-9


@pytest.mark.parametrize("n", [1, 2, 3])
def test_ends_after_as_many_iterations_as_eigenvalues(n: int, device: str) -> None:
    d = torch.arange(1, n + 1, dtype=F64, device=home(device)).repeat(5)
    result = solve(Diagonal(d), torch.ones(5 * n, dtype=F64, device=home(device)), rtol=1e-13)
    assert result.iterations == n
    torch.testing.assert_close(result.x, 1 / d, rtol=1e-12, atol=0)


def test_error_in_the_energy_norm_never_grows() -> None:
    A = spd(60, condition=1e4)
    b = random(60)
    exact = torch.linalg.solve(A, b)
    energies = []
    for k in range(1, 60, 3):
        x = expect("maxiter", lambda k=k: cg(A, b, maxiter=k, rtol=0)).x
        energies.append(float((x - exact) @ A @ (x - exact)))
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(energies))


# --- scipy, iterate by iterate ---


def problems() -> dict[str, tuple[Any, Any]]:
    """Name: our operator, scipy's matrix."""
    stencils = {
        "poisson 2-D": Stencil((30, 31)),
        "poisson 3-D": Stencil((12, 13, 14)),
        "anisotropic": Stencil((8, 9, 10), weights=(1.0, 3.0, 0.3), shift=0.1),
        "neumann with shift": Stencil((20, 21), boundary="neumann", shift=0.05),
        "faces": Stencil.from_faces(random_faces((17, 18)), 0.1),
    }
    cases: dict[str, tuple[Any, Any]] = {name: (A, A.to_csr().to_scipy()) for name, A in stencils.items()}
    cases["dense"] = (Dense(spd(100, 50.0)), spd(100, 50.0).numpy())
    return cases


def gallery() -> dict[str, tuple[Any, Any]]:
    """Real matrices that pyamg ships: finite elements of aerofoils, bars and cubes."""
    amg = pytest.importorskip("pyamg.gallery")
    names = ("airfoil", "bar", "knot", "unit_cube", "local_disc_galerkin_diffusion")
    matrices = {name: amg.load_example(name)["A"].tocsr() for name in names}
    return {name: (CSR.from_any(A), A) for name, A in matrices.items()}


def scipy_iterates(A: Any, b: np.ndarray[Any, Any], count: int, M: Any = None) -> list[np.ndarray[Any, Any]]:
    sla = pytest.importorskip("scipy.sparse.linalg")
    iterates: list[np.ndarray[Any, Any]] = []
    sla.cg(A, b, rtol=0, atol=0, maxiter=count, M=M, callback=lambda x: iterates.append(x.copy()))
    return iterates


def exact_iterates(A: Any, b: np.ndarray[Any, Any], count: int) -> list[np.ndarray[Any, Any]]:
    """The textbook's conjugate gradients in 80-bit arithmetic."""
    A = pytest.importorskip("scipy.sparse").csr_array(A).astype(np.longdouble)
    x, r = np.zeros(len(b), np.longdouble), b.astype(np.longdouble)
    p, rr = r, r @ r
    iterates = []
    for _ in range(count):
        q = A @ p
        alpha = rr / (p @ q)
        x, r = x + alpha * p, r - alpha * q
        rr, previous = r @ r, rr
        p = r + rr / previous * p
        iterates.append(x.astype(np.float64))
    return iterates


def our_iterates(A: Any, b: Tensor, count: int, **options: Any) -> list[Tensor]:
    results = [expect("maxiter", lambda k=k: cg(A, b, maxiter=k, rtol=0, **options)) for k in range(1, count + 1)]
    assert [result.iterations for result in results] == list(range(1, count + 1))
    return [result.x for result in results]


@pytest.mark.parametrize("name", ["poisson 2-D", "poisson 3-D", "anisotropic", "neumann with shift"])
def test_iterates_are_those_of_scipy(name: str, device: str) -> None:
    """50 iterations, each to 1e-10 relative."""
    A, matrix = problems()[name]
    b = random(A.shape[0])
    count = 50 if device == "cpu" else 12
    theirs = scipy_iterates(matrix, b.numpy(), count)
    for k, (x, expected) in enumerate(zip(our_iterates(A, b, count), theirs, strict=True), 1):
        assert error(x, torch.from_numpy(expected)) < 1e-10, f"iteration {k}"


@pytest.mark.parametrize("name", ["faces", "dense", "airfoil", "bar", "knot", "unit_cube"])
def test_iterates_where_rounding_is_amplified(name: str) -> None:
    """Where conjugacy is lost no two implementations agree; ours is as close to exact arithmetic as scipy's.

    How close scipy comes is a matter of luck: its errors differ a hundredfold between orderings of the unknowns.
    """
    A, matrix = problems()[name] if name in problems() else gallery()[name]
    b = random(A.shape[0]).numpy()
    matrix = pytest.importorskip("scipy.sparse").csr_array(matrix)
    orders = [np.random.default_rng(seed).permutation(len(b)) for seed in range(6)]
    theirs = [[x[np.argsort(order)] for x in scipy_iterates(matrix[order][:, order], b[order], 50)] for order in orders]
    for k, (x, exact, *others) in enumerate(
        zip(our_iterates(A, torch.from_numpy(b), 50), exact_iterates(matrix, b, 50), *theirs, strict=True), 1
    ):
        expected = torch.from_numpy(exact)
        luck = max(error(torch.from_numpy(other), expected) for other in others)
        assert error(x, expected) <= max(1e-10, 4 * luck), f"iteration {k}"


@pytest.mark.parametrize("preconditioner", ["jacobi", "callable"])
def test_preconditioned_iterates_are_those_of_scipy(preconditioner: str) -> None:
    pytest.importorskip("scipy")
    from scipy.sparse import diags_array

    A = Stencil.from_faces([face * 10 ** random(*face.shape, seed=5) for face in random_faces((17, 18))], 0.1)
    b = random(A.shape[0])
    inverse = 1 / A.diagonal()
    M = "jacobi" if preconditioner == "jacobi" else lambda r: inverse * r
    iterates = scipy_iterates(A.to_csr().to_scipy(), b.numpy(), 50, diags_array(inverse.numpy()))
    for k, (x, expected) in enumerate(zip(our_iterates(A, b, 50, M=M), iterates, strict=True), 1):
        assert error(x, torch.from_numpy(expected)) < 1e-10, f"iteration {k}"


@pytest.mark.parametrize("rtol", [1e-3, 1e-8])
@pytest.mark.parametrize("name", [*problems(), "airfoil", "bar", "knot", "unit_cube", "local_disc_galerkin_diffusion"])
def test_as_many_iterations_as_scipy(name: str, rtol: float) -> None:
    sla = pytest.importorskip("scipy.sparse.linalg")
    A, matrix = problems()[name] if name in problems() else gallery()[name]
    b = random(A.shape[0])
    norms: list[float] = []
    sla.cg(matrix, b.numpy(), rtol=rtol, atol=0, callback=lambda x: norms.append(0.0))
    result = solve(A, b, rtol=rtol)
    assert abs(result.iterations - len(norms)) <= 1
    x = result.x.numpy()
    assert np.linalg.norm(b.numpy() - matrix @ x) <= rtol * float(b.norm()) * (1 + 1e-6)


# --- bits ---


def large_operators(dtype: torch.dtype) -> dict[str, LinearOperator]:
    """Above the threshold of 32768 elements below which one thread does it all."""
    grid = (31, 33, 34)
    stencil = Stencil(
        grid, weights=(1.0, 2.0, 0.5), boundary=("neumann", "dirichlet", "neumann"), shift=0.5, dtype=dtype
    )
    faces = Stencil.from_faces([face.to(dtype) for face in random_faces(grid)], 0.5)
    return {
        "stencil": stencil,
        "faces": faces,
        "csr": stencil.to_csr(),
        "sum": stencil + 2.0 * faces + Diagonal(random(stencil.shape[0], dtype=dtype).abs()),
        "dense": Dense(spd(300).to(dtype)),
        "long rows": csr_of(spd(300).to(dtype)),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [None, "jacobi", "ic0", "operator", "callable"])
@pytest.mark.parametrize("kind", list(large_operators(F64)))
def test_threads_change_no_bit(kind: str, M: Any, dtype: torch.dtype) -> None:
    A = large_operators(dtype)[kind]
    b = random(A.shape[0], dtype=dtype)
    if M == "operator":
        M = 0.1 * Diagonal(1 / A.diagonal()) + 0.9 * Diagonal(1 / A.diagonal())
    elif M == "callable":
        inverse = 1 / A.diagonal()
        M = lambda r: inverse * r  # noqa: E731
    results = []
    for count in (1, 2, 3):
        with threads(count), pytest.warns(RuntimeWarning, match="cg: "):
            result = cg(A, b, M=M, maxiter=12, rtol=0)
        # The incomplete factor of a full matrix is exact: then the residual vanishes before the limit.
        assert str(result.status) == ("stagnated" if result.iterations < 12 else "maxiter")
        results.append((result.x, torch.tensor(result.history.residual_norms), torch.tensor(result.residual_norm)))
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [None, "jacobi", "ic0"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("callable", "mixed")])
def test_a_batch_is_the_loop_to_the_last_bit(kind: str, M: str | None, dtype: torch.dtype, device: str) -> None:
    """Systems of a batch stop one by one, and none notices the others."""
    A = example_operators(dtype, home(device))[kind]
    b = random(6, 20, dtype=dtype, device=home(device)) * 10.0 ** torch.arange(-3, 3, device=home(device))[:, None].to(
        dtype
    )
    b[2] = A.matvec(torch.ones(20, dtype=dtype, device=home(device)))
    b[4] = 0
    options: dict[str, Any] = {"rtol": 1e-9 if dtype is F64 else 1e-4, "M": M}
    together = solve(A, b, **options)
    alone = [solve(A, row, **options) for row in b]
    assert same_bits([together.x], [torch.stack([result.x for result in alone])])
    assert together.per_system_iterations.tolist() == [result.iterations for result in alone]
    assert together.per_system_residual_norm.tolist() == [result.residual_norm for result in alone]
    assert together.iterations == max(result.iterations for result in alone)
    assert together.residual_norm == max(result.residual_norm for result in alone)
    assert len(set(together.per_system_iterations.tolist())) > 1


def test_large_batches(device: str) -> None:
    """More systems than threads, than blocks, and than rows; batch shapes of any rank."""
    A = Stencil((3, 3), shift=0.1, device=home(device))
    b = random(2, 3, 67, 9, device=home(device))
    result = solve(A, b, rtol=1e-12)
    expected = torch.linalg.solve(A.dense(), b.reshape(-1, 9).T).T.reshape(b.shape)
    assert error(result.x, expected) < 1e-11
    assert len(result.per_system_status) == 402


def test_repeated_solves_are_identical(device: str) -> None:
    A = example_operators(device=home(device))["sum"]
    b = random(20, device=home(device))
    assert torch.equal(solve(A, b, rtol=1e-10).x, solve(A, b, rtol=1e-10).x)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_stay_as_they_are(kind: str) -> None:
    A = example_operators()[kind]
    b, x0 = random(2, 20), random(2, 20, seed=1)
    copies = b.clone(), x0.clone()
    solve(A, b, x0, rtol=1e-10)
    assert same_bits([b, x0], copies)


# --- shapes ---


def test_grid_shapes() -> None:
    A = Stencil((4, 5, 6))
    b = random(2, 4, 5, 6)
    result = solve(A, b, random(2, 4, 5, 6, seed=1), rtol=1e-11)
    assert result.x.shape == b.shape
    flat = solve(A, b.reshape(2, 120), rtol=1e-11)
    assert flat.x.shape == (2, 120)
    assert error(result.x, flat.x) < 1e-9
    assert solve(2.0 * A + Diagonal(torch.ones(120, dtype=F64)), b[0], rtol=1e-6).x.shape == (4, 5, 6)


def test_layouts_of_b() -> None:
    """Strided, expanded, transposed and lazily negated right-hand sides; x0 as well."""
    A = Stencil((4, 5))
    b = random(3, 20)
    expected = solve(A, b, rtol=1e-10).x
    buffer = torch.zeros(3, 40, dtype=F64)
    buffer[:, ::2] = b
    for view in (buffer[:, ::2], b.T.contiguous().T, torch._neg_view(-b)):
        assert torch.equal(solve(A, view, rtol=1e-10).x, expected)
        solve(A, b, view, rtol=1e-10)
    expanded = solve(A, b[:1].expand(3, 20), rtol=1e-10).x
    assert torch.equal(expanded, expected[:1].expand(3, 20))
    single = torch.ones(1, dtype=F64).expand(20)
    assert error(solve(A, single, single, rtol=1e-10).x, torch.linalg.solve(A.dense(), single)) < 1e-9


@pytest.mark.parametrize("storage", [None, F32])
@pytest.mark.parametrize("M", [None, "jacobi", "ic0", lambda r: r])
def test_nothing_to_solve(M: Any, storage: Any, device: str) -> None:
    d = home(device)
    A = Stencil((3, 4), device=d)
    for batch in ((0,), (2, 0), (0, 3)):
        b = torch.zeros(*batch, 12, dtype=F64, device=d)
        for x0 in (None, b):
            result = solve(A, b, x0, M=M, storage=storage)
            assert result.x.shape == b.shape
            assert (result.iterations, result.residual_norm, result.per_system_status) == (0, 0.0, [])
    for shape in ((0,), (3, 0)):
        for nothing in (Dense(torch.zeros(0, 0, dtype=F64, device=d)), Diagonal(torch.zeros(0, dtype=F64, device=d))):
            result = solve(nothing, torch.zeros(shape, dtype=F64, device=d), M=M, storage=storage)
            assert result.x.shape == shape
            assert "converged" in repr(result)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_unknown(dtype: torch.dtype, device: str) -> None:
    options = {"dtype": dtype, "device": home(device)}
    b = torch.tensor([3.0], **options)
    for A in (
        Dense(torch.tensor([[4.0]], **options)),
        Diagonal(torch.tensor([4.0], **options)),
        Stencil((1, 1), **options),
    ):
        for M in (None, "jacobi", "ic0"):
            result = solve(A, b, M=M)
            assert (result.x.item(), result.iterations) == (0.75, 1)


# --- starting and stopping ---


def test_warm_start() -> None:
    A = Stencil((20, 20))
    b = random(400)
    first = expect("maxiter", lambda: cg(A, b, rtol=1e-10, maxiter=30))
    again = solve(A, b, rtol=1e-10, **first.state)
    cold = solve(A, b, rtol=1e-10)
    assert again.iterations < cold.iterations
    assert error(again.x, cold.x) < 1e-8
    near = solve(A, b, cold.x + 1e-6 * random(400, seed=1), rtol=1e-10)
    assert near.iterations < cold.iterations


def test_exact_start(device: str) -> None:
    A = Diagonal(torch.full((5,), 2.0, dtype=F64, device=home(device)))
    b = torch.ones(5, dtype=F64, device=home(device))
    for rtol in (1e-5, 0.0):
        result = solve(A, b, b / 2, rtol=rtol)
        assert (result.iterations, result.residual_norm) == (0, 0.0)
        assert torch.equal(result.x, b / 2)
        assert result.history.iterations.tolist() == [0]


@pytest.mark.parametrize("storage", [None, F32])
@pytest.mark.parametrize("kind", KINDS)
def test_zero_right_hand_side(kind: str, storage: Any) -> None:
    """The solution is zero, whatever the start: no relative tolerance could be met on the way there."""
    A = example_operators()[kind]
    zero = torch.zeros(20, dtype=F64)
    for x0 in (None, zero, random(20)):
        result = solve(A, zero, x0, storage=storage)
        assert (result.iterations, result.residual_norm, result.relative_residual) == (0, 0.0, 0.0)
        assert torch.equal(result.x, zero)
    both = torch.stack([zero, random(20)])
    result = solve(A, both, random(2, 20, seed=1), rtol=1e-10, storage=storage)
    assert torch.equal(result.x[0], zero)
    assert error(A.matvec(result.x[1]), both[1]) <= 1e-10


def test_absolute_tolerance(device: str) -> None:
    A = Stencil((10, 10), device=home(device))
    b = random(100, device=home(device))
    result = solve(A, b, rtol=0, atol=1e-3)
    assert 1e-5 < result.residual_norm <= 1e-3
    assert result.tolerance == 1e-3
    assert solve(A, b, rtol=1e-12, atol=1e-3).iterations == result.iterations  # the looser of the two
    assert solve(A, b, rtol=0, atol=1e3).iterations == 0
    assert torch.equal(solve(A, 0 * b, b, rtol=0, atol=1e3).x, b)
    assert solve(A, 0 * b, b, rtol=0, atol=1e-8).residual_norm <= 1e-8


def test_no_tolerance_makes_every_iteration(device: str) -> None:
    A = Stencil((10, 10), device=home(device))
    b = random(100, device=home(device))
    for maxiter in (1, 7, 64, 100):
        result = expect("maxiter", lambda maxiter=maxiter: cg(A, b, rtol=0, maxiter=maxiter))
        assert result.iterations == maxiter
        assert result.history.iterations.tolist() == list(range(maxiter + 1))


def test_no_tolerance_past_the_end_of_the_numbers(device: str) -> None:
    """The recurrence may fall below the smallest number; that is rounding, not a singular matrix."""
    for dtype in DTYPES:
        A = Diagonal(torch.linspace(1, 2, 200, dtype=dtype, device=home(device)))
        b = torch.ones(200, dtype=dtype, device=home(device))
        result = expect("stagnated", lambda A=A, b=b: cg(A, b, rtol=0, maxiter=5000))
        assert result.relative_residual < 8 * torch.finfo(dtype).eps
    b = random(100)
    result = expect("stagnated", lambda: cg(Stencil((10, 10)), b, rtol=0, maxiter=10_000))
    assert result.relative_residual < 1e-14


def test_no_iteration_at_all(device: str) -> None:
    A = Stencil((10, 10), device=home(device))
    b, x0 = random(100, device=home(device)), random(100, seed=1, device=home(device))
    result = expect("maxiter", lambda: cg(A, b, maxiter=0))
    assert result.iterations == 0
    assert not result.x.any()
    assert result.relative_residual == pytest.approx(1.0)
    result = expect("maxiter", lambda: cg(A, b, x0, maxiter=0))
    assert torch.equal(result.x, x0)
    assert result.residual_norm == pytest.approx(float((b - A.matvec(x0)).norm()), rel=1e-12)
    assert solve(A, A.matvec(x0), x0, maxiter=0).iterations == 0


def test_default_limit_is_ten_n() -> None:
    n = 12
    A = torch.diag(torch.logspace(0, 14, n, dtype=F64))
    q = torch.linalg.qr(random(n, n))[0]
    A = q @ A @ q.T
    result = expect("maxiter", lambda: cg((A + A.T) / 2, random(n), rtol=0))
    assert result.iterations == 10 * n
    assert expect("maxiter", lambda: cg((A + A.T) / 2, random(n), rtol=0, maxiter=np.int64(3))).iterations == 3


# --- what is recorded ---


def test_history() -> None:
    A = Stencil((12, 12))
    b = random(144)
    result = solve(A, b, rtol=1e-8)
    assert len(result.history) == result.iterations + 1
    assert result.history.iterations.tolist() == list(range(result.iterations + 1))
    assert result.history.residual_norms[0] == pytest.approx(float(b.norm()), rel=1e-14)
    assert result.history.residual_norms[-1] == pytest.approx(result.residual_norm, rel=1e-5)
    for k in (1, 5, 20):
        partial = expect("maxiter", lambda k=k: cg(A, b, rtol=0, maxiter=k))
        assert result.history.residual_norms[k] == pytest.approx(partial.residual_norm, rel=1e-9)
    assert result.seconds > 0
    table = repr(result)
    for word in ("cg on float64 (cpu)", "converged", "144", f"{result.iterations}", "|b - Ax| / |b|", "seconds"):
        assert word in table


def test_history_of_a_long_run_is_thinned() -> None:
    A = Diagonal(torch.logspace(0, 8, 3000, dtype=F64))
    b = random(3000)
    result = expect("maxiter", lambda: cg(A, b, rtol=0, maxiter=9000))
    steps = np.diff(result.history.iterations)
    assert 2000 < len(result.history) <= 4096
    assert (steps == steps[0]).all()
    assert math.log2(steps[0]).is_integer()
    norms: dict[int, float] = {}
    expect(
        "maxiter",
        lambda: cg(
            A, b, rtol=0, maxiter=9000, callback=lambda info: norms.update({info.iteration: info.residual_norm})
        ),
    )
    assert all(
        norms[int(k)] == norm
        for k, norm in zip(result.history.iterations[1:], result.history.residual_norms[1:], strict=True)
    )


def test_history_of_a_batch_is_that_of_the_worst() -> None:
    A = Stencil((8, 8))
    b = random(3, 64) * torch.tensor([[1.0], [100.0], [0.01]], dtype=F64)
    result = solve(A, b, rtol=1e-6)
    worst = int(result.per_system_residual_norm.argmax())
    assert worst == 1
    assert result.history.residual_norms[0] == pytest.approx(float(b[1].norm()))
    assert result.residual_norm == float(result.per_system_residual_norm[1])


def test_plot() -> None:
    pytest.importorskip("matplotlib").use("Agg")
    axes = solve(Stencil((8, 8)), random(64)).plot()
    assert axes.get_yscale() == "log"


# --- numbers of any size ---


@pytest.mark.parametrize("M", [None, "jacobi"])
@pytest.mark.parametrize(
    ("dtype", "exponent"), [(F64, 250), (F64, 307), (F64, -170), (F64, -290), (F32, -30), (F32, 36), (F32, -36)]
)
def test_scale_of_the_right_hand_side(exponent: int, dtype: torch.dtype, M: str | None, device: str) -> None:
    """Scaling b scales x: squares that over- or underflow do not matter."""
    A = Stencil((6, 7), shift=1.0, dtype=dtype, device=home(device))
    b = random(42, dtype=dtype, device=home(device))
    b = b / b.abs().max()
    scale = 10.0**exponent
    rtol = 1e-10 if dtype is F64 else 1e-5
    for x0 in (None, random(42, seed=1, dtype=dtype, device=home(device))):
        result = solve(A, b * scale, None if x0 is None else x0 * scale, M=M, rtol=rtol)
        assert error(A.matvec(result.x / scale), b) <= 2 * rtol
        size = float(b.double().norm())
        assert result.residual_norm / scale <= rtol * size
        assert result.tolerance / scale == pytest.approx(rtol * size, rel=1e-5)
        assert result.history.residual_norms[-1] / scale <= 1.01 * rtol * size


@pytest.mark.parametrize("storage", [None, F32])
def test_scales_of_a_batch(storage: Any) -> None:
    A = Stencil((6, 7))
    b = random(5, 42)
    scales = torch.tensor([1e-200, 1.0, 1e200, 0.0, 1e-310], dtype=F64)[:, None]
    result = solve(A, b * scales, rtol=1e-10, storage=storage)
    expected = solve(A, b, rtol=1e-12).x
    for k in (0, 1, 2):
        assert error(result.x[k] / scales[k], expected[k]) < 1e-8
    assert not result.x[3].any()
    assert error(result.x[4] * 1e300, 1e-10 * expected[4]) < 1e-6  # subnormal: fewer digits
    norms = result.per_system_residual_norm / (b * scales).abs().amax(-1)
    assert float(norms[:3].max()) < 1e-8


def test_scales_with_an_absolute_tolerance() -> None:
    A = Stencil((6, 7))
    b = random(42)
    for scale in (1e-310, 1e-200, 5e-324):
        result = solve(A, b * scale, rtol=0, atol=1.0)
        assert (result.iterations, float(result.x.abs().max())) == (0, 0.0)
    result = solve(A, b * 1e250, rtol=0, atol=1e240)
    assert result.residual_norm <= 1e240
    assert result.iterations > 5
    with pytest.raises(ValueError, match="cg: b: expected right-hand sides .*comparable size"):
        cg(A, torch.stack([1e-200 * b, b]), rtol=0, atol=1e-210)
    with pytest.raises(ValueError, match="cg: b: expected right-hand sides .*start from zero"):
        cg(A, b, b * 1e200)


@pytest.mark.parametrize("exponent", [-140, -20, 20, 140])
@pytest.mark.parametrize("M", [None, "jacobi", "ic0"])
def test_scale_of_the_matrix(exponent: int, M: str | None) -> None:
    scale = 10.0**exponent
    b = random(42)
    reference = solve(Stencil((6, 7)), b, rtol=1e-10, M=M)
    result = solve(Stencil((6, 7), weights=scale), b, rtol=1e-10, M=M)
    assert result.iterations == reference.iterations
    assert error(result.x * scale, reference.x) < 1e-8


# --- storage in single precision ---


@pytest.mark.parametrize("M", [None, "jacobi", "ic0"])
@pytest.mark.parametrize("kind", ["stencil", "csr", "dense", "sum"])
def test_single_precision_storage(kind: str, M: str | None, device: str) -> None:
    """fp32 inside, fp64 accuracy outside."""
    A = example_operators(device=home(device))[kind]
    b = random(3, 20, device=home(device))
    result = solve(A, b, rtol=1e-11, storage=F32, M=M)
    true = (b - A.matvec(result.x)).norm(dim=-1)
    assert bool((true <= 1e-11 * b.norm(dim=-1)).all())
    assert result.x.dtype is F64
    torch.testing.assert_close(result.per_system_residual_norm, true.cpu(), rtol=1e-3, atol=0)
    history = result.history
    assert history.iterations[-1] == result.iterations
    assert (history.residual_norms > 0).all()
    assert history.residual_norms[-1] < 1e-10 * float(b.norm())


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e5])
def test_single_precision_storage_of_a_bad_condition(condition: float) -> None:
    """A leg that stagnates in fp32 is no failure as long as the next one gains."""
    A = spd(200, condition)
    b = random(200)
    result = solve(A, b, rtol=1e-11, storage=F32, maxiter=20000)
    assert float((b - A @ result.x).norm()) <= 1e-11 * float(b.norm())
    assert error(result.x, torch.linalg.solve(A, b)) <= 1e-10 * condition


def test_single_precision_storage_reports_failures() -> None:
    b = random(100)
    A = Stencil((10, 10))
    assert expect("maxiter", lambda: cg(A, b, rtol=1e-11, storage=F32, maxiter=10)).iterations == 10
    assert expect("maxiter", lambda: cg(A, b, rtol=1e-11, storage=F32, maxiter=0)).iterations == 0
    expect("negative_curvature", lambda: cg(-A, b, storage=F32))
    expect("stagnated", lambda: cg(A, b, rtol=1e-17, storage=F32, maxiter=10000))
    expect("singular", lambda: cg(Stencil((10, 10), boundary="neumann"), b + 1, storage=F32))
    seen: list[Any] = []
    solve(A, b, rtol=1e-11, storage=F32, callback=seen.append)
    assert [info.iteration for info in seen] == list(range(1, len(seen) + 1))
    assert seen[-1].residual_norm <= 1.01e-11 * float(b.norm())


def test_single_precision_storage_takes_a_start() -> None:
    A = Stencil((10, 10))
    b = random(100)
    x = solve(A, b, rtol=1e-12).x
    assert solve(A, b, x, rtol=1e-11, storage=F32).iterations == 0
    near = solve(A, b, x + 1e-8 * random(100, seed=1), rtol=1e-11, storage=F32)
    assert near.iterations < solve(A, b, rtol=1e-11, storage=F32).iterations
    assert torch.equal(solve(A, b, storage=F64, rtol=1e-9).x, solve(A, b, rtol=1e-9).x)


def test_x_stands_alone(device: str) -> None:
    """The result shares no memory with the inputs or with a later solve."""
    A = Stencil((4, 5), device=home(device))
    b, x0 = random(20, device=home(device)), random(20, seed=1, device=home(device))
    first = solve(A, b, x0, maxiter=200)
    copy: Tensor = first.x.clone()
    solve(A, 2 * b, x0)
    x0.zero_()
    b.zero_()
    assert torch.equal(first.x, copy)
