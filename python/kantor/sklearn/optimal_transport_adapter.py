"""Domain adaptation by optimal transport, as a scikit-learn transformer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.metrics import pairwise_distances_argmin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
from torch import Tensor

from kantor.transport import TransportResult, solve, solve_sample
from kantor.transport._extension import softmax_map

_FLOATS = (np.float64, np.float32)
_ROUNDS = 10  # of the majorisation of the class term
_OFFSET = 0.3  # under the root of the class term: without it a class that has left a target row never comes back


class OptimalTransportAdapter(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """Move rows of one domain onto another by optimal transport.

    The rows X of the source domain and `X_target` of the target domain are coupled by the plan of least squared
    distance with an entropic term, :func:`kantor.transport.solve_sample`; a row goes to the mean of the target rows
    that its mass goes to. What is known of moved source rows, such as their classes, then serves in the target domain.

    Parameters
    ----------
    reg : float
        Strength of the entropic term, > 0, relative to the spread of the data: the sum of both domains' variances.
        Smaller moves rows onto single target rows, larger towards the mean of all.
    class_reg : float
        Strength of a term that keeps source rows of different classes apart, >= 0, in the same unit. Needs y in `fit`
        and memory for an n x m matrix. Where there are classes 1 is worth a look.
    tol : float
        Error of the marginals at which the solver stops.
    max_iter : int, optional
        Limit of its steps, of each of ten rounds with a class term. Default: 500.

    Attributes
    ----------
    X_target_ : ndarray (m, d)
        The rows of the target domain.
    result_ : TransportResult
        The plan and how it was found, ``result_.plan``; of the rows after each domain was centred and both were divided
        by ``spread_``.
    spread_ : float
        Root of the sum of both domains' variances.
    classes_ : ndarray (C,)
        Of the source rows, with a class term.
    n_iter_ : int
        Steps of the solver.
    n_features_in_ : int
        Columns of the table.
    feature_names_in_ : ndarray (d,)
        Their names, where the table had some.

    Raises
    ------
    TypeError
        Sparse rows.
    ValueError
        NaN, infinity, other features in the target domain, numbers out of range, a class term without classes.

    Warns
    -----
    UserWarning
        `fit` without X_target.
    RuntimeWarning
        The solver did not reach `tol`.

    Notes
    -----
    Any row x of the source domain goes to ``sum_j w_j y_j``, ``w`` the softmax of ``(g_j - |x - y_j|^2) / reg`` with
    the potential g of the plan: for rows of `fit` this is the barycentric map, for others its continuous extension
    (Pooladian & Niles-Weed). With a class term a row takes the class of its nearest row in `fit`.
    :meth:`inverse_transform` does the same from the target domain to the source.

    `transform` takes every row for one of the source domain. So either move labelled source rows and train a model on
    them; or make the new domain the source and that of a trained model the target, and put the adapter in front of
    the model in a pipeline.

    The class term is ``class_reg / m sum_j sum_c sqrt(s_cj + 0.3)`` with ``s_cj`` the share of class c in what target
    row j gets; it is least where every target row gets one class. Ten rounds replace the root by its tangent.

    O((n + m) d) memory, O(n m d) a sweep without a class term. Solved in float64; moved rows keep the dtype of X.
    Deterministic.

    Source: Courty, Flamary, Tuia and Rakotomamonjy, *Optimal Transport for Domain Adaptation*, IEEE TPAMI 39(9), 2017,
    equations 13, 15 and 16; Pooladian and Niles-Weed, *Entropic estimation of optimal transport maps*, 2021.

    Examples
    --------
    >>> import numpy as np
    >>> from kantor.sklearn import OptimalTransportAdapter
    >>> source = np.random.default_rng(0).normal(size=(100, 2))
    >>> adapter = OptimalTransportAdapter(reg=0.001).fit(source, X_target=source + [5.0, -3.0])
    >>> bool(np.abs(adapter.transform(source) - source - [5.0, -3.0]).max() < 0.1)
    True
    """

    result_: TransportResult
    _classes_apart: _ClassTerm | None

    def __init__(
        self, reg: float = 0.1, *, class_reg: float = 0.0, tol: float = 1e-6, max_iter: int | None = None
    ) -> None:
        self.reg = reg
        self.class_reg = class_reg
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, X: Any, y: Any = None, X_target: Any = None) -> OptimalTransportAdapter:
        """Couple the rows of two domains.

        Parameters
        ----------
        X : array or data frame (n, d)
            Rows of the source domain, dense and finite.
        y : array (n,), optional
            Their classes, of use with `class_reg` only; -1, the label of unknown ones elsewhere, is a class here.
        X_target : array or data frame (m, d), optional
            Rows of the target domain. Default, with a warning: X itself, onto which it is then smoothed.

        Returns
        -------
        OptimalTransportAdapter
            Itself.
        """
        X = validate_data(self, X, dtype=_FLOATS)
        if X_target is None:
            warnings.warn(
                "OptimalTransportAdapter.fit: X_target: expected rows of the target domain, got none: X is moved onto "
                "itself",
                UserWarning,
                stacklevel=2,
            )
            target = X
        else:
            target = validate_data(self, X_target, dtype=_FLOATS, reset=False)
        for name in ("reg", "class_reg"):
            value, least = getattr(self, name), "> 0" if name == "reg" else ">= 0"
            number = isinstance(value, int | float | np.integer | np.floating) and 0 <= value < np.inf
            if not number or (name == "reg" and value == 0):
                raise ValueError(
                    f"OptimalTransportAdapter.fit: {name}: expected a finite number {least}, got {value!r}"
                )
        self.X_target_ = np.array(target)
        source, target = _copy(X), _copy(target)
        # The plan does not change where a domain as a whole is shifted; centred, distances keep their digits.
        self._means = source.mean(0), target.mean(0)
        source, target = source - self._means[0], target - self._means[1]
        spread = float((source.square().sum(1).mean() + target.square().sum(1).mean()).sqrt())
        if not math.isfinite(spread):
            raise ValueError(
                "OptimalTransportAdapter.fit: X and X_target: expected squares within the range of float64; scale the "
                "columns"
            )
        self.spread_ = spread if spread > 0 else 1.0
        self._rows = source / self.spread_, target / self.spread_
        if self.class_reg > 0:
            self._fit_with_classes(y)
        else:
            self._classes_apart = None
            self.result_ = self._solved(solve_sample, *self._rows)
            self.n_iter_ = self.result_.n_iter
        return self

    def _solved(self, solver: Any, *problem: Tensor, **options: Any) -> TransportResult:
        result: TransportResult = solver(
            *problem, reg=self.reg, tol=self.tol, max_iter=self.max_iter, grad="none", **options
        )
        return result

    def _fit_with_classes(self, y: Any) -> None:
        """Majorisation and minimisation: the concave class term is replaced by its tangent at the last plan."""
        if y is None:
            raise ValueError("OptimalTransportAdapter.fit: y: expected the classes of X with class_reg > 0, got None")
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        source, target = self._rows
        if len(y) != len(source):
            raise ValueError(
                f"OptimalTransportAdapter.fit: y: expected {len(source)} classes, one a row of X, got {len(y)}"
            )
        self.classes_, numbers = np.unique(y, return_inverse=True)
        kinds = torch.from_numpy(numbers)
        distances = torch.cdist(source, target).square()
        shares = torch.ones(len(self.classes_), len(target), dtype=torch.float64)
        start, self.n_iter_ = None, 0
        for _ in range(_ROUNDS):
            slopes = self.class_reg / (2 * (shares + _OFFSET).sqrt())
            self._classes_apart = _ClassTerm(kinds, slopes)
            self.result_ = start = self._solved(solve, distances + slopes[kinds], x0=start)
            self.n_iter_ += start.n_iter
            shares = torch.zeros_like(shares).index_add(0, kinds, start.plan) * len(target)

    def transform(self, X: Any) -> NDArray[Any]:
        """Move rows of the source domain, ``(k, d)``, to the target domain."""
        return self._moved(X, source=0)

    def inverse_transform(self, X: Any) -> NDArray[Any]:
        """Move rows of the target domain, ``(k, d)``, to the source domain."""
        return self._moved(X, source=1)

    def _moved(self, X: Any, source: int) -> NDArray[Any]:
        check_is_fitted(self)
        X = validate_data(self, X, dtype=_FLOATS, reset=False)
        here, there = self._rows[source], self._rows[1 - source]
        potential = self.result_.potentials[1 - source]
        points = (_copy(X) - self._means[source]) / self.spread_
        if self._classes_apart is None:
            moved = softmax_map(points, there, potential, self.reg)
        else:
            moved = torch.empty_like(points)
            nearest = torch.from_numpy(pairwise_distances_argmin(points.numpy(), here.numpy()))
            for rows, costs in self._classes_apart.costs(nearest, source):
                moved[rows] = softmax_map(points[rows], there, potential - costs, self.reg)
        moved = moved * self.spread_ + self._means[1 - source]
        return moved.numpy().astype(X.dtype)


@dataclass(frozen=True)
class _ClassTerm:
    """What the class term adds to the cost of source row i and target row j: ``slopes[kinds[i], j]``."""

    kinds: Tensor
    slopes: Tensor

    def costs(self, nearest: Tensor, source: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows that share their added costs, and these, from what rows of fit they count as."""
        groups = self.kinds[nearest] if source == 0 else nearest
        for number in groups.unique():
            yield groups == number, self.slopes[number] if source == 0 else self.slopes[self.kinds, number]


def _copy(X: NDArray[Any]) -> Tensor:
    """A float64 tensor of its own memory, row by row wherever the table has its columns."""
    return torch.from_numpy(np.array(X, dtype=np.float64, order="C"))


__all__ = ["OptimalTransportAdapter"]
