"""Finding the voxel grid behind a sparse matrix, so that multigrid can be used where only the matrix is known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from kantor._checks import host
from kantor.linalg import _native
from kantor.linalg._grid_positions import Links, NotAGridError, box, fits, masked, occupied
from kantor.linalg.csr import CSR
from kantor.linalg.poisson_grid import AIR, FLUID, SOLID, PoissonGrid

_ROUNDING = 32  # units in the last place of a diagonal entry: it is the sum of up to six rounded numbers


@dataclass(frozen=True)
class GridMatrix:
    """A matrix written as a :class:`PoissonGrid`, up to the order of the unknowns; see :func:`detect_grid`.

    Attributes
    ----------
    grid : PoissonGrid
        The operator: ``grid.to_csr()`` and the matrix have the same entries, to rounding.
    rows : Tensor
        ``(m,)``, int64: the rows of the matrix that are coupled to others.
    cells : Tensor
        ``(m,)``, int64: their cells, flat indices of the grid.
    diagonal : Tensor
        ``(n,)``: the diagonal of the matrix; rows that stand alone are solved by dividing by it.
    contrast : float
        Largest over smallest coefficient between unknowns. Multigrid slows down with it, incomplete Cholesky less so.
    """

    grid: PoissonGrid
    rows: Tensor
    cells: Tensor
    diagonal: Tensor
    contrast: float

    def expand(self, b: Tensor) -> Tensor:
        """Return right-hand sides ``(..., n)`` of the matrix as those of the grid, ``(..., cells of the grid)``."""
        spread = b.new_zeros((*b.shape[:-1], self.grid.shape[0]))
        return spread.index_copy(-1, self.cells, b.index_select(-1, self.rows))

    def compress(self, x: Tensor, b: Tensor) -> Tensor:
        """Return the solution of the matrix for `b`, ``(..., n)``, from that of the grid."""
        return (b / self.diagonal).index_copy(-1, self.rows, x.index_select(-1, self.cells))


def poisson_grid_of(A: CSR) -> GridMatrix | None:
    """Return the :class:`PoissonGrid` whose matrix `A` is, or None; see :func:`detect_grid`."""
    try:
        return detect_grid(A)
    except NotAGridError:
        return None


def detect_grid(A: CSR) -> GridMatrix:
    """Find the voxel grid whose five- or seven-point Poisson matrix `A` is.

    Recognised are

    - boxes with all their cells, in C or Fortran order: the links join rows at the distances 1, nx and nx ny. Rows that
      stand alone (the identity in cells that are no unknowns) may be anywhere;
    - the fluid cells of a masked grid alone, in C order, as ``PoissonGrid.to_csr()`` gives them. Which way a link goes
      follows from the order of the rows, and from opposite sides of squares being parallel.

    Coefficients may be constant or not, rims Dirichlet, Neumann or mixed. What a row has on its diagonal beyond its
    links must be a face towards air, so the row needs a cell beside it that is no unknown: the matrix of
    ``-Laplace + c`` is refused.

    Parameters
    ----------
    A : CSR
        Symmetric ``(n, n)``, float32 or float64.

    Returns
    -------
    GridMatrix
        The grid, on the device and in the dtype of `A`, and which row is which cell. Not differentiable.

    Raises
    ------
    NotAGridError
        `A` is something else, or the order of its rows does not show the grid.
    TypeError
        `A` is not a CSR matrix.

    Notes
    -----
    O(n) memory, O(n log n) time, on the host. Deterministic. Exact: the operator of the grid is that of the matrix to
    rounding, or it is refused. For masked grids needs scipy (extra ``cli``).

    Examples
    --------
    >>> import torch
    >>> from kantor.linalg import Multigrid, PoissonGrid, cg
    >>> from kantor.linalg.grid_detection import detect_grid
    >>> flags = torch.full((40, 30), 2)
    >>> flags[-1] = 3
    >>> A = PoissonGrid(flags).to_csr()  # a matrix from elsewhere, say
    >>> found = detect_grid(A)
    >>> found.grid
    PoissonGrid(40 x 30, 1170 unknowns, float64, cpu)
    >>> b = torch.ones(1170, dtype=torch.float64)
    >>> result = cg(found.grid, found.expand(b), M=Multigrid(found.grid), rtol=1e-8)
    >>> x = found.compress(result.x, b)
    >>> bool((A @ x - b).norm() <= 2e-8 * b.norm())
    True
    """
    if not isinstance(A, CSR):
        raise TypeError(f"detect_grid: A: expected a CSR matrix, got {type(A).__name__}; use CSR.from_any")
    links, diagonal = _read(A)
    n = diagonal.numel()
    sums = links.sums(n)
    excess = diagonal - sums
    tolerance = _ROUNDING * torch.finfo(A.dtype).eps * diagonal
    if bool((excess < -tolerance).any()):
        row = int((excess < -tolerance).nonzero()[0])
        raise NotAGridError(f"row {row} sums to {float(excess[row]):.3g}, less than zero")
    excess = torch.where(excess <= tolerance, torch.zeros_like(excess), excess)

    rows = (sums > 0).nonzero().squeeze(-1)
    if rows.numel() == 0:
        raise NotAGridError("the matrix is diagonal")
    rank = torch.empty(n, dtype=torch.int64)
    rank[rows] = torch.arange(rows.numel())
    links = Links(rank[links.first], rank[links.second], links.weight)
    position = box(rows, links, n)
    if position is None or not fits(position, links):
        position = masked(rows, links)
    if not fits(position, links):
        raise NotAGridError("the links are not those of neighbours in a grid, or not in its order")
    if bool((position == position[0]).all(0).sum() >= position.shape[1] - 1):
        raise NotAGridError("a chain, whose incomplete Cholesky factor is exact")
    grid, cells = _grid(position + 1, links, excess[rows], tolerance[rows], A.dtype)
    error = (grid.diagonal()[cells].double() - diagonal[rows]).abs()
    if bool((error > 2 * tolerance[rows]).any()):
        raise NotAGridError("the diagonal is not that of a grid")
    if A.device.type != "cpu":
        grid = PoissonGrid(grid.flags.to(A.device), spacing=grid.spacing, face_coef=_moved(grid, A), dtype=A.dtype)
    contrast = float(links.weight.max() / links.weight.min())
    return GridMatrix(grid, rows.to(A.device), cells.to(A.device), diagonal.to(A.device, A.dtype), contrast)


def _moved(grid: PoissonGrid, A: CSR) -> list[Tensor] | None:
    return None if grid.face_coef is None else [c.to(A.device) for c in grid.face_coef]


def _read(A: CSR) -> tuple[Links, Tensor]:
    """Links and diagonal, float64 on the host; explicit zeros are no links."""
    n = A.shape[0]
    if A.shape[1] != n or n == 0:
        raise NotAGridError(f"the matrix is {A.shape[0]} x {A.shape[1]}")
    relative, where = A.asymmetry()
    if relative > _ROUNDING * torch.finfo(A.dtype).eps:
        raise NotAGridError(f"the matrix is not symmetric: {where}")
    crow, col, values = host(A.crow), host(A.col).long(), host(A.values).double()
    row = _native.csr_rows(crow, col.numel())
    on, above = col == row, (col > row) & (values != 0)
    diagonal = torch.zeros(n, dtype=torch.float64).index_add(0, row[on], values[on])
    links = Links(row[above], col[above], -values[above])
    if bool((links.weight < 0).any()):
        k = int((links.weight < 0).nonzero()[0])
        raise NotAGridError(f"entry ({int(links.first[k])}, {int(links.second[k])}) is positive")
    if not bool((diagonal > 0).all()):
        row_found = int((diagonal <= 0).nonzero()[0])
        raise NotAGridError(f"the diagonal of row {row_found} is {float(diagonal[row_found]):.3g}")
    return links, diagonal


# Which cells around the unknowns are air ----------------------------------------------------------------------------


def _grid(
    position: Tensor, links: Links, excess: Tensor, tolerance: Tensor, dtype: torch.dtype
) -> tuple[PoissonGrid, Tensor]:
    """The grid with what is beside the unknowns, and their cells; `position` leaves a margin of one cell before."""
    fluid = occupied(position)
    fluid = pad(fluid, [0, 1] * fluid.ndim)
    where = position.unbind(-1)
    scale = float(links.weight.mean())
    faces_needed = torch.zeros(fluid.shape, dtype=torch.int64)
    faces_needed[where] = (excess / scale).round().long()
    unit = bool(((links.weight - scale).abs() <= tolerance.max()).all())
    unit = unit and bool(((excess - scale * faces_needed[where].double()).abs() <= tolerance).all())
    air = _air(fluid, faces_needed) if unit else None
    spread = torch.zeros(fluid.shape, dtype=torch.float64)
    if air is None:
        faces_needed = torch.zeros_like(faces_needed)
        faces_needed[where] = (excess > 0).long()
        air = _candidates(fluid, faces_needed)
        beside = sum(_beside(air), torch.zeros_like(faces_needed))
        if bool((faces_needed > beside).any()):
            cell = int(((faces_needed > beside)[where]).nonzero()[0])
            raise NotAGridError(f"{float(excess[cell]):.3g} on the diagonal of a row is more than its links explain")
        spread[where] = excess / beside[where].clamp(min=1)  # any division among its faces gives the same matrix
        unit = False
    flags = torch.full(fluid.shape, SOLID, dtype=torch.uint8)
    flags[fluid], flags[air] = FLUID, AIR
    low, high = (f((flags != SOLID).nonzero(), 0).values for f in (torch.min, torch.max))
    crop = tuple(slice(int(a), int(b) + 1) for a, b in zip(low, high, strict=True))
    faces = None if unit else [c.to(dtype) for c in _coefficients(position, links, spread, fluid, crop)]
    shape = torch.tensor(flags[crop].shape)
    strides = torch.tensor([math.prod(shape[a + 1 :].tolist()) for a in range(len(shape))])
    cells = ((position - low) * strides).sum(-1)
    spacing = 1 / math.sqrt(scale) if unit else 1.0
    return PoissonGrid(flags[crop].clone(), spacing=spacing, face_coef=faces, dtype=dtype), cells


def _coefficients(
    position: Tensor, links: Links, spread: Tensor, fluid: Tensor, crop: tuple[slice, ...]
) -> list[Tensor]:
    """Face coefficients: the links' weights between unknowns, `spread` of the unknown towards air."""
    faces = []
    step = position[links.second] - position[links.first]
    for axis, n in enumerate(fluid.shape):
        widths = [0, 0] * (fluid.ndim - 1 - axis) + [0, 1]
        c = pad(spread, widths)
        c.narrow(axis, 1, n).add_(spread)
        along = step[:, axis] == 1
        c[position[links.second[along]].unbind(-1)] = links.weight[along]
        wider = tuple(slice(s.start, s.stop + (a == axis)) for a, s in enumerate(crop))
        faces.append(torch.where(c[wider] > 0, c[wider], torch.ones((), dtype=torch.float64)))
    return faces


def _beside(values: Tensor) -> list[Tensor]:
    """The values of the neighbours on every side; zero outside. Integers, shaped like `values`."""
    shifted = []
    for axis in range(values.ndim):
        before, after = [[0, 0] * (values.ndim - 1 - axis) + side for side in ([1, 0], [0, 1])]
        n = values.shape[axis]
        numbers = values.long()
        shifted += [pad(numbers, before).narrow(axis, 0, n), pad(numbers, after).narrow(axis, 1, n)]
    return shifted


def _candidates(fluid: Tensor, faces_needed: Tensor) -> Tensor:
    """Cells that may be air: beside an unknown, and every unknown beside them needs faces towards air."""
    any_fluid = sum(_beside(fluid), torch.zeros_like(faces_needed)) > 0
    any_closed = sum(_beside(fluid & (faces_needed == 0)), torch.zeros_like(faces_needed)) > 0
    return ~fluid & any_fluid & ~any_closed


def _air(fluid: Tensor, faces_needed: Tensor) -> Tensor | None:
    """Cells of air such that every unknown has just as many beside it as it needs; None where that is not found.

    At the end of a free surface, say in a corner, a cell needs one face but has a wall beside it that could be air too.
    The candidate with more of its kind beside it is the surface; the others become solid, and so on.
    """
    air = _candidates(fluid, faces_needed)
    for _ in range(4):
        beside = _beside(air)
        count = sum(beside, torch.zeros_like(faces_needed)) * fluid
        if bool((count < faces_needed).any()):
            return None
        if torch.equal(count, faces_needed):
            return air
        company = (sum(beside, torch.zeros_like(faces_needed)) + 1) * air
        around = _beside(company)
        most = torch.stack(around).amax(0)
        for side, values in enumerate(around):
            drop = (count > faces_needed) & (values > 0) & (values < most)
            # From the unknown back to the candidate on that side of it.
            air = air & ~(_beside(drop)[side ^ 1] > 0)
    return None


__all__ = ["GridMatrix", "NotAGridError", "detect_grid", "poisson_grid_of"]
