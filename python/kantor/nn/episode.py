"""Few-shot episodes: a handful of labelled points and queries, classified together."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from kantor._checks import check_finite, check_float, check_same, check_tensor
from kantor._progress import steps_bar
from kantor.graph._arguments import check_choice, check_count, check_step
from kantor.graph.propagator import propagator

Method = Literal["diffusion", "coin", "prototype", "laplacian"]

_EPS = 1e-12  # smallest probability whose logarithm is taken
_BYTES = 2**28  # of weights, with their gradients and momenta, that are trained at once
_SHARPNESS = 10.0  # of the softmax of cosines that rectifies prototypes


@dataclass(frozen=True, repr=False)
class EpisodeResult:
    """Classes of the queries of an episode, or of a batch of them. Prints as a small table.

    Attributes
    ----------
    labels : Tensor (m,) or (B, m)
        Predicted classes, in the terms of the support's labels.
    probabilities : Tensor (m, C) or (B, m, C)
        Of the classes, in ascending order of their labels. For "prototype" and "laplacian" the softmax of minus the
        squared distances, which only ranks classes.
    method : str
        How they were found.
    seconds : float
        Wall-clock time.
    """

    labels: Tensor
    probabilities: Tensor
    method: str
    seconds: float

    def accuracy(self, query_labels: Tensor) -> Tensor:
        """Return the share of queries whose class is right: a number, or one for each episode ``(B,)``, float64."""
        return (self.labels == query_labels).double().mean(-1)

    def __repr__(self) -> str:
        *batch, queries, classes = self.probabilities.shape
        episodes = f"{batch[0]:,} episodes of " if batch else ""
        return (
            f"few-shot classification by {self.method}\n  {episodes}{queries:,} queries in {classes} classes\n"
            f"  seconds  {self.seconds:.3g}"
        )


class Episode:
    """A few-shot problem: points with labels (the support) and points without (the query), often features of a network.

    Many problems of the same size are solved at once as a batch: every tensor gets a first dimension B.

    Parameters
    ----------
    support : Tensor (s, d) or (B, s, d)
        Points with labels, float32 or float64.
    support_labels : Tensor (s,) or (B, s)
        Their classes, integers; one for all episodes of a batch or one each. Every episode needs all classes.
    query : Tensor (m, d) or (B, m, d)
        Points without.

    Raises
    ------
    TypeError
        Not tensors, or wrong dtypes.
    ValueError
        Shapes that do not fit, NaN or infinite points, an episode without a point of some class.

    Examples
    --------
    >>> import torch
    >>> from kantor.nn import Episode
    >>> random = torch.Generator().manual_seed(0)
    >>> query_labels = torch.arange(40) % 2
    >>> query = torch.randn(40, 4, generator=random) + 5 * query_labels[:, None]
    >>> support = torch.tensor([[0.0, 0.0, 0.0, 0.0], [5.0, 5.0, 5.0, 5.0]])
    >>> result = Episode(support, torch.tensor([0, 1]), query).normalise().classify("coin")
    >>> bool(result.accuracy(query_labels) > 0.9)
    True
    """

    def __init__(self, support: Tensor, support_labels: Tensor, query: Tensor) -> None:
        for name, points in (("support", support), ("query", query)):
            check_tensor(points, "Episode", name)
            check_float(points, "Episode", name)
            if points.ndim not in (2, 3) or points.shape[-2] == 0:
                raise ValueError(
                    f"Episode: {name}: expected shape (n, d) or (B, n, d) with n >= 1, got {tuple(points.shape)}"
                )
            check_finite(points, "Episode", name)
        check_same("Episode", [("support", support), ("query", query)])
        if (*support.shape[:-2], support.shape[-1]) != (*query.shape[:-2], query.shape[-1]):
            raise ValueError(
                f"Episode: support and query: expected the same batch and features, got {tuple(support.shape)} and "
                f"{tuple(query.shape)}"
            )
        check_tensor(support_labels, "Episode", "support_labels")
        if support_labels.dtype.is_floating_point or support_labels.dtype.is_complex:
            raise TypeError(f"Episode: support_labels: expected integers, got {str(support_labels.dtype)[6:]}")
        shapes = {support.shape[-2:-1], support.shape[:-1]}
        if support_labels.shape not in shapes:
            raise ValueError(
                f"Episode: support_labels: expected shape {' or '.join(str(tuple(s)) for s in sorted(shapes))}, got "
                f"{tuple(support_labels.shape)}"
            )
        self.support, self.query = support, query
        self.classes, numbers = torch.unique(support_labels.to(support.device), return_inverse=True)
        self._numbers = numbers.expand(support.shape[:-1])
        if len(self.classes) < 2:
            raise ValueError(f"Episode: support_labels: expected at least two classes, got {self.classes.tolist()}")
        counts = functional.one_hot(self._numbers, len(self.classes)).sum(-2)
        if bool((counts == 0).any()):
            *episode, c = (int(i) for i in (counts == 0).nonzero()[0])
            where = f"episode {episode[0]} has" if episode else "there is"
            raise ValueError(
                f"Episode: support_labels: {where} no point of class {int(self.classes[c])}; every episode needs all"
            )

    def normalise(self, base_mean: Tensor | None = None, *, shift: bool = True) -> Episode:
        """Return the episode with centred points of length one.

        Parameters
        ----------
        base_mean : Tensor (d,), optional
            Mean of the features of the classes that the network was trained on, which is subtracted. Default: none is.
        shift : bool
            Move the queries, at last, so that their mean is that of the support.

        Raises
        ------
        ValueError
            base_mean of another shape.

        Notes
        -----
        Source: Wang et al., *SimpleShot*, arXiv 1911.04623 (centring and length); Wang, Dou, Bao and Shi, IEEE TPAMI
        46(2), 2024 (shift).
        """
        support, query = self.support, self.query
        if base_mean is not None:
            check_tensor(base_mean, "Episode.normalise", "base_mean")
            if base_mean.shape != support.shape[-1:]:
                raise ValueError(
                    f"Episode.normalise: base_mean: expected shape {tuple(support.shape[-1:])}, got "
                    f"{tuple(base_mean.shape)}"
                )
            support, query = support - base_mean.to(support), query - base_mean.to(query)
        support, query = functional.normalize(support, dim=-1), functional.normalize(query, dim=-1)
        if shift:
            query = query + (support.mean(-2, keepdim=True) - query.mean(-2, keepdim=True))
        return Episode(support, self.classes[self._numbers], query)

    def classify(
        self,
        method: Method = "diffusion",
        *,
        step: float = 0.5,
        num_steps: int | None = None,
        k: int = 7,
        bandwidth_k: int = 4,
        alpha: float = 0.0,
        rectify: bool = False,
        smoothness: float = 0.5,
        lr: float = 0.1,
        max_epochs: int = 100,
        seed: int = 0,
        progress: bool = False,
    ) -> EpisodeResult:
        """Classify the queries.

        Parameters
        ----------
        method : "diffusion", "coin", "prototype" or "laplacian"
            * diffusion: a network ``C (x + B relu(A x + a) + b) + c``, whose features diffuse on the graph of all
              points (Diff-ResNet), trained on the support.
            * coin: the same network, whose probabilities diffuse (COIN).
            * prototype: the class with the nearest mean (SimpleShot).
            * laplacian: nearest means, smoothed over the graph of 3 nearest queries (LaplacianShot).
        step, num_steps : float, int
            Of the diffusion. Defaults: 0.5, and 6 for "diffusion", 10 for "coin".
        k, bandwidth_k : int
            Of the graph, with self-tuning weights: see :func:`kantor.graph.knn_graph`.
        alpha : float
            Weight of a further loss: the expected distance of the queries from the rectified prototypes of their
            classes, by the network's probabilities. For "diffusion" and "coin".
        rectify : bool
            For "prototype" and "laplacian": move the means towards the queries that are near them first.
        smoothness : float
            For "laplacian": how much neighbours count against distances.
        lr, max_epochs : float, int
            Of gradient descent with momentum 0.9 and weight decay 1e-4; lr falls to a tenth at half and again at three
            quarters.
        seed : int
            Of the initial weights.
        progress : bool
            Show a bar.

        Returns
        -------
        EpisodeResult

        Raises
        ------
        ValueError
            A number out of range, an unknown word, k not smaller than the number of points.
        StabilityError
            A step too long for one of the graphs.

        Notes
        -----
        All episodes of a batch are trained at once, each with its own network, in parts of 256 MiB. The matrix of the
        diffusion steps is formed once, its rows of the support alone in training. Deterministic for a seed.

        Source: Wang, Dou, Bao and Shi, IEEE TPAMI 46(2), 2024; Wang, Bao and Shi, arXiv 2403.15726; Wang et al.,
        *SimpleShot*, arXiv 1911.04623; Ziko et al., *Laplacian Regularized Few-Shot Learning*, ICML 2020.
        """
        started = time.perf_counter()
        name = "Episode.classify"
        check_choice(name, method, "method", get_args(Method))
        check_step(name, step)
        num_steps = {"diffusion": 6, "coin": 10}.get(method, 0) if num_steps is None else num_steps
        num_steps = check_count(name, num_steps)
        k, bandwidth_k = check_count(name, k, "k", 1), check_count(name, bandwidth_k, "bandwidth_k", 1)
        max_epochs = check_count(name, max_epochs, "max_epochs")
        for word, number in (("alpha", alpha), ("smoothness", smoothness), ("lr", lr)):
            if not (isinstance(number, int | float) and 0 <= number < math.inf):
                raise ValueError(f"{name}: {word}: expected a finite number >= 0, got {number!r}")
        points = self.support.shape[-2] + self.query.shape[-2]
        if method in ("diffusion", "coin") and not max(k, bandwidth_k - 1) < points:
            raise ValueError(f"{name}: k: expected fewer than the {points} points of an episode, got {k}")
        single = self.support.ndim == 2
        support, query, labels = (t[None] if single else t for t in (self.support, self.query, self._numbers))
        x = torch.cat([support, query], -2).detach()
        if method in ("diffusion", "coin"):
            generator = torch.Generator().manual_seed(seed)
            chunk = max(1, _BYTES // (6 * x.shape[-1] ** 2 * x.element_size()))
            options: dict[str, Any] = {"alpha": alpha, "lr": lr, "max_epochs": max_epochs, "generator": generator}
            parts = []
            with steps_bar(progress, name, len(x)) as advance:
                for begin in range(0, len(x), chunk):
                    part, known = x[begin : begin + chunk], labels[begin : begin + chunk]
                    P = propagator(_self_tuning(part, k, bandwidth_k), step, num_steps)
                    parts.append(_train(part, known, len(self.classes), P, method, **options))
                    advance(begin + len(part), "")
            log_prob = torch.cat(parts)
        else:
            prototypes = _prototypes(support, labels, len(self.classes))
            prototypes = _rectified(x, prototypes) if rectify else prototypes
            cost = torch.cdist(query, prototypes).square()
            log_prob = _laplacian(query, cost, smoothness) if method == "laplacian" else (-cost).log_softmax(-1)
        log_prob = log_prob[0] if single else log_prob
        return EpisodeResult(self.classes[log_prob.argmax(-1)], log_prob.exp(), method, time.perf_counter() - started)

    def __repr__(self) -> str:
        batch = f"{self.support.shape[0]} episodes, each " if self.support.ndim == 3 else ""
        return (
            f"Episode({batch}{self.support.shape[-2]} points with labels of {len(self.classes)} classes, "
            f"{self.query.shape[-2]} queries, {self.support.shape[-1]} features)"
        )


def _self_tuning(x: Tensor, k: int, bandwidth_k: int) -> Tensor:
    """Self-tuning weights as of :func:`kantor.graph.knn_graph`, dense: ``(B, n, n)`` for points ``(B, n, d)``."""
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distance.sort(-1).values  # the point itself is the first
    positive = distance[distance > 0]
    tiny = 1e-6 if x.dtype is torch.float64 else 1e-4
    floor = tiny * float(positive.median()) if positive.numel() else 1.0
    scale = nearest[..., bandwidth_k - 1 : bandwidth_k].clamp(min=floor)
    w = torch.exp(-(distance / scale).square()) * (distance < nearest[..., k : k + 1])
    sums = w.sum(-1)
    root = torch.where(sums > 0, sums, 1).rsqrt()
    w = root[..., :, None] * w * root[..., None, :]
    return (w + w.mT) / 2


def _train(
    x: Tensor,
    labels: Tensor,
    classes: int,
    P: Tensor,
    method: str,
    *,
    alpha: float,
    lr: float,
    max_epochs: int,
    generator: torch.Generator,
) -> Tensor:
    """Train one network for each episode and return the logarithms of the probabilities of the queries."""
    known = labels.shape[1]
    targets = labels.flatten()
    # As torch's linear layers begin: uniform up to 1 / sqrt(inputs).
    sizes = [(x.shape[-1], x.shape[-1])] * 2 + [(x.shape[-1], classes)]
    weights = [_uniform(len(x), a, b, a, x, generator) for a, b in sizes]
    biases = [_uniform(len(x), 1, b, a, x, generator) for a, b in sizes]
    sgd = torch.optim.SGD([*weights, *biases], lr=lr, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(sgd, [max_epochs // 2, 3 * max_epochs // 4])

    def log_prob(rows: Tensor) -> Tensor:
        (A, B, C), (a, b, c) = weights, biases
        scores = torch.baddbmm(c, x + torch.baddbmm(b, torch.relu(torch.baddbmm(a, x, A)), B), C)
        if method == "coin":
            return (rows @ scores.softmax(-1)).clamp(min=_EPS).log()
        return (rows @ scores).log_softmax(-1)  # the classifier goes before the diffusion, which is linear

    rows, distances = P[:, :known], x.new_empty(0)
    if alpha:
        prototypes = _rectified(x, _prototypes(x[:, :known], labels, classes))
        rows, distances = P, torch.cdist(x[:, known:], prototypes)
    for _ in range(max_epochs):
        predicted = log_prob(rows)
        # The episodes share nothing: the gradient of the sum over them is each one's own.
        loss = functional.nll_loss(predicted[:, :known].flatten(0, 1), targets, reduction="sum") / known
        if alpha:
            loss = loss + alpha * (predicted[:, known:].exp() * distances).sum()
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        schedule.step()
    with torch.no_grad():
        return log_prob(P[:, known:])


def _uniform(batch: int, rows: int, columns: int, inputs: int, like: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.rand(batch, rows, columns, generator=generator, dtype=like.dtype)
    return ((2 * drawn - 1) / math.sqrt(inputs)).to(like.device).requires_grad_()


def _prototypes(support: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Means of the classes, ``(B, C, d)``."""
    member = functional.one_hot(labels, classes).to(support.dtype)
    return member.mT @ support / member.sum(-2)[..., None]


def _rectified(x: Tensor, prototypes: Tensor) -> Tensor:
    """Mean of the points nearest to a prototype by cosine, each times its softmax; unchanged where there is none."""
    cosine = functional.normalize(x, dim=-1) @ functional.normalize(prototypes, dim=-1).mT
    share = (_SHARPNESS * cosine).softmax(-1)
    member = functional.one_hot(share.argmax(-1), prototypes.shape[-2]).to(x.dtype)
    count = member.sum(-2)[..., None]
    return torch.where(count > 0, (member * share).mT @ x / count.clamp(min=1), prototypes)


def _laplacian(query: Tensor, cost: Tensor, smoothness: float, neighbours: int = 3, max_iter: int = 100) -> Tensor:
    """Minimise ``sum y_q . cost_q`` plus smoothness over neighbours, by bounds that are updated in closed form."""
    distance = torch.cdist(query, query)
    distance.diagonal(dim1=-2, dim2=-1).fill_(math.inf)
    nearest = distance.topk(min(neighbours, query.shape[-2] - 1), largest=False).indices
    w = torch.zeros_like(distance).scatter_(-1, nearest, 1.0)
    y = (-cost).log_softmax(-1)
    for _ in range(max_iter):
        y, before = (smoothness * (w @ y.exp()) - cost).log_softmax(-1), y
        if float((y.exp() - before.exp()).abs().max()) < 1e-6:
            break
    return y


__all__ = ["Episode", "EpisodeResult"]
