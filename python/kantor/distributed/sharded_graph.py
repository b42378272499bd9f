"""A graph whose nodes are shared among processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kantor import linalg
from kantor._ranks import Ranks
from kantor.distributed._halo import Halo
from kantor.distributed._sharded_steps import ShardedSteps
from kantor.distributed.sharded_csr import ShardedCSR, split_rows
from kantor.distributed.shares import gather, split
from kantor.distributed.sum_over_ranks import replicated
from kantor.graph import Graph
from kantor.graph._arguments import check_count, check_points, check_step
from kantor.graph._chebyshev import chebyshev_series
from kantor.graph._native import product
from kantor.graph._recurrence import explicit_step, on_columns, row_sums
from kantor.graph._spectrum import lanczos, lanczos_start
from kantor.graph._validation import check_sign, check_types
from kantor.graph.diffuse import METHODS, Method, check_options
from kantor.graph.implicit_diffuse import solve_steps
from kantor.graph.stability import Limits, Mode, enforce, refuse_asymmetric, report_of
from kantor.linalg import CSR


class ShardedGraph:
    """A graph with non-negative weights whose nodes are cut into contiguous blocks, one for each rank.

    Each rank has the rows of W of its own nodes. :func:`kantor.graph.diffuse` takes it like a graph of one process;
    every rank passes its rows of x and gets its rows of the result. Which nodes of other ranks its edges reach, its
    *ghosts*, is found once, here; a step exchanges their rows of x.

    Parameters
    ----------
    rowptr, col, weight : Tensor
        The rows of this rank's nodes, as in :class:`kantor.graph.Graph`, with `col` counting the nodes of the whole
        graph; there may be none.
    ranks : Ranks, optional
        Default: those of the default group.

    Attributes
    ----------
    n : int
        Nodes of the whole graph.
    num_nodes, num_edges : int
        Of this rank.
    begin : int
        Its first node.
    counts : list of int
        Nodes of every rank.
    ghosts : int
        Nodes of other ranks that its edges reach.
    weight : Tensor
        Of its edges, sorted by row and column; may require a gradient.

    Raises
    ------
    TypeError, ValueError
        On every rank, what :class:`kantor.graph.Graph` raises on one, with the rank in the message.

    Notes
    -----
    Memory: the edges with int32 indices, and one row of x for each node and ghost. A step sends one message to each
    neighbour, for d columns together ``8 d`` bytes in double precision for each node that it has as a ghost.

    Examples
    --------
    >>> import torch
    >>> from kantor.distributed import ShardedGraph
    >>> from kantor.graph import diffuse, from_torch
    >>> path = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    >>> graph = ShardedGraph.from_graph(from_torch(path.to_sparse_csr()))
    >>> x = graph.split(torch.tensor([[4.0], [0.0], [0.0]]))
    >>> diffuse(x, graph, step=0.25, num_steps=1).T
    tensor([[3., 1., 0.]])
    """

    def __init__(self, rowptr: Tensor, col: Tensor, weight: Tensor, ranks: Ranks | None = None) -> None:
        self.ranks = ranks = Ranks() if ranks is None else ranks
        rows = rowptr.numel() - 1 if isinstance(rowptr, Tensor) else -1
        self.counts: list[int] = [row[0] for row in ranks.table(rows)]
        self.n, self.begin = sum(self.counts), sum(self.counts[: ranks.rank])
        with ranks.together():
            check_types(rowptr, col, weight)
            check_sign("ShardedGraph", "weight", weight)
            local = CSR(rowptr, col, weight, (rows, self.n))
        ranks.agree("ShardedGraph", bytes_of_a_weight=local.dtype.itemsize)
        column = local.col.long()
        inside = (column >= self.begin) & (column < self.begin + rows)
        self._needed: Tensor = torch.unique(column[~inside])
        self._halo = Halo(self._needed, self.counts, ranks)
        # Own nodes first, then the ghosts, whose rows are empty. Entries keep their order, so that sums over a row are
        # those of one process.
        numbers = torch.where(inside, column - self.begin, rows + torch.searchsorted(self._needed, column))
        pointers = torch.cat([local.crow, local.crow[-1:].expand(self.ghosts)])
        self._extended = Graph._trusted(pointers.int(), numbers.int(), local.values)
        self._limits: tuple[int, Limits] | None = None

    @classmethod
    def from_graph(
        cls, graph: Graph | None, ranks: Ranks | None = None, *, counts: Sequence[int] | None = None,
        source: int | None = None,
    ) -> ShardedGraph:  # fmt: skip
        """Cut a whole graph into blocks of nodes; :meth:`Graph.permute` can bring neighbours together before.

        Parameters
        ----------
        graph : Graph or None
            All ranks hold it, or `source` alone, and the others pass None.
        ranks : Ranks, optional
            Default: those of the default group.
        counts : sequence of int, optional
            Nodes for each rank. Default: equal but for one.
        source : int, optional
            The rank that deals out the nodes.
        """
        ranks = Ranks() if ranks is None else ranks
        matrix: CSR | None = None
        with ranks.together():
            if source is None or ranks.rank == source:
                if not isinstance(graph, Graph):
                    raise TypeError(f"ShardedGraph.from_graph: graph: expected a Graph, got {type(graph).__name__}")
                matrix = CSR(graph.rowptr, graph.col, graph.weight, (graph.num_nodes, graph.num_nodes))
        return cls(*split_rows("ShardedGraph.from_graph", matrix, ranks, counts, source), ranks)

    # --- what it is ---

    @property
    def num_nodes(self) -> int:
        """Of this rank."""
        return self.counts[self.ranks.rank]

    @property
    def num_edges(self) -> int:
        """Of this rank."""
        return self._extended.num_edges

    @property
    def ghosts(self) -> int:
        """Nodes of other ranks that this one's edges reach."""
        return self._needed.numel()

    @property
    def weight(self) -> Tensor:
        """Of this rank's edges, sorted by row and column."""
        return self._extended.weight

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        """Of this rank's tensors."""
        return self.weight.device

    def split(self, x: Tensor | None, source: int | None = None) -> Tensor:
        """Return this rank's rows of x ``(n, d)`` or ``(B, n, d)``, which all hold or `source` deals out."""
        return split(x, self.ranks, self.counts, dim=-2, source=source)

    def gather(self, x: Tensor, target: int | None = None) -> Tensor | None:
        """Return all rows from those of each rank, on every rank, or on `target` and None elsewhere."""
        return gather(x, self.ranks, dim=-2, target=target)

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"ShardedGraph({self.n} nodes, {dtype}, {self.device}; rank {self.ranks.rank} of {self.ranks.size}: "
            f"{self.num_nodes} nodes, {self.num_edges} edges, {self.ghosts} ghosts)"
        )

    # --- diffusion ---

    def diffuse(
        self,
        x: Tensor,
        step: float | Tensor,
        num_steps: int,
        *,
        method: Method = "explicit",
        dropout: float = 0.0,
        teleport: float = 0.0,
        seed: int | None = None,
        stability: Mode = "error",
    ) -> Tensor:
        """Diffuse this rank's rows of x: :func:`kantor.graph.diffuse`, which calls it. All ranks call it together.

        The explicit method gives the bits of one process, dropout included, but for teleport; method "propagator" is
        not available. Derivatives for x, weights and a step that all ranks have alike; those for weights and step keep
        all states.
        """
        ranks = self.ranks
        with ranks.together():
            x = check_points("diffuse", x)
            for what, mine, its in (("device", x.device, self.device), ("dtype", x.dtype, self.dtype)):
                if mine != its:
                    raise ValueError(f"diffuse: x has {what} {mine}, graph {its}; convert one with .to({what})")
            if x.shape[-2] != self.num_nodes:
                raise ValueError(
                    f"diffuse: x: expected {self.num_nodes} rows, one for each node of this rank, got {x.shape[-2]}"
                )
            step = check_step("diffuse", step, like=self._extended)
            num_steps = check_count("diffuse", num_steps)
            dropout, teleport, seed = check_options(method, dropout, teleport, seed, stability)
            if method == "propagator":
                raise ValueError("diffuse: method: 'propagator' needs its matrix in one process; use 'explicit'")
        columns = x.shape[-1] * math.prod(x.shape[:-2])
        trained = self.weight.requires_grad or (isinstance(step, Tensor) and step.requires_grad)
        ranks.agree(
            "diffuse", step=float(step.detach() if isinstance(step, Tensor) else step), num_steps=num_steps,
            columns=columns, dropout=dropout, teleport=teleport, method=METHODS.index(method),
            checked=stability != "ignore", x_requires_grad=x.requires_grad, graph_or_step_requires_grad=trained,
        )  # fmt: skip
        if num_steps == 0 or columns == 0 or self.n == 0:
            return x.clone()
        if isinstance(step, Tensor) and step.requires_grad:
            step = replicated(step, ranks)
        if method == "implicit":
            self._require_symmetric("conjugate gradients")
            return solve_steps(x, [self._backward_euler(step * num_steps)], 1, *self._tolerances(), 500, True)[0]
        if method == "chebyshev":
            self._require_symmetric("method 'chebyshev'")
            return chebyshev_series(x, step * num_steps, self._lambda_max_bound(), self._steps_of)
        if stability != "ignore":
            self._check_stability(float(step.detach() if isinstance(step, Tensor) else step), stability)
        if dropout:
            seed = int(ranks.broadcast_object(int(torch.randint(2**62, ())) if seed is None else seed))
        return self._explicit(x, step, num_steps, teleport, dropout, seed or 0)

    def _explicit(
        self, x: Tensor, step: float | Tensor, num_steps: int, teleport: float, dropout: float, seed: int
    ) -> Tensor:
        edge, diagonal = explicit_step(self._extended, step)
        if teleport:
            edge, diagonal = (1 - teleport) * edge, (1 - teleport) * diagonal
        steps = ShardedSteps(self._extended, self._halo, edge, diagonal, num_steps, teleport, dropout, seed, self.begin)
        return on_columns(x, steps)

    def _steps_of(self, length: float) -> Callable[[Tensor], Tensor]:
        return lambda y: self._explicit(y, length, 1, 0.0, 0.0, 0)

    def _tolerances(self) -> tuple[float, float]:
        return (1e-10 if self.dtype == torch.float64 else 1e-7), 0.0

    def _backward_euler(self, tau: float | Tensor) -> linalg.LinearOperator:
        """``I + tau (D - W)``."""
        scaled = tau * self.weight.double()
        degree = row_sums(self._extended, scaled)[: self.num_nodes]
        rows = self._extended.rows
        numbers = torch.cat([torch.arange(self.num_nodes, device=self.device) + self.begin, self._needed])
        own = torch.arange(self.num_nodes, device=self.device)
        local = CSR.from_coo(
            torch.cat([rows, own]), torch.cat([numbers[self._extended.col.long()], numbers[own]]),
            torch.cat([-scaled, 1 + degree]), (self.num_nodes, self.n),
        )  # fmt: skip
        return ShardedCSR(local.crow, local.col, local.values, self.ranks)

    # --- what the weights allow ---

    def _times(self, weight: Tensor, x: Tensor) -> Tensor:
        """``W x`` with other weights; x is ``(num_nodes,)``."""
        both = torch.cat([x, self._halo.start(x)()])
        return product(self._extended.rowptr, self._extended.col, weight, both[:, None])[: self.num_nodes, 0]

    @torch.no_grad()
    def _without_loops(self) -> tuple[Tensor, Tensor, float]:
        """Weights without self loops and their row sums, double, and the largest sum on any rank."""
        weight = self.weight.detach().double().masked_fill(self._extended.rows == self._extended.col, 0.0)
        degree = row_sums(self._extended, weight)[: self.num_nodes]
        (largest,) = self.ranks.max(float(degree.max()) if len(degree) else 0.0)
        return weight, degree, largest

    @torch.no_grad()
    def _lambda_max_bound(self) -> float:
        """:meth:`Graph.lambda_max_bound` of the whole graph."""
        weight, degree, largest = self._without_loops()
        share = degree / max(largest, torch.finfo(torch.float64).tiny)
        reached = self._times(weight, share)
        mean = torch.where(share > 0, reached / torch.where(share > 0, share, 1), 0)
        (bound,) = self.ranks.max(float((degree + mean).max()) if len(degree) else 0.0)
        return bound

    @torch.no_grad()
    def _lambda_max(self) -> float:
        """:meth:`Graph.lambda_max` of the whole graph."""
        weight, degree, largest = self._without_loops()
        if largest == 0:
            return 0.0
        weight, degree = weight / largest, degree / largest
        start = lanczos_start(degree, seed=self.ranks.rank)
        return largest * lanczos(
            lambda v: degree * v - self._times(weight, v), lambda v, w: self.ranks.sum(float(v @ w))[0], start, self.n
        )

    def _symmetric(self) -> bool:
        """Whether ``W = W'``, as far as a probe shows."""
        weight = self.weight.detach().double()
        probe = linalg.Callable(
            lambda v: self._times(weight, v.reshape(-1)).reshape(v.shape), self.num_nodes, device=self.device,
            ranks=self.ranks,
        )  # fmt: skip
        return probe.asymmetry()[0] <= 100 * torch.finfo(self.dtype).eps

    def _require_symmetric(self, what: str) -> None:
        if not self._known_limits().symmetric:
            refuse_asymmetric("diffuse", what)

    def _known_limits(self) -> Limits:
        """Found once for the present weights, by all ranks together."""
        version = self.weight._version
        known = self._limits if self._limits is not None and self._limits[0] == version else None
        (missing,) = self.ranks.max(known is None)
        if missing or known is None:
            limits = Limits(self._symmetric(), self._without_loops()[2], 16 * torch.finfo(self.dtype).eps)
            known = self._limits = version, limits
        return known[1]

    def _check_stability(self, step: float, mode: str) -> None:
        limits = self._known_limits()
        if step * limits.max_rate > 1 + limits.rounding:
            top = self._lambda_max() if limits.symmetric else math.nan
            bound = self._lambda_max_bound() if limits.symmetric else math.inf
            enforce("diffuse", report_of(step, limits, top, bound), mode, depth=5)


__all__ = ["ShardedGraph"]
