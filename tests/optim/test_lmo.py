"""Norm balls: oracle, dual and primal norm belong together; which parameter gets which."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kantor.optim import dual_norm, lmo, lmo_param_groups, primal_norm

F64 = torch.float64
SHAPES = {
    "spectral": [(5, 8), (8, 5), (1, 1)],
    "spectral_conv": [(4, 3, 2, 2), (6, 2, 3), (2, 2, 2, 3, 2)],
    "sign": [(5, 8), (7,), ()],
    "rms": [(9,), (), (3, 4)],
    "row": [(5, 8)],
    "col": [(5, 8)],
}
CASES = [(kind, shape) for kind, shapes in SHAPES.items() for shape in shapes]


def normal(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_the_oracle_attains_the_dual_norm_on_the_sphere(kind: str, shape: tuple[int, ...]) -> None:
    B = normal(shape)
    for method, tolerance in (("svd", 1e-12), ("polar", 2e-3)):
        O = lmo(B, kind, method=method, scale=2.0)  # noqa: E741
        dual = dual_norm(B, kind, scale=2.0)
        torch.testing.assert_close((B * O).sum(), dual, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(primal_norm(O, kind, scale=2.0), torch.ones((), dtype=F64), rtol=tolerance, atol=0)
    torch.testing.assert_close(dual_norm(B, kind, method="polar"), dual_norm(B, kind), rtol=2e-3, atol=0)


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_no_element_has_a_larger_inner_product(kind: str, shape: tuple[int, ...]) -> None:
    B = normal(shape)
    for seed in range(1, 6):
        X = normal(shape, seed)
        assert (B * X).sum() <= dual_norm(B, kind) * primal_norm(X, kind) * (1 + 1e-12)


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_zero_gives_zero(kind: str, shape: tuple[int, ...]) -> None:
    zero = torch.zeros(shape)
    assert torch.equal(lmo(zero, kind), zero)
    assert dual_norm(zero, kind) == 0
    assert primal_norm(zero, kind) == 0


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_extreme_scales_and_half_precision(kind: str, shape: tuple[int, ...]) -> None:
    B = normal(shape)
    cases = [(F64, 1e200, 1e-12), (F64, 1e-200, 1e-12), (torch.float32, 1e30, 1e-4), (torch.float32, 1e-30, 1e-4)]
    for dtype, scale, tolerance in [*cases, (torch.float16, 100.0, 5e-3), (torch.bfloat16, 1e30, 3e-2)]:
        A = (scale * B).to(dtype)
        direction = lmo(A, kind)
        assert direction.dtype is dtype
        torch.testing.assert_close(direction.to(F64), lmo(B, kind), rtol=tolerance, atol=tolerance)
        for norm in (dual_norm, primal_norm):
            assert norm(A, kind).dtype is dtype
            assert float(norm(A, kind)) / scale == pytest.approx(float(norm(B, kind)), rel=tolerance)


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_nothing_gives_nothing(kind: str, shape: tuple[int, ...]) -> None:
    for axis in range(len(shape)):
        empty = torch.zeros(*shape[:axis], 0, *shape[axis + 1 :])
        assert lmo(empty, kind).shape == empty.shape
        assert dual_norm(empty, kind) == primal_norm(empty, kind) == 0


def test_the_nuclear_norm_by_iteration() -> None:
    for n in (64, 100):
        A = torch.randn(n, n, generator=torch.Generator().manual_seed(n))
        exact = dual_norm(A, "spectral")
        assert abs(dual_norm(A, "spectral", method="polar") / exact - 1) < 5e-4
        assert -0.17 < dual_norm(A, "spectral", method="muon5") / exact - 1 < -0.11


def test_groups_of_a_model() -> None:
    model = nn.ModuleDict(
        {
            "words": nn.Embedding(11, 4),
            "body": nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.LayerNorm(4)),
            "head": nn.Linear(4, 11),
        }
    )
    model["body"][0].bias.requires_grad_(False)
    kinds = {name: group["kind"] for group in lmo_param_groups(model) for name, _ in group["params"]}
    assert kinds == {
        "words.weight": "sign",
        "body.0.weight": "spectral_conv",
        "body.1.weight": "spectral",
        "body.1.bias": "rms",
        "body.2.weight": "rms",
        "body.2.bias": "rms",
        "head.weight": "sign",
        "head.bias": "rms",
    }
    with pytest.raises(TypeError, match="Module"):
        lmo_param_groups(model.parameters())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"write \('body',\)"):
        lmo_param_groups(model, head_names="body")
    with pytest.raises(ValueError, match="call the model on a batch first"):
        lmo_param_groups(nn.LazyLinear(3))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="one of spectral"):
        lmo(torch.ones(2, 2), "frobenius")
    for kind, shape in (("spectral", (3,)), ("spectral", (2, 2, 2)), ("spectral_conv", (2, 2)), ("row", (3,))):
        with pytest.raises(ValueError, match=f"kind {kind}"):
            dual_norm(torch.ones(shape), kind)
    with pytest.raises(TypeError, match="real"):
        primal_norm(torch.ones(2, dtype=torch.complex64), "rms")
    with pytest.raises(ValueError, match="finite"):
        lmo(torch.tensor([1.0, torch.inf]), "sign")
    for scale in (0.0, -1.0, torch.nan):
        with pytest.raises(ValueError, match="scale: expected a number > 0"):
            lmo(torch.ones(3), "rms", scale=scale)
