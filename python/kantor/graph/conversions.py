"""Graphs from what others call a graph.

One convention holds everywhere: an edge (i, j) is the entry ``W[i, j]``, as in the adjacency matrices of SciPy and
NetworkX. Node i then takes values from node j. Libraries that send messages along edge_index, from its first row to its
second, do the transposed: for a directed graph take ``.T``.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from kantor._checks import FLOATS, check_finite, check_float, check_tensor
from kantor.graph import _pattern
from kantor.graph._arguments import check_choice, check_count
from kantor.graph._validation import check_sign
from kantor.graph.graph import Graph
from kantor.linalg import CSR

Normalize = Literal["sym", "row"] | None


def from_edge_index(
    edge_index: Tensor,
    num_nodes: int | None = None,
    edge_weight: Tensor | None = None,
    self_loops: bool = True,
    normalize: Normalize = "sym",
    *,
    undirected: bool = False,
) -> Graph:
    """Return the graph of a list of edges: ``D^-1/2 (A + I) D^-1/2`` by default, D the row sums of ``A + I``.

    Parameters
    ----------
    edge_index : Tensor (2, m)
        Edge e is the entry ``W[edge_index[0, e], edge_index[1, e]]``, by which the first node takes values from the
        second; int32 or int64. An undirected edge stands there in both directions, unless `undirected` is given.
    num_nodes : int, optional
        Default: the largest index and one.
    edge_weight : Tensor (m,), optional
        Non-negative, float32 or float64; may require a gradient. Weights of an edge that occurs several times are added
        up. Default: one for every edge, however often it occurs, in torch's default dtype.
    self_loops : bool
        Give a self loop of weight one to nodes that have none.
    normalize : "sym", "row" or None
        ``D^-1/2 W D^-1/2``, ``D^-1 W``, or W as it is; see :meth:`Graph.normalized`.
    undirected : bool
        Take every edge in both directions; where the two are given with different weights, the larger one.

    Returns
    -------
    Graph
        Differentiable in `edge_weight`.

    Raises
    ------
    TypeError
        Not tensors, or wrong dtypes.
    ValueError
        Shapes that do not fit, indices out of range, negative, NaN or infinite weights, tensors on different devices.

    Notes
    -----
    One sort of the edges. Deterministic on the CPU; on a GPU duplicates are added in no fixed order.

    Source of the defaults: Wang, Dou, Bao and Shi, *Diffusion Mechanism in Residual Neural Network: Theory and
    Applications*, IEEE TPAMI 46(2), 2024, citation graphs.

    Examples
    --------
    >>> import torch
    >>> from kantor.graph import from_edge_index
    >>> from_edge_index(torch.tensor([[0, 1], [1, 2]]), undirected=True)
    Graph(3 nodes, 7 edges, symmetric, weights 0.333 to 0.5, float32, cpu)
    """
    name = "from_edge_index"
    check_tensor(edge_index, name, "edge_index")
    if edge_index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: edge_index: expected int32 or int64, got {str(edge_index.dtype)[6:]}")
    if edge_index.ndim != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"{name}: edge_index: expected shape (2, m), got {tuple(edge_index.shape)}")
    m = edge_index.shape[1]
    low, high = (int(edge_index.min()), int(edge_index.max())) if m else (0, -1)
    n = high + 1 if num_nodes is None else check_count(name, num_nodes, "num_nodes")
    if n >= 2**31:
        raise ValueError(f"{name}: num_nodes: expected fewer than 2^31 nodes, got {n}")
    if low < 0 or high >= n:
        raise ValueError(
            f"{name}: edge_index: expected node numbers 0..{n - 1}, got {low if low < 0 else high}; nodes are counted "
            "from 0, num_nodes tells how many there are"
        )
    if edge_weight is None:
        weight = torch.ones(m, device=edge_index.device)
    else:
        weight = check_tensor(edge_weight, name, "edge_weight")
        check_float(weight, name, "edge_weight")
        if weight.shape != (m,):
            raise ValueError(
                f"{name}: edge_weight: expected shape ({m},), one weight an edge, got {tuple(weight.shape)}"
            )
        if weight.device != edge_index.device:
            raise ValueError(
                f"{name}: edge_index is on {edge_index.device}, edge_weight on {weight.device}; move one with "
                ".to(device)"
            )
        check_finite(weight, name, "edge_weight")
        check_sign(name, "edge_weight", weight)
    rowptr, col, weight = _pattern.coalesce(edge_index[0], edge_index[1], weight, n)
    if edge_weight is None:
        weight = torch.ones_like(weight)
    else:
        check_finite(weight, name, "edge_weight: sums of repeated edges")
    return _finish(name, Graph(rowptr, col, weight), self_loops, normalize, undirected)


def from_torch(A: Tensor, *, self_loops: bool = False, normalize: Normalize = None, undirected: bool = False) -> Graph:
    """Return the graph of a torch sparse matrix.

    Parameters
    ----------
    A : Tensor (n, n)
        Sparse in any layout, non-negative, float32 or float64; its values may require a gradient.
    self_loops, normalize, undirected
        As in :func:`from_edge_index`; by default W is A as it is.

    Raises
    ------
    TypeError
        Not sparse, or another dtype.
    ValueError
        Not square; negative, NaN or infinite values.

    Examples
    --------
    >>> import torch
    >>> from kantor.graph import from_torch
    >>> from_torch(torch.tensor([[0.0, 2.0], [2.0, 0.0]]).to_sparse())
    Graph(2 nodes, 2 edges, symmetric, weights 2, float32, cpu)
    """
    if not isinstance(A, Tensor):
        raise TypeError(f"from_torch: A: expected a torch sparse tensor, got {type(A).__name__}")
    if A.layout is torch.strided:
        raise TypeError("from_torch: A: expected a torch sparse tensor, got a dense one; call A.to_sparse_csr()")
    return _from_matrix("from_torch", A, self_loops, normalize, undirected)


def from_scipy(A: Any, *, self_loops: bool = False, normalize: Normalize = None, undirected: bool = False) -> Graph:
    """Return the graph of a scipy sparse matrix or array.

    Parameters
    ----------
    A : scipy sparse matrix or array (n, n)
        In any format, non-negative. float32 and float64 keep their dtype, integers and booleans become torch's default
        dtype.
    self_loops, normalize, undirected
        As in :func:`from_edge_index`; by default W is A as it is.

    Raises
    ------
    TypeError
        Not a sparse matrix, or complex.
    ValueError
        Not square; negative, NaN or infinite values.

    Examples
    --------
    >>> import scipy.sparse
    >>> from kantor.graph import from_scipy
    >>> from_scipy(scipy.sparse.diags_array([1.0, 1.0], offsets=[-1, 1], shape=(3, 3)))
    Graph(3 nodes, 4 edges, symmetric, weights 1, float64, cpu)
    """
    if not hasattr(A, "tocsr"):
        hint = "; use from_torch" if isinstance(A, Tensor) else ""
        raise TypeError(f"from_scipy: A: expected a scipy sparse matrix, got {type(A).__name__}{hint}")
    # A copy in any case: a matrix may change, a graph does not.
    A = A.astype(str(torch.get_default_dtype())[6:]) if A.dtype.kind in "iub" else A.copy()
    return _from_matrix("from_scipy", A, self_loops, normalize, undirected)


def from_networkx(
    G: Any,
    *,
    weight: str | None = "weight",
    self_loops: bool = True,
    normalize: Normalize = "sym",
    undirected: bool = False,
) -> Graph:
    """Return the graph of a NetworkX graph; node i is the i-th of ``list(G)``.

    Parameters
    ----------
    G : networkx.Graph, DiGraph, MultiGraph or MultiDiGraph
        Edges of an undirected graph count in both directions; parallel edges are added up.
    weight : str or None
        Name of the edges' attribute that holds their weights; edges without it have weight one. None: all have.
    self_loops, normalize, undirected
        As in :func:`from_edge_index`.

    Raises
    ------
    TypeError
        Not a NetworkX graph, or weights that are not numbers.
    ValueError
        Negative, NaN or infinite weights.

    Examples
    --------
    >>> import networkx
    >>> from kantor.graph import from_networkx
    >>> from_networkx(networkx.path_graph(3), self_loops=False, normalize=None)
    Graph(3 nodes, 4 edges, symmetric, weights 1, float32, cpu)
    """
    if not all(hasattr(G, name) for name in ("edges", "nodes", "is_directed")):
        raise TypeError(f"from_networkx: G: expected a networkx graph, got {type(G).__name__}")
    number = {node: i for i, node in enumerate(G)}
    edges = [(number[u], number[v]) for u, v in G.edges()]
    weights = [1.0] * len(edges) if weight is None else [w for _, _, w in G.edges(data=weight, default=1.0)]
    index = torch.tensor(edges, dtype=torch.long).reshape(-1, 2).T
    try:
        values = torch.tensor([float(w) for w in weights], dtype=torch.get_default_dtype())
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"from_networkx: weight: expected a number in the attribute {weight!r} of every edge: {error}; pass "
            "weight=None for edges of weight one"
        ) from error
    if not G.is_directed():
        other = index[0] != index[1]
        index, values = torch.cat([index, index.flip(0)[:, other]], 1), torch.cat([values, values[other]])
    try:
        return from_edge_index(index, len(number), values, self_loops, normalize, undirected=undirected)
    except ValueError as error:
        raise ValueError(f"from_networkx: {str(error).partition(': ')[2]}") from error


def from_pyg(data: Any, *, self_loops: bool = True, normalize: Normalize = "sym", undirected: bool = False) -> Graph:
    """Return the graph of a ``torch_geometric.data.Data``.

    Parameters
    ----------
    data : Data, or anything with these attributes
        ``edge_index``; ``num_nodes``; the weights are ``edge_weight``, or ``edge_attr`` where that is one number an
        edge. Edges without weights get one. Numbers that are not float32 or float64 become ``x.dtype`` where that is,
        else torch's default dtype.
    self_loops, normalize, undirected
        As in :func:`from_edge_index`; with their defaults the weights are those of ``gcn_norm`` for a graph whose edges
        stand there once in each direction. Messages go from the first row of ``edge_index`` to the second: for a
        directed graph that is the ``T`` of this one.

    Raises
    ------
    TypeError
        Not such an object.
    ValueError
        As in :func:`from_edge_index`; attributes of several numbers an edge.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> import torch
    >>> from kantor.graph import from_pyg
    >>> data = SimpleNamespace(edge_index=torch.tensor([[0, 1], [1, 0]]), num_nodes=2)  # or a torch_geometric Data
    >>> from_pyg(data).num_edges
    4
    """
    edge_index = getattr(data, "edge_index", None)
    if not isinstance(edge_index, Tensor):
        raise TypeError(
            f"from_pyg: data: expected an object with a tensor edge_index, got {type(data).__name__}; use "
            "data.to_homogeneous(), or from_torch(data.adj_t)"
        )
    weight = getattr(data, "edge_weight", None)
    attributes = getattr(data, "edge_attr", None)
    if weight is None and attributes is not None:
        if attributes.numel() != edge_index.shape[-1]:
            raise ValueError(
                f"from_pyg: data.edge_attr: expected one number an edge, got shape {tuple(attributes.shape)}; set "
                "data.edge_weight, or data.edge_attr to None"
            )
        weight = attributes.reshape(-1)
    x = getattr(data, "x", None)
    dtype = x.dtype if isinstance(x, Tensor) and x.dtype in FLOATS else torch.get_default_dtype()
    if isinstance(weight, Tensor) and weight.dtype not in FLOATS and not weight.is_complex():
        weight = weight.to(dtype)
    try:
        graph = from_edge_index(edge_index, getattr(data, "num_nodes", None), weight, self_loops=False, normalize=None)
    except (TypeError, ValueError) as error:
        raise type(error)(f"from_pyg: data.{str(error).partition(': ')[2]}") from error
    return _finish("from_pyg", graph if weight is not None else graph.to(dtype), self_loops, normalize, undirected)


def _from_matrix(name: str, A: Any, self_loops: bool, normalize: Normalize, undirected: bool) -> Graph:
    if len(A.shape) != 2 or A.shape[0] != A.shape[1]:
        raise ValueError(f"{name}: A: expected a square matrix, got shape {tuple(A.shape)}")
    try:
        matrix = CSR.from_any(A)
        graph = Graph(matrix.crow, matrix.col, matrix.values)
    except (TypeError, ValueError) as error:  # the same complaint, in the name of what was called
        raise type(error)(f"{name}: A: {str(error).partition(': ')[2]}") from error
    return _finish(name, graph, self_loops, normalize, undirected)


def _finish(name: str, graph: Graph, self_loops: bool, normalize: Normalize, undirected: bool) -> Graph:
    if normalize is not None:
        check_choice(name, normalize, "normalize", ("sym", "row"))
    if undirected:
        graph = graph.symmetrized("max")
    if self_loops:
        graph = graph.with_self_loops()
    return graph if normalize is None else graph.normalized(normalize)
