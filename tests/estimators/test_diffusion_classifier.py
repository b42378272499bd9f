"""The classifier: scikit-learn's own checks, what it says of the table and of new rows, where it stands, bad input."""

from __future__ import annotations

import pickle
import sys
from contextlib import suppress
from typing import Any
from unittest import SkipTest

import numpy as np
import pytest

pytest.importorskip("sklearn.base")

from sklearn.base import clone
from sklearn.datasets import make_blobs, make_moons
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.semi_supervised import LabelSpreading
from sklearn.utils.estimator_checks import (
    check_classifiers_classes,
    estimator_checks_generator,
    parametrize_with_checks,
)

from kantor.graph import classify
from kantor.graph._labels import read_features, scaled
from kantor.sklearn import DiffusionClassifier

SPREADING = DiffusionClassifier("label_spreading")
SMALL = DiffusionClassifier(num_steps=5, max_epochs=50)


def expected_failures(estimator: Any) -> dict[str, str]:
    """What cannot hold, and why."""
    return {"check_classifiers_classes": "-1 and 1 are no two classes where -1 means unknown"}


@parametrize_with_checks([SPREADING, SMALL], expected_failed_checks=expected_failures)
def test_scikit_learns_checks(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize("estimator", [SPREADING, SMALL], ids=str)
def test_the_check_of_classes_holds_as_for_scikit_learns_own(estimator: Any) -> None:
    # By these names scikit-learn tells for whom -1 means unknown.
    check_classifiers_classes("LabelSpreading", estimator)


@pytest.mark.slow
def test_scikit_learns_checks_with_the_defaults(size: str) -> None:
    if size != "full":
        pytest.skip("takes half a minute: --size full")
    for method in ("diffusion", "coin", "no_diffusion"):
        model = DiffusionClassifier(method)  # type: ignore[arg-type]
        for estimator, check in estimator_checks_generator(
            model, mark="skip", expected_failed_checks=expected_failures(0)
        ):
            with suppress(pytest.skip.Exception, SkipTest):
                check(estimator)


def blobs(n: int = 90, known: int = 9) -> tuple[Any, Any, Any]:
    """Separated clusters of three classes; their labels, and these with gaps."""
    X, truth = make_blobs(n, centers=[[0, 0], [5, 0], [0, 5]], random_state=0)
    return X, truth, np.where(np.arange(n) < known, truth, -1)


X, TRUTH, Y = blobs()


# --- the table ---


@pytest.mark.parametrize("method", ["diffusion", "coin", "label_spreading", "no_diffusion"])
def test_it_says_what_classify_says(method: Any) -> None:
    model = DiffusionClassifier(method, max_epochs=30).fit(X, Y)
    result = classify(X, Y, method=method, max_epochs=30)
    np.testing.assert_array_equal(model.transduction_, result.labels)
    np.testing.assert_allclose(model.label_distributions_, result.probabilities, atol=1e-6)
    np.testing.assert_allclose(model.label_distributions_.sum(1), 1, rtol=1e-14)
    assert model.label_distributions_.dtype == np.float64
    assert (model.transduction_ == TRUTH).mean() > 0.9
    np.testing.assert_array_equal(model.classes_, [0, 1, 2])
    assert model.n_iter_ == (result.num_steps if method == "label_spreading" else 30)
    assert (model.predict(X) == TRUTH).mean() > 0.9


def test_given_labels_are_kept() -> None:
    wrong = Y.copy()
    wrong[0] = (TRUTH[0] + 1) % 3
    model = clone(SPREADING).fit(X, wrong)
    assert model.transduction_[0] == wrong[0]
    assert model.label_distributions_.shape == (90, 3)


@pytest.mark.parametrize("kind", ["objects", "words", "empty", "floats"])
def test_kinds_of_labels(kind: str) -> None:
    names = np.array([3.0, 1.0, 2.0] if kind == "floats" else ["ant", "bee", "cat"])
    labels = names[TRUTH].astype(object)
    labels[9:] = "" if kind == "empty" else -1
    labels = labels.astype({"objects": object, "floats": float}.get(kind, str))
    model = clone(SPREADING).fit(X, labels)
    np.testing.assert_array_equal(model.classes_, np.unique(names))
    assert (model.transduction_ == names[TRUTH]).mean() > 0.9
    assert set(model.predict(X)) <= set(names)
    assert model.score(X, labels) > 0.9


def test_random_state() -> None:
    small = DiffusionClassifier(max_epochs=3)
    first = small.fit(X, Y).label_distributions_
    np.testing.assert_array_equal(first, clone(small).fit(X, Y).label_distributions_)
    for other in (1, None, np.random.RandomState(5)):
        assert (clone(small).set_params(random_state=other).fit(X, Y).label_distributions_ != first).any()


# --- new rows ---


def by_loops(model: DiffusionClassifier, new: Any, k: int) -> Any:
    """The mean over the k - 1 nearest rows, as the documentation has it."""
    both = (np.concatenate([X, new]) - X.mean(0)) / X.std(0)
    rows = []
    for point in both[len(X) :]:
        distance = np.linalg.norm(both[: len(X)] - point, axis=1)
        near = np.argsort(distance)[: k - 1]
        weight = np.exp(-((distance[near] / distance[near[max(2, (k + 1) // 2) - 2]]) ** 2))
        rows.append(weight @ model.label_distributions_[near] / weight.sum())
    return np.array(rows)


@pytest.mark.parametrize("k", [2, 3, 4, 10])
def test_new_rows_take_one_step_from_the_table(k: int) -> None:
    model = DiffusionClassifier("label_spreading", k=k, scale="columns").fit(X, Y)
    new = X[:12] + 0.37
    np.testing.assert_allclose(model.predict_proba(new), by_loops(model, new, k), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(model.predict(new), model.predict_proba(new).argmax(1))
    # What is said of a row does not depend on those beside it.
    np.testing.assert_allclose(model.predict_proba(new[3:4])[0], model.predict_proba(new)[3], rtol=1e-9)


def test_new_rows_are_scaled_as_the_table_was() -> None:
    for scale in ("columns", "together", "rows", "none"):
        table = np.abs(X) + 0.1
        model = DiffusionClassifier("label_spreading", scale=scale).fit(table, Y)  # type: ignore[arg-type]
        alone = np.concatenate([model.predict_proba(table[i : i + 1]) for i in range(0, 90, 9)])
        np.testing.assert_allclose(alone, model.predict_proba(table)[::9], rtol=1e-6)
        by_hand = scaled(read_features(table), scale).numpy()
        other = DiffusionClassifier("label_spreading", scale="none").fit(by_hand, Y)
        np.testing.assert_allclose(other.predict_proba(by_hand), model.predict_proba(table), rtol=1e-4, atol=1e-6)


def test_duplicates() -> None:
    table = np.repeat(X[:30], 4, 0)
    model = DiffusionClassifier("label_spreading", k=5).fit(table, np.repeat(Y[:30], 4))
    probabilities = model.predict_proba(X[:30])  # whose nearest rows are all at distance zero
    assert np.isfinite(probabilities).all()
    np.testing.assert_allclose(probabilities, model.label_distributions_[::4], atol=1e-6)


def test_new_rows_of_moons() -> None:
    X, truth = make_moons(300, noise=0.06, random_state=0)
    y = np.full(200, -1)
    for c in (0, 1):
        y[np.flatnonzero(truth[:200] == c)[:3]] = c
    model = clone(SPREADING).fit(X[:200], y)
    assert model.score(X[200:], truth[200:]) > 0.95
    theirs = LabelSpreading(kernel="knn", n_neighbors=9, alpha=0.8)
    theirs.fit(StandardScaler().fit_transform(X[:200]), y)
    assert (model.transduction_ == theirs.transduction_).mean() > 0.95


# --- where it stands ---


def test_in_a_pipeline_and_a_grid_search_with_gaps() -> None:
    pipeline = make_pipeline(StandardScaler(), DiffusionClassifier("label_spreading", scale="none"))
    y = np.where(np.arange(90) % 3 == 0, TRUTH, -1)
    search = GridSearchCV(pipeline, {"diffusionclassifier__teleport": [0.1, 0.9]}, cv=3).fit(X, y)
    assert search.best_score_ > 0.9  # over the rows with a label: the others have none that could be right
    assert (search.predict(X) == TRUTH).mean() > 0.9


def test_score_leaves_out_unknown_rows() -> None:
    model = clone(SPREADING).fit(X, Y)
    some = np.where(np.arange(90) < 20, TRUTH, -1)
    some[0] = (TRUTH[0] + 1) % 3
    right = model.predict(X)[:20] == some[:20]
    assert model.score(X, some) == right.mean() < 1
    weight = np.linspace(1, 2, 90)
    assert model.score(X, some, weight) == pytest.approx(np.average(right, weights=weight[:20]))
    with pytest.raises(ValueError, match=r"score: y: expected a label that is known, got none; -1 means unknown"):
        model.score(X, np.full(90, -1))


def test_clones_copies_and_dtypes() -> None:
    y = np.where(np.arange(90) < 30, TRUTH, -1)
    model = DiffusionClassifier(max_epochs=5, num_steps=3, k=6).fit(X, y)
    assert clone(model).get_params() == model.get_params()
    copied = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(copied.predict_proba(X), model.predict_proba(X))
    folds = [result.cross_validate(3).accuracy for result in (copied.result_, model.result_)]
    assert folds[0] == folds[1]
    single = clone(model).fit(X.astype("float32"), y)
    np.testing.assert_allclose(single.predict_proba(X.astype("float32")), model.predict_proba(X), atol=1e-3)


def test_data_frames() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X, columns=["east", "north"])
    model = clone(SPREADING).fit(frame, pandas.Series(Y))
    assert list(model.feature_names_in_) == ["east", "north"]
    np.testing.assert_array_equal(model.predict_proba(frame), clone(SPREADING).fit(X, Y).predict_proba(X))
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame.rename(columns={"north": "up"}))


# --- what is wrong ---


@pytest.mark.parametrize(
    ("options", "x", "y", "error", "match"),
    [
        ({}, X, np.full(90, -1), ValueError, r"fit: y: expected labels of at least two classes, got 0 class"),
        ({}, X, np.where(Y == 0, 0, -1), ValueError, r"got 1 class; -1 means unknown: name a class otherwise"),
        (
            {},
            X,
            np.where(Y == 0, np.nan, Y),
            ValueError,
            r"y contains NaN.*fit: y: write -1 where the class is unknown",
        ),
        ({}, X, np.linspace(0, 1, 90), ValueError, r"Unknown label type: continuous"),
        ({}, X[:2], Y[:2], ValueError, r"Found array with 2 sample\(s\) .* minimum of 3 is required"),
        ({}, X[:50], Y, ValueError, r"inconsistent numbers of samples"),
        ({"method": "kriging"}, X, Y, ValueError, r"method: expected one of 'diffusion', 'coin', .* got 'kriging'"),
        ({"k": 90}, X, Y, ValueError, r"k: expected 1..89, fewer than the 90 rows, got 90"),
        ({"scale": "log"}, X, Y, ValueError, r"scale: expected one of"),
        ({"teleport": 1.5}, X, Y, ValueError, r"teleport: expected a number in \[0, 1\), got 1.5"),
        ({"random_state": "seven"}, X, Y, ValueError, r"cannot be used to seed"),
        ({}, np.where(X > 4, np.nan, X), Y, ValueError, r"Input X contains NaN"),
    ],
)
def test_bad_input(options: Any, x: Any, y: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        DiffusionClassifier(**options).fit(x, y)


def test_sparse_tables_are_refused() -> None:
    sp = pytest.importorskip("scipy.sparse")
    with pytest.raises(TypeError, match="Sparse data was passed for X, but dense data is required"):
        clone(SPREADING).fit(sp.csr_array(X), Y)


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("kantor.sklearn")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn.utils.validation", None)
    with pytest.raises(
        ImportError, match=r'kantor.sklearn needs scikit-learn 1.6 or newer: pip install "kantor\[sklearn'
    ):
        import kantor.sklearn  # noqa: F401
