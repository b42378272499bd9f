"""What the arguments of the transport solvers are checked for, and what they are turned into."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kantor._checks import check_finite, check_float, check_same, check_tensor, is_readable
from kantor._ranks import Ranks, together
from kantor.transport._cost import Cost
from kantor.transport._result import TransportResult

METHODS = ("auto", "newton", "sns", "sinkhorn")
EXACT_REG = 1e-5  # of the range of the cost: where the continuation for reg=0 ends


def check_options(call: str, options: dict[str, Any]) -> None:
    """Check what is no tensor."""
    tol, max_iter, relaxation, density, warm_up = (
        options[name] for name in ("tol", "max_iter", "relaxation", "density", "warm_up")
    )
    for name, allowed in (
        ("method", METHODS),
        ("reg_type", ("entropy", "kl")),
        ("grad", ("implicit", "none")),
        ("interrupt", ("raise", "return")),
    ):
        value = options[name]
        if value not in allowed:
            raise ValueError(f"{call}: {name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
    if not (isinstance(tol, int | float | np.floating) and 0 < tol < math.inf):
        raise ValueError(f"{call}: tol: expected a finite number > 0, got {tol!r}")
    if max_iter is not None and (not isinstance(max_iter, int | np.integer) or max_iter < 0):
        raise ValueError(f"{call}: max_iter: expected an integer >= 0, got {max_iter!r}")
    if relaxation is not None and not (isinstance(relaxation, int | float) and 0 < relaxation < 2):
        raise ValueError(f"{call}: relaxation: expected a number in (0, 2), got {relaxation!r}")
    if density is not None and not (isinstance(density, int | float) and 0 < density <= 1):
        raise ValueError(f"{call}: density: expected a number in (0, 1], got {density!r}")
    if not isinstance(warm_up, int | np.integer) or warm_up < 0:
        raise ValueError(f"{call}: warm_up: expected an integer >= 0, got {warm_up!r}")


def check_method(call: str, method: str, rho: tuple[float, float]) -> None:
    if method == "sns" and not (math.isinf(rho[0]) and math.isinf(rho[1])):
        raise ValueError(
            f"{call}: unbalanced: expected None with method='sns', which is for hard marginals; use 'newton'"
        )


def weights_of(call: str, like: Tensor, w: Any, size: int, name: str) -> Tensor:
    lead = like.shape[:-2] if like.ndim == 3 else ()
    if w is None:
        return torch.full((size,), 1 / size, dtype=like.dtype, device=like.device)
    weights = check_tensor(w, call, name)
    check_float(weights, call, name)
    check_same(call, [("C" if call == "solve" else "X", like), (name, weights)])
    if weights.shape != (size,) and weights.shape != (*lead, size):
        batch = f" or {(*lead, size)}" if lead else ""
        points = "; C is a matrix of costs: for two sets of points call solve_sample" if call == "solve" else ""
        hint = points if weights.ndim == 2 and not batch else ""
        raise ValueError(f"{call}: {name}: expected shape ({size},){batch}, got {tuple(weights.shape)}{hint}")
    return weights


def strengths(call: str, unbalanced: Any) -> tuple[float, float]:
    pair = unbalanced if isinstance(unbalanced, tuple | list) else (unbalanced, unbalanced)
    if len(pair) != 2:
        raise ValueError(f"{call}: unbalanced: expected a number or a pair, got {unbalanced!r}")
    strengths = []
    for rho in pair:
        if rho is None:
            strengths.append(math.inf)
        elif isinstance(rho, int | float | np.floating) and rho > 0:
            strengths.append(float(rho))
        else:
            raise ValueError(f"{call}: unbalanced: expected numbers > 0 or None, got {unbalanced!r}")
    return strengths[0], strengths[1]


def regularisation(call: str, reg: Any) -> Tensor:
    if isinstance(reg, Tensor):
        if reg.numel() != 1 or not reg.dtype.is_floating_point:
            raise ValueError(f"{call}: reg: expected one floating-point number, got {tuple(reg.shape)} {reg.dtype}")
        eps = reg.reshape(()).to(torch.float64)
    elif isinstance(reg, int | float | np.floating | np.integer) and not isinstance(reg, bool):
        eps = torch.tensor(float(reg), dtype=torch.float64)
    else:
        raise TypeError(f"{call}: reg: expected a number, got {type(reg).__name__}")
    if is_readable(eps) and not 0 <= float(eps.detach()) < math.inf:
        raise ValueError(f"{call}: reg: expected a finite number >= 0, got {float(eps.detach())}")
    return eps


def total_of(w: Tensor, ranks: Ranks | None) -> Tensor:
    """Sum of the weights, float64; over ranks where each has some of them."""
    total = w.detach().double().sum(-1)
    return total if ranks is None else torch.tensor(ranks.sum(float(total))[0], dtype=torch.float64)


def check_problem(
    call: str,
    cost: Cost,
    C: Tensor | None,
    a: Tensor,
    b: Tensor,
    rho: tuple[float, float],
    eps: float,
    ranks: Ranks | None = None,
) -> None:
    """Check values. With `ranks`, of which each has some rows, an error on one is an error on all."""
    with together(ranks):
        for name, w in (("a", a), ("b", b)):
            check_finite(w, call, name)
            values = w.detach()
            if bool((values < 0).any()):
                where = (values < 0).nonzero()[0].tolist()
                raise ValueError(
                    f"{call}: {name}: expected weights >= 0, got {values[tuple(where)].item()} at "
                    f"{where[0] if len(where) == 1 else tuple(where)}"
                )
    mass_a, mass_b = total_of(a, ranks), total_of(b, None)
    for name, total in (("a", mass_a), ("b", mass_b)):
        if not bool((total > 0).all()):
            raise ValueError(f"{call}: {name}: expected weights with a positive sum, got zeros")
        if not bool(torch.isfinite(total).all()):
            raise ValueError(f"{call}: {name}: expected weights with a finite sum, got infinity; scale them down")
    low, high, infinite = cost.extent(ranks)
    if math.isnan(low) or low == -math.inf:
        with together(ranks):
            _refuse_cost(call, C, math.isnan(low))
        _refuse_cost(call, None, math.isnan(low))
    if 0 < eps < 1e-14 * (high - low):
        raise ValueError(
            f"{call}: reg: expected 0, or at least 1e-14 of the range of the cost ({high - low:.3g}), below which "
            f"exponents have no digits left; got {eps:.3g}"
        )
    if infinite:
        _check_moves(call, cost, C, a.detach(), b.detach(), ranks)
    if math.isinf(rho[0]) and math.isinf(rho[1]):
        mass_b = mass_b.to(mass_a.device)
        gap = (mass_a - mass_b).abs()
        if bool((gap > 1e-6 * torch.maximum(mass_a, mass_b)).any()):
            k = int(gap.flatten().argmax())
            totals = [float(t.expand_as(gap).flatten()[k]) for t in (mass_a, mass_b)]
            raise ValueError(
                f"{call}: a and b: expected equal masses, got {totals[0]:.9g} and {totals[1]:.9g}; normalise them, or "
                "use unbalanced=rho to let the masses differ"
            )


def _refuse_cost(call: str, C: Tensor | None, is_nan: bool) -> None:
    """Raise, with the place where it is known; rows that are not at fault do not."""
    place = ""
    if C is not None:
        wrong = (torch.isnan(C.detach()) if is_nan else torch.isneginf(C.detach())).nonzero()
        if not len(wrong):
            return
        place = f" at {tuple(wrong[0].tolist())}"
    kind = "NaN" if is_nan else "-inf"
    raise ValueError(f"{call}: C: expected costs that are finite or +inf (a forbidden pair), got {kind}{place}")


def _check_moves(call: str, cost: Cost, C: Tensor | None, a: Tensor, b: Tensor, ranks: Ranks | None) -> None:
    """A row or column with mass must have an allowed pair with mass on the other side."""
    with together(ranks):
        rows, columns = _movable(cost, C, a, b)
    if ranks is not None:
        columns = ranks.all_reduce_(columns.double().to(ranks.device), "max").bool().to(b.device)
    with together(ranks):
        _check_stuck(call, "row", rows, a)
    _check_stuck(call, "column", columns, b)


def _movable(cost: Cost, C: Tensor | None, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if C is not None:
        allowed = torch.isfinite(C.detach()) & (a > 0).unsqueeze(-1) & (b > 0).unsqueeze(-2)
        return allowed.any(-1), allowed.any(-2)
    rows, columns = torch.zeros_like(a, dtype=torch.bool), torch.zeros_like(b, dtype=torch.bool)
    step = cost.tile_rows()
    for first in range(0, a.numel(), step):  # a function's tiles
        with torch.no_grad():
            tile = torch.isfinite(cost.tile(first, min(a.numel(), first + step)))
        rows[first : first + step] = (tile & (b > 0)).any(-1)
        columns |= (tile & (a[first : first + step] > 0).unsqueeze(-1)).any(-2)
    return rows, columns


def _check_stuck(call: str, name: str, can_move: Tensor, weights: Tensor) -> None:
    stuck = ~can_move & (weights > 0)
    if bool(stuck.any()):
        where = stuck.nonzero()[0].tolist()
        batch = f" of problem {where[0]}" if len(where) == 2 else ""
        raise ValueError(
            f"{call}: C: {name} {where[-1]}{batch} has mass but no allowed move: all its costs are +inf, so no "
            "plan exists; allow a pair, or set its weight to zero"
        )


def exact_reg(call: str, C: Tensor, rho: tuple[float, float]) -> Tensor:
    if C.ndim == 3:
        raise ValueError(f"{call}: reg: 0 needs its own last reg for each problem; pass a list of matrices, list(C)")
    if not (math.isinf(rho[0]) and math.isinf(rho[1])):
        raise ValueError(f"{call}: reg: expected a positive number with unbalanced marginals, got 0")
    low, high, _ = Cost.dense(C.detach()).extent()
    return torch.tensor(EXACT_REG * (high - low) or 1.0, dtype=torch.float64)


def start_of(call: str, x0: Any, lead: Sequence[int], n: int, m: int) -> Tensor | None:
    if x0 is None:
        return None
    potentials = x0.potentials if isinstance(x0, TransportResult) else x0
    if not (isinstance(potentials, tuple | list) and len(potentials) == 2 and isinstance(potentials[1], Tensor)):
        raise TypeError(f"{call}: x0: expected a TransportResult or a pair of potentials, got {type(x0).__name__}")
    g = potentials[1].detach()
    if potentials[0].shape != (*lead, n) or g.shape != (*lead, m):
        raise ValueError(
            f"{call}: x0: expected potentials of shapes {(*lead, n)} and {(*lead, m)}, got "
            f"{tuple(potentials[0].shape)} and {tuple(g.shape)}"
        )
    return g.to(torch.float64)
