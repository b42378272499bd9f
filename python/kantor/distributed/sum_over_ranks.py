"""Functions whose value is a sum over processes, each of which holds its own data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kantor._checks import check_tensor
from kantor._ranks import Ranks


def sum_over_ranks(
    fun: Callable[[Tensor], Tensor], ranks: Ranks | None = None, *, batched: bool = False
) -> Callable[[Tensor], Tensor]:
    """Return the function ``x -> sum over ranks of fun(x)``, with its derivatives of every order in torch.

    Each rank has its own `fun`, of its own data; x is the same on all of them, and so are value, gradient and Hessian
    products: one all-reduce each, of as many numbers as they have. Hand it to :func:`kantor.optim.minimize`, or to any
    other method, and call that on every rank.

    Parameters
    ----------
    fun : callable
        ``fun(x)``: a scalar, or ``(B,)`` with `batched`. For a mean over all samples divide by their total number.
    ranks : Ranks, optional
        Default: those of the default group.
    batched : bool
        The first dimension of x counts independent problems.

    Returns
    -------
    callable
        Collective: all ranks call it together, with the same x, and differentiate it together.

    Raises
    ------
    RankError
        By the returned function, when another rank died, stalled or took another path.
    Exception
        What `fun` raises on one rank, on every rank.

    Notes
    -----
    The ranks take the same decisions as long as they compute the same bits from the same numbers: the same kind of
    machine, the same number of threads.

    Examples
    --------
    >>> import torch
    >>> from kantor.distributed import sum_over_ranks
    >>> from kantor.optim import minimize
    >>> data = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    >>> fun = sum_over_ranks(lambda x: ((x - data) ** 2).sum())
    >>> result = minimize(fun, torch.zeros(1, dtype=torch.float64))
    >>> bool((result.x - 3).abs() < 1e-6)
    True
    """
    if not callable(fun):
        raise TypeError(f"sum_over_ranks: fun: expected a callable, got {type(fun).__name__}")
    return _SumOverRanks(fun, Ranks() if ranks is None else ranks, batched)


class _SumOverRanks:
    def __init__(self, fun: Callable[[Tensor], Tensor], ranks: Ranks, batched: bool) -> None:
        self.fun, self.ranks, self.batched = fun, ranks, batched

    def __call__(self, x: Tensor) -> Tensor:
        check_tensor(x, "sum_over_ranks", "x")
        problem: Exception | None = None
        shared: Tensor = _Replicated.apply(x, self.ranks)  # type: ignore[no-untyped-call]
        try:
            value = self.fun(shared)
            expected = x.shape[:1] if self.batched else torch.Size(())
            if not isinstance(value, Tensor) or (value.shape != expected and (self.batched or value.numel() != 1)):
                got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"sum_over_ranks: fun: expected a tensor of shape {tuple(expected)}, got {got}")
            value = value.reshape(expected)
        except Exception as error:  # raised below, on every rank
            problem = error
            value = x.new_zeros(x.shape[:1] if self.batched else ())
        failed = value.new_full((1,), float(problem is not None))
        total: Tensor = _Sum.apply(torch.cat([value.reshape(-1), failed]), self.ranks)  # type: ignore[no-untyped-call]
        if float(total.detach()[-1]) > 0:
            with self.ranks.together():
                if problem is not None:
                    raise problem
        return total[:-1].reshape(value.shape)


def replicated(value: Tensor, ranks: Ranks) -> Tensor:
    """A value that all ranks have, for a rank's own use: its gradient is the sum over the ranks."""
    result: Tensor = _Replicated.apply(value, ranks)  # type: ignore[no-untyped-call]
    return result


def _all_reduced(t: Tensor, ranks: Ranks) -> Tensor:
    if torch._C._functorch.is_legacy_batchedtensor(t):
        raise RuntimeError("sum_over_ranks: batched gradients go one by one")
    return ranks.all_reduce_(t.detach().clone(memory_format=torch.contiguous_format))


# A sum of values that belong to one rank each, and a value that all have alike, are each other's derivative.


class _Sum(torch.autograd.Function):
    """From one value a rank to their sum, which all have."""

    @staticmethod
    def forward(value: Tensor, ranks: Ranks) -> Tensor:
        return _all_reduced(value, ranks)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Ranks], output: Tensor) -> None:
        ctx.ranks = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Replicated.apply(grad, ctx.ranks), None  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        result: Tensor = _Sum.apply(tangent, ctx.ranks)  # type: ignore[no-untyped-call]
        return result

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, None], value: Tensor, ranks: Ranks) -> tuple[Tensor, int | None]:
        return _Sum.apply(value, ranks), in_dims[0]  # type: ignore[no-untyped-call]


class _Replicated(torch.autograd.Function):
    """From a value that all ranks have to a rank's own use of it: the gradients of all uses add up."""

    @staticmethod
    def forward(value: Tensor, ranks: Ranks) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Ranks], output: Tensor) -> None:
        ctx.ranks = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grad, ctx.ranks), None  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent.view_as(tangent)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, None], value: Tensor, ranks: Ranks) -> tuple[Tensor, int | None]:
        return _Replicated.apply(value, ranks), in_dims[0]  # type: ignore[no-untyped-call]
