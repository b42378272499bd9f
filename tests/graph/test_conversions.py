"""Graphs from edge lists, torch and scipy matrices, NetworkX and PyG: the same graph whatever it came in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kantor.graph import from_edge_index, from_networkx, from_pyg, from_scipy, from_torch

F32, F64 = torch.float32, torch.float64

# A directed cycle, an edge that occurs twice, a self loop; node 4 is alone.
EDGES = torch.tensor([[0, 1, 2, 0, 3], [1, 2, 0, 1, 3]])


def citation_weights(A: Tensor) -> Tensor:
    """The paper's weights of a binary adjacency matrix without self loops."""
    A1 = A + torch.eye(len(A), dtype=A.dtype)
    root = A1.sum(1).pow(-0.5)
    return root[:, None] * A1 * root


def random_adjacency(n: int = 12, density: float = 0.2) -> Tensor:
    A = (torch.rand(n, n, generator=torch.Generator().manual_seed(0)) < density).to(F64).triu(1)
    return A + A.T


# --- edge lists ---


def test_defaults_are_the_papers_weights() -> None:
    A = random_adjacency()
    A[5] = A[:, 5] = 0  # alone: its weight is one
    graph = from_edge_index(A.nonzero().T, 12)
    assert graph.symmetric
    assert graph.dtype is torch.get_default_dtype()
    torch.testing.assert_close(graph.dense().double(), citation_weights(A), rtol=1e-6, atol=0)
    half = A.triu().nonzero().T
    assert torch.equal(from_edge_index(half, 12, undirected=True).dense(), graph.dense())
    weighted = from_edge_index(A.nonzero().T.int(), 12, torch.ones(int(A.sum()), dtype=F64))
    torch.testing.assert_close(weighted.dense(), citation_weights(A), rtol=1e-14, atol=0)


def test_edges_are_entries() -> None:
    plain: dict[str, Any] = {"self_loops": False, "normalize": None}
    binary = torch.zeros(5, 5)
    binary[EDGES[0], EDGES[1]] = 1
    assert torch.equal(from_edge_index(EDGES, 5, **plain).dense(), binary)  # once, however often it occurs
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    summed = torch.zeros(5, 5).index_put((EDGES[0], EDGES[1]), weight, accumulate=True)
    assert torch.equal(from_edge_index(EDGES, 5, weight, **plain).dense(), summed)
    assert from_edge_index(EDGES, **plain).num_nodes == 4
    loops = from_edge_index(EDGES, 5, weight, True, None)
    assert loops.diagonal.tolist() == [1.0, 1.0, 1.0, 5.0, 1.0]
    both = from_edge_index(EDGES, 5, weight, undirected=True, **plain)
    assert torch.equal(both.dense(), torch.maximum(summed, summed.T))
    rows = from_edge_index(EDGES, 5, weight, normalize="row")
    torch.testing.assert_close(rows.degree, torch.ones(5))


def test_no_edges() -> None:
    none = torch.zeros(2, 0, dtype=torch.int64)
    assert from_edge_index(none).num_nodes == 0
    assert torch.equal(from_edge_index(none, 3).dense(), torch.eye(3))
    assert from_edge_index(none, 3, self_loops=False).num_edges == 0


@pytest.mark.parametrize("normalize", ["sym", "row", None])
@pytest.mark.parametrize("undirected", [False, True])
def test_derivatives_for_edge_weights(normalize: Any, undirected: bool) -> None:
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=F64, requires_grad=True)

    def dense(weight: Tensor) -> Tensor:
        return from_edge_index(EDGES, 5, weight, normalize=normalize, undirected=undirected).dense()

    assert torch.autograd.gradcheck(dense, weight)


@pytest.mark.parametrize(
    ("edges", "options", "error", "match"),
    [
        ([[0, 1]], {}, TypeError, r"edge_index: expected a torch.Tensor, got list"),
        (torch.zeros(2, 3), {}, TypeError, r"edge_index: expected int32 or int64, got float32"),
        (EDGES.T, {}, ValueError, r"edge_index: expected shape \(2, m\), got \(5, 2\)"),
        (EDGES[0], {}, ValueError, r"edge_index: expected shape \(2, m\), got \(5,\)"),
        (EDGES, {"num_nodes": 3}, ValueError, r"edge_index: expected node numbers 0\.\.2, got 3; nodes are counted"),
        (EDGES - 1, {}, ValueError, r"edge_index: expected node numbers 0\.\.2, got -1"),
        (EDGES, {"num_nodes": -1}, ValueError, r"num_nodes: expected an integer >= 0, got -1"),
        (EDGES, {"num_nodes": 5.0}, ValueError, r"num_nodes: expected an integer"),
        (EDGES, {"edge_weight": torch.ones(4)}, ValueError, r"edge_weight: expected shape \(5,\), one weight an edge"),
        (EDGES, {"edge_weight": torch.ones(5, 1)}, ValueError, r"edge_weight: expected shape \(5,\).*got \(5, 1\)"),
        (EDGES, {"edge_weight": torch.ones(5).long()}, TypeError, r"edge_weight: expected dtype float32 or float64"),
        (
            EDGES,
            {"edge_weight": torch.ones(5, device="meta")},
            ValueError,
            r"edge_index is on cpu, edge_weight on meta",
        ),
        (
            EDGES,
            {"edge_weight": torch.tensor([1, 1, -1.0, 1, 1])},
            ValueError,
            r"edge_weight: entry 2 is -1.0; expected",
        ),
        (EDGES, {"edge_weight": torch.full((5,), torch.nan)}, ValueError, r"edge_weight: expected finite values"),
        (EDGES, {"normalize": "column"}, ValueError, r"normalize: expected one of 'sym', 'row', got 'column'"),
    ],
    ids=str,
)
def test_wrong_edges(edges: Any, options: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=rf"^from_edge_index: {match}"):
        from_edge_index(edges, **options)


# --- matrices ---


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_matrices_are_taken_as_they_are(dtype: torch.dtype) -> None:
    sp = pytest.importorskip("scipy.sparse")
    A = torch.rand(8, 8, dtype=dtype, generator=torch.Generator().manual_seed(0))
    A[A < 0.6] = 0
    forms = [from_torch(A.to_sparse_csr()), from_torch(A.to_sparse())]
    forms += [from_scipy(make(A.numpy())) for make in (sp.csr_array, sp.csr_matrix, sp.coo_array, sp.lil_array)]
    for graph in forms:
        assert graph.dtype is dtype
        assert torch.equal(graph.dense(), A)
    expected = from_edge_index(A.nonzero().T, 8, A[A.nonzero().T.unbind()], undirected=True)
    options: dict[str, Any] = {"self_loops": True, "normalize": "sym", "undirected": True}
    for graph in (from_torch(A.to_sparse(), **options), from_scipy(sp.csc_array(A.numpy()), **options)):
        assert torch.equal(graph.dense(), expected.dense())
    assert torch.equal(from_torch(from_scipy(sp.csr_array(A.numpy())).to_torch()).dense(), A)


def test_integer_matrices_take_the_default_dtype() -> None:
    sp = pytest.importorskip("scipy.sparse")
    for dtype in ("bool", "int8", "int64"):
        assert from_scipy(sp.csr_array(np.eye(3, dtype=dtype))).dtype is torch.get_default_dtype()


def test_a_scipy_matrix_may_change_afterwards() -> None:
    sp = pytest.importorskip("scipy.sparse")
    for A in (sp.csr_array(np.eye(3)), sp.csc_array(np.eye(3)), sp.coo_array(np.eye(3)), sp.dia_array(np.eye(3))):
        graph = from_scipy(A)
        A.data[:] = 7.0
        assert torch.equal(graph.dense(), torch.eye(3, dtype=F64))


def test_values_of_a_torch_matrix_are_differentiable() -> None:
    values = torch.ones(5, dtype=F64, requires_grad=True)
    A = torch.sparse_coo_tensor(EDGES, values, (5, 5), check_invariants=True)
    (gradient,) = torch.autograd.grad(from_torch(A).degree.square().sum(), values)
    assert gradient.tolist() == [4.0, 2.0, 2.0, 4.0, 2.0]


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda sp: from_scipy(np.eye(3)), TypeError, r"from_scipy: A: expected a scipy sparse matrix, got ndarray"),
        (lambda sp: from_scipy(torch.eye(3)), TypeError, r"from_scipy: A: .* got Tensor; use from_torch"),
        (lambda sp: from_scipy(sp.csr_array((2, 3))), ValueError, r"from_scipy: A: expected a square matrix, got"),
        (
            lambda sp: from_scipy(sp.csr_array(-np.eye(3))),
            ValueError,
            r"from_scipy: A: weight: entry 0 is -1.0; expected",
        ),
        (lambda sp: from_scipy(sp.csr_array(1j * np.eye(3))), TypeError, r"from_scipy: A: expected float32 or float64"),
        (
            lambda sp: from_torch(sp.csr_array((3, 3))),
            TypeError,
            r"from_torch: A: expected a torch sparse tensor, got csr",
        ),
        (
            lambda sp: from_torch(torch.eye(3)),
            TypeError,
            r"from_torch: A: .* got a dense one; call A.to_sparse_csr\(\)",
        ),
        (lambda sp: from_torch(torch.ones(2, 3).to_sparse()), ValueError, r"from_torch: A: expected a square matrix"),
        (lambda sp: from_torch((-torch.eye(3)).to_sparse()), ValueError, r"from_torch: A: weight: entry 0 is -1.0"),
        (lambda sp: from_torch((torch.nan * torch.eye(3)).to_sparse()), ValueError, r"from_torch: .*entry 0 is nan"),
    ],
)
def test_wrong_matrices(call: Any, error: type[Exception], match: str) -> None:
    sp = pytest.importorskip("scipy.sparse")
    with pytest.raises(error, match=rf"^{match}"):
        call(sp)


# --- NetworkX ---


def test_networkx() -> None:
    nx = pytest.importorskip("networkx")
    plain: dict[str, Any] = {"self_loops": False, "normalize": None}
    weighted = nx.Graph([("a", "b", {"weight": 2.0}), ("b", "c"), ("c", "c", {"weight": 3.0})])
    directed = nx.DiGraph([(2, 0, {"weight": 0.5}), (0, 1), (1, 0)])
    parallel = nx.MultiGraph([(0, 1, {"weight": 2.0}), (0, 1, {"weight": 3.0}), (1, 1)])
    for G in (weighted, directed, parallel, nx.MultiDiGraph(parallel), nx.karate_club_graph(), nx.empty_graph(3)):
        graph = from_networkx(G, **plain)
        np.testing.assert_array_equal(graph.dense(), nx.to_numpy_array(G))
        np.testing.assert_array_equal(from_networkx(G, weight=None, **plain).dense(), nx.to_numpy_array(G, weight=None))
    assert from_networkx(nx.Graph()).num_nodes == 0
    A = torch.from_numpy(nx.to_numpy_array(nx.path_graph(4)))
    torch.testing.assert_close(from_networkx(nx.path_graph(4)).dense().double(), citation_weights(A))
    with pytest.raises(TypeError, match=r"^from_networkx: G: expected a networkx graph, got dict"):
        from_networkx({0: [1]})
    with pytest.raises(ValueError, match=r"^from_networkx: edge_weight: entry 0 is -1.0"):
        from_networkx(nx.Graph([(0, 1, {"weight": -1.0})]))
    for weight in (None, "heavy", 1j):
        with pytest.raises(TypeError, match=r"^from_networkx: weight: expected a number in the attribute 'weight'"):
            from_networkx(nx.Graph([(0, 1, {"weight": weight})]))


# --- PyG ---


def test_pyg_normalisation() -> None:
    data = pytest.importorskip("torch_geometric.data")
    gcn = pytest.importorskip("torch_geometric.nn.conv.gcn_conv")
    A = random_adjacency()
    edges = A.nonzero().T
    weight = torch.rand(12, 12, dtype=F64, generator=torch.Generator().manual_seed(1))
    weight = (weight + weight.T)[edges[0], edges[1]]
    for edge_weight in (weight, None):
        index, values = gcn.gcn_norm(edges, edge_weight, 12, dtype=F64)
        expected = torch.zeros(12, 12, dtype=F64).index_put((index[0], index[1]), values)
        x = torch.zeros(12, 2, dtype=F64)
        for graph in (
            from_pyg(data.Data(x=x, edge_index=edges, edge_weight=edge_weight)),
            from_pyg(data.Data(x=x, edge_index=edges, edge_attr=None if edge_weight is None else weight[:, None])),
        ):
            assert graph.dtype is F64
            torch.testing.assert_close(graph.dense(), expected)
    torch.testing.assert_close(
        from_pyg(data.Data(edge_index=edges, num_nodes=12)).dense().double(), citation_weights(A)
    )
    ones = torch.ones(len(edges[0]), dtype=torch.int64)
    assert from_pyg(data.Data(edge_index=edges, edge_weight=ones, num_nodes=12)).dtype is F32
    for other in (torch.float16, torch.bfloat16):
        for edge_weight in (ones.to(other), None):
            x = torch.zeros(12, 2, dtype=other)
            assert from_pyg(data.Data(x=x, edge_index=edges, edge_weight=edge_weight)).dtype is F32


def test_directed_pyg_is_the_transposed() -> None:
    data = pytest.importorskip("torch_geometric.data")
    conv = pytest.importorskip("torch_geometric.nn").SimpleConv(aggr="sum")
    edges, x = torch.tensor([[0, 0, 1, 3], [1, 2, 2, 0]]), torch.rand(4, 2)
    graph = from_pyg(data.Data(x=x, edge_index=edges), self_loops=False, normalize=None)
    torch.testing.assert_close(graph.T.dense() @ x, conv(x, edges))


def test_wrong_pyg() -> None:
    with pytest.raises(TypeError, match=r"^from_pyg: data: expected an object with a tensor edge_index, got dict"):
        from_pyg({})
    wide = SimpleNamespace(edge_index=EDGES, edge_attr=torch.ones(5, 3), num_nodes=5)
    with pytest.raises(ValueError, match=r"^from_pyg: data.edge_attr: expected one number an edge, got shape \(5, 3\)"):
        from_pyg(wide)
