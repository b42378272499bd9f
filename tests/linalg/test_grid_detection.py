"""Grids behind matrices: what is recognised, what is refused, and that the operator is the matrix."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kantor.datasets import poisson_scenes as scenes
from kantor.linalg import CSR, Multigrid, PoissonGrid, Stencil, cg
from kantor.linalg.grid_detection import GridMatrix, NotAGridError, detect_grid, poisson_grid_of
from systems import F32, F64, csr_of, random

GRIDS = [(20, 24), (17, 40), (12, 13, 14)]


def line(n: int, ends: tuple[float, float] = (1.0, 1.0)) -> sp.csr_array:
    """Second differences; `ends` are the faces beyond the first and the last: 1 Dirichlet, 0 Neumann."""
    d = torch.full((n,), 2.0, dtype=F64).numpy()
    d[0], d[-1] = 1 + ends[0], 1 + ends[1]
    off = -torch.ones(n - 1, dtype=F64).numpy()
    return sp.diags_array([off, d, off], offsets=[-1, 0, 1], format="csr")


def box(*sizes: int, ends: dict[int, tuple[float, float]] | None = None) -> CSR:
    """Sum of second differences along every axis, Dirichlet unless `ends` of an axis say otherwise."""
    total = sp.csr_array((1, 1))
    for axis, n in enumerate(sizes):
        one = line(n, (ends or {}).get(axis, (1.0, 1.0)))
        total = sp.csr_array(sp.kron(total, sp.eye_array(n)) + sp.kron(sp.eye_array(total.shape[0]), one))
    return CSR.from_any(total)


def check(A: CSR, found: GridMatrix) -> None:
    """Every entry of the matrix, by its position in the grid; and what stands alone."""
    full = found.grid.to_csr(compressed=False).to_scipy()
    cells, rows = found.cells.numpy(), found.rows.numpy()
    matrix = A.to_scipy()
    difference = full[cells][:, cells] - matrix[rows][:, rows]
    assert abs(difference).max() <= 1e-14 * abs(matrix).max()
    assert len(set(cells.tolist())) == len(rows) == found.grid.num_unknowns
    alone = torch.ones(A.shape[0], dtype=torch.bool)
    alone[found.rows] = False
    assert abs(matrix[alone.numpy()] - sp.diags_array(matrix.diagonal()).tocsr()[alone.numpy()]).sum() == 0


# --- boxes ---


@pytest.mark.parametrize("sizes", [(8, 9), (2, 30), (30, 2), (9, 8, 7), (2, 2, 20), (20, 2, 2)])
def test_dirichlet_box(sizes: tuple[int, ...]) -> None:
    A = box(*sizes)
    found = detect_grid(A)
    assert found.grid.grid == tuple(n + 2 for n in sizes)
    assert found.grid.face_coef is None
    check(A, found)


@pytest.mark.parametrize("sizes", [(8, 9), (2, 30), (9, 8, 7)])
def test_neumann_box(sizes: tuple[int, ...]) -> None:
    A = box(*sizes, ends=dict.fromkeys(range(len(sizes)), (0.0, 0.0)))
    found = detect_grid(A)
    assert found.grid.grid == sizes
    assert bool(found.grid.mask.all())
    check(A, found)


@pytest.mark.parametrize("first", [(0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.0, 0.0)])
@pytest.mark.parametrize("last", [(0.0, 1.0), (1.0, 1.0), (0.0, 0.0)])
@pytest.mark.parametrize("sizes", [(8, 9), (6, 7, 8)])
def test_mixed_rims_stay_voxels(sizes: tuple[int, ...], first: tuple[float, float], last: tuple[float, float]) -> None:
    """Where a surface of air ends at a wall, the corner has one face towards air, not two halves."""
    ends = {0: first, len(sizes) - 1: last} | ({1: (0.0, 0.0)} if len(sizes) == 3 else {})
    A = box(*sizes, ends=ends)
    found = detect_grid(A)
    assert found.grid.face_coef is None
    expected = [n + round(sum(ends.get(axis, (1.0, 1.0)))) for axis, n in enumerate(sizes)]
    assert found.grid.grid == tuple(expected)
    check(A, found)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("boundary", ["dirichlet", "neumann"])
def test_stencils(grid: tuple[int, ...], boundary: str) -> None:
    A = Stencil(grid, boundary=boundary).to_csr()
    check(A, detect_grid(A))


@pytest.mark.parametrize("factor", [1e-12, 0.3, 1 / 3, 4096.0, 1e20])
def test_common_factor(factor: float) -> None:
    A = box(12, 10)
    scaled = CSR(A.crow, A.col, A.values * factor, A.shape)
    found = detect_grid(scaled)
    assert found.grid.face_coef is None
    assert found.grid.spacing == pytest.approx(factor**-0.5, rel=1e-14)
    check(scaled, found)


@given(seed=st.integers(0, 2**31), sizes=st.lists(st.integers(2, 7), min_size=2, max_size=3))
@settings(max_examples=40, deadline=None)
def test_variable_coefficients(seed: int, sizes: list[int]) -> None:
    """Faces of any size, rims open or closed cell by cell."""
    generator = torch.Generator().manual_seed(seed)
    grid = tuple(n + 2 for n in sizes)
    flags = torch.where(torch.rand(grid, generator=generator) < 0.5, 0, 3)
    flags[tuple(slice(1, -1) for _ in grid)] = 2
    faces = [
        torch.rand([n + (a == axis) for a, n in enumerate(grid)], generator=generator, dtype=F64) + 0.01
        for axis in range(len(grid))
    ]
    A = PoissonGrid(flags, face_coef=faces).to_csr()
    found = detect_grid(A)
    assert found.grid.face_coef is not None
    check(A, found)


# --- masked grids ---


def open_grids() -> list[tuple[str, tuple[int, ...]]]:
    return [(name, grid) for name in scenes.SCENES for grid in GRIDS]


@pytest.mark.parametrize(("name", "grid"), open_grids())
def test_scenes_with_all_their_cells(name: str, grid: tuple[int, ...]) -> None:
    A = PoissonGrid(scenes.SCENES[name](grid), spacing=0.1).to_csr(compressed=False)
    check(A, detect_grid(A))


@pytest.mark.parametrize(("name", "grid"), open_grids())
def test_scenes_with_their_unknowns_alone(name: str, grid: tuple[int, ...]) -> None:
    A = PoissonGrid(scenes.SCENES[name](grid), spacing=0.1).to_csr()
    if len(grid) == 3 and name in ("labyrinth", "droplets"):  # too few squares to tell the axes: refused, never wrong
        found = poisson_grid_of(A)
        if found is None:
            return
    else:
        found = detect_grid(A)
    check(A, found)


@given(seed=st.integers(0, 2**31), dense=st.floats(0.3, 0.95), dims=st.sampled_from([2, 3]))
@settings(max_examples=60, deadline=None)
def test_random_masks_are_exact_or_refused(seed: int, dense: float, dims: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand([6, 7, 5][:dims], generator=generator)
    flags = torch.where(u < dense, 2, torch.where(u < (1 + dense) / 2, 3, 0))
    flags[(0,) * dims] = 2
    for compressed in (True, False):
        A = PoissonGrid(flags).to_csr(compressed=compressed)
        found = poisson_grid_of(A)
        if found is not None:
            check(A, found)


@pytest.mark.parametrize("grid", [(30, 26), (14, 15, 16)])
@pytest.mark.parametrize("compressed", [True, False])
def test_solution_is_that_of_the_matrix(grid: tuple[int, ...], compressed: bool) -> None:
    A = PoissonGrid(scenes.smoke_balls(grid)).to_csr(compressed=compressed)
    b = random(3, A.shape[0])
    found = detect_grid(A)
    result = cg(found.grid, found.expand(b), M=Multigrid(found.grid), rtol=1e-11)
    x = found.compress(result.x, b)
    assert result.iterations < 25
    torch.testing.assert_close(A.matvec(x), b, rtol=0, atol=1e-9)


def test_float32() -> None:
    faces = [torch.rand(13, 10, dtype=F64) + 0.1, torch.rand(12, 11, dtype=F64) + 0.1]
    flags = torch.full((12, 10), 2)
    flags[-1] = 3
    A = PoissonGrid(flags, face_coef=faces).to_csr().to(F32)
    found = detect_grid(A)
    assert found.grid.dtype is F32
    b = random(A.shape[0], dtype=F32)
    product = found.grid.matvec(found.expand(b))
    torch.testing.assert_close(product[found.cells], A.matvec(b)[found.rows], rtol=1e-4, atol=1e-5)


def test_explicit_zeros_are_no_links() -> None:
    A = PoissonGrid(scenes.smoke_sphere((16, 16))).to_csr()
    i, j = torch.tensor([3, 40]), torch.tensor([40, 3])
    rows = torch.repeat_interleave(torch.arange(A.shape[0]), A.crow.diff())
    padded = CSR.from_coo(
        torch.cat([rows, i]), torch.cat([A.col.long(), j]), torch.cat([A.values, torch.zeros(2, dtype=F64)]), A.shape
    )
    assert padded.nnz == A.nnz + 2
    check(padded, detect_grid(padded))


# --- what is no grid ---


def changed(A: CSR, change: Callable[[Tensor], object]) -> CSR:
    dense = A.dense()
    change(dense)
    return csr_of(dense)


def periodic(dense: Tensor) -> None:
    for row in range(0, 80, 10):
        dense[row, row + 9] = dense[row + 9, row] = -1.0


def set_pair(i: int, j: int, value: float) -> Callable[[Tensor], None]:
    def change(dense: Tensor) -> None:
        dense[i, j] = dense[j, i] = value

    return change


def add_to_diagonal(row: int, value: float) -> Callable[[Tensor], None]:
    def change(dense: Tensor) -> None:
        dense[row, row] += value

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (periodic, "the links are not those"),
        (set_pair(3, 4, 1.0), "entry (3, 4) is positive"),
        (set_pair(14, 25, -0.5), "sums to -0.5"),
        (set_pair(14, 15, 0.0), "the links are not those"),
        (set_pair(14, 15, -0.999), "more than its links explain"),
        (add_to_diagonal(44, 1e-9), "more than its links explain"),
        (add_to_diagonal(44, -1e-9), "row 44 sums to -1e-09"),
        (add_to_diagonal(44, -9.0), "row 44"),
        (lambda dense: dense.diagonal().add_(0.1), "more than its links explain"),
    ],
)
def test_one_change_is_noticed(change: Callable[[Tensor], object], reason: str) -> None:
    A = changed(box(8, 10), change)
    with pytest.raises(NotAGridError, match=re.escape(reason)):
        detect_grid(A)
    assert poisson_grid_of(A) is None


def test_other_matrices_are_refused() -> None:
    A = box(8, 10)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    shuffled = changed(A, lambda dense: dense.copy_(dense.clone()[order][:, order]))
    nine = CSR.from_any(sp.csr_array(sp.kron(line(8), line(10))))
    star = torch.diag(torch.full((9,), 8.0, dtype=F64))
    star[0, 1:] = star[1:, 0] = -1.0
    chain = CSR.from_any(line(50))
    identity = CSR.from_any(sp.eye_array(50, format="csr"))
    for matrix, reason in (
        (shuffled, "a row has links|the links are not those"),
        (nine, "is positive"),
        (csr_of(star), "on one side of the diagonal"),
        (chain, "a chain"),
        (identity, "is diagonal"),
        (CSR.from_any(sp.csr_array(torch.ones(2, 3, dtype=F64).numpy())), "2 x 3"),
        (changed(A, lambda dense: dense[3, 4].mul_(1.01)), "not symmetric"),
    ):
        with pytest.raises(NotAGridError, match=reason):
            detect_grid(matrix)


def test_only_csr() -> None:
    with pytest.raises(TypeError, match=r"detect_grid: A: expected a CSR matrix, got PoissonGrid; use CSR.from_any"):
        detect_grid(PoissonGrid(torch.full((4, 4), 2)))  # type: ignore[arg-type]


def test_input_is_left_alone() -> None:
    A = PoissonGrid(scenes.smoke_sphere((16, 16))).to_csr()
    before = A.values.clone(), A.col.clone(), A.crow.clone()
    detect_grid(A)
    for one, other in zip(before, (A.values, A.col, A.crow), strict=True):
        assert torch.equal(one, other)
