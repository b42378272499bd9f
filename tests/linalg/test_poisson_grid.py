"""PoissonGrid against matrices assembled from its definition, analytic spectra, cosine transforms and direct solves."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import scipy.fft
import scipy.sparse as sp
import scipy.sparse.linalg as spla
import torch
from scipy.ndimage import label
from torch import Tensor, func
from torch.library import opcheck

from devices import home
from kantor.datasets import poisson_scenes as scenes
from kantor.linalg import PoissonGrid, capped_cg, cg, dcdm, fcg, ic0, jacobi
from op_checks import threads
from systems import F32, F64, error, random, solve

SOLID, FLUID, AIR = 0, 2, 3
SHAPES = [
    (1, 1), (1, 7), (9, 1), (2, 3), (5, 5), (8, 8), (17, 23), (7, 40),
    (1, 1, 1), (1, 1, 5), (3, 1, 4), (2, 2, 2), (5, 6, 7), (9, 4, 11),
]  # fmt: skip
FLAG_DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]
NAMES = list(scenes.SCENES)


# --- the definition, in numpy ---


def random_flags(shape: Sequence[int], seed: int = 0, solid: float = 0.25, air: float = 0.1) -> Tensor:
    """Any mixture, with at least one fluid cell."""
    draws = np.random.default_rng(seed).random(tuple(shape))
    flags = np.where(draws < solid, SOLID, np.where(draws < solid + air, AIR, FLUID))
    flags.flat[0] = FLUID
    return torch.from_numpy(flags)


def random_coefficients(shape: Sequence[int], seed: int = 0, dtype: torch.dtype = F64) -> list[Tensor]:
    """Positive, one tensor an axis, with one more entry along it."""
    return [
        random(*(n + (a == axis) for a, n in enumerate(shape)), seed=seed + axis).abs().add(0.5).to(dtype)
        for axis in range(len(shape))
    ]


def matrix_of(flags: Tensor, coefficients: Sequence[Tensor] | None = None, spacing: float = 1.0) -> sp.csr_array:
    """The matrix on the fluid cells in C order, cell by cell and side by side."""
    padded = np.pad(flags.cpu().numpy().astype(int), 1)  # outside is solid
    cells = np.argwhere(padded == FLUID)
    number = np.full(padded.shape, -1)
    number[tuple(cells.T)] = np.arange(len(cells))
    diagonal = np.zeros(len(cells))
    rows, cols, values = [], [], []
    for axis in range(padded.ndim):
        for side in (-1, 1):
            other = cells.copy()
            other[:, axis] += side
            kind = padded[tuple(other.T)]
            face = cells - 1  # in the array, whose first cell is 1 in the padded one
            face[:, axis] += side > 0
            c = np.ones(len(cells)) if coefficients is None else coefficients[axis].double().numpy()[tuple(face.T)]
            diagonal += np.where(kind == SOLID, 0.0, c)
            fluid = kind == FLUID
            rows.append(np.flatnonzero(fluid))
            cols.append(number[tuple(other[fluid].T)])
            values.append(-c[fluid])
    n = len(cells)
    off = sp.coo_array((np.concatenate(values), (np.concatenate(rows), np.concatenate(cols))), shape=(n, n))
    return ((off + sp.diags_array(diagonal)) / spacing**2).tocsr()


def closed_labels(flags: Tensor) -> np.ndarray[Any, Any]:
    """Components of the fluid without air beside them, numbered from 0 in C order; -1 elsewhere."""
    array = flags.numpy()
    numbers, count = label(array == FLUID)
    beside_air = np.zeros(array.shape, bool)
    for axis in range(array.ndim):
        for step in (-1, 1):
            shifted = np.roll(array, step, axis)
            edge: list[Any] = [slice(None)] * array.ndim
            edge[axis] = 0 if step == 1 else -1
            shifted[tuple(edge)] = SOLID
            beside_air |= shifted == AIR
    open_ = set(np.unique(numbers[beside_air & (array == FLUID)]))
    result, used = np.full(array.shape, -1), 0
    for k in range(1, count + 1):  # numbered by their first cells
        if k not in open_:
            result[numbers == k] = used
            used += 1
    return result


def compatible(flags: Tensor, b: Tensor) -> Tensor:
    """b with zero mean over every closed component."""
    labels, b = torch.from_numpy(closed_labels(flags)), b.clone()
    for k in range(int(labels.max()) + 1):
        inside = labels == k
        b[..., inside] -= b[..., inside].mean(-1, keepdim=True)
    return b


def fluid(flags: Tensor, x: Tensor) -> Tensor:
    """The entries of a grid-shaped vector in fluid cells."""
    return x.cpu()[..., flags == FLUID]


def forms(shape: Sequence[int], seed: int = 0) -> dict[str, dict[str, Any]]:
    return {"voxels": {}, "faces": {"face_coef": random_coefficients(shape, seed)}}


# --- products ---


@pytest.mark.parametrize("form", ["voxels", "faces"])
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(shape: tuple[int, ...], dtype: torch.dtype, form: str, device: str) -> None:
    for seed in range(3):
        flags, x = random_flags(shape, seed), random(2, *shape, seed=seed).to(dtype)
        coefficients = None if form == "voxels" else random_coefficients(shape, seed, dtype)
        matrix = matrix_of(flags, coefficients, spacing=0.25)
        moved = None if coefficients is None else [c.to(home(device)) for c in coefficients]
        A = PoissonGrid(flags, face_coef=moved, spacing=0.25, dtype=dtype, device=home(device))
        y = A.matvec(x.to(home(device)))
        expected = torch.from_numpy((matrix @ fluid(flags, x).double().numpy().T).T)
        largest = float(abs(matrix).max()) * float(x.abs().max()) + 1e-30
        assert (fluid(flags, y) - expected).abs().max() <= 16 * torch.finfo(dtype).eps * largest
        assert not y.cpu()[..., flags != FLUID].any()
        assert (y.shape, y.dtype) == (x.shape, dtype)
        flat = A.matvec(x.to(home(device)).flatten(1))
        assert torch.equal(flat, y.flatten(1))
        one_of_batch = A.matvec(x[1].to(home(device)))
        assert torch.equal(one_of_batch, y[1])
        assert A.num_unknowns == matrix.shape[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matrices(shape: tuple[int, ...]) -> None:
    """to_csr, compressed or not, diagonal and dense; symmetric; row sums are the faces towards air."""
    for name, options in forms(shape, seed=2).items():
        flags = random_flags(shape, 2)
        A = PoissonGrid(flags, spacing=0.5, **options)
        matrix = matrix_of(flags, options.get("face_coef"), 0.5)
        size = float(abs(matrix).max()) + 1e-300
        csr = A.to_csr().to_scipy()
        assert abs(csr - matrix).max() <= 1e-14 * size
        assert abs(csr - csr.T).max() <= 1e-14 * size
        assert csr.nnz == (matrix != 0).sum() or csr.nnz >= matrix.nnz
        mask = A.mask.flatten()
        whole = A.to_csr(compressed=False).dense()
        alone = np.diag((matrix.diagonal() == 0).astype(float))  # rows of zeros get a one there, too
        np.testing.assert_allclose(whole[mask][:, mask].numpy(), matrix.toarray() + alone, rtol=0, atol=1e-14 * size)
        assert torch.equal(whole[~mask], torch.eye(len(mask), dtype=F64)[~mask])
        dense = A.dense()
        np.testing.assert_allclose(dense[mask][:, mask].numpy(), matrix.toarray(), rtol=0, atol=1e-14 * size)
        assert not dense[~mask].any()
        assert not dense[:, ~mask].any()
        np.testing.assert_allclose(A.diagonal()[mask].numpy(), matrix.diagonal(), rtol=1e-14)
        assert not A.diagonal()[~mask].any()
        assert A.T is A
        if name == "voxels":
            padded = np.pad(flags.numpy(), 1)
            around = sum(
                np.roll(padded == AIR, step, axis) for axis in range(padded.ndim) for step in (-1, 1)
            )  # the rim is solid, so that nothing comes round from the other end
            air = np.asarray(around)[tuple([slice(1, -1)] * padded.ndim)][flags.numpy() == FLUID]
            np.testing.assert_array_equal(matrix.sum(1) * 0.25, air)
            np.testing.assert_allclose(csr.sum(1) * 0.25, air, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_definite_on_open_scenes(name: str) -> None:
    for shape in ((12, 12), (13, 14)) if name in ("baffles", "labyrinth") else ((12, 12), (9, 8, 9)):
        flags = scenes.SCENES[name](shape)
        A = PoissonGrid(flags)
        matrix = A.to_csr().to_scipy().toarray()
        np.testing.assert_array_equal(matrix, matrix_of(flags).toarray())
        smallest = np.linalg.eigvalsh(matrix)[0]
        labels, count = A.closed_components
        np.testing.assert_array_equal(labels.numpy(), closed_labels(flags))
        if name == "pools":
            assert count == 1
            assert abs(smallest) < 1e-12
        else:
            assert count == 0
            assert smallest > 1e-4


def test_compressing() -> None:
    shape = (5, 6, 7)
    flags = random_flags(shape, 5)
    A = PoissonGrid(flags)
    x = random(2, 3, *shape)
    v = A.compress(x)
    assert torch.equal(v, x[..., flags == FLUID])
    assert torch.equal(A.compress(x.flatten(2)), v)
    back = A.expand(v)
    assert torch.equal(back, torch.where(flags == FLUID, x, torch.zeros_like(x)))
    assert torch.equal(A.compress(back), v)
    assert torch.autograd.gradcheck(A.compress, (x.clone().requires_grad_(),))
    assert torch.autograd.gradcheck(A.expand, (v.clone().requires_grad_(),))
    assert torch.equal(torch.vmap(A.expand)(v), back)
    with pytest.raises(ValueError, match=r"PoissonGrid.compress: x: expected shape \(..., 5, 6, 7\) or \(..., 210\)"):
        A.compress(random(5, 6))
    with pytest.raises(ValueError, match=rf"PoissonGrid.expand: v: expected shape \(..., {A.num_unknowns}\), got \(3,"):
        A.expand(random(3))
    with pytest.raises(TypeError, match="PoissonGrid.expand: v: expected a torch.Tensor, got list"):
        A.expand([1.0])  # type: ignore[arg-type]


# --- what is given as flags ---


@pytest.mark.parametrize("dtype", FLAG_DTYPES, ids=str)
def test_every_integer(dtype: torch.dtype) -> None:
    flags = random_flags((6, 7), 1)
    A, x = PoissonGrid(flags.to(dtype)), random(6, 7)
    assert A.flags.dtype is torch.uint8
    assert torch.equal(A.matvec(x), PoissonGrid(flags).matvec(x))


def test_flags_of_any_layout() -> None:
    flags, x = random_flags((6, 7, 5), 1), random(6, 7, 5)
    expected = PoissonGrid(flags).matvec(x)
    for form in (flags.mT.contiguous().mT, torch.stack([flags, flags + 1], -1)[..., 0], flags.flip(0).flip(0)):
        assert torch.equal(PoissonGrid(form).matvec(x), expected)
    row = torch.tensor([FLUID, FLUID, SOLID, AIR])
    A = PoissonGrid(row.expand(6, 4))
    assert torch.equal(A.matvec(random(6, 4)), PoissonGrid(row.expand(6, 4).contiguous()).matvec(random(6, 4)))
    coefficients = random_coefficients((6, 7, 5))
    strided = [torch.stack([c, -c], -1)[..., 0] for c in coefficients]
    assert torch.equal(
        PoissonGrid(flags, face_coef=strided).matvec(x), PoissonGrid(flags, face_coef=coefficients).matvec(x)
    )


def test_the_grid_keeps_its_flags() -> None:
    """What happens to the caller's tensor afterwards does not matter."""
    flags = random_flags((6, 7), 1).to(torch.uint8)
    A, x = PoissonGrid(flags), random(6, 7)
    expected = PoissonGrid(flags.clone()).matvec(x)
    flags.fill_(FLUID)
    assert torch.equal(A.matvec(x), expected)
    assert torch.equal(A.flags == FLUID, A.mask)


@pytest.mark.parametrize("form", ["voxels", "faces"])
def test_vectors_of_any_layout(form: str) -> None:
    flags = random_flags((6, 8), 1)
    A, x = PoissonGrid(flags, **forms((6, 8))[form]), random(3, 6, 8)
    expected = A.matvec(x)
    for given in (x.mT.contiguous().mT, torch.stack([x, x], -1)[..., 0], torch._neg_view(-x)):
        assert torch.equal(A.matvec(given), expected)
    assert torch.equal(A.matvec(x[:1].expand(3, 6, 8)), expected[:1].expand(3, 6, 8))
    assert A.matvec(random(0, 6, 8)).shape == (0, 6, 8)


@pytest.mark.parametrize("junk", [7.0, math.inf, math.nan])
@pytest.mark.parametrize("form", ["voxels", "faces"])
def test_other_cells_are_ignored(form: str, junk: float, device: str) -> None:
    """In x, b and x0, whatever the method; and results are zero there."""
    shape = (8, 9)
    flags = scenes.smoke_balls(shape)
    flags[:, 2:4] = SOLID
    options = {k: [c.to(home(device)) for c in v] for k, v in forms(shape)[form].items()}
    A = PoissonGrid(flags, device=home(device), **options)
    b, x0 = (random(2, *shape, seed=k).to(home(device)) for k in (0, 1))
    b = compatible(flags, b.cpu()).to(home(device))
    spoiled_b, spoiled_x0 = (torch.where(A.mask, v, torch.full_like(v, junk)) for v in (b, x0))
    assert torch.equal(A.matvec(spoiled_x0), A.matvec(x0 * A.mask))
    for M in (None, "jacobi", "ic0"):
        expected = solve(A, b * A.mask, x0 * A.mask, M=M, rtol=1e-10).x
        x = solve(A, spoiled_b, spoiled_x0, M=M, rtol=1e-10).x
        assert error(x, expected) < 1e-12
        assert not x[..., ~A.mask].any()


@pytest.mark.parametrize("form", ["voxels", "faces"])
def test_other_cells_are_ignored_by_flexible_methods(form: str) -> None:
    shape = (8, 9)
    flags = scenes.smoke_balls(shape)
    A = PoissonGrid(flags, **forms(shape)[form])
    b = random(*shape)
    spoiled = torch.where(A.mask, b, torch.full_like(b, math.nan))
    expected = spla.spsolve(matrix_of(flags, A.face_coef).tocsc(), fluid(flags, b).numpy())
    for x in (fcg(A, spoiled, rtol=1e-10).x, dcdm(A, spoiled, lambda r: r, rtol=1e-10).x):
        assert error(x[A.mask], torch.from_numpy(expected)) < 1e-8
        assert not x[~A.mask].any()
    d = capped_cg(A, (b * A.mask).flatten(), damping=1e-12, rtol=1e-9).d.reshape(shape)
    assert error(-d[A.mask], torch.from_numpy(expected)) < 1e-6
    assert not d[~A.mask].any()


# --- analytic cases ---


@pytest.mark.parametrize("shape", [(9, 12), (7, 6, 8)], ids=str)
def test_sines_are_eigenvectors(shape: tuple[int, ...], device: str) -> None:
    """The fluid inside a rim of air: n inner cells an axis, p = 0 at the centres of the air cells."""
    A = PoissonGrid(scenes.box_dirichlet(shape), spacing=0.5, device=home(device))
    inner = [n - 2 for n in shape]
    for mode in ([1] * len(shape), [n // 2 for n in inner], inner):
        angles = [math.pi * k / (n + 1) for k, n in zip(mode, inner, strict=True)]
        u = torch.ones(shape, dtype=F64)
        for axis, angle in enumerate(angles):
            wave = torch.sin(angle * torch.arange(shape[axis], dtype=F64))
            u = u * wave.reshape([-1 if a == axis else 1 for a in range(len(shape))])
        u = torch.where(A.mask.cpu(), u, torch.zeros_like(u))
        eigenvalue = sum(2 - 2 * math.cos(angle) for angle in angles) / 0.25
        v = A.matvec(u.to(home(device))).cpu()
        assert (v - eigenvalue * u).norm() <= 1e-12 * eigenvalue * u.norm()


@pytest.mark.parametrize("shape", [(8, 12), (1, 30), (6, 5, 7)], ids=str)
def test_cosine_transform_of_a_closed_box(shape: tuple[int, ...]) -> None:
    A = PoissonGrid(torch.full(shape, FLUID), spacing=0.1)
    ones = torch.ones(shape, dtype=F64)
    assert A.matvec(ones).abs().max() <= 1e-13 / 0.01
    b = random(*shape)
    b -= b.mean()
    symbol = np.zeros(shape)
    for axis, n in enumerate(shape):
        line = (2 - 2 * np.cos(np.pi * np.arange(n) / n)) / 0.01
        symbol = symbol + line.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    modes = scipy.fft.dctn(b.numpy(), norm="ortho")
    symbol.flat[0] = 1
    modes.flat[0] = 0
    expected = torch.from_numpy(scipy.fft.idctn(modes / symbol, norm="ortho"))
    for M in (None, "jacobi", "ic0"):
        x = solve(A, b, M=M, rtol=1e-12).x
        assert error(x, expected) < 1e-8
        assert abs(float(x.mean())) < 1e-14


@pytest.mark.parametrize("M", [None, "jacobi", "ic0"])
@pytest.mark.parametrize("name", NAMES)
def test_direct_solves(name: str, M: str | None) -> None:
    """Of every scene: the residual promised, and the solution up to the condition number."""
    for shape in ((20, 24), (16, 14, 15)):
        flags = scenes.SCENES[name](shape)
        b = compatible(flags, random(*shape))
        A = PoissonGrid(flags)
        result = solve(A, b, M=M, rtol=1e-8)
        matrix, right = matrix_of(flags), fluid(flags, b).numpy()
        residual = np.linalg.norm(right - matrix @ fluid(flags, result.x).numpy())
        assert residual <= 1.001e-8 * np.linalg.norm(right)
        if name != "pools":
            expected = spla.spsolve(matrix.tocsc(), right)
            condition = np.linalg.norm(expected) * abs(matrix).sum(1).max() / np.linalg.norm(right)
            assert error(fluid(flags, result.x), torch.from_numpy(expected)) <= 1e-8 * max(condition, 1.0) * 1e3
        assert not result.x[flags != FLUID].any()


@pytest.mark.parametrize("M", [None, "jacobi", "ic0"])
def test_preconditioned_solves_of_single_precision_and_batches(M: str | None, device: str) -> None:
    shape = (20, 24)
    flags = scenes.smoke_balls(shape)
    A = PoissonGrid(flags, dtype=F32, device=home(device))
    b = random(2, 3, *shape, dtype=F32)
    b[1, 1] = 0
    result = solve(A, b.to(home(device)), M=M, rtol=1e-4)
    expected = spla.spsolve(matrix_of(flags).tocsc(), fluid(flags, b).double().reshape(6, -1).numpy().T).T
    assert error(fluid(flags, result.x).reshape(6, -1), torch.from_numpy(expected)) < 1e-2
    assert not result.x[1, 1].any()
    refined = solve(A.to(F64), b.double().to(home(device)), M=M, rtol=1e-11, storage=F32)
    assert error(fluid(flags, refined.x).reshape(6, -1), torch.from_numpy(expected)) < 1e-8


def test_preconditioners_help() -> None:
    flags = scenes.smoke_balls((64, 64))
    A, b = PoissonGrid(flags), random(64, 64)
    plain, jacobi_, ic0_ = (solve(A, b, M=M, rtol=1e-6).iterations for M in (None, "jacobi", "ic0"))
    assert jacobi_ <= 1.05 * plain
    assert ic0_ < 0.5 * plain


def test_preconditioners_themselves() -> None:
    shape = (9, 10)
    flags, r = random_flags(shape, 4), random(90)
    for options in forms(shape).values():
        A = PoissonGrid(flags, **options)
        mask = A.mask.flatten()
        z = jacobi(A).matvec(r)
        assert error(z[mask] * A.diagonal()[mask], r[mask]) < 1e-14
        assert not z[~mask].any()
        factor = ic0(A)
        dense = factor.dense()
        assert error(dense.T, dense) < 1e-13
        assert torch.linalg.eigvalsh(dense[mask][:, mask])[0] > 0
        assert not dense[mask][:, ~mask].any()


# --- closed pools ---


def two_pools() -> Tensor:
    """One open above, one closed, and a closed cell alone."""
    flags = torch.full((6, 9), FLUID)
    flags[:, 4] = SOLID
    flags[-1, :4] = AIR
    flags[:, 7] = SOLID
    flags[:, 8] = SOLID
    flags[2, 8] = FLUID
    return flags


@pytest.mark.parametrize("M", [None, "jacobi", "ic0"])
@pytest.mark.parametrize("form", ["voxels", "faces"])
def test_closed_pools(form: str, M: str | None, device: str) -> None:
    flags = two_pools()
    coefficients = forms(flags.shape)[form].get("face_coef")
    moved = None if coefficients is None else [c.to(home(device)) for c in coefficients]
    A = PoissonGrid(flags, face_coef=moved, device=home(device))
    labels, count = A.closed_components
    assert count == 2
    np.testing.assert_array_equal(labels.cpu().numpy(), closed_labels(flags))
    b = compatible(flags, random(3, *flags.shape))
    b[..., 2, 8] = 0
    result = solve(A, b.to(home(device)), M=M, rtol=1e-10)
    pinv = torch.linalg.pinv(torch.from_numpy(matrix_of(flags, coefficients).toarray()), hermitian=True)
    assert error(fluid(flags, result.x), fluid(flags, b) @ pinv) < 1e-8
    for k in range(2):
        assert result.x.cpu()[..., labels.cpu() == k].mean(-1).abs().max() < 1e-14
    nudged = b + 1e-9 * random(*b.shape, seed=3)  # within rounding of compatible: taken
    nudged[..., 2, 8] = 0
    assert error(solve(A, nudged.to(home(device)), M=M, rtol=1e-6).x, result.x) < 1e-4


def test_incompatible_right_hand_sides() -> None:
    flags = two_pools()
    A, b = PoissonGrid(flags), compatible(two_pools(), random(6, 9))
    b[2, 8] = 0
    for solver in (cg, fcg, lambda A, b: dcdm(A, b, lambda r: r)):
        spoiled = b.clone()
        spoiled[0, 5] += 1
        with pytest.raises(ValueError, match=r": b: its sum over closed component 0 \(12 cells, first at \(0, 5\)\)"):
            solver(A, spoiled)
        spoiled = b.clone()
        spoiled[2, 8] = 1e-3
        with pytest.raises(ValueError, match=r": b: its sum over closed component 1 \(1 cells?, first at \(2, 8\)\)"):
            solver(A, torch.stack([b, spoiled]))
        spoiled = b.clone()
        spoiled[3, :4] += 100  # the open pool takes anything
        assert solver(A, spoiled).converged


def test_random_components() -> None:
    for seed in range(20):
        for shape in ((13, 17), (1, 40), (40, 1), (5, 7, 6)):
            flags = random_flags(shape, seed, solid=0.1 + 0.03 * seed, air=0.02)
            labels, count = PoissonGrid(flags).closed_components
            expected = closed_labels(flags)
            np.testing.assert_array_equal(labels.numpy(), expected)
            assert count == expected.max() + 1


def test_nothing_but_single_cells() -> None:
    """A checkerboard: no cell has a fluid neighbour. Closed, all rows are zero; with air for solid, a diagonal."""
    checks = torch.arange(6)[:, None] + torch.arange(7) & 1
    closed = PoissonGrid(torch.where(checks.bool(), FLUID, SOLID))
    assert closed.closed_components[1] == 21
    for M in (None, "jacobi", "ic0"):
        assert not solve(closed, torch.zeros(6, 7, dtype=F64), M=M).x.any()
    open_ = PoissonGrid(torch.where(checks.bool(), FLUID, AIR))
    b = random(6, 7)
    for M in (None, "jacobi", "ic0"):
        x = solve(open_, b, M=M, rtol=1e-12).x
        assert error(x[open_.mask], b[open_.mask] / open_.diagonal().reshape(6, 7)[open_.mask]) < 1e-12


# --- derivatives ---


def small_scene() -> Tensor:
    flags = torch.full((6, 6), FLUID)
    flags[0] = AIR
    flags[2:4, 2:4] = SOLID
    flags[:, 5] = SOLID
    flags[4, 5] = AIR
    return flags


def closed_scene() -> Tensor:
    flags = torch.full((6, 6), FLUID)
    flags[:, 3] = SOLID
    flags[0, :3] = AIR
    return flags


@pytest.mark.parametrize("M", [None, "jacobi", "ic0"])
@pytest.mark.parametrize("scene", [small_scene, closed_scene])
def test_derivatives_of_solutions(scene: Any, M: str | None) -> None:
    """By b and the coefficients: reverse, forward, second order, without care for what is in the other cells."""
    flags = scene()
    b = compatible(flags, random(6, 6)).requires_grad_()
    cy, cx = (c.requires_grad_() for c in random_coefficients((6, 6)))
    labels = torch.from_numpy(closed_labels(flags))

    def ours(b: Tensor, cy: Tensor, cx: Tensor) -> Tensor:
        if scene is closed_scene:  # stay in the range of the operator
            inside = (labels == 0).to(F64)
            b = b - inside * (b * inside).sum() / inside.sum()
        return solve(PoissonGrid(flags, face_coef=(cy, cx)), b, M=M, rtol=1e-13).x

    fast = M is not None
    assert torch.autograd.gradcheck(ours, (b, cy, cx), check_forward_ad=True, atol=1e-6, rtol=1e-4, fast_mode=fast)
    if M is None:
        modes = {"check_fwd_over_rev": True, "fast_mode": True}
        assert torch.autograd.gradgradcheck(ours, (b, cy, cx), atol=1e-4, rtol=1e-3, **modes)


@pytest.mark.parametrize("form", ["voxels", "faces"])
def test_derivatives_of_products(form: str) -> None:
    flags = small_scene()
    x = random(2, 6, 6).requires_grad_()
    if form == "voxels":
        A = PoissonGrid(flags, spacing=0.5)
        assert torch.autograd.gradcheck(A.matvec, (x,), check_forward_ad=True, check_batched_grad=True)
        return
    c = tuple(c.requires_grad_() for c in random_coefficients((6, 6)))

    def product(x: Tensor, *c: Tensor) -> Tensor:
        return PoissonGrid(flags, face_coef=c, spacing=0.5).matvec(x)

    assert torch.autograd.gradcheck(product, (x, *c), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(product, (x, *c), fast_mode=True)

    def entries(*c: Tensor) -> Tensor:
        A = PoissonGrid(flags, face_coef=c, spacing=0.5)
        return torch.cat([A.to_csr().values, A.diagonal()])

    assert torch.autograd.gradcheck(entries, c, check_forward_ad=True)


@pytest.mark.parametrize("form", ["voxels", "faces"])
def test_gradients_of_sums_over_all_cells(form: str) -> None:
    """The derivative of x.sum() is one also where there is no unknown: that must not reach the adjoint solve."""
    flags = small_scene()
    A = PoissonGrid(flags, **forms((6, 6))[form])
    b = random(6, 6).requires_grad_()
    (gradient,) = torch.autograd.grad(solve(A, b, rtol=1e-12).x.sum(), b)
    expected = np.linalg.solve(matrix_of(flags, A.face_coef).toarray(), np.ones(A.num_unknowns))
    assert error(gradient[A.mask], torch.from_numpy(expected)) < 1e-9
    assert not gradient[~A.mask].any()


def test_one_grid_for_many_gradients() -> None:
    """Two solves with one grid, each differentiated, one after the other."""
    flags = small_scene()
    c = [c.requires_grad_() for c in random_coefficients((6, 6))]
    A, b = PoissonGrid(flags, face_coef=c), random(6, 6)
    gradients = []
    for _ in range(2):
        x = solve(A, b, rtol=1e-12).x
        gradients.append(torch.autograd.grad((x * A.mask).square().sum(), c))
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)


def test_a_first_use_without_gradients_does_no_harm() -> None:
    flags = small_scene()
    c = [c.requires_grad_() for c in random_coefficients((6, 6))]
    A = PoissonGrid(flags, face_coef=c)
    with torch.no_grad():
        A.matvec(random(6, 6))
        A.diagonal()
    assert A.matvec(random(6, 6)).requires_grad
    assert solve(A, random(6, 6)).x.requires_grad


@pytest.mark.parametrize("junk", [math.nan, -1.0, 0.0, math.inf])
def test_coefficients_of_closed_faces_are_not_read(junk: float) -> None:
    flags, b = small_scene(), random(6, 6)
    coefficients = random_coefficients((6, 6))
    padded, spoiled = np.pad(flags.numpy(), 1), []
    for axis, c in enumerate(coefficients):
        cut = [slice(1, -1), slice(1, -1)]
        cut[axis] = slice(0, -1)
        before = padded[tuple(cut)]
        cut[axis] = slice(1, None)
        after = padded[tuple(cut)]
        read = ((before == FLUID) & (after != SOLID)) | ((after == FLUID) & (before != SOLID))
        spoiled.append(torch.where(torch.from_numpy(read), c, torch.full_like(c, junk)).requires_grad_())
    A, B = (PoissonGrid(flags, face_coef=c) for c in (coefficients, spoiled))
    assert torch.equal(A.matvec(b), B.matvec(b))
    assert torch.equal(A.diagonal(), B.diagonal())
    x = solve(B, b, rtol=1e-12).x
    assert torch.equal(solve(A, b, rtol=1e-12).x, x)
    for gradient in torch.autograd.grad((x * A.mask).square().sum(), spoiled):
        assert bool(gradient.isfinite().all())


# --- transforms ---


def test_vmap() -> None:
    flags = closed_scene()
    rows = compatible(flags, random(3, 6, 6))
    for options in forms((6, 6)).values():
        A = PoissonGrid(flags, **options)
        assert torch.equal(torch.vmap(A.matvec)(rows), A.matvec(rows))
        for M in (None, "jacobi", ic0(A)):
            actual = torch.vmap(lambda b, A=A, M=M: cg(A, b, M=M, rtol=1e-12).x)(rows)
            assert error(actual, solve(A, rows, M=M, rtol=1e-12).x) < 1e-10
            gradient = func.grad(lambda b, A=A, M=M: (cg(A, b, M=M, rtol=1e-12).x * A.mask).square().sum())
            looped = torch.stack([gradient(row) for row in rows])
            assert error(torch.vmap(gradient)(rows), looped) < 1e-8


def test_vmap_over_coefficients() -> None:
    flags, b = small_scene(), random(6, 6)
    cy, cx = (torch.stack(pair) for pair in zip(*(random_coefficients((6, 6), k) for k in (0, 5)), strict=True))

    def solution(cy: Tensor, cx: Tensor) -> Tensor:
        return cg(PoissonGrid(flags, face_coef=(cy, cx)), b, rtol=1e-12).x

    expected = torch.stack([solution(cy[k], cx[k]) for k in range(2)])
    assert error(torch.vmap(solution)(cy, cx), expected) < 1e-10


@pytest.mark.parametrize("asked_before", [False, True])
@pytest.mark.parametrize("form", ["voxels", "faces"])
def test_compile(form: str, asked_before: bool) -> None:
    torch._dynamo.reset()
    flags = closed_scene()
    A = PoissonGrid(flags, **forms((6, 6))[form])
    M = ic0(A)
    if asked_before:
        assert A.closed_components[1] == 1

    def step(b: Tensor) -> Tensor:
        return A.matvec(cg(A, 2 * b, M=M, rtol=1e-12).x) + A.matvec(b)

    b = compatible(flags, random(6, 6))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert error(compiled(b), step(b)) < 1e-10


def test_operator_checks() -> None:
    for flags, options in ((small_scene(), {}), (small_scene(), forms((6, 6))["faces"])):
        A = PoissonGrid(flags, **options)
        x = random(2, 36).requires_grad_()
        opcheck(torch.ops.kantor.matvec.default, (*A.encode(), x))
        b = random(2, 36) * A.mask.flatten()  # the bare operator does not confine gradients to the fluid
        opcheck(torch.ops.kantor.cg.default, (*A.encode(), [], [], [], b, None, 1e-12, 0.0, 100))


# --- reproducibility ---


@pytest.mark.parametrize("form", ["voxels", "faces"])
@pytest.mark.parametrize("shape", [(300, 260), (40, 41, 43), (1, 70_000)], ids=str)
def test_threads_change_no_bit(shape: tuple[int, ...], form: str) -> None:
    flags = random_flags(shape, 1, solid=0.05, air=0.05)
    b = compatible(flags, random(2, *shape)) if shape[0] > 1 else random(2, *shape)
    results = []
    for count in (1, 2):
        with threads(count):
            A = PoissonGrid(flags, **forms(shape)[form])
            results.append((A.matvec(b), solve(A, b, rtol=1e-2).x if shape[0] > 1 else b))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_copies() -> None:
    flags, x = small_scene(), random(6, 6)
    for options in forms((6, 6)).values():
        A = PoissonGrid(flags, spacing=0.5, **options)
        expected = A.matvec(x)
        for other in (copy.copy(A), copy.deepcopy(A), pickle.loads(pickle.dumps(A))):
            assert torch.equal(other.matvec(x), expected)
            assert repr(other) == repr(A)
        single = A.to(F32)
        assert (single.dtype, A.dtype) == (F32, F64)
        assert error(single.matvec(x.float()), expected) < 1e-6
        assert torch.equal(single.to(F64).mask, A.mask)
    assert repr(PoissonGrid(flags)) == f"PoissonGrid(6 x 6, {int((flags == 2).sum())} unknowns, float64, cpu)"


def test_sums() -> None:
    """Scaled and added, grids are ordinary operators."""
    flags, x = small_scene(), random(6, 6)
    A, B = PoissonGrid(flags), PoissonGrid(flags, face_coef=random_coefficients((6, 6)))
    total = 2.0 * A + 0.5 * B
    assert total.grid == (6, 6)
    assert error(total.matvec(x), 2 * A.matvec(x) + 0.5 * B.matvec(x)) < 1e-14
    assert error(total.dense(), 2 * A.dense() + 0.5 * B.dense()) < 1e-14
    assert error(total.to_csr().dense()[A.mask.flatten()], total.dense()[A.mask.flatten()]) < 1e-14


# --- errors ---


def test_errors_of_flags() -> None:
    good = small_scene()
    for flags, text in (
        ([[2]], "flags: expected a torch.Tensor, got list"),
        (good.double(), "flags: expected integers .* got torch.float64; call .to"),
        (good == 2, "flags: expected integers .* got torch.bool"),
        (good.to(torch.complex64), "flags: expected integers .* got torch.complex64"),
    ):
        with pytest.raises(TypeError, match=f"PoissonGrid: {text}"):
            PoissonGrid(flags)  # type: ignore[arg-type]
    for flags, text in (
        (good[0], r"flags: expected shape \(ny, nx\) or \(nz, ny, nx\), got \(6,\)"),
        (good.expand(2, 2, 6, 6), r"flags: expected shape .* got \(2, 2, 6, 6\); make one operator for each grid"),
        (good[:0], r"flags: expected shape .* got \(0, 6\)"),
        (
            torch.where(good == AIR, 1, good),
            r"flags: expected 0 \(solid\), 2 \(fluid\) or 3 \(air\), got 1 at \(0, 0\)",
        ),
        (torch.where(good == AIR, -1, good), r"got -1 at \(0, 0\)"),
        (torch.where(good == AIR, 258, good), r"got 258 at \(0, 0\)"),
        (torch.zeros(4, 4, dtype=torch.int64), "flags: there is no fluid cell"),
        (torch.full((4, 4), AIR), "flags: there is no fluid cell"),
    ):
        with pytest.raises(ValueError, match=f"PoissonGrid: .*{text}|{text}"):
            PoissonGrid(flags)


def test_errors_of_options() -> None:
    flags = small_scene()
    for spacing in (0, -1.0, math.nan, math.inf, "1", torch.tensor(1.0), 1e-200, 1e200):
        with pytest.raises(ValueError, match="PoissonGrid: spacing: expected a"):
            PoissonGrid(flags, spacing=spacing)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="PoissonGrid: dtype: expected dtype float32 or float64, got float16"):
        PoissonGrid(flags, dtype=torch.float16)
    cy, cx = random_coefficients((6, 6))
    with pytest.raises(ValueError, match="PoissonGrid: face_coef: expected 2 tensors, got 3"):
        PoissonGrid(flags, face_coef=(cy, cy, cx))
    with pytest.raises(TypeError, match="PoissonGrid: face_coef"):
        PoissonGrid(flags, face_coef=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="PoissonGrid: face_coef cx: expected a torch.Tensor, got float"):
        PoissonGrid(flags, face_coef=(cy, 1.0))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="PoissonGrid: face_coef cy: expected dtype float32 or float64, got int64"):
        PoissonGrid(flags, face_coef=(cy.long(), cx))
    with pytest.raises(TypeError, match="PoissonGrid: .* is float64, .*cx is float32"):
        PoissonGrid(flags, face_coef=(cy, cx.float()))
    with pytest.raises(ValueError, match=r"face_coef cy: expected shape \(7, 6\) for the grid \(6, 6\), got \(6, 7\)"):
        PoissonGrid(flags, face_coef=(cx, cy))
    for value in (0.0, -1.0, math.nan, math.inf):
        bad = cx.clone()
        bad[1, 1] = value
        with pytest.raises(ValueError, match="PoissonGrid: face_coef cx: expected positive finite values"):
            PoissonGrid(flags, face_coef=(cy, bad))


def test_errors_of_vectors() -> None:
    A, b = PoissonGrid(small_scene()), random(6, 6)
    with pytest.raises(TypeError, match="PoissonGrid.matvec"):
        A.matvec(b.float())
    with pytest.raises(ValueError, match=r"PoissonGrid.matvec: x: expected shape \(..., 36\), got \(6, 5\)"):
        A.matvec(b[:, :5])
    for solver in (cg, fcg, lambda A, b: dcdm(A, b, lambda r: r)):
        with pytest.raises(TypeError, match="b: expected dtype float32 or float64, got int64"):
            solver(A, b.long())
        with pytest.raises(TypeError, match="float32"):
            solver(A, b.float())
        with pytest.raises(ValueError, match="b"):
            solver(A, b[:5])
        for value in (math.nan, math.inf):
            spoiled = b.clone()
            spoiled[1, 0] = value
            with pytest.raises(ValueError, match="b: expected finite values"):
                solver(A, spoiled)
    if torch.cuda.is_available():
        with pytest.raises(ValueError, match="cuda"):
            cg(A, b.cuda())
    with pytest.raises(ValueError, match="meta"):
        cg(A, b.to("meta"))
