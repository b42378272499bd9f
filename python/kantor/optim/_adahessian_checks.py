"""What AdaHessian refuses, and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kantor._checks import is_number
from kantor.optim.hessian_diagonal import block_size

COMMON = (
    "update_period",
    "first_estimates",
    "n_samples",
    "skip_nonfinite",
    "seed",
)  # one step takes all groups at once


def check_group(group: dict[str, Any], first: dict[str, Any] | None = None) -> None:
    """Raise unless the options of a group are in range, and those that cannot differ are those of the first group."""
    for name in ("lr", "eps", "weight_decay"):
        if not (is_number(group[name]) and group[name] >= 0):
            raise ValueError(f"AdaHessian: {name}: expected a number >= 0, got {group[name]!r}")
    betas = group["betas"]
    if not (isinstance(betas, list | tuple) and len(betas) == 2 and all(is_number(b) and 0 <= b < 1 for b in betas)):
        raise ValueError(f"AdaHessian: betas: expected two numbers in [0, 1), got {betas!r}")
    if not (is_number(group["hessian_power"]) and 0 <= group["hessian_power"] <= 1):
        raise ValueError(f"AdaHessian: hessian_power: expected a number in [0, 1], got {group['hessian_power']!r}")
    for name in ("update_period", "first_estimates", "n_samples"):
        if not (isinstance(group[name], int) and group[name] >= 1):
            raise ValueError(f"AdaHessian: {name}: expected an integer >= 1, got {group[name]!r}")
    if group["max_update"] is not None and not (is_number(group["max_update"]) and group["max_update"] > 0):
        raise ValueError(f"AdaHessian: max_update: expected None or a number > 0, got {group['max_update']!r}")
    seed = group["seed"]
    if not (isinstance(seed, int) and 0 <= seed < 2**63):
        raise ValueError(f"AdaHessian: seed: expected an integer in [0, 2^63), got {seed!r}")
    for name in COMMON if first is not None else ():
        if first is not None and group[name] != first[name]:
            raise ValueError(
                f"AdaHessian: {name}: expected {first[name]!r}, as in the first group, got {group[name]!r}; "
                "it is the same for all groups"
            )


def check_parameter(p: Tensor, number: int) -> None:
    """Raise unless a parameter is dense, real and floating-point."""
    if p.layout is not torch.strided:
        raise RuntimeError(f"AdaHessian: params[{number}]: expected a dense parameter, got layout {p.layout}")
    if p.is_complex():
        raise NotImplementedError(
            f"AdaHessian: params[{number}]: complex parameters are not supported; optimise torch.view_as_real of them"
        )
    if not p.is_floating_point():
        raise TypeError(f"AdaHessian: params[{number}]: expected a floating-point dtype, got {p.dtype}")


def check_gradients(gradients: Sequence[Tensor | None]) -> None:
    """Raise at a sparse gradient."""
    for number, g in enumerate(gradients):
        if g is not None and g.layout is not torch.strided:
            raise RuntimeError(
                f"AdaHessian.step: params[{number}]: expected a dense gradient, got layout {g.layout}; "
                "create the embedding with sparse=False"
            )


def check_loss(loss: Any) -> Tensor:
    """Return what a closure gave as a scalar with a graph, or raise."""
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"AdaHessian.step: closure: expected a scalar tensor, got {type(loss).__name__}; return the loss itself"
        )
    if loss.numel() != 1:
        raise ValueError(f"AdaHessian.step: closure: expected a scalar tensor, got shape {tuple(loss.shape)}")
    return loss.reshape(())


def check_probes(probes: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    """Raise unless there is a probe like each parameter."""
    if not isinstance(probes, list | tuple):
        raise TypeError(f"AdaHessian.step: probes: expected a list of tensors, got {type(probes).__name__}")
    if len(probes) != len(parameters):
        raise ValueError(f"AdaHessian.step: probes: expected {len(parameters)} tensors, got {len(probes)}")
    for number, (z, p) in enumerate(zip(probes, parameters, strict=True)):
        if not isinstance(z, Tensor) or z.shape != p.shape or z.dtype != p.dtype or z.device != p.device:
            got = f"{tuple(z.shape)}, {z.dtype} on {z.device}" if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(
                f"AdaHessian.step: probes[{number}]: expected {tuple(p.shape)}, {p.dtype} on {p.device}, got {got}"
            )


def check_state(state: dict[str, Any], p: Tensor, block: Any, number: int) -> None:
    """Raise unless a saved state, or none, fits a parameter."""
    where = f"AdaHessian.load_state_dict: params[{number}]"
    if not state:
        return
    if missing := {"m", "v", "t", "t_h", "age", "idle"} - set(state):
        raise ValueError(f"{where}: expected a state of AdaHessian, got one without {', '.join(sorted(missing))}")
    if state["m"].shape != p.shape:
        raise ValueError(
            f"{where}: expected a state of shape {tuple(p.shape)}, got {tuple(state['m'].shape)}; "
            "give the parameters in the order in which they were when it was saved"
        )
    entries = p.numel() // block_size(p, block, where)
    if state["v"].numel() != entries:
        raise ValueError(f"{where}: expected v with {entries} entries, one a block, got {state['v'].numel()}")
