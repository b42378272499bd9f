"""Products with the inverse of the empirical Fisher matrix of a window of gradients, which is never formed (M-FAC)."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from kantor._checks import check_finite
from kantor._errors import NumericalBreakdown
from kantor._ops import backend
from kantor.optim._fisher_checks import check_gradient, check_memory, check_options, check_state
from kantor.optim._gradient_window import GradientWindow, largest_of, strips


class EmpiricalFisher:
    """The inverse of ``F = damping I + (1/m) sum_i g_i g_i'`` for the last m gradients.

    Neither F nor its inverse is formed: products cost two passes over the gradients. With ``block_size``, F is
    block-diagonal on consecutive blocks of that many coordinates, each with a matrix of its own.

    Parameters
    ----------
    grads : Tensor, optional
        ``(n, d)``, of any floating-point dtype: the window to begin with. It is copied.
    m : int, optional
        Gradients in the window, any number. Default: n. More gradients replace the oldest ones.
    dim : int, optional
        d, where there are no gradients yet.
    damping : float
        lambda > 0.
    block_size : int, optional
        Coordinates of a block; the last may be shorter. Default: one block.
    storage_dtype : dtype, optional
        Of the stored gradients: float32, float64, or bfloat16, float16, int8, which take half or a quarter of the
        memory; the last two with a scale for each gradient. Results are those of the gradients as stored, in
        float32, or float64 where they are stored so. Default: that of `grads`, or torch's default dtype.
    divisor : {"window", "mean"}
        Of the sum: m from the first gradient on, as published, or the number of gradients there are.
    device : device, optional
        Default: that of `grads`, or torch's default device.
    factor : {"refactor", "update"}
        How a replaced gradient changes the Cholesky factor of the m x m system: factorised anew, m^3/3 operations, or
        updated in O(m^2) and factorised anew every m gradients. On CUDA it is always factorised anew.
    on_nonfinite : {"raise", "skip"}
        What :meth:`push` does with a gradient that is not finite.
    max_bytes : int, optional
        Limit of memory. Default: 80 % of what is free.
    process_group : torch.distributed.ProcessGroup, optional
        Each rank holds a slice of the coordinates, d of them; only vectors of m numbers are exchanged, and with
        `block_size` none. All ranks must call alike.

    Attributes
    ----------
    m, dim, count : int
        Size of the window, d, and how many gradients it holds.

    Raises
    ------
    ValueError
        Options out of range; gradients of another shape or device, or not finite.
    TypeError
        Not tensors; an integer or complex dtype.
    MemoryError
        The window would exceed `max_bytes`; nothing was allocated.

    Notes
    -----
    Memory: m d numbers, and ``16 min(m, B)^2`` bytes a block of B: systems are m x m, or, for blocks no longer than the
    window, B x B, where F is held and factorised itself. All sums over coordinates are in double precision, so that
    errors do not grow like ``|g|^2 / damping`` times the roundoff of float32, as those of the published recursions do.
    On the CPU passes over the gradients give the same bits for any number of threads; LAPACK's factors of systems of
    some hundred rows may differ in the last bit of a double. A window is used by one thread at a time.

    Source: Frantar, Kurtic & Alistarh, *M-FAC: Efficient Matrix-Free Approximations of Second-Order Information*,
    NeurIPS 2021, arXiv 2107.03356. With ``K = G G'`` their recursion (eq. 5) is Woodbury's formula
    ``F^-1 x = (x - G' (m damping I + K)^-1 G x) / damping``, and their coefficients are those of a Cholesky factor.

    Examples
    --------
    >>> import torch
    >>> from kantor.optim import EmpiricalFisher
    >>> g = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    >>> fisher = EmpiricalFisher(g, damping=0.5)
    >>> fisher.ihvp(torch.ones(3, dtype=torch.float64))
    tensor([0.2000, 1.0000, 2.0000], dtype=torch.float64)
    >>> fisher.diag_inverse()
    tensor([0.2000, 1.0000, 2.0000], dtype=torch.float64)
    """

    def __init__(
        self,
        grads: Tensor | None = None,
        *,
        m: int | None = None,
        dim: int | None = None,
        damping: float = 1e-5,
        block_size: int | None = None,
        storage_dtype: torch.dtype | None = None,
        divisor: Literal["window", "mean"] = "window",
        device: torch.device | str | None = None,
        factor: Literal["refactor", "update"] = "refactor",
        on_nonfinite: Literal["raise", "skip"] = "raise",
        max_bytes: int | None = None,
        process_group: Any = None,
    ) -> None:
        check_options(m, damping, block_size, storage_dtype, divisor, factor, on_nonfinite)
        if grads is not None:
            grads = check_gradient(grads, "EmpiricalFisher", "grads")
            if grads.ndim != 2 or 0 in grads.shape:
                raise ValueError(f"EmpiricalFisher: grads: expected shape (n, d), got {tuple(grads.shape)}")
            if dim not in (None, grads.shape[1]) or (m is not None and m < len(grads)):
                raise ValueError(
                    f"EmpiricalFisher: grads: expected at most m = {m} rows of dim = {dim}, got {tuple(grads.shape)}"
                )
            largest = largest_of(grads)
            if not math.isfinite(largest):
                check_finite(grads, "EmpiricalFisher", "grads")
            m, dim = len(grads) if m is None else m, grads.shape[1]
            storage_dtype, device = storage_dtype or grads.dtype, grads.device if device is None else device
        if m is None or dim is None or not (isinstance(dim, int) and dim >= 1):
            raise ValueError(f"EmpiricalFisher: expected grads, or m and dim, both >= 1, got m={m!r}, dim={dim!r}")
        self.m, self.dim, self.damping = m, dim, float(damping)
        self._block_size, self._divisor, self._mode, self._skip = block_size, divisor, factor, on_nonfinite == "skip"
        self._group = process_group
        storage = storage_dtype or torch.get_default_dtype()
        where = torch.empty(0, device=device).device
        block = min(block_size or dim, dim)
        check_memory(m, dim, block, storage, where, max_bytes)
        self._window = GradientWindow(m, dim, block, storage, where)
        self.count, self._newest = 0, -1
        self._updates = 0  # of the factor since it was last computed
        self._factor: Tensor | None = None
        self._shift = 0.0  # of the damping, where it is below roundoff
        # Systems are as large as the window or the block, whichever is smaller. Coordinates that are spread over ranks
        # have only the first in common.
        self._by_columns = block <= m and (process_group is None or block_size is not None)
        self._size = block if self._by_columns else m
        self._gram: Tensor | None = None  # of a window that is filled at once, formed when it is needed
        self._peak: Tensor | None = None  # the largest trace of each block's G'G since it was formed
        if grads is None:
            self._gram = torch.zeros(self._window.blocks, self._size, self._size, dtype=torch.float64, device=where)
        else:
            if largest > self._window.limit:
                raise ValueError(
                    f"EmpiricalFisher: grads: expected magnitudes of at most {self._window.limit:.3g}, "
                    f"got {largest:.3g}; scale the loss down"
                )
            self._window.fill(grads)
            self.count, self._newest = len(grads), len(grads) - 1

    @property
    def dtype(self) -> torch.dtype:
        """Of results: float64 where gradients are stored so, else float32."""
        return self._window.dtype

    @property
    def device(self) -> torch.device:
        """Where the gradients are."""
        return self._window.rows.device

    def __repr__(self) -> str:
        """Say what it holds."""
        blocks = f", {self._window.blocks} blocks of {self._window.block}" if self._window.blocks > 1 else ""
        return f"EmpiricalFisher({self.count} of {self.m} gradients, dim={self.dim}, damping={self.damping:g}{blocks})"

    # --- the window ---

    @torch.no_grad()
    def push(self, g: Tensor) -> bool:
        """Put a gradient into the window, in place of the oldest one when it is full.

        Parameters
        ----------
        g : Tensor
            ``(d,)``, any floating-point dtype.

        Returns
        -------
        bool
            False where it was not finite and is skipped; the window is as before.

        Raises
        ------
        ValueError, TypeError
            Another length, device or kind of dtype; not finite, with ``on_nonfinite="raise"``. The window is as before.

        Notes
        -----
        One pass over the gradients: row and column r of ``K = G G'`` become ``G g``. Waits for a CUDA device once, to
        see whether g is finite; twice for blocks no longer than the window.
        """
        g = self._vectors(g, "push", "g")
        if g.ndim != 1:
            raise ValueError(f"EmpiricalFisher.push: g: expected shape ({self.dim},), got {tuple(g.shape)}")
        largest = largest_of(g)
        if not self._all_fit(largest):
            if self._skip:
                return False
            raise ValueError(
                f"EmpiricalFisher.push: g: expected finite values, at most {self._window.limit:.3g} in magnitude, "
                "got NaN, infinity or more; the window is as before; on_nonfinite='skip' leaves such gradients out"
            )
        slot = (self._newest + 1) % self.m
        gram, factor, terms = self._grams(), self._factor, self._terms
        self._gram = self._factor = None  # an interrupt leaves a window of which they are formed anew
        if self._by_columns:
            keep = self._exchange(gram, slot, g)
        else:
            row = self._summed(self._window.insert(slot, g, largest))
            gram[:, slot, :] = row
            gram[:, :, slot] = row
            keep = True
        self._newest, self.count = slot, min(self.count + 1, self.m)
        if keep:
            self._gram = gram
        if factor is not None and not self._by_columns and self._replace_in_factor(factor, gram, slot, terms):
            self._factor = factor
        return True

    def _exchange(self, gram: Tensor, slot: int, g: Tensor) -> bool:
        """Put g into a slot and into ``G'G``; False where ``G'G`` is to be formed anew.

        What is subtracted leaves its roundoff: it is formed anew once in m gradients, and where little is left.
        """
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        peak = diagonal.sum(-1) if self._peak is None else self._peak
        self._peak = None
        old = self._window.row(slot)
        self._window.fill(g.unsqueeze(0), slot)
        pair = torch.stack([old, self._window.row(slot)], dim=1)
        gram.baddbmm_(pair.mT * pair.new_tensor([-1.0, 1.0]), pair)
        trace = diagonal.sum(-1)
        if slot == self.m - 1 or bool((trace < 0.01 * peak).any()):
            return False
        self._peak = torch.maximum(peak, trace)
        return True

    def _all_fit(self, largest: float) -> bool:
        fits = largest <= self._window.limit
        if self._group is None:
            return fits
        bad = torch.tensor(0.0 if fits else 1.0, device=self.device)
        dist.all_reduce(bad, group=self._group)
        return not bool(bad)

    def _summed(self, products: Tensor) -> Tensor:
        """Over the ranks, where blocks of coordinates do not belong to one of them."""
        if self._group is not None and self._block_size is None:
            dist.all_reduce(products, group=self._group)
        return products

    def _vectors(self, x: Tensor, function: str, name: str) -> Tensor:
        function = f"EmpiricalFisher.{function}"
        x = check_gradient(x, function, name, self.dtype)
        if x.ndim not in (1, 2) or x.shape[-1] != self.dim:
            raise ValueError(f"{function}: {name}: expected {self.dim} elements, got shape {tuple(x.shape)}")
        if x.device != self.device:
            raise ValueError(
                f"{function}: {name} is on {x.device}, the window on {self.device}; move it with .to(device)"
            )
        return x

    # --- the small systems in double: by rows (blocks, m, m), or by columns (blocks, block, block) ---

    def _grams(self) -> Tensor:
        """``K = G G'``, or ``G'G`` of each block."""
        if self._gram is None:
            self._gram = self._window.covariance() if self._by_columns else self._summed(self._window.gram())
        return self._gram

    @property
    def _terms(self) -> int:
        """Divisor of the sum."""
        return self.m if self._divisor == "window" else max(self.count, 1)

    def _cholesky(self) -> Tensor:
        """Of ``damping I + K / m``, or of F itself; what is added to the damping is then in ``_shift``."""
        if self._factor is not None:
            return self._factor
        system = self._grams() / self._terms
        diagonal = system.diagonal(dim1=-2, dim2=-1)
        scale = float(diagonal.sum(-1).max())
        diagonal.add_(self.damping)
        factor, info = torch.linalg.cholesky_ex(system)
        self._shift, self._updates = 0.0, 0
        if bool((info != 0).any()):  # the damping is below the roundoff of K: the least shift that is above it
            self._shift = 4 * self._size * torch.finfo(torch.float64).eps * scale
            warnings.warn(
                f"EmpiricalFisher: damping {self.damping:g} is below the roundoff of the gradients' products; "
                f"{self._shift:.3g} is added to it. Raise the damping, or clip the gradients.",
                RuntimeWarning,
                stacklevel=4,  # over the decorator of the public method
            )
            diagonal.add_(self._shift)
            factor, info = torch.linalg.cholesky_ex(system)
            if bool((info != 0).any()):
                raise NumericalBreakdown(
                    "EmpiricalFisher: F is not positive definite to working precision; raise the damping"
                )
            self._updates = self.m  # the next gradient may do without the shift
        self._factor = factor.mT.contiguous().mT  # by columns
        return self._factor

    @property
    def _damped(self) -> float:
        """The damping of the factor."""
        return self.damping + self._shift

    def _replace_in_factor(self, factor: Tensor, gram: Tensor, slot: int, terms: int) -> bool:
        """Bring a factor made for the divisor `terms` in line with row and column `slot` of K; False: not possible."""
        if self._mode != "update" or self.device.type != "cpu" or terms != self._terms or self._updates >= self.m:
            return False
        row = gram[:, slot] / terms
        row[:, slot] += self.damping
        self._updates += 1
        return bool(backend().mfac_replace(factor.mT, slot, row))

    # --- products ---

    @torch.no_grad()
    def ihvp(self, x: Tensor) -> Tensor:
        """Return ``F^-1 x``.

        Parameters
        ----------
        x : Tensor
            ``(d,)`` or ``(k, d)``, any floating-point dtype.

        Returns
        -------
        Tensor
            Of the same shape. A function of this signature also serves as preconditioner: ``cg(..., M=fisher.ihvp)``.
            It carries no derivative: that of ``y'F^-1 x`` for x is ``fisher.ihvp(y)``.

        Raises
        ------
        ValueError, TypeError
            Another length, device or kind of dtype.

        Notes
        -----
        ``4 k m d`` operations, two passes over the gradients a vector; ``2 k d B``, and no pass, where systems are
        those of blocks. The two nearly equal parts of Woodbury's formula are subtracted in double precision, before
        the one rounding.
        """
        x = self._vectors(x, "ihvp", "x")
        if not x.numel():
            return x.clone()
        rows = x.reshape(-1, self.dim)
        if self._by_columns:
            return self._solve_columns(self._window.by_blocks(rows.to(torch.float64))).view(x.shape)
        products = self._summed(self._window.products(rows))
        a = torch.cholesky_solve(products.permute(1, 2, 0), self._cholesky()).permute(2, 0, 1)
        return self._window.combine(a / (-self._damped * self._terms), 1 / self._damped, rows).view(x.shape)

    def _solve_columns(self, x: Tensor) -> Tensor:
        """``F^-1 x`` for ``x (k, blocks, block)``, as ``(k, d)``."""
        solved = torch.cholesky_solve(x.permute(1, 2, 0), self._cholesky()).permute(2, 0, 1)
        return solved.reshape(len(x), -1)[:, : self.dim].to(self.dtype)

    @torch.no_grad()
    def ihvp_last(self) -> Tensor:
        """Return ``F^-1 g`` for the newest gradient g, ``(d,)``, in one pass over the gradients.

        Raises
        ------
        ValueError
            There is no gradient yet.

        Notes
        -----
        g is in the span of the gradients, so that ``F^-1 g = G' c`` with ``(damping I + K/m) c = e`` for its unit
        vector e: nothing is subtracted, whatever the damping.
        """
        if self.count == 0:
            raise ValueError("EmpiricalFisher.ihvp_last: expected a gradient in the window, got none; call push first")
        if self._by_columns:
            return self._solve_columns(self._window.row(self._newest).unsqueeze(0))[0]
        unit = torch.zeros(self._window.blocks, self.m, 1, dtype=torch.float64, device=self.device)
        unit[:, self._newest] = 1
        c = torch.cholesky_solve(unit, self._cholesky())
        return self._window.combine(c.permute(2, 0, 1))[0]

    # --- entries ---

    @torch.no_grad()
    def diag_inverse(self) -> Tensor:
        """Return the diagonal of ``F^-1``, ``(d,)``.

        Notes
        -----
        ``(1 - colsum(W^2)) / damping`` with ``W = C^-1 G / sqrt(m)``, C the Cholesky factor: m^2 d operations in double
        precision, by pages of columns; W is not kept. For blocks of B up to m, the inverses of the blocks, B^2 d.
        Where nearly all digits cancel, what is left is at least the inverse of F's diagonal, a lower bound.
        """
        factor = self._cholesky()
        if self._by_columns:
            diagonal = torch.cholesky_inverse(factor).diagonal(dim1=-2, dim2=-1)
            return diagonal.reshape(-1)[: self.dim].to(self.dtype)
        result = torch.empty(self.dim, dtype=self.dtype, device=self.device)
        eye = torch.eye(self.m, dtype=torch.float64, device=self.device)
        inverted, inverse = -1, factor
        for block, begin, page in self._window.pages():
            if block != inverted:  # products with the inverse are faster than solves
                inverse = torch.linalg.solve_triangular(factor[block : block + len(page)], eye, upper=False)
                inverted = block
            squares = torch.zeros_like(page[:, 0])
            for first, last in strips(self.m):
                squares += (inverse[:, first:last, :last] @ page[:, :last]).square_().sum(-2)
            part = self._above(1 - squares / self._terms, page.square().sum(-2)).reshape(-1)
            target = result[begin : begin + part.numel()]
            target.copy_(part[: target.numel()])
        return result

    def _above(self, ones: Tensor, squares: Tensor) -> Tensor:
        """The diagonal from that of ``damping F^-1``, and by Cauchy and Schwarz not below the inverse of F's."""
        return torch.maximum(ones / self._damped, 1 / (self._damped + squares / self._terms))

    @torch.no_grad()
    def inverse_entry(self, i: int, j: int) -> Tensor:
        """Return entry (i, j) of ``F^-1``, a scalar; exactly 0 across blocks. O(m^2) operations.

        Raises
        ------
        ValueError
            An index outside 0 to d - 1.
        """
        for name, index in (("i", i), ("j", j)):
            if not 0 <= index < self.dim:
                raise ValueError(f"EmpiricalFisher.inverse_entry: {name}: expected 0 to {self.dim - 1}, got {index!r}")
        block = i // self._window.block
        if block != j // self._window.block:
            return torch.zeros((), dtype=self.dtype, device=self.device)
        if self._by_columns:
            unit = torch.zeros(self._size, 1, dtype=torch.float64, device=self.device)
            unit[j % self._size] = 1
            return torch.cholesky_solve(unit, self._cholesky()[block])[i % self._size, 0].to(self.dtype)
        columns = torch.cat([self._window.columns(index, index + 1) for index in (i, j)], dim=1)
        W = torch.linalg.solve_triangular(self._cholesky()[block], columns, upper=False)
        product: Tensor = W[:, 0] @ W[:, 1] / self._terms
        if i == j:
            return self._above(1 - product, columns[:, 0].square().sum()).to(self.dtype)
        return (-product / self._damped).to(self.dtype)

    @torch.no_grad()
    def logdet(self) -> Tensor:
        """Return ``log det F``, a scalar in double precision."""
        halves = self._cholesky().diagonal(dim1=-2, dim2=-1).log().sum()
        dim = self._summed(halves.new_tensor(float(self.dim)))  # every rank has the same system, and a part of it
        whole: Tensor = 2 * halves + (dim - self._size * self._window.blocks) * math.log(self._damped)
        if self._group is not None and self._block_size is not None:  # every rank has its own
            dist.all_reduce(whole, group=self._group)
        return whole

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """Return the gradients and their products, not copied; loading them continues bit for bit."""
        window = self._window
        return {
            "settings": self._settings(),
            "rows": window.rows,
            "scales": window.scales,
            "gram": self._gram,
            "peak": self._peak,
            "factor": self._factor if self._mode == "update" and not self._shift else None,
            "counters": (self.count, self._newest, self._updates),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, from any device.

        Raises
        ------
        ValueError
            The state belongs to another window; nothing is changed.
        """
        self.check_state(state)
        window = self._window
        window.rows.copy_(state["rows"])
        if window.scales is not None:
            window.scales.copy_(state["scales"])

        def copied(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(self.device, copy=True)

        self._gram, self._peak, self._factor = copied(state["gram"]), copied(state["peak"]), copied(state["factor"])
        self._shift = 0.0
        self.count, self._newest, self._updates = state["counters"]

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError if :meth:`load_state_dict` would."""
        blocks, size = self._window.blocks, self._size
        shapes = {"gram": (blocks, size, size), "peak": (blocks,), "factor": (blocks, size, size)}
        check_state(state, self._settings(), {"rows": self._window.rows, "scales": self._window.scales}, shapes)

    def _settings(self) -> dict[str, Any]:
        return {
            "m": self.m,
            "dim": self.dim,
            "damping": self.damping,
            "block_size": self._block_size,
            "storage_dtype": str(self._window.rows.dtype).removeprefix("torch."),
            "divisor": self._divisor,
            "factor": self._mode,
        }
