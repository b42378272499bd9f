"""Station: a thousand handwritten digits, one or two labels of each class, and a graph that carries them on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kantor.demo.figures import Ink, draw_picture
from kantor.demo.page import Check, Finding, Gallery, Picture, Section, StationReport, Table
from kantor.graph import Graph, diffuse, knn_graph, stability
from kantor.nn import COIN, DiffResNet

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "Handwritten digits from one label a class"
LABELS = (1, 2, 5)  # of each class
STEP, NUM_STEPS = 0.5, 40
METHODS = ("no diffusion", "Diff-ResNet", "COIN", "scikit-learn LabelSpreading")

_LEAD = (
    "Many pictures, few labels: most of what is known about a digit is which others look like it. A graph joins every "
    "picture with its nearest ones, and a network that diffuses along the graph learns from the labels of a handful "
    "what the others are."
)
_CREDITS = (
    "Handwritten digits: E. Alpaydin, C. Kaynak, UCI Machine Learning Repository, CC BY 4.0 (scikit-learn).",
    "Methods: T. Wang, Z. Dou, C. Bao, Z. Shi, <cite>Diffusion mechanism in residual neural network: theory and "
    "applications</cite>, IEEE TPAMI 2024; T. Wang, C. Bao, Z. Shi, <cite>Convection-diffusion equation: a "
    "theoretically certified framework for neural networks</cite>, 2024.",
)


@dataclass(frozen=True)
class Digits:
    """Pictures as rows of features (n, 64) in [0, 1], their true classes, and the graph of nearest neighbours."""

    x: Tensor
    classes: Tensor
    graph: Graph


@dataclass(frozen=True)
class Fit:
    """What one method made of one draw of labels: a class for each picture, accuracy without the labelled, seconds."""

    predicted: Tensor
    accuracy: float
    seconds: float


def load(count: int | None = None) -> Digits:
    """The digits that ship with scikit-learn, or the first of them.

    Raises
    ------
    ImportError
        scikit-learn is missing; the message names the extra to install.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the demo needs scikit-learn: pip install "kantor[demo]"') from error
    data = load_digits()
    x = torch.from_numpy(data.data[:count] / 16).float()
    return Digits(x, torch.from_numpy(data.target[:count]), knn_graph(x, k=11, bandwidth_k=6))


def run(folder: Path, size: Literal["small", "full"] = "full") -> StationReport:
    """Run the station: pictures into ``folder / "digits"``, and the report for the page and the terminal.

    Parameters
    ----------
    folder : Path
        The demo's folder.
    size : {"small", "full"}
        All 1797 digits, five draws of the labels and 150 epochs; or 500, two and 100.

    Raises
    ------
    ImportError
        scikit-learn or matplotlib is missing.
    """
    started = time.perf_counter()
    full = size == "full"
    digits = load(None if full else 500)
    draws, epochs = (5, 150) if full else (2, 100)
    fits = {
        (method, count): [
            fit(digits, method, draw_labels(digits.classes, count, seed), epochs) for seed in range(draws)
        ]
        for count in LABELS
        for method in METHODS
    }
    means = {key: float(np.mean([each.accuracy for each in found])) for key, found in fits.items()}
    table = _table(fits, means, len(digits.x), draws, epochs)
    seen = draw_labels(digits.classes, 1, 0)
    diffused = diffuse(digits.x, digits.graph, STEP, NUM_STEPS)
    (folder / "digits").mkdir(parents=True, exist_ok=True)
    axes = _principal_axes(digits.x)
    pictures = tuple(
        _graph_picture(folder / "digits", name, points @ axes, digits, seen, caption)
        for name, points, caption in (
            ("before", digits.x, "The pictures, on the two axes along which they differ most."),
            ("after", diffused, f"On the same axes after {NUM_STEPS} steps of diffusion."),
        )
    )
    without, with_diffusion = fits["no diffusion", 1][0], fits["COIN", 1][0]
    corrected = _corrected(folder / "digits", digits, without.predicted, with_diffusion.predicted)
    return StationReport(
        name="digits",
        title=TITLE,
        lead=_LEAD,
        sections=(
            Section("A graph, and diffusion on it", (*_GRAPH_TEXT, Gallery(pictures))),
            Section(
                "What one label a class is worth", (_METHOD_TEXT, Gallery((_chart(folder / "digits", fits),)), table)
            ),
            Section("Digits that diffusion corrects", (_CORRECTED_TEXT, Gallery((corrected,)))),
        ),
        table=table,
        checks=_checks(digits, diffused, means),
        seconds=time.perf_counter() - started,
        credits=_CREDITS,
        finding=Finding(
            f"{len(digits.x):,} pictures, of which one, two or five of each digit have a label.",
            "The same network without diffusion, and scikit-learn's label spreading.",
            f"With one label a class {', '.join(f'{100 * means[m, 1]:.0f} % ({m})' for m in METHODS)} are right.",
        ),
    )


_GRAPH_TEXT = (
    "64 grey values a picture; each is joined with those nearest to it, by a weight that falls with their distance, "
    "measured in the distance of the sixth neighbour. One step of diffusion moves every point a little "
    "towards the mean of its neighbours:",
    '<span class="equation"><i>x</i><sub>i</sub> &larr; <i>x</i><sub>i</sub> &minus; &gamma; &sum;<sub>j</sub> '
    "<i>w</i><sub>ij</sub> (<i>x</i><sub>i</sub> &minus; <i>x</i><sub>j</sub>)</span>",
    "Nobody told it the classes, and yet they draw together. Colours are the true classes; the ten labelled "
    "pictures wear a ring.",
)
_METHOD_TEXT = (
    "Every network has one residual block and a linear classifier, and is trained on the labelled rows alone. "
    "Without diffusion that is all. Diff-ResNet diffuses the hidden features, COIN the probabilities; both train "
    f"through all {NUM_STEPS} steps. LabelSpreading diffuses the labels themselves and learns nothing."
)
_CORRECTED_TEXT = (
    "One label a class, the same draw for both: pictures that the network takes for something else, and COIN reads. "
    "Below each picture its class, and in brackets what it was taken for."
)


# Learning ----------------------------------------------------------------------------------------------------------


def draw_labels(classes: Tensor, count: int, seed: int) -> Tensor:
    """Indices of ``count`` rows of each class."""
    random = np.random.default_rng(seed)
    rows = [random.choice(np.flatnonzero(classes.numpy() == c), count, replace=False) for c in range(10)]
    return torch.from_numpy(np.concatenate(rows))


def fit(digits: Digits, method: str, seen: Tensor, epochs: int) -> Fit:
    """Learn from the rows ``seen``, and predict all."""
    began = time.perf_counter()
    if method == "scikit-learn LabelSpreading":
        predicted = _label_spreading(digits, seen)
    else:
        torch.manual_seed(0)
        num_steps = 0 if method == "no diffusion" else NUM_STEPS
        if method == "COIN":
            coin = COIN(64, 10, STEP, num_steps, hidden=64)
            scores, parameters = coin.log_prob, coin.parameters()
        else:
            net = DiffResNet(64, 10, STEP, num_steps, residual="two_layer")
            scores, parameters = net.forward, net.parameters()
        optimiser = torch.optim.Adam(parameters, lr=0.01)
        for _ in range(epochs):
            optimiser.zero_grad()
            cross_entropy(scores(digits.x, digits.graph)[seen], digits.classes[seen]).backward()
            optimiser.step()
        with torch.no_grad():
            predicted = scores(digits.x, digits.graph).argmax(1)
    seconds = time.perf_counter() - began
    unseen = torch.ones(len(predicted), dtype=torch.bool).index_fill(0, seen, False)
    accuracy = float((predicted == digits.classes)[unseen].double().mean())
    return Fit(predicted, accuracy, seconds)


def _label_spreading(digits: Digits, seen: Tensor) -> Tensor:
    from sklearn.semi_supervised import LabelSpreading

    known = torch.full_like(digits.classes, -1)
    known[seen] = digits.classes[seen]
    model = LabelSpreading(kernel="knn", n_neighbors=10, alpha=0.8, max_iter=200)
    model.fit(digits.x.numpy(), known.numpy())
    return torch.from_numpy(model.transduction_)


def separation(points: Tensor, classes: Tensor) -> float:
    """Mean squared distance between classes over that within them."""
    means = torch.stack([points[classes == c].mean(0) for c in range(10)])
    within = (points - means[classes]).square().sum(1).mean()
    return float((means - points.mean(0)).square().sum(1).mean() / within)


def _checks(digits: Digits, diffused: Tensor, means: dict[tuple[str, int], float]) -> tuple[Check, ...]:
    report = stability(digits.graph, STEP)
    gains = [means["Diff-ResNet", count] - means["no diffusion", count] for count in LABELS]
    coin, spreading = (np.mean([means[method, count] for count in LABELS]) for method in METHODS[2:])
    before, after = separation(digits.x, digits.classes), separation(diffused, digits.classes)
    return (
        Check(
            "The step is stable",
            bool(report.energy_stable),
            f"step {STEP:g} times the largest eigenvalue {report.lambda_max:.3f} is below 2",
        ),
        Check(
            "Diffusion draws the classes together",
            after > 3 * before,
            f"distance between classes over that within: {before:.2f} before, {after:.2f} after",
        ),
        Check(
            "Diffusion inside the network helps",
            min(gains) > 0.03,
            f"by {' / '.join(f'{100 * gain:.1f}' for gain in gains)} points with {_counts()} labels a class",
        ),
        Check(
            "COIN is ahead of LabelSpreading",
            bool(coin > spreading),
            f"{100 * coin:.1f} % and {100 * spreading:.1f} %, mean over {_counts()} labels a class",
        ),
    )


def _counts() -> str:
    return ", ".join(map(str, LABELS[:-1])) + f" and {LABELS[-1]}"


def _table(
    fits: dict[tuple[str, int], list[Fit]], means: dict[tuple[str, int], float], rows: int, draws: int, epochs: int
) -> Table:
    seconds = {m: np.median([each.seconds for count in LABELS for each in fits[m, count]]) for m in METHODS}
    return Table(
        caption=f"Accuracy on the unlabelled of {rows:,} digits, percent",
        header=("Method", *(f"{count} label{'s' * (count > 1)}" for count in LABELS), "Seconds"),
        rows=tuple(
            (method, *(f"{100 * means[method, count]:.1f}" for count in LABELS), f"{seconds[method]:.2f}")
            for method in METHODS
        ),
        numeric=frozenset(range(1, 2 + len(LABELS))),
        note=f"Labels a class; mean of {draws} draws, the same for all methods. Networks: a residual block of 64 "
        f"hidden units, {epochs} steps of Adam; diffusion: step {STEP:g}, {NUM_STEPS} steps. Seconds: one fit, "
        f"{torch.get_num_threads()} CPU thread(s).",
    )


# Drawing -----------------------------------------------------------------------------------------------------------


def _principal_axes(x: Tensor) -> Tensor:
    """The two directions (d, 2) along which the rows of x differ most."""
    from sklearn.decomposition import PCA

    return torch.from_numpy(PCA(2, svd_solver="full").fit(x.double().numpy()).components_.T).to(x)


def _graph_picture(folder: Path, name: str, points: Tensor, digits: Digits, seen: Tensor, caption: str) -> Picture:
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection

    at = points.numpy()
    rows, columns = digits.graph.rows.numpy(), digits.graph.col.numpy()
    once = rows < columns
    edges = np.stack([at[rows[once]], at[columns[once]]], axis=1)
    colours = colormaps["tab10"](digits.classes.numpy())

    def draw(ax: Axes, ink: Ink) -> None:
        ax.add_collection(LineCollection(list(edges), colors=ink.ink, linewidths=0.25, alpha=0.18, zorder=0))
        ax.scatter(at[:, 0], at[:, 1], s=5, c=colours, linewidths=0)
        ax.scatter(at[seen, 0], at[seen, 1], s=60, c=colours[seen], edgecolors=ink.ink, linewidths=1.3, zorder=3)
        for row in seen.tolist():
            text = str(int(digits.classes[row]))
            ax.annotate(text, at[row], xytext=(6, 5), textcoords="offset points", fontsize=9, weight="bold", zorder=4)
        ax.set_axis_off()

    alt = {
        "before": "Scatter plot: points in ten colours overlap in one cloud, joined by thin lines.",
        "after": "Scatter plot on the same axes: most colours have drawn together into small separate clusters.",
    }[name]
    return draw_picture(folder, name, 4.2, 4.2, alt, caption, draw)


def _chart(folder: Path, fits: dict[tuple[str, int], list[Fit]]) -> Picture:
    """Accuracies of every draw as dots, their means as lines, one group for each number of labels."""

    def draw(ax: Axes, ink: Ink) -> None:
        for place, method in enumerate(METHODS):
            shift = 0.16 * (place - 1.5)
            for group, count in enumerate(LABELS):
                accuracies = [100 * each.accuracy for each in fits[method, count]]
                at = group + shift
                mean = float(np.mean(accuracies))
                colour = ink.colours[place]
                ax.plot([at] * len(accuracies), accuracies, "o", color=colour, markersize=3.5, alpha=0.55, mew=0)
                label = method if group == 0 else None
                ax.plot([at - 0.06, at + 0.06], [mean, mean], color=colour, linewidth=3, label=label)
        ax.set_xticks(range(len(LABELS)), [f"{count} label{'s' * (count > 1)} a class" for count in LABELS])
        ax.set_ylabel("accuracy on the unlabelled, %")
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(axis="x", length=0)
        ax.legend(frameon=False, fontsize=8, loc="lower right")

    means = "; ".join(
        f"{count}: " + ", ".join(f"{m} {100 * np.mean([f.accuracy for f in fits[m, count]]):.0f}" for m in METHODS)
        for count in LABELS
    )
    return draw_picture(
        folder, "accuracy", 6.4, 3.6, f"Dots: accuracies in percent by the number of labels a class. {means}.",
        "Accuracy of each draw of the labels (dots) and the mean (bars).", draw,
    )  # fmt: skip


def _corrected(folder: Path, digits: Digits, without: Tensor, with_diffusion: Tensor, shown: int = 12) -> Picture:
    """Pictures that only diffusion gets right, evenly spread over the classes."""
    better = torch.nonzero((with_diffusion == digits.classes) & (without != digits.classes)).flatten()
    better = better[torch.argsort(digits.classes[better], stable=True)]
    rows = better[torch.linspace(0, len(better) - 1, min(shown, len(better))).round().long()].tolist()

    def draw(ax: Axes, ink: Ink) -> None:
        for place, row in enumerate(rows):
            left = 1.15 * place
            picture = 1 - digits.x[row].view(8, 8).numpy()
            ax.imshow(picture, cmap="gray", vmin=0, vmax=1, extent=(left, left + 1, 0, 1), interpolation="nearest")
            words = f"{int(digits.classes[row])} ({int(without[row])})"
            ax.text(left + 0.5, -0.12, words, ha="center", va="top", fontsize=9)
        ax.set_xlim(-0.05, 1.15 * len(rows) - 0.1)
        ax.set_ylim(-0.5, 1.05)
        ax.set_axis_off()

    pairs = ", ".join(f"{int(digits.classes[row])} taken for {int(without[row])}" for row in rows)
    return draw_picture(
        folder, "corrected", 8.0, 1.1, f"A row of handwritten digits in coarse pixels: {pairs}.",
        f"{len(rows)} of the {len(better):,} pictures that COIN corrects.", draw,
    )  # fmt: skip
