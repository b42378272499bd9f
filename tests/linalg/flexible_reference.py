"""Flexible conjugate gradients in plain numpy, in extended precision, and maps from residuals to try them with."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kantor.linalg import FlexibleResult
from systems import F64, random

Array = np.ndarray[Any, Any]


def reference(
    A: Array, b: Array, f: Callable[[Array], Array], k_prev: int, *, normalised: bool, notay: bool = False
) -> Iterator[Array]:
    """The iterates, from zero on: sequential Gram-Schmidt, twice, against the newest directions first."""
    A, b = A.astype(np.longdouble), b.astype(np.longdouble)
    x, r = np.zeros_like(b), b.copy()
    kept: list[tuple[Array, Array]] = []
    for i in range(10**6):
        yield x.astype(np.float64)
        scale = np.sqrt(r @ r) if normalised else np.longdouble(1)
        p = f((r / scale).astype(np.float64)).astype(np.longdouble)
        most = max(1, i % (k_prev + 1)) if notay and k_prev > 0 else k_prev
        for _ in range(2):
            for other, product in kept[: min(most, len(kept))]:
                p = p - (p @ product) / (other @ product) * other
        Ap = A @ p
        step = (p @ r) / (p @ Ap)
        x = x + step * p
        r = b - A @ x
        kept = [(p, Ap), *kept][: max(k_prev, 1)]


def network(n: int, seed: int = 0, gain: float = 1.0) -> Callable[[Tensor], Tensor]:
    """Two layers with random weights: neither linear nor symmetric, and no idea of the system."""
    W, V = random(3 * n, n, seed=seed), random(n, 3 * n, seed=seed + 1) / (3 * n) ** 0.5

    def f(r: Tensor) -> Tensor:
        return r + gain * torch.tanh(r.double() @ W.T).mul(1.7).relu() @ V.T / n**0.5

    return f


def numpy_of(f: Callable[[Tensor], Tensor]) -> Callable[[Array], Array]:
    return lambda r: f(torch.from_numpy(r)).numpy()


def noise(seed: int = 5) -> Callable[[Tensor], Tensor]:
    """Random directions, whatever the residual; the same sequence each time it is made."""
    generator = torch.Generator().manual_seed(seed)
    return lambda r: torch.randn(r.shape, dtype=F64, generator=generator)


def ends(status: str, call: Callable[[], FlexibleResult]) -> FlexibleResult:
    """The result of a solve that must warn and end with this status."""
    with pytest.warns(RuntimeWarning, match=f": {status}"):
        result = call()
    assert str(result.status) == status
    return result


def quietly(call: Callable[[], FlexibleResult]) -> FlexibleResult:
    """The result of a solve that need not converge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()
