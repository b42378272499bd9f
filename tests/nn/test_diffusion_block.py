"""The diffusion layer, and the network around it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kantor import StabilityError
from kantor.graph import Graph, diffuse
from kantor.nn import DiffResNet, DiffusionBlock

F32, F64 = torch.float32, torch.float64


def ring(n: int, dtype: torch.dtype = F32) -> Graph:
    """Degree one, lambda_max 2 (n even)."""
    i = torch.arange(n)
    col = torch.stack([(i - 1) % n, (i + 1) % n], 1).sort(1).values
    return Graph(torch.arange(n + 1) * 2, col.flatten(), torch.full((2 * n,), 0.5, dtype=dtype))


def points(n: int, d: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(n, d, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- the block ---


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("method", ["explicit", "implicit", "propagator", "chebyshev"])
def test_is_diffuse(method: Any, dtype: torch.dtype) -> None:
    graph, x = ring(8, dtype), points(8, 3, dtype)
    block = DiffusionBlock(0.4, 5, method=method)
    assert torch.equal(block(x, graph), diffuse(x, graph, 0.4, 5, method=method))
    assert torch.equal(block(x, graph.dense()), diffuse(x, graph.dense(), 0.4, 5, method=method))
    batch = torch.stack([x, -x])
    assert block(batch, graph).shape == (2, 8, 3)
    assert list(block.parameters()) == []


def test_dropout_acts_in_training_only() -> None:
    graph, x = ring(8), points(8, 3)
    block = DiffusionBlock(0.4, 5, dropout=0.5)
    torch.manual_seed(0)
    assert not torch.equal(block(x, graph), block(x, graph))
    assert block.is_random
    block.eval()
    assert not block.is_random
    assert torch.equal(block(x, graph), diffuse(x, graph, 0.4, 5))


@pytest.mark.parametrize("dtype", [F32, F64])
def test_learned_step(dtype: torch.dtype) -> None:
    """A step that was too short grows, from the right start and above zero always."""
    graph, x = ring(10, dtype), points(10, 2, dtype)
    target = diffuse(x, graph, 0.4, 4)
    block = DiffusionBlock(0.05, 4, learn_step=True).to(dtype)
    assert block.step.item() == pytest.approx(0.05, rel=1e-6)
    optimizer = torch.optim.Adam(block.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        (block(x, graph) - target).square().mean().backward()
        optimizer.step()
    assert block.step.item() == pytest.approx(0.4, rel=1e-2)
    with torch.no_grad():
        block.raw_step.fill_(-50.0)
        assert float(block.step) > 0
    for step in (1e-6, 1.0, 30.0):
        assert DiffusionBlock(step, 1, learn_step=True).double().step.item() == pytest.approx(step, rel=1e-5)


def test_learned_step_that_becomes_unstable_is_told() -> None:
    block = DiffusionBlock(0.9, 3, learn_step=True)
    block(points(8, 1), ring(8))
    with torch.no_grad():
        block.raw_step.fill_(2.0)
    with pytest.raises(StabilityError, match="step"):
        block(points(8, 1), ring(8))


def test_learned_weights() -> None:
    graph, x = ring(6, F64), points(6, 2, F64)
    weight = graph.weight.clone().requires_grad_()
    DiffusionBlock(0.4, 3)(x, graph.with_weight(weight)).square().sum().backward()
    assert weight.grad.abs().min() > 0


def test_the_step_is_checked_cheaply_for_trained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(Graph, "lambda_max", lambda self: calls.append(1))
    graph = ring(6, F64)
    DiffusionBlock(0.9, 3)(points(6, 2, F64), graph.with_weight(graph.weight.clone().requires_grad_()))
    assert calls == []  # the degrees tell enough


# --- Diff-ResNet ---


@pytest.mark.parametrize("residual", ["one_layer", "two_layer"])
def test_network_formula(residual: Any) -> None:
    graph, x = ring(12, F64), points(12, 5, F64)
    model = DiffResNet(5, 3, 0.4, 6, residual).double()
    block = model.residual
    h = torch.relu(x @ block.inner.weight.T + block.inner.bias)
    h = x + (h if residual == "one_layer" else h @ block.outer.weight.T + block.outer.bias)
    expected = diffuse(h, graph, 0.4, 6) @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(model(x, graph), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.features(x, graph), diffuse(h, graph, 0.4, 6), rtol=0, atol=0)


def test_hidden_width() -> None:
    assert DiffResNet(5, 3, 0.4, 6, "two_layer", hidden=17).residual.inner.out_features == 17


@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_classifier_goes_first(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Without dropout as many columns are diffused as there are classes, with the same result and gradients."""
    graph, x = ring(20, dtype), points(20, 40, dtype)
    torch.manual_seed(0)
    model = DiffResNet(40, 4, 0.4, 10, dropout=0.3).to(dtype)
    widths: list[int] = []
    model.diffusion.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[-1]))
    model(x, graph)
    model.eval()
    scores = model(x, graph)
    assert widths == [40, 4]
    direct = model.classifier(model.features(x, graph))
    torch.testing.assert_close(scores, direct, rtol=1e-5, atol=1e-5)
    for a, b in zip(
        *(torch.autograd.grad(y[:3].sum(), list(model.parameters())) for y in (scores, direct)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_network_on_a_batch_of_episodes() -> None:
    x, weights = points(3 * 8, 5).reshape(3, 8, 5), ring(8).dense().expand(3, 8, 8)
    model = DiffResNet(5, 2, 0.4, 3)
    for entry, scores in zip(x, model(x, weights), strict=True):
        torch.testing.assert_close(scores, model(entry, ring(8)), rtol=1e-5, atol=1e-5)


def test_permutation_equivariance() -> None:
    graph, x = ring(12), points(12, 5)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    model = DiffResNet(5, 3, 0.4, 6)
    torch.testing.assert_close(model(x[order], graph.permute(order)), model(x, graph)[order], rtol=1e-5, atol=1e-5)


def test_without_steps_it_is_the_plain_network() -> None:
    model = DiffResNet(5, 7, 0.4, 0)
    x = points(6, 5)
    assert torch.equal(model(x, ring(6)), model.classifier(model.residual(x)))


# --- as torch modules ---


def models() -> list[nn.Module]:
    return [DiffusionBlock(0.3, 4, learn_step=True), DiffResNet(4, 2, 0.3, 4, "two_layer", learn_step=True)]


def test_state_dict_and_copies() -> None:
    for model in models():
        other = copy.deepcopy(model)
        for parameter in other.parameters():
            parameter.data.add_(0.1)
        x, graph = points(6, 4), ring(6)
        assert not torch.equal(model(x, graph), other(x, graph))
        other.load_state_dict(model.state_dict())
        assert torch.equal(model(x, graph), other(x, graph))


def test_prints() -> None:
    assert repr(DiffusionBlock(0.25, 20, dropout=0.25)) == "DiffusionBlock(step=0.25, num_steps=20, dropout=0.25)"
    learned = repr(DiffusionBlock(0.25, 20, True, method="implicit", stability="warn"))
    assert learned == "DiffusionBlock(step=0.25 (learned), num_steps=20, method='implicit', stability='warn')"
    assert "teleport=0.1" in repr(DiffusionBlock(0.25, 20, teleport=0.1))
    assert "DiffusionBlock(step=0.25, num_steps=20)" in repr(DiffResNet(4, 2, 0.25, 20))


def test_compile() -> None:
    graph, x = ring(8), points(8, 4)
    for model in models():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        expected, got = model(x, graph), compiled(x, graph)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        grads = [torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in (expected, got)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


CALLS: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    (ValueError, r"DiffusionBlock: step: expected a finite number >= 0, got -1", lambda: DiffusionBlock(-1.0, 2)),
    (ValueError, r"DiffusionBlock: step: .*nan", lambda: DiffusionBlock(math.nan, 2)),
    (TypeError, r"DiffusionBlock: step: expected a number, got NoneType", lambda: DiffusionBlock(None, 2)),
    (ValueError, r"DiffusionBlock: step: expected a number > 0 with learn_step", lambda: DiffusionBlock(0.0, 2, True)),
    (ValueError, r"DiffusionBlock: num_steps: expected an integer >= 0, got 2\.5", lambda: DiffusionBlock(0.1, 2.5)),
    (ValueError, r"DiffusionBlock: dropout: expected", lambda: DiffusionBlock(0.1, 2, dropout=1.0)),
    (ValueError, r"DiffusionBlock: teleport: expected", lambda: DiffusionBlock(0.1, 2, teleport=1.0)),
    (ValueError, r"DiffusionBlock: method: expected one of", lambda: DiffusionBlock(0.1, 2, method="euler")),
    (ValueError, r"DiffusionBlock: stability: expected one of", lambda: DiffusionBlock(0.1, 2, stability="no")),
    (ValueError, r"DiffusionBlock: dropout: expected 0 with method='implicit'",
     lambda: DiffusionBlock(0.1, 2, dropout=0.1, method="implicit")),
    (ValueError, r"DiffResNet: in_features: expected an integer >= 1, got 0", lambda: DiffResNet(0, 2, 0.1, 1)),
    (ValueError, r"DiffResNet: num_classes: expected an integer >= 1, got 2\.0", lambda: DiffResNet(4, 2.0, 0.1, 1)),
    (ValueError, r"DiffResNet: residual: expected one of", lambda: DiffResNet(4, 2, 0.1, 1, "three_layer")),
    (ValueError, r"DiffResNet: hidden: expected None with residual='one_layer'",
     lambda: DiffResNet(4, 2, 0.1, 1, hidden=3)),
    (ValueError, r"DiffResNet: hidden: expected an integer", lambda: DiffResNet(4, 2, 0.1, 1, "two_layer", hidden=0)),
    (ValueError, r"diffuse: x: expected 8 rows", lambda: DiffResNet(4, 2, 0.1, 1)(points(7, 4), ring(8))),
    (StabilityError, r"diffuse: step: .*got 1\.1", lambda: DiffResNet(4, 2, 1.1, 1)(points(8, 4), ring(8))),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "call"), CALLS, ids=[message for _, message, _ in CALLS])
def test_errors(kind: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=message):
        call()
