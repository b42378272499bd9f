"""A transport problem whose rows are spread over ranks.

Every rank has some rows of the cost (or of the points X) and of a, and all columns: b, Y and the potential g. The
algorithms are those of one process (csrc/transport/row_ranks.h): what they sum over rows they sum over ranks.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kantor._checks import host_array
from kantor._ops import backend
from kantor._ranks import Ranks
from kantor.transport._arguments import (
    check_options,
    check_problem,
    regularisation,
    start_of,
    strengths,
    total_of,
    weights_of,
)
from kantor.transport._cost import Cost, is_tracked
from kantor.transport._native import nothing_yet
from kantor.transport._result import TransportResult
from kantor.transport._value import dual_value

Start = Callable[[Cost, Tensor, Tensor, float, tuple[float, float], dict[str, Any], Ranks], Tensor | None]


def solve_rows(
    call: str, read: Callable[[], Cost], a: Any, b: Any, x0: Any, callback: Any, progress: bool,
    options: dict[str, Any], ranks: Ranks, coarse_start: Start | None = None,
) -> TransportResult:  # fmt: skip
    """Solve one problem; `read` checks and returns this rank's rows of the cost."""
    from kantor.transport.solve import _make_result, _warned, run_points  # which calls this function

    started = time.perf_counter()
    with ranks.together():
        check_options(call, options)
        eps_given, rho = regularisation(call, options["reg"]), strengths(call, options["unbalanced"])
        _check_ability(call, options, float(eps_given.detach()))
        cost = read()
        n, m = cost.shape
        like = cost.matrix if cost.matrix is not None else cost.x
        assert like is not None
        a = None if a is None else weights_of(call, like, a, n, "a")
        b = weights_of(call, like, b, m, "b")
        if options["grad"] != "none" and is_tracked(like, b, eps_given, *(t for t in (a, cost.y) if t is not None)):
            raise ValueError(
                f"{call}: ranks: expected tensors without gradients: over ranks there are no derivatives; detach them, "
                "pass grad='none', or solve in one process"
            )
        cost, b, eps = cost.detach(), b.detach(), float(eps_given.detach())
        start = start_of(call, x0, (), n, m)
    _check_agreement(call, ranks, cost, b, options, start)
    rows, starts = (int(count) for count in ranks.sum(n, start is not None))
    if rows == 0:
        raise ValueError(f"{call}: {'C' if call == 'solve' else 'X'}: expected a row on one of the ranks, got none")
    if starts not in (0, ranks.size):
        raise ValueError(f"{call}: x0: expected a start on all ranks or on none, got {starts} of {ranks.size}")
    a = torch.full((n,), 1 / rows, dtype=b.dtype, device=b.device) if a is None else a.detach()
    check_problem(call, cost, cost.matrix, a, b, rho, eps, ranks)
    chosen = "newton" if options["method"] == "auto" else options["method"]
    show = progress and ranks.rank == 0
    try:
        if coarse_start is not None and chosen == "newton" and start is None:
            start = coarse_start(cost, a, b, eps, rho, options, ranks)
        f, g, info, history = run_points(
            call, cost, a, b, eps, rho, chosen, start, options, callback, show, ranks, rows
        )
    except KeyboardInterrupt:  # before there is anything to return
        if options["interrupt"] == "raise":
            raise
        f, g, info, history = nothing_yet(cost)
    value = _value(cost, a, b, eps, f, g, rho, options["reg_type"] == "kl", ranks)
    result = _make_result(
        cost, (a, b), f, g, value, eps_given.detach(), info, history, options["method"], chosen, options["tol"], False
    )
    return _warned(replace(result, ranks=ranks, seconds=time.perf_counter() - started), call, depth=4)


def _check_ability(call: str, options: dict[str, Any], eps: float) -> None:
    if eps == 0:
        raise ValueError(
            f"{call}: reg: expected a positive number with ranks, got 0: the certificate of the unregularised problem "
            "needs the plan in one process"
        )
    if options["method"] == "sns":
        raise ValueError(f"{call}: method: expected 'auto', 'newton' or 'sinkhorn' with ranks, got 'sns'; use 'newton'")


def _check_agreement(
    call: str, ranks: Ranks, cost: Cost, b: Tensor, options: dict[str, Any], start: Tensor | None
) -> None:
    """Raise, on all ranks, unless what all should have is the same on all: else they would part and wait for ever."""

    def mark(*values: object) -> int:
        code = 0
        for value in values:
            plain = host_array(value).tobytes() if isinstance(value, Tensor) else repr(value).encode()
            code = zlib.crc32(plain, code)
        return code

    marks = {
        "number of columns": cost.shape[1],
        "dtype and device": mark(str(cost.dtype), cost.device.type),
        "b": mark(b),
        "Y": 0 if cost.y is None else mark(tuple(cost.y.shape), cost.y),
        "cost": mark(cost.kind, cost.p),
        "start": mark(start),
        "options": mark(*(float(v) if isinstance(v, Tensor) else v for v in options.values())),
    }
    largest = ranks.max(*marks.values(), *(-value for value in marks.values()))
    count = len(marks)
    for name, most, minus_least in zip(marks, largest[:count], largest[count:], strict=True):
        if most != -minus_least:
            raise ValueError(
                f"{call}: {name}: expected the same on all ranks, got different ones; only rows are spread over ranks"
            )


def _value(
    cost: Cost, a: Tensor, b: Tensor, eps: float, f: Tensor, g: Tensor, rho: tuple[float, float], relative: bool,
    ranks: Ranks,
) -> Tensor:  # fmt: skip
    """Value of the dual: the part of the rows, summed over ranks, and that of the columns."""
    a64, b64, f, g = (t.cpu().double() for t in (a, b, f, g))
    r, c = a64, b64
    if not (math.isinf(rho[0]) and math.isinf(rho[1])):
        r, c = marginals(cost, eps, f, g, ranks)
    none = a64.new_zeros(0)
    (of_rows,) = ranks.sum(float(dual_value(a64, none, eps, f, none, r, none, *rho, relative)))
    value = of_rows + dual_value(none, b64, eps, none, g, none, c, *rho, relative)
    if relative:
        value = value + eps * total_of(a64, ranks) * b64.sum()
    return value.to(cost.device)


def marginals(cost: Cost, eps: float, f: Tensor, g: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Row sums of the plan, this rank's, and column sums, over all."""
    r, c = torch.empty_like(f), torch.zeros_like(g)
    with ranks.together():
        if cost.shape[0]:
            backend().transport_sums(tuple(cost.encode()), eps, f, g, r, c, torch.get_num_threads())
    return r, ranks.all_reduce_(c.to(ranks.device)).cpu()


__all__ = ["solve_rows"]
