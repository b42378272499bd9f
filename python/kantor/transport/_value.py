"""The optimal value as a torch operator: its first derivatives are the plan and the potentials (envelope theorem).

With P optimal the value, ``min <P, C> + eps H(P) + penalties of the marginals``, changes with each argument as that
expression does for P fixed; a hard marginal adds its multiplier. The rules are written in the potentials, so that
second derivatives come from differentiating these.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kantor._ops import Context, declare
from kantor.transport._native import plan_of


def _dot(w: Tensor, potential: Tensor) -> Tensor:
    return torch.where(w > 0, w * torch.where(w > 0, potential, 0.0), 0.0).sum(-1)


def dual_value(
    a: Tensor, b: Tensor, eps: Tensor | float, f: Tensor, g: Tensor, r: Tensor, c: Tensor,
    rho_a: float, rho_b: float, relative: bool,
) -> Tensor:  # fmt: skip
    """Value of the dual, from potentials and marginals r, c of the plan; exact to second order in their error."""
    hard_a, hard_b = math.isinf(rho_a), math.isinf(rho_b)
    value = _dot(a, f) if hard_a else -rho_a * (r.sum(-1) - a.sum(-1))
    value = value + (_dot(b, g) if hard_b else -rho_b * (c.sum(-1) - b.sum(-1)))
    if relative:
        if hard_a:
            value = value - eps * torch.special.xlogy(a, a).sum(-1)
        if hard_b:
            value = value - eps * torch.special.xlogy(b, b).sum(-1)
        value = value + eps * a.sum(-1) * b.sum(-1)
    if relative or not (hard_a and hard_b):
        value = value - eps * r.sum(-1)
    return value


def weight_gradient(
    w: Tensor, other_mass: Tensor, eps: Tensor | float, potential: Tensor, marginal: Tensor, rho: float, relative: bool
) -> Tensor:
    """Derivative of the value with respect to one weight vector; 0 where it is -inf, at weights of zero."""
    positive = w > 0
    safe = torch.where(positive, w, 1.0)
    extra = eps * (other_mass.unsqueeze(-1) - 1) if relative else 0.0
    if math.isinf(rho):
        own = torch.where(positive, potential, 0.0) - (eps * torch.log(safe) if relative else 0.0)
        return torch.where(positive, own + extra, 0.0)
    ratio = torch.where(positive, marginal / safe, 1.0)
    return rho * (1 - ratio) + (eps * (other_mass.unsqueeze(-1) - ratio) if relative else 0.0)


def _forward(
    C: Tensor, a: Tensor, b: Tensor, eps: Tensor, f: Tensor, g: Tensor, rho_a: float, rho_b: float, relative: bool
) -> Tensor:
    a, b = a.to(torch.float64), b.to(torch.float64)
    if math.isinf(rho_a) and math.isinf(rho_b):
        r, c = a, b
    else:
        P = plan_of(C, f, g, eps)
        r, c = P.sum(-1), P.sum(-2)
    return dual_value(a, b, eps, f, g, r, c, rho_a, rho_b, relative).clone()


def _backward(ctx: Context, grad: Tensor) -> tuple[Any, ...]:
    C, a, b, eps, f, g, rho_a, rho_b, relative = ctx.inputs
    a64, b64 = a.to(torch.float64), b.to(torch.float64)
    P = plan_of(C, f, g, eps)
    r, c = P.sum(-1), P.sum(-2)
    up = grad.unsqueeze(-1)
    grad_a = up * weight_gradient(a64, b64.sum(-1), eps, f, r, rho_a, relative)
    grad_b = up * weight_gradient(b64, a64.sum(-1), eps, g, c, rho_b, relative)
    return (
        (up.unsqueeze(-1) * P).to(C.dtype),
        grad_a.sum_to_size(a.shape).to(a.dtype),
        grad_b.sum_to_size(b.shape).to(b.dtype),
        (grad * _eps_gradient(C, a64, b64, eps, f, g, P, r, c, rho_a, rho_b, relative)).sum().to(eps.dtype),
        *[None] * 5,
    )


def _eps_gradient(
    C: Tensor, a: Tensor, b: Tensor, eps: Tensor, f: Tensor, g: Tensor, P: Tensor, r: Tensor, c: Tensor,
    rho_a: float, rho_b: float, relative: bool,
) -> Tensor:  # fmt: skip
    z = torch.where(P > 0, (f.unsqueeze(-1) + g.unsqueeze(-2) - C) / eps, 0.0)
    entropy = (P * z).sum((-2, -1))
    if relative:
        entropy = entropy - torch.special.xlogy(r, torch.where(a > 0, a, 1.0)).sum(-1)
        entropy = entropy - torch.special.xlogy(c, torch.where(b > 0, b, 1.0)).sum(-1) + a.sum(-1) * b.sum(-1)
    if relative or not (math.isinf(rho_a) and math.isinf(rho_b)):
        entropy = entropy - r.sum(-1)
    return entropy


def _jvp(ctx: Context, dC: Any, da: Any, db: Any, d_eps: Any, *_: Any) -> Tensor:
    C, a, b, eps, f, g, rho_a, rho_b, relative = ctx.inputs
    a64, b64 = a.to(torch.float64), b.to(torch.float64)
    P = plan_of(C, f, g, eps)
    r, c = P.sum(-1), P.sum(-2)
    result = torch.zeros_like(r.sum(-1))
    if dC is not None:
        result = result + torch.where(P > 0, P * dC, 0.0).sum((-2, -1))
    if da is not None:
        result = result + (da * weight_gradient(a64, b64.sum(-1), eps, f, r, rho_a, relative)).sum(-1)
    if db is not None:
        result = result + (db * weight_gradient(b64, a64.sum(-1), eps, g, c, rho_b, relative)).sum(-1)
    if d_eps is not None:
        result = result + d_eps * _eps_gradient(C, a64, b64, eps, f, g, P, r, c, rho_a, rho_b, relative)
    return result


transport_value = declare(
    "transport_value(Tensor C, Tensor a, Tensor b, Tensor eps, Tensor f, Tensor g, float rho_a, float rho_b, "
    "bool relative) -> Tensor",
    forward=_forward,
    fake=lambda C, *_: C.new_empty(C.shape[:-2], dtype=torch.float64),
    backward=_backward,
    jvp=_jvp,
)
