"""Few-shot episodes: every method finds separated classes, batches equal single episodes, and each part its oracle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kantor.graph import StabilityError, knn_graph, propagator
from kantor.nn import Episode, EpisodeResult
from kantor.nn import episode as module

METHODS = ["diffusion", "coin", "prototype", "laplacian"]


def points(
    batch: int = 3, shots: int = 2, queries: int = 8, distance: float = 3.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Support (B, 3 shots, 5), labels, queries (B, 3 queries, 5), their labels; classes are called 4, 6 and 9."""
    generator = torch.Generator().manual_seed(0)
    names = torch.tensor([4, 6, 9])
    centres = distance * torch.randn(batch, 3, 5, generator=generator, dtype=torch.float64)
    drawn = []
    for count in (shots, queries):
        noise = torch.randn(batch, 3, count, 5, generator=generator, dtype=torch.float64)
        drawn.append((centres[:, :, None] + noise).flatten(1, 2).to(dtype))
    return drawn[0], names.repeat_interleave(shots), drawn[1], names.repeat_interleave(queries)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_finds_separated_classes(method: Any, dtype: torch.dtype) -> None:
    support, labels, query, truth = points(distance=5.0, dtype=dtype)
    result = Episode(support, labels, query).normalise().classify(method, max_epochs=60)
    assert result.labels.shape == (3, 24)
    assert result.probabilities.dtype is dtype
    torch.testing.assert_close(result.probabilities.sum(-1), torch.ones(3, 24, dtype=dtype), rtol=0, atol=1e-5)
    assert result.accuracy(truth).shape == (3,)
    assert bool((result.accuracy(truth) > 0.9).all())


@pytest.mark.parametrize("method", ["prototype", "laplacian"])
def test_batch_is_its_episodes(method: Any) -> None:
    support, labels, query, _ = points()
    batch = Episode(support, labels.expand(3, -1), query).normalise().classify(method)
    for b in range(3):
        single = Episode(support[b], labels, query[b]).normalise().classify(method)
        torch.testing.assert_close(single.probabilities, batch.probabilities[b])
        assert torch.equal(single.labels, batch.labels[b])


def test_parts_of_a_batch_are_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    support, labels, query, _ = points(batch=4)
    first = Episode(support[:1], labels, query[:1]).classify(max_epochs=5)
    monkeypatch.setattr(module, "_BYTES", 1)  # one episode a part
    parts = Episode(support, labels, query).classify(max_epochs=5)
    torch.testing.assert_close(parts.probabilities[:1], first.probabilities)


def test_training_is_that_of_torch_layers() -> None:
    support, labels, query, _ = points(batch=1)
    n, known = support.shape[1] + query.shape[1], support.shape[1]
    result = Episode(support, labels, query).classify("diffusion", max_epochs=8, seed=2)
    generator = torch.Generator().manual_seed(2)
    sizes = [(5, 5), (5, 5), (5, 3)]
    weights = [module._uniform(1, a, b, a, support, generator)[0].detach() for a, b in sizes]
    biases = [module._uniform(1, 1, b, a, support, generator)[0, 0].detach() for a, b in sizes]
    layers = [torch.nn.Linear(a, b, dtype=torch.float64) for a, b in sizes]
    for layer, weight, bias in zip(layers, weights, biases, strict=True):
        layer.weight.data, layer.bias.data = weight.T.clone(), bias.clone()
    x = torch.cat([support[0], query[0]])
    P = propagator(knn_graph(x, k=7, bandwidth_k=4), 0.5, 6)
    sgd = torch.optim.SGD([p for layer in layers for p in layer.parameters()], lr=0.1, momentum=0.9, weight_decay=1e-4)

    def scores() -> Tensor:
        scores: Tensor = layers[2](P @ (x + layers[1](torch.relu(layers[0](x)))))
        return scores

    numbers = torch.arange(3).repeat_interleave(2)
    for epoch in range(8):
        for group in sgd.param_groups:
            group["lr"] = 0.1 if epoch < 4 else 0.01 if epoch < 6 else 0.001
        loss = torch.nn.functional.cross_entropy(scores()[:known], numbers)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    torch.testing.assert_close(result.probabilities[0], scores()[known:].softmax(-1), rtol=1e-6, atol=1e-8)
    assert n == len(x)


def test_weights_are_those_of_knn_graph() -> None:
    x = torch.cat([points()[0], points()[2]], 1)
    x[1, 3] = x[1, 5]  # a duplicate
    for k, bandwidth_k in ((7, 4), (3, 2), (5, 6)):
        dense = module._self_tuning(x, k, bandwidth_k)
        for b in range(3):
            expected = knn_graph(x[b], k=k, bandwidth_k=bandwidth_k).dense()
            torch.testing.assert_close(dense[b], expected, rtol=1e-6, atol=1e-9)


def test_normalise() -> None:
    support, labels, query, _ = points()
    mean = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain = Episode(support, labels, query).normalise(mean, shift=False)
    torch.testing.assert_close(plain.support, (support - mean) / (support - mean).norm(dim=-1, keepdim=True))
    torch.testing.assert_close(plain.query.norm(dim=-1), torch.ones(3, 24, dtype=torch.float64))
    shifted = Episode(support, labels, query).normalise(mean)
    torch.testing.assert_close(shifted.query.mean(1), shifted.support.mean(1))
    assert shifted.classes.tolist() == [4, 6, 9]


def test_rectified_prototypes() -> None:
    x = torch.tensor([[[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]], dtype=torch.float64)
    prototypes = torch.tensor([[[2.0, 0.0], [0.0, 0.5], [-1.0, -1.0]]], dtype=torch.float64)
    cosine = torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(prototypes, dim=-1).mT
    share = torch.softmax(10 * cosine, -1)[0]
    rectified = module._rectified(x, prototypes)[0]
    torch.testing.assert_close(rectified[0], (share[0, 0] * x[0, 0] + share[1, 0] * x[0, 1]) / 2)
    torch.testing.assert_close(rectified[1], share[2, 1] * x[0, 2])
    torch.testing.assert_close(rectified[2], prototypes[0, 2])  # nobody is near it


def test_laplacian_lowers_its_objective() -> None:
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(1, 20, 4, generator=generator, dtype=torch.float64)
    cost = torch.rand(1, 20, 3, generator=generator, dtype=torch.float64)
    distance = torch.cdist(query, query)
    distance.diagonal(dim1=-2, dim2=-1).fill_(math.inf)
    w = torch.zeros_like(distance).scatter_(-1, distance.topk(3, largest=False).indices, 1.0)

    def objective(log_y: Tensor) -> float:
        y = log_y.exp()
        return float((y * cost).sum() + (y * log_y).sum() - 0.5 * 0.7 * (y * (w @ y)).sum())

    found = module._laplacian(query, cost, 0.7)
    assert objective(found) < objective((-cost).log_softmax(-1))
    torch.testing.assert_close(found, (0.7 * (w @ found.exp()) - cost).log_softmax(-1), rtol=0, atol=1e-4)


def test_prototypes_are_means() -> None:
    support, labels, query, _ = points(batch=1)
    means = support[0].unflatten(0, (3, 2)).mean(1)
    nearest = torch.cdist(query[0], means).argmin(1)
    result = Episode(support[0], labels, query[0]).classify("prototype")
    assert torch.equal(result.labels, torch.tensor([4, 6, 9])[nearest])


def test_no_steps_is_no_diffusion_and_k_does_not_matter() -> None:
    episode = Episode(*points()[:3])
    a = episode.classify(num_steps=0, max_epochs=5, k=3)
    b = episode.classify(num_steps=0, max_epochs=5, k=9)
    assert torch.equal(a.probabilities, b.probabilities)
    c = episode.classify(num_steps=6, max_epochs=5)
    assert not torch.allclose(a.probabilities, c.probabilities)


@pytest.mark.parametrize("method", ["diffusion", "coin"])
def test_alpha_pulls_queries_to_prototypes(method: Any) -> None:
    episode = Episode(*points()[:3]).normalise()
    plain, pulled = (episode.classify(method, alpha=alpha, max_epochs=30) for alpha in (0.0, 0.1))
    x = torch.cat([episode.support, episode.query], 1)
    numbers = torch.arange(3).repeat_interleave(2).expand(3, -1)
    prototypes = module._rectified(x, module._prototypes(episode.support, numbers, 3))
    distance = torch.cdist(episode.query, prototypes)
    assert float((pulled.probabilities * distance).sum()) < float((plain.probabilities * distance).sum())


def test_deterministic_and_the_default_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    episode = Episode(*points()[:3])
    assert torch.equal(episode.classify(max_epochs=3).probabilities, episode.classify(max_epochs=3).probabilities)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_query() -> None:
    support, labels, query, _ = points(batch=1)
    for method in METHODS:
        result: EpisodeResult = Episode(support[0], labels, query[0, :1]).classify(method, k=4, max_epochs=3)
        assert result.labels.shape == (1,)


def test_prints() -> None:
    support, labels, query, _ = points()
    episode = Episode(support, labels, query)
    assert repr(episode) == "Episode(3 episodes, each 6 points with labels of 3 classes, 24 queries, 5 features)"
    assert "3 episodes of 24 queries in 3 classes" in repr(episode.classify("prototype"))


SUPPORT, LABELS, QUERY, _TRUTH = points()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((SUPPORT.numpy(), LABELS, QUERY), TypeError, "Episode: support: expected a torch.Tensor"),
        ((SUPPORT, LABELS, QUERY.long()), TypeError, "Episode: query: expected dtype"),
        ((SUPPORT, LABELS, QUERY.float()), TypeError, "Episode: support is float64, query is float32"),
        ((SUPPORT[0, 0], LABELS, QUERY), ValueError, "Episode: support: expected shape"),
        ((SUPPORT * math.nan, LABELS, QUERY), ValueError, "Episode: support: expected finite"),
        ((SUPPORT, LABELS, QUERY[:2]), ValueError, "Episode: support and query: expected the same batch"),
        ((SUPPORT, LABELS, QUERY[..., :2]), ValueError, "Episode: support and query: expected the same batch"),
        ((SUPPORT, LABELS.float(), QUERY), TypeError, "Episode: support_labels: expected integers"),
        ((SUPPORT, LABELS[:-1], QUERY), ValueError, "Episode: support_labels: expected shape"),
        ((SUPPORT, torch.zeros(6, dtype=torch.long), QUERY), ValueError, "at least two classes"),
        (
            (SUPPORT, torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1] * 6]), QUERY),
            ValueError,
            "support_labels: episode 2 has no point of class 0",
        ),
    ],
)
def test_errors_of_an_episode(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Episode(*arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "magic"}, ValueError, "Episode.classify: method"),
        ({"k": 30}, ValueError, "Episode.classify: k: expected fewer than the 30 points"),
        ({"k": 0}, ValueError, "Episode.classify: k"),
        ({"num_steps": -1}, ValueError, "Episode.classify: num_steps"),
        ({"step": -0.5}, ValueError, "Episode.classify: step"),
        ({"step": 50.0}, StabilityError, "largest safe step"),
        ({"alpha": -1.0}, ValueError, "Episode.classify: alpha"),
        ({"lr": math.inf}, ValueError, "Episode.classify: lr"),
    ],
)
def test_errors_of_a_classification(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Episode(SUPPORT, LABELS, QUERY).classify(**options)


def test_base_mean_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"Episode.normalise: base_mean: expected shape \(5,\)"):
        Episode(SUPPORT, LABELS, QUERY).normalise(torch.zeros(4))
