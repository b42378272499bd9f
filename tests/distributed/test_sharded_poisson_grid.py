"""Grids in slabs: products, closed components, multigrid and cg are those of one process, whatever the cut."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import ranks as processes
from kantor import _C
from kantor._ranks import Ranks
from kantor.datasets import poisson_scenes as scenes
from kantor.distributed import ShardedMultigrid, ShardedPoissonGrid
from kantor.linalg import LearnedVCycle, Multigrid, PoissonGrid, capped_cg, cg

F32, F64 = torch.float32, torch.float64
SOLID, FLUID, AIR = 0, 2, 3

# Planes of each rank, as shares of the first axis: uneven, thin, none at all.
CUTS: dict[int, list[list[float]]] = {
    1: [[1]],
    2: [[0.5, 0.5], [0.04, 0.96], [1, 0]],
    3: [[0.3, 0.36, 0.34], [0.5, 0, 0.5], [0, 0.06, 0.94]],
    4: [[0.25, 0.25, 0.25, 0.25], [0.1, 0.05, 0.05, 0.8], [0, 0.02, 0, 0.98], [0.6, 0.04, 0.04, 0.32]],
}


def cut(shares: list[float], planes: int) -> list[int]:
    """Whole planes, at least one where the share is not zero."""
    counts = [max(1, int(share * planes)) if share else 0 for share in shares]
    counts[counts.index(max(counts))] += planes - sum(counts)
    return counts


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def pools(shape: tuple[int, ...]) -> Tensor:
    """Closed pools that slabs cut through, side by side and one around another, and an open one."""
    flags = torch.full(shape, FLUID, dtype=torch.uint8)
    flags[:, ..., ::7] = SOLID  # walls along the cut axis: components reach through all slabs
    flags[5, ..., :7] = SOLID  # and one across
    flags[0] = SOLID
    flags[-1, ..., -1] = AIR
    flags[-2, ..., 8:-1] = FLUID
    return flags


def serpent(n: int) -> Tensor:
    """One closed corridor up and down through all slabs, so that labels meet many times."""
    flags = torch.full((n, n), SOLID, dtype=torch.uint8)
    flags[:, ::2] = FLUID
    flags[-1, 1::4] = FLUID
    flags[0, 3::4] = FLUID
    return flags


SCENES = {
    "tank": lambda: scenes.tank((40, 24)),
    "balls": lambda: scenes.smoke_balls((22, 18, 20)),
    "odd": lambda: scenes.smoke_balls((33, 17)),
    "maze": lambda: scenes.labyrinth((38, 40)),
    "maze 3d": lambda: scenes.labyrinth((14, 12, 13)),
    "pools": lambda: pools((24, 29)),
    "pools 3d": lambda: pools((17, 6, 15)),
    "serpent": lambda: serpent(31),
}


def faces_of(flags: Tensor) -> list[Tensor]:
    """Coefficients between 0.5 and 1.5, in units that need scaling."""
    return [
        1e7 * (0.5 + torch.rand(tuple(n + (a == axis) for a, n in enumerate(flags.shape)), dtype=F64,
                                generator=torch.Generator().manual_seed(axis)))
        for axis in range(flags.ndim)
    ]  # fmt: skip


def right_hand_side(A: PoissonGrid, *lead: int) -> Tensor:
    """Random, and in the range of A."""
    flat = A.confined(random(*lead, A.shape[0]))
    return A._without_means(flat, A._component_sums(flat)) if A.closed_components[1] else flat


def both(ranks: Ranks, name: str, counts: list[float], faces: bool, dtype: torch.dtype = F64) -> tuple[Any, Any]:
    flags = SCENES[name]()
    coefficients = faces_of(flags) if faces else None
    options: dict[str, Any] = {"spacing": 0.1, "face_coef": coefficients}
    whole = PoissonGrid(flags, **options).to(dtype)
    return whole, ShardedPoissonGrid.from_global(flags, ranks, counts=cut(counts, len(flags)), **options).to(dtype)


def cases(cuts: list[list[float]], size: str) -> Iterator[tuple[str, list[float], bool, int]]:
    """Scene, shares, whether with coefficients, and a number: all of them, or each scene twice."""
    for number, (name, faces) in enumerate(itertools.product(SCENES, (False, True))):
        for k, counts in enumerate(cuts):
            if size == "full" or (number + number // 2) % len(cuts) == k:
                yield name, counts, faces, number


# --- on the ranks ---


def _products(ranks: Ranks, cuts: list[list[float]], size: str) -> None:
    for name, counts, faces, _ in cases(cuts, size):
        whole, A = both(ranks, name, counts, faces)
        x = random(2, *whole.grid)
        x[:, whole.flags != FLUID] = float("nan")  # no part of it
        y, labels, diagonal = A.gather(A.matvec(A.split(x))), A.closed_components[0], A.gather(A.diagonal())
        labels = torch.cat(ranks.all_gather(labels))
        back = A.whole()
        with ranks.together():
            expected = whole.matvec(x)
            case = (name, counts, faces)
            assert A.n == whole.shape[0]
            assert (y - expected).abs().max() <= 1e-13 * expected.abs().max(), case
            assert A.closed_components[1] == whole.closed_components[1], case
            assert torch.equal(labels, whole.closed_components[0]), case
            assert torch.allclose(diagonal.flatten(), whole.diagonal(), rtol=1e-14), case
            assert torch.equal(back.matvec(x), expected), case


CYCLES: list[tuple[int, dict[str, Any]]] = [
    (64, {}),
    (200, {"sweeps": 2}),
    (64, {"sweeps": 3, "precision": F64}),
    (64, {"smoother": "jacobi"}),
    (300, {"walls": False}),
    (10**6, {}),
]


def _cycles(ranks: Ranks, cuts: list[list[float]], size: str) -> None:
    for name, counts, faces, number in cases(cuts, size):
        whole, A = both(ranks, name, counts, faces)
        r = random(2, *whole.grid)
        some = CYCLES if size == "full" else [CYCLES[0], CYCLES[1 + number % 5]]
        for below, options in some:
            M = ShardedMultigrid(A, whole_below=below, **options)
            z = A.gather(M.matvec(A.split(r)))
            with ranks.together():
                one = Multigrid(whole, **options)
                case = (name, counts, faces, below, options)
                assert torch.equal(z, one.matvec(r)), case
                assert [level["size"] for level in M.levels] == [level["size"] for level in one.levels], case
                assert M.has_walls == one.has_walls, case
                assert any(level["cut"] for level in M.levels) == (below < whole.shape[0]), case


def _solves(ranks: Ranks, cuts: list[list[float]], size: str) -> list[int]:
    iterations = []
    for name, counts, faces, number in cases(cuts, size):
        if size == "small" and number % 4 in (1, 2):  # each scene once
            continue
        whole, A = both(ranks, name, counts, faces)
        b = right_hand_side(whole, 2)
        mine = A.split(b.unflatten(-1, whole.grid))
        small = ShardedMultigrid(A, whole_below=64, sweeps=2)
        for M in ("multigrid", small, "jacobi")[: 3 if size == "full" or number == 0 else 2]:
            result = cg(A, mine, M=M, rtol=1e-9)
            x = A.gather(result.x)
            assert x is not None
            with ranks.together():
                own = M if isinstance(M, str) else Multigrid(whole, sweeps=2)
                expected = cg(whole, b, M=own, rtol=1e-9)
                case = (name, counts, faces, M)
                assert result.converged, case
                # Rounding in sums makes a difference after hundreds of iterations, not after ten.
                assert abs(result.iterations - expected.iterations) <= max(1, expected.iterations // 100), case
                x = x.flatten(1)
                residual = (whole.matvec(x) - b).norm(dim=-1)
                assert bool((residual <= 1.01e-9 * b.norm(dim=-1)).all()), case
                assert (x - expected.x).norm() <= 1e-5 * expected.x.norm(), case  # condition times tolerance
                if whole.closed_components[1]:
                    assert whole._component_sums(x).abs().max() <= 1e-9 * x.abs().max() * x.shape[-1], case
            iterations.append(result.iterations)
    return iterations


def _single_precision(ranks: Ranks) -> None:
    for faces in (False, True):
        whole, A = both(ranks, "balls", CUTS[ranks.size][-1], faces, F32)
        b = right_hand_side(whole).float()
        results = [cg(A, A.split(b.view(whole.grid)), M=M, rtol=1e-5) for M in ("multigrid", "ic0")]
        double = cg(A.to(F64), A.split(b.view(whole.grid)).double(), M="multigrid", storage=F32, rtol=1e-10)
        assert double.converged
        assert all(result.converged and result.x.dtype is F32 for result in results)
        assert abs(results[0].iterations - cg(whole, b, M="multigrid", rtol=1e-5).iterations) <= 1


def _learned(ranks: Ranks) -> None:
    whole, A = both(ranks, "balls", CUTS[ranks.size][1], True)
    cycle = LearnedVCycle(3)
    M = cycle.bind(A)
    assert isinstance(M, ShardedMultigrid)
    r = random(*whole.grid)
    small = ShardedMultigrid(A, whole_below=64, smoother="stencil", stencils=cycle.stencils, scales=cycle.scales)
    for operator in (M, small):
        assert torch.equal(A.gather(operator.matvec(A.split(r))), cycle.bind(whole).matvec(r))
    assert small.safer().smoother == "jacobi"
    g = right_hand_side(whole)
    options: dict[str, Any] = {"damping": 1.0, "rtol": 1e-8, "M_inv": "multigrid"}
    d = A.gather(capped_cg(A, A.split(g.view(whole.grid)).flatten(), **options).d.view(A.grid))
    expected = capped_cg(whole, g, **options).d
    assert (d.flatten() - expected).norm() <= 1e-6 * expected.norm()


def _extreme_sizes(ranks: Ranks) -> None:
    """A right-hand side that single precision cannot hold, and that vanishes on some ranks."""
    whole, A = both(ranks, "tank", CUTS[ranks.size][0], False)
    b = torch.zeros(whole.grid, dtype=F64)
    b[3, 4] = 1e-90
    result = cg(A, A.split(b), M="multigrid", rtol=1e-8)
    x = A.gather(result.x)
    assert result.converged
    expected = cg(whole, b, M="multigrid", rtol=1e-8)
    assert abs(result.iterations - expected.iterations) <= 1
    assert (x - expected.x).norm() <= 1e-6 * expected.x.norm()


def _derivatives(ranks: Ranks) -> None:
    whole, A = both(ranks, "pools", CUTS[ranks.size][-1], False)
    b, weight = right_hand_side(whole).view(whole.grid), random(*whole.grid, seed=3)
    mine = A.split(b).requires_grad_()
    (cg(A, mine, M="multigrid", rtol=1e-12).x * A.split(weight)).sum().backward()
    grad = A.gather(mine.grad)
    b.requires_grad_()
    (cg(whole, b, M="multigrid", rtol=1e-12).x * weight).sum().backward()
    assert (grad - b.grad).norm() <= 1e-8 * b.grad.norm()
    v = A.split(random(*whole.grid, seed=4)).requires_grad_()
    for operator in (A, ShardedMultigrid(A, whole_below=64, precision=F64)):  # symmetric: the gradient is the product
        (g,) = torch.autograd.grad((operator.matvec(v) * A.split(weight)).sum(), v)
        assert (g - operator.matvec(A.split(weight))).norm() <= 1e-12 * max(1, float(g.norm()))


def _errors(ranks: Ranks) -> list[str]:
    said = []

    def fails(kind: type[Exception], work: Callable[[], object]) -> None:
        with pytest.raises(kind) as caught:
            work()
        said.append(str(caught.value))

    last = ranks.rank == ranks.size - 1
    open_flags = torch.full((3, 8), FLUID)
    fails(ValueError, lambda: ShardedPoissonGrid(open_flags[:, : 8 - last], ranks))
    fails(ValueError, lambda: ShardedPoissonGrid(open_flags + 2 * last, ranks))
    fails(ValueError, lambda: ShardedPoissonGrid(torch.zeros(3, 8, dtype=torch.int64), ranks))
    faces = [torch.full((4, 8), 1.0 + ranks.rank, dtype=F64), torch.ones(3, 9, dtype=F64)]
    fails(ValueError, lambda: ShardedPoissonGrid(open_flags, ranks, face_coef=faces))
    ones = [torch.ones_like(c).requires_grad_() for c in faces]
    fails(ValueError, lambda: ShardedPoissonGrid(open_flags, ranks, face_coef=ones))
    fails(ValueError, lambda: ShardedPoissonGrid(open_flags, ranks, face_coef=ones if last else None))
    A = ShardedPoissonGrid(open_flags, ranks)
    fails(ValueError, lambda: cg(A, torch.ones(A.grid, dtype=F64), M="multigrid"))
    fails(TypeError, lambda: Multigrid(A))
    fails(TypeError, A.to_csr)
    fails(ValueError, lambda: ShardedMultigrid(A, sweeps=0))
    fails(TypeError, lambda: ShardedMultigrid(PoissonGrid(open_flags)))
    assert repr(ShardedMultigrid(A)).startswith("ShardedMultigrid(rbgs, V-cycle")
    assert f"rank {ranks.rank} of {ranks.size}: planes" in repr(A)
    return said


def _traffic(ranks: Ranks, planes: int) -> dict[str, tuple[int, int]]:
    """Bytes and messages of one more iteration, kind by kind."""
    A = ShardedPoissonGrid.from_global(scenes.tank((planes, 8, 12)), ranks)
    b = A.confined(random(A.shape[0], seed=ranks.rank))
    M = ShardedMultigrid(A, whole_below=200)
    assert sum(bool(level["cut"]) for level in M.levels) == 2
    counted = []
    for maxiter in (2, 5):
        ranks.traffic.reset()
        cg(A, b, M=M, rtol=0, maxiter=maxiter)
        counted.append([(kind.bytes, kind.messages) for kind in (ranks.traffic.exchange, ranks.traffic.all_gather,
                                                                 ranks.traffic.all_reduce)])  # fmt: skip
    few, many = counted
    return {
        name: ((m[0] - f[0]) // 3, (m[1] - f[1]) // 3)
        for name, f, m in zip(("exchange", "all_gather", "all_reduce"), few, many, strict=True)
    }


def _memory(ranks: Ranks) -> tuple[int, int]:
    """Bytes of the tensors that the operator and the cycle hold, and those of one process."""
    flags = scenes.tank((96, 24, 32))
    A = ShardedPoissonGrid.from_global(flags, ranks)
    M = ShardedMultigrid(A, whole_below=2000)
    M.matvec(torch.zeros(A.shape[0], dtype=F64))
    whole = PoissonGrid(flags)
    one = Multigrid(whole)

    def size(value: Any) -> int:
        if isinstance(value, Tensor):
            return value.nbytes
        if isinstance(value, dict):
            return sum(map(size, value.values()))
        if isinstance(value, list | tuple):
            return sum(map(size, value))
        return size(vars(value)) if type(value).__name__ in ("_Level", "_Buffers") else 0

    workspace = _C.multigrid_workspace(one._layout, 1)
    return size(vars(A)) + size(vars(M)), size(vars(whole)) + size(vars(one)) + workspace


# --- the tests ---

SIZES = pytest.mark.parametrize("size_of_group", [1, 2, 3, 4])


@SIZES
def test_products_and_components(size_of_group: int, size: str) -> None:
    processes.run(size_of_group, _products, CUTS[size_of_group], size)


@SIZES
def test_the_cycle_is_that_of_one_process_to_the_last_bit(size_of_group: int, size: str) -> None:
    processes.run(size_of_group, _cycles, CUTS[size_of_group], size)


@pytest.mark.parametrize("options", [{}, {"sweeps": 2}, {"smoother": "jacobi"}])
def test_threads_leave_the_bits(options: dict[str, Any]) -> None:
    """One rank, levels large enough for two threads: what a thread makes beyond its planes is its neighbour's."""
    flags = scenes.smoke_balls((48, 36, 40))
    A = ShardedPoissonGrid(flags, Ranks())
    r = random(A.shape[0])
    assert torch.get_num_threads() == 2
    assert torch.equal(ShardedMultigrid(A, **options).matvec(r), Multigrid(PoissonGrid(flags), **options).matvec(r))


@SIZES
def test_solves(size_of_group: int, size: str) -> None:
    first, *others = processes.run(size_of_group, _solves, CUTS[size_of_group], size)
    assert all(other == first for other in others)


@pytest.mark.parametrize("work", [_single_precision, _learned, _extreme_sizes, _derivatives])
def test_uses(work: Callable[[Ranks], None]) -> None:
    processes.run(3, work)


def test_errors_are_the_same_on_all_ranks_and_name_the_one() -> None:
    first, *others = (said[:7] for said in processes.run(3, _errors))  # the others name their rank's part of A
    assert all(other == first for other in others)
    shapes, flags, no_fluid, differ, derivative, missing, closed = first
    assert "planes of one shape" in shapes
    assert "(3, 7)" in shapes
    assert flags.startswith("rank 2: PoissonGrid: flags: expected 0 (solid), 2 (fluid) or 3 (air), got 4 at (0, 0)")
    assert "no fluid cell (2) on any rank" in no_fluid
    assert "rank 1:" in differ
    assert "differ; give both the same" in differ
    assert "no derivatives" in derivative
    assert "face_coef (given or not)" in missing
    assert "closed component 0 (72 cells, first at (0, 0))" in closed  # of all ranks together


@pytest.mark.parametrize("size_of_group", [2, 3, 4])
def test_traffic_is_that_of_the_model(size_of_group: int) -> None:
    """docs/guide/distributed.md: planes of 8 x 12 cells, 12 to a rank, two levels cut, the third on all ranks."""
    planes = 12 * size_of_group
    plane, coarse = 8 * 12, 4 * 6
    rest = (planes // 4 // size_of_group) * (2 * 3)  # cells of a rank's part of the first level that is whole
    for rank, counted in enumerate(processes.run(size_of_group, _traffic, planes)):
        neighbours = 1 if rank in (0, size_of_group - 1) else 2
        product = 8 * plane
        down = 4 * 3 * (plane + coarse)
        up = 4 * 2 * coarse
        assert counted["exchange"] == (neighbours * (product + down + up), neighbours * 4), rank
        assert counted["all_gather"] == (4 * rest, 1), rank
        assert counted["all_reduce"] == (8 * (3 + 6), 3), rank


def test_memory_is_shared() -> None:
    for mine, alone in processes.run(4, _memory):
        # A quarter each, and at most 8 ghost planes to 24 of the finest level, 16 to 12 of the next; labels and the
        # vectors' second copies come on top.
        assert mine <= 0.5 * alone
