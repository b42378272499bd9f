"""The torch operators of ``kantor.graph``: product, edge_dot, propagate and its derivatives, dropout_mask.

A sparse n x n matrix travels as its pattern, ``rowptr`` (n + 1) and ``col`` (nnz), int32, and its values (nnz). Two
bilinear forms give every derivative: with

* product ``y = W x``: gradients ``W' g`` and ``edge_dot(g, x)``;
* edge_dot ``w_ij = <a_i, b_j>``: gradients ``V b`` and ``V' a``, V being the gradient on the pattern.

propagate is the recurrence of csrc/graph/propagate.h, or its adjoint: linear in x, so that its derivative for x is
itself with the flag turned. For edge and diagonal there is a native operator, of O(n sqrt(K)) memory a column tile;
where that derivative is itself differentiated (second derivatives, torch.func, forward mode), a loop over products
takes its place, which every rule of torch goes through, and which keeps all K states: O(K n d) memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kantor._ops import Context, backend, declare
from kantor.graph._neighbours import knn
from kantor.linalg._native import csr_transpose

__all__ = ["dropout_mask", "edge_dot", "knn", "product", "propagate", "rows_of"]

Triple = tuple[Tensor, Tensor, Tensor]


def rows_of(rowptr: Tensor) -> Tensor:
    """Row of each entry, ``(nnz,)`` int64."""
    return torch.repeat_interleave(torch.arange(rowptr.numel() - 1, device=rowptr.device), rowptr.diff())


class _Pattern(NamedTuple):
    """A pattern and that of its transpose; entry e of the transpose is entry ``permutation[e]`` of the matrix."""

    rowptr: Tensor
    col: Tensor
    t_rowptr: Tensor
    t_col: Tensor
    permutation: Tensor

    @property
    def transposed(self) -> _Pattern:
        order = torch.arange(self.permutation.numel(), dtype=self.permutation.dtype, device=self.permutation.device)
        inverse = torch.empty_like(order).scatter(0, self.permutation.long(), order)
        return _Pattern(self.t_rowptr, self.t_col, self.rowptr, self.col, inverse)

    def transpose(self, values: Tensor) -> Tensor:
        """Values in the order of the transpose."""
        return values.index_select(0, self.permutation)


def _pattern(rowptr: Tensor, col: Tensor, *transposed: Tensor | None) -> _Pattern:
    """The pattern with its transpose, which is made where it was not given."""
    if transposed[0] is None:
        return _Pattern(rowptr, col, *csr_transpose(rowptr, col, rowptr.numel() - 1))
    return _Pattern(rowptr, col, *transposed)  # type: ignore[arg-type]


def _sum(*parts: Tensor | None) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return sum(present[1:], present[0]) if present else None


_NO_GRADIENTS = (None,) * 5  # of the pattern


# --- product ----------------------------------------------------------------------------------------------------------


def _product_forward(rowptr: Tensor, col: Tensor, *rest: Any) -> Tensor:
    weight, x = rest[3:]
    y: Tensor = torch.empty_like(x)
    backend().product(rowptr, col, weight, x, y, torch.get_num_threads())
    return y


def _product_backward(ctx: Context, grad: Tensor) -> tuple[Any, ...]:
    *parts, weight, x = ctx.inputs
    grad_weight = _edge_dot(*parts, grad, x) if ctx.needs[5] else None
    grad_x = None
    if ctx.needs[6]:
        pattern = _pattern(*parts)
        grad_x = _product(*pattern.transposed, pattern.transpose(weight), grad)
    return *_NO_GRADIENTS, grad_weight, grad_x


def _product_jvp(ctx: Context, *tangents: Tensor | None) -> Tensor | None:
    *parts, weight, x = ctx.inputs
    d_weight, d_x = tangents[5:]
    return _sum(
        None if d_weight is None else _product(*parts, d_weight, x),
        None if d_x is None else _product(*parts, weight, d_x),
    )


_PATTERN = "Tensor rowptr, Tensor col, Tensor? t_rowptr, Tensor? t_col, Tensor? t_permutation"

_product = declare(
    f"graph_product({_PATTERN}, Tensor weight, Tensor x) -> Tensor",
    forward=_product_forward,
    fake=lambda *args: args[-1].new_empty(args[-1].shape),
    backward=_product_backward,
    jvp=_product_jvp,
)


# --- edge_dot ---------------------------------------------------------------------------------------------------------


def _edge_dot_forward(rowptr: Tensor, col: Tensor, *rest: Any) -> Tensor:
    a, b = rest[3:]
    out: Tensor = a.new_empty(col.shape)
    backend().edge_dot(rowptr, col, a, b, out, torch.get_num_threads())
    return out


def _edge_dot_backward(ctx: Context, grad: Tensor) -> tuple[Any, ...]:
    *parts, a, b = ctx.inputs
    grad_a = _product(*parts, grad, b) if ctx.needs[5] else None
    grad_b = None
    if ctx.needs[6]:
        pattern = _pattern(*parts)
        grad_b = _product(*pattern.transposed, pattern.transpose(grad), a)
    return *_NO_GRADIENTS, grad_a, grad_b


def _edge_dot_jvp(ctx: Context, *tangents: Tensor | None) -> Tensor | None:
    *parts, a, b = ctx.inputs
    d_a, d_b = tangents[5:]
    return _sum(
        None if d_a is None else _edge_dot(*parts, d_a, b),
        None if d_b is None else _edge_dot(*parts, a, d_b),
    )


_edge_dot = declare(
    f"graph_edge_dot({_PATTERN}, Tensor a, Tensor b) -> Tensor",
    forward=_edge_dot_forward,
    fake=lambda rowptr, col, *rest: rest[-1].new_empty(col.shape),
    backward=_edge_dot_backward,
    jvp=_edge_dot_jvp,
)


# --- dropout_mask -----------------------------------------------------------------------------------------------------


def _mask_forward(like: Tensor, step: int, dropout: float, seed: int, first_row: int) -> Tensor:
    mask = torch.empty_like(like)
    backend().dropout_mask(mask, step, dropout, seed, first_row, torch.get_num_threads())
    return mask


_dropout_mask = declare(
    "graph_dropout_mask(Tensor like, int step, float dropout, int seed, int first_row) -> Tensor",
    forward=_mask_forward,
    fake=lambda like, *_: like.new_empty(like.shape),
    backward=lambda ctx, grad: (None,) * 5,
    jvp=lambda ctx, *tangents: None,
)


# --- propagate --------------------------------------------------------------------------------------------------------


def _propagate_forward(
    rowptr: Tensor, col: Tensor, t_rowptr: Tensor | None, t_col: Tensor | None, t_permutation: Tensor | None,
    edge: Tensor, diagonal: Tensor, x: Tensor,
    num_steps: int, teleport: float, dropout: float, seed: int, adjoint: bool,
) -> Tensor:  # fmt: skip
    if adjoint:
        pattern = _pattern(rowptr, col, t_rowptr, t_col, t_permutation)
        rowptr, col, edge = pattern.t_rowptr, pattern.t_col, pattern.transpose(edge)
    native, options, threads = backend(), (num_steps, teleport, dropout, seed, adjoint), torch.get_num_threads()
    size = native.propagate_workspace(rowptr, col, edge, diagonal, x, options, threads)
    y = torch.empty_like(x)
    native.propagate(rowptr, col, edge, diagonal, x, y, x.new_empty(size), options, threads)
    return y


def _gradients_forward(
    rowptr: Tensor, col: Tensor, t_rowptr: Tensor, t_col: Tensor, t_permutation: Tensor,
    edge: Tensor, diagonal: Tensor, x: Tensor, g: Tensor, num_steps: int, teleport: float, dropout: float, seed: int,
) -> Triple:  # fmt: skip
    native, options, threads = backend(), (num_steps, teleport, dropout, seed, False), torch.get_num_threads()
    transpose = (t_rowptr, t_col, edge.index_select(0, t_permutation))
    size = native.propagate_gradients_workspace(rowptr, col, edge, diagonal, x, options, threads)
    results = (torch.empty_like(edge), torch.empty_like(diagonal), torch.empty_like(x))
    native.propagate_gradients(
        rowptr, col, edge, diagonal, transpose, x, g, results, x.new_empty(size), options, threads
    )
    return results


_propagate_gradients = declare(
    "graph_propagate_gradients(Tensor rowptr, Tensor col, Tensor t_rowptr, Tensor t_col, Tensor t_permutation, "
    "Tensor edge, Tensor diagonal, Tensor x, Tensor g, int num_steps, float teleport, float dropout, int seed)"
    " -> (Tensor edge_gradient, Tensor diagonal_gradient, Tensor x_gradient)",
    forward=_gradients_forward,
    fake=lambda *args: tuple(tensor.new_empty(tensor.shape) for tensor in args[5:8]),
)


class _Steps:
    """The recurrence step by step, out of operators that have derivatives of any order."""

    def __init__(self, pattern: _Pattern, like: Tensor, options: tuple[int, float, float, int]) -> None:
        self.pattern, self.turned = pattern, pattern.transposed
        self.steps, self.teleport, self.dropout, self.seed = options
        self._like = like.detach()

    def mask(self, k: int, x: Tensor) -> Tensor:
        """``m_k x``."""
        return x * dropout_mask(self._like, k, self.dropout, self.seed) if self.dropout > 0 else x

    def plus(self, y: Tensor, start: Tensor) -> Tensor:
        """``y + a start``."""
        return y + self.teleport * start if self.teleport else y

    def ahead(self, edge: Tensor, diagonal: Tensor, z: Tensor) -> Tensor:
        """``D z + E z``."""
        y: Tensor = diagonal.unsqueeze(-1) * z + _product(*self.pattern, edge, z)
        return y

    def back(self, edge: Tensor, diagonal: Tensor, g: Tensor) -> Tensor:
        """``D g + E' g``."""
        y: Tensor = diagonal.unsqueeze(-1) * g + _product(*self.turned, self.pattern.transpose(edge), g)
        return y

    def gradients(self, edge: Tensor, diagonal: Tensor, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of ``<g, x_K>`` for edge and diagonal."""
        states, y = [], x
        for k in range(self.steps):
            z = self.mask(k, y)
            states.append(z)
            y = self.plus(self.ahead(edge, diagonal, z), x)
        d_edge, d_diagonal = torch.zeros_like(edge), torch.zeros_like(diagonal)
        for k in reversed(range(self.steps)):
            d_edge = d_edge + _edge_dot(*self.pattern, g, states[k])
            d_diagonal = d_diagonal + (g * states[k]).sum(-1)
            g = self.mask(k, self.back(edge, diagonal, g))
        return d_edge, d_diagonal

    def tangent(self, edge: Tensor, diagonal: Tensor, x: Tensor, d_edge: Tensor, d_diagonal: Tensor) -> Tensor:
        """Derivative of x_K in the direction (d_edge, d_diagonal)."""
        y, t = x, torch.zeros_like(x)
        for k in range(self.steps):
            z = self.mask(k, y)
            t = self.ahead(edge, diagonal, self.mask(k, t)) + self.ahead(d_edge, d_diagonal, z)
            y = self.plus(self.ahead(edge, diagonal, z), x)
        return t

    def adjoint_tangent(self, edge: Tensor, diagonal: Tensor, g: Tensor, d_edge: Tensor, d_diagonal: Tensor) -> Tensor:
        """Derivative of the adjoint's result for g in that direction."""
        t = total = torch.zeros_like(g)
        for k in reversed(range(self.steps)):
            total = self.plus(total, t)
            t = self.mask(k, self.back(edge, diagonal, t) + self.back(d_edge, d_diagonal, g))
            g = self.mask(k, self.back(edge, diagonal, g))
        return t + total


def _propagate_backward(ctx: Context, grad: Tensor) -> tuple[Any, ...]:
    *parts, edge, diagonal, x, num_steps, teleport, dropout, seed, adjoint = ctx.inputs
    need_matrix, need_x = ctx.needs[5] or ctx.needs[6], ctx.needs[7]
    pattern, options = _pattern(*parts), (num_steps, teleport, dropout, seed)
    grad_edge = grad_diagonal = grad_x = None
    # <grad, P x> = <P' grad, x>: for the matrix, an adjoint's input and gradient change places.
    state, g = (grad, x) if adjoint else (x, grad)
    # Is this derivative to be differentiated in its turn?
    again = torch.is_grad_enabled() or forward_ad._current_level >= 0
    if need_matrix and again:
        grad_edge, grad_diagonal = _Steps(pattern, x, options).gradients(edge, diagonal, state, g)
    elif need_matrix:
        grad_edge, grad_diagonal, grad_x = _propagate_gradients(*pattern, edge, diagonal, state, g, *options)
    if adjoint or grad_x is None:
        grad_x = _propagate(*pattern, edge, diagonal, grad, *options, not adjoint) if need_x else None
    return *_NO_GRADIENTS, grad_edge, grad_diagonal, grad_x, *(None,) * 5


def _propagate_jvp(ctx: Context, *tangents: Tensor | None) -> Tensor | None:
    *parts, edge, diagonal, x, num_steps, teleport, dropout, seed, adjoint = ctx.inputs
    d_edge, d_diagonal, d_x = tangents[5:8]
    pattern, options = _pattern(*parts), (num_steps, teleport, dropout, seed)
    moved = None
    if d_edge is not None or d_diagonal is not None:
        steps = _Steps(pattern, x, options)
        moved = (steps.adjoint_tangent if adjoint else steps.tangent)(
            edge,
            diagonal,
            x,
            torch.zeros_like(edge) if d_edge is None else d_edge,
            torch.zeros_like(diagonal) if d_diagonal is None else d_diagonal,
        )
    return _sum(moved, None if d_x is None else _propagate(*pattern, edge, diagonal, d_x, *options, adjoint))


_propagate = declare(
    f"graph_propagate({_PATTERN}, Tensor edge, Tensor diagonal, Tensor x, "
    "int num_steps, float teleport, float dropout, int seed, bool adjoint) -> Tensor",
    forward=_propagate_forward,
    fake=lambda *args: args[7].new_empty(args[7].shape),
    backward=_propagate_backward,
    jvp=_propagate_jvp,
)


# --- what the rest of the package calls -------------------------------------------------------------------------------


def product(rowptr: Tensor, col: Tensor, weight: Tensor, x: Tensor, transposed: Triple | None = None) -> Tensor:
    """``W x`` for x of shape (n, d); deterministic, and so are all operators here.

    ``transposed = (t_rowptr, t_col, permutation)`` spares the derivative for x the making of it.
    """
    y: Tensor = _product(rowptr, col, *(transposed or (None,) * 3), weight, x)
    return y


def edge_dot(rowptr: Tensor, col: Tensor, a: Tensor, b: Tensor, transposed: Triple | None = None) -> Tensor:
    """``<a_i, b_j>`` for every entry (i, j); a and b of shape (n, d)."""
    out: Tensor = _edge_dot(rowptr, col, *(transposed or (None,) * 3), a, b)
    return out


def dropout_mask(like: Tensor, step: int, dropout: float, seed: int, first_row: int = 0) -> Tensor:
    """The factors 0 and ``1 / (1 - dropout)`` by which `propagate` multiplies its state before step `step`.

    Of the rows ``first_row, first_row + 1, ...``.
    """
    mask: Tensor = _dropout_mask(like, step, dropout, seed, first_row)
    return mask


def propagate(
    rowptr: Tensor,
    col: Tensor,
    edge: Tensor,
    diagonal: Tensor,
    x: Tensor,
    num_steps: int,
    teleport: float = 0.0,
    dropout: float = 0.0,
    seed: int = 0,
    transposed: Triple | None = None,
) -> Tensor:
    """``x <- D m_k x + E m_k x + teleport x_0``, num_steps times, with dropout masks m_k; x of shape (n, d).

    E has the pattern and the values `edge`, D is the `diagonal` (n,). Memory: two tiles of columns beside the result,
    whatever the number of steps, forward and backward; O(n sqrt(num_steps)) a tile where edge or diagonal want a
    gradient, and all states where second derivatives are asked for. Time: 2 nnz d flops a step; one more sweep
    backward, about four with gradients for edge and diagonal.
    """
    y: Tensor = _propagate(
        rowptr, col, *(transposed or (None,) * 3), edge, diagonal, x, num_steps, teleport, dropout, seed, False
    )
    return y
