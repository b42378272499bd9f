"""Classes from a few labels, as a scikit-learn estimator."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import accuracy_score
from sklearn.neighbors import NearestNeighbors
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data

from kantor.graph import classify
from kantor.graph._labels import Scaling, is_unknown, read_features
from kantor.graph.classify import Method, Scale

_FLOATS = (np.float64, np.float32)


class DiffusionClassifier(ClassifierMixin, BaseEstimator):
    """Classify all rows of a table from the labels of a few, and new rows from those: :func:`kantor.graph.classify`.

    Semi-supervised, with the conventions of ``sklearn.semi_supervised``: `fit` gets all rows, and -1 as the label of
    those whose class is unknown. Works in pipelines and grid searches; :meth:`score` counts rows with a label only.

    Parameters
    ----------
    method : "diffusion", "coin", "label_spreading" or "no_diffusion"
        What diffuses on the graph of nearest rows: hidden features of a network, its probabilities, the labels, or
        nothing.
    k : int, optional
        Entries a row of the graph keeps, itself included. Default: 10.
    step, num_steps, teleport, scale, validation, max_epochs : optional
        As for :func:`kantor.graph.classify`. `scale` compares columns; in a pipeline that scales, say "none".
    random_state : int, RandomState or None
        Of the initial weights. None draws a new seed in every `fit`.

    Attributes
    ----------
    classes_ : ndarray (C,)
        The classes, sorted.
    transduction_ : ndarray (n,)
        A class for every row of the table: the given one, or the most probable.
    label_distributions_ : ndarray (n, C)
        Probabilities of the classes, float64: what the method says of every row, of those with a label too.
    n_iter_ : int
        Epochs of the training; for "label_spreading", which has none, diffusion steps.
    result_ : ClassifyResult
        What :func:`kantor.graph.classify` returned: the graph, the network, ``cross_validate()``. Its classes are
        positions in ``classes_``.
    n_features_in_ : int
        Columns of the table.
    feature_names_in_ : ndarray (d,)
        Their names, where the table had some.

    Raises
    ------
    TypeError
        A sparse table.
    ValueError
        In `fit`: NaN, infinity, labels of fewer than two classes or that are no classes, numbers out of range.

    Warns
    -----
    RuntimeWarning
        The training broke down.

    Notes
    -----
    A new row takes one diffusion step from the table: its probabilities are the mean of ``label_distributions_`` over
    its k - 1 nearest rows, weighted by ``exp(-(d / s)^2)`` with s the distance of the nearest ones as in the graph. The
    table takes nothing back, so that what is said of a row does not depend on the rows beside it. Rows of the table are
    new rows to `predict`: ``fit(X, y).predict(X)`` need not be ``transduction_``, as in scikit-learn's own.

    Labels of words may be unknown as -1 too, in an array of objects; "-1", which NumPy makes of that in an array of
    words, and "" count as unknown. A table of n rows costs what `classify` does; m new ones a search among the n.
    Deterministic for a seed on one machine with one number of threads.

    Source: see :func:`kantor.graph.classify`; new rows: Delalleau, Bengio and Le Roux, *Efficient Non-Parametric
    Function Induction in Semi-Supervised Learning*, AISTATS 2005.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.datasets import make_blobs
    >>> from kantor.sklearn import DiffusionClassifier
    >>> X, truth = make_blobs(120, centers=3, random_state=0, cluster_std=0.5)
    >>> y = np.where(np.arange(120) < 9, truth, -1)
    >>> model = DiffusionClassifier("coin").fit(X[:100], y[:100])
    >>> float((model.transduction_ == truth[:100]).mean()), model.score(X[100:], truth[100:])
    (1.0, 1.0)
    """

    def __init__(
        self,
        method: Method = "diffusion",
        *,
        k: int | None = None,
        step: float | None = None,
        num_steps: int | None = None,
        teleport: float | None = None,
        scale: Scale = "auto",
        validation: Any = None,
        max_epochs: int | None = None,
        random_state: Any = 0,
    ) -> None:
        self.method = method
        self.k = k
        self.step = step
        self.num_steps = num_steps
        self.teleport = teleport
        self.scale = scale
        self.validation = validation
        self.max_epochs = max_epochs
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> DiffusionClassifier:
        """Classify the rows of a table.

        Parameters
        ----------
        X : array or data frame (n, d)
            Features, dense and finite, n >= 3.
        y : array (n,)
            Classes, -1 where unknown.

        Returns
        -------
        DiffusionClassifier
            Itself.
        """
        try:
            X, y = validate_data(self, X, y, dtype=_FLOATS, ensure_min_samples=3)
        except ValueError as error:
            if str(error).startswith("Input y contains NaN"):
                raise ValueError(f"{error} DiffusionClassifier.fit: y: write -1 where the class is unknown") from error
            raise
        known = ~_unknown(y)
        check_classification_targets(y[known])
        classes, numbers = np.unique(y[known], return_inverse=True)
        if len(classes) < 2:
            raise ValueError(
                f"DiffusionClassifier.fit: y: expected labels of at least two classes, got {len(classes)} class; -1 "
                "means unknown: name a class otherwise"
            )
        labels = np.full(len(y), -1)
        labels[known] = numbers
        k = min(10, len(X) - 1) if self.k is None else self.k
        seed = self.random_state
        if seed is None or not isinstance(seed, int | np.integer):
            seed = check_random_state(seed).randint(2**31 - 1)
        table = np.array(X, order="C")  # a copy, which may be written to: torch shares memory
        result = classify(
            table, labels, method=self.method, k=k, step=self.step, num_steps=self.num_steps, teleport=self.teleport,
            scale=self.scale, validation=self.validation, max_epochs=self.max_epochs, seed=int(seed),
        )  # fmt: skip
        self.classes_ = classes
        self.transduction_ = classes[result.labels]
        probabilities = np.asarray(result.probabilities, dtype=np.float64)
        self.label_distributions_ = probabilities / probabilities.sum(1, keepdims=True)
        self.n_iter_ = len(result.history["loss"]) if result.history else result.num_steps
        self.result_ = result
        features = read_features(table)
        self._scaling = Scaling.of(features, self.scale)
        # Entries of the graph count the row itself, which a new row is not: so many of them and such a width are left.
        self._neighbours = NearestNeighbors(n_neighbors=max(1, k - 1)).fit(self._scaling(features).numpy())
        self._width = max(2, (k + 1) // 2) - 1
        return self

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Return the probabilities of the classes, ``(m, C)``, for rows like those of the table ``(m, d)``."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=_FLOATS, reset=False)
        rows = self._scaling(read_features(np.array(X, order="C")))
        distance, index = self._neighbours.kneighbors(rows.numpy())
        width = distance[:, min(self._width, distance.shape[1]) - 1, None]
        # Where even that row is a duplicate, duplicates share the weight.
        ratio = np.divide(distance, width, out=np.where(distance > 0, np.inf, 0.0), where=width > 0)
        weight = np.exp(-np.square(ratio))
        probabilities = np.einsum("mk,mkc->mc", weight, self.label_distributions_[index])
        shares: NDArray[np.float64] = probabilities / probabilities.sum(1, keepdims=True)
        return shares

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the most probable class, ``(m,)``, for rows like those of the table ``(m, d)``."""
        probabilities = self.predict_proba(X)
        found: NDArray[Any] = self.classes_[probabilities.argmax(1)]
        return found

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the share of rows with a label whose class is predicted; rows of label -1 are left out.

        Parameters
        ----------
        X : array or data frame (m, d)
            Rows.
        y : array (m,)
            Classes, -1 where unknown.
        sample_weight : array (m,), optional
            What a row counts.
        """
        y = column_or_1d(y)
        known = ~_unknown(y)
        if not known.any():
            raise ValueError("DiffusionClassifier.score: y: expected a label that is known, got none; -1 means unknown")
        weight = None if sample_weight is None else column_or_1d(sample_weight)[known]
        return float(accuracy_score(y[known], self.predict(X)[known], sample_weight=weight))


def _unknown(y: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a label stands for none."""
    return np.array([is_unknown(label) or label == "-1" for label in y.tolist()], dtype=bool)


__all__ = ["DiffusionClassifier"]
