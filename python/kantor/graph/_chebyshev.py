"""The heat kernel ``exp(-t L)`` by Chebyshev polynomials."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kantor.graph._arguments import Similarity
from kantor.graph._recurrence import recurrence, row_sums
from kantor.graph.graph import Graph
from kantor.graph.stability import lambda_max


def heat_kernel(x: Tensor, graph: Similarity, time: float | Tensor) -> Tensor:
    """Return ``exp(-time (D - W)) x`` for symmetric W, to rounding.

    With ``L = r (1 + s)``, where r is half of an upper bound of the spectrum and s has its eigenvalues in [-1, 1],
    ``exp(-t L) = sum_k c_k T_k(s)`` and the coefficients fall faster than any power once ``k > sqrt(t r)``.
    """
    # The eigenvalue is known within 1 % from below, and the polynomials grow fast outside of [-1, 1].
    radius = 0.5 * (graph.lambda_max_bound() if isinstance(graph, Graph) else 1.001 * lambda_max(graph))
    coefficients = _coefficients(time, radius, torch.finfo(x.dtype).eps)
    if radius == 0:
        return x.clone()
    edge = (graph.weight if isinstance(graph, Graph) else graph) / -radius
    diagonal = (-row_sums(graph, edge) - 1).to(x.dtype)

    def shifted(y: Tensor) -> Tensor:  # s y = (L / r - 1) y
        return recurrence(y, graph, edge, diagonal, num_steps=1)

    before, now = x, shifted(x)
    result = coefficients[0] * before + coefficients[1] * now
    for coefficient in coefficients[2:]:
        before, now = now, 2 * shifted(now) - before
        result = result + coefficient * now
    return result


def _coefficients(time: float | Tensor, radius: float, tolerance: float) -> Tensor:
    """Chebyshev coefficients of ``exp(-time radius (1 + s))``, as many as matter; differentiable in time.

    Gauss quadrature at the Chebyshev points, whose cost is nothing beside one product with the graph.
    """
    t = torch.as_tensor(time, dtype=torch.float64).cpu()
    product = float(t.detach()) * radius
    # |c_k| <= 2 exp(-k^2 / (5 a)) for k <= 2 a, and less than 2^-k beyond (a = time * radius).
    digits = math.log(4 / tolerance)
    terms = math.ceil(max(math.sqrt(5 * product * digits), 2 * digits))
    angle = (torch.arange(2 * terms, dtype=torch.float64) + 0.5) * (math.pi / (2 * terms))
    values = torch.exp(-(t * radius) * (1 + angle.cos()))
    order = torch.arange(terms, dtype=torch.float64)
    coefficients = (order[:, None] * angle).cos() @ values / terms
    coefficients = torch.cat([coefficients[:1] / 2, coefficients[1:]])
    small = coefficients.detach().abs().flip(0).cumsum(0).flip(0) <= tolerance  # the tail from here on
    return coefficients[: max(int((~small).sum()), 2)]  # at time zero the derivative still needs two
