"""The diffusion recurrence, its adjoint and derivatives, and the products they are made of."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import op_checks
from kantor import _C
from kantor.graph import _native
from op_checks import Arguments, OpCase, Rand, threads

PROPAGATE = torch.ops.kantor.graph_propagate.default
F32, F64 = torch.float32, torch.float64


# --- graphs ---


def pattern(n: int, seed: int = 0, degree: int = 4, reach: int | None = None) -> tuple[Tensor, Tensor]:
    """Rowptr and col of a matrix that is not symmetric: empty rows, diagonal entries, up to 2 `degree` a row."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, min(2 * degree, n) + 1, (n,), generator=generator)
    rows = torch.repeat_interleave(torch.arange(n), counts)
    far = torch.randint(0, max(n, 1), rows.shape, generator=generator)
    cols = far if reach is None else (rows + far % (2 * reach + 1) - reach).clamp(0, n - 1)
    key = torch.unique(rows * n + cols)
    rows = key // max(n, 1)
    counts = torch.bincount(rows, minlength=n)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int(), (key - rows * n).int()


def matrix(rowptr: Tensor, col: Tensor, values: Tensor) -> Tensor:
    n = rowptr.numel() - 1
    return values.new_zeros(n, n).index_put((_native.rows_of(rowptr), col.long()), values)


def problem(n: int, d: int, dtype: torch.dtype = F64, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pattern, edge, diagonal and x, of a step that neither grows nor shrinks fast."""
    generator = torch.Generator().manual_seed(n + d)
    rowptr, col = pattern(n, **options)
    edge = 0.2 * torch.rand(col.shape, generator=generator, dtype=F64)
    diagonal = 0.2 + 0.2 * torch.rand(n, generator=generator, dtype=F64)
    return rowptr, col, edge.to(dtype), diagonal.to(dtype), torch.randn(n, d, generator=generator, dtype=F64).to(dtype)


def loop(
    rowptr: Tensor, col: Tensor, edge: Tensor, diagonal: Tensor, x: Tensor, steps: int,
    teleport: float = 0.0, dropout: float = 0.0, seed: int = 0,
) -> Tensor:  # fmt: skip
    """The recurrence in plain torch."""
    rows, y = _native.rows_of(rowptr), x
    for k in range(steps):
        z = y * _native.dropout_mask(x.detach(), k, dropout, seed) if dropout else y
        y = (diagonal[:, None] * z).index_add(0, rows, edge[:, None] * z[col.long()]) + teleport * x
    return y


# --- as operators ---


def with_pattern(*shapes: str) -> Any:
    """A sample: pattern, then edge (e), diagonal (d) or matrices of three columns (x)."""

    def sample(size: int, rand: Rand) -> Arguments:
        rowptr, col = pattern(size, size)
        makers = {"e": lambda: 0.3 * rand(col.numel()), "d": lambda: 0.5 + 0.1 * rand(size), "x": lambda: rand(size, 3)}
        return (rowptr, col, *(makers[shape]() for shape in shapes))

    return sample


def adjoint(rowptr: Tensor, col: Tensor, edge: Tensor, diagonal: Tensor, g: Tensor) -> Tensor:
    return PROPAGATE(rowptr, col, None, None, None, edge, diagonal, g, 3, 0.2, 0.3, 5, True)


def adjoint_oracle(rowptr: Tensor, col: Tensor, edge: Tensor, diagonal: Tensor, g: Tensor) -> Tensor:
    E, total = matrix(rowptr, col, edge), torch.zeros_like(g)
    for k in (2, 1, 0):
        total = total + 0.2 * g
        g = _native.dropout_mask(g, k, 0.3, 5) * (diagonal[:, None] * g + E.T @ g)
    return g + total


OPTIONS = (4, 0.2, 0.3, 11)
CASES = [
    OpCase(
        "product",
        call=_native.product,
        sample=with_pattern("e", "x"),
        oracle=lambda rowptr, col, weight, x: matrix(rowptr, col, weight) @ x,
        differentiable=(2, 3),
        op=torch.ops.kantor.graph_product.default,
        op_arguments=lambda rowptr, col, weight, x: (rowptr, col, None, None, None, weight, x),
    ),
    OpCase(
        "edge_dot",
        call=_native.edge_dot,
        sample=with_pattern("x", "x"),
        oracle=lambda rowptr, col, a, b: (a[_native.rows_of(rowptr)] * b[col.long()]).sum(-1),
        differentiable=(2, 3),
        op=torch.ops.kantor.graph_edge_dot.default,
        op_arguments=lambda rowptr, col, a, b: (rowptr, col, None, None, None, a, b),
    ),
    OpCase(
        "propagate",
        call=lambda *args: _native.propagate(*args, *OPTIONS),
        sample=with_pattern("e", "d", "x"),
        oracle=lambda *args: loop(*args, *OPTIONS),
        differentiable=(2, 3, 4),
        op=PROPAGATE,
        op_arguments=lambda rowptr, col, *rest: (rowptr, col, None, None, None, *rest, *OPTIONS, False),
    ),
    OpCase(
        "adjoint",
        call=adjoint,
        sample=with_pattern("e", "d", "x"),
        oracle=adjoint_oracle,
        differentiable=(2, 3, 4),
    ),
]


@pytest.mark.parametrize(("check", "case", "device"), op_checks.parameters(CASES))
def test_operators(check: Any, case: OpCase, device: str) -> None:
    op_checks.run(check, case, device)


# --- values ---


@pytest.mark.parametrize("steps", [0, 1, 7, 50])
def test_powers_of_the_matrix(steps: int) -> None:
    for n, d in ((1, 1), (13, 5), (60, 8)):
        rowptr, col, edge, diagonal, x = problem(n, d)
        step = (torch.diag(diagonal) + matrix(rowptr, col, edge)).numpy()
        expected = torch.from_numpy(np.linalg.matrix_power(step, steps) @ x.numpy())
        scale = expected.abs().max()
        result = _native.propagate(rowptr, col, edge, diagonal, x, steps)
        assert (result - expected).abs().max() <= 1e-12 * scale
        assert result.data_ptr() != x.data_ptr()
        result = _native.propagate(rowptr, col, edge.float(), diagonal.float(), x.float(), steps)
        assert (result - expected).abs().max() <= 2e-6 * max(steps, 1) ** 0.5 * scale


def gradients(arguments: tuple[Tensor, ...], options: tuple[Any, ...], function: Any) -> tuple[Tensor, ...]:
    """Result, and the derivatives for edge, diagonal and x of its product with a fixed matrix."""
    leaves = [t.detach().requires_grad_() for t in arguments[2:]]
    y = function(*arguments[:2], *leaves, *options)
    probe = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape).cos()
    return (y.detach(), *torch.autograd.grad((y * probe).sum(), leaves, materialize_grads=True))


# Tiles of one, and of several columns; several tiles, the last one narrow, for threads to take; rows shared by threads,
# in an order that suits the cache or not; rows that come from memory.
SHAPES = [*((90, d) for d in (1, 2, 3, 7, 8, 33, 64, 200)), (2000, 200), (9000, 5), (40_000, 20), (140_000, 4)]


@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("dtype", [F64, F32])
def test_every_way_through_the_columns(n: int, d: int, dtype: torch.dtype) -> None:
    large = n > 1000
    for reach in (None, 50) if large else (None,):
        arguments = problem(n, d, dtype, reach=reach)
        for options in ((3, 0.1, 0.3, 2**40 + 7),) if large else ((1,), (5, 0.2), (6, 0.0, 0.4, -3)):
            expected = gradients(arguments, options, loop)
            results = []
            for count in (1, 2):
                with threads(count):
                    results.append(gradients(arguments, options, _native.propagate))
                    results[-1] += (_native.product(*arguments[:3], arguments[4]),)
            for one, two, right in zip(*results, (*expected, matmul(*arguments[:3], arguments[4])), strict=True):
                assert torch.equal(one, two)
                assert (one - right).abs().max() <= 64 * torch.finfo(dtype).eps * right.abs().max()


def matmul(rowptr: Tensor, col: Tensor, edge: Tensor, x: Tensor) -> Tensor:
    return torch.zeros_like(x).index_add(0, _native.rows_of(rowptr), edge[:, None] * x[col.long()])


def test_unsorted_rows_and_a_transpose_that_is_given() -> None:
    rowptr, col, edge, diagonal, x = problem(30, 5)
    shuffled = torch.cat([begin + torch.randperm(int(end - begin)) for begin, end in rowptr.unfold(0, 2, 1)])
    arguments = (rowptr, col[shuffled], edge[shuffled], diagonal, x)
    transposed = torch.ops.kantor.csr_transpose(rowptr, arguments[1], 30)
    expected = gradients(arguments, OPTIONS, loop)
    for result in (
        gradients(arguments, OPTIONS, _native.propagate),
        gradients(arguments, OPTIONS, lambda *args: _native.propagate(*args, transposed=transposed)),
    ):
        for actual, right in zip(result, expected, strict=True):
            assert torch.allclose(actual, right, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("n", "d"), [(0, 3), (4, 0), (5, 2)])
def test_nothing_to_do(n: int, d: int) -> None:
    x, diagonal = torch.randn(n, d, dtype=F64), torch.rand(n, dtype=F64)
    empty = (torch.zeros(n + 1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=F64))
    for options in ((0,), (0, 0.5, 0.5, 1), (3,), (2, 0.1, 0.2, 3)):
        for actual, right in zip(
            gradients((*empty, diagonal, x), options, _native.propagate),
            gradients((*empty, diagonal, x), options, loop),
            strict=True,
        ):
            assert torch.allclose(actual, right, rtol=1e-13)
    assert not _native.product(*empty, x).any()


# --- invariants ---


def test_order_of_the_nodes() -> None:
    rowptr, col, edge, diagonal, x = problem(50, 6)
    order = torch.randperm(50)
    place = order.argsort()
    rows = place[_native.rows_of(rowptr)]
    sort = torch.argsort(rows * 50 + place[col.long()])
    moved_rowptr = torch.cat([torch.zeros(1), torch.bincount(rows, minlength=50).cumsum(0)]).int()
    moved = _native.propagate(
        moved_rowptr, place[col.long()][sort].int(), edge[sort], diagonal[order], x[order], 8, 0.1
    )
    expected = _native.propagate(rowptr, col, edge, diagonal, x, 8, 0.1)[order]
    assert torch.allclose(moved, expected, rtol=1e-12, atol=1e-13)


def test_components_never_mix() -> None:
    first, second = problem(40, 9), problem(25, 9)
    rowptr = torch.cat([first[0], first[0][-1] + second[0][1:]])
    col = torch.cat([first[1], second[1] + 40])
    both = [torch.cat([a, b]) for a, b in zip(first[2:], second[2:], strict=True)]
    both[2][40:] = torch.nan
    result = _native.propagate(rowptr, col, *both, 12)
    assert torch.equal(result[:40], _native.propagate(*first, 12))
    assert result[40:].isnan().all()


# --- dropout ---


def philox(seed: int, counter: tuple[int, int, int, int]) -> list[int]:
    """Philox4x32-10 in Python's integers."""
    low = 0xFFFFFFFF
    key, (a, b, c, d) = [seed & low, seed >> 32 & low], counter
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = second >> 32 ^ b ^ key[0], second & low, first >> 32 ^ d ^ key[1], first & low
        key = [key[0] + 0x9E3779B9 & low, key[1] + 0xBB67AE85 & low]
    return [a, b, c, d]


def test_philox() -> None:
    assert philox(0, (0, 0, 0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # the authors' test vector
    for seed in (0, 2**63 - 1, -(2**62)):
        for dtype in (F32, F64):
            mask = _native.dropout_mask(torch.empty(5, 70, dtype=dtype), 3, 0.37, seed)
            for row, column in ((0, 0), (4, 69), (2, 33), (3, 64)):
                random = philox(seed, (column // 4, row, 3, 0))[column % 4]
                assert mask[row, column] == torch.tensor(1 / (1 - 0.37), dtype=dtype) * (random >= int(0.37 * 2**32))


def masks(steps: Iterator[int] | range, seed: int) -> Tensor:
    like = torch.empty(300, 40, dtype=F64)
    return torch.stack([_native.dropout_mask(like, k, 0.25, seed) for k in steps])


def test_masks_are_independent() -> None:
    kept = (torch.cat([masks(range(4), 1), masks(range(4), 2)]) > 0).double().flatten(1)
    deviation = (0.25 * 0.75 / kept.shape[1]) ** 0.5
    assert (kept.mean(1) - 0.75).abs().max() < 5 * deviation
    correlation = torch.corrcoef(kept) - torch.eye(8)
    assert correlation.abs().max() < 5 / kept.shape[1] ** 0.5
    neighbours = kept.unflatten(1, (300, 40))
    for a, b in ((neighbours[:, 1:], neighbours[:, :-1]), (neighbours[..., 1:], neighbours[..., :-1])):
        both = (a * b).mean()
        assert abs(both - 0.75**2) < 5 * (0.75**2 * (1 - 0.75**2) / a.numel()) ** 0.5


def test_masks_do_not_depend_on_the_width() -> None:
    like = torch.empty(20, 100)
    whole = _native.dropout_mask(like, 2, 0.5, 9)
    for d in (1, 2, 5, 64, 99):
        assert torch.equal(_native.dropout_mask(like[:, :d], 2, 0.5, 9), whole[:, :d])


# --- derivatives ---


def test_second_derivatives_agree_with_the_loop() -> None:
    rowptr, col, *values = problem(12, 3)
    for options in ((3,), OPTIONS):
        hessians = []
        for function in (loop, _native.propagate):
            leaves = [v.clone().requires_grad_() for v in values]
            first = torch.autograd.grad(
                function(rowptr, col, *leaves, *options).pow(3).sum(), leaves, create_graph=True
            )
            second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves, create_graph=True)
            hessians.append([*first, *second, *torch.autograd.grad(sum(g.sum() for g in second), leaves)])
        for actual, right in zip(*reversed(hessians), strict=True):
            assert torch.allclose(actual, right, rtol=1e-10, atol=1e-11)


def test_forward_over_reverse() -> None:
    rowptr, col, edge, diagonal, x = problem(8, 2)

    def gradient(edge: Tensor) -> Tensor:
        return torch.func.grad(lambda e: _native.propagate(rowptr, col, e, diagonal, x, *OPTIONS).sin().sum())(edge)

    tangent = torch.ones_like(edge)
    _, actual = torch.func.jvp(gradient, (edge,), (tangent,))
    expected = (gradient(edge + 1e-6 * tangent) - gradient(edge - 1e-6 * tangent)) / 2e-6
    assert torch.allclose(actual, expected, rtol=1e-6, atol=1e-8)


# --- memory, errors ---


@pytest.mark.parametrize("steps", [1, 2, 20, 1000])
@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize(("n", "d"), [(2485, 1433), (2485, 64), (20_000, 64), (100_000, 64), (70_000, 200)])
def test_memory_does_not_grow_with_steps(n: int, d: int, steps: int, adjoint: bool) -> None:
    """Beside the result of n d numbers at most twice as many."""
    rowptr, col = torch.zeros(n + 1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    edge, diagonal, x = torch.zeros(0), torch.zeros(n), torch.empty(n, d)
    size = _C.propagate_workspace(rowptr, col, edge, diagonal, x, (steps, 0.1, 0.5, 0, adjoint), 2)
    assert size <= 2 * n * d


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("n", "d"), [(300, 200), (50_000, 64)])
def test_interruption(n: int, d: int, count: int) -> None:
    """Ctrl-C ends a call that would take minutes."""
    rowptr, col, edge, diagonal, x = problem(n, d, F32)
    timer = threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGINT))
    with threads(count), pytest.raises(KeyboardInterrupt):
        timer.start()
        _native.propagate(rowptr, col, edge, diagonal, x, 2**20 if n > 1000 else 2**24)
    timer.join()


def test_errors() -> None:
    rowptr, col, edge, diagonal, x = problem(6, 2)
    with pytest.raises(TypeError, match="edge: expected float64, got float32"):
        _native.propagate(rowptr, col, edge.float(), diagonal, x, 1)
    with pytest.raises(TypeError, match="rowptr: expected int32"):
        _native.product(rowptr.long(), col, edge, x)
    with pytest.raises(ValueError, match="x: expected shape"):
        _native.product(rowptr, col, edge, x[:5])
    with pytest.raises(ValueError, match="diagonal: has another size"):
        _native.propagate(rowptr, col, edge, diagonal[:5], x, 1)
    with pytest.raises(ValueError, match="b: has another size"):
        _native.edge_dot(rowptr, col, x, x[:, :1])
    with pytest.raises(ValueError, match="steps >= 0"):
        _native.propagate(rowptr, col, edge, diagonal, x, -1)
    with pytest.raises(ValueError, match="dropout in"):
        _native.propagate(rowptr, col, edge, diagonal, x, 1, 0.0, 1.0)
