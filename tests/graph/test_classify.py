"""The front door: kinds of features and labels, methods, what the result says, and what is wrong."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kantor import ConvergenceError
from kantor.graph import ClassifyResult, Graph, StabilityError, classify, from_edge_index, knn_graph, stability
from kantor.graph._labels import read_features, read_labels, scaled

METHODS = ["diffusion", "coin", "label_spreading", "no_diffusion"]
NAMES = np.array(["ant", "bee", "cat"])


def table(n: int = 60, d: int = 4, distance: float = 8.0) -> tuple[Tensor, np.ndarray[Any, Any]]:
    """Three separated clusters, which alternate, and their names."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.arange(n) % 3
    x = torch.randn(n, d, generator=generator) + distance * torch.eye(3, d)[kind]
    return x, NAMES[kind.numpy()]


X, TRUTH = table()
FEW: list[Any] = [str(name) if i < 6 else None for i, name in enumerate(TRUTH)]


def short(x: Any = X, labels: Any = FEW, **options: Any) -> ClassifyResult:
    """With few epochs."""
    return classify(x, labels, **({"max_epochs": 30} | options))


# --- what it finds ---


@pytest.mark.parametrize("scale", ["columns", "together"])
@pytest.mark.parametrize("factor", [2.0**-900, 2.0**900])
def test_scales_whose_squares_are_out_of_range(factor: float, scale: Any) -> None:
    x = X.double()
    assert torch.equal(scaled(factor * x, scale), scaled(x, scale))


@pytest.mark.parametrize("method", METHODS)
def test_separated_classes(method: Any) -> None:
    result = short(method=method).check()
    assert (result.labels == TRUTH).mean() > 0.97
    assert result.classes == ["ant", "bee", "cat"]
    assert result.probabilities.shape == (60, 3)
    np.testing.assert_allclose(result.probabilities.sum(1), 1, atol=1e-5)
    np.testing.assert_array_equal(result.confidence, result.probabilities.max(1))
    assert result.given.sum() == 6
    assert (result.model is None) == (method == "label_spreading")


def test_given_labels_are_kept_and_the_method_has_its_own_view() -> None:
    wrong = list(FEW)
    wrong[0] = "cat"  # in truth an ant
    result = short(labels=wrong, method="label_spreading", teleport=0.05)
    assert result.labels[0] == "cat"
    many = [str(name) for name in TRUTH]
    many[0] = "cat"
    assert short(labels=many, method="label_spreading", teleport=0.05).predicted[0] == "ant"


def test_label_spreading_is_the_closed_form() -> None:
    graph = knn_graph(X.double(), k=6)
    result = classify(X.double(), FEW, graph=graph, method="label_spreading", teleport=0.3, num_steps=200)
    S = graph.normalized("sym").dense()
    Y = torch.zeros(60, 3, dtype=torch.float64)
    Y[torch.arange(6), torch.arange(6) % 3] = 1
    mass = 0.3 * torch.linalg.solve(torch.eye(60, dtype=torch.float64) - 0.7 * S, Y)
    reached = mass.sum(1) > 1e-300
    np.testing.assert_allclose(result.probabilities[reached], (mass / mass.sum(1, keepdim=True))[reached], rtol=1e-8)


def test_label_spreading_agrees_with_scikit_learn() -> None:
    semi_supervised = pytest.importorskip("sklearn.semi_supervised")
    y = np.where(np.arange(60) < 6, np.arange(60) % 3, -1)
    x, _ = table(distance=2.5)
    theirs = semi_supervised.LabelSpreading(kernel="knn", n_neighbors=9, alpha=0.8).fit(scaled(x, "columns"), y)
    ours = classify(x, y, method="label_spreading")
    assert (ours.labels == theirs.transduction_).mean() > 0.9


def test_network_and_epochs_are_those_of_fit_nodes() -> None:
    from kantor.nn import COIN, fit_nodes

    result = classify(X, FEW, method="coin", step=0.4, num_steps=5, teleport=0.1, seed=3, scale="none", max_epochs=7)
    torch.manual_seed(3)
    model = COIN(4, 3, 0.4, 5, hidden=64, teleport=0.1)
    numbers = read_labels(FEW, 60).numbers
    graph = knn_graph(X, 10, bandwidth_k=5)
    fit = fit_nodes(model, X, graph, numbers, numbers >= 0, max_epochs=7, seed=3)
    np.testing.assert_allclose(result.probabilities, fit.probabilities, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(result.history["loss"], fit.history["loss"])


def test_a_graph_of_your_own_without_features() -> None:
    ring = torch.arange(20)
    graph = from_edge_index(torch.stack([ring, (ring + 1) % 20]), undirected=True)
    result = classify(None, {0: "left", 10: "right"}, graph=graph, method="label_spreading")
    near = np.minimum(np.arange(20), 20 - np.arange(20))
    assert (result.labels[near < 5] == "left").all()
    assert (result.labels[near > 5] == "right").all()


def test_a_graph_that_is_not_symmetric_is_stepped_on_safely() -> None:
    graph = knn_graph(X, k=5, weights="gaussian")
    assert not graph.symmetric
    result = short(graph=graph)
    assert stability(graph, result.step).max_principle
    assert (result.labels == TRUTH).mean() > 0.9


def test_default_step_is_a_share_of_the_largest() -> None:
    result = short()
    assert result.step == pytest.approx(0.7 * stability(result.graph, 0.0).largest_step)
    rate = float((result.graph.degree - result.graph.diagonal).mean())
    assert abs(result.num_steps * result.step * rate - 12) <= result.step * rate
    given = short(graph=result.graph, step=result.step / 2)
    assert abs(given.num_steps * given.step * rate - 3) <= given.step * rate
    assert short(method="no_diffusion", num_steps=7).num_steps == 0
    assert short(method="label_spreading", teleport=0.5).num_steps == 20


@pytest.mark.parametrize("validation", [0.34, [0, 1, 2], "mask"])
def test_validation_stops_the_training(validation: Any) -> None:
    labels = [str(name) if i < 15 else None for i, name in enumerate(TRUTH)]
    if validation == "mask":
        validation = np.arange(60) < 3
    result = classify(X, labels, validation=validation, max_epochs=300)
    assert np.isfinite(result.history["val_loss"]).all()
    assert (result.labels == TRUTH).mean() > 0.9


def test_same_seed_same_numbers_and_the_default_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    a, b = short(seed=5), short(seed=5)
    np.testing.assert_array_equal(a.probabilities, b.probabilities)
    assert torch.equal(torch.get_rng_state(), before)
    assert not np.array_equal(a.probabilities, short(seed=6).probabilities)


def test_order_of_the_rows_does_not_matter() -> None:
    order = np.random.default_rng(0).permutation(60)
    moved = classify(X[order], [FEW[i] for i in order], method="label_spreading")
    straight = classify(X, FEW, method="label_spreading")
    np.testing.assert_allclose(moved.probabilities, straight.probabilities[order], atol=1e-5)


# --- graphs as they come ---


@pytest.mark.parametrize("method", METHODS)
def test_isolated_nodes_and_several_components(method: Any) -> None:
    pairs = torch.tensor([[i, i + 3] for i in range(48)]).T  # three chains; nine nodes without any edge
    graph = from_edge_index(pairs, 60, self_loops=False, normalize="sym", undirected=True)
    assert graph.components()[0] == 12
    result = short(graph=graph, method=method)
    assert np.isfinite(result.probabilities).all()
    assert (result.labels[:51] == TRUTH[:51]).mean() > 0.9
    if method != "no_diffusion":
        assert "9 rows are not connected with any label" in result.message


def test_a_graph_without_edges() -> None:
    graph = Graph(torch.zeros(61, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0))
    assert (short(graph=graph).labels == TRUTH).mean() > 0.9
    spread = short(graph=graph, method="label_spreading")
    assert np.isfinite(spread.probabilities).all()


def test_ten_classes_and_many_duplicates() -> None:
    x = torch.arange(10.0).repeat_interleave(8)[:, None] * torch.ones(1, 3)
    labels = [i // 8 if i % 8 == 0 else -1 for i in range(80)]
    result = short(x, labels, method="label_spreading")
    assert np.isfinite(result.probabilities).all()
    assert result.probabilities.shape == (80, 10)


def test_three_rows() -> None:
    result = short([[0.0, 0.0], [0.1, 0.0], [5.0, 5.0]], ["a", None, "b"], method="label_spreading")
    assert result.labels[1] == "a"


# --- features and labels as people have them ---


@pytest.mark.parametrize("kind", ["list", "float64", "integers", "bool", "sparse", "frame"])
def test_kinds_of_features(kind: str) -> None:
    x = X.numpy()
    if kind == "list":
        read = read_features(x.tolist())
    elif kind == "integers":
        x = (x * 10).astype(int)
        read = read_features(x)
    elif kind == "bool":
        x = x > 4
        read = read_features(x)
    elif kind == "sparse":
        read = read_features(pytest.importorskip("scipy.sparse").csr_array(x))
    elif kind == "frame":
        read = read_features(pytest.importorskip("pandas").DataFrame(x, columns=list("abcd")))
    else:
        read = read_features(X.double())
    assert read.dtype is (torch.float64 if kind == "float64" else torch.float32)
    np.testing.assert_allclose(read, x.astype(float), rtol=1e-6)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["b", None, "a", ""], ["a", "b"]),
        (np.array(["b", np.nan, "a", "a"]), ["a", "b"]),
        (np.array(["b", None, "a", "a"], dtype=object), ["a", "b"]),
        ([1, -1, 0, 1], [0, 1]),
        (np.array([1, -1, 0, 1]), [0, 1]),
        (torch.tensor([5, -1, 2, 2]), [2, 5]),
        ([1.0, math.nan, 0.0, 1.0], [0, 1]),
        ([True, None, False, False], [False, True]),
        ([("x", 1), None, ("x", 0), None], [("x", 0), ("x", 1)]),
        ([1, None, "a", 2], [1, 2, "a"]),
        ({0: "b", 2: "a"}, ["a", "b"]),
        ([0.5, None, 1.5, 1.5], [0.5, 1.5]),
    ],
)
def test_kinds_of_labels(labels: Any, classes: list[Any]) -> None:
    read = read_labels(labels, 4)
    assert read.classes == classes
    assert int(read.numbers[1]) == -1
    known = read.numbers[read.numbers >= 0]
    assert [read.classes[i] for i in known] == read.names(known).tolist()


def test_labels_of_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    assert read_labels(pandas.Series([3, None, 1, 1]), 4).classes == [1, 3]
    assert read_labels(pandas.Series([3, None, 1, 1], dtype="Int64"), 4).classes == [1, 3]
    assert read_labels(pandas.Series(["b", None, "a", "a"], dtype="category"), 4).classes == ["a", "b"]
    assert read_labels(pandas.Series(["b", pandas.NA, "a", "a"], dtype="string"), 4).classes == ["a", "b"]


def test_labels_come_back_in_their_own_kind() -> None:
    assert short(labels=[int(i % 3) if i < 6 else -1 for i in range(60)]).labels.dtype.kind == "i"
    assert short(labels=[("k", i % 3) if i < 6 else None for i in range(60)]).labels[59] == ("k", 2)


def test_scales() -> None:
    pixels = torch.randint(0, 17, (50, 6), generator=torch.Generator().manual_seed(0)).float()
    pixels[0] = 16
    words = (torch.rand(50, 40, generator=torch.Generator().manual_seed(0)) < 0.1).float()
    assert torch.equal(scaled(pixels, "auto"), scaled(pixels, "together"))
    assert torch.equal(scaled(words, "auto"), scaled(words, "rows"))
    assert torch.equal(scaled(X, "auto"), scaled(X, "columns"))
    assert torch.equal(scaled(X, "none"), X)
    sums = scaled(words, "rows").sum(1)
    assert bool(((sums - 1).abs() < 1e-6).logical_or(sums == 0).all())
    constant = torch.cat([X, torch.full((60, 1), 0.1)], 1)
    columns = scaled(constant, "columns")
    torch.testing.assert_close(columns[:, :4].square().mean(0), torch.ones(4))
    assert float(columns[:, 4].abs().max()) < 1e-5
    torch.testing.assert_close(scaled(pixels, "together").square().mean(), torch.tensor(1.0))


def test_units_do_not_matter() -> None:
    units = torch.tensor([1.0, 1000.0, 0.001, 7.0])
    np.testing.assert_allclose(short(X * units).probabilities, short(X).probabilities, atol=1e-3)


# --- cross-validation ---


@pytest.mark.parametrize("method", ["coin", "label_spreading"])
def test_cross_validation_hides_every_label_once(method: Any) -> None:
    labels = [str(name) if i < 21 else None for i, name in enumerate(TRUTH)]
    found = short(labels=labels, method=method).cross_validate(3)
    assert len(found.fold_accuracies) == 3
    assert found.rows.tolist() == list(range(21))
    assert found.accuracy == (found.predicted == TRUTH[:21]).mean()
    assert found.accuracy > 0.9
    assert set(found.class_accuracies) == set(NAMES)
    assert "3-fold cross-validation over 21 given labels" in repr(found)


def test_cross_validation_does_not_see_what_it_hides() -> None:
    # Labels that say nothing of the features: what is found must be no better than chance.
    random = np.random.default_rng(0)
    x = random.standard_normal((80, 5))
    labels = random.integers(0, 2, 80)
    assert short(x, labels, method="label_spreading").cross_validate().accuracy < 0.7


def test_cross_validation_with_two_labels_a_class_keeps_one_of_each() -> None:
    assert len(short(method="label_spreading").cross_validate(10).fold_accuracies) == 6


def test_a_class_with_one_label_cannot_be_cross_validated() -> None:
    labels = list(FEW)
    labels[0] = None
    result = short(labels=labels, method="label_spreading")
    with pytest.raises(ValueError, match="cross_validate: labels: expected two of every class, .* class 'ant' has one"):
        result.cross_validate()
    with pytest.raises(ValueError, match="folds"):
        result.cross_validate(1)


# --- what the result says ---


def test_result_speaks() -> None:
    result = short()
    assert repr(result).splitlines()[0] == "classification of 60 rows by diffusion"
    assert "6 given, 54 predicted" in repr(result)
    assert "ant: 20, bee: 20, cat: 20" in repr(result)
    assert result.check() is result


def test_all_labelled_is_allowed_and_said() -> None:
    result = short(labels=TRUTH)
    np.testing.assert_array_equal(result.labels, TRUTH)
    assert "nothing was predicted" in result.message


def test_breakdown_is_told() -> None:
    with pytest.warns(RuntimeWarning, match="breakdown"):
        result = classify(1e38 * X.sign(), FEW, scale="none", graph=knn_graph(X))
    assert not result.converged
    with pytest.raises(ConvergenceError, match="classify: breakdown"):
        result.check()


@pytest.mark.parametrize("d", [1, 2, 4])
def test_plot(d: int) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    x, _ = table(d=4)
    ax = short(x[:, :d], method="label_spreading").plot()
    assert {text.get_text() for text in ax.get_legend().get_texts()} == set(NAMES)


# --- what is wrong ---


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": [None] * 60}, ValueError, "classify: labels: .* at least two classes, got none"),
        ({"labels": ["a"] * 3 + [None] * 57}, ValueError, "labels: .* got 3 times 'a' and nothing else"),
        ({"labels": [1] * 30 + [-1] * 30}, ValueError, "-1 means unknown: name a class otherwise"),
        ({"labels": FEW[:-1]}, ValueError, "classify: labels: expected 60, one a row, got 59"),
        ({"labels": {60: "a", 0: "b"}}, ValueError, r"classify: labels: expected rows 0\.\.59 as keys, got 60"),
        ({"labels": "abc"}, TypeError, "classify: labels: expected a sequence"),
        ({"labels": 3}, TypeError, "classify: labels: expected a sequence"),
        ({"labels": np.zeros((60, 2))}, ValueError, r"classify: labels: expected one dimension, got shape \(60, 2\)"),
        ({"labels": [[1], [2]] + [None] * 58}, TypeError, "classify: labels: expected words or numbers, got a list"),
        ({"x": None}, TypeError, "classify: x: expected features, got None"),
        ({"x": [["a", "b"]] * 60}, TypeError, "classify: x: expected numbers"),
        ({"x": X[:, 0]}, ValueError, r"classify: x: expected shape \(n, d\).*a single feature is x\[:, None\]"),
        ({"x": X[:, :0]}, ValueError, "classify: x: expected shape"),
        ({"x": X + 1j}, TypeError, "classify: x: expected real numbers"),
        (
            {"x": X.index_put((torch.tensor([7]), torch.tensor([2])), torch.tensor(math.nan))},
            ValueError,
            r"classify: x: expected finite values, got nan in row 7, column 2 \(1 such rows\)",
        ),
        ({"method": "magic"}, ValueError, "classify: method"),
        ({"scale": "magic"}, ValueError, "classify: scale"),
        ({"k": 0}, ValueError, "classify: k"),
        ({"k": 60}, ValueError, r"classify: k: expected 1\.\.59, fewer than the 60 rows, got 60"),
        ({"step": -1.0}, ValueError, "classify: step"),
        ({"step": 50.0}, StabilityError, "largest safe step"),
        ({"num_steps": -1}, ValueError, "classify: num_steps"),
        ({"num_steps": 1.5}, ValueError, "classify: num_steps"),
        ({"teleport": 1.0}, ValueError, "classify: teleport"),
        ({"max_epochs": 0}, ValueError, "classify: max_epochs"),
        ({"graph": X}, TypeError, "classify: graph: expected a kantor.graph.Graph, got Tensor"),
        ({"graph": knn_graph(X[:30])}, ValueError, "classify: graph: expected 60 nodes, one a row of x, got 30"),
        ({"validation": 1.5}, ValueError, "classify: validation: expected a share"),
        ({"validation": 0.01}, ValueError, "classify: validation: a share of 0.01 of the labels is none"),
        ({"validation": [0, 3]}, ValueError, "classify: validation: .* one of every class to learn from"),
        ({"validation": [40]}, ValueError, "classify: validation: expected some rows with labels"),
        ({"validation": [60]}, ValueError, r"classify: validation: expected rows 0\.\.59"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        classify(**({"x": X, "labels": FEW} | change))


def test_errors_of_data_frames() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X.numpy(), columns=["a", "b", "c", "d"])
    frame.loc[5, "c"] = np.nan
    with pytest.raises(ValueError, match=r"classify: x: .* got nan in row 5, column 'c' \(1 such rows\)"):
        classify(frame, FEW)
    with pytest.raises(TypeError, match="classify: x: expected numbers, got text in town; leave out"):
        classify(frame.assign(town="Rome"), FEW)


def test_two_rows_are_too_few() -> None:
    with pytest.raises(ValueError, match="classify: x: expected at least 3 rows"):
        classify([[0.0], [1.0]], ["a", "b"])


@pytest.mark.parametrize(("columns", "hidden"), [(8, 64), (300, 300), (2100, 256)])
def test_size_of_the_network(columns: int, hidden: int) -> None:
    """A weight for each pair of columns is too much where there are thousands."""
    x = torch.randn(12, columns, generator=torch.Generator().manual_seed(0))
    model = classify(x, {0: "a", 1: "b"}, k=3, max_epochs=1).model
    assert model is not None
    assert max(p.shape[0] for p in model.parameters() if p.ndim == 2 and p.shape[1] == columns) == hidden
