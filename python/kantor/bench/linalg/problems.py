"""Symmetric positive definite systems: 3-D Poisson on a cube, and the finite element matrices that pyamg ships."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import numpy as np
    import scipy.sparse

PYAMG_EXAMPLES = (
    "airfoil",
    "bar",
    "helmholtz_2D",
    "knot",
    "local_disc_galerkin_diffusion",
    "recirc_flow",
    "unit_cube",
    "unit_square",
)
SYMMETRY_TOLERANCE = 1e-12  # relative to the largest entry
PIVOT_TOLERANCE = 1e-12  # relative to the largest pivot: a smaller one is a singular matrix's rounding


@dataclass(frozen=True)
class CsrArrays:
    """Compressed sparse rows with int32 indices, columns ascending in every row."""

    crow: torch.Tensor
    col: torch.Tensor
    values: torch.Tensor

    def torch(self) -> torch.Tensor:
        """The matrix as a torch sparse CSR tensor on the same memory."""
        n = self.crow.numel() - 1
        return torch.sparse_csr_tensor(self.crow, self.col, self.values, (n, n), check_invariants=False)

    def scipy(self) -> scipy.sparse.csr_array[Any]:
        """The matrix as a scipy CSR array on the same memory."""
        import scipy.sparse

        n = self.crow.numel() - 1
        matrix = scipy.sparse.csr_array((self.values.numpy(), self.col.numpy(), self.crow.numpy()), shape=(n, n))
        matrix.has_sorted_indices = True
        return matrix


@dataclass(frozen=True)
class Problem:
    """A x = b on one device in one dtype. `grid` is (nz, ny, nx) for Poisson, None for a general matrix."""

    name: str
    b: torch.Tensor
    grid: tuple[int, int, int] | None
    matrix: CsrArrays | None = field(default=None, repr=False)

    @property
    def n(self) -> int:
        """Number of unknowns."""
        return self.b.numel()

    @functools.cached_property
    def csr(self) -> CsrArrays:
        """The matrix in CSR; built on first use for a grid, since it takes far more memory than the vectors."""
        if self.matrix is not None:
            return self.matrix
        if self.grid is None:
            raise ValueError(f"csr: problem {self.name} has neither a grid nor a matrix")
        return poisson_csr(self.grid, self.b.dtype, self.b.device)

    def relative_residual(self, x: torch.Tensor) -> float:
        """|b - A x| / |b| with everything after x in float64."""
        b, x = self.b.double(), x.reshape(-1).double()
        if self.grid is not None:
            q = torch.empty_like(x)
            poisson_slices(x.view(self.grid), q.view(self.grid))
        else:
            arrays = self.csr
            q = torch.mv(CsrArrays(arrays.crow, arrays.col, arrays.values.double()).torch(), x)
        return float(torch.linalg.vector_norm(b - q) / torch.linalg.vector_norm(b))


def poisson(side: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """7-point Laplacian on a side^3 grid, Dirichlet boundary, unit spacing; b standard normal with a fixed seed."""
    generator = torch.Generator(device).manual_seed(0)
    b = torch.randn(side**3, dtype=dtype, device=device, generator=generator)
    return Problem(f"poisson3d-{side}", b, (side, side, side))


def poisson_slices(p: torch.Tensor, q: torch.Tensor) -> None:
    """q = A p for the 7-point Laplacian, in place and without temporaries: seven passes over shifted slices."""
    torch.mul(p, 6.0, out=q)
    q[1:].sub_(p[:-1])
    q[:-1].sub_(p[1:])
    q[:, 1:].sub_(p[:, :-1])
    q[:, :-1].sub_(p[:, 1:])
    q[:, :, 1:].sub_(p[:, :, :-1])
    q[:, :, :-1].sub_(p[:, :, 1:])


def poisson_csr(grid: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> CsrArrays:
    """The same operator in CSR, built on `device` by masking the seven diagonals of the full band."""
    nz, ny, nx = grid
    n = nz * ny * nx
    index = torch.arange(n, dtype=torch.int32, device=device)
    z, y, x = index // (ny * nx), index // nx % ny, index % nx
    inside = torch.stack(
        [z > 0, y > 0, x > 0, torch.ones_like(x, dtype=torch.bool), x < nx - 1, y < ny - 1, z < nz - 1]
    )
    del z, y, x
    inside = inside.T.contiguous()
    crow = torch.zeros(n + 1, dtype=torch.int32, device=device)
    torch.cumsum(inside.sum(1, dtype=torch.int32), 0, dtype=torch.int32, out=crow[1:])
    offsets = torch.tensor([-ny * nx, -nx, -1, 0, 1, nx, ny * nx], dtype=torch.int32, device=device)
    col = (index[:, None] + offsets)[inside]
    stencil = torch.tensor([-1, -1, -1, 6, -1, -1, -1], dtype=dtype, device=device)
    values = stencil.expand(n, 7)[inside]
    return CsrArrays(crow, col, values)


def pyamg_matrices() -> list[str]:
    """Names of the real, symmetric, positive definite matrices among pyamg's examples."""
    return [name for name in PYAMG_EXAMPLES if is_positive_definite(load_pyamg(name))]


def load_pyamg(name: str) -> scipy.sparse.csr_array[Any]:
    """One of pyamg's example matrices, in CSR with sorted int32 indices."""
    import scipy.sparse
    from pyamg.gallery import load_example

    matrix = scipy.sparse.csr_array(load_example(name)["A"])
    matrix.sum_duplicates()
    return matrix


def is_positive_definite(matrix: scipy.sparse.csr_array[Any]) -> bool:
    """Whether a real sparse matrix is symmetric and all pivots of its LDL' factorisation are positive.

    Sylvester's law of inertia: with symmetric pivoting the pivots have the signs of the eigenvalues.
    """
    import scipy.sparse.linalg

    if matrix.dtype.kind != "f" or matrix.shape[0] != matrix.shape[1]:
        return False
    if abs(matrix - matrix.T).max() > SYMMETRY_TOLERANCE * abs(matrix).max():
        return False
    factors = scipy.sparse.linalg.splu(
        matrix.tocsc(), permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True}
    )
    pivots: np.ndarray[Any, np.dtype[np.float64]] = factors.U.diagonal()
    same_order = bool((factors.perm_r == factors.perm_c).all())
    return same_order and float(pivots.min()) > PIVOT_TOLERANCE * float(pivots.max())


def pyamg_problem(name: str, dtype: torch.dtype, device: torch.device) -> Problem:
    """A x = b with one of pyamg's matrices; b standard normal with a fixed seed."""
    matrix = load_pyamg(name)
    arrays = CsrArrays(
        torch.from_numpy(matrix.indptr).to(device, torch.int32),
        torch.from_numpy(matrix.indices).to(device, torch.int32),
        torch.from_numpy(matrix.data).to(device, dtype),
    )
    generator = torch.Generator().manual_seed(0)
    b = torch.randn(matrix.shape[0], dtype=torch.float64, generator=generator).to(device, dtype)
    return Problem(name, b, None, arrays)


def make(name: str, dtype: torch.dtype, device: torch.device) -> Problem:
    """The problem called `name`: "poisson3d-<side>" or one of pyamg's examples."""
    if name.startswith("poisson3d-"):
        return poisson(int(name.removeprefix("poisson3d-")), dtype, device)
    return pyamg_problem(name, dtype, device)
