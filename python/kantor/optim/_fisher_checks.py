"""What EmpiricalFisher and MFAC refuse, and what they say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat

import torch
from torch import Tensor

from kantor._checks import check_tensor
from kantor.optim._gradient_window import STORAGE, padded


def check_options(
    m: int | None,
    damping: float,
    block_size: int | None,
    storage_dtype: torch.dtype | None,
    divisor: str,
    factor: str,
    on_nonfinite: str,
    function: str = "EmpiricalFisher",
) -> None:
    """Raise ValueError, or TypeError for the dtype, at the first option out of range."""
    for name, value in (("m", m), ("block_size", block_size)):
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise ValueError(f"{function}: {name}: expected an integer >= 1, got {value!r}")
    if not (isinstance(damping, SupportsFloat) and 0 < float(damping) < math.inf):
        raise ValueError(f"{function}: damping: expected a finite number > 0, got {damping!r}")
    if storage_dtype is not None and storage_dtype not in STORAGE:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in STORAGE)
        raise TypeError(f"{function}: storage_dtype: expected one of {names}, got {storage_dtype}")
    choices = {"divisor": ("window", "mean"), "factor": ("refactor", "update"), "on_nonfinite": ("raise", "skip")}
    for (name, allowed), chosen in zip(choices.items(), (divisor, factor, on_nonfinite), strict=True):
        if chosen not in allowed:
            raise ValueError(f"{function}: {name}: expected {allowed[0]!r} or {allowed[1]!r}, got {chosen!r}")


def check_memory(m: int, dim: int, block: int, dtype: torch.dtype, device: torch.device, limit: int | None) -> None:
    """Raise MemoryError if rows, Gram matrices and their factors exceed `limit`, by default 80 % of free memory."""
    blocks = -(-dim // block)
    needed = m * padded(dim) * dtype.itemsize + 2 * blocks * min(m, block) ** 2 * 8
    if limit is None:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_host_bytes()
        limit = int(0.8 * free)
    if needed > limit:
        raise MemoryError(
            f"EmpiricalFisher: {m} gradients of {dim} elements in {str(dtype).removeprefix('torch.')} need "
            f"{needed / 2**30:.3g} GiB, the limit is {limit / 2**30:.3g} GiB; use storage_dtype=torch.bfloat16, a "
            "smaller m, another block_size B (a block takes 16 min(m, B)^2 bytes more), or raise max_bytes"
        )


def _free_host_bytes() -> float:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * float(line.split()[1])
    except OSError:
        pass
    return math.inf


def check_gradient(g: Any, function: str, argument: str, dtype: torch.dtype | None = None) -> Tensor:
    """Return the values of a real floating-point tensor in `dtype`, or its own, else raise TypeError."""
    values = check_tensor(g, function, argument)
    if torch._C._functorch.is_functorch_wrapped_tensor(values):
        raise TypeError(f"{function}: {argument}: expected a plain tensor, got one of torch.func; call it outside")
    if not values.is_floating_point():
        got = str(values.dtype).removeprefix("torch.")
        raise TypeError(
            f"{function}: {argument}: expected a real floating-point dtype, got {got}; "
            "convert it with .to(torch.float32)"
        )
    return values.detach().to(dtype or values.dtype).resolve_neg()


def check_state(
    state: Any, settings: dict[str, Any], like: dict[str, Tensor | None], shapes: dict[str, tuple[int, ...]]
) -> None:
    """Raise ValueError unless a saved window has these settings, tensors like these, and others of these shapes."""
    function = "EmpiricalFisher.load_state_dict"
    found = state.get("settings") if isinstance(state, Mapping) else None
    if found != settings:
        raise ValueError(
            f"{function}: expected {settings}, got {found}; make an object with the options of the saved one"
        )
    required = {name: tuple(tensor.shape) for name, tensor in like.items() if tensor is not None}
    for name, shape in (required | shapes).items():
        tensor = state.get(name)
        if (tensor is None and name in required) or (tensor is not None and tuple(tensor.shape) != shape):
            got = None if tensor is None else tuple(tensor.shape)
            raise ValueError(f"{function}: {name}: expected shape {shape}, got {got}; the state is damaged")
    if missing := {*like, *shapes, "counters"} - set(state):
        raise ValueError(f"{function}: expected {', '.join(sorted(missing))}, got a state without; it is damaged")
