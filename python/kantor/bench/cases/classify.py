"""Handwritten digits from a few labels of each: how long it takes, and how many it gets wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kantor.bench.case import OWN, Peer, Problem, Run
from kantor.graph import classify

TITLE = "Handwritten digits from 5 labels of each class"
SIZES = {"tiny": (300, 1), "small": (1797, 1), "full": (1797, 5)}  # pictures, draws of the labels
LABELS = 5
MOST_WRONG = 12.0  # per cent; a network without the graph gets 17 wrong

Task = tuple[Any, Any, list[Any]]  # pictures (n, 64), classes, the labels given in each draw (-1: unknown)


def _kantor(method: str) -> Any:
    def prepare(task: Task) -> Run:
        x, _, draws = task
        tensor = torch.from_numpy(x)
        return lambda: [classify(tensor, torch.from_numpy(given), method=method).labels for given in draws]  # type: ignore[arg-type]

    return prepare


def _spreading(**options: Any) -> Any:
    def prepare(task: Task) -> Run:
        from sklearn.semi_supervised import LabelSpreading

        x, _, draws = task
        return lambda: [LabelSpreading(**options).fit(x, given).transduction_ for given in draws]

    return prepare


PEERS = {
    peer.name: peer
    for peer in (
        Peer("label spreading", OWN, "classify(method='label_spreading')", _kantor("label_spreading")),
        Peer("diffusion", OWN, "classify(method='diffusion')", _kantor("diffusion")),
        Peer("coin", OWN, "classify(method='coin')", _kantor("coin")),
        Peer(
            "LabelSpreading, knn", "scikit-learn", "LabelSpreading(kernel='knn', n_neighbors=10, alpha=0.8)",
            _spreading(kernel="knn", n_neighbors=10, alpha=0.8), ("sklearn",),
        ),
        Peer(
            "LabelSpreading, rbf", "scikit-learn", "LabelSpreading(kernel='rbf', gamma=0.01, alpha=0.2)",
            _spreading(kernel="rbf", gamma=0.01), ("sklearn",),
        ),
    )
}  # fmt: skip


def problems(size: str, device: str) -> tuple[Problem, ...]:
    """One; none on a GPU, which the peer does not use."""
    if device == "cuda":
        return ()
    count, draws = SIZES[size]
    name = f"{count} digits, {draws} draw{'s' * (draws > 1)} of the labels"
    return (Problem(name, "wrong, %", MOST_WRONG, ("seconds", "wrong, %"), needs=("sklearn",)),)


def make(problem: str, device: str) -> Task:
    """Pictures in shades of 0 to 16, their classes, and labels drawn anew in each draw."""
    from sklearn.datasets import load_digits

    count, _, draws, *_ = problem.split()
    x, y = load_digits(return_X_y=True)
    x, y = x[: int(count)].astype(np.float32), y[: int(count)]
    given = []
    for seed in range(int(draws)):
        random = np.random.default_rng(seed)
        chosen = [random.choice(np.flatnonzero(y == digit), LABELS, replace=False) for digit in range(10)]
        labels = np.full(len(y), -1)
        labels[np.concatenate(chosen)] = y[np.concatenate(chosen)]
        given.append(labels)
    return x, y, given


def judge(task: Task, answer: Any) -> dict[str, Any]:
    """Per cent of the unlabelled digits that are wrong, mean of the draws."""
    _, y, draws = task
    wrong = [
        100 * float((np.asarray(found) != y)[given < 0].mean()) for found, given in zip(answer, draws, strict=True)
    ]
    return {"accuracy": float(np.mean(wrong)), "wrong, %": float(np.mean(wrong))}
