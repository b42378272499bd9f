"""Poisson problems on voxel grids with solids and free surfaces, as operators."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kantor import _C
from kantor._checks import check_float, check_same, check_tensor, host, is_readable
from kantor.linalg._native import DIAGONAL, FACES, POISSON, Encoded
from kantor.linalg._operator import LinearOperator

if TYPE_CHECKING:
    from kantor.linalg.csr import CSR
    from kantor.linalg.multigrid import Multigrid

SOLID, FLUID, AIR = 0, 2, 3


class PoissonGrid(LinearOperator):
    """Pressure Poisson operator of a marker-and-cell grid: five points in two dimensions, seven in three.

    Unknowns are the FLUID cells. A face towards SOLID carries no flux (homogeneous Neumann), and so does the rim of the
    array; an AIR cell holds p = 0 at its centre (homogeneous Dirichlet). With grid spacing h

        ``(A p)_i = 1/h**2 sum_j c_ij (p_i - p_j)``   over the face neighbours j that are not SOLID, p_j = 0 in AIR.

    Vectors are grid shaped ``(..., *grid)`` or flat ``(..., n)`` and hold all cells; those that are not FLUID are
    ignored on input and zero on output. Symmetric; positive definite unless some connected component of the fluid
    touches no AIR: then constants on it are its null space, solvers need right-hand sides whose sum over the component
    vanishes, and return the solution of zero mean there.

    Parameters
    ----------
    flags : Tensor
        ``(ny, nx)`` or ``(nz, ny, nx)``, integers: SOLID = 0, FLUID = 2, AIR = 3.
    spacing : float
        Grid spacing h.
    face_coef : sequence of Tensor, optional
        Coefficients c of the faces, ``(cz, cy, cx)`` or ``(cy, cx)``, shaped like the grid with one more entry along
        their own axis; entry i is the face between cells i - 1 and i. Positive and finite; faces at SOLID cells and on
        the rim are not read. Default: one everywhere. Solutions are differentiable with respect to them.
    dtype : torch.dtype, optional
        float32 or float64; default that of ``face_coef``, else float64.
    device : torch.device, optional
        Default: that of `flags`.

    Attributes
    ----------
    flags : Tensor
        As given, uint8.
    mask : Tensor
        Whether each cell is an unknown, bool, shaped like the grid.
    num_unknowns : int
        Number of FLUID cells.
    cells : Tensor
        Per cell its links and its diagonal, uint8 ``(*grid, 2)``, as native code takes them (csrc/linalg/operator.h).
    closed_components : tuple of Tensor and int
        The components of the fluid that touch no AIR, numbered in the order of their first cells: int32 like the grid,
        -1 elsewhere, and how many there are.

    Raises
    ------
    TypeError
        `flags` is not an integer tensor, or a dtype is not float32 or float64.
    ValueError
        Flags other than 0, 2, 3; no FLUID cell; shapes that do not fit; coefficients that are not positive and finite.

    Notes
    -----
    Two bytes a cell beside the vectors (without coefficients), 4 words with. The discretisation is the usual one of
    fluid simulation: McAdams, Sifakis, Teran, *A parallel multigrid Poisson solver for fluids simulation on large
    grids*, 2010; Kaneda et al., *A Deep Conjugate Direction Method for Iteratively Solving Linear Systems*, 2023.

    Examples
    --------
    >>> import torch
    >>> from kantor.linalg import PoissonGrid, cg
    >>> flags = torch.full((16, 16), 2)
    >>> flags[0] = 3  # a free surface above
    >>> flags[6:9, 5:9] = 0  # and a block in the middle
    >>> A = PoissonGrid(flags)
    >>> b = torch.ones(16, 16, dtype=torch.float64)
    >>> p = cg(A, b, rtol=1e-10).x
    >>> bool((A.matvec(p) - b)[A.mask].norm() <= 1e-10 * b[A.mask].norm())
    True
    """

    grid: tuple[int, ...]

    def __init__(
        self,
        flags: Tensor,
        *,
        spacing: float = 1.0,
        face_coef: Sequence[Tensor] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self._check_flags(flags)
        # h and 1/h^2 both in the range of float32.
        if not (isinstance(spacing, int | float) and 1e-18 <= spacing <= 1e18):
            raise ValueError(f"PoissonGrid: spacing: expected a number from 1e-18 to 1e18, got {spacing!r}")
        flags = flags if device is None else flags.to(device)
        self.flags = flags.to(torch.uint8, copy=True, memory_format=torch.contiguous_format)
        self.mask = self.flags == FLUID
        self.num_unknowns = int(self.mask.sum())
        if self.num_unknowns == 0:
            raise ValueError("PoissonGrid: flags: there is no fluid cell (2): nothing to solve for")
        self.spacing = float(spacing)
        self.grid = tuple(flags.shape)
        self.shape = (flags.numel(), flags.numel())
        self.device = flags.device
        self.cells = self._cells()
        self.closed_components = self._closed_components()
        self._component_sizes = self._count_components()
        self.face_coef = None if face_coef is None else self._checked_coefficients(face_coef)
        self.dtype = dtype or (self.face_coef[0].dtype if self.face_coef else torch.float64)
        check_float(torch.empty(0, dtype=self.dtype), "PoissonGrid", "dtype")
        if self.face_coef is not None:
            self.face_coef = tuple(c.to(self.dtype) for c in self.face_coef)

    @staticmethod
    def _check_flags(flags: Tensor) -> None:
        check_tensor(flags, "PoissonGrid", "flags")
        if flags.is_floating_point() or flags.is_complex() or flags.dtype is torch.bool:
            raise TypeError(
                f"PoissonGrid: flags: expected integers (0 solid, 2 fluid, 3 air), got {flags.dtype}; "
                "call .to(torch.uint8)"
            )
        if flags.ndim not in (2, 3) or min(flags.shape) < 1:
            raise ValueError(
                f"PoissonGrid: flags: expected shape (ny, nx) or (nz, ny, nx), got {tuple(flags.shape)}; make one "
                "operator for each grid of a batch"
            )
        known = (flags == SOLID) | (flags == FLUID) | (flags == AIR)
        if not bool(known.all()):
            where = tuple(int(i) for i in (~known).nonzero()[0])
            raise ValueError(
                f"PoissonGrid: flags: expected 0 (solid), 2 (fluid) or 3 (air), got {int(flags[where])} at {where}"
            )

    def _checked_coefficients(self, face_coef: Sequence[Tensor]) -> tuple[Tensor, ...]:
        names = ("cz", "cy", "cx")[-len(self.grid) :]
        if not isinstance(face_coef, list | tuple):
            raise TypeError(
                f"PoissonGrid: face_coef: expected {len(names)} tensors ({', '.join(names)}), "
                f"got {type(face_coef).__name__}"
            )
        if len(face_coef) != len(names):
            raise ValueError(f"PoissonGrid: face_coef: expected {len(names)} tensors, got {len(face_coef)}")
        pairs = list(zip(names, face_coef, strict=True))
        for axis, (name, c) in enumerate(pairs):
            check_tensor(c, "PoissonGrid", f"face_coef {name}")
            check_float(c, "PoissonGrid", f"face_coef {name}")
            expected = tuple(n + (a == axis) for a, n in enumerate(self.grid))
            if tuple(c.shape) != expected:
                raise ValueError(
                    f"PoissonGrid: face_coef {name}: expected shape {expected} for the grid {self.grid}, "
                    f"got {tuple(c.shape)}"
                )
        check_same("PoissonGrid", [("flags", torch.empty(0, dtype=face_coef[0].dtype, device=self.device)), *pairs])
        coefficients = tuple(face_coef)
        for axis, (name, c) in enumerate(pairs):
            if not is_readable(c):
                continue
            read = c.detach()[self._links(axis) | self._openings(axis)]
            if not bool(((read > 0) & read.isfinite()).all()):
                raise ValueError(
                    f"PoissonGrid: face_coef {name}: expected positive finite values between fluid cells and towards "
                    "air; close a face by a SOLID cell"
                )
        return coefficients

    def _sides(self, axis: int) -> tuple[Tensor, Tensor]:
        """Flags on both sides of every face along `axis`; outside the array is SOLID."""
        rim = torch.zeros_like(self.flags.narrow(axis, 0, 1))
        return torch.cat([rim, self.flags], axis), torch.cat([self.flags, rim], axis)

    def _links(self, axis: int) -> Tensor:
        """Faces between two FLUID cells."""
        before, after = self._sides(axis)
        return (before == FLUID) & (after == FLUID)

    def _openings(self, axis: int) -> Tensor:
        """Faces between FLUID and AIR."""
        before, after = self._sides(axis)
        return (before + after) == FLUID + AIR

    def _cells(self) -> Tensor:
        links = self.mask.byte() * 64
        diagonal = torch.zeros_like(self.flags)
        for axis, n in enumerate(self.grid):
            first_bit = 0 if axis == 0 else 4 if axis == len(self.grid) - 1 else 2
            link, opening = self._links(axis).byte(), self._openings(axis).byte()
            before, after = link.narrow(axis, 0, n), link.narrow(axis, 1, n)
            links += (before << first_bit) + (after << (first_bit + 1))
            diagonal += before + after + opening.narrow(axis, 0, n) + opening.narrow(axis, 1, n)
        return torch.stack([links, diagonal * self.mask], -1)

    def coefficients(self) -> tuple[list[Tensor], Tensor]:
        """Return the faces between unknowns and the Dirichlet diagonal: c per axis (zero elsewhere), d like the grid.

        ``(A p)_i = 1/h**2 (d_i p_i + sum_j c_ij (p_i - p_j))`` over the faces of cell i. Differentiable in `face_coef`.
        """
        faces, d = [], torch.zeros(self.grid, dtype=self.dtype, device=self.device)
        for axis, n in enumerate(self.grid):
            link, opening = self._links(axis).to(self.dtype), self._openings(axis).to(self.dtype)
            if self.face_coef is not None:
                # where, not a product: coefficients that are not read may be anything.
                c = self.face_coef[axis]
                link, opening = (torch.where(part > 0, c, part) for part in (link, opening))
            faces.append(link)
            d = d + (opening.narrow(axis, 0, n) + opening.narrow(axis, 1, n)) * self.mask
        return faces, d

    @property
    def _native_grid(self) -> list[int]:
        """The grid as (nz, ny, nx): a two-dimensional one (ny, nx) becomes (ny, 1, nx)."""
        return list(self.grid) if len(self.grid) == 3 else [self.grid[0], 1, self.grid[1]]

    def encode(self) -> Encoded:
        """Two bytes a cell, or one term for the faces and one for the Dirichlet diagonal."""
        native_grid = self._native_grid
        scale = 1 / self.spacing**2
        if self.face_coef is None:
            return Encoded([self.cells], [POISSON, *native_grid], [scale])
        faces, d = self.coefficients()
        operands = [d.new_zeros(1), *(c.contiguous() for c in faces), d.reshape(-1)]
        layout = [FACES, *native_grid, len(self.grid), DIAGONAL, self.shape[0]]
        return Encoded(operands, layout, [scale, scale])

    def _closed_components(self) -> tuple[Tensor, int]:
        labels = torch.empty(self.grid, dtype=torch.int32)
        count = _C.closed_components(host(self.cells), labels, *self._native_grid)
        return labels.to(self.device), count

    def admit(self, b: Tensor, name: str) -> Tensor:
        """Return the right-hand side on the fluid alone, with zero mean over every closed component.

        Raises
        ------
        ValueError
            The sum over a closed component is more than rounding: ``|sum b| > 1e-6 sum |b|``.
        """
        b = self.confined(b)
        count = self.closed_components[1]
        if count == 0:
            return b
        sums, sizes = self._component_sums(b), self._component_sums(b.detach().abs())
        if is_readable(b):
            tolerance = max(1e-6, 100 * torch.finfo(b.dtype).eps)
            incompatible = sums.detach().abs() > tolerance * sizes
            if bool(incompatible.any()):
                component = int(incompatible.reshape(-1, count).any(0).nonzero()[0])
                cells, first = self._component(component)
                raise ValueError(
                    f"{name}: b: its sum over closed component {component} ({cells} cells, first at {first}) is "
                    f"{float(sums.detach().reshape(-1, count)[:, component].abs().max()):.3g}, expected 0: no air "
                    "touches it, so what flows in must flow out; subtract the mean of b over the component"
                )
        return self._without_means(b, sums)

    def settle(self, x: Tensor) -> Tensor:
        """Return the solution that has zero mean over every closed component."""
        x = self.confined(x)
        if self.closed_components[1] == 0:
            return x
        return self._without_means(x, self._component_sums(x))

    def confined(self, v: Tensor) -> Tensor:
        """Flat vectors on the fluid alone; its derivative confines what derivatives are solved for."""
        return torch.where(self._flat_mask, v, v.new_zeros(()))

    @property
    def _flat_mask(self) -> Tensor:
        return self.mask.reshape(-1)

    def _apply(self, x: Tensor) -> Tensor:
        # Coefficients of zero would let NaN through; voxels skip what is not linked.
        return super()._apply(x if self.face_coef is None else self.confined(x))

    def _component_sums(self, v: Tensor) -> Tensor:
        labels, count = self.closed_components
        index = labels.reshape(-1).long() + 1  # 0: what belongs to none
        sums = v.new_zeros((*v.shape[:-1], count + 1)).index_add(-1, index, v)
        return sums[..., 1:]

    def _count_components(self) -> Tensor:
        """Cells of each closed component."""
        labels, count = self.closed_components
        return torch.bincount(labels.reshape(-1).long() + 1, minlength=count + 1)[1:]

    def _component(self, number: int) -> tuple[int, tuple[int, ...]]:
        """The size of a closed component and its first cell."""
        first = (self.closed_components[0] == number).nonzero()[0]
        return int(self._component_sizes[number]), tuple(int(i) for i in first)

    def _without_means(self, v: Tensor, sums: Tensor) -> Tensor:
        index = self.closed_components[0].reshape(-1).long()
        means = torch.nn.functional.pad(sums / self._component_sizes.to(v.dtype), (1, 0))
        return v - means.index_select(-1, index + 1)

    @property
    def T(self) -> PoissonGrid:  # noqa: N802
        """Itself: the operator is symmetric."""
        return self

    def diagonal(self) -> Tensor:
        """Return the main diagonal, flat; zero outside the fluid."""
        if self.face_coef is None:
            total = self.cells[..., 1].to(self.dtype)
        else:
            faces, total = self.coefficients()
            for axis, face in enumerate(faces):
                n = self.grid[axis]
                total = total + face.narrow(axis, 0, n) + face.narrow(axis, 1, n)
        return total.reshape(-1) / self.spacing**2

    def compress(self, x: Tensor) -> Tensor:
        """Return the unknowns of a vector ``(..., *grid)`` or ``(..., n)`` as ``(..., num_unknowns)``, in C order."""
        self._check_grid_vector(x, "compress")
        flat = x.flatten(-len(self.grid)) if tuple(x.shape[-len(self.grid) :]) == self.grid else x
        return flat.index_select(-1, self._unknowns)

    def expand(self, v: Tensor) -> Tensor:
        """Return ``(..., num_unknowns)`` spread over the grid, ``(..., *grid)``, zero outside the fluid."""
        check_tensor(v, "PoissonGrid.expand", "v")
        if v.ndim == 0 or v.shape[-1] != self.num_unknowns:
            raise ValueError(f"PoissonGrid.expand: v: expected shape (..., {self.num_unknowns}), got {tuple(v.shape)}")
        flat = v.new_zeros((*v.shape[:-1], self.shape[0])).index_copy(-1, self._unknowns, v)
        expanded: Tensor = flat.unflatten(-1, self.grid)
        return expanded

    def _check_grid_vector(self, x: Tensor, name: str) -> None:
        check_tensor(x, f"PoissonGrid.{name}", "x")
        if tuple(x.shape[-len(self.grid) :]) != self.grid and (x.ndim == 0 or x.shape[-1] != self.shape[0]):
            raise ValueError(
                f"PoissonGrid.{name}: x: expected shape (..., {', '.join(map(str, self.grid))}) or "
                f"(..., {self.shape[0]}), got {tuple(x.shape)}"
            )

    @cached_property
    def _unknowns(self) -> Tensor:
        return self.mask.reshape(-1).nonzero().squeeze(-1)

    def to_csr(self, *, compressed: bool = True) -> CSR:
        """Return the matrix in CSR form; differentiable in `face_coef`.

        Parameters
        ----------
        compressed : bool
            Rows and columns are the unknowns in C order (see :meth:`compress`). False: all cells of the grid, with a
            one on the diagonal where the row would be empty.
        """
        if compressed:
            number = torch.full_like(self._unknowns.new_zeros(self.shape[0]), -1)
            number[self._unknowns] = torch.arange(self.num_unknowns, device=self.device)
            return self._assemble(number, self.diagonal()[self._unknowns])
        diagonal = self.diagonal()
        index = torch.arange(self.shape[0], device=self.device)
        return self._assemble(index, torch.where(diagonal == 0, torch.ones_like(diagonal), diagonal))

    def entries(self) -> CSR:
        """Return the matrix over all cells of the grid, its rows outside the fluid empty."""
        return self._assemble(torch.arange(self.shape[0], device=self.device), self.diagonal())

    def _assemble(self, number: Tensor, diagonal: Tensor) -> CSR:
        """Assemble from the number of every cell, -1 where there is none, and the diagonal in that numbering."""
        from kantor.linalg.csr import CSR

        faces, _ = self.coefficients()
        index, own = number.reshape(self.grid), number[number >= 0]
        rows, cols, values = [own], [own], [diagonal]
        for axis, face in enumerate(faces):
            n = self.grid[axis]
            if n < 2:
                continue
            linked = self._links(axis).narrow(axis, 1, n - 1)
            here, there = index.narrow(axis, 0, n - 1)[linked], index.narrow(axis, 1, n - 1)[linked]
            rows += [here, there]
            cols += [there, here]
            values += [-face.narrow(axis, 1, n - 1)[linked] / self.spacing**2] * 2
        return CSR.from_coo(torch.cat(rows), torch.cat(cols), torch.cat(values), (own.numel(), own.numel()))

    def levels(self) -> list[dict[str, object]]:
        """Return the levels that multigrid makes of this grid: see :attr:`Multigrid.levels`."""
        return self._multigrid().levels

    def _multigrid(self, **options: Any) -> Multigrid:
        """The preconditioner that solvers know as "multigrid"."""
        from kantor.linalg.multigrid import Multigrid

        return Multigrid(self, **options)

    def to(self, dtype: torch.dtype) -> PoissonGrid:
        """Convert the coefficients."""
        converted = object.__new__(type(self))
        converted.__dict__.update(self.__dict__)
        check_float(torch.empty(0, dtype=dtype), "PoissonGrid.to", "dtype")
        converted.dtype = dtype
        if self.face_coef is not None:
            converted.face_coef = tuple(c.to(dtype) for c in self.face_coef)
        return converted

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        size = " x ".join(map(str, self.grid))
        return f"PoissonGrid({size}, {self.num_unknowns} unknowns, {dtype}, {self.device})"


__all__ = ["AIR", "FLUID", "SOLID", "PoissonGrid"]
