"""What LANTON refuses, and what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from kantor._checks import is_number
from kantor.linalg.msign import check_msign_options
from kantor.optim.lmo import DEFAULT_SCALE

MSIGN_NAMES = ("msign_method", "msign_steps", "matmul_dtype")


def check_group(group: dict[str, Any]) -> None:
    """Raise at the first option of a group that is out of range."""

    def demand(name: str, fits: Callable[[Any], bool], expected: str) -> None:
        if not fits(group[name]):
            raise ValueError(f"LANTON: {name}: expected {expected}, got {group[name]!r}")

    demand("lr", lambda x: is_number(x) and x >= 0, "a number >= 0")
    for name in ("beta1", "beta2"):
        demand(name, lambda x: is_number(x) and 0 <= x < 1, "a number in [0, 1)")
    demand(
        "alpha", lambda x: (is_number(x) and x > 0) or (isinstance(x, str) and x == "auto"), "'auto' or a number > 0"
    )
    demand("scale", lambda x: x is None or (is_number(x) and x > 0), "None or a number > 0")
    demand("weight_decay", lambda x: is_number(x) and x >= 0, "a number >= 0")
    demand("second_gradient", lambda x: x in ("previous", "independent"), "'previous' or 'independent'")
    demand("noise_estimator", lambda x: x in ("nuclear", "frobenius"), "'nuclear' or 'frobenius'")
    demand("noise_every", lambda x: isinstance(x, int) and x >= 1, "an integer >= 1")
    demand("min_factor", lambda x: is_number(x) and 0 <= x <= 1, "a number in [0, 1]")
    demand("kind", lambda x: x in ("auto", *DEFAULT_SCALE), f"'auto' or one of {', '.join(DEFAULT_SCALE)}")
    check_msign_options("LANTON", group["msign_method"], group["msign_steps"], group["matmul_dtype"], names=MSIGN_NAMES)


def check_parameters(parameters: Iterable[Tensor]) -> None:
    """Raise unless all are real, floating-point, and have a shape."""
    for number, p in enumerate(parameters):
        if isinstance(p, torch.nn.UninitializedParameter):
            raise ValueError(
                f"LANTON: params[{number}]: expected a shape, from which the kind follows, got a parameter of a lazy "
                "module; call the model on a batch first"
            )
        if p.is_complex():
            raise NotImplementedError(f"LANTON: params[{number}]: expected real parameters, got {p.dtype}")
        if not p.is_floating_point():
            raise TypeError(f"LANTON: params[{number}]: expected a floating-point dtype, got {p.dtype}")


def check_second(second: Any, p: Tensor, number: int) -> None:
    """Raise unless it may be a gradient of the parameter."""
    where = f"LANTON.step: second_grads[{number}]"
    if not isinstance(second, Tensor) or second.layout is not torch.strided or not second.is_floating_point():
        got = f"{second.layout}, {second.dtype}" if isinstance(second, Tensor) else type(second).__name__
        raise TypeError(f"{where}: expected a dense tensor of a real floating-point dtype, got {got}")
    if second.shape != p.shape:
        raise ValueError(f"{where}: expected shape {tuple(p.shape)}, got {tuple(second.shape)}")
