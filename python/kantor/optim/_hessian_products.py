"""Gradients of a training loop with their graphs, and Hessian-vector products through these."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kantor.optim._adahessian_checks import check_loss

Draw = Callable[[list[int]], Sequence[Tensor]]  # numbers of parameters -> a probe like each of them


def evaluate(
    closure: Callable[[], Tensor] | None, parameters: list[Tensor], create_graph: bool
) -> tuple[Tensor | None, list[Tensor | None], bool]:
    """The loss, the gradients, and whether they were taken here rather than by ``backward()``."""
    if closure is None:
        return None, [p.grad if p.requires_grad else None for p in parameters], False
    kept = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        with torch.enable_grad():
            loss = check_loss(closure())
        gradients = [p.grad for p in parameters]
        if any(g is not None for g in gradients):  # backward() in the closure
            kept = gradients
            return loss.detach(), gradients, False
        if not loss.requires_grad:
            raise RuntimeError(
                "AdaHessian.step: closure: the loss has no graph; compute it from the parameters, with gradients on"
            )
        wanted = [i for i, p in enumerate(parameters) if p.requires_grad]
        leaves = [parameters[i] for i in wanted]
        try:
            with torch.enable_grad():
                found = torch.autograd.grad(loss, leaves, create_graph=create_graph, allow_unused=True)
        except RuntimeError as error:
            if "create_graph" in str(error):  # a compiled model may refuse even that
                raise RuntimeError(_no_second_derivative([], str(error))) from error
            raise
        for i, g in zip(wanted, found, strict=True):
            gradients[i] = g
        return loss.detach(), gradients, True
    finally:
        for p, grad in zip(parameters, kept, strict=True):
            p.grad = grad


def cut_graphs(parameters: list[Tensor]) -> None:
    """Break the cycle parameter -> gradient -> graph -> parameter, which would outlive every reference to it."""
    for p in parameters:
        if p.grad is not None and p.grad.grad_fn is not None:
            p.grad = p.grad.detach()


def products(
    gradients: Sequence[Tensor | None],
    parameters: Sequence[Tensor],
    draws: Sequence[Draw],
    name: Callable[[int], str],
    *,
    signed: bool = True,
) -> list[Tensor | None]:
    """The mean over the draws of z * H z, or of H z, for each parameter that has a gradient; frees the graph.

    Where a gradient has no graph, the loss is linear in its parameter, and the product is zero.

    Raises
    ------
    RuntimeError
        An operation without a second derivative; the message has the parameter's name.
    """
    inputs = [i for i, g in enumerate(gradients) if g is not None]
    leaves = [parameters[i] for i in inputs]
    graphs = {i: g for i, g in enumerate(gradients) if g is not None and g.requires_grad}
    total: list[Tensor] = []
    for number, draw in enumerate(draws):
        z = draw(inputs)
        of_graphs = [each for i, each in zip(inputs, z, strict=True) if i in graphs]
        u = _hessian_vector(graphs, leaves, of_graphs, name, retain_graph=number + 1 < len(draws))
        if signed:
            u = list(torch._foreach_mul(u, list(z)))
        if total:
            torch._foreach_add_(total, u)
        else:
            total = u
    if len(draws) > 1:
        torch._foreach_div_(total, len(draws))
    result: list[Tensor | None] = [None] * len(parameters)
    for i, u_i in zip(inputs, total, strict=True):
        result[i] = u_i
    return result


def _hessian_vector(
    graphs: dict[int, Tensor],
    leaves: Sequence[Tensor],
    z: Sequence[Tensor],
    name: Callable[[int], str],
    *,
    retain_graph: bool,
) -> list[Tensor]:
    if not graphs:
        return [torch.zeros_like(p) for p in leaves]
    try:
        found = torch.autograd.grad(list(graphs.values()), leaves, z, retain_graph=retain_graph, allow_unused=True)
    except RuntimeError as error:
        culprits = [name(i) for (i, g), sign in zip(graphs.items(), z, strict=True) if _fails(g, leaves, sign)]
        raise RuntimeError(_no_second_derivative(culprits, str(error))) from error
    if any(h is None for h in found) and (culprits := [name(i) for i, g in graphs.items() if _ends_early(g)]):
        raise RuntimeError(_no_second_derivative(culprits, "an operation is marked once_differentiable"))
    return [torch.zeros_like(p) if h is None else h for h, p in zip(found, leaves, strict=True)]


# What torch calls an operation without a second derivative, and another way to compute the same.
_REMEDIES = {
    "scaled_dot_product": "run the model inside torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)",
    "cudnn_rnn": "run the model inside torch.backends.cudnn.flags(enabled=False)",
    "compile": "compile the model with backend='eager', or not at all",
}


def _no_second_derivative(culprits: list[str], why: str) -> str:
    where = f"the gradient of {', '.join(culprits)}" if culprits else "a gradient"
    remedy = next((f"; {remedy}" for name, remedy in _REMEDIES.items() if name in why), "")
    return (
        f"AdaHessian.step: {where} cannot be differentiated again, and every operation of the loss needs a second "
        f"derivative{remedy}: {why}"
    )


def _ends_early(gradient: Tensor) -> bool:
    """Whether the graph has a node that only raises; autograd passes it by where nothing wanted lies behind it."""
    ahead, seen = [gradient.grad_fn], set()
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            return True
        seen.add(node)
        ahead += [following for following, _ in node.next_functions]
    return False


def _fails(gradient: Tensor, leaves: Sequence[Tensor], z: Tensor) -> bool:
    """Whether this gradient cannot be differentiated, rather than that its graph is half gone."""
    try:
        torch.autograd.grad(gradient, leaves, z, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        return "second time" not in str(error)
    return False
