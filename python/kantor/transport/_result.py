"""What transport solvers return: potentials, and whatever is asked of the plan they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kantor._checks import check_tensor, host_array
from kantor._errors import ConvergenceError
from kantor._ops import backend
from kantor._ranks import Ranks
from kantor._result import Status
from kantor.transport._cost import Cost, is_tracked
from kantor.transport._native import plan_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DENSE_LIMIT = 1 << 29  # entries of a plan that may be formed


class TransportStatus(Status):
    """How a transport solve ended: ``str(status)`` is the plain word, ``status.advice`` what it means, what to try."""

    CONVERGED = (
        "converged",
        "The marginals meet the tolerance.",
    )
    MAX_ITER = (
        "max_iter",
        "The iteration limit was reached before the tolerance: raise max_iter or tol, or use method='newton'. To go on "
        "from here pass x0=result.",
    )
    STALLED = (
        "stalled",
        "The marginal error stopped falling above the tolerance. If it is small, it has reached the rounding level: "
        "reg is so small that exponents (f + g - C) / reg are no longer exact; raise reg or tol. If it is large, the "
        "problem is next to infeasible: look at forbidden pairs and at the range of the weights.",
    )
    INFEASIBLE = (
        "infeasible",
        "No plan has these marginals: the forbidden pairs (infinite costs) leave some mass nowhere to go. The dual "
        "value exceeds the cost of every plan, which proves it. Allow more pairs, or use unbalanced=rho.",
    )
    OVERFLOW = (
        "overflow",
        "The iteration produced NaN or infinity: the potentials left the range of float64. Scale the cost and reg by "
        "a common factor, and look at the range of the weights.",
    )
    INTERRUPTED = (
        "interrupted",
        "Interrupted by Ctrl-C: the potentials are the last ones. To go on pass x0=result.",
    )
    STOPPED = (
        "stopped",
        "Stopped by the callback: the potentials are the last ones.",
    )
    UNCHECKED = (
        "unchecked",
        "The solve ran inside torch.compile, export or vmap, where its numbers cannot be looked at: only potentials, "
        "plan and value are known.",
    )


@dataclass(frozen=True, repr=False, eq=False)
class TransportResult:
    """Result of an entropic transport problem.

    For a batch of B problems tensors have a leading dimension B, the scalars describe the worst problem and
    ``per_problem_*`` all of them.

    Attributes
    ----------
    potentials : tuple of Tensor
        f (n,) and g (m,), float64: the plan is ``exp((f_i + g_j - C_ij) / reg)``. -inf where a weight is zero. With
        hard marginals ``a.f = b.g``; with ``reg_type="kl"`` the potentials of the reference measure a x b are
        ``f - reg log a`` and ``g - reg log b``. Where the plan falls into parts that less mass than the tolerance
        joins, the difference of the potentials between parts, and derivatives through it, are not determined by the
        marginals; plan and value are.
    value : Tensor
        Optimal value of the problem, entropy included; float64, differentiable.
    marginal_error : float
        ``|P1 - a|_1 + |P'1 - b|_1`` relative to the mass (with penalised marginals: of the optimality conditions).
    status : TransportStatus
        How it ended.
    n_iter : int
        Steps: of Newton's method and of Sinkhorn's iteration.
    n_newton : int
        Newton steps among them.
    n_sweeps : int
        Passes over the n x m entries of the cost.
    method : str
        What was used.
    reason : str
        Why, where the method was chosen by ``method="auto"``.
    reg : float
        Regularisation of the plan; for ``reg=0`` the last one of the continuation.
    history : dict of ndarray
        ``marginal_error``, ``seconds``, ``reg``, ``kind`` ("sinkhorn" or "newton"), one entry a step.
    seconds : float
        Wall-clock time.
    lower_bound, duality_gap : float
        With ``reg=0``: the value of a feasible point of the dual of the unregularised problem, and what the cost of the
        rounded plan exceeds it by. NaN otherwise.
    statistics : dict
        Counters of the solver: linear solves, iterations of CG, factorisations, largest sparse plan, events of
        negative curvature (0 unless rounding interferes).
    ranks : Ranks or None
        Of a problem whose rows are spread over processes: f, the plan and its products are of this one's rows, g, the
        value and ``P' V`` of all. `value_linear` and ``apply(V, transpose=True)`` are then to be called by all ranks.
    """

    potentials: tuple[Tensor, Tensor]
    value: Tensor
    marginal_error: float
    status: TransportStatus
    n_iter: int
    n_newton: int
    n_sweeps: int
    method: str
    reason: str
    reg: float
    tol: float
    history: dict[str, np.ndarray[Any, Any]]
    seconds: float
    cost: Cost | list[Cost]
    weights: tuple[Tensor, Tensor]
    eps: Tensor
    lower_bound: float = math.nan
    duality_gap: float = math.nan
    statistics: dict[str, int] = field(default_factory=dict)
    rounded: Tensor | None = None
    per_problem_status: list[TransportStatus] = field(default_factory=list)
    per_problem_error: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(0))
    ranks: Ranks | None = None

    # --- how it went ---

    @property
    def converged(self) -> bool:
        """True when every problem met its tolerance."""
        return self.status is TransportStatus.CONVERGED

    @property
    def message(self) -> str:
        """What happened and what to try."""
        failed = sum(status is not TransportStatus.CONVERGED for status in self.per_problem_status)
        count = len(self.per_problem_status)
        prefix = f"{failed} of {count} problems failed; the first: " if failed and count > 1 else ""
        return f"{prefix}{self.status.value}: {self.status.advice}"

    def check(self) -> TransportResult:
        """Return self if converged, else raise :class:`kantor.ConvergenceError` carrying this result."""
        if not self.converged:
            raise ConvergenceError(f"{self.method}: {self.message}", self)
        return self

    @property
    def state(self) -> dict[str, Any]:
        """Keyword arguments of a warm start: ``solve(C, reg=reg, **result.state)``."""
        return {"x0": self}

    # --- the plan ---

    @property
    def shape(self) -> tuple[int, int]:
        """(n, m)."""
        return self.potentials[0].shape[-1], self.potentials[1].shape[-1]

    def _dense_cost(self) -> Tensor:
        n, m = self.shape
        if isinstance(self.cost, list):
            return torch.stack([cost.tile(0, n) for cost in self.cost])
        if n * m > _DENSE_LIMIT and self.cost.matrix is None:
            raise ValueError(
                f"plan: a dense plan of {n} x {m} entries would need {n * m * 8 / 2**30:.1f} GiB; use plan_sparse(), "
                "apply() or barycentric_map(), which do not form it"
            )
        if n == 0:  # of a rank without rows
            return torch.zeros(0, m, dtype=self.cost.dtype, device=self.cost.device)
        step = self.cost.tile_rows()
        return torch.cat([self.cost.tile(first, min(n, first + step)) for first in range(0, n, step)])

    @property
    def plan(self) -> Tensor:
        """The plan P (n, m), formed on first use, in the dtype of the cost; differentiable. With ``reg=0`` rounded."""
        return self._once("_plan", self._form_plan)

    def _once(self, name: str, form: Callable[[], Tensor]) -> Tensor:
        """Keep what is formed, but not while tracing."""
        if torch.compiler.is_compiling():
            return form()
        kept_before = self.__dict__.get(name)
        # What was formed without derivatives is formed again where they are wanted.
        if kept_before is None or (self._tracked() and not kept_before.requires_grad):
            object.__setattr__(self, name, form())
        kept: Tensor = self.__dict__[name]
        return kept

    def _form_plan(self) -> Tensor:
        if self.rounded is not None:
            return self.rounded.to_dense().to(self._dtype)
        return plan_of(self._dense_cost(), *self.potentials, self.eps).to(self._dtype)

    @property
    def value_linear(self) -> Tensor:
        """``<P, C>``, float64; differentiable where the plan is."""
        return self._once("_value_linear", self._form_value_linear)

    def _form_value_linear(self) -> Tensor:
        if self.rounded is not None and not isinstance(self.cost, list):
            coo = self.rounded.to_sparse_coo()
            rows, columns = coo.indices()
            exact: Tensor = (coo.values() * self._pair_costs(rows, columns)).sum()
            return exact
        if isinstance(self.cost, list) or self._tracked():
            C = self._dense_cost().to(torch.float64)
            P = plan_of(C, *self.potentials, self.eps)
            return (P * torch.where(P > 0, C, 0.0)).sum((-2, -1))
        f, g = self._host_potentials()
        linear, _ = backend().transport_values(tuple(self.cost.encode()), self.reg, f, g, torch.get_num_threads())
        if self.ranks is not None:
            (linear,) = self.ranks.sum(linear)
        return torch.tensor(linear, dtype=torch.float64)

    def _pair_costs(self, rows: Tensor, columns: Tensor) -> Tensor:
        assert isinstance(self.cost, Cost)
        cost = self.cost
        if cost.matrix is not None:
            return cost.matrix[rows, columns].to(torch.float64)
        assert cost.x is not None
        assert cost.y is not None
        x, y = cost.x[rows].to(torch.float64), cost.y[columns].to(torch.float64)
        if cost.function is not None:
            return torch.stack([cost.function(p[None], q[None])[0, 0].double() for p, q in zip(x, y, strict=True)])
        pairs = [Cost(cost.kind, x=p[None], y=q[None], p=cost.p).tile(0, 1)[0, 0] for p, q in zip(x, y, strict=True)]
        return torch.stack(pairs) if pairs else x.new_zeros(0)

    @property
    def _dtype(self) -> torch.dtype:
        return self.cost[0].dtype if isinstance(self.cost, list) else self.cost.dtype

    def _tracked(self) -> bool:
        tensors = [*self.potentials, self.eps]
        if isinstance(self.cost, Cost):
            tensors += [t for t in (self.cost.matrix, self.cost.x, self.cost.y) if t is not None]
        return is_tracked(*tensors)

    def _host_potentials(self) -> tuple[Tensor, Tensor]:
        f, g = self.potentials
        return f.detach().cpu().contiguous(), g.detach().cpu().contiguous()

    def _single(self, function: str) -> Cost:
        if isinstance(self.cost, list):
            raise ValueError(f"{function}: expected the result of one problem, got a batch; use result.plan")
        return self.cost

    def plan_sparse(self, threshold: float | None = None, *, limit: int | None = None) -> Tensor:
        """The entries of the plan above `threshold`, as a torch sparse CSR matrix (n, m), float64, on the CPU.

        Parameters
        ----------
        threshold : float, optional
            Default: what can leave out no more than a millionth of the mass, ``1e-6 mass / (n m)``, over ranks in all.
        limit : int, optional
            Raise ValueError beyond this many entries; default 2^28.
        """
        if self.rounded is not None:
            return self.rounded
        cost = self._single("plan_sparse")
        n, m = self.shape
        if threshold is None:
            threshold = 1e-6 * float(self.weights[1].sum()) / (max(n, 1) * m * (self.ranks.size if self.ranks else 1))
        if not threshold >= 0:
            raise ValueError(f"plan_sparse: threshold: expected a number >= 0, got {threshold!r}")
        found = backend().transport_extract(
            tuple(cost.encode()), self.reg, *self._host_potentials(), threshold, limit or 1 << 28,
            torch.get_num_threads(),
        )  # fmt: skip
        if found is None:
            raise ValueError(
                f"plan_sparse: more than {limit or 1 << 28} entries exceed the threshold {threshold:.1e}; raise it, "
                "or use apply(), which forms no plan"
            )
        return sparse_csr(found, (n, m))

    def to_scipy(self, threshold: float | None = None, *, limit: int | None = None) -> Any:
        """:meth:`plan_sparse` as a ``scipy.sparse.csr_array`` (needs scipy, extra ``cli``)."""
        from scipy.sparse import csr_array

        plan = self.plan_sparse(threshold, limit=limit)
        parts = plan.values(), plan.col_indices(), plan.crow_indices()
        return csr_array(tuple(host_array(part) for part in parts), shape=self.shape)

    def apply(self, V: Tensor, *, transpose: bool = False) -> Tensor:
        """``P V``, or ``P' V`` with `transpose`, without forming P; (n,) or (n, k) from (m,) or (m, k).

        Differentiable with respect to V, and to the problem where the plan is (then it is formed).
        """
        rows, others = (self.shape[0], self.shape[1]) if transpose else (self.shape[1], self.shape[0])
        check_tensor(V, "apply", "V")
        fits = V.ndim in (1, 2) and V.shape[0] == rows
        if isinstance(self.cost, list):  # a batch of V, or one for all
            fits = fits or (V.ndim == 3 and V.shape[-2] == rows)
        if not fits:
            raise ValueError(f"apply: V: expected shape ({rows},) or ({rows}, k), got {tuple(V.shape)}")
        if isinstance(self.cost, list) or self.rounded is not None or self._tracked():
            P = self.plan if self.rounded is None else self.rounded.to(V.dtype)
            return (P.mT if transpose else P) @ V
        result: Tensor = _Apply.apply(V, self, transpose)  # type: ignore[no-untyped-call]
        assert result.shape[0] == others
        return result

    def barycentric_map(self, Y: Tensor | None = None) -> Tensor:
        """Where each row's mass goes on average, ``(P Y)_i / (P1)_i``: (n, d) for Y (m, d).

        Y defaults to the target points of `solve_sample`. NaN for rows without mass.
        """
        if Y is None:
            cost = self._single("barycentric_map")
            if cost.y is None:
                raise ValueError("barycentric_map: Y: expected the target points, since the cost is a matrix")
            Y = cost.y
        ones = torch.ones(self.shape[1], dtype=Y.dtype, device=Y.device)
        if isinstance(self.cost, list):
            return self.apply(Y) / self.apply(ones).unsqueeze(-1)
        flat = Y.unsqueeze(-1) if Y.ndim == 1 else Y
        product = self.apply(torch.cat([flat, ones.unsqueeze(-1)], -1))
        mapped = product[:, :-1] / product[:, -1:]
        return mapped[:, 0] if Y.ndim == 1 else mapped

    def plot(self, ax: Axes | None = None) -> Axes:
        """Plot the marginal error against time (needs matplotlib, extra ``cli``)."""
        from kantor.plotting import plot_transport

        return plot_transport(self.history, ax=ax, label=self.method, tolerance=self.tol)

    def __repr__(self) -> str:
        n, m = self.shape
        count = len(self.per_problem_status)
        value = self.value.detach()
        shown = (
            f"{float(value):.12g}" if value.numel() == 1 else f"{float(value.min()):.6g} to {float(value.max()):.6g}"
        )
        rows = [
            ("status", self.status.value),
            ("problem", f"{n:,} x {m:,}" + (f" x {count} problems" if count > 1 else "")),
            ("reg", f"{self.reg:.3g}"),
            ("value", shown),
            ("marginal error", f"{self.marginal_error:.3e}"),
            ("steps", f"{self.n_iter:,}, {self.n_newton:,} of Newton's method"),
            ("sweeps", f"{self.n_sweeps:,}"),
            ("seconds", f"{self.seconds:.3g}"),
        ]
        if self.rounded is not None:
            rows.insert(4, ("cost of the plan", f"{float(self.value_linear):.12g}"))
            rows.insert(5, ("duality gap", f"{self.duality_gap:.3e}"))
        if self.reason:
            rows.append(("chosen", self.reason))
        width = max(len(name) for name, _ in rows)
        lines = [f"transport by {self.method}"]
        lines += [f"  {name:<{width}}  {text}" for name, text in rows]
        if not self.converged:
            lines.append(f"  {self.status.advice}")
        return "\n".join(lines)


class _Apply(torch.autograd.Function):
    """P V of a plan that is not formed; the adjoint is P' of the gradient."""

    @staticmethod
    def forward(ctx: Any, V: Tensor, result: TransportResult, transpose: bool) -> Tensor:
        ctx.result, ctx.transpose = result, transpose
        n, m = result.shape
        cost = result.cost
        assert isinstance(cost, Cost)
        source = V.detach().to("cpu", torch.float64)
        matrix = source.reshape(source.shape[0], math.prod(source.shape[1:])).contiguous()
        out = torch.empty(m if transpose else n, matrix.shape[1], dtype=torch.float64)
        f, g = result._host_potentials()
        backend().transport_apply(
            tuple(cost.encode()), result.reg, f, g, matrix, out, transpose, torch.get_num_threads()
        )
        if transpose and result.ranks is not None:
            out = result.ranks.all_reduce_(out.to(result.ranks.device))
        return out.reshape(-1, *V.shape[1:]).to(V.device, V.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.result.ranks is not None:
            raise ValueError("apply: over ranks there are no derivatives; detach V, or solve in one process")
        return _Apply.apply(grad, ctx.result, not ctx.transpose), None, None  # type: ignore[no-untyped-call]


def sparse_csr(found: tuple[Any, Any, Any], shape: tuple[int, int]) -> Tensor:
    """A torch CSR matrix from the arrays of the native code."""
    crow, col, values = (torch.from_numpy(array) for array in found)
    return torch.sparse_csr_tensor(crow, col.long(), values, shape, check_invariants=False)


__all__ = ["TransportResult", "TransportStatus"]
