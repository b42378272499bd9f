"""Diffusion steps: against matrix powers in NumPy, the heat equation, and what a diffusion must not do."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from kantor.graph import Graph, StabilityError, _spectrum, diffuse, stability
from similarities import (
    F32,
    F64,
    as_graph,
    diffused,
    error,
    normal,
    one_step,
    path,
    random_weights,
    star,
)

FORMS = pytest.mark.parametrize("form", [as_graph, lambda weights: weights], ids=["graph", "dense"])
METHODS = ("explicit", "implicit", "propagator", "chebyshev")


# --- values ---


@pytest.mark.parametrize("num_steps", [0, 1, 7, 50])
@pytest.mark.parametrize("symmetric", [True, False])
@FORMS
def test_equals_a_matrix_power(form: Callable[[Tensor], Any], symmetric: bool, num_steps: int) -> None:
    for n, d in ((2, 1), (17, 3), (60, 33)):
        weights, x = random_weights(n, n, symmetric=symmetric), normal(n, d)
        step = 0.9 * min(stability(weights, 1.0).largest_positive_step, 1e3)
        expected = diffused(x, weights, step, num_steps)
        assert error(diffuse(x, form(weights), step, num_steps), expected) < 1e-12
        single = diffuse(x.to(F32), form(weights.to(F32)), step, num_steps)
        assert single.dtype == F32
        assert error(single, expected) < 2e-6 * math.sqrt(max(num_steps, 1))


@FORMS
def test_batch(form: Callable[[Tensor], Any]) -> None:
    weights, x = random_weights(12, symmetric=False), normal(3, 12, 2)
    together = diffuse(x, form(weights), 0.2, 5)
    for entry, result in zip(x, together, strict=True):
        assert error(result, diffused(entry, weights, 0.2, 5)) < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_batch_of_weights(method: Any) -> None:
    weights = torch.stack([random_weights(9, seed) for seed in range(3)])
    x = normal(3, 9, 2)
    together = diffuse(x, weights, 0.2, 5, method=method)
    for entry, W, result in zip(x, weights, together, strict=True):
        torch.testing.assert_close(result, diffuse(entry, as_graph(W), 0.2, 5, method=method), rtol=1e-9, atol=1e-9)


def test_shared_methods_agree_on_batches() -> None:
    weights, x = random_weights(10), normal(2, 10, 3)
    for method in METHODS:
        together = diffuse(x, as_graph(weights), 0.3, 4, method=method)
        alone = torch.stack([diffuse(entry, as_graph(weights), 0.3, 4, method=method) for entry in x])
        torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)


def test_nothing_to_do_gives_a_copy() -> None:
    weights = random_weights(6)
    for form in (as_graph(weights), weights):
        x = normal(6, 2)
        for method in METHODS:
            y = diffuse(x, form, 0.3, 0, method=method)
            assert torch.equal(y, x)
            assert y.data_ptr() != x.data_ptr()
        assert torch.equal(diffuse(x, form, 0.0, 3), x)
    for method in METHODS:
        nothing = Graph(torch.zeros(1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=F64))
        assert diffuse(normal(0, 2), nothing, 0.3, 4, method=method).shape == (0, 2)
        assert diffuse(normal(6, 0), as_graph(weights), 0.3, 4, method=method).shape == (6, 0)


@pytest.mark.parametrize("method", METHODS)
def test_without_edges_nothing_moves(method: Any) -> None:
    x = normal(5, 3)
    graph = Graph(torch.zeros(6, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=F64))
    assert torch.equal(diffuse(x, graph, 100.0, 4, method=method), x)
    assert torch.equal(diffuse(x, torch.zeros(5, 5, dtype=F64), 100.0, 4, method=method), x)


# --- derivatives ---


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("options", [{}, {"teleport": 0.2}, {"dropout": 0.4, "seed": 3}], ids=str)
def test_gradcheck(symmetric: bool, options: dict[str, Any]) -> None:
    graph = as_graph(random_weights(6, symmetric=symmetric, density=0.5))

    def call(x: Tensor, weight: Tensor, step: Tensor) -> Tensor:
        return diffuse(x, graph.with_weight(weight), step, 3, stability="ignore", **options)

    args = (normal(6, 2), graph.weight.clone(), torch.tensor(0.3, dtype=F64))
    leaves = tuple(arg.requires_grad_() for arg in args)
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("method", ["propagator", "chebyshev", "implicit"])
def test_gradcheck_of_the_other_methods(method: Any) -> None:
    graph = as_graph(random_weights(5, density=0.6))
    turned = graph.transposed.permutation

    def call(x: Tensor, weight: Tensor, step: Tensor) -> Tensor:
        return diffuse(x, graph.with_weight((weight + weight[turned]) / 2), step, 3, method=method)

    args = (normal(5, 2), graph.weight.clone(), torch.tensor(0.2, dtype=F64))
    leaves = tuple(arg.requires_grad_() for arg in args)
    assert torch.autograd.gradcheck(call, leaves, atol=1e-6)


def test_dropout_is_replayed_for_derivatives() -> None:
    graph, x = as_graph(random_weights(20)), normal(20, 4).requires_grad_()
    y = diffuse(x, graph, 0.3, 4, dropout=0.5, seed=11)
    assert torch.equal(y, diffuse(x, graph, 0.3, 4, dropout=0.5, seed=11))
    assert not torch.equal(y, diffuse(x, graph, 0.3, 4, dropout=0.5, seed=12))
    # Linear in x for given masks: <gradient, x> is the value itself.
    weights = normal(20, 4, seed=5)
    (gradient,) = torch.autograd.grad((weights * y).sum(), x)
    torch.testing.assert_close((gradient * x).sum(), (weights * y).sum(), rtol=1e-12, atol=1e-12)


def test_dropout_keeps_the_mean_and_draws_from_the_default_generator() -> None:
    graph, x = as_graph(random_weights(8)), torch.ones(8, 4000, dtype=F64)
    torch.manual_seed(0)
    y = diffuse(x, graph, 0.3, 2, dropout=0.25)
    assert abs(float(y.mean()) - 1) < 0.02
    torch.manual_seed(0)
    assert torch.equal(y, diffuse(x, graph, 0.3, 2, dropout=0.25))
    assert not torch.equal(y, diffuse(x, graph, 0.3, 2, dropout=0.25))


# --- invariants ---


@FORMS
def test_mass_and_constants(form: Callable[[Tensor], Any]) -> None:
    weights, x = random_weights(50), normal(50, 4)
    y = diffuse(x, form(weights), 0.3, 30)
    assert float((y.sum(0) - x.sum(0)).abs().max()) < 1e-12 * 50
    constant = torch.full((50, 1), 3.7, dtype=F64)
    assert float((diffuse(constant, form(random_weights(50, symmetric=False)), 0.2, 30) - 3.7).abs().max()) < 1e-13


def test_energy() -> None:
    weights = random_weights(30)
    L = torch.diag(weights.sum(1)) - weights
    values, vectors = torch.linalg.eigh(L)

    def energies(x: Tensor, step: float) -> list[float]:
        states = [diffuse(x, as_graph(weights), step, k, stability="ignore") for k in range(6)]
        return [float((y * (L @ y)).sum()) for y in states]

    falling = energies(normal(30, 3), 1.98 / float(values[-1]))
    assert all(after <= before for before, after in pairwise(falling))
    rising = energies(vectors[:, -1:], 2.02 / float(values[-1]))
    assert all(after > before for before, after in pairwise(rising))


def test_maximum_principle() -> None:
    weights, x = random_weights(40, symmetric=False), normal(40, 5)
    step = 1 / float((weights.sum(1) - weights.diagonal()).max())
    y = diffuse(x, as_graph(weights), step, 10)
    assert bool((y <= x.max(0).values + 1e-13).all())
    assert bool((y >= x.min(0).values - 1e-13).all())


@pytest.mark.parametrize("method", METHODS)
def test_permutation(method: Any) -> None:
    weights, x = random_weights(25), normal(25, 3)
    order = torch.randperm(25, generator=torch.Generator().manual_seed(1))
    y = diffuse(x, as_graph(weights), 0.2, 6, method=method)
    permuted = diffuse(x[order], as_graph(weights[order][:, order]), 0.2, 6, method=method)
    torch.testing.assert_close(permuted, y[order], rtol=1e-9, atol=1e-9)


def test_components_never_mix() -> None:
    weights = torch.block_diag(random_weights(7), random_weights(9, seed=3))
    x = normal(16, 2)
    other = x.clone()
    other[7:] *= 1e6
    graph = as_graph(weights)
    assert torch.equal(diffuse(x, graph, 0.2, 20)[:7], diffuse(other, graph, 0.2, 20)[:7])
    assert torch.equal(diffuse(x, graph, 0.2, 20)[:7], diffuse(x[:7], as_graph(weights[:7, :7]), 0.2, 20))


def test_path_modes_decay_as_known() -> None:
    n, step, num_steps = 24, 0.4, 9
    i, j = torch.arange(n, dtype=F64)[:, None], torch.arange(n, dtype=F64)
    modes = (math.pi * (i + 0.5) * j / n).cos()
    decay = (1 - step * (2 - 2 * (math.pi * j / n).cos())) ** num_steps
    torch.testing.assert_close(diffuse(modes, as_graph(path(n)), step, num_steps), modes * decay, rtol=0, atol=1e-12)


# --- limits and other methods ---


def test_explicit_steps_converge_to_the_heat_equation() -> None:
    weights, x, time = random_weights(30), normal(30, 2), 1.5
    L = np.diag(weights.sum(1).numpy()) - weights.numpy()
    heat = torch.from_numpy(scipy.sparse.linalg.expm_multiply(-time * L, x.numpy()))
    errors = [error(diffuse(x, as_graph(weights), time / K, K), heat) for K in (200, 400, 800)]
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(abs(slope - 1) < 0.1 for slope in slopes)
    for steps in (1, 3):
        for form in (as_graph(weights), weights):
            assert error(diffuse(x, form, time / steps, steps, method="chebyshev"), heat) < 1e-12
            single = form.to(F32)
            assert error(diffuse(x.to(F32), single, time / steps, steps, method="chebyshev"), heat) < 2e-6


def test_chebyshev_starts_like_the_heat_equation() -> None:
    weights, x, time = random_weights(8), normal(8, 2), torch.zeros((), dtype=F64, requires_grad=True)
    jacobian = torch.func.jacrev(lambda t: diffuse(x, as_graph(weights), t, 1, method="chebyshev"))(time)
    torch.testing.assert_close(jacobian, weights @ x - weights.sum(1, keepdim=True) * x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("time", [1e-6, 0.1, 30.0, 1000.0])
def test_chebyshev_for_any_time(time: float) -> None:
    weights, x = random_weights(30), normal(30, 2)
    L = np.diag(weights.sum(1).numpy()) - weights.numpy()
    heat = torch.from_numpy(scipy.sparse.linalg.expm_multiply(-time * L, x.numpy()))
    assert error(diffuse(x, as_graph(weights), time, 1, method="chebyshev"), heat) < 1e-11


def test_implicit_equals_a_sparse_solve() -> None:
    weights, x = random_weights(40), normal(40, 3)
    L = np.diag(weights.sum(1).numpy()) - weights.numpy()
    for step, num_steps in ((0.7, 1), (2.5, 4)):
        system = scipy.sparse.csc_array(np.eye(40) + step * num_steps * L)
        expected = torch.from_numpy(scipy.sparse.linalg.spsolve(system, x.numpy()))
        assert error(diffuse(x, as_graph(weights), step, num_steps, method="implicit"), expected) < 1e-8


@pytest.mark.parametrize("symmetric", [True, False])
def test_propagator_equals_explicit(symmetric: bool) -> None:
    weights, x = random_weights(30, symmetric=symmetric).to(F32), normal(30, 3).to(F32)
    for form in (as_graph(weights), weights):
        explicit = diffuse(x, form, 0.2, 13)
        torch.testing.assert_close(diffuse(x, form, 0.2, 13, method="propagator"), explicit, rtol=1e-5, atol=1e-5)


def test_teleport_ends_in_the_closed_form() -> None:
    weights, x, a = random_weights(20), normal(20, 3), 0.15
    P = torch.from_numpy(one_step(weights, 0.3))
    expected = a * torch.linalg.solve(torch.eye(20, dtype=F64) - (1 - a) * P, x)
    for form in (as_graph(weights), weights):
        assert error(diffuse(x, form, 0.3, 200, teleport=a), expected) < 1e-6


# --- stability ---


def test_unstable_steps() -> None:
    graph, x = as_graph(star(4)), normal(5, 1)  # lambda_max = 5
    assert diffuse(x, graph, 0.39, 3).isfinite().all()
    with pytest.raises(StabilityError) as caught:
        diffuse(x, graph, 0.41, 3)
    message = str(caught.value)
    for part in ("diffuse: step: ", "got 0.41", "lambda_max(D - W) = 5", "step * lambda_max = 2.05", "0.4"):
        assert part in message
    assert isinstance(caught.value, ValueError)
    with pytest.warns(RuntimeWarning, match=r"diffuse: step: .*0\.41"):
        diffuse(x, graph, 0.41, 3, stability="warn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diffuse(x, graph, 0.41, 3, stability="ignore")
        diffuse(x, graph, 0.41, 3, method="implicit")
        diffuse(x, graph, 0.41, 3, method="chebyshev")
    with pytest.raises(StabilityError):
        diffuse(x, star(4), 0.41, 3)
    with pytest.raises(StabilityError):
        diffuse(x, graph, torch.tensor(0.41), 3, method="propagator")


def test_stability_of_weights_that_are_not_symmetric() -> None:
    weights = random_weights(20, symmetric=False)
    safe = stability(as_graph(weights), 1.0).largest_step
    diffuse(normal(20, 1), as_graph(weights), safe, 3)
    with pytest.raises(StabilityError, match="not symmetric"):
        diffuse(normal(20, 1), as_graph(weights), 1.01 * safe, 3)


def test_a_graph_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    compute = _spectrum.largest_eigenvalue
    monkeypatch.setattr(_spectrum, "largest_eigenvalue", lambda *args: calls.append(1) or compute(*args))
    graph, x = as_graph(star(4)), normal(5, 1)
    for _ in range(5):
        diffuse(x, graph, 0.39, 2)
    assert len(calls) == 1


def test_report() -> None:
    weights = random_weights(30)
    top = float(torch.linalg.eigvalsh(torch.diag(weights.sum(1)) - weights)[-1])
    rate = float((weights.sum(1) - weights.diagonal()).max())
    for form in (as_graph(weights), weights, weights.expand(2, -1, -1)):
        report = stability(form, 0.1)
        assert 0.99 * top <= report.lambda_max <= (1 + 1e-12) * top
        assert report.max_rate == pytest.approx(rate)
        assert 0.97 * 2 / top <= report.largest_step <= 2 / top
        assert report.largest_positive_step == pytest.approx(1 / rate, rel=2e-3)
        assert (report.energy_stable, report.max_principle, report.stable) == (True, True, True)
        assert not stability(form, 2.05 / top).stable
        between = stability(form, 1.01 / rate)
        assert (between.energy_stable, between.max_principle) == (1.01 / rate * top <= 2, False)
    assert "lambda_max" in repr(stability(weights, 0.1))
    with pytest.raises(AttributeError):
        report.step = 1.0  # type: ignore[misc]
    directed = stability(as_graph(random_weights(9, symmetric=False)), 0.1)
    assert math.isnan(directed.lambda_max)
    assert "lambda_max" not in repr(directed)
    assert stability(torch.zeros(3, 3), 5.0).largest_step == math.inf


# --- transforms ---


def test_vmap_and_compile() -> None:
    graph, x = as_graph(random_weights(10)), normal(4, 10, 2)

    def call(entry: Tensor) -> Tensor:
        return diffuse(entry, graph, 0.2, 3)

    expected = torch.stack([call(entry) for entry in x])
    torch.testing.assert_close(torch.func.vmap(call)(x), expected, rtol=1e-12, atol=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in METHODS:
            together = torch.func.vmap(lambda entry, how=method: diffuse(entry, graph, 0.2, 3, method=how))(x)
            torch.testing.assert_close(together, diffuse(x, graph, 0.2, 3, method=method), rtol=1e-8, atol=1e-8)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x[0]), expected[0], rtol=1e-12, atol=1e-12)


# --- errors ---

G, X = as_graph(random_weights(5)), normal(5, 2)
W = random_weights(5)
NAN, INF = math.nan, math.inf

CALLS: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    (TypeError, r"diffuse: x: expected a torch\.Tensor, got ndarray", lambda: diffuse(X.numpy(), G, 0.1, 1)),
    (TypeError, r"diffuse: x: expected shape \(n, d\) or \(B, n, d\), got \(5,\)", lambda: diffuse(X[:, 0], G, 0.1, 1)),
    (TypeError, r"diffuse: x: .*got \(1, 1, 5, 2\)", lambda: diffuse(X[None, None], G, 0.1, 1)),
    (TypeError, r"diffuse: x: expected dtype float32 or float64, got int64", lambda: diffuse(X.long(), G, 0.1, 1)),
    (TypeError, r"diffuse: graph: expected a kantor\.graph\.Graph or dense", lambda: diffuse(X, W.numpy(), 0.1, 1)),
    (TypeError, r"diffuse: graph: .*got layout", lambda: diffuse(X, W.to_sparse_csr(), 0.1, 1)),
    (TypeError, r"diffuse: graph: expected dtype float32 or float64", lambda: diffuse(X, W.long(), 0.1, 1)),
    (ValueError, r"diffuse: graph: expected weights \(n, n\) or \(B, n, n\)", lambda: diffuse(X, W[:, :4], 0.1, 1)),
    (ValueError, r"diffuse: graph: expected weights >= 0, got -", lambda: diffuse(X, W - 1, 0.1, 1)),
    (ValueError, r"diffuse: graph: expected finite values, got nan", lambda: diffuse(X, W * NAN, 0.1, 1)),
    (ValueError, r"diffuse: x: expected 5 rows, one for each node.*got 4", lambda: diffuse(X[:4], G, 0.1, 1)),
    (ValueError, r"diffuse: x: expected 5 rows", lambda: diffuse(X[None, :4], W, 0.1, 1)),
    (ValueError, r"diffuse: x: expected shape \(3, 5, d\)", lambda: diffuse(X, W.expand(3, 5, 5), 0.1, 1)),
    (ValueError, r"diffuse: x: expected shape \(3, 5, d\)", lambda: diffuse(X[None], W.expand(3, 5, 5), 0.1, 1)),
    (ValueError, r"diffuse: x has dtype torch\.float32, graph torch\.float64", lambda: diffuse(X.to(F32), G, 0.1, 1)),
    (ValueError, r"diffuse: x has device meta, graph cpu", lambda: diffuse(X.to("meta"), G, 0.1, 1)),
    (ValueError, r"diffuse: step: expected a finite number >= 0, got -0\.1", lambda: diffuse(X, G, -0.1, 1)),
    (ValueError, r"diffuse: step: .*got nan", lambda: diffuse(X, G, NAN, 1)),
    (ValueError, r"diffuse: step: .*got inf", lambda: diffuse(X, G, torch.tensor(INF), 1)),
    (ValueError, r"diffuse: step: expected one number", lambda: diffuse(X, G, torch.ones(2), 1)),
    (TypeError, r"diffuse: step: expected a number, got str", lambda: diffuse(X, G, "0.1", 1)),
    (TypeError, r"diffuse: step: expected dtype", lambda: diffuse(X, G, torch.tensor(1), 1)),
    (ValueError, r"diffuse: num_steps: expected an integer >= 0, got -1", lambda: diffuse(X, G, 0.1, -1)),
    (ValueError, r"diffuse: num_steps: expected an integer >= 0, got 1\.5", lambda: diffuse(X, G, 0.1, 1.5)),
    (ValueError, r"diffuse: num_steps: .*got True", lambda: diffuse(X, G, 0.1, True)),
    (ValueError, r"diffuse: method: expected one of 'explicit', .*got 'euler'",
     lambda: diffuse(X, G, 0.1, 1, method="euler")),
    (ValueError, r"diffuse: stability: expected one of", lambda: diffuse(X, G, 0.1, 1, stability="no")),
    (ValueError, r"diffuse: dropout: expected a number in \[0, 1\), got 1", lambda: diffuse(X, G, 0.1, 1, dropout=1.0)),
    (ValueError, r"diffuse: dropout: .*got -0\.1", lambda: diffuse(X, G, 0.1, 1, dropout=-0.1)),
    (ValueError, r"diffuse: teleport: .*got 1", lambda: diffuse(X, G, 0.1, 1, teleport=1)),
    (ValueError, r"diffuse: dropout: expected 0 with method='implicit'",
     lambda: diffuse(X, G, 0.1, 1, method="implicit", dropout=0.1)),
    (ValueError, r"diffuse: teleport: expected 0 with method='propagator'",
     lambda: diffuse(X, G, 0.1, 1, method="propagator", teleport=0.1)),
    (ValueError, r"diffuse: graph: expected symmetric weights for method 'chebyshev'",
     lambda: diffuse(X, torch.triu(W), 0.1, 1, method="chebyshev")),
    (ValueError, r"implicit_diffuse: graph: expected symmetric weights .*symmetrise",
     lambda: diffuse(X, torch.triu(W), 0.1, 1, method="implicit")),
    (TypeError, r"stability: graph: expected", lambda: stability(3, 0.1)),
    (ValueError, r"stability: step: expected", lambda: stability(G, -1.0)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "call"), CALLS, ids=[message for _, message, _ in CALLS])
def test_errors(kind: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=message) as caught:
        call()
    assert not isinstance(caught.value, StabilityError)
