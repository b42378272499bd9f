"""The torch operators of kantor.linalg through the harness that every operator has to pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import op_checks
from kantor.linalg import _native
from kantor.linalg._native import CSR, DENSE, DIAGONAL, FACES, INCOMPLETE_CHOLESKY, LOW_RANK, STENCIL
from op_checks import Arguments, ErrorCase, OpCase, Rand

MATVEC, CG, IC0_SOLVE = torch.ops.kantor.matvec.default, torch.ops.kantor.cg.default, torch.ops.kantor.ic0_solve.default


# --- encoded operators: operands, layout, scales ---


def tridiagonal(size: int) -> tuple[Tensor, Tensor]:
    """Row pointers and columns of a tridiagonal matrix."""
    rows = torch.arange(size).repeat_interleave(3)
    cols = rows + torch.tensor([-1, 0, 1]).repeat(size)
    inside = (cols >= 0) & (cols < size)
    counts = torch.bincount(rows[inside], minlength=size)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int(), cols[inside].int()


def dense(size: int, rand: Rand) -> tuple[list[Tensor], list[int], list[float]]:
    matrix = 0.5 * rand(size, size) / max(size, 1) ** 0.5
    return [matrix + matrix.mT + 4 * torch.eye(size, dtype=torch.float64)], [DENSE, size, size], [2.0]


def csr(size: int, rand: Rand, index: torch.dtype = torch.int32) -> tuple[list[Tensor], list[int], list[float]]:
    crow, col = tridiagonal(size)
    rows = torch.arange(size).repeat_interleave(crow.diff().long())
    values = torch.where(rows == col, 4.0 + rand(size)[rows].abs(), rand(2 * size + 1)[rows + col])
    return [crow.to(index), col.to(index), values], [CSR, size, size, 1], [1.0]


def stencil(size: int, rand: Rand) -> tuple[list[Tensor], list[int], list[float]]:
    return [rand(4).abs() + 0.5], [STENCIL, size, 1, 2, 0, 1, 1], [0.5]


def faces(size: int, rand: Rand) -> tuple[list[Tensor], list[int], list[float]]:
    operands = [rand(1).abs() + 0.5, *(rand(*shape).abs() for shape in ((size + 1, 1, 2), (size, 2, 2), (size, 1, 3)))]
    return operands, [FACES, size, 1, 2, 3], [1.0]


def diagonal(size: int, rand: Rand) -> tuple[list[Tensor], list[int], list[float]]:
    return [rand(size).abs() + 0.5], [DIAGONAL, size], [-3.0]


def low_rank(size: int, rand: Rand) -> tuple[list[Tensor], list[int], list[float]]:
    return [rand(5, size), rand(5)], [LOW_RANK, size, 5], [0.5]


def shifted_low_rank(size: int, rand: Rand) -> tuple[list[Tensor], list[int], list[float]]:
    """Positive definite, also where five factors are disturbed a little."""
    operands = [rand(5, size), rand(5).abs() + 0.1, rand(size).abs() + 0.5]
    return operands, [LOW_RANK, size, 5, DIAGONAL, size], [0.5, 1.0]


def total(size: int, rand: Rand) -> tuple[list[Tensor], list[int], list[float]]:
    n = 2 * size
    parts = [stencil(size, rand), csr(n, rand, torch.int64), diagonal(n, rand)]
    scales = [0.5, 2.0, 0.25]
    return [t for part in parts for t in part[0]], [k for part in parts for k in part[1]], scales


FORMS = {"dense": dense, "csr": csr, "stencil": stencil, "faces": faces, "diagonal": diagonal, "sum": total}
FORMS |= {"low rank": low_rank, "shifted low rank": shifted_low_rank}


def unknowns(layout: list[int]) -> int:
    return layout[1] * layout[2] * layout[3] if layout[0] in (STENCIL, FACES) else layout[1]


def matrix_of(operands: list[Tensor], layout: list[int], scales: list[float]) -> Tensor:
    """The dense matrix, in plain torch."""
    n = unknowns(layout)
    result = torch.zeros(n, n, dtype=torch.float64)
    for term, scale in zip(_native.split_terms(operands, layout), scales, strict=True):
        t = term.operands
        if term.kind == DENSE:
            part = t[0]
        elif term.kind == CSR:
            rows = torch.arange(n).repeat_interleave(t[0].diff().long())
            part = torch.zeros(n, n, dtype=torch.float64).index_put((rows, t[1].long()), t[2], accumulate=True)
        elif term.kind == DIAGONAL:
            part = torch.diag(t[0])
        elif term.kind == LOW_RANK:
            part = t[0].mT @ torch.diag(t[1]) @ t[0]
        else:
            part = grid_matrix(term.kind, term.meta, t)
        result = result + scale * part
    return result


def grid_matrix(kind: int, meta: list[int], operands: list[Tensor]) -> Tensor:
    """Every row from unit vectors: shift u + sum over the faces of f (u_i - u_neighbour)."""
    grid = meta[:3]
    n = grid[0] * grid[1] * grid[2]
    u = torch.eye(n, dtype=torch.float64).reshape(n, *grid)
    shift = operands[0][0]
    y = shift * u
    for axis in range(3):
        if kind == STENCIL:
            weight, neumann = operands[0][1 + axis], meta[3 + axis]
            f = weight.expand([m + (a == axis) for a, m in enumerate(grid)])
            border = torch.zeros(grid[axis] + 1, dtype=torch.float64)
            border[0] = border[-1] = neumann
            f = f * (1 - border).reshape([-1 if a == axis else 1 for a in range(3)])
        else:
            f = operands[1 + axis]
        padding = [0, 0] * (2 - axis) + [1, 1]
        flow = f * torch.nn.functional.pad(u, padding).diff(dim=1 + axis)
        y = y - flow.diff(dim=1 + axis)
    return y.reshape(n, n).mT


# --- matvec ---


def matvec_case(name: str) -> OpCase:
    form = FORMS[name]

    def sample(size: int, rand: Rand) -> Arguments:
        operands, layout, scales = form(size, rand)
        return operands, layout, scales, rand(2, unknowns(layout))

    def oracle(operands: Any, layout: Any, scales: Any, x: Tensor) -> Tensor:
        return x @ matrix_of(operands, layout, scales).mT

    return OpCase(
        f"matvec {name}",
        call=MATVEC,
        sample=sample,
        oracle=oracle,
        differentiable=(0, 3),
        free=(3,) if name in ("csr", "sum") else (0, 3),
        factor=64.0,
        op=MATVEC,
        sizes=(1, 2, 17, 101) if name in ("stencil", "faces", "sum") else (0, 1, 2, 17, 101),
        small_size=3,
        large_size={"dense": 400, "faces": 20_003, "stencil": 20_003, "sum": 20_003}.get(name, 50_003),
        errors=(
            ErrorCase(ValueError, "does not match", lambda o, t, s, x: (o, t, s, x[..., :-1])),
            ErrorCase(ValueError, "fewer scales", lambda o, t, s, x: (o, t, s[:-1], x)),
            ErrorCase(ValueError, "fewer operands|wrong number", lambda o, t, s, x: (o[:-1] or [x[0, :0]], t, s, x)),
            ErrorCase(
                TypeError, "expected float64, got float32", lambda o, t, s, x: ([*o[:-1], o[-1].float()], t, s, x)
            ),
        ),
    )


# --- cg ---

NONE: tuple[list[Tensor], list[int], list[float]] = ([], [], [])


def symmetric(operands: list[Tensor], layout: list[int]) -> list[Tensor]:
    """Symmetrise what finite differences have disturbed."""
    result: list[Tensor] = []
    for term in _native.split_terms(operands, layout):
        t = list(term.operands)
        if term.kind == DENSE:
            t = [(t[0] + t[0].mT) / 2]
        elif term.kind == CSR:
            permutation = torch.ops.kantor.csr_transpose(t[0], t[1], term.meta[1])[2]
            t[2] = (t[2] + t[2].index_select(0, permutation)) / 2
        result += t
    return result


def cg_case(name: str, M: str | None = None) -> OpCase:
    form = FORMS[name]

    def sample(size: int, rand: Rand) -> Arguments:
        operands, layout, scales = form(size, rand)
        scales = [abs(scale) for scale in scales]
        n = unknowns(layout)
        m = NONE if M is None else ([rand(n).abs() + 0.5], [DIAGONAL, n], [1.0])
        return operands, layout, scales, *m, rand(2, n), None, 1e-14, 0.0, 10 * n

    def oracle(operands: Any, layout: Any, scales: Any, mo: Any, ml: Any, ms: Any, b: Tensor, *rest: Any) -> Tensor:
        return torch.linalg.solve(matrix_of(operands, layout, scales), b.mT).mT

    def constrain(operands: Any, layout: Any, *rest: Any) -> Arguments:
        return symmetric(operands, layout), layout, *rest

    def condition(operands: Any, layout: Any, scales: Any, *rest: Any) -> float:
        return float(torch.linalg.cond(matrix_of(operands, layout, scales))) if unknowns(layout) else 1.0

    return OpCase(
        f"cg {name}" + (f" {M}" if M else ""),
        call=CG,
        sample=sample,
        oracle=oracle,
        differentiable=(0, 6),
        free=(6,),
        constrain=constrain,
        condition=condition,
        factor=64.0,
        op=CG,
        sizes=(1, 2, 17) if name in ("stencil", "faces", "sum") else (0, 1, 2, 33),
        small_size=2 if name in ("stencil", "faces", "sum") else 3,
        large_size={"dense": 300, "faces": 10_003, "stencil": 20_003, "sum": 10_003}.get(name, 40_003),
        errors=(
            ErrorCase(ValueError, "does not match b", lambda *a: (*a[:6], a[6][..., :-1], *a[7:])),
            ErrorCase(ValueError, "fewer scales", lambda *a: (*a[:2], [], *a[3:])),
            ErrorCase(TypeError, "expected float64, got float32", lambda *a: ([*a[0][:-1], a[0][-1].float()], *a[1:])),
        ),
    )


# --- ic0_solve: lower factor, its transpose, and the levels ---


def factor(size: int, rand: Rand) -> tuple[list[Tensor], list[int]]:
    """The factor of a bidiagonal matrix, in natural order: every row is a level of its own."""
    below, diagonals = rand(size), rand(size).abs() + 1.0
    counts = torch.ones(size, dtype=torch.int64)
    counts[1:] = 2
    crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    rows = torch.arange(size).repeat_interleave(counts)
    col = torch.arange(int(crow[-1])) - crow[rows] + rows - (counts[rows] - 1)
    values = torch.where(rows == col, 1 / diagonals[rows], below[rows])  # the diagonal is stored inverted
    u_crow, u_col, permutation = torch.ops.kantor.csr_transpose(crow.int(), col.int(), size)
    pointers, order = torch.arange(size + 1).int(), torch.arange(size).int()
    operands = [crow.int(), col.int(), values, u_crow, u_col, values[permutation.long()], pointers, order]
    return operands, [INCOMPLETE_CHOLESKY, size, size]


def ic0_oracle(operands: list[Tensor], layout: list[int], r: Tensor) -> Tensor:
    n = layout[1]
    rows = torch.arange(n).repeat_interleave(operands[0].diff().long())
    L = torch.zeros(n, n, dtype=torch.float64).index_put((rows, operands[1].long()), operands[2])
    L = L - torch.diag(L.diagonal()) + torch.diag(1 / L.diagonal())
    return torch.linalg.solve(L @ L.mT, r.mT).mT


IC0 = OpCase(
    "ic0_solve",
    call=IC0_SOLVE,
    sample=lambda size, rand: (*factor(size, rand), rand(2, size)),
    oracle=ic0_oracle,
    differentiable=(2,),
    condition=lambda operands, layout, r: 100.0,
    op=IC0_SOLVE,
    small_size=3,
    large_size=40_003,
    sizes=(0, 1, 2, 17, 101),
    errors=(ErrorCase(ValueError, "fewer operands", lambda operands, layout, r: (operands[:-1], layout, r)),),
)

CASES = [
    *(matvec_case(name) for name in FORMS),
    *(cg_case(name) for name in FORMS if name not in ("csr", "diagonal", "low rank")),
    cg_case("csr", "with a diagonal"),
    IC0,
]


@pytest.mark.parametrize(("check", "case", "device"), op_checks.parameters(CASES))
def test_operator(check: Callable[..., None], case: OpCase, device: str) -> None:
    op_checks.run(check, case, device)


def test_csr_transpose() -> None:
    """Structure only: no derivative, the same through fake tensors, and its own inverse."""
    crow, col = torch.tensor([0, 2, 2, 5]), torch.tensor([1, 3, 0, 1, 2])
    op = torch.ops.kantor.csr_transpose.default
    t_crow, t_col, permutation = op(crow, col, 4)
    assert (t_crow.tolist(), t_col.tolist(), permutation.tolist()) == (
        [0, 1, 3, 4, 5],
        [2, 0, 2, 2, 0],
        [2, 0, 3, 4, 1],
    )
    back = op(t_crow, t_col, 3)
    assert torch.equal(back[0], crow)
    assert torch.equal(back[1], col)
    assert torch.equal(permutation[back[2]], torch.arange(5))
    for index in (torch.int32, torch.int64):
        torch.library.opcheck(op, (crow.to(index), col.to(index), 4))


def test_sizes() -> None:
    op = torch.ops.kantor.sizes.default
    b = torch.tensor([[1.0, -4.0], [0.0, 0.0], [1e-300, 0.0]], dtype=torch.float64)
    assert op(b).tolist() == [[4.0], [1.0], [2.0**-997]]  # the power of two below the largest entry
    assert op(b[:, :0]).tolist() == [[1.0], [1.0], [1.0]]
    torch.library.opcheck(op, (b.clone().requires_grad_(),))
