"""Which labelled nodes train a network, which stop the training, and which judge it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kantor._checks import check_tensor
from kantor.graph._arguments import check_count


class Split(NamedTuple):
    """Nodes to train on, to stop by, and to be judged by: indices, int64, ascending within a class and by class."""

    train: Tensor
    val: Tensor
    test: Tensor


def split_per_class(labels: Tensor, train: int = 20, val: int = 30, seed: int | np.random.RandomState = 0) -> Split:
    """Draw nodes of every class for training and validation, the same number of each; the rest is for the test.

    Parameters
    ----------
    labels : Tensor (n,)
        Classes, integers; nodes with -1 have no label and are left out.
    train, val : int
        Nodes a class, >= 1 and >= 0.
    seed : int or numpy.random.RandomState
        Of the draw. A generator is moved on, so that further seeds can be drawn from it.

    Returns
    -------
    Split
        Three index tensors, without a common node.

    Raises
    ------
    TypeError
        labels are no integers.
    ValueError
        A class with fewer than ``train + val`` nodes.

    Notes
    -----
    Source: the protocol of Shchur et al., *Pitfalls of Graph Neural Network Evaluation*, 2018, which Diff-ResNet and
    COIN follow: ``RandomState(42).randint(0, 1000000, 100)`` are the seeds of their splits, and 20 seeds of
    initialisations are drawn from each split's generator after it. Deterministic on all machines.

    Examples
    --------
    >>> import torch
    >>> from kantor.nn import split_per_class
    >>> split = split_per_class(torch.arange(100) % 2, train=5, val=10, seed=1)
    >>> len(split.train), len(split.val), len(split.test)
    (10, 20, 70)
    """
    y = check_labels("split_per_class", labels).cpu().numpy()
    train, val = check_count("split_per_class", train, "train", 1), check_count("split_per_class", val, "val")
    random = seed if isinstance(seed, np.random.RandomState) else np.random.RandomState(seed)
    classes = np.unique(y[y >= 0])
    for c in classes:
        if (count := int((y == c).sum())) < train + val:
            raise ValueError(
                f"split_per_class: labels: expected at least train + val = {train + val} nodes of every class, class "
                f"{c} has {count}; lower train or val"
            )

    def draw(allowed: np.ndarray[Any, Any], count: int) -> np.ndarray[Any, Any]:
        drawn = [random.choice(np.flatnonzero(allowed & (y == c)), count, replace=False) for c in classes]
        return np.concatenate([np.empty(0, np.int64), *drawn])

    rest = y >= 0
    parts = []
    for count in (train, val):
        parts.append(draw(rest, count))
        rest = rest.copy()
        rest[parts[-1]] = False
    return Split(*(torch.from_numpy(part).long() for part in (*parts, np.flatnonzero(rest))))


def check_labels(function: str, labels: object) -> Tensor:
    """Return labels as int64."""
    labels = check_tensor(labels, function, "labels")
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype is torch.bool:
        raise TypeError(
            f"{function}: labels: expected integers, got {str(labels.dtype)[6:]}; number the classes from 0"
        )
    if labels.ndim != 1:
        raise ValueError(f"{function}: labels: expected shape (n,), got {tuple(labels.shape)}")
    return labels.long()


__all__ = ["Split", "check_labels", "split_per_class"]
