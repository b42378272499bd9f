"""Exact nearest neighbours: the same sets as a search in float64, whatever the points."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

import op_checks
from devices import home
from kantor.graph._neighbours import _knn, knn
from op_checks import OpCase

F32, F64 = torch.float32, torch.float64


def normal(n: int, d: int, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    return torch.randn(n, d, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plainly(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All distances in float64; equal ones in the order of the indices."""
    x = x.cpu().double()
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    distance, index = torch.sort(distance, dim=1, stable=True)
    return index[:, :k], distance[:, :k]


def agrees(x: Tensor, k: int) -> None:
    index, distance = knn(x, k)
    expected_index, expected = plainly(x, k)
    assert index.dtype == torch.int32
    assert distance.dtype == x.dtype
    assert torch.equal(index.cpu().long(), expected_index)
    torch.testing.assert_close(distance.cpu().double(), expected, rtol=4 * torch.finfo(x.dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
class TestEveryDevice:
    """Small, since the emulator is slow."""

    @pytest.mark.parametrize("d", [1, 2, 17, 100])
    def test_random_points(self, device: str, dtype: torch.dtype, d: int) -> None:
        for n, k in ((2, 1), (16, 15), (130, 5), (150, 40)):
            agrees(normal(n, d, dtype).to(home(device)), k)

    def test_a_lattice_is_in_the_order_of_the_indices(self, device: str, dtype: torch.dtype) -> None:
        axis = torch.arange(12.0, dtype=dtype)
        for k in (4, 9):
            agrees(torch.cartesian_prod(axis, axis).to(home(device)), k)

    def test_duplicates_are_at_distance_zero(self, device: str, dtype: torch.dtype) -> None:
        x = normal(50, 6, dtype).repeat_interleave(3, 0).to(home(device))
        _, distance = knn(x, 4)
        assert (distance[:, :2] == 0).all()
        assert (distance[:, 2:] > 0).all()
        agrees(torch.ones(120, 3, dtype=dtype, device=home(device)), 5)

    @pytest.mark.parametrize("k", [1, 4, 60])
    def test_more_duplicates_than_neighbours(self, device: str, dtype: torch.dtype, k: int) -> None:
        few_places = normal(7, 3, dtype)[torch.randint(0, 7, (180,), generator=torch.Generator().manual_seed(0))]
        one_place = normal(180, 3, dtype)
        one_place[40:150] = one_place[3]
        for x in (few_places, one_place):
            agrees(x.to(home(device)), k)

    def test_far_from_the_origin(self, device: str, dtype: torch.dtype) -> None:
        agrees((1e4 + normal(150, 8)).to(dtype).to(home(device)), 7)

    def test_clusters_whose_distance_hides_their_size(self, device: str, dtype: torch.dtype) -> None:
        x = normal(160, 5)
        x[::2] += 1e5 if dtype == F32 else 1e13
        agrees(x.to(dtype).to(home(device)), 6)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(("n", "d", "k"), [(3001, 3, 15), (2000, 64, 50), (500, 1000, 15), (1400, 8, 700)])
def test_as_sklearn(dtype: torch.dtype, n: int, d: int, k: int) -> None:
    x = normal(n, d, dtype)
    index, distance = knn(x, k)
    search = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(x.double())
    expected, expected_index = (torch.from_numpy(array) for array in search.kneighbors())
    torch.testing.assert_close(distance.double(), expected, rtol=1e-5, atol=0)
    assert torch.equal(index.long().sort().values, expected_index.sort().values)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_any_scale(scale: float) -> None:
    agrees((scale * normal(400, 7)).float(), 8)


def test_a_far_point_spoils_nothing() -> None:
    x = normal(500, 4)
    x[17] = 1e12
    agrees(x.float(), 6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_has_no_neighbours_and_is_none(bad: float) -> None:
    x = normal(100, 4)
    x[-1, 2] = bad
    index, distance = knn(x, 3)
    assert (index[-1] == -1).all()
    assert distance[-1].isnan().all()
    assert torch.equal(index[:-1], knn(x[:-1], 3)[0])


def test_no_derivative() -> None:
    _, distance = knn(normal(20, 3).requires_grad_(), 2)
    assert not distance.requires_grad


def test_ctrl_c_ends_the_search() -> None:
    x = torch.ones(100_000, 100)  # many seconds of work
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            knn(x, 5)
    finally:
        timer.cancel()
        timer.join()


@pytest.mark.parametrize(
    ("error", "match", "x", "k"),
    [
        (ValueError, "k: expected 1 to n - 1 = 9, got 0", normal(10, 3), 0),
        (ValueError, "got 10", normal(10, 3), 10),
        (ValueError, "k: expected", normal(1, 3), 1),
        (ValueError, "k: expected", normal(0, 3), 1),
        (ValueError, r"x: expected shape \(n, d\)", normal(10, 3)[0], 1),
        (ValueError, r"x: expected shape \(n, d\)", normal(10, 0), 1),
        (TypeError, "expected float32 or float64", torch.arange(12).view(4, 3), 1),
        (TypeError, "expected float32 or float64", normal(10, 3).half(), 1),
    ],
)
def test_bad_arguments(error: type[Exception], match: str, x: Tensor, k: int) -> None:
    with pytest.raises(error, match=match):
        knn(x, k)


CASE = OpCase(
    "knn",
    call=lambda x: knn(x, 3)[::-1],
    sample=lambda size, rand: (rand(size + 4, 5),),
    oracle=lambda x: plainly(x, 3)[1],
    free=(0,),
    sizes=(0, 1, 2, 17, 120),
    large_size=3001,
    op=_knn,
    op_arguments=lambda x: (x, 3),
)


@pytest.mark.parametrize(("check", "case", "device"), op_checks.parameters([CASE]))
def test_operator(check: Callable[[OpCase, str], None], case: OpCase, device: str) -> None:
    op_checks.run(check, case, device)
