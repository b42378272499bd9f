"""The sharded matrix by itself: products, how it is made, shares of vectors, derivatives, bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kantor._ranks import Ranks
from kantor.distributed import ShardedCSR, gather, shares, split
from ranks import outcomes, run
from systems_in_shares import COUNTS, F64, laplacian, matrix, sharded, vector


def _products(ranks: Ranks, counts: list[int] | None) -> dict[str, Any]:
    A = matrix()
    S = sharded(ranks, A, counts)
    x = vector(2, 3, A.shape[0])
    from_root = ShardedCSR.from_csr(A if ranks.rank == 0 else None, ranks, counts=counts, source=0)
    begin, end = S.begin, S.begin + S.shape[0]
    rows = A.to_scipy()[begin:end]
    from_rows = ShardedCSR.from_rows(rows, ranks)
    y = S.matvec(S.split(x))
    asymmetric = ShardedCSR.from_rows((2 if ranks.rank == ranks.size - 1 else 1) * rows, ranks)
    return {
        "product": S.gather(y),
        "equal": all(torch.equal(other.matvec(S.split(x)), y) for other in (from_root, from_rows)),
        "one": S.gather(S.matvec(S.split(x[0, 0].contiguous()))),
        "transposed": S.gather(S.T.matvec(S.split(x))),
        "diagonal": S.gather(S.diagonal()),
        "symmetric": S.asymmetry()[0],
        "asymmetric": asymmetric.asymmetry()[0],
        "shape": (S.shape, S.n, S.begin),
        "single": S.to(torch.float32).matvec(S.split(x.float())),
        "repr": repr(S),
    }


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_products_are_those_of_one_process(size: int) -> None:
    A, x = matrix(), vector(2, 3, 177)
    begin = 0
    for result in run(size, _products, COUNTS[size]):
        torch.testing.assert_close(result["product"], A.matvec(x), rtol=1e-13, atol=1e-12)
        torch.testing.assert_close(result["transposed"], A.T.matvec(x), rtol=1e-13, atol=1e-12)
        torch.testing.assert_close(result["one"], A.matvec(x)[0, 0], rtol=1e-13, atol=1e-12)
        assert torch.equal(result["diagonal"], A.diagonal())
        assert result["equal"]
        assert result["symmetric"] < 1e-14
        assert size == 1 or result["asymmetric"] > 1e-8
        assert result["shape"][1:] == (177, begin)
        begin += result["shape"][0][0]
        assert result["single"].dtype is torch.float32
        assert f"of {size}" in result["repr"]


def _shares(ranks: Ranks) -> list[Any]:
    x = vector(5, 7)
    mine = split(x, ranks, dim=0)
    dealt = split(x if ranks.rank == 1 else None, ranks, [3, 0, 4], source=1)
    everywhere, on_two = gather(mine, ranks, dim=0), gather(dealt, ranks, target=2)
    return [torch.equal(everywhere, x), on_two is not None and torch.equal(on_two, x), len(mine), dealt.shape[-1]]


def test_shares_of_vectors() -> None:
    assert shares(7, 3) == [2, 2, 3]
    assert run(3, _shares) == [[True, False, 1, 3], [True, False, 2, 0], [True, True, 2, 4]]


def _wrong(ranks: Ranks, case: str) -> None:
    A = matrix()
    if case == "counts":
        sharded(ranks, A, [100, 78])
    elif case == "column":
        col = A.col.clone()
        col[-1] = 200 if ranks.rank == 1 else col[-1]
        S = sharded(ranks, A)
        crow, begin = A.crow.long(), S.begin
        mine = slice(int(crow[begin]), int(crow[begin + S.shape[0]]))
        ShardedCSR(crow[begin : begin + S.shape[0] + 1] - crow[begin], col[mine], A.values[mine], ranks)
    elif case == "value":
        values = A.values.clone()
        values[-1] = torch.nan
        rows = [88, 89]
        ends = A.crow.long()[torch.tensor([0, rows[0], 177])]
        mine = slice(int(ends[ranks.rank]), int(ends[ranks.rank + 1]))
        crow = A.crow.long()[sum(rows[: ranks.rank]) : sum(rows[: ranks.rank + 1]) + 1]
        ShardedCSR(crow - crow[0], A.col[mine], values[mine], ranks)


@pytest.mark.parametrize(("case", "message"), [("counts", "add up to 177"), ("column", "rank 1: "), ("value", "nan")])
def test_a_bad_block_is_an_error_on_all_ranks(case: str, message: str) -> None:
    for error in outcomes(2, _wrong, case):
        assert isinstance(error, ValueError)
        assert message in str(error)


def _derivatives(ranks: Ranks, counts: list[int] | None) -> list[Any]:
    A = matrix()
    rows = list(counts or [177])
    begin = sum(rows[: ranks.rank])
    crow = A.crow.long()[begin : begin + rows[ranks.rank] + 1]
    values = A.values[crow[0] : crow[-1]].clone().requires_grad_()
    S = ShardedCSR(crow - crow[0], A.col[crow[0] : crow[-1]], values, ranks)
    x = S.split(vector(2, 177)).requires_grad_()
    weight = S.split(vector(2, 177, seed=2))
    (S.matvec(x) * weight).sum().backward()
    return [S.gather(x.grad), gather(values.grad, ranks, dim=0)]


@pytest.mark.parametrize("size", [1, 3])
def test_derivatives_of_a_product(size: int) -> None:
    A = matrix()
    values = A.values.clone().requires_grad_()
    A = type(A)(A.crow, A.col, values, A.shape)
    x = vector(2, 177).requires_grad_()
    (A.matvec(x) * vector(2, 177, seed=2)).sum().backward()
    for grad_x, grad_values in run(size, _derivatives, COUNTS[size]):
        torch.testing.assert_close(grad_x, x.grad, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad_values, values.grad, rtol=1e-12, atol=1e-12)


def _bytes(ranks: Ranks) -> tuple[int, int, int]:
    S = sharded(ranks, laplacian((12, 5, 4)))
    x = torch.ones(3, S.shape[0], dtype=F64)
    ranks.traffic.reset()
    S.matvec(x)
    return S.ghosts, ranks.traffic.exchange.bytes, ranks.traffic.exchange.messages


def test_a_product_sends_a_plane_to_each_neighbour() -> None:
    plane = 20
    assert run(3, _bytes) == [
        (plane, 3 * plane * 8, 1),
        (2 * plane, 3 * 2 * plane * 8, 2),
        (plane, 3 * plane * 8, 1),
    ]
