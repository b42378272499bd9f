"""Loading the state of an optimiser: torch's, but checked first, and without rounding it to the parameters' dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Group = dict[str, Any]
State = dict[str, Any]


def load_exactly(
    optimizer: torch.optim.Optimizer,
    load: Callable[[dict[str, Any]], None],
    state_dict: dict[str, Any],
    check: Callable[[list[Group], list[State]], None],
    dtype: Callable[[Tensor, str], torch.dtype],
) -> None:
    """Call torch's ``load`` of the optimiser.

    ``check(groups, states)`` raises where the saved groups, or the states of all parameters in order, do not fit, when
    nothing has changed yet. ``dtype(parameter, name)`` is that of a tensor of the state. Both are called in hooks, and
    so see what other hooks made of the dictionary, and others what was done here.
    """
    name = f"{type(optimizer).__name__}.load_state_dict"
    saved: list[State] = []

    def before(_: torch.optim.Optimizer, given: dict[str, Any]) -> None:
        groups = given.get("param_groups")
        if not isinstance(groups, list) or not isinstance(given.get("state"), dict):
            raise ValueError(
                f"{name}: state_dict: expected 'state' and 'param_groups', as the optimiser's state_dict() returns, "
                f"got {', '.join(map(repr, list(given)[:4])) or 'nothing'}"
            )
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in optimizer.param_groups]:
            return  # torch says what is wrong
        for group in groups:
            if missing := set(optimizer.defaults) - set(group):
                raise ValueError(
                    f"{name}: state_dict: expected that of a {type(optimizer).__name__}, got a group without "
                    + ", ".join(sorted(missing))
                )
        saved.extend(given["state"].get(i, {}) for group in groups for i in group["params"])
        check(groups, saved)

    def after(_: torch.optim.Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for p, values in zip(parameters, saved, strict=True):
            for key, value in values.items():
                if isinstance(value, Tensor):
                    exact = value.detach().to(p.device, dtype(p, key), copy=True).contiguous()
                    optimizer.state[p][key] = exact

    hooks = (
        optimizer.register_load_state_dict_pre_hook(before),
        optimizer.register_load_state_dict_post_hook(after, prepend=True),
    )
    try:
        load(state_dict)
    finally:
        for hook in hooks:
            hook.remove()
