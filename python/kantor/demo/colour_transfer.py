"""Station: the colours of one photograph on another, and the race of the solvers behind it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from kantor._colour_transfer import recolour, sample_colours
from kantor.demo.page import Check, Finding, Gallery, Picture, Section, StationReport, Table, times
from kantor.demo.pictures import Album, load_photographs
from kantor.transport import TransportResult, solve, solve_sample

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kantor.demo.pictures import Image

    Array = NDArray[np.float64]

TITLE = "The colours of one photograph on another"
TOL = 1e-9
BLUR = 1e-2  # regularisation of the pictures, relative to the range of the cost
RACE = 1e-3  # and of the race, relative to the largest cost
METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Kantor newton", {"method": "newton"}),
    ("Kantor sns", {"method": "sns", "density": 0.2}),
    ("Kantor sinkhorn", {"method": "sinkhorn", "max_iter": 5000}),
)
_BUDGETS = (10, 30, 100, 300, 1000, 3000)  # iterations of the other programs

_LEAD = (
    "A photograph is a cloud of colours. The cheapest way to move the cloud of one onto that of another, optimal "
    "transport, says which colour becomes which: the light parts of one take the light colours of the other, and "
    "neighbouring colours stay neighbours. A little entropy makes the map smooth, and the problem one that Newton's "
    "method solves in a few dozen steps."
)
_CREDITS = (
    "Pavilion above a lake, <code>china.jpg</code>: danielbuechele, CC BY 2.0, modified here (scikit-learn).",
    "Coffee on a wooden table: Rachel Michetti, courtesy of Pikolo Espresso Bar, CC0 (scikit-image).",
    "Falcon 9 with DSCOVR before its launch: SpaceX, public domain (scikit-image).",
    "Method: X. Tang, M. Shavlovsky, H. Rahmanian, E. Tardini, K. K. Thekumparampil, T. Xiao, L. Ying, "
    "<cite>Accelerating Sinkhorn Algorithm with Sparse Newton Iterations</cite>, ICLR 2024.",
)


@dataclass(frozen=True)
class Run:
    """One solver in the race: marginal errors (L1) after so many seconds, and its row of the table."""

    name: str
    seconds: Array
    errors: Array
    row: tuple[str, ...]
    history: dict[str, NDArray[Any]] | None = None  # of Kantor's


def run(folder: Path, size: Literal["small", "full"] = "full") -> StationReport:
    """Run the station: pictures into ``folder / "colour_transfer"``, and the report for the page and the terminal.

    Parameters
    ----------
    folder : Path
        The demo's folder.
    size : {"small", "full"}
        2000 colours of each photograph and 1000 in the race; or photographs of a third of the width, 500 and 250.

    Raises
    ------
    ImportError
        scikit-image, scikit-learn or matplotlib is missing.
    """
    started = time.perf_counter()
    full = size == "full"
    photographs = load_photographs(1 if full else 3)
    random = np.random.default_rng(0)
    album = Album(folder, "colour_transfer")
    pictures, transfer_checks = _transfer(album, photographs, 2000 if full else 500, random)
    runs, race_checks, count = _race(photographs, 1000 if full else 250, random, patience=4.0 if full else 0.5)
    table = Table(
        caption=f"{count:,} colours against {count:,}, regularisation {RACE:g} of the largest cost",
        header=("Program", "Status", "Steps", "Sweeps", "Seconds", "Marginal error"),
        rows=tuple(run.row for run in runs),
        numeric=frozenset(range(2, 6)),
        note=f"To marginals of an L1 error of {TOL:g}, float64, {torch.get_num_threads()} CPU thread(s). A sweep is a "
        "pass over all pairs of colours. POT and regot, where installed, run for 10, 30, 100, ... iterations, each "
        "time from the start, until they are done or take long; the error is that of the plan they return. Kantor's "
        "sns keeps a fifth of the entries (density=0.2); with the share of the publication it does not converge here.",
    )
    return StationReport(
        name="colour_transfer",
        title=TITLE,
        lead=_LEAD,
        sections=(
            Section("Morning and night", pictures),
            Section("How the solvers get there", (_RACE_TEXT, Gallery((_curves(album, runs),)), table)),
        ),
        table=table,
        checks=(*transfer_checks, *race_checks),
        seconds=time.perf_counter() - started,
        credits=_CREDITS,
        finding=_finding(runs, count),
    )


# --- pictures ---------------------------------------------------------------------------------------------------------


def _transfer(
    album: Album, photographs: dict[str, Image], count: int, random: np.random.Generator
) -> tuple[tuple[str | Gallery, ...], tuple[Check, ...]]:
    """The lake in the colours of the coffee and of the launch."""
    lake = photographs["lake"]
    X = sample_colours(lake, count, random)
    originals = [album.add("lake", lake, "The lake.", "A pavilion above a lake under a pale sky, with green trees.")]
    recoloured = []
    converged, shift = True, 0.0
    for name, original, alt, caption, new_alt in (
        ("coffee", "The coffee.", "A white cup on a red saucer on a reddish brown wooden table.",
         "The lake in the colours of the coffee.",
         "The same pavilion in red and brown, under an orange sky that grows pale to the right."),
        ("launch", "The launch.", "A rocket on its pad at dusk under a dark blue sky.",
         "The lake in the colours of the launch.",
         "The same pavilion by night: blue sky and water, with yellow light on the roofs and on streaks of cloud."),
    ):  # fmt: skip
        Y = sample_colours(photographs[name], count, random)
        result = solve_sample(X, Y, reg=BLUR * _range(X, Y), tol=TOL, grad="none")
        converged &= result.converged
        shift = max(shift, float((result.barycentric_map().mean(0) - Y.mean(0)).abs().max()))
        originals.append(album.add(name, photographs[name], original, alt))
        recoloured.append(album.add(f"lake-{name}", recolour(lake, result, Y), caption, new_alt))
    text = (
        f"{len(X):,} pixels of each photograph are drawn; the cost of moving a colour is the squared distance in red, "
        f"green and blue, and the regularisation {BLUR:g} of its range.",
        Gallery(tuple(originals)),
        "The plan spreads each colour over several. Their mean, the barycentric map, is where it goes; the same "
        "formula holds for the colours that were not drawn, so that every pixel can be mapped.",
        Gallery(tuple(recoloured)),
    )
    checks = (
        Check("Both transfers converged", converged, f"to marginals of an L1 error of {TOL:g}"),
        Check(
            "The mean colour becomes that of the target",
            shift < 1e-6,
            f"off by {255 * shift:.1e} of 255 levels among the colours drawn",
        ),
    )
    return text, checks


def _range(X: Tensor, Y: Tensor) -> float:
    """Largest squared distance that the boxes around the colours allow."""
    sides = torch.maximum(X.amax(0), Y.amax(0)) - torch.minimum(X.amin(0), Y.amin(0))
    return float(sides.square().sum())


# --- race -------------------------------------------------------------------------------------------------------------

_RACE_TEXT = (
    "Sinkhorn's iteration scales rows and columns of the plan in turn, and each round gains the same share of a digit, "
    "the less the smaller the regularisation. Newton's method solves for both at once. Few pairs of colours matter, so "
    "its matrix is sparse; the regularisation is lowered step by step (a mark in the plot), and each plan is a good "
    "start for the next."
)


def _race(
    photographs: dict[str, Image], count: int, random: np.random.Generator, *, patience: float
) -> tuple[list[Run], tuple[Check, ...], int]:
    X, Y = (sample_colours(photographs[name], count, random) for name in ("lake", "coffee"))
    C = torch.cdist(X, Y, compute_mode="donot_use_mm_for_euclid_dist").square()
    C = C / C.max()
    results = []
    solve(C[:50, :50], reg=RACE)  # the first parallel region starts the threads
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the table says who did not converge
        for name, options in METHODS:
            results.append((name, solve(C, reg=RACE, tol=TOL, grad="none", **options)))
    runs = [_own(name, result) for name, result in results]
    runs += [_other(name, solver, C, patience) for name, solver in _others()]
    values = [float(result.value) for _, result in results if result.converged]
    gap = (max(values) - min(values)) / abs(values[0]) if values else np.inf
    newton = results[0][1]
    checks = (
        Check(
            "Newton's method converged",
            newton.converged,
            f"{newton.n_newton} Newton steps, {newton.n_sweeps} sweeps, marginal error {newton.marginal_error:.1e}",
        ),
        Check(
            "Those that converged agree",
            len(values) >= 2 and gap < 1e-8,
            f"{len(values)} of Kantor's methods, values within {gap:.1e} of each other",
        ),
    )
    return runs, checks, count


def _finding(runs: list[Run], count: int) -> Finding:
    """The first run is that of Kantor's default; the others of Kantor's stand in where nothing else is installed."""
    others = [run for run in runs if run.history is None] or runs[1:]
    took = runs[0].seconds[-1]
    said = [
        f"{run.name} takes {times(run.seconds[-1] / took)} times as long as {runs[0].name}"
        if run.errors[-1] <= TOL
        else f"{run.name} is at {run.errors[-1]:.0e} after {times(run.seconds[-1] / took)} times as long"
        for run in others
    ]
    return Finding(
        f"{count:,} colours onto {count:,} with little entropy, marginals to {TOL:g}.",
        ", ".join(run.name for run in others) + ".",
        "; ".join(said) + ".",
    )


def _own(name: str, result: TransportResult) -> Run:
    history = result.history
    row = (
        name,
        result.status.value.replace("_", " "),
        f"{result.n_iter:,}",
        f"{result.n_sweeps:,}",
        f"{result.seconds:.3f}",
        f"{result.marginal_error:.1e}",
    )
    return Run(name, history["seconds"], history["marginal_error"], row, history)


Solver = Callable[["Array", "Array", int], "Array"]  # (cost, weights of both sides, iterations) -> plan


def _others() -> list[tuple[str, Solver]]:
    """Other programs that are installed, each with its fastest method that survives this regularisation."""
    found: list[tuple[str, Solver]] = []
    if find_spec("ot") is not None:
        found.append(("POT sinkhorn", _pot))
    if find_spec("regot") is not None:
        found.append(("regot sinkhorn_ssns", _regot))
    return found


def _pot(C: Array, weights: Array, iterations: int) -> Array:
    with redirect_stdout(StringIO()):  # what it imports may greet the world
        import ot

    plan = ot.sinkhorn(weights, weights, C, RACE, numItermax=iterations, stopThr=_norm_tol(C), warn=False)
    return np.asarray(plan)


def _regot(C: Array, weights: Array, iterations: int) -> Array:
    import regot

    result = regot.sinkhorn_ssns(np.asfortranarray(C), weights, weights, RACE, tol=_norm_tol(C), max_iter=iterations)
    return np.asarray(result.plan)


def _norm_tol(C: Array) -> float:
    """Euclidean norm of an error of the marginals that guarantees an L1 norm of TOL."""
    return TOL / float(np.sqrt(len(C)))


def _other(name: str, solver: Solver, cost: Tensor, patience: float) -> Run:
    """Errors and times of runs with ever more iterations, until one is good enough or takes long."""
    C = cost.numpy()
    weights = np.full(len(C), 1.0 / len(C))
    solver(C[:50, :50], np.full(50, 1 / 50), 10)  # imports, threads
    seconds, errors = [], []
    for iterations in _BUDGETS:
        best = np.inf
        for _ in range(2):  # the better of two where they are short
            begun = time.perf_counter()
            plan = solver(C, weights, iterations)
            best = min(best, time.perf_counter() - begun)
            if best > 0.5:
                break
        seconds.append(best)
        errors.append(float(np.abs(plan.sum(1) - weights).sum() + np.abs(plan.sum(0) - weights).sum()))
        if not errors[-1] > TOL or seconds[-1] > patience:
            break
    status = "converged" if errors[-1] <= TOL else "stopped"
    row = (name, status, f"up to {iterations:,}", "", f"{seconds[-1]:.3f}", f"{errors[-1]:.1e}")
    return Run(name, np.array(seconds), np.array(errors), row)


def _curves(album: Album, runs: list[Run]) -> Picture:
    """Marginal error against seconds, for light and dark pages."""
    import matplotlib

    from kantor.plotting import new_axes, plot_transport, save_figure

    for version, ink, ground, colours in (
        ("light", "#1d1f21", "#fdfcfa", ("#0b5c8a", "#b3541e", "#23683a", "#8a5a9a", "#6b7075")),
        ("dark", "#e6e4df", "#15171a", ("#7cc0ea", "#f0a56b", "#7fcf97", "#cf9fe0", "#9aa0a6")),
    ):
        style: dict[Any, Any] = {"figure.facecolor": ground, "axes.facecolor": ground}
        style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink)
        with matplotlib.rc_context(style):
            ax = new_axes(5.4, 3.4)
            for run, colour in zip(runs, colours, strict=False):
                if run.history is not None:
                    tolerance = TOL if run is runs[0] else None
                    plot_transport(run.history, ax=ax, tolerance=tolerance, color=colour, label=None)
                    ax.plot([], [], color=colour, label=run.name)
                else:
                    ax.plot(run.seconds, run.errors, ".--", color=colour, linewidth=1.2, label=run.name)
            ax.set_xscale("log")
            ax.set_ylabel("marginal error (L1)")
            ax.legend(frameon=False, fontsize="small")
            save_figure(ax, album.folder / f"race-{version}.png")
    light, dark = (f"{album.folder.name}/race-{version}.png" for version in ("light", "dark"))
    ends = ", ".join(f"{run.name} at {run.errors[-1]:.0e} after {run.seconds[-1]:.2g} s" for run in runs)
    return Picture(
        light,
        f"Line plot, marginal error against seconds, both on logarithmic axes; {ends}.",
        "L1 error of the marginals against time. Marks: the regularisation is lowered.",
        1080,
        680,
        dark,
    )
