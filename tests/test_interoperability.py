"""Operators, arrays and results on their way between Kantor, SciPy, NumPy, torch's sparse layouts and PyG."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kantor import graph, linalg, optim, transport
from kantor.datasets import poisson_scenes
from kantor.linalg import CSR, Dense, LearnedVCycle, LinearOperator, Multigrid, PoissonGrid, Stencil, as_operator, cg

sp = pytest.importorskip("scipy.sparse")
spla = pytest.importorskip("scipy.sparse.linalg")

F32, F64 = torch.float32, torch.float64


def random(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def gappy(rows: int = 12, columns: int = 12, dtype: torch.dtype = F64) -> Tensor:
    """Two thirds zeros, one empty row, not symmetric."""
    A = random(rows, columns, dtype=dtype)
    A[A < 0.4] = 0
    A[3] = 0
    return A


def spd(n: int = 60) -> Tensor:
    """Eigenvalues from 1 to 1000."""
    q = torch.linalg.qr(random(n, n))[0]
    A = q * torch.logspace(0, 3, n, dtype=F64) @ q.T
    return (A + A.T) / 2


# --- what operators are made of ---

TORCH_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "coo": Tensor.to_sparse,
    "csr": Tensor.to_sparse_csr,
    "csc": Tensor.to_sparse_csc,
    "bsr": lambda A: A.to_sparse_bsr((2, 3)),
    "bsc": lambda A: A.to_sparse_bsc((3, 2)),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("layout", TORCH_LAYOUTS)
def test_torchs_sparse_layouts(layout: str, dtype: torch.dtype) -> None:
    for shape in ((12, 12), (6, 12), (12, 6)):
        A = gappy(*shape, dtype=dtype)
        operator = as_operator(TORCH_LAYOUTS[layout](A))
        assert isinstance(operator, CSR)
        assert operator.dtype is dtype
        assert torch.equal(operator.dense(), A)
    leaf = gappy().requires_grad_()
    as_operator(TORCH_LAYOUTS[layout](leaf)).matvec(random(12)).sum().backward()
    assert leaf.grad is not None
    kept = gappy() != 0
    torch.testing.assert_close(leaf.grad[kept], random(12).expand(12, 12)[kept])
    weights = gappy().abs()
    assert torch.equal(graph.from_torch(TORCH_LAYOUTS[layout](weights)).dense(), weights)


@pytest.mark.parametrize("form", ["csr", "csc", "coo", "bsr", "dia", "lil", "dok"])
def test_scipys_matrices_and_arrays(form: str) -> None:
    A = gappy()
    for kind in ("matrix", "array"):
        operator = as_operator(getattr(sp, f"{form}_{kind}")(A.numpy()))
        assert torch.equal(operator.dense(), A)
    assert torch.equal(as_operator(getattr(sp, f"{form}_array")(A.float().numpy())).dense(), A.float())


def test_scipys_operators() -> None:
    A, b = spd(), random(60)
    expected = torch.linalg.solve(A, b)
    matrix = A.numpy()
    for operator in (spla.aslinearoperator(matrix), spla.LinearOperator(matrix.shape, matvec=lambda x: matrix @ x)):
        torch.testing.assert_close(cg(operator, b, rtol=1e-12).x, expected, rtol=1e-8, atol=1e-10)


def test_graphs_of_torch_geometric() -> None:
    pyg = pytest.importorskip("torch_geometric.data")
    edge_index = torch.tensor([[0, 1, 1, 2, 2, 3, 3, 0], [1, 0, 2, 1, 3, 2, 0, 3]])
    data = pyg.Data(edge_index=edge_index, num_nodes=4, edge_weight=torch.arange(8, dtype=F64) // 2 + 1)
    g = graph.from_pyg(data, self_loops=False, normalize=None)
    A = sp.coo_array((data.edge_weight.numpy(), edge_index.numpy()), shape=(4, 4)).toarray()
    np.testing.assert_array_equal(g.adjacency().dense(), A)
    np.testing.assert_array_equal(g.to_scipy().toarray(), A)
    L = g.laplacian()
    np.testing.assert_array_equal(L.dense(), np.diag(A.sum(1)) - A)
    b = torch.tensor([1.0, -1.0, 2.0, -2.0], dtype=F64)
    x = cg(L, b, rtol=1e-12).x
    torch.testing.assert_close(L.matvec(x), b)
    assert torch.equal(graph.from_edge_index(edge_index, 4, data.edge_weight, False, None).dense(), g.dense())


# --- operators in SciPy ---


def operators() -> dict[str, LinearOperator]:
    grid = PoissonGrid(poisson_scenes.smoke_balls((12, 16)))
    matrix = CSR.from_any(gappy().to_sparse_csr())
    return {
        "CSR": matrix + 0.0 * matrix,  # a sum, which has no form of its own in SciPy
        "rectangular": Dense(random(5, 7)),
        "Stencil": Stencil((4, 5)),
        "PoissonGrid": grid,
        "Multigrid": Multigrid(grid),
        "ic0": linalg.ic0(Stencil((4, 5))),
        "jacobi": linalg.jacobi(Stencil((4, 5))),
        "nystrom": linalg.nystrom(spd(), 6, damping=1.0),
        "function": linalg.Callable(lambda x: 2 * x, 9),
    }


@pytest.mark.parametrize("name", operators())
def test_products_in_scipy(name: str) -> None:
    operator = operators()[name]
    there = operator.to_scipy()
    rows, columns = operator.shape
    assert there.shape == (rows, columns)
    assert there.dtype == np.float64
    x, X = random(columns).numpy(), random(columns, 3, seed=1).numpy()
    x.flags.writeable = X.flags.writeable = False
    expected = operator.matvec(torch.from_numpy(X.T.copy())).numpy().T
    np.testing.assert_allclose(there @ X, expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(there @ x, operator.matvec(torch.tensor(x)).numpy(), rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(there @ x[:, None], (there @ x)[:, None])
    assert (there @ np.ones(columns, dtype=int)).dtype == np.float64
    y, Y = random(rows, seed=2).numpy(), random(rows, 2, seed=3).numpy()
    if name == "function":  # which nobody said to be symmetric
        with pytest.raises(NotImplementedError):
            there.rmatvec(y)
        return
    assert y @ (there @ x) == pytest.approx(there.rmatvec(y) @ x, rel=1e-5, abs=1e-9)
    np.testing.assert_allclose(there.rmatmat(Y), np.stack([there.rmatvec(c) for c in Y.T], 1), rtol=1e-6, atol=1e-9)


def test_products_keep_single_precision_and_refuse_complex_numbers() -> None:
    A = Stencil((4, 5)).to(F32).to_scipy()
    assert A.dtype == np.float32
    assert (A @ np.ones(20)).dtype == np.float32
    with pytest.raises(TypeError, match=r"Stencil.to_scipy: x: expected real numbers, got complex128"):
        A @ np.full(20, 1j)


def counted(solver: Any, A: Any, b: Any, **options: Any) -> tuple[Any, int]:
    """Solution and iterations of a solver of SciPy's."""
    seen: list[int] = []
    x, info = solver(A, b, callback=lambda _: seen.append(1), **options)
    assert info == 0
    return x, len(seen)


def preconditioned() -> dict[str, tuple[LinearOperator, Any, Tensor]]:
    """System, preconditioner, right-hand side."""
    stencil = Stencil((24, 24), weights=(1.0, 30.0))
    varied = CSR.from_any(sp.diags_array(np.logspace(0, 4, 200)) + Stencil((200, 1)).to_csr().to_scipy())
    dense = Dense(spd())
    grid = PoissonGrid(poisson_scenes.smoke_balls((48, 40)))
    fluid = torch.where(grid.mask, random(48, 40), 0.0).flatten()
    return {
        "none": (stencil, None, random(576)),
        "jacobi": (varied, linalg.jacobi(varied), random(200)),
        "ic0": (stencil, linalg.ic0(stencil), random(576)),
        "nystrom": (dense, linalg.nystrom(dense, 20, damping=0.5), random(60)),
        "Multigrid": (grid, Multigrid(grid, precision=F64), fluid),
        "LearnedVCycle": (grid, LearnedVCycle(2).bind(grid, precision=F64), fluid),
    }


@pytest.mark.parametrize("name", preconditioned())
def test_scipys_cg_takes_as_many_iterations_as_ours(name: str) -> None:
    A, M, b = preconditioned()[name]
    ours = cg(A, b, M=M, rtol=1e-8)
    there = None if M is None else M.to_scipy()
    x, iterations = counted(spla.cg, A.to_scipy(), b.numpy(), M=there, rtol=1e-8)
    assert abs(iterations - ours.iterations) <= 1
    torch.testing.assert_close(A.matvec(torch.from_numpy(x)), b, rtol=0, atol=2e-8 * float(b.norm()))
    if M is not None:
        plain = counted(spla.cg, A.to_scipy(), b.numpy(), rtol=1e-8)[1]
        assert iterations < 0.7 * plain
    # The other way round: SciPy's operators inside our cg.
    back = cg(A.to_scipy(), b, M=there, rtol=1e-8)
    assert abs(back.iterations - ours.iterations) <= 1


@pytest.mark.parametrize("name", ["jacobi", "ic0", "nystrom", "Multigrid", "LearnedVCycle"])
def test_preconditioners_in_scipys_minres(name: str) -> None:
    A, M, b = preconditioned()[name]
    _, without = counted(spla.minres, A.to_scipy(), b.numpy(), rtol=1e-9)
    x, iterations = counted(spla.minres, A.to_scipy(), b.numpy(), M=M.to_scipy(), rtol=1e-9)
    assert iterations < 0.8 * without
    residual = float((A.matvec(torch.from_numpy(x)) - b).norm())
    assert residual < 1e-5 * float(b.norm())


@pytest.mark.parametrize("name", ["ic0", "Multigrid"])
def test_preconditioners_in_scipys_lobpcg(name: str) -> None:
    if name == "ic0":
        A: LinearOperator = Stencil((24, 24))
        M: Any = linalg.ic0(A)
    else:
        A = PoissonGrid(torch.where(torch.ones(24, 24, dtype=torch.bool), 2, 0))
        M = Multigrid(A, precision=F64)
    exact = np.linalg.eigvalsh(A.dense().numpy())
    start = random(576, 4).numpy()
    # The smallest eigenvalues but for the zero of a closed box, whose constants are held out.
    closed = exact[0] < 1e-10
    out = np.full((576, 1), 1 / 24.0) if closed else None
    values, _ = spla.lobpcg(A.to_scipy(), start, M=M.to_scipy(), Y=out, largest=False, tol=1e-7, maxiter=60)
    np.testing.assert_allclose(np.sort(values)[:3], exact[int(closed) :][:3], rtol=1e-6)


# --- NumPy arrays at the front doors ---

ROWS, ONES = np.arange(12.0).reshape(4, 3), np.ones(4)
EYE, T = np.eye(4), torch.eye(4, dtype=F64)

DOORS: dict[str, tuple[Callable[[], Any], str]] = {
    "cg, b": (lambda: cg(T, ONES), "cg: b"),
    "cg, x0": (lambda: cg(T, T[0], ONES), "cg: x0"),
    "cg, A": (lambda: cg(EYE, T[0]), "as_operator: A"),
    "cg, M": (lambda: cg(T, T[0], M=EYE), "as_operator: A"),
    "capped_cg": (lambda: linalg.capped_cg(T, ONES, damping=1.0), "capped_cg: g"),
    "multishift_cg": (lambda: linalg.multishift_cg(T, ONES, T[0]), "multishift_cg: b"),
    "fcg": (lambda: linalg.fcg(T, ONES, M=lambda r: r), "fcg: b"),
    "Dense": (lambda: Dense(EYE), "Dense: A"),
    "Diagonal": (lambda: linalg.Diagonal(ONES), "Diagonal: d"),
    "matvec": (lambda: Dense(T).matvec(ONES), "Dense.matvec: x"),
    "@": (lambda: Dense(T) @ ONES, "Dense @ x: x"),
    "jacobi": (lambda: linalg.jacobi(EYE), "as_operator: A"),
    "msign": (lambda: linalg.msign(EYE), "msign: A"),
    "PoissonGrid": (lambda: PoissonGrid(EYE), "PoissonGrid: flags"),
    "solve": (lambda: transport.solve(EYE, reg=1.0), "solve: C"),
    "solve, a": (lambda: transport.solve(T, ONES, reg=1.0), "solve: a"),
    "solve_sample": (lambda: transport.solve_sample(ROWS, T, reg=1.0), "solve_sample: X"),
    "barycenter": (lambda: transport.barycenter(EYE, EYE, reg=1.0), "barycenter: C"),
    "sliced": (lambda: transport.sliced_wasserstein(EYE, EYE), "sliced_wasserstein: X"),
    "apply": (lambda: transport.solve(T, reg=1.0).apply(ONES), "apply: V"),
    "knn_graph": (lambda: graph.knn_graph(ROWS), "knn_graph: x"),
    "from_edge_index": (lambda: graph.from_edge_index(EYE), "from_edge_index: edge_index"),
    "diffuse": (lambda: graph.diffuse(ONES, T, 0.1, 1), "diffuse: x"),
}


@pytest.mark.parametrize("door", DOORS)
def test_where_tensors_are_expected_arrays_are_told_what_to_do(door: str) -> None:
    call, where = DOORS[door]
    argument = where.rpartition(" ")[2]
    with pytest.raises(TypeError, match=rf"^{where}: expected a .*, got ndarray; call torch.from_numpy\({argument}\)$"):
        call()


def test_tables_and_starting_points_may_be_arrays() -> None:
    x, y = np.array([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2]]), np.array([0, -1, -1, 1, -1, -1])
    result = graph.classify(x, y, method="label_spreading", k=3)
    assert isinstance(result.labels, np.ndarray)
    np.testing.assert_array_equal(result.labels, [0, 0, 0, 1, 1, 1])
    best = optim.minimize(
        lambda x: ((x - 1) ** 2).sum(), np.zeros(3), grad=lambda x: 2 * (x - 1), hvp=lambda x, v: 2 * v
    )
    assert isinstance(best.x, np.ndarray)
    np.testing.assert_allclose(best.x, 1, atol=1e-5)


def test_graphs_are_no_operators_but_have_some() -> None:
    g = graph.from_edge_index(torch.tensor([[0, 1], [1, 0]]))
    with pytest.raises(TypeError, match=r"got Graph; a graph has several matrices: take .laplacian\(\) or .adjacency"):
        cg(g, torch.ones(2))
    pyg = pytest.importorskip("torch_geometric.data")
    with pytest.raises(TypeError, match=r"got Data; call kantor.graph.from_pyg\(A\), and .laplacian\(\)"):
        as_operator(pyg.Data(edge_index=torch.tensor([[0, 1], [1, 0]]), num_nodes=2))


# --- results as arrays ---


def test_solutions_as_arrays() -> None:
    b = random(4, 5).requires_grad_()
    result = cg(Stencil((4, 5)), b, rtol=1e-10)
    assert result.x.requires_grad
    array = result.numpy()
    assert isinstance(array, np.ndarray)
    np.testing.assert_array_equal(array, result.x.detach().numpy())
    assert linalg.fcg(spd(), random(60), M=lambda r: r).numpy().shape == (60,)


def test_plans_as_sparse_arrays() -> None:
    X, Y = random(40, 2), random(30, 2, seed=1)
    result = transport.solve_sample(X, Y, reg=1e-2)
    plan = result.to_scipy()
    assert isinstance(plan, sp.csr_array)
    assert plan.shape == (40, 30)
    assert plan.nnz < 600
    np.testing.assert_array_equal(plan.toarray(), result.plan_sparse().to_dense())
    np.testing.assert_allclose(plan.sum(0), 1 / 30, rtol=1e-5)
    few = result.to_scipy(1e-3)
    assert few.nnz < plan.nnz
    assert (few.data > 1e-3).all()
    with pytest.raises(ValueError, match="plan_sparse: more than 3 entries exceed"):
        result.to_scipy(limit=3)
    exact = transport.solve((X[:, None] - Y).square().sum(-1), reg=0)
    np.testing.assert_allclose(exact.to_scipy().toarray(), exact.plan, rtol=1e-12)
    np.testing.assert_allclose(CSR.from_any(plan).matvec(torch.ones(30, dtype=F64)), 1 / 40, rtol=1e-5)
