"""Station: filling holes in photographs and pasting between them by solving the Poisson equation.

The equations are in :mod:`kantor.demo.poisson_system`; this module poses them on real photographs, solves each one
with Kantor and with SciPy, and tells the story.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from kantor.demo.page import Check, Finding, Gallery, Picture, Section, StationReport, Table, between
from kantor.demo.pictures import Album, damage_mask, draw_mask, load_photographs, place, tint
from kantor.demo.poisson_system import insert, region_system, right_hand_side, tileable
from kantor.linalg import Stencil, cg, ic0

if TYPE_CHECKING:
    from kantor.demo.pictures import Image
    from kantor.linalg import CSR, LinearOperator

TITLE = "Repairing and joining photographs with a linear solver"
RTOL = 1e-6  # the error that it leaves is checked to be below half a grey level


# Measuring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """One system solved by Kantor and by SciPy: its row of the table, and the largest difference of a pixel."""

    row: tuple[str, ...]
    difference: float
    converged: bool
    ratio: float  # of SciPy's time to Kantor's


def solve_and_compare(name: str, A: LinearOperator, b: torch.Tensor) -> tuple[torch.Tensor, Comparison]:
    """Solve all channels at once with Kantor and one after the other with SciPy, both to the same tolerance.

    Returns
    -------
    tuple
        Kantor's solution in b's shape, and the comparison. Times are the best of up to three runs; those with ic0
        include the factorisation.
    """
    import scipy.sparse.linalg
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    stored = A.to_csr()
    matrix = stored.to_scipy()
    columns = b.reshape(len(b), -1).numpy()
    counts = np.zeros(len(b), dtype=np.int64)

    def scipy_cg() -> tuple[Image, bool]:
        counts[:] = 0
        solutions, converged = [], True
        for channel, column in enumerate(columns):

            def count(_: Any, channel: int = channel) -> None:
                counts[channel] += 1

            x, status = scipy.sparse.linalg.cg(
                matrix, column, rtol=RTOL, atol=0.0, maxiter=10 * len(column), callback=count
            )
            solutions.append(x)
            converged = converged and status == 0
        return np.stack(solutions), converged

    plain, seconds = _best_of_three(lambda: cg(A, b, rtol=RTOL))
    preconditioned, ic0_seconds = _best_of_three(lambda: cg(A, b, M=ic0(stored), rtol=RTOL))
    # Vectors this short gain nothing from several threads of BLAS, which wait for each other at length where other
    # programs run; SciPy's products have one thread anyway.
    with threadpool_limits(1, "blas"):
        (expected, scipy_converged), scipy_seconds = _best_of_three(scipy_cg)
    solutions = (result.x.reshape(columns.shape).numpy() for result in (plain, preconditioned))
    row = (
        name,
        f"{columns.shape[1]:,}",
        f"{counts.max():,} / {scipy_seconds:.3g} s",
        f"{plain.iterations:,} / {seconds:.3g} s",
        f"{preconditioned.iterations:,} / {ic0_seconds:.3g} s",
        f"{scipy_seconds / seconds:.1f}",
    )
    return plain.x, Comparison(
        row=row,
        difference=max(float(np.abs(x - expected).max()) for x in solutions),
        converged=scipy_converged and plain.converged and preconditioned.converged,
        ratio=scipy_seconds / seconds,
    )


def _best_of_three(function: Any) -> tuple[Any, float]:
    """Return the result and best time of up to three calls; a slow function is called once: noise matters less."""
    seconds: list[float] = []
    while len(seconds) < 3 and sum(seconds) < 0.3:
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


# The pictures and their story -------------------------------------------------------------------------------------

_LEAD = (
    "Knowing a picture's slopes and the colours on the rim of a region is enough to know the region: the Poisson "
    "equation puts the two together. Here it removes scratches and lettering from one photograph, pastes between "
    "others without a seam, and makes a texture repeat. Each result is the solution of a sparse system with one "
    "unknown a pixel, by Kantor's conjugate gradients."
)
_CREDITS = (
    "Chelsea the cat: Stefan van der Walt, CC0 (scikit-image).",
    "Astronaut Eileen Collins: NASA, public domain (scikit-image).",
    "Falcon 9 with DSCOVR before its launch: SpaceX, public domain (scikit-image).",
    "Hubble eXtreme Deep Field: NASA and ESA, public domain (scikit-image).",
    "Coffee on a wooden table: Rachel Michetti, courtesy of Pikolo Espresso Bar, CC0 (scikit-image).",
    "Pavilion above a lake, <code>china.jpg</code>: danielbuechele, CC BY 2.0, modified here (scikit-learn).",
    "Method: P. Pérez, M. Gangnet, A. Blake, <cite>Poisson image editing</cite>, ACM Transactions on Graphics 22(3), "
    "2003; equation numbers on this page are theirs.",
)


def _fill_holes(album: Album, photographs: dict[str, Image], scale: int) -> tuple[Section, Comparison]:
    original = photographs["cat"]
    mask = damage_mask(original.shape, scale)
    damaged = np.where(mask[..., None], 1.0, original)
    system = region_system(mask)
    x, comparison = solve_and_compare("Holes (matrix)", system.matrix, right_hand_side(system, damaged, None))
    filled = insert(system, damaged, x)
    error = 255 * np.abs(filled - original)[mask].mean()
    pictures = (
        album.add(
            "holes-before",
            damaged,
            "Damaged: scratched and written over.",
            "A cat's face, covered by two lines of white lettering and by white scratches.",
        ),
        album.add(
            "holes-mask",
            tint(original, mask),
            f"The {mask.sum():,} unknown pixels, over the original.",
            "The undamaged photograph of the cat with the damaged pixels marked in magenta.",
        ),
        album.add(
            "holes-after",
            filled,
            "Filled by the membrane.",
            "The cat's face with the damage gone: fur, eyes and "
            "whiskers continue through the former scratches and letters.",
        ),
    )
    section = Section(
        "Filling holes",
        (
            "The lettering and the scratches have destroyed some pixels; which ones is known, what was there is not. "
            "The smoothest guess is a membrane stretched over each hole and fixed at its rim: every unknown pixel is "
            "the mean of its four neighbours (equation 2).",
            '<span class="equation">|<i>N</i><sub>p</sub>| <i>f</i><sub>p</sub> &minus; &sum; <i>f</i><sub>q</sub> = '
            "&sum; <i>f</i>*<sub>q</sub> + &sum; <i>v</i><sub>pq</sub></span>",
            "This is equation 7, one row for each pixel p of the region: the first sum runs over its neighbours q that "
            "are unknown too, the second over those on the rim, where the picture <i>f</i>* is known, the third over "
            "all of them. For a membrane the guidance <i>v</i> is zero.",
            Gallery(pictures),
            f"The original is known here, so the guess can be judged: inside the holes it is off by {error:.1f} of 255 "
            "grey levels on average.",
        ),
    )
    return section, comparison


def _clone(album: Album, photographs: dict[str, Image], scale: int) -> tuple[Section, Comparison]:
    target = photographs["lake"]
    outline = [(385, 0), (372, 60), (368, 180), (345, 215), (345, 240), (362, 245), (362, 270), (405, 271), (470, 268)]
    outline = [(x // scale, y // scale) for x, y in [*outline, (465, 235), (464, 40), (440, 0)]]
    around = draw_mask(photographs["astronaut"].shape, lambda canvas: canvas.polygon(outline, fill=255))
    source = place(photographs["astronaut"], target.shape, 0, 15 // scale)
    mask = place(np.repeat(around[..., None], 3, axis=2).astype(np.float64), target.shape, 0, 15 // scale)[..., 0] > 0
    system = region_system(mask)
    b = right_hand_side(system, target, source)
    x, comparison = solve_and_compare("Clone (matrix)", system.matrix, b)
    pictures = (
        album.add(
            "clone-source",
            tint(photographs["astronaut"], around)[: 340 // scale],
            "Source, with the region drawn by hand.",
            "Portrait of an astronaut in front of a model of the space shuttle; a loose outline around the model "
            "is marked in magenta.",
        ),
        album.add(
            "clone-naive",
            np.where(mask[..., None], source, target),
            "Pasted: the studio comes along.",
            "A pavilion above a lake; beside it stands the shuttle, surrounded by a brownish patch of its own "
            "background with hard edges.",
        ),
        album.add(
            "clone-after",
            insert(system, target, x),
            "Cloned: the slopes of the source, the colours of the rim.",
            "The same scene, with the shuttle standing in the hazy sky and no visible edge around it.",
        ),
    )
    section = Section(
        "Pasting without a seam",
        (
            "A loose outline is enough. Inside it the unknown picture shall have the slopes of the source, "
            "<i>v</i><sub>pq</sub> = <i>g</i><sub>p</sub> &minus; <i>g</i><sub>q</sub> (equation 11), and on the "
            "outline the colours of the target. The difference between the two skies is spread over the region, where "
            "nobody sees it. At the upper edge of the picture the region has no rim and the slope stays free.",
            Gallery(pictures),
            Gallery(
                (
                    _convergence(
                        album,
                        system.matrix,
                        b[0],
                        "Residual norm of the red channel against iterations. "
                        "Both programs run the same method on the same matrix, so their curves coincide; an incomplete "
                        "Cholesky preconditioner (ic0) needs fewer iterations.",
                    ),
                )
            ),
        ),
    )
    return section, comparison


def _mixed(album: Album, photographs: dict[str, Image], scale: int) -> tuple[Section, Comparison]:
    target = photographs["launch"]
    galaxies = place(photographs["galaxies"], target.shape, -420 // scale, -60 // scale)
    horizon, width = 270 // scale, target.shape[1]
    mask = np.zeros(target.shape[:2], dtype=np.bool_)
    mask[1:horizon, 1:-1] = True
    # Dimmed towards the rim, most of all towards the horizon, so that no galaxy is cut in two.
    rows, columns = np.arange(target.shape[0])[:, None], np.arange(width)
    sides = np.minimum(np.minimum(columns, columns[::-1]), rows) / (20 / scale)
    source = galaxies * np.clip(np.minimum(sides, (horizon - rows) / (120 / scale)), 0.0, 1.0)[..., None]
    system = region_system(mask)
    A = Stencil((horizon - 1, width - 2))  # the same matrix as the region's: all four sides are known
    x, comparison = solve_and_compare("Mixed (stencil)", A, right_hand_side(system, target, source, mixed=True))
    imported = cg(A, right_hand_side(system, target, source), rtol=RTOL).x
    pictures = (
        album.add(
            "mixed-target",
            target,
            "The evening before a launch.",
            "A rocket on its launch pad at dusk, between lattice towers, under an empty dark blue sky.",
        ),
        album.add(
            "mixed-naive",
            np.where(mask[..., None], source, target),
            "Pasted.",
            "The upper part of the scene is "
            "replaced by a black sky full of galaxies that hides the towers and the tip of the rocket.",
        ),
        album.add(
            "mixed-imported",
            insert(system, target, imported),
            "Cloned: the towers are gone.",
            "The galaxies shine in a dark blue sky, but the towers and the rocket end where the region begins.",
        ),
        album.add(
            "mixed-after",
            insert(system, target, x),
            "Mixed gradients: the towers stand before the stars.",
            "The galaxies shine in the dark blue sky behind complete lattice towers and a complete rocket.",
        ),
    )
    section = Section(
        "Keeping the foreground",
        (
            "Imported slopes wipe out whatever the target had inside the region. Taking for each pair of pixels the "
            "larger of the two slopes (equation 13) keeps the strong edges of both pictures. Such slopes need not "
            "belong to any picture; the solution is the picture that comes nearest, in the sense of least squares.",
            "The region is a rectangle with all four sides known, so the matrix is the five-point stencil, which "
            "Kantor applies without storing it.",
            Gallery(pictures),
        ),
    )
    return section, comparison


def _tile(album: Album, photographs: dict[str, Image], scale: int) -> tuple[Section, Comparison]:
    texture = photographs["coffee"][270 // scale : 400 // scale, 470 // scale : 600 // scale]
    A, b, framed = tileable(texture)
    x, comparison = solve_and_compare("Tile (stencil)", A, b)
    seamless = framed.copy()
    seamless[1:-1, 1:-1] = np.clip(np.moveaxis(x.numpy(), 0, -1), 0.0, 1.0)
    pictures = (
        album.add(
            "tile-before",
            np.tile(texture, (2, 3, 1)),
            "A piece of table, repeated: the lamp's light breaks at every edge.",
            "Six copies of a piece of a wooden table side by side, with a visible dark and bright edge between them.",
        ),
        album.add(
            "tile-after",
            np.tile(seamless, (2, 3, 1)),
            "The same after the solve: no edge is left.",
            "Six copies of the corrected piece side by side: the grain runs on from copy to copy without an edge.",
        ),
    )
    section = Section(
        "A texture that repeats",
        (
            "Give opposite edges of a rectangle their common mean, keep the slopes inside: the result can be laid side "
            "by side. Again all four sides are known, and the system is the five-point stencil.",
            Gallery(pictures),
        ),
    )
    return section, comparison


def _convergence(album: Album, A: CSR, b: torch.Tensor, caption: str) -> Picture:
    """Residuals of one right-hand side (n,) with SciPy, Kantor, and Kantor with ic0, for light and dark pages."""
    import matplotlib
    import scipy.sparse.linalg

    from kantor.plotting import new_axes, plot_convergence, save_figure

    matrix, column = A.to_scipy(), b.numpy()
    expected = [float(np.linalg.norm(column))]
    scipy.sparse.linalg.cg(
        matrix,
        column,
        rtol=RTOL,
        callback=lambda x: expected.append(float(np.linalg.norm(column - matrix @ x))),
    )
    plain = cg(A, b, rtol=RTOL).history
    preconditioned = cg(A, b, M=ic0(A), rtol=RTOL).history
    for version, ink, ground, colours in (
        ("light", "#1d1f21", "#fdfcfa", ("#6b7075", "#0b5c8a", "#b3541e")),
        ("dark", "#e6e4df", "#15171a", ("#8f959b", "#7cc0ea", "#f0a56b")),
    ):
        style: dict[Any, Any] = {"figure.facecolor": ground, "axes.facecolor": ground}
        style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink)
        with matplotlib.rc_context(style):
            ax = new_axes(5.4, 3.4)
            ax.plot(expected, color=colours[0], linewidth=5, solid_capstyle="round")
            plot_convergence(plain, ax, color=colours[1])
            plot_convergence(preconditioned, ax, color=colours[2], tolerance=RTOL * expected[0])
            labels = (
                (0.50, expected, "SciPy cg (wide grey line)", colours[0], (8, 22)),
                (0.70, plain.residual_norms, "Kantor cg", colours[1], (8, 14)),
                (0.60, preconditioned.residual_norms, "Kantor cg with ic0", colours[2], (8, 10)),
            )
            for share, residuals, text, colour, offset in labels:
                at = int(share * (len(residuals) - 1))
                ax.annotate(text, (at, residuals[at]), offset, textcoords="offset points", color=colour)
            save_figure(ax, album.folder / f"convergence-{version}.png")
    light, dark = (f"{album.folder.name}/convergence-{version}.png" for version in ("light", "dark"))
    alt = (
        "Line plot, residual norm on a logarithmic axis against iterations: the curves of SciPy and Kantor lie on "
        f"each other and end after {len(expected) - 1} iterations, Kantor with ic0 ends after "
        f"{int(preconditioned.iterations[-1])}."
    )
    return Picture(light, alt, caption, 1080, 680, dark)


def run(folder: Path, size: Literal["small", "full"] = "full") -> StationReport:
    """Run the station: pictures into ``folder / "poisson_editing"``, and the report for the page and the terminal.

    Parameters
    ----------
    folder : Path
        The demo's folder.
    size : {"small", "full"}
        ``"full"`` uses the photographs as they are, ``"small"`` shrinks them to a third of their width.

    Raises
    ------
    ImportError
        scikit-image, scikit-learn or matplotlib is missing.
    """
    start = time.perf_counter()
    scale = 1 if size == "full" else 3
    photographs = load_photographs(scale)
    album = Album(folder, "poisson_editing")
    cg(Stencil((64, 64)), torch.ones(3, 64, 64, dtype=torch.float64))  # the first parallel region starts the threads
    solved = [
        _fill_holes(album, photographs, scale),
        _clone(album, photographs, scale),
        _mixed(album, photographs, scale),
        _tile(album, photographs, scale),
    ]
    comparisons = [comparison for _, comparison in solved]
    table = Table(
        caption="Conjugate gradients: iterations / seconds beside SciPy's",
        header=("System", "Unknowns", "SciPy", "Kantor", "Kantor with ic0", "Ratio"),
        rows=tuple(comparison.row for comparison in comparisons),
        numeric=frozenset(range(1, 6)),
        note=f"Three colour channels, relative residual {RTOL:g}, float64, {torch.get_num_threads()} CPU thread(s), "
        "best of up to three runs. Kantor solves the channels as one batch; SciPy's cg takes one right-hand side, so "
        "it solves one after the other, on the same matrix. Iterations are those of the slowest channel; the ratio is "
        "SciPy's time over Kantor's, both without preconditioner; the time with ic0 includes the factorisation.",
    )
    levels = 255 * max(comparison.difference for comparison in comparisons)
    checks = (
        Check("Every system converged", all(c.converged for c in comparisons), f"to a relative residual of {RTOL:g}"),
        Check("Kantor and SciPy agree", levels < 0.5, f"largest difference of a pixel {levels:.2g} of 255 grey levels"),
    )
    figures = Section("What it cost", (table,))
    return StationReport(
        name="poisson_editing",
        title=TITLE,
        lead=_LEAD,
        sections=(*(section for section, _ in solved), figures),
        table=table,
        checks=checks,
        seconds=time.perf_counter() - start,
        credits=_CREDITS,
        finding=Finding(
            f"Four sparse systems with an unknown a pixel, {', '.join(c.row[1] for c in comparisons)} unknowns.",
            "SciPy's conjugate gradients on the same matrices, to the same residual.",
            f"SciPy takes {between(c.ratio for c in comparisons)} times as long as Kantor.",
        ),
    )
