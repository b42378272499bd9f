"""Training on the nodes of a graph: what is drawn, what is kept, when it ends, how it goes on."""

from __future__ import annotations

import copy
import math
import os
import signal
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clusters import clusters, graph_of
from kantor import ConvergenceError
from kantor.nn import COIN, DiffResNet, FitInfo, FitResult, FitStatus, fit_nodes, split_per_class

X, LABELS = clusters(90)
GRAPH = graph_of(X)
SPLIT = split_per_class(LABELS, train=2, val=5, seed=0)


def network(dropout: float = 0.0, seed: int = 0) -> DiffResNet:
    torch.manual_seed(seed)
    return DiffResNet(4, 3, step=0.5, num_steps=5, dropout=dropout)


def fit(model: nn.Module | None = None, val: Tensor | None = SPLIT.val, **options: Any) -> FitResult:
    return fit_nodes(model or network(), X, GRAPH, LABELS, SPLIT.train, val, **options)


# --- the draw ---


def test_split_has_so_many_of_each_class_and_no_node_twice() -> None:
    labels = torch.tensor([0] * 10 + [1] * 12 + [-1] * 5 + [2] * 9)
    split = split_per_class(labels, train=3, val=4, seed=5)
    assert labels[split.train].bincount().tolist() == [3, 3, 3]
    assert labels[split.val].bincount().tolist() == [4, 4, 4]
    assert labels[split.test].bincount().tolist() == [3, 5, 2]
    assert len(torch.cat(split).unique()) == 31


def test_split_is_that_of_the_published_protocol() -> None:
    labels, random = torch.arange(40) % 2, np.random.RandomState(7)
    y = labels.numpy()
    train = np.concatenate([random.choice(np.flatnonzero(y == c), 4, replace=False) for c in (0, 1)])
    rest = np.setdiff1d(np.arange(40), train)
    val = np.concatenate([random.choice(rest[y[rest] == c], 3, replace=False) for c in (0, 1)])
    generator = np.random.RandomState(7)
    split = split_per_class(labels, 4, 3, generator)
    np.testing.assert_array_equal(split.train, train)
    np.testing.assert_array_equal(split.val, val)
    assert generator.randint(10**6) == random.randint(10**6)  # seeds of initialisations follow


def test_split_without_validation() -> None:
    split = split_per_class(LABELS, train=1, val=0)
    assert (len(split.train), len(split.val), len(split.test)) == (3, 0, 87)


def test_split_says_which_class_is_too_small() -> None:
    with pytest.raises(ValueError, match="split_per_class: labels: .* class 1 has 3; lower train or val"):
        split_per_class(torch.tensor([0, 0, 0, 0, 1, 1, 1]), train=2, val=2)
    with pytest.raises(TypeError, match="split_per_class: labels: expected integers"):
        split_per_class(torch.rand(5), 1, 1)
    with pytest.raises(ValueError, match="split_per_class: train"):
        split_per_class(LABELS, train=0)


# --- the training ---


@pytest.mark.parametrize("kind", ["diffusion", "coin"])
def test_learns_from_two_labels_a_class(kind: str) -> None:
    torch.manual_seed(0)
    model = network() if kind == "diffusion" else COIN(4, 3, step=0.5, num_steps=5)
    result = fit(model, val=None, max_epochs=40).check()
    assert result.status is FitStatus.COMPLETED
    assert result.accuracy(SPLIT.test) > 0.95
    torch.testing.assert_close(result.probabilities.sum(1), torch.ones(90), rtol=0, atol=1e-5)
    assert result.model is model
    assert not model.training


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_one_epoch_is_one_step_of_adam(dropout: float) -> None:
    model, twin = network(dropout), network(dropout)
    result = fit(model, None, max_epochs=3, lr=0.02, weight_decay=1e-3, seed=4)
    adam = torch.optim.Adam(twin.parameters(), lr=0.02, weight_decay=1e-3)
    torch.manual_seed(4)
    losses = []
    for _ in range(3):
        loss = nn.functional.cross_entropy(twin(X, GRAPH)[SPLIT.train], LABELS[SPLIT.train])
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(float(loss.detach()))
    np.testing.assert_allclose(result.history["loss"], losses, rtol=1e-5)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_state_of_the_lowest_validation_loss_is_kept() -> None:
    result = fit(max_epochs=40, lr=0.1)
    history = result.history["val_loss"]
    assert result.best_epoch == int(np.flatnonzero(history == history.min())[-1])
    with torch.no_grad():
        scores = result.model(X, GRAPH)[SPLIT.val]
    assert float(nn.functional.cross_entropy(scores, LABELS[SPLIT.val])) == pytest.approx(history.min(), rel=1e-5)
    assert result.val_accuracy == result.accuracy(SPLIT.val)


class Sequence(nn.Module):
    """Logarithms of probabilities of given certainties for the right class, one an epoch."""

    def __init__(self, certainty: list[float], right: list[bool]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.certainty, self.right, self.epoch = certainty, right, -1

    def log_prob(self, x: Tensor, graph: Any) -> Tensor:
        self.epoch += self.training
        at = min(self.epoch, len(self.certainty) - 1)
        p = torch.full((90, 3), (1 - self.certainty[at]) / 2)
        p[torch.arange(90), LABELS if self.right[at] else (LABELS + 1) % 3] = self.certainty[at]
        return p.log() + 0 * self.weight


def test_patience() -> None:
    # The loss falls for three epochs, then neither it nor the accuracy improves.
    model = Sequence([0.4, 0.5, 0.6, 0.5, 0.5, 0.5], [True, True, True, False, False, False])
    result = fit(model, patience=4)
    assert result.status is FitStatus.CONVERGED
    assert result.epochs == 6
    assert result.best_epoch == 2


def test_strict_counts_ties_as_no_improvement() -> None:
    constant = [0.5] * 5, [True] * 5
    assert fit(Sequence(*constant), patience=3, strict=True).epochs == 3
    assert fit(Sequence(*constant), patience=3, strict=False, max_epochs=20).status is FitStatus.MAX_EPOCHS


def test_a_model_without_dropout_is_evaluated_by_the_pass_that_trains_it() -> None:
    class Counting(DiffResNet):
        calls = 0

        def forward(self, x: Tensor, graph: Any) -> Tensor:
            self.calls += 1
            return super().forward(x, graph)

    for dropout, calls in ((0.0, 10 + 2), (0.5, 2 * 10 + 1)):
        model = Counting(4, 3, step=0.5, num_steps=3, dropout=dropout)
        fit(model, max_epochs=10, patience=100)
        assert model.calls == calls


def test_sparse_features_give_the_same() -> None:
    x = X * (X > 7)  # few entries left
    assert 0 < int(x.count_nonzero()) < 0.3 * x.numel()
    dense = fit_nodes(network(), x, GRAPH, LABELS, SPLIT.train, max_epochs=5)
    sparse = fit_nodes(network(), x.to_sparse_csr(), GRAPH, LABELS, SPLIT.train, max_epochs=5)
    torch.testing.assert_close(dense.probabilities, sparse.probabilities, rtol=1e-4, atol=1e-5)


def test_masks_are_indices() -> None:
    mask = torch.zeros(90, dtype=torch.bool)
    mask[SPLIT.train] = True
    by_mask = fit_nodes(network(), X, GRAPH, LABELS, mask, max_epochs=5)
    in_order = fit_nodes(network(), X, GRAPH, LABELS, SPLIT.train.sort().values, max_epochs=5)
    torch.testing.assert_close(by_mask.probabilities, in_order.probabilities, rtol=0, atol=0)


def test_the_labels_outside_do_not_matter() -> None:
    hidden = torch.full_like(LABELS, -1)
    hidden[SPLIT.train] = LABELS[SPLIT.train]
    one = fit_nodes(network(), X, GRAPH, hidden, SPLIT.train, max_epochs=5)
    torch.testing.assert_close(one.probabilities, fit(val=None, max_epochs=5).probabilities, rtol=0, atol=0)


def test_same_seed_same_numbers_and_the_default_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    model = network(dropout=0.3)
    start = copy.deepcopy(model)
    torch.set_rng_state(before)
    a = fit(model, max_epochs=5, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    b = fit(start, max_epochs=5, seed=3)
    assert torch.equal(a.probabilities, b.probabilities)


# --- how it ends ---


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_going_on_gives_the_numbers_of_one_longer_training(dropout: float) -> None:
    whole = fit(network(dropout), max_epochs=12, patience=100, seed=1)
    part = fit(network(dropout), max_epochs=5, patience=100, seed=1)
    assert part.status is FitStatus.MAX_EPOCHS
    rest = fit(network(dropout, seed=9), max_epochs=12, patience=100, resume=part.state)
    assert rest.epochs == 12
    np.testing.assert_array_equal(rest.history["loss"], whole.history["loss"])
    assert torch.equal(rest.probabilities, whole.probabilities)


def test_callback_sees_every_epoch_and_may_stop() -> None:
    seen: list[FitInfo] = []

    def callback(info: FitInfo) -> bool:
        seen.append(info)
        return info.epoch == 4

    result = fit(callback=callback)
    assert result.status is FitStatus.STOPPED
    assert [info.epoch for info in seen] == [1, 2, 3, 4]
    assert all(math.isfinite(value) for info in seen for value in (info.loss, info.val_loss, info.val_accuracy))
    assert not result.converged
    with pytest.raises(ConvergenceError, match="fit_nodes: stopped") as caught:
        result.check()
    assert caught.value.result is result


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread")
@pytest.mark.parametrize("interrupt", ["return", "raise"])
def test_ctrl_c_leaves_the_best_state_in_place(interrupt: Any) -> None:
    model = network()
    losses: list[float] = []

    def callback(info: FitInfo) -> None:
        losses.append(info.val_loss)
        if info.epoch == 6:
            os.kill(os.getpid(), signal.SIGINT)

    if interrupt == "return":
        result = fit(model, callback=callback, interrupt="return")
        assert result.status is FitStatus.INTERRUPTED
        assert fit(model, max_epochs=9, patience=50, resume=result.state).epochs == 9
        return
    with pytest.raises(KeyboardInterrupt):
        fit(model, callback=callback)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(X, GRAPH)[SPLIT.val], LABELS[SPLIT.val])
    assert float(loss) <= min(losses)


def test_breakdown_is_told_and_what_was_before_is_kept() -> None:
    model = Sequence([0.4, 0.5, math.nan], [True, True, True])
    with pytest.warns(RuntimeWarning, match="fit_nodes: breakdown: The loss became NaN"):
        result = fit(model)
    assert result.status is FitStatus.BREAKDOWN
    assert (result.epochs, result.best_epoch) == (2, 1)


def test_result_speaks() -> None:
    result = fit(max_epochs=3)
    assert repr(result).splitlines()[0] == "training of DiffResNet on 90 nodes"
    assert "max_epochs" in repr(result)
    assert "resume=result.state" in result.message
    assert {"epochs", "validation"} <= {line.split()[0] for line in repr(result).splitlines()[1:-1]}
    assert "none" in repr(fit(val=None, max_epochs=3))
    pytest.importorskip("matplotlib")
    ax = result.plot()
    assert ax.get_xlabel() == "epoch"
    assert {text.get_text() for text in ax.get_legend().get_texts()} >= {"training loss", "validation loss"}


def test_no_epoch_at_all() -> None:
    result = fit(max_epochs=0)
    assert result.epochs == 0
    assert "none" in repr(result)


# --- what is wrong ---


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X.numpy()}, TypeError, "fit_nodes: x: expected a tensor"),
        ({"x": X.to(torch.int64)}, TypeError, "fit_nodes: x: expected dtype"),
        ({"x": X[0]}, ValueError, r"fit_nodes: x: expected shape \(n, d\)"),
        ({"x": X.index_fill(0, torch.tensor([3]), math.nan)}, ValueError, r"fit_nodes: x: expected finite .*\(3, 0\)"),
        ({"labels": LABELS[:-1]}, ValueError, "fit_nodes: labels: expected 90, one a row of x, got 89"),
        ({"labels": LABELS.float()}, TypeError, "fit_nodes: labels: expected integers"),
        ({"labels": LABELS[:, None]}, ValueError, r"fit_nodes: labels: expected shape \(n,\)"),
        ({"graph": graph_of(X[:50])}, ValueError, "fit_nodes: graph: expected 90 nodes, one a row of x, got 50"),
        ({"train": torch.tensor([], dtype=torch.int64)}, ValueError, "fit_nodes: train: expected at least one node"),
        ({"train": torch.tensor([90])}, ValueError, r"fit_nodes: train: expected nodes 0\.\.89"),
        ({"train": torch.tensor([0.5])}, TypeError, "fit_nodes: train: expected indices"),
        ({"val": SPLIT.train}, ValueError, "fit_nodes: val: node .* is also in train"),
        ({"labels": LABELS - 1}, ValueError, "fit_nodes: train: node .* has no label"),
        ({"lr": -1.0}, ValueError, "fit_nodes: lr"),
        ({"patience": 0}, ValueError, "fit_nodes: patience"),
        ({"interrupt": "no"}, ValueError, "fit_nodes: interrupt"),
        ({"resume": {}}, ValueError, "fit_nodes: resume: expected the state of a FitResult"),
        ({"labels": LABELS + 7}, IndexError, "out of bounds"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": X, "graph": GRAPH, "labels": LABELS, "train": SPLIT.train, "val": SPLIT.val} | change
    with pytest.raises(error, match=message):
        fit_nodes(network(), **arguments)
