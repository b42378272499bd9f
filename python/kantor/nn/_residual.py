"""The residual layers of the papers' networks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from kantor.graph._arguments import check_count


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

    def projected(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return ``self(x) @ weight.T``, where weight has few rows, without the products that are as wide as x."""
        h = torch.relu(self.inner(x))
        if self.outer is None:
            return functional.linear(x, weight) + functional.linear(h, weight)
        return functional.linear(x, weight) + functional.linear(h, weight @ self.outer.weight, weight @ self.outer.bias)


class ResidualClassifier(nn.Sequential):
    """A residual block and a linear layer of few outputs."""

    def __init__(self, features: int, outputs: int, hidden: int | None = None) -> None:
        super().__init__(ResidualBlock(features, hidden), nn.Linear(features, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., outputs)``."""
        block, linear = self[0], self[1]
        assert isinstance(block, ResidualBlock)
        assert isinstance(linear, nn.Linear)
        return block.projected(x, linear.weight) + linear.bias


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
    return check_count(call, value, name, least=1)
