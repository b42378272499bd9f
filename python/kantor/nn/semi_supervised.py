"""Training of a network that sees all nodes of a graph and the labels of some of them."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kantor._checks import check_finite, check_float, check_tensor
from kantor._progress import steps_bar
from kantor.graph._arguments import Similarity, check_choice, check_count
from kantor.graph.graph import Graph
from kantor.linalg._training import after_step
from kantor.nn._fit_result import FitInfo, FitResult, FitStatus
from kantor.nn.node_splits import check_labels

_SPARSE = 0.05  # share of entries that are not zero below which products with sparse features are several times faster
_EPOCHS_WITHOUT_VALIDATION = 150


def fit_nodes(
    model: nn.Module,
    x: Tensor,
    graph: Similarity,
    labels: Tensor,
    train: Tensor,
    val: Tensor | None = None,
    *,
    lr: float = 0.01,
    weight_decay: float = 5e-4,
    max_epochs: int | None = None,
    patience: int = 50,
    strict: bool = True,
    seed: int | None = None,
    callback: Callable[[FitInfo], object] | None = None,
    progress: bool = False,
    interrupt: Literal["raise", "return"] = "raise",
    resume: dict[str, Any] | None = None,
) -> FitResult:
    """Train a network, in place, on the labels of some nodes of a graph; it sees the features and edges of all.

    Every epoch is one step of Adam on the cross-entropy of the training nodes. Training ends when for `patience` epochs
    neither the loss nor the accuracy on the validation nodes improved. The state that is kept is that of the lowest
    validation loss.

    Parameters
    ----------
    model : torch.nn.Module
        ``model(x, graph)`` returns scores ``(n, C)``, as :class:`DiffResNet` does; of a model with a method
        ``log_prob(x, graph)``, as :class:`COIN`, that is taken.
    x : Tensor (n, d)
        Features. Where nearly all entries are zero, as for bags of words, sparse CSR is several times faster; a dense
        x is turned into that for models which say ``accepts_sparse``.
    graph : Graph or Tensor
        Of n nodes.
    labels : Tensor (n,)
        Classes 0 .. C - 1, integers; -1 or anything else where there is none.
    train, val : Tensor
        Nodes, as indices or as masks ``(n,)``. Without `val` all epochs are made.
    lr, weight_decay : float
        Of Adam.
    max_epochs : int, optional
        Default: 10 000 with validation nodes, 150 without.
    patience : int
        Epochs without improvement after which to stop.
    strict : bool
        Whether only a loss below all before is an improvement, and an accuracy above: COIN's recipe. False, as in that
        of Diff-ResNet: equality counts, so that training goes on as long as the accuracy stays at its best.
    seed : int, optional
        Of the dropout. Default: torch's default generator is used as it is. The weights are the model's own: make it
        after ``torch.manual_seed``.
    callback : callable, optional
        Called with a :class:`FitInfo` after each epoch; returning True ends the training.
    progress : bool
        Show a bar (tqdm, or log records without it).
    interrupt : "raise" or "return"
        What Ctrl-C does, once the best state is in place: raise KeyboardInterrupt, or return the result.
    resume : dict, optional
        ``state`` of an earlier result: go on where it ended, with the same numbers as one longer training.

    Returns
    -------
    FitResult
        Never raises for a training that did not converge; ``result.check()`` does.

    Raises
    ------
    TypeError
        labels are no integers, nodes neither integers nor a mask.
    ValueError
        Features that are not finite, lengths that do not fit, no training nodes, nodes without label or in both sets.

    Warns
    -----
    RuntimeWarning
        The loss became NaN or infinite.

    Notes
    -----
    A model that gives the same in training and in evaluation, that is without dropout, is evaluated by the pass that
    trains it, one an epoch. Deterministic for a seed on one machine with one number of threads.

    Source: Wang, Dou, Bao and Shi, *Diffusion Mechanism in Residual Neural Network: Theory and Applications*, IEEE
    TPAMI 46(2), 2024; Wang, Bao and Shi, *Convection-Diffusion Equation*, arXiv 2403.15726: citation graphs.

    Examples
    --------
    >>> import torch
    >>> from kantor.graph import knn_graph
    >>> from kantor.nn import DiffResNet, fit_nodes
    >>> random = torch.Generator().manual_seed(0)
    >>> labels = torch.arange(60) % 2
    >>> x = torch.randn(60, 3, generator=random) + 4 * labels[:, None]
    >>> _ = torch.manual_seed(0)
    >>> model = DiffResNet(3, 2, step=0.5, num_steps=40)
    >>> result = fit_nodes(model, x, knn_graph(x), labels, train=torch.tensor([0, 1]), max_epochs=50)
    >>> result.accuracy(torch.arange(2, 60)) > 0.9
    True
    """
    x, labels, train, val = _checked(model, x, graph, labels, train, val)
    check_choice("fit_nodes", interrupt, "interrupt", ("raise", "return"))
    patience = check_count("fit_nodes", patience, "patience", 1)
    for name, number in (("lr", lr), ("weight_decay", weight_decay)):
        if not (isinstance(number, int | float) and 0 <= number < math.inf):
            raise ValueError(f"fit_nodes: {name}: expected a finite number >= 0, got {number!r}")
    if max_epochs is None:
        max_epochs = _EPOCHS_WITHOUT_VALIDATION if val is None else 10_000
    max_epochs = check_count("fit_nodes", max_epochs, "max_epochs")

    training = _Training(model, x, graph, labels, train, val, lr, weight_decay, strict, patience)
    if resume is not None:
        training.load(resume)
    before, started, status = training.seconds, time.perf_counter(), None
    with (
        torch.random.fork_rng(enabled=seed is not None or resume is not None),
        steps_bar(progress, "fit_nodes", max_epochs, start=training.epoch) as advance,
        after_step() as asked,
    ):
        if resume is not None:
            torch.set_rng_state(resume["random"])
        elif seed is not None:
            torch.manual_seed(seed)
        while status is None and training.epoch < max_epochs:
            status = training.make_epoch()
            training.seconds = before + time.perf_counter() - started
            advance(training.epoch, training.note)
            if asked():
                status = FitStatus.INTERRUPTED
            elif status is None and callback is not None and callback(training.info) is True:
                status = FitStatus.STOPPED
        state = training.state()
    result = training.result(status, before + time.perf_counter() - started, state)
    if status is FitStatus.INTERRUPTED and interrupt == "raise":
        raise KeyboardInterrupt
    if status is FitStatus.BREAKDOWN:
        warnings.warn(f"fit_nodes: {result.message}", RuntimeWarning, stacklevel=2)
    return result


class _Training:
    """The weights, what the validation nodes have said so far, and the state that is kept."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        graph: Similarity,
        labels: Tensor,
        train: Tensor,
        val: Tensor | None,
        lr: float,
        weight_decay: float,
        strict: bool,
        patience: int,
    ) -> None:
        self.model, self.x, self.graph, self.labels = model, x, graph, labels
        self.train, self.val, self.strict, self.patience = train, val, strict, patience
        self.adam = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
        self.epoch, self.seconds = 0, 0.0
        self.history: dict[str, list[float]] = {"loss": [], "val_loss": [], "val_accuracy": []}
        self.lowest, self.highest, self.improved = math.inf, -math.inf, 0  # loss, accuracy, and the epoch of either
        self.kept = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.kept_epoch, self.kept_loss, self.kept_accuracy = 0, math.inf, -math.inf
        self.same_in_evaluation: bool | None = None

    def log_prob(self) -> Tensor:
        """Logarithms of the probabilities of the classes, ``(n, C)``."""
        own: Callable[..., Tensor] | None = getattr(self.model, "log_prob", None)
        if own is not None:
            return own(self.x, self.graph)
        scores: Tensor = self.model(self.x, self.graph)
        return scores.log_softmax(1)

    def evaluate(self) -> Tensor:
        """Logarithms of the probabilities in evaluation mode."""
        self.model.eval()
        with torch.no_grad():
            return self.log_prob()

    def make_epoch(self) -> FitStatus | None:
        """One step of Adam, after a look at the state before it; how the training ends, if it does."""
        self.model.train()
        log_prob = self.log_prob()
        loss = functional.nll_loss(log_prob[self.train], self.labels[self.train])
        if not math.isfinite(float(loss.detach())):
            return FitStatus.BREAKDOWN
        if self.val is None:
            seen = math.nan, math.nan
            self.keep(math.nan, math.nan)
        else:
            seen = self.validate(log_prob.detach(), self.val)
            if self.epoch - self.improved >= self.patience:
                return FitStatus.CONVERGED
        for values, value in zip(self.history.values(), (float(loss.detach()), *seen), strict=True):
            values.append(value)
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        self.epoch += 1
        return None

    def validate(self, in_training: Tensor, val: Tensor) -> tuple[float, float]:
        """Loss and accuracy on the validation nodes; keeps the state if it is the best."""
        log_prob = in_training if self.same_in_evaluation else self.evaluate()
        if self.same_in_evaluation is None:
            self.same_in_evaluation = torch.equal(log_prob, in_training)
        log_prob, labels = log_prob[val], self.labels[val]
        loss = float(functional.nll_loss(log_prob, labels))
        accuracy = float((log_prob.argmax(1) == labels).double().mean())
        better = (
            loss < self.lowest or accuracy > self.highest
            if self.strict
            else loss <= self.lowest or accuracy >= self.highest
        )
        self.improved = self.epoch if better else self.improved
        self.lowest, self.highest = min(loss, self.lowest), max(accuracy, self.highest)
        if loss <= self.kept_loss:
            self.keep(loss, accuracy)
        return loss, accuracy

    def keep(self, loss: float, accuracy: float) -> None:
        """Copy the weights."""
        self.kept_epoch, self.kept_loss, self.kept_accuracy = self.epoch, loss, accuracy
        for name, value in self.model.state_dict().items():
            self.kept[name].copy_(value.detach())

    @property
    def info(self) -> FitInfo:
        """The last epoch, for a callback."""
        return FitInfo(self.epoch, *(values[-1] for values in self.history.values()))

    @property
    def note(self) -> str:
        """The last epoch, for a progress bar."""
        loss, _, accuracy = (values[-1] if values else math.nan for values in self.history.values())
        return f"loss {loss:.4f}" + (f", validation {100 * accuracy:.1f} %" if math.isfinite(accuracy) else "")

    def state(self) -> dict[str, Any]:
        """What a continuation needs."""
        return {
            "model": copy.deepcopy(self.model.state_dict()),
            "adam": copy.deepcopy(self.adam.state_dict()),
            "random": torch.get_rng_state(),
            "history": copy.deepcopy(self.history),
            **{name: getattr(self, name) for name in _NUMBERS},
            "kept": self.kept,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        if missing := [name for name in ("model", "adam", "random", "history", "kept", *_NUMBERS) if name not in state]:
            raise ValueError(f"fit_nodes: resume: expected the state of a FitResult, got one without {missing[0]!r}")
        self.model.load_state_dict(state["model"])
        self.adam.load_state_dict(copy.deepcopy(state["adam"]))
        self.history = copy.deepcopy(state["history"])
        self.kept = {name: value.clone() for name, value in state["kept"].items()}
        for name in _NUMBERS:
            setattr(self, name, state[name])

    def result(self, status: FitStatus | None, seconds: float, state: dict[str, Any]) -> FitResult:
        """Put the state to be kept in place, and tell how it went."""
        last = self.val is None and status is not FitStatus.BREAKDOWN
        if not last:
            self.model.load_state_dict(self.kept)
        probabilities = self.evaluate().exp()
        return FitResult(
            model=self.model,
            status=status or (FitStatus.COMPLETED if self.val is None else FitStatus.MAX_EPOCHS),
            epochs=self.epoch,
            best_epoch=self.epoch if last else self.kept_epoch,
            probabilities=probabilities,
            predicted=probabilities.argmax(1),
            labels=self.labels,
            val_accuracy=math.nan if self.val is None or self.epoch == 0 else self.kept_accuracy,
            history={name: np.array(values) for name, values in self.history.items()},
            seconds=seconds,
            state=state,
        )


_NUMBERS = (
    "epoch",
    "seconds",
    "lowest",
    "highest",
    "improved",
    "kept_epoch",
    "kept_loss",
    "kept_accuracy",
    "same_in_evaluation",
)


def _check_nodes(name: str, nodes: object, labels: Tensor) -> Tensor:
    """Indices of nodes that have labels."""
    index = check_tensor(nodes, "fit_nodes", name)
    if index.dtype is torch.bool and index.shape == labels.shape:
        index = index.nonzero()[:, 0]
    if index.ndim != 1 or index.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"fit_nodes: {name}: expected indices (m,) in int32 or int64, or a mask ({len(labels)},), got "
            f"{str(index.dtype)[6:]} of shape {tuple(index.shape)}"
        )
    if not index.numel():
        raise ValueError(f"fit_nodes: {name}: expected at least one node, got none")
    if not 0 <= int(index.min()) <= int(index.max()) < len(labels):
        raise ValueError(f"fit_nodes: {name}: expected nodes 0..{len(labels) - 1}, got {index.min()}..{index.max()}")
    index = index.long().to(labels.device)
    if bool((labels[index] < 0).any()):
        node = int(index[labels[index] < 0][0])
        raise ValueError(f"fit_nodes: {name}: node {node} has no label (it is {int(labels[node])}); leave it out")
    return index


def _checked(
    model: nn.Module, x: object, graph: Similarity, labels: object, train: object, val: object
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    if not isinstance(x, Tensor) or x.layout not in (torch.strided, torch.sparse_csr):
        got = x.layout if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"fit_nodes: x: expected a tensor, dense or sparse CSR, got {got}")
    check_float(x, "fit_nodes", "x")
    if x.ndim != 2:
        raise ValueError(f"fit_nodes: x: expected shape (n, d), got {tuple(x.shape)}")
    check_finite(x if x.layout is torch.strided else x.values(), "fit_nodes", "x")
    y = check_labels("fit_nodes", labels).to(x.device)
    if len(y) != x.shape[0]:
        raise ValueError(f"fit_nodes: labels: expected {x.shape[0]}, one a row of x, got {len(y)}")
    nodes = graph.num_nodes if isinstance(graph, Graph) else graph.shape[-1]
    if nodes != x.shape[0]:
        raise ValueError(f"fit_nodes: graph: expected {x.shape[0]} nodes, one a row of x, got {nodes}")
    train = _check_nodes("train", train, y)
    val = None if val is None else _check_nodes("val", val, y)
    if val is not None and bool((both := torch.isin(val, train)).any()):
        raise ValueError(f"fit_nodes: val: node {int(val[both][0])} is also in train; keep them apart")
    dense = x.layout is torch.strided and getattr(model, "accepts_sparse", False)
    if dense and int(x.count_nonzero()) < _SPARSE * x.numel():
        with warnings.catch_warnings():  # torch calls its sparse tensors beta
            warnings.simplefilter("ignore")
            x = x.to_sparse_csr()
    return x, y, train, val


__all__ = ["fit_nodes"]
