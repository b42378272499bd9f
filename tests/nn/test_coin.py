"""Output diffusion and COIN: probabilities stay what they are, in every mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor, nn
from torch.nn import functional

from kantor import StabilityError
from kantor.graph import Graph, diffuse, from_torch, stability
from kantor.nn import COIN, OutputDiffusion

F32, F64 = torch.float32, torch.float64
MODES = ("clamp", "row", "implicit", "error")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights(n: int, seed: int = 0) -> Tensor:
    """Symmetric, three nodes in ten connected, the last one isolated."""
    draw = torch.rand(n, n, dtype=F64, generator=torch.Generator().manual_seed(seed))
    W = torch.where(draw < 0.3, draw, 0)
    W = W + W.T
    W[-1], W[:, -1] = 0, 0
    return W / W.sum(1).max()


def star(leaves: int) -> Tensor:
    W = torch.zeros(leaves + 1, leaves + 1, dtype=F64)
    W[0, 1:] = W[1:, 0] = 1
    return W


def graph_of(W: Tensor) -> Graph:
    pattern = W != 0
    rowptr = torch.cat([torch.zeros(1, dtype=torch.long), pattern.sum(1).cumsum(0)])
    return Graph(rowptr, pattern.nonzero()[:, 1], W[pattern])


def numpy_steps(W: Tensor, step: float, num_steps: int) -> Tensor:
    L = np.diag(W.numpy().sum(1)) - W.numpy()
    return torch.from_numpy(np.linalg.matrix_power(np.eye(len(L)) - step * L, num_steps))


# --- probabilities ---


@pytest.mark.parametrize("mode", MODES)
def test_rows_keep_their_sum(mode: Any) -> None:
    W, u = weights(30), normal(30, 5).softmax(1)
    for dtype, tolerance in ((F64, 1e-9 if mode == "implicit" else 1e-13), (F32, 1e-6)):
        for form in (graph_of(W.to(dtype)), W.to(dtype)):
            for step in (0.01, 0.5, 0.99):
                diffused = OutputDiffusion(step, 200, positivity=mode)(u.to(dtype), form).double()
                assert float((diffused.sum(1) - 1).abs().max()) < tolerance
                assert float(diffused.min()) >= 0


def test_comparison_linearity_constants() -> None:
    W = weights(25)
    graph = graph_of(W)
    block = OutputDiffusion(stability(graph, 1.0).largest_positive_step, 20)
    u, more = normal(25, 3), normal(25, 3, seed=1).abs()
    assert bool((block(u, graph) <= block(u + more, graph) + 1e-12).all())
    together = block(2 * u - 3 * more, graph)
    torch.testing.assert_close(together, 2 * block(u, graph) - 3 * block(more, graph), rtol=1e-12, atol=1e-12)
    constant = torch.full((25, 1), 0.7, dtype=F64)
    torch.testing.assert_close(block(constant, graph), constant, rtol=1e-13, atol=0)


def test_sigmoid_stays_between_zero_and_one() -> None:
    graph, x = graph_of(weights(25)), normal(25, 4)
    u = COIN(4, 1, 0.99, 30, head="sigmoid", positivity="error").double()(x, graph).detach()
    assert u.shape == (25, 1)
    assert 0 <= float(u.min()) <= float(u.max()) <= 1


# --- positivity ---


def test_positivity_on_a_star() -> None:
    """The centre of a star takes more than it has when step * degree = 2."""
    W = star(4)
    u = torch.tensor([[1.0, 0.0]] + 4 * [[0.0, 1.0]], dtype=F64)
    options: dict[str, Any] = {"step": 0.4, "num_steps": 1}
    for form in (graph_of(W), W):
        leaf = u.clone().requires_grad_()
        clamp = OutputDiffusion(0.5, 1, stability="ignore")
        assert float(clamp(u, form).min()) < 0
        log_prob = clamp.log_prob(leaf, form)
        assert clamp.info.clamped == int((clamp(leaf, form) < 1e-12).sum()) > 0
        assert clamp.info.entries == 10
        functional.nll_loss(log_prob, torch.tensor([0, 1, 1, 1, 1])).backward()
        assert log_prob.isfinite().all()
        assert leaf.grad.isfinite().all()
        for mode in ("row", "implicit"):
            block = OutputDiffusion(**options, positivity=mode)
            diffused = block(u, form)
            assert float(diffused.min()) >= 0
            assert float((diffused.sum(1) - 1).abs().max()) < 1e-9
            block.log_prob(u, form)
            assert block.info.clamped == 0
        with pytest.raises(StabilityError, match=r"OutputDiffusion: step: expected at most 0\.25, where positivity"):
            OutputDiffusion(**options, positivity="error")(u, form)
        OutputDiffusion(0.25, 3, positivity="error")(u, form)


def test_row_is_the_random_walk() -> None:
    W = weights(20)
    u = normal(20, 3)
    degree = W.sum(1, keepdim=True)
    P = W / torch.where(degree > 0, degree, 1) + torch.diag((W.sum(1) == 0).double())
    expected = torch.linalg.matrix_power(0.3 * torch.eye(20, dtype=F64) + 0.7 * P, 6) @ u
    for form in (graph_of(W), W):
        diffused = OutputDiffusion(0.7, 6, positivity="row")(u, form)
        torch.testing.assert_close(diffused, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(diffused[-1], u[-1])  # nothing is connected to it
        with pytest.raises(StabilityError, match="step"):
            OutputDiffusion(1.3, 6, positivity="row")(u, form)


def test_implicit_is_one_solve() -> None:
    W, u = weights(30), normal(30, 3).softmax(1)
    block = OutputDiffusion(0.5, 20, positivity="implicit")
    system = scipy.sparse.csc_array(np.eye(30) + 10.0 * (np.diag(W.numpy().sum(1)) - W.numpy()))
    expected = torch.from_numpy(scipy.sparse.linalg.spsolve(system, u.numpy()))
    torch.testing.assert_close(block(u, graph_of(W)), expected, rtol=1e-8, atol=1e-8)
    assert block.info.converged
    assert block.info.iterations > 0


# --- COIN ---


@pytest.mark.parametrize("hidden", [None, 7])
def test_softmax_network(hidden: int | None) -> None:
    W, x = weights(20), normal(20, 5)
    model = COIN(5, 3, 0.5, 8, hidden=hidden).double()
    block, last = model.base
    h = torch.relu(block.inner(x))
    h = x + (h if hidden is None else block.outer(h))
    u = (h @ last.weight.T + last.bias).softmax(1)
    expected = numpy_steps(W, 0.5, 8) @ u
    torch.testing.assert_close(model(x, graph_of(W)), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.log_prob(x, graph_of(W)), expected.log(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(model(x, W), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("head", "f", "hidden"), [("sigmoid", torch.relu, 3), ("linear", functional.elu, 16)])
def test_other_heads(head: Any, f: Callable[[Tensor], Tensor], hidden: int) -> None:
    W, x = weights(20), normal(20, 5)
    model = COIN(5, 2, 0.5, 8, head=head).double()
    net = model.base
    assert net.inner.out_features == hidden
    z = net.skip(x) + net.outer(f(net.inner(x)))
    u = z.sigmoid() if head == "sigmoid" else z
    torch.testing.assert_close(model(x, graph_of(W)), numpy_steps(W, 0.5, 8) @ u, rtol=1e-12, atol=1e-12)


def test_own_base() -> None:
    W, x = weights(20), normal(20, 5)
    base = nn.Linear(5, 4).double()
    model = COIN(5, 4, 0.5, 8, base=base)
    expected = numpy_steps(W, 0.5, 8) @ base(x).softmax(1)
    torch.testing.assert_close(model(x, graph_of(W)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("head", ["softmax", "sigmoid", "linear"])
def test_without_steps_it_is_the_base(head: Any) -> None:
    x, graph = normal(9, 5), graph_of(weights(9))
    model = COIN(5, 3, 0.5, 0, head=head).double()
    scores = model.base(x)
    expected = {"softmax": scores.softmax(1), "sigmoid": scores.sigmoid(), "linear": scores}[head]
    for mode in MODES:
        model.diffusion.positivity = mode
        assert torch.equal(model(x, graph), expected)


def test_gradcheck() -> None:
    graph, x = graph_of(weights(12)), normal(12, 4)
    model = COIN(4, 3, 0.5, 5, learn_step=True).double()
    names = [name for name, _ in model.named_parameters()]

    def call(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values[1:], strict=True)), (values[0], graph))

    leaves = (x.requires_grad_(), *(p.detach().clone().requires_grad_() for p in model.parameters()))
    assert torch.autograd.gradcheck(call, leaves)


def test_teleport_ends_in_personalised_page_rank() -> None:
    W, u, a = weights(20), normal(20, 3).softmax(1), 0.1
    expected = a * torch.linalg.solve(torch.eye(20, dtype=F64) - (1 - a) * numpy_steps(W, 0.5, 1), u)
    diffused = OutputDiffusion(0.5, 300, teleport=a)(u, graph_of(W))
    torch.testing.assert_close(diffused, expected, rtol=0, atol=1e-6)
    assert torch.equal(OutputDiffusion(0.5, 9, teleport=0.0)(u, graph_of(W)), diffuse(u, graph_of(W), 0.5, 9))


def test_teleport_equals_appnp() -> None:
    APPNP = pytest.importorskip("torch_geometric.nn").APPNP
    W, u = weights(20).to(F32), normal(20, 3, dtype=F32).softmax(1)
    P = numpy_steps(W, 0.5, 1).to(F32)
    edge_index = P.nonzero().T
    theirs = APPNP(K=12, alpha=0.2, normalize=False)(u, edge_index.flip(0), P[tuple(edge_index)])
    ours = OutputDiffusion(0.5, 12, teleport=0.2)(u, graph_of(W))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_no_edges_is_the_identity() -> None:
    x = normal(7, 5)
    nothing = Graph(torch.zeros(8, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=F64))
    for mode in MODES:
        model = COIN(5, 3, 0.5, 8, positivity=mode).double()
        assert torch.equal(model(x, nothing), model.base(x).softmax(1))


def test_permutation_equivariance() -> None:
    graph, x = graph_of(weights(20)), normal(20, 5)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    for mode in MODES:
        model = COIN(5, 3, 0.5, 8, positivity=mode).double()
        torch.testing.assert_close(model(x[order], graph.permute(order)), model(x, graph)[order], rtol=1e-8, atol=1e-8)


def test_many_snapshots_are_one_graph() -> None:
    """A block-diagonal graph is a sequence of graphs."""
    Ws, x = [weights(6, seed) for seed in range(3)], normal(18, 4)
    model = COIN(4, 2, 0.5, 3, head="linear").double()
    together = model(x, from_torch(torch.block_diag(*Ws).to_sparse(), normalize=None, self_loops=False))
    for i, W in enumerate(Ws):
        part = slice(6 * i, 6 * i + 6)
        torch.testing.assert_close(together[part], model(x[part], graph_of(W)), rtol=1e-12, atol=1e-12)


def test_as_a_torch_module() -> None:
    graph, x = graph_of(weights(9)), normal(9, 4)
    model = COIN(4, 3, 0.5, 5, learn_step=True).double()
    model.log_prob(x, graph)
    other = copy.deepcopy(model)
    assert other.info == model.info
    for parameter in other.parameters():
        parameter.data.mul_(1.1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(x, graph), other(x, graph))
    assert "head='softmax'" in repr(model)
    assert "step=0.5 (learned), num_steps=5, positivity='clamp'" in repr(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, graph), model(x, graph), rtol=1e-12, atol=1e-12)


def test_dropout_in_training_only() -> None:
    graph, x = graph_of(weights(9)), normal(9, 4)
    model = COIN(4, 3, 0.5, 5, head="linear", dropout=0.5).double()
    assert not torch.equal(model(x, graph), model(x, graph))
    model.eval()
    assert torch.equal(model(x, graph), model(x, graph))


# --- errors ---

X, G = normal(9, 4), graph_of(weights(9))
CALLS: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    (ValueError, r"OutputDiffusion: step: expected", lambda: OutputDiffusion(-0.1, 1)),
    (ValueError, r"OutputDiffusion: num_steps: expected", lambda: OutputDiffusion(0.1, -1)),
    (ValueError, r"OutputDiffusion: positivity: expected one of", lambda: OutputDiffusion(1, 1, positivity="x")),
    (ValueError, r"OutputDiffusion: eps: expected a number in \(0, 1\), got 0", lambda: OutputDiffusion(0.1, 1, eps=0)),
    (ValueError, r"OutputDiffusion: teleport: expected", lambda: OutputDiffusion(0.1, 1, teleport=-0.5)),
    (ValueError, r"OutputDiffusion: dropout: expected 0 with positivity='implicit'",
     lambda: OutputDiffusion(0.1, 1, positivity="implicit", dropout=0.5)),
    (ValueError, r"COIN: in_features: expected", lambda: COIN(0, 2, 0.1, 1)),
    (ValueError, r"COIN: num_classes: expected at least 2 with head='softmax', got 1.*sigmoid",
     lambda: COIN(4, 1, 0.1, 1)),
    (ValueError, r"COIN: head: expected one of 'softmax', 'sigmoid', 'linear'", lambda: COIN(4, 2, 0.1, 1, head="x")),
    (ValueError, r"COIN: hidden: expected an integer >= 1", lambda: COIN(4, 2, 0.1, 1, hidden=0)),
    (ValueError, r"COIN: hidden: expected None beside", lambda: COIN(4, 2, 0.1, 1, hidden=3, base=nn.Linear(4, 2))),
    (TypeError, r"COIN: base: expected a torch\.nn\.Module, got type", lambda: COIN(4, 2, 0.1, 1, base=nn.Linear)),
    (ValueError, r"COIN\.log_prob: head: expected 'softmax' or 'sigmoid'",
     lambda: COIN(4, 2, 0.1, 1, head="linear").double().log_prob(X, G)),
    (StabilityError, r"diffuse: step: .*got 3", lambda: COIN(4, 2, 3.0, 1).double()(X, G)),
    (ValueError, r"diffuse: x: expected 9 rows", lambda: COIN(4, 2, 0.1, 1).double()(X[:5], G)),
    (ValueError, r"implicit_diffuse: graph: expected symmetric",
     lambda: COIN(4, 2, 0.1, 1, positivity="implicit").double()(X, weights(9).triu())),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "call"), CALLS, ids=[message for _, message, _ in CALLS])
def test_errors(kind: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_a_class_without_labelled_rows_and_labels_out_of_range() -> None:
    model = COIN(4, 3, 0.5, 2).double()
    functional.nll_loss(model.log_prob(X, G)[:2], torch.tensor([0, 1])).backward()  # nobody has class 2
    with pytest.raises(IndexError):
        functional.nll_loss(model.log_prob(X, G)[:2], torch.tensor([0, 3]))
