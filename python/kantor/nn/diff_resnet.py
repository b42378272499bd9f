"""The diffusion residual network: features move along a graph before they are classified."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from kantor.graph._arguments import Similarity, check_choice
from kantor.graph.diffuse import Method
from kantor.graph.stability import Mode
from kantor.nn._residual import ResidualBlock, check_size
from kantor.nn.diffusion_block import DiffusionBlock


class DiffResNet(nn.Module):
    """Residual block, diffusion on a graph, linear classifier: for many points of which few have labels.

    All points pass through at once, with labels and without; the loss sees the rows that have one.

    Parameters
    ----------
    in_features : int
        d, columns of x.
    num_classes : int
        C, columns of the result.
    step, num_steps : float, int
        Of the diffusion; see :class:`DiffusionBlock`.
    residual : {"one_layer", "two_layer"}
        ``x + relu(A x + a)``, the paper's for citation graphs, or ``x + B relu(A x + a) + b``.
    hidden : int, optional
        Width of the hidden layer of "two_layer". Default: d.
    dropout : float
        Before every diffusion step, in training mode.
    learn_step, method, teleport, stability
        See :class:`DiffusionBlock`.

    Attributes
    ----------
    residual, diffusion, classifier : torch.nn.Module
        The three parts.

    Raises
    ------
    ValueError
        An argument out of range.

    Notes
    -----
    Without dropout the classifier goes first: ``(P h) C' = P (h C')``, so that C columns are diffused instead of d,
    the same to rounding.

    Source: Wang, Dou, Bao and Shi, *Diffusion Mechanism in Residual Neural Network: Theory and Applications*, IEEE
    TPAMI 46(2), 2024.

    Examples
    --------
    >>> import torch
    >>> from kantor.graph import knn_graph
    >>> from kantor.nn import DiffResNet
    >>> x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    >>> model = DiffResNet(8, 3, step=0.5, num_steps=10)
    >>> model(x, knn_graph(x, k=7)).shape
    torch.Size([100, 3])
    """

    accepts_sparse = True  # features in sparse CSR

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        step: float,
        num_steps: int,
        residual: Literal["one_layer", "two_layer"] = "one_layer",
        dropout: float = 0.0,
        *,
        hidden: int | None = None,
        learn_step: bool = False,
        method: Method = "explicit",
        teleport: float = 0.0,
        stability: Mode = "error",
    ) -> None:
        super().__init__()
        check_size("DiffResNet", in_features, "in_features")
        check_size("DiffResNet", num_classes, "num_classes")
        check_choice("DiffResNet", residual, "residual", ("one_layer", "two_layer"))
        if hidden is not None:
            check_size("DiffResNet", hidden, "hidden")
            if residual == "one_layer":
                raise ValueError(
                    f"DiffResNet: hidden: expected None with residual='one_layer', got {hidden}; use 'two_layer'"
                )
        width = (hidden or in_features) if residual == "two_layer" else None
        self.residual = ResidualBlock(in_features, width)
        self.diffusion = DiffusionBlock(
            step, num_steps, learn_step, dropout, method=method, teleport=teleport, stability=stability
        )
        self.classifier = nn.Linear(in_features, num_classes)

    def forward(self, x: Tensor, graph: Similarity) -> Tensor:
        """Return scores, one a class: their softmax are probabilities.

        Parameters
        ----------
        x : Tensor
            ``(n, d)``, also in sparse CSR, or ``(B, n, d)`` for a batch.
        graph : Graph or Tensor
            A graph of n nodes, or dense weights ``(n, n)`` or ``(B, n, n)``.

        Returns
        -------
        Tensor
            ``(n, C)`` or ``(B, n, C)``. For what is raised see :func:`kantor.graph.diffuse`.
        """
        if self.diffusion.is_random or self.classifier.out_features >= self.classifier.in_features:
            scores: Tensor = self.classifier(self.features(x, graph))
            return scores
        # Constants are fixed points of the diffusion: the bias may come after it.
        columns: Tensor = self.diffusion(functional.linear(self.residual(x), self.classifier.weight), graph)
        return columns + self.classifier.bias

    def features(self, x: Tensor, graph: Similarity) -> Tensor:
        """Return what the classifier sees, ``(n, d)``: features after the residual block and diffusion."""
        result: Tensor = self.diffusion(self.residual(x), graph)
        return result


__all__ = ["DiffResNet"]
