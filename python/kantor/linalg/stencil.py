"""Five- and seven-point stencils on regular grids as operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kantor._checks import check_finite, check_float, check_same, check_tensor
from kantor.linalg._native import FACES, STENCIL, Encoded
from kantor.linalg._operator import LinearOperator

if TYPE_CHECKING:
    from kantor.linalg.csr import CSR

_BOUNDARIES = {"dirichlet": 0, "neumann": 1}


class _GridOperator(LinearOperator):
    """What both kinds of stencil share: a grid, its flattening, and the way to a sparse matrix."""

    grid: tuple[int, ...]

    def _set_grid(self, name: str, shape: Sequence[int]) -> None:
        if not isinstance(shape, Sequence):
            raise TypeError(
                f"{name}: shape: expected two or three numbers such as (64, 64), got {type(shape).__name__}; for one "
                "dimension (1, n), with weights=(0, w)"
            )
        grid = tuple(int(s) for s in shape)
        if len(grid) not in (2, 3):
            raise ValueError(f"{name}: shape: expected two or three dimensions, got {grid}")
        if min(grid) < 1:
            raise ValueError(f"{name}: shape: every dimension must be at least 1, got {grid}")
        self.grid = grid
        n = math.prod(grid)
        self.shape = (n, n)

    def _native_grid(self) -> list[int]:
        """The grid as (nz, ny, nx): a two-dimensional one (ny, nx) becomes (ny, 1, nx)."""
        return list(self.grid) if len(self.grid) == 3 else [self.grid[0], 1, self.grid[1]]

    @property
    def T(self) -> LinearOperator:  # noqa: N802
        """Itself: stencils are symmetric."""
        return self

    def _couplings(self) -> list[Tensor]:
        """Per axis, the coupling of a cell and its next one along that axis, shaped like the grid less one there."""
        raise NotImplementedError  # both sub-classes define it

    def to_csr(self) -> CSR:
        """Return the same matrix in CSR form, rows in the grid's C order. Differentiable in the coefficients."""
        from kantor.linalg.csr import CSR

        index = torch.arange(self.shape[0], device=self.device).reshape(self.grid)
        rows, cols, values = [index.reshape(-1)], [index.reshape(-1)], [self.diagonal()]
        for axis, coupling in enumerate(self._couplings()):
            here = index.narrow(axis, 0, self.grid[axis] - 1).reshape(-1)
            there = index.narrow(axis, 1, self.grid[axis] - 1).reshape(-1)
            rows += [here, there]
            cols += [there, here]
            values += [-coupling.reshape(-1)] * 2
        return CSR.from_coo(torch.cat(rows), torch.cat(cols), torch.cat(values), self.shape)


class Stencil(_GridOperator):
    """Constant-coefficient stencil on a regular grid: five points in two dimensions, seven in three.

    ``(A u)_i = shift u_i + sum_axis w_axis (2 u_i - u_left - u_right)``: with ``weights = 1 / h**2`` the negative
    Laplacian of grid spacing h. Solutions are differentiable with respect to weights and shift when these are tensors.

    Parameters
    ----------
    shape : tuple of int
        Grid, ``(ny, nx)`` or ``(nz, ny, nx)``. Vectors are grid shaped ``(..., nz, ny, nx)`` or flat ``(..., n)``.
    weights : float, sequence of float, or Tensor
        One for all axes or one per axis, in the order of ``shape``.
    boundary : "dirichlet", "neumann", or one per axis
        Outside the grid u is zero, or equal to its border value.
    shift : float or scalar Tensor
        Added to the diagonal.
    dtype, device
        float64 on the CPU by default, or those of a ``weights`` tensor.

    Raises
    ------
    ValueError
        A shape that is not two- or three-dimensional, a wrong number of weights, an unknown boundary, NaN.
    TypeError
        A dtype other than float32 or float64.

    Examples
    --------
    >>> import torch
    >>> from kantor.linalg import Stencil
    >>> A = Stencil((4, 4))
    >>> A.matvec(torch.ones(4, 4, dtype=torch.float64))[1]
    tensor([1., 0., 0., 1.], dtype=torch.float64)
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        weights: float | Sequence[float] | Tensor = 1.0,
        boundary: str | Sequence[str] = "dirichlet",
        shift: float | Tensor = 0.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self._set_grid("Stencil", shape)
        dims = len(self.grid)
        given = [t for t in (weights, shift) if isinstance(t, Tensor)]
        self.dtype = dtype or (given[0].dtype if given else torch.float64)
        where = given[0].device if given and device is None else device
        self.device = torch.empty(0, device=where or "cpu").device  # "cuda" becomes "cuda:0"
        check_float(torch.empty(0, dtype=self.dtype), "Stencil", "dtype")
        axis_weights = torch.as_tensor(weights, dtype=self.dtype, device=self.device)
        if axis_weights.ndim > 1 or axis_weights.numel() not in (1, dims):
            raise ValueError(f"Stencil: weights: expected one or {dims}, got shape {tuple(axis_weights.shape)}")
        self.weights = axis_weights.expand(dims)
        self.shift = torch.as_tensor(shift, dtype=self.dtype, device=self.device).reshape(())
        if not torch.compiler.is_compiling():
            check_finite(self.weights, "Stencil", "weights")
            check_finite(self.shift.reshape(1), "Stencil", "shift")
        kinds = [boundary] * dims if isinstance(boundary, str) else list(boundary)
        if len(kinds) != dims or any(kind not in _BOUNDARIES for kind in kinds):
            raise ValueError(
                f"Stencil: boundary: expected 'dirichlet' or 'neumann', or {dims} of them, got {boundary!r}"
            )
        self.boundary = tuple(kinds)

    @staticmethod
    def from_faces(faces: Sequence[Tensor], shift: float | Tensor = 0.0) -> FaceStencil:
        """Return the stencil with one coefficient per cell face; see :class:`FaceStencil`."""
        return FaceStencil(faces, shift)

    def encode(self) -> Encoded:
        """One constant stencil term."""
        three = len(self.grid) == 3
        flags = [_BOUNDARIES[kind] for kind in self.boundary]
        weights = (
            self.weights if three else torch.stack([self.weights[0], torch.zeros_like(self.shift), self.weights[1]])
        )
        boundaries = flags if three else [flags[0], 0, flags[1]]
        return Encoded(
            [torch.cat([self.shift.reshape(1), weights])], [STENCIL, *self._native_grid(), *boundaries], [1.0]
        )

    def diagonal(self) -> Tensor:
        """Return the main diagonal, flat."""
        result = self.shift.expand(self.grid)
        for axis, kind in enumerate(self.boundary):
            n = self.grid[axis]
            sides = torch.full((n,), 2.0, dtype=self.dtype, device=self.device)
            if kind == "neumann":
                sides[0] -= 1
                sides[-1] -= 1
            result = result + self.weights[axis] * sides.reshape([n if a == axis else 1 for a in range(len(self.grid))])
        return result.reshape(-1)

    def _couplings(self) -> list[Tensor]:
        shapes = [[n - (a == axis) for a, n in enumerate(self.grid)] for axis in range(len(self.grid))]
        return [self.weights[axis].expand(shape) for axis, shape in enumerate(shapes)]

    def to(self, dtype: torch.dtype) -> Stencil:
        """Convert the coefficients."""
        return Stencil(
            self.grid, weights=self.weights.to(dtype), boundary=self.boundary, shift=self.shift.to(dtype), dtype=dtype
        )


class FaceStencil(_GridOperator):
    """Stencil with one coefficient per cell face: the finite-volume form of ``shift u - div(c grad u)``.

    ``(A u)_i = shift u_i + sum_faces f (u_i - u_neighbour)`` with u = 0 outside the grid: a positive border face is a
    Dirichlet boundary, a zero one a Neumann boundary. Solutions are differentiable with respect to faces and shift.

    Parameters
    ----------
    faces : sequence of Tensor
        ``(fz, fy, fx)`` or ``(fy, fx)``: shaped like the grid with one more entry along their own axis.
    shift : float or scalar Tensor
        Added to the diagonal.

    Raises
    ------
    ValueError
        Shapes that do not belong to one grid, NaN or infinite values, mixed devices.
    TypeError
        Not tensors, or mixed dtypes.
    """

    def __init__(self, faces: Sequence[Tensor], shift: float | Tensor = 0.0) -> None:
        names = {2: ("fy", "fx"), 3: ("fz", "fy", "fx")}.get(len(faces))
        if names is None:
            raise ValueError(f"Stencil.from_faces: expected two or three tensors, got {len(faces)}")
        for name, face in zip(names, faces, strict=True):
            check_tensor(face, "Stencil.from_faces", name)
            check_float(face, "Stencil.from_faces", name)
        check_same("Stencil.from_faces", list(zip(names, faces, strict=True)))
        first = list(faces[0].shape)
        if len(first) != len(faces):
            raise ValueError(
                f"Stencil.from_faces: {names[0]}: expected {len(faces)} dimensions, got shape {tuple(first)}"
            )
        self._set_grid("Stencil.from_faces", [first[0] - 1, *first[1:]])
        for axis, (name, face) in enumerate(zip(names, faces, strict=True)):
            expected = tuple(n + (a == axis) for a, n in enumerate(self.grid))
            if tuple(face.shape) != expected:
                raise ValueError(
                    f"Stencil.from_faces: {name}: expected shape {expected} for the grid {self.grid}, "
                    f"got {tuple(face.shape)}"
                )
            check_finite(face, "Stencil.from_faces", name)
        self.faces = tuple(faces)
        self.dtype, self.device = faces[0].dtype, faces[0].device
        self.shift = torch.as_tensor(shift, dtype=self.dtype, device=self.device).reshape(())
        check_finite(self.shift.reshape(1), "Stencil.from_faces", "shift")

    def encode(self) -> Encoded:
        """One face-coefficient term."""
        operands = [self.shift.reshape(1), *(face.contiguous() for face in self.faces)]
        return Encoded(operands, [FACES, *self._native_grid(), len(self.grid)], [1.0])

    def diagonal(self) -> Tensor:
        """Return the main diagonal, flat."""
        result = self.shift.expand(self.grid)
        for axis, face in enumerate(self.faces):
            n = self.grid[axis]
            result = result + face.narrow(axis, 0, n) + face.narrow(axis, 1, n)
        return result.reshape(-1)

    def _couplings(self) -> list[Tensor]:
        return [face.narrow(axis, 1, self.grid[axis] - 1) for axis, face in enumerate(self.faces)]

    def to(self, dtype: torch.dtype) -> FaceStencil:
        """Convert the coefficients."""
        return FaceStencil([face.to(dtype) for face in self.faces], self.shift.to(dtype))
