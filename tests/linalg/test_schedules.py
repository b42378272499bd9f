"""The CUDA code on the emulator: whatever order threads and blocks run in, the results are those of the CPU code."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import devices
from kantor._ops import emulated
from kantor.linalg import CSR, Dense, Diagonal, LinearOperator, LowRank, Stencil, capped_cg, cg, ic0, multishift_cg
from systems import F32, F64, csr_of, error, expect, random, random_faces, solve, sparse, spd

SCHEDULES = (0, 1, 2, 3)


@pytest.fixture(params=SCHEDULES, ids=["forward", "reverse", "shuffled", "shuffled again"])
def schedule(request: pytest.FixtureRequest) -> Iterator[int]:
    """Run the emulator's threads and blocks in this order."""
    devices.require("emulated")
    emulator: Any = importlib.import_module("kantor._emu")
    assert emulator.schedule_count == len(SCHEDULES)
    emulator.set_schedule(request.param)
    yield request.param
    emulator.set_schedule(0)


def operators() -> dict[str, LinearOperator]:
    """Several blocks each, with rows of all lengths: one, four and thirty-two threads to a row."""
    grid = (9, 10, 11)
    stencil = Stencil(grid, weights=(1.0, 2.0, 3.0), boundary=("neumann", "dirichlet", "neumann"), shift=0.5)
    short = csr_of(torch.diag(random(700).abs() + 1))
    long = csr_of(spd(300))
    return {
        "stencil": stencil,
        "faces": Stencil.from_faces(random_faces(grid), 0.5),
        "csr": stencil.to_csr(),
        "short rows": short,
        "long rows": long,
        "dense": Dense(spd(300)),
        "diagonal": Diagonal(random(990).abs() + 1),
        # Factors of few columns, read once, and of many, in several pieces each; few and many factors.
        "low rank": Diagonal(random(300).abs() + 1)
        + 0.01 * LowRank(random(260, 300, seed=1), random(260, seed=2).abs()),
        "many columns": Diagonal(random(33_000).abs() + 1) - 1e-6 * LowRank(random(5, 33_000, seed=1)),
        "sum": stencil + 2.0 * stencil.to_csr() - 0.5 * Diagonal(random(990).abs()),
    }


KINDS = tuple(operators())


@pytest.mark.parametrize("kind", KINDS)
def test_matvec(kind: str, schedule: int) -> None:
    for dtype, tolerance in ((F64, 1e-12), (F32, 1e-5)):
        A = operators()[kind].to(dtype)
        x = random(3, A.shape[1], dtype=dtype)
        expected = A.matvec(x)
        with emulated():
            actual = A.matvec(x)
            assert torch.equal(A.matvec(x), actual)
        assert error(actual, expected) < tolerance


def test_rectangles(schedule: int) -> None:
    for matrix in (random(5, 700), random(700, 5), sparse(400, 30), sparse(30, 400)):
        for A in (Dense(matrix), csr_of(matrix)):
            with emulated():
                assert error(A.matvec(random(2, A.shape[1])), random(2, A.shape[1]) @ matrix.T) < 1e-12


@pytest.mark.parametrize("M", [None, "jacobi", "ic0", "operator", "callable", "low rank"])
@pytest.mark.parametrize("kind", KINDS)
def test_cg(kind: str, M: Any, schedule: int) -> None:
    """The same iterates after a few iterations, and the same bits for every schedule."""
    A, name = operators()[kind], str(M)
    if kind == "many columns" and M in ("ic0", "operator"):
        M = None  # these take the entries of the matrix, 10^9 here
    b = random(A.shape[0])
    if M == "ic0":
        M = ic0(A)
    elif M == "operator":
        M = Diagonal(1 / A.diagonal()).to_csr() * 2.0
    elif M == "low rank":
        M = Diagonal(1 / A.diagonal()) + 1e-3 * LowRank(random(3, A.shape[0], seed=1))
    elif M == "callable":
        inverse = 1 / A.diagonal()
        M = lambda r: inverse * r  # noqa: E731
    if kind in ("diagonal", "short rows") and M is not None:  # solved in one step
        options: dict[str, Any] = {"rtol": 1e-12}
        run = solve
    else:
        options = {"rtol": 0.0, "maxiter": 6}
        run = lambda *args, **rest: expect("maxiter", lambda: cg(*args, **rest))  # noqa: E731
    expected = run(A, b, M=M, **options)
    with emulated():
        actual = run(A, b, M=M, **options)
    assert error(actual.x, expected.x) < 1e-12
    assert actual.iterations == expected.iterations
    torch.testing.assert_close(
        torch.tensor(actual.history.residual_norms), torch.tensor(expected.history.residual_norms),
        rtol=1e-10, atol=1e-13 * float(b.norm()),
    )  # fmt: skip
    key = (kind, name)
    assert torch.equal(SEEN.setdefault(key, actual.x), actual.x), "the schedule changes bits"


SEEN: dict[tuple[str, str], Tensor] = {}


@pytest.mark.parametrize("kind", ["stencil", "low rank", "many columns"])
def test_capped_and_multishift_cg(kind: str, schedule: int) -> None:
    A = operators()[kind]
    b, shifts = random(A.shape[0]), torch.tensor([2.0, 0.0, 50.0], dtype=F64)
    M = Diagonal(1 / A.diagonal()) + 1e-3 * LowRank(random(3, A.shape[0], seed=1))
    runs = {
        "capped": lambda: capped_cg(A, b, damping=0.1, max_iter=5).d,
        "preconditioned": lambda: capped_cg(A, b, damping=0.1, max_iter=5, M_inv=M).d,
        "multishift": lambda: multishift_cg(A, b, shifts, rtol=0.0, maxiter=5).x,
    }
    for name, run in runs.items():
        expected = run()
        with emulated():
            actual = run()
        assert error(actual, expected) < 1e-12
        assert torch.equal(SEEN.setdefault((kind, name), actual), actual), "the schedule changes bits"


@pytest.mark.parametrize("kind", ["stencil", "csr", "dense", "sum"])
def test_converged_solutions(kind: str, schedule: int) -> None:
    A = operators()[kind]
    b = random(A.shape[0])
    expected = solve(A, b, rtol=1e-13)
    with emulated():
        actual = solve(A, b, rtol=1e-13)
    assert error(actual.x, expected.x) < 1e-11
    assert abs(actual.iterations - expected.iterations) <= 1


def test_ic0(schedule: int) -> None:
    """Many levels of few rows, and few levels of many."""
    pairs = torch.block_diag(*[torch.tensor([[3.0, -1.0], [-1.0, 3.0]], dtype=F64)] * 400)
    for A in (Stencil((9, 10, 11)).to_csr(), csr_of(pairs)):
        M = ic0(A)
        r = random(2, A.shape[0])
        expected = M.matvec(r)
        with emulated():
            actual = M.matvec(r)
        assert error(actual, expected) < 1e-13


def test_statuses(schedule: int) -> None:
    """Reductions decide about the end of a solve, so the order must not matter there either."""
    stencil = Stencil((20, 20))
    with emulated():
        assert solve(stencil, random(5, 400), rtol=1e-10).converged
        expect("negative_curvature", lambda: cg(stencil - 3.0 * Diagonal(torch.ones(400, dtype=F64)), random(400)))
        expect("singular", lambda: cg(Stencil((20, 20), boundary="neumann"), random(400) + 1, rtol=1e-10))
        assert solve(stencil, torch.stack([random(400), torch.zeros(400, dtype=F64)]), rtol=1e-10).x[1].abs().max() == 0
        with pytest.raises(ValueError, match="finite"):
            cg(stencil, torch.full((400,), float("nan"), dtype=F64))


@pytest.mark.slow
def test_large_batches(size: str, schedule: int) -> None:
    """More vectors than a CUDA grid has rows of blocks (65535)."""
    A = Diagonal(torch.tensor([2.0], dtype=F64))
    x = random(70_000, 1)
    systems = x if size == "full" and schedule == 0 else x[:300]
    with emulated():
        assert torch.equal(A.matvec(x), 2 * x)
        assert torch.equal(solve(A, systems).x, systems / 2)


def test_schedules_are_checked() -> None:
    devices.require("emulated")
    emulator: Any = importlib.import_module("kantor._emu")
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match="set_schedule: expected 0, 1, 2 or 3"):
            emulator.set_schedule(wrong)


def test_cuda_tensors_need_a_cuda_build() -> None:
    """On a build without CUDA the emulator is the only way to the CUDA code: nothing falls back to it silently."""
    assert isinstance(Stencil((3, 3)).to_csr(), CSR)
    calls = []
    emulator: Any = pytest.importorskip("kantor._emu")
    original = emulator.matvec
    try:
        emulator.matvec = lambda *args: (calls.append(1), original(*args))[1]
        Stencil((3, 3)).matvec(random(9))
        assert not calls
        with emulated():
            Stencil((3, 3)).matvec(random(9))
        assert calls == [1]
    finally:
        emulator.matvec = original
