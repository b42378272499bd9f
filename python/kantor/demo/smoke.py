"""Station: smoke around a moving ball, one pressure equation a step, and what it costs with every preconditioner.

The flow is in :mod:`kantor.demo.smoke_flow`; this module runs it, times the solvers on its equations, and draws it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from kantor.demo.page import Check, Finding, Gallery, Picture, Section, StationReport, Table
from kantor.demo.pictures import Album
from kantor.demo.smoke_flow import RADIUS, Flow
from kantor.linalg import Multigrid, PoissonGrid, cg, ic0

if TYPE_CHECKING:
    from kantor.demo.pictures import Image

TITLE = "Smoke around a moving ball, and a pressure equation for every step"
RTOL = 1e-6
KANTOR: tuple[tuple[str, Callable[[PoissonGrid], Any]], ...] = (
    ("Kantor cg, Multigrid", Multigrid),
    ("Kantor cg, ic0", ic0),
    ("Kantor cg", lambda _: None),
)

_LEAD = (
    "Smoke carries itself along, and must neither pile up nor thin out. A pressure sees to that: one sparse system a "
    "step, with one unknown a cell. The ball moves, so every step has another matrix, and whatever a solver prepares "
    "is good for one solve. Kantor's multigrid is prepared in a few passes over the grid, and the solve ends "
    "after about ten iterations."
)
_CREDITS = (
    "The smoke: made by this station.",
    "Method: J. Stam, <cite>Stable fluids</cite>, SIGGRAPH 1999, for the flow; A. McAdams, E. Sifakis, J. Teran, "
    "<cite>A parallel multigrid Poisson solver for fluids simulation on large grids</cite>, SCA 2010, for multigrid "
    "as a preconditioner of its pressure.",
)


# Measuring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One pressure equation solved by one program: the solution on the grid, and what it took."""

    p: Tensor
    residuals: np.ndarray[Any, np.dtype[np.float64]]
    setup: float
    solve: float

    @property
    def iterations(self) -> int:
        """Number of iterations."""
        return len(self.residuals) - 1


def _kantor(prepare: Callable[[PoissonGrid], Any]) -> Callable[[PoissonGrid, Tensor], Run]:
    def run(A: PoissonGrid, b: Tensor) -> Run:
        start = time.perf_counter()
        M = prepare(A)
        ready = time.perf_counter()
        result = cg(A, b, M=M, rtol=RTOL)
        return Run(result.x, result.history.residual_norms, ready - start, time.perf_counter() - ready)

    return run


def _pyamg(build: Callable[[Any], Any]) -> Callable[[PoissonGrid, Tensor], Run]:
    def run(A: PoissonGrid, b: Tensor) -> Run:
        matrix, right = A.to_csr().to_scipy(), A.compress(b).numpy()
        matrix.indptr, matrix.indices = matrix.indptr.astype(np.int32), matrix.indices.astype(np.int32)
        start = time.perf_counter()
        hierarchy = build(matrix)
        ready = time.perf_counter()
        residuals: list[float] = []
        x = hierarchy.solve(right, tol=RTOL, accel="cg", residuals=residuals)
        seconds = time.perf_counter() - ready
        return Run(A.expand(torch.from_numpy(x)), np.array(residuals), ready - start, seconds)

    return run


def _others() -> list[tuple[str, Callable[[PoissonGrid, Tensor], Run]]]:
    """The same with pyamg, where it is installed."""
    if find_spec("pyamg") is None:
        return []
    import pyamg

    return [
        ("pyamg cg, smoothed aggregation", _pyamg(pyamg.smoothed_aggregation_solver)),
        ("pyamg cg, Ruge-Stüben", _pyamg(pyamg.ruge_stuben_solver)),
    ]


@dataclass(frozen=True)
class Film:
    """What a run of the flow left: pictures, the runs of every program, and how the steps went."""

    frames: list[Image]
    runs: dict[str, list[Run]]
    iterations: list[int]  # of the solves that the flow itself used
    divergence: float  # largest that a step left, relative to what it found
    disagreement: float  # largest difference of two programs' pressures, relative to the largest pressure
    unknowns: int


def make_film(shape: tuple[int, int], steps: int, compared: int) -> Film:
    """Run the flow; in ``compared`` of its steps, evenly spread, every program solves the step's equation."""
    programs = [*((name, _kantor(prepare)) for name, prepare in KANTOR), *_others()]
    runs: dict[str, list[Run]] = {name: [] for name, _ in programs}
    frames, iterations = [], []
    divergence = disagreement = 0.0
    unknowns = 0
    flow = Flow(shape, steps)
    for step in range(steps):
        b = flow.move()
        A = PoissonGrid(flow.flags)
        unknowns = max(unknowns, A.num_unknowns)
        own = programs[0][1](A, b)
        iterations.append(own.iterations)
        if (step + 1) * compared // steps > step * compared // steps:
            for name, program in programs:
                run = program(A, b)
                runs[name].append(run)
                disagreement = max(disagreement, float((run.p - own.p).abs().max() / own.p.abs().max()))
        flow.project(own.p)
        divergence = max(divergence, float(flow.divergence().abs().max() / b.abs().max()))
        frames.append(draw(flow))
    return Film(frames, runs, iterations, divergence, disagreement, unknowns)


# Drawing -----------------------------------------------------------------------------------------------------------


def draw(flow: Flow, pixels: int = 3) -> Image:
    """Smoke and ball, ``pixels`` a cell, right side up."""
    ny, nx = flow.shape
    enlarged = torch.nn.functional.interpolate(flow.smoke[None, None], scale_factor=pixels, mode="bilinear")[0, 0]
    smoke = (1 - torch.exp(-1.8 * enlarged)).clamp(0, 1).numpy()[..., None]
    y, x = np.mgrid[: ny * pixels, : nx * pixels] / pixels
    night = np.linspace(0.16, 0.05, ny * pixels)[:, None, None] * np.array([0.75, 1.0, 1.45])
    image = night + smoke * (np.array([0.96, 0.92, 0.86]) - night)
    above, right = y - flow.centre[0], x - flow.centre[1]
    radius = RADIUS * min(ny, nx)
    inside = np.clip(pixels * (radius - np.hypot(above, right)), 0, 1)[..., None]
    light = np.clip(0.75 + 0.45 * (above - right) / radius / np.sqrt(2), 0.3, 1.1)[..., None]
    return np.asarray(np.clip(image + inside * (light * np.array([0.88, 0.45, 0.2]) - image), 0, 1)[::-1])


def _curves(album: Album, runs: dict[str, Run]) -> Picture:
    """Residuals of one step's solve against seconds, preparation included, for light and dark pages."""
    import matplotlib

    from kantor.plotting import new_axes, save_figure

    for version, ink, ground, colours in (
        ("light", "#1d1f21", "#fdfcfa", ("#0b5c8a", "#b3541e", "#6b7075", "#7a3b8f", "#3f7a3a")),
        ("dark", "#e6e4df", "#15171a", ("#7cc0ea", "#f0a56b", "#9aa0a6", "#cf9be0", "#95cf8e")),
    ):
        style: dict[Any, Any] = {"figure.facecolor": ground, "axes.facecolor": ground}
        style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink)
        with matplotlib.rc_context(style):
            ax = new_axes(5.4, 3.4)
            for (name, run), colour in zip(runs.items(), colours, strict=False):
                milliseconds = 1e3 * (run.setup + run.solve * np.linspace(0, 1, len(run.residuals)))
                ax.plot(milliseconds, run.residuals / run.residuals[0], color=colour, label=name)
            ax.set_xscale("log")
            ax.set_yscale("log")
            ax.set_xlim(left=0.1)
            ax.set_xlabel("milliseconds, preparation included")
            ax.set_ylabel("relative residual")
            ax.legend(frameon=False, fontsize=8)
            save_figure(ax, album.folder / f"curves-{version}.png")
    light, dark = (f"{album.folder.name}/curves-{version}.png" for version in ("light", "dark"))
    ends = ", ".join(f"{name} after {run.iterations:,} iterations" for name, run in runs.items())
    return Picture(
        light,
        f"Line plot, relative residual against milliseconds, both logarithmic; the curves end: {ends}.",
        "One step's pressure equation: relative residual against time. A curve begins where its preparation ends.",
        1080,
        680,
        dark,
    )


# The story ---------------------------------------------------------------------------------------------------------


def run(folder: Path, size: Literal["small", "full"] = "full") -> StationReport:
    """Run the station: pictures into ``folder / "smoke"``, and the report for the page and the terminal.

    Parameters
    ----------
    folder : Path
        The demo's folder.
    size : {"small", "full"}
        160 x 112 cells and 96 steps, or 48 x 32 and 18.

    Raises
    ------
    ImportError
        Pillow or matplotlib is missing.
    """
    started = time.perf_counter()
    shape, steps, compared = ((160, 112), 96, 8) if size == "full" else ((48, 32), 18, 3)
    film = make_film(shape, steps, compared)
    album = Album(folder, "smoke")
    shown = [steps * (k + 1) // 6 for k in range(6)]
    strip = tuple(
        album.add(
            f"step-{step}",
            film.frames[step - 1],
            f"Step {step}.",
            f"Step {step} of {steps}: pale smoke rises in a dark box, an orange ball goes round in it.",
        )
        for step in shown
    )
    moving = album.animate(
        "moving",
        film.frames,
        4.8,
        f"All {steps} steps, played once.",
        "Animation: a plume of smoke rises from the floor of a dark box and curls around an orange ball that goes "
        "round once.",
    )
    middle = {name: runs[len(runs) // 2] for name, runs in film.runs.items()}
    table = _table(film)
    checks = (
        Check(
            "No step leaves a divergence",
            film.divergence < 1e2 * RTOL,
            f"at most {film.divergence:.1e} of what it was",
        ),
        Check(
            "All programs find the same pressure",
            film.disagreement < 1e3 * RTOL,
            f"largest difference {film.disagreement:.1e} of the largest pressure",
        ),
        Check(
            "Multigrid needs few iterations wherever the ball is",
            max(film.iterations) <= 15,
            f"{min(film.iterations)} to {max(film.iterations)} in {steps} steps",
        ),
    )
    flow = Section(
        "The flow",
        (
            f"{shape[0]} x {shape[1]} cells between walls, open above. Every step carries the velocities and the smoke "
            "along, lets hot smoke rise, moves the ball, and then solves for the pressure <i>p</i> whose gradient "
            "takes the divergence away:",
            '<span class="equation">&sum; (<i>p</i><sub>i</sub> &minus; <i>p</i><sub>j</sub>) = &minus;(flow out of '
            "cell <i>i</i>)</span>",
            "The sum runs over the neighbours that are not solid; where the neighbour is air its pressure is zero.",
            Gallery((moving,)),
            Gallery(strip),
        ),
    )
    cost = Section("What a step costs", (Gallery((_curves(album, middle),)), table))
    return StationReport(
        name="smoke",
        title=TITLE,
        lead=_LEAD,
        sections=(flow, cost),
        table=table,
        checks=checks,
        seconds=time.perf_counter() - started,
        credits=_CREDITS,
        finding=_finding(film, table),
    )


def _finding(film: Film, table: Table) -> Finding:
    ratios = [f"{row[0]} {row[-1]}" for row in table.rows[1:]]
    return Finding(
        f"{film.unknowns:,} unknowns a step, another matrix in every step.",
        ", ".join(row[0] for row in table.rows[1:]) + ".",
        f"A step in multiples of multigrid's time: {', '.join(ratios)}.",
    )


def _table(film: Film) -> Table:
    best = {name: min(runs, key=lambda run: run.setup + run.solve) for name, runs in film.runs.items()}
    least = best[KANTOR[0][0]].setup + best[KANTOR[0][0]].solve
    rows = tuple(
        (
            name,
            f"{median(each.iterations for each in film.runs[name]):g}",
            f"{1e3 * run.setup:.2f}",
            f"{1e3 * run.solve:.2f}",
            f"{1e3 * (run.setup + run.solve):.2f}",
            f"{(run.setup + run.solve) / least:.1f}",
        )
        for name, run in best.items()
    )
    count = len(next(iter(film.runs.values())))
    return Table(
        caption=f"The pressure equation of a step, {film.unknowns:,} unknowns",
        header=("Method", "Iterations", "Preparing, ms", "Solving, ms", "A step, ms", "Ratio"),
        rows=rows,
        numeric=frozenset(range(1, 6)),
        note=f"The fastest of {count} steps and the median of their iterations; relative residual {RTOL:g}, float64, "
        f"{torch.get_num_threads()} CPU thread(s). pyamg's matrix is assembled outside the times. The ratio is to the "
        "first row.",
    )
