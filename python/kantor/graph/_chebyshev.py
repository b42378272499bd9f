"""The heat kernel ``exp(-t L)`` by Chebyshev polynomials."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kantor.graph._arguments import Similarity
from kantor.graph._recurrence import explicit_step, recurrence
from kantor.graph.graph import Graph
from kantor.graph.stability import lambda_max


def heat_kernel(x: Tensor, graph: Similarity, time: float | Tensor) -> Tensor:
    """Return ``exp(-time (D - W)) x`` for symmetric W, to rounding.

    Let r be half of an upper bound of the spectrum. ``s = 1 - L / r``, one explicit step of length 1 / r, has its
    eigenvalues in [-1, 1], and ``exp(-t L) = exp(-t r (1 - s)) = sum_k c_k T_k(s)`` with positive coefficients, which
    sum to one and fall faster than any power once ``k > sqrt(t r)``.
    """
    # The eigenvalue is known within 1 % from below, and the polynomials grow fast outside of [-1, 1].
    bound = graph.lambda_max_bound() if isinstance(graph, Graph) else 1.001 * lambda_max(graph)

    def steps_of(length: float) -> Callable[[Tensor], Tensor]:
        edge, diagonal = explicit_step(graph, length)
        return lambda y: recurrence(y, graph, edge, diagonal, num_steps=1)

    return chebyshev_series(x, time, bound, steps_of)


def chebyshev_series(
    x: Tensor, time: float | Tensor, bound: float, steps_of: Callable[[float], Callable[[Tensor], Tensor]]
) -> Tensor:
    """``exp(-time L) x`` for an L with spectrum in [0, bound]; ``steps_of(t)`` is the map ``y -> y - t L y``."""
    radius = 0.5 * bound
    coefficients = _coefficients(time, radius, torch.finfo(x.dtype).eps)
    if radius == 0:
        return x.clone()
    step = steps_of(1 / radius)
    before, now = x, step(x)
    result = coefficients[0] * before + coefficients[1] * now
    for coefficient in coefficients[2:]:
        before, now = now, 2 * step(now) - before
        result = result + coefficient * now
    return result


def _coefficients(time: float | Tensor, radius: float, tolerance: float) -> Tensor:
    """Chebyshev coefficients of ``exp(-time radius (1 - s))``, as many as matter; differentiable in time.

    The trapezoidal rule for the Fourier coefficients of ``exp(-time radius (1 - cos angle))``.
    """
    t = torch.as_tensor(time, dtype=torch.float64).cpu()
    product = float(t.detach()) * radius
    # |c_k| <= 2 exp(-k^2 / (5 a)) for k <= 2 a, and less than 2^-k beyond (a = time * radius).
    digits = math.log(4 / tolerance)
    terms = math.ceil(max(math.sqrt(5 * product * digits), 2 * digits))
    angle = 2 * math.pi * torch.fft.fftfreq(2 * terms, dtype=torch.float64)
    values = torch.exp(-2 * t * radius * (angle / 2).sin().square())
    coefficients = torch.fft.rfft(values).real[:terms] / terms
    coefficients = torch.cat([coefficients[:1] / 2, coefficients[1:]])
    small = coefficients.detach().abs().flip(0).cumsum(0).flip(0) <= tolerance  # the tail from here on
    return coefficients[: max(int((~small).sum()), 2)]  # at time zero the derivative still needs two
