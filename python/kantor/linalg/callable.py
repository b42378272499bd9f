"""Python functions as operators."""

from __future__ import annotations

from collections.abc import Callable as CallableType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kantor._ranks import Ranks
from kantor.linalg._operator import LinearOperator

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as ScipyOperator


class Callable(LinearOperator):
    """A linear function given as Python code, such as a Hessian-vector product.

    Inside a solver it is called once per iteration; the rest of the iteration stays native.

    Parameters
    ----------
    fn : callable
        Maps ``(..., n)`` to ``(..., n)``, linearly.
    n : int
        Size.
    dtype, device : torch.dtype, torch.device, optional
        Of the vectors it takes. Default: float64 on the CPU.
    transpose : callable, optional
        The transposed map; by default the operator has none.
    ranks : Ranks, optional
        The processes among which the vectors' rows are shared; `n` counts those of this process, and `fn` is a
        collective function of all of them.

    Examples
    --------
    >>> import torch
    >>> from kantor.linalg import Callable, cg
    >>> A = Callable(lambda x: 2 * x, 3)
    >>> cg(A, torch.ones(3, dtype=torch.float64)).x
    tensor([0.5000, 0.5000, 0.5000], dtype=torch.float64)
    """

    def __init__(
        self,
        fn: CallableType[[Tensor], Tensor],
        n: int,
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        transpose: CallableType[[Tensor], Tensor] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        if not callable(fn):
            raise TypeError(f"Callable: fn: expected a callable, got {type(fn).__name__}")
        self.fn, self.transpose, self.ranks = fn, transpose, ranks
        self.shape = (int(n), int(n))
        self.dtype, self.device = dtype, torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"

    @classmethod
    def from_scipy(cls, A: ScipyOperator, *, like: Tensor | None = None) -> Callable:
        """Wrap a square ``scipy.sparse.linalg.LinearOperator``; its products run on the host."""
        rows, cols = A.shape
        if rows != cols:
            raise ValueError(f"as_operator: A: expected a square operator, got shape {A.shape}")

        def host(product: CallableType[[Any], Any]) -> CallableType[[Tensor], Tensor]:
            def fn(x: Tensor) -> Tensor:
                columns = product(x.detach().reshape(-1, rows).cpu().numpy().T)
                return torch.as_tensor(columns.T, dtype=x.dtype).to(x.device).reshape(x.shape)

            return fn

        dtype = torch.float64 if like is None else like.dtype
        device = torch.device("cpu") if like is None else like.device
        return cls(host(A.matmat), rows, dtype=dtype, device=device, transpose=host(A.rmatmat))

    @property
    def is_native(self) -> bool:
        """False: Python code applies it."""
        return False

    def _apply(self, x: Tensor) -> Tensor:
        y = self.fn(x)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            got = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"Callable: fn returned {got}, expected a tensor of shape {tuple(x.shape)}")
        if y.dtype != x.dtype or y.device != x.device:
            raise TypeError(f"Callable: fn returned {y.dtype} on {y.device}, expected {x.dtype} on {x.device}")
        return y

    @property
    def T(self) -> Callable:  # noqa: N802
        """The transposed map."""
        if self.transpose is None:
            raise TypeError("Callable has no transpose; pass transpose=")
        return Callable(
            self.transpose, self.shape[0], dtype=self.dtype, device=self.device, transpose=self.fn, ranks=self.ranks
        )

    def to(self, dtype: torch.dtype) -> Callable:
        """Return the same function on vectors of another dtype: they are converted on the way in and out."""

        def converted(fn: CallableType[[Tensor], Tensor]) -> CallableType[[Tensor], Tensor]:
            return lambda x: fn(x.to(self.dtype)).to(dtype)

        transpose = None if self.transpose is None else converted(self.transpose)
        return Callable(
            converted(self.fn), self.shape[0], dtype=dtype, device=self.device, transpose=transpose, ranks=self.ranks
        )

    def asymmetry(self) -> tuple[float, str]:
        """Return a probe ``|u'Av - v'Au|`` relative to its terms."""
        return self._asymmetry_by_probe()
