"""Weighted graphs in compressed sparse row form.

One class, half of it docstrings: what is computed stands in `_pattern`, `_spectrum`, `_validation` and `_picture`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from kantor import _C
from kantor._checks import check_finite, check_float, check_same, check_tensor, host, is_readable
from kantor.graph import _pattern, _spectrum
from kantor.graph._native import product, rows_of
from kantor.graph._pattern import Transposed
from kantor.graph._validation import check_entries, check_sign, check_size, check_types, narrow
from kantor.linalg import CSR

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

_T = TypeVar("_T")


class Graph:
    """A graph with non-negative weights: node i has the neighbours ``col[rowptr[i]:rowptr[i+1]]``, W its matrix.

    ``W[i, j]`` is the weight with which node j acts on node i. Everything is checked once, here. Rows that are not
    sorted are sorted and duplicate entries added up. A graph does not change: what alters it returns another one, and
    its tensors are not to be written to. Derivatives flow to `weight` through all methods that return weights.

    Parameters
    ----------
    rowptr : Tensor (n + 1,)
        Where each row begins, int32 or int64.
    col : Tensor (nnz,)
        Neighbours, int32 or int64.
    weight : Tensor (nnz,)
        Non-negative, float32 or float64; may require a gradient.

    Attributes
    ----------
    rowptr, col : Tensor
        As above, int32.
    weight : Tensor
        As above.
    recall : float or None
        Of a graph of approximate nearest neighbours: the share of true neighbours found, measured on a sample.

    Raises
    ------
    TypeError
        Not tensors, or wrong dtypes.
    ValueError
        Lengths that do not fit, row pointers that decrease, indices out of range, negative, NaN or infinite weights,
        2^31 entries or more, tensors on different devices. The message names the first offender.

    Notes
    -----
    O(nnz) for entries that are sorted, one sort for others.

    Examples
    --------
    >>> import torch
    >>> from kantor.graph import Graph
    >>> path = Graph(torch.tensor([0, 1, 3, 4]), torch.tensor([1, 0, 2, 1]), torch.ones(4))
    >>> path
    Graph(3 nodes, 4 edges, symmetric, weights 1, float32, cpu)
    >>> path.degree
    tensor([1., 2., 1.])
    """

    rowptr: Tensor
    col: Tensor
    weight: Tensor
    recall: float | None

    def __init__(self, rowptr: Tensor, col: Tensor, weight: Tensor) -> None:
        check_types(rowptr, col, weight)
        n = rowptr.numel() - 1
        rowptr, col = narrow("rowptr", rowptr), narrow("col", col)
        if is_readable(weight) and not weight.is_meta:
            is_sorted = check_entries(rowptr, col, weight)
            check_sign("Graph", "weight", weight)  # before duplicates are added up: a sum could hide it
            if not is_sorted:
                rowptr, col, weight = _pattern.coalesce(rows_of(rowptr), col, weight, n)
                check_finite(weight, "Graph", "weight: sums of duplicate entries")
        self._set(rowptr, col, weight)

    def _set(self, rowptr: Tensor, col: Tensor, weight: Tensor) -> None:
        check_size(col)
        self.rowptr, self.col, self.weight = map(_kept, (rowptr, col, weight))
        self.recall = None
        self._of_pattern: dict[str, Any] = {}  # what depends on the pattern alone, shared by with_weight
        self._of_weight: dict[str, Any] = {}

    @classmethod
    def _trusted(cls, rowptr: Tensor, col: Tensor, weight: Tensor) -> Graph:
        """Build from arrays that are right by construction: int32, sorted, no duplicates."""
        graph = cls.__new__(cls)
        graph._set(rowptr, col, weight)
        return graph

    def _with(self, weight: Tensor) -> Graph:
        graph = copy.copy(self)
        graph.weight, graph._of_weight = _kept(weight), {}
        return graph

    def __getstate__(self) -> dict[str, Any]:
        """What copies and files hold: not what is known of the weights, since a copy counts its changes anew."""
        return {**self.__dict__, "_of_weight": {}}

    def _once(self, store: dict[str, Any], name: str, compute: Callable[[], _T]) -> _T:
        """What is known already, else `compute`: kept, unless a derivative or a compiler follows it."""
        readable, of_weight = is_readable(self.weight), store is self._of_weight
        if of_weight and self.weight.requires_grad:
            return compute()
        if of_weight and readable:
            version = self.weight._version
            if store.setdefault("version", version) != version:  # someone wrote into the weights after all
                store.clear()
                store["version"] = version
        if name not in store and not readable:
            return compute()
        if name not in store:
            with self._lasting():
                store[name] = compute()
        known: _T = store[name]
        return known

    @contextmanager
    def _lasting(self) -> Iterator[None]:
        """Outside of inference mode and, as far as the graph is, of torch.func: their tensors are of no use later."""
        is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
        wrapped = any(map(is_wrapped, (self.rowptr, self.col, self.weight)))
        with torch.inference_mode(False), nullcontext() if wrapped else torch._C._DisableFuncTorch():
            yield

    # --- what it is ---

    @property
    def num_nodes(self) -> int:
        """Number of nodes n."""
        return self.rowptr.numel() - 1

    @property
    def num_edges(self) -> int:
        """Number of stored entries of W: both directions of an edge count, and so does a self loop."""
        return self.col.numel()

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        """Of all tensors."""
        return self.weight.device

    @property
    def rows(self) -> Tensor:
        """Row of each entry, ``(nnz,)`` int64."""
        return rows_of(self.rowptr)

    @property
    def degree(self) -> Tensor:
        """Row sums of W, the diagonal included, ``(n,)``."""

        def sums() -> Tensor:
            ones = self.weight.new_ones(self.num_nodes, 1)
            return product(self.rowptr, self.col, self.weight, ones)[:, 0]

        return self._once(self._of_weight, "degree", sums)

    @property
    def diagonal(self) -> Tensor:
        """Weights of the self loops, ``(n,)``; zero where there is none."""

        def entries() -> Tensor:
            rows = self.rows
            (loops,) = (rows == self.col).nonzero(as_tuple=True)
            return self.weight.new_zeros(self.num_nodes).index_put((rows[loops],), self.weight[loops])

        return self._once(self._of_weight, "diagonal", entries)

    @property
    def symmetric(self) -> bool:
        """Whether ``W = W^T``, up to a hundred roundings of the largest weight."""

        def holds() -> bool:
            weight = host(self.weight)
            difference, _, _ = _C.csr_asymmetry(host(self.rowptr), host(self.col), weight)
            return difference <= 100 * torch.finfo(self.dtype).eps * (float(weight.max()) if len(weight) else 0.0)

        return self._once(self._of_weight, "symmetric", holds)

    @property
    def transposed(self) -> Transposed:
        """Pattern of ``W^T``: ``rowptr``, ``col`` and the entry of W that each entry is, ``permutation``; all int32.

        Where the pattern is symmetric the first two are the graph's own.
        """
        return self._once(self._of_pattern, "transposed", lambda: _pattern.transpose(self.rowptr, self.col))

    def lambda_max(self) -> float:
        """Return the largest eigenvalue of the Laplacian ``D - W``, within about 1 % and never above it.

        By at most a hundred Lanczos steps in float64 from a fixed start: deterministic, and kept. For graphs that are
        not symmetric, whose eigenvalues may be complex, :meth:`lambda_max_bound` is returned.
        """
        if not self.symmetric:
            return self.lambda_max_bound()
        return self._once(self._of_weight, "lambda_max", lambda: _spectrum.largest_eigenvalue(*self._doubled()))

    def lambda_max_bound(self) -> float:
        """Return a bound on the modulus of all eigenvalues of ``D - W``: ``max_i (d_i + sum_j w_ij d_j / d_i)``.

        Here d are the degrees without self loops. At most twice the largest degree. O(nnz), kept.
        """
        return self._once(self._of_weight, "lambda_max_bound", lambda: _spectrum.upper_bound(*self._doubled()))

    def _doubled(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The pattern; weights without the diagonal, and their row sums, in float64 and without derivatives."""
        with torch.no_grad():
            weight = self.weight.detach().double().masked_fill(self.rows == self.col, 0.0)
            ones = weight.new_ones(self.num_nodes, 1)
            return self.rowptr, self.col, weight, product(self.rowptr, self.col, weight, ones)[:, 0]

    def components(self) -> tuple[int, Tensor]:
        """Return the number of connected components and the component of each node, ``(n,)`` int64.

        Components are numbered in the order of their first nodes. Every stored entry connects, whatever its weight and
        direction. O(nnz log n), kept.
        """

        def count() -> tuple[int, Tensor]:
            return _pattern.components(self.rowptr, self.col, self.transposed)

        return self._once(self._of_pattern, "components", count)

    # --- other graphs ---

    @property
    def T(self) -> Graph:  # noqa: N802
        """The graph with all edges turned round. O(nnz)."""
        rowptr, col, permutation = self.transposed
        return Graph._trusted(rowptr, col, self.weight.index_select(0, permutation))

    def with_weight(self, weight: Tensor) -> Graph:
        """Return the same pattern with other weights ``(nnz,)``, in the order of `col`; checked as in the constructor.

        What is known of the pattern, such as its transpose, is kept: this is the way to train weights.
        """
        check_tensor(weight, "Graph.with_weight", "weight")
        check_float(weight, "Graph.with_weight", "weight")
        if weight.shape != self.weight.shape:
            raise ValueError(
                f"Graph.with_weight: weight: expected shape {tuple(self.weight.shape)}, got {tuple(weight.shape)}; one "
                "weight for each entry of col"
            )
        if weight.device != self.device:
            raise ValueError(
                f"Graph.with_weight: weight is on {weight.device}, the graph on {self.device}; move one with "
                ".to(device)"
            )
        check_finite(weight, "Graph.with_weight", "weight")
        check_sign("Graph.with_weight", "weight", weight)
        return self._with(weight)

    def symmetrized(self, how: Literal["mean", "max"] = "mean") -> Graph:
        """Return the symmetric graph with ``(W + W^T) / 2`` or ``max(W, W^T)``; missing entries count as zero.

        One merge of the pattern and its transpose, O(nnz log nnz); symmetric to the last bit.
        """
        if how not in ("mean", "max"):
            raise ValueError(f"Graph.symmetrized: how: expected 'mean' or 'max', got {how!r}")
        t_rowptr, t_col, permutation = self.transposed
        turned = self.weight.index_select(0, permutation)
        if t_col is self.col:
            rowptr, col, ours, theirs = self.rowptr, self.col, self.weight, turned
        else:
            rowptr, col, place, t_place = _pattern.union((self.rowptr, self.col), (t_rowptr, t_col))
            empty = self.weight.new_zeros(col.numel())
            ours, theirs = empty.index_copy(0, place, self.weight), empty.index_copy(0, t_place, turned)
        graph = Graph._trusted(rowptr, col, ours / 2 + theirs / 2 if how == "mean" else torch.maximum(ours, theirs))
        graph._once(graph._of_weight, "symmetric", lambda: True)
        return graph

    def with_self_loops(self, weight: float = 1.0) -> Graph:
        """Return the graph in which every node without a self loop has one of this weight, a number >= 0."""
        if isinstance(weight, bool) or not hasattr(weight, "__float__"):
            raise TypeError(f"Graph.with_self_loops: weight: expected a number, got {type(weight).__name__}")
        weight = float(weight)
        if not 0 <= weight <= torch.finfo(self.dtype).max:
            raise ValueError(f"Graph.with_self_loops: weight: expected a finite number >= 0, got {weight}")
        rowptr, col, place, diagonal = _pattern.insert_diagonal(self.rowptr, self.col)
        values = self.weight.new_zeros(col.numel())
        values[diagonal] = weight
        return Graph._trusted(rowptr, col, values.index_copy(0, place, self.weight))

    def normalized(self, kind: Literal["sym", "row"] = "sym") -> Graph:
        """Return ``D^-1/2 W D^-1/2`` ("sym") or ``D^-1 W`` ("row"), D the row sums of W; rows without weight stay zero.

        The degrees of the result are one with "row", and near one but not equal to it with "sym". Also in a graph that
        is not symmetric "sym" takes the row sums on both sides: an edge to a node whose row is empty becomes zero.
        """
        if kind not in ("sym", "row"):
            raise ValueError(f"Graph.normalized: kind: expected 'sym' or 'row', got {kind!r}")
        if kind == "row":
            return self._with(self.weight * _power(self.degree, -1.0)[self.rows])
        scale = _power(self.degree, -0.5)
        # The product of the two scales first: it is the same for (i, j) and (j, i), to the last bit.
        return self._with(self.weight * (scale[self.rows] * scale[self.col.long()]))

    def subgraph(self, nodes: Tensor) -> Graph:
        """Return the graph on some of the nodes and the edges between them.

        Parameters
        ----------
        nodes : Tensor (m,)
            Node numbers without repetition, int32 or int64: node i of the result is ``nodes[i]``. Or a mask ``(n,)``.
        """
        nodes = self._check_nodes(nodes, "Graph.subgraph", "nodes")
        rowptr, col, entries = _pattern.select(self.rowptr, self.col, nodes)
        return Graph._trusted(rowptr, col, self.weight.index_select(0, entries))

    def permute(self, order: Tensor) -> Graph:
        """Return the graph with its nodes renumbered: node i of the result is ``order[i]``, as in ``x[order]``.

        Parameters
        ----------
        order : Tensor (n,)
            A permutation of the nodes, int32 or int64.
        """
        order = self._check_nodes(order, "Graph.permute", "order")
        if order.numel() != self.num_nodes:
            raise ValueError(
                f"Graph.permute: order: expected all {self.num_nodes} nodes, got {order.numel()}; use subgraph for some"
            )
        rowptr, col, entries = _pattern.select(self.rowptr, self.col, order)
        return Graph._trusted(rowptr, col, self.weight.index_select(0, entries))

    def _check_nodes(self, nodes: Tensor, function: str, argument: str) -> Tensor:
        check_tensor(nodes, function, argument)
        n = self.num_nodes
        if nodes.device != self.device:
            raise ValueError(
                f"{function}: {argument} is on {nodes.device}, the graph on {self.device}; move one with .to(device)"
            )
        if nodes.dtype is torch.bool and nodes.shape == (n,):
            return nodes.nonzero()[:, 0]
        if nodes.ndim != 1 or nodes.dtype not in (torch.int32, torch.int64):
            raise TypeError(
                f"{function}: {argument}: expected node numbers (m,) in int32 or int64, or a mask ({n},), got "
                f"{str(nodes.dtype)[6:]} of shape {tuple(nodes.shape)}"
            )
        if nodes.numel():
            low, high = int(nodes.min()), int(nodes.max())
            if low < 0 or high >= n:
                raise ValueError(f"{function}: {argument}: expected 0..{n - 1}, got {low if low < 0 else high}")
            counts = torch.bincount(nodes, minlength=n)
            if int(counts.max()) > 1:
                raise ValueError(f"{function}: {argument}: node {int(counts.argmax())} appears more than once")
        return nodes.long()

    def largest_component(self) -> tuple[Graph, Tensor]:
        """Return the largest connected component, and its nodes in ascending order, ``(m,)`` int64.

        Of several equally large ones the first.
        """
        count, labels = self.components()
        if count <= 1:
            return self, torch.arange(self.num_nodes, device=self.device)
        nodes = (labels == torch.bincount(labels).argmax()).nonzero()[:, 0]
        return self.subgraph(nodes), nodes

    def reorder(self, method: Literal["rcm"] = "rcm") -> tuple[Graph, Tensor]:
        """Renumber the nodes so that neighbours stand close to each other, which makes products faster.

        Diffusion reads the rows of x in the order of `col`. When the nodes come in random order nearly each of these
        reads misses the caches: at a million nodes a good order was worth a factor of 3.4. Take ``x[order]`` along, and
        put results back with ``y[torch.argsort(order)]``.

        Parameters
        ----------
        method : "rcm"
            Reverse Cuthill-McKee, by scipy (extra ``graph``), on the host.

        Returns
        -------
        graph : Graph
            ``self.permute(order)``.
        order : Tensor (n,)
            int64.
        """
        if method != "rcm":
            raise ValueError(f"Graph.reorder: method: expected 'rcm', got {method!r}")
        try:
            from scipy.sparse.csgraph import reverse_cuthill_mckee
        except ImportError as error:
            raise ImportError('Graph.reorder needs scipy: pip install "kantor[graph]"') from error
        if self.num_nodes == 0:
            return self, self.col.long()
        found = reverse_cuthill_mckee(self.to_scipy(), symmetric_mode=self.symmetric)
        order = torch.from_numpy(found.copy()).long().to(self.device)
        return self.permute(order), order

    @staticmethod
    def block_diagonal(graphs: Iterable[Graph]) -> Graph:
        """Return one graph of several, side by side and unconnected: the nodes of the first, then those of the second.

        Episodes, or snapshots of a graph that changes, then take one call: stack their features likewise.
        """
        graphs = list(graphs)
        if not graphs:
            raise ValueError("Graph.block_diagonal: graphs: expected at least one graph, got none")
        for i, graph in enumerate(graphs):
            if not isinstance(graph, Graph):
                raise TypeError(f"Graph.block_diagonal: graphs: expected graphs, got {type(graph).__name__} at {i}")
        check_same("Graph.block_diagonal", ((f"graphs[{i}]", graph.weight) for i, graph in enumerate(graphs)))
        rowptr, col, nodes, entries = [graphs[0].rowptr[:1].long()], [], 0, 0
        for graph in graphs:
            rowptr.append(graph.rowptr[1:].long() + entries)
            col.append(graph.col.long() + nodes)
            nodes, entries = nodes + graph.num_nodes, entries + graph.num_edges
        return Graph(torch.cat(rowptr), torch.cat(col), torch.cat([graph.weight for graph in graphs]))

    # --- other forms ---

    def adjacency(self) -> CSR:
        """Return W as a linear operator; differentiable in the weights."""
        return self._once(
            self._of_weight, "adjacency", lambda: CSR(self.rowptr, self.col, self.weight, (self.num_nodes,) * 2)
        )

    def laplacian(self, kind: Literal["combinatorial", "normalized", "random_walk"] = "combinatorial") -> CSR:
        """Return a Laplacian as a linear operator; differentiable in the weights.

        With D the row sums of W: ``D - W`` ("combinatorial"), ``D^-1/2 (D - W) D^-1/2`` ("normalized"), or
        ``D^-1 (D - W)`` ("random_walk"). Self loops cancel in ``D - W``. Rows of nodes without weight are zero.
        """
        if kind not in ("combinatorial", "normalized", "random_walk"):
            raise ValueError(
                f"Graph.laplacian: kind: expected 'combinatorial', 'normalized' or 'random_walk', got {kind!r}"
            )
        rowptr, col, place, diagonal = _pattern.insert_diagonal(self.rowptr, self.col)
        values = self.weight.new_zeros(col.numel()).index_copy(0, place, -self.weight)
        values = values.index_add(0, diagonal, self.degree)
        rows = rows_of(rowptr)
        if kind == "normalized":
            scale = _power(self.degree, -0.5)
            values = values * (scale[rows] * scale[col.long()])
        elif kind == "random_walk":
            values = values * _power(self.degree, -1.0)[rows]
        return CSR(rowptr, col, values, (self.num_nodes, self.num_nodes))

    def dense(self) -> Tensor:
        """Return W as a dense tensor ``(n, n)``."""
        return self.weight.new_zeros(self.num_nodes, self.num_nodes).index_put(
            (self.rows, self.col.long()), self.weight
        )

    def to_torch(self) -> Tensor:
        """Return W as a torch sparse CSR tensor."""
        shape = (self.num_nodes, self.num_nodes)
        return torch.sparse_csr_tensor(self.rowptr, self.col, self.weight, shape, check_invariants=False)

    def to_scipy(self) -> Any:
        """Return a copy of W as a ``scipy.sparse.csr_array`` on the host (needs scipy, extra ``graph``)."""
        try:
            from scipy.sparse import csr_array
        except ImportError as error:
            raise ImportError('Graph.to_scipy needs scipy: pip install "kantor[graph]"') from error
        weight, col, rowptr = (host(t).numpy() for t in (self.weight, self.col, self.rowptr))
        return csr_array((weight, col, rowptr), shape=(self.num_nodes, self.num_nodes), copy=True)

    def to(self, *args: Any, **kwargs: Any) -> Graph:
        """Convert as ``Tensor.to`` does: ``graph.to("cuda")``, ``graph.to(torch.float64)``."""
        weight = self.weight.to(*args, **kwargs)
        check_float(weight, "Graph.to", "dtype")
        if weight is self.weight:
            return self
        if weight.device == self.device:
            return self._with(weight)
        graph = Graph._trusted(self.rowptr.to(weight.device), self.col.to(weight.device), weight)
        graph.recall = self.recall
        return graph

    def plot(
        self,
        positions: Tensor | np.ndarray[Any, Any] | None = None,
        labels: Any = None,
        *,
        ax: Axes | None = None,
        edges: int = 20_000,
    ) -> Axes:
        """Draw the nodes, coloured by `labels`, and the edges, the darker the heavier (matplotlib, extra ``demo``).

        Parameters
        ----------
        positions : Tensor or array (n, d), optional
            Where the nodes are; of more than two columns the two principal components are taken. Default: a spectral
            embedding of the graph, laid out by t-SNE up to 5000 nodes (scikit-learn).
        labels : sequence (n,), optional
            Classes, each with its colour; -1 or None: unknown, gray.
        ax : Axes, optional
            Where to draw.
        edges : int
            At most so many are drawn, the heaviest.
        """
        from kantor.graph._picture import plot_graph

        return plot_graph(self, positions, labels, ax, edges)

    def __repr__(self) -> str:
        parts = [f"{self.num_nodes} nodes", f"{self.num_edges} edges"]
        if is_readable(self.weight) and self.device.type != "meta":
            parts.append("symmetric" if self.symmetric else "not symmetric")
            if self.num_edges:
                low, high = float(self.weight.detach().min()), float(self.weight.detach().max())
                parts.append(f"weights {low:.3g}" if low == high else f"weights {low:.3g} to {high:.3g}")
        if "components" in self._of_pattern:
            count = self.components()[0]
            parts.append("1 component" if count == 1 else f"{count} components")
        if self.recall is not None:
            parts.append(f"recall {self.recall:.3f}")
        return f"Graph({', '.join(parts)}, {str(self.dtype).removeprefix('torch.')}, {self.device})"


def _kept(tensor: Tensor) -> Tensor:
    """A tensor of inference mode, which no derivative may use, as one that may: a copy."""
    if torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def _power(degree: Tensor, exponent: float) -> Tensor:
    """``degree ** exponent``, zero where the degree is, or nearly: its inverse could overflow; so are derivatives."""
    positive = degree >= torch.finfo(degree.dtype).tiny
    return torch.where(positive, torch.where(positive, degree, 1).pow(exponent), 0)
