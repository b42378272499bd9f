"""Well separated clusters, one a class: what every classifier should get right."""

from __future__ import annotations

import torch
from torch import Tensor

from kantor.graph import Graph, knn_graph


def clusters(
    n: int = 60, classes: int = 3, d: int = 4, distance: float = 8.0, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Points (n, d) and classes (n,), which alternate."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = distance * torch.eye(classes, d, dtype=torch.float64)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) + centres[labels]
    return x.to(dtype), labels


def graph_of(x: Tensor) -> Graph:
    """Its graph of nearest neighbours."""
    return knn_graph(x, k=7)
