"""Systems of equations that several files of tests share, and what to compare solutions with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kantor.linalg import CSR, Dense, Diagonal, LinearOperator, LowRank, SolveResult, Stencil, cg
from kantor.linalg import Callable as CallableOperator

F32, F64 = torch.float32, torch.float64
BOUNDARIES = ("dirichlet", "neumann")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = F64, device: str = "cpu") -> Tensor:
    """Standard normal numbers; the same in every dtype and on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=F64, generator=generator).to(device, dtype)


def spd(n: int, condition: float = 100.0, seed: int = 0) -> Tensor:
    """Dense symmetric positive definite matrix with eigenvalues from 1 / condition to 1, evenly spread in logarithm."""
    q = torch.linalg.qr(random(n, n, seed=seed))[0]
    matrix = q * torch.logspace(-np.log10(condition), 0, n, dtype=F64) @ q.T
    return (matrix + matrix.T) / 2


def sparse(rows: int, cols: int, density: float = 0.3, seed: int = 0) -> Tensor:
    """Dense form of a sparse matrix whose second and last row are empty."""
    matrix = random(rows, cols, seed=seed) * (
        torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) < density
    )
    matrix[1:2] = 0
    matrix[-1:] = 0
    return matrix


def csr_of(matrix: Tensor, index: torch.dtype = torch.int64) -> CSR:
    s = matrix.to_sparse_csr()
    return CSR(s.crow_indices().to(index), s.col_indices().to(index), s.values(), (matrix.shape[0], matrix.shape[1]))


# --- grids: matrices from their formula, with loops ---


def neighbours(grid: Sequence[int]) -> Any:
    """(cell, axis, side, neighbour or None) for every face of every cell; cells are index tuples."""
    for cell in product(*map(range, grid)):
        for axis in range(len(grid)):
            for side in (-1, 1):
                other = (*cell[:axis], cell[axis] + side, *cell[axis + 1 :])
                yield cell, axis, side, other if 0 <= other[axis] < grid[axis] else None


def stencil_matrix(grid: Sequence[int], weights: Sequence[float], boundary: Sequence[str], shift: float) -> Tensor:
    n = int(np.prod(grid))
    matrix = shift * torch.eye(n, dtype=F64)
    for cell, axis, _, other in neighbours(grid):
        row = np.ravel_multi_index(cell, tuple(grid))
        if other is not None:
            matrix[row, row] += weights[axis]
            matrix[row, np.ravel_multi_index(other, tuple(grid))] -= weights[axis]
        elif boundary[axis] == "dirichlet":
            matrix[row, row] += weights[axis]
    return matrix


def face_matrix(faces: Sequence[Tensor], shift: float) -> Tensor:
    grid = [n - (axis == 0) for axis, n in enumerate(faces[0].shape)]
    n = int(np.prod(grid))
    matrix = shift * torch.eye(n, dtype=F64)
    for cell, axis, side, other in neighbours(grid):
        row = np.ravel_multi_index(cell, tuple(grid))
        face = (*cell[:axis], cell[axis] + (side > 0), *cell[axis + 1 :])
        matrix[row, row] += faces[axis][face].double().cpu()
        if other is not None:
            matrix[row, np.ravel_multi_index(other, tuple(grid))] -= faces[axis][face].double().cpu()
    return matrix


def random_faces(grid: Sequence[int], seed: int = 0) -> list[Tensor]:
    """Positive coefficients, some border faces zero (Neumann)."""
    faces = []
    for axis in range(len(grid)):
        face = random(*(n + (a == axis) for a, n in enumerate(grid)), seed=seed + axis).abs() + 0.1
        face.narrow(axis, 0, 1).mul_((random(*face.narrow(axis, 0, 1).shape, seed=seed + 10 + axis) > 0).to(F64))
        faces.append(face)
    return faces


# --- one operator of each kind with its dense matrix, for tests that hold for all ---


def poisson(grid: Sequence[int] = (9, 11), **options: Any) -> Stencil:
    return Stencil(grid, **options)


def example_operators(dtype: torch.dtype = F64, device: str = "cpu") -> dict[str, LinearOperator]:
    """Symmetric positive definite operators on 4 x 5 grids, in every form."""
    stencil = Stencil(
        (4, 5), weights=(2.0, 0.5), boundary=("neumann", "dirichlet"), shift=0.3, dtype=dtype, device=device
    )
    faces = Stencil.from_faces([f.to(device, dtype) for f in random_faces((4, 5))], 0.2)
    dense = Dense(spd(20).to(device, dtype))
    csr = csr_of(stencil_matrix((4, 5), (1.0, 3.0), ("dirichlet", "dirichlet"), 0.1)).to(dtype)
    if device != "cpu":
        csr = CSR(csr.crow.to(device), csr.col.to(device), csr.values.to(device), csr.shape)
    diagonal = Diagonal(random(20, seed=3, dtype=dtype, device=device).abs() + 0.5)
    return {
        "dense": dense,
        "csr": csr,
        "stencil": stencil,
        "faces": faces,
        "diagonal": diagonal,
        "low rank": LowRank(random(80, 20, seed=4, dtype=dtype, device=device)),
        "sum": 0.5 * stencil + 2.0 * csr + dense,
        "nested": 2.0 * (faces + 0.5 * (diagonal + stencil)) - 0.25 * stencil,
        "callable": CallableOperator(dense.matvec, 20, dtype=dtype, device=device, transpose=dense.matvec),
        "mixed": stencil + CallableOperator(dense.matvec, 20, dtype=dtype, device=device, transpose=dense.matvec),
    }


KINDS = tuple(example_operators())
NATIVE_KINDS = tuple(kind for kind, operator in example_operators().items() if operator.is_native)


# --- solves ---


def expect(status: str, call: Callable[[], SolveResult]) -> SolveResult:
    """The result of a solve that must warn and end with this status."""
    with pytest.warns(RuntimeWarning, match=f"cg: .*{status}"):
        result = call()
    assert str(result.status) == status
    assert not result.converged
    return result


def solve(A: Any, b: Tensor, *args: Any, **options: Any) -> SolveResult:
    """A solve that must converge, with a residual that really is as small as promised."""
    result = cg(A, b, *args, **options)
    assert result.converged
    return result


def error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|, both flattened."""
    actual, expected = actual.detach().cpu().double().flatten(), expected.detach().cpu().double().flatten()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-300))
