"""Norm balls of parameters: their linear minimisation oracles, their dual norms, and which parameter gets which.

For a weight A of shape (d_out, d_in), as in nn.Linear, the oracle O(B) maximises <B, O> over the unit ball of a norm:
its inner product with B is the dual norm of B. Section 1 of Pethick et al., arXiv 2502.07529, has the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kantor._checks import check_finite, check_tensor, is_number
from kantor.linalg.msign import check_msign_options, over_largest, polar_factor

KINDS = ("spectral", "spectral_conv", "sign", "rms", "row", "col")
MATRIX_KINDS = ("spectral", "spectral_conv")  # those whose oracle is a polar factor

# Radii for transformers: the output layer and embeddings move further, gains and biases less.
DEFAULT_SCALE = {"spectral": 1.0, "spectral_conv": 1.0, "sign": 10.0, "rms": 0.3, "row": 1.0, "col": 1.0}


@dataclass(frozen=True, slots=True)
class Ball:
    """The unit ball of a kind of norm, for tensors of one shape: O(B) = size * unit(B), dual(A) = size * total(A)."""

    kind: str
    shape: tuple[int, ...]

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def size(self) -> float:
        """Size of the oracle's answer, beside a polar factor, signs, or unit vectors."""
        if self.kind == "spectral":
            return math.sqrt(self.shape[0] / self.shape[1])
        if self.kind == "spectral_conv":
            return math.sqrt(self.shape[0] / self.shape[1]) / math.prod(self.shape[2:])
        if self.kind == "sign":
            return 1 / (self.shape[-1] if self.shape else 1)
        if self.kind == "rms":
            return math.sqrt(math.prod(self.shape))
        return math.sqrt(self.shape[1] if self.kind == "row" else self.shape[0])

    def check(self, function: str) -> None:
        """Raise unless the shape fits the kind."""
        ndim = len(self.shape)
        fits = {
            "spectral": (ndim == 2, "2 dimensions; use spectral_conv for kernels, rms for vectors"),
            "spectral_conv": (ndim >= 3, "3 or more dimensions (out, in, kernel); use spectral for matrices"),
            "row": (ndim == 2, "2 dimensions"),
            "col": (ndim == 2, "2 dimensions"),
        }
        if self.kind not in KINDS:
            raise ValueError(f"{function}: kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        fit, expected = fits.get(self.kind, (True, ""))
        if not fit:
            raise ValueError(f"{function}: kind {self.kind}: expected {expected}; got shape {self.shape}")


def lmo(
    B: Tensor,
    kind: str,
    *,
    scale: float = 1.0,
    method: str = "polar",
    steps: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Linear minimisation oracle: the element of a norm ball with the largest inner product with ``B``.

    ``-lmo(gradient, kind)`` is the steepest direction in that norm: a step is ``X -= lr * lmo(momentum, kind)``.

    Parameters
    ----------
    B : Tensor
        A parameter's momentum or gradient, of the shape of the parameter, (d_out, d_in) for a matrix.
    kind : str
        The norm, and with it the answer for radius 1:

        ================= ===================================== ====================================
        kind              norm of A                             lmo(B)
        ================= ===================================== ====================================
        ``spectral``      sqrt(d_in/d_out) sigma_max            sqrt(d_out/d_in) msign(B)
        ``spectral_conv`` k^2 sqrt(in/out) sigma_max            sqrt(out/in) / k^2 msign(B)
        ``sign``          d_in times the largest entry          sign(B) / d_in
        ``rms``           2-norm of A, over sqrt(d)             sqrt(d) B / (2-norm of B)
        ``row``           largest RMS of a row                  rows of RMS 1
        ``col``           largest RMS of a column               columns of RMS 1
        ================= ===================================== ====================================

        ``spectral_conv`` is of the matrix (out, in k^2) of a kernel (out, in, k, k), or of any other dimension;
        ``sign`` takes the last dimension for d_in, ``rms`` all elements for d.
    scale : float
        Radius of the ball.
    method, steps, dtype
        Of the polar factor, see :func:`kantor.linalg.msign`.

    Returns
    -------
    Tensor
        Of the shape and dtype of ``B``; zero where ``B`` is zero. No graph.

    Raises
    ------
    TypeError, ValueError
        Not a dense real floating-point tensor; unknown kind, or one that the shape does not fit; NaN or infinity; a
        scale that is not positive.

    References
    ----------
    T. Pethick et al., *Training Deep Learning Models with Norm-Constrained LMOs*, arXiv 2502.07529, Tables 1 to 4.

    Examples
    --------
    >>> import torch
    >>> from kantor.optim import dual_norm, lmo
    >>> B = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> inner = (B * lmo(B, "sign")).sum()
    >>> bool((inner - dual_norm(B, "sign")).abs() < 1e-12)
    True
    """
    ball = _ball(B, kind, scale, "lmo", "B", method, steps, dtype)
    if B.numel() == 0:
        return torch.zeros_like(B)
    direction = unit(ball, _wide(B), lambda X: polar_factor(X, method, steps, dtype))
    return (scale * ball.size * direction).to(B.dtype)


def dual_norm(
    A: Tensor,
    kind: str,
    *,
    scale: float = 1.0,
    method: str = "svd",
    steps: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Dual norm: the largest inner product of ``A`` with an element of the ball of radius ``scale``.

    Parameters
    ----------
    A, kind, scale
        See :func:`lmo`.
    method, steps, dtype
        Of the nuclear norm, as inner product with the polar factor; ``"svd"`` is exact, ``"polar"`` within 2e-4 and
        ``"muon5"`` 13 to 16 per cent too small for Gaussian matrices of 64 to 256 rows.

    Returns
    -------
    Tensor, shape ()
        Of the dtype of ``A``.

    Raises
    ------
    TypeError, ValueError
        As :func:`lmo`.

    Examples
    --------
    >>> import torch
    >>> from kantor.optim import dual_norm
    >>> float(dual_norm(torch.tensor([3.0, -4.0]), "sign"))
    3.5
    """
    ball = _ball(A, kind, scale, "dual_norm", "A", method, steps, dtype)
    if A.numel() == 0:
        return A.new_zeros(())
    wide = _wide(A)
    if kind in MATRIX_KINDS and method == "svd":
        total = torch.linalg.svdvals(wide.reshape(ball.matrix)).sum()
    else:
        total = (wide * unit(ball, wide, lambda X: polar_factor(X, method, steps, dtype))).sum()
    norm: Tensor = (scale * ball.size * total).to(A.dtype)
    return norm


def primal_norm(A: Tensor, kind: str, *, scale: float = 1.0) -> Tensor:
    """Norm of the kind: the least radius, in units of ``scale``, of a ball that contains ``A``.

    Parameters
    ----------
    A, kind, scale
        See :func:`lmo`.

    Returns
    -------
    Tensor, shape ()
        Of the dtype of ``A``; the singular value of a matrix kind is exact.

    Raises
    ------
    TypeError, ValueError
        As :func:`lmo`.

    Examples
    --------
    >>> import torch
    >>> from kantor.optim import primal_norm
    >>> float(primal_norm(torch.eye(4), "spectral"))
    1.0
    """
    ball = _ball(A, kind, scale, "primal_norm", "A", "svd", None, None)
    if A.numel() == 0:
        return A.new_zeros(())
    wide = _wide(A)
    if kind in MATRIX_KINDS:
        largest = torch.linalg.matrix_norm(wide.reshape(ball.matrix), 2)
    elif kind == "sign":
        largest = wide.abs().max()
    else:
        X, most = over_largest(wide.reshape(-1), 0)
        dim = {"row": 1, "col": 0}.get(kind)
        largest = most[0] * torch.linalg.vector_norm(X.view(wide.shape), dim=dim).max()
    norm: Tensor = (largest / (scale * ball.size)).to(A.dtype)
    return norm


def unit(ball: Ball, B: Tensor, polar: Callable[[Tensor], Tensor]) -> Tensor:
    """O(B) without its size: polar factor, signs, or unit vectors."""
    if ball.kind in MATRIX_KINDS:
        return polar(B.reshape(ball.matrix)).view(B.shape)
    if ball.kind == "sign":
        return B.sign()
    dim = {"row": 1, "col": 0}.get(ball.kind)
    X = B.reshape(-1) if dim is None else B
    X = over_largest(X, dim or 0)[0]
    norm = torch.linalg.vector_norm(X, dim=dim, keepdim=True)
    return torch.where(norm > 0, X / norm, 0.0).view(B.shape)


def _wide(A: Tensor) -> Tensor:
    """A without its graph, in a precision that decompositions and sums have."""
    return A.detach() if A.dtype is torch.float64 else A.detach().float()


def _ball(
    A: Tensor,
    kind: str,
    scale: float,
    function: str,
    argument: str,
    method: str,
    steps: int | None,
    dtype: torch.dtype | None,
) -> Ball:
    check_tensor(A, function, argument)
    if not (is_number(scale) and scale > 0):
        raise ValueError(f"{function}: scale: expected a number > 0, got {scale!r}")
    check_msign_options(function, method, steps, dtype, A.device)
    if not A.dtype.is_floating_point:
        raise TypeError(f"{function}: {argument}: expected a real floating-point tensor, got {A.dtype}")
    ball = Ball(kind, tuple(A.shape))
    ball.check(function)
    check_finite(A, function, argument)
    return ball


# --- which parameter gets which norm ---

_HEADS = ("lm_head", "head")
_TABLES = ("wte", "wpe", "emb")


def kind_of(p: Tensor, name: str | None = None, head_names: Sequence[str] = _HEADS) -> str:
    """Choose the norm of a parameter from its shape and, where it has one, its dotted name."""
    if p.ndim <= 1:
        return "rms"
    if p.ndim >= 3:
        return "spectral_conv"
    parts = () if name is None else tuple(name.split("."))
    if any(part in head_names or part in _TABLES or "embed" in part for part in parts):
        return "sign"
    return "spectral"


def lmo_param_groups(
    model: nn.Module,
    *,
    embedding_types: tuple[type[nn.Module], ...] = (nn.Embedding,),
    head_names: Iterable[str] = _HEADS,
) -> list[dict[str, Any]]:
    """Sort the parameters of a model into groups of one norm each, for :class:`kantor.optim.LANTON`.

    Parameters
    ----------
    model : torch.nn.Module
    embedding_types : tuple of module types
        Their tables get ``"sign"``, whatever they are called; so does an output layer that shares one.
    head_names : iterable of str
        Modules of one of these names, at any depth, are output layers: their matrices get ``"sign"``.

    Returns
    -------
    list of dict
        Groups ``{"params": [(name, parameter), ...], "kind": ...}``, at most one a kind: ``spectral`` for the other
        matrices, ``spectral_conv`` for kernels, ``rms`` for gains and biases. Change or add options before passing them
        on. Parameters that do not require gradients are left out.

    Raises
    ------
    TypeError
        ``model`` is not a module, or ``head_names`` a single string.
    ValueError
        A parameter of a lazy module that has no shape yet.

    Examples
    --------
    >>> from torch import nn
    >>> from kantor.optim import lmo_param_groups
    >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    >>> [(group["kind"], len(group["params"])) for group in lmo_param_groups(model)]
    [('sign', 1), ('spectral', 1), ('rms', 3)]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"lmo_param_groups: model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(head_names, str):
        raise TypeError(f"lmo_param_groups: head_names: expected several names, got a string; write ({head_names!r},)")
    heads = tuple(head_names)
    tables = {id(p) for m in model.modules() if isinstance(m, embedding_types) for p in m.parameters(recurse=False)}
    groups: dict[str, list[tuple[str, Tensor]]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if isinstance(p, nn.UninitializedParameter):
            raise ValueError(
                f"lmo_param_groups: model: expected parameters with a shape, got {name} of a lazy module; "
                "call the model on a batch first"
            )
        module_parts = name.split(".")[:-1]
        if p.ndim >= 2 and (id(p) in tables or any(part in heads for part in module_parts)):
            kind = "sign"
        else:
            kind = kind_of(p)
        groups.setdefault(kind, []).append((name, p))
    return [{"params": members, "kind": kind} for kind, members in groups.items()]
