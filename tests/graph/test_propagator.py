"""The matrix of many steps: against NumPy, by all of its ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kantor.graph import StabilityError, propagator
from similarities import F64, as_graph, error, one_step, random_weights, star

FORMS = pytest.mark.parametrize("form", [as_graph, lambda weights: weights], ids=["graph", "dense"])


@pytest.mark.parametrize("num_steps", [0, 1, 2, 7, 50])
@pytest.mark.parametrize("symmetric", [True, False])
@FORMS
def test_equals_a_matrix_power(form: Callable[[Tensor], Any], symmetric: bool, num_steps: int) -> None:
    for density in (0.02, 0.5):  # few entries: products with the graph; many: squaring
        weights = random_weights(40, symmetric=symmetric, density=density)
        expected = torch.from_numpy(np.linalg.matrix_power(one_step(weights, 0.05), num_steps))
        assert error(propagator(form(weights), 0.05, num_steps), expected) < 1e-12
        for rows in (torch.tensor([3, 0, 3, 39]), torch.arange(40), torch.tensor([], dtype=torch.long)):
            some = propagator(form(weights), 0.05, num_steps, rows)
            assert some.shape == (len(rows), 40)
            torch.testing.assert_close(some, expected[rows], rtol=1e-12, atol=1e-12)


def test_batch() -> None:
    weights = torch.stack([random_weights(15, seed) for seed in range(4)])
    rows = torch.tensor([1, 14])
    for num_steps in (1, 6):
        P, some = propagator(weights, 0.2, num_steps), propagator(weights, 0.2, num_steps, rows)
        assert some.shape == (4, 2, 15)
        for W, entry, few in zip(weights, P, some, strict=True):
            expected = torch.from_numpy(np.linalg.matrix_power(one_step(W, 0.2), num_steps))
            assert error(entry, expected) < 1e-12
            assert error(few, expected[rows]) < 1e-12


@FORMS
@pytest.mark.parametrize("rows", [None, torch.tensor([0, 4])])
def test_gradcheck(form: Callable[[Tensor], Any], rows: Tensor | None) -> None:
    weights = random_weights(6, symmetric=False, density=0.7) + 0.1

    def call(W: Tensor, step: Tensor) -> Tensor:
        return propagator(form(W), step, 5, rows, stability="ignore")

    assert torch.autograd.gradcheck(call, (weights.requires_grad_(), torch.tensor(0.2, dtype=F64, requires_grad=True)))


def test_errors() -> None:
    W = star(4)
    with pytest.raises(StabilityError, match=r"propagator: step: "):
        propagator(W, 0.41, 2)
    for kind, message, call in (
        (TypeError, r"propagator: graph: expected", lambda: propagator(3, 0.1, 1)),
        (ValueError, r"propagator: graph: expected weights \(n, n\)", lambda: propagator(W[:3], 0.1, 1)),
        (ValueError, r"propagator: step: expected", lambda: propagator(W, -0.1, 1)),
        (ValueError, r"propagator: num_steps: expected", lambda: propagator(W, 0.1, -1)),
        (TypeError, r"propagator: rows: expected a vector of integers", lambda: propagator(W, 0.1, 1, torch.ones(2))),
        (IndexError, r"propagator: rows: expected 0\.\.4, got 0\.\.5", lambda: propagator(W, 0.1, 1, torch.arange(6))),
    ):
        with pytest.raises(kind, match=message):
            call()
