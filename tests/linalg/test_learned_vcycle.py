"""The learned V-cycle: symmetry and definiteness, transfers, the native cycle beside the reference, training."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kantor.datasets import poisson_scenes as scenes
from kantor.linalg import LearnedVCycle, PoissonGrid, cg, train_vcycle
from kantor.linalg._vcycle_reference import (
    Level,
    Neighbours,
    build_levels,
    dirichlet_factor,
    levels_of,
    prolong,
    restrict,
)
from systems import F32, F64, random

GRIDS = [(16, 16), (17, 23), (9, 40), (16, 16, 16), (7, 9, 12), (5, 6, 11)]


def mixed(grid: tuple[int, ...], seed: int = 0) -> PoissonGrid:
    """Solid, fluid and air at random, in blocks; parts of the fluid touch no air."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand([-(-n // 3) for n in grid], generator=generator)
    for axis, n in enumerate(grid):
        u = u.repeat_interleave(3, axis).narrow(axis, 0, n)
    flags = torch.where(u < 0.15, 0, torch.where(u > 0.85, 3, 2))
    flags[-1] = 3
    return PoissonGrid(flags)


def open_scene(grid: tuple[int, ...], seed: int = 0) -> PoissonGrid:
    return PoissonGrid(scenes.smoke_balls(grid, seed=seed))


def perturbed(dim: int, **options: Any) -> LearnedVCycle:
    """Stencils without any symmetry, near damped Jacobi."""
    net = LearnedVCycle(dim, pretrained=False, **options)
    with torch.no_grad():
        net.stencils += 0.03 * random(*net.stencils.shape, seed=1)
        net.scales += 0.1 * random(*net.scales.shape, seed=2)
    return net


def vector(A: PoissonGrid, seed: int = 0, count: int = 1) -> Tensor:
    return random(count, *A.grid, seed=seed) * A.mask


# --- parameters ---


@pytest.mark.parametrize(("dim", "count"), [(2, 60), (3, 168)])
def test_number_of_parameters(dim: int, count: int) -> None:
    assert sum(p.numel() for p in LearnedVCycle(dim).parameters()) == count
    assert sum(p.numel() for p in LearnedVCycle(dim, pretrained=False).parameters()) == count
    assert not list(LearnedVCycle(dim, "rbgs").parameters())


@pytest.mark.parametrize("dim", [2, 3])
def test_weights_of_the_package(dim: int) -> None:
    """Symmetric under all rotations and reflections, with a positive symbol, so that K is positive definite."""
    net = LearnedVCycle(dim)
    for k in net.stencils.detach():
        for axis in range(dim):
            torch.testing.assert_close(k, k.flip(axis), rtol=0, atol=2e-6)
            torch.testing.assert_close(k, k.transpose(0, axis), rtol=0, atol=2e-6)
        symbol = torch.fft.fftn(torch.nn.functional.pad(k, [0, 5] * dim).roll([-1] * dim, list(range(dim))))
        assert symbol.real.min() > 0.01
        assert symbol.imag.abs().max() < 1e-5
    assert bool((net.scales > 0.5).all())


def test_state_dict_round_trip() -> None:
    net, other = perturbed(2), LearnedVCycle(2)
    other.load_state_dict(net.state_dict())
    torch.testing.assert_close(other.stencils, net.stencils, rtol=0, atol=0)


# --- the hierarchy ---


def reference_levels(A: PoissonGrid) -> list[tuple[Tensor, Tensor]]:
    """Dense matrices of two levels and of the interpolation between them, written with loops."""
    grid = A.grid
    faces, d = A.coefficients()
    diagonal = A.diagonal().reshape(grid)
    cells = list(np.ndindex(*grid))
    number = {cell: i for i, cell in enumerate(cells)}
    coarse = [math.ceil(n / 2) for n in grid]
    fine_matrix, P = (
        torch.zeros(len(cells), len(cells), dtype=F64),
        torch.zeros(len(cells), math.prod(coarse), dtype=F64),
    )
    coarse_matrix = torch.zeros(math.prod(coarse), math.prod(coarse), dtype=F64)

    def block(cell: tuple[int, ...]) -> int:
        return int(np.ravel_multi_index([i // 2 for i in cell], coarse))

    for cell, i in number.items():
        fine_matrix[i, i] += d[cell]
        coarse_matrix[block(cell), block(cell)] += d[cell] / 1.5
        if diagonal[cell] > 0:
            P[i, block(cell)] += 1
        for axis in range(len(grid)):
            before = (*cell[:axis], cell[axis] - 1, *cell[axis + 1 :])
            if cell[axis] == 0 or (c := float(faces[axis][cell])) == 0:
                continue
            j = number[before]
            for matrix, a, b, value in (
                (fine_matrix, i, j, c),
                (coarse_matrix, block(cell), block(before), c / 2),
            ):
                if a != b:
                    matrix[a, a] += value
                    matrix[b, b] += value
                    matrix[a, b] -= value
                    matrix[b, a] -= value
            if cell[axis] % 2 == 0:  # across the border of two blocks
                for a, own, other in ((i, cell, before), (j, before, cell)):
                    P[a, block(other)] += 0.25
                    P[a, block(own)] -= 0.25
    return [(fine_matrix, P), (coarse_matrix, P)]


def dense(operator: Neighbours) -> Tensor:
    n = math.prod(operator.grid)
    return operator(torch.eye(n, dtype=F64).reshape(n, *operator.grid)).flatten(1).T


@pytest.mark.parametrize("grid", [(9, 8), (7, 13), (5, 4, 6), (4, 5, 5)], ids=str)
def test_levels_and_interpolation_by_loops(grid: tuple[int, ...]) -> None:
    A = mixed(grid, seed=3)
    fine, coarse = levels_of(A)[:2]
    (matrix, P), (coarse_matrix, _) = reference_levels(A)
    torch.testing.assert_close(dense(fine.A), matrix)
    torch.testing.assert_close(dense(coarse.A), coarse_matrix)
    e = torch.eye(P.shape[1], dtype=F64).reshape(-1, *coarse.A.grid)
    torch.testing.assert_close(prolong(fine, e).flatten(1).T, P)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_restriction_is_the_transpose(grid: tuple[int, ...]) -> None:
    levels = levels_of(mixed(grid))
    for fine, coarse in pairwise(levels):
        e, r = random(*coarse.A.grid, seed=1), random(*fine.A.grid, seed=2)
        left, right = (r * prolong(fine, e)).sum(), (restrict(fine, r) * e).sum()
        assert abs(float(left - right)) <= 1e-12 * float(r.norm() * e.norm())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_constants_stay_constant_next_to_solid_and_air(grid: tuple[int, ...]) -> None:
    A = mixed(grid)
    fine, coarse = levels_of(A)[:2]
    constant = prolong(fine, torch.ones(coarse.A.grid, dtype=F64))
    linked = fine.A.diagonal > 0
    torch.testing.assert_close(constant, linked.to(F64))


def test_distance_to_the_surface() -> None:
    """The product of the factors is 2 / 3, then 3 / 5 and so on: half a fine cell less as blocks grow."""
    cells = [1.0]
    for level in range(4):
        cells.append(cells[-1] * 2 * dirichlet_factor(level))
    distance = [1.0] + [(2**level / 2 + 0.5) for level in range(1, 5)]
    torch.testing.assert_close(cells, [2**level / d for level, d in enumerate(distance)])


# --- the cycle ---


@pytest.mark.parametrize("smoother", ["stencil", "jacobi", "rbgs"])
@pytest.mark.parametrize("nu", [1, 2])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_symmetric(grid: tuple[int, ...], nu: int, smoother: Any) -> None:
    A = open_scene(grid)
    net = perturbed(len(grid), nu=nu) if smoother == "stencil" else LearnedVCycle(len(grid), smoother, nu)
    u, v = vector(A, 1), vector(A, 2)
    Mu, Mv = net(A, u).detach(), net(A, v).detach()
    left, right = (u * Mv).sum(), (v * Mu).sum()
    assert abs(float(left - right)) <= 1e-10 * float(u.norm() * Mv.norm())


def eigenvalues(net: LearnedVCycle, A: PoissonGrid) -> Tensor:
    """Of M A on its range."""
    n = A.num_unknowns
    units = A.expand(torch.eye(n, dtype=F64))
    with torch.no_grad():
        M = A.compress(net(A, units))
    values, vectors = torch.linalg.eigh(A.to_csr().dense())
    root = vectors[:, values > 1e-10] * values[values > 1e-10].sqrt()
    return torch.linalg.eigvalsh(root.T @ M @ root)


@pytest.mark.parametrize("smoother", ["stencil", "jacobi", "rbgs"])
@pytest.mark.parametrize(
    "flags",
    [
        scenes.smoke_balls((16, 16), seed=3),
        scenes.tank((16, 16)),
        scenes.box_dirichlet((16, 16)),
        scenes.dam((16, 16)),
        scenes.droplets((16, 16), seed=1),
        scenes.baffles((16, 16)),
        scenes.labyrinth((16, 16), seed=1),
        scenes.smoke_sphere((9, 9, 9)),
        scenes.droplets((9, 9, 9), seed=1),
    ],
    ids=["balls", "tank", "box", "dam", "droplets", "baffles", "labyrinth", "sphere 3-D", "droplets 3-D"],
)
def test_eigenvalues_between_0_and_2(flags: Tensor, smoother: Any) -> None:
    values = eigenvalues(LearnedVCycle(flags.ndim, smoother), PoissonGrid(flags))
    assert values.min() > 0
    assert values.max() < 2


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dim", [2, 3])
def test_definite_on_random_cells(dim: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand([20, 16, 7][:dim] if dim == 2 else [9, 8, 7], generator=generator)
    flags = torch.where(u < 0.2 * seed, 0, torch.where(u > 0.9, 3, 2))
    values = eigenvalues(LearnedVCycle(dim), PoissonGrid(flags))
    assert values.min() > 0
    assert values.max() < 2


@pytest.mark.parametrize("scene", [scenes.smoke_balls, scenes.smoke_sphere, scenes.box_dirichlet, scenes.dam])
@pytest.mark.parametrize("dim", [2, 3])
def test_sweeps_contract(dim: int, scene: Any) -> None:
    assert max(LearnedVCycle(dim).contraction(PoissonGrid(scene((48, 56) if dim == 2 else (20, 24, 22))))) < 2


def test_contraction_is_the_largest_eigenvalue() -> None:
    A = PoissonGrid(scenes.smoke_sphere((9, 9)))
    net = LearnedVCycle(2)
    level = levels_of(A)[0]
    n = A.num_unknowns
    k = net.stencils.detach()[0]
    units = A.expand(torch.eye(n, dtype=F64)) * level.inverse_root
    N = torch.nn.functional.conv2d(units[:, None], k[None, None], padding=1)[:, 0] * level.inverse_root
    largest = torch.linalg.eigvals(A.compress(N) @ A.to_csr().dense()).real.max()
    torch.testing.assert_close(net.contraction(A, 500)[0], float(largest), rtol=1e-3, atol=0)


@pytest.mark.parametrize("smoother", ["stencil", "jacobi", "rbgs"])
@pytest.mark.parametrize("nu", [1, 2])
@pytest.mark.parametrize("grid", [*GRIDS, (1, 90), (130, 3), (3, 2, 40)], ids=str)
def test_native_cycle_is_the_reference(grid: tuple[int, ...], nu: int, smoother: Any) -> None:
    flags = torch.full(grid, 2)
    flags[..., -1] = 3
    if min(grid) > 6:
        flags[tuple(slice(2, 5) for _ in grid)] = 0
        flags[tuple(slice(4, 6) for _ in grid)] = 3
    A = PoissonGrid(flags)
    net = perturbed(len(grid), nu=nu) if smoother == "stencil" else LearnedVCycle(len(grid), smoother, nu)
    r = vector(A, 1, count=2)
    expected = net(A, r).detach()
    actual = net.bind(A, walls=False, precision=F64).matvec(r)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
    single = net.bind(A, walls=False, precision=F32).matvec(r)
    torch.testing.assert_close(single, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_with_coefficients() -> None:
    grid = (20, 26)
    faces = [random(*(n + (a == axis) for a, n in enumerate(grid)), seed=axis).exp() for axis in range(2)]
    A = PoissonGrid(scenes.smoke_sphere(grid), face_coef=faces)
    net, r = LearnedVCycle(2), vector(A)
    expected = net(A, r).detach()
    torch.testing.assert_close(net.bind(A, precision=F64).matvec(r), expected, rtol=1e-10, atol=1e-10)


def test_spacing_scales_the_inverse() -> None:
    flags, net = scenes.tank((12, 14)), LearnedVCycle(2)
    A, scaled = PoissonGrid(flags), PoissonGrid(flags, spacing=0.5)
    torch.testing.assert_close(net(scaled, vector(A)), net(A, vector(A)) / 4)


def test_flat_and_grid_shaped_and_precision() -> None:
    A, net = open_scene((12, 15)), LearnedVCycle(2)
    r = random(2, 3, *A.grid)  # not zero outside of the fluid
    z = net(A, r)
    assert z.shape == r.shape
    assert bool((z[..., ~A.mask] == 0).all())
    torch.testing.assert_close(net(A, r.flatten(-2)), z.flatten(-2), rtol=0, atol=0)
    assert net(A, r.float()).dtype is F32
    torch.testing.assert_close(net(A, r.float()).double(), z, rtol=0, atol=1e-4)


def test_a_batch_of_grids_is_the_grids_one_by_one() -> None:
    grids = [open_scene((18, 20), seed) for seed in range(3)]
    coefficients = [A.coefficients() for A in grids]
    faces = [torch.stack([c[axis] for c, _ in coefficients])[:, None] for axis in range(2)]
    stacked = build_levels(faces, torch.stack([d for _, d in coefficients])[:, None])
    for s, A in enumerate(grids):
        for one, all_of_them in zip(levels_of(A), stacked, strict=True):
            assert isinstance(one, Level)
            torch.testing.assert_close(all_of_them.A.diagonal[s, 0], one.A.diagonal)
            torch.testing.assert_close(all_of_them.inverse_root[s, 0], one.inverse_root)


def test_derivatives() -> None:
    A = PoissonGrid(scenes.smoke_sphere((9, 10)))
    net = perturbed(2)
    r = vector(A)[0].requires_grad_()
    stencils, scales = net.stencils.detach().requires_grad_(), net.scales.detach().requires_grad_()

    def apply(r: Tensor, stencils: Tensor, scales: Tensor) -> Any:
        return torch.func.functional_call(net, {"stencils": stencils, "scales": scales}, (A, r))

    assert torch.autograd.gradcheck(apply, (r, stencils, scales), fast_mode=True)
    assert torch.autograd.gradgradcheck(apply, (r, stencils, scales), fast_mode=True)


# --- iterations ---


def count(A: PoissonGrid, net: LearnedVCycle) -> int:
    b = vector(A, seed=5)[0]
    return cg(A, b, M=net.bind(A), rtol=1e-6).check().iterations


SIZES = {2: {"small": (64, 128), "full": (64, 256)}, 3: {"small": (32,), "full": (32, 64)}}


@pytest.mark.slow
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("name", ["smoke_balls", "smoke_sphere", "tank"])
def test_iterations(name: str, dim: int, size: str) -> None:
    """At most 11 in two dimensions and 9 in three, and about half of what damped Jacobi needs."""
    for n in SIZES[dim][size]:
        A = PoissonGrid(getattr(scenes, name)((n,) * dim))
        learned, untrained = count(A, LearnedVCycle(dim)), count(A, LearnedVCycle(dim, pretrained=False))
        assert learned <= (9 if dim == 2 else 8)
        assert learned <= 0.65 * untrained
        assert learned < count(A, LearnedVCycle(dim, "rbgs"))


@pytest.mark.slow
def test_iterations_do_not_grow_with_the_grid(size: str) -> None:
    large = 128 if size == "full" else 64
    few, more = (count(open_scene((n,) * 3), LearnedVCycle(3)) for n in (32, large))
    assert more <= 1.5 * few


def test_odd_sizes() -> None:
    assert count(open_scene((101, 77)), LearnedVCycle(2)) <= 9
    assert count(open_scene((33, 29, 35)), LearnedVCycle(3)) <= 8


# --- training ---


def small_scenes() -> list[PoissonGrid]:
    return [
        PoissonGrid(f) for f in (scenes.smoke_balls((20, 20)), scenes.tank((20, 20)), scenes.smoke_sphere((16, 24)))
    ]


def weights(net: LearnedVCycle) -> Tensor:
    return torch.cat([net.stencils.detach().flatten(), net.scales.detach()])


def test_training_reduces_iterations() -> None:
    net = LearnedVCycle(2, pretrained=False)
    result = train_vcycle(net, small_scenes(), guards=PoissonGrid(scenes.dam((20, 20))), steps=30, iterations=4)
    assert result.steps == len(result.losses) == 30
    assert result.validation_loss < 0.85 * result.losses[0]
    A = open_scene((32, 32), seed=9)
    assert count(A, net) < count(A, LearnedVCycle(2, pretrained=False))
    assert "LearnedVCycle(2-D, stencil" in repr(result)


def test_training_in_three_dimensions() -> None:
    net = LearnedVCycle(3, pretrained=False)
    result = train_vcycle(net, PoissonGrid(scenes.smoke_sphere((10, 9, 8))), steps=15, iterations=3, groups=1)
    assert result.losses[-3:].mean() < result.losses[:3].mean()
    torch.testing.assert_close(net.stencils[0], net.stencils[5], rtol=0, atol=0)


def test_one_iteration_is_the_scaled_loss() -> None:
    """``|b - a A q|^2 / |b|^2`` with ``a = q'b / q'Aq`` is what one step of conjugate gradients leaves."""
    A, net = PoissonGrid(scenes.tank((18, 18))), LearnedVCycle(2, pretrained=False)
    b = torch.randn((1, 3, *A.grid), generator=torch.Generator().manual_seed(4)).double()[0] * A.mask
    q = net(A, b).detach()
    Aq = A.matvec(q)
    a = (q * b).sum((1, 2)) / (q * Aq).sum((1, 2))
    left = (b - a[:, None, None] * Aq).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)
    result = train_vcycle(net, A, steps=1, batch=3, iterations=1, seed=4)
    assert result.losses[0] == pytest.approx(float(left.log().mean().exp()), rel=1e-4)


def test_resumed_is_uninterrupted(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 12, "iterations": 3, "batch": 1, "seed": 7}
    whole, parts = LearnedVCycle(2, pretrained=False), LearnedVCycle(2, pretrained=False)
    expected = train_vcycle(whole, small_scenes(), **options)
    file = tmp_path / "vcycle.pt"
    first = train_vcycle(parts, small_scenes(), checkpoint=file, callback=lambda info: info.step == 5, **options)
    assert first.stopped
    assert first.steps == 5
    resumed = LearnedVCycle(2, pretrained=False)
    second = train_vcycle(resumed, small_scenes(), checkpoint=file, **options)
    assert second.steps == 12
    np.testing.assert_array_equal(second.losses, expected.losses)
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)
    with pytest.raises(ValueError, match="checkpoint.*another training: seed differ"):
        train_vcycle(resumed, small_scenes(), checkpoint=file, **(options | {"seed": 8}))


def test_interrupted_training_keeps_its_weights(tmp_path: Path) -> None:
    net, file = LearnedVCycle(2, pretrained=False), tmp_path / "vcycle.pt"
    before = weights(net).clone()

    def interrupt(info: Any) -> None:
        if info.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_vcycle(net, small_scenes(), steps=9, iterations=2, checkpoint=file, callback=interrupt)
    result = train_vcycle(net, small_scenes(), steps=9, iterations=2, checkpoint=file)
    assert result.steps == 9
    assert not torch.equal(weights(net), before)


# --- errors ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 4}, "LearnedVCycle: dim: expected 2 or 3, got 4"),
        ({"dim": 2, "smoother": "sor"}, "smoother: expected 'stencil', 'jacobi' or 'rbgs', got 'sor'"),
        ({"dim": 2, "nu": 0}, "nu: expected an integer from 1 to 8, got 0"),
    ],
)
def test_constructor_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearnedVCycle(**arguments)


def test_grid_errors() -> None:
    flat, solid = open_scene((12, 12)), open_scene((8, 8, 8))
    net = LearnedVCycle(2)
    for call in (lambda A: net(A, torch.ones(8, 8, 8)), net.bind, net.contraction):
        with pytest.raises(ValueError, match=r"expected 2 dimensions, got the grid \(8, 8, 8\)"):
            call(solid)
        with pytest.raises(TypeError, match="grid: expected a PoissonGrid, got Tensor"):
            call(flat.flags)
    with pytest.raises(ValueError, match=r"r: expected shape \(..., 12, 12\) on cpu, got \(11, 12\)"):
        net(flat, torch.ones(11, 12))
    with pytest.raises(TypeError, match="r: expected dtype float32 or float64"):
        net(flat, torch.ones(12, 12, dtype=torch.int64))
    with pytest.raises(ValueError, match="Gauss-Seidel always contracts"):
        LearnedVCycle(2, "rbgs").contraction(flat)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: expected a positive integer, got 0"),
        ({"batch": 1.5}, "batch: expected a positive integer, got 1.5"),
        ({"iterations": -1}, "iterations: expected a positive integer"),
        ({"groups": 7}, "groups: expected an integer from 1 to 6, got 7"),
        ({"contraction": 2.0}, "contraction: expected a number between 0 and 2, got 2.0"),
        ({"lr": math.nan}, "lr: expected a positive finite number"),
        ({"scenes": []}, "scenes: expected at least one grid, got none"),
        ({"scenes": [open_scene((8, 8))]}, "more than 64 cells"),
        ({"guards": [open_scene((8, 8, 8))]}, "guards: expected grids of 2 dimensions"),
    ],
)
def test_training_errors(options: dict[str, Any], message: str) -> None:
    arguments = {"scenes": open_scene((12, 12)), "steps": 1} | options
    with pytest.raises(ValueError, match=message):
        train_vcycle(LearnedVCycle(2, pretrained=False), **arguments)


def test_training_type_errors() -> None:
    A = open_scene((12, 12))
    with pytest.raises(TypeError, match="net: expected a LearnedVCycle, got Linear"):
        train_vcycle(torch.nn.Linear(1, 1), A)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nothing to train"):
        train_vcycle(LearnedVCycle(2, "jacobi"), A)
    with pytest.raises(TypeError, match="scenes: expected a PoissonGrid or a list of them, got Tensor"):
        train_vcycle(LearnedVCycle(2), A.flags)  # type: ignore[arg-type]
