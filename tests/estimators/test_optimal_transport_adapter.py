"""The adapter: scikit-learn's own checks, what the map is, the class term, where it stands, bad input."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn.base")

import sklearn
from sklearn.base import clone
from sklearn.datasets import make_moons
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from kantor.sklearn import OptimalTransportAdapter
from kantor.transport import solve, solve_sample


class OntoDouble(OptimalTransportAdapter):
    """Whose target domain is what it gets, twice as large: for checks that know nothing of a second table."""

    def fit(self, X: Any, y: Any = None) -> OntoDouble:  # type: ignore[override]
        """Fit to the two."""
        target = X * 2 if hasattr(X, "shape") and np.asarray(X).dtype.kind == "f" else X
        super().fit(X, y, X_target=target)
        return self


# No check is expected to fail. Without a target domain the checks move X onto itself, which takes the same path.
@pytest.mark.filterwarnings("ignore:OptimalTransportAdapter.fit. X_target")
@parametrize_with_checks([OptimalTransportAdapter(), OntoDouble(reg=0.02), OntoDouble(class_reg=1.0)])
def test_scikit_learns_checks(estimator: Any, check: Any) -> None:
    check(estimator)


def moons(n: int = 60, angle: float = 0.6, seed: int = 0) -> tuple[Any, Any, Any, Any]:
    """Two half moons, and others turned by an angle and shifted."""
    X, y = make_moons(n, noise=0.05, random_state=seed)
    Y, z = make_moons(n + 10, noise=0.05, random_state=seed + 1)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return X, y, Y @ turn + [3.0, -2.0], z


X, LABELS, Y, TARGET_LABELS = moons()


def softmax_mean(scores: Any, values: Any) -> Any:
    weight = np.exp(scores - scores.max(1, keepdims=True))
    return weight @ values / weight.sum(1, keepdims=True)


# --- the map ---


def test_the_plan_is_that_of_the_centred_rows_in_one_unit() -> None:
    adapter = OptimalTransportAdapter(reg=0.05, tol=1e-10).fit(X, X_target=Y)
    spread = np.sqrt(X.var(0).sum() + Y.var(0).sum())
    np.testing.assert_allclose(adapter.spread_, spread, rtol=1e-12)
    direct = solve_sample(torch.from_numpy(X), torch.from_numpy(Y), reg=0.05 * spread**2, tol=1e-10)
    np.testing.assert_allclose(adapter.result_.plan, direct.plan, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(adapter.transform(X), direct.barycentric_map(), rtol=1e-7)
    assert adapter.n_iter_ == adapter.result_.n_iter > 0
    np.testing.assert_array_equal(adapter.X_target_, Y)


def test_new_rows_follow_the_formula_in_both_directions() -> None:
    adapter = OptimalTransportAdapter(reg=0.05, tol=1e-11).fit(X, X_target=Y)
    spread = adapter.spread_
    source, target = (X - X.mean(0)) / spread, (Y - Y.mean(0)) / spread
    f, g = (potential.numpy() for potential in adapter.result_.potentials)
    for new, here, there, potential, values, move in (
        (X[:7] + 0.3, X, target, g, Y, adapter.transform),
        (Y[:7] - 0.2, Y, source, f, X, adapter.inverse_transform),
    ):
        points = (new - here.mean(0)) / spread
        distance = ((points[:, None] - there) ** 2).sum(-1)
        np.testing.assert_allclose(move(new), softmax_mean((potential - distance) / 0.05, values), rtol=1e-9)
    back = OptimalTransportAdapter(reg=0.05, tol=1e-11).fit(Y, X_target=X)
    np.testing.assert_allclose(adapter.inverse_transform(Y), back.transform(Y), rtol=1e-6)


def test_a_shift_is_undone_wherever_the_domains_are() -> None:
    for far in (0.0, 1e7):
        shift = np.array([far, -3.0])
        moved = OptimalTransportAdapter(reg=1e-3).fit(X, X_target=X + shift).transform(X[:20] + 0.01)
        np.testing.assert_allclose(moved, X[:20] + 0.01 + shift, atol=0.08)


def test_dtypes_and_units() -> None:
    double = OptimalTransportAdapter().fit(X, X_target=Y)
    single = OptimalTransportAdapter().fit(X.astype("float32"), X_target=Y.astype("float32"))
    assert single.transform(X.astype("float32")).dtype == np.float32
    assert double.transform(X).dtype == np.float64
    np.testing.assert_allclose(single.transform(X.astype("float32")), double.transform(X), atol=1e-4)
    for unit in (1e-9, 1e9):  # reg is relative to the spread
        other = OptimalTransportAdapter().fit(unit * X, X_target=unit * Y)
        np.testing.assert_allclose(other.transform(unit * X), unit * double.transform(X), rtol=1e-6)


@pytest.mark.parametrize("n", [1, 2])
def test_few_or_equal_rows(n: int) -> None:
    adapter = OptimalTransportAdapter().fit(np.zeros((n, 2)), X_target=np.full((3, 2), 5.0))
    np.testing.assert_array_equal(adapter.transform(np.ones((4, 2))), np.full((4, 2), 5.0))


def test_the_plan_is_pots() -> None:
    ot = pytest.importorskip("ot")
    adapter = OptimalTransportAdapter(reg=0.05, tol=1e-10).fit(X, X_target=Y)
    theirs = ot.da.SinkhornTransport(reg_e=0.05 * adapter.spread_**2, max_iter=5000, tol=1e-11)
    theirs.fit(Xs=X, Xt=Y)
    np.testing.assert_allclose(adapter.result_.plan, theirs.coupling_, atol=1e-8)
    np.testing.assert_allclose(adapter.transform(X), theirs.transform(Xs=X), atol=1e-5)


# --- classes ---


def class_objective(adapter: OptimalTransportAdapter, reg: float, class_reg: float) -> float:
    """What the class term's rounds make smaller, at a plan."""
    P = adapter.result_.plan.numpy()
    source, target = (X - X.mean(0)) / adapter.spread_, (Y - Y.mean(0)) / adapter.spread_
    cost = ((source[:, None] - target) ** 2).sum(-1)
    shares = np.stack([P[c == LABELS].sum(0) for c in (0, 1)]) * len(Y)
    entropy = (P * np.log(P, where=P > 0, out=np.zeros_like(P))).sum()
    return float((P * cost).sum() + reg * entropy + class_reg * np.sqrt(shares + 0.3).sum(0).mean())


def test_the_class_term_separates_and_lowers_its_objective() -> None:
    plain = OptimalTransportAdapter(reg=0.1).fit(X, X_target=Y)
    adapter = OptimalTransportAdapter(reg=0.1, class_reg=1.0).fit(X, LABELS, X_target=Y)
    assert class_objective(adapter, 0.1, 1.0) < class_objective(plain, 0.1, 1.0) - 0.01

    def purity(of: OptimalTransportAdapter) -> float:
        plan = of.result_.plan.numpy()
        return float(np.maximum(plan[LABELS == 0].sum(0), plan[LABELS == 1].sum(0)).sum())

    assert purity(adapter) > purity(plain) + 0.05
    np.testing.assert_array_equal(adapter.classes_, [0, 1])
    # Ten rounds end near a fixed point: the plan of the tangent at the plan is the plan itself.
    plan = adapter.result_.plan
    shares = torch.stack([plan[torch.from_numpy(c == LABELS)].sum(0) for c in (0, 1)]) * len(Y)
    source, target = (torch.from_numpy(t - t.mean(0)) / adapter.spread_ for t in (X, Y))
    slopes = 1.0 / (2 * (shares + 0.3).sqrt())
    following = solve(torch.cdist(source, target).square() + slopes[torch.from_numpy(LABELS)], reg=0.1).plan
    assert float((following - plan).abs().sum()) < 0.02


def test_rows_of_fit_get_their_barycentric_image_with_classes_too() -> None:
    adapter = OptimalTransportAdapter(reg=0.1, class_reg=1.0, tol=1e-10).fit(X, LABELS, X_target=Y)
    P = adapter.result_.plan.numpy()
    np.testing.assert_allclose(adapter.transform(X), P @ Y / P.sum(1, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(adapter.inverse_transform(Y), P.T @ X / P.sum(0)[:, None], rtol=1e-6, atol=1e-7)
    words = clone(adapter).fit(X, np.array(["a", "b"])[LABELS], X_target=Y)
    np.testing.assert_array_equal(words.transform(X), adapter.transform(X))


def test_adaptation_helps() -> None:
    X, y, Y, z = moons(150, 0.5)
    before = KNeighborsClassifier(3).fit(X, y).score(Y, z)
    scores = []
    for class_reg in (0.0, 1.0):
        adapter = OptimalTransportAdapter(reg=0.02, class_reg=class_reg).fit(X, y, X_target=Y)
        scores.append(KNeighborsClassifier(3).fit(adapter.transform(X), y).score(Y, z))
    assert scores[0] > before + 0.2
    assert min(scores) > 0.75


# --- where it stands ---


def test_in_front_of_a_trained_model() -> None:
    X, y, Y, z = moons(150, 0.3)
    model = KNeighborsClassifier(3).fit(X, y)
    pipeline = make_pipeline(OptimalTransportAdapter(reg=0.02), FrozenEstimator(model))
    pipeline.fit(Y[:100], z[:100], optimaltransportadapter__X_target=X)
    assert pipeline.score(Y[100:], z[100:]) > 0.85 > 0.7 > model.score(Y[100:], z[100:])


def test_in_a_grid_search() -> None:
    pipeline = make_pipeline(OptimalTransportAdapter(), LogisticRegression())
    grid = {"optimaltransportadapter__reg": [0.05, 0.2], "optimaltransportadapter__class_reg": [0.0, 0.5]}
    search = GridSearchCV(pipeline, grid, cv=2).fit(X, LABELS, optimaltransportadapter__X_target=Y)
    assert search.best_score_ > 0.8
    assert set(search.best_params_) == set(grid)


def test_a_grid_search_hands_the_target_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    fit = OptimalTransportAdapter.fit

    def recorded(self: OptimalTransportAdapter, X: Any, y: Any = None, X_target: Any = None) -> Any:
        seen.append(len(X_target))
        return fit(self, X, y, X_target=X_target)

    monkeypatch.setattr(OptimalTransportAdapter, "fit", recorded)
    pipeline = make_pipeline(OptimalTransportAdapter(), KNeighborsClassifier(1))
    search = GridSearchCV(pipeline, {"optimaltransportadapter__reg": [0.1]}, cv=2, refit=False)
    for target, expected in ((Y, 70), (Y[:60], 30)):  # of as many rows as X each fold gets its own part
        seen.clear()
        search.fit(X, LABELS, optimaltransportadapter__X_target=target)
        assert seen == [expected, expected]


def test_earlier_steps_of_a_pipeline_reach_the_target_domain() -> None:
    with sklearn.config_context(enable_metadata_routing=True):
        steps = [("scale", StandardScaler()), ("adapt", OptimalTransportAdapter().set_fit_request(X_target=True))]
        pipeline = Pipeline(steps, transform_input=["X_target"]).fit(X, LABELS, X_target=Y)
        moved = pipeline.transform(X)
    scaler = StandardScaler().fit(X)
    by_hand = OptimalTransportAdapter().fit(scaler.transform(X), X_target=scaler.transform(Y))
    np.testing.assert_array_equal(moved, by_hand.transform(scaler.transform(X)))


def test_clones_copies_and_data_frames() -> None:
    pandas = pytest.importorskip("pandas")
    adapter = OptimalTransportAdapter(reg=0.05, class_reg=1.0).fit(X, LABELS, X_target=Y)
    assert clone(adapter).get_params() == adapter.get_params()
    copied = pickle.loads(pickle.dumps(adapter))
    np.testing.assert_array_equal(copied.transform(X), adapter.transform(X))
    frame, target = pandas.DataFrame(X, columns=["east", "north"]), pandas.DataFrame(Y, columns=["east", "north"])
    named = clone(adapter).set_output(transform="pandas").fit(frame, LABELS, X_target=target)
    moved = named.transform(frame)
    assert list(moved.columns) == list(named.get_feature_names_out()) == ["east", "north"]
    np.testing.assert_array_equal(moved, adapter.transform(X))
    with pytest.raises(ValueError, match="feature names"):
        clone(adapter).fit(frame, LABELS, X_target=target.rename(columns={"north": "up"}))


# --- what is wrong ---


@pytest.mark.parametrize(
    ("options", "data", "error", "match"),
    [
        ({"reg": 0}, {}, ValueError, r"OptimalTransportAdapter.fit: reg: expected a finite number > 0, got 0"),
        ({"reg": None}, {}, ValueError, r"reg: expected a finite number > 0, got None"),
        ({"class_reg": -1.0}, {}, ValueError, r"class_reg: expected a finite number >= 0, got -1.0"),
        ({"class_reg": np.nan}, {}, ValueError, r"class_reg: expected a finite number >= 0, got nan"),
        ({"class_reg": 1.0}, {"y": None}, ValueError, r"y: expected the classes of X with class_reg > 0, got None"),
        ({"class_reg": 1.0}, {"y": LABELS[:5]}, ValueError, r"y: expected 60 classes, one a row of X, got 5"),
        ({"class_reg": 1.0}, {"y": np.linspace(0, 1, 60)}, ValueError, r"Unknown label type: continuous"),
        ({"tol": 0.0}, {}, ValueError, r"tol: expected a finite number > 0"),
        ({}, {"X_target": Y[:, :1]}, ValueError, r"X has 1 features, but OptimalTransportAdapter is expecting 2"),
        ({}, {"X_target": np.full((3, 2), np.nan)}, ValueError, r"contains NaN"),
        ({}, {"X": np.full((3, 2), 1e200)}, ValueError, r"squares within the range of float64; scale the columns"),
    ],
)
def test_bad_input(options: Any, data: Any, error: type[Exception], match: str) -> None:
    if "X" in data:
        data["X"] = data["X"] * [[1.0], [2.0], [3.0]]
    with pytest.raises(error, match=match):
        OptimalTransportAdapter(**options).fit(**({"X": X, "y": LABELS, "X_target": Y} | data))


def test_sparse_rows_are_refused_and_a_missing_target_is_named() -> None:
    sp = pytest.importorskip("scipy.sparse")
    for data in ({"X": sp.csr_array(X), "X_target": Y}, {"X": X, "X_target": sp.csr_array(Y)}):
        with pytest.raises(TypeError, match="Sparse data was passed .* but dense data is required"):
            OptimalTransportAdapter().fit(**data)
    with pytest.warns(UserWarning, match="X_target: expected rows of the target domain, got none: X is moved onto"):
        adapter = OptimalTransportAdapter(reg=1e-3).fit(X)
    np.testing.assert_allclose(adapter.transform(X), X, atol=0.1)


def test_a_solver_that_does_not_get_there_warns() -> None:
    with pytest.warns(RuntimeWarning, match="max_iter"):
        OptimalTransportAdapter(reg=1e-3, max_iter=1).fit(X, X_target=Y)
