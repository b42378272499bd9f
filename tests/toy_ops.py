"""Toy operators for the tests of the recipe, in a namespace of their own.

`axpby` runs a native kernel, `weighted_sum` takes a list of tensors and an optional one, `exponential` has results
without derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kantor._checks import check_float, check_same
from kantor._ops import Context, backend, declare

LIBRARY = torch.library.Library("kantor_test", "FRAGMENT")


def add(*terms: Tensor | None) -> Tensor | None:
    """Sum of the tangents that are there."""
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None


def scaled(a: float, t: Tensor | None) -> Tensor | None:
    return None if t is None else a * t


def axpby_forward(x: Tensor, y: Tensor, a: float, b: float) -> Tensor:
    out = torch.empty_like(x)
    backend().multiply_add(x, y, out, a, b, torch.get_num_threads())
    return out


def axpby_backward(ctx: Context, grad: Tensor) -> tuple[Any, ...]:
    _, _, a, b = ctx.inputs
    # In terms of the operator itself, so that second derivatives go through it as well.
    return axpby(grad, grad, a, 0.0), axpby(grad, grad, 0.0, b), None, None


axpby = declare(
    "axpby(Tensor x, Tensor y, float a, float b) -> Tensor",
    forward=axpby_forward,
    fake=lambda x, y, a, b: x.new_empty(x.shape),
    backward=axpby_backward,
    jvp=lambda ctx, dx, dy, *_: add(scaled(ctx.inputs[2], dx), scaled(ctx.inputs[3], dy)),
    batched=("x", "y"),
    library=LIBRARY,
)


def public_axpby(x: Tensor, y: Tensor, a: float, b: float) -> Tensor:
    """What a user calls: arguments checked, then the operator."""
    check_float(x, "axpby", "x")
    check_float(y, "axpby", "y")
    check_same("axpby", [("x", x), ("y", y)])
    if x.shape != y.shape:
        raise ValueError(f"axpby: y: expected shape {tuple(x.shape)}, that of x, got {tuple(y.shape)}")
    return axpby(x, y, a, b)


def weighted_sum_forward(terms: list[Tensor], weights: list[float], bias: Tensor | None) -> Tensor:
    total = sum(w * t for w, t in zip(weights, terms, strict=True))
    return total + bias if bias is not None else total


def weighted_sum_backward(ctx: Context, grad: Tensor) -> tuple[Any, ...]:
    needs_terms, _, needs_bias = ctx.needs
    terms = [w * grad if need else None for w, need in zip(ctx.inputs[1], needs_terms, strict=True)]
    return terms if any(needs_terms) else None, None, grad if needs_bias else None


weighted_sum = declare(
    "weighted_sum(Tensor[] terms, float[] weights, Tensor? bias) -> Tensor",
    forward=weighted_sum_forward,
    fake=lambda terms, weights, bias: terms[0].new_empty(terms[0].shape),
    backward=weighted_sum_backward,
    jvp=lambda ctx, d_terms, _, d_bias: add(*map(scaled, ctx.inputs[1], d_terms), d_bias),
    library=LIBRARY,
)


def exponential_forward(x: Tensor, steps: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    return x.exp(), x.sign(), torch.tensor([x.numel(), *steps])


def exponential_fake(x: Tensor, steps: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(1 + len(steps), dtype=torch.int64)


exponential = declare(
    "exponential(Tensor x, int[] steps) -> (Tensor y, Tensor sign, Tensor counts)",
    forward=exponential_forward,
    fake=exponential_fake,
    backward=lambda ctx, grad: (grad * exponential(*ctx.inputs)[0], None),
    jvp=lambda ctx, dx, _: dx * exponential(*ctx.inputs)[0],
    library=LIBRARY,
)
