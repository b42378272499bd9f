"""The diagonal of a Hessian by random probes, and the blocks over which it is averaged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from kantor._checks import check_float, check_tensor
from kantor.optim._multi_tensor import buckets, run, state_dtype

Block = int | str | dict[int, Any] | None


def hessian_diagonal(
    fun: Callable[[list[Tensor]], Tensor],
    params: Iterable[Tensor],
    *,
    n_samples: int = 1,
    estimator: str = "hutchinson",
    block: Block = None,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Estimate the diagonal of the Hessian of a scalar function: the mean of ``z * H z`` over random signs z.

    Parameters
    ----------
    fun : callable
        ``fun(params)``: a scalar, in torch operations that can be differentiated twice. It gets the list, and has to
        use that: ``torch.func.functional_call`` does with a module's parameters.
    params : iterable of Tensor
        The point, float32 or float64, of any shapes. It is not changed.
    n_samples : int
        Probes, one Hessian-vector product each.
    estimator : {"hutchinson"}
        The estimator of Bekas, Kokiopoulou and Saad with Rademacher probes.
    block : None, int, "auto", "row" or dict
        Average over blocks, as :class:`AdaHessian` does; every entry of a block then holds its mean. None: do not.
    generator : torch.Generator, optional
        Where the seed of the probes is drawn from. Default: torch's own.

    Returns
    -------
    list of Tensor
        Like ``params``, signed.

    Raises
    ------
    ValueError, TypeError
        No parameters, not float32 or float64, a value that is not scalar or does not depend on them, options out of
        range.

    Notes
    -----
    Unbiased. The variance of entry i is ``sum_(j != i) H_ij^2 / n_samples``: none for a diagonal Hessian. Products are
    taken forward over reverse, ``jvp`` of ``grad``, in the memory of a gradient; where an operation has no forward-mode
    rule, by double backward. Deterministic for a seed: probes come from Philox, the same on every device.

    References
    ----------
    C. Bekas, E. Kokiopoulou, Y. Saad. *An estimator for the diagonal of a matrix.* Applied Numerical Mathematics 57,
    2007, equation 2.

    Examples
    --------
    >>> import torch
    >>> from kantor.optim import hessian_diagonal
    >>> w = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    >>> hessian_diagonal(lambda params: (params[0] ** 3).sum(), [w])
    [tensor([ 6., 12., 18.], dtype=torch.float64)]
    """
    name = "hessian_diagonal"
    if estimator != "hutchinson":
        raise ValueError(f"{name}: estimator: expected 'hutchinson', got {estimator!r}")
    if not (isinstance(n_samples, int) and n_samples >= 1):
        raise ValueError(f"{name}: n_samples: expected an integer >= 1, got {n_samples!r}")
    if not callable(fun):
        raise TypeError(f"{name}: fun: expected a function of a list of tensors, got {type(fun).__name__}")
    params = [] if isinstance(params, Tensor) else list(params)
    if not params:
        raise ValueError(f"{name}: params: expected a list of at least one tensor; put a single one into a list")
    for number, p in enumerate(params):
        check_float(check_tensor(p, name, f"params[{number}]"), name, f"params[{number}]")
    sizes = [1 if block is None else block_size(p, block, f"{name}: params[{i}]") for i, p in enumerate(params)]
    point = [p.detach() for p in params]
    products = _products(fun, point)
    seed, totals = draw_seed(generator), [torch.zeros_like(p) for p in point]
    for sample in range(n_samples):
        z = rademacher(point, seed, [(position, 0, sample) for position in range(len(point))])
        for total, sign, product in zip(totals, z, products(z), strict=True):
            total.addcmul_(sign, product)
    return [_block_mean(total / n_samples, size) for total, size in zip(totals, sizes, strict=True)]


def _products(fun: Callable[[list[Tensor]], Tensor], point: list[Tensor]) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    """The Hessian-vector product at a point, forward over reverse as long as that works."""
    forward = True

    def scalar(params: list[Tensor]) -> Tensor:
        value = fun(list(params))
        check_tensor(value, "hessian_diagonal", "fun")
        if value.numel() != 1:
            raise ValueError(f"hessian_diagonal: fun: expected a scalar, got shape {tuple(value.shape)}")
        if not value.requires_grad:
            raise ValueError(
                "hessian_diagonal: fun: expected a function of the list that it is given, got a value that does not "
                "depend on it; for a module, compute with torch.func.functional_call"
            )
        return value.reshape(())

    def double_backward(z: list[Tensor]) -> Sequence[Tensor]:
        leaves = [p.clone().requires_grad_() for p in point]
        with torch.enable_grad():
            gradients = torch.autograd.grad(scalar(leaves), leaves, create_graph=True, materialize_grads=True)
        pairs = [(g, sign) for g, sign in zip(gradients, z, strict=True) if g.requires_grad]
        if not pairs:
            return [torch.zeros_like(p) for p in point]
        outputs, signs = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, leaves, signs, materialize_grads=True)

    def product(z: list[Tensor]) -> Sequence[Tensor]:
        nonlocal forward
        if forward:
            try:
                moved: list[Tensor] = torch.func.jvp(torch.func.grad(scalar), (point,), (z,))[1]
                return [each.detach() for each in moved]
            except (
                RuntimeError,
                NotImplementedError,
            ):  # no forward-mode rule, say; if it is the function, it will tell
                forward = False
        return double_backward(z)

    return product


# --- blocks ---


def block_size(p: Tensor, block: Any, where: str) -> int:
    """How many consecutive entries of a parameter share their curvature.

    Parameters
    ----------
    p : Tensor
        The parameter.
    block : int, "auto", "row" or dict
        ``"auto"``: one entry for at most two dimensions; beyond, all entries behind the first two, such as a
        convolution's window. ``"row"``: a row of a matrix, else as ``"auto"``. A dict has a rule per number of
        dimensions, and ``"auto"`` for the others.
    where : str
        Beginning of messages.

    Raises
    ------
    ValueError
        Not one of these, or a number that does not divide the parameter's.
    """
    rule = block.get(p.ndim, "auto") if isinstance(block, dict) else block
    if isinstance(rule, int) and not isinstance(rule, bool):
        if rule < 1 or p.numel() % rule:
            raise ValueError(
                f"{where}: block: expected a divisor of the {p.numel()} entries of shape {tuple(p.shape)}, got {rule}"
            )
        return rule
    if rule not in ("auto", "row"):
        raise ValueError(f"{where}: block: expected an integer, 'auto', 'row', or a dict of these, got {rule!r}")
    size = p.shape[1] if rule == "row" and p.ndim == 2 else math.prod(p.shape[2:])
    return max(1, size)


def _block_mean(values: Tensor, size: int) -> Tensor:
    """Every entry replaced by the mean of its block."""
    if size == 1:
        return values
    return values.reshape(-1, size).mean(1, keepdim=True).expand(-1, size).reshape(values.shape)


# --- probes ---


def draw_seed(generator: torch.Generator | None) -> int:
    """A seed for :func:`rademacher`."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (), dtype=torch.int64, generator=generator, device=device))


def rademacher(like: Sequence[Tensor], seed: int, counters: Sequence[tuple[int, int, int]]) -> list[Tensor]:
    """Random signs, a function of the seed and each tensor's counter (position, draw, sample) alone.

    Source: Philox4x32-10, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; one bit a sign.
    """
    z = [torch.empty(p.shape, dtype=state_dtype(p), device=p.device) for p in like]
    for some in buckets(range(len(z)), lambda i: (z[i].device, z[i].dtype)).values():
        run("rademacher", [[z[i] for i in some]], [1] * len(some), [counters[i] for i in some], seed)
    return [sign.to(p.dtype) for sign, p in zip(z, like, strict=True)]
