"""Many independent problems at once: one algorithm each, their vector work done together.

Every problem runs its own :func:`kantor.optim.arncg.arncg`. All problems that want to try a step share one evaluation
of the batch, until each of them asks for a linear system; these are one batched capped CG. Problems that wait or have
ended stand still.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kantor.optim._newton_system import Solver, row_norms
from kantor.optim._objective import Objective, Point
from kantor.optim._recorder import Callback, Interrupted, Limits, Recorder
from kantor.optim._result import OptimizeResult, OptimizeStatus
from kantor.optim.arncg import Measure, Move, Options, Request, Solve, State, Try, advance, arncg


def drive_batch(
    objective: Objective,
    o: Options,
    limits: Limits,
    *,
    states: list[State] | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    interrupt: Literal["raise", "return"] = "raise",
) -> OptimizeResult:
    """Minimise every problem of a batched objective; beside the tensors O(B) Python work a round, some 10 us each."""
    recorder = Recorder(objective, "arncg", o.tol, limits, callback, ("M", "omega"))
    batch = _Batch(objective, o, Solver(objective.start, o), states)
    n_iter = 0
    ended: OptimizeStatus | None = None
    try:
        with recorder.watching(progress, interrupt):
            recorder.record(batch.X, batch.f, batch.G, *batch.parameters())
            while batch.waiting_for(Solve):
                recorder.check_limits(n_iter)
                n_iter += 1
                recorder.n_points += batch.linearise()
                batch.solve(limits.max_hvp - objective.n_hvp)
                recorder.check_limits(-1)  # a system may have been cut short by the limit of products
                while batch.waiting_for(Try):
                    batch.try_steps()
                recorder.record(batch.X, batch.f, batch.G, *batch.parameters())
    except Interrupted as over:
        ended = over.status
    statuses = [ended or OptimizeStatus.CONVERGED if status is None else status for status in batch.statuses]
    return recorder.result(
        batch.X,
        batch.f,
        batch.g,
        batch.G,
        next((status for status in statuses if status is not OptimizeStatus.CONVERGED), OptimizeStatus.CONVERGED),
        n_iter,
        {"resume": [asdict(s) for s in batch.states], "batched": True},
        M=torch.tensor([s.M for s in batch.states], dtype=torch.float64),
        per_problem_status=statuses,
        per_problem_iterations=batch.moves,
    )


class _Batch:
    """The vectors of a batch, and the request that each problem waits with."""

    def __init__(self, objective: Objective, o: Options, solver: Solver, states: list[State] | None) -> None:
        count = objective.problems
        self.objective, self.solver = objective, solver
        self.X = objective.start
        # The last evaluation that covers the whole batch as it stands; its graph serves the Hessian products.
        self.point: Point | None = objective.evaluate(self.X)
        self.f = self.point.f.double().cpu()
        self.g = objective.gradient(self.point)
        self.G = row_norms(self.g)
        for what, values in (("value of fun", self.f), ("gradient norm", self.G)):
            if not bool(torch.isfinite(values).all()):
                k = int((~torch.isfinite(values)).nonzero()[0])
                raise ValueError(
                    f"{objective.name}: expected a finite {what} at x0, got {values[k].item()} in problem {k}"
                )
        self.states = [State(o.M0) for _ in range(count)] if states is None else states
        self.statuses: list[OptimizeStatus | None] = [None] * count
        self.moves = np.zeros(count, np.int64)
        self._hessian: Any = None
        starts = zip(self.f.tolist(), self.G.tolist(), self.states, strict=True)
        self._algorithms = [arncg(f, G, s, o, objective.dtype) for f, G, s in starts]
        self._requests: list[Request | None] = [None] * count
        for k in range(count):
            self._advance(k, None)

    def waiting_for(self, kind: type) -> list[int]:
        """The problems that wait with such a request."""
        return [k for k, request in enumerate(self._requests) if type(request) is kind]

    def parameters(self) -> tuple[Any, Any]:
        """M and omega of every problem, for the history."""
        return np.array([s.M for s in self.states]), np.array([s.omega for s in self.states])

    def linearise(self) -> bool:
        """Have Hessian products ready at the current points; whether these are new."""
        if self._hessian is not None:
            return False
        if self.point is None:  # the points stem from different evaluations
            self.point = self.objective.evaluate(self.X)
            self.g = self.objective.gradient(self.point)
        self._hessian = self.objective.hessian(self.point)
        return True

    def solve(self, budget: float) -> None:
        """One batched system for all that ask; the others are left out by a zero right-hand side."""
        asking = self.waiting_for(Solve)
        requests = [request if isinstance(request, Solve) else None for request in self._requests]
        directions = self.solver.solve_batch(self._hessian, self.g, requests, budget)
        for k in asking:
            self._advance(k, directions[k])

    def try_steps(self) -> None:
        """One evaluation for all that ask; then gradients where the values are good enough, and moves."""
        trying = self.waiting_for(Try)
        steps = torch.zeros(len(self._requests), dtype=torch.float64)
        for k in trying:
            steps[k] = self._requests[k].step  # type: ignore[union-attr]
        stepped = self.X + steps.to(self.X).unsqueeze(-1) * self.solver.d
        tried = self.objective.evaluate(torch.where(self._mask(trying), stepped, self.X))
        f = tried.f.double().cpu()
        for k in trying:
            self._advance(k, f[k].item())
        measuring = self.waiting_for(Measure)
        if not measuring:
            return
        g = self.objective.gradient(tried)
        G = row_norms(g)
        for k in measuring:
            self._advance(k, G[k].item())
        moving = self.waiting_for(Move)
        if not moving:
            return
        mask = self._mask(moving)
        self.X, self.g = torch.where(mask, tried.x, self.X), torch.where(mask, g, self.g)
        row = mask.squeeze(-1).cpu()
        self.f, self.G = torch.where(row, f, self.f), torch.where(row, G, self.G)
        self.moves[moving] += 1
        self.point = tried if len(moving) == len(trying) else None
        self._hessian = None
        for k in moving:
            self._advance(k, None)

    def _advance(self, k: int, answer: Any) -> None:
        request = advance(self._algorithms[k], answer)
        if isinstance(request, OptimizeStatus):
            self._requests[k], self.statuses[k] = None, request
        else:
            self._requests[k] = request

    def _mask(self, rows: list[int]) -> Tensor:
        mask = torch.zeros(len(self._requests), 1, dtype=torch.bool)
        mask[rows] = True
        return mask.to(self.X.device)
