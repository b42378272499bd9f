"""The experiments by which diffusion networks are judged: the tests run parts of them, the benchmark all.

Each returns accuracies in percent, or errors, by the name of the method.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kantor.datasets import four_discs, heat_snapshots, read_citation_graph, two_moons
from kantor.graph import Graph, diffuse, from_edge_index, from_torch, knn_graph
from kantor.nn import COIN, DiffResNet, Episode, fit_nodes, split_per_class

Scores = dict[str, list[float]]


def means(scores: Scores) -> dict[str, float]:
    """Mean of each method."""
    return {name: float(np.mean(values)) for name, values in scores.items()}


# --- handwritten digits ---


def digits() -> tuple[Tensor, Tensor]:
    """1797 pictures (n, 64) in [0, 1] and their classes."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.from_numpy(x / 16).float(), torch.from_numpy(y)


def semi_supervised_digits(
    labels_per_class: int, draws: int, count: int | None = None, steps: tuple[int, ...] = (10, 40)
) -> Scores:
    """Labels of a few pictures of each class, accuracy on the others; networks with a hidden layer of 64 units."""
    from sklearn.semi_supervised import LabelSpreading

    x, y = (values[:count] for values in digits())
    graph = knn_graph(x, k=11, bandwidth_k=6)
    models: dict[str, Callable[[], nn.Module]] = {"K=0": lambda: DiffResNet(64, 10, 0.5, 0, "two_layer")}
    for k in steps:
        models[f"Diff-ResNet K={k}"] = lambda k=k: DiffResNet(64, 10, 0.5, k, "two_layer")  # type: ignore[misc]
        models[f"COIN K={k}"] = lambda k=k: COIN(64, 10, 0.5, k, hidden=64)  # type: ignore[misc]
    scores: Scores = {name: [] for name in [*models, "LabelSpreading"]}
    for seed in range(draws):
        split = split_per_class(y, labels_per_class, 0, seed)
        for name, model in models.items():
            torch.manual_seed(seed)
            fit = fit_nodes(model(), x, graph, y, split.train, weight_decay=0.0, max_epochs=150)
            scores[name].append(100 * fit.accuracy(split.test))
        given = np.full(len(y), -1)
        given[split.train] = y[split.train]
        spread = LabelSpreading(kernel="knn", n_neighbors=10, alpha=0.8).fit(x.numpy(), given).transduction_
        scores["LabelSpreading"].append(100 * float((spread == y.numpy())[split.test].mean()))
    return scores


def few_shot_digits(shots: int, episodes: int, seed: int = 0, queries: int = 15) -> Scores:
    """Five-way episodes of the digits 5 to 9; the mean of 0 to 4 is that of the base classes."""
    x, y = digits()
    random = np.random.RandomState(seed)
    drawn = [
        [random.choice(np.flatnonzero(y.numpy() == c), shots + queries, replace=False) for c in range(5, 10)]
        for _ in range(episodes)
    ]
    nodes = torch.from_numpy(np.array(drawn))  # (episodes, classes, shots + queries)
    support, query = (x[part.flatten(1)] for part in (nodes[..., :shots], nodes[..., shots:]))
    labels, truth = (torch.arange(5, 10).repeat_interleave(count) for count in (shots, queries))
    episode = Episode(support, labels, query).normalise(x[y < 5].mean(0))
    methods: dict[str, dict[str, Any]] = {
        "SimpleShot": {"method": "prototype"},
        "LaplacianShot": {"method": "laplacian"},
        "LaplacianShot, rectified": {"method": "laplacian", "rectify": True},
        "K=0": {"method": "diffusion", "num_steps": 0},
        "Diff-ResNet": {"method": "diffusion"},
        "Diff-ResNet, alpha": {"method": "diffusion", "alpha": 0.01},
        "COIN": {"method": "coin"},
    }
    return {name: (100 * episode.classify(**m).accuracy(truth)).tolist() for name, m in methods.items()}


# --- a citation graph ---


def cora_path() -> Path:
    """``cora.npz`` in the folder KANTOR_DATA, or among the shared data beside the repository."""
    folder = os.environ.get("KANTOR_DATA")
    return (Path(folder) if folder else Path(__file__).resolve().parents[3] / "shared/data/graphs") / "cora.npz"


def citation_graph(path: Path) -> tuple[Tensor, Graph, Tensor]:
    """Features, graph and classes of the largest component."""
    data = read_citation_graph(path)
    graph, nodes = from_edge_index(data.edge_index, len(data.labels)).largest_component()
    return data.x.to_dense()[nodes], graph, data.labels[nodes]


def split_seeds(count: int) -> list[int]:
    """Seeds of the published protocol."""
    return [int(seed) for seed in np.random.RandomState(42).randint(0, 1_000_000, 100)[:count]]


def semi_supervised_citations(
    path: Path, splits: int, names: tuple[str, ...] | None = None, max_epochs: int | None = None
) -> Scores:
    """20 labels a class to train on and 30 to stop by; accuracy on the rest."""
    x, graph, y = citation_graph(path)
    d, classes = x.shape[1], int(y.max()) + 1
    models: dict[str, Callable[[], nn.Module]] = {
        "K=0": lambda: DiffResNet(d, classes, 0.25, 0),
        "Diff-ResNet": lambda: DiffResNet(d, classes, 0.25, 20),
        "COIN": lambda: COIN(d, classes, 0.25, 20),
        "Diff-ResNet, dropout 1/4": lambda: DiffResNet(d, classes, 0.25, 20, dropout=0.25),
        "COIN, step 0.34": lambda: COIN(d, classes, 0.34, 20),
        "COIN, row": lambda: COIN(d, classes, 0.9, 20, positivity="row"),
        "COIN, implicit": lambda: COIN(d, classes, 0.25, 20, positivity="implicit"),
        "COIN, error": lambda: COIN(d, classes, 0.17, 30, positivity="error"),
    }
    scores: Scores = {name: [] for name in names or models}
    for seed in split_seeds(splits):
        split = split_per_class(y, 20, 30, seed)
        for name in scores:
            torch.manual_seed(0)
            fit = fit_nodes(
                models[name](),
                x,
                graph,
                y,
                split.train,
                split.val,
                strict="COIN" in name,
                seed=0,
                max_epochs=max_epochs,
            )
            assert bool(fit.probabilities.isfinite().all())
            scores[name].append(100 * fit.accuracy(split.test))
    return scores


# --- points in the plane ---


def distance_over_diameter(steps: tuple[int, ...]) -> list[float]:
    """Smallest distance between two of four discs over the largest diameter of one, after so many diffusion steps."""
    x, disc = four_discs()
    graph = knn_graph(x, k=20, weights="gaussian", sigma=0.5)
    same = disc[:, None] == disc[None]
    ratios = []
    for k in steps:
        distance = torch.cdist(*(diffuse(x, graph, 1.0, k),) * 2)
        ratios.append(float(distance[~same].min() / distance[same].max()))
    return ratios


def moons(seeds: int) -> Scores:
    """A residual network of two units, 100 steps of gradient descent on all labels: accuracy on them."""
    scores: Scores = {"K=0": [], "Diff-ResNet": []}
    for seed in range(seeds):
        x, y = two_moons(1000, 0.05, seed)
        graph = knn_graph(x, k=25, weights="gaussian", sigma=0.5)
        for name, k in (("K=0", 0), ("Diff-ResNet", 60)):
            torch.manual_seed(seed)
            model = DiffResNet(2, 2, 1.0, k, "two_layer")
            sgd = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=5e-4)
            for _ in range(100):
                sgd.zero_grad()
                functional.cross_entropy(model(x, graph), y).backward()
                sgd.step()
            with torch.no_grad():
                scores[name].append(100 * float((model(x, graph).argmax(1) == y).double().mean()))
    return scores


# --- values on a graph over time ---


def heat(seeds: int, times: int = 200, epochs: int = 100, lags: int = 8) -> Scores:
    """Predict the next values of all nodes from the last ones, nine tenths of which are hidden: squared error."""
    scores: Scores = {"K=0": [], "COIN": []}
    for seed in range(seeds):
        data = heat_snapshots(times=times, seed=seed)
        graph = from_torch(data.weights.to_sparse())
        seen = torch.where(data.observed, data.values, 0.0)
        x = torch.stack([seen[t - lags : t].T for t in range(lags, times)])
        target, known = data.values[lags:], data.observed[lags:]
        first, second = len(x) // 5, 2 * len(x) // 5  # a fifth to train on, a fifth to stop by, the rest to judge
        for name, k in (("K=0", 0), ("COIN", 10)):
            torch.manual_seed(seed)
            model = COIN(lags, 1, 0.5, k, head="linear", hidden=16, dropout=0.25 if k else 0.0)
            adam = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4)
            best, error = float("inf"), float("nan")
            for _ in range(epochs):
                model.train()
                miss = (model(x[:first], graph)[..., 0] - target[:first]).square() * known[:first]
                adam.zero_grad()
                (miss.sum(1) / known[:first].sum(1).clamp(min=1)).mean().backward()
                adam.step()
                model.eval()
                with torch.no_grad():
                    squares = (model(x[first:], graph)[..., 0] - target[first:]).square()
                watched = float(squares[: second - first][known[first:second]].mean())
                if watched < best:
                    best, error = watched, float(squares[second - first :].mean())
            scores[name].append(error)
    return scores
