"""The convection-diffusion network COIN: a network whose outputs diffuse on a graph."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from kantor.graph._arguments import Similarity, check_choice
from kantor.graph.stability import Mode
from kantor.nn._residual import ResidualBlock, SkipNetwork, check_size
from kantor.nn.output_diffusion import OutputDiffusion, OutputInfo, Positivity

HEADS = ("softmax", "sigmoid", "linear")


class COIN(nn.Module):
    """Convection-diffusion network: ``u = head(base(x))``, then steps of diffusion of u on a graph.

    The residual network carries the outputs along characteristics (convection); the diffusion, which it lacks, acts on
    the outputs themselves: few columns, no weights.

    Parameters
    ----------
    in_features : int
        d, columns of x.
    num_classes : int
        C, columns of the result.
    step : float
        Length of a step, the paper's ``sigma^2``.
    num_steps : int
        K, the paper's number of layers.
    head : {"softmax", "sigmoid", "linear"}
        What makes outputs of the base's scores, and which base is the default:

        * softmax: probabilities of C >= 2 classes; ``C (x + relu(A x + a)) + c``, with `hidden`
          ``C (x + B relu(A x + a) + b) + c``.
        * sigmoid: a probability in every column; ``S x + B relu(A x)``.
        * linear: values; ``S x + B elu(A x)``.
    hidden : int, optional
        Width of the hidden layer. Default: none for softmax, 3 for sigmoid, 16 for linear.
    base : torch.nn.Module, optional
        A network of your own: takes x, returns scores ``(n, C)``, to which the head is applied.
    positivity, eps, teleport, dropout, learn_step, stability
        Of the diffusion; see :class:`OutputDiffusion`.

    Attributes
    ----------
    base : torch.nn.Module
        The network before the diffusion.
    diffusion : OutputDiffusion
        The steps.

    Raises
    ------
    TypeError
        base is no Module.
    ValueError
        An argument out of range; fewer than two classes with softmax; `hidden` beside `base`.

    Notes
    -----
    Train on `log_prob` (softmax, with ``nll_loss`` on the labelled rows) or on the result of `forward`
    (``mse_loss``; for sigmoid ``binary_cross_entropy`` of the result clamped to [0, 1]).

    Source: Wang, Bao and Shi, *Convection-Diffusion Equation: A Theoretically Certified Framework for Neural Networks*,
    arXiv 2403.15726.

    Examples
    --------
    >>> import torch
    >>> from kantor.graph import knn_graph
    >>> from kantor.nn import COIN
    >>> x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    >>> model = COIN(8, 3, step=0.5, num_steps=10)
    >>> u = model(x, knn_graph(x, k=7))
    >>> u.shape, bool((u.sum(1) - 1).abs().max() < 1e-5)
    (torch.Size([100, 3]), True)
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        step: float,
        num_steps: int,
        *,
        head: Literal["softmax", "sigmoid", "linear"] = "softmax",
        hidden: int | None = None,
        base: nn.Module | None = None,
        positivity: Positivity = "clamp",
        eps: float = 1e-12,
        teleport: float = 0.0,
        dropout: float = 0.0,
        learn_step: bool = False,
        stability: Mode = "error",
    ) -> None:
        super().__init__()
        check_size("COIN", in_features, "in_features")
        check_size("COIN", num_classes, "num_classes")
        check_choice("COIN", head, "head", HEADS)
        if head == "softmax" and num_classes < 2:
            raise ValueError(
                f"COIN: num_classes: expected at least 2 with head='softmax', got {num_classes}; for one probability a "
                "row use head='sigmoid'"
            )
        if hidden is not None:
            check_size("COIN", hidden, "hidden")
        if base is not None and not isinstance(base, nn.Module):
            raise TypeError(f"COIN: base: expected a torch.nn.Module, got {type(base).__name__}")
        if base is not None and hidden is not None:
            raise ValueError(f"COIN: hidden: expected None beside a base of your own, got {hidden}")
        self.head = head
        self.accepts_sparse = base is None  # features in sparse CSR
        self.base = base if base is not None else _default_base(in_features, num_classes, head, hidden)
        self.diffusion = OutputDiffusion(
            step,
            num_steps,
            positivity=positivity,
            eps=eps,
            teleport=teleport,
            dropout=dropout,
            learn_step=learn_step,
            stability=stability,
        )

    def forward(self, x: Tensor, graph: Similarity) -> Tensor:
        """Return the diffused outputs: probabilities, or values with a linear head.

        Parameters
        ----------
        x : Tensor
            ``(n, d)``, or ``(B, n, d)`` for a batch.
        graph : Graph or Tensor
            A graph of n nodes, or dense weights ``(n, n)`` or ``(B, n, n)``.

        Returns
        -------
        Tensor
            ``(n, C)`` or ``(B, n, C)``. For what is raised see :class:`OutputDiffusion`.
        """
        u: Tensor = self.diffusion(self._outputs(x), graph)
        return u

    def log_prob(self, x: Tensor, graph: Similarity) -> Tensor:
        """Return ``log(max(u, eps))`` of the diffused probabilities, shaped like them; finite always.

        Raises
        ------
        ValueError
            The head is linear: values have no logarithm. For the rest see :meth:`forward`.
        """
        if self.head == "linear":
            raise ValueError("COIN.log_prob: head: expected 'softmax' or 'sigmoid', got 'linear'; use forward")
        return self.diffusion.log_prob(self._outputs(x), graph)

    @property
    def info(self) -> OutputInfo:
        """What the last pass had to do: ``info.clamped`` entries were raised to eps by `log_prob`."""
        return self.diffusion.info

    def _outputs(self, x: Tensor) -> Tensor:
        scores: Tensor = self.base(x)
        if self.head == "softmax":
            return scores.softmax(-1)
        return scores.sigmoid() if self.head == "sigmoid" else scores

    def extra_repr(self) -> str:
        """Name the head."""
        return f"head={self.head!r}"


def _default_base(in_features: int, num_classes: int, head: str, hidden: int | None) -> nn.Module:
    if head == "softmax":
        return nn.Sequential(ResidualBlock(in_features, hidden), nn.Linear(in_features, num_classes))
    if head == "sigmoid":
        return SkipNetwork(in_features, num_classes, hidden or 3, torch.relu)
    return SkipNetwork(in_features, num_classes, hidden or 16, functional.elu)


__all__ = ["COIN"]
