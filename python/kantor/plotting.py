"""Plots of results. matplotlib is imported on first use only; it comes with the extra ``demo``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from numpy.typing import NDArray


class ConvergenceHistory(Protocol):
    """What :func:`plot_convergence` reads: the ``history`` of every iterative result of Kantor."""

    @property
    def iterations(self) -> NDArray[Any]:
        """Iteration numbers, shape (m,)."""

    @property
    def residual_norms(self) -> NDArray[Any]:
        """Residual norms at these iterations, shape (m,), or (m, batch) for a batch of right-hand sides."""


def new_axes(width: float = 6.4, height: float = 3.8) -> Axes:
    """Axes of a new figure (inches), without pyplot's global state so that it works without a display.

    Raises
    ------
    ImportError
        matplotlib is missing; the message names the extra to install.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plotting needs matplotlib: pip install "kantor[demo]"') from error
    axes: Axes = Figure(figsize=(width, height), dpi=200, layout="constrained").add_subplot()
    return axes


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
    ax = new_axes() if ax is None else ax
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
    ax = new_axes() if ax is None else ax
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
