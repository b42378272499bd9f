"""Optimal Brain Surgeon pruning with the empirical Fisher matrix of M-FAC."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kantor._checks import check_finite, check_tensor
from kantor.optim._fisher_checks import check_gradient
from kantor.optim.empirical_fisher import EmpiricalFisher


@torch.no_grad()
def prune_obs(
    model_or_params: nn.Module | Mapping[str, Tensor] | Iterable[Tensor],
    grads: Tensor | None,
    sparsity: float,
    *,
    damping: float = 1e-5,
    block_size: int | None = 128,
    n_recompute: int = 16,
    grad_fn: Callable[[int], Tensor] | None = None,
    per_layer: bool = False,
    mask: Any = None,
) -> dict[str, Any]:
    """Remove the weights whose loss by removal is least, and move the others to make up for it, in place.

    With F the empirical Fisher matrix for the Hessian, removing weight j costs ``rho_j = w_j^2 / (2 [F^-1]_jj)``, and
    the others follow by ``-w_j / [F^-1]_jj`` times column j of ``F^-1``.

    Parameters
    ----------
    model_or_params : Module, dict of tensors or iterable of tensors
        The weights, on one device. Of a module: the weights of its linear and convolutional layers, under their names
        (that of the first one where layers share it); biases and norms are left alone. They are changed in place.
    grads : Tensor or None
        ``(m, d)``: gradients of the loss on m small batches, for all these weights in this order, flattened; model in
        evaluation mode. None: ``grad_fn(0)``.
    sparsity : float
        Share of zeros to reach, in [0, 1).
    damping, block_size
        Of the :class:`EmpiricalFisher`.
    n_recompute : int
        Steps in which it is reached: shares of remaining weights are a geometric sequence, and F is that of the
        remaining weights, formed anew in each step.
    grad_fn : callable, optional
        ``grad_fn(k)`` gives fresh gradients ``(m, d)`` for step k = 1, 2, ..., at the weights as they are then.
        Default: the first ones again.
    per_layer : bool
        The sparsity in each tensor, instead of one ranking over all.
    mask : like the first argument, optional
        False where a weight is gone already; it stays gone. Default: all there; zeros are weights like others, and may
        move.

    Returns
    -------
    dict
        ``mask`` (bool, what remains), ``delta`` (what was added to the weights) and ``saliency`` (``rho`` when it was
        last known), each a dict by name, or a list for an iterable. ``torch.nn.utils.prune.custom_from_mask`` takes the
        masks.

    Raises
    ------
    ValueError, TypeError
        Options out of range; gradients or masks of another shape; a sparsity below that of `mask`; weights that are not
        finite, are given twice, or are computed from others (``torch.nn.utils.prune``, parametrizations). When it
        raises, the weights are as before.

    Notes
    -----
    Deterministic; a tie removes the weight that comes first. The number of zeros is rounded, so that a small tensor may
    lose all of its weights. ``n_recompute (m^2 d + d/B m^3)`` operations for blocks of
    B. The updates of weights removed in one step are formed together, as if they were independent.

    Source: Frantar et al., arXiv 2107.03356, section 3; Hassibi & Stork, *Second order derivatives for network
    pruning*, NIPS 1992.

    Examples
    --------
    >>> import torch
    >>> from kantor.optim import prune_obs
    >>> generator = torch.Generator().manual_seed(0)
    >>> w = torch.tensor([1.0, 0.1, -2.0, 0.02])
    >>> pruned = prune_obs([w], torch.randn(32, 4, generator=generator), 0.5)
    >>> pruned["mask"][0]
    tensor([ True, False,  True, False])
    """
    names, weights = _weights(model_or_params)
    if not 0 <= sparsity < 1:
        raise ValueError(f"prune_obs: sparsity: expected a number in [0, 1), got {sparsity!r}")
    if not (isinstance(n_recompute, int) and n_recompute >= 1):
        raise ValueError(f"prune_obs: n_recompute: expected an integer >= 1, got {n_recompute!r}")
    if grads is None and grad_fn is None:
        raise ValueError("prune_obs: grads: expected gradients (m, d), or grad_fn, got neither")
    sizes = [weight.numel() for weight in weights]
    before = _flat(weights).double()
    check_finite(before, "prune_obs", "weights")
    alive = _alive(mask, names, weights)
    w = torch.where(alive, before, 0.0)
    saliency = torch.zeros_like(w)
    layers = list(torch.arange(len(w), device=w.device).split(sizes)) if per_layer else [slice(None)]
    kept_before = [int(alive[layer].sum()) for layer in layers]
    kept_after = [len(w[layer]) - round(sparsity * len(w[layer])) for layer in layers]
    if any(after > start for after, start in zip(kept_after, kept_before, strict=True)):
        raise ValueError(f"prune_obs: sparsity: expected at least that of mask, got {sparsity}")
    try:
        for k in range(n_recompute):
            if grad_fn is not None and (k > 0 or grads is None):
                _write(w, weights)
                with torch.enable_grad():
                    grads = grad_fn(k)
            rows = check_gradient(grads, "prune_obs", "grads")
            if rows.ndim != 2 or rows.shape[1] != len(w):
                raise ValueError(f"prune_obs: grads: expected shape (m, {len(w)}), got {tuple(rows.shape)}")
            if rows.device != w.device:
                raise ValueError(f"prune_obs: grads are on {rows.device}, the weights on {w.device}; move them")
            remaining = alive.nonzero().squeeze(1)
            if not len(remaining):
                break
            fisher = EmpiricalFisher(rows[:, remaining], damping=damping, block_size=block_size)
            diagonal = torch.ones_like(w)
            diagonal[remaining] = fisher.diag_inverse().double()
            saliency = torch.where(alive, w.square() / (2 * diagonal), saliency)
            # Step k of the geometric path: start (after / start)^((k + 1) / n).
            for layer, start, after in zip(layers, kept_before, kept_after, strict=True):
                share = (k + 1) / n_recompute
                kept = after if k + 1 == n_recompute else round(start * (after / start) ** share) if start else 0
                _drop_least(alive, saliency, layer, kept)
            removed = ~alive[remaining]
            target = torch.where(removed, -w[remaining] / diagonal[remaining], 0.0)
            w[remaining] += fisher.ihvp(target).double()
            w[~alive] = 0
        _write(w, weights)
    except BaseException:
        _write(before, weights)
        raise

    def shaped(flat: Tensor, like: bool = True) -> Any:
        parts = [
            part.view(weight.shape).to(weight.dtype if like else part.dtype)
            for part, weight in zip(flat.split(sizes), weights, strict=True)
        ]
        return parts if names is None else dict(zip(names, parts, strict=True))

    return {
        "mask": shaped(alive, like=False),
        "delta": shaped(_flat(weights).double() - before),
        "saliency": shaped(saliency),
    }


def _drop_least(alive: Tensor, saliency: Tensor, layer: Any, kept: int) -> None:
    """Leave the `kept` largest of the layer's remaining weights."""
    index = torch.arange(len(alive), device=alive.device)[layer]
    index = index[alive[index]]
    order = torch.argsort(saliency[index], stable=True)
    alive[index[order[: len(index) - kept]]] = False


def _weights(source: Any) -> tuple[list[str] | None, list[Tensor]]:
    if isinstance(source, nn.Module):
        source = _of_layers(source)
    elif isinstance(source, Tensor):
        raise TypeError("prune_obs: params: expected an iterable of tensors, got a tensor; put it into a list")
    names = list(source) if isinstance(source, Mapping) else None
    weights = list(source.values()) if isinstance(source, Mapping) else list(source)
    if not weights:
        raise ValueError("prune_obs: params: expected at least one tensor, got none")
    for number, weight in enumerate(weights):
        name = f"params[{number if names is None else repr(names[number])}]"
        if not check_tensor(weight, "prune_obs", name).is_floating_point():
            raise TypeError(f"prune_obs: {name}: expected a real floating-point dtype, got {weight.dtype}")
        if weight.device != weights[0].device:
            raise ValueError(f"prune_obs: {name} is on {weight.device}, others on {weights[0].device}; move it")
        if any(weight is other for other in weights[:number]):
            raise ValueError(f"prune_obs: {name}: expected every weight once, got it twice")
    return names, weights


def _of_layers(model: nn.Module) -> dict[str, Tensor]:
    """The weights of linear and convolutional layers by name, each once."""
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            continue
        name = f"{prefix}.weight" if prefix else "weight"
        if not isinstance(module.weight, nn.Parameter):
            raise ValueError(
                f"prune_obs: model: {name}: expected a parameter, got a tensor that is computed from others; make it "
                "one first, with torch.nn.utils.prune.remove or torch.nn.utils.parametrize.remove_parametrizations"
            )
        if not any(module.weight is weight for weight in found.values()):
            found[name] = module.weight
    if not found:
        raise ValueError("prune_obs: model: expected linear or convolutional layers, got none; pass the parameters")
    return found


def _alive(mask: Any, names: list[str] | None, weights: list[Tensor]) -> Tensor:
    if mask is None:
        return torch.ones(sum(weight.numel() for weight in weights), dtype=torch.bool, device=weights[0].device)
    if isinstance(mask, Mapping):
        if names is None or set(mask) != set(names):
            raise ValueError(f"prune_obs: mask: expected {names or 'a list'}, got a dict of {sorted(mask)}")
        mask = [mask[name] for name in names]
    masks = [check_tensor(part, "prune_obs", f"mask[{number}]") for number, part in enumerate(mask)]
    shapes = [tuple(weight.shape) for weight in weights]
    if [tuple(part.shape) for part in masks] != shapes:
        raise ValueError(f"prune_obs: mask: expected shapes {shapes}, got {[tuple(part.shape) for part in masks]}")
    return torch.cat([part.reshape(-1).bool() for part in masks]).to(weights[0].device)


def _flat(weights: list[Tensor]) -> Tensor:
    return torch.cat([weight.detach().reshape(-1) for weight in weights])


def _write(w: Tensor, weights: list[Tensor]) -> None:
    for part, weight in zip(w.split([weight.numel() for weight in weights]), weights, strict=True):
        weight.copy_(part.view(weight.shape))
