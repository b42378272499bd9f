"""Station: a photograph from the squares of random projections, by minimisers that must leave a maximum first."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from kantor.demo.page import Check, Finding, Gallery, Picture, Section, StationReport, Table, times
from kantor.demo.pictures import Album, load_photographs, shrink
from kantor.optim import OptimizeResult, minimize

if TYPE_CHECKING:
    from kantor.demo.pictures import Image

TITLE = "A picture from intensities alone, and who leaves a saddle"
TOL = 1e-6
METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Kantor arncg", {"method": "arncg"}),
    ("SciPy trust-krylov", {"method": "trust-krylov"}),
    ("torch L-BFGS", {"method": "lbfgs", "max_iter": 3000}),
)

_LEAD = (
    "A detector counts photons: it records the square of a wave and loses its sign. Finding the picture behind such "
    "intensities is a smooth problem with a maximum at zero, saddles around it and two minima, the picture and its "
    "negative. Kantor's regularised Newton-CG needs products of the Hessian with vectors, notices negative curvature "
    "while it solves its linear systems, and walks along it."
)
_CREDITS = (
    "Chelsea the cat: Stefan van der Walt, CC0 (scikit-image).",
    "Method: Y. Zhou, J. Xu, B. Li, C. Bao, C. Ding, J. Zhu, <cite>A Regularized Newton Method for Nonconvex "
    "Optimization with Global and Local Complexity Guarantees</cite>, arXiv 2502.04799.",
)


@dataclass(frozen=True)
class Measurements:
    """Intensities of a picture: ``y = (A x)^2`` for m random projections of n pixels."""

    picture: Tensor  # (side, side), mean zero
    A: Tensor
    y: Tensor

    def fun(self, x: Tensor) -> Tensor:
        """Mean square of the misfit of the intensities, over four."""
        return ((self.A @ x) ** 2 - self.y).square().mean() / 4

    def error(self, x: Tensor) -> float:
        """Relative error, up to the sign that is lost."""
        truth = self.picture.reshape(-1)
        sign = 1.0 if float(truth @ x) >= 0 else -1.0
        return float((sign * x - truth).norm() / truth.norm())


def measure(photograph: Image, side: int, generator: torch.Generator) -> Measurements:
    """Intensities of the grey values of a photograph's middle, shrunk to side x side."""
    grey = photograph.mean(axis=2)
    scale = min(grey.shape) // side
    top, left = ((size - scale * side) // 2 for size in grey.shape)
    patch = photograph[top : top + scale * side, left : left + scale * side]
    small = torch.from_numpy(shrink(patch, scale).mean(axis=2).copy())
    picture = (small - small.mean()) / small.std()
    n = side * side
    A = torch.randn(6 * n, n, dtype=torch.float64, generator=generator) / side
    return Measurements(picture, A, (A @ picture.reshape(-1)) ** 2)


def _solve(m: Measurements, x0: Tensor, **options: Any) -> OptimizeResult:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the table says who did not converge
        return minimize(m.fun, x0, tol=TOL, max_hvp=5000, **options)


def _as_image(values: Tensor, pixels: int = 8) -> Image:
    """Grey values as an enlarged picture."""
    grey = np.clip(0.5 + values.numpy() / 5, 0, 1)
    return np.repeat(np.repeat(np.repeat(grey[..., None], 3, axis=2), pixels, axis=0), pixels, axis=1)


def _work(result: OptimizeResult) -> int:
    return result.n_grad + 2 * result.n_hvp


def run(folder: Path, size: Literal["small", "full"] = "full") -> StationReport:
    """Run the station: pictures into ``folder / "phase_retrieval"``, and the report for the page and the terminal.

    Parameters
    ----------
    folder : Path
        The demo's folder.
    size : {"small", "full"}
        The picture has 32 x 32 pixels, or 16 x 16.

    Raises
    ------
    ImportError
        scikit-image, scikit-learn, SciPy or matplotlib is missing.
    """
    started = time.perf_counter()
    side = 32 if size == "full" else 16
    generator = torch.Generator().manual_seed(0)
    m = measure(load_photographs()["cat"], side, generator)
    near_zero = 0.01 * torch.randn(side * side, dtype=torch.float64, generator=generator)
    results = [(name, _solve(m, near_zero, **options)) for name, options in METHODS]
    album = Album(folder, "phase_retrieval")
    best = results[0][1]
    sign = 1.0 if float(m.picture.reshape(-1) @ best.x) >= 0 else -1.0
    pictures = (
        album.add("truth", _as_image(m.picture), "The picture.", "Grey picture of a cat's face in coarse pixels."),
        album.add(
            "intensities",
            _as_image(2.5 * (m.y[: side * side].view(side, side) / m.y.max() * 2 - 1)),
            "A sixth of what is known: intensities.",
            "Grey noise, mostly dark, in which nothing can be recognised.",
        ),
        album.add(
            "found", _as_image(sign * best.x.view(side, side)), "What arncg found.", "The same picture of a cat's face."
        ),
    )
    table = _table(m, results, side)
    saddle_rows, left = _saddle(m)
    saddle = Table(
        caption="Started at zero, where the gradient vanishes",
        header=("Method", "Products", "Value at the end", "Left?"),
        rows=saddle_rows,
        numeric=frozenset({1, 2}),
        note="With a tolerance for curvature, arncg looks for a direction of negative curvature at a stationary point "
        "(capped CG from a random vector) before it calls it a minimum. Methods that look at the gradient alone "
        "report success on a maximum.",
    )
    checks = (
        Check(
            "The picture is found",
            best.converged and m.error(best.x) < 1e-4,
            f"relative error {m.error(best.x):.1e} up to its sign, {best.n_hvp} Hessian-vector products",
        ),
        Check("The maximum is left", left, "with curvature_tol=1e-3, from exactly zero"),
    )
    curves = _curves(album, [(name.split()[-1], result) for name, result in results])
    return StationReport(
        name="phase_retrieval",
        title=TITLE,
        lead=_LEAD,
        sections=(
            Section(
                "The picture behind the intensities",
                (
                    f"{side * side:,} unknown pixels, {6 * side * side:,} squared random projections. One function of "
                    "x, three methods through the same call of <code>minimize</code>; derivatives by automatic "
                    "differentiation.",
                    Gallery(pictures),
                    Gallery((curves,)),
                    table,
                ),
            ),
            Section("Who leaves a maximum", (saddle,)),
        ),
        table=table,
        checks=checks,
        seconds=time.perf_counter() - started,
        credits=_CREDITS,
        finding=Finding(
            f"{side * side:,} pixels from {6 * side * side:,} intensities: smooth, with saddles and a maximum at zero.",
            "SciPy's trust-krylov and torch's L-BFGS, through the same function.",
            f"{_others(results)}{'; of the three only Kantor leaves the maximum' if left else ''}.",
        ),
    )


def _table(m: Measurements, results: list[tuple[str, OptimizeResult]], side: int) -> Table:
    rows = tuple(
        (
            name,
            str(result.status),
            f"{result.n_fun:,}",
            f"{result.n_hvp:,}",
            f"{_work(result):,}",
            f"{result.seconds:.2f}",
            f"{m.error(result.x):.1e}",
        )
        for name, result in results
    )
    return Table(
        caption="From next to zero to the picture",
        header=("Method", "Status", "Values", "Products", "Work", "Seconds", "Error"),
        rows=rows,
        numeric=frozenset(range(2, 7)),
        note=f"To a gradient norm of {TOL:g}, float64, {torch.get_num_threads()} CPU thread(s). Work counts gradients, "
        "and two for a product of the Hessian with a vector. Errors are relative, up to the sign that intensities "
        "lose.",
    )


def _others(results: list[tuple[str, OptimizeResult]]) -> str:
    """What the others' work is in multiples of Kantor's, which comes first."""
    return ", ".join(
        f"{name} does {times(_work(result) / _work(results[0][1]))} times Kantor's work" for name, result in results[1:]
    )


def _saddle(m: Measurements) -> tuple[tuple[tuple[str, ...], ...], bool]:
    """Everyone from exactly zero; arncg also with the second-order check."""
    zero = torch.zeros(m.A.shape[1], dtype=torch.float64)
    height = m.fun(zero).item()
    runs = [(name, _solve(m, zero, **options)) for name, options in METHODS]
    aware = _solve(m, zero, curvature_tol=1e-3)
    runs.insert(0, ("Kantor arncg, curvature_tol", aware))
    rows = tuple(
        (name, f"{result.n_hvp:,}", f"{result.fun:.3g}", "yes" if result.fun < 0.999 * height else "no")
        for name, result in runs
    )
    return rows, aware.converged and aware.fun < 1e-3 * height


def _curves(album: Album, results: list[tuple[str, OptimizeResult]]) -> Picture:
    """Value and gradient norm against work, for light and dark pages."""
    import matplotlib
    from cycler import cycler  # comes with matplotlib

    from kantor.plotting import new_axes, plot_minimization, save_figure

    for version, ink, ground, colours in (
        ("light", "#1d1f21", "#fdfcfa", ("#0b5c8a", "#b3541e", "#6b7075")),
        ("dark", "#e6e4df", "#15171a", ("#7cc0ea", "#f0a56b", "#9aa0a6")),
    ):
        style: dict[Any, Any] = {"figure.facecolor": ground, "axes.facecolor": ground}
        style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink)
        style["axes.prop_cycle"] = cycler(color=colours)
        with matplotlib.rc_context(style):
            ax = new_axes(5.4, 3.4)
            for name, result in results:
                plot_minimization(result.history, ax=ax, label=name, tolerance=TOL if result is results[0][1] else None)
            save_figure(ax, album.folder / f"curves-{version}.png")
    light, dark = (f"{album.folder.name}/curves-{version}.png" for version in ("light", "dark"))
    ends = ", ".join(f"{name} after {_work(result):,}" for name, result in results)
    return Picture(
        light,
        f"Line plot, gradient norm and value on a logarithmic axis against gradient equivalents; {ends}.",
        "Gradient norm, and dashed the value, against work.",
        1080,
        680,
        dark,
    )
