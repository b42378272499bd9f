"""What ``kantor transport`` tells about a solve: figures for JSON, a table, and what to try where it failed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kantor._command_line import finite, print_rows, scientific
from kantor._transport_problem import Problem
from kantor.transport import TransportResult, TransportStatus

SUMMARY_ENTRIES = 20_000_000  # of a plan that is formed only to be summed up


def describe(
    problem: Problem,
    result: TransportResult,
    plan: Tensor | None,
    cost: str,
    power: float,
    span: float,
    *,
    balanced: bool,
) -> dict[str, Any]:
    """Return what the table and the JSON output tell."""
    n, m = problem.shape
    linear = float(result.value_linear)
    return {
        "kind": problem.kind,
        "note": problem.note,
        "rows": n,
        "columns": m,
        "dimension": None if problem.X is None else problem.X.shape[1],
        "cost": "matrix" if problem.kind == "matrix" else cost,
        "p": power if problem.kind != "matrix" and cost == "lp" else None,
        "cost_range": finite(span),
        "reg": result.reg,
        "relative_reg": finite(result.reg / span) if span > 0 else None,
        "threads": torch.get_num_threads(),
        "status": result.status.value,
        "converged": result.converged,
        "message": result.message,
        "value": finite(float(result.value)),
        "linear_value": finite(linear),
        "wasserstein": _distance(cost, power, linear) if balanced and problem.kind != "matrix" else None,
        "lower_bound": finite(result.lower_bound),
        "duality_gap": finite(result.duality_gap),
        "marginal_error": finite(result.marginal_error),
        "plan": _plan_summary(problem, plan),
        "method": result.method,
        "reason": result.reason.removeprefix(f"{result.method}: "),
        "steps": result.n_iter,
        "newton_steps": result.n_newton,
        "sweeps": result.n_sweeps,
        "seconds": result.seconds,
    }


def _distance(cost: str, power: float, linear: float) -> dict[str, Any] | None:
    """Order and value of the Wasserstein distance that the cost of the plan stands for."""
    order = {"sqeuclidean": 2.0, "euclidean": 1.0, "l1": 1.0, "lp": max(power, 1.0)}.get(cost)
    if order is None or not np.isfinite(linear):
        return None
    return {"order": order, "value": max(linear, 0.0) ** (1 / order)}


def _plan_summary(problem: Problem, plan: Tensor | None) -> dict[str, Any] | None:
    """Mass, entries, entropy and largest entry; positions are those of the files."""
    if plan is None:
        return None
    mass = plan.values()
    summary: dict[str, Any] = {"nonzeros": mass.numel(), "mass": float(mass.sum())}
    summary["entropy"] = -float(torch.special.xlogy(mass, mass).sum())
    if mass.numel() and problem.kind != "colour":  # a pixel that was drawn has no place that says anything
        k = int(mass.argmax())
        row = int(torch.searchsorted(plan.crow_indices(), k, right=True)) - 1
        column = int(plan.col_indices()[k])
        at = [row if problem.rows is None else int(problem.rows[row])]
        at.append(column if problem.columns is None else int(problem.columns[column]))
        summary |= {"largest": float(mass[k]), "largest_at": at}
    return summary


def print_outcome(outcome: dict[str, Any]) -> None:
    """Print the outcome as a table."""
    size = f"{outcome['rows']:,} x {outcome['columns']:,}"
    if outcome["dimension"] is not None:
        size += f" points in {outcome['dimension']} dimension{'s' if outcome['dimension'] != 1 else ''}"
    share = outcome["relative_reg"]
    rows: dict[str, Any] = {
        name.replace("_", " "): outcome[name] for name in ("A", "B", "cost_matrix", "a", "b") if outcome[name]
    }
    rows |= {
        "problem": size + (f"; {outcome['note']}" if outcome["note"] else ""),
        "cost": outcome["cost"] + ("" if outcome["p"] is None else f", p = {outcome['p']:g}"),
        "reg": f"{outcome['reg']:.4g}" + ("" if share is None else f" ({share:.1e} of the range of the cost)"),
        "status": outcome["status"].replace("_", " "),
        "value": _number(outcome["value"]),
        "<P, C>": _number(outcome["linear_value"]),
    }
    if outcome["wasserstein"] is not None:
        rows[f"W_{outcome['wasserstein']['order']:g}"] = _number(outcome["wasserstein"]["value"])
    if outcome["duality_gap"] is not None:
        rows["duality gap"] = scientific(outcome["duality_gap"])
    rows["marginal error"] = scientific(outcome["marginal_error"])
    plan = outcome["plan"]
    if plan is None:
        rows["plan"] = f"not formed: more than {SUMMARY_ENTRIES:,} entries, or none"
    else:
        rows["plan"] = f"{plan['nonzeros']:,} entries, entropy {plan['entropy']:.6g}"
        if "largest" in plan:
            rows["plan"] += f", largest {plan['largest']:.3e} at ({plan['largest_at'][0]:,}, {plan['largest_at'][1]:,})"
    rows |= {
        "method": outcome["method"] + (f" ({outcome['reason']})" if outcome["reason"] else ""),
        "steps": f"{outcome['steps']:,}, {outcome['newton_steps']:,} of Newton's method; {outcome['sweeps']:,} sweep"
        + "s" * (outcome["sweeps"] != 1),
        "seconds": f"{outcome['seconds']:.3f} (reading {outcome['seconds_read']:.3f})",
    }
    if outcome["processes"] > 1:
        rows["processes"] = outcome["processes"]
    print_rows(rows | {name: outcome[name] for name in ("output", "map", "plot") if outcome[name] is not None})


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.10g}"


def advice(result: TransportResult) -> str:
    """Return what happened and what to try, in the words of the command line."""
    if result.status is TransportStatus.MAX_ITER:
        other = "" if result.method == "newton" else ", or use --method newton"
        return f"The iteration limit was reached before the tolerance: raise --max-iter or --tol{other}."
    if result.status is TransportStatus.STALLED:
        return (
            f"The marginal error stopped falling at {result.marginal_error:.1e}: raise --reg or --tol, and look at the "
            "range of the weights."
        )
    if result.status is TransportStatus.INFEASIBLE:
        return (
            "No plan has these marginals: forbidden pairs (infinite costs) leave some mass nowhere to go. Allow more "
            "pairs, or use --unbalanced."
        )
    return result.message
