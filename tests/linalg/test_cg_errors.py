"""Bad input: every message names the function, the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from torch import Tensor

from devices import home
from kantor.linalg import CSR, Dense, Diagonal, Multigrid, PoissonGrid, Stencil, cg, ic0, jacobi
from kantor.linalg import Callable as CallableOperator
from systems import F32, F64, csr_of, example_operators, random, solve, spd

NAN, INF = float("nan"), float("inf")


def spoiled(t: Tensor, value: float, *index: int) -> Tensor:
    t = t.clone()
    t[index] = value
    return t


def raises(error: type[Exception], match: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=match):
        call()


# --- b ---


@pytest.mark.parametrize("kind", list(example_operators()))
def test_wrong_b(kind: str) -> None:
    A = example_operators()[kind]
    raises(ValueError, r"^cg: b: expected shape \(\.\.\., 20\).*, got \(19,\)", lambda: cg(A, random(19)))
    raises(
        ValueError,
        r"^cg: b: expected .*got \(20, 1\); for right-hand sides in columns pass b\.T",
        lambda: cg(A, random(20, 1)),
    )
    raises(
        ValueError,
        r"^cg: b: expected .*got \(20, 3\); for right-hand sides in columns pass b\.T",
        lambda: cg(A, random(20, 3)),
    )
    raises(ValueError, r"^cg: b: expected .*got \(\)", lambda: cg(A, torch.tensor(1.0, dtype=F64)))
    raises(ValueError, r"^cg: b: expected .*got \(0,\)", lambda: cg(A, random(0)))
    raises(ValueError, r"^cg: b: expected .*got \(3, 19\)$", lambda: cg(A, random(3, 19)))
    for dtype in (torch.int64, torch.int32, torch.bool, torch.float16, torch.bfloat16):
        raises(
            TypeError, rf"^cg: b: expected dtype float32 or float64, got {str(dtype)[6:]}; call \.to\(torch.float64\)",
            lambda dtype=dtype: cg(A, torch.ones(20, dtype=dtype)),
        )  # fmt: skip
    raises(TypeError, r"^cg: b: .*got complex128; complex systems are not supported", lambda: cg(A, random(20) * 1j))
    raises(
        TypeError, r"^cg: A is float64, b is float32; convert one with \.to\(dtype\)", lambda: cg(A, random(20).float())
    )
    raises(
        ValueError, r"^cg: A is on cpu, b on meta; move one with \.to\(device\)", lambda: cg(A, random(20).to("meta"))
    )
    raises(TypeError, r"^cg: b: expected a torch.Tensor, got ndarray", lambda: cg(A, np.ones(20)))
    raises(TypeError, r"^cg: b: expected a torch.Tensor, got list", lambda: cg(A, [1.0] * 20))
    raises(TypeError, r"^cg: b: expected a torch.Tensor, got NoneType", lambda: cg(A, None))
    raises(
        TypeError,
        r"^cg: b: expected a dense tensor, got layout torch.sparse_coo",
        lambda: cg(A, random(20).to_sparse()),
    )


def test_wrong_grid() -> None:
    A = Stencil((4, 5))
    raises(
        ValueError,
        r"^cg: b: expected shape \(\.\.\., 20\) or \(\.\.\., 4, 5\), got \(5, 4\)",
        lambda: cg(A, random(5, 4)),
    )
    raises(
        ValueError, r"^cg: x0: expected the shape of b, \(4, 5\), got \(20,\)", lambda: cg(A, random(4, 5), random(20))
    )


@pytest.mark.parametrize("storage", [None, F32])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("kind", list(example_operators()))
def test_values_of_b_and_x0(kind: str, bad: float, storage: Any, device: str) -> None:
    """Anywhere, in any precision, alone or in a batch: the message tells where."""
    A = example_operators(device=home(device))[kind]
    b = random(20, device=home(device))
    raises(
        ValueError,
        rf"^cg: b: expected finite values, got {bad} at 13$",
        lambda: cg(A, spoiled(b, bad, 13), storage=storage),
    )
    batch = spoiled(b.expand(3, 20), bad, 1, 7)
    raises(
        ValueError, rf"^cg: b: expected finite values, got {bad} at \(1, 7\)$", lambda: cg(A, batch, storage=storage)
    )
    raises(
        ValueError,
        rf"^cg: x0: expected finite values, got {bad} at 2$",
        lambda: cg(A, b, spoiled(b, bad, 2), storage=storage),
    )
    only = torch.full((1,), bad, dtype=F64, device=home(device))
    raises(
        ValueError,
        r"^cg: b: expected finite values",
        lambda: cg(Diagonal(torch.ones_like(only)), only, storage=storage),
    )


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_values_in_large_vectors(dtype: torch.dtype) -> None:
    """In any chunk of a reduction, also behind larger numbers."""
    A = Stencil((30, 30, 40), dtype=dtype)
    for place in (0, 4095, 20_000, 35_999):
        for bad in (NAN, INF):
            b = spoiled(random(36_000, dtype=dtype) * 1e3, bad, place)
            raises(ValueError, rf"^cg: b: expected finite values, got {bad} at {place}$", lambda b=b: cg(A, b))


# --- x0 and options ---


def test_wrong_x0() -> None:
    A = Stencil((4, 5))
    b = random(3, 20)
    for shape in ((20,), (3, 19), (1, 3, 20), (3, 4, 5), ()):
        raises(
            ValueError,
            r"^cg: x0: expected the shape of b, \(3, 20\), got",
            lambda shape=shape: cg(A, b, random(*shape)),
        )
    raises(TypeError, r"^cg: b is float64, x0 is float32; convert", lambda: cg(A, b, b.float()))
    raises(TypeError, r"^cg: b is float64, x0 is int64; convert", lambda: cg(A, b, b.long()))
    raises(ValueError, r"^cg: b is on cpu, x0 on meta; move", lambda: cg(A, b, b.to("meta")))
    raises(TypeError, r"^cg: x0: expected a torch.Tensor, got float", lambda: cg(A, b, 0.0))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"rtol": -1e-5}, ValueError, r"^cg: rtol: expected a finite number >= 0, got -1e-05"),
        ({"rtol": NAN}, ValueError, r"^cg: rtol: expected a finite number >= 0, got nan"),
        ({"rtol": INF}, ValueError, r"^cg: rtol: expected a finite number >= 0, got inf"),
        ({"rtol": "small"}, ValueError, r"^cg: rtol: expected a finite number >= 0, got 'small'"),
        ({"rtol": None}, ValueError, r"^cg: rtol: expected .* got None"),
        ({"atol": -1.0}, ValueError, r"^cg: atol: expected a finite number >= 0, got -1.0"),
        ({"atol": NAN}, ValueError, r"^cg: atol: expected a finite number >= 0, got nan"),
        ({"maxiter": -1}, ValueError, r"^cg: maxiter: expected an integer >= 0, got -1"),
        ({"maxiter": 3.5}, ValueError, r"^cg: maxiter: expected an integer >= 0, got 3.5"),
        ({"maxiter": "10"}, ValueError, r"^cg: maxiter: expected an integer >= 0, got '10'"),
        ({"storage": torch.float16}, ValueError, r"^cg: storage: expected torch.float32 with .* got torch.float16"),
        ({"storage": "float32"}, ValueError, r"^cg: storage: expected torch.float32"),
        ({"interrupt": "ignore"}, ValueError, r"^cg: interrupt: expected 'raise' or 'return', got 'ignore'"),
        ({"tol": 1e-5}, TypeError, r"unexpected keyword argument 'tol'"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_options(options: dict[str, Any], error: type[Exception], match: str) -> None:
    raises(error, match, lambda: cg(Stencil((4, 5)), random(20), **options))


def test_storage_of_a_single_precision_system() -> None:
    A, b = Stencil((4, 5), dtype=F32), random(20, dtype=F32)
    assert solve(A, b, storage=F32, rtol=1e-4).x.dtype is F32
    raises(ValueError, r"^cg: storage: .*got torch.float64 with torch.float32", lambda: cg(A, b, storage=F64))


# --- A ---


def test_wrong_matrix() -> None:
    b = random(4)
    raises(ValueError, r"^cg: A: expected a square operator, got 3 x 4", lambda: cg(random(3, 4), b))
    raises(ValueError, r"^cg: A: expected a square operator, got 4 x 3", lambda: cg(csr_of(random(4, 3)), b))
    raises(ValueError, r"^Dense: A: expected a matrix \(rows, columns\), got shape \(4,\)", lambda: cg(random(4), b))
    raises(
        ValueError,
        r"^Dense: A: expected a matrix \(rows, columns\), got shape \(2, 4, 4\)",
        lambda: cg(random(2, 4, 4), b),
    )
    for dtype in (torch.int64, torch.float16, torch.bool):
        raises(
            TypeError, rf"^Dense: A: expected dtype float32 or float64, got {str(dtype)[6:]}",
            lambda dtype=dtype: cg(torch.eye(4).to(dtype), b),
        )  # fmt: skip
    raises(TypeError, r"^Dense: A: .*complex64; complex systems are not supported", lambda: cg(torch.eye(4) * 1j, b))
    raises(TypeError, r"^cg: A is float32, b is float64; convert", lambda: cg(torch.eye(4), b))
    raises(
        ValueError, r"^cg: A is on meta, b on cpu; move", lambda: cg(CallableOperator(lambda x: x, 4, device="meta"), b)
    )
    raises(TypeError, r"^as_operator: A: expected a tensor, a kantor operator, .*got NoneType", lambda: cg(None, b))
    raises(TypeError, r"^as_operator: A: expected .*got ndarray", lambda: cg(np.eye(4), b))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_values_of_the_matrix(bad: float) -> None:
    raises(
        ValueError,
        rf"^Dense: A: expected finite values, got {bad} at \(1, 2\)",
        lambda: cg(spoiled(spd(4), bad, 1, 2), random(4)),
    )
    A = csr_of(spd(4))
    raises(
        ValueError, rf"^CSR: values: entry 6 is {bad}; expected finite values",
        lambda: CSR(A.crow, A.col, spoiled(A.values, bad, 6), A.shape),
    )  # fmt: skip
    raises(
        ValueError,
        rf"^Diagonal: d: expected finite values, got {bad} at 3",
        lambda: Diagonal(spoiled(random(5), bad, 3)),
    )
    raises(ValueError, r"^Stencil: weights: expected finite values", lambda: Stencil((3, 3), weights=(1.0, bad)))
    raises(ValueError, r"^Stencil: shift: expected finite values", lambda: Stencil((3, 3), shift=bad))
    fy, fx = torch.ones(4, 3, dtype=F64), torch.ones(3, 4, dtype=F64)
    raises(
        ValueError,
        rf"^Stencil.from_faces: fy: expected finite values, got {bad} at \(2, 1\)",
        lambda: Stencil.from_faces((spoiled(fy, bad, 2, 1), fx)),
    )
    raises(
        ValueError,
        rf"^Stencil.from_faces: fx: expected finite values, got {bad} at \(2, 1\)",
        lambda: Stencil.from_faces((fy, spoiled(fx, bad, 2, 1))),
    )
    raises(ValueError, r"^Stencil.from_faces: shift: expected finite values", lambda: Stencil.from_faces((fy, fx), bad))


def test_wrong_dense_and_diagonal() -> None:
    raises(TypeError, r"^Dense: A: expected a torch.Tensor, got ndarray", lambda: Dense(np.eye(3)))  # type: ignore[arg-type]
    raises(
        TypeError,
        r"^Dense: A: expected a dense tensor, got layout torch.sparse_coo",
        lambda: Dense(torch.eye(3).to_sparse()),
    )
    raises(TypeError, r"^Diagonal: d: expected a torch.Tensor, got list", lambda: Diagonal([1.0]))  # type: ignore[arg-type]
    raises(ValueError, r"^Diagonal: d: expected shape \(n,\), got \(3, 3\)", lambda: Diagonal(torch.eye(3)))
    raises(TypeError, r"^Diagonal: d: expected dtype float32 or float64, got int64", lambda: Diagonal(torch.arange(3)))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        (((3,),), {}, ValueError, r"^Stencil: shape: expected two or three dimensions, got \(3,\)"),
        (((2, 2, 2, 2),), {}, ValueError, r"^Stencil: shape: expected two or three dimensions"),
        (((3, 0),), {}, ValueError, r"^Stencil: shape: every dimension must be at least 1, got \(3, 0\)"),
        (((3, -1),), {}, ValueError, r"^Stencil: shape: every dimension must be at least 1"),
        (((3, 3),), {"weights": (1.0, 2.0, 3.0)}, ValueError, r"^Stencil: weights: expected one or 2, got .*\(3,\)"),
        (((3, 3, 3),), {"weights": (1.0, 2.0)}, ValueError, r"^Stencil: weights: expected one or 3, got shape \(2,\)"),
        (((3, 3),), {"weights": torch.ones(1, 2)}, ValueError, r"^Stencil: weights: expected one or 2, got .*\(1, 2\)"),
        (((3, 3),), {"boundary": "periodic"}, ValueError, r"^Stencil: boundary: expected 'dirichlet' .*got 'periodic'"),
        (((3, 3),), {"boundary": ("neumann",)}, ValueError, r"^Stencil: boundary: expected .*or 2 of them"),
        (((3, 3),), {"dtype": torch.float16}, TypeError, r"^Stencil: dtype: expected .*float64, got float16"),
        (((3, 3),), {"weights": torch.ones(2, dtype=torch.int64)}, TypeError, r"^Stencil: dtype: .*got int64"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_stencil(arguments: Any, options: dict[str, Any], error: type[Exception], match: str) -> None:
    raises(error, match, lambda: Stencil(*arguments, **options))


def test_wrong_faces() -> None:
    fy, fx = torch.ones(4, 3, dtype=F64), torch.ones(3, 4, dtype=F64)
    from_faces = Stencil.from_faces
    raises(ValueError, r"^Stencil.from_faces: expected two or three tensors, got 1", lambda: from_faces((fy,)))
    raises(
        ValueError,
        r"^Stencil.from_faces: fx: expected shape \(3, 4\) for the grid \(3, 3\), got \(4, 3\)",
        lambda: from_faces((fy, fy)),
    )
    raises(
        ValueError,
        r"^Stencil.from_faces: fz: expected 3 dimensions, got shape \(4, 3\)",
        lambda: from_faces((fy, fx, fx)),
    )
    raises(
        TypeError, r"^Stencil.from_faces: fy is float64, fx is float32; convert", lambda: from_faces((fy, fx.float()))
    )
    raises(ValueError, r"^Stencil.from_faces: fy is on cpu, fx on meta; move", lambda: from_faces((fy, fx.to("meta"))))
    raises(TypeError, r"^Stencil.from_faces: fy: expected a torch.Tensor, got list", lambda: from_faces(([1.0], fx)))  # type: ignore[list-item]
    raises(
        TypeError,
        r"^Stencil.from_faces: fy: expected dtype float32 or float64, got int64",
        lambda: from_faces((fy.long(), fx)),
    )
    raises(ValueError, r"at least 1", lambda: from_faces((torch.ones(1, 3, dtype=F64), torch.ones(0, 4, dtype=F64))))


# --- Python operators ---


@pytest.mark.parametrize(
    ("fn", "error", "match"),
    [
        (lambda x: x[..., :3], ValueError, r"Callable: fn returned shape \(3,\), expected a tensor of shape \(20,\)"),
        (lambda x: x.float(), TypeError, r"Callable: fn returned torch.float32"),
        (lambda x: x.numpy(), ValueError, r"Callable: fn returned ndarray, expected a tensor"),
        (lambda x: None, ValueError, r"Callable: fn returned NoneType"),
        (lambda x, y: x, TypeError, r"missing 1 required positional argument"),
    ],
    ids=["shape", "dtype", "numpy", "nothing", "arguments"],
)
def test_wrong_callables(fn: Any, error: type[Exception], match: str) -> None:
    with torch.no_grad():
        raises(error, match, lambda: cg(fn, random(20)))
        raises(error, match, lambda: cg(Stencil((4, 5)), random(20), M=fn))


def test_rectangular_scipy_operator() -> None:
    sla = pytest.importorskip("scipy.sparse.linalg")
    raises(
        ValueError, r"^as_operator: A: expected a square operator, got shape \(2, 3\)",
        lambda: cg(sla.aslinearoperator(np.ones((2, 3))), random(3)),
    )  # fmt: skip


def test_errors_leave_nothing_behind() -> None:
    """After any of these, the next solve is as good as the first."""
    A = Stencil((4, 5))
    before = solve(A, random(20), rtol=1e-10).x
    for bad in (
        lambda: cg(A, random(19)),
        lambda: cg(A, spoiled(random(20), NAN, 3)),
        lambda: cg(lambda x: None, random(20)),
    ):
        with pytest.raises((TypeError, ValueError)):
            bad()
    assert torch.equal(solve(A, random(20), rtol=1e-10).x, before)


@pytest.mark.parametrize(
    ("M", "text"),
    [
        (jacobi, r"jacobi; pass jacobi\(A\) or 'jacobi'"),
        (ic0, r"pass ic0\(A\) or 'ic0'"),
        (Multigrid, r"pass Multigrid\(A\)"),
    ],
)
def test_what_makes_a_preconditioner_is_none_itself(M, text):
    with pytest.raises(TypeError, match=f"cg: M: expected an operator, got what makes one, .*{text}"):
        cg(Stencil((4, 4)), torch.ones(16, dtype=torch.float64), M=M)


def test_multigrid_says_which_grid_a_stencil_is():
    with pytest.raises(TypeError, match=r"Multigrid: A: expected a PoissonGrid, got Stencil; .* air around them \(3\)"):
        Multigrid(Stencil((4, 5)))
    flags = torch.nn.functional.pad(torch.full((4, 5), 2), (1, 1, 1, 1), value=3)
    grid, b = PoissonGrid(flags), torch.randn(6, 7, dtype=torch.float64)
    torch.testing.assert_close(
        cg(grid, b, M=Multigrid(grid), rtol=1e-12).x[1:-1, 1:-1], cg(Stencil((4, 5)), b[1:-1, 1:-1], rtol=1e-12).x
    )


@pytest.mark.parametrize(
    ("b", "call"),
    [
        (np.ones(16), r"torch.from_numpy\(b\)"), ([1.0] * 16, r"torch.tensor\(b, dtype=torch.float64\)"),
        (pandas.Series(np.ones(16)), r"torch.from_numpy\(b.to_numpy\(\)\)"),
    ],
)  # fmt: skip
def test_what_is_no_tensor_is_told_how_to_become_one(b, call):
    with pytest.raises(TypeError, match=f"cg: b: expected a torch.Tensor, got .*; call {call}"):
        cg(Stencil((4, 4)), b)
