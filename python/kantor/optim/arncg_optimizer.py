"""Regularised Newton-CG as a torch optimiser over the parameters of a module."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from kantor._checks import check_float, check_same
from kantor.optim._newton_system import Sketch, Solver, norm
from kantor.optim._result import OptimizeStatus
from kantor.optim.arncg import Measure, Move, Solve, State, Try, advance, arncg, options

Closure = Callable[[], Tensor]


class ARNCG(torch.optim.Optimizer):
    """Full-batch second-order training: regularised Newton-CG (Zhou et al., arXiv 2502.04799) as a torch optimiser.

    Every :meth:`step` makes one accepted step of :func:`kantor.optim.minimize`'s method ``arncg`` on the function that
    the closure computes, whichever it is at that moment: data may be resampled between steps. For deterministic
    functions of many parameters, such as physics-informed networks, where L-BFGS stalls.

    Parameters
    ----------
    params : iterable of Parameter or of groups
        Of any shapes, one dtype (float64 recommended, or float32), on devices of one kind. Those that do not require
        gradients are left alone. All groups are one vector; options per group are not supported.
    preset : {"economy", "guarantee", "paper"}
        See :func:`kantor.optim.minimize`.
    preconditioner : "auto", None, "nystrom" or callable
        ``"nystrom"`` sketches the Hessian (60 products every 20 steps); ``"auto"`` begins to where systems are hard, as
        :func:`kantor.optim.minimize` does.
    tol : float
        A step does nothing when the gradient norm is at most this.
    max_cg_iter : int, optional
        Limit of Hessian-vector products in one linear system. Default: twice the number of parameters.
    **changes
        Parameters of the method instead of the preset's: ``theta, policy, fallback, rule, eta, ...``.

    Attributes
    ----------
    status : OptimizeStatus or None
        Why the last step did nothing; None when it made one.
    n_hvp : int
        Hessian-vector products so far.

    Raises
    ------
    ValueError, TypeError
        No parameter requires a gradient; mixed dtypes or kinds of device; options out of range.

    Notes
    -----
    A step costs one evaluation with gradient at the start, the Hessian-vector products of one or a few linear systems
    (a second reverse pass through the same graph each), and one evaluation with gradient for every step length tried.
    Memory: about 8 vectors and the graph of one evaluation.

    Examples
    --------
    >>> import torch
    >>> from kantor.optim import ARNCG
    >>> x, y = torch.linspace(-1, 1, 50, dtype=torch.float64).view(-1, 1), None
    >>> y = torch.sin(3 * x)
    >>> _ = torch.manual_seed(0)
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 10), torch.nn.Tanh(), torch.nn.Linear(10, 1)).double()
    >>> optimizer = ARNCG(net.parameters())
    >>> for _ in range(60):
    ...     loss = optimizer.step(lambda: (net(x) - y).square().mean())
    >>> bool(loss < 1e-4)
    True
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        preset: str = "economy",
        preconditioner: Any = "auto",
        tol: float = 0.0,
        max_cg_iter: int | None = None,
        **changes: Any,
    ) -> None:
        self._options = options(preset, tol=tol, **changes)
        if max_cg_iter is not None and not (isinstance(max_cg_iter, int) and max_cg_iter >= 1):
            raise ValueError(f"ARNCG: max_cg_iter: expected an integer >= 1, got {max_cg_iter!r}")
        self._max_cg_iter = math.inf if max_cg_iter is None else max_cg_iter
        super().__init__(params, {})
        if any(set(group) != {"params"} for group in self.param_groups):
            raise ValueError("ARNCG: options per parameter group are not supported; pass them to ARNCG itself")
        like = self._flat()
        if preconditioner == "auto" and self._options.adaptation != "model":
            preconditioner = None  # the other presets do as published
        self._solver, self._sketch = Solver(like, self._options), Sketch(preconditioner)
        self.status: OptimizeStatus | None = None
        self.n_hvp = 0

    # --- one step ---

    @torch.no_grad()
    def step(self, closure: Closure) -> Tensor:  # type: ignore[override]
        """Make one accepted step and return the loss before it.

        Parameters
        ----------
        closure : callable
            ``closure()`` computes the loss from the parameters, with its graph; it need not call ``backward()``.

        Raises
        ------
        TypeError, ValueError
            The closure returns no scalar tensor.
        RuntimeError
            The loss has no graph, cannot be differentiated twice, or is not finite.
        """
        if closure is None:
            raise TypeError("ARNCG.step: closure: expected a callable that returns the loss, got None")
        loss = self._loss(closure)
        graph = self._gradient(loss, create_graph=True)
        g = graph.detach()
        f, G = loss.item(), norm(g)
        if not (math.isfinite(f) and math.isfinite(G)):
            raise RuntimeError(
                f"ARNCG.step: the loss or its gradient is not finite at the current parameters: {f}, {G}"
            )
        store = self.state[self._parameters()[0]]
        s = State(**store["arncg"]) if "arncg" in store else State(self._options.M0)
        algorithm = arncg(f, G, s, self._options, g.dtype)
        x = self._flat()
        leaves = self._parameters()
        tried: Tensor | None = None
        answer: Any = None
        self.status = None

        def product(v: Tensor) -> Tensor:
            return self._product(graph, leaves, v)

        try:
            while not isinstance(request := advance(algorithm, answer), OptimizeStatus | Move):
                if type(request) is Solve:
                    if tried is not None:  # the graph belongs to x
                        self._write(x)
                    M_inv = self._sketch.at(x, product, request.damping)
                    answer = self._solver.solve(product, g, request, self._max_cg_iter, M_inv)
                    self._sketch.note(self.n_hvp)
                elif type(request) is Try:
                    self._write(torch.add(x, self._solver.d, alpha=request.step))
                    tried = self._loss(closure)
                    answer = tried.item()
                elif type(request) is Measure:
                    assert tried is not None
                    answer = norm(self._gradient(tried, create_graph=False))
        except BaseException:
            self._write(x)
            raise
        if isinstance(request, OptimizeStatus):
            self.status = request
            self._write(x)
        else:
            advance(algorithm, None)  # keeps the books of the step; what it asks for next is left to the next step
            algorithm.close()
        store["arncg"] = asdict(s)
        return loss.detach()

    # --- between parameters and flat vectors ---

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def _flat(self) -> Tensor:
        parameters = self._parameters()
        if not parameters:
            raise ValueError("ARNCG: params: expected at least one parameter that requires a gradient")
        first = parameters[0]
        for number, p in enumerate(parameters):
            check_float(p, "ARNCG", f"params[{number}]")
            if p.device.type != first.device.type or p.dtype != first.dtype:
                check_same("ARNCG", [("params[0]", first), (f"params[{number}]", p)])
        return _joined([p.detach() for p in parameters], parameters)

    def _write(self, x: Tensor) -> None:
        """Set the parameters. Through `.data`: the graph at the start of the step stays valid once x is back."""
        at = 0
        for p in self._parameters():
            p.data.copy_(x[at : at + p.numel()].view_as(p))
            at += p.numel()

    def _loss(self, closure: Closure) -> Tensor:
        with torch.enable_grad():
            loss = closure()
            if not isinstance(loss, Tensor):
                raise TypeError(f"ARNCG.step: closure: expected a scalar tensor, got {type(loss).__name__}")
            if loss.numel() != 1:
                raise ValueError(f"ARNCG.step: closure: expected a scalar tensor, got shape {tuple(loss.shape)}")
            return loss.reshape(())

    def _gradient(self, loss: Tensor, create_graph: bool) -> Tensor:
        parameters = self._parameters()
        if not loss.requires_grad:
            raise RuntimeError(
                "ARNCG.step: closure: the loss has no graph; compute it from the parameters, with gradients on"
            )
        try:
            with torch.enable_grad():
                parts = torch.autograd.grad(loss, parameters, create_graph=create_graph, allow_unused=True)
        except RuntimeError as error:
            if "second time" not in str(error):
                raise
            raise RuntimeError(
                "ARNCG.step: closure: the graph of the loss is gone: return the loss without calling backward() on it"
            ) from error
        with torch.enable_grad():
            return _joined(
                [torch.zeros_like(p) if t is None else t for t, p in zip(parts, parameters, strict=True)], parameters
            )

    def _product(self, graph: Tensor, leaves: list[Tensor], v: Tensor) -> Tensor:
        self.n_hvp += 1
        if not graph.requires_grad:
            return torch.zeros_like(v)
        parts = torch.autograd.grad(graph, leaves, v, retain_graph=True, allow_unused=True)
        return _joined([torch.zeros_like(p) if t is None else t for t, p in zip(parts, leaves, strict=True)], leaves)


def _joined(parts: list[Tensor], parameters: list[Tensor]) -> Tensor:
    """One vector on the device of the first parameter."""
    return torch.cat([part.reshape(-1).to(parameters[0].device) for part in parts])
