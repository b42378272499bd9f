"""How long an explicit diffusion step may be.

One step is ``x <- (I - step L) x`` with ``L = D - W``. Two conditions, from weak to strong:

* energy: for symmetric W the energy ``tr(x' L x)`` never grows if and only if ``step lambda_max(L) <= 2``;
* maximum principle: every new value is a convex combination of old ones if and only if
  ``step max_i (D_ii - W_ii) <= 1``. It implies the first, since ``lambda_max <= 2 max_i (D_ii - W_ii)`` (Gershgorin).

Without symmetry eigenvalues say little about powers of ``I - step L``; there the maximum principle is the condition.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal, NoReturn

import torch
from torch import Tensor

from kantor._checks import is_readable
from kantor._errors import StabilityError
from kantor.graph._arguments import Similarity, check_choice, check_similarity, check_step
from kantor.graph.graph import Graph

MODES = ("error", "warn", "ignore")
Mode = Literal["error", "warn", "ignore"]


@dataclass(frozen=True, repr=False)
class StabilityReport:
    """Whether an explicit diffusion step is safe on a graph. Prints as a small table.

    Attributes
    ----------
    step : float
        The step asked about.
    symmetric : bool
        Whether the weights are.
    lambda_max : float
        Largest eigenvalue of ``D - W``, from below and within 1 %; of a batch the largest. NaN without symmetry.
    max_rate : float
        ``max_i (D_ii - W_ii)``.
    energy_stable : bool
        ``step * lambda_max <= 2``: the energy ``tr(x' L x)`` of no x grows, to the accuracy of lambda_max. False
        without symmetry.
    max_principle : bool
        ``step * max_rate <= 1``: values stay between the smallest and the largest, positive ones positive.
    largest_step : float
        That is stable: ``2 / lambda_max``, rounded down; without symmetry, that keeps the maximum principle.
    largest_positive_step : float
        That keeps the maximum principle.
    """

    step: float
    symmetric: bool
    lambda_max: float
    max_rate: float
    energy_stable: bool
    max_principle: bool
    largest_step: float
    largest_positive_step: float

    @property
    def stable(self) -> bool:
        """Whether repeated steps stay bounded: the condition that :func:`diffuse` checks."""
        return self.energy_stable or self.max_principle

    def __repr__(self) -> str:
        rows = [
            ("symmetric weights", "yes" if self.symmetric else "no"),
            ("lambda_max", f"{self.lambda_max:.4g}"),
            ("step * lambda_max", f"{self.step * self.lambda_max:.4g} (stable up to 2)"),
            ("step * max(D - W_ii)", f"{self.step * self.max_rate:.4g} (maximum principle up to 1)"),
            ("stable", "yes" if self.stable else "no"),
            ("maximum principle", "yes" if self.max_principle else "no"),
            ("largest stable step", f"{self.largest_step:.4g}"),
            ("largest positive step", f"{self.largest_positive_step:.4g}"),
        ]
        if not self.symmetric:
            del rows[1:3]
        width = max(len(name) for name, _ in rows)
        return "\n".join([f"explicit diffusion with step {self.step:.4g}", *(f"  {n:<{width}}  {v}" for n, v in rows)])


def stability(graph: Similarity, step: float | Tensor) -> StabilityReport:
    """Tell whether explicit diffusion steps of this length are stable on a graph, and which are.

    Parameters
    ----------
    graph : Graph or Tensor
        A graph, or dense weights ``(n, n)`` or ``(B, n, n)``.
    step : float or Tensor
        A number >= 0.

    Returns
    -------
    StabilityReport

    Raises
    ------
    TypeError
        graph is neither, step no number.
    ValueError
        Weights that are not square, negative or not finite; a step that is negative or not finite.

    Notes
    -----
    Costs some 20 products with the graph the first time; its largest eigenvalue is kept with it. Deterministic.

    Source: Wang, Dou, Bao and Shi, *Diffusion Mechanism in Residual Neural Network: Theory and Applications*, IEEE
    TPAMI 46(2), 2024, whose step must satisfy the conditions at the head of this module.

    Examples
    --------
    >>> import torch
    >>> from kantor.graph import stability
    >>> path = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    >>> report = stability(path, step=0.6)
    >>> report.energy_stable, report.max_principle
    (True, False)
    """
    check_similarity("stability", graph)
    return _report(graph, float(check_step("stability", step)))


def check_stability(call: str, graph: Similarity, step: float | Tensor, mode: str, x: Tensor) -> None:
    """Raise or warn when explicit steps would grow; nothing where values cannot be looked at.

    A graph is looked at once; after that the check costs a comparison.
    """
    check_choice(call, mode, "stability", MODES)
    weight = graph.weight if isinstance(graph, Graph) else graph
    steps = [step] if isinstance(step, Tensor) else []
    if mode == "ignore" or not weight.numel() or not all(map(is_readable, (x, weight, *steps))):
        return
    value = float(step.detach() if isinstance(step, Tensor) else step)
    limits = _limits_of(graph)
    if value * limits.max_rate > 1 + limits.rounding:
        enforce(call, _report(graph, value), mode, depth=4)


def enforce(call: str, report: StabilityReport, mode: str, depth: int) -> None:
    """Raise or warn unless the step is stable."""
    if report.stable or mode == "ignore":
        return
    message = f"{call}: step: {_complaint(report)}"
    if mode == "error":
        raise StabilityError(message)
    warnings.warn(message, RuntimeWarning, stacklevel=depth)


def check_positivity(call: str, graph: Similarity, step: float | Tensor, x: Tensor) -> None:
    """Raise when explicit steps may turn positive values negative."""
    weight = graph.weight if isinstance(graph, Graph) else graph
    if not weight.numel() or not all(map(is_readable, (x, weight, *([step] if isinstance(step, Tensor) else [])))):
        return
    value = float(step.detach() if isinstance(step, Tensor) else step)
    limits = _limits_of(graph)
    if value * limits.max_rate > 1 + limits.rounding:
        raise StabilityError(
            f"{call}: step: expected at most {_positive_step(limits):.4g}, where positivity is guaranteed, "
            f"got {value:.4g}: step * max(D - W_ii) = {value * limits.max_rate:.4g} > 1; take a smaller step with more "
            "num_steps, or positivity='row', 'implicit' or 'clamp'"
        )


def _complaint(report: StabilityReport) -> str:
    step, instead = report.step, "take a smaller step with more num_steps, "
    if report.symmetric:
        instead += "diffuse implicitly, "
        why = f"lambda_max(D - W) = {report.lambda_max:.4g}, step * lambda_max = {step * report.lambda_max:.4g} > 2"
    else:
        why = f"the weights are not symmetric and step * max(D - W_ii) = {step * report.max_rate:.4g} > 1"
    return (
        f"expected at most {report.largest_step:.4g}, the largest safe step on this graph, got {step:.4g}: {why}, so "
        f"that values may grow without bound; {instead}or pass stability='warn' or 'ignore'"
    )


def round_down(value: float) -> float:
    """Round down to four digits."""
    if not 0 < value < math.inf:
        return value
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return math.floor(value / unit) * unit


@dataclass(frozen=True)
class Limits:
    """What a graph has to say about steps, short of its largest eigenvalue."""

    symmetric: bool
    max_rate: float
    rounding: float


def _look_at(graph: Similarity) -> Limits:
    with torch.no_grad():
        if isinstance(graph, Graph):
            rate, symmetric = graph.degree - graph.diagonal, graph.symmetric
        else:
            rate = graph.sum(-1) - graph.diagonal(dim1=-2, dim2=-1)
            symmetric = _is_symmetric(graph.detach())
        return Limits(symmetric, float(rate.max()), 16 * torch.finfo(graph.dtype).eps)


def lambda_max(graph: Similarity) -> float:
    """Largest eigenvalue of ``D - W`` for symmetric W, from below and within 1 %; of a batch the largest."""
    if isinstance(graph, Graph):
        return float(graph.lambda_max())
    with torch.no_grad():
        laplacian = torch.diag_embed(graph.sum(-1)) - graph.detach()
        return float(torch.linalg.eigvalsh(laplacian)[..., -1].max())


def require_symmetric(call: str, graph: Similarity, what: str) -> None:
    """Raise unless the weights are symmetric; nothing where values cannot be looked at."""
    weight = graph.weight if isinstance(graph, Graph) else graph
    if weight.numel() and is_readable(weight) and not _limits_of(graph).symmetric:
        refuse_asymmetric(call, what)


def refuse_asymmetric(call: str, what: str) -> NoReturn:
    """Say that weights should be symmetric."""
    raise ValueError(
        f"{call}: graph: expected symmetric weights for {what}, got W != W.T; symmetrise them as (W + W.T) / 2, "
        "or diffuse by explicit steps"
    )


def _is_symmetric(weights: Tensor) -> bool:
    tolerance = 1e3 * torch.finfo(weights.dtype).eps * float(weights.abs().max())
    return bool(((weights - weights.mT).abs() <= tolerance).all())


def _limits_of(graph: Similarity) -> Limits:
    """Limits of a graph, which keeps them as long as its weights are not being trained."""
    if isinstance(graph, Graph):
        return graph._once(graph._of_weight, "step_limits", lambda: _look_at(graph))
    return _look_at(graph)


def _positive_step(limits: Limits) -> float:
    return round_down((1 + limits.rounding) / limits.max_rate) if limits.max_rate > 0 else math.inf


def _report(graph: Similarity, step: float) -> StabilityReport:
    weight = graph.weight if isinstance(graph, Graph) else graph
    if not weight.numel():
        return StabilityReport(step, True, 0.0, 0.0, True, True, math.inf, math.inf)
    limits = _limits_of(graph)
    top = lambda_max(graph) if limits.symmetric else math.nan
    return report_of(step, limits, top, graph.lambda_max_bound() if isinstance(graph, Graph) else math.inf)


def report_of(step: float, limits: Limits, top: float, bound: float) -> StabilityReport:
    """The report for weights whose largest eigenvalue is `top`, NaN without symmetry, and certainly below `bound`."""
    rate, slack = limits.max_rate, 1 + limits.rounding
    positive = _positive_step(limits)
    largest = positive
    if limits.symmetric:
        # The eigenvalue is known within 1 % from below: rounded down by as much, the step is safe. So is the bound.
        above = min(1.01 * top, bound)
        largest = max(positive, round_down(2 / above)) if above > 0 else math.inf
    return StabilityReport(
        step=step,
        symmetric=limits.symmetric,
        lambda_max=top,
        max_rate=rate,
        energy_stable=limits.symmetric and step * top <= 2 * slack,
        max_principle=step * rate <= slack,
        largest_step=largest,
        largest_positive_step=positive,
    )


__all__ = [
    "StabilityReport",
    "check_positivity",
    "check_stability",
    "lambda_max",
    "require_symmetric",
    "round_down",
    "stability",
]
