"""The diagonal of a Hessian by probes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kantor.optim import hessian_diagonal

F64 = torch.float64
A = torch.tensor([[4.0, 1.0, 0.0], [1.0, 3.0, 0.5], [0.0, 0.5, 2.0]], dtype=F64)

OUTSIDE = nn.Parameter(torch.ones(3, dtype=F64))


def value(params: list[Tensor]) -> Tensor:
    (w,) = params
    return 0.5 * w @ A @ w + w.cos().sum()


def test_mean_and_variance_of_the_estimate() -> None:
    w, count = torch.tensor([0.3, -1.0, 2.0], dtype=F64), 20_000
    H = A - w.cos().diag()
    variance = H.square().sum(1) - H.diag().square()

    def many(params: list[Tensor]) -> Tensor:  # the same problem in every row, each with a probe of its own
        (W,) = params
        return 0.5 * ((W @ A) * W).sum() + W.cos().sum()

    (singles,) = hessian_diagonal(many, [w.repeat(count, 1)], generator=torch.Generator().manual_seed(0))
    assert bool(((singles.mean(0) - H.diag()).abs() <= 4 * (variance / count).sqrt()).all())
    torch.testing.assert_close(singles.var(0), variance, rtol=0.1, atol=0)
    (mean,) = hessian_diagonal(value, [w], n_samples=100, generator=torch.Generator().manual_seed(1))
    assert bool(((mean - H.diag()).abs() <= 4 * (variance / 100).sqrt()).all())


def test_one_probe_is_exact_for_a_diagonal_hessian() -> None:
    w, v = torch.tensor([1.0, 2.0], dtype=F64), torch.tensor([[0.5], [3.0]], dtype=F64)
    first, second = hessian_diagonal(lambda params: (params[0] ** 3).sum() + params[1].exp().sum(), [w, v])
    torch.testing.assert_close(first, 6 * w, rtol=1e-14, atol=0)
    torch.testing.assert_close(second, v.exp(), rtol=1e-14, atol=0)


def test_parameters_of_a_module_as_they_come() -> None:
    net = nn.Linear(2, 1, bias=False)

    def loss(params: list[Tensor]) -> Tensor:
        return torch.func.functional_call(net, {"weight": params[0]}, torch.eye(2)).square().sum()

    assert torch.equal(hessian_diagonal(loss, net.parameters())[0], torch.full((1, 2), 2.0))


def test_blocks_are_averaged_with_their_signs() -> None:
    w = torch.arange(1.0, 9, dtype=F64).view(2, 4) * torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=F64)
    (rows,) = hessian_diagonal(lambda params: (params[0] ** 3).sum() / 6, [w], block="row")
    torch.testing.assert_close(rows, w.mean(1, keepdim=True).expand(2, 4))


class OnlyBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


def test_operations_without_forward_mode() -> None:
    w, v = torch.tensor([1.0, -2.0], dtype=F64), torch.ones(2, dtype=F64)
    first, second = hessian_diagonal(lambda params: OnlyBackward.apply(params[0]).sum() + params[1].sum(), [w, v])
    torch.testing.assert_close(first, 6 * w)
    assert torch.equal(second, torch.zeros(2, dtype=F64))


def test_curvlinops() -> None:
    curvlinops = pytest.importorskip("curvlinops")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(20, 4, dtype=F64), torch.randint(3, (20,))
    names, params = zip(*net.named_parameters(), strict=True)
    operator = curvlinops.HessianLinearOperator(net, nn.CrossEntropyLoss(), list(params), [(x, y)])
    H = torch.as_tensor(np.asarray(operator @ torch.eye(operator.shape[1], dtype=F64)))

    def loss(params: list[Tensor]) -> Tensor:
        return cross_entropy(torch.func.functional_call(net, dict(zip(names, params, strict=True)), x), y)

    parts = hessian_diagonal(loss, params, n_samples=500, generator=torch.Generator().manual_seed(1))
    estimate = torch.cat([part.reshape(-1) for part in parts])
    deviation = ((H.square().sum(1) - H.diag().square()) / 500).sqrt()
    assert bool(((estimate - H.diag()).abs() <= 5 * deviation + 1e-12).all())


def test_repeats_with_the_generator_and_leaves_the_point_alone() -> None:
    w = torch.tensor([0.3, -1.0, 2.0], dtype=F64)
    first, second = (hessian_diagonal(value, [w], generator=torch.Generator().manual_seed(5))[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not w.requires_grad


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"estimator": "exact"}, ValueError, "estimator"),
        ({"n_samples": 0}, ValueError, "n_samples"),
        ({"params": []}, ValueError, "params"),
        ({"params": torch.ones(3)}, ValueError, "params"),
        ({"params": [torch.ones(3, dtype=torch.int64)]}, TypeError, r"params\[0\]"),
        ({"params": [1.0]}, TypeError, r"params\[0\]"),
        ({"block": 2}, ValueError, "divisor"),
        ({"fun": lambda params: params[0]}, ValueError, "scalar"),
        ({"fun": lambda params: OUTSIDE.square().sum()}, ValueError, "depend on it; .*functional_call"),
        ({"fun": 3.0}, TypeError, "fun"),
        ({"generator": 3}, TypeError, "generator"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], match: str) -> None:
    arguments: dict[str, Any] = {"fun": value, "params": [torch.ones(3, dtype=F64)]} | options
    with pytest.raises(error, match=match):
        hessian_diagonal(arguments.pop("fun"), arguments.pop("params"), **arguments)
