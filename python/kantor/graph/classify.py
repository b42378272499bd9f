"""The front door: a table, a few labels, and a class for every row."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from kantor.graph import _native
from kantor.graph._arguments import check_choice, check_count, check_fraction, check_step
from kantor.graph._classify_result import ClassifyResult
from kantor.graph._labels import read_features, read_labels, scaled
from kantor.graph.graph import Graph
from kantor.graph.knn_graph import knn_graph
from kantor.graph.stability import stability

if TYPE_CHECKING:
    from kantor.nn import FitResult

Method = Literal["diffusion", "coin", "label_spreading", "no_diffusion"]
Scale = Literal["auto", "columns", "together", "rows", "none"]

_NEIGHBOURS = 10
_REACH, _REACH_GIVEN = 12.0, 3.0  # step * num_steps * mean rate, on nearest neighbours and on a given graph
_MOST_STEPS = 200
_SAFE_SHARE = 0.7  # of the largest stable step
_WITHOUT_STEP: dict[Method, float] = {"no_diffusion": 0.0, "label_spreading": 1.0}
_SPREADING_TELEPORT = 0.2
_SPREADING_RTOL = 1e-6
_HIDDEN = 64
_WIDE = range(256, 2049)  # features for which the residual block has one layer, as the papers' for bags of words
_VERY_WIDE, _HIDDEN_VERY_WIDE = 2049, 256  # from so many on d^2 weights take minutes to train: so many hidden ones


def classify(
    x: Any,
    labels: Any,
    *,
    graph: Graph | None = None,
    method: Method = "diffusion",
    k: int | None = None,
    step: float | None = None,
    num_steps: int | None = None,
    teleport: float | None = None,
    scale: Scale = "auto",
    validation: Any = None,
    max_epochs: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> ClassifyResult:
    """Classify the rows of a table from the labels of a few of them.

    Rows are joined with those most like them; along this graph information flows from rows with labels to rows without.
    Nothing has to be tuned for a first answer, and ``result.cross_validate()`` tells how good it is.

    Parameters
    ----------
    x : Tensor, array or data frame (n, d)
        Features, a row a point: numbers, finite. None with `graph` and method "label_spreading".
    labels : sequence, array, series or mapping
        A class for each row: words or whole numbers. Unknown are -1, None, NaN and the empty word. Or a mapping from
        rows to classes, for some rows.
    graph : Graph, optional
        Of n nodes, where you have one: citations, contacts, streets. Default: ``knn_graph`` of the scaled features with
        self-tuning weights.
    method : "diffusion", "coin", "label_spreading" or "no_diffusion"
        * diffusion: a network whose hidden features diffuse on the graph (Diff-ResNet).
        * coin: a network whose probabilities diffuse (COIN); often better with very few labels.
        * label_spreading: no network; labels walk on the graph and return to their row with probability `teleport` in
          every step.
        * no_diffusion: the same network without a graph, to see what that is worth.
    k : int, optional
        Entries a row of the graph keeps, itself included; see :func:`knn_graph`. Default: 10.
    step : float, optional
        Length of a diffusion step. Default: 0.7 of the largest stable one on the graph. Label spreading has no step.
    num_steps : int, optional
        More carry further, and mix more. Default: about 20, so that ``step num_steps`` times the mean of
        ``D_ii - W_ii`` is 12; 3 on a graph of your own, whose edges join different classes more often. Of label
        spreading as many as leave an error of 1e-6.
    teleport : float, optional
        Share of its first value that every point gets back in every step. Default: 0, with label spreading 0.2.
    scale : "auto", "columns", "together", "rows" or "none"
        How features are made comparable before they are used, since distances add them up:

        * columns: every column to mean 0 and variance 1, because columns in different units (age, income) would
          otherwise count by their units.
        * together: all columns by one common factor, because such columns share a unit (pixels, ratings, yes and no),
          and those that hardly vary say little.
        * rows: rows to sum 1, because longer texts hold more words.
        * auto: "rows" where nothing is negative and more than 80 % are zero; "together" where at least half of the
          columns have the same largest value; else "columns".
    validation : indices, mask or float, optional
        Rows whose labels only tell when to stop the training; or the share of the labels of each class to take, in
        (0, 1). Default: none; a fixed number of epochs.
    max_epochs : int, optional
        Of the training. Default: 150; with `validation` until 50 epochs brought no improvement.
    seed : int
        Of the initial weights.
    progress : bool
        Show a bar.

    Returns
    -------
    ClassifyResult
        ``labels``, ``probabilities``, ``confidence``; ``cross_validate()``, ``plot()``. Where all rows have labels
        nothing is predicted, and the message says so.

    Raises
    ------
    TypeError
        Features that are no numbers, labels that cannot be classes, graph that is none.
    ValueError
        Missing features, named by row and column; labels that do not fit the rows, none, or of one class only; numbers
        out of range.
    StabilityError
        A step that is not stable on the graph; the message gives the largest.

    Warns
    -----
    RuntimeWarning
        The training broke down.

    Notes
    -----
    Points in parts of the graph without any label get their class from the network alone; the message counts them. The
    graph of n rows takes n^2 d operations where the search is exact, see :func:`knn_graph`; an epoch of the training
    ``O(n d h + K nnz C)``, h = 64, d for 256 to 2048 features, 256 for more. Deterministic for a seed on one machine
    with one number of threads.

    Source: Wang, Dou, Bao and Shi, *Diffusion Mechanism in Residual Neural Network: Theory and Applications*, IEEE
    TPAMI 46(2), 2024; Wang, Bao and Shi, arXiv 2403.15726; label spreading: Zhou et al., *Learning with Local and
    Global Consistency*, NIPS 2003.

    Examples
    --------
    >>> import torch
    >>> from kantor.graph import classify
    >>> random = torch.Generator().manual_seed(0)
    >>> kind = torch.arange(90) % 3
    >>> x = torch.randn(90, 4, generator=random) + 6 * torch.nn.functional.one_hot(kind, 4)
    >>> result = classify(x, {0: "ant", 1: "bee", 2: "cat"})
    >>> [str(name) for name in result.labels[3:6]]
    ['ant', 'bee', 'cat']
    """
    started = time.perf_counter()
    features = None if x is None else read_features(x)
    _check_arguments(features, graph, method, scale, num_steps, max_epochs)
    n = len(features) if features is not None else graph.num_nodes  # type: ignore[union-attr]
    known = read_labels(labels, n)
    if features is not None:
        features = scaled(features, scale)
    made = graph is None
    if graph is None:
        assert features is not None
        graph = _neighbours(features, k, progress)
    elif features is not None:
        if isinstance(x, Tensor) and x.device != graph.device:
            raise ValueError(f"classify: x is on {x.device}, graph on {graph.device}; move one with .to(device)")
        features = features.to(graph.device, graph.dtype)
    if graph.num_nodes != n:
        raise ValueError(f"classify: graph: expected {n} nodes, one a row of x, got {graph.num_nodes}")
    numbers = known.numbers.to(graph.device)
    if teleport is None:
        teleport = _SPREADING_TELEPORT if method == "label_spreading" else 0.0
    teleport = check_fraction("classify", teleport, "teleport")
    step = _step(graph, step, method)
    if num_steps is None or method == "no_diffusion":
        num_steps = _num_steps(graph, step, teleport, method, _REACH if made else _REACH_GIVEN)
    problem = _Problem(features, graph, len(known.classes), method, step, num_steps, teleport, max_epochs, seed)
    held_out = _validation(validation, known.numbers, seed)
    probabilities, fit = problem.solve(numbers, None if held_out is None else held_out.to(graph.device), progress)
    predicted = probabilities.argmax(1)
    given = numbers >= 0
    return ClassifyResult(
        labels=known.names(torch.where(given, numbers, predicted)),
        predicted=known.names(predicted),
        probabilities=probabilities.cpu().numpy(),
        classes=known.classes,
        given=given.cpu().numpy(),
        graph=graph,
        method=method,
        step=problem.step,
        num_steps=problem.num_steps,
        converged=fit is None or fit.converged,
        message=_message(graph, given, fit, method),
        history={} if fit is None else fit.history,
        seconds=time.perf_counter() - started,
        model=None if fit is None else fit.model,
        _known=type(known)(numbers, known.classes),
        _features=features,
        _solve=problem.again,
        _seed=seed,
    )


@dataclass(frozen=True)
class _Problem:
    """All but the labels, which cross-validation varies."""

    features: Tensor | None
    graph: Graph
    classes: int
    method: Method
    step: float
    num_steps: int
    teleport: float
    max_epochs: int | None
    seed: int

    def solve(self, numbers: Tensor, held_out: Tensor | None, progress: bool) -> tuple[Tensor, FitResult | None]:
        """Probabilities of the classes ``(n, C)`` from the labels that are not negative, and how the training went."""
        if self.method == "label_spreading":
            return self._spread(numbers), None
        from kantor.nn import COIN, DiffResNet, fit_nodes

        assert self.features is not None
        d = self.features.shape[1]
        hidden = None if d in _WIDE else _HIDDEN if d < _VERY_WIDE else _HIDDEN_VERY_WIDE
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model: torch.nn.Module
            shape = d, self.classes, self.step, self.num_steps
            if self.method == "coin":
                model = COIN(*shape, hidden=hidden, teleport=self.teleport)
            else:
                residual: Literal["one_layer", "two_layer"] = "one_layer" if hidden is None else "two_layer"
                model = DiffResNet(*shape, residual, hidden=hidden, teleport=self.teleport)
        train = numbers >= 0
        if held_out is not None:
            train = train & ~held_out
        fit = fit_nodes(
            model.to(self.features.device, self.features.dtype),
            self.features,
            self.graph,
            numbers,
            train,
            held_out,
            max_epochs=self.max_epochs,
            seed=self.seed,
            progress=progress,
        )
        return fit.probabilities / fit.probabilities.sum(1, keepdim=True), fit

    def again(self, numbers: Tensor, title: str) -> Tensor:
        """Probabilities from other labels, with a bar where there is a title for it."""
        return self.solve(numbers, None, bool(title))[0]

    def _spread(self, numbers: Tensor) -> Tensor:
        """Shares of walks from the labels, ``a (I - (1 - a) S)^-1 Y``, by the iteration of which that is the limit."""
        graph, a = self.graph, self.teleport
        S = graph.normalized("sym" if graph.symmetric else "row")
        Y = graph.weight.new_zeros(graph.num_nodes, self.classes)
        labelled = numbers >= 0
        Y[labelled, numbers[labelled]] = 1
        nothing = graph.weight.new_zeros(graph.num_nodes)
        mass = _native.propagate(S.rowptr, S.col, (1 - a) * S.weight, nothing, Y, self.num_steps, teleport=a)
        total = mass.sum(1, keepdim=True)
        prior = Y.sum(0) / Y.sum()  # where no walk arrives
        return torch.where(total > 0, mass / torch.where(total > 0, total, 1), prior)


def _check_arguments(
    features: Tensor | None, graph: object, method: str, scale: str, num_steps: object, max_epochs: object
) -> None:
    check_choice("classify", method, "method", get_args(Method))
    check_choice("classify", scale, "scale", get_args(Scale))
    if graph is not None and not isinstance(graph, Graph):
        raise TypeError(
            f"classify: graph: expected a kantor.graph.Graph, got {type(graph).__name__}; make one with from_scipy, "
            "from_torch, from_networkx, from_pyg or from_edge_index"
        )
    if features is None and (graph is None or method != "label_spreading"):
        raise TypeError("classify: x: expected features, got None; only label_spreading on a graph does without")
    if num_steps is not None:
        check_count("classify", num_steps)
    if max_epochs is not None:
        check_count("classify", max_epochs, "max_epochs", 1)


def _neighbours(features: Tensor, k: int | None, progress: bool) -> Graph:
    n = len(features)
    if n < 3:
        raise ValueError(f"classify: x: expected at least 3 rows to join with each other, got {n}")
    k = min(_NEIGHBOURS, n - 1) if k is None else check_count("classify", k, "k", 1)
    if k >= n:
        raise ValueError(f"classify: k: expected 1..{n - 1}, fewer than the {n} rows, got {k}")
    return knn_graph(features, k, bandwidth_k=max(2, (k + 1) // 2), progress=progress)


def _step(graph: Graph, step: float | None, method: Method) -> float:
    if step is not None:
        step = float(check_step("classify", step))
    if method in _WITHOUT_STEP:
        return _WITHOUT_STEP[method]
    if step is not None:
        return step
    if graph.num_edges == 0:
        return 0.0
    report = stability(graph, 0.0)
    largest = report.largest_step if report.symmetric else report.largest_positive_step
    return _SAFE_SHARE * largest if math.isfinite(largest) else 0.0


def _num_steps(graph: Graph, step: float, teleport: float, method: Method, reach: float) -> int:
    if method == "label_spreading":
        # What is left of the starting values after so many steps; without any return there is no limit to wait for.
        return math.ceil(math.log(_SPREADING_RTOL) / math.log(1 - teleport)) if teleport > 0 else _MOST_STEPS
    rate = (graph.degree - graph.diagonal).detach()
    moved = step * float(rate[rate > 0].mean()) if bool((rate > 0).any()) else 0.0
    if method == "no_diffusion" or moved == 0:
        return 0
    return min(max(round(reach / moved), 1), _MOST_STEPS)


def _validation(validation: Any, numbers: Tensor, seed: int) -> Tensor | None:
    """A mask of rows that stop the training."""
    if validation is None:
        return None
    mask = torch.zeros_like(numbers, dtype=torch.bool)
    if isinstance(validation, float):
        if not 0 < validation < 1:
            raise ValueError(f"classify: validation: expected a share in (0, 1), rows or a mask, got {validation}")
        random = np.random.RandomState(seed)
        for c in range(int(numbers.max()) + 1):
            of_class = random.permutation((numbers == c).nonzero()[:, 0].numpy())
            # The training keeps one of each class at least.
            mask[torch.from_numpy(of_class[: min(round(validation * len(of_class)), len(of_class) - 1)])] = True
        if not bool(mask.any()):
            raise ValueError(f"classify: validation: a share of {validation} of the labels is none; label more rows")
        return mask
    rows = torch.as_tensor(validation).cpu()
    if rows.dtype is not torch.bool and (rows.numel() == 0 or not 0 <= int(rows.min()) <= int(rows.max()) < len(mask)):
        raise ValueError(f"classify: validation: expected rows 0..{len(mask) - 1} or a mask, got {validation!r}")
    if rows.dtype is torch.bool and rows.shape != mask.shape:
        raise ValueError(f"classify: validation: expected a mask of {len(mask)} rows, got shape {tuple(rows.shape)}")
    mask[rows] = True
    mask &= numbers >= 0
    left = set(numbers[(numbers >= 0) & ~mask].tolist())
    if not bool(mask.any()) or left != set(numbers[numbers >= 0].tolist()):
        raise ValueError(
            "classify: validation: expected some rows with labels that leave one of every class to learn from"
        )
    return mask


def _message(graph: Graph, given: Tensor, fit: FitResult | None, method: str) -> str:
    """How it went, and what to keep in mind."""
    parts = [fit.message if fit is not None else "converged: label spreading has no training."]
    if bool(given.all()):
        parts.append("Every row had a label: nothing was predicted; cross_validate() tells how well they can be.")
    elif method != "no_diffusion":
        component = graph.components()[1]
        reached = torch.zeros(int(component.max()) + 1, dtype=torch.bool, device=component.device)
        reached[component[given]] = True
        if alone := int((~reached[component]).sum()):
            source = "the most frequent class" if method == "label_spreading" else "the network alone"
            parts.append(
                f"{alone:,} rows are not connected with any label: their class comes from {source}; a larger k "
                "connects more."
            )
    return " ".join(parts)


__all__ = ["classify"]
