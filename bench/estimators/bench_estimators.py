"""The scikit-learn estimators beside scikit-learn's LabelSpreading and POT's domain adaptation: accuracy and time.

    python bench/estimators/bench_estimators.py
    python bench/estimators/bench_estimators.py labels --draws 10
    python bench/estimators/bench_estimators.py domains --draws 5

Prints a table a part, and one JSON line a row on standard error. Peers are given the best of a grid of their settings,
chosen by the very accuracy that is reported; Kantor's classifiers run with their defaults, its adapter with those and,
like POT's, with the best of the same grid. Times are medians over the draws, methods taking turns; one thread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import rotate
from sklearn.datasets import load_digits, make_moons
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.semi_supervised import LabelSpreading

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kantor.bench.tables import Table
from kantor.sklearn import DiffusionClassifier, OptimalTransportAdapter

Draw = tuple[Any, ...]
Score = tuple[float, ...]


def note(**record: Any) -> None:
    """One JSON line."""
    print(json.dumps(record), file=sys.stderr, flush=True)


def compare(draws: list[Draw], methods: dict[str, list[Callable[..., tuple[Score, float]]]]) -> dict[str, Any]:
    """For each method the mean scores of its best setting (by the first score), and the median of its seconds."""
    seen: dict[tuple[str, int], list[tuple[Score, float]]] = {}
    for draw in draws:
        for name, settings in methods.items():
            for number, run in enumerate(settings):
                seen.setdefault((name, number), []).append(run(*draw))
    best: dict[str, Any] = {}
    for (name, number), results in seen.items():
        scores = np.mean([score for score, _ in results], 0)
        if name not in best or scores[0] > best[name][0][0]:
            best[name] = scores, statistics.median(seconds for _, seconds in results), number
    return best


# --- classes from a few labels ---


def few_labels(name: str, per_class: int, draws: int) -> Iterator[Draw]:
    """Rows with gaps in their labels, the truth, and rows that come later."""
    for seed in range(draws):
        random = np.random.RandomState(seed)
        X, y = load_digits(return_X_y=True) if name == "digits" else make_moons(1500, noise=0.1, random_state=seed)
        order = random.permutation(len(X))
        X, y = X[order], y[order]
        table = len(X) * 2 // 3
        known = np.full(table, -1)
        for c in np.unique(y):
            rows = np.flatnonzero(y[:table] == c)[:per_class]
            known[rows] = c
        yield X[:table], known, y[:table], X[table:], y[table:]


def classifier(model: Any) -> Callable[..., tuple[Score, float]]:
    """Accuracies on the rows without label and on new rows, and the seconds of fit and predict."""

    def run(X: Any, known: Any, truth: Any, new: Any, new_truth: Any) -> tuple[Score, float]:
        started = time.perf_counter()
        model.fit(X, known)
        later = model.predict(new)
        seconds = time.perf_counter() - started
        return ((model.transduction_ == truth)[known < 0].mean(), (later == new_truth).mean()), seconds

    return run


def labels(arguments: argparse.Namespace) -> None:
    """DiffusionClassifier beside LabelSpreading."""
    table = Table(
        f"From few labels: accuracy in %, means of {arguments.draws} draws",
        ("data", "labels a class", "method", "rows without label", "new rows", "seconds"),
    )
    # Kantor scales by itself: "together" for pixels, which is what none is to LabelSpreading; columns for moons.
    spreading = [
        LabelSpreading(kernel="knn", n_neighbors=k, alpha=alpha, max_iter=200)
        for k, alpha in itertools.product((5, 7, 10), (0.2, 0.8, 0.95))
    ]
    for data, per_class in itertools.product(("digits", "moons"), (1, 5)):
        gammas = (5e-4, 1e-3, 2e-3) if data == "digits" else (10, 30, 100)
        smooth = [
            LabelSpreading(gamma=gamma, alpha=alpha, max_iter=200)
            for gamma, alpha in itertools.product(gammas, (0.2, 0.8))
        ]
        methods = {
            "LabelSpreading, knn, best of 9": [classifier(model) for model in spreading],
            f"LabelSpreading, rbf, best of {len(smooth)}": [classifier(model) for model in smooth],
            "DiffusionClassifier, label_spreading": [classifier(DiffusionClassifier("label_spreading"))],
            "DiffusionClassifier, diffusion": [classifier(DiffusionClassifier())],
            "DiffusionClassifier, coin": [classifier(DiffusionClassifier("coin"))],
        }
        best = compare(list(few_labels(data, per_class, arguments.draws)), methods)
        for name, (scores, seconds, number) in best.items():
            table.add(data, per_class, name, *(f"{100 * score:.1f}" for score in scores), f"{seconds:.3f}")
            note(part="labels", data=data, labels=per_class, method=name, scores=list(scores), seconds=seconds,
                 setting=number)  # fmt: skip
    table.print()


# --- domains ---


def domains(name: str, draws: int) -> Iterator[Draw]:
    """Rows of a source domain with classes, of a target domain, and target rows that come later."""
    images, classes = load_digits(return_X_y=True)
    for seed in range(draws):
        if name == "moons":  # half of it turned by 40 degrees
            (X, y), (Y, z) = (make_moons(n, noise=0.1, random_state=2 * seed + i) for i, n in enumerate((400, 800)))
            turn = np.array([[np.cos(0.7), np.sin(0.7)], [-np.sin(0.7), np.cos(0.7)]])
            yield X, y, Y[:400] @ turn, z[:400], Y[400:] @ turn, z[400:]
            continue
        order = np.random.RandomState(seed).permutation(len(images))
        rows, targets, later = order[:500], order[500:1000], order[1000:]
        turned = [
            np.stack([rotate(image.reshape(8, 8), 20, reshape=False, order=1).ravel() for image in images[part]])
            for part in (targets, later)
        ]
        brighter = [1.3 * part + 3 for part in turned]
        yield images[rows], classes[rows], brighter[0], classes[targets], brighter[1], classes[later]


MODELS: tuple[Callable[[], Any], ...] = (
    lambda: KNeighborsClassifier(1),
    lambda: make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)),
)


def judged(moved: Any, y: Any, Y: Any, z: Any, later: Any, later_z: Any) -> Score:
    """Accuracies in the target domain of models of the moved rows: nearest neighbour on both parts, then linear."""
    near, linear = (model().fit(moved, y) for model in MODELS)
    return near.score(Y, z), near.score(later, later_z), linear.score(later, later_z)


def adapted(move: Callable[..., Any]) -> Callable[..., tuple[Score, float]]:
    """A way of moving source rows as a method to compare; the seconds are of the move alone."""

    def run(X: Any, y: Any, Y: Any, z: Any, later: Any, later_z: Any) -> tuple[Score, float]:
        started = time.perf_counter()
        moved = move(X, y, Y)
        seconds = time.perf_counter() - started
        return judged(moved, y, Y, z, later, later_z), seconds

    return run


def kantors(**options: Any) -> Callable[..., tuple[Score, float]]:
    """The adapter with these options."""
    return adapted(lambda X, y, Y: OptimalTransportAdapter(**options).fit(X, y, X_target=Y).transform(X))


def pots(kind: str, **options: Any) -> Callable[..., tuple[Score, float]]:
    """A class of POT's with these options; to the adapter's tolerance, the cost divided by its largest entry."""
    import ot.da

    make = getattr(ot.da, kind)
    return adapted(lambda X, y, Y: make(norm="max", tol=1e-6, **options).fit(Xs=X, ys=y, Xt=Y).transform(Xs=X))


def run_domains(arguments: argparse.Namespace) -> None:
    """OptimalTransportAdapter beside POT's SinkhornTransport and SinkhornLpl1Transport."""
    table = Table(
        f"Domain adaptation: accuracy in the target domain in %, means of {arguments.draws} draws",
        ("data", "method", "nearest, rows of fit", "nearest, new rows", "linear, new rows", "seconds"),
    )
    regs, class_terms = (0.05, 0.1, 0.2, 0.4), list(itertools.product((0.1, 0.2, 0.4), (0.3, 1.0)))
    their_regs, their_class_terms = (0.01, 0.02, 0.05, 0.1), list(itertools.product((0.02, 0.05, 0.1), (0.1, 0.3)))
    methods = {
        "none": [adapted(lambda X, y, Y: X)],
        "POT SinkhornTransport, best of 4": [pots("SinkhornTransport", reg_e=reg) for reg in their_regs],
        "OptimalTransportAdapter, best of 4": [kantors(reg=reg) for reg in regs],
        "OptimalTransportAdapter, default": [kantors()],
        "POT SinkhornLpl1Transport, best of 6": [
            pots("SinkhornLpl1Transport", reg_e=reg, reg_cl=cl) for reg, cl in their_class_terms
        ],
        "OptimalTransportAdapter, class term, best of 6": [kantors(reg=reg, class_reg=cl) for reg, cl in class_terms],
        "OptimalTransportAdapter, class_reg=1": [kantors(class_reg=1.0)],
    }
    for data in ("digits, turned by 20 degrees", "moons"):
        best = compare(list(domains(data, arguments.draws)), methods)
        for name, (scores, seconds, number) in best.items():
            table.add(data, name, *(f"{100 * score:.1f}" for score in scores), f"{seconds:.3f}")
            note(part="domains", data=data, method=name, scores=list(scores), seconds=seconds, setting=number)
    table.print()


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"labels": labels, "domains": run_domains}
    parser.add_argument("parts", nargs="*", choices=[[], *parts], default=list(parts))
    parser.add_argument("--draws", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="max_iter")  # of LabelSpreading
    warnings.filterwarnings("ignore", module=r"ot\b.*")
    for part in arguments.parts:
        parts[part](arguments)
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
