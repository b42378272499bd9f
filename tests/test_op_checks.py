"""The harness itself: every kind of broken operator is caught by the check that is there for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.optests.generate_tests import OpCheckError

import op_checks
from kantor._ops import declare
from op_checks import ErrorCase, OpCase

RULES: dict[str, Any] = {
    "forward": lambda x, y: x * y,
    "fake": lambda x, y: x.new_empty(x.shape),
    "backward": lambda ctx, grad: (grad * ctx.inputs[1], grad * ctx.inputs[0]),
    "jvp": lambda ctx, dx, dy: sum(t * v for t, v in ((dx, ctx.inputs[1]), (dy, ctx.inputs[0])) if t is not None),
    "batched": ("x", "y"),
}


def broken_vmap(info: Any, in_dims: Any, x: Tensor, y: Tensor) -> tuple[Tensor, int]:
    return x.movedim(in_dims[0] or 0, 0) * y.movedim(in_dims[1] or 0, 0) + 1e-9, 0


def thread_dependent(x: Tensor, y: Tensor) -> Tensor:
    return x * y * (1 + 1e-5 * torch.get_num_threads())


@pytest.fixture
def library() -> Iterator[torch.library.Library]:
    library = torch.library.Library("kantor_test_broken", "FRAGMENT")
    yield library
    library._destroy()


@pytest.mark.parametrize(
    ("check", "change"),
    [
        pytest.param(op_checks.check_values, {}, id="nothing"),
        pytest.param(op_checks.check_values, {"forward": lambda x, y: x * y * (1 + 1e-5)}, id="inaccurate"),
        pytest.param(op_checks.check_values, {"forward": lambda x, y: (x * y).sqrt() ** 2}, id="nan"),
        pytest.param(op_checks.check_values, {"forward": lambda x, y: x.mul_(y).clone()}, id="writes"),
        pytest.param(op_checks.check_values, {"forward": lambda x, y: (x * y)[:-1]}, id="shape"),
        pytest.param(op_checks.check_opcheck, {"forward": lambda x, y: x}, id="returns-input"),
        pytest.param(op_checks.check_opcheck, {"fake": lambda x, y: x.new_empty(x.shape, dtype=torch.int8)}, id="fake"),
        pytest.param(op_checks.check_threads, {"forward": thread_dependent}, id="threads"),
        pytest.param(op_checks.check_gradients, {"backward": lambda ctx, grad: (grad, grad)}, id="backward"),
        pytest.param(op_checks.check_gradients, {"jvp": lambda ctx, dx, dy: None}, id="jvp"),
        pytest.param(
            op_checks.check_gradients,
            {"backward": lambda ctx, grad: (grad * ctx.inputs[1].detach(), grad * ctx.inputs[0])},
            id="second-derivative",
        ),
        pytest.param(op_checks.check_vmap, {"vmap": broken_vmap, "batched": ()}, id="vmap"),
    ],
)
def test_a_broken_operator_is_caught(
    check: Callable[..., None], change: dict[str, Any], library: torch.library.Library
) -> None:
    multiply = declare("multiply(Tensor x, Tensor y) -> Tensor", **(RULES | change), library=library)
    case = OpCase(
        "multiply",
        call=multiply,
        sample=lambda size, rand: (rand(size), rand(size)),
        oracle=lambda x, y: x * y,
        differentiable=(0, 1),
        op=multiply,
    )
    if not change:
        for good in (op_checks.check_layouts, op_checks.check_threads, op_checks.check_gradients, op_checks.check_vmap):
            good(case)
        check(case)
        return
    with pytest.raises((AssertionError, RuntimeError, OpCheckError)):
        check(case)


def test_layouts_that_change_bits_are_caught() -> None:
    case = OpCase(
        "memory",
        call=lambda x: torch.as_strided(x, x.shape, (1,), x.storage_offset()).clone(),
        sample=lambda size, rand: (rand(size),),
        oracle=lambda x: x,
        differentiable=(0,),
    )
    op_checks.check_values(case)
    with pytest.raises(AssertionError, match="strided arguments change the result"):
        op_checks.check_layouts(case)


@pytest.mark.parametrize("call", [lambda x, y: x * y, lambda x, y: x.double() * y.double()])
def test_missing_argument_checks_are_caught(call: Callable[..., Tensor]) -> None:
    case = OpCase(
        "unchecked",
        call=call,
        sample=lambda size, rand: (rand(size), rand(size)),
        oracle=lambda x, y: x * y,
        differentiable=(0, 1),
        checked=True,
    )
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        op_checks.check_errors(case)


def test_an_error_case_needs_its_message() -> None:
    def call(x: Tensor) -> Tensor:
        raise ValueError("something else")

    case = OpCase(
        "vague",
        call=call,
        sample=lambda size, rand: (rand(size),),
        oracle=lambda x: x,
        errors=(ErrorCase(ValueError, "x: expected", lambda x: (x[:-1],)),),
    )
    with pytest.raises(AssertionError, match="did not match"):
        op_checks.check_errors(case)
