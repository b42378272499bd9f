"""Diffusion of a network's outputs, which keeps probabilities what they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kantor._checks import is_readable
from kantor.graph._arguments import Similarity, check_choice, check_points, check_similarity
from kantor.graph.diffuse import diffuse
from kantor.graph.graph import Graph
from kantor.graph.implicit_diffuse import implicit_diffuse
from kantor.graph.stability import Mode, check_positivity
from kantor.nn.diffusion_block import DiffusionBlock

POSITIVITY = ("clamp", "row", "implicit", "error")
Positivity = Literal["clamp", "row", "implicit", "error"]


@dataclass(frozen=True)
class OutputInfo:
    """What the last pass through an :class:`OutputDiffusion` had to do.

    Attributes
    ----------
    clamped : int
        Entries below eps that the last `log_prob` raised to it.
    entries : int
        Of how many.
    iterations : int or None
        Of conjugate gradients, with ``positivity="implicit"``.
    converged : bool or None
        Whether they met their tolerance.
    """

    clamped: int
    entries: int
    iterations: int | None = None
    converged: bool | None = None


class OutputDiffusion(DiffusionBlock):
    """Diffusion of outputs on a graph, ``u <- (I - step (D - W)) u``, K times: probabilities, or values to regress.

    Rows that sum to one keep it for any step. Positive entries are sure to stay positive only while
    ``step max_i (D_ii - W_ii) <= 1``; the logarithm of a negative one is NaN, which `positivity` is about.

    Parameters
    ----------
    step : float
        Length of a step, >= 0: the paper's ``sigma^2``.
    num_steps : int
        K >= 0: the paper's number of layers.
    positivity : {"clamp", "row", "implicit", "error"}
        * clamp: `log_prob` raises entries to `eps` first; ``info.clamped`` counts them.
        * row: the random walk ``I - step (I - D^-1 W)``, positive for ``step <= 1``. Nodes without edges stay as they
          are.
        * implicit: one backward Euler step ``(I + step K L)^-1 u``, positive for any step. Symmetric weights.
        * error: StabilityError unless the condition above holds.
    eps : float
        Smallest probability whose logarithm is taken.
    teleport : float
        a in [0, 1): ``u <- (1 - a) (I - step L) u + a u_0``, as in APPNP. Not with "implicit".
    dropout : float
        Before every step, in training mode. Not with "implicit".
    learn_step : bool
        Train the step; see :class:`DiffusionBlock`.
    stability : {"error", "warn", "ignore"}
        What to do about an unstable step; see :func:`kantor.graph.stability`.

    Raises
    ------
    ValueError
        An argument out of range; dropout or teleport with ``positivity="implicit"``.

    Notes
    -----
    The result of `forward` is never clamped, except that "implicit" cuts off what the solve leaves below zero. Memory
    O(n C) also for derivatives, whatever K.

    Source: Wang, Bao and Shi, *Convection-Diffusion Equation: A Theoretically Certified Framework for Neural Networks*,
    arXiv 2403.15726.

    Examples
    --------
    >>> import torch
    >>> from kantor.nn import OutputDiffusion
    >>> star = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    >>> u = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> block = OutputDiffusion(step=0.6, num_steps=1)
    >>> block(u, star)[0]
    tensor([-0.2000,  1.2000])
    >>> bool(block.log_prob(u, star).isfinite().all()), block.info.clamped
    (True, 1)
    """

    def __init__(
        self,
        step: float,
        num_steps: int,
        *,
        positivity: Positivity = "clamp",
        eps: float = 1e-12,
        teleport: float = 0.0,
        dropout: float = 0.0,
        learn_step: bool = False,
        stability: Mode = "error",
    ) -> None:
        check_choice("OutputDiffusion", positivity, "positivity", POSITIVITY)
        if not (isinstance(eps, float) and 0 < eps < 1):
            raise ValueError(f"OutputDiffusion: eps: expected a number in (0, 1), got {eps!r}")
        for option, value in (("dropout", dropout), ("teleport", teleport)):
            if value and positivity == "implicit":
                raise ValueError(
                    f"OutputDiffusion: {option}: expected 0 with positivity='implicit', got {value}; use 'row'"
                )
        super().__init__(step, num_steps, learn_step, dropout, teleport=teleport, stability=stability)
        self.positivity, self.eps = positivity, eps
        self._clamped: Tensor | None = None
        self._entries = 0
        self._solve: tuple[int, bool] | None = None

    def forward(self, u: Tensor, graph: Similarity) -> Tensor:
        """Return the diffused outputs.

        Parameters
        ----------
        u : Tensor
            ``(n, C)``, or ``(B, n, C)`` for a batch.
        graph : Graph or Tensor
            A graph of n nodes, or dense weights ``(n, n)`` or ``(B, n, n)``.

        Returns
        -------
        Tensor
            Shaped like u. For what is raised see :func:`kantor.graph.diffuse`.
        """
        check_points("OutputDiffusion", u, "u")
        check_similarity("OutputDiffusion", graph)
        if self.positivity == "implicit":
            return self._implicit(u, graph)
        if self.positivity == "error":
            check_positivity("OutputDiffusion", graph, self.step, u)
        return diffuse(
            u,
            _random_walk(graph) if self.positivity == "row" else graph,
            self.step,
            self.num_steps,
            dropout=self.dropout if self.training else 0.0,
            teleport=self.teleport,
            stability=self.stability,
        )

    def log_prob(self, u: Tensor, graph: Similarity) -> Tensor:
        """Return ``log(max(u_K, eps))``, finite always; ``info.clamped`` then counts the entries below eps."""
        diffused: Tensor = self(u, graph)
        if is_readable(diffused):
            self._clamped, self._entries = (diffused.detach() < self.eps).sum(), diffused.numel()
        return diffused.clamp(min=self.eps).log()

    @property
    def info(self) -> OutputInfo:
        """What the last pass had to do."""
        clamped = 0 if self._clamped is None else int(self._clamped)
        return OutputInfo(clamped, self._entries, *(self._solve or (None, None)))

    def _implicit(self, u: Tensor, graph: Similarity) -> Tensor:
        if self.num_steps == 0:
            return u.clone()
        nonnegative = is_readable(u) and bool((u.detach() >= 0).all())
        diffused, info = implicit_diffuse(u, graph, self.step * self.num_steps)
        self._solve = info.iterations, info.converged
        # The exact solution has no negative entries then: what is below zero is the error of the solve.
        return diffused.clamp(min=0) if nonnegative else diffused

    def extra_repr(self) -> str:
        """Show what differs from the defaults."""
        return super().extra_repr() + f", positivity={self.positivity!r}"


def _random_walk(graph: Similarity) -> Similarity:
    """``D^-1 W``; rows without weight stay zero. A graph keeps it."""
    if isinstance(graph, Graph):
        return graph._once(graph._of_weight, "random_walk", lambda: graph.normalized("row"))
    degree = graph.sum(-1, keepdim=True)
    return graph / torch.where(degree > 0, degree, 1)


__all__ = ["OutputDiffusion", "OutputInfo"]
