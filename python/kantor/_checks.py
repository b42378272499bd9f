"""Argument checks. A message says: function, argument, what was expected, what came, what to do."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

FLOATS = (torch.float32, torch.float64)


def check_tensor(value: object, function: str, argument: str) -> Tensor:
    """Return ``value`` if it is a strided tensor, else raise TypeError."""
    if not isinstance(value, Tensor):
        if isinstance(value, np.ndarray):
            hint = f"; call torch.from_numpy({argument})"
        elif isinstance(value, list | tuple):
            hint = f"; call torch.tensor({argument}, dtype=torch.float64)"
        elif hasattr(value, "to_numpy"):  # a column or a table of pandas, polars, ...
            hint = f"; call torch.from_numpy({argument}.to_numpy())"
        else:
            hint = ""
        raise TypeError(f"{function}: {argument}: expected a torch.Tensor, got {type(value).__name__}{hint}")
    if value.layout is not torch.strided:
        raise TypeError(f"{function}: {argument}: expected a dense tensor, got layout {value.layout}; call .to_dense()")
    return value


def check_float(value: Tensor, function: str, argument: str) -> None:
    """Raise TypeError unless the dtype is float32 or float64."""
    if value.dtype not in FLOATS:
        hint = "; call .to(torch.float64)" if not value.dtype.is_complex else "; complex systems are not supported"
        raise TypeError(f"{function}: {argument}: expected dtype float32 or float64, got {_short(value.dtype)}{hint}")


def is_number(value: object) -> bool:
    """Whether it is a finite real number: Python's, or a tensor with one element."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and math.isfinite(value.detach())
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_readable(tensor: Tensor) -> bool:
    """Whether values may be looked at: not inside torch.compile, export or vmap."""
    if torch.compiler.is_compiling() or isinstance(tensor, FakeTensor | FunctionalTensor):
        return False
    if torch._C._functorch.is_legacy_batchedtensor(tensor):  # torch.autograd.grad(is_grads_batched=True)
        return False
    level = tensor
    while torch._C._functorch.is_functorch_wrapped_tensor(level):
        if torch._C._functorch.is_batchedtensor(level):
            return False
        level = torch._C._functorch.get_unwrapped(level)
    return True


def host(tensor: Tensor) -> Tensor:
    """Return the plain values, also inside torch.func, as a contiguous CPU tensor: for code that reads structure."""
    with torch._C._DisableFuncTorch():
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
        return tensor.detach().cpu().contiguous().resolve_neg()


def host_array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return :func:`host` as a NumPy array, sharing its memory."""
    with torch._C._DisableFuncTorch():
        array: np.ndarray[Any, Any] = host(tensor).numpy()
        return array


def check_finite(value: Tensor, function: str, argument: str) -> None:
    """Raise ValueError at the first NaN or infinity, naming its index; nothing where values cannot be looked at."""
    if not is_readable(value):
        return
    finite = torch.isfinite(value.detach())
    if not bool(finite.all()):
        where = tuple(int(i) for i in (~finite).nonzero()[0])
        index = where[0] if len(where) == 1 else where
        raise ValueError(
            f"{function}: {argument}: expected finite values, got {value.detach()[where].item()} at {index}"
        )


def check_same(function: str, tensors: Iterable[tuple[str, Tensor | None]]) -> None:
    """Raise unless all tensors share dtype (TypeError) and device (ValueError); the message names both sides."""
    present = [(name, tensor) for name, tensor in tensors if tensor is not None]
    for name, tensor in present[1:]:
        first_name, first = present[0]
        if tensor.device != first.device:
            raise ValueError(
                f"{function}: {first_name} is on {first.device}, {name} on {tensor.device}; move one with .to(device)"
            )
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{function}: {first_name} is {_short(first.dtype)}, {name} is {_short(tensor.dtype)}; "
                "convert one with .to(dtype)"
            )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
