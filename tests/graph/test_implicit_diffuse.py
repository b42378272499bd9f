"""Backward Euler steps: against sparse direct solves, their derivatives, and what is reported."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from kantor import ConvergenceWarning
from kantor.graph import Graph, implicit_diffuse, knn_graph
from similarities import F32, F64, as_graph, error, normal, path, random_weights, star


def solved(u: Tensor, weights: Tensor, time: float, num_steps: int = 1) -> Tensor:
    W = weights.numpy()
    system = scipy.sparse.csc_array(np.eye(len(W)) + time / num_steps * (np.diag(W.sum(1)) - W))
    result = u.numpy()
    for _ in range(num_steps):
        result = scipy.sparse.linalg.spsolve(system, result)
    return torch.from_numpy(result)


@pytest.mark.parametrize(("time", "num_steps"), [(0.0, 1), (0.5, 1), (10.0, 1), (10.0, 4), (1e4, 1)])
def test_equals_a_sparse_solve(time: float, num_steps: int) -> None:
    weights, u = random_weights(50), normal(50, 3)
    expected = solved(u, weights, time, num_steps)
    for form in (as_graph(weights), weights):
        result, info = implicit_diffuse(u, form, time, num_steps)
        assert info.converged
        assert info.residual <= 1e-10
        assert len(info.solves) == num_steps
        assert error(result, expected) < 1e-8
        single, info = implicit_diffuse(u.to(F32), form.to(F32), min(time, 10.0), num_steps)
        assert info.converged
        assert error(single, solved(u, weights, min(time, 10.0), num_steps)) < 1e-5


def test_batches() -> None:
    u, weights = normal(3, 12, 2), torch.stack([random_weights(12, seed) for seed in range(3)])
    shared, _ = implicit_diffuse(u, as_graph(weights[0]), 2.0, 2)
    own, info = implicit_diffuse(u, weights, 2.0, 2)
    assert len(info.solves) == 6
    for entry, W, a, b in zip(u, weights, shared, own, strict=True):
        assert error(a, solved(entry, weights[0], 2.0, 2)) < 1e-8
        assert error(b, solved(entry, W, 2.0, 2)) < 1e-8


def test_positive_and_stochastic_for_any_time() -> None:
    u = normal(30, 4).softmax(1)
    for time in (0.1, 3.0, 1e3):
        result, _ = implicit_diffuse(u, as_graph(random_weights(30)), time)
        assert float(result.min()) > -1e-9
        assert float((result.sum(1) - 1).abs().max()) < 1e-8


def test_few_iterations_on_a_graph_of_points() -> None:
    x = torch.from_numpy(load_digits().data) / 16
    graph = knn_graph(x, k=11, bandwidth_k=6)
    u = torch.nn.functional.one_hot(torch.arange(len(x)) % 10).double()
    _, info = implicit_diffuse(u, graph, 10.0, rtol=1e-6)
    assert info.converged
    assert info.iterations <= 40


@pytest.mark.parametrize("num_steps", [1, 2])
def test_gradcheck(num_steps: int) -> None:
    graph = as_graph(random_weights(6, density=0.6))
    turned = graph.transposed.permutation

    def call(u: Tensor, weight: Tensor, time: Tensor) -> Tensor:
        return implicit_diffuse(u, graph.with_weight((weight + weight[turned]) / 2), time, num_steps, rtol=1e-13)[0]

    args = (normal(6, 2), graph.weight.clone(), torch.tensor(1.3, dtype=F64))
    leaves = tuple(arg.requires_grad_() for arg in args)
    assert torch.autograd.gradcheck(call, leaves, atol=1e-7)


def test_no_convergence_warns_and_says_so() -> None:
    with pytest.warns(ConvergenceWarning, match=r"implicit_diffuse: .*maxiter") as caught:
        u, info = implicit_diffuse(normal(60, 2), as_graph(path(60)), 1e4, 3, maxiter=2)
    assert len(caught) == 1
    assert issubclass(ConvergenceWarning, RuntimeWarning)
    assert not info.converged
    assert info.iterations == 6
    assert info.residual > 1e-10
    assert u.isfinite().all()
    assert "converged" in repr(info)
    assert "no" in repr(info)


def test_nothing_to_do() -> None:
    nothing = Graph(torch.zeros(1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=F64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        u, info = implicit_diffuse(normal(0, 3), nothing, 1.0)
        assert u.shape == (0, 3)
        assert info.converged
        no_edges = Graph(torch.zeros(5, dtype=torch.int32), nothing.col, nothing.weight)
        u = normal(4, 2)
        assert torch.equal(implicit_diffuse(u, no_edges, 5.0)[0], u)
        assert implicit_diffuse(normal(4, 0), no_edges, 5.0)[0].shape == (4, 0)


G, U, W = as_graph(star(4)), normal(5, 2), star(4)
CALLS: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    (TypeError, r"implicit_diffuse: u: expected a torch\.Tensor", lambda: implicit_diffuse(U.numpy(), G, 1.0)),
    (TypeError, r"implicit_diffuse: u: expected shape", lambda: implicit_diffuse(U[:, 0], G, 1.0)),
    (TypeError, r"implicit_diffuse: u: expected dtype", lambda: implicit_diffuse(U.long(), G, 1.0)),
    (ValueError, r"implicit_diffuse: u: expected 5 rows", lambda: implicit_diffuse(U[:4], G, 1.0)),
    (ValueError, r"implicit_diffuse: u has dtype", lambda: implicit_diffuse(U.to(F32), G, 1.0)),
    (ValueError, r"implicit_diffuse: time: expected a finite number >= 0", lambda: implicit_diffuse(U, G, -1.0)),
    (ValueError, r"implicit_diffuse: time: .*nan", lambda: implicit_diffuse(U, G, math.nan)),
    (ValueError, r"implicit_diffuse: num_steps: expected an integer >= 1, got 0", lambda: implicit_diffuse(U, G, 1, 0)),
    (ValueError, r"implicit_diffuse: graph: expected symmetric weights for conjugate gradients, got W != W\.T; symm",
     lambda: implicit_diffuse(U, as_graph(torch.triu(W)), 1.0)),
    (ValueError, r"rtol", lambda: implicit_diffuse(U, G, 1.0, rtol=-1.0)),
    (ValueError, r"maxiter", lambda: implicit_diffuse(U, G, 1.0, maxiter=-1)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "call"), CALLS, ids=[message for _, message, _ in CALLS])
def test_errors(kind: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=message):
        call()
