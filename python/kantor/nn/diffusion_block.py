"""Diffusion on a graph as a layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from kantor.graph._arguments import Similarity, check_choice, check_count, check_fraction, check_step
from kantor.graph.diffuse import METHODS, Method, diffuse
from kantor.graph.stability import MODES, Mode


class DiffusionBlock(nn.Module):
    """Steps of diffusion on a graph, ``x <- (I - step (D - W))^num_steps x``: a layer without weights.

    It goes anywhere in a network that sees all points at once. Connected points move together, so that classes become
    separable from few labels.

    Parameters
    ----------
    step : float
        Length of a step, >= 0.
    num_steps : int
        K >= 0.
    learn_step : bool
        Train the step: the parameter is ``raw_step``, and ``step = softplus(raw_step)``, so that it stays positive. It
        may still grow beyond what is stable on the graph, which `stability` is about.
    dropout : float
        Probability with which entries are set to zero before every step, in training mode only.
    method : {"explicit", "implicit", "propagator", "chebyshev"}
        See :func:`kantor.graph.diffuse`.
    teleport : float
        See :func:`kantor.graph.diffuse`.
    stability : {"error", "warn", "ignore"}
        What to do about an unstable step; see :func:`kantor.graph.stability`.

    Attributes
    ----------
    step : float or Tensor
        The step, or what the parameter makes it.

    Raises
    ------
    ValueError
        An argument out of range; ``step=0`` with `learn_step`.

    Notes
    -----
    Memory O(n d) also for derivatives, whatever K. Weights ``graph.weight`` may require a gradient.

    Source: Wang, Dou, Bao and Shi, *Diffusion Mechanism in Residual Neural Network: Theory and Applications*, IEEE
    TPAMI 46(2), 2024.

    Examples
    --------
    >>> import torch
    >>> from kantor.nn import DiffusionBlock
    >>> path = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    >>> block = DiffusionBlock(step=0.25, num_steps=1)
    >>> block(torch.tensor([[4.0], [0.0], [0.0]]), path).T
    tensor([[3., 1., 0.]])
    """

    def __init__(
        self,
        step: float,
        num_steps: int,
        learn_step: bool = False,
        dropout: float = 0.0,
        *,
        method: Method = "explicit",
        teleport: float = 0.0,
        stability: Mode = "error",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self._step = float(check_step(name, step))
        self.num_steps = check_count(name, num_steps)
        self.dropout = check_fraction(name, dropout, "dropout")
        self.teleport = check_fraction(name, teleport, "teleport")
        check_choice(name, method, "method", METHODS)
        check_choice(name, stability, "stability", MODES)
        self.method, self.stability = method, stability
        for option, value in (("dropout", self.dropout), ("teleport", self.teleport)):
            if value and method != "explicit":
                raise ValueError(f"{name}: {option}: expected 0 with method={method!r}, got {value}; use 'explicit'")
        if learn_step and self._step == 0:
            raise ValueError(f"{name}: step: expected a number > 0 with learn_step, got 0")
        inverse_softplus = self._step + math.log(-math.expm1(-self._step)) if learn_step else 0.0
        self.raw_step = nn.Parameter(torch.tensor(inverse_softplus)) if learn_step else None

    @property
    def step(self) -> float | Tensor:
        """Length of a step."""
        return self._step if self.raw_step is None else functional.softplus(self.raw_step)

    @property
    def is_random(self) -> bool:
        """Whether dropout acts now."""
        return self.training and self.dropout > 0

    def forward(self, x: Tensor, graph: Similarity) -> Tensor:
        """Return the diffused values.

        Parameters
        ----------
        x : Tensor
            ``(n, d)``, or ``(B, n, d)`` for a batch.
        graph : Graph or Tensor
            A graph of n nodes, or dense weights ``(n, n)`` or ``(B, n, n)``.

        Returns
        -------
        Tensor
            Shaped like x. For what is raised see :func:`kantor.graph.diffuse`.
        """
        return diffuse(
            x,
            graph,
            self.step,
            self.num_steps,
            method=self.method,
            dropout=self.dropout if self.training else 0.0,
            teleport=self.teleport,
            stability=self.stability,
        )

    def extra_repr(self) -> str:
        """Show what differs from the defaults."""
        with torch.no_grad():
            step = f"{float(self.step):.4g}" + (" (learned)" if self.raw_step is not None else "")
        options = [f"step={step}", f"num_steps={self.num_steps}"]
        options += [f"method={self.method!r}"] if self.method != "explicit" else []
        options += [f"dropout={self.dropout:g}"] if self.dropout else []
        options += [f"teleport={self.teleport:g}"] if self.teleport else []
        options += [f"stability={self.stability!r}"] if self.stability != "error" else []
        return ", ".join(options)


__all__ = ["DiffusionBlock"]
