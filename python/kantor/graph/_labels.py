"""Labels as people have them: words or numbers, with gaps; and the rows of features that they belong to."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Labels:
    """Numbers of classes.

    Attributes
    ----------
    numbers : Tensor (n,)
        0 .. C - 1, or -1 where the label is unknown; int64.
    classes : list
        What the numbers stand for.
    """

    numbers: Tensor
    classes: list[Any]

    def names(self, numbers: Tensor) -> np.ndarray[Any, Any]:
        """Classes of these numbers, as an array of their own kind where they have one, else of objects."""
        kinds = {type(name) for name in self.classes}
        simple = len(kinds) == 1 and kinds <= {int, str, bool, float}
        names: np.ndarray[Any, Any] = np.array(self.classes if simple else [None] * len(self.classes))
        if not simple:
            names[:] = self.classes
        chosen: np.ndarray[Any, Any] = names[numbers.cpu().numpy()]
        return chosen


def read_labels(labels: Any, n: int) -> Labels:
    """Number the classes of n labels; a mapping from rows to labels has them where it has a key."""
    if isinstance(labels, Mapping):
        values: list[Any] = [None] * n
        for row, label in labels.items():
            if not (hasattr(row, "__index__") and 0 <= row.__index__() < n):
                raise ValueError(f"classify: labels: expected rows 0..{n - 1} as keys, got {row!r}")
            values[row.__index__()] = label
    elif isinstance(labels, str) or not hasattr(labels, "__len__"):
        raise TypeError(
            f"classify: labels: expected a sequence, an array or a mapping from rows to labels, got "
            f"{type(labels).__name__}"
        )
    else:
        if getattr(labels, "ndim", 1) != 1:
            raise ValueError(
                f"classify: labels: expected one dimension, got shape {tuple(labels.shape)}; pass one column"
            )
        values = list(labels.tolist() if hasattr(labels, "tolist") else labels)
        if len(values) != n:
            raise ValueError(f"classify: labels: expected {n}, one a row, got {len(values)}; -1 or None where unknown")
    names = [None if is_unknown(value) else _plain(value) for value in values]
    counts = Counter(name for name in names if name is not None)
    if len(counts) < 2:
        raise ValueError(f"classify: labels: expected known labels of at least two classes, got {_few(counts, values)}")
    try:
        classes = sorted(counts)
    except TypeError:  # of kinds that have no order
        classes = sorted(counts, key=lambda name: (type(name).__name__, str(name)))
    number = {name: i for i, name in enumerate(classes)}
    return Labels(torch.tensor([-1 if name is None else number[name] for name in names]), classes)


def _few(counts: Counter[Any], values: list[Any]) -> str:
    """What is wrong with labels of less than two classes, and what to do."""
    if counts:
        (name, count), *_ = counts.items()
        what = f"{count} times {name!r} and nothing else; label some rows of another class"
    else:
        what = "none; label some rows of each class"
    minus = any(isinstance(value, int | float) and value == -1 for value in values)
    return what + (" (-1 means unknown: name a class otherwise)" if minus else "")


def is_unknown(value: Any) -> bool:
    """Whether a label stands for none: -1, None, NaN, the empty word."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    if isinstance(value, str):
        return value in ("", "nan")  # what NumPy makes of NaN in an array of strings
    if isinstance(value, float | np.floating):
        return math.isnan(value) or value == -1
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and value == -1


def _plain(value: Any) -> Any:
    """A Python object; whole numbers as int, also where gaps made pandas write them as decimals."""
    value = value.item() if isinstance(value, np.generic | Tensor) else value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, Hashable):
        raise TypeError(f"classify: labels: expected words or numbers, got a {type(value).__name__}: {value!r}")
    return value


def read_features(x: Any) -> Tensor:
    """A tensor (n, d), float32 unless it came as a float64 tensor, of finite entries."""
    names = [str(name) for name in x.columns] if hasattr(x, "columns") else None
    if isinstance(x, Tensor):
        points = x.detach()
        points = points if points.layout is torch.strided else points.to_dense()
        if points.is_complex():
            raise TypeError(f"classify: x: expected real numbers, got {str(points.dtype)[6:]}")
        points = points if points.dtype in (torch.float32, torch.float64) else points.float()
    else:
        if names is not None:
            array = _table(x, names)
        else:
            x = x.toarray() if hasattr(x, "toarray") else x  # sparse
            try:
                array = np.asarray(x, dtype=np.float64)
            except (TypeError, ValueError) as error:
                raise TypeError(f"classify: x: expected numbers, one row a point: {error}") from error
        points = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float64))
    if points.ndim != 2 or 0 in points.shape:
        hint = "; a single feature is x[:, None]" if points.ndim == 1 else ""
        raise ValueError(f"classify: x: expected shape (n, d), one row a point, got {tuple(points.shape)}{hint}")
    if not isinstance(x, Tensor) and bool((single := points.float()).isfinite().all()):
        points = single
    finite = torch.isfinite(points)
    if not bool(finite.all()):
        row, column = (int(i) for i in (~finite).nonzero()[0])
        where = f"row {row}, column {repr(names[column]) if names else column}"
        rows = int((~finite).any(1).sum())
        raise ValueError(
            f"classify: x: expected finite values, got {points[row, column].item()} in {where} ({rows} such rows); "
            "fill it in, or leave out the row or the column"
        )
    return points


def _table(x: Any, names: list[str]) -> np.ndarray[Any, Any]:
    """The columns of a data frame as numbers; missing cells are NaN."""
    columns, words = [], []
    for place, name in enumerate(names):
        try:
            columns.append(np.asarray(x.iloc[:, place].to_numpy(dtype=np.float64, na_value=np.nan)))
        except (TypeError, ValueError):
            words.append(name)
    if words:
        raise TypeError(
            f"classify: x: expected numbers, got text in {', '.join(words)}; leave out or encode the column"
        )
    return np.stack(columns, 1) if columns else np.empty((len(x), 0))


@dataclass(frozen=True)
class Scaling:
    """What brings the rows of a table, and others like them, onto a common scale: ``(x - mean) / spread``.

    Attributes
    ----------
    mean, spread : Tensor (d,) or (), optional
        Of the table, float64. None: the sum of each row is the spread of the row.
    """

    mean: Tensor | None
    spread: Tensor | None

    @classmethod
    def of(cls, x: Tensor, how: str) -> Scaling:
        """The scaling that suits a table; see :func:`kantor.graph.classify`."""
        if how == "auto":
            how = _scale_of(x)
        if how == "rows":
            return cls(None, None)
        exact = x.double()
        if how == "none":
            return cls(exact.new_zeros(()), exact.new_ones(()))
        # A column of one value is zero but for the rounding of that value: it must not be blown up.
        rounding = 10 * torch.finfo(x.dtype).eps * exact.abs().amax(0)
        mean = exact.mean(0)
        spread = _root_mean_square(exact - mean)
        if how == "together":
            spread, rounding = _root_mean_square(spread), rounding.max()
        return cls(mean, torch.where(spread > rounding, spread, 1))

    def __call__(self, x: Tensor) -> Tensor:
        """Rows on the common scale, in their dtype."""
        if self.mean is None or self.spread is None:
            sums = x.abs().sum(1, keepdim=True)
            return x / torch.where(sums > 0, sums, 1)
        return ((x.double() - self.mean) / self.spread).to(x.dtype)


def _root_mean_square(x: Tensor) -> Tensor:
    """Of each column; squared next to one, lest squares leave the range of float64."""
    unit = torch.exp2(torch.frexp(x.abs().amax(0)).exponent.clamp(-1000, 1000).double())
    return (x / unit).square().mean(0).sqrt() * unit


def scaled(x: Tensor, how: str) -> Tensor:
    """Features on a common scale; see :func:`kantor.graph.classify`."""
    return Scaling.of(x, how)(x)


def _scale_of(x: Tensor) -> str:
    """What "auto" is for these features."""
    if bool((x >= 0).all()) and int(x.count_nonzero()) < 0.2 * x.numel():
        return "rows"
    largest = x.abs().amax(0)
    shared = int((largest == largest.max()).sum())
    return "together" if x.shape[1] > 2 and shared >= 0.5 * x.shape[1] else "columns"


__all__ = ["Labels", "Scaling", "is_unknown", "read_features", "read_labels", "scaled"]
