"""Plots of results. matplotlib is imported on first use only; it comes with the extra ``demo``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from numpy.typing import NDArray
    from torch import Tensor

_LINES = 1000  # of a plan that a picture shows before it is a blot
_ARROWS = 24  # along an edge of an image


class ConvergenceHistory(Protocol):
    """What :func:`plot_convergence` reads: the ``history`` of every iterative result of Kantor."""

    @property
    def iterations(self) -> NDArray[Any]:
        """Iteration numbers, shape (m,)."""

    @property
    def residual_norms(self) -> NDArray[Any]:
        """Residual norms at these iterations, shape (m,), or (m, batch) for a batch of right-hand sides."""


def new_axes(width: float = 6.4, height: float = 3.8, projection: str | None = None) -> Axes:
    """Axes of a new figure (inches), without pyplot's global state so that it works without a display.

    Parameters
    ----------
    width, height : float
        Of the figure, inches.
    projection : str, optional
        ``"3d"`` for axes of three dimensions.

    Raises
    ------
    ImportError
        matplotlib is missing; the message names the extra to install.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plotting needs matplotlib: pip install "kantor[demo]"') from error
    axes: Axes = Figure(figsize=(width, height), dpi=200, layout="constrained").add_subplot(projection=projection)
    return axes


def axes_or_new(ax: Axes | None, width: float = 6.4, height: float = 3.8) -> Axes:
    """Return `ax`, or new axes of that size (inches) where it is None.

    Raises
    ------
    TypeError
        A name of a file, or anything else that cannot be drawn into.
    ImportError
        matplotlib is missing.
    """
    if ax is None:
        return new_axes(width, height)
    if not hasattr(ax, "plot") or not hasattr(ax, "set_xlabel"):
        raise TypeError(
            f"plot: ax: expected matplotlib axes, got {type(ax).__name__}; to write a file call "
            "kantor.plotting.save_figure(result.plot(), path)"
        )
    return ax


def save_figure(ax: Axes, path: str | Path) -> None:
    """Write the figure that ``ax`` belongs to; the suffix of ``path`` chooses the format."""
    figure: Any = ax.figure  # axes of a subfigure would have no savefig; new_axes makes none
    figure.savefig(path)


def plot_convergence(
    history: ConvergenceHistory,
    ax: Axes | None = None,
    label: str | None = None,
    tolerance: float | None = None,
    **line: Any,
) -> Axes:
    """Draw residual norms against iterations on a logarithmic scale.

    Residuals that are zero or not finite have no place on a logarithmic axis and are left out.

    Parameters
    ----------
    history : ConvergenceHistory
        Iteration numbers (m,) and residual norms (m,) or (m, batch); a batch gives one line each.
    ax : matplotlib Axes, optional
        Axes to draw into, so that several runs can share a plot; a new figure when None.
    label : str, optional
        Written at the end of the line in its colour, in place of a legend.
    tolerance : float, optional
        Residual at which the run may stop, drawn as a dotted line.
    **line
        Passed to ``Axes.plot`` (colour, width, dashes).

    Returns
    -------
    matplotlib Axes
        ``save_figure(ax, path)`` writes the picture.

    Raises
    ------
    ImportError
        matplotlib is missing.
    ValueError
        The two arrays of the history do not match.
    """
    iterations = np.asarray(history.iterations)
    residuals = np.asarray(history.residual_norms, dtype=np.float64)
    if iterations.ndim != 1 or residuals.ndim not in (1, 2) or residuals.shape[0] != iterations.shape[0]:
        raise ValueError(
            "plot_convergence: history.residual_norms must have shape (m,) or (m, batch) with m = "
            f"len(history.iterations), got {residuals.shape} for {iterations.shape}"
        )
    ax = axes_or_new(ax)
    residuals = np.where(np.isfinite(residuals) & (residuals > 0), residuals, np.nan)
    lines = ax.plot(iterations, residuals, **{"linewidth": 1.8, "solid_capstyle": "round", **line})
    first = residuals.reshape(len(iterations), -1)[:, 0] if residuals.size else np.empty(0)
    drawn = np.flatnonzero(np.isfinite(first))
    if label is not None and drawn.size:
        ax.annotate(
            label,
            xy=(iterations[drawn[-1]], first[drawn[-1]]),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=lines[0].get_color(),
            annotation_clip=False,
        )
    if tolerance is not None and tolerance > 0:
        ax.axhline(tolerance, color="0.5", linewidth=1.0, linestyle=":")
        ax.annotate(
            "tolerance",
            xy=(0.0, tolerance),
            xycoords=("axes fraction", "data"),
            xytext=(4, 3),
            textcoords="offset points",
            color="0.45",
            fontsize="small",
        )
    ax.set_yscale("log")
    ax.set_xlabel("iteration")
    ax.set_ylabel("residual norm")
    ax.grid(visible=True, which="major", color="0.5", alpha=0.25, linewidth=0.8)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def plot_minimization(
    history: Mapping[str, np.ndarray[Any, Any]],
    *,
    ax: Axes | None = None,
    label: str | None = None,
    tolerance: float | None = None,
    against: str = "work",
) -> Axes:
    """Draw how a minimisation went: gradient norm, and value above the smallest one seen (dashed), on a log scale.

    Parameters
    ----------
    history : mapping
        ``OptimizeResult.history``; of a batch the first problem is drawn.
    ax : Axes, optional
        Where to draw.
    label : str, optional
        Name at the end of the curve.
    tolerance : float, optional
        Drawn as a horizontal line.
    against : "work", "seconds" or "points"
        The horizontal axis; work counts gradient equivalents: evaluations, and two for a Hessian-vector product.

    Raises
    ------
    ValueError
        Another word for `against`.
    """
    axes = {
        "work": ("gradient equivalents", history["n_grad"] + 2 * history["n_hvp"]),
        "seconds": ("seconds", history["seconds"]),
        "points": ("points", np.arange(history["seconds"].shape[-1])),
    }
    if against not in axes:
        raise ValueError(f"plot_minimization: against: expected 'work', 'seconds' or 'points', got {against!r}")
    name, horizontal = axes[against]
    ax = axes_or_new(ax)
    norms, values = (np.atleast_2d(history[key])[0] for key in ("grad_norm", "fun"))
    above = values - values.min(initial=np.inf)
    positive = (np.where(np.isfinite(v) & (v > 0), v, np.nan) for v in (norms, above))
    (line,) = ax.plot(horizontal, next(positive), linewidth=1.8)
    ax.plot(horizontal, next(positive), linewidth=1.0, linestyle="--", color=line.get_color(), alpha=0.7)
    if label is not None and len(norms):
        ax.annotate(
            label,
            xy=(horizontal[-1], max(norms[-1], 1e-300)),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=line.get_color(),
            annotation_clip=False,
        )
    if tolerance is not None and tolerance > 0:
        ax.axhline(tolerance, color="0.5", linewidth=1.0, linestyle=":")
    ax.set_yscale("log")
    ax.set_xlabel(name)
    ax.set_ylabel("gradient norm; dashed: value")
    ax.grid(visible=True, which="major", color="0.5", alpha=0.25, linewidth=0.8)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def plot_transport(
    history: Mapping[str, np.ndarray[Any, Any]],
    *,
    ax: Axes | None = None,
    label: str | None = None,
    tolerance: float | None = None,
    against: str = "seconds",
    **line: Any,
) -> Axes:
    """Draw how a transport solve went: the marginal error on a log scale, with a mark where the regularisation changes.

    The error jumps up at a mark: a plan that meets its marginals at one regularisation misses them at the next.

    Parameters
    ----------
    history : mapping
        ``TransportResult.history``: ``marginal_error``, ``seconds``, ``reg``, one entry a step.
    ax : Axes, optional
        Where to draw, so that several runs can share a plot.
    label : str, optional
        Name at the end of the curve.
    tolerance : float, optional
        Drawn as a horizontal line.
    against : "seconds" or "steps"
        The horizontal axis.
    **line
        Passed to ``Axes.plot`` (colour, width, dashes).

    Raises
    ------
    ImportError
        matplotlib is missing.
    ValueError
        Another word for `against`; a history without these entries, as that of a traced solve.
    """
    if missing := [name for name in ("marginal_error", "seconds", "reg") if name not in history]:
        raise ValueError(
            f"plot_transport: history: expected an entry {missing[0]!r}, got {sorted(history)}; a solve inside "
            "torch.compile, export or vmap records none"
        )
    errors, reg = (np.asarray(history[name], dtype=np.float64) for name in ("marginal_error", "reg"))
    axes = {"seconds": ("seconds", history["seconds"]), "steps": ("step", np.arange(1, len(errors) + 1))}
    if against not in axes:
        raise ValueError(f"plot_transport: against: expected 'seconds' or 'steps', got {against!r}")
    name, horizontal = axes[against]
    ax = axes_or_new(ax)
    errors = np.where(np.isfinite(errors) & (errors > 0), errors, np.nan)
    (drawn,) = ax.plot(horizontal, errors, **{"linewidth": 1.8, "solid_capstyle": "round", **line})
    changes = 1 + np.flatnonzero(np.diff(reg))
    if changes.size:
        ax.plot(
            horizontal[changes],
            errors[changes],
            color=drawn.get_color(),  # without it the next curve would skip a colour
            linestyle="none",
            marker="o",
            markersize=4.5,
            markerfacecolor=ax.get_facecolor(),
        )
    last = np.flatnonzero(np.isfinite(errors))
    if label is not None and last.size:
        ax.annotate(
            label,
            xy=(horizontal[last[-1]], errors[last[-1]]),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=drawn.get_color(),
            annotation_clip=False,
        )
    if tolerance is not None and tolerance > 0:
        ax.axhline(tolerance, color="0.5", linewidth=1.0, linestyle=":")
    ax.set_yscale("log")
    ax.set_xlabel(name)
    if changes.size or not ax.get_ylabel():  # another curve of these axes may have marks
        ax.set_ylabel("marginal error; marks: reg changes" if changes.size else "marginal error")
    ax.grid(visible=True, which="major", color="0.5", alpha=0.25, linewidth=0.8)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def plot_displacement(
    X: Tensor,
    Y: Tensor,
    plan_sparse: Tensor,
    ax: Axes | None = None,
    *,
    lines: int = _LINES,
) -> Axes:
    """Draw where a plan sends points: sources, their images under the barycentric map, and the heaviest moves.

    Parameters
    ----------
    X, Y : Tensor (n, d), (m, d)
        Sources and targets, d = 2 or 3.
    plan_sparse : Tensor
        The plan (n, m), sparse CSR, from ``TransportResult.plan_sparse()``. Rows without mass have no image.
    ax : Axes, optional
        Where to draw; of projection "3d" for d = 3.
    lines : int
        How many entries of the plan, the largest, are drawn as lines from source to target; the heavier the darker.

    Raises
    ------
    ImportError
        matplotlib is missing.
    ValueError
        Shapes that do not match, points of another dimension, axes that do not fit it.
    TypeError
        A plan that is not sparse CSR.

    Examples
    --------
    >>> import torch, kantor
    >>> from kantor.plotting import plot_displacement
    >>> X = torch.rand(20, 2, generator=torch.Generator().manual_seed(0))
    >>> result = kantor.transport.solve_sample(X, X + 1, reg=1e-2)
    >>> ax = plot_displacement(X, X + 1, result.plan_sparse())
    >>> ax.get_aspect()
    1.0
    """
    sources, targets = (np.asarray(t.detach().cpu(), dtype=np.float64) for t in (X, Y))
    if sources.ndim != 2 or targets.ndim != 2 or sources.shape[1] != targets.shape[1]:
        raise ValueError(
            f"plot_displacement: X and Y: expected shapes (n, d) and (m, d), got {sources.shape} and {targets.shape}"
        )
    flat = sources.shape[1] == 2
    if sources.shape[1] not in (2, 3):
        raise ValueError(
            f"plot_displacement: X: expected points in 2 or 3 dimensions, got {sources.shape[1]}; choose some columns"
        )
    rows, columns, mass = _entries(plan_sparse, (len(sources), len(targets)))
    if ax is None:
        ax = new_axes(5.4, 5.0, None if flat else "3d")
    elif (ax.name == "3d") is flat:
        raise ValueError(f"plot_displacement: ax: expected axes for {2 if flat else 3} dimensions, got {ax.name!r}")
    weights = np.bincount(rows, mass, len(sources))
    sums = np.stack([np.bincount(rows, mass * targets[columns, k], len(sources)) for k in range(targets.shape[1])], 1)
    images = sums[weights > 0] / weights[weights > 0, None]

    heaviest = np.argsort(-mass, kind="stable")[: max(0, lines)]
    if heaviest.size:
        from matplotlib import collections
        from mpl_toolkits.mplot3d import art3d

        kind: Any = collections.LineCollection if flat else art3d.Line3DCollection
        segments = np.stack([sources[rows[heaviest]], targets[columns[heaviest]]], 1)
        colours = np.tile([0.45, 0.45, 0.45, 1.0], (len(heaviest), 1))
        colours[:, 3] = np.clip(0.7 * mass[heaviest] / mass[heaviest[0]], 0.03, 0.7)
        moves: Any = ax  # Axes3D takes a third coordinate everywhere
        moves.add_collection(kind(segments, colors=colours, linewidths=0.7, zorder=1))
    size = float(np.clip(2000 / max(len(sources), 1), 2, 18))
    for points, colour, name in ((sources, "#b3541e", "source"), (images, "#0b5c8a", "image")):
        ax.scatter(*points.T, s=size, color=colour, linewidths=0, label=name, zorder=2)  # type: ignore[misc]
    ax.autoscale_view()
    ax.set_aspect("equal")
    ax.legend(frameon=False, loc="upper right", markerscale=max(1.0, 3 / size**0.5))
    if flat:
        ax.spines[["top", "right"]].set_visible(False)
    return ax


def _entries(plan: Tensor, shape: tuple[int, int]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Rows, columns and masses of a torch CSR matrix of this shape."""
    if not hasattr(plan, "crow_indices") or str(getattr(plan, "layout", "")) != "torch.sparse_csr":
        got = getattr(plan, "layout", type(plan).__name__)
        raise TypeError(f"plot_displacement: plan_sparse: expected a torch sparse CSR matrix, got {got}")
    if tuple(plan.shape) != shape:
        raise ValueError(f"plot_displacement: plan_sparse: expected shape {shape}, got {tuple(plan.shape)}")
    crow, columns, mass = (
        np.asarray(t.detach().cpu()) for t in (plan.crow_indices(), plan.col_indices(), plan.values())
    )
    return np.repeat(np.arange(shape[0]), np.diff(crow)), columns, mass.astype(np.float64)


def plot_displacement_field(
    picture: NDArray[Any], positions: NDArray[Any], images: NDArray[Any], ax: Axes | None = None
) -> Axes:
    """Draw a gray picture and arrows from some of its pixels to where their mass goes.

    Parameters
    ----------
    picture : array (h, w)
        Gray values; also how much mass a place has: dark places send no arrow.
    positions, images : array (k, 2)
        Rows and columns in the picture: centres of cells in row-major order or any other, and where they go. NaN for
        those that go nowhere.
    ax : Axes, optional
        Where to draw.

    Raises
    ------
    ImportError
        matplotlib is missing.
    ValueError
        Shapes that do not match.
    """
    picture, positions, images = (np.asarray(array, dtype=np.float64) for array in (picture, positions, images))
    if picture.ndim != 2 or positions.ndim != 2 or positions.shape[1] != 2 or images.shape != positions.shape:
        raise ValueError(
            "plot_displacement_field: expected a picture (h, w), positions and images (k, 2), got "
            f"{picture.shape}, {positions.shape} and {images.shape}"
        )
    ax = axes_or_new(ax, 5.4, 5.4 * picture.shape[0] / picture.shape[1] + 0.2)
    ax.imshow(picture, cmap="gray", vmin=0, alpha=0.75)
    # One arrow from each square of a coarse grid: its heaviest cell.
    edge = max(picture.shape) / _ARROWS
    rows, columns = positions[:, 0], positions[:, 1]
    at = tuple(
        np.clip(np.rint(t).astype(int), 0, size - 1) for t, size in zip((rows, columns), picture.shape, strict=True)
    )
    mass = np.where(np.isfinite(images).all(1), picture[at], 0.0)
    square = (rows // edge).astype(int) * (_ARROWS + 1) + (columns // edge).astype(int)
    order = np.lexsort((-mass, square))
    first = order[np.unique(square[order], return_index=True)[1]]
    first = first[mass[first] > 0.02 * mass.max(initial=0.0)]
    down, right = (images - positions)[first].T
    ax.quiver(
        columns[first],
        rows[first],
        right,
        down,
        angles="xy",
        scale_units="xy",
        scale=1.0,
        color="#e07b39",
        width=0.004,
        headwidth=3.5,
    )
    ax.set_axis_off()
    return ax
