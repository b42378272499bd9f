"""The residual layers of the papers' networks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """``x + relu(A x + a)``, or with a hidden layer ``x + B relu(A x + a) + b``."""

    def __init__(self, features: int, hidden: int | None = None) -> None:
        super().__init__()
        self.inner = nn.Linear(features, features if hidden is None else hidden)
        self.outer = None if hidden is None else nn.Linear(hidden, features)

    def forward(self, x: Tensor) -> Tensor:
        """Return a dense tensor shaped like x, ``(..., features)``; x may be sparse CSR, which makes A x cheap."""
        h = torch.relu(self.inner(x))
        x = x if x.layout is torch.strided else x.to_dense()
        return x + (h if self.outer is None else self.outer(h))


class SkipNetwork(nn.Module):
    """``S x + B f(A x)`` with biases: a linear map beside a network with one hidden layer."""

    def __init__(
        self, in_features: int, out_features: int, hidden: int, activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.skip = nn.Linear(in_features, out_features)
        self.inner = nn.Linear(in_features, hidden)
        self.outer = nn.Linear(hidden, out_features)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., out_features)`` for x of shape ``(..., in_features)``."""
        result: Tensor = self.skip(x) + self.outer(self.activation(self.inner(x)))
        return result

    def extra_repr(self) -> str:
        """Name the activation."""
        return f"activation={getattr(self.activation, '__name__', self.activation)}"


def check_size(call: str, value: object, name: str) -> int:
    """Return an integer >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{call}: {name}: expected an integer >= 1, got {value!r}")
    return value
