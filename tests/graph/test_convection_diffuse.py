"""Upwind convection on graphs: conservation, positivity, known transport on a ring."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor

from kantor.graph import Graph, StabilityError, convection_diffuse, diffuse
from similarities import F32, F64, as_graph, error, generator, normal, random_weights, star


def ring(n: int, weight: float = 0.0) -> Graph:
    """A ring whose edges are stored in both directions."""
    i = torch.arange(n)
    col = torch.stack([(i - 1) % n, (i + 1) % n], 1).sort(1).values
    return Graph(torch.arange(n + 1) * 2, col.flatten(), torch.full((2 * n,), weight, dtype=F64))


def along(graph: Graph, speed: float) -> Tensor:
    """The same velocity on every edge of a ring, from i to i + 1."""
    forward = (graph.col - graph.rows) % graph.num_nodes == 1
    return torch.where(forward, speed, -speed).double()


def random_velocity(graph: Graph, size: float = 1.0) -> Tensor:
    v = size * torch.randn(graph.num_edges, dtype=F64, generator=generator(5))
    return v - v[graph.transposed.permutation]


def in_numpy(u: Tensor, weights: Tensor, v: Tensor, step: float, num_steps: int) -> Tensor:
    """The formula, pair by pair."""
    for _ in range(num_steps):
        change = weights * (u.T[:, None, :] - u.T[:, :, None]) + (-v).clamp(min=0) * u.T[:, None, :]
        change = change - v.clamp(min=0) * u.T[:, :, None]
        u = u + step * change.sum(-1).T
    return u


def test_without_velocity_it_is_diffusion() -> None:
    graph, u = as_graph(random_weights(30)), normal(30, 4)
    expected = diffuse(u, graph, 0.3, 7)
    assert torch.equal(convection_diffuse(u, graph, step=0.3, num_steps=7), expected)
    zero = torch.zeros(graph.num_edges, dtype=F64)
    assert torch.equal(convection_diffuse(u, graph, zero, step=0.3, num_steps=7), expected)
    assert torch.equal(convection_diffuse(u, graph, -zero, step=0.3, num_steps=7), expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_equals_the_formula(symmetric: bool) -> None:
    weights = random_weights(14, symmetric=symmetric, density=0.5)
    pattern = (weights + weights.T) != 0  # the velocity needs both directions
    weights = torch.where(pattern & (weights == 0), 1e-9, weights)
    graph, u = as_graph(weights), normal(14, 3)
    v = random_velocity(graph, 0.2)
    dense = torch.zeros(14, 14, dtype=F64).index_put((graph.rows, graph.col.long()), v)
    expected = in_numpy(u, weights, dense, 0.1, 5)
    assert error(convection_diffuse(u, graph, v, step=0.1, num_steps=5), expected) < 1e-12
    assert error(convection_diffuse(u, graph, dense, step=0.1, num_steps=5), expected) < 1e-12
    batch = torch.stack([u, 2 * u])
    assert error(convection_diffuse(batch, graph, v, step=0.1, num_steps=5)[1], 2 * expected) < 1e-12


def test_a_bump_travels_round_a_ring() -> None:
    n, step, num_steps, speed = 60, 0.25, 20, 2.0
    graph = ring(n)
    u = torch.zeros(n, 1, dtype=F64)
    u[3] = 1
    moved = convection_diffuse(u, graph, along(graph, speed), step=step, num_steps=num_steps)
    # Each step a share `step * speed` moves on by one node: a binomial distribution, of mean K step speed.
    expected = torch.zeros(n, dtype=F64)
    expected[3 : 3 + num_steps + 1] = torch.from_numpy(
        scipy.stats.binom.pmf(range(num_steps + 1), num_steps, step * speed)
    )
    torch.testing.assert_close(moved[:, 0], expected, rtol=0, atol=1e-12)
    mean = float((moved[:, 0] * torch.arange(n)).sum()) - 3
    assert mean == pytest.approx(num_steps * step * speed, abs=1e-10)
    # At a step of one cell it moves without smearing.
    exact = convection_diffuse(u, graph, along(graph, speed), step=1 / speed, num_steps=20)
    assert torch.equal(exact, u.roll(20, 0))


def test_mass_and_positivity() -> None:
    graph, u = as_graph(random_weights(40)), normal(40, 3).abs()
    v = random_velocity(graph, 0.3)
    leaving = torch.zeros(40, dtype=F64).index_add(0, graph.rows, v.clamp(min=0))
    step = 1 / float((graph.degree - graph.diagonal + leaving).max())
    moved = convection_diffuse(u, graph, v, step=step, num_steps=50)
    assert float((moved.sum(0) - u.sum(0)).abs().max()) < 1e-12 * 40
    assert float(moved.min()) >= 0


def test_gradcheck() -> None:
    graph = as_graph(random_weights(6, density=0.6))
    turned = graph.transposed.permutation

    def call(u: Tensor, weight: Tensor, v: Tensor, step: Tensor) -> Tensor:
        graph_ = graph.with_weight(weight)
        return convection_diffuse(u, graph_, v - v[turned], step=step, num_steps=3, stability="ignore")

    v = random_velocity(graph)
    args = (normal(6, 2), graph.weight.clone(), v, torch.tensor(0.1, dtype=F64))
    leaves = tuple(arg.requires_grad_() for arg in args)
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_unstable_steps() -> None:
    graph, u = ring(8), normal(8, 1)
    v = along(graph, 2.0)
    with pytest.raises(StabilityError, match=r"convection_diffuse: step: expected at most 0\.5.*got 0\.6"):
        convection_diffuse(u, graph, v, step=0.6, num_steps=2)
    with pytest.warns(RuntimeWarning, match=r"convection_diffuse: step"):
        convection_diffuse(u, graph, v, step=0.6, num_steps=2, stability="warn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convection_diffuse(u, graph, v, step=0.6, num_steps=2, stability="ignore")
        # Pure diffusion is judged by its eigenvalue, as in `diffuse`.
        convection_diffuse(u, ring(8, 1.0), 0 * v, step=0.5, num_steps=2)
    with pytest.raises(StabilityError):
        convection_diffuse(u, ring(8, 1.0), 0 * v, step=0.51, num_steps=2)


def test_nothing_to_do() -> None:
    graph, u = ring(5), normal(5, 2)
    v = along(graph, 1.0)
    for options in ({"step": 0.5, "num_steps": 0}, {"step": 0.0, "num_steps": 3}):
        assert torch.equal(convection_diffuse(u, graph, v, **options), u)
    no_edges = Graph(torch.zeros(6, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=F64))
    assert torch.equal(convection_diffuse(u, no_edges, torch.zeros(0, dtype=F64), step=9.0, num_steps=3), u)


R, U = ring(5), normal(5, 2)
V = along(R, 1.0)


def call(u: Any = U, graph: Any = R, velocity: Any = V, step: Any = 0.1, num_steps: Any = 1, **more: Any) -> Tensor:
    return convection_diffuse(u, graph, velocity, step=step, num_steps=num_steps, **more)


CALLS: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    (TypeError, r"convection_diffuse: u: expected a torch\.Tensor", lambda: call(U.numpy())),
    (TypeError, r"convection_diffuse: u: expected shape", lambda: call(U[:, 0])),
    (TypeError, r"convection_diffuse: graph: expected a kantor\.graph\.Graph", lambda: call(graph=star(4))),
    (ValueError, r"convection_diffuse: u: expected 5 rows", lambda: call(U[:4])),
    (ValueError, r"convection_diffuse: u has dtype", lambda: call(U.to(F32))),
    (ValueError, r"convection_diffuse: step: expected", lambda: call(step=-1.0)),
    (ValueError, r"convection_diffuse: num_steps: expected", lambda: call(num_steps=-1)),
    (ValueError, r"convection_diffuse: scheme: expected one of 'upwind', got 'x'", lambda: call(scheme="x")),
    (ValueError, r"convection_diffuse: stability: expected one of", lambda: call(stability="no")),
    (TypeError, r"convection_diffuse: velocity: expected a torch\.Tensor", lambda: call(velocity=1.0)),
    (ValueError, r"convection_diffuse: velocity has dtype", lambda: call(velocity=V.to(F32))),
    (ValueError, r"convection_diffuse: velocity: expected shape \(10,\)", lambda: call(velocity=V[:-1])),
    (ValueError, r"convection_diffuse: velocity: expected finite", lambda: call(velocity=V / 0)),
    (ValueError, r"convection_diffuse: velocity: expected v_ij = -v_ji, got v_ij \+ v_ji = 2 at \(0, 1\)",
     lambda: call(velocity=V.abs())),
    (ValueError, r"convection_diffuse: velocity: expected v_ij = -v_ji", lambda: call(velocity=V + 3e-6)),
    (ValueError, r"convection_diffuse: velocity: expected zeros where the graph has no edge",
     lambda: call(velocity=torch.ones(5, 5, dtype=F64).triu(1) - torch.ones(5, 5, dtype=F64).tril(-1))),
    (ValueError, r"convection_diffuse: velocity: expected v_ij = -v_ji",
     lambda: call(graph=as_graph(torch.triu(star(4))), velocity=torch.ones(4, dtype=F64))),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "wrong"), CALLS, ids=[message for _, message, _ in CALLS])
def test_errors(kind: type[Exception], message: str, wrong: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=message):
        wrong()


def test_a_velocity_antisymmetric_to_rounding_passes() -> None:
    call(velocity=V + 1e-7)
