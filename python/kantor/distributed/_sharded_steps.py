"""Explicit diffusion steps on the nodes of one rank, with the others' rows exchanged between steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kantor._ops import backend
from kantor.distributed._halo import Halo
from kantor.graph import Graph
from kantor.graph._native import dropout_mask, propagate


@dataclass(frozen=True)
class ShardedSteps:
    """``x <- D m_k x + E m_k x + teleport x_0``, num_steps times, as in ``kantor.graph._recurrence``.

    `graph` has this rank's nodes, then the ghosts with empty rows; E is `edge` on its pattern, D `diagonal`.
    """

    graph: Graph
    halo: Halo
    edge: Tensor
    diagonal: Tensor
    num_steps: int
    teleport: float
    dropout: float
    seed: int
    first_row: int

    def __call__(self, x: Tensor) -> Tensor:
        """x after the steps, (num_nodes, d); differentiable."""
        if torch.is_grad_enabled() and (self.edge.requires_grad or self.diagonal.requires_grad):
            return self._tracked(x)
        result: Tensor = _Steps.apply(x, self, False)  # type: ignore[no-untyped-call]
        return result

    def mask(self, k: int, x: Tensor) -> Tensor:
        """The factors of dropout: of these rows among all."""
        return dropout_mask(x.detach(), k, self.dropout, self.seed, self.first_row)

    def _tracked(self, x: Tensor) -> Tensor:
        """Out of operators that have derivatives for everything; keeps all states."""
        y, graph = x, self.graph
        for k in range(self.num_steps):
            z = y * self.mask(k, y) if self.dropout else y
            both = torch.cat([z, self.halo.ghosts(z, 0)])
            y = propagate(graph.rowptr, graph.col, self.edge, self.diagonal, both, 1, transposed=graph.transposed)[
                : x.shape[0]
            ]
            y = y + self.teleport * x if self.teleport else y
        return y

    def ahead(self, x: Tensor) -> Tensor:
        """The steps. Two buffers of own rows and ghosts take turns; traffic of a step: those of one process."""
        rows, graph = x.shape[0], self.graph
        state, after = x.new_empty(graph.num_nodes, x.shape[1]), x.new_empty(graph.num_nodes, x.shape[1])
        state[:rows] = x
        for k in range(self.num_steps):
            if self.dropout:
                state[:rows] *= self.mask(k, x)
            state[rows:] = self.halo.start(state[:rows], 0)()
            _step(graph.rowptr, graph.col, self.edge, self.diagonal, state, after)
            if self.teleport:
                after[:rows].add_(x, alpha=self.teleport)
            state, after = after, state
        return state[:rows]

    def back(self, g: Tensor) -> Tensor:
        """Their adjoint: what a step gives to ghosts goes home to the ranks that own them."""
        rows, graph = g.shape[0], self.graph
        t_rowptr, t_col, permutation = graph.transposed
        edge = self.edge.index_select(0, permutation)
        state, after = g.new_zeros(graph.num_nodes, g.shape[1]), g.new_empty(graph.num_nodes, g.shape[1])
        state[:rows] = g
        total = torch.zeros_like(g) if self.teleport else None
        for k in reversed(range(self.num_steps)):
            if total is not None:
                total.add_(state[:rows], alpha=self.teleport)
            _step(t_rowptr, t_col, edge, self.diagonal, state, after)
            after[:rows] += self.halo.give_back(after[rows:], 0)
            after[rows:] = 0
            if self.dropout:
                after[:rows] *= self.mask(k, g)
            state, after = after, state
        return state[:rows] if total is None else state[:rows] + total


def _step(rowptr: Tensor, col: Tensor, edge: Tensor, diagonal: Tensor, x: Tensor, y: Tensor) -> None:
    native, options, threads = backend(), (1, 0.0, 0.0, 0, False), torch.get_num_threads()
    size = native.propagate_workspace(rowptr, col, edge, diagonal, x, options, threads)
    native.propagate(rowptr, col, edge, diagonal, x, y, x.new_empty(size), options, threads)


class _Steps(torch.autograd.Function):
    """Linear in x, and so its own derivative."""

    @staticmethod
    def forward(x: Tensor, steps: ShardedSteps, adjoint: bool) -> Tensor:
        x = x.contiguous()
        return steps.back(x) if adjoint else steps.ahead(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ShardedSteps, bool], output: Tensor) -> None:
        _, ctx.steps, ctx.adjoint = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Steps.apply(grad, ctx.steps, not ctx.adjoint), None, None  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        result: Tensor = _Steps.apply(tangent, ctx.steps, ctx.adjoint)  # type: ignore[no-untyped-call]
        return result
