"""The matrix sign of a rectangular matrix, U V' of its singular value decomposition: by iteration, or exactly."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kantor._checks import check_finite, check_tensor
from kantor._ops import Context, backend, declare

Coefficients = list[tuple[float, float, float]]

METHODS = ("polar", "muon5", "svd")

# Amsel et al., arXiv 2505.16932: the best odd quintic for the interval that the singular values are in, step by step.
_POLAR = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
]
_NEWTON_SCHULZ = (1.875, -1.25, 0.375)  # where the interval has shrunk to a point
_MUON = (3.4445, -4.7750, 2.0315)

_POLAR_SAFETY = 1.01  # rounding must not take a singular value beyond 1
_MOST_STEPS = 32  # of the native code
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def msign(A: Tensor, *, method: str = "polar", steps: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Orthogonal factor of the polar decomposition: ``U V'`` of the thin SVD ``A = U S V'``.

    The nearest matrix with orthonormal rows (or columns), and the steepest direction of the spectral norm.

    Parameters
    ----------
    A : Tensor, shape (..., r, c)
        float32, float64, bfloat16 or float16. Any number of matrices of any shape.
    method : {"polar", "muon5", "svd"}
        ``"polar"``: odd polynomials that are optimal for the interval of the singular values at each step. Relative
        singular values (to the Frobenius norm) down to 1e-3 end in 0.9988 to 1.0012 after 6 steps. ``"muon5"``:
        Muon's five steps of one polynomial, which end in 0.68 to 1.13. ``"svd"``: exact, and differentiable.
    steps : int, optional
        Of the iteration; 6 for ``"polar"``, where more continue with Newton-Schulz; 5 for ``"muon5"``.
    dtype : torch.dtype, optional
        Of the products. Default: float64 for float64, on CUDA bfloat16 for matrices too large for one block's shared
        memory, else float32. float16 on CUDA only. Ignored by ``"svd"``.

    Returns
    -------
    Tensor, shape (..., r, c)
        Of the dtype of ``A``. A zero matrix gives zero.

    Raises
    ------
    TypeError
        ``A`` is not a dense floating-point tensor, or ``dtype`` is none of the four.
    ValueError
        Fewer than two dimensions; NaN or infinity; unknown method; ``steps`` below 1 or above 32; float16 products on
        the CPU.

    Notes
    -----
    An iteration costs ``4 r^2 c + 2 r^3`` operations a step, with r <= c after a transposition. Small matrices are one
    native call for the whole batch, which forms half of the symmetric products: up to 64 rows, and ``2 r (r + c)`` up
    to 65536 on the CPU (64 x 448), to 24576 on CUDA (64 x 128). Larger ones are matrix products of torch. On the CPU a
    matrix's result does not depend on the batch that it is in.

    Only ``"svd"`` has a derivative, the Frechet derivative, exact also where singular values coincide, for matrices of
    full rank, and NaN for others; a second derivative wants distinct singular values. The other methods return a tensor
    without a graph. Directions whose relative singular values are below 1e-3 end between 0 and 1, and where they are
    rounding near 0: a matrix of lower rank has the factor of its own space.

    References
    ----------
    N. Amsel, D. Persson, C. Musco, R. M. Gower, *The Polar Express*, arXiv 2505.16932, Algorithm 1. K. Jordan et al.,
    *Muon*, 2024.

    Examples
    --------
    >>> import torch
    >>> from kantor.linalg import msign
    >>> A = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(0))
    >>> Q = msign(A)
    >>> bool((Q @ Q.mT - torch.eye(20)).abs().max() < 5e-3)
    True
    """
    check_tensor(A, "msign", "A")
    check_msign_options("msign", method, steps, dtype, A.device)
    if A.dtype not in _DTYPES:
        raise TypeError(f"msign: A: expected float32, float64, bfloat16 or float16, got {A.dtype}")
    if A.ndim < 2:
        raise ValueError(f"msign: A: expected shape (..., r, c), got {tuple(A.shape)}")
    check_finite(A, "msign", "A")
    if method != "svd":
        return polar_factor(A.detach(), method, steps, dtype)
    work = A if A.dtype in (torch.float32, torch.float64) else A.float()
    return polar_factor(work, method, None, None).to(A.dtype)


def check_msign_options(
    function: str,
    method: str,
    steps: int | None,
    dtype: torch.dtype | None,
    device: torch.device | None = None,
    names: tuple[str, str, str] = ("method", "steps", "dtype"),
) -> None:
    """Raise unless these are options of :func:`msign`; `names` are what the caller's arguments are called."""
    if method not in METHODS:
        raise ValueError(f"{function}: {names[0]}: expected one of {', '.join(METHODS)}, got {method!r}")
    if steps is not None and not (isinstance(steps, int) and 1 <= steps <= _MOST_STEPS):
        raise ValueError(f"{function}: {names[1]}: expected an integer from 1 to {_MOST_STEPS}, got {steps!r}")
    if dtype is not None and dtype not in _DTYPES:
        raise TypeError(f"{function}: {names[2]}: expected float32, float64, bfloat16 or float16, got {dtype!r}")
    if dtype is torch.float16 and device is not None and device.type == "cpu":
        raise ValueError(f"{function}: {names[2]}: float16 products need CUDA; use bfloat16 or float32 on the CPU")


def iterate(A: Tensor, method: str, steps: int | None, dtype: torch.dtype | None) -> Tensor:
    """:func:`msign` by iteration or SVD, without checks and without a graph."""
    if A.numel() == 0:
        return torch.zeros_like(A)
    if method == "svd":
        U, S, Vh = _svd(A if A.dtype in (torch.float32, torch.float64) else A.float())
        return _product(U, S, Vh).to(A.dtype)
    tall = A.shape[-2] > A.shape[-1]
    X = (A.mT if tall else A).reshape(-1, min(A.shape[-2:]), max(A.shape[-2:]))
    native = backend()
    small = native.msign_is_small(X)
    if dtype is None:
        dtype = A.dtype if A.dtype is torch.float64 else torch.float32
        if A.is_cuda and not small and dtype is torch.float32:
            dtype = torch.bfloat16
    coefficients, safety = _coefficients(method, steps, dtype)
    small = small and dtype in (torch.float32, torch.float64) and not (A.is_cuda and dtype is torch.float64)
    if small:
        # The native code adds up squares of float32 in double.
        X = (over_largest(X, (1, 2))[0] if X.dtype is torch.float64 else X).to(dtype).contiguous()
        out = torch.empty_like(X)
        native.msign_small(X, coefficients, safety, out, torch.get_num_threads())
    else:
        out = _by_products(X, coefficients, safety, dtype)
    out = out.to(A.dtype).view(*A.shape[:-2], *X.shape[1:])
    return out.mT if tall else out


def over_largest(A: Tensor, dim: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """``A`` over its largest entry, so that squares neither overflow nor vanish, and that entry; zero stays zero."""
    largest = A.abs().amax(dim, keepdim=True)
    return A / torch.where(largest > 0, largest, 1.0), largest


def _coefficients(method: str, steps: int | None, dtype: torch.dtype) -> tuple[Coefficients, float]:
    if method == "muon5":
        return [_MUON] * (steps or 5), 1.0
    count = steps or len(_POLAR)
    coefficients = _POLAR[:count] + [_NEWTON_SCHULZ] * (count - len(_POLAR))
    if dtype in (torch.bfloat16, torch.float16):
        # Beyond 1 the polynomials grow fast, and products in half precision end there: p(x / safety), but at last p(x).
        s = _POLAR_SAFETY
        coefficients[:-1] = [(a / s, b / s**3, c / s**5) for a, b, c in coefficients[:-1]]
    return coefficients, _POLAR_SAFETY


def _by_products(X: Tensor, coefficients: Coefficients, safety: float, dtype: torch.dtype) -> Tensor:
    """Iterate by torch's matrix products: on CUDA batched, on the CPU one matrix after the other, on all threads."""
    if X.is_cuda:
        X = _normalised(X, safety, dtype)
        for a, b, c in coefficients:
            A = X @ X.mT
            X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
        return X
    # Two copies of one matrix, A and its polynomial are all the memory that is touched.
    out = torch.empty(X.shape, dtype=dtype)
    other = torch.empty_like(out[0])
    A, P = (out.new_empty(X.shape[1], X.shape[1]) for _ in range(2))
    for source, target in zip(X, out, strict=True):
        here, there = _normalised(source[None], safety, dtype)[0], other
        for a, b, c in coefficients:
            torch.mm(here, here.mT, out=A)
            torch.addmm(A, A, A, beta=b, alpha=c, out=P)
            torch.addmm(here, P, here, beta=a, out=there)
            here, there = there, here
        target.copy_(here)
    return out


def _normalised(X: Tensor, safety: float, dtype: torch.dtype) -> Tensor:
    """Each matrix of the batch over its Frobenius norm, times 1 / safety."""
    X = over_largest(X, (1, 2))[0]
    norm = torch.linalg.vector_norm(X, dim=(1, 2), keepdim=True, dtype=torch.float64)
    scale = torch.where(norm > 0, 1 / (safety * norm), 0.0)
    return (X * scale.to(X.dtype)).to(dtype).contiguous()


# --- exactly ---


def _svd(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    return U, S, Vh


def _product(U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
    """U V' over the singular values that are not rounding."""
    eps = torch.finfo(S.dtype).eps * max(U.shape[-2], Vh.shape[-1])
    kept = (eps * S[..., :1] < S).to(S.dtype)
    return (U * kept[..., None, :]) @ Vh


def _frechet(A: Tensor, E: Tensor) -> Tensor:
    """Derivative of U V' along E: the rotation inside the two spaces of rank r, and out of the one that is not all.

    It is self-adjoint, as the second derivative of the nuclear norm.
    """
    U, S, Vh = _svd(A)
    M = U.mT @ E @ Vh.mT
    inside = U @ ((M - M.mT) / (S[..., :, None] + S[..., None, :])) @ Vh
    rows = (U / S[..., None, :]) @ (U.mT @ E - M @ Vh)  # zero when c = r
    columns = ((E @ Vh.mT - U @ M) / S[..., None, :]) @ Vh
    return inside + rows + columns


# --- the operator ---


def _forward(A: Tensor, method: str, steps: int | None, dtype: torch.dtype | None) -> Tensor:
    return iterate(A, method, steps, dtype).contiguous()


def _backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _along(ctx, grad), None, None, None


def _along(ctx: Context, direction: Tensor, *_: None) -> Tensor:
    A, method = ctx.inputs[:2]
    if method != "svd":
        raise NotImplementedError(f"msign: method {method!r} has no derivative; 'svd' has one")
    return _frechet(A, direction)


polar_factor: Callable[..., Tensor] = declare(
    "msign(Tensor A, str method, int? steps, ScalarType? dtype) -> Tensor",
    forward=_forward,
    fake=lambda A, method, steps, dtype: A.new_empty(A.shape),
    backward=_backward,
    jvp=_along,
    batched=("A",),
)
