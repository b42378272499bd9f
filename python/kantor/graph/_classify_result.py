"""What :func:`kantor.graph.classify` returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kantor._checks import host
from kantor._errors import ConvergenceError
from kantor.graph._arguments import check_count
from kantor.graph._labels import Labels
from kantor.graph.graph import Graph

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_EMBEDDED = 5000  # points up to which t-SNE takes seconds

Solve = Callable[[Tensor, str], Tensor]


@dataclass(frozen=True, repr=False)
class CrossValidation:
    """How often hidden labels were found again. Prints as a small table.

    Attributes
    ----------
    accuracy : float
        Share of the given labels that were found when they were hidden.
    standard_error : float
        Of that share, as if the labels were independent.
    fold_accuracies : list of float
        Of each fold.
    class_accuracies : dict
        Of each class.
    rows : ndarray (m,)
        Rows with a given label.
    predicted : ndarray (m,)
        What was found there.
    """

    accuracy: float
    standard_error: float
    fold_accuracies: list[float]
    class_accuracies: dict[Any, float]
    rows: np.ndarray[Any, np.dtype[np.int64]]
    predicted: np.ndarray[Any, Any]

    def __repr__(self) -> str:
        lines = [
            f"{len(self.fold_accuracies)}-fold cross-validation over {len(self.rows)} given labels",
            f"  accuracy  {100 * self.accuracy:.1f} % +- {100 * self.standard_error:.1f}",
        ]
        lines += [f"    {name}: {100 * share:.1f} %" for name, share in self.class_accuracies.items()]
        return "\n".join(lines)


@dataclass(frozen=True, repr=False)
class ClassifyResult:
    """Classes of all rows, from the labels of some. Prints as a small table.

    Attributes
    ----------
    labels : ndarray (n,)
        The given labels, and predicted ones where none was given.
    predicted : ndarray (n,)
        What the method says of every row, also of those with a given label: a different answer there may show a wrong
        label.
    probabilities : ndarray (n, C)
        Of the classes, by the method; rows sum to one.
    classes : list
        The classes, in the order of the columns.
    given : ndarray (n,)
        Whether a label was given.
    graph : Graph
        What was diffused on.
    method, step, num_steps
        What was done.
    converged : bool
        Whether the training, or iteration, ended as it should.
    message : str
        What happened, what to keep in mind and what to try.
    history : dict of ndarray
        Of the training: ``loss``, ``val_loss``, ``val_accuracy``; of label spreading empty.
    seconds : float
        Wall-clock time.
    model : torch.nn.Module or None
        The trained network.
    """

    labels: np.ndarray[Any, Any]
    predicted: np.ndarray[Any, Any]
    probabilities: np.ndarray[Any, Any]
    classes: list[Any]
    given: np.ndarray[Any, np.dtype[np.bool_]]
    graph: Graph
    method: str
    step: float
    num_steps: int
    converged: bool
    message: str
    history: dict[str, np.ndarray[Any, Any]]
    seconds: float
    model: torch.nn.Module | None
    _known: Labels = field(repr=False)
    _features: Tensor | None = field(repr=False)
    _solve: Solve = field(repr=False)
    _seed: int = field(repr=False)

    @property
    def confidence(self) -> np.ndarray[Any, Any]:
        """Probability of the predicted class ``(n,)``."""
        confidence: np.ndarray[Any, Any] = self.probabilities.max(1)
        return confidence

    def check(self) -> ClassifyResult:
        """Return self if converged, else raise :class:`kantor.ConvergenceError` carrying this result."""
        if not self.converged:
            raise ConvergenceError(f"classify: {self.message}", self)
        return self

    def cross_validate(self, folds: int = 5, *, progress: bool = False) -> CrossValidation:
        """Hide a part of the given labels, classify again, and compare; every label is hidden once.

        Parameters
        ----------
        folds : int
            Parts, >= 2; at most one for each label. Every class is spread over them evenly.
        progress : bool
            Show a bar for each training.

        Returns
        -------
        CrossValidation
            Each fold has fewer labels than there are, so that the accuracy is estimated rather too low.

        Raises
        ------
        ValueError
            A class with a single label, which cannot be both hidden and seen.

        Notes
        -----
        As long as `folds` calls of the method. Deterministic for the seed of the classification.
        """
        folds = check_count("cross_validate", folds, "folds", 2)
        numbers = self._known.numbers
        counts = torch.bincount(numbers[numbers >= 0], minlength=len(self.classes))
        if int(counts.min()) < 2:
            name = self.classes[int(counts.argmin())]
            raise ValueError(
                f"cross_validate: labels: expected two of every class, one to hide and one to learn from, class "
                f"{name!r} has one; label another, or leave the class out"
            )
        rows = (numbers >= 0).nonzero()[:, 0].cpu()
        folds = min(folds, len(rows))
        random = np.random.RandomState(self._seed)
        order = rows[torch.from_numpy(random.permutation(len(rows)))]
        order = order[numbers.cpu()[order].argsort(stable=True)]  # class by class: dealing them out spreads every class
        found = torch.full_like(numbers, -1)
        shares = []
        for fold in range(folds):
            hidden = order[fold::folds].to(numbers.device)
            seen = numbers.clone()
            seen[hidden] = -1
            answer = self._solve(seen, f"fold {fold + 1} of {folds}" if progress else "").argmax(1)
            found[hidden] = answer[hidden]
            shares.append(float((answer[hidden] == numbers[hidden]).double().mean()))
        right = (found == numbers)[rows].double().cpu()
        accuracy, of = float(right.mean()), numbers.cpu()[rows]
        return CrossValidation(
            accuracy=accuracy,
            standard_error=float((accuracy * (1 - accuracy) / len(rows)) ** 0.5),
            fold_accuracies=shares,
            class_accuracies={name: float(right[of == c].mean()) for c, name in enumerate(self.classes)},
            rows=rows.numpy(),
            predicted=self._known.names(found[rows]),
        )

    def plot(self, ax: Axes | None = None, *, positions: Tensor | None = None, edges: int = 20_000) -> Axes:
        """Draw the graph in the plane: points in the colours of their classes, those with a given label with a ring.

        Parameters
        ----------
        ax : Axes, optional
            Where to draw.
        positions : Tensor (n, 2), optional
            Where the points are. Default: the features themselves where there are two; else t-SNE of them, from 5000
            points on their principal components; without features the spectral embedding of the graph (scikit-learn).
        edges : int
            At most so many are drawn, the heaviest.

        Raises
        ------
        ImportError
            matplotlib or scikit-learn (extra ``demo``) is missing.
        """
        places = positions if positions is not None else self._places()
        ax = self.graph.plot(places, self.labels, ax=ax, edges=edges)
        if self.given.any() and not self.given.all() and places is not None:
            x, y = host(places)[torch.from_numpy(self.given), :2].T.numpy()
            ax.scatter(x, y, s=36, facecolors="none", edgecolors="black", linewidths=0.9, zorder=5)
        return ax

    def _places(self) -> Tensor | None:
        if self._features is None:
            return None
        x = self._features
        if x.shape[1] == 1:
            return torch.cat([x, torch.zeros_like(x)], 1)
        if x.shape[1] == 2:
            return x
        try:
            from sklearn.decomposition import PCA
            from sklearn.manifold import TSNE
        except ImportError as error:
            raise ImportError('ClassifyResult.plot needs scikit-learn: pip install "kantor[demo]"') from error
        points = host(x).numpy()
        if len(points) > _EMBEDDED or len(points) < 4:
            return torch.from_numpy(PCA(2, random_state=0).fit_transform(points))
        perplexity = min(30.0, (len(points) - 1) / 3)
        embedding = TSNE(2, init="pca", perplexity=perplexity, random_state=0).fit_transform(points)
        return torch.from_numpy(embedding)

    def __repr__(self) -> str:
        n, known = len(self.labels), int(self.given.sum())
        counts = [(name, int((self.labels == name).sum())) for name in self.classes]
        shown = ", ".join(f"{name}: {count:,}" for name, count in counts[:10]) + (", ..." if len(counts) > 10 else "")
        rows = [
            ("labels", f"{known:,} given, {n - known:,} predicted"),
            ("classes", shown),
            ("graph", repr(self.graph)),
            ("diffusion", f"{self.num_steps} steps of {self.step:.3g}" if self.num_steps else "none"),
            ("confidence", f"{100 * float(np.median(self.confidence)):.0f} % (median)"),
            ("seconds", f"{self.seconds:.3g}"),
        ]
        lines = [f"classification of {n:,} rows by {self.method}", *(f"  {name:<10}  {value}" for name, value in rows)]
        return "\n".join([*lines, f"  {self.message}"])


__all__ = ["ClassifyResult", "CrossValidation", "Solve"]
